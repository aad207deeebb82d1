"""The report: its pictures say what the numbers say, and it needs nothing but itself."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline import convert, report
from thermocline.activity.accumulator import Accumulator
from thermocline.activity.drawing import Axis, Plot, heat_colour, layer_marks, mixed, percents, share_axis
from thermocline.activity.pictures import activity_pictures, predictor_pictures
from thermocline.activity.predictor import save_predictor
from thermocline.activity.report import page
from thermocline.activity.statistics import Activity
from thermocline.activity.store import save_activity
from thermocline.errors import FingerprintError, ModelFormatError, OutputError, UsageError
from thermocline.files.gguf import GgufFile
from thermocline.files.open import open_model
from thermocline.files.sidecar import SidecarKind, write_sidecar

MODEL, OTHER = "ab" * 32, "cd" * 32
SVG = "{http://www.w3.org/2000/svg}"
ALWAYS = ["ranked", "heat", "active", "coverage"]
HOSTILE = '<script>alert("x")</script>&'


def counted(name: str = "tiny", layers: int = 3, neurons: int = 500) -> Activity:
    random = np.random.default_rng(8)
    accumulator = Accumulator(Activity.empty(MODEL, name, layers, neurons), np.ones((layers, neurons)))
    often = random.uniform(0, 0.3, neurons)
    accumulator.begin_sequence()
    for layer in range(layers):
        accumulator.ffn_hidden(layer, (random.random((40, neurons)) < often).astype(np.float32))
    return accumulator.result(({"id": "r"},))


def write_predictor(path: Path, info: object, fingerprint: str = MODEL) -> Path:
    write_sidecar(path, SidecarKind.PREDICTOR, fingerprint, info, {"x": np.zeros(2)})
    return path


LAYERS = [{"rank": 32 * (i + 1), "recall": 0.97, "energy_recall": 0.99, "precision": 0.6 + 0.1 * i} for i in range(3)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_activity(counted(), tmp_path / "x.activity.safetensors")
    return tmp_path / "x.activity.safetensors"


class Page(HTMLParser):
    """The tags of a page, its figures and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "figure":
            self.figures.append(dict(attrs)["id"])


def test_the_page_has_its_pictures_and_needs_nothing_else(saved: Path, tmp_path: Path) -> None:
    predictor = write_predictor(tmp_path / "p", {"layers": LAYERS, "audit": {"kl": 0.0031}, "note": "made here"})
    written = report(saved, tmp_path / "r.html", predictor=predictor)
    assert written == [tmp_path / "r.html"]
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.figures == [*ALWAYS, "sizes", "locality", "predictor", "predictor_rank"]
    assert page.tags.count("svg") == len(page.figures)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(page.tags)
    assert not re.search(r"(https?:)?//\w|url\(|@import", text)
    assert not {"href", "src", "srcset", "xlink:href"} & {name for name, _ in page.attributes}
    for words in ("audit.kl", "0.0031", "made here", "default-src 'none'", f"{counted().coverage(0.8)[1] * 100:.1f}"):
        assert words in text


def test_a_page_says_where_the_tokens_are_not_known() -> None:
    """As in PowerInfer's files, which only count."""
    fired = np.arange(12).reshape(3, 4) + 1
    known = Activity.from_counts(MODEL, "tiny", fired, 12)
    assert "watched over 12 tokens<" in page(known, [], None, [])
    told = page(replace(known, tokens_known=False), [], None, [])
    assert "watched over at least 12 tokens<" in told
    assert "<b>at least 12</b>" in told
    assert "<b>at most 54.2" in told


def test_a_report_without_a_predictor(saved: Path, tmp_path: Path) -> None:
    report(saved, tmp_path / "r.html")
    assert Page((tmp_path / "r.html").read_text()).figures == [*ALWAYS, "sizes", "locality"]


def test_the_predictor_beside_an_activity_is_drawn_with_it(saved: Path, tmp_path: Path) -> None:
    beside = write_predictor(tmp_path / "x.predictor.safetensors", {"layers": LAYERS})
    report(saved, tmp_path / "r.html")
    assert Page((tmp_path / "r.html").read_text()).figures == [
        *ALWAYS,
        "sizes",
        "locality",
        "predictor",
        "predictor_rank",
    ]
    (tmp_path / "other").mkdir()
    report(saved, tmp_path / "r.html", predictor=write_predictor(tmp_path / "other" / "p", {"note": "named"}))
    assert "named" in (tmp_path / "r.html").read_text()
    assert "predictor_rank" not in (tmp_path / "r.html").read_text()
    write_predictor(beside, {"layers": LAYERS}, OTHER)
    told: list[str] = []
    report(saved, tmp_path / "r.html", notice=told.append)
    assert Page((tmp_path / "r.html").read_text()).figures == [*ALWAYS, "sizes", "locality"]
    (line,) = told
    assert line.startswith("no predictor is drawn: ")
    assert "x.predictor.safetensors: belongs to the model" in line


