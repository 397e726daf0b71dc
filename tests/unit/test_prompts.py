"""Prompt lists: what ships, what a user brings, mixtures of them, what the errors say."""

import hashlib
import json
import re
from collections import Counter
from importlib.resources import files

import pytest

from diffusers_fair import prompts
from diffusers_fair.prompts import PromptSet, prompt_set
from diffusers_fair.prompts.groups import classes_named
from diffusers_fair.prompts.mixtures import PromptMixture, counts_per_cycle, prompt_mixture
from diffusers_fair.prompts.tables import targets_by_prompt

PAPER = {  # what the paper's appendices A.2, A.3 and A.8 list: number of entries, their hash
    ("occupations", "validation"): (10, "19c0c6691640f75b"),
    ("occupations", "test"): (50, "f70130581eeb1ef5"),
    ("testbed-occupations", "validation"): (10, "19c0c6691640f75b"),
    ("testbed-occupations", "test"): (50, "f70130581eeb1ef5"),
    ("sports", "train"): (24, "4f11c2dc0748fb93"),
    ("sports", "test"): (85, "fa0cfd080452b7bd"),
    ("styles", "train"): (7, "7c2a7f38ab60908f"),
    ("styles", "test"): (19, "0541cf2a3dc888b2"),
    ("descriptors", "train"): (40, "ea0cc1ac4160ccb5"),
    ("descriptors", "test"): (20, "f729c7d5b8668a73"),
    ("non-templated", "test"): (40, "3757e31276ede9a7"),
}
SIZES = {  # of train, validation and test
    "occupations": (1000, 10, 50),
    "testbed-occupations": (161, 10, 50),
    "sports": (24, 10, 85),
    "sports-extended": (250, 10, 85),
    "styles": (7, 10, 19),
    "styles-extended": (150, 10, 19),
    "descriptors": (40, 10, 20),
    "non-templated": (0, 0, 40),
    "untouched": (17, 4, 15),
    "testbed-untouched": (16, 2, 12),
}
OWN = {"untouched", "testbed-untouched"}  # nothing of theirs is the paper's
PERSONS = re.compile(  # words that say who it is: they would settle what the adapter is to balance
    r"((?<!hu)(?<!ro)man|men|woman|women|boy|girl|lady|tress|stewardess|hostess)\b"
    r"|\b(male|female|young|elderly|senior|junior|child|youth|asian|african|latino)\b"
)


def words(title: str) -> set[str]:
    """Words of a title without plural s, order, brackets and the like."""
    bare = re.sub(r"\(.*\)", "", title.lower())
    return {re.sub(r"s$", "", w) for w in re.findall(r"\w+", bare)} - {"and", "of", "the"}


def alike(a: str, b: str) -> bool:
    """Whether a title is another one, with words added or left out."""
    return words(a) <= words(b) or words(b) <= words(a)


@pytest.mark.parametrize("name", prompts.names())
def test_packaged_lists_are_clean_and_their_splits_disjoint(name):
    listed = prompt_set(name)
    splits = [listed.train, listed.validation, listed.test]
    subjects = [subject for split in splits for subject in split]
    assert len({subject.strip().lower() for subject in subjects}) == len(subjects) > 0
    assert all(subject == subject.strip() != "" for subject in subjects)
    assert listed.prompts("test")
    assert not listed.train or listed.prompts("validation")


def test_the_expected_lists_ship():
    listed = {name: prompt_set(name) for name in prompts.names()}
    sizes = {n: (len(s.train), len(s.validation), len(s.test)) for n, s in listed.items()}
    assert sizes == SIZES
    assert listed["occupations"].templates == ("a photo of the face of a {}, a person",)
    assert listed["testbed-occupations"].templates == listed["occupations"].templates
    assert listed["sports"].templates == ("a person playing {}",)


@pytest.mark.parametrize(("name", "split"), PAPER)
def test_the_paper_s_lists_are_as_it_prints_them(name, split):
    subjects = getattr(prompt_set(name), split)
    digest = hashlib.sha256("\n".join(subjects).encode()).hexdigest()[:16]
    assert (len(subjects), digest) == PAPER[name, split]


@pytest.mark.parametrize("name", ["sports", "styles"])
def test_extended_lists_add_to_training_alone(name):
    short, long = prompt_set(name), prompt_set(f"{name}-extended")
    assert long.train[: len(short.train)] == short.train
    assert (long.templates, long.validation, long.test) == (
        short.templates,
        short.validation,
        short.test,
    )


