"""Tests of the page, the sheets that people fill, the prompt and the trackers: no model, no network."""

import csv
import io
import json
import random
import re
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import evaluate  # noqa: E402
import people  # noqa: E402
from files import InputError, Tracker  # noqa: E402
from metrics import near_duplicates  # noqa: E402
from test_evaluate import record, write_run  # noqa: E402

HOSTILE = "<script>alert(1)</script>"


# ---- The page ------------------------------------------------------------------------------------

class Page(HTMLParser):
    """What a page consists of: its tags with their attributes, texts outside style and script, balance."""

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
    drafts = [HOSTILE, "a kind word", "A kind word!", "\u202egnp.exe\x1b[31m", "\" onload=\"alert(2)",
              "</style></script><img src=http://x.y/z>", *(f"draft {i}" for i in range(6))]
    path = Path(write_run(folder, seed, arm, lambda i: 3 + i % 3, drafts=drafts, post=f"{HOSTILE} said one"))
    lines = [{"step": s, "ce": 2.0 - s / 9} for s in range(1, 9)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return str(path)


def test_the_page_holds_every_run_loads_nothing_and_takes_no_markup(tmp_path):
    runs = [hostile_run(tmp_path / f"{arm}{seed}", seed, arm) for arm in ("poly@0.1", "poly@0.3", HOSTILE.replace("/", "|"))
            for seed in (1, 2)]
    evaluate.report(runs, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and [t for t, _ in page.tags].count("script") == 1  # ours alone
    shown = "\n".join(page.words)
    for run in runs:
        assert data.printable(run) in shown
    assert HOSTILE in shown and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    for tag, attributes in page.tags:
        assert tag not in ("img", "link", "iframe", "object", "embed", "audio", "video", "image", "use")
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "href", "srcset", "action", "data"), (tag, name)
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)
    sections = [a for t, a in page.tags if a.get("class") == "post"]
    assert len(sections) == 12 and sum("near" in a.get("class", "").split() for _, a in page.tags) == 12 * 3
    assert "prefers-color-scheme:dark" in text and "@media print" in text
    curves = json.loads((tmp_path / "out" / "report.json").read_text())["curves"]
    assert curves[0]["name"] == "ce" and len(curves[0]["arms"]) == 3 and (tmp_path / "out" / "curve_training_ce.svg").exists()


def test_near_duplicates_by_hand():
    texts = ["the cat sat on the mat", "The cat sat on the mat!", "the dog sat on the mat", "a b", "", " ", "😀", "😀", "🎉"]
    assert near_duplicates(texts) == [None, 0, 0, None, None, 4, None, 6, None]
    assert near_duplicates(["one two three four", "one two three five"]) == [None, None]  # 6 of 8: 0.75


# ---- People's picks ------------------------------------------------------------------------------

def wide_run(folder, arm, posts):
    """A measured run whose drafts carry their number and post, not their arm."""
    path = Path(write_run(folder, 1, arm, lambda i: 1, posts=2))
    records = [record([["warm"]] * 12, name=f"p{i}", n=12, intent=f"about {i // 2}",
                      drafts=[f"=draft {n}, \"quoted\"\n{arm[::-1]} on {i}" for n in range(12)]) for i in range(posts)]
    whole = json.loads((path / "evaluation.json").read_text())
    (path / "evaluation.json").write_text(json.dumps(whole | {"records": records}))
    return str(path)


def filled(sheet, key, rater, weights, delimiter=","):
    """The sheet as a rater with these preferences hands it back, in Excel's manner."""
    draw, rows = random.Random(rater), list(csv.reader(io.StringIO(sheet.lstrip("\ufeff"))))
    for item, about in key["items"].items():
        sets = list(about["sets"])
        pick = draw.choices(sets, [weights[about["sets"][s]] for s in sets])[0]
        for row in rows:
            if row[:2] == [item, pick]:
                row[-1] = "x"
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return "\ufeff" + out.getvalue()


