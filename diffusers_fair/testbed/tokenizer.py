"""CLIP's tokenizer, from files that ship with the testbed."""

from functools import cache
from pathlib import Path

from transformers import CLIPTokenizer

FOLDER = Path(__file__).parent / "weights" / "tokenizer"


@cache
def tokenizer() -> CLIPTokenizer:
    """Load the tokenizer of Stable Diffusion 1.x: start 49406, end and padding 49407, 77 tokens."""
    return CLIPTokenizer.from_pretrained(FOLDER)
