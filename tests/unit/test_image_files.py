"""File names of images: they tell what an image is, and none is another's."""

import re

import pytest

from diffusers_fair.evaluation.image_files import file_stems

PROMPTS = [
    *("", " ", "...", "\N{SNOWMAN}\N{GRINNING FACE}", "a doctor, smiling", "a doctor: smiling"),
    *("A doctor, smiling", "x" * 2000, "x" * 2001, "CON", "a/b", "a\\b", "..", "nul.txt", "a\0b"),
    *("\u533b\u751f" * 100, "e\u0301", "\u00e9", "\u00df", "ss", "a doctor, smiling"),
]


def stems(prompts, adapter=None, seed=0, settings=("testbed", 20)):
    return file_stems(prompts, seed=seed, adapter=adapter, settings=settings)


def test_every_prompt_has_a_name_that_every_file_system_takes():
    names = [f"{stem}-000.png" for stem in stems(PROMPTS, "runs/" + "y" * 300 + "/adapter")]
    assert len({name.casefold() for name in names}) == len(PROMPTS)
    for name in names:
        assert re.fullmatch(r"\w+(-\w+)*-seed0-y+-[0-9a-f]{10}-000\.png", name)
        assert len(name.encode()) <= 200


@pytest.mark.parametrize(
    ("prompt", "adapter", "start"),
    [
        ("A photo of a chef", None, "a-photo-of-a-chef-seed7-base-"),
        ("a chef", "runs/demo/adapter", "a-chef-seed7-demo-adapter-"),
        ("a chef", "C:\\runs\\Demo", "a-chef-seed7-runs-demo-"),
        ("a chef", "me/fair", "a-chef-seed7-me-fair-"),
        ("a chef", "..", "a-chef-seed7-adapter-"),
        ("\u533b\u751f", None, "\u533b\u751f-seed7-base-"),
        ("!?", None, "prompt-seed7-base-"),
    ],
)
def test_a_name_tells_prompt_seed_and_adapter(prompt, adapter, start):
    assert stems([prompt], adapter, 7)[0].startswith(start)


def test_whatever_an_image_depends_on_changes_its_name():
    names = [
        *stems(["a", "a"]),
        *(stems(["a"], seed=1) + stems(["a"], "x") + stems(["a"], settings=("testbed", 21))),
    ]
    assert len(set(names)) == 5
    assert stems(["a"]) == stems(["a", "b"])[:1]
