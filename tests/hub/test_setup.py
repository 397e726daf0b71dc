"""Setting up a machine for a recipe, from a Hub here with repositories of the real layout."""

import io
import json
import shutil

import families
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stand_ins
import torch
from command import run
from PIL import Image
from test_hub import contents, hub, waits  # noqa: F401
from torchvision.models import mobilenet_v3_large

from diffusers_fair import setup
from diffusers_fair.backends import retinaface
from diffusers_fair.backends.registry import base, load_base
from diffusers_fair.backends.sources import HubDataset, HubModel, HubPipeline, UrlFile
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.training.classifier import Settings
from diffusers_fair.training.labelled_images import read_images

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
FACES = "datasets/HuggingFaceM4/FairFace"
CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
BIG_CLIP = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
FEATURES = {
    "gender": {"names": ["Male", "Female"]},
    "race": {
        "names": [
            *("East Asian", "Indian", "Black", "White"),
            *("Middle Eastern", "Latino_Hispanic", "Southeast Asian"),
        ]
    },
}
FACES_CARD = """---
license: cc-by-4.0
dataset_info:
- config_name: '0.25'
  splits: [{name: train, num_examples: 86744}, {name: validation, num_examples: 10954}]
- config_name: '1.25'
  splits: [{name: train, num_examples: 86744}]
configs:
- config_name: '0.25'
  data_files: [{split: train, path: 0.25/train-*}, {split: validation, path: 0.25/validation-*}]
- config_name: '1.25'
  data_files: [{split: train, path: 1.25/train-*}]
---
"""


def card(licence: str) -> bytes:
    return f"---\nlicense: {licence}\n---\n".encode()


def parquet(count: int) -> bytes:
    """A file as `datasets` writes it: numbers, whose names are in the metadata."""
    rng, images = np.random.default_rng(0), []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "png")
        images.append({"bytes": file.getvalue(), "path": None})
    labels = {name: [i % len(v["names"]) for i in range(count)] for name, v in FEATURES.items()}
    info = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    file = io.BytesIO()
    pq.write_table(pa.table({"image": images} | labels).replace_schema_metadata(info), file)
    return file.getvalue()


def saved(state: dict) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    return {
        "base": contents(stand_ins.stable_diffusion(home / "base")),
        "dino": contents(stand_ins.dinov2_folder(home / "dino")),
        "clip": contents(stand_ins.open_clip_folder(home / "clip")),
        "imagenet": saved(mobilenet_v3_large().state_dict()),
        "faces": parquet(14),
    }


@pytest.fixture
def machine(hub, folders, monkeypatch, tmp_path):  # noqa: F811
    """A machine with nothing on it, and a Hub with everything that sd15-gender names."""
    unused = {
        "v1-5-pruned.ckpt": b"0" * 999,
        "v1-5-pruned-emaonly.safetensors": b"0" * 999,
        "unet/diffusion_pytorch_model.bin": b"0" * 999,
        "unet/diffusion_pytorch_model.fp16.safetensors": b"0" * 999,
        "safety_checker/model.safetensors": b"0" * 999,
        "safety_checker/config.json": b"{}",
    }
    licence = {"README.md": card("creativeml-openrail-m")}
    hub.publish(BASE, folders["base"] | unused | licence)
    for size in ("base", "giant"):
        hub.publish(f"facebook/dinov2-{size}", folders["dino"] | {"README.md": card("apache-2.0")})
    others = {"model.safetensors": b"0" * 999, "open_clip_pytorch_model.bin": b"0" * 999}
    for name in (CLIP, BIG_CLIP):
        hub.publish(name, folders["clip"] | others | {"README.md": card("mit")})
    hub.publish(
        FACES,
        {f"0.25/train-0000{i}-of-00002.parquet": folders["faces"] for i in range(2)}
        | {f"{x}-00000-of-00001.parquet": b"" for x in ("0.25/validation", "1.25/train")}
        | {"README.md": FACES_CARD.encode()},
    )
    stand_ins.retinaface(monkeypatch, tmp_path / "torch")
    name = retinaface.URL.rpartition("/")[2]
    weights = (tmp_path / "torch" / "hub" / "checkpoints" / name).read_bytes()
    hub.publish("org/weights", {name: weights, "imagenet.pth": folders["imagenet"]})
    shutil.rmtree(tmp_path / "torch")
    url = f"{hub.url}/org/weights/resolve/main"
    monkeypatch.setattr(retinaface, "URL", f"{url}/{name}")

    def imagenet_weights() -> UrlFile:
        file = "mobilenet_v3_large-5c1a4163.pth"
        path = tmp_path / "torch" / "hub" / "checkpoints" / file
        return UrlFile(f"{url}/imagenet.pth", path, len(folders["imagenet"]), "BSD-3-Clause")

    monkeypatch.setattr(setup, "imagenet_weights", imagenet_weights)
    small = Settings(size=32, epochs=1, batch_size=8, held_out=0.25)
    monkeypatch.setattr(setup, "SETTINGS", small)
    monkeypatch.chdir(tmp_path)
    return hub


