"""The baselines: each against its own published equation, all as pipelines like any other."""

import inspect

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import SemanticStableDiffusionPipeline
from families import PIPELINES, WITH_RECIPES
from tiny import pipeline

from diffusers_fair.attributes import Attribute
from diffusers_fair.baselines import BASELINES, ChangedPipeline, Task, Wording, baseline
from diffusers_fair.baselines.attribute_words import AttributeWords
from diffusers_fair.baselines.concept_algebra import ConceptAlgebra, _transferred
from diffusers_fair.baselines.debias_vl import DebiasVL, _last_tokens, calibration, pairs
from diffusers_fair.baselines.ethical_intervention import EthicalIntervention
from diffusers_fair.baselines.fair_diffusion import FairDiffusion, directions
from diffusers_fair.baselines.uce import (
    UCE,
    _class_shares,
    _closed_form,
    _open_gaps,
    shifts,
)
from diffusers_fair.diffusion.sampling import decode, denoise, guided_prediction
from diffusers_fair.evaluation.generate import generate
from diffusers_fair.families import denoiser_of, family_of
from diffusers_fair.families.stable_diffusion import cross_attention
from diffusers_fair.prompts.wording import Term, combinations, sample_terms, subject, with_terms
from diffusers_fair.vision.classifiers import NetworkClassifier
from diffusers_fair.vision.faces import Faces
from diffusers_fair.vision.judges import Judges

HUE = Wording(Attribute("hue", ("warm", "green", "blue")), {"warm": ("red", "amber")})
TONE = Wording(Attribute("tone", ("dark", "pale"), (0.75, 0.25)), {})
PROMPTS = ["a baker", "a judge", "a nurse"]
CHECKED = {
    "uce": UCE(concepts=2, images_per_prompt=2, iterations=2, step=2),
}


def find_all(images):
    """Such that the chip is the whole picture."""
    n, _, h, w = images.shape
    box = torch.tensor([w, h, 5 * w, 5 * h]) / 6
    return Faces(box.expand(n, 4), torch.ones(n, dtype=torch.bool))


def find_none(images):
    return Faces(find_all(images).boxes, torch.zeros(len(images), dtype=torch.bool))


def judges(detector=find_all):
    """Classes by the mean colour, and by how bright the picture is."""
    return Judges(
        face_detector=detector,
        classifiers={
            "hue": NetworkClassifier(lambda x: 99 * x.mean((2, 3)), HUE.attribute.classes, 8),
            "tone": NetworkClassifier(
                lambda x: 99 * x.mean((1, 2, 3))[:, None] * torch.tensor([1.0, -1.0]),
                ("pale", "dark"),  # not in the attribute's order
                8,
            ),
        },
        clip=None,  # nobody asks for them
        dino=None,
    )


def task(*wordings, detector=find_all):
    found = wordings or (HUE, TONE)
    return Task(
        wordings=found,
        prompts=PROMPTS,
        judges=lambda: judges(detector),
        steps=2,
        guidance_scale=2.0,
    )


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipe, prompts=("a cook",) * 3, seeds=(5, 6, 7), steps=3, scale=3.0, **options):
    """(n, 3, h, w)"""
    return pipe(
        list(prompts),
        generator=generators(*seeds),
        num_inference_steps=steps,
        guidance_scale=scale,
        output_type="pt",
        **options,
    ).images


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


# ---- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "words", "expected"),
    [
        ("a photo of the face of a chef, a person", ["old"], "a photo of the face of an old chef"),
        ("A painting of a chef wearing a hat", ["red"], "A painting of a red chef wearing a hat"),
        ("an actor", ["red", "old"], "an old red actor"),
        ("An actor", ["red"], "A red actor"),
        ("the playwright and novelist", ["red"], "the red playwright and novelist"),
        ("Portrait of pilot in winter", ["red"], "Portrait of red pilot in winter"),
        ("Afterparty bartender", ["red"], "red Afterparty bartender"),
        ("two people", ["old"], "old two people"),
    ],
)
def test_words_go_before_the_subject(prompt, words, expected):
    assert with_terms(prompt, [Term(w, 0, 1.0) for w in words]).removesuffix(", a person") == (
        expected
    )


