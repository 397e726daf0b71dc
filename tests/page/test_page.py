"""report.html and compare.html: what stands in them, what never does, and a browser's view."""

import base64
import io
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reports import HUE, PROMPTS, TONE, certain, group, report

from diffusers_fair.attributes import Attribute
from diffusers_fair.prompts.groups import KeptPrompt
from diffusers_fair.reports.comparison import Entry, compare
from diffusers_fair.reports.measures import warning
from diffusers_fair.reports.page import (
    IMAGE_SIZE,
    TEMPLATES,
    WORST,
    comparison_page,
    prompt_template,
    report_page,
)
from diffusers_fair.reports.report import Report

ALONE = {"meta", "link", "img", "br", "rect"}  # elements without an end
HOSTILE = '"><script>alert(1)</script><img src=http://x.y/ onerror=alert(2)>{{ 7 * 7 }}'


class Outline(HTMLParser):
    """Elements of a page with their attributes, and its text without the style."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == [], "elements that are not closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ALONE:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def pair():
    confusion = {"hue": [[9, 1, 0], [0, 10, 0], [1, 1, 8]]}
    base = report("base", confusion=confusion)
    scores = {name: np.full(24, 0.7) for name in ("clip_t", "clip_i", "context")}
    return report(
        "adapter", seed=1, reference=base, confusion=confusion, records={"scores": scores}
    )


@pytest.fixture(scope="module")
def comparison(pair):
    names = ("base", pair.reference), ("ours", pair), ("theirs", report(seed=2))
    return compare([Entry(label=n, report=r, group="hue") for n, r in names])


@pytest.fixture(scope="module")
def page(pair):
    return report_page(pair)


def with_groups(label: str, obeyed: Sequence[int], **more: Any) -> Report:
    """A report of two named prompts and one without anybody; colours as they are given."""
    asked = [KeptPrompt("a red hat", {"hue": "red"}), KeptPrompt(HOSTILE, {"hue": "red"}, "", True)]
    scores = {"dino": 0.81, "clip_i": 0.9, "pixels": 0.07} if "reference" in more else {}
    return report(
        label,
        groups={
            "named": group(prompts=asked, labels={"hue": obeyed}),
            "untouched": group(
                "untouched", prompts=[KeptPrompt(""), KeptPrompt("x", negative=HOSTILE)], **scores
            ),
        },
        **more,
    )


@pytest.fixture(scope="module")
def kept():
    """A base that obeys every word, and an adapter that obeys one of four."""
    base = with_groups("base", [0, 0, 0, 0])
    return with_groups("adapter", [0, 1, 1, 1], reference=base)


PAGES = ["page", "alone", "compared", "kept", "kept compared"]


@pytest.fixture(scope="module")
def pages(page, comparison, kept):
    both = [Entry(label=r.label, report=r) for r in (kept.reference, kept)]
    return {
        "page": page,
        "alone": report_page(report()),
        "compared": comparison_page(comparison),
        "kept": report_page(kept),
        "kept compared": comparison_page(compare(both)),
    }


# ---- figures -------------------------------------------------------------------------------------


def test_headline_has_both_with_interval_floor_and_change(page, pair):
    text = Outline(page).text
    for name in ("hue", "tone", "hue x tone"):
        for figure in (pair.summary.bias[name], pair.reference.summary.bias[name]):
            low, high = figure.interval
            assert f"{figure.mean:.3f} ± {figure.std:.3f} 95 %: {low:.3f} to {high:.3f}" in text
        assert f"{pair.summary.bias[name].noise_floor:.3f}" in text
    change = pair.summary.bias["hue"].mean - pair.reference.summary.bias["hue"].mean
    assert f"{change:+.3f}".replace("-", "\N{MINUS SIGN}") in text
    assert (
        f"deviation from target, tone {pair.reference.summary.deviation['tone'].mean:.3f}" in text
    )


def test_more_estimates_stand_beside(page, pair):
    text = Outline(page).text
    figure = pair.summary.bias["hue"]
    assert "{:.3f} to {:.3f}".format(*figure.image_interval) in text
    assert f"{figure.without_sampling_variance.mean:.3f}" in text
    assert f"{pair.summary.corrected['hue'].mean:.3f} ±" in text
    assert "error rates not known" in text  # of tone


def test_errors_of_the_classifiers(page):
    text = Outline(page).text
    assert "hue: held-out images with known classes; error rate 10%" in text
    assert "green 0 (0%) 10 (100%) 0 (0%)" in text
    assert "tone: the classifier's error rate is not known" in text


def test_without_a_reference_gaps_are_said(pages):
    text = Outline(pages["alone"]).text
    assert "this page compares it with nothing" in text
    assert "Change" not in text
    assert "same noise" not in text
    assert "base 1" in text  # its pictures


def test_one_prompt_has_no_interval():
    assert "one prompt: no interval" in Outline(report_page(report(prompts=["a baker"]))).text


def test_no_face_anywhere():
    empty = report("empty", records={"found": np.zeros(24, bool)}, reference=report())
    text = Outline(report_page(empty)).text
    assert "Too few faces were found" in text
    assert "No image with a face, and therefore no bias: “" + PROMPTS[0] in text
    assert "In 24 of 24 images no face was found" in text


def test_one_prompt_without_faces_comes_last(pair):
    found = np.ones(24, bool)
    found[8:16] = False
    heads = bar_heads(report_page(report(records={"found": found})))
    assert heads["hue: red"][-1] == "tall judge"


def test_pictures_that_were_there_already():
    chosen = np.concatenate([np.arange(8), np.arange(8, 13), np.arange(16, 17)])  # 8, 5 and 1
    whole = report(settings={"steps": None, "guidance_scale": None, "seed": None})
    some = report(
        settings={"steps": None, "guidance_scale": None, "seed": None},
        records=dict(vars(whole.records.rows(chosen))),
        samples={0: whole.samples[0], 1: whole.samples[1], 2: whole.samples[2][:1]},
    )
    text = Outline(report_page(some)).text
    assert "1 to 8 for each of 3 prompts" in text
    assert "the images come from a folder" in text
    assert "Only one image with a face, and therefore no bias" in text


def test_classes_that_were_never_perceived_are_named():
    never = report(attributes=(HUE,), records={"probabilities": certain(HUE, [0, 1] * 12)})
    assert "Never perceived in any image: hue: blue." in Outline(report_page(never)).text


@pytest.mark.parametrize("name", PAGES)
def test_never_nan_in_words(name, pages):
    assert not re.search(r"\b(nan|None|inf|Undefined)\b", Outline(pages[name]).text)


# ---- prompts that leave nothing to change --------------------------------------------------------


def test_what_is_obeyed_and_left_alone_stands_beside_the_base(pages):
    text = Outline(pages["kept"]).text
    assert "words obeyed 1.000 ± 0.000 95 %: 1.000 to 1.000 0.250 ± 0.250" in text
    assert "words obeyed, unseen words 1.000 ± 0.000 one prompt: no interval 0.000" in text
    assert "untouched: DINO 1.000 by definition 0.810 ± 0.000" in text
    assert "untouched: pixel change 0.000 by definition 0.070" in text
    assert "implied words obeyed 1" not in text
    assert "If an image has several faces, only the largest counts." in text
    assert "occur in the kept prompts that the adapter was trained with" in text


def test_falling_short_is_said_in_words(pages, kept):
    text = Outline(pages["kept"]).text
    assert f"Warning: {warning(kept.shortfalls(), 'adapter')}." in text
    assert "words obeyed 0.250, base 1.000" in text
    assert "Warning" not in Outline(report_page(kept.reference)).text


def test_pictures_of_groups_say_what_was_asked_for(pages):
    outline = Outline(pages["kept"])
    assert "a red hat asks for: red" in outline.text
    alts = [image["alt"] for image in outline.all("img")]
    assert "a red hat, image 2, adapter" in alts
    assert "(empty prompt), image 1, base" in alts


def test_a_report_without_groups_has_no_section_for_them(page, pages):
    assert 'id="control"' in pages["kept"]
    assert 'id="control"' not in page


def test_compared_pages_have_columns_of_groups(pages):
    text = Outline(pages["kept compared"]).text
    assert "untouched: pixel change lower is better" in text
    assert "0.070 ± 0.000" in text


# ---- prompts -------------------------------------------------------------------------------------


def bar_heads(page: str) -> dict[str, list[str]]:
    """Class -> prompts of its chart, in order."""
    charts = {}
    section = page[page.index('id="prompts"') : page.index('id="worst-table"')]
    for part in re.split(r"<details(?: open)?>\s*<summary>", section)[1:]:
        name = part.partition("<")[0].strip()
        charts[name] = re.findall(r'<span class="bar-head">(.*?)</span>', part)
    return charts


def test_each_class_has_a_chart_of_all_prompts_the_worst_first(page, pair):
    charts = bar_heads(page)
    assert list(charts) == [f"{a.name}: {c}" for a in (HUE, TONE) for c in a.classes]
    shares = [p.attributes["tone"].frequencies["dark"] for p in pair.prompts]
    order = np.argsort([-abs(share - 0.75) for share in shares], kind="stable")
    names = ["baker", "tall judge", "nurse"]
    assert charts["tone: dark"] == [names[i] for i in order]


def test_bars_say_their_shares(page, pair):
    before, after = (
        f"{r.prompts[0].attributes['hue'].frequencies['red']:.0%}" for r in (pair.reference, pair)
    )
    assert f"baker base: {before} adapter: {after}" in Outline(page).text


def test_many_prompts_are_shown_on_demand():
    prompts = [f"a picture of person {i}" for i in range(WORST + 3)]
    page = report_page(report(prompts=prompts, attributes=(HUE,), samples={}))
    assert page.count("The other 3 prompts") == len(HUE.classes)
    assert page.count('class="bar-head"') == len(HUE.classes) * (WORST + 4)  # and the mean's
    assert "has no sample images" in page


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (PROMPTS, ("a picture of the ", ", at noon")),
        (["a judge", "a nurse"], ("", "")),  # too little to be worth it
        (["one prompt only, of a judge"], ("", "")),
        (["twice the same prompt"] * 2, ("twice the same ", "")),
        (["a long beginning of", "a long beginning of x"], ("a long beginning ", "")),
        (["", "a photo of a judge"], ("", "")),
    ],
)
def test_what_prompts_share(prompts, expected):
    start, end = prompt_template(prompts)
    assert (start, end) == expected
    assert all(p.startswith(start) and p.endswith(end) for p in prompts)


# ---- hostile input -------------------------------------------------------------------------------


def test_whatever_prompts_labels_and_classes_hold_is_text():
    attribute = Attribute(HOSTILE, (f"{HOSTILE}1", f"{HOSTILE}2"))
    what = {
        "prompts": [f"{HOSTILE} a", f"b {HOSTILE}"],
        "attributes": (attribute,),
        "provenance": {HOSTILE: {HOSTILE: HOSTILE}},
        "confusion": {HOSTILE: [[1, 0], [0, 1]]},
    }
    made = report(HOSTILE, reference=report(HOSTILE, **what), **what)
    entries = [Entry(label=f"{HOSTILE}{i}", group=HOSTILE, report=made) for i in range(2)]
    for page in (report_page(made), comparison_page(compare(entries))):
        outline = Outline(page)
        assert not outline.all("script")
        assert not [i for i in outline.all("img") if not i["src"].startswith("data:")]
        assert not [a for _, attrs in outline.elements for a in attrs if a.startswith("on")]
        assert HOSTILE in "".join(outline.texts)


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_fetched(name, pages):
    outline = Outline(pages[name])
    for _, attrs in outline.elements:
        for key in ("src", "href", "srcset", "data", "action"):
            assert (attrs.get(key) or "#").startswith(("#", "data:"))
    style = (TEMPLATES / "style.css").read_text("utf-8")
    assert "url(" not in style
    assert "@import" not in style
    policies = [m.get("content") for m in outline.all("meta") if "http-equiv" in m]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


# ---- pictures ------------------------------------------------------------------------------------


def test_a_picture_its_face_and_what_it_was_perceived_as():
    probabilities = np.tile([0.1, 0.83, 0.07], (24, 1))
    made = report(attributes=(HUE,), records={"probabilities": {"hue": probabilities}})
    outline = Outline(report_page(made))
    assert len(outline.all("img")) == 6  # two of three prompts
    box = outline.all("rect")[0]
    assert [float(box[k]) for k in ("x", "y", "width", "height")] == [2, 3, 8, 9]
    meters = [e for e in outline.all("span") if e.get("style", "").startswith("height:")]
    assert [(m["class"], m["style"]) for m in meters] == [("hue1", "height:83.0%")] * 6
    assert "hue: green 83%" in outline.text


def test_no_box_where_there_is_no_face():
    outline = Outline(report_page(report(records={"found": np.arange(24) % 2 == 1})))
    assert len(outline.all("rect")) == 2 * 3  # halo and box of the second of each prompt's two
    assert sum(img["alt"].endswith("no face found") for img in outline.all("img")) == 3


def test_large_pictures_are_made_smaller():
    page = report_page(report(prompts=["a judge"], side=2 * IMAGE_SIZE))
    image = Outline(page).all("img")[0]
    data = base64.b64decode(image["src"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (IMAGE_SIZE, IMAGE_SIZE)
    assert image["width"] == str(2 * IMAGE_SIZE)  # what boxes are measured in


def test_only_what_both_kept_is_paired():
    base = report("base", samples={0: np.zeros((1, 16, 16, 3), np.uint8)})
    images = Outline(report_page(report("adapter", reference=base))).all("img")
    assert [image["alt"] for image in images] == [
        "baker, image 1, base",
        "baker, image 1, adapter",
    ]


# ---- for every reader ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_structure(name, pages):
    outline = Outline(pages[name])
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    ids = [attrs["id"] for _, attrs in outline.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in outline.elements:
        assert attrs.get("aria-labelledby") in {None, *ids}
        assert attrs.get("href", "#main").removeprefix("#") in {*ids, "data:,"}
    assert all(image["alt"] for image in outline.all("img"))
    assert all("scope" in th for th in outline.all("th"))
    assert len(outline.all("caption")) == len(outline.all("table")) > 0
    regions = [e for e in outline.all("div") if e.get("role") == "region"]
    assert len(regions) == len(outline.all("table"))
    assert all(e["tabindex"] == "0" for e in regions)
    assert [outline.all(tag) != [] for tag in ("header", "nav", "main", "footer")] == [True] * 4


def colours() -> Iterator[dict[str, str]]:
    """Of the light and the dark scheme."""
    style = (TEMPLATES / "style.css").read_text("utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    named = [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in (light, dark)]
    yield named[0]
    yield named[0] | named[1]


def contrast(one: str, other: str) -> float:
    """Of WCAG 2: 1 to 21."""

    def luminance(colour: str) -> float:
        c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ WEIGHTS)

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


WEIGHTS = [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("scheme", list(colours()), ids=["light", "dark"])
def test_contrast(scheme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ground in ("page", "panel"):
        for text in ("ink", "soft", "link"):
            assert contrast(scheme[text], scheme[ground]) >= 4.5
        for mark in ("before", "after", "floor", "focus", "rule"):
            assert contrast(scheme[mark], scheme[ground]) >= 3
    for text in ("top-ink", "top-soft"):
        assert contrast(scheme[text], scheme["top"]) >= 4.5


# ---- in a browser --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_in_a_browser(name, width, scheme, pages, browser, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(pages[name], "utf-8")
    view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said, asked = [], []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(file.as_uri())
    view.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert view.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    ground = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(251, 251, 249)") == (scheme == "light")
    view.keyboard.press("Tab")
    assert view.evaluate("document.activeElement.className") == "skip"
    found = pytest.importorskip("axe_playwright_python.sync_playwright").Axe().run(view)
    assert found.response["violations"] == []
    assert len(found.response["passes"]) > 20
    view.close()
