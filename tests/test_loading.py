import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model_state_dict
from test_io import adapter_info

from diffusers_fair import load_fair_adapter, set_fair_adapter_scale, unload_fair_adapter
from diffusers_fair.adapters import io
from diffusers_fair.adapters.io import Lora, base_fingerprint, read_adapter, write_adapter
from diffusers_fair.adapters.lora import add_lora, lora_state_dict

TARGETS = {
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
}
SIZES = {"text_encoder": Lora(rank=3, alpha=12.0), "unet": Lora(rank=2, alpha=2.0)}


def train(pipe, parts=SIZES, seed=0):
    """Put random low-rank layers on a pipeline with peft; return them in diffusers' layout."""
    weights = {}
    torch.manual_seed(seed)
    for part in parts:
        model = getattr(pipe, part)
        size = {"r": SIZES[part].rank, "lora_alpha": SIZES[part].alpha}
        model.add_adapter(LoraConfig(**size, target_modules=TARGETS[part], init_lora_weights=False))
        state = get_peft_model_state_dict(model, adapter_name="default")
        weights |= {io.PREFIXES[part] + key: value for key, value in state.items()}
    return weights


def save(folder, pipe, parts=SIZES, seed=0, **info):
    """Write the adapter folder that a training of this pipeline could end with."""
    info = {"components": {part: SIZES[part] for part in parts}} | info
    fingerprint = base_fingerprint(pipe)
    write_adapter(
        folder, train(pipe, parts, seed), adapter_info(**{"fingerprint": fingerprint} | info)
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("fair") / "adapter", tiny.pipeline())


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """An ordinary LoRA, in the text encoder only and on some of the layers."""
    return save(tmp_path_factory.mktemp("other") / "a", tiny.pipeline(), ["text_encoder"], seed=1)


