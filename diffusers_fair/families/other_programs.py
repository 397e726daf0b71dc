"""What programs other than diffusers call the layers and models of each family, and what they read.

Layers have the names that kohya's sd-scripts give them. Those of transformers have the names that
OneTrainer gives them, as sd-scripts fuses layers that diffusers keeps apart.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from diffusers_fair.families.flux import FLUX
from diffusers_fair.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_fair.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from diffusers_fair.families.stable_diffusion_xl import STABLE_DIFFUSION_XL

_SD2_WIDTH = 1024  # of the prompt embeddings of Stable Diffusion 2
_READS_EMBEDDINGS = (".self_attn.q_proj.lora_A.weight", ".attn2.to_k.lora_A.weight")
_LAYERS_PER_BLOCK = 2  # of Stable Diffusion XL's U-Net
_BLOCK = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?attentions\.(\d+)\.")

# ---- layers --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of a family's layers."""

    prefixes: Mapping[str, str]
    """Component -> prefix of the names of its layers."""
    original: Callable[[str], str] = str
    """Name of a layer in diffusers -> its name in the model as first published."""


def original_unet_layer(name: str) -> str:
    """Return the name that a layer of the U-Net has in the original Stable Diffusion XL.

    `down_blocks.1.attentions.0.proj_in` is `input_blocks.4.1.proj_in`: the blocks are counted
    through, and each consists of a residual layer, 0, and attention, 1.
    """
    match = _BLOCK.match(name)
    if match is None:
        return name
    kind, level, index = match[1], int(match[2] or 0), int(match[3])
    number = level * (_LAYERS_PER_BLOCK + 1) + index
    block = {
        "down": f"input_blocks.{number + 1}",  # the first is the convolution before them
        "mid": "middle_block",
        "up": f"output_blocks.{number}",
    }[kind]
    return f"{block}.1.{name[match.end() :]}"


LAYOUTS: Mapping[str, Layout] = {
    STABLE_DIFFUSION.name: Layout(prefixes={"text_encoder": "lora_te_", "unet": "lora_unet_"}),
    STABLE_DIFFUSION_XL.name: Layout(
        prefixes={
            "text_encoder": "lora_te1_",
            "text_encoder_2": "lora_te2_",
            "unet": "lora_unet_",
        },
        original=original_unet_layer,
    ),
    STABLE_DIFFUSION_3.name: Layout(
        prefixes={
            "text_encoder": "lora_te1_",
            "text_encoder_2": "lora_te2_",
            "transformer": "lora_transformer_",
        }
    ),
    FLUX.name: Layout(
        prefixes={"text_encoder": "lora_te1_", "transformer": "lora_transformer_"},
    ),
}
"""Name of a family -> names of its layers."""


def layer_name(family: str, layer: str) -> str:
    """Return the name of a layer in other programs.

    Args:
        family: name of a family in `LAYOUTS`.
        layer: the layer's key in an adapter, such as `unet.mid_block.attentions.0.proj_in`.

    Raises:
        ValueError: the layer is in a component that adapters of this family do not have.
    """
    component, _, name = layer.partition(".")
    layout = LAYOUTS[family]
    if component not in layout.prefixes:
        raise ValueError(
            f"an adapter for {family} has layers in {' or '.join(layout.prefixes)}, got '{layer}': "
            "if the adapter is for another model, save it with this version of diffusers-fair, "
            "which records the family"
        )
    return layout.prefixes[component] + layout.original(name).replace(".", "_")


# ---- base models ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseNames:
    """Names of the kind of base model in a file's metadata."""

    architecture: str
    """`modelspec.architecture`, without the kind of the file."""
    version: str
    """`ss_base_model_version`."""


def base_names(family: str, base_model: str, weights: Mapping[str, Tensor]) -> BaseNames:
    """Return the names of an adapter's kind of base model.

    Args:
        family: name of a family in `LAYOUTS`.
        base_model: id of the base model.
        weights: weights of the adapter, which tell Stable Diffusion 1 and 2 apart by their widths.
    """
    id_ = base_model.lower()
    if family == STABLE_DIFFUSION_XL.name:
        return BaseNames("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")
    if family == STABLE_DIFFUSION_3.name:
        return BaseNames("stable-diffusion-3", "sd3")
    if family == FLUX.name:
        return BaseNames("flux-1-schnell" if "schnell" in id_ else "flux-1-dev", "flux1")
    if any(_embedding_width(key, x) == _SD2_WIDTH for key, x in weights.items()):
        resolution = "512" if id_.endswith("base") else "768-v"
        return BaseNames(f"stable-diffusion-v2-{resolution}", "sd_v2")
    return BaseNames("stable-diffusion-v1", "sd_v1")


def _embedding_width(key: str, tensor: Tensor) -> int | None:
    """Width of the prompt embeddings, if a weight of Stable Diffusion's adapter tells it."""
    tells = key.startswith("<") or key.endswith(_READS_EMBEDDINGS)
    return tensor.shape[1] if tells else None


# ---- programs ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program that generates images, and what it reads."""

    title: str
    lora: tuple[str, ...]
    """Names of the families for which it reads LoRA layers."""
    soft_tokens: tuple[str, ...] = (STABLE_DIFFUSION.name,)
    """Names of the families for which it reads soft tokens."""
    use_lora: str
    """How to use a LoRA file; `{name}` is its name without the ending."""
    use_soft_tokens: str
    """How to use a file of soft tokens."""


PROGRAMS: Mapping[str, Program] = {
    "comfyui": Program(
        title="ComfyUI",
        lora=tuple(LAYOUTS),
        use_lora="put the file in `models/loras` and select it in a Load LoRA node, with strength "
        "1 for model and clip",
        use_soft_tokens="put the file in `models/embeddings` and type `embedding:{name}` once "
        "before each prompt",
    ),
    "a1111": Program(
        title="A1111 and Forge",
        lora=(STABLE_DIFFUSION.name, STABLE_DIFFUSION_XL.name),
        use_lora="put the file in `models/Lora` and type `<lora:{name}:1>` in each prompt",
        use_soft_tokens="put the file in `embeddings` and type `{name}` once before each prompt",
    ),
    "kohya": Program(
        title="kohya's sd-scripts",
        lora=(STABLE_DIFFUSION.name, STABLE_DIFFUSION_XL.name),
        use_lora="pass `--network_module networks.lora --network_weights {name}.safetensors` to "
        "`gen_img.py`, or `--network_weights` to training",
        use_soft_tokens="pass `--textual_inversion_embeddings {name}.safetensors` to `gen_img.py` "
        "and type `{name}` once before each prompt",
    ),
    "invokeai": Program(
        title="InvokeAI",
        lora=(STABLE_DIFFUSION.name, STABLE_DIFFUSION_XL.name, FLUX.name),
        use_lora="install the file in the model manager and add it to the generation as a LoRA, "
        "with weight 1",
        use_soft_tokens="install the file in the model manager and type `<{name}>` once before "
        "each prompt",
    ),
}
"""Name in commands -> program."""
