"""Cards: of the testbed's adapters again, and of every kind of adapter and report."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import preview_card
import pytest
import test_evaluation as evaluated
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from reports import group
from test_io import BOTH, SOFT, adapter_info, edit, embeds, put, weights

from diffusers_fair import cli, testbed
from diffusers_fair.adapters.folder import README_FILE, read_adapter, write_adapter, write_info
from diffusers_fair.adapters.format import INFO_FILE
from diffusers_fair.prompts.groups import KeptPrompt
from diffusers_fair.publishing import card
from diffusers_fair.publishing.card import write_card
from diffusers_fair.reports.folder import GROUPS_SHEET, load_report, report_json, save_report

ROOT = Path(__file__).parents[2]
CARDS = sorted(path.parent for path in (ROOT / "model_cards/adapters").glob("*/README.md"))
HUE = evaluated.HUE
TONE = evaluated.TONE


def lora(folder, **changes):
    write_adapter(folder, weights(), adapter_info(**{"evaluation": None} | changes))
    return folder


@pytest.fixture
def adapter(tmp_path):
    return lora(tmp_path / "adapter", attributes=(HUE, TONE))


@pytest.fixture(scope="module")
def measured():
    """A report beside its base: hue is balanced better than before, tone is off its target."""
    same = np.tile([0, 0, 0, 1, 1, 1], (2, 1))
    hues = np.tile([0, 0, 1, 1, 2, 2], (2, 1))
    make = {"attributes": (HUE, TONE), "scores": {"clip_t": np.full(12, 0.25)}}
    found = np.ones((2, 6))
    report = dataclasses.replace(
        evaluated.made_up(found, [hues, same], **make),
        reference=evaluated.made_up(found, [0 * hues, same], **make),
        confusion={"hue": [[0.9, 0.1, 0.0], [0.0, 1.0, 0.0], [0.0, 0.2, 0.8]]},
        provenance={"date": "2031-05-06T07:08:09+00:00", "commit": "c" * 40},
    )
    return json.dumps(report_json(report))


@pytest.fixture
def report(measured, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(measured, "utf-8")
    return tmp_path / "report"


def text_of(folder):
    return (folder / README_FILE).read_text("utf-8")


# ---- those that are kept -------------------------------------------------------------------------


def test_there_are_cards():
    assert len(CARDS) >= 2


@pytest.mark.parametrize("kept", CARDS, ids=lambda path: path.name)
def test_kept_cards_follow_from_their_reports(kept, tmp_path):
    """Byte for byte: neither the card nor what the adapter says of itself is typed."""
    names = [README_FILE, INFO_FILE, "report.json", f"samples/{card.PAIRS}"]
    old = {name: (kept / name).read_bytes() for name in names}
    report = shutil.copytree(kept / "samples", tmp_path / "report")
    shutil.copy(kept / "report.json", report)
    fresh = shutil.copytree(
        kept, tmp_path / "adapter", ignore=shutil.ignore_patterns("README*", "*.png", "report.json")
    )
    write_info(fresh, dataclasses.replace(read_adapter(fresh)[0], evaluation=None))
    write_card(fresh, report)
    assert {name: (fresh / name).read_bytes() for name in names} == old


@pytest.mark.parametrize("kept", CARDS, ids=lambda path: path.name)
def test_kept_cards_are_shown_with_their_images_and_tables(kept, tmp_path):
    preview_card.main(kept, tmp_path / "preview.html")
    page = (tmp_path / "preview.html").read_text("utf-8")
    title = next(line for line in text_of(kept).splitlines() if line.startswith("# "))
    assert f"<title>{title.removeprefix('# ')}</title>" in page
    assert f'src="{(kept / "samples" / card.PAIRS).as_uri()}"' in page
    assert page.count("<table>") == page.count('<div class="scroll" tabindex="0"><table>') >= 3


@pytest.mark.slow
@pytest.mark.parametrize("kept", CARDS[:1], ids=lambda path: path.name)
def test_what_a_kept_card_says_loads_the_adapter(kept, monkeypatch):
    """Its Python, run on the testbed: with this package and with diffusers alone, the same."""
    tokens = MarkdownIt().parse(ModelCard.load(kept / "README.md").text)
    blocks = [token.content for token in tokens if token.info == "python"]
    assert len(blocks) == 2
    monkeypatch.chdir(kept)
    names, drawn = {}, []
    for block in blocks:
        code = block.replace("path/of/this/folder", ".")
        names["g"] = torch.Generator().manual_seed(0)
        code, found = re.subn(r"steps=\d+", "steps=2, generator=g", code)
        assert found == 1
        exec(code, names)
        drawn.append(names["image"].tobytes())
        names["pipe"] = testbed.pipeline()
    assert drawn[0] == drawn[1]


# ---- any others ----------------------------------------------------------------------------------


def test_figures_are_the_report_s(adapter, report):
    write_card(adapter, report)
    figures = json.loads((report / "report.json").read_text("utf-8"))["summary"]
    text = text_of(adapter)
    hue, tone = figures["bias"]["hue"], figures["deviation"]["tone"]
    ends = "[{:.3f}, {:.3f}]".format(*hue["interval"])
    assert f"| bias, hue | 0.667 ± 0.000 [0.667, 0.667] | 0.000 ± 0.000 {ends} | " in text
    assert (
        f"| deviation from target, tone | 0.500 ± 0.000 [0.500, 0.500] | {tone['mean']:.3f} ± "
        in text
    )
    assert f" | {hue['floor']:.3f} |" in text
    corrected = figures["corrected"]["hue"]["mean"]
    assert f"| — classifier errors corrected | - | {corrected:.3f} ± " in text
    assert "accuracy on held-out images, mean over classes: 90.0% (hue)." in text
    assert "| hue | red | 0.333 | 1.000 ± 0.000 | 0.333 ± 0.000 |" in text
    assert "| tone | dark | 0.750 | 0.500 ± 0.000 | 0.500 ± 0.000 |" in text
    assert (
        "2 prompts, 12 images (12 with a face), 1 steps, guidance 1.0, seed 0, on 2031-05-06"
        in (text)
    )
    assert "The deviation from target is the same measure, but" in text


def add_groups(report, obeyed):
    """Words obeyed by the base always, and by the adapter in that share of the images."""
    prompts = [
        KeptPrompt("a red hat", {"hue": "red"}),
        KeptPrompt("a hat", {"hue": "red"}, "", True),
    ]
    right, found = ({"hue": [0] * n + [1] * (20 - n)} for n in (20, round(20 * obeyed)))
    lamp = group("untouched", prompts=[KeptPrompt("")], dino=0.97, clip_i=0.98, pixels=0.0123)
    base, mine = (
        group(prompts=prompts, labels=labels, images=10, attributes=(HUE, TONE))
        for labels in (right, found)
    )
    root = json.loads((report / "report.json").read_text("utf-8"))
    root["groups"] = {"named": mine.json(), "untouched": lamp.json()}
    root["reference"]["groups"] = {"named": {"summary": base.json()["summary"]}}
    (report / "report.json").write_text(json.dumps(root), "utf-8")


def test_words_obeyed_and_what_is_left_alone(adapter, report):
    write_card(adapter, report)
    assert "Control prompts" not in text_of(adapter)
    assert "groups" not in read_adapter(adapter)[0].evaluation
    add_groups(report, obeyed=0.75)
    write_card(adapter, report)
    text = text_of(adapter)
    assert "### Control prompts" in text
    assert "| words obeyed | 1.000 ± 0.000 [1.000, 1.000] | 0.750 ± 0.250 [0.500, 1.000] |" in text
    assert "| words obeyed, unseen words | 1.000 ± 0.000 | 0.500 ± 0.000 |" in text
    assert "| untouched: DINO | 1 | 0.970 ± 0.000 |" in text
    assert "| untouched: pixel change | 0 | 0.012 ± 0.000 |" in text
    assert "**Warning:** The adapter falls short of its base model by more than 5 points" in text
    assert "words obeyed 0.750, base 1.000" in text
    kept = read_adapter(adapter)[0].evaluation["groups"]
    assert kept["after"]["named"]["obeyed"]["mean"] == 0.75
    assert kept["before"]["named"]["obeyed"]["mean"] == 1
    write_card(adapter)  # from what was noted
    assert text_of(adapter) == text


def test_no_warning_of_an_adapter_that_obeys(adapter, report):
    add_groups(report, obeyed=1.0)
    write_card(adapter, report)
    assert "### Control prompts" in text_of(adapter)
    assert "Warning" not in text_of(adapter)


def test_what_was_not_asked_for_stands_apart(tmp_path, report):
    adapter = lora(tmp_path / "other", attributes=(TONE,))
    write_card(adapter, report)
    asked, other = text_of(adapter).split("may have changed")
    asked = asked.split("## Evaluation")[1]
    assert "bias, tone" in asked
    assert "bias, hue" not in asked
    assert "bias, hue" in other
    assert "bias, hue x tone" in other


def test_the_summary_goes_into_the_adapter_and_the_card_follows_from_it(adapter, report):
    path = write_card(adapter, report)
    assert path == adapter / "README.md"
    first = path.read_bytes()
    info, _ = read_adapter(adapter)
    root = json.loads((report / "report.json").read_text("utf-8"))
    assert info.evaluation["after"]["bias"] == root["summary"]["bias"]
    assert info.evaluation["before"]["bias"] == root["reference"]["summary"]["bias"]
    assert (adapter / "report.json").read_bytes() == (report / "report.json").read_bytes()
    path.unlink()
    write_card(adapter)
    assert path.read_bytes() == first


def test_metadata_is_what_the_hub_reads(tmp_path, report):
    base = "runwayml/stable-diffusion-v1-5"
    adapter = lora(tmp_path / "other", attributes=(HUE,), base_model=base)
    write_card(adapter, report)
    data = ModelCard.load(adapter / "README.md").data
    assert data.base_model == base
    assert data.base_model_relation == "adapter"
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert data.license == "creativeml-openrail-m"
    assert {"diffusers-fair", "lora", "text-to-image"} - set(data.tags) == {"text-to-image"}
    figures = json.loads((report / "report.json").read_text("utf-8"))["summary"]
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert results["bias, hue"] == round(figures["bias"]["hue"]["mean"], 4)
    assert results["CLIP-T"] == 0.25
    assert 'from_pretrained("runwayml/stable-diffusion-v1-5")' in text_of(adapter)


@pytest.mark.parametrize("base", ["testbed", "/home/me/a model", "org/unknown"])
def test_bases_that_are_not_on_the_hub_are_not_said_to_be(tmp_path, base):
    adapter = lora(tmp_path / "other", base_model=base)
    write_card(adapter)
    data = ModelCard.load(adapter / "README.md").data.to_dict()
    assert ("base_model" in data) == (base == "org/unknown")
    assert data.get("license") == ("apache-2.0" if base == "testbed" else None)


@pytest.mark.parametrize(
    ("base", "creation", "arguments"),
    [
        ("testbed", "testbed.pipeline()", ""),
        ("testbed-flux", "testbed.flux_pipeline()", ", max_sequence_length=32"),
    ],
)
def test_the_code_of_a_shipped_base(tmp_path, base, creation, arguments):
    adapter = lora(tmp_path / "other", base_model=base)
    write_card(adapter)
    text = text_of(adapter)
    assert f"the base `{base}` of `diffusers-fair`" in text
    assert f"pipe = diffusers_fair.{creation}\n" in text
    assert text.count(f"image = pipe(prompt{arguments}).images[0]") == 2
    assert ModelCard.load(adapter / "README.md").data.license == "apache-2.0"


@pytest.mark.parametrize("components", [SOFT, BOTH])
def test_the_prompt_to_type_for_soft_tokens(tmp_path, components):
    tensors = embeds() | (weights() if components == BOTH else {})
    write_adapter(tmp_path / "a", tensors, adapter_info(components=components, evaluation=None))
    write_card(tmp_path / "a")
    text = text_of(tmp_path / "a")
    assert 'pipe.load_textual_inversion("path/of/this/folder", weight_name="learned_' in text
    assert 'image = pipe("<fair> " + prompt).images[0]' in text
    assert "put the placeholder `<fair>` once before each prompt" in text
    assert ("pipe.load_lora_weights(" in text) == (components == BOTH)
    assert "`pipe.set_fair_adapter_scale(0)` turns it off, and a scale of 1 on" in text


def test_what_is_corrected_stands_below_its_bias(adapter, report):
    hue = json.loads((report / "report.json").read_text("utf-8"))["summary"]["corrected"]["hue"]
    edit_report(report, put(["summary", "corrected", "tone"], hue))
    write_card(adapter, report)
    heads = [line.split(" | ")[0] for line in text_of(adapter).splitlines()]
    tones = heads[heads.index("| bias, tone") : heads.index("| deviation from target, tone")]
    assert tones[1:] == ["| — without sampling variance", "| — classifier errors corrected"]


def test_without_a_report_it_says_so(adapter):
    write_card(adapter)
    text = text_of(adapter)
    assert "Not evaluated yet. `diffusers-fair evaluate` evaluates the adapter" in text
    assert ModelCard.load(adapter / "README.md").data.eval_results is None
    assert "| attribute | class | target |\n" in text
    assert "The cost was not recorded" in text


def test_what_a_classifier_sees_and_who_counts(tmp_path):
    sky = dataclasses.replace(TONE, name="sky", region="image")
    said = "Images without a face are not counted. If an image has several faces, "
    texts = {}
    for name, attributes, recipe in (
        ("faces", (HUE,), {}),
        ("crowds", (HUE, sky), {"people": "all"}),
        ("whole", (sky,), {}),
    ):
        write_card(lora(tmp_path / name, attributes=attributes, recipe=recipe))
        texts[name] = text_of(tmp_path / name)
    assert f"{said}only the largest is counted.\n" in texts["faces"]
    assert "assigns them to a face.\n" in texts["faces"]
    assert f"{said}every one is counted.\n" in texts["crowds"]
    assert "assigns them to a face or, for sky, to the whole image.\n" in texts["crowds"]
    assert said not in texts["whole"]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({}, "only the largest counts. Words"),
        ({"people": "all"}, "the share of those counts. Words"),
    ],
)
def test_the_card_says_which_faces_obey(recipe, said, tmp_path, report):
    folder = lora(tmp_path / "a", attributes=(HUE,), recipe=recipe)
    add_groups(report, obeyed=0.75)
    write_card(folder, report)
    assert said in text_of(folder)
    assert "occur in the kept prompts that the adapter was trained with" in text_of(folder)


def test_a_report_without_a_base_shows_gaps(adapter, report):
    edit_report(report, put(["reference"], None))
    write_card(adapter, report)
    text = text_of(adapter)
    assert "The base model was not evaluated" in text
    assert "| bias, hue | - | 0.000 ± 0.000" in text
    assert "| hue | red | 0.333 | - | 0.333 ± 0.000 |" in text


def edit_report(report, change):
    root = json.loads((report / "report.json").read_text("utf-8"))
    change(root)
    (report / "report.json").write_text(json.dumps(root), "utf-8")


def test_what_training_took_and_the_recipe(tmp_path):
    training = {"iterations": 130, "seconds": 1234.5, "machine": "2 cores"}
    adapter = lora(tmp_path / "other", training=training)
    write_card(adapter)
    text = text_of(adapter)
    assert "- iterations: 130\n- seconds: 1234.5\n- machine: 2 cores\n" in text
    assert "Cost:\n" in text
    block = text.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(block) == adapter_info().recipe


def test_a_training_from_another_adapter_is_not_taken_for_all_of_it(tmp_path):
    recipe = {"adapter": {"init_from": "org/start"}}
    write_card(lora(tmp_path / "other", training={"seconds": 9}, recipe=recipe))
    told = "Cost, starting from the adapter org/start, whose own training is not included:\n"
    assert told in text_of(tmp_path / "other")


def test_names_are_text_and_not_markup(tmp_path):
    evil = dataclasses.replace(HUE, name="<b>|`*_[x](y)#", classes=("<script>", "a|b", "~c"))
    adapter = lora(tmp_path / "other", attributes=(evil,), recipe={"x": "<script>"})
    write_card(adapter)
    page = (
        MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(ModelCard.load(adapter / "README.md").text)
    )
    assert "<script>" not in page
    assert "<td>&lt;script&gt;</td>" in page
    assert "<td>a|b</td>" in page
    assert "<td>&lt;b&gt;|`*_[x](y)#</td>" in page


def test_pictures_are_copied_and_shown(adapter, report):
    (report / card.PAIRS).write_bytes(b"picture")
    write_card(adapter, report)
    assert (adapter / "samples" / card.PAIRS).read_bytes() == b"picture"
    (adapter / "samples" / "a b.png").write_bytes(b"another")
    write_card(adapter)
    text = text_of(adapter)
    assert "adapter](samples/pairs.png)\n![a b.png](samples/a%20b.png)" in text
    assert "![The same noise, above without and below" in text


def test_the_sheet_of_prompts_that_leave_nothing_to_change_is_shown(adapter, report):
    (report / GROUPS_SHEET).write_bytes(b"sheet")
    write_card(adapter, report)
    assert (adapter / "samples" / GROUPS_SHEET).read_bytes() == b"sheet"
    assert "![Control prompts: the same noise" in text_of(adapter)


def test_a_link_is_replaced_and_not_followed(adapter, report, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    for name in ("README.md", "report.json"):
        (adapter / name).symlink_to(mine)
    write_card(adapter, report)
    assert mine.read_text() == "mine"
    assert not (adapter / "README.md").is_symlink()


# ---- refused, and nothing changed ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(["format"], 9), "is damaged or of another version: its format version is 9, not 1"),
        (lambda root: root.pop("summary"), "is damaged or of another version: 'summary'"),
        (put(["settings"], 3), "is damaged or of another version: 'int'"),
        (
            put(["settings", "attributes", 0, "classes", 0], "pink"),
            "balances 'hue' with the classes .'red', .*, but the report evaluated .*: evaluate the",
        ),
        (
            put(["summary", "bias", "hue"], 3),
            "evaluation stored in the adapter cannot be shown .*: write the card",
        ),
        (put(["summary", "scores"], None), "evaluation stored in the adapter cannot be shown"),
        (
            put(["groups"], {"named": {"summary": {}}}),
            "damaged or of another version: 'prompts'|'ob",
        ),
    ],
)
def test_reports_that_are_not_of_the_adapter(adapter, report, change, message):
    edit_report(report, change)
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    with pytest.raises(ValueError, match=message):
        write_card(adapter, report)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_no_report_and_no_adapter(adapter, tmp_path):
    with pytest.raises(ValueError, match=r"there is no report in '.*': expected a file report\.js"):
        write_card(adapter, tmp_path)
    with pytest.raises(ValueError, match="there is no adapter folder at"):
        write_card(tmp_path / "nowhere")


def test_what_an_adapter_says_may_be_anything(adapter):
    edit(adapter, put(["evaluation"], {"after": 3}))
    with pytest.raises(ValueError, match=r"cannot be shown .*: write the card again with"):
        write_card(adapter)


def test_the_command(adapter, report, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["diffusers-fair", "card", str(adapter), "--report", str(report)]
    )
    cli.main()
    assert "card in " in capsys.readouterr().out
    assert "bias, hue" in text_of(adapter)
    monkeypatch.setattr("sys.argv", ["diffusers-fair", "card", str(report)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "is not an adapter folder" in capsys.readouterr().err


def test_a_report_as_evaluate_saves_it(adapter, tmp_path):
    """From the images on: two tiny pipelines, measured on the same noise."""
    options = {"judges": evaluated.judges(), **evaluated.QUICK}
    base = evaluated.evaluate(evaluated.pipeline(), evaluated.PROMPTS, [HUE, TONE], **options)
    after = evaluated.evaluate(
        evaluated.pipeline(seed=1), evaluated.PROMPTS, [HUE, TONE], reference=base, **options
    )
    save_report(after, tmp_path / "measured")
    write_card(adapter, tmp_path / "measured")
    loaded = load_report(tmp_path / "measured")
    assert read_adapter(adapter)[0].evaluation["after"]["scores"] == loaded.summary.json()["scores"]
    assert "![The same noise" in text_of(adapter)
    assert "The base model's images started from the same noise" in text_of(adapter)
    data = ModelCard.load(adapter / "README.md").data
    assert len(data.eval_results) == 3 + len(loaded.summary.scores)