def images(pipe):
    return pipe(
        "a chef",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images  # (1, 3, 16, 16)


def snapshot(pipe):
    """Everything that an adapter could change."""
    state = {}
    for part in ("text_encoder", "unet", "vae"):
        model = getattr(pipe, part)
        state[part] = (
            {key: value.clone() for key, value in model.state_dict().items()},
            [(name, type(module)) for name, module in model.named_modules()],
            {name: value.requires_grad for name, value in model.named_parameters()},
            {name for name, module in model.named_modules() if module.training},
            set(getattr(model, "peft_config", {})),
            [getattr(module, "active_adapters", None) for module in model.modules()],
        )
    return state


def assert_same(pipe, before):
    for part, (weights, *rest) in snapshot(pipe).items():
        old_weights, *old_rest = before[part]
        assert list(weights) == list(old_weights)
        assert all(torch.equal(weights[key], old_weights[key]) for key in weights)
        assert rest == old_rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_images_as_plain_diffusers_and_as_trained(folder, dtype):
    trained, plain, ours = (tiny.pipeline(dtype) for _ in range(3))
    base = images(ours)
    train(trained)
    plain.load_lora_weights(folder)
    load_fair_adapter(ours, folder)
    assert torch.equal(images(ours), images(plain))
    assert not torch.equal(images(ours), base)
    if dtype == torch.float32:
        assert torch.equal(images(ours), images(trained))


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_one_part_only(tmp_path, part):
    save(tmp_path / "adapter", tiny.pipeline(), [part])
    plain, ours = tiny.pipeline(), tiny.pipeline()
    plain.load_lora_weights(tmp_path / "adapter")
    load_fair_adapter(ours, tmp_path / "adapter")
    assert torch.equal(images(ours), images(plain))
    assert set(ours.get_list_adapters()) == {part}


def test_what_is_trained_is_what_is_loaded(tmp_path):
    trained, loaded = tiny.pipeline(), tiny.pipeline()
    for part in TARGETS:
        for i, parameter in enumerate(add_lora(trained, part, rank=4)):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    sizes = dict.fromkeys(TARGETS, Lora(rank=4, alpha=4.0))
    info = adapter_info(fingerprint=base_fingerprint(loaded), components=sizes)
    write_adapter(tmp_path / "adapter", lora_state_dict(trained), info)
    load_fair_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(images(loaded), images(trained))


def test_methods_of_the_pipeline(folder):
    pipe = tiny.pipeline()
    base = images(pipe)
    pipe.load_fair_adapter(str(folder), scale=0.5)
    half = images(pipe)
    pipe.set_fair_adapter_scale(1.0)
    full = images(pipe)
    pipe.unload_fair_adapter()
    assert torch.equal(images(pipe), base)
    assert not torch.equal(half, base)
    assert not torch.equal(half, full)


def test_unloading_restores_bit_for_bit(folder):
    pipe = tiny.pipeline()
    pipe.unet.requires_grad_(True)
    before, base = snapshot(pipe), images(pipe)
    load_fair_adapter(pipe, folder, scale=0.7)
    unload_fair_adapter(pipe)
    assert_same(pipe, before)
    assert torch.equal(images(pipe), base)
    load_fair_adapter(pipe, folder)  # and it can be loaded again
    unload_fair_adapter(pipe)
    assert_same(pipe, before)


def test_adapter_is_frozen_and_the_rest_as_it_was(folder):
    pipe = tiny.pipeline()
    pipe.unet.requires_grad_(True)
    load_fair_adapter(pipe, folder)
    for part, expected in {"text_encoder": False, "unet": True}.items():
        for name, parameter in getattr(pipe, part).named_parameters():
            assert parameter.requires_grad == (expected and ".lora_" not in name)


def test_loading_draws_no_random_numbers(folder):
    pipe = tiny.pipeline()
    state = torch.get_rng_state()
    load_fair_adapter(pipe, folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_scale(folder):
    pipe, by_diffusers = tiny.pipeline(), tiny.pipeline()
    base = images(pipe)
    load_fair_adapter(pipe, folder, scale=0)
    assert torch.equal(images(pipe), base)
    set_fair_adapter_scale(pipe, 0.3)
    by_diffusers.load_lora_weights(folder, adapter_name="fair")
    by_diffusers.set_adapters("fair", 0.3)
    assert torch.equal(images(pipe), images(by_diffusers))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_that_is_no_number(folder, scale):
    pipe = tiny.pipeline()
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=f"scale must be a finite number, got {scale}"):
        load_fair_adapter(pipe, folder, scale=scale)
    assert_same(pipe, before)


def test_beside_another_adapter(folder, other):
    pipe = tiny.pipeline()
    pipe.load_lora_weights(other, adapter_name="style")
    before, styled = snapshot(pipe), images(pipe)
    load_fair_adapter(pipe, folder, scale=0)
    assert torch.equal(images(pipe), styled)
    set_fair_adapter_scale(pipe, 1)
    assert not torch.equal(images(pipe), styled)
    unload_fair_adapter(pipe)
    assert_same(pipe, before)
    assert torch.equal(images(pipe), styled)


def test_an_adapter_that_is_switched_off_stays_off(folder, other):
    pipe = tiny.pipeline()
    pipe.load_lora_weights(other, adapter_name="off")
    pipe.load_lora_weights(other, adapter_name="on")
    pipe.set_adapters("on", 0.5)
    before, expected = snapshot(pipe), images(pipe)
    load_fair_adapter(pipe, folder, scale=0)
    assert torch.equal(images(pipe), expected)
    unload_fair_adapter(pipe)
    assert_same(pipe, before)


def test_two_of_ours(folder, other):
    pipe = tiny.pipeline()
    load_fair_adapter(pipe, other, adapter_name="one")
    one = images(pipe)
    load_fair_adapter(pipe, folder, adapter_name="two")
    unload_fair_adapter(pipe, adapter_name="two")
    assert torch.equal(images(pipe), one)


def test_fingerprint_is_of_the_shapes():
    pipe = tiny.pipeline()
    fingerprint = base_fingerprint(pipe)
    assert base_fingerprint(tiny.pipeline(torch.bfloat16, seed=1)) == fingerprint
    train(pipe)
    assert base_fingerprint(pipe) == fingerprint
    pipe.unet.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    assert base_fingerprint(pipe) != fingerprint


# ---- refused, and nothing changed ----------------------------------------------------------------


def refused(pipe, message, *args, **kwargs):
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=message) as caught:
        load_fair_adapter(pipe, *args, **kwargs)
    assert "\n" not in str(caught.value)
    assert_same(pipe, before)


