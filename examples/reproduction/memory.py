"""Compute the memory that a training step takes in each family, without a GPU and without weights.

    python examples/reproduction/memory.py --out model_cards/memory

The models have the configurations of the public ones, in bfloat16, and fake tensors, which have a size
but no data; attention is fused. Peaks are the sizes of all tensors that are alive at the same time, without the
weights. A GPU takes more: the allocator rounds up, libraries need workspace, and the CUDA context about
half a gigabyte. Writes memory.md and memory.json.
"""

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from diffusers_fair.families.base import Family
from diffusers_fair.families.flux import FLUX
from diffusers_fair.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_fair.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from diffusers_fair.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from diffusers_fair.provenance import provenance

GB = 1e9
RANK = 16
SIZES = (512, 1024)  # pixels


def unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=64, **config)


def sdxl_unet() -> UNet2DConditionModel:
    return unet(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sd35_medium() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=384,
        qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    )


def clip(width: int, layers: int, heads: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
        )
    )


def t5_xxl() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )


def decoder(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        sample_size=512,
    )


def clip_l() -> CLIPTextModel:
    return clip(768, 12, 12)


def clip_g() -> CLIPTextModel:
    return clip(1280, 32, 20)


# name -> family, denoiser, text encoders, latent channels, conditioning of one image
MODELS: dict[str, tuple[Family, Callable[[], nn.Module], tuple, int, dict[str, tuple]]] = {
    "Stable Diffusion 1.5": (
        STABLE_DIFFUSION,
        lambda: unet(cross_attention_dim=768),
        (clip_l,),
        4,
        {"encoder_hidden_states": (77, 768)},
    ),
    "SDXL": (
        STABLE_DIFFUSION_XL,
        sdxl_unet,
        (clip_l, clip_g),
        4,
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
    ),
    "Stable Diffusion 3.5 medium": (
        STABLE_DIFFUSION_3,
        sd35_medium,
        (clip_l, clip_g, t5_xxl),
        16,
        {"encoder_hidden_states": (77 + 256, 4096), "pooled_projections": (2048,)},
    ),
    "FLUX.1 dev": (
        FLUX,
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        (clip_l, t5_xxl),
        16,
        {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,), "guidance": ()},
    ),
}


def frozen(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a model of bfloat16 weights."""
    torch.set_default_dtype(torch.bfloat16)  # fake weights cannot be converted
    try:
        return make().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def weights_of(model: nn.Module) -> float:
    """Return the size of the weights in GB."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / GB


class Adapted(nn.Module):
    """A layer with LoRA in float32; peft converts weights, which fake ones do not support."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x.float())).to(x.dtype)


def add_lora(model: nn.Module, names: tuple[str, ...]) -> None:
    """Add LoRA to the layers whose names end so."""
    ends = tuple(f".{name}" for name in names)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith(ends):
            model.set_submodule(name, Adapted(layer))


class LiveMemory(TorchDispatchMode):
    """Adds up the storages that operations make, as long as they are alive."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, key, None)
            self.peak = max(self.peak, sum(self.sizes.values()))


def peak(run: Callable[[], Tensor]) -> float:
    """Return the peak of the tensors that forward and backward pass make, in GB."""
    gc.collect()
    with LiveMemory() as memory:
        run().backward()
    return memory.peak / GB


def step_of(family: Family, model: nn.Module, shapes: dict, channels: int, size: int) -> float:
    """Return the peak of one replayed step of one image and one guidance branch, in GB."""
    side = size // 8
    latents = torch.zeros(1, channels, side, side, dtype=torch.bfloat16)
    timesteps = torch.zeros(())
    conditioning = {
        name: torch.zeros(1, *shape, dtype=torch.bfloat16) for name, shape in shapes.items()
    }
    return peak(lambda: family.predict(model, latents, timesteps, conditioning).sum())


def decoding(channels: int, size: int, *, checkpointed: bool) -> float:
    """Return the peak of decoding and of its gradient, for one image, in GB."""
    vae = frozen(lambda: decoder(channels))
    if checkpointed:
        vae.enable_gradient_checkpointing()
        vae.train()
    side = size // 8
    z = torch.zeros(1, channels, side, side, dtype=torch.bfloat16)
    return peak(lambda: vae.decode(z.requires_grad_(), return_dict=False)[0].sum())


def measure(name: str) -> dict[str, Any]:
    """Measure one base model."""
    family, make, encoders, channels, shapes = MODELS[name]
    found: dict[str, Any] = {
        "denoiser": weights_of(frozen(make)),
        "text encoders": [weights_of(frozen(encoder)) for encoder in encoders],
        "VAE": weights_of(frozen(lambda: decoder(channels))),
    }
    for size in SIZES:
        figures = {}
        for checkpointed in (False, True):
            model = frozen(make)
            add_lora(model, family.targets[family.denoiser])
            if checkpointed:
                model.enable_gradient_checkpointing()
                model.train()
            key = "step, checkpointed" if checkpointed else "step"
            figures[key] = step_of(family, model, shapes, channels, size)
            key = "decoder, checkpointed" if checkpointed else "decoder"
            figures[key] = decoding(channels, size, checkpointed=checkpointed)
        found[f"{size} pixels"] = figures
    return found


def table(measured: dict[str, dict[str, Any]]) -> str:
    """Format the figures in Markdown."""
    columns = ["step", "step, checkpointed", "decoder", "decoder, checkpointed"]
    rows = [
        "| GB in bfloat16 | pixels | denoiser | text encoders | VAE | "
        + " | ".join(columns)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(columns),
    ]
    for name, found in measured.items():
        encoders = " + ".join(f"{x:.2f}" for x in found["text encoders"])
        for size in SIZES:
            figures = [f"{found[f'{size} pixels'][column]:.2f}" for column in columns]
            fixed = [f"{found['denoiser']:.2f}", encoders, f"{found['VAE']:.2f}"]
            rows.append(f"| {name} | {size} | " + " | ".join([*fixed, *figures]) + " |")
    return "\n".join(rows)


TEXT = """\
# Memory of a training step

Computed on {date} at commit {commit} by `examples/reproduction/memory.py` from the configurations of the
public models: no weights, no GPU. Sizes of the weights, and peaks of what one image adds to them: in a
replayed step (LoRA of rank {rank} in the denoiser, one guidance branch), and in the decoder's forward and
backward pass.

{table}

- `train.gradient_checkpointing` turns `step` into `step, checkpointed`, `train.decoder_checkpointing` does
  the same for the decoder.
- With guidance, two branches are evaluated together, which doubles the step; `train.split_guidance` evaluates
  them one after the other.
- Micro-batches of m images take m times as much as one. Sampling without gradients takes far less than a step.
- The judges come on top, with 4 to 5 GB for ViT-H and DINOv2-base.
"""


def main(
    out: Annotated[Path, typer.Option(help="Folder for memory.md and memory.json.")],
    only: Annotated[list[str] | None, typer.Option(help="Name of a base model.")] = None,
) -> None:
    """Compute the memory of a training step in each family."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        measured = {name: measure(name) for name in only or MODELS}
    facts = provenance(torch.device("cpu"))
    commit = str(facts.get("commit", "unknown"))[:12]
    text = TEXT.format(date=facts["date"][:10], commit=commit, rank=RANK, table=table(measured))
    out.mkdir(parents=True, exist_ok=True)
    (out / "memory.json").write_text(
        json.dumps({"provenance": facts, "models": measured}, indent=2) + "\n", encoding="utf-8"
    )
    (out / "memory.md").write_text(text, encoding="utf-8")
    typer.echo(table(measured))


if __name__ == "__main__":
    typer.run(main)
