"""A few held-out pictures of the testbed with their labels, shared by tests."""

import io
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

FILE = Path(__file__).parents[2] / "examples" / "testbed" / "portraits64.parquet"


@cache
def held_out(kind: str, count: int) -> tuple[Tensor, dict[str, np.ndarray]]:
    """The first `count` test pictures of a kind, (n, 3, 64, 64) in [-1, 1], and their labels."""
    test = (pc.field("kind") == kind) & (pc.field("split") == "test")
    table = pq.read_table(FILE, filters=test).slice(0, count)
    pictures = [np.asarray(Image.open(io.BytesIO(x.as_py()))) for x in table["image"]]
    labels = {
        name: np.array(table[name].to_pylist())
        for name in table.column_names
        if name != "image" and table[name].null_count == 0
    }
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1, labels