def answer(monkeypatch, word: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(word))


@pytest.mark.slow
def test_a_machine_is_set_up_once(machine, monkeypatch, tmp_path, capsys):
    answer(monkeypatch, "n\n")
    assert run(monkeypatch, "setup", "sd15-gender") == 1
    said, refused = capsys.readouterr()
    assert refused.endswith("diffusers-fair: nothing was downloaded\n")
    for line in (
        "off      face realism loss (losses.face is 0): models.face_embedder and models.face_bank",
        f"GB  {BASE}, creativeml-openrail-m  (for base)",
        f"GB  {CLIP}, mit  (for models.clip)",
        "GB  HuggingFaceM4/FairFace, cc-by-4.0  (for models.classifiers.gender)",
        "MIT; trained on WIDER FACE",
        "train     classifier 'classifiers/gender' on 86,744 images of "
        "hf:HuggingFaceM4/FairFace/0.25, about ",
        "min on this machine (an estimate)",
    ):
        assert line in said
    asked = {path for route, path in machine.asked if route != "model_info"}
    assert asked == {f"/{BASE}/resolve/main/model_index.json"}
    assert not (tmp_path / "classifiers").exists()

    assert run(monkeypatch, "setup", "sd15-gender", "--yes") == 0
    said = capsys.readouterr().out
    assert "missing" not in said
    assert said.endswith("ready: diffusers-fair train sd15-gender\n")
    facts = json.loads((tmp_path / "classifiers/gender/classifier.json").read_text())
    assert facts["classes"] == ["Male", "Female"]
    assert sum(facts["pictures"].values()) == 28  # both files of the split, not the validation's
    fetched = {path.split("?")[0] for route, path in machine.asked if route == "resolve"}
    assert not [path for path in fetched if "pruned" in path or "fp16" in path]
    assert not [path for path in fetched if "safety" in path or "pytorch_model.bin" in path]

    machine.asked.clear()
    assert run(monkeypatch, "setup", "sd15-gender") == 0  # nothing to ask
    assert not machine.asked
    load_base(BASE, dtype="bfloat16")
    assert "download" not in machine.routes()  # diffusers finds every weight that it needs


@pytest.mark.slow
def test_a_setup_that_broke_off_goes_on(machine, monkeypatch, capsys):
    monkeypatch.setattr(setup, "seconds_per_image", lambda settings: 0.01)
    size = HubPipeline(BASE).download().size
    machine.fail("download", 500, times=99, skip=1)
    assert run(monkeypatch, "setup", "sd15-gender", "--yes") == 2
    said = capsys.readouterr().err
    assert f"cannot download '{BASE}' from the Hub: " in said
    assert "what has arrived is kept, so give the same command again to continue" in said
    machine.faults.clear()
    [left] = [x for x in setup.plan(RunConfig.load("sd15-gender")).downloads if x.name == BASE]
    assert 0 < left.size < size


@pytest.mark.slow
def test_what_cannot_be_fetched_is_said_before_anything_is(machine, monkeypatch, capsys):
    monkeypatch.setattr(setup, "seconds_per_image", lambda settings: 0.01)
    assert run(monkeypatch, "setup", "sd15-gender-paper", "--yes") == 2
    said = capsys.readouterr().err
    assert "setup cannot fetch 2 of the requirements: face-embedder (unknown to timm" in said
    assert "images in 'real-faces' (put images with faces" in said
    assert not machine.asked
    assert run(monkeypatch, "setup", "sd15-gender", "base.model=org/nowhere", "--yes") == 2
    said = capsys.readouterr().err
    assert "cannot download 'org/nowhere': the Hub has no such repository, or it is priv" in said
    machine.fail("model_info", 503, times=99)
    assert run(monkeypatch, "setup", "sd15-gender", "--yes") == 2
    said = capsys.readouterr().err
    assert f"cannot download '{BASE}' from the Hub: " in said
    assert "; check the connection, then give the same command again" in said
    machine.faults.clear()
    answer(monkeypatch, "")
    assert run(monkeypatch, "setup", "sd15-gender") == 2
    assert "got no answer: answer y, or use --yes" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    assert run(monkeypatch, "setup", "sd15-gender", "--yes") == 2
    assert "there are 0.0 GB free: make room, or set HF_HOME" in capsys.readouterr().err
    trained_on = "models.classifiers.gender.trained_on=nowhere"
    assert run(monkeypatch, "setup", "sd15-gender", trained_on, "--yes") == 2
    assert "should be trained on 'nowhere', which does not exist" in capsys.readouterr().err


