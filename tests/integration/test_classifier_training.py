"""A classifier of one's own: pictures in, a folder with weights and held-out figures out."""

import dataclasses
import io
import json
import os
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffusers_fair import cli
from diffusers_fair.backends.trained_classifier import load as load_classifier
from diffusers_fair.training import classifier as classifier_training
from diffusers_fair.training.classifier import Settings, _hold_out, train_classifier
from diffusers_fair.training.labelled_images import read_images
from diffusers_fair.training.stopping import StoppedError

COLOURS = {"green": (30, 200, 30), "red": (200, 30, 30)}
SMALL = Settings(size=32, epochs=8, batch_size=8, held_out=0.25, pretrained=False)


def picture(colour: str, seed: int) -> Image.Image:
    """Noise of a colour, 40 by 36 pixels."""
    noise = np.random.default_rng(seed).normal(COLOURS[colour], 40, (36, 40, 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def contents(colour: str, seed: int) -> bytes:
    file = io.BytesIO()
    picture(colour, seed).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """16 pictures of each colour."""
    home = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        (home / colour).mkdir()
        for i in range(16):
            picture(colour, i).save(home / colour / f"{i:02d}.png")
    (home / "notes.txt").write_text("not a picture")
    return home


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A classifier's folder, and its facts."""
    out = tmp_path_factory.mktemp("classifier") / "colour"
    return out, train_classifier(read_images(folder), out, SMALL)


def write(file, labels, images, metadata=None):
    table = pa.table({"image": images, "colour": labels, "other": list(range(len(labels)))})
    pq.write_table(table.replace_schema_metadata(metadata), file)
    return file


# ---- pictures ------------------------------------------------------------------------------------


def test_a_folder_for_each_class(folder):
    found = read_images(folder)
    assert found.classes == ("green", "red")
    assert found.labels.tolist() == [0] * 16 + [1] * 16
    assert found.files[16].parent.name == "red"


def test_a_parquet_file_of_words(tmp_path):
    words = ["red", "green", "red", "green"]
    images = [contents(word, i) for i, word in enumerate(words)]
    found = read_images(write(tmp_path / "x.parquet", words, images), "colour")
    assert found.classes == ("green", "red")
    assert found.labels.tolist() == [1, 0, 1, 0]
    assert found.files == images


def test_a_folder_of_parquet_files_with_named_numbers(tmp_path):
    """As the library `datasets` writes them: structs, and names in the metadata."""
    names = {"info": {"features": {"colour": {"names": ["red", "blue", "green"]}}}}
    metadata = {"huggingface": json.dumps(names)}
    for part in ("a", "b"):
        images = [{"bytes": contents("red", i), "path": None} for i in range(3)]
        write(tmp_path / f"{part}.parquet", [0, 2, 0], images, metadata)
    found = read_images(tmp_path, "colour")
    assert found.classes == ("red", "green")  # nothing is blue
    assert found.labels.tolist() == [0, 1, 0, 0, 1, 0]
    assert all(isinstance(file, bytes) for file in found.files)


def test_sources_that_will_not_do(tmp_path, folder):
    with pytest.raises(ValueError, match="there is nothing at 'nowhere'"):
        read_images("nowhere")
    with pytest.raises(ValueError, match=r"two or more classes .* got \{\}"):
        read_images(tmp_path)
    with pytest.raises(ValueError, match="expected the path of a file or folder, got an empty"):
        read_images("")
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"bad.parquet' cannot be read as parquet: Parquet magic"):
        read_images(tmp_path / "bad.parquet")
    (tmp_path / "bad.parquet").unlink()
    file = write(tmp_path / "x.parquet", ["red"] * 3, [b""] * 3)
    with pytest.raises(ValueError, match="has no column 'label', it has image, colour, other"):
        read_images(file)
    with pytest.raises(ValueError, match=r"two or more classes .* got \{'red': 3\}"):
        read_images(file, "colour")
    (tmp_path / "one").mkdir()
    for colour, count in {"red": 3, "green": 1}.items():
        (tmp_path / "one" / colour).mkdir()
        for i in range(count):
            picture(colour, i).save(tmp_path / "one" / colour / f"{i}.png")
    with pytest.raises(ValueError, match="two or more images each"):
        read_images(tmp_path / "one")


@pytest.mark.parametrize(
    ("label", "image", "message"),
    [
        (-1, b"x", "row 2 of .* a label, got the label -1"),  # `datasets` says so of unknown ones
        (2, b"x", "got the label 2"),
        (None, b"x", "got the label None"),
        (0, None, "the contents of an image .* NoneType as the image"),
    ],
)
def test_rows_without_a_label_or_an_image(label, image, message, tmp_path):
    names = {"info": {"features": {"colour": {"names": ["red", "green"]}}}}
    labels, images = [0, 1, label], [b"x", b"x", image]
    file = write(tmp_path / "x.parquet", labels, images, {"huggingface": json.dumps(names)})
    with pytest.raises(ValueError, match=message):
        read_images(file, "colour")


def test_the_share_of_every_class_is_held_out():
    labels = torch.tensor([0] * 20 + [1] * 4 + [2] * 2)
    train, held = _hold_out(labels, 0.25, torch.Generator().manual_seed(0))
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(26))
    assert torch.bincount(labels[held]).tolist() == [5, 1, 1]
    again = _hold_out(labels, 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(held, again[1])


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "where"), [(2, "batch 2 of epoch 1 of 2"), (3, "epoch 1 of 2")])
def test_a_stopped_training_goes_on_to_the_same_classifier(
    batch, where, folder, tmp_path, monkeypatch
):
    images = read_images(folder)
    settings = dataclasses.replace(SMALL, epochs=2)  # of three batches
    train_classifier(images, tmp_path / "whole", settings)
    load, loaded = classifier_training._load, []

    def stop(*args):
        loaded.append(args)
        if len(loaded) == batch:
            os.kill(os.getpid(), signal.SIGINT)
        return load(*args)

    with monkeypatch.context() as patch:
        patch.setattr(classifier_training, "_load", stop)
        with pytest.raises(StoppedError, match=f"stopped after {where}, .*same command") as stopped:
            train_classifier(images, tmp_path / "stopped", settings)
    assert stopped.value.code == 130
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["training.pt"]
    with pytest.raises(ValueError, match="stopped, with other images or options: give the same"):
        train_classifier(images, tmp_path / "stopped", dataclasses.replace(settings, lr=1.0))
    train_classifier(images, tmp_path / "stopped", settings)
    files = [sorted(path.name for path in (tmp_path / f).iterdir()) for f in ("whole", "stopped")]
    assert files[0] == files[1] == ["classifier.json", "model.safetensors"]
    for name in files[0]:
        whole, stopped = ((tmp_path / f / name).read_bytes() for f in ("whole", "stopped"))
        assert whole == stopped


