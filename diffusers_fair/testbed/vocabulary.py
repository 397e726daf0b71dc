"""Text models that were trained on few words, stored without the embeddings of all other tokens.

During training, a text model has a token table of only k rows, one for each token that occurs;
`table_rows` maps CLIP's token ids to rows. The file holds the k rows and their token ids. `unpack`
puts the rows back into a table of CLIP's whole vocabulary.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SEED = 20261123
_TABLE = "token_embedding.weight"  # end of the table's name in every CLIP
_IDS = "token_ids"  # key in the file


def table_rows(used: Tensor, ids: Tensor) -> Tensor:
    """Map token ids (...) to rows of the small table; `used` (k,) holds its sorted token ids."""
    return torch.searchsorted(used, ids)


def pack(
    model: nn.Module, used: Tensor, file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a model as float16 safetensors, with the token ids of its small table.

    Args:
        model: text model with one token table of k rows.
        used: sorted token ids of the rows, (k,).
        file: file to write.
        metadata: texts to store with the weights.
    """
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    assert len(state[_table(state)]) == len(used)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state | {_IDS: used.to(torch.int32)}, file, metadata)


def unpack(file: Path, vocabulary: int, std: float = 0.02, seed: int = SEED) -> dict[str, Tensor]:
    """Read a file of `pack` as float32 weights, with a token table of the whole vocabulary.

    Args:
        file: file to read.
        vocabulary: number of rows of the whole table.
        std: standard deviation of the rows of all other tokens, as at initialisation.
        seed: random seed of those rows.
    """
    state = load_file(file)
    used = state.pop(_IDS).long()
    state = {name: value.float() for name, value in state.items()}
    name = _table(state)
    noise = torch.Generator().manual_seed(seed)
    table = torch.randn(vocabulary, state[name].shape[1], generator=noise) * std
    state[name] = table.index_copy_(0, used, state[name])
    return state


def _table(state: dict[str, Tensor]) -> str:
    """Find the name of the token table."""
    (name,) = (name for name in state if name.endswith(_TABLE))
    return name
