"""Small models with the structure and the files of the real ones: shared by tests, no network."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import open_clip
import timm
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from tiny import BETAS, tokenizer
from transformers import (
    BitImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from diffusers_fair.backends import trained_classifier
from diffusers_fair.backends.retinaface import URL

SIZE = 32  # pixels that the judges take
WORDS = 49408  # of open_clip's own tokenizer


def stable_diffusion(folder: Path) -> Path:
    """Stable Diffusion 1.5 as it is on the Hub, but narrow, and for 128 pixels."""
    tokens = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=4,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    unet = UNet2DConditionModel(  # the default blocks are those of Stable Diffusion 1
        sample_size=16,
        block_out_channels=(32, 64, 64, 64),
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=2,
        latent_channels=4,
        sample_size=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text),
            tokenizer=tokens,
            unet=unet,
            scheduler=PNDMScheduler(
                **BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def single_file(folder: Path, file: Path) -> Path:
    """The weights of `stable_diffusion` in one file, under the names of the original code."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    layer = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0"}
    layer |= {"conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    layer |= {"conv_shortcut": "skip_connection"}
    unet = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    unet |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    unet |= {"mid_block.attentions.0": "middle_block.1"}
    vae = {"conv_norm_out": "norm_out", "mid_block.attentions.0": "mid.attn_1"}
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    for i in range(4):
        unet[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{3 * i + 3}.0.op"
        unet[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}"
        unet[f"mid_block.resnets.{i}"] = f"middle_block.{2 * i}"
        vae[f"down_blocks.{i}.downsamplers.0"] = f"down.{i}.downsample"
        vae[f"up_blocks.{i}.upsamplers.0"] = f"up.{3 - i}.upsample"
        vae[f"mid_block.resnets.{i}"] = f"mid.block_{i + 1}"
        for j in range(3):
            unet[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{3 * i + j + 1}.0"
            unet[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{3 * i + j + 1}.1"
            unet[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{3 * i + j}.0"
            unet[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{3 * i + j}.1"
            vae[f"down_blocks.{i}.resnets.{j}"] = f"down.{i}.block.{j}"
            vae[f"up_blocks.{i}.resnets.{j}"] = f"up.{3 - i}.block.{j}"

    def renamed(name: str, words: dict[str, str]) -> str:
        for new, old in words.items():
            name = name.replace(f"{new}.", f"{old}.")
        return name

    weights = {}
    for name, weight in pipe.unet.state_dict().items():
        inner = layer if ".resnets." in name else {}
        weights[f"model.diffusion_model.{renamed(name, inner | unet)}"] = weight
    for name, weight in pipe.vae.state_dict().items():
        is_attention = ".attentions." in name
        inner = attention if is_attention else {"conv_shortcut": "nin_shortcut"}
        square = is_attention and weight.ndim == 2  # convolutions there
        weight = weight[..., None, None] if square else weight
        weights[f"first_stage_model.{renamed(name, vae | inner)}"] = weight
    for name, weight in pipe.text_encoder.state_dict().items():
        inner_name = name.removeprefix("text_model.")
        weights[f"cond_stage_model.transformer.text_model.{inner_name}"] = weight
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file)
    return file


def hub_cache(cache: Path, model: str, folder: Path) -> None:
    """Put a pipeline's configuration, without its weights, where the Hub's client caches it."""
    place, commit = cache / f"models--{model.replace('/', '--')}", "a" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(folder, place / "snapshots" / commit, ignore=ignored)


def open_clip_folder(folder: Path) -> Path:
    """A CLIP of open_clip."""
    model = {
        "embed_dim": 16,
        "vision_cfg": {
            **{"image_size": SIZE, "patch_size": 8},
            **{"layers": 2, "width": 32, "head_width": 16},
        },
        "text_cfg": {
            **{"context_length": 77, "vocab_size": WORDS},
            **{"width": 16, "heads": 2, "layers": 2},
        },
    }
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": preprocess})
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = open_clip.CLIP(**model)
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def dinov2_folder(folder: Path) -> Path:
    """A DINOv2 of transformers."""
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    size = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


def vit_folder(folder: Path, labels: list[str]) -> Path:
    """An image classification model of transformers."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIZE,
        patch_size=8,
        id2label=dict(enumerate(labels)),
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def checkpoint_folder(folder: Path, labels: list[str]) -> Path:
    """What `diffusers-fair classifier train` writes."""
    network = trained_classifier.mobilenet(len(labels))
    trained_classifier.write(folder, network, {"classes": labels, "size": SIZE})
    return folder


def timm_folder(folder: Path) -> Path:
    """A face embedder of timm; its last layer makes the embedding, 12 numbers."""
    args = {
        **{"img_size": SIZE, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
        **{"class_token": False, "global_pool": "avg"},
    }
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = timm.create_model("vit_tiny_patch16_224", num_classes=12, **args)
        for weight in network.parameters():  # so that pictures matter
            torch.nn.init.normal_(weight, std=0.3)
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 12,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [3, SIZE, SIZE],
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.3, 0.4],
            "num_classes": 12,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder


def picture_folder(folder: Path, pictures: torch.Tensor) -> Path:
    """Pictures (n, 3, h, w) in [-1, 1] as files."""
    folder.mkdir()
    for i, x in enumerate(pictures):
        pixels = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
        Image.fromarray(np.asarray(pixels)).save(folder / f"{i}.png")
    return folder


# ---- RetinaFace ----------------------------------------------------------------------------------

BOXES = torch.tensor(  # centre and size, in shares of the image
    [[0.25, 0.5, 0.25, 0.5], [0.75, 0.5, 0.4, 0.5], [0.72, 0.5, 0.4, 0.5]]
)


class Spots(torch.nn.Module):
    """Stands in for `retinaface.network.RetinaFace`: a face where the anchor's middle is red."""

    def __init__(self, name, pretrained, return_layers, in_channels, out_channels):
        super().__init__()
        assert (name, pretrained, in_channels, out_channels) == ("Resnet50", False, 256, 256)
        self.shift = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        n, _, h, w = images.shape
        x, y = (BOXES[:, 0] * w).long(), (BOXES[:, 1] * h).long()
        red = images[:, 0, y, x]  # (n, anchors)
        logits = torch.stack([torch.zeros_like(red), 4 * red], -1) + self.shift
        points = torch.arange(10.0, device=images.device).expand(n, len(BOXES), 10)
        return images.new_zeros(n, len(BOXES), 4), logits, points


def _decode(offsets, anchors, variance):
    centres = anchors[:, :2] + offsets[:, :2] * variance[0] * anchors[:, 2:]
    sizes = anchors[:, 2:] * (offsets[:, 2:] * variance[1]).exp()
    return torch.cat([centres - sizes / 2, centres + sizes / 2], 1)


def _decode_landm(offsets, anchors, variance):
    points = offsets.view(-1, 5, 2) * variance[0] * anchors[:, None, 2:]
    return (points + anchors[:, None, :2]).flatten(1)


def _priorbox(min_sizes, steps, clip, image_size):
    assert (len(min_sizes), steps, clip, len(image_size)) == (3, [8, 16, 32], False, 2)
    return BOXES


def retinaface(monkeypatch, folder: Path) -> None:
    """Put a package of the same interface in retinaface's place, and weights in torch's cache."""
    from diffusers_fair.backends.retinaface import _anchors

    content = {
        "retinaface": {},
        "retinaface.network": {"RetinaFace": Spots},
        "retinaface.box_utils": {"decode": _decode, "decode_landm": _decode_landm},
        "retinaface.prior_box": {"priorbox": _priorbox},
    }
    for name, members in content.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        module.__spec__ = type(sys.__spec__)(name, None, origin="stand-in")
        monkeypatch.setitem(sys.modules, name, module)
    weights = folder / "hub" / "checkpoints" / URL.rpartition("/")[2]
    weights.parent.mkdir(parents=True)
    torch.save({"shift": torch.zeros(1)}, weights)
    monkeypatch.setenv("TORCH_HOME", str(folder))
    _anchors.cache_clear()
