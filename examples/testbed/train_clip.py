"""Train the image-text encoder on balanced captions of the training images. 8 minutes on 1 core.

Captions are sampled for images, not images for captions. As the images are balanced, no occupation
is correlated with a gender, race or age, and the encoder learns only what the words say.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from augment import degrade, mirror
from captions import EMPTY, NOUNS, OTHER, STYLED, TWO, Caption, every_text
from data import HERE, STYLES, Portraits, load_portraits
from judging import COLUMNS, WEIGHTS, as_texts, images_of, in_batches
from stage import Stage
from torch import Tensor

from diffusers_fair.testbed import judges, world
from diffusers_fair.testbed.models import SIZE, VOCABULARY
from diffusers_fair.testbed.tokenizer import tokenizer
from diffusers_fair.testbed.vocabulary import pack, table_rows, unpack
from diffusers_fair.vision.encoders import ClipEncoder, Pixels

BATCH = {"portrait": 76, "pair": 10, "empty": 10}
MEDIA = {"photo": "a photo", "oil painting": "an oil painting", "pencil sketch": "a pencil sketch"}
STYLE_ODDS = (0.8, 0.1, 0.1)


def captions_of(shown: dict[str, str], g: np.random.Generator) -> list[Caption]:
    """Sample captions of an image: for portraits, one about the work and one about the person.

    Args:
        shown: description by `shown_by`.
        g: random generator.
    """
    kind, family, style = shown["kind"], shown["family"], shown["style"]
    facts = world.families()[family]
    occupation = str(g.choice(facts["occupations"]))
    if kind == "empty":
        return [Caption(str(g.choice(EMPTY)).format(facts["place"]), kind, style, family)]
    if kind == "pair":
        return [Caption(str(g.choice(TWO)).format(occupation), kind, style, family)]
    about_work = Caption(work_text(family, style, occupation, g), kind, style, family)
    return [about_work, about_person(shown, occupation, g)]


def work_text(family: str, style: str, occupation: str, g: np.random.Generator) -> str:
    """Sample a text about the occupation that does not describe the person."""
    if style != "photo":
        return str(g.choice(STYLED)).format(style, occupation)
    manner = g.random()
    if manner < 0.5:
        return world.NEUTRAL.format(occupation)
    if manner < 0.8 or not sentences(family):
        return str(g.choice(OTHER)).format(occupation)
    return str(g.choice(sentences(family)))


def about_person(shown: dict[str, str], occupation: str, g: np.random.Generator) -> Caption:
    """Sample a caption with most of the person's classes and, half of the time, the occupation."""
    named = {n: shown[n] for n in ("age", "race", "gender") if g.random() < 0.75}
    words = [str(g.choice(world.WORDS[c])) for c in named.values()]
    style = shown["style"]
    if g.random() < 0.5:
        text = world.NEUTRAL.format(" ".join([*words, occupation]))
        return Caption(
            text.replace("a photo", MEDIA[style]), "portrait", style, shown["family"], named
        )
    if "gender" in named:
        words[-1] = NOUNS[named["gender"]]
    else:
        words.append("person")
    text = " ".join([f"{MEDIA[style]} of a", *words])
    return Caption(text, "portrait", style, None, named)


def sentences(family: str) -> list[str]:
    """List free sentences and sports of a family that name no other style than a photo."""
    texts = [
        s.text
        for s in world.sentences()
        if s.family == family and world.style_of(s.text) == "photo"
    ]
    return texts + [f"a person playing {s.text}" for s in world.sports() if s.family == family]


def agreement(captions: list[Caption], shown: list[dict[str, str]]) -> Tensor:
    """Return whether each text is true of each image, (texts, images) bool."""
    wanted = [
        {"kind": c.kind, "style": c.style, **({"family": c.family} if c.family else {}), **c.labels}
        for c in captions
    ]
    return torch.tensor([[all(p.get(k) == v for k, v in w.items()) for p in shown] for w in wanted])


def shown_by(portraits: Portraits, row: int, style: str) -> dict[str, str]:
    """Describe what an image shows; pairs and empty scenes have no attributes."""
    at = portraits.labels
    who = {n: at[c][row] for n, c in COLUMNS.items()} if at["kind"][row] == "portrait" else {}
    return {"kind": str(at["kind"][row]), "family": str(at["family"][row]), "style": style, **who}


def contrast(logits: Tensor, agree: Tensor) -> Tensor:
    """Compute the symmetric cross-entropy, with all true pairs as targets; both (texts, images)."""
    both = []
    for scores, target in ((logits, agree.float()), (logits.T, agree.T.float())):
        target = target / target.sum(1, keepdim=True)
        both.append(-(target * scores.log_softmax(1)).sum(1).mean())
    return sum(both) / 2