def test_subject_ends_at_the_next_stop():
    assert subject("a photo of the face of a chef, a person") == "chef"
    assert subject("A philosopher reading. Oil painting.") == "philosopher reading"


def test_words_share_the_target_of_their_class():
    assert [(t.word, t.label) for t in HUE.terms] == [
        ("red", 0),
        ("amber", 0),
        ("green", 1),
        ("blue", 2),
    ]
    assert [t.share for t in HUE.terms] == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])
    joint = combinations([HUE, TONE])
    assert len(joint) == 8
    assert sum(share for _, share in joint) == pytest.approx(1)
    assert joint[0][1] == pytest.approx(1 / 6 * 0.75)


def test_words_for_no_class():
    with pytest.raises(ValueError, match="given for 'hot', which is not a class of attribute"):
        Wording(HUE.attribute, {"hot": ("red",)})


def test_drawn_words_follow_the_target_and_leave_the_noise_alone():
    seeds = generators(*range(2000))
    drawn = [sample_terms([HUE, TONE], g) for g in seeds]
    assert np.mean([t.word == "pale" for _, t in drawn]) == pytest.approx(0.25, abs=0.03)
    assert np.mean([t.label == 0 for t, _ in drawn]) == pytest.approx(1 / 3, abs=0.03)
    both = np.mean([t.label == 0 and u.word == "pale" for t, u in drawn])
    assert both == pytest.approx(1 / 12, abs=0.02)
    assert torch.equal(
        torch.randn(3, generator=seeds[0]), torch.randn(3, generator=generators(0)[0])
    )


# ---- all of them ---------------------------------------------------------------------------------


NOT_OF_PAPER = "does not have: choose another baseline, such as attribute-words, or another base"
OTHERS = [name for name in PIPELINES if name not in WITH_RECIPES]
APART = ["z_image", "lumina2", "flux2_klein"]  # evaluate the guidance branches apart
REFUSED = {  # baseline -> families that it does not work with, and why
    "debias-vl": (("sdxl", "sd3", "flux", *OTHERS), "projects the tokens of a single text encoder"),
    "uce": (("sd3", "flux", *OTHERS), "edits the keys and values of cross-attention"),
    "concept-algebra": (("flux", *APART), "needs classifier-free guidance"),
    "fair-diffusion": (("flux", *APART), "needs classifier-free guidance"),
}
BASES = {**WITH_RECIPES, "sd2": lambda: pipeline(version=2)}
WORKING = [
    (name, base)
    for name in BASELINES
    for base in BASES
    if base not in REFUSED.get(name, ((), ""))[0]
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "base"), WORKING)
def test_images_are_decided_by_their_generators_and_the_pipeline_is_restored(name, base):
    pipe = BASES[base]()
    denoiser = denoiser_of(pipe)
    state = {key: value.clone() for key, value in denoiser.state_dict().items()}
    before = draw(pipe)
    with CHECKED.get(name, baseline(name)).apply(pipe, task()) as changed:
        images = draw(changed)
        assert (images - before).abs().amax((1, 2, 3)).min() > 5e-4
        alone = draw(changed, ["a cook"], [7])
        assert (images[2] - alone[0]).abs().max() < 2e-4  # rounding, by another batch size
    assert all(torch.equal(value, state[key]) for key, value in denoiser.state_dict().items())
    assert torch.equal(draw(pipe), before)


