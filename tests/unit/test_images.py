"""The conversion between images in [-1, 1], bytes and pictures of Pillow."""

import numpy as np
import torch
from PIL import Image

from diffusers_fair.vision.images import from_bytes, from_pillow, to_arrays, to_bytes


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
