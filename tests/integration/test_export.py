"""Adapters as files for other programs: read back by diffusers alone, and by training."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import families
import layer_names
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers_fair import Attribute, export_adapter, testbed
from diffusers_fair.adapters.export import read_exported_lora
from diffusers_fair.adapters.folder import open_adapter, write_adapter
from diffusers_fair.adapters.format import AdapterInfo, Lora, SoftTokens
from diffusers_fair.adapters.tensors import data_start
from diffusers_fair.adapters.trainable import TrainableAdapter
from diffusers_fair.families import FAMILIES, family_of
from diffusers_fair.families.other_programs import LAYOUTS, PROGRAMS, base_names, layer_name
from diffusers_fair.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_fair.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from diffusers_fair.publishing.export import write_all

KEPT = Path(__file__).parents[2] / "model_cards" / "adapters"
LORA = ("testbed-gender", "testbed-unet", "testbed-text-encoder-unet")
PROMPT = "a photo of the face of a nurse, a person"


def images(pipe, prompt=PROMPT):
    return pipe(
        prompt,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


def sdxl(dtype=torch.float32):
    """As many layers per block as every SDXL has, on which the original names depend."""
    return families.sdxl(dtype, layers_per_block=2)


PIPELINES = families.WITH_RECIPES | {"sdxl": sdxl}


def info_of(pipe, components, **changes):
    values = {
        "base_model": "org/some-model-v1.5",
        "fingerprint": "f" * 64,
        "family": family_of(pipe).name,
        "components": components,
        "attributes": (Attribute("shape", ("round", "square"), (0.5, 0.5)),),
        "recipe": {},
    }
    return AdapterInfo(**(values | changes))


def written(folder, pipe, components=None, alpha=4.0, **changes):
    """Write an adapter of random weights for a pipeline."""
    if components is None:
        components = dict.fromkeys(family_of(pipe).targets, Lora(rank=2, alpha=alpha))
    adapter = TrainableAdapter(pipe, components)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters:
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    write_adapter(folder, adapter.weights(), info_of(pipe, components, **changes))
    return folder


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "adapter", tiny.pipeline())


@pytest.fixture
def whole(tmp_path):
    components = {"text_encoder": Lora(rank=2, alpha=2), "soft_tokens": SoftTokens(count=3)}
    return written(tmp_path / "whole", tiny.pipeline(), components)


def exported(adapter, out, program="comfyui") -> Path:
    (path,) = export_adapter(adapter, program, out)
    return path


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


# ---- the same images -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("name", LORA)
def test_diffusers_alone_makes_the_same_images_of_kept_adapters(name, doubled, tmp_path):
    adapter = open_adapter(KEPT / name)
    components = {
        part: replace(lora, alpha=lora.alpha * (1 + doubled))
        for part, lora in adapter.info.lora.items()
    }
    write_adapter(tmp_path / "own", adapter.weights, replace(adapter.info, components=components))
    own, theirs = testbed.pipeline(), testbed.pipeline()
    base = images(own)
    own.load_lora_weights(tmp_path / "own", weight_name="pytorch_lora_weights.safetensors")
    theirs.load_lora_weights(exported(tmp_path / "own", tmp_path))
    assert (images(own) - images(theirs)).abs().max() == 0
    assert not torch.equal(images(own), base)


@pytest.mark.slow
def test_diffusers_alone_makes_the_same_images_of_kept_soft_tokens(tmp_path):
    path = exported(KEPT / "testbed-prefix", tmp_path)
    own, theirs = testbed.pipeline(), testbed.pipeline()
    own.load_fair_adapter(KEPT / "testbed-prefix")
    theirs.load_textual_inversion(str(path), token=path.stem)
    assert torch.equal(images(own), images(theirs, f"{path.stem} {PROMPT}"))
    assert not torch.equal(images(own), images(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [2.0, 4.0])
@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])  # SD3's loader reads its own layout only
def test_diffusers_alone_makes_the_same_images_in_each_family(family, alpha, tmp_path):
    make = PIPELINES[family]
    adapter = written(tmp_path / "adapter", make(), alpha=alpha)
    own, theirs = make(), make()
    base = images(own)
    own.load_lora_weights(adapter, weight_name="pytorch_lora_weights.safetensors")
    theirs.load_lora_weights(exported(adapter, tmp_path))
    assert (images(own) - images(theirs)).abs().max() == 0
    assert not torch.equal(images(own), base)


# ---- names and values ----------------------------------------------------------------------------


def meta_layers(family, models):
    """The layers that get LoRA in models of real size, as keys of an adapter."""
    for component, model in models.items():
        ends = tuple(f".{end}" for end in family.targets[component])
        prefix = f"{component}."
        if component.startswith("text_encoder") and not hasattr(model, "text_model"):
            prefix += "text_model."  # which transformers 5 dropped
        for name, module in model.named_modules():
            is_target = isinstance(module, torch.nn.Linear) and name.endswith(ends)
            if is_target and family.has_effect(component, model, name):
                yield prefix + name


def clip_config(**changes):
    return CLIPTextConfig(**{"hidden_size": 768, "num_attention_heads": 12} | changes)


@pytest.mark.slow
def test_every_layer_of_stable_diffusion_1_5_has_its_name():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        models = {
            "text_encoder": CLIPTextModel(clip_config(num_hidden_layers=12)),
            "unet": UNet2DConditionModel(cross_attention_dim=768),
        }
    layers = list(meta_layers(STABLE_DIFFUSION, models))
    names = [layer_name(STABLE_DIFFUSION.name, layer) for layer in layers]
    assert len(names) == len(layer_names.SD15) == 200
    assert set(names) == layer_names.SD15


@pytest.mark.slow
def test_every_layer_of_stable_diffusion_xl_has_its_name():
    from diffusers import UNet2DConditionModel

    second = clip_config(hidden_size=1280, num_attention_heads=20, num_hidden_layers=32)
    with torch.device("meta"):
        models = {
            "text_encoder": CLIPTextModel(clip_config(num_hidden_layers=12)),
            "text_encoder_2": CLIPTextModelWithProjection(second),
            "unet": UNet2DConditionModel(
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
                up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
            ),
        }
    layers = list(meta_layers(STABLE_DIFFUSION_XL, models))
    names = [layer_name(STABLE_DIFFUSION_XL.name, layer) for layer in layers]
    assert len(names) == len(layer_names.SDXL) == 66 + 192 + 560
    assert set(names) == layer_names.SDXL


@pytest.mark.parametrize(
    ("family", "layer", "name"),
    [
        (
            "Stable Diffusion 1 or 2",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        ),
        (
            "Stable Diffusion 1 or 2",
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        ),
        (
            "Stable Diffusion XL",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        ),
        (
            "Stable Diffusion 3",
            "transformer.transformer_blocks.0.attn.to_add_out",
            "lora_transformer_transformer_blocks_0_attn_to_add_out",
        ),
        (
            "FLUX.1",
            "transformer.single_transformer_blocks.3.attn.to_q",
            "lora_transformer_single_transformer_blocks_3_attn_to_q",
        ),
    ],
)
def test_names(family, layer, name):
    assert layer_name(family, layer) == name


def test_every_family_has_a_layout_for_its_components():
    for family in FAMILIES:
        if family.name in LAYOUTS:
            assert LAYOUTS[family.name].prefixes.keys() == family.targets.keys()


@pytest.mark.slow
@pytest.mark.parametrize("family", PIPELINES)
def test_layers_have_the_adapters_values(family, tmp_path):
    adapter = open_adapter(written(tmp_path / "adapter", PIPELINES[family]()))
    tensors = load_file(exported(adapter, tmp_path))
    layers = {key.rpartition(".lora_")[0] for key in adapter.weights}
    assert len(tensors) == 3 * len(layers)
    for layer in layers:
        name = layer_name(adapter.info.family, layer)
        a, b = (adapter.weights[f"{layer}.lora_{half}.weight"] for half in "AB")
        down, up = (tensors[f"{name}.lora_{half}.weight"] for half in ("down", "up"))
        assert torch.equal(tensors[f"{name}.alpha"] / len(down) * (up @ down), 4 / 2 * (b @ a))


# ---- files ---------------------------------------------------------------------------------------


def test_the_metadata_that_programs_show(folder, tmp_path):
    path = exported(folder, tmp_path / "out")
    assert path == tmp_path / "out" / "fair-shape-some-model-v1-5.safetensors"
    shown = metadata(path)
    digest = shown.pop("sshs_model_hash")
    assert shown == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "Fairness adapter: shape, for org/some-model-v1.5",
        "modelspec.description": "Rebalances the perceived shape of generated people.",
        "modelspec.tags": "fairness, bias-mitigation, shape",
        "modelspec.usage_hint": "Use it at strength 1; there is no trigger word.",
        "modelspec.hash_sha256": f"0x{digest}",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_sd_model_name": "org/some-model-v1.5",
        "ss_output_name": "fair-shape-some-model-v1-5",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "4",
    }
    content = path.read_bytes()
    assert hashlib.sha256(content[data_start(content) :]).hexdigest() == digest
    assert exported(folder, tmp_path / "again").read_bytes() == content


def test_the_licence_and_the_rank_if_they_differ(tmp_path):
    components = {"text_encoder": Lora(rank=2, alpha=2), "unet": Lora(rank=3, alpha=3)}
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    adapter = written(tmp_path / "adapter", tiny.pipeline(), components, base_model=base)
    shown = metadata(exported(adapter, tmp_path))
    assert shown["ss_network_dim"] == shown["ss_network_alpha"] == "Dynamic"
    assert shown["modelspec.license"] == "creativeml-openrail-m"


@pytest.mark.parametrize(
    ("family", "base", "weights", "expected"),
    [
        ("Stable Diffusion 1 or 2", "org/base", {"<fair>": 768}, "stable-diffusion-v1"),
        ("Stable Diffusion 1 or 2", "org/2-1", {"<fair>": 1024}, "stable-diffusion-v2-768-v"),
        ("Stable Diffusion 1 or 2", "org/2-base", {"<fair>": 1024}, "stable-diffusion-v2-512"),
        (
            "Stable Diffusion 1 or 2",
            "org/2-1",
            {"unet.attn2.to_k.lora_A.weight": 1024},
            "stable-diffusion-v2-768-v",
        ),
        ("Stable Diffusion XL", "org/xl", {}, "stable-diffusion-xl-v1-base"),
        ("Stable Diffusion 3", "org/3", {}, "stable-diffusion-3"),
        ("FLUX.1", "org/FLUX.1-dev", {}, "flux-1-dev"),
        ("FLUX.1", "org/FLUX.1-schnell", {}, "flux-1-schnell"),
    ],
)
def test_the_kind_of_base_model(family, base, weights, expected):
    tensors = {key: torch.zeros(2, width) for key, width in weights.items()}
    assert base_names(family, base, tensors).architecture == expected


def test_soft_tokens_are_named_for_what_is_typed(whole, tmp_path):
    usages = export_adapter(whole, "a1111", tmp_path / "out")
    lora, tokens = usages
    assert (lora.stem, tokens.stem) == ("fair-shape-some-model-v1-5", "fair-shape-prefix")
    assert "<lora:fair-shape-some-model-v1-5:1>" in usages[lora]
    assert "type `fair-shape-prefix` once before each prompt" in usages[tokens]
    (embeddings,) = (tensors := load_file(tokens)).values()
    assert list(tensors) == ["emb_params"]
    assert torch.equal(embeddings, open_adapter(whole).weights["<fair>"])
    shown = metadata(tokens)
    assert shown["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert shown["modelspec.trigger_phrase"] == "fair-shape-prefix"
    assert "ss_network_dim" not in shown


def test_a_file_has_the_name_that_it_is_given(folder, tmp_path):
    path = exported(folder, tmp_path / "deep" / "even.safetensors", "kohya")
    assert path == tmp_path / "deep" / "even.safetensors"
    assert metadata(path)["ss_output_name"] == "even"


# ---- what is refused -----------------------------------------------------------------------------


def test_nothing_is_written_of_what_is_refused(folder, whole, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"one of the programs comfyui, .*, got 'midjourney'"):
        export_adapter(folder, "midjourney", out)
    with pytest.raises(ValueError, match="there is no adapter folder at"):
        export_adapter(tmp_path / "nowhere", "comfyui", out)
    with pytest.raises(ValueError, match=r"to two files: choose a folder, got 'x\.safetensors'"):
        export_adapter(whole, "comfyui", out / "x.safetensors")
    assert not out.exists()


def test_an_existing_file_stays(whole, tmp_path):
    second = tmp_path / "fair-shape-prefix.safetensors"
    second.write_text("mine")
    with pytest.raises(ValueError, match=r"prefix\.safetensors' exists already: remove it, or"):
        export_adapter(whole, "comfyui", tmp_path)
    assert second.read_text() == "mine"
    assert not list(tmp_path.glob("*v1-5.safetensors"))
    with pytest.raises(
        ValueError, match=r"is a file: choose a folder, or a new \.safetensors file"
    ):
        export_adapter(whole, "comfyui", second.rename(tmp_path / "notes.txt"))


def test_a_failed_write_leaves_no_files(tmp_path):
    paths = {tmp_path / "a": b"1", tmp_path / "missing" / "b": b"2"}
    with pytest.raises(FileNotFoundError):
        write_all(paths)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("family", "program"), [("sd3", "a1111"), ("flux", "kohya")])
def test_a_program_without_the_family(family, program, tmp_path):
    adapter = written(tmp_path / "adapter", PIPELINES[family]())
    message = f"{PROGRAMS[program].title} does not read LoRA layers for .*: export it to comfyui"
    with pytest.raises(ValueError, match=message):
        export_adapter(adapter, program, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_program_without_soft_tokens(tmp_path):
    components = {"soft_tokens": SoftTokens(count=2)}
    info = info_of(tiny.pipeline(), components, family="FLUX.1")
    write_adapter(tmp_path / "adapter", {"<fair>": torch.ones(2, 4)}, info)
    with pytest.raises(ValueError, match=r"ComfyUI does not read soft tokens for FLUX.1: no other"):
        export_adapter(tmp_path / "adapter", "comfyui", tmp_path)


def test_layers_of_another_family(tmp_path):
    adapter = written(tmp_path / "adapter", families.flux(), family=STABLE_DIFFUSION.name)
    with pytest.raises(ValueError, match=r"has layers in text_encoder or unet, got 'transformer\."):
        export_adapter(adapter, "comfyui", tmp_path)


def test_the_family_is_recorded(tmp_path):
    for make in (tiny.pipeline, families.flux):
        folder = written(tmp_path / make.__name__, make())
        base = json.loads((folder / "fair_adapter.json").read_text())["base_model"]
        assert open_adapter(folder).info.family == family_of(make()).name
        assert base.get("family") == ("FLUX.1" if make is families.flux else None)


# ---- reading them --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", PIPELINES)
def test_training_starts_from_an_exported_file(family, tmp_path):
    make = PIPELINES[family]
    folder = written(tmp_path / "adapter", make(), alpha=4.0)
    path = exported(folder, tmp_path)
    components = dict.fromkeys(family_of(make()).targets, Lora(rank=2, alpha=2.0))
    adapter = TrainableAdapter(make(), components)
    weights, unused = read_exported_lora(path, family_of(make()).name, adapter.weights())
    assert unused == 0
    adapter.load(weights)
    for key, tensor in open_adapter(folder).weights.items():  # alpha 4 in B
        assert torch.equal(weights[key], tensor * (2 if "lora_B" in key else 1))


def changed(path, change) -> Path:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


def start(components=("text_encoder",), rank=2):
    layers = dict.fromkeys(components, Lora(rank=rank, alpha=rank))
    return TrainableAdapter(tiny.pipeline(), layers).weights()


def read(path, initial):
    return read_exported_lora(path, STABLE_DIFFUSION.name, initial)


def test_layers_that_do_not_fit_are_left_out(folder, tmp_path):
    path = exported(folder, tmp_path)
    initial = start()
    first = "lora_te_text_model_encoder_layers_0_mlp_fc1"

    def without_first(tensors):
        for key in [key for key in tensors if key.startswith(first) or key.endswith(".alpha")]:
            del tensors[key]

    weights, unused = read(changed(path, without_first), initial)
    assert unused == len(open_adapter(folder).weights) // 2 - len(initial) // 2
    expected = open_adapter(folder).weights  # without an alpha, it is the rank
    for key in initial:
        kept = initial if "layers.0.mlp.fc1" in key else expected
        assert torch.equal(weights[key], kept[key])


NAME = "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update({f"{NAME}.hada_w1_a": torch.ones(1)}), "not LoRA but LyCORIS or DoRA"),
        (lambda x: x.update({f"{NAME}.dora_scale": torch.ones(1)}), "not LoRA but LyCORIS or DoRA"),
        (lambda x: x.update({"conv.weight": torch.ones(1)}), "expected LoRA layers as NAME with"),
        (lambda x: x.pop(f"{NAME}.lora_up.weight"), f"has only a part of the layer '{NAME}'"),
        (lambda x: x[f"{NAME}.lora_up.weight"].fill_(torch.nan), "holds NaN or infinite values"),
    ],
)
def test_other_files_are_refused(folder, tmp_path, change, message):
    path = changed(exported(folder, tmp_path), change)
    with pytest.raises(ValueError, match=message):
        read(path, start())


def test_files_that_fit_nothing_are_refused(folder, whole, tmp_path):
    path = exported(folder, tmp_path)
    with pytest.raises(ValueError, match=r"of shape \[3, .*set adapter.rank to the rank of the"):
        read(path, start(rank=3))
    unet = exported(
        written(tmp_path / "u", tiny.pipeline(), {"unet": Lora(rank=2, alpha=2)}),
        tmp_path / "u.safetensors",
    )
    with pytest.raises(
        ValueError, match=r"has none of the adapter's layers \(the first is lora_te"
    ):
        read(unet, start())
    with pytest.raises(ValueError, match="none, as it has soft tokens alone"):
        read(path, {"<fair>": torch.ones(2, 4)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        read(path, start())
