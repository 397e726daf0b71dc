"""Models that were trained on few words, shipped without the embeddings of all other words.

While training, a text model has a token table of k rows only, one for each token that occurs;
`rows` turns CLIP's token numbers into rows. The file holds those k rows and their numbers;
`unpack` puts them back into a table of CLIP's whole vocabulary.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SEED = 20261123
TABLE = "token_embedding.weight"  # how the name of the table ends in every CLIP
IDS = "token_ids"  # key in the file


def rows(used: Tensor, ids: Tensor) -> Tensor:
    """Token numbers (...), all of them in `used` (k,), sorted -> rows of the small table."""
    return torch.searchsorted(used, ids)


def pack(
    model: nn.Module, used: Tensor, file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a model as float16 safetensors, with the numbers of the tokens in its small table.

    Args:
        model: holds one token table of k rows.
        used: (k,) sorted token numbers of the rows.
        file: to write.
        metadata: texts to keep beside the weights.
    """
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    assert len(state[_table(state)]) == len(used)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state | {IDS: used.to(torch.int32)}, file, metadata)


def unpack(file: Path, vocabulary: int, std: float = 0.02, seed: int = SEED) -> dict[str, Tensor]:
    """Read what `pack` wrote as float32, with a token table of the whole vocabulary.

    Args:
        file: written by `pack`.
        vocabulary: rows of the whole table.
        std: standard deviation of the rows of tokens it never saw, as at initialisation.
        seed: of those rows; the same seed gives the same table.
    """
    state = load_file(file)
    used = state.pop(IDS).long()
    state = {name: value.float() for name, value in state.items()}
    name = _table(state)
    noise = torch.Generator().manual_seed(seed)
    table = torch.randn(vocabulary, state[name].shape[1], generator=noise) * std
    state[name] = table.index_copy_(0, used, state[name])
    return state


def _table(state: dict[str, Tensor]) -> str:
    """Name of the one token table."""
    (name,) = (name for name in state if name.endswith(TABLE))
    return name
