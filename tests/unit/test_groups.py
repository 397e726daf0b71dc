"""Prompts that an adapter has to leave alone: what they say, and what they ask for."""

import re
from collections import Counter

import pytest

from diffusers_fair.attributes import Attribute
from diffusers_fair.prompts import names, prompt_set
from diffusers_fair.prompts.groups import (
    _NEGATIVES,
    classes_named,
    evaluation_groups,
    implied_prompts,
    named_prompts,
    requested_classes,
    untouched_prompts,
    vocabulary,
)
from diffusers_fair.prompts.lexicon import entry
from diffusers_fair.prompts.wording import Wording, attribute_sections, recipe_wording

HUE = Wording(Attribute("hue", ("red", "green", "blue")), {"red": ("crimson",)})
GENDER = Wording(Attribute("gender", ("female", "male")), {}, {"female": ("woman",)})
GENDER_SECTION = {"name": "gender", "words": {"female": ["female"]}}
NEUTRAL = ["a photo of the face of a chef, a person", "a portrait of an actor"]


def test_named_prompts_ask_for_every_class_in_every_form():
    found = named_prompts(NEUTRAL, [GENDER], 6)
    assert [p.text for p in found] == [
        "a photo of the face of a female chef, a person",
        "a portrait of an actor, a woman",
        "a photo of the face of a chef, a female person",
        "a photo of the face of a male chef, a person",
        "a portrait of an actor, a male person",
        "a photo of the face of a chef, a male person",
    ]
    assert [p.expected_classes["gender"] for p in found] == ["female"] * 3 + ["male"] * 3
    assert not any(p.unseen or p.negative for p in found)


def test_a_noun_stands_before_the_subject_with_its_article():
    texts = [p.text for p in named_prompts(NEUTRAL[1:], [GENDER], 8)]
    assert "a portrait of a woman, an actor" in texts


def test_two_attributes_are_asked_for_at_once():
    found = named_prompts(NEUTRAL, [GENDER, HUE], 6)
    both = [p for p in found if len(p.expected_classes) == 2]
    assert [p.text for p in both] == [
        "a photo of the face of a crimson female chef, a person",
        "a portrait of a green female actor",
        "a photo of the face of a blue female chef, a person",
    ]
    assert both[0].expected_classes == {"gender": "female", "hue": "red"}


def test_an_attribute_outside_the_lexicon_uses_its_own_words():
    found = named_prompts(NEUTRAL, [HUE], 3, include_unseen=True)
    assert [p.text for p in found][:2] == [
        "a photo of the face of a crimson chef, a person",
        "a photo of the face of a green chef, a person",
    ]
    assert not implied_prompts([HUE], include_unseen=True)


def test_words_that_training_does_not_use_are_marked_unseen():
    found = named_prompts(NEUTRAL, [GENDER], 16, include_unseen=True)
    for prompt in found:
        known = re.search(r"\b(female|male|woman)\b", prompt.text) is not None
        assert prompt.unseen is not known, prompt.text
    assert any(
        "she is smiling" in p.text
        for p in named_prompts(NEUTRAL, [GENDER], 20, include_unseen=True)
    )


def test_implied_prompts_are_split_and_name_no_class():
    seen, every = implied_prompts([GENDER]), implied_prompts([GENDER], include_unseen=True)
    assert {p.text for p in seen} == {p.text for p in every if not p.unseen}
    assert len(seen) < len(every)
    words = vocabulary([GENDER])
    assert [p.text for p in every if classes_named(p.text, words)] == []


def test_untouched_prompts_come_with_and_without_a_negative_prompt():
    found = untouched_prompts("untouched", "test")
    assert found[0].text == ""
    assert [p.negative for p in found if p.negative] == list(_NEGATIVES)
    assert not any(p.expected_classes for p in found)


@pytest.mark.parametrize("name", ["untouched", "testbed-untouched"])
def test_untouched_prompts_of_training_are_not_evaluated(name):
    assert name in names()
    train, test = (set(prompt_set(name).prompts(split)) for split in ("train", "test"))
    assert not train & test


