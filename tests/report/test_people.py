"""Tests of report/people.py."""

import csv
import io
import json
import random
from pathlib import Path

import pytest

import data
import evaluate
from helpers import HOSTILE, record, write_run
from report import people
from report import report
from report.tables import csv_cell
from support import picks
from support.words import near_duplicates


def test_a_sheet_cannot_inject_formulas(tmp_path):
    run = write_run(tmp_path / "x", 0, "=cmd|' /C calc'!A0", lambda i: 3)
    report.report([run], tmp_path / "out")
    sheet = (tmp_path / "out" / "report.csv").read_text().splitlines()
    assert len(sheet) > 10 and all(line.startswith('"\'=cmd') for line in sheet[1:])
    risky = ["=1", "+1", "-1", "@a", " =1", "\t=1", "\r\n=1", "\u3000=1", "\uff1d1", "=\"\"",
             "\u202e=1"]
    cells = [csv_cell(text) for text in risky]
    assert all(c[1] in "'\ufffd" for c in cells) and csv_cell('a "b", =c') == '"a ""b"", =c"'


# ---- The page ------------------------------------------------------------------------------------

def test_near_duplicates_by_hand():
    texts = ["the cat sat on the mat", "The cat sat on the mat!", "the dog sat on the mat", "a b",
             "", " ", "😀", "😀", "🎉"]
    assert near_duplicates(texts) == [None, 0, 0, None, None, 4, None, 6, None]
    # 6 of 8: 0.75
    assert near_duplicates(["one two three four", "one two three five"]) == [None, None]


# ---- People's picks ------------------------------------------------------------------------------

def wide_run(folder, arm, posts):
    """A measured run whose drafts carry their number and post, not their arm."""
    path = Path(write_run(folder, 1, arm, lambda i: 1, posts=2))
    records = [record([["warm"]] * 12, name=f"p{i}", n=12, intent=f"about {i // 2}",
                      drafts=[f"=draft {n}, \"quoted\"\n{arm[::-1]} on {i}" for n in range(12)])
               for i in range(posts)]
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


@pytest.mark.slow
def test_known_preferences_are_recovered_within_their_intervals(tmp_path, capsys):
    runs = [wide_run(tmp_path / a, a, 120) for a in ("base", "lora", "poly")]
    sheet = tmp_path / "picks.csv"
    assert evaluate.main(["ask", *runs, "--out", str(sheet), "--k", "3", "--posts", "0"]) == 0
    text = sheet.read_text(encoding="utf-8")
    key = json.loads((tmp_path / "picks.key.json").read_text())
    assert (len(key["items"]) == 120
            and len({tuple(i["sets"].values()) for i in key["items"].values()}) == 6)
    rows = list(csv.DictReader(io.StringIO(text.lstrip("\ufeff"))))
    assert (len(rows) == 360 and all(row["draft 3"].startswith("'=draft") and row["pick"] == ""
                                     for row in rows))
    assert not any(word in text for word in ("lora", "poly", "base"))          # blind
    for row in rows:
        name, about = key["items"][row["item"]]["sets"][row["set"]], key["items"][row["item"]]["id"]
        assert row["draft 1"].endswith(f"{name[::-1]} on {about[1:]}")
    truth = {"base": 0.15, "lora": 0.3, "poly": 0.55}
    files = []
    for rater in range(3):
        files.append(tmp_path / f"rater{rater}.csv")
        files[-1].write_text(filled(text, key, rater, truth, ";" if rater == 1 else ","),
                             encoding="utf-8", newline="")
    capsys.readouterr()
    assert evaluate.main(["picks", *map(str, files), "--key", str(tmp_path / "picks.key.json"),
                          "--out", str(tmp_path / "r")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["picks"] == 360 and result["raters"] == 3 and result["posts"] == 120
            and result["left_out"] == 0)
    for name, rate in truth.items():
        row = result["runs"][name]
        assert row["low"] < rate < row["high"] and 0.05 < row["high"] - row["low"] < 0.2
    # the raters are independent
    assert abs(result["fleiss_kappa"]) < 0.12
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
    for changed, said in ((text.replace('"set"', '"sat"'), "no column"),
                          (text.replace('""\n', '"x"\n'), "two sets of item"),
                          (text.replace('"1","A"', '"77","A"').replace('""\n', '"x"\n'),
                           "no such item")):
        capsys.readouterr()
        Path(sheet).write_text(changed, encoding="utf-8", newline="")
        assert evaluate.main(["picks", sheet]) == 2 and said in capsys.readouterr().err
    assert evaluate.main(["picks", str(tmp_path / "other.csv")]) == 2


def test_fleiss_kappa_by_hand():
    assert (people.fleiss_kappa([[2, 0], [0, 2]]) == 1 and people.fleiss_kappa([[1, 1], [1, 1]])
            == -1)
    assert people.fleiss_kappa([[3, 0], [2, 1],
                                [0, 3]]) == pytest.approx((7 / 9 - 41 / 81) / (1 - 41 / 81))
    assert (people.fleiss_kappa([[2, 0], [2, 0]]) is None
            and people.fleiss_kappa([[1, 0], [0, 1]]) is None)


# ---- The prompt and the trackers -----------------------------------------------------------------

def test_the_prompt_keeps_picks_that_sft_reads(tmp_path):
    said, place = [], tmp_path / "picks.jsonl"
    lines = ["My cat sings\n", "7\n", "zwei\n", "3\n", "...\n", "Not this one\n", "\n", "Another\n",
             "1\n", "\n", "never read\n"]
    picks.converse(lambda post: ["Nice cat", "nice cat!", f"Sing, {post}"], "runs/a", place, lines,
                   said.append)
    kept = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
    assert [(k["post"], k["pick"]) for k in kept] == [("My cat sings", 2), ("Another", 0)]
    assert all(k["reply"] == k["drafts"][k["pick"]] and k["run"] == "runs/a" for k in kept)
    assert "2. nice cat!   (like 1)" in said and sum("is no number" in s for s in said) == 2
    posts = data.load_posts(place)
    assert [(p.post, p.replies) for p in posts] == [("My cat sings", ("Sing, My cat sings",)),
                                                    ("Another", ("Nice cat",))]
    # the input ends in the middle
    picks.converse(lambda post: [HOSTILE], "runs/a", place, ["one"], said.append)
    assert len(place.read_text().splitlines()) == 2
