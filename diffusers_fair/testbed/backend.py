"""Providers of the testbed's base models and judges."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers_fair import testbed
from diffusers_fair.backends.needs import Need
from diffusers_fair.backends.pipelines import Base, UsualEvaluation
from diffusers_fair.families import family_of
from diffusers_fair.families.base import Usual

if TYPE_CHECKING:
    import torch

    from diffusers_fair.vision.judges import Judges


def _usual_evaluation() -> UsualEvaluation:
    from diffusers_fair.testbed import world

    return UsualEvaluation(
        attributes=world.ATTRIBUTES,
        words=world.WORDS,
        prompt_set="testbed-occupations",
    )


def _base(create: Callable[[], Any], usual_sampling: Usual, **call_options: Any) -> Base:
    """Describe a base model that has the testbed's world and judges."""

    def load(model: str, revision: str | None, dtype: "torch.dtype") -> Any:
        from torch import nn

        pipe = create()
        for part in family_of(pipe).components:  # `pipe.to` warns of layers to keep in float32
            nn.Module.to(getattr(pipe, part), dtype)
        return pipe

    return Base(
        load=load,
        needs=lambda model, revision: [],
        usual_sampling=usual_sampling,
        untouched_set="testbed-untouched",
        usual_device="cpu",  # fast enough, and the same figures everywhere
        usual_dtype="float32",
        code=f"diffusers_fair.testbed.{create.__name__}()",
        call_options=call_options,
        usual_evaluation=_usual_evaluation,
    )


base = _base(testbed.pipeline, Usual(guidance_scale=testbed.GUIDANCE, steps=20))
flux_base = _base(
    testbed.flux_pipeline,
    Usual(guidance_scale=testbed.FLUX_GUIDANCE, steps=12),
    max_sequence_length=testbed.FLUX_TOKENS,
)


@dataclass(frozen=True)
class _Judge:
    """Provider of one of `testbed.judges`."""

    name: str

    def load(self, device: Any = "cpu") -> Any:
        """Load the judge."""
        from diffusers_fair.testbed import judges

        return getattr(judges, self.name)(device=device)

    def needs(self) -> list[Need]:
        """List the requirements of `load`: none."""
        return []


face_detector = _Judge("face_detector")
clip = _Judge("clip")
dino = _Judge("dino")
face_embedder = _Judge("face_embedder")
reference_faces = _Judge("reference_faces")


class _Classifier:
    """Provider of the classifiers; the model `evaluation` is never used in training."""

    def load(self, model: str, attribute: str, device: Any = "cpu") -> Any:
        """Load the classifier of an attribute.

        Raises:
            ValueError: there is no such attribute.
        """
        from diffusers_fair.testbed import judges

        return judges.classifier(attribute, evaluation=model == "evaluation", device=device)

    def needs(self, model: str) -> list[Need]:
        """List the requirements of `load`: none."""
        return []

    def extra_scores(self, model: str, device: Any) -> dict[str, Any]:
        """Score images by whether the context is that of the prompt, in evaluation only."""
        if model != "evaluation":
            return {}
        from diffusers_fair.testbed import judges, world
        from diffusers_fair.vision.judges import recognition

        return {"context": recognition(judges.family_classifier(device=device), world.family_in)}


classifier = _Classifier()


def load_evaluation_judges(attributes: Sequence[str], device: Any = "cpu") -> "Judges":
    """Load the testbed's evaluation judges, which training never uses.

    Args:
        attributes: names of the testbed's attributes to classify.
        device: device that they compute on. Images are moved to it.

    Raises:
        ValueError: the testbed has no attribute of that name.
    """
    from diffusers_fair.backends.registry import load_judges
    from diffusers_fair.config.models import EvaluationModelsSection
    from diffusers_fair.testbed import world

    for name in attributes:
        if name not in world.ATTRIBUTES:
            raise ValueError(
                f"the testbed has no attribute '{name}': expected {', '.join(world.ATTRIBUTES)}"
            )
    measured = [world.ATTRIBUTES[name] for name in attributes]
    return load_judges(EvaluationModelsSection(), measured, device)
