"""Image files, and the conversion between images in [-1, 1], bytes and pictures of Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_fair.vision.images import (
    from_bytes,
    from_pillow,
    image_files,
    read_image,
    to_arrays,
    to_bytes,
)


def test_every_byte_comes_back():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = from_bytes(values)
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal(to_bytes(images), values)


def test_values_outside_are_clipped():
    assert to_bytes(torch.tensor([-1.5, 0.0, 3.0])).tolist() == [0, 128, 255]


def test_pillow_s_pictures_come_back():
    pixels = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    images = torch.stack([from_pillow(Image.fromarray(each)) for each in pixels])
    assert images.shape == (2, 3, 4, 5)
    assert (to_arrays(images) == pixels).all()
    assert (to_arrays(images[0]) == pixels[0]).all()


# ---- files ---------------------------------------------------------------------------------------

STEPS = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4369  # 0 to 65535
RED = Image.new("RGB", (4, 4), "red")


@pytest.mark.parametrize(
    ("name", "dtype"), [("a.png", "uint16"), ("a.tif", "uint16"), ("a.pgm", "int32")]
)
def test_16_bit_pixels_are_scaled(name, dtype, tmp_path):
    Image.fromarray(STEPS.astype(dtype)).save(tmp_path / name)
    pixels = np.array(read_image(tmp_path / name))
    assert (pixels == (STEPS // 257)[..., None]).all()


def test_a_transparent_16_bit_grey_is_white(tmp_path):
    Image.fromarray(STEPS).save(tmp_path / "a.png", transparency=4369)
    pixels = np.array(read_image(tmp_path / "a.png"))
    assert pixels[0, :, 0].tolist() == [0, 255, 34, 51]


@pytest.mark.parametrize(
    ("name", "image", "options", "color"),
    [
        ("palette.png", RED.quantize(2), {}, (255, 0, 0)),
        ("clear.gif", RED.quantize(2), {"transparency": 0}, (255, 255, 255)),
        ("grey.png", Image.new("LA", (4, 4), (0, 0)), {}, (255, 255, 255)),
        ("half.png", Image.new("RGBA", (4, 4), (255, 0, 0, 51)), {}, (255, 204, 204)),
        ("ink.tif", RED.convert("CMYK"), {}, (255, 0, 0)),
        ("bit.png", Image.new("1", (4, 4), 1), {}, (255, 255, 255)),
        ("photo.jpg", RED, {"format": "MPO", "save_all": True, "append_images": [RED]}, None),
    ],
)
def test_every_kind_of_picture_is_rgb_on_white(name, image, options, color, tmp_path):
    image.save(tmp_path / name, **options)
    found = read_image(tmp_path / name)
    assert found.mode == "RGB"
    assert found.getpixel((1, 1)) == (color or (254, 0, 0))  # JPEG loses a little


@pytest.mark.parametrize(
    ("name", "image", "options", "message"),
    [
        ("a.gif", RED, {"save_all": True, "append_images": [Image.new("RGB", (4, 4))]}, "of 2"),
        ("a.tif", Image.fromarray(STEPS.astype("float32")), {}, "16 bits, got mode F"),
        ("a.tif", Image.fromarray(STEPS.astype("int32")), {}, "16 bits, got mode I"),
        ("a.tif", Image.new("LAB", (4, 4)), {}, "RGB or CMYK in 8 or 16 bits, got mode LAB"),
    ],
)
def test_pictures_of_unclear_content_are_refused(name, image, options, message, tmp_path):
    image.save(tmp_path / name, **options)
    with pytest.raises(ValueError, match=rf"{name}' cannot be read.*{message}.*: repair or remove"):
        read_image(tmp_path / name)


def test_files_of_the_system_are_no_pictures(tmp_path):
    names = ["a.png", "b/c.JPG", "._a.png", ".DS_Store", "Thumbs.db", "a.pdf", "a.txt"]
    names += ["__MACOSX/a.png", "__MACOSX/b/._c.JPG", ".cache/a.png", "b/.hidden.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    assert image_files(tmp_path) == [tmp_path / "a.png"]
    assert image_files(tmp_path, "*/*") == [tmp_path / "b" / "c.JPG"]
    assert image_files(tmp_path, "**/*") == [tmp_path / "a.png", tmp_path / "b" / "c.JPG"]
