"""Tests of report/page.py."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers import HOSTILE, write_run
from report.limits import below_limit
from report import pictures
from report import report
from report import svg
from support import files


def polygons(page):
    """[[(x, y), ..] of each band] of a picture."""
    return [[tuple(map(float, point.split(","))) for point in element.get("points").split()]
            for element in ElementTree.fromstring(page).iter() if element.tag.endswith("polygon")]


@pytest.mark.slow
def test_bands_and_bars_stay_where_a_metric_can_be(tmp_path):
    """Two posts and two seeds give intervals far below 0 and above 1: they are drawn to the
    edge, no further, and the numbers stay. Each arm has a band along its k; one with a single
    k has whiskers."""
    runs = [write_run(tmp_path / f"{arm}{seed}", seed, arm, lambda i: (some + 6 * seed) * (i % 2),
                      posts=2)
            for arm, some in (("few", 1), ("many", 6)) for seed in (0, 1)]
    summary = report.report(runs, tmp_path / "out")
    rows = [row for arm in summary["arms"].values() for name, row in arm["metrics"].items()
            if name in ("pass@5", "valid")]
    assert min(row["low"] for row in rows) < -0.5 and max(row["high"] for row in rows) > 1.5
    for name in ("pass_at_k.svg", "pass1_pass5.svg", "quality_diversity.svg"):
        page = (tmp_path / "out" / name).read_text()
        labels = [float(e.text) for e in ElementTree.fromstring(page).iter()
                  if e.get("text-anchor") == "end"
                  and e.text.replace(".", "").replace("-", "").isdecimal()]
        assert min(labels) == 0 and max(labels) == 1, (name, labels)
    bands = polygons((tmp_path / "out" / "pass_at_k.svg").read_text())
    assert [len(band) for band in bands] == [2 * len(summary["ks"])] * 2
    joint = write_run(tmp_path / "joint", 0, "few@list", lambda i: 3, of="few", posts=2,
                      **{"set": 3},
                      settings={"decoding": {"name": "list", "independent": False, "set_size": 3}})
    report.report([*runs, joint], tmp_path / "out")
    assert len(polygons((tmp_path / "out" / "pass_at_k.svg").read_text())) == 2


@pytest.mark.slow
def test_methods_of_one_setting_are_connected_in_its_order(tmp_path):
    """poly@0.1, @1 and @10 and poly itself, first: in both pictures, however they lie and
    however they are given."""
    runs = [write_run(tmp_path / f"r{n}", 0, arm, lambda i: right, semantic=spread)
            for n, (arm, right, spread) in enumerate([("poly@10", 2, 0.1), ("poly", 3, 0.6),
                                                      ("other", 5, 0.5),
                                                      ("poly@0.1", 6, 0.2), ("poly@1", 4, 0.4)])]
    report.report(runs, tmp_path / "out")
    for name in ("pass1_pass5.svg", "quality_diversity.svg"):
        root = ElementTree.parse(tmp_path / "out" / name).getroot()
        line, = [e.get("points").split() for e in root.iter() if e.tag.endswith("polyline")
                 and e.get("stroke") == svg.COLOURS[0] and e.get("stroke-width") == "1"]
        heights = [float(point.split(",")[1]) for point in line]
        assert (len(line) == 4 and sorted(range(4), key=lambda i: heights[i])
                == [1, 2, 0, 3]), (name, heights)


@pytest.mark.slow
def test_a_method_is_placed_by_its_temperature_and_its_name_may_hold_an_at(tmp_path):
    """x@1 at T = 1 lay before x@1@0.5 and x@1@1.6, all three at 1; so did its curve's colours
    and names."""
    runs = [write_run(tmp_path / f"r{n}", 0, arm, lambda i: right, settings={"temperature": heat},
                      of="x@1" if arm.startswith("x@1@") else None)
            for n, (arm, right, heat) in enumerate([("x@1", 4, 1.0), ("x@1@1.6", 2, 1.6),
                                                    ("x@1@0.5", 6, 0.5), ("y@beams", 3, 1.0),
                                                    ("z@0.3", 2, 1.0), ("z@3", 5, 1.0)])]
    summary = report.report(runs, tmp_path / "out")
    assert pictures.knobs(summary) == {
        "x@1": ("x@1", 1.0), "x@1@1.6": ("x@1", 1.6), "x@1@0.5": ("x@1", 0.5),
        "y@beams": ("y@beams", -math.inf), "z@0.3": ("z", 0.3), "z@3": ("z", 3.0)}
    curves = pictures.curves_of({arm: arm for arm in summary["arms"]}, summary)
    assert curves == {"x@1": ["x@1@0.5", "x@1", "x@1@1.6"], "z": ["z@0.3", "z@3"]}
    assert pictures.looks(summary) == {"x@1": 0, "x@1@1.6": 0, "x@1@0.5": 0, "y@beams": 1,
                                       "z@0.3": 2, "z@3": 2}


@pytest.mark.slow
def test_many_arms_are_named_by_their_methods(tmp_path):
    arms = ["base", *(f"x@{n}" for n in range(12)), "z", *(f"z@{n}" for n in range(12))]
    runs = [write_run(tmp_path / f"r{n}", 0, arm, lambda i: 1 + n % 6)
            for n, arm in enumerate(arms)]
    report.report(runs, tmp_path / "out")
    for name in ("pass1_pass5.svg", "quality_diversity.svg"):
        root = ElementTree.parse(tmp_path / "out" / name).getroot()
        said = [e.text for e in root.iter() if "paint-order" in e.attrib]
        assert (sorted(said) == ["base", "x", "z"]
                and "1 4" not in {e.get("stroke-dasharray") for e in root.iter()})


def test_the_area_between_a_curve_and_the_limit_by_hand(tmp_path):
    """The front falls from (.2, .9) to (.6, .5); the curve, from (.1, .4) to (.5, .4), lies .5
    under its flat part, then .5 to .2: (.1 * .5 + .3 * .35) / .4. Order does not matter."""
    limit = [(0.2, 0.9), (0.6, 0.5)]
    assert below_limit([(0.5, 0.4), (0.1, 0.4)], limit[::-1]) == pytest.approx(0.3875, abs=1e-3)
    assert (below_limit([(0.5, 0.4), (0.3, 0.8), (0.1, 0.4)], limit) < 0.3
            and below_limit(limit, limit) == 0)
    runs = [write_run(tmp_path / f"r{n}", 0, arm, lambda i: right) for n, (arm, right) in enumerate(
        [("poly", 3), ("poly@1", 5), ("alone", 4)])]
    report.report(runs, tmp_path / "out")
    note, = [x for x in (tmp_path / "out" / "report.md").read_text().splitlines()
             if "Mean height of the limit" in x]
    said = [float(x) for x in re.findall(r"\d\.\d+", note)]
    summary = json.loads((tmp_path / "out" / "report.json").read_text())
    curve = [[summary["arms"][arm]["metrics"][f"pass@{k}"]["mean"] for k in (1, 5)]
             for arm in ("poly", "poly@1")]
    assert said == pytest.approx([below_limit(curve, summary["front"]), curve[0][0], curve[1][0]],
                                 abs=1e-3)
    assert "alone" not in note and said[0] > 0.05


@pytest.mark.slow
def test_a_report_links_the_pictures_that_it_has(runs, tmp_path):
    for ks in ((1, 2, 3, 5, 10), (1, 5), (2, 3)):
        out = tmp_path / str(len(ks)) / str(ks[0])
        report.report(runs, out, ks=ks)
        linked = set(re.findall(r"\]\(([\w.]+)\)", (out / "report.md").read_text()))
        assert linked == {path.name for path in out.glob("*.svg")} and "pass_at_k.svg" in linked


# ---- The page ------------------------------------------------------------------------------------

class Page(HTMLParser):
    """What a page consists of: its tags with their attributes, texts outside style and script,
    balance."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(text)


