import hashlib
import json
import math
import os
import random
import shutil
import struct
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import diffusers_fair
from diffusers_fair import Attribute
from diffusers_fair.adapters import folder as folders
from diffusers_fair.adapters import tensors
from diffusers_fair.adapters.folder import open_adapter, read_adapter, write_adapter, write_info
from diffusers_fair.adapters.format import (
    _FORMAT_VERSIONS,
    _MAX_LABEL,
    _MAX_RANK,
    _MAX_WORDS,
    EMBEDS_FILE,
    INFO_FILE,
    MAX_BYTES,
    SCHEMA_FILE,
    SOFT_TOKENS,
    WEIGHTS_FILE,
    AdapterInfo,
    Lora,
    SoftTokens,
    generated_schema,
)
from diffusers_fair.families import LORA_PREFIXES

TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_"
UNET = "unet.mid_block.attentions.0.to_out.0.lora_"


def adapter_info(**changes):
    values = {
        "base_model": "testbed",
        "fingerprint": "f" * 64,
        "components": {"text_encoder": Lora(rank=3, alpha=6.0), "unet": Lora(rank=2, alpha=2.0)},
        "attributes": (Attribute("shape", ("round", "square", "flat"), (0.5, 0.25, 0.25)),),
        "recipe": {"train": {"iterations": 3}, "steps": [1, 2]},
        "evaluation": {"bias": {"before": 0.6, "after": 0.1}},
    }
    return AdapterInfo(**(values | changes))


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (3, 8), "B": (5, 3)}, {"A": (2, 4), "B": (7, 2)}
    return {
        f"{prefix}{half}.weight": torch.randn(shape, generator=generator).to(dtype)
        for prefix, halves in zip((TEXT, UNET), shapes, strict=True)
        for half, shape in halves.items()
    }


SOFT = {"soft_tokens": SoftTokens(count=2)}
BOTH = {"text_encoder": Lora(rank=3, alpha=6.0), "unet": Lora(rank=2, alpha=2.0)} | SOFT


def embeds(dtype=torch.float32):
    return {"<fair>": torch.arange(8.0).view(2, 4).to(dtype)}


def put(path, value):
    """A change that sets one value of nested JSON."""

    def change(data):
        *parents, last = path
        for name in parents:
            data = data[name]
        data[last] = value

    return change


@pytest.fixture
def folder(tmp_path):
    write_adapter(tmp_path / "adapter", weights(), adapter_info())
    return tmp_path / "adapter"


@pytest.fixture
def whole(tmp_path):
    """An adapter of LoRA layers and soft tokens."""
    write_adapter(tmp_path / "whole", weights() | embeds(), adapter_info(components=BOTH))
    return tmp_path / "whole"


def edit(folder, change):
    """Change the JSON of an adapter folder in place."""
    data = json.loads((folder / INFO_FILE).read_text())
    change(data)
    (folder / INFO_FILE).write_text(json.dumps(data))


