"""Made-up reports, as an evaluation would give them but without any model: shared by tests."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusers_fair.attributes import Attribute
from diffusers_fair.prompts.groups import KeptPrompt, PromptGroup
from diffusers_fair.reports.groups import GroupReport, with_obeyed
from diffusers_fair.reports.records import Records, Settings
from diffusers_fair.reports.report import Report

HUE = Attribute("hue", ("red", "green", "blue"))
TONE = Attribute("tone", ("dark", "light"), (0.75, 0.25))
PROMPTS = tuple(f"a picture of the {thing}, at noon" for thing in ("baker", "tall judge", "nurse"))


def report(
    label: str = "base",
    *,
    prompts: Sequence[str] = PROMPTS,
    attributes: Sequence[Attribute] = (HUE, TONE),
    images: int = 8,
    side: int = 16,
    seed: int = 0,
    **changes: Any,
) -> Report:
    """Random classes, faces and scores; pictures of every prompt."""
    rng = np.random.default_rng(seed)
    prompt, image = np.indices((len(prompts), images)).reshape(2, -1)
    n = len(prompt)
    settings = {"steps": 2, "guidance_scale": 4.5, "seed": 0} | changes.pop("settings", {})
    records = {
        "prompt": prompt,
        "image": image,
        "seed": np.arange(n),
        "found": np.ones(n, bool),
        "boxes": np.tile([2.0, 3.0, 10.0, 12.0], (n, 1)),
        "probabilities": {a.name: rng.dirichlet([0.5] * len(a.classes), n) for a in attributes},
        "scores": {"clip_t": rng.normal(0.3, 0.02, n)},
        "features": {},
    }
    return Report(
        **{
            "label": label,
            "settings": Settings(
                prompts=tuple(prompts),
                attributes=tuple(attributes),
                images_per_prompt=images,
                **settings,
            ),
            "records": Records(**records | changes.pop("records", {})),
            "samples": {
                i: rng.integers(0, 256, (2, side, side, 3), dtype=np.uint8)
                for i in range(len(prompts))
            },
            "provenance": {"date": "2026-01-01", "versions": {"torch": "2.14"}},
        }
        | changes
    )


def certain(attribute: Attribute, labels: Sequence[int]) -> Mapping[str, np.ndarray]:
    """Probabilities of a classifier that is sure of these classes, (n,)."""
    return {attribute.name: np.eye(len(attribute.classes))[np.asarray(labels)]}


def group(
    name: str = "named",
    *,
    prompts: Sequence[KeptPrompt],
    labels: Mapping[str, Sequence[int]] | None = None,
    attributes: Sequence[Attribute] = (HUE, TONE),
    images: int = 2,
    seed: int = 0,
    **scores: float,
) -> GroupReport:
    """What was seen of a group: classes of each image, faces in all, scores the same for all."""
    rng = np.random.default_rng(seed)
    prompt, image = np.indices((len(prompts), images)).reshape(2, -1)
    n = len(prompt)
    known = {a.name: rng.integers(len(a.classes), size=n) for a in attributes} | (labels or {})
    records = Records(
        prompt=prompt,
        image=image,
        seed=np.arange(n),
        found=np.ones(n, bool),
        boxes=np.tile([2.0, 3.0, 10.0, 12.0], (n, 1)),
        probabilities={a.name: certain(a, known[a.name])[a.name] for a in attributes},
        scores={key: np.full(n, value) for key, value in scores.items()},
        features={},
    )
    return GroupReport(
        group=PromptGroup(name, tuple(prompts), images),
        attributes=tuple(attributes),
        records=with_obeyed(records, prompts, attributes),
        samples={0: rng.integers(0, 256, (images, 16, 16, 3), dtype=np.uint8)},
    )