def test_missing_folder(tmp_path):
    refused(tiny.pipeline(), "there is no adapter folder at", tmp_path / "nowhere")


def test_truncated_weights(folder, tmp_path):
    for name in (io.INFO_FILE, io.WEIGHTS_FILE):
        content = (folder / name).read_bytes()
        (tmp_path / name).write_bytes(content if name == io.INFO_FILE else content[:-4])
    refused(tiny.pipeline(), "is truncated or damaged", tmp_path)


def test_other_format_version(folder, tmp_path):
    info = json.loads((folder / io.INFO_FILE).read_text())
    (tmp_path / io.INFO_FILE).write_text(json.dumps(info | {"format_version": 9}))
    (tmp_path / io.WEIGHTS_FILE).write_bytes((folder / io.WEIGHTS_FILE).read_bytes())
    refused(tiny.pipeline(), "is of format version 9, and", tmp_path)


def test_other_base_model(folder, monkeypatch):
    monkeypatch.setattr(tiny, "WIDTH", 32)
    message = "trained for the base model 'testbed', and the shapes of this StableDiffusionPipeline"
    refused(tiny.pipeline(), message, folder)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("unet.nowhere.lora_A.weight", (2, 8)),
        ("unet.mid_block.lora_A.weight", (2, 8)),
        ("unet.conv_in.lora_A.weight", (2, 8)),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", (2, 8)),
    ],
)
def test_weight_without_a_layer(tmp_path, key, shape):
    """An adapter whose fingerprint is right but whose weights are not."""
    pipe = tiny.pipeline()
    weights = {key: torch.ones(shape), key.replace("lora_A", "lora_B"): torch.ones(16, 2)}
    info = adapter_info(
        fingerprint=base_fingerprint(pipe), components={"unet": Lora(rank=2, alpha=2.0)}
    )
    write_adapter(tmp_path / "adapter", weights, info)
    name = key.removeprefix("unet.")
    refused(pipe, f"weight '{name}' fits no layer of the unet", tmp_path / "adapter")


def test_name_in_use(folder, other):
    pipe = tiny.pipeline()
    pipe.load_lora_weights(other, adapter_name="fair")
    refused(pipe, "already carries an adapter 'fair': unload it first or pass", folder)


@pytest.mark.parametrize("name", ["", "a.b", "a b"])
def test_bad_name(folder, name):
    refused(tiny.pipeline(), "adapter_name must be letters", folder, adapter_name=name)


def test_nothing_to_unload_or_scale(other):
    pipe = tiny.pipeline()
    pipe.load_lora_weights(other, adapter_name="style")
    message = r"carries no adapter 'fair', only \['style'\]"
    with pytest.raises(ValueError, match=message):
        unload_fair_adapter(pipe)
    with pytest.raises(ValueError, match=message):
        set_fair_adapter_scale(pipe, 1)


