"""Reports side by side: what is best, what differs, what cannot be compared."""

import json

import numpy as np
import pytest
from command import run
from reports import HUE, PROMPTS, TONE, certain, group, report
from scipy.stats import wilcoxon

from diffusers_fair.attributes import Attribute
from diffusers_fair.prompts.groups import KeptPrompt
from diffusers_fair.reports.columns import MeasureColumn
from diffusers_fair.reports.comparison import Comparison, Entry, compare
from diffusers_fair.reports.folder import save_comparison, save_report
from diffusers_fair.reports.markdown import comparison_markdown


def entry(label: str, group: str = "", **what) -> Entry:
    return Entry(label=label, group=group, report=report(label, **what))


def even(shares: list[float], images: int = 10) -> dict:
    """Of tone, the same in each prompt."""
    labels = [0] * round(shares[0] * images) + [1] * round(shares[1] * images)
    return {
        "attributes": (TONE,),
        "images": images,
        "records": {"probabilities": certain(TONE, labels * len(PROMPTS))},
    }


@pytest.fixture(scope="module")
def three() -> Comparison:
    return compare(
        [
            entry("base", seed=0),
            entry("ours", "hue x tone", seed=1),
            entry("theirs", "hue x tone", seed=2),
        ]
    )


def column(comparison: Comparison, head: str):
    return next(c for c in comparison.columns if c.head == head)


def test_columns_in_the_order_of_the_papers_table(three):
    assert [c.head for c in three.columns] == [
        *("bias, hue", "bias, tone", "bias, hue x tone"),
        *("deviation from target, tone", "deviation from target, hue x tone"),
        *("images with a face", "CLIP-T"),
    ]


def test_scores_of_ones_own_stand_before_the_usual():
    scores = {name: np.linspace(0, 1, 24) for name in ("clip_t", "dino", "context")}
    made = compare([entry("a", records={"scores": scores}), entry("b")])
    assert [c.head for c in made.columns][-3:] == ["context", "CLIP-T", "DINO"]


def test_less_bias_is_best_and_only_within_the_group():
    rows = [entry("base", **even([0.5, 0.5]))]
    rows += [entry("a", "tone", **even([0.9, 0.1])), entry("b", "tone", **even([0.7, 0.3]))]
    made = compare(rows)
    bias = column(made, "bias, tone")
    assert [made.is_best(row, bias) for row in made.entries] == [False, False, True]


def test_equal_to_the_digits_shown_is_best_together():
    rows = [entry(name, **even([0.8, 0.2])) for name in ("a", "b")]
    rows.append(entry("c", **even([1.0, 0.0])))
    made = compare(rows)
    bias = column(made, "bias, tone")
    assert [made.is_best(row, bias) for row in made.entries] == [True, True, False]


def test_more_of_a_score_is_best_and_faces_are_never():
    low, high = ({"clip_t": np.full(24, value)} for value in (0.2, 0.4))
    made = compare([entry("a", records={"scores": low}), entry("b", records={"scores": high})])
    assert [made.is_best(row, column(made, "CLIP-T")) for row in made.entries] == [False, True]
    assert not any(made.is_best(row, column(made, "images with a face")) for row in made.entries)


@pytest.mark.slow
def test_differences_are_wilcoxons_of_the_prompts():
    prompts = [f"prompt {i}" for i in range(12)]
    made = compare([entry(name, prompts=prompts, seed=i) for i, name in enumerate("ab")])
    a, b = ([p.attributes["hue"].bias for p in e.report.prompts] for e in made.entries)
    test = made.differences["b"]["bias, hue"]
    assert test.difference == pytest.approx(np.mean(b) - np.mean(a))
    expected = wilcoxon(np.subtract(b, a), zero_method="pratt").pvalue
    assert test.p_value == pytest.approx(expected)


def test_against_another_row(three):
    swapped = compare(three.entries, against="ours")
    assert set(swapped.differences) == {"base", "theirs"}
    there = three.differences["ours"]["bias, hue"].difference
    assert swapped.differences["base"]["bias, hue"].difference == pytest.approx(-there)


def test_counted_by_what_all_looked_at_towards_the_first_target():
    other = Attribute("tone", TONE.classes, (0.5, 0.5))
    made = compare([entry("a"), entry("b", attributes=(other,))])
    assert [e.report.settings.attributes for e in made.entries] == [(TONE,)] * 2
    assert "deviation from target, tone" in [c.head for c in made.columns]


def test_a_prompt_without_faces_is_left_out_of_the_pairs():
    found = np.ones(24, bool)
    found[:8] = False
    made = compare([entry("a"), entry("b", seed=1, records={"found": found})])
    test = made.differences["b"]["bias, hue"]
    assert test.prompts == 2
    assert made.differences["b"]["images with a face"].difference == pytest.approx(-1 / 3)


def test_no_face_at_all_is_a_gap_everywhere():
    made = compare([entry("a"), entry("b", records={"found": np.zeros(24, bool)})])
    assert "| b | - | - | - |" in comparison_markdown(made)
    assert "NaN" not in json.dumps(made.json())
    assert made.json()["rows"][1]["figures"]["bias, hue"] is None


def test_markdown_marks_the_best_and_names_groups(three):
    lines = comparison_markdown(three).splitlines()
    tables = [line.count("|") for line in lines if line.startswith("|")]
    assert set(tables) == {len(three.columns) + 2}
    assert any(line.startswith("| *hue x tone* |") for line in lines)
    assert sum("**" in line for line in lines if line.startswith("| ")) >= 1


