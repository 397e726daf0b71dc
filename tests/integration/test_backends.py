"""Models of others, at small size: what the recipe says is what is loaded, or a clear message."""

import json
import sys
from pathlib import Path
from pickle import UnpicklingError

import cost
import open_clip
import pytest
import stand_ins
import timm
import torch
import yaml
from huggingface_hub import constants
from pictures import held_out
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny import pipeline
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification, Dinov2Model

from diffusers_fair import FairnessFinetuner
from diffusers_fair.attributes import Attribute
from diffusers_fair.backends import (
    dinov2,
    image_classification,
    retinaface,
)
from diffusers_fair.backends import open_clip as clips
from diffusers_fair.backends import (
    reference_faces as face_bank,
)
from diffusers_fair.backends import timm as embedders
from diffusers_fair.backends.labels import group
from diffusers_fair.backends.registry import (
    base,
    load_base,
    load_judges,
    load_reference_faces,
    provider,
    untouched_set,
    untouched_sets,
    usual_sampling,
)
from diffusers_fair.backends.trained_classifier import load as load_classifier
from diffusers_fair.backends.zero_shot import zero_shot
from diffusers_fair.config import backends
from diffusers_fair.config.models import ClassifierSection, EvaluationModelsSection, ModelsSection
from diffusers_fair.config.recipe import RECIPES, recipes
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.families.base import Usual
from diffusers_fair.testbed.backend import load_evaluation_judges
from diffusers_fair.training import batch_gradient as gradient
from diffusers_fair.training.original_images import run_cache_key

