"""Providers of the testbed's base model and judges, which run on the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers_fair import testbed
from diffusers_fair.backends.needs import Need
from diffusers_fair.backends.pipelines import Base, UsualEvaluation, dtype_of
from diffusers_fair.families.stable_diffusion import STABLE_DIFFUSION

if TYPE_CHECKING:
    from diffusers_fair.vision.judges import Judges


def _load_base(model: str, revision: str | None, dtype: str) -> Any:
    import torch

    pipe = testbed.pipeline()
    for part in STABLE_DIFFUSION.components:  # `pipe.to` warns of layers to keep in float32
        torch.nn.Module.to(getattr(pipe, part), dtype_of(dtype, gpu=False))
    return pipe


def _usual_evaluation() -> UsualEvaluation:
    from diffusers_fair.testbed import world

    return UsualEvaluation(
        attributes=world.ATTRIBUTES, words=world.WORDS, prompt_set="testbed-occupations", steps=20
    )


base = Base(
    load=_load_base,
    needs=lambda model, revision: [],
    usual_guidance=testbed.GUIDANCE,
    untouched_set="testbed-untouched",
    device="cpu",
    usual_evaluation=_usual_evaluation,
)


@dataclass(frozen=True)
class _Judge:
    """Provider of one of `testbed.judges`."""

    name: str

    def load(self, device: Any = "cpu") -> Any:
        """Load the judge.

        Raises:
            ValueError: the device is not the CPU.
        """
        return getattr(_judges(device), self.name)()

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
            ValueError: there is no such attribute, or the device is not the CPU.
        """
        return _judges(device).classifier(attribute, evaluation=model == "evaluation")

    def needs(self, model: str) -> list[Need]:
        """List the requirements of `load`: none."""
        return []

    def extra_scores(self, model: str) -> dict[str, Any]:
        """Score images by whether the context is that of the prompt, in evaluation only."""
        if model != "evaluation":
            return {}
        from diffusers_fair.testbed import judges, world
        from diffusers_fair.vision.judges import recognition

        return {"context": recognition(judges.family_classifier(), world.family_in)}


classifier = _Classifier()


def load_evaluation_judges(attributes: Sequence[str]) -> "Judges":
    """Load the testbed's evaluation judges, which training never uses.

    Args:
        attributes: names of the testbed's attributes to classify.

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
    return load_judges(EvaluationModelsSection(), [world.ATTRIBUTES[name] for name in attributes])


def _judges(device: Any) -> Any:
    """Import the judges if the device is the CPU."""
    import torch

    if torch.device(device).type != "cpu":
        raise ValueError(
            f"the judges of the {testbed.NAME} run on the CPU only, but the pipeline is on "
            f"'{device}': move it to the CPU, or name other models in the recipe"
        )
    from diffusers_fair.testbed import judges

    return judges