# ---- base models of every family -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", families.WITH_RECIPES)
def test_every_pipeline_is_fetched_whole(hub, name, tmp_path):  # noqa: F811
    """Without what its repository holds for other programs; then diffusers needs no more."""
    original = families.WITH_RECIPES[name]()
    original.save_pretrained(tmp_path / "base")
    others = {
        "base.safetensors": b"0" * 99,
        "text_encoders/t5xxl_fp16.safetensors": b"0" * 99,
        "vae/diffusion_pytorch_model.fp16.safetensors": b"0" * 99,
        "vae_decoder/model.onnx": b"0" * 99,
        "unet/openvino_model.bin": b"0" * 99,
    }
    hub.publish("org/base", contents(tmp_path / "base") | others)
    [missing] = base("org/base").needs("org/base", None)
    assert (missing.available, missing.source) == (False, HubPipeline("org/base"))
    missing.source.download().fetch()
    asked = [path for route, path in hub.asked if route == "resolve"]
    assert not [path for path in asked for other in others if other in path]
    [found] = base("org/base").needs("org/base", None)
    assert found.available, found.advice
    assert found.size > 0
    hub.asked.clear()
    loaded = load_base("org/base")
    assert type(loaded) is type(original)
    assert "download" not in hub.routes()


def test_gated_repositories_say_how_to_get_access(hub):  # noqa: F811
    files = {"model_index.json": b"{}", "README.md": card("other")}
    hub.publish("org/gated", files, gated=True)
    advice = "its publisher asks you to accept its licence: do so "
    with pytest.raises(ValueError, match=f"'org/gated': {advice}at https://.*org/gated, then run"):
        HubPipeline("org/gated").download()
    with pytest.raises(ValueError, match=f"{advice}on its page on the Hub, then run `hf auth log"):
        load_base("org/gated")


def test_a_repository_of_no_pipeline(hub):  # noqa: F811
    hub.publish("org/lora", {"model.safetensors": b"0"})
    message = r"'org/lora' on the Hub is no pipeline of diffusers, as it has no model_index\.json: "
    with pytest.raises(ValueError, match=message):
        HubPipeline("org/lora").download()


# ---- data sets -----------------------------------------------------------------------------------


def test_images_of_the_hub_are_read(machine):
    found = read_images("hf:HuggingFaceM4/FairFace/0.25", "race")
    assert found.classes == tuple(FEATURES["race"]["names"])
    assert found.labels.tolist() == [i % 7 for i in range(14)] * 2
    machine.asked.clear()
    read_images("hf:HuggingFaceM4/FairFace/0.25/train", "gender")
    assert "download" not in machine.routes()


def test_data_sets_are_named_by_configuration_and_split(machine, folders):
    assert HubDataset.parse("hf:HuggingFaceM4/FairFace/0.25/validation").images() == 10954
    with pytest.raises(ValueError, match=r"has the configurations 0.25, 1.25, got ''"):
        read_images("hf:HuggingFaceM4/FairFace")
    with pytest.raises(ValueError, match=r"has no parquet files .*expected hf:ORG/NAME"):
        read_images("hf:HuggingFaceM4/FairFace/0.25/test")
    with pytest.raises(ValueError, match=r"expected hf:ORG/NAME, .* got 'hf:FairFace'"):
        read_images("hf:FairFace")
    machine.publish("datasets/org/plain", {"data/train-0.parquet": folders["faces"]})
    assert len(read_images("hf:org/plain", "gender").labels) == 14
    assert HubDataset("org/plain").images() is None


def test_an_answer_that_is_not_the_hubs(hub):  # noqa: F811
    hub.fail("model_info", "garbage", times=99)
    message = f"cannot download '{BASE}' from the Hub: .*; check the connection"
    with pytest.raises(ValueError, match=message):
        HubModel(BASE).download()


def test_the_error_of_a_revision_names_it(machine):
    with pytest.raises(ValueError, match=f"'{BASE}': its repository has no revision 'v9'"):
        HubModel(BASE, "v9").download()
