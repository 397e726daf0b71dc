import pytest
import torch
from pictures import held_out

from diffusers_fair.testbed.judges import FaceGrid, GridDetector, face_detector
from diffusers_fair.vision.faces import (
    TEMPLATE,
    Faces,
    _square_boxes,
    aligned_chips,
    face_chips,
    overlap,
)


def faces(*boxes: tuple[float, float, float, float]) -> Faces:
    return Faces(torch.tensor(boxes), torch.ones(len(boxes), dtype=torch.bool))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Cells(torch.nn.Module):
    """A detector's network that has made up its mind."""

    def __init__(self, logits: list[float], boxes: list[list[float]]):
        super().__init__()
        self.answer = torch.tensor([logits]), torch.tensor([boxes])

    def forward(self, images):
        return self.answer


def test_square_box_grows_the_longer_side():
    assert _square_boxes(torch.tensor([[10.0, 20, 20, 40]]), 0.5).tolist() == [[15, 30, 30]]


def test_chip_of_a_box_of_its_own_size_is_the_plain_crop(images):
    chips = face_chips(images, faces((0, -2, 16, 14), (4, -2, 20, 14)), 16, margin=0)
    assert torch.allclose(chips[0, :, 2:14], images[0], atol=1e-5)
    assert torch.allclose(chips[1, :, 2:14, :12], images[1, :, :, 4:], atol=1e-5)


def test_chip_beyond_the_image_repeats_its_border(images):
    chips = face_chips(images, faces((-40, 0, -30, 10), (-40, 0, -30, 10)), 5, margin=0)
    assert torch.allclose(chips.diff(dim=-1), torch.zeros(()), atol=1e-5)


def test_small_chips_average_instead_of_skipping():
    checks = torch.tensor([[1.0, -1], [-1, 1]]).repeat(8, 8).expand(1, 3, 16, 16)
    chips = face_chips(checks, faces((0, 0, 16, 16)), 4, margin=0)
    assert chips.abs().max() < 1e-5


def test_chips_do_not_depend_on_the_rest_of_the_batch(images):
    both = faces((2, 3, 8, 9), (1, 1, 15, 11))
    together = face_chips(images, both, 8)
    alone = [face_chips(images[i : i + 1], both[i : i + 1], 8) for i in range(2)]
    assert torch.equal(together, torch.cat(alone))


def test_chips_are_differentiable(images):
    x = images.double().requires_grad_()
    both = faces((2.3, 3.1, 8, 9.4), (1, 1, 15, 11))
    assert torch.autograd.gradcheck(lambda v: face_chips(v, both, 5), x)


def test_chips_need_a_row_for_each_image(images):
    with pytest.raises(
        ValueError, match="expected the faces of 2 images, one row each, got 1 rows"
    ):
        face_chips(images, faces((0, 0, 5, 5)), 8)


def marked(landmarks: torch.Tensor) -> Faces:
    n = len(landmarks)
    return Faces(torch.zeros(n, 4), torch.ones(n, dtype=torch.bool), landmarks)