def rewrite(folder, change, metadata=None, name=WEIGHTS_FILE):
    """Change the tensors of an adapter folder in place; its header stays unless one is given."""
    path = folder / name
    with safe_open(path, framework="pt") as file:
        tensors, old = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, metadata=old if metadata is None else metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read(tmp_path, dtype):
    write_adapter(tmp_path / "deep" / "adapter", weights(dtype), adapter_info())
    info, tensors = read_adapter(tmp_path / "deep" / "adapter")
    assert info == adapter_info()
    assert tensors.keys() == weights().keys()
    for key, tensor in weights(dtype).items():
        assert tensors[key].dtype == dtype
        assert torch.equal(tensors[key], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("components", [SOFT, BOTH])
def test_soft_tokens_are_read_as_written(tmp_path, components, dtype):
    tensors = embeds(dtype) | (weights() if len(components) > 1 else {})
    write_adapter(tmp_path / "adapter", tensors, adapter_info(components=components))
    info, found = read_adapter(tmp_path / "adapter")
    assert info == adapter_info(components=components)
    assert info.soft_tokens == SOFT["soft_tokens"]
    assert info.soft_tokens.names == ("<fair>", "<fair>_1")
    assert info.lora == {name: size for name, size in components.items() if name in LORA_PREFIXES}
    assert found.keys() == tensors.keys()
    assert found["<fair>"].dtype == dtype
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    with safe_open(tmp_path / "adapter" / EMBEDS_FILE, framework="pt") as file:
        assert list(file.keys()) == ["<fair>"]
    assert (tmp_path / "adapter" / WEIGHTS_FILE).exists() == bool(info.lora)


def test_an_adapter_without_soft_tokens_replaces_one_with_them(whole):
    write_adapter(whole, weights(), adapter_info())
    assert read_adapter(whole)[0] == adapter_info()
    assert not (whole / EMBEDS_FILE).exists()


def test_optional_fields_may_be_missing(tmp_path):
    info = adapter_info(base_revision=None, evaluation=None)
    write_adapter(tmp_path / "adapter", weights(), info)
    assert read_adapter(tmp_path / "adapter")[0] == info


def test_json_describes_the_adapter(folder):
    data = json.loads((folder / INFO_FILE).read_text())
    assert data["format_version"] == 1
    assert data["base_model"] == {"id": "testbed", "revision": None, "fingerprint": "f" * 64}
    assert data["components"]["text_encoder"] == {"rank": 3, "alpha": 6.0}
    assert data["attributes"][0]["target"] == [0.5, 0.25, 0.25]
    assert data["library_versions"]["diffusers-fair"] == diffusers_fair.__version__
    assert data["library_versions"]["torch"] == version("torch")


def test_header_holds_the_metadata_of_diffusers(folder):
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["text_encoder.r"] == 3
    assert metadata["text_encoder.lora_alpha"] == 6
    assert metadata["text_encoder.target_modules"] == ["encoder.layers.0.mlp.fc1"]
    assert metadata["unet.target_modules"] == ["mid_block.attentions.0.to_out.0"]
    for part in ("text_encoder", "unet"):  # diffusers 0.34 to 0.39 fails without them
        assert metadata[f"{part}.rank_pattern"] == metadata[f"{part}.alpha_pattern"] == {}


def test_files_from_before_patterns_were_written_are_read_and_keep_their_digest(whole):
    new = open_adapter(whole)
    path = whole / WEIGHTS_FILE
    with safe_open(path, framework="pt") as file:
        text = file.metadata()["lora_adapter_metadata"]
    described = {k: v for k, v in json.loads(text).items() if not k.endswith("_pattern")}
    old_text = json.dumps(described, indent=2)
    path.write_bytes(
        tensors.serialize(weights(), {"format": "pt", "lora_adapter_metadata": old_text})
    )
    edit(whole, put(["checksums"], None))
    old = open_adapter(whole)
    contents = (whole / EMBEDS_FILE).read_bytes() + path.read_bytes()
    assert old.digest == new.digest == hashlib.sha256(contents).hexdigest()[:16]
    assert old.checksums[WEIGHTS_FILE] != new.checksums[WEIGHTS_FILE]


# ---- writing -------------------------------------------------------------------------------------


def test_the_same_adapter_is_the_same_bytes(tmp_path):
    for i in range(8):  # as often as it takes safetensors to write its metadata in another order
        write_adapter(tmp_path / str(i), weights() | embeds(), adapter_info(components=BOTH))
    for name in (INFO_FILE, WEIGHTS_FILE, EMBEDS_FILE):
        assert len({(tmp_path / str(i) / name).read_bytes() for i in range(8)}) == 1


def test_an_adapter_folder_is_replaced_as_a_whole(folder):
    (folder / "README.md").write_text("old card")
    (folder / "samples").mkdir()
    write_adapter(folder, weights(), adapter_info(base_model="other"))
    assert read_adapter(folder)[0].base_model == "other"
    assert {path.name for path in folder.iterdir()} == {INFO_FILE, WEIGHTS_FILE}
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_all_files_have_the_same_permissions(whole):
    modes = {file.name: file.stat().st_mode & 0o777 for file in whole.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_an_empty_folder_is_used(tmp_path):
    write_adapter(tmp_path, weights(), adapter_info())
    assert read_adapter(tmp_path)[0] == adapter_info()


@pytest.mark.parametrize("name", ["recipe.yaml", "thesis.tex", "README.md"])
def test_a_folder_with_something_else_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(
        ValueError, match=f"holds something other than an adapter .'{name}'.*another"
    ):
        write_adapter(tmp_path, weights(), adapter_info())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_adapter_folder_with_foreign_files_is_refused(folder):
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"something other than an adapter .*notes"):
        write_adapter(folder, weights(), adapter_info())
    assert (folder / "notes.txt").exists()


def test_a_file_is_refused(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(ValueError, match="is a file: choose a folder"):
        write_adapter(tmp_path / "adapter", weights(), adapter_info())


@pytest.mark.parametrize(
    ("tensors", "info", "message"),
    [
        ({TEXT + "A.weight": torch.tensor([[torch.nan]])}, {}, "shape"),
        (weights() | {TEXT + "A.weight": torch.full((3, 8), torch.inf)}, {}, "NaN or infinite"),
        (weights(torch.float64), {}, "F64"),
        (weights(), {"components": {"unet": Lora(rank=2, alpha=2.0)}}, "not a LoRA weight"),
        (weights(), {"components": SOFT}, f"has a '{WEIGHTS_FILE}', which its {INFO_FILE}"),
        (weights() | embeds(), {}, f"has a '{EMBEDS_FILE}', which its fair_adapter.json does not"),
        (weights(), {"components": BOTH}, r"expected only '<fair>' in it, or .*, got \[\]"),
        (embeds(), {"components": BOTH}, "it holds no weights of 'text_encoder'"),
        (embeds() | {"x": torch.ones(1)}, {"components": SOFT}, f"has a '{WEIGHTS_FILE}', which"),
        (embeds(), {"components": {"unet": SoftTokens(count=2)}}, "expected unet to have the keys"),
        (weights(), {"evaluation": {"bias": float("nan")}}, "Out of range float"),
    ],
)
def test_invalid_adapters_are_not_written(folder, tensors, info, message):
    before = (folder / INFO_FILE).read_text()
    for target in (folder, folder.parent / "new"):
        with pytest.raises(ValueError, match=message):
            write_adapter(target, tensors, adapter_info(**info))
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    assert (folder / INFO_FILE).read_text() == before


def test_an_interrupted_write_leaves_no_files(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tensors, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(tmp_path / "adapter", weights(), adapter_info())
    assert list(tmp_path.iterdir()) == []


# ---- reading -------------------------------------------------------------------------------------


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"there is no adapter folder at '.*nowhere'"):
        read_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [INFO_FILE, WEIGHTS_FILE, EMBEDS_FILE])
def test_missing_file(whole, name):
    (whole / name).unlink()
    with pytest.raises(ValueError, match=f"is not an adapter folder: '{name}' is missing"):
        read_adapter(whole)


@pytest.mark.parametrize(("name", "part"), [(EMBEDS_FILE, "soft_tokens"), (WEIGHTS_FILE, "")])
def test_file_that_is_not_named(whole, name, part):
    named = [part] if part else list(LORA_PREFIXES)
    edit(whole, lambda data: [data["components"].pop(key, None) for key in named])
    with pytest.raises(
        ValueError, match=f"has a '{name}', which its fair_adapter.json does not describe"
    ):
        read_adapter(whole)


@pytest.mark.parametrize("name", [INFO_FILE, WEIGHTS_FILE, EMBEDS_FILE])
@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.99])
def test_truncated_file(whole, name, kept):
    content = (whole / name).read_bytes()
    length = kept if isinstance(kept, int) else int(kept * len(content))
    (whole / name).write_bytes(content[:length])
    with pytest.raises(ValueError, match=f"'.*{name}' is truncated or"):
        read_adapter(whole)


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_other_format_version(folder, version):
    edit(folder, lambda data: data.update(format_version=version))
    message = rf"is of format version {version}, .* reads the versions \(1, 2\): use"
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