@pytest.mark.parametrize(
    ("name", "base"), [(name, base) for name, (bases, _) in REFUSED.items() for base in bases]
)
def test_pipelines_that_a_method_does_not_work_with_are_refused(name, base):
    pipe = PIPELINES[base]()
    message = f"^{name} {REFUSED[name][1]}, which this {type(pipe).__name__} {NOT_OF_PAPER}"
    with pytest.raises(ValueError, match=message):
        baseline(name).check(pipe)
    with pytest.raises(ValueError, match=message):
        baseline(name).apply(pipe, task())


@pytest.mark.parametrize("name", BASELINES)
def test_negative_prompts_reach_the_pipeline(name):
    with CHECKED.get(name, baseline(name)).apply(pipeline(), task()) as changed:
        plain = draw(changed, ["a cook"] * 2, [5, 6])
        images = draw(changed, ["a cook"] * 2, [5, 6], negative_prompt=["", "blurry"])
    assert torch.equal(images[0], plain[0])
    assert (images[1] - plain[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", BASELINES)
def test_each_is_documented_and_stands_in_a_file_of_its_own(name):
    method = BASELINES[name]
    assert method.__doc__
    assert method.__module__.rpartition(".")[2] == name.replace("-", "_")
    assert len(inspect.signature(method.apply).parameters) == 3


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown baseline 'UCE': expected one of attribute-words"):
        baseline("UCE")


def test_one_prompt_takes_one_generator(pipe):
    changed = ChangedPipeline(pipe)
    assert changed.scheduler is pipe.scheduler
    image = changed("a cook", generator=generators(5)[0], num_inference_steps=2, output_type="pt")
    assert image.images.shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="one generator for each of 2 prompts, got 1: give a list"):
        changed(["a cook", "a judge"], generator=generators(5)[0])


# ---- prompts -------------------------------------------------------------------------------------


def test_attribute_words_are_asked_for_in_the_prompt(pipe):
    images = draw(AttributeWords().apply(pipe, task()))
    worded = [with_terms("a cook", sample_terms([HUE, TONE], g)) for g in generators(5, 6, 7)]
    assert len(set(worded)) > 1
    assert torch.equal(images, draw(pipe, worded))


def test_ethical_intervention_is_a_clause_behind_the_prompt(pipe):
    """Bansal et al., section 1: "a photo of a lawyer if all individuals can be a lawyer ..."."""
    images = draw(EthicalIntervention().apply(pipe, task()), ["a cook."], [5])
    clause = "if all individuals can be a cook irrespective of their hue and tone"
    assert torch.equal(images, draw(pipe, [f"a cook {clause}"], [5]))


# ---- debiasVL ------------------------------------------------------------------------------------


def test_calibration_minimises_the_published_objective():
    z = torch.randn(2, 7, 5, dtype=torch.float64, generator=generators(0)[0])
    p = calibration(z[0] - z[1], 500.0).requires_grad_()
    alike = ((z[0] - z[1]) @ p.T).square().sum() / 7
    loss = (p - torch.eye(5)).square().sum() + 500 * alike
    (gradient,) = torch.autograd.grad(loss, p)
    assert gradient.abs().max() < 1e-10


def test_pairs_differ_in_the_words_alone():
    first, second = pairs(["a cook"], [Wording(TONE.attribute, {}), Wording(HUE.attribute, {})])
    assert len(first) == 15  # two of the six combinations
    assert ("a warm dark cook", "a green dark cook") in list(zip(first, second, strict=True))


def test_last_tokens_are_the_text_encoders_own(pipe):
    ids = pipe.tokenizer(["a cook"], padding="max_length", return_tensors="pt").input_ids
    hidden = pipe.text_encoder(ids)[0][0, 6]  # start, five letters, end
    found = _last_tokens(pipe, ["a cook", "a judge", "a cook"], batch=1)
    assert torch.allclose(found[0], hidden, atol=1e-6)
    assert torch.equal(found[0], found[2])


def test_debias_vl_projects_the_prompt_and_not_the_negative_one(pipe):
    images = draw(DebiasVL().apply(pipe, task(TONE)), ["a cook"], [5])
    first, second = (_last_tokens(pipe, texts).double() for texts in pairs(PROMPTS, [TONE]))
    gaps = first / first.norm(dim=1)[:, None] - second / second.norm(dim=1)[:, None]
    embeddings, negative = pipe.encode_prompt(["a cook"], "cpu", 1, True)
    by_hand = pipe(
        prompt_embeds=embeddings @ calibration(gaps, 500).float(),
        negative_prompt_embeds=negative,
        generator=generators(5),
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    assert (images - by_hand).abs().max() < 1e-4


# ---- concept algebra -----------------------------------------------------------------------------


def test_two_phrases_span_one_direction():
    """Algorithm 2 of the paper, for the even mixture: s - <s - m, u> u."""
    s, a, b = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64, generator=generators(1)[0])
    found = _transferred(s, torch.stack([a, b]), torch.tensor([0.5, 0.5], dtype=torch.float64))
    for i in range(2):
        u = (b[i] - a[i]) / (b[i] - a[i]).norm()
        expected = s[i] - ((s[i] - (a[i] + b[i]) / 2) * u).sum() * u
        assert torch.allclose(found[i], expected, atol=1e-10)


def test_only_the_concept_is_replaced():
    g = generators(2)[0]
    s = torch.randn(2, 4, 3, 3, generator=g, dtype=torch.float64)
    phrases = torch.randn(4, 2, 4, 3, 3, generator=g, dtype=torch.float64)
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    found = _transferred(s, phrases, shares)
    mean = torch.einsum("k,knchw->nchw", shares, phrases)
    basis = (phrases[1:] - phrases[:1]).flatten(2)  # (3, n, D)
    for i in range(2):
        assert (basis[:, i] @ (found - mean)[i].flatten()).abs().max() < 1e-9
        outside = s[i].flatten() - found[i].flatten()
        left = torch.linalg.lstsq(basis[:, i].T, outside[:, None]).solution
        assert (basis[:, i].T @ left - outside[:, None]).abs().max() < 1e-9
    again = _transferred(found, phrases, shares)
    assert torch.allclose(again, found, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_concept_algebra_edits_the_prompts_score_at_every_step(pipe, scale):
    """One step by hand, with and without guidance."""
    method = ConceptAlgebra(phrase="a person")
    image = draw(method.apply(pipe, task(TONE)), ["a cook"], [5], steps=1, scale=scale)
    texts = ["", "a cook", "a dark person", "a pale person"]
    embeddings = pipe.encode_prompt(texts, "cpu", 1, False)[0]
    noise = torch.randn(1, 4, 8, 8, generator=generators(5)[0])
    pipe.scheduler.set_timesteps(1)
    t = pipe.scheduler.timesteps[0]
    u, s, *concept = pipe.unet(noise.expand(4, -1, -1, -1), t, embeddings).sample.split(1)
    edited = _transferred(s, torch.stack(concept), torch.tensor([0.75, 0.25], dtype=torch.float64))
    latents = pipe.scheduler.step(u + scale * (edited - u), t, noise).prev_sample
    by_hand = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    assert (image - by_hand.clamp(0, 1)).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sdxl", "sd3"])
def test_concept_algebra_edits_noise_and_velocity_alike(base):
    """One guided step by hand, with every text's prediction evaluated alone."""
    pipe, shares = BASES[base](), torch.tensor([0.75, 0.25], dtype=torch.float64)
    method, family = ConceptAlgebra(phrase="a person"), family_of(pipe)
    image = draw(method.apply(pipe, task(TONE)), ["a cook"], [5], steps=1)
    noise = torch.randn(1, *family.noise_shape(pipe), generator=generators(5)[0])

    def evaluate(_, scaled, t):
        texts = [family.encode(pipe, [x]) for x in ("a cook", "a dark person", "a pale person")]
        u, s, *concept = (
            guided_prediction(pipe, {"cond": x}, noise.shape, 1.0)(scaled, t)
            for x in (family.unconditional(pipe), *texts)
        )
        return u + 3 * (_transferred(s, torch.stack(concept), shares) - u)

    with torch.no_grad():
        by_hand = decode(pipe, denoise(pipe, evaluate, pipe.scheduler, noise, 1)) / 2 + 0.5
    change = image - draw(pipe, ["a cook"], [5], steps=1)
    assert change.abs().max() > 2e-5  # the tiny SDXL hardly depends on the prompt
    assert (image - by_hand).abs().max() < 0.1 * change.abs().max()


# ---- Fair Diffusion ------------------------------------------------------------------------------


def test_fair_diffusion_is_semantic_guidance_of_the_host(pipe):
    """The published pair of directions, by diffusers' own implementation of SEGA."""
    method = FairDiffusion(warmup=0.2)
    image = draw(method.apply(pipe, task(TONE)), ["a cook"], [5], steps=8)
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    host = SemanticStableDiffusionPipeline(**parts, requires_safety_checker=False)
    host.set_progress_bar_config(disable=True)
    (term,) = sample_terms([TONE], generators(5)[0])
    (other,) = (t.word for t in TONE.terms if t.word != term.word)
    expected = host(
        ["a cook"],
        generator=generators(5),
        num_inference_steps=8,
        guidance_scale=3.0,
        editing_prompt=[f"{term.word} person", f"{other} person"],
        reverse_editing_direction=[False, True],
        edit_warmup_steps=2,
        edit_guidance_scale=4,
        edit_threshold=0.95,
        edit_momentum_scale=0.5,
        edit_mom_beta=0.6,
        output_type="pt",
    ).images
    assert (image - draw(pipe, ["a cook"], [5], steps=8)).abs().max() > 1e-3
    assert (image - expected).abs().max() < 3e-5


def test_directions_go_to_the_drawn_class_and_from_the_others():
    red, dark = HUE.terms[0], TONE.terms[0]
    assert directions([HUE, TONE], [red, dark]).tolist() == [1, 0, -0.5, -0.5, 1, -1]


def test_semantic_guidance_needs_guidance(pipe):
    changed = FairDiffusion().apply(pipe, task(TONE))
    with pytest.raises(ValueError, match="use a guidance_scale above 1"):
        draw(changed, scale=1.0)
    assert not pipe.unet._forward_hooks


# ---- UCE -----------------------------------------------------------------------------------------


def test_closed_form_is_the_least_squares_solution():
    """For the weights of one layer, by the gradient of the objective it minimises."""
    g = generators(3)[0]
    c, v, r = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (4, 4, 3))
    old = torch.randn(6, 5, generator=g, dtype=torch.float64)
    w = (old @ _closed_form(c, v, r, 2.0, 0.7, 0.3)).requires_grad_()
    loss = (
        2 * (c @ w.T - v @ old.T).square().sum()
        + 0.7 * (r @ w.T - r @ old.T).square().sum()
        + 0.3 * (w - old).square().sum()
    )
    (gradient,) = torch.autograd.grad(loss, w)
    assert gradient.abs().max() < 1e-9
    same = _closed_form(c, c, r, 2.0, 0.7, 0.3)
    assert torch.allclose(same, torch.eye(5, dtype=torch.float64), atol=1e-10)


def test_shifted_tokens_are_those_of_the_worded_prompts(pipe):
    tokens, words = shifts(pipe, "a cook", [HUE, TONE])
    assert tokens.shape == (77 - 2 - len("n") - len("amber"), 16)  # from the c of "cook" on
    assert words.shape == (5, *tokens.shape)
    length = len(tokens)

    def embed(text):
        return pipe.encode_prompt([text], "cpu", 1, False)[0][0].double()

    assert torch.equal(tokens, embed("a cook")[2 : 2 + length])
    assert torch.allclose(words[4], embed("a pale cook")[6 : 6 + length], atol=1e-6)
    warm = (embed("a red cook")[5 : 5 + length] + embed("an amber cook")[8 : 8 + length]) / 2
    assert torch.allclose(words[0], warm, atol=1e-6)


def test_class_shares_are_counted_in_the_attributes_order(pipe):
    shares = _class_shares(pipe, PROMPTS, task(), judges(), 4)
    assert shares.shape == (3, 5)
    assert np.allclose(shares[:, :3].sum(1), 1)
    options = {"steps": 2, "guidance_scale": 2.0, "seed": 0, "batch_size": 5, "progress": False}
    drawn = list(generate(pipe, PROMPTS, images_per_prompt=4, **options))
    bright = torch.cat([batch.images.mean((1, 2, 3)) > 0 for batch in drawn]).view(3, 4)
    assert shares[:, 4].tolist() == bright.float().mean(1).tolist()
    assert np.isnan(_class_shares(pipe, PROMPTS, task(), judges(find_none), 1)).all()


def test_gaps_close_within_the_tolerance():
    shares = np.array([[0.4, 0.3, 0.3, 0.73, 0.27], [1, 0, 0, 0.5, 0.5], [np.nan] * 5])
    gaps = _open_gaps(shares, [HUE, TONE], 0.05)
    assert gaps[0, :3] == pytest.approx([-1 / 15, 1 / 30, 1 / 30])
    assert gaps[0, 3:].tolist() == [0, 0]
    assert gaps[1] == pytest.approx([-2 / 3, 1 / 3, 1 / 3, 0.25, -0.25])
    assert not gaps[2].any()


def test_uce_moves_keys_and_values_towards_the_words(pipe):
    """After one edit of one prompt: W c is nearer to W_old (c + sum alpha a) than before."""
    todo = task(TONE)
    layers = cross_attention(pipe)
    old = [layer.weight.clone() for layer in layers]
    assert len(layers) == 2 * 4  # one block down, one in the middle, two up
    method = UCE(concepts=1, images_per_prompt=2, iterations=1, step=0.5)
    tokens, words = shifts(pipe, PROMPTS[0], [TONE])
    gaps = _open_gaps(_class_shares(pipe, PROMPTS[:1], todo, judges(), 2), [TONE], 0.05)[0]
    wanted = tokens + torch.einsum("k,ktd->td", torch.from_numpy(0.5 * gaps), words)
    with method.apply(pipe, todo):
        for layer, weight in zip(layers, old, strict=True):
            goal = wanted @ weight.double().T
            now = (tokens @ layer.weight.double().T - goal).norm()
            assert now < 0.95 * (tokens @ weight.double().T - goal).norm()


def test_uce_leaves_the_weights_where_nothing_is_to_be_done(pipe):
    old = [layer.weight.clone() for layer in cross_attention(pipe)]
    UCE(iterations=1, concepts=1, images_per_prompt=1).apply(pipe, task(detector=find_none))
    assert all(map(torch.equal, old, (layer.weight for layer in cross_attention(pipe))))


def test_uce_restores_the_weights_upon_an_error(pipe):
    old = [layer.weight.clone() for layer in cross_attention(pipe)]
    calls = iter([find_all])

    def fails_later(images):
        for detector in calls:
            return detector(images)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        UCE(concepts=1, images_per_prompt=1).apply(pipe, task(TONE, detector=fails_later))
    assert all(map(torch.equal, old, (layer.weight for layer in cross_attention(pipe))))


def test_uce_refuses_weights_that_are_offloaded_layer_by_layer():
    """What `enable_sequential_cpu_offload` does, which itself asks for a GPU."""
    offloaded = pipeline()
    cpu_offload(offloaded.unet, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"offloaded layer by layer: call pipe\.remove_all_hooks"):
        UCE().apply(offloaded, task(TONE))