@pytest.fixture
def portrait() -> torch.Tensor:
    small = torch.rand(1, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(small, (112, 112), mode="bicubic")


def test_an_aligned_face_is_not_moved(portrait):
    wanted = torch.tensor(TEMPLATE)[None]
    assert torch.allclose(aligned_chips(portrait, marked(wanted), 112), portrait, atol=1e-4)
    small = torch.nn.functional.avg_pool2d(portrait, 2)
    assert torch.allclose(aligned_chips(portrait, marked(wanted), 56), small, atol=1e-4)


def test_a_tilted_face_is_put_upright(portrait):
    x, y = torch.tensor(TEMPLATE).unbind(1)
    lying = marked(torch.stack([y, 112 - x], 1)[None])  # as rot90 moves them
    chips = aligned_chips(torch.rot90(portrait, 1, (2, 3)), lying, 112)
    assert torch.allclose(chips, portrait, atol=1e-4)


def test_a_face_elsewhere_and_larger_is_brought_back(portrait):
    canvas = torch.zeros(1, 3, 300, 260)
    large = torch.nn.functional.interpolate(portrait, scale_factor=2, mode="nearest")
    canvas[..., 40:264, 20:244] = large
    landmarks = 2 * torch.tensor(TEMPLATE)[None] + torch.tensor([20.0, 40])
    chips = aligned_chips(canvas, marked(landmarks), 112)
    assert (chips - portrait)[..., 2:-2, 2:-2].abs().max() < 0.03


def test_alignment_is_the_least_squares_similarity():
    """The least squares by a solver: chip = [[a, -b], [b, a]] landmark + [c, d]."""
    g = torch.Generator().manual_seed(0)
    wanted = torch.tensor(TEMPLATE, dtype=torch.float64)
    landmarks = 1.7 * wanted + 20 + 15 * torch.randn(5, 2, generator=g, dtype=torch.float64)
    (x, y), one, zero = landmarks.T, torch.ones(5).double(), torch.zeros(5).double()
    rows = torch.cat([torch.stack([x, -y, one, zero], 1), torch.stack([y, x, zero, one], 1)])
    a, b, c, d = torch.linalg.lstsq(rows, wanted.T.reshape(-1)).solution
    chip = torch.cartesian_prod(*[torch.arange(112).double() + 0.5] * 2).flip(1)  # x, y
    back = torch.linalg.inv(torch.stack([torch.stack([a, -b]), torch.stack([b, a])]))
    expected = (chip - torch.stack([c, d])) @ back.T
    ramps = torch.meshgrid(*[torch.arange(112).double() + 0.5] * 2, indexing="xy")
    image = torch.stack([*ramps, torch.zeros(112, 112).double()])[None]  # tells x and y
    found = aligned_chips(image, marked(landmarks[None]), 112)[0, :2].flatten(1).T
    inside = ((expected > 1) & (expected < 111)).all(1)
    assert inside.float().mean() > 0.2
    assert torch.allclose(found[inside], expected[inside], atol=1e-6)


def test_aligned_chips_are_differentiable(images):
    x = images.double().requires_grad_()
    landmarks = torch.tensor(TEMPLATE).double() / 9 + torch.tensor([[[1.3, -0.2]], [[2, 0.5]]])
    assert torch.autograd.gradcheck(lambda v: aligned_chips(v, marked(landmarks), 5), x)


def test_landmarks_in_one_place_give_a_finite_chip(images):
    x = images.requires_grad_()
    chips = aligned_chips(x, marked(torch.full((2, 5, 2), 3.0)), 8)
    (g,) = torch.autograd.grad(chips.sum(), x)
    assert chips.isfinite().all()
    assert g.isfinite().all()


def test_alignment_needs_landmarks_of_every_image(images):
    with pytest.raises(ValueError, match="expected faces with landmarks, got none: crop"):
        aligned_chips(images, faces((0, 0, 5, 5), (0, 0, 5, 5)), 8)
    with pytest.raises(ValueError, match="the faces of 2 images, one row each, got 1 rows"):
        aligned_chips(images, marked(torch.rand(1, 5, 2)), 8)


def test_some_of_the_faces():
    some = Faces(
        torch.arange(12.0).view(3, 4), torch.tensor([True, False, True]), torch.rand(3, 5, 2)
    )
    kept = some[some.is_face]
    assert len(kept) == 2
    assert kept.boxes.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert kept.landmarks is not None
    assert kept.landmarks.shape == (2, 5, 2)


def test_overlap_of_boxes():
    a, b = torch.tensor([0.0, 0, 10, 10]), torch.tensor([5.0, 0, 15, 10])
    assert overlap(a, b).item() == pytest.approx(1 / 3)
    assert overlap(a, torch.tensor([20.0, 0, 30, 10])).item() == 0


def test_detector_returns_the_largest_face_not_the_most_confident():
    near, far = [0.0, 0, 30, 30], [40.0, 40, 50, 50]
    found = GridDetector(Cells([1.0, 5.0, -5.0], [near, far, [0.0, 0, 60, 60]]))(torch.zeros(1))
    assert found.is_face.tolist() == [True]
    assert torch.allclose(found.boxes, torch.tensor([near]), atol=0.2)


def test_detector_averages_cells_that_agree():
    cells = Cells([2.0, 2.0], [[0.0, 0, 30, 30], [2.0, 2, 32, 32]])
    assert torch.allclose(
        GridDetector(cells)(torch.zeros(1)).boxes, torch.tensor([[1.0, 1, 31, 31]])
    )


def test_detector_without_a_face_says_so_and_stays_finite():
    found = GridDetector(FaceGrid().eval())(torch.zeros(3, 3, 64, 64))
    none = GridDetector(Cells([-9.0, -8.0], [[0.0, 0, 30, 30], [2.0, 2, 32, 32]]))(torch.zeros(1))
    assert found.boxes.isfinite().all()
    assert none.is_face.tolist() == [False]
    assert none.boxes.isfinite().all()


def test_testbed_detector_on_held_out_pictures():
    portraits, labels = held_out("portrait", 150)
    found = face_detector()(portraits)
    truth = torch.tensor([box.tolist() for box in labels["face1"]])
    assert found.is_face.float().mean() >= 0.97
    assert overlap(found.boxes, truth).mean() > 0.8
    assert not found.boxes.requires_grad


def test_testbed_detector_returns_the_nearer_of_two_faces():
    pairs, labels = held_out("pair", 60)
    truth = torch.tensor([box.tolist() for box in labels["face1"]])
    assert (overlap(face_detector()(pairs).boxes, truth) > 0.5).float().mean() >= 0.95


def test_testbed_detector_sees_nobody_in_empty_scenes():
    assert face_detector()(held_out("empty", 80)[0]).is_face.float().mean() <= 0.03
