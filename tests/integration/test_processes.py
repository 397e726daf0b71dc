"""Several processes with one total batch: the same targets, the same update, the same files."""

import json

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from numpy.linalg import norm
from test_objective import logged, objective, pictures
from together import together

from diffusers_fair import FairnessFinetuner, distributed
from diffusers_fair.adapters.folder import read_adapter
from diffusers_fair.config.recipe import RECIPES
from diffusers_fair.diffusion.noise import Noise
from diffusers_fair.objective.targets import _joint_targets
from diffusers_fair.training.batches import Batch, Shard

PROMPTS, EACH = 2, 3  # images: over four processes a share has images of two prompts
TRAIN = {
    "base": {"dtype": "float32"},
    "adapter": {"rank": 2},
    # a gradient that does not nearly cancel: of one that does, rounding is what is left
    "attributes": [{"name": "gender", "classes": ["female", "male"], "threshold": 0.6}],
    "losses": {"semantics": 4},
    "prompts": {"images_per_prompt": EACH, "keep": None},
    "sampling": {"steps": 2},
    # each process replays its images at the steps that they have in the whole batch
    "gradient": {"replay_steps": 1},
    "optimizer": {"lr": 2.5e-3, "warmup": 0},
    "tracker": "none",
}


@pytest.mark.parametrize("file", sorted((RECIPES / "launch").iterdir()), ids=lambda file: file.stem)
def test_launch_files_are_accelerates(file):
    launch = load_config_from_file(str(file))
    assert launch.distributed_type == DistributedType.MULTI_GPU
    assert launch.num_processes > 1
    assert launch.num_machines == {"one-machine": 1, "two-machines": 2}[file.stem]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_image_is_made_once(count):
    shares = together(count, distributed.shard, 7)
    images = [i for share in shares for i in range(7)[share]]
    assert images == list(range(7))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_shard_knows_the_prompts_of_its_images():
    batch = Batch(("a", "b", "c"), tuple(map(Noise, range(9))), 4)
    shard = Shard(batch, slice(2, 5))
    assert (shard.prompts, shard.skipped) == (("a", "b"), 2)
    assert shard.noise == (Noise(2), Noise(3), Noise(4))
    assert Shard(batch, slice(0, 9)).cache_key() == {
        "prompts": ("a", "b", "c"),
        "seeds": tuple(range(9)),
        "steps": 4,
    }
    assert Shard(batch, slice(3, 6)).cache_key()["images"] == [3, 6]


def refusal(images: int) -> str:
    with pytest.raises(ValueError, match="cannot be shared") as refused:
        distributed.shard(images)
    return str(refused.value)


def test_more_processes_than_images_are_refused():
    (said, _) = together(2, refusal, 1)
    assert said.startswith("1 images per iteration cannot be shared by 2 processes: start fewer")


def told() -> tuple:
    """Of process 1 or more: what all know of what it alone knows."""
    own = distributed.rank()
    tensors = [torch.full((2, own + 1), 1.0 + own), torch.ones(())]
    gathered = [len(rows) for rows in distributed.gather(torch.zeros(own, 3))]
    first = distributed.is_main()
    sums = tensors if own == 0 and distributed.world_size() == 1 else [torch.full((2,), 1.0 + own)]
    distributed.all_reduce_sum(sums)
    return (
        gathered,
        first,
        sums[0].tolist(),
        distributed.any_across(own == 1),
        distributed.max_across(own),
    )


def test_all_know_what_one_knows():
    first, second = together(2, told)
    assert first == ([0, 1], True, [3.0, 3.0], True, 1)
    assert second == ([0, 1], False, [3.0, 3.0], True, 1)
    assert told()[0] == [0]


# ---- the loss ------------------------------------------------------------------------------------


def looked(x: torch.Tensor, originals: torch.Tensor, prompts: list[str], micro_batch: int | None):
    """This process's part of: gradient, targets, and the figures of all."""
    aim, targets = objective(), []
    assign = aim.targets.assign
    aim.targets.assign = lambda *args: targets.append(assign(*args)) or targets[-1]
    share = distributed.shard(len(x))
    images = x[share].clone().requires_grad_()
    loss, figures = logged(
        aim(images, aim.originals(originals[share], micro_batch), prompts, micro_batch)
    )
    (gradient,) = torch.autograd.grad(loss, images)
    return gradient.numpy(), [t.labels.tolist() for t in targets[0]], figures