@pytest.mark.parametrize("name", prompts.names())
def test_sources_say_what_is_the_paper_s_and_what_is_not(name):
    text = files(prompts).joinpath(f"{name}.json").read_text("utf-8")
    paper = "Shen et al., ICLR 2024, appendix A." in json.loads(text)["source"]
    assert paper is (name not in OWN)
    own = SIZES[name][0] > 0
    assert bool(re.search("written for this package|compiled for", text, re.IGNORECASE)) == own


def test_own_subjects_are_plain_and_say_nothing_of_the_person():
    titles = prompt_set("occupations").train
    assert [t for t in titles if not re.fullmatch(r"[a-z]+([ -][a-z]+)*", t)] == []
    sports, styles = prompt_set("sports-extended"), prompt_set("styles-extended")
    own = [*titles, *sports.train[24:], *sports.validation, *styles.train[7:], *styles.validation]
    own += prompt_set("descriptors").validation
    assert [text for text in own if PERSONS.search(text)] == []


def test_no_training_title_is_a_variant_of_one_held_out():
    occupations = prompt_set("occupations")
    held_out = [*occupations.validation, *occupations.test, "accountant", "auditor"]
    near = [(t, h) for t in occupations.train for h in held_out if alike(t, h)]
    assert near == []
    assert len({frozenset(words(t)) for t in occupations.train}) == 1000
    sports = prompt_set("sports-extended")
    added = sports.train[24:]
    assert [(a, h) for a in added for h in sports.validation + sports.test if alike(a, h)] == []
    texts = prompt_set("styles-extended").train[7:]
    assert [(t, h) for t in texts for h in held_out if re.search(rf"\b{h}s?\b", t)] == []


def test_prompts_are_templates_times_subjects():
    listed = PromptSet("toy", ("a {}", "{}, {}"), ("cat", "d{o}g"), (), ())
    assert listed.prompts("train") == ["a cat", "a d{o}g", "cat, cat", "d{o}g, d{o}g"]


def test_unknown_name_names_the_nearest():
    with pytest.raises(ValueError, match="called 'sport': did you mean 'sports'"):
        prompt_set("sport")
    with pytest.raises(ValueError, match=r"did you mean 'testbed-occupations'.*one prompt a line"):
        prompt_set("testbed_ocupations")


def test_splits_that_are_missing():
    with pytest.raises(ValueError, match="no split 'tests': expected one of train, validation"):
        prompt_set("sports").prompts("tests")
    with pytest.raises(ValueError, match=r"'non-templated' has no train prompts.*for: test"):
        prompt_set("non-templated").prompts("train")


def test_template_without_a_placeholder():
    with pytest.raises(ValueError, match=r"no {} for the subject: 'a face'"):
        PromptSet("toy", ("a face",), ("cat",), (), ())


def test_own_text_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\ufeffa zoo keeper \n\na {curly} barista\r\n", encoding="utf-8")
    assert prompt_set(path).prompts("test") == ["a zoo keeper", "a {curly} barista"]
    assert prompt_set(str(path)).prompts("train") == prompt_set(path).prompts("test")


def test_invalid_text_files_are_refused(tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n\n")
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match=r"empty\.txt' holds no prompts"):
        prompt_set(empty)
    with pytest.raises(ValueError, match="not UTF-8 text"):
        prompt_set(binary)


