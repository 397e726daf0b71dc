"""Marks the kept prompts of an evaluation whose words an adapter was not trained on as unseen."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffusers_fair.prompts.groups import IMPLIED, NAMED, KeptPrompt, PromptGroup


def kept_sets(recipe: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the prompt sets that a recipe keeps by `prompts.keep`.

    Args:
        recipe: a recipe as unvalidated JSON data. Without `prompts.keep`, it keeps no sets.
    """
    prompts = recipe.get("prompts")
    keep = prompts.get("keep") if isinstance(prompts, Mapping) else None
    sets = keep.get("sets") if isinstance(keep, Mapping) else None
    names = sets if isinstance(sets, Mapping | list) else ()
    return frozenset(name for name in names if isinstance(name, str))


def mark_unseen(
    groups: Sequence[PromptGroup], kept: Collection[str], balanced: Collection[str]
) -> tuple[PromptGroup, ...]:
    """Mark the prompts with words that training did not keep as unseen.

    Args:
        groups: groups whose prompts are marked by their words alone.
        kept: names of the prompt sets that training kept.
        balanced: names of the attributes that the adapter balances.

    Returns:
        The groups. Prompts that name or imply a class are marked as unseen if training did not keep
        prompts of their group, or if the adapter does not balance their attribute.
    """

    def marked(group: PromptGroup, prompt: KeptPrompt) -> KeptPrompt:
        is_kept = group.name in kept and prompt.expected_classes.keys() <= set(balanced)
        return replace(prompt, unseen=prompt.unseen or not is_kept)

    return tuple(
        replace(group, prompts=tuple(marked(group, prompt) for prompt in group.prompts))
        if group.name in (NAMED, IMPLIED)
        else group
        for group in groups
    )