def test_large_json(folder):
    edit(folder, lambda data: data.update(recipe={"x": "x" * MAX_BYTES[INFO_FILE]}))
    with pytest.raises(ValueError, match="more than the 1048576 allowed"):
        read_adapter(folder)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, EMBEDS_FILE])
def test_large_weights(whole, monkeypatch, name):
    monkeypatch.setitem(MAX_BYTES, name, 50)
    with pytest.raises(ValueError, match="more than the 50 allowed"):
        read_adapter(whole)


@pytest.mark.parametrize("depth", [25, 100_000])
def test_deep_json(folder, depth):
    text = (folder / INFO_FILE).read_text()
    text = text.replace('"steps": ', '"steps": ' + "[" * depth + "]" * depth + ', "more": ')
    (folder / INFO_FILE).write_text(text)
    with pytest.raises(ValueError, match="nested deeper than 20 levels"):
        read_adapter(folder)


def test_brackets_in_strings_do_not_count_as_depth(tmp_path):
    info = adapter_info(recipe={"note": '[{"\\' * 100})
    write_adapter(tmp_path / "adapter", weights(), info)
    assert read_adapter(tmp_path / "adapter")[0] == info


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("recipe"), "expected the file to have the keys"),
        (put(["extra"], 1), "expected the file to have the keys"),
        (put(["recipe"], []), "'recipe' of the file must not be list"),
        (put(["base_model", "id"], None), "'id' of base_model must not be NoneType"),
        (put(["base_model", "fingerprint"], 3), "'fingerprint' of base_model must not be int"),
        (put(["components"], {}), "expected components of"),
        (put(["components", "vae"], {"rank": 3, "alpha": 3}), "expected components of"),
        (put(["components", "unet", "rank"], True), "'rank' of unet must not be bool"),
        (put(["components", "unet", "rank"], 0), "rank of unet must be from 1 to 1024, got 0"),
        (put(["components", "unet", "rank"], 10**9), "rank of unet must be from 1 to 1024"),
        (put(["components", "unet", "alpha"], 0), "alpha of unet must be positive"),
        (put(["components", "unet", "alpha"], 10**400), "alpha of unet must be positive"),
        (put(["components", "unet", "alpha"], float("nan")), "NaN is not a finite number"),
        (put(["components", "soft_tokens"], 5), "expected soft_tokens to have the keys"),
        (put(["components", "soft_tokens", "count"], True), "'count' of soft_tokens must not be"),
        (put(["components", "soft_tokens", "count"], 0), "can be 1 to 1024 soft tokens, got 0"),
        (put(["components", "soft_tokens", "count"], 1025), "1 to 1024 soft tokens, got 1025"),
        (
            put(["components", "soft_tokens", "token"], "a"),
            "in angle brackets, such as '<fair>', got",
        ),
        (put(["components", "soft_tokens", "token"], "<A>"), "of lowercase letters, .* got '<A>'"),
        (put(["components", "soft_tokens", "token"], "<a>\n"), "in angle brackets"),
        (put(["components", "soft_tokens", "token"], f"<{'a' * 65}>"), "in angle brackets"),
        (put(["attributes", 0], "round"), "expected an attribute to have the keys"),
        (put(["attributes", 0, "classes"], [1, 2, 3]), "the classes of 'shape' must be strings"),
        (put(["attributes", 0, "target"], ["a", 0, 1]), "the target of 'shape' must be numbers"),
        (put(["attributes", 0, "target"], [0.5, 0.5]), "needs 3 shares"),
        (put(["attributes", 0, "target"], [10**400, 0, 0]), "too large"),
        (put(["evaluation"], "good"), "'evaluation' of the file must not be str"),
    ],
)
def test_bad_json_values(whole, change, message):
    edit(whole, change)
    with pytest.raises(ValueError, match=message):
        read_adapter(whole)