@pytest.fixture
def model(tiny_model: Path, oracle: Any, tmp_path: Path) -> Path:
    """A model with its activity and its predictor inside."""
    with open_model(tiny_model) as source:
        fingerprint = source.fingerprint
        save_predictor(oracle(source), tmp_path / "p", fingerprint)
    counts = Activity.from_counts(fingerprint, "tiny", np.arange(192).reshape(2, 96), 200)
    save_activity(counts, tmp_path / "a")
    convert(tiny_model, tmp_path / "m.gguf", activity=tmp_path / "a", predictor=tmp_path / "p")
    return tmp_path / "m.gguf"


def test_the_predictor_inside_a_model_is_drawn_with_its_audit(model: Path, saved: Path, tmp_path: Path) -> None:
    page, told = tmp_path / "r.html", list[str]()
    report(model, page, notice=told.append)
    assert Page(page.read_text()).figures[-1] == "predictor_rank"
    (line,) = told
    assert line.startswith("how well the predictor does is not drawn")
    with GgufFile.open(model) as file:
        fingerprint = file.fingerprint
    audit = tmp_path / "m.audit.safetensors"
    write_sidecar(audit, SidecarKind.AUDIT, fingerprint, {"audit": {"layers": LAYERS[:2]}}, {})
    for named in (None, model):
        told.clear()
        report(model, page, predictor=named, notice=told.append)
        assert Page(page.read_text()).figures[-2:] == ["predictor_audit", "predictor_rank"]
        assert told == []
    with pytest.raises(FingerprintError, match="give the predictor of the model that was profiled"):
        report(saved, page, predictor=model)