def test_labels_cannot_break_the_markdown():
    made = compare([entry("a|b\n<i>"), entry("c")])
    assert "| a\\|b &lt;i&gt; |" in comparison_markdown(made)


def test_saved_as_page_json_and_markdown(three, tmp_path):
    save_comparison(three, tmp_path / "out")
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["compare.html", "compare.json", "compare.md"]
    root = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))
    assert root["against"] == "base"
    assert root["rows"][1]["group"] == "hue x tone"
    ours = three.entries[1].report
    assert root["rows"][1]["figures"]["bias, hue"] == ours.summary.bias["hue"].json()
    assert root["rows"][1]["difference"]["CLIP-T"]["prompts"] == 3
    assert root["rows"][0]["difference"] == {}
    names = {"faces", "off target, tone", "off target, hue x tone"}  # released names of keys
    assert names <= root["rows"][1]["figures"].keys() & root["rows"][1]["difference"].keys()


# ---- prompts that leave nothing to change --------------------------------------------------------

HATS = [KeptPrompt(f"a {c} hat {i}", {"hue": c}) for i in range(3) for c in ("red", "blue")]


def named(prompts, labels, images=2):
    return {"named": group(prompts=prompts, images=images, labels={"hue": labels})}


def test_words_obeyed_are_columns_and_the_most_is_best():
    half = entry("half", groups=named(HATS, [0, 0, 0, 0] * 3))  # red, whatever is asked for
    whole = entry("whole", groups=named(HATS, [0, 0, 2, 2] * 3))
    made = compare([half, whole, entry("older")])
    obeyed = column(made, "words obeyed")
    estimates = [obeyed.estimate(e.report) for e in made.entries]
    assert [estimate and estimate.mean for estimate in estimates] == [0.5, 1.0, None]
    assert [made.is_best(e, obeyed) for e in made.entries] == [False, True, False]
    test = made.differences["whole"]["words obeyed"]
    assert (test.prompts, test.difference) == (6, 0.5)
    assert made.differences["older"]["words obeyed"].difference is None
    row = made.json()["rows"][1]
    assert row["figures"]["words obeyed"]["n"] == 6
    assert row["groups"]["named"]["obeyed"]["mean"] == 1
    assert "| whole | " in comparison_markdown(made)


def test_only_prompts_that_all_have_are_compared():
    few = entry("few", groups=named(HATS[::-1][:3], [0] * 3, images=1))
    many = entry("many", groups=named(HATS, [0] * 12))
    made = compare([few, many])
    texts = [[p.text for p in e.report.groups["named"].group.prompts] for e in made.entries]
    assert texts[0] == texts[1] == sorted(p.text for p in HATS[3:])
    assert made.entries[1].report.group_summaries()["named"].images == 3
    assert made.differences["many"]["words obeyed"].difference == 0


def test_no_prompts_in_common_is_no_column():
    made = compare(
        [entry("a", groups=named(HATS[:2], [0] * 4)), entry("b", groups=named(HATS[2:], [0] * 8))]
    )
    assert not [c for c in made.columns if isinstance(c, MeasureColumn)]


# ---- what cannot be compared ---------------------------------------------------------------------

COLD = Attribute("hue", ("red", "green"))
BAD = {
    "one report": ([entry("a")], "expected two or more reports to compare, got 1"),
    "the same label": (
        [entry("a"), entry("a")],
        "two reports have the label 'a': name them, as in LABEL=REPORT",
    ),
    "other prompts": (
        [entry("a"), entry("b", prompts=PROMPTS[::-1])],
        r"'b' was evaluated on other prompts than 'a' \(3 and 3\): only reports on the same",
    ),
    "other image counts": (
        [entry("a"), entry("b", images=5)],
        r"'b' has 5 images of each prompt \(15 in all\), 'a' has 8 \(24\): fewer images",
    ),
    "no attribute in common": (
        [entry("a", attributes=(HUE,)), entry("b", attributes=(COLD,))],
        "no attribute with the same classes in common: evaluate again with hue",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_compared_is_said(case):
    entries, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        compare(entries)


def test_unknown_row_to_test_against():
    with pytest.raises(ValueError, match=r"with the label 'z': expected one of \['a', 'b'\]"):
        compare([entry("a"), entry("b")], against="z")


def test_not_over_a_file(three, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file' is a file: choose another folder"):
        save_comparison(three, tmp_path / "file")


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_report(report("base"), "base")
    save_report(report("adapter", seed=1), "run=1")


def test_the_command_names_rows_and_groups(folders, monkeypatch):
    words = ["plain=base", "hue x tone/ours=run=1", "run=1", "--against", "ours", "--out", "out"]
    assert run(monkeypatch, "compare", *words) == 0
    with open("out/compare.json", encoding="utf-8") as file:
        root = json.load(file)
    assert [(row["group"], row["label"]) for row in root["rows"]] == [
        *[("", "plain"), ("hue x tone", "ours"), ("", "adapter")]
    ]
    assert root["against"] == "ours"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base"], "expected two or more reports"),
        (["base", "nowhere"], "there is no report in 'nowhere'"),
        (["base", "base"], "two reports have the label 'base'"),
        (["base", "run=1", "--against", "x"], "there is no report with the label 'x'"),
    ],
)
def test_bad_input_of_the_command(words, message, folders, monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "compare", *words, "--out", "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