def test_json_that_is_no_object(folder):
    (folder / INFO_FILE).write_text("[]")
    with pytest.raises(ValueError, match=r"expected the file to have the keys .* got list"):
        read_adapter(folder)


def test_json_in_another_encoding(folder):
    (folder / INFO_FILE).write_bytes("{}".encode("utf-16"))
    with pytest.raises(ValueError, match="is truncated or not acceptable JSON"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put([TEXT + "A.weight"], torch.zeros(3)), r"rank 3 but has the shape \[3\]"),
        (put([TEXT + "A.weight"], torch.tensor(1.0)), r"rank 3 but has the shape \[\]"),
        (put([TEXT + "A.weight"], torch.zeros(4, 8)), r"rank 3 but has the shape \[4, 8\]"),
        (put([TEXT + "B.weight"], torch.zeros(3, 4)), r"rank 3 but has the shape \[3, 4\]"),
        (put([TEXT + "B.weight"], torch.zeros(0, 3)), r"rank 3 but has the shape \[0, 3\]"),
        (put([TEXT + "A.weight"], torch.zeros(3, 8).int()), "is of type I32, expected one of"),
        (put([TEXT + "A.weight"], torch.zeros(3, 8).double()), "is of type F64, expected one of"),
        (put([TEXT + "A.weight"], torch.full((3, 8), torch.nan)), "holds NaN or infinite values"),
        (put([UNET + "B.weight"], torch.full((7, 2), -torch.inf)), "holds NaN or infinite values"),
        (lambda tensors: tensors.pop(TEXT + "B.weight"), "has no matching lora_B"),
        (put(["vae.x.lora_A.weight"], torch.zeros(3, 8)), "'vae.*' is not a LoRA weight"),
        (put(["unet.x.weight"], torch.zeros(2, 8)), "'unet.x.weight' is not a LoRA weight"),
        (put(["unet.../x.lora_A.weight"], torch.zeros(2, 8)), "is not a LoRA weight"),
        (put(["unet.x.lora_A.weight\n"], torch.zeros(2, 8)), "is not a LoRA weight"),
        (
            lambda tensors: [tensors.pop(f"{UNET}{x}.weight") for x in "AB"],
            "it holds no weights of",
        ),
        (
            lambda tensors: tensors.update(
                {f"unet.x.lora_{x}.weight": torch.zeros(2, 2) for x in "AB"}
            ),
            "'lora_adapter_metadata' does not agree",
        ),
    ],
)
def test_bad_tensors(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=f"does not hold the weights of an adapter: .*{message}"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(["<fair>"], torch.zeros(2)), r"expected 2 rows of '<fair>', got the shape \[2\]"),
        (
            put(["<fair>"], torch.zeros(3, 4)),
            r"expected 2 rows of '<fair>', got the shape \[3, 4\]",
        ),
        (
            put(["<fair>"], torch.zeros(2, 0)),
            r"expected 2 rows of '<fair>', got the shape \[2, 0\]",
        ),
        (put(["<fair>"], torch.zeros(2, 4).int()), "is of type I32, expected one of"),
        (put(["<fair>"], torch.full((2, 4), torch.nan)), "holds NaN or infinite values"),
        (put(["<other>"], torch.zeros(2, 4)), "expected only '<fair>' in it, or .*, got"),
        (lambda tensors: tensors.clear(), r"expected only '<fair>' in it, or .*, got \[\]"),
        (
            lambda t: t.update({"<a>": t.pop("<fair>")}),
            r"only '<fair>' in it, or .*, got \['<a>'\]",
        ),
    ],
)
def test_bad_soft_tokens(whole, change, message):
    rewrite(whole, change, name=EMBEDS_FILE)
    with pytest.raises(ValueError, match=f"does not hold the weights of an adapter: .*{message}"):
        read_adapter(whole)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "does not agree with fair_adapter.json"),
        ({"lora_adapter_metadata": "{"}, "is truncated or not acceptable JSON"),
        ({"lora_adapter_metadata": "[" * 100}, "nested deeper"),
        ({"lora_adapter_metadata": " " * (MAX_BYTES[INFO_FILE] + 1)}, "longer than"),
        ({"lora_adapter_metadata": '{"unet.r": 2, "unet.use_dora": true}'}, "does not agree"),
        ({"lora_adapter_metadata": '{"unet.rank_pattern": {"mid_block": 3}}'}, "does not agree"),
        ({"lora_adapter_metadata": "[]"}, "does not agree"),
    ],
)
def test_bad_header(folder, metadata, message):
    rewrite(folder, lambda tensors: None, metadata)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