SHAPE = Attribute("shape", ("round", "square"))
LABELS = ["Ball", "Ring", "Box"]
CLASSES = {"round": ("ball", "ring"), "square": ("box",)}
PHRASES = {"round": ("a ball", "a ring"), "square": ("a box", "a cube")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of small models, by kind."""
    home = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "open_clip": stand_ins.open_clip_folder(home / "open_clip"),
            "dinov2": stand_ins.dinov2_folder(home / "dinov2"),
            "transformers": stand_ins.vit_folder(home / "vit", LABELS),
            "checkpoint": stand_ins.checkpoint_folder(home / "checkpoint", LABELS),
            "timm": stand_ins.timm_folder(home / "timm"),
        }


def pictures(size: int = stand_ins.SIZE, count: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 8, 8, generator=g)
    x = F.interpolate(small, (size, size), mode="bicubic").clamp(0, 1)
    return (x * 255).round() / 127.5 - 1


def pil(x: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(((p + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for p in x]


def assert_differentiable(judge, x: torch.Tensor) -> None:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(judge(x)[:, 0].sum(), x)
    assert g.isfinite().all()
    assert (g.abs().amax((1, 2, 3)) > 0).all()


# ---- RetinaFace ----------------------------------------------------------------------------------


@pytest.fixture
def detector(monkeypatch, tmp_path):
    stand_ins.retinaface(monkeypatch, tmp_path / "torch")
    return retinaface.load()


def spots(*anchors: int) -> torch.Tensor:
    """A dark picture (1, 3, 40, 80), red in the middle of some anchors."""
    image = -torch.ones(1, 3, 40, 80)
    for x, y in (stand_ins.BOXES[list(anchors), :2] * torch.tensor([80, 40])).long():
        image[0, 0, y, x] = 1
    return image


def test_retinaface_takes_the_largest_face(detector):
    faces = detector(torch.cat([spots(0), spots(0, 1), spots()]))
    assert faces.is_face.tolist() == [True, True, False]
    assert torch.allclose(faces.boxes[0], torch.tensor([10.0, 10, 30, 30]))
    assert torch.allclose(faces.boxes[1], torch.tensor([44.0, 10, 76, 30]))
    assert faces.boxes.isfinite().all()
    first = torch.tensor([20.0, 20]) + torch.tensor([0, 1]) * 0.1 * torch.tensor([20, 20])
    assert torch.allclose(faces.landmarks[0, 0], first)  # the left eye, by the stand-in's formula
    assert faces.landmarks.shape == (3, 5, 2)


def test_of_boxes_of_one_face_the_surest_stays(detector):
    image = spots(1, 2)
    image[0, 0, 20, 57] = 0.5  # the middle of the last anchor, a little less red
    assert torch.allclose(detector(image).boxes[0], torch.tensor([44.0, 10, 76, 30]))


def test_retinaface_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "retinaface", None)
    message = r"RetinaFace needs the package 'retinaface.*pip install --no-deps retinaface-pytorch"
    with pytest.raises(ModuleNotFoundError, match=message):
        retinaface.load()


def test_retinaface_without_its_weights(monkeypatch, tmp_path):
    stand_ins.retinaface(monkeypatch, tmp_path / "torch")
    monkeypatch.setattr(retinaface, "URL", "file:///nowhere/weights.zip")
    with pytest.raises(ValueError, match=r"cannot load RetinaFace: .*weights.zip' as|or that file"):
        retinaface.load()


def test_real_retinaface_in_a_batch_is_the_package_one_by_one():
    network_module = pytest.importorskip("retinaface.network")
    from retinaface.box_utils import decode, decode_landm
    from retinaface.prior_box import priorbox
    from torchvision.ops import nms

    layers = {"layer2": 1, "layer3": 2, "layer4": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = network_module.RetinaFace("Resnet50", False, 256, layers, 256).eval()
        for head in network.ClassHead:
            torch.nn.init.normal_(head.conv1x1.weight, std=0.1)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = retinaface.RetinaFaceDetector(network, threshold=0.5)(images)
    anchors = priorbox([[16, 32], [64, 128], [256, 512]], [8, 16, 32], False, (64, 96))
    for i in range(2):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (retinaface.MEAN, retinaface.STD))
        with torch.no_grad():
            offsets, logits, points = network((((images[i] + 1) / 2 - mean) / std)[None])
        boxes = decode(offsets[0], anchors, [0.1, 0.2]) * torch.tensor([96, 64, 96, 64])
        marks = decode_landm(points[0], anchors, [0.1, 0.2]) * torch.tensor([96, 64] * 5)
        scores = logits.softmax(-1)[0, :, 1]
        sure = scores > 0.5
        kept = nms(boxes[sure], scores[sure], 0.4)
        sides = (boxes[sure][kept, 2:] - boxes[sure][kept, :2]).prod(1)
        best = kept[sides.argmax()]
        assert torch.allclose(found.boxes[i], boxes[sure][best], atol=1e-2)
        assert torch.allclose(found.landmarks[i].flatten(), marks[sure][best], atol=1e-2)


# ---- encoders ------------------------------------------------------------------------------------


def test_open_clip_is_the_library_with_its_own_preprocessing(models):
    encode = clips.load(str(models["open_clip"]))
    network, _, preprocess = open_clip.create_model_and_transforms(
        f"local-dir:{models['open_clip']}"
    )
    x = pictures()
    with torch.no_grad():
        theirs = network.eval().encode_image(torch.stack([preprocess(p) for p in pil(x)]))
        texts = network.encode_text(open_clip.tokenize(["a ball", "a box"]))
    assert torch.allclose(encode(x), F.normalize(theirs, dim=-1), atol=1e-5)
    assert torch.allclose(encode.texts(["a ball", "a box"]), F.normalize(texts, dim=-1), atol=1e-5)
    assert_differentiable(encode, pictures(48))


def test_dinov2_is_the_library_with_its_own_preprocessing(models):
    encode = dinov2.load(str(models["dinov2"]))
    processor = AutoImageProcessor.from_pretrained(models["dinov2"])
    x = pictures(28)
    values = processor(pil(x), do_resize=False, return_tensors="pt").pixel_values
    with torch.no_grad():
        theirs = Dinov2Model.from_pretrained(models["dinov2"]).eval()(values).pooler_output
    assert torch.allclose(encode(x), F.normalize(theirs, dim=-1), atol=1e-5)
    assert_differentiable(encode, pictures(48))


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (clips.load, "ViT-B-32", "neither a folder nor of the form MODEL/WEIGHTS"),
        (clips.load, "ViT-B-32/nobodys", "cannot load 'ViT-B-32/nobodys' of open_clip"),
        (clips.load, "ViT-X-99/x", "Model config for 'ViT-X-99' not found"),
        (
            dinov2.load,
            "./nowhere",
            r"cannot load the DINOv2 './nowhere': .* expected a Hub",
        ),
        (embedders.load, "nowhere", "cannot load the face embedder 'nowhere' of timm"),
        (embedders.load, "./nowhere", "expected a name that timm knows, hf-hub:ORG/MODEL"),
        (load_base, "./nowhere", "cannot load the base model './nowhere': .* expected 'testbed'"),
    ],
)
def test_models_that_are_not_there(load, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [SafetensorError("no header\nor"), UnpicklingError("no header"), KeyError("no header")]
)
def test_whatever_a_library_raises_is_one_sentence(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(ValueError, match=r"embedder 'x' of timm: '?no header'?; expected a name"):
        embedders.load("x")


def test_files_that_a_library_does_not_expect(tmp_path):
    """It takes the list for a dictionary."""
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"cannot load the base model .*; expected 'testbed'"):
        load_base(str(tmp_path))


def test_a_wrong_call_of_a_library_is_no_missing_model(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda: None)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        embedders.load("x")


def test_a_folder_of_open_clip_without_weights(tmp_path, models):
    (tmp_path / "open_clip_config.json").write_bytes(
        (models["open_clip"] / "open_clip_config.json").read_bytes()
    )
    with pytest.raises(ValueError, match=r"weights .* could not be loaded"):
        clips.load(str(tmp_path))


def test_a_model_that_is_no_dinov2(models):
    with pytest.raises(ValueError, match="it is of type 'vit'"):
        dinov2.load(str(models["transformers"]))


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="needs the package 'timm': pip install timm"):
        embedders.load("vit_tiny_patch16_224")


def test_open_clip_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ModuleNotFoundError, match="'open_clip': pip install open_clip_torch"):
        clips.load("ViT-H-14/laion2b_s32b_b79k")


# ---- classifiers ---------------------------------------------------------------------------------


def test_image_classification_sums_the_probabilities_of_labels(models):
    classify = image_classification.load(str(models["transformers"]), CLASSES)
    assert classify.classes == ("round", "square")
    network = AutoModelForImageClassification.from_pretrained(models["transformers"]).eval()
    processor = AutoImageProcessor.from_pretrained(models["transformers"])
    x = pictures()
    with torch.no_grad():
        p = network(**processor(pil(x), return_tensors="pt")).logits.softmax(-1)  # (n, 3)
    expected = torch.stack([p[:, 0] + p[:, 1], p[:, 2]], 1)
    assert torch.allclose(classify(x), expected, atol=1e-5)
    assert_differentiable(classify, x)


def test_labels_may_be_the_classes(models):
    classify = image_classification.load(str(models["transformers"]), {})
    assert classify.classes == tuple(LABELS)
    assert torch.allclose(classify(pictures()).sum(1), torch.ones(3))


def test_labels_in_groups():
    assert group(LABELS, CLASSES) == {"round": [0, 1], "square": [2]}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            {"round": ["ball", "rnig"], "square": ["box"]},
            r"'round' has the label 'rnig', but the model",
        ),
        ({"round": ["ball"], "square": ["box"]}, "must be in one class, not 'Ring' in 0"),
        ({"round": ["ball", "ring"], "square": ["box", "ring"]}, "not 'Ring' in 2"),
    ],
)
def test_labels_that_do_not_fit(models, classes, message):
    for load, kind in [
        (image_classification.load, "transformers"),
        (load_classifier, "checkpoint"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(str(models[kind]), classes)


def test_zero_shot_compares_faces_with_phrases(models):
    encode = clips.load(str(models["open_clip"]))
    classify = zero_shot(encode, PHRASES)
    assert (classify.classes, classify.size) == (("round", "square"), stand_ins.SIZE)
    x = pictures()
    means = [encode.texts(list(texts)).mean(0) for texts in PHRASES.values()]
    cosines = F.cosine_similarity(encode(x)[:, None], torch.stack(means)[None], dim=-1)
    expected = (encode.model.logit_scale.exp() * cosines).softmax(-1)
    assert torch.allclose(classify(x), expected, atol=1e-5)
    assert_differentiable(classify, x)


def test_checkpoint_with_classes(models):
    classify = load_classifier(str(models["checkpoint"]), CLASSES)
    plain = load_classifier(str(models["checkpoint"]), {})
    x = pictures()
    assert (classify.classes, classify.size) == (("round", "square"), stand_ins.SIZE)
    assert torch.allclose(classify(x)[:, 0], plain(x)[:, :2].sum(1), atol=1e-5)
    assert_differentiable(classify, x)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (None, "No such file"),
        ("[", "cannot load the classifier"),
        ({"format": 2}, "must have format 1, got 2"),
        ({"format": 1, "size": 32}, "must name two or more classes, got None"),
        ({"format": 1, "classes": ["a", "b"], "size": 1}, "size of 32 to 1024 pixels, got 1"),
        ({"format": 1, "classes": ["a", "b"], "size": 32}, "size mismatch|Error"),
    ],
)
def test_a_folder_that_is_no_classifier(facts, message, models, tmp_path):
    weights = (models["checkpoint"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    if facts is not None:
        text = facts if isinstance(facts, str) else json.dumps(facts)
        (tmp_path / "classifier.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(str(tmp_path), {})
    assert "diffusers-fair classifier train" in str(caught.value)


# ---- real faces ----------------------------------------------------------------------------------

FACELESS = -torch.ones(1, 3, 40, 80)


def test_timm_is_the_library_with_its_own_preprocessing(models):
    encode = embedders.load(str(models["timm"]))
    network = timm.create_model(f"local-dir:{models['timm']}", pretrained=True).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    x = pictures()
    with torch.no_grad():
        theirs = network(((x + 1) / 2 - mean) / std)
    assert theirs.shape == (3, 12)  # the last layer is there
    assert torch.allclose(encode(x), F.normalize(theirs, dim=-1), atol=1e-5)
    assert encode.pixels.size == stand_ins.SIZE
    assert_differentiable(encode, pictures(48))


def test_timm_without_weights_or_squares(models, tmp_path):
    config = json.loads((models["timm"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"cannot load the face embedder .* expected a name"):
        embedders.load(str(tmp_path))
    config["pretrained_cfg"]["input_size"] = [3, 32, 64]
    config["model_args"]["img_size"] = [32, 64]
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = timm.create_model(f"local-dir:{tmp_path}", num_classes=12)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"it takes images of \[3, 32, 64\], not square RGB"):
        embedders.load(str(tmp_path))


def test_a_bank_of_pictures_holds_the_faces_found(detector, models, tmp_path):
    encode = embedders.load(str(models["timm"]))
    seen = torch.cat([spots(0), FACELESS, spots(0, 1)])
    seen[:, 1:] = F.interpolate(pictures(), (40, 80))[:, 1:]  # in green and blue, so as to differ
    folder = stand_ins.picture_folder(tmp_path / "faces", seen)
    (folder / "more").mkdir()
    (folder / "0.png").rename(folder / "more" / "0.PNG")
    (folder / "notes.txt").write_text("not a picture")
    asked = ModelsSection(face_embedder=f"timm:{models['timm']}", face_bank=str(folder))
    real = load_reference_faces(asked, detector)
    with torch.no_grad():
        expected = real.embed(seen, detector(seen))[[2, 0]]
    assert torch.allclose(real.embeddings, expected, atol=1e-2)  # colours of a file are steps
    assert not torch.allclose(real.embeddings[0], real.embeddings[1], atol=1e-2)
    assert torch.allclose(real.embedder(pictures()), encode(pictures()))


def test_large_pictures_are_shrunk(tmp_path):
    folder = stand_ins.picture_folder(tmp_path / "large", torch.zeros(1, 3, 600, 1200))
    assert face_bank._read(folder / "0.png").shape == (1, 3, 256, 512)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a folder with images: put images with faces"),
        ({}, "is not a folder with images: put images with faces"),
        ({"a.jpg": b"x"}, r"a\.jpg' cannot be read as an image \(.*\): repair or remove it"),
    ],
)
def test_folders_that_are_no_bank(content, message, detector, models, tmp_path):
    folder = tmp_path / "bank"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    encode = embedders.load(str(models["timm"]))
    with pytest.raises(ValueError, match=message):
        face_bank.load(str(folder), detector, encode)


def test_a_bank_without_a_face(detector, models, tmp_path):
    folder = stand_ins.picture_folder(tmp_path / "bank", torch.cat([FACELESS, FACELESS]))
    encode = embedders.load(str(models["timm"]))
    with pytest.raises(ValueError, match="no face was found in any of its 2 images: put"):
        face_bank.load(str(folder), detector, encode)


def test_the_testbed_has_real_faces():
    from diffusers_fair.testbed import judges

    real = load_reference_faces(ModelsSection(), judges.face_detector())
    assert real.embedder is judges.face_embedder()
    assert real.embeddings.shape == (1024, 64)
    assert torch.allclose(real.embeddings.norm(dim=1), torch.ones(1024))
    assert (judges.WEIGHTS / "face_bank.safetensors").stat().st_size < 0.2e6
    x = held_out("portrait", 60)[0]
    faces = judges.face_detector()(x)
    empty = held_out("empty", 60)[0]  # the same places, without a face
    near, far = (
        (real.embed(v, faces) @ real.embeddings.T).amax(1).mean().item() for v in (x, empty)
    )
    assert near > 0.75  # measured over all held-out portraits: 0.81
    assert far < near - 0.05  # measured: 0.70


@pytest.mark.slow
def test_real_faces_are_loaded_only_if_they_have_a_weight(monkeypatch, tmp_path):
    small = {"output": str(tmp_path), "prompts.images_per_prompt": 3, "sampling.steps": 2}
    small |= {"gradient.replay_steps": 1, "adapter.rank": 2, "train.prompts_per_iteration": 1}
    trained = FairnessFinetuner.from_recipe("testbed-gender", **small, **{"losses.face": 0.5})
    figures = trained.iteration(0).metrics()
    assert figures["face"] > 0
    terms = figures["alignment"] + figures["semantics"] + figures["face"]
    assert figures["loss"] == pytest.approx(terms, abs=1e-5)

    def refuse(*args):
        raise AssertionError("real faces were loaded")

    monkeypatch.setattr(gradient, "load_reference_faces", refuse)
    plain = FairnessFinetuner.from_recipe("testbed-gender", **small)
    assert plain.gradient.objective.reference_faces is None


# ---- judges --------------------------------------------------------------------------------------


def section(models, **classifier) -> ModelsSection:
    return ModelsSection(
        classifiers={"shape": ClassifierSection(**classifier)},
        clip=f"open_clip:{models['open_clip']}",
        dino=f"dinov2:{models['dinov2']}",
    )


def test_one_model_serves_several_judges(models):
    asked = section(models, kind="zero_shot", model=str(models["open_clip"]), phrases=PHRASES)
    judges = load_judges(asked, [SHAPE])
    assert judges.classifiers["shape"].network.__closure__
    cells = [cell.cell_contents for cell in judges.classifiers["shape"].network.__closure__]
    assert any(cell is judges.clip for cell in cells)
    assert not judges.extra


def test_classes_that_are_not_the_attributes(models):
    asked = section(models, kind="transformers", model=str(models["transformers"]))
    with pytest.raises(ValueError, match=r"'shape' has .* classifier knows \['Ball', 'Ring', 'Box"):
        load_judges(asked, [SHAPE])


@pytest.mark.slow
def test_attributes_of_ones_own_are_trained_and_measured(models, tmp_path, monkeypatch):
    """Two that no file of the package knows, one of three classes, in a recipe like any other."""
    from diffusers_fair import cli

    recipe = {
        "extends": "testbed-gender-race",
        "adapter": {"init_from": None},  # another recipe's adapter, which is not there
        "attributes": [
            {"name": "glasses", "classes": ["with", "without"], "target": [0.25, 0.75]},
            {"name": "toy", "classes": LABELS, "cost": 2, "threshold": 0},
        ],
        "prompts": {"images_per_prompt": 6},
        "sampling": {"steps": 2},
        "gradient": {"replay_steps": 1},
        "optimizer": {"warmup": 0},
        "train": {"iterations": 1, "prompts_per_iteration": 1, "validation_images": 2},
        "output": str(tmp_path / "run"),
    }
    phrases = {"with": ["a face with glasses", "spectacles"], "without": ["a face", "no glasses"]}
    judges = {
        "glasses": {"kind": "zero_shot", "model": str(models["open_clip"]), "phrases": phrases},
        "toy": f"checkpoint:{models['checkpoint']}",
    }
    recipe |= {"models": {"classifiers": judges}, "evaluation": {"models": {"classifiers": judges}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "prompts.txt").write_text("a photo of the face of a chef\n")
    run(monkeypatch, cli, "train", tmp_path / "own.yaml")
    event = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    assert event.keys() >= {"bias/glasses", "bias/toy", "largest/toy"}
    assert event["gradient"] > 0
    words = ["--adapter", tmp_path / "run" / "adapter", "--recipe", tmp_path / "own.yaml"]
    words += ["--prompts", tmp_path / "prompts.txt", "--images", 4, "--steps", 2]
    run(monkeypatch, cli, "evaluate", *words, "--base", "testbed", "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["summary"]["bias"].keys() == {"glasses", "toy", "glasses x toy"}
    seen = report["prompts"][0]["attributes"]["toy"]["frequencies"]
    assert seen.keys() == set(LABELS)


def run(monkeypatch, cli, *words) -> None:
    """A command of the shell."""
    monkeypatch.setattr("sys.argv", ["diffusers-fair", *map(str, words)])
    cli.main()


def test_every_kind_has_a_provider():
    kinds = (backends.FACE_DETECTORS, backends.CLIPS, backends.DINOS, backends.FACE_EMBEDDERS)
    more = (backends.REFERENCE_FACES, backends.SHIPPED_BASES)
    paths = [path for role in (*kinds, *more) for path in role.values()]
    paths += [kind.provider for kind in backends.CLASSIFIERS.values()]
    for path in (*paths, backends.REFERENCE_FOLDER, backends.PRETRAINED_BASE):
        assert callable(provider(path).load), path
        assert callable(provider(path).needs), path


def test_what_a_base_is_used_with():
    assert untouched_sets() == ("untouched", "testbed-untouched")
    assert [untouched_set(name) for name in ("org/model", "testbed")] == [*untouched_sets()]
    assert untouched_set("testbed-flux") == untouched_set("testbed")
    pipe = pipeline()
    assert usual_sampling("org/model", pipe) == Usual(guidance_scale=7.5, steps=20)
    assert usual_sampling("testbed", pipe) == Usual(guidance_scale=4.5, steps=20)
    models = ("org/model", "testbed", "testbed-flux")
    usual = [(base(m).usual_device, base(m).usual_dtype) for m in models]
    assert usual == [("auto", "auto"), ("cpu", "float32"), ("cpu", "float32")]
    assert base("org/model").usual_evaluation is None


def test_the_testbed_stays_the_default():
    from diffusers_fair.testbed import judges, world

    loaded = load_judges(ModelsSection(), [world.GENDER])
    assert loaded.clip is judges.clip()
    chips = pictures(judges.CHIP)
    training, evaluation = (judges.classifier("gender", evaluation=e) for e in (False, True))
    assert torch.equal(loaded.classifiers["gender"](chips), training(chips))
    later = load_judges(EvaluationModelsSection(), [world.GENDER])
    assert torch.equal(later.classifiers["gender"](chips), evaluation(chips))
    assert list(later.extra) == ["context"]
    assert load_evaluation_judges(["race"]).classifiers["race"].classes == world.RACE.classes
    with pytest.raises(ValueError, match="the testbed has no attribute 'height'"):
        load_evaluation_judges(["height"])


def test_the_testbeds_judges_move():
    """All of a judge is on the device: torch refuses to mix it with the CPU."""
    from diffusers_fair.testbed import world

    images = torch.zeros(2, 3, 64, 64)
    for section in (ModelsSection(), EvaluationModelsSection()):
        judges = load_judges(section, [world.GENDER], "meta")
        x = judges.on_device(images)
        faces = judges.faces(x)
        results = [faces.boxes, judges.clip(x), judges.clip.texts(["a chef"]), judges.dino(x)]
        results.append(judges.probabilities(world.GENDER, x, faces))
        assert {result.device.type for result in results} == {"meta"}
    real = load_reference_faces(ModelsSection(), judges.face_detector, "meta")
    assert {real.embeddings.device.type, real.embedder(x).device.type} == {"meta"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "models.clip=ViT-H-14",
            "models.clip: expected 'testbed' or 'open_clip:MODEL/WEIGHTS', got",
        ),
        ("models.clip='open_clip:'", "expected 'testbed' or 'open_clip:MODEL/WEIGHTS'"),
        ("models.face_detector=retinaface:x", "expected 'testbed' or 'retinaface' or 'none', got"),
        ("models.dino=dinov2", "expected 'testbed' or 'dinov2:MODEL', got 'dinov2'"),
        ("models.face_embedder=timm", "expected 'testbed' or 'timm:MODEL', got 'timm'"),
        (
            "models.face_embedder=timm:x",
            "models: face_bank 'testbed' holds embeddings of .*, not of 'timm:x': choose a",
        ),
        ("evaluation.models.face_bank=x", r"unknown key 'evaluation\.models\.face_bank'"),
        ("models.classifiers=blip", r"classifiers\.\*\.kind: expected 'testbed', .* got 'blip'"),
        ("models.classifiers=testbed:x", "expected 'testbed' or 'testbed:evaluation', got 'x'"),
        ("models.classifiers={race: testbed}", "no classifier for attribute 'gender': .* race"),
        ("models.classifiers.gender=checkpoint", "of kind 'checkpoint' needs a model"),
        ("models.classifiers.gender.knd=x", r"unknown key .*gender\.knd': did you mean 'kind'"),
        ("models.classifiers.gender=zero_shot:x", "'zero_shot' needs phrases for each class"),
        (
            "models.classifiers.gender={kind: zero_shot, model: x, phrases: {male: [a]}}",
            r"phrases\.male: expected 2 or more, got 1",
        ),
        (
            "models.classifiers.gender={kind: checkpoint, model: x, phrases: {male: [a, b]}}",
            "kind 'checkpoint' takes no phrases",
        ),
        (
            "models.classifiers.gender={kind: testbed, classes: {male: [a, b]}}",
            "kind 'testbed' takes no classes",
        ),
        (
            "models.classifiers.gender={kind: checkpoint, model: x, classes: {man: [a]}}",
            r"its classifier has \['man'\]: they must be the same",
        ),
        (
            "models.classifiers.gender={kind: testbed, trained_on: 'hf:org/faces'}",
            "a classifier of kind 'testbed' takes no trained_on",
        ),
    ],
)
def test_recipes_that_name_models_wrongly(override, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.load("testbed-gender", [override])


def test_every_key_of_a_classifier_is_documented():
    assert all(field.description for field in ClassifierSection.model_fields.values())
    assert all(field.description for field in ModelsSection.model_fields.values())


# ---- Stable Diffusion 1.5 ------------------------------------------------------------------------

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
RATE = 20  # evaluations per second that the README assumes
PAPER = {  # appendix A.2 and A.7: images, threshold, lambda_face, lambda_1, iterations
    "sd15-gender-paper": (24, 0.8, 1, 8, 10_000),
    "sd15-race-paper": (32, 0.8, 0.1, 6, 12_000),
    "sd15-gender-race-paper": (32, 0.6, 0.1, 8, 14_000),
    "sd15-gender-race-age-paper": (40, 0.7, 0.1, 8, 14_000),
}
LESS = {  # for each attribute lambda_2 / lambda_1 and lambda_3 / lambda_2
    "sd15-gender-paper": [(0.2, 0.2)],
    "sd15-race-paper": [(0.6, 0.3)],
    "sd15-gender-race-paper": [(0.2, 0.2), (0.6, 0.3)],
    "sd15-gender-race-age-paper": [(0.2, 0.2), (0.3, 0.3), (0.3, 0.3)],
}


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    return stand_ins.stable_diffusion(tmp_path_factory.mktemp("base") / "sd15")


def small(config: RunConfig, models, base) -> dict:
    """Overrides that put small models in the places of those of a recipe, kind by kind."""

    def classifiers(section: ModelsSection) -> dict:
        found = {}
        for name, classifier in section.classifiers.items():
            model = {"zero_shot": "open_clip"}.get(classifier.kind, classifier.kind)
            folder = models[model]
            if classifier.kind != "zero_shot":
                labels = [label for words in classifier.classes.values() for label in words]
                make = {"checkpoint": stand_ins.checkpoint_folder}.get(model, stand_ins.vit_folder)
                folder = folder.with_name(f"{model}-{'-'.join(labels)}".replace(" ", "_"))
                folder.exists() or make(folder, labels)
            found[f"{name}.model"] = str(folder)
        return found

    values = {"base.model": str(base), "prompts.images_per_prompt": 2, "sampling.steps": 2}
    values |= {"prompts.keep.images": 2, "prompts.keep.pairs": 2, "prompts.keep.texts": 2}
    values["gradient.replay_steps"] = 1
    for key, section in {
        "models": config.models,
        "evaluation.models": config.evaluation.models,
    }.items():
        values[f"{key}.clip"] = f"open_clip:{models['open_clip']}"
        values[f"{key}.dino"] = f"dinov2:{models['dinov2']}"
        values |= {f"{key}.classifiers.{k}": v for k, v in classifiers(section).items()}
    return values


def test_the_quick_recipe_states_its_cost():
    quick, whole = (RunConfig.load(f"sd15-gender{name}") for name in ("-quick", ""))
    header = (RECIPES / "sd15-gender-quick.yaml").read_text("utf-8")
    assert (
        f"# Cost: {cost.evaluations(quick) / 1e6:.2f} million U-Net evaluations. The paper's "
        f"training takes {cost.published_evaluations(whole) / 1e6:.1f} million "
        f"(sd15-gender: {cost.evaluations(whole) / 1e6:.1f}).\n"
    ) in header
    hours = [
        f"{count / RATE / 3600:.0f}"
        for count in (cost.evaluations(quick), cost.published_evaluations(whole))
    ]
    assert f"{hours[0]} hours, the paper's {hours[1]}" in " ".join(README.split())


def test_what_a_classifier_was_trained_on_is_no_part_of_a_run():
    """Runs and caches of recipes that did not name it yet stay valid."""
    recipe = RunConfig.load("sd15-gender")
    before = RunConfig.load("sd15-gender", {"models.classifiers.gender.trained_on": ""})
    assert "trained_on" in recipe.to_yaml()
    assert "trained_on" not in before.to_yaml()
    assert not recipe.differences(before)
    assert run_cache_key(recipe) == run_cache_key(before)


def test_every_recipe_of_the_paper_is_shipped():
    assert set(PAPER) <= set(recipes())


@pytest.mark.parametrize("name", PAPER)
def test_recipe_has_the_papers_figures(name):
    config = RunConfig.load(name)
    images, threshold, face, semantics, iterations = PAPER[name]
    assert config.base.model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert config.prompts.images_per_prompt == images
    assert {a.threshold for a in config.attributes} == {threshold}
    assert (config.losses.semantics, config.losses.face) == (semantics, face)
    assert [(a.semantics_changed, a.semantics_face) for a in config.attributes] == LESS[name]
    assert config.optimizer.ema_decay == 0.996
    assert config.train.iterations == iterations
    assert config.sampling.steps == (19, 23)
    assert (config.adapter.rank, config.optimizer.lr) == (50, 5e-5)
    assert "-".join(["sd15", *(a.name for a in config.attributes), "paper"]) == name
    judged = {a.name for a in config.attributes}
    assert set(config.models.classifiers) == set(config.evaluation.models.classifiers) == judged


@pytest.mark.parametrize("name", PAPER)
def test_recipe_without_face_realism_differs_in_nothing_else(name):
    paper, shipped = RunConfig.load(name), RunConfig.load(name.removesuffix("-paper"))
    assert {*shipped.differences(paper)} == {"losses.face"}
    assert shipped.losses.face == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_the_dtype_that_suits_the_processor(units, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    pipe = load_base("testbed", dtype="auto")
    assert {p.dtype for part in (pipe.unet, pipe.vae) for p in part.parameters()} == {expected}
    assert load_base("testbed", dtype="bfloat16").text_encoder.dtype == torch.bfloat16


@pytest.mark.slow
def test_a_single_file_is_the_pipeline_of_its_folder(stable_diffusion, monkeypatch, tmp_path):
    file = stand_ins.single_file(stable_diffusion, tmp_path / "model.safetensors")
    config = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # what diffusers takes it for
    stand_ins.hub_cache(tmp_path / "cache", config, stable_diffusion)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder, single = load_base(stable_diffusion), load_base(str(file))
    assert type(single) is type(folder)
    assert type(single.scheduler) is type(folder.scheduler)
    for part in ("unet", "vae", "text_encoder"):
        ours = getattr(single, part).state_dict()
        for name, weight in getattr(folder, part).state_dict().items():
            assert torch.equal(ours[name], weight), name
    assert [need.available for need in base(str(file)).needs(str(file), None)] == [True]


def test_single_files_that_will_not_do(monkeypatch, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    for name, reason in {"none": "No such file", "bad": "header too small"}.items():
        with pytest.raises(ValueError, match=rf"base model .*{name}.safetensors': .*{reason}"):
            load_base(str(tmp_path / f"{name}.safetensors"))
    missing = str(tmp_path / "none.safetensors")
    assert [need.available for need in base(missing).needs(missing, None)] == [False]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in recipes() if name.startswith("sd15-")])
def test_recipe_trains_one_iteration(name, models, stable_diffusion, monkeypatch, tmp_path):
    stand_ins.retinaface(monkeypatch, tmp_path / "torch")
    values = small(RunConfig.load(name), models, stable_diffusion)
    values["models.face_embedder"] = f"timm:{models['timm']}"
    values["models.face_bank"] = str(stand_ins.picture_folder(tmp_path / "real", spots(0, 1)))
    values |= {"optimizer.warmup": 0, "output": str(tmp_path / "run")}
    trained = FairnessFinetuner.from_recipe(name, **values)
    assert trained.pipe.unet.dtype == torch.bfloat16
    assert type(trained.pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    before = [p.detach().clone() for p in trained.parameters]
    figures = trained.iteration(0).metrics()
    assert ("face" in figures) == name.endswith("-paper")
    assert figures["skipped"] == 0
    assert figures["gradient"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trained.parameters, strict=True))


@pytest.mark.slow
def test_recipe_evaluates(models, stable_diffusion, monkeypatch, tmp_path, capsys):
    from diffusers_fair import cli

    stand_ins.retinaface(monkeypatch, tmp_path / "torch")
    name = "sd15-gender-race-age"
    config = RunConfig.load(name, small(RunConfig.load(name), models, stable_diffusion))
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    (tmp_path / "prompts.txt").write_text("a photo of a chef\n")
    words = ["--base", stable_diffusion, "--prompts", tmp_path / "prompts.txt", "--images", 2]
    words += ["--steps", 2, "--group-images", 1, "--out", tmp_path / "report"]
    monkeypatch.setattr("sys.argv", ["diffusers-fair", "evaluate", *map(str, words)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "there are no models to judge the images of" in capsys.readouterr().err
    sys.argv += ["--recipe", str(tmp_path / "recipe.yaml")]
    cli.main()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {a["name"] for a in report["settings"]["attributes"]} == {"gender", "race", "age"}
