"""Published methods to compare adapters with, one per file, behind one protocol.

Each method is a dataclass of its hyperparameters, whose defaults are the published values. Its
`apply(pipe, task)` returns a pipeline that uses the method, and restores the original on exit:

    with BASELINES["fair-diffusion"]().apply(pipe, task) as changed:
        report = evaluate(changed, prompts, attributes, judges=judges)
"""

from diffusers_fair.baselines.attribute_words import AttributeWords
from diffusers_fair.baselines.base import Baseline, ChangedPipeline, Task
from diffusers_fair.baselines.concept_algebra import ConceptAlgebra
from diffusers_fair.baselines.debias_vl import DebiasVL
from diffusers_fair.baselines.ethical_intervention import EthicalIntervention
from diffusers_fair.baselines.fair_diffusion import FairDiffusion
from diffusers_fair.baselines.uce import UCE
from diffusers_fair.prompts.wording import Wording

__all__ = ["BASELINES", "Baseline", "ChangedPipeline", "Task", "Wording", "baseline"]

BASELINES: dict[str, type[Baseline]] = {
    "attribute-words": AttributeWords,
    "ethical-intervention": EthicalIntervention,
    "debias-vl": DebiasVL,
    "uce": UCE,
    "concept-algebra": ConceptAlgebra,
    "fair-diffusion": FairDiffusion,
}


def baseline(name: str) -> Baseline:
    """Return the method of that name with its default hyperparameters.

    Raises:
        ValueError: there is no such method.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown baseline '{name}': expected one of {', '.join(BASELINES)}")
    return BASELINES[name]()