def test_a_model_without_a_predictor_inside_is_told(saved: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no predictor inside"):
        report(saved, tmp_path / "r.html", predictor=tiny_model)


def test_only_pages_and_pictures_are_replaced(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    report(saved, tmp_path / "r.html", pictures=folder)
    report(saved, tmp_path / "r.html", pictures=folder)
    content = saved.read_bytes()
    with pytest.raises(UsageError, match="is there and is no page of HTML: name another file with -o"):
        report(saved, saved)
    assert saved.read_bytes() == content
    (folder / "heat.svg").write_text("mine")
    with pytest.raises(UsageError, match=r"heat\.svg is there and is no picture in SVG"):
        report(saved, tmp_path / "new.html", pictures=folder)
    assert (folder / "heat.svg").read_text() == "mine"
    assert not (tmp_path / "new.html").exists()


def test_pictures_are_files_of_their_own(saved: Path, tmp_path: Path) -> None:
    predictor = write_predictor(tmp_path / "p", {"layers": LAYERS})
    written = report(saved, None, predictor=predictor, pictures=tmp_path / "deep" / "pictures")
    assert [path.stem for path in written] == [*ALWAYS, "sizes", "locality", "predictor", "predictor_rank"]
    for path in written:
        root = ET.parse(path).getroot()
        assert root.tag == f"{SVG}svg"
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for shape in root.iter(f"{SVG}rect"):
            x, y = float(shape.attrib.get("x", 0)), float(shape.attrib.get("y", 0))
            assert -1 <= x <= x + float(shape.attrib["width"]) <= width + 1
            assert -1 <= y <= y + float(shape.attrib["height"]) <= height + 1


def test_names_from_files_are_text_and_nothing_else(tmp_path: Path) -> None:
    save_activity(counted(HOSTILE), tmp_path / "x")
    predictor = write_predictor(tmp_path / "p", {HOSTILE: HOSTILE, "deep": {HOSTILE: 1.5}, "layers": LAYERS})
    report(tmp_path / "x", tmp_path / "r.html", predictor=predictor)
    text = (tmp_path / "r.html").read_text()
    assert "script" not in Page(text).tags
    assert text.count("&lt;script&gt;") >= 4


@pytest.mark.parametrize(
    "layers",
    [None, [], {}, "x", [1, 2], [{}], [{"recall": None}], [{"recall": True}], [{"recall": "0.9"}], [{"rank": -1}]],
)
def test_a_predictor_that_tells_nothing_useful_draws_nothing(layers: object) -> None:
    assert predictor_pictures({"layers": layers}) == []


def test_layers_that_tell_less_than_others_leave_gaps() -> None:
    pictures = predictor_pictures({"layers": [{"recall": 0.9}, {}, {"recall": 1e300}, {"recall": 0.8, "rank": 5}]})
    assert [picture.name for picture in pictures] == ["predictor", "predictor_rank"]
    assert all("nan" not in picture.svg and "inf" not in picture.svg for picture in pictures)


@pytest.mark.parametrize("activity", [
    Activity.empty(MODEL, "nothing", 2, 3),
    Activity.from_counts(MODEL, "one neuron", np.ones((1, 1), int), 1),
    Activity.from_counts(MODEL, "deep", np.ones((150, 4), int), 3),
    counted(neurons=3), counted(layers=1), counted(layers=2, neurons=1001),
], ids=lambda a: f"{a.n_layer}x{a.n_ff}")  # fmt: skip
def test_pictures_of_unusual_activities_are_drawings_too(activity: Activity) -> None:
    for picture in activity_pictures(activity):
        assert "nan" not in picture.svg
        ET.fromstring(picture.svg)


def test_another_models_predictor_is_refused(saved: Path, tmp_path: Path) -> None:
    predictor = write_predictor(tmp_path / "p", {}, OTHER)
    with pytest.raises(FingerprintError, match="not to tiny"):
        report(saved, tmp_path / "r.html", predictor=predictor)
    with pytest.raises(ModelFormatError, match="kind activity; needed is one of kind predictor"):
        report(saved, tmp_path / "r.html", predictor=saved)
    assert not (tmp_path / "r.html").exists()


def test_a_folder_that_cannot_be_made_is_told(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        report(saved, None, pictures=tmp_path / "file" / "below")


def test_a_curve_goes_where_its_numbers_are() -> None:
    plot = Plot("t", Axis(0, 10, "x", ()), Axis(0, 1, "y", ()), width=190, height=216, right=28)
    assert (plot.across(0), plot.across(10), plot.down(0), plot.down(1)) == (62, 162, 162, 62)
    plot.line([0, 5, 6, 10], [0, 0.5, np.nan, 1], "#000000")
    assert 'd="M62.0 162.0L112.0 112.0M162.0 62.0"' in plot.svg()
    plot.bars([0.5], ("#123456",), width=1)
    assert '<rect x="57.00" y="112.00" width="10.00" height="50.00" fill="#123456"/>' in plot.svg()


def test_a_heat_map_covers_its_frame_once() -> None:
    values = np.random.default_rng(1).random((4, 30))
    plot = Plot("t", Axis(0, 1, "x", ()), Axis(3.5, -0.5, "y", ()))
    plot.heat(values, 0, 1)
    boxes = re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H[\d.]+Z", plot.svg())
    area = sum((float(r) - float(x)) * (float(b) - float(t)) for x, t, r, b in boxes)
    assert area == pytest.approx(plot.inner_width * plot.inner_height, rel=1e-3)
    flat = Plot("t", Axis(0, 1, "x", ()), Axis(0.5, -0.5, "y", ()))
    flat.heat(np.array([[0.0, 0, 0, 1, 1]]), 0, 1)
    assert len(re.findall("M62.0 ", flat.svg())) == 1
    assert heat_colour(0) in flat.svg()
    assert heat_colour(1) in flat.svg()


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]),
        (0, 0.05, ["0 %", "1 %", "2 %", "3 %", "4 %", "5 %"]),
        (0.5, 1, ["50 %", "60 %", "70 %", "80 %", "90 %", "100 %"]),
    ],
)
def test_marks_are_round(low: float, high: float, wanted: list[str]) -> None:
    assert [text for _, text in percents(low, high)] == wanted


def test_axes_hold_their_values() -> None:
    for values in ([0.093], [0.0], [np.nan], [0.999], [1.0], [0.003, 0.02]):
        axis = share_axis(values, "share")
        assert axis.low == 0
        assert max(v for v in [*values, 0] if not np.isnan(v)) <= axis.high <= 1
        assert 2 <= len(axis.marks) <= 8
    for count in (1, 6, 12, 13, 80, 126, 1000):
        assert 1 <= len(layer_marks(count)) <= 13
    assert mixed("#000000", "#ff8000", 0.5) == "#804000"