def test_an_alpha_that_contradicts_the_header_is_refused(folder):
    edit(folder, put(["components", "unet", "alpha"], 4))
    with pytest.raises(ValueError, match=r"does not agree with fair_adapter\.json"):
        read_adapter(folder)


def test_header_longer_than_the_file(folder):
    path = folder / WEIGHTS_FILE
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        read_adapter(folder)


def test_a_pickle_is_not_read(folder):
    torch.save(weights(), folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="is truncated or damaged"):
        read_adapter(folder)


@pytest.mark.slow
def test_random_damage_gives_a_clear_error_or_the_same_weights(whole):
    """Bytes changed, cut off, put in or twice there: 600 folders."""
    folder, rng = whole, random.Random(0)
    good = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    expected = read_adapter(folder)[1]
    assert len(good) == 3
    errors = 0
    for _ in range(600):
        name = rng.choice(list(good))
        content, place = bytearray(good[name]), rng.randrange(len(good[name]))
        match rng.choice(("change", "change", "cut", "insert", "repeat")):
            case "change":
                for _ in range(rng.choice((1, 1, 3))):
                    content[rng.randrange(len(content))] = rng.randrange(256)
            case "cut":
                del content[place : place + rng.choice((1, 8, len(content)))]
            case "insert":
                content[place:place] = rng.randbytes(rng.choice((1, 8, 64)))
            case "repeat":
                content[place:place] = content[: rng.randrange(1, 64)]
        (folder / name).write_bytes(content)
        try:
            found = read_adapter(folder)[1]
        except ValueError:  # and nothing else
            errors += 1
        else:
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
        (folder / name).write_bytes(good[name])
    assert 400 < errors < 600
    assert read_adapter(folder)[0] == adapter_info(components=BOTH)