def example(faceless: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight images of two prompts, and originals; some without a face."""
    x = pictures([-0.8, -0.6, -0.2, 0.1, -0.3, 0.3, 0.5, 0.7])
    originals = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    x[faceless, :, 0, 0] = -2
    return x, originals


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize(
    "faceless", [slice(0, 0), slice(4, 8), slice(0, 8)], ids=["all", "some", "none"]
)
def test_the_loss_of_shares_is_that_of_the_whole(count, faceless):
    """Also where one process finds no face, or none does."""
    x, originals = example(faceless)
    gradient, targets, figures = looked(x, originals, ["a", "b"], None)
    parts = together(count, looked, x, originals, ["a", "b"], None)
    together_gradient = torch.cat([torch.from_numpy(part[0]) for part in parts])
    torch.testing.assert_close(together_gradient, torch.from_numpy(gradient), atol=1e-7, rtol=1e-5)
    for _, others, seen in parts:
        assert others == targets
        assert seen == pytest.approx(figures, abs=1e-6)


@pytest.mark.parametrize("faceless", [slice(0, 0), slice(1, 4)])
def test_judges_that_see_few_images_at_a_time_change_nothing(faceless):
    x, originals = example(faceless)
    gradient, targets, figures = looked(x, originals, ["a", "b"], None)
    parts = looked(x, originals, ["a", "b"], 3)
    torch.testing.assert_close(*map(torch.from_numpy, (parts[0], gradient)), atol=1e-7, rtol=1e-5)
    assert parts[1] == targets
    assert parts[2] == pytest.approx(figures, abs=1e-6)


def kept_images(x: torch.Tensor, originals: torch.Tensor, asked: list[dict]) -> tuple:
    """This process's part of the gradient of kept images, and the figures of all."""
    aim, share = objective(), distributed.shard(len(x))
    images = x[share].clone().requires_grad_()
    loss, figures = logged(aim.kept_images(images, aim.originals(originals[share]), asked[share]))
    return torch.autograd.grad(loss, images)[0].numpy(), figures


@pytest.mark.parametrize("count", [2, 3])
def test_the_loss_of_shares_of_kept_images_is_that_of_the_whole(count):
    x, originals = example(slice(4, 6))
    asked = [{"brightness": "bright"}, {}, {"brightness": "dark"}, {}] * 2
    gradient, figures = kept_images(x, originals, asked)
    parts = together(count, kept_images, x, originals, asked)
    assert norm(np.concatenate([part[0] for part in parts]) - gradient) <= 1e-6 * norm(gradient)
    for _, found in parts:
        assert found == pytest.approx(figures, rel=1e-5)


# ---- the training --------------------------------------------------------------------------------


def trained(folder: str) -> tuple:
    """Two iterations on one batch: their targets, their gradients, the whole update."""
    train = {
        **{"iterations": 2, "prompts_per_iteration": PROMPTS, "distinct_iterations": 1},
        **{"micro_batch": 1, "validate_every": None},  # every image by itself: the same last bit
    }
    finetuner = FairnessFinetuner.from_recipe("testbed-gender", **TRAIN, train=train, output=folder)
    before = torch.cat([p.detach().flatten() for p in finetuner.parameters])
    assignment = finetuner.gradient.objective.targets
    targets, assign = [], assignment.assign
    assignment.assign = lambda *args: targets.append(assign(*args)) or targets[-1]
    gradients, clip = [], finetuner._clip

    def clipped() -> float:
        length = clip()
        gradients.append(torch.cat([p.grad.flatten() for p in finetuner.parameters]).numpy())
        return length

    finetuner._clip = clipped
    finetuner.train(progress=False)
    update = torch.cat([p.detach().flatten() for p in finetuner.parameters]) - before
    labels = [target.labels.tolist() for found in targets for target in found]
    return labels, gradients, update.numpy()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder and outcome of a single process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, trained(str(folder))


def kept(folder: str) -> tuple[np.ndarray, dict]:
    """The gradient of the kept prompts of an adapter that has moved, and their figures."""
    keep = {"images": 0, "pairs": 5, "prediction": 10, "texts": 6}
    finetuner = FairnessFinetuner.from_recipe(
        "testbed-gender",
        **TRAIN | {"prompts": {"images_per_prompt": EACH, "keep": keep}},
        train={"micro_batch": 1},
        output=folder,
    )
    g = torch.Generator().manual_seed(0)
    for parameter in finetuner.parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=g)
    figures = finetuner.gradient._kept_backward(finetuner.gradient.kept, 0, 1, False).metrics()
    distributed.all_reduce_sum([parameter.grad for parameter in finetuner.parameters])
    return torch.cat([p.grad.flatten() for p in finetuner.parameters]).numpy(), figures


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_share_the_kept_prompts(count, tmp_path):
    gradient, figures = kept(str(tmp_path / "alone"))
    assert set(figures) == {"keep/embedding", "keep/prediction"}
    for theirs, found in together(count, kept, str(tmp_path / "run")):
        assert norm(theirs - gradient) <= 1e-5 * norm(gradient)
        assert found == pytest.approx(figures, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_the_same_adapter(alone, count, tmp_path):
    folder, (labels, gradients, update) = alone
    found = together(count, trained, str(tmp_path / "run"))
    for their_labels, theirs, their_update in found:
        assert their_labels == labels
        assert (their_update == found[0][2]).all()  # to the last bit
        assert norm(theirs[0] - gradients[0]) <= 1e-5 * norm(gradients[0])
        for x, y in ((theirs[1], gradients[1]), (their_update, update)):
            assert norm(x - y) <= 2e-4 * norm(y)  # after AdamW: rounding over rounding
    files = [
        {p.relative_to(f).as_posix() for p in f.rglob("*")} for f in (folder, tmp_path / "run")
    ]
    caches = [{name for name in names if name.startswith("originals/")} for names in files]
    assert [len(cache) for cache in caches] == [1, count]
    assert files[0] - caches[0] == files[1] - caches[1]
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2]
    info, _ = read_adapter(tmp_path / "run" / "adapter")
    assert info.training["processes"] == count
    assert info.training["iterations"] == 2


def test_the_targets_of_the_example_are_not_trivial():
    """Those above would also agree if all of them were the same."""
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    assert _joint_targets([p], [[0.5, 0.5]])[0].labels.tolist() == [0, 0, 1, 1]
