"""A genuine Stable Diffusion pipeline, too small to be of use: shared by tests, no network."""

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_fair.families import family_of

WIDTH = 16  # of the prompt embeddings
LATENT = (4, 8, 8)  # c, h, w
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer() -> CLIPTokenizer:
    """Byte-level, without merges: every letter is a token."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def text_encoder(vocabulary: int, **more: object) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=WIDTH,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
            **more,
        )
    )


def unet(**more: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT[1],
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        **{"attention_head_dim": 2, "norm_num_groups": 4} | more,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT[0],
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
    )


def pipeline(
    dtype: torch.dtype = torch.float32, *, seed: int = 0, version: int = 1, **scheduler: object
) -> StableDiffusionPipeline:
    """16x16 pixels, latents 4x8x8, all weights random; DPM-Solver++ 2M unless told otherwise.

    Version 2 has what Stable Diffusion 2.x has otherwise: it predicts velocity, the U-Net projects
    linearly and counts heads by level, the text encoder's activation is GELU.
    """
    second = version == 2
    text = {"hidden_act": "gelu"} if second else {}
    blocks = {"use_linear_projection": True, "attention_head_dim": (2, 4)} if second else {}
    if second:
        scheduler = {"prediction_type": "v_prediction"} | scheduler
    tokens = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = StableDiffusionPipeline(
            vae=vae(),
            text_encoder=text_encoder(len(tokens), **text),
            tokenizer=tokens,
            unet=unet(**blocks),
            scheduler=DPMSolverMultistepScheduler(**BETAS, steps_offset=1, **scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        for name, weight in pipe.text_encoder.named_parameters():  # so that prompts matter
            if "embedding" in name:
                torch.nn.init.normal_(weight)
    for module in (pipe.vae, pipe.text_encoder, pipe.unet):
        torch.nn.Module.to(module.requires_grad_(False).eval(), dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encode_prompts(
    pipe: StableDiffusionPipeline, prompts: list[str], *, prefix: bool = True
) -> torch.Tensor:
    """Embeddings of prompts as training has them, (n, L, d)."""
    return family_of(pipe).encode(pipe, prompts, prefix=prefix)["encoder_hidden_states"]
