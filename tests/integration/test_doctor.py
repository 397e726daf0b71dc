"""What a recipe needs: found where it is, named where it is not, and never fetched."""

import json
import socket
import sys

import pytest
import stand_ins
import torch
from command import run
from huggingface_hub import constants

from diffusers_fair import doctor
from diffusers_fair.backends import open_clip, retinaface, timm
from diffusers_fair.config.schema import RunConfig

LABELS = ["Female", "Male"]
CHECKPOINT = "models.classifiers.gender.model"


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No network, an empty cache, torch's folder elsewhere, RetinaFace not installed."""

    def refuse(*args):
        raise AssertionError("the doctor went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    whole = retinaface.package
    monkeypatch.setattr(
        retinaface,
        "package",
        lambda *a: whole("nowhere_to_be_found" if "ret" in a[0] else a[0], *a[1:]),
    )


INDEX = {  # as pipelines list their components
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def cached(home, model: str, *files: str, index: object = None) -> None:
    """Put files into the Hub's cache, ten bytes each, and the `model_index.json` of a pipeline."""
    folder = home / "hub" / f"models--{model.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    for name in files:
        path = folder / "snapshots" / "abc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"0123456789")
    if index is not None:
        (folder / "snapshots" / "abc" / "model_index.json").write_text(json.dumps(index))


def gaps(*overrides: str) -> dict[str, str]:
    """What is missing for sd15-gender-paper, and the advice."""
    config = RunConfig.load("sd15-gender-paper", overrides)
    return {need.what: need.advice for need in doctor.examine(config) if not need.available}


def test_the_testbed_needs_nothing_that_is_not_shipped(monkeypatch, capsys):
    assert run(monkeypatch, "doctor", "testbed-gender") == 0
    said = capsys.readouterr().out
    assert "ok       package accelerate  (for training)" in said
    assert "ok       testbed-occupations  (for prompts)" in said
    assert "missing" not in said


def test_a_device_that_is_not_there():
    found = gaps("train.device=cuda:99")
    assert "device 'cuda:99' is not available" in found["device cuda:99"]


def test_a_recipe_on_an_empty_machine(monkeypatch, capsys):
    assert run(monkeypatch, "doctor", "sd15-gender-paper") == 2
    said = capsys.readouterr()
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    for expected in (
        f"missing  {base}  (for base)\n",
        f"  neither a folder nor in the Hub's cache: hf download {base}\n",
        "missing  package nowhere_to_be_found  (for models.face_detector, evaluation.models.face",
        "  pip install --no-deps retinaface-pytorch\n",
        "missing  folder 'classifiers/gender'  (for models.classifiers.gender)\n",
        "  train it with: diffusers-fair classifier train hf:HuggingFaceM4/FairFace/0.25 "
        "--label gender --out classifiers/gender\n",
        "missing  laion/CLIP-ViT-H-14-laion2B-s32B-b79K  (for models.clip)\n",
        "missing  facebook/dinov2-base  (for models.dino)\n",
        "missing  face-embedder  (for models.face_embedder)\n",
        "  unknown to timm, or without weights: expected a name that timm knows, ",
        "missing  images in 'real-faces'  (for models.face_bank)\n",
        "  put images with faces into it, or name another face_bank\n",
        "(for evaluation.models.classifiers.gender, evaluation.models.clip)\n",
        "ok       occupations  (for prompts)\n",
        "weights on this machine: 0.0 GB",
    ):
        assert expected in said.out
    assert (
        "recipe 'sd15-gender-paper': 10 requirements are missing, see above; `diffusers-fair "
        "setup` fetches 7 of them"
    ) in said.err


def test_what_is_in_the_cache_is_found(tmp_path):
    cached(tmp_path, "facebook/dinov2-base", "config.json", "model.safetensors")
    assert "facebook/dinov2-base" not in gaps()
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    cached(tmp_path, base, "unet/x.safetensors", "vae/x.bin", index=INDEX)
    assert gaps()[base].endswith("has no text_encoder, text_encoder_2")


@pytest.mark.parametrize(
    ("index", "advice"),
    [
        (None, "/snapshots/abc' is no pipeline: it has no model_index.json"),
        ([], "model_index.json' must list the components of a pipeline: download it again"),
    ],
)
def test_a_folder_that_is_no_pipeline(index, advice, tmp_path):
    cached(tmp_path, "org/base", "unet/x.safetensors", index=index)
    assert gaps("base.model=org/base")["org/base"].endswith(advice)


def test_weights_are_counted_once_as_stored(tmp_path):
    files = [
        f"{part}/model.{kind}"
        for part in ("unet", "vae", "text_encoder", "text_encoder_2")
        for kind in ("bin", "safetensors")
    ]
    cached(tmp_path, "org/base", *files, index=INDEX)
    cached(tmp_path, "org/dino", "model.safetensors")
    dino = ["models.dino=dinov2:org/dino", "evaluation.models.dino=dinov2:org/dino"]
    found = doctor.examine(RunConfig.load("sd15-gender", ["base.model=org/base", *dino]))
    assert sum(need.size for need in found) == 50


def test_folders_are_found(tmp_path):
    clip = stand_ins.open_clip_folder(tmp_path / "clip")
    assert "open_clip" not in str(gaps(f"models.clip=open_clip:{clip}").get(str(clip)))
    (clip / "open_clip_model.safetensors").unlink()
    assert gaps(f"models.clip=open_clip:{clip}")[str(clip)].endswith("has no weights")


def test_the_adapter_to_start_from_is_looked_up(tmp_path):
    asked = "adapter.init_from={}".format
    assert "hf download org/fair" in gaps(asked("org/fair"))["org/fair"]
    told = gaps(asked("runs/not/trained"))["runs/not/trained"]
    assert told == (
        "there is no such folder: train it or put it there, or name another folder or Hub id"
    )
    cached(tmp_path, "org/fair", "fair_adapter.json", "pytorch_lora_weights.safetensors")
    assert "org/fair" not in gaps(asked("org/fair"))
    (tmp_path / "empty").mkdir()
    assert gaps(asked(tmp_path / "empty"))[str(tmp_path / "empty")].endswith("has no weights")
    (tmp_path / "style.safetensors").write_bytes(b"1")
    assert "style.safetensors" not in str(gaps(asked(tmp_path / "style.safetensors")))


def test_a_checkpoint_with_other_classes_is_noticed(tmp_path):
    right = stand_ins.checkpoint_folder(tmp_path / "right", LABELS)
    wrong = stand_ins.checkpoint_folder(tmp_path / "wrong", ["Man", "Woman"])
    assert f"classes of '{right}'" not in gaps(f"{CHECKPOINT}={right}")
    assert (
        "has the label 'Female', but the model has"
        in gaps(f"{CHECKPOINT}={wrong}")[f"classes of '{wrong}'"]
    )


def test_a_model_that_open_clip_does_not_know():
    assert (
        "unknown to open_clip" in gaps("models.clip=open_clip:ViT-H-14/nobodys")["ViT-H-14/nobodys"]
    )


def test_open_clip_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(open_clip, "PACKAGE", "nowhere_to_be_found")
    assert gaps()["package nowhere_to_be_found"] == "pip install open_clip_torch"


def test_real_faces_are_needed_only_if_they_have_a_weight(monkeypatch, capsys):
    assert not {"face-embedder", "images in 'real-faces'"} & {*gaps("losses.face=0")}
    run(monkeypatch, "doctor", "sd15-gender")
    assert (
        "off      face realism loss (losses.face is 0): models.face_emb" in capsys.readouterr().out
    )
    run(monkeypatch, "doctor", "sd15-gender-paper")
    assert "face realism loss" not in capsys.readouterr().out


def test_a_face_embedder_of_the_hub_and_of_timm(tmp_path):
    cached(tmp_path, "org/faces", "model.safetensors")
    assert "org/faces" not in gaps("models.face_embedder=timm:hf-hub:org/faces")
    assert gaps("models.face_embedder=timm:hf-hub:org/x")["org/x"].endswith("hf download org/x")
    hub = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert hub in gaps("models.face_embedder=timm:vit_tiny_patch16_224")


def test_a_face_embedder_and_a_bank_in_folders(tmp_path):
    embedder = stand_ins.timm_folder(tmp_path / "timm")
    bank = stand_ins.picture_folder(tmp_path / "faces", torch.zeros(1, 3, 8, 8))
    found = gaps(f"models.face_embedder=timm:{embedder}", f"models.face_bank={bank}")
    assert not {str(embedder), f"images in '{bank}'"} & {*found}
    (bank / "0.png").unlink()
    (embedder / "model.safetensors").unlink()
    found = gaps(f"models.face_embedder=timm:{embedder}", f"models.face_bank={bank}")
    assert found[str(embedder)].endswith("has no weights")
    assert f"images in '{bank}'" in found


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(timm, "PACKAGE", "nowhere_to_be_found_either")
    assert gaps()["package nowhere_to_be_found_either"] == "pip install timm"


def test_prompts_that_are_not_there():
    assert "did you mean 'occupations'" in gaps("prompts.sets=[occupation]")["occupation"]
    assert (
        "has no validation prompts"
        in gaps("prompts.sets=[non-templated]", "prompts.train=test")["non-templated"]
    )


def test_bad_recipes_are_bad_input(monkeypatch, capsys):
    assert run(monkeypatch, "doctor", "testbed-gendr") == 2
    assert run(monkeypatch, "doctor", "testbed-gender", "trian.seed=3") == 2
    said = capsys.readouterr().err
    assert "did you mean 'testbed-gender'" in said
    assert "did you mean 'train'" in said


def test_no_model_is_loaded(monkeypatch):
    before = set(sys.modules)
    doctor.examine(RunConfig.load("sd15-gender"))
    assert not {name for name in set(sys.modules) - before if name.startswith("diffusers.")}


def test_unknown_sets_of_kept_prompts_are_noticed():
    assert "kept prompts" not in gaps()
    assert "names 'nowhere': expected named" in gaps("prompts.keep.sets=[nowhere]")["kept prompts"]


CLASSES = {
    "sd": {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "tokenizer": "T"},
    "flux": {"transformer": "FluxTransformer2DModel", "text_encoder": "CLIPTextModel"},
}


@pytest.mark.parametrize(
    ("family", "advice"),
    [
        ("flux", "an adapter for FLUX.1 can have text_encoder, transformer, got unet: choose"),
        ("sd", None),
        (None, None),
    ],
)
def test_components_that_the_base_lacks(tmp_path, family, advice):
    """Known from the list of components, before any weights are there."""
    index = {name: ["library", kind] for name, kind in CLASSES.get(family, {}).items()}
    index |= {"_class_name": "Pipeline", "vae": ["diffusers", "AutoencoderKL"], "scheduler": [None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index) if family else "{")
    found = gaps(f"base.model={tmp_path}", "adapter.components=[unet]").get("components unet")
    assert found is None if advice is None else advice in found


@pytest.mark.parametrize(("part", "available"), [("unet", True), ("transformer", False)])
def test_components_of_the_testbed(part, available):
    config = RunConfig.load("testbed-gender", [f"adapter.components=[{part}]"])
    found = {need.what: need.available for need in doctor.examine(config)}
    assert found[f"components {part}"] == available
