"""Checks of the arguments of an evaluation, before any image is generated."""

import math
from collections import Counter
from collections.abc import Sequence

from diffusers_fair.attributes import Attribute, People
from diffusers_fair.prompts import normalized
from diffusers_fair.prompts.groups import GROUPS, PromptGroup
from diffusers_fair.reports.records import Settings
from diffusers_fair.reports.report import Report
from diffusers_fair.vision.judges import Judges

_MAX_IMAGES = 10**6  # per prompt; a list of far more would take all memory


def checked_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """Return the prompts as a tuple.

    Raises:
        ValueError: the list is empty, is a string, or has a prompt twice.
    """
    if isinstance(prompts, str):
        raise ValueError(f"expected a list of prompts, got one string: use [{prompts!r}]")
    if not prompts:
        raise ValueError(
            "there are no prompts to evaluate: give one or more, for example "
            "prompt_set('testbed-occupations').prompts('test')"
        )
    for text, times in Counter(map(normalized, prompts)).items():
        if times > 1:
            raise ValueError(f"the prompt '{text}' is given {times} times: leave out the copies")
    return tuple(prompts)


def checked_attributes(attributes: Sequence[Attribute], judges: Judges) -> tuple[Attribute, ...]:
    """Return the attributes as a tuple.

    Raises:
        ValueError: the list is empty, two attributes have the same name, or a classifier is missing
            or has other classes than its attribute.
    """
    if not attributes:
        raise ValueError("there are no attributes to evaluate: give one or more")
    names = [a.name for a in attributes]
    if len(set(names)) < len(names):
        raise ValueError(f"attributes must have different names, got {names}")
    for attribute in attributes:
        if attribute.name not in judges.classifiers:
            raise ValueError(
                f"there is no classifier for attribute '{attribute.name}': judges.classifiers has "
                f"{sorted(judges.classifiers)}"
            )
        classes = judges.classifiers[attribute.name].classes
        if set(classes) != set(attribute.classes):
            raise ValueError(
                f"attribute '{attribute.name}' has classes {list(attribute.classes)}, but its "
                f"classifier has {list(classes)}: they must be the same"
            )
    return tuple(attributes)


def check_sampling(*, images_per_prompt: int, steps: int, guidance_scale: float, seed: int) -> None:
    """Check the numbers of images and steps, the guidance scale and the seed.

    Raises:
        ValueError: one is out of range.
    """
    if positive(images_per_prompt, "images_per_prompt") > _MAX_IMAGES:
        raise ValueError(
            f"images_per_prompt must be {_MAX_IMAGES} or less, got {images_per_prompt}"
        )
    positive(steps, "steps")
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f"guidance_scale must be a finite number, 0 or more, got {guidance_scale}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")


def positive(value: int, name: str) -> int:
    """Return the value if it is positive.

    Raises:
        ValueError: the value is below 1.
    """
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
    return value


def check_groups(groups: Sequence[PromptGroup], attributes: Sequence[Attribute]) -> None:
    """Check groups of control prompts.

    Raises:
        ValueError: a group is unknown, duplicate or empty, has the same prompt twice, or asks for
            a class that is not evaluated.
    """
    names = [group.name for group in groups]
    for group in groups:
        if group.name not in GROUPS or names.count(group.name) > 1:
            raise ValueError(
                f"expected groups of prompts among {', '.join(GROUPS)}, each at most once; got "
                f"{names}"
            )
        if not group.prompts:
            raise ValueError(f"the group '{group.name}' has no prompts: leave it out")
        positive(group.images_per_prompt, f"images_per_prompt of the group '{group.name}'")
        _check_prompts(group, attributes)


def _check_prompts(group: PromptGroup, attributes: Sequence[Attribute]) -> None:
    classes = {a.name: a.classes for a in attributes}
    texts = [(prompt.text, prompt.negative) for prompt in group.prompts]
    for prompt in group.prompts:
        if texts.count((prompt.text, prompt.negative)) > 1:
            raise ValueError(
                f"the group '{group.name}' has the prompt '{prompt.text}' more than once: leave "
                "out the copies, whose images would be the same"
            )
        for name, wanted in prompt.expected_classes.items():
            if wanted not in classes.get(name, ()):
                raise ValueError(
                    f"the prompt '{prompt.text}' asks for '{wanted}' of '{name}', but the "
                    f"evaluated classes are {classes}"
                )


def check_reference(reference: Report, settings: Settings, groups: Sequence[PromptGroup]) -> None:
    """Check that each image can be compared with an image of the reference.

    Raises:
        ValueError: the noise, the sampling or the counted faces differ, or the reference lacks
            image features or a group.
    """
    reference.settings.check_same_noise(settings)
    check_people(reference, settings.people)
    if not reference.records.features:
        raise ValueError(
            f"the reference '{reference.label}' has no image features to compare with: evaluate "
            "it again"
        )
    for group in groups:
        if not has_group(reference, group):
            raise ValueError(
                f"the reference lacks images of the group of prompts '{group.name}': add them with "
                "evaluation.groups.with_groups and the base model's pipeline, or leave them out "
                "with groups=()"
            )


def check_people(reference: Report, people: People) -> None:
    """Check that the reference counts the same faces of an image: the largest, or all.

    Raises:
        ValueError: it counts others.
    """
    if reference.settings.people != people:
        raise ValueError(
            f"the reference '{reference.label}' was evaluated with people "
            f"'{reference.settings.people}', but the judges have people '{people}': evaluate the "
            "base model again"
        )


def has_group(reference: Report, group: PromptGroup) -> bool:
    """Whether the reference has all images of the group."""
    return group.name in reference.groups and reference.groups[group.name].covers(group)
