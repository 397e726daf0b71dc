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
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

SIZE = 16  # pixels of an image
TOKENS = 24  # that T5 reads
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


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


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every word is a token, as far as it is known; with a template for chats."""
    special = ("<pad>", "<bos>", "<unk>")
    words = "<|user|> <|assistant|> a an dog cat two cats images image prompt User <Prompt Start>"
    vocabulary = {word: i for i, word in enumerate((*special, *words.split()))}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        chat_template="{% for m in messages %}<|user|> {{ m.content }} <|assistant|>{% endfor %}",
    )


def language_model(config: type[Any], model: type[Any], *, layers: int = 2) -> Any:
    """A language model whose states have 16 channels, for `word_tokenizer`."""
    return model(
        config(
            vocab_size=len(word_tokenizer()),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
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


def sana(dtype: torch.dtype = torch.float32, scheduler: Any = None) -> diffusers.SanaPipeline:
    """32x32 pixels, latents 4x8x8, an autoencoder that compresses more."""
    blocks: dict[str, Any] = {}
    for part in ("encoder", "decoder"):
        blocks |= {
            f"{part}_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            f"{part}_block_out_channels": (8, 8, 8),
            f"{part}_qkv_multiscales": ((), (), (5,)),
            f"{part}_layers_per_block": (1, 1, 1),
        }
    return _built(
        lambda: diffusers.SanaPipeline(
            tokenizer=word_tokenizer(),
            text_encoder=language_model(Gemma2Config, Gemma2Model),
            vae=diffusers.AutoencoderDC(
                latent_channels=4,
                attention_head_dim=2,
                downsample_block_type="conv",
                upsample_block_type="interpolate",
                scaling_factor=0.41407,
                **blocks,
            ),
            transformer=diffusers.SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=8,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=16,
                sample_size=8,
            ),
            scheduler=scheduler or diffusers.DPMSolverMultistepScheduler(**FLOW),
        ),
        dtype,
    )


def z_image(dtype: torch.dtype = torch.float32, scheduler: Any = None) -> diffusers.ZImagePipeline:
    """16x16 pixels, latents 16x8x8, prompts of different lengths in a list."""
    return _built(
        lambda: diffusers.ZImagePipeline(
            vae=vae(16, shift_factor=0.1159, scaling_factor=0.3611),
            text_encoder=language_model(Qwen3Config, Qwen3Model),
            tokenizer=word_tokenizer(),
            transformer=diffusers.ZImageTransformer2DModel(
                dim=24,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=16,
                axes_dims=[4, 4, 4],
                axes_lens=[64, 16, 16],
            ),
            scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        ),
        dtype,
    )


def lumina2(dtype: torch.dtype = torch.float32, scheduler: Any = None) -> diffusers.Lumina2Pipeline:
    """16x16 pixels, latents 16x8x8, guidance that is normalised."""
    pipe = _built(
        lambda: diffusers.Lumina2Pipeline(
            vae=vae(16, shift_factor=0.1159, scaling_factor=0.3611),
            text_encoder=language_model(Gemma2Config, Gemma2Model),
            tokenizer=word_tokenizer(),
            transformer=diffusers.Lumina2Transformer2DModel(
                sample_size=8,
                hidden_size=24,
                num_layers=2,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=8,
                axes_dim_rope=(4, 4, 4),
                axes_lens=(300, 16, 16),
                cap_feat_dim=16,
            ),
            scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        ),
        dtype,
    )
    pipe.vae_scale_factor = 2  # 8 in the pipeline, whatever the autoencoder is
    return pipe


def aura_flow(
    dtype: torch.dtype = torch.float32, scheduler: Any = None
) -> diffusers.AuraFlowPipeline:
    """16x16 pixels, latents 4x8x8."""
    tokenizer = t5_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return _built(
        lambda: diffusers.AuraFlowPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(
                UMT5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
            ),
            vae=vae(4),
            transformer=diffusers.AuraFlowTransformer2DModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=16,
                caption_projection_dim=16,
                pos_embed_max_size=64,
            ),
            scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
        ),
        dtype,
    )


def flux2_klein(
    dtype: torch.dtype = torch.float32, scheduler: Any = None, *, distilled: bool = False
) -> diffusers.Flux2KleinPipeline:
    """16x16 pixels, latents 16x4x4, of which the autoencoder knows the mean and the variance."""
    pipe = _built(
        lambda: diffusers.Flux2KleinPipeline(
            vae=diffusers.AutoencoderKLFlux2(
                block_out_channels=(8, 16),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                mid_block_add_attention=False,
            ),
            text_encoder=language_model(Qwen3Config, Qwen3ForCausalLM, layers=27),  # it reads 27
            tokenizer=word_tokenizer(),
            transformer=diffusers.Flux2Transformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=3 * 16,
                timestep_guidance_channels=16,
                axes_dims_rope=(2, 2, 2, 2),
                guidance_embeds=False,
            ),
            scheduler=scheduler
            or diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            is_distilled=distilled,
        ),
        dtype,
    )
    pipe.vae.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    pipe.vae.bn.running_var.copy_(torch.linspace(1, 3, 16))
    pipe.default_sample_size = SIZE // pipe.vae_scale_factor
    return pipe


PIPELINES: dict[str, Callable[..., Any]] = {
    "sd": tiny.pipeline,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "sana": sana,
    "z_image": z_image,
    "lumina2": lumina2,
    "aura_flow": aura_flow,
    "flux2_klein": flux2_klein,
}
"""Name -> makes a pipeline of this family, given the data type."""


WITH_RECIPES = {name: PIPELINES[name] for name in ("sd", "sdxl", "sd3", "flux")}
"""The families that have recipes, names in other programs, and all baselines that fit them."""


def size_of(pipe: Any) -> int:
    """Width and height in pixels; Sana insists on a multiple of 32."""
    return 32 if isinstance(pipe, diffusers.SanaPipeline) else SIZE


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
