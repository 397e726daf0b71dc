"""The cache of original images: found again, whole, and for its batch alone."""

from dataclasses import asdict, astuple

import pytest
import torch

from diffusers_fair.config.schema import RunConfig
from diffusers_fair.diffusion.noise import Noise
from diffusers_fair.objective.originals import Originals
from diffusers_fair.training.batches import Batch
from diffusers_fair.training.original_images import OriginalImageCache, run_cache_key
from diffusers_fair.vision.faces import Faces

CPU = torch.device("cpu")
BATCH = {"prompts": ["a cat"], "seeds": [1, 2, 3], "steps": 4}


def originals(landmarks: bool, embeddings: bool) -> Originals:
    g = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(3, *shape, generator=g)

    return Originals(
        Faces(drawn(4), torch.tensor([True, False, True]), drawn(5, 2) if landmarks else None),
        {"colour": torch.tensor([0, 2, 1]), "size": torch.tensor([1, 1, 0])},
        (drawn(8), drawn(6)),
        torch.tensor([False, True, True]),
        drawn(7) if embeddings else None,
    )


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b


def never() -> Originals:
    raise AssertionError("made again")


@pytest.mark.parametrize("landmarks", [False, True])
@pytest.mark.parametrize("embeddings", [False, True])
def test_cached_judgements_are_bit_for_bit_the_same(tmp_path, landmarks, embeddings):
    made = originals(landmarks, embeddings)
    cache = OriginalImageCache(tmp_path / "cache", {"model": "x"})
    assert cache.get(BATCH, lambda: made, CPU) is made
    again = OriginalImageCache(tmp_path / "cache", {"model": "x"}).get(BATCH, never, CPU)
    assert equal(astuple(again), astuple(made))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    ("about", "batch"),
    [
        ({"model": "y"}, BATCH),
        ({"model": "x"}, BATCH | {"seeds": [1, 2, 4]}),
        ({"model": "x"}, BATCH | {"prompts": ["a dog"]}),
        ({"model": "x"}, BATCH | {"steps": 5}),
    ],
)
def test_other_keys_are_computed_again(tmp_path, about, batch):
    first, other = originals(False, False), originals(True, True)
    OriginalImageCache(tmp_path, {"model": "x"}).get(BATCH, lambda: first, CPU)
    assert OriginalImageCache(tmp_path, about).get(batch, lambda: other, CPU) is other


def test_deleted_files_are_computed_again(tmp_path):
    cache, made = OriginalImageCache(tmp_path, None), originals(False, False)
    cache.get(BATCH, lambda: made, CPU)
    for path in tmp_path.iterdir():
        path.unlink()
    assert cache.get(BATCH, lambda: made, CPU) is made


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(AssertionError, match="made again"):
        OriginalImageCache(tmp_path / "cache", None).get(BATCH, never, CPU)
    assert not (tmp_path / "cache").exists()


def test_a_batch_knows_how_many_images_a_prompt_has():
    batch = Batch(("a", "b"), tuple(map(Noise, range(6))), 4)
    assert batch.images_per_prompt == 3
    assert asdict(batch)["prompts"] == ("a", "b")


def test_words_are_not_what_originals_depend_on():
    plain = RunConfig.load("testbed-gender")
    changes = {"attributes.0.words": {"female": ["lady"]}, "attributes.0.nouns": {"male": ["man"]}}
    assert run_cache_key(RunConfig.load("testbed-gender", changes)) == run_cache_key(plain)


def test_the_key_depends_on_the_size_of_the_images_and_older_caches_stay_valid():
    values = {"output": "x"}
    default = run_cache_key(RunConfig.load("testbed-gender", values))
    small = run_cache_key(RunConfig.load("testbed-gender", values | {"sampling.size": 32}))
    assert "size" not in default["sampling"]
    assert small["sampling"] == default["sampling"] | {"size": 32}
