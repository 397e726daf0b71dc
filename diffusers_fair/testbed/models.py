"""The architectures and weights of the testbed's pipelines."""

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_fair.testbed.vocabulary import unpack

SIZE = 64  # pixels
WIDTH = 128  # dimensions of a prompt embedding
TOKENS = 77  # tokens of a prompt
FLUX_FILE = "flux_transformer.safetensors"
VOCABULARY = 49408  # tokens of CLIP's byte-pair encoding
NOISE = {  # noise schedule of Stable Diffusion 1.x
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def autoencoder() -> AutoencoderKL:
    """Create the autoencoder: 64x64 pixels <-> 16x16x4 latents."""
    return AutoencoderKL(
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def unet() -> UNet2DConditionModel:
    """Create the U-Net: 16x16x4 latents, cross-attention at 8x8 and 4x4."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 96, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def flux_transformer() -> FluxTransformer2DModel:
    """Create the transformer of the FLUX testbed: 8x8 packed latents, guidance embedded."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,  # 2x2 latents of 4 channels
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def text_encoder(vocabulary: int = VOCABULARY) -> CLIPTextModel:
    """Create the text encoder: prompt tokens -> (n, 77, 128) embeddings."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


def load_autoencoder(weights: Path) -> AutoencoderKL:
    """Load the autoencoder as float32, with its scaling factor."""
    file = weights / "vae.safetensors"
    vae = _loaded(autoencoder(), file)
    with safe_open(file, "pt") as opened:
        vae.register_to_config(scaling_factor=float(opened.metadata()["scaling_factor"]))
    return vae


def load_flux_autoencoder(weights: Path) -> AutoencoderKL:
    """Load the same autoencoder with the shift that gives latents the mean 0, as FLUX.1 has it."""
    vae = load_autoencoder(weights)
    with safe_open(weights / FLUX_FILE, "pt") as opened:
        vae.register_to_config(shift_factor=float(opened.metadata()["shift_factor"]))
    return vae


def load_text_encoder(weights: Path) -> CLIPTextModel:
    """Load the text encoder as float32; tokens that training never saw get random embeddings."""
    model = text_encoder()
    model.load_state_dict(unpack(weights / "text_encoder.safetensors", VOCABULARY))
    return model.eval().requires_grad_(False)


def load_unet(weights: Path) -> UNet2DConditionModel:
    """Load the U-Net as float32."""
    return _loaded(unet(), weights / "unet.safetensors")


def load_flux_transformer(weights: Path) -> FluxTransformer2DModel:
    """Load the transformer of the FLUX testbed as float32."""
    return _loaded(flux_transformer(), weights / FLUX_FILE)


def _loaded(model: Any, file: Path) -> Any:
    """Load weights into a model as float32, without gradients."""
    model.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    return model.eval().requires_grad_(False)