def test_weights_with_another_checksum_are_refused(whole):
    """Of the right names, shapes and types; a folder from before there were checksums is read."""
    other = {key: 2 * value for key, value in weights().items()}
    write_adapter(whole.with_name("other"), other | embeds(), adapter_info(components=BOTH))
    shutil.copy(whole.with_name("other") / WEIGHTS_FILE, whole)
    with pytest.raises(
        ValueError,
        match=f"{WEIGHTS_FILE}' is damaged: its checksum is not the one in fair_adapter.json",
    ):
        read_adapter(whole)
    edit(whole, lambda data: data.pop("checksums"))
    assert torch.equal(read_adapter(whole)[1][f"{UNET}A.weight"], other[f"{UNET}A.weight"])


# ---- names, links, strings without an end --------------------------------------------------------


@pytest.mark.parametrize("text", ["", " ", "two\nlines", "\x1b[31m", "\ud800", "x" * 301])
@pytest.mark.parametrize("place", [["name"], ["classes", 0]])
def test_names_that_are_not_printable_are_refused(folder, text, place):
    edit(folder, put(["attributes", 0, *place], text))
    with pytest.raises(ValueError, match="must be 1 to 300 printable characters") as caught:
        read_adapter(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("number", ["1e999", "-1e999", "Infinity"])
def test_numbers_that_are_not_finite_are_refused(folder, number):
    path = folder / INFO_FILE
    path.write_text(path.read_text().replace('"iterations": 3', f'"iterations": {number}'))
    with pytest.raises(ValueError, match=f"{number} is not a finite number"):
        read_adapter(folder)


@pytest.mark.parametrize("end", ["", "\\"])
def test_a_string_without_an_end_is_refused_in_linear_time(folder, end):
    """Where each of the quotes is taken for the begin of another string it takes hours."""
    (folder / INFO_FILE).write_text('"' + '\\"' * 500_000 + end)
    with pytest.raises(ValueError, match="truncated or not acceptable JSON"):
        read_adapter(folder)


@pytest.mark.parametrize("name", [INFO_FILE, WEIGHTS_FILE, EMBEDS_FILE])
def test_links_out_of_the_folder_are_not_followed(whole, tmp_path, name):
    (whole / name).rename(tmp_path / "elsewhere")
    (whole / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name}' is a link out of the folder: put the file"):
        read_adapter(whole)


def test_links_into_the_folder_are_followed(whole, tmp_path):
    (whole / INFO_FILE).rename(whole / "info")
    (whole / INFO_FILE).symlink_to("info")
    (tmp_path / "here").symlink_to(whole)
    assert read_adapter(tmp_path / "here")[0] == adapter_info(components=BOTH)


@pytest.mark.parametrize("name", [INFO_FILE, WEIGHTS_FILE, EMBEDS_FILE])
def test_a_folder_or_a_pipe_is_no_file(whole, name):
    (whole / name).unlink()
    (whole / name).mkdir()
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        read_adapter(whole)
    (whole / name).rmdir()
    os.mkfifo(whole / name)  # to open it would wait for ever
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        read_adapter(whole)


# ---- what it says of itself is said otherwise ----------------------------------------------------


def test_write_info_only_replaces_the_info(whole):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    info = adapter_info(components=BOTH, training={"iterations": 3, "seconds": 1.5})
    write_info(whole, info)
    after = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {INFO_FILE}
    assert read_adapter(whole)[0] == info


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"components": SOFT}, "holds the weights of .*: write them with write_adapter"),
        ({"base_model": "two\nlines"}, "names and words must be"),
        ({"evaluation": {"bias": math.inf}}, "Out of range float"),
    ],
)
def test_info_that_could_not_be_read_is_not_written(whole, changes, message):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(ValueError, match=message):
        write_info(whole, adapter_info(**{"components": BOTH} | changes))
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


