"""A folder of pictures made by anything: what is read, what is a gap, what is said of bad input."""

import json

import numpy as np
import pytest
import torch
from judging import HUE, TONE, find_none, judges
from PIL import Image

from diffusers_fair.evaluation.audit import audit
from diffusers_fair.evaluation.generate import pairs_of
from diffusers_fair.evaluation.image_folder import image_folder
from diffusers_fair.reports.folder import load_report


def paint(file, size=(16, 16), seed=0, mode="RGB", **options):
    """A picture of noise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, **options)


@pytest.fixture
def folder(tmp_path):
    """Three prompts with four, one and no pictures, of several sizes and formats."""
    place = tmp_path / "pictures"
    paint(place / "a baker" / "0.png")
    paint(place / "a baker" / "1.jpg", (30, 20), 1)
    paint(place / "a baker" / "2.webp", (10, 24), 2, lossless=True)
    paint(place / "a baker" / "3.gif", (8, 8), 3, mode="P")
    (place / "a baker" / "notes.json").write_text("{}")
    paint(place / "x1" / "0.tif", (12, 12), 4, mode="L")
    (place / "x1" / "prompt.txt").write_text("a judge\n in a robe\n")
    (place / "a nurse").mkdir()
    return place


def look(folder, **changes):
    return audit(folder, [HUE, TONE], judges=judges(), progress=False, **changes)


def test_gaps_are_explicit_and_prompts_count_their_own_pictures(folder, tmp_path):
    report = look(folder, out=tmp_path / "report", batch_size=2)
    assert report.settings.prompts == ("a baker", "a nurse", "a judge in a robe")
    assert [p.images for p in report.prompts] == [4, 0, 1]
    assert report.prompts[0].attributes["hue"].noise_floor > 0.2
    assert report.prompts[1].attributes == report.prompts[2].attributes
    assert set(report.prompts[2].attributes.values()) == {None}
    assert report.prompts[1].scores == {"clip_t": None}
    summary = report.summary
    assert summary.bias["hue"].n == 1
    assert summary.prompts_without_images == ["a nurse"]
    assert summary.prompts_without_faces == ["a nurse"]
    assert summary.prompts_with_one_face == ["a judge in a robe"]
    assert summary.face_rate.mean == 1
    json.dumps([summary.json(), *(p.json() for p in report.prompts)], allow_nan=False)
    again = load_report(tmp_path / "report")
    assert again.summary == summary
    assert again.records.file.tolist()[-1] == "x1/0.tif"
    assert again.records.seed is None
    assert again.settings.seed is None


def test_figures_do_not_depend_on_the_batches(folder):
    one, many = look(folder, batch_size=1), look(folder, batch_size=24)
    for key, values in one.records.scores.items():
        np.testing.assert_allclose(many.records.scores[key], values, atol=1e-5)
    assert one.summary.bias == many.summary.bias


def test_no_face_in_any_picture(folder):
    report = audit(folder, [HUE], judges=judges(face_detector=find_none), progress=False)
    assert report.summary.bias == {"hue": None}
    assert len(report.summary.prompts_without_faces) == 3


def test_pictures_are_fitted_into_a_square(folder):
    found = image_folder(folder)
    assert found.side == 30
    (pairs,) = pairs_of([len(files) for files in found.files], 24)
    images = found.read(pairs).images
    assert images.shape == (5, 3, 30, 30)
    lower = images[1, :, 25:]  # of 30 x 20 pixels: five rows of grey above and below
    torch.testing.assert_close(lower, torch.full_like(lower, 127 / 127.5 - 1))


def test_pictures_of_one_size_stay_as_they_are(tmp_path):
    paint(tmp_path / "a" / "0.png", (20, 12))
    paint(tmp_path / "b" / "0.png", (20, 12), 1)
    found = image_folder(tmp_path)
    assert found.side is None
    images = found.read(np.array([[1, 0]])).images
    pixels = np.array(Image.open(tmp_path / "b" / "0.png"))
    np.testing.assert_allclose((images[0].permute(1, 2, 0) + 1) * 127.5, pixels, atol=1e-4)


def test_transparent_parts_are_white_and_cameras_are_turned(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a" / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it a quarter
    picture = Image.new("RGB", (8, 8), "black")
    picture.paste("white", (0, 0, 8, 4))
    picture.save(tmp_path / "a" / "1.png", exif=exif)
    clear, turned = image_folder(tmp_path).read(np.array([[0, 0], [0, 1]])).images
    assert (clear == 1).all()
    assert (turned[:, :, 4:] == 1).all()
    assert (turned[:, :, :4] == -1).all()


def test_a_picture_that_cannot_be_read(folder):
    file = folder / "a baker" / "1.jpg"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"1\.jpg' cannot be read as an image \(.*\): repair or"):
        image_folder(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place: None, "there is no folder '.*nowhere': expected one with a subfolder per"),
        (lambda place: place.mkdir(), r"has no subfolder with images \(but 0 images of its own"),
        (
            lambda place: paint(place / "0.png"),
            r"\(but 1 images of its own\): expected a subfolder",
        ),
        (lambda place: (place / "a baker").mkdir(parents=True), "has no subfolder with images"),
    ],
)
def test_folders_without_pictures(make, message, tmp_path):
    make(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=message):
        image_folder(tmp_path / "nowhere")


def test_prompts_that_are_not_clear(folder):
    (folder / "x1" / "prompt.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"prompt\.txt' holds no prompt: expected one as UTF-8"):
        image_folder(folder)
    (folder / "x1" / "prompt.txt").write_text("a baker")
    with pytest.raises(ValueError, match="two subfolders for the prompt 'a baker': merge them"):
        image_folder(folder)


def test_what_systems_add_is_no_prompt(folder):
    paint(folder / "__MACOSX" / "a baker" / "._0.png")
    paint(folder / ".cache" / "0.png")
    (folder / "a baker" / "._0.png").write_bytes(b"x")
    found = image_folder(folder)
    assert found.prompts == ("a baker", "a nurse", "a judge in a robe")
    assert [len(files) for files in found.files] == [4, 0, 1]


def test_two_unicode_forms_of_a_prompt(folder):
    paint(folder / "a cafe\u0301 owner" / "0.png")
    assert "a caf\u00e9 owner" in image_folder(folder).prompts
    paint(folder / "a caf\u00e9 owner" / "0.png")
    with pytest.raises(ValueError, match="two subfolders for the prompt 'a caf\u00e9 owner'"):
        image_folder(folder)


def test_other_pictures_do_not_go_on(folder, tmp_path):
    look(folder, out=tmp_path / "report")
    paint(folder / "a baker" / "4.png")
    with pytest.raises(ValueError, match="already holds another report"):
        look(folder, out=tmp_path / "report")
