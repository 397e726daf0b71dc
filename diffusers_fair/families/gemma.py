"""What Sana and Lumina 2 share: Gemma reads the prompt, and its padding is masked."""

from collections.abc import Sequence
from typing import Any

from diffusers_fair.families.base import TransformerFamily, encoder_of, execution_device
from diffusers_fair.families.conditioning import Conditioning


class GemmaFamily(TransformerFamily):
    """Families whose pipelines put instructions before prompts, but not before negative prompts."""

    def encode(self, pipe: Any, prompts: Sequence[str], *, prefix: bool = True) -> Conditioning:
        """Encode prompts by the pipeline's own method: tokens (n, L, d) and their mask (n, L)."""
        encode = encoder_of(pipe, self.encode_method, prefix=prefix)
        texts = list(prompts)
        found = encode(
            texts,
            not prefix,
            negative_prompt=texts,
            device=execution_device(pipe),
            **self.encode_options(pipe),
        )
        embeddings, mask = found[:2] if prefix else found[2:]
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def encode_options(self, pipe: Any) -> dict[str, Any]:
        """Return further arguments with which the pipeline's call encodes prompts."""
        return {}