def hostile_run(folder, seed, arm):
    completions = [HOSTILE, "a kind word", "A kind word!", "\u202egnp.exe\x1b[31m",
                   "\" onload=\"alert(2)", "</style></script><img src=http://x.y/z>",
                   *(f"draft {i}" for i in range(6))]
    path = Path(write_run(folder, seed, arm, lambda i: 3 + i % 3, drafts=completions,
                          post=f"{HOSTILE} said one"))
    lines = [{"step": s, "ce": 2.0 - s / 9} for s in range(1, 9)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return str(path)


@pytest.mark.slow
def test_the_page_holds_every_run_loads_nothing_and_takes_no_markup(tmp_path):
    runs = [hostile_run(tmp_path / f"{arm}{seed}", seed, arm)
            for arm in ("poly@0.1", "poly@0.3", HOSTILE.replace("/", "|"))
            for seed in (1, 2)]
    report.report(runs, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and [t for t, _ in page.tags].count("script") == 1  # ours alone
    shown = "\n".join(page.words)
    for run in runs:
        assert files.printable(run) in shown
    assert HOSTILE in shown and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    for tag, attributes in page.tags:
        assert tag not in ("img", "link", "iframe", "object", "embed", "audio", "video", "image",
                           "use")
        for name, value in attributes.items():
            assert (not name.startswith("on")
                    and name not in ("src", "href", "srcset", "action", "data")), (tag, name)
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)
    sections = [a for t, a in page.tags if a.get("class") == "post"]
    assert (len(sections) == 12 and sum("near" in a.get("class", "").split() for _, a in page.tags)
            == 12 * 3)
    assert "prefers-color-scheme:dark" in text and "@media print" in text
    curves = json.loads((tmp_path / "out" / "report.json").read_text())["curves"]
    assert (curves[0]["name"] == "ce" and len(curves[0]["arms"]) == 3
            and (tmp_path / "out" / "curve_training_ce.svg").exists())
