"""Random attribute words: each image's prompt names classes drawn from the target."""

from dataclasses import dataclass
from typing import Any

from diffusers_fair.baselines.base import ChangedPipeline, Task
from diffusers_fair.prompts.wording import sample_terms, with_terms


@dataclass(frozen=True)
class AttributeWords:
    """Adds to each image's prompt one word per attribute, drawn from the target.

    The strongest simple baseline. It needs a subject to place the words before, and has no effect
    where the model does not follow the words.
    """

    def apply(self, pipe: Any, task: Task) -> ChangedPipeline:
        """Add words to every prompt."""

        def generate(prompts, generators, **options):
            worded = [
                with_terms(prompt, sample_terms(task.wordings, generator))
                for prompt, generator in zip(prompts, generators, strict=True)
            ]
            return pipe(prompt=worded, generator=generators, **options)

        return ChangedPipeline(pipe, generate)
