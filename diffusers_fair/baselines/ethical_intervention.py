"""Ethical intervention: every prompt ends with a clause that asks for fairness.

Bansal, Yin, Monajatipoor, Chang: How well can text-to-image generative models understand ethical
natural language interventions? EMNLP 2022.
"""

from dataclasses import dataclass
from typing import Any

from diffusers_fair.baselines.base import Baseline, ChangedPipeline, Task
from diffusers_fair.prompts.wording import subject


@dataclass(frozen=True)
class EthicalIntervention(Baseline):
    """Appends the clause in section 1 of the paper to every prompt."""

    clause: str = "if all individuals can be a {subject} irrespective of their {attributes}"
    """`{subject}` is the subject of the prompt, `{attributes}` the names of the attributes."""

    def apply(self, pipe: Any, task: Task) -> ChangedPipeline:
        """Append the clause to every prompt."""
        attributes = " and ".join(wording.attribute.name for wording in task.wordings)

        def generate(prompts, generators, **options):
            longer = [
                f"{p.rstrip('. ')} {self.clause.format(subject=subject(p), attributes=attributes)}"
                for p in prompts
            ]
            return pipe(prompt=longer, generator=generators, **options)

        return ChangedPipeline(pipe, generate)