def test_fused_adapters_stay(folder, other):
    pipe = tiny.pipeline()
    load_fair_adapter(pipe, folder)
    pipe.fuse_lora()
    before = snapshot(pipe)
    message = r"fused into the pipeline's weights: call pipe\.unfuse_lora\(\) first"
    with pytest.raises(ValueError, match=message):
        unload_fair_adapter(pipe)
    assert_same(pipe, before)
    refused(pipe, message, other, adapter_name="two")


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("function", ["inject_adapter_in_model", "set_peft_model_state_dict"])
@pytest.mark.parametrize("stacked", [False, True])
def test_an_error_half_way_is_taken_back(folder, other, monkeypatch, function, part, stacked):
    import peft.functional

    pipe = tiny.pipeline()
    if stacked:
        load_fair_adapter(pipe, other, adapter_name="one")
    before, calls, real = snapshot(pipe), [], getattr(peft.functional, function)

    def fail(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append(result)
        if len(calls) > part:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(peft.functional, function, fail)
    with pytest.raises(KeyboardInterrupt):
        load_fair_adapter(pipe, folder)
    assert_same(pipe, before)


# ---- from the Hub --------------------------------------------------------------------------------

COMMIT = "c" * 40


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A server on this machine that holds `org/fair`, and an empty cache."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"evil.bin": b"pickle"}
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0]
            asked.append((path, self.headers.get("authorization")))
            tree = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in files.items()]
            known = {f"/api/models/org/fair/revision/{r}" for r in ("main", "v1")}
            if path in known:
                self.answer(json.dumps({"id": "org/fair", "sha": COMMIT}).encode())
            elif path == f"/api/models/org/fair/tree/{COMMIT}":
                self.answer(json.dumps(tree).encode())
            elif path.startswith(f"/org/fair/resolve/{COMMIT}/"):
                self.answer(files[Path(path).name], ETag=f'"{Path(path).name}"')
            elif path.startswith("/api/models/org/broken"):
                self.answer(b"", 403)
            else:
                kind = "Revision" if path.startswith("/api/models/org/fair") else "Repo"
                self.answer(b"", 404, **{"X-Error-Code": f"{kind}NotFound"})

        def answer(self, body, status=200, **headers):
            self.send_response(status)
            length = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}
            for name, value in (length | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield asked
    server.shutdown()
    server.server_close()


def test_from_the_hub_and_then_from_the_cache(hub, folder, monkeypatch):
    here, there = tiny.pipeline(), tiny.pipeline()
    load_fair_adapter(here, folder)
    load_fair_adapter(there, "org/fair", token="secret-word")
    assert torch.equal(images(here), images(there))
    assert ("/api/models/org/fair/revision/main", "Bearer secret-word") in hub
    assert not any("evil.bin" in path for path, _ in hub)

    hub.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = tiny.pipeline()
    load_fair_adapter(offline, "org/fair")
    assert torch.equal(images(here), images(offline))
    assert not hub


def test_revision(hub):
    load_fair_adapter(tiny.pipeline(), "org/fair", revision="v1")
    assert "/api/models/org/fair/revision/v1" in [path for path, _ in hub]
    message = "'org/fair', and its repository on the Hub has no revision 'v2'"
    refused(tiny.pipeline(), message, "org/fair", revision="v2")


def test_no_such_repository(hub):
    message = "'org/nothing', and no repository on the Hub that you may read .* pass token="
    refused(tiny.pipeline(), message, "org/nothing", token="secret-word")


def test_hub_error(hub):
    message = "'org/broken', and .*the Hub"
    refused(tiny.pipeline(), message, "org/broken")


def test_offline_and_not_in_the_cache(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = "'org/fair', and it is not in the local cache, and the Hub cannot be reached"
    refused(tiny.pipeline(), message, "org/fair")


def test_what_is_read_from_the_hub_is_checked(hub, monkeypatch):
    monkeypatch.setattr(io, "FORMAT_VERSION", 2)
    refused(tiny.pipeline(), "is of format version 1, and this package reads version 2", "org/fair")


def test_card_and_samples_are_not_needed(folder):
    assert {path.name for path in folder.iterdir()} == {io.INFO_FILE, io.WEIGHTS_FILE}
    assert read_adapter(folder)[0].base_model == "testbed"