def test_the_groups_of_an_evaluation_are_those_that_have_prompts():
    assert [g.name for g in evaluation_groups(NEUTRAL, [GENDER])] == [
        "named",
        "implied",
        "untouched",
    ]
    found = evaluation_groups(NEUTRAL, [HUE], images_per_prompt=7)
    assert [(g.name, g.images_per_prompt) for g in found] == [("named", 7), ("untouched", 7)]


def test_the_number_of_named_prompts_can_be_chosen():
    neutral = [f"a photo of a chef of kind {i}, a person" for i in range(12)]
    few, many = (
        evaluation_groups(neutral, [GENDER], per_attribute=count)[0].prompts for count in (4, 12)
    )
    assert (len(few), len(many)) == (4, 12)
    assert Counter(name for prompt in many for name in prompt.expected_classes.values()) == {
        "female": 6,
        "male": 6,
    }


def test_groups_have_no_duplicate_prompts():
    named = evaluation_groups(NEUTRAL[1:], [HUE])[0].prompts
    texts = [p.text for p in named]
    assert len(texts) == len(set(texts))
    assert texts[:2] == [
        "a portrait of a crimson actor",
        "a portrait of an actor, a crimson person",
    ]


def test_words_are_those_of_the_first_recipe_that_has_any():
    blank, mine, other = (
        {"name": "hue", "words": {}},
        {"name": "hue", "nouns": {"red": ["a redhead"]}},
        {"name": "hue", "words": {"red": ["scarlet"]}},
    )
    found = recipe_wording(HUE.attribute, [GENDER_SECTION, blank, mine, other])
    assert found == Wording(HUE.attribute, {}, {"red": ("a redhead",)})
    assert recipe_wording(HUE.attribute, [GENDER_SECTION]) == Wording(HUE.attribute, {})


@pytest.mark.parametrize(
    "section",
    [
        "hue",
        None,
        {"name": "hue"},
        {"name": "hue", "words": ["red"], "nouns": "red"},
        {"name": "hue", "words": {"red": "scarlet"}},
        {"name": "hue", "words": {"red": [3, None, " "]}, "nouns": {"red": []}},
        {"name": "hue", "words": {"pink": ["rose"]}},
    ],
)
def test_a_section_of_a_recipe_that_has_no_words(section):
    after = {"name": "hue", "words": {"red": ["ruby", 3]}, "nouns": {"red": [None, "redhead"]}}
    expected = Wording(HUE.attribute, {"red": ("ruby",)}, {"red": ("redhead",)})
    assert recipe_wording(HUE.attribute, [section, after]) == expected
    assert recipe_wording(HUE.attribute, [section]) == Wording(HUE.attribute, {})


@pytest.mark.parametrize("sections", [None, "hue", {"name": "hue"}, 3])
def test_a_recipe_without_a_list_of_attributes_has_no_sections(sections):
    assert attribute_sections({"attributes": sections}) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of a Woman", {"gender": "female"}),
        ("a man and a woman", {}),
        ("two women", {"gender": "female"}),
        ("a chef, he is smiling", {"gender": "male"}),
        ("a craftsman in the shed", {}),
        ("a crimson woman", {"gender": "female", "hue": "red"}),
        ("", {}),
    ],
)
def test_the_classes_that_a_prompt_names(text, expected):
    assert requested_classes(text, vocabulary([GENDER, HUE])) == expected


def test_a_prompt_that_names_two_classes_names_both():
    found = classes_named("a man and a woman", vocabulary([GENDER]))
    assert found == {"gender": ["female", "male"]}


def test_words_for_unknown_classes_are_refused():
    with pytest.raises(
        ValueError, match="given for 'pink', which is not a class of attribute 'hue'"
    ):
        Wording(HUE.attribute, {}, {"pink": ("rose",)})


def test_a_class_that_is_not_in_the_lexicon_has_an_empty_entry():
    assert entry("teal").words == ()
    assert entry("FEMALE").nouns[0] == "woman"