@pytest.mark.slow
def test_the_folder_says_how_good_the_classifier_is(trained, folder):
    out, facts = trained
    assert sorted(path.name for path in out.iterdir()) == ["classifier.json", "model.safetensors"]
    assert json.loads((out / "classifier.json").read_text()) == {"format": 1} | facts
    assert facts["pictures"] == {"trained on": 24, "held out": 8}
    confusion = np.array(facts["confusion"])
    assert confusion.sum(1).tolist() == [4, 4]
    assert facts["accuracy"] == confusion.trace() / 8
    assert facts["accuracy"] >= 0.75  # red is not green; 1 here


@pytest.mark.slow
def test_what_was_measured_is_what_is_loaded(trained, folder):
    out, facts = trained
    pictures = read_images(folder)
    _, held = _hold_out(pictures.labels, SMALL.held_out, torch.Generator().manual_seed(SMALL.seed))
    classify = load_classifier(str(out), {})
    assert (classify.classes, classify.size) == (("green", "red"), 32)
    guesses = classify(classifier_training._load(pictures, held, 32)).argmax(1)
    assert (guesses == pictures.labels[held]).float().mean() == facts["accuracy"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_classifier(folder, tmp_path):
    quick = Settings(size=32, epochs=1, batch_size=12, held_out=0.25, pretrained=False)
    state = torch.get_rng_state()
    for name in ("a", "b"):
        train_classifier(read_images(folder), tmp_path / name, quick)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_a_folder_that_holds_something_is_left_alone(trained, folder):
    with pytest.raises(ValueError, match="is not an empty folder: choose another folder"):
        train_classifier(read_images(folder), trained[0], SMALL)


def test_a_damaged_state_of_a_stopped_training(folder, tmp_path):
    (tmp_path / "training.pt").write_text("junk")
    with pytest.raises(ValueError, match=r"training.pt' is damaged, or no training .*: remove it"):
        train_classifier(read_images(folder), tmp_path, SMALL)
    assert (tmp_path / "training.pt").read_text() == "junk"


@pytest.mark.slow
def test_a_training_that_diverges_leaves_nothing(folder, tmp_path):
    settings = dataclasses.replace(SMALL, epochs=2, lr=1e30)
    with pytest.raises(ValueError, match=r"diverged: choose a lower lr than 1e\+30"):
        train_classifier(read_images(folder), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"size": 8}, "size must be 32 to 1024, got 8"),
        ({"size": 2048}, "size must be 32 to 1024, got 2048"),
        ({"lr": float("nan")}, "lr must be a finite number above 0, got nan"),
        ({"lr": float("inf")}, "lr must be a finite number above 0, got inf"),
        ({"seed": -1}, r"seed must be 0 to \d+, got -1"),
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"batch_size": 1}, r"batch_size must be 2 to \d+, got 1"),
        ({"held_out": 1}, "held_out must be between 0 and 1, got 1"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        Settings(**setting)


def test_imagenets_weights_that_cannot_be_had(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"ImageNet's weights: no network; .*--no-pretrained"):
        train_classifier(read_images(folder), tmp_path / "out", Settings(size=32))
    assert not (tmp_path / "out").exists()


def test_ctrl_c_while_the_speed_is_measured_stops_at_once(monkeypatch):
    """There is nothing to save or to resume."""
    interrupt = lambda *_: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    monkeypatch.setattr(classifier_training, "_load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        classifier_training.seconds_per_image(SMALL)


@pytest.mark.slow
def test_the_command(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "colour"
    words = ["--out", out, "--size", 32, "--epochs", 1, "--batch-size", 12, "--no-pretrained"]
    words = ["diffusers-fair", "classifier", "train", folder, *words, "--held-out", 0.25]
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    cli.main()
    said = capsys.readouterr().out
    assert "on 8 held-out images" in said
    assert "true class, classified as" in said
    assert (out / "classifier.json").exists()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "is not an empty folder" in capsys.readouterr().err