WORDS = {"shape": {"round": ("round", "ball-like"), "flat": ("flat",)}}


def test_words_are_read_as_written(tmp_path):
    write_adapter(tmp_path / "adapter", weights(), adapter_info(words=WORDS))
    data = json.loads((tmp_path / "adapter" / INFO_FILE).read_text())
    assert data["format_version"] == 1
    assert data["words"] == {"shape": {"round": ["round", "ball-like"], "flat": ["flat"]}}
    assert read_adapter(tmp_path / "adapter")[0] == adapter_info(words=WORDS)
    schema.validate(data)


def test_folders_from_before_words_were_noted_keep_their_bytes(folder):
    before = (folder / INFO_FILE).read_bytes()
    assert "words" not in json.loads(before)
    write_info(folder, read_adapter(folder)[0])
    assert (folder / INFO_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "'words' of the file must not be list"),
        ({"size": {}}, r"words are for the attributes \['shape'\], got 'size'"),
        ({"shape": ["round"]}, r"words of 'shape' must be listed by class, got \['round'\]"),
        ({"shape": {"oval": ["oval"]}}, r"words of 'shape' are for its classes .*, got \['oval'\]"),
        ({"shape": {"round": "round"}}, "words of 'round' must be a list of strings"),
        ({"shape": {"round": [1]}}, "words of 'round' must be a list of strings"),
        ({"shape": {"round": []}}, r"words of 'round' .* 1 to 1000 words, got \[\]"),
        ({"shape": {"round": ["x"] * 1001}}, r"words of 'round' .* 1 to 1000 words, got \['x', "),
        ({"shape": {"round": ["x" * 301]}}, "names and words must be 1 to 300 printable char"),
        ({"shape": {"round": ["a\x1b[0m"]}}, "names and words must be 1 to 300 printable char"),
    ],
)
def test_invalid_words_are_refused(folder, words, message):
    edit(folder, put(["words"], words))
    with pytest.raises(ValueError, match=f"{INFO_FILE}.*{message}"):
        read_adapter(folder)


def test_folders_from_before_training_was_noted_are_read(folder):
    edit(folder, lambda data: data.pop("training"))
    assert read_adapter(folder)[0] == adapter_info()


