"""Attribute words at random: each image's prompt asks for classes drawn from the target."""

from dataclasses import dataclass
from typing import Any

from diffusers_fair.baselines.base import ChangedPipeline, Task
from diffusers_fair.prompts.wording import draw_terms, with_terms


@dataclass(frozen=True)
class AttributeWords:
    """Says in the prompt who is to be seen, drawn for each image by the target.

    The strongest simple rival. It needs a subject to put the words before, asks for one word of
    one class of each attribute, and cannot help where the model does not obey the words.
    """

    def apply(self, pipe: Any, task: Task) -> ChangedPipeline:
        """Put words into every prompt."""

        def draw(prompts, generators, **options):
            worded = [
                with_terms(prompt, draw_terms(task.wordings, generator))
                for prompt, generator in zip(prompts, generators, strict=True)
            ]
            return pipe(prompt=worded, generator=generators, **options)

        return ChangedPipeline(pipe, draw)
