"""Random attribute words: each image's prompt names classes sampled from the target."""

from dataclasses import dataclass
from typing import Any

from diffusers_fair.baselines.base import Baseline, ChangedPipeline, Task
from diffusers_fair.prompts.wording import sample_terms, with_terms


@dataclass(frozen=True)
class AttributeWords(Baseline):
    """Adds one word per attribute, sampled from the target, to each image's prompt.

    The strongest simple baseline. The words are placed before the subject of the prompt. They have
    no effect if the model does not follow them.
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