def sample_batch(portraits: Portraits, kinds: dict[str, np.ndarray], g: torch.Generator):
    """Sample images (n, 3, 64, 64), captions of all images, and descriptions of each image."""
    rng = np.random.default_rng(g.initial_seed())
    pick = np.concatenate([rng.choice(kinds[kind], count) for kind, count in BATCH.items()])
    rng.shuffle(pick)
    x = degrade(mirror(images_of(portraits, pick), g), g)
    styles = [str(s) for s in rng.choice(list(STYLES), len(pick), p=STYLE_ODDS)]
    x = torch.stack([STYLES[style](x[i : i + 1])[0] for i, style in enumerate(styles)])
    shown = [shown_by(portraits, row, style) for row, style in zip(pick, styles, strict=True)]
    captions = [caption for facts in shown for caption in captions_of(facts, rng)]
    return x, captions, shown


def measure(encoder: ClipEncoder, portraits: Portraits) -> dict:
    """Measure zero-shot accuracy on held-out portraits, and typical cosines."""
    picks = portraits.where(kind="portrait", split="test")
    x = images_of(portraits, picks)
    images = in_batches(encoder, x)
    at = portraits.labels

    def right(texts: list[list[str]], truth: list[int], features: Tensor = images) -> float:
        anchors = torch.stack([encoder.texts(group).mean(0) for group in texts])
        guess = (features @ torch.nn.functional.normalize(anchors, dim=1).T).argmax(1)
        return round((guess == torch.tensor(truth)).float().mean().item(), 4)

    families = list(world.families())
    neutral = [
        [world.NEUTRAL.format(o) for o in world.families()[f]["occupations"]] for f in families
    ]
    metrics: dict = {"family": right(neutral, [families.index(f) for f in at["family"][picks]])}
    for name, attribute in world.ATTRIBUTES.items():
        texts = [
            [world.explicit(o.text, c) for o in world.occupations()[::10]]
            for c in attribute.classes
        ]
        metrics[name] = right(texts, [attribute.classes.index(c) for c in at[COLUMNS[name]][picks]])
    styled = torch.cat([in_batches(encoder, restyle(x[:300])) for restyle in STYLES.values()])
    kinds = [
        [f"{MEDIA[s]} of the face of a {o.text}, a person" for o in world.occupations()[::10]]
        for s in STYLES
    ]
    metrics["style"] = right(kinds, [i for i in range(len(STYLES)) for _ in range(300)], styled)
    by_family = torch.stack(
        [images[torch.from_numpy(at["family"][picks] == f)].mean(0) for f in families]
    )
    captions = torch.cat([encoder.texts(t).mean(0, keepdim=True) for t in neutral])
    cosines = by_family @ captions.T
    metrics["cosine with own family's captions"] = round(cosines.diag().mean().item(), 3)
    metrics["cosine with other families' captions"] = round(
        cosines[~torch.eye(16, dtype=torch.bool)].mean().item(), 3
    )
    metrics["cosine of two pictures"] = round((images[:700] @ images[700:1400].T).mean().item(), 3)
    return metrics


def main(steps: int, work: Path, out: Path) -> None:
    torch.manual_seed(0)
    portraits = load_portraits()
    tokenize = tokenizer()
    used = torch.tensor(
        sorted({i for ids in tokenize(every_text(), truncation=True).input_ids for i in ids})
    )
    model = judges.clip_network(len(used))
    kinds = {kind: portraits.where(kind=kind, split="train") for kind in BATCH}

    def encode_texts(texts: list[str]) -> Tensor:
        ids = tokenize(texts, padding=True, truncation=True, return_tensors="pt").input_ids
        states = model.text_model(input_ids=table_rows(used, ids)).pooler_output
        return torch.nn.functional.normalize(model.text_projection(states), dim=-1)

    encode_images = ClipEncoder(model, tokenize, Pixels(SIZE))

    def loss_at(g: torch.Generator) -> tuple[Tensor, dict]:
        x, captions, shown = sample_batch(portraits, kinds, g)
        logits = encode_texts([c.text for c in captions]) @ encode_images(x).T
        agree = agreement(captions, shown)
        loss = contrast(logits * model.logit_scale.clamp(max=4.0).exp(), agree)
        best = agree[torch.arange(len(agree)), logits.argmax(1)].float().mean()
        return loss, {
            "right": round(best.item(), 3),
            "scale": round(model.logit_scale.exp().item(), 1),
        }

    Stage(name="clip", steps=steps, lr=1.5e-3, work=work, weight_decay=0.05, warmup=150).train(
        model, loss_at
    )
    file = out / "clip.safetensors"
    pack(model, used, file)
    judges_clip = ClipEncoder(
        judges.freeze(judges.clip_network(), unpack(file, VOCABULARY)), tokenize, Pixels(SIZE)
    )
    pack(model, used, file, as_texts({"held_out": measure(judges_clip, portraits)}))
    print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    main(**vars(parser.parse_args()))
