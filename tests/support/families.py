"""Genuine pipelines of every family, too small to be of use: shared by tests, no network."""

from collections.abc import Callable
from typing import Any

import diffusers
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

SIZE = 16  # pixels of an image
TOKENS = 24  # that T5 reads


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Every letter is a token."""
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    letters = [(letter, -1.0) for letter in "abcdefghijklmnopqrstuvwxyz ▁"]
    tokens = Tokenizer(models.Unigram(special + letters, unk_id=2))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TOKENS,
    )


def t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=64,
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def clip(
    vocabulary: int, width: int, *, projection: int | None = None, eos: int | None = None
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """CLIP's text encoder, with a projection where its size is given, as bigG has."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=projection or width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1 if eos is None else eos,
        pad_token_id=vocabulary - 1,
        hidden_act="quick_gelu" if projection is None else "gelu",
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def vae(channels: int, **config: object) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
        **config,
    )


def sdxl(
    dtype: torch.dtype = torch.float32, scheduler: Any = None, *, zeros: bool = True, **unet: object
) -> diffusers.StableDiffusionXLPipeline:
    """16x16 pixels, latents 4x8x8, a second text encoder with a projection."""
    first, second = tiny.tokenizer(), tiny.tokenizer()
    second.pad_token = "!"
    return _built(
        lambda: diffusers.StableDiffusionXLPipeline(
            vae=vae(4),
            text_encoder=clip(len(first), 16),
            text_encoder_2=clip(len(second), 24, projection=20),
            tokenizer=first,
            tokenizer_2=second,
            unet=diffusers.UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=16 + 24,
                attention_head_dim=2,
                norm_num_groups=4,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                transformer_layers_per_block=(1, 2),
                projection_class_embeddings_input_dim=6 * 8 + 20,
                use_linear_projection=True,
                **{"layers_per_block": 1} | unet,
            ),
            scheduler=scheduler
            or diffusers.EulerDiscreteScheduler(
                **tiny.BETAS, timestep_spacing="leading", steps_offset=1
            ),
            force_zeros_for_empty_prompt=zeros,
        ),
        dtype,
    )


def sd3(
    dtype: torch.dtype = torch.float32, scheduler: Any = None, *, version: float = 3.5
) -> diffusers.StableDiffusion3Pipeline:
    """16x16 pixels, latents 16x8x8; 3.5 has normalised queries and a dual attention block."""
    first, second = tiny.tokenizer(), tiny.tokenizer()
    medium = version == 3.5
    return _built(
        lambda: diffusers.StableDiffusion3Pipeline(
            vae=vae(16, shift_factor=0.0609, scaling_factor=1.5305),
            text_encoder=clip(len(first), 16, projection=16),
            text_encoder_2=clip(len(second), 24, projection=24),
            text_encoder_3=t5(48),
            tokenizer=first,
            tokenizer_2=second,
            tokenizer_3=t5_tokenizer(),
            transformer=diffusers.SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=16,
                out_channels=16,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=48,
                caption_projection_dim=32,
                pooled_projection_dim=16 + 24,
                pos_embed_max_size=16,
                qk_norm="rms_norm" if medium else None,
                dual_attention_layers=(0,) if medium else (),
            ),
            scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        ),
        dtype,
    )


def flux(
    dtype: torch.dtype = torch.float32, scheduler: Any = None, *, dev: bool = True
) -> diffusers.FluxPipeline:
    """16x16 pixels, latents 16x8x8, packed; dev embeds guidance, schnell does not."""
    first = tiny.tokenizer()
    pipe = _built(
        lambda: diffusers.FluxPipeline(
            vae=vae(16, shift_factor=0.1159, scaling_factor=0.3611),
            text_encoder=clip(len(first), 16),
            text_encoder_2=t5(32),
            tokenizer=first,
            tokenizer_2=t5_tokenizer(),
            transformer=diffusers.FluxTransformer2DModel(
                patch_size=1,
                in_channels=64,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=16,
                guidance_embeds=dev,
                axes_dims_rope=(4, 4, 8),
            ),
            scheduler=scheduler
            or diffusers.FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=dev, shift=3.0 if dev else 1.0
            ),
        ),
        dtype,
    )
    pipe.default_sample_size = SIZE // pipe.vae_scale_factor
    return pipe


PIPELINES: dict[str, Callable[..., Any]] = {
    "sd": tiny.pipeline,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
}
"""Name -> makes a pipeline of this family, given the data type."""


def _built(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """Make a pipeline with reproducible weights, in which prompts and all layers matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = make()
        for name, model in pipe.components.items():
            if isinstance(model, torch.nn.Module):
                _wake(name, model)
                torch.nn.Module.to(model.requires_grad_(False).eval(), dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _wake(name: str, model: torch.nn.Module) -> None:
    """Initialize what starts at zero, such as adaptive norms, and embeddings, which start small."""
    for path, weight in model.named_parameters():
        is_table = "embedding" in path or "shared" in path
        if name.startswith("text_encoder") and is_table and "position" not in path:
            torch.nn.init.normal_(weight)
        elif not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