# ---- the schema ----------------------------------------------------------------------------------

schema = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text("utf-8")))
CARDS = sorted((Path(__file__).parents[2] / "model_cards").glob("adapters/*"))


def test_the_shipped_schema_is_the_one_that_checks():
    """If not: write `generated_schema()` to the file."""
    assert SCHEMA_FILE.read_text("utf-8") == generated_schema()


def test_the_schema_is_valid():
    schema.check_schema(schema.schema)
    properties = schema.schema["properties"]
    first, last = _FORMAT_VERSIONS
    assert properties["format_version"] == {"type": "integer", "minimum": first, "maximum": last}
    components = properties["components"]["properties"]
    assert set(components) == {*LORA_PREFIXES, SOFT_TOKENS}
    assert components["unet"]["properties"]["rank"]["maximum"] == _MAX_RANK
    assert properties["base_model"]["properties"]["id"]["maxLength"] == _MAX_LABEL
    of_class = properties["words"]["additionalProperties"]["additionalProperties"]
    assert of_class["maxItems"] == _MAX_WORDS
    assert {*properties} - {*schema.schema["required"]} == {"words", "training", "checksums"}


DIGESTS = {  # as recorded when the adapters were evaluated
    "testbed-gender": "b69e3e38cb98bdb8",
    "testbed-gender-race": "e03f64041327f1b6",
    "testbed-gender-race-age": "96a0a7fbd0f7607b",
    "testbed-multi-concept": "b27a4e02b51b3db2",
    "testbed-prefix": "448809ab70cd4d06",
    "testbed-race": "bead918c7bcb73cb",
    "testbed-text-encoder-unet": "ac1191805492fd5e",
    "testbed-unet": "765d60861ebd517f",
}


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.name)
def test_shipped_adapters_keep_their_digest(card):
    """Reports name adapters by it."""
    adapter = open_adapter(card)
    assert adapter.digest == DIGESTS[card.name]
    assert dict(adapter.checksums) == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in card.glob("*.safetensors")
    }


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.name)
def test_shipped_adapters_match_the_schema(card):
    schema.validate(json.loads((card / INFO_FILE).read_text("utf-8")))


def test_written_adapters_match_the_schema(whole):
    schema.validate(json.loads((whole / INFO_FILE).read_text("utf-8")))


@pytest.mark.parametrize(
    "change",
    [
        put(["format_version"], 3),
        put(["base_model", "fingerprint"], "f"),
        put(["base_model", "id"], None),
        put(["components"], {}),
        put(["components", "vae"], {"rank": 1, "alpha": 1}),
        put(["components", "unet", "rank"], 0),
        put(["components", "unet", "rank"], 2.5),
        put(["components", "unet", "alpha"], 0),
        put(["components", "soft_tokens", "token"], "<|endoftext|>"),
        put(["components", "soft_tokens", "count"], 2000),
        put(["attributes", 0, "classes"], ["round"]),
        put(["attributes", 0, "target"], ["a", "b", "c"]),
        put(["attributes", 0, "target", 0], True),
        put(["attributes"], {}),
        put(["attributes"], []),
        put(["words"], []),
        put(["words"], {"shape": {"round": []}}),
        put(["words"], {"shape": {"round": [3]}}),
        put(["words"], {"shape": {"round": ["x"] * 1001}}),
        put(["recipe"], []),
        put(["evaluation"], 3),
        put(["training"], "long"),
        put(["more"], 1),
        lambda data: data.pop("recipe"),
    ],
)
def test_reader_and_schema_refuse_the_same(whole, change):
    edit(whole, change)
    with pytest.raises(ValueError, match=INFO_FILE):
        read_adapter(whole)
    with pytest.raises(jsonschema.ValidationError):
        schema.validate(json.loads((whole / INFO_FILE).read_text("utf-8")))


# ---- opened once ---------------------------------------------------------------------------------


def test_an_open_adapter_is_not_read_again(whole, monkeypatch):
    adapter = open_adapter(whole)
    monkeypatch.setattr(folders, "load_info", None)
    assert open_adapter(adapter) is adapter