def test_known_preferences_are_recovered_within_their_intervals(tmp_path, capsys):
    runs = [wide_run(tmp_path / a, a, 120) for a in ("base", "lora", "poly")]
    sheet = tmp_path / "picks.csv"
    assert evaluate.main(["ask", *runs, "--out", str(sheet), "--k", "3", "--posts", "0"]) == 0
    text = sheet.read_text(encoding="utf-8")
    key = json.loads((tmp_path / "picks.key.json").read_text())
    assert len(key["items"]) == 120 and len({tuple(i["sets"].values()) for i in key["items"].values()}) == 6
    rows = list(csv.DictReader(io.StringIO(text.lstrip("\ufeff"))))
    assert len(rows) == 360 and all(row["draft 3"].startswith("'=draft") and row["pick"] == "" for row in rows)
    assert not any(word in text for word in ("lora", "poly", "base"))          # blind
    for row in rows:
        name, about = key["items"][row["item"]]["sets"][row["set"]], key["items"][row["item"]]["id"]
        assert row["draft 1"].endswith(f"{name[::-1]} on {about[1:]}")
    truth = {"base": 0.15, "lora": 0.3, "poly": 0.55}
    files = []
    for rater in range(3):
        files.append(tmp_path / f"rater{rater}.csv")
        files[-1].write_text(filled(text, key, rater, truth, ";" if rater == 1 else ","), encoding="utf-8", newline="")
    capsys.readouterr()
    assert evaluate.main(["picks", *map(str, files), "--key", str(tmp_path / "picks.key.json"), "--out", str(tmp_path / "r")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["picks"] == 360 and result["raters"] == 3 and result["posts"] == 120 and result["left_out"] == 0
    for name, rate in truth.items():
        row = result["runs"][name]
        assert row["low"] < rate < row["high"] and 0.05 < row["high"] - row["low"] < 0.2
    assert abs(result["fleiss_kappa"]) < 0.12                                   # the raters are independent
    assert sum(row["rate"] for row in result["runs"].values()) == pytest.approx(1)
    assert capsys.readouterr().out == (tmp_path / "r.txt").read_text()


def test_sheets_that_do_not_fit_are_named(tmp_path, capsys):
    runs = [wide_run(tmp_path / a, a, 4) for a in ("lora", "poly")]
    sheet = str(tmp_path / "s.csv")
    assert evaluate.main(["ask", runs[0], "--out", sheet]) == 2
    assert evaluate.main(["ask", *runs, "--out", sheet, "--k", "13"]) == 2
    assert not Path(sheet).exists()
    assert evaluate.main(["ask", *runs, "--out", sheet]) == 0
    assert evaluate.main(["picks", sheet]) == 2                                 # nobody picked
    text = Path(sheet).read_text(encoding="utf-8")
    for changed, said in ((text.replace('"set"', '"sat"'), "no column"), (text.replace('""\n', '"x"\n'), "two sets of item"),
                          (text.replace('"1","A"', '"77","A"').replace('""\n', '"x"\n'), "no such item")):
        capsys.readouterr()
        Path(sheet).write_text(changed, encoding="utf-8", newline="")
        assert evaluate.main(["picks", sheet]) == 2 and said in capsys.readouterr().err
    assert evaluate.main(["picks", str(tmp_path / "other.csv")]) == 2


def test_fleiss_kappa_by_hand():
    assert people.fleiss_kappa([[2, 0], [0, 2]]) == 1 and people.fleiss_kappa([[1, 1], [1, 1]]) == -1
    assert people.fleiss_kappa([[3, 0], [2, 1], [0, 3]]) == pytest.approx((7 / 9 - 41 / 81) / (1 - 41 / 81))
    assert people.fleiss_kappa([[2, 0], [2, 0]]) is None and people.fleiss_kappa([[1, 0], [0, 1]]) is None


# ---- The prompt and the trackers -----------------------------------------------------------------

def test_the_prompt_keeps_picks_that_sft_reads(tmp_path):
    said, place = [], tmp_path / "picks.jsonl"
    lines = ["My cat sings\n", "7\n", "zwei\n", "3\n", "...\n", "Not this one\n", "\n", "Another\n", "1\n", "\n", "never read\n"]
    people.converse(lambda post: ["Nice cat", "nice cat!", f"Sing, {post}"], "runs/a", place, lines, said.append)
    kept = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
    assert [(k["post"], k["pick"]) for k in kept] == [("My cat sings", 2), ("Another", 0)]
    assert all(k["reply"] == k["drafts"][k["pick"]] and k["run"] == "runs/a" for k in kept)
    assert "2. nice cat!   (like 1)" in said and sum("is no number" in s for s in said) == 2
    posts = data.load_posts(place)
    assert [(p.post, p.replies) for p in posts] == [("My cat sings", ("Sing, My cat sings",)), ("Another", ("Nice cat",))]
    people.converse(lambda post: [HOSTILE], "runs/a", place, ["one"], said.append)      # the input ends in the middle
    assert len(place.read_text().splitlines()) == 2


@pytest.mark.parametrize("kind", Tracker.PACKAGES)
def test_a_tracker_gets_the_numbers_of_each_step(kind, tmp_path, monkeypatch):
    got = []
    fake = types.ModuleType(kind)
    fake.SummaryWriter = lambda place: types.SimpleNamespace(
        add_scalar=lambda name, value, step: got.append((name, value, step)), flush=lambda: None)
    fake.init = lambda **about: types.SimpleNamespace(
        log=lambda numbers, step: got.extend((n, v, step) for n, v in numbers.items()))
    monkeypatch.setitem(sys.modules, Tracker.PACKAGES[kind], fake)
    tracker = Tracker(kind, tmp_path, {})
    tracker.log({"step": 3, "ce": 1.5, "grad_norm": None, "stage": "sft"})
    tracker.log({"event": "end", "seconds": 9.0})
    assert got == [("ce", 1.5, 3)]
    monkeypatch.setitem(sys.modules, Tracker.PACKAGES[kind], None)                      # not installed
    with pytest.raises(InputError, match=f"the package {kind} is not installed"):
        Tracker.package(kind)