def test_copies_in_a_text_file_are_refused(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a cafe\u0301\na tea house\na caf\u00e9\n", "utf-8")
    with pytest.raises(ValueError, match="has 'a caf\u00e9' 2 times: leave out the copies"):
        prompt_set(path)


def test_a_file_in_the_home_folder_in_another_unicode_form(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.txt").write_text("a cafe\u0301\n", "utf-8")
    assert prompt_set("~/mine.txt").prompts("test") == ["a caf\u00e9"]
    table = {"a cafe\u0301": (0.25, 0.75)}
    assert targets_by_prompt(table, ["~/mine.txt"]) == {"a caf\u00e9": (0.25, 0.75)}


def test_words_are_found_in_either_unicode_form():
    words = {"role": {"baker": ["boulange\u0301re"], "farmer": ["cafe"]}}
    assert classes_named("une boulang\u00e9re", words) == {"role": ["baker"]}
    assert classes_named("un cafe\u0301", words) == {}


def test_own_json_file(tmp_path):
    path = tmp_path / "mine.json"
    lists = {"templates": ["a {}"], "train": ["cat "], "test": ["dög"]}
    path.write_text(json.dumps(lists), encoding="utf-8")
    assert prompt_set(path) == PromptSet(str(path), ("a {}",), ("cat",), (), ("dög",))
    packaged = files(prompts).joinpath("sports.json").read_bytes()
    path.write_bytes(packaged)
    assert prompt_set(path).prompts("test") == prompt_set("sports").prompts("test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"mine\.json' is not JSON: Expecting property name"),
        ("\udcff", r"mine\.json' is not JSON: 'utf-8' codec can't decode"),
        ('["cat"]', "expected an object with the keys source, templates, train.*; got list"),
        ('{"templates": ["{}"], "tests": ["cat"]}', "keys source, templates, .* test; got tests"),
        ('{"templates": "{}"}', "expected a list of texts as 'templates', got '{}'"),
        ('{"templates": ["{}"], "train": [" "]}', r"list of texts as 'train', got \[' '\]"),
        ('{"train": ["cat"]}', "holds no prompts: expected templates"),
        ('{"templates": ["{}"]}', "holds no prompts: .* subjects in at least one split"),
        ('{"templates": ["a"], "test": ["cat"]}', "has no {} for the subject: 'a'"),
        (
            '{"templates": ["a {}", "a {} "], "train": ["cat"]}',
            r"has 'a \{\}' 2 times: leave out the copies",
        ),
        ('{"templates": [NaN]}', "not JSON: NaN is not a finite number"),
        (
            '{"templates": ["{}"], "train": ["cat"], "test": ["Cat "]}',
            "has 'cat' 2 times: keep it in one split",
        ),
    ],
)
def test_invalid_json_files_are_refused(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        prompt_set(path)


WEIGHTS = {"occupations": 0.5, "sports-extended": 0.2, "styles-extended": 0.15, "descriptors": 0.15}


def test_every_cycle_of_a_mixture_has_the_given_proportions():
    mixture = prompt_mixture(WEIGHTS)
    assert mixture.counts == (10, 4, 3, 3)
    owner = {text: name for name in WEIGHTS for text in prompt_set(name).prompts("train")}
    drawn = [owner[mixture.prompt(place)] for place in range(100)]
    cycles = [drawn[start : start + 20] for start in range(0, 100, 20)]
    assert all(Counter(c) == dict(zip(WEIGHTS, (10, 4, 3, 3), strict=True)) for c in cycles)
    assert len({tuple(c) for c in cycles}) == 5  # in another order each time


def test_every_prompt_of_a_set_comes_once_before_any_comes_again():
    mixture = PromptMixture((("a", "b", "c"), ("x", "y", "z", "u", "v")), counts=(2, 1), seed=3)
    drawn = [mixture.prompt(place) for place in range(90)]
    for own in mixture.prompts:
        mine = [text for text in drawn if text in own]
        turns = [mine[start : start + len(own)] for start in range(0, len(mine), len(own))]
        assert all(sorted(turn) == sorted(own) for turn in turns)
        assert len({tuple(turn) for turn in turns}) > 2


def test_a_mixture_depends_on_its_seed_alone():
    first, again, other = (prompt_mixture(WEIGHTS, seed=seed) for seed in (5, 5, 6))
    places = range(60)
    drawn = [first.prompt(place) for place in places]
    assert [again.prompt(place) for place in reversed(places)] == drawn[::-1]  # resumed anywhere
    assert [other.prompt(place) for place in places] != drawn


def test_a_mixture_takes_any_split_and_own_files(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a zoo keeper\n")
    mixture = prompt_mixture({"descriptors": 1, str(path): 1}, split="validation")
    drawn = {mixture.prompt(place) for place in range(20)}
    assert drawn == {"a zoo keeper", *prompt_set("descriptors").validation}


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([0.7], (1,)),
        ([1 / 3, 1 / 3, 1 / 3], (1, 1, 1)),
        ([0.1, 0.2], (1, 2)),
        ([0.999, 0.001], (999, 1)),
        ([1000, 250, 150, 40], (100, 25, 15, 4)),
    ],
)
def test_counts_are_the_smallest_in_proportion(weights, counts):
    assert counts_per_cycle(weights) == counts


def test_invalid_mixtures_are_refused():
    with pytest.raises(ValueError, match="no prompt sets to mix"):
        prompt_mixture({})
    for weight in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected positive weights, got"):
            prompt_mixture({"sports": 1, "styles": weight})
    with pytest.raises(ValueError, match="add up to 1000 or less: round them"):
        prompt_mixture({"sports": 1, "styles": 3.14159})
    with pytest.raises(ValueError, match="no train prompts"):
        prompt_mixture({"sports": 1, "non-templated": 1})
    with pytest.raises(ValueError, match="did you mean 'sports'"):
        prompt_mixture({"sport": 1})
