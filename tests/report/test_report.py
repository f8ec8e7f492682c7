"""Tests of report/report.py."""

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

import evaluate
import polylora
from helpers import measured, places, record, refusal, sft_args, write_run
from metrics import pass_at_k, post_metrics
from report.limits import attainable
from report import pictures
from report import report
from report import runs as report_runs
from report.sets import record_metrics
from report.stats import interval
from report import summary
from support import files
from support.files import InputError
from support.student_t import t_quantile


def test_joint_completions_are_measured_as_whole_sets():
    """Two sets of three: Pass@3 is the mean of two yes or no; over all subsets of the six it
    would be another number, and other k have none. Diversity is within a set."""
    styles = [["warm"], [], ["warm"], [], [], ["dry"]]
    completions = ["a b", "c d", "e f", "a b", "a b", "a b"]
    joint = record(styles, n=6, drafts=completions, **{"set": 3})
    got, apart = record_metrics(joint,
                                ks=(1, 3, 5)), post_metrics(record(styles, n=6, drafts=completions),
                                                            ks=(3,))
    assert got["pass@3"] == pytest.approx((0.5 + 0.3) / 2) != pytest.approx(apart["pass@3"])
    assert not {"pass@1", "pass@5", "coverage@1", "longest@5"} & set(got)
    assert (got["coverage@3"] == pytest.approx(1 / 3) and got["stances"] == 1.0
            and got["valid"] == 0.5)
    assert got["distinct-1"] == pytest.approx((1 + 1 / 3) / 2)
    assert (got["duplicates"], got["truncated"]) == pytest.approx(((0 + 2 / 3) / 2, 1 / 6))
    for size in (4, 0, 2.0, None):
        with pytest.raises(ValueError, match="sets of"):
            record_metrics(joint | {"set": size}, ks=(3,))


# The report
@pytest.mark.slow
def test_a_joint_method_is_reported_with_the_others(runs, tmp_path):
    """Its Pass@3 alone; everything else of Pass@k is a dash, and a note says why."""
    decoding = {"name": "list", "independent": False, "set_size": 3}
    joint = write_run(tmp_path / "x0", 0, "poly <&> |@list", lambda i: 6, of="poly <&> |",
                      settings={"decoding": decoding, "adapter": "x"},
                      **{"set": 3})
    path = tmp_path / "b0" / "evaluation.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"settings": data["settings"] | {"adapter": "x"}}))
    summary = report.report([*runs, joint], tmp_path / "out", "lora-grpo")
    arm = summary["arms"]["poly <&> |@list"]["metrics"]
    assert arm["pass@3"]["mean"] == pytest.approx(0.25) and arm["pass@5"]["mean"] is None
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "joint sets of 3: Pass@3 is of whole sets" in text and "equal, bit for bit" not in text
    assert "pass@5 in" not in text
    for name in ("pass_at_k.svg", "pass1_pass5.svg"):
        ElementTree.parse(tmp_path / "out" / name)
    assert evaluate.main(["report", *runs, "--out", str(tmp_path / "few"), "--ks", "10,2"]) == 0
    assert json.loads((tmp_path / "few" / "report.json").read_text())["ks"] == [2, 10]
    assert not (tmp_path / "few" / "pass1_pass5.svg").exists()
    with pytest.raises(SystemExit):
        evaluate.main(["report", *runs, "--out", str(tmp_path / "few"), "--ks", "0,2"])


@pytest.mark.slow
def test_report_writes_what_was_measured(runs, tmp_path, capsys):
    out = tmp_path / "out" / "deep"
    assert evaluate.main(["report", *runs, "--out", str(out), "--against", "lora-grpo"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "report.json", "report.md", "report.txt", "report.csv", "pass_at_k.svg", "pass1_pass5.svg",
        "pass1_pass10.svg", "quality_diversity.svg", "report.html"}
    data = json.loads((out / "report.json").read_text())
    assert list(data["arms"]) == ["lora-grpo", "poly <&> |", "base"] and data["posts"] == 6
    lora, base = data["arms"]["lora-grpo"], data["arms"]["base"]
    valid = lora["metrics"]["valid"]
    assert lora["seeds"] == [0, 1] and valid["mean"] == pytest.approx(3.5 / 12)
    assert valid["per_seed"] == pytest.approx([2.5 / 12, 4.5 / 12])
    assert valid["sd_over_seeds"] == pytest.approx(2 / 12 / 2 ** 0.5)
    assert valid["low"] < valid["mean"] < valid["high"]
    want = interval([np.array([(2 + 2 * s + i % 2) / 12 for i in range(6)]) for s in (0, 1)],
                    [[f"p{i}" for i in range(6)]] * 2, True)
    assert (valid["low"], valid["high"]) == pytest.approx(want[1:], abs=1e-12)
    assert lora["metrics"]["pass@10"]["mean"] == pytest.approx(
        0.5 * np.mean([pass_at_k(12, c, 10) for c in (2, 3, 4, 5)]), abs=1e-12)
    assert base["metrics"]["distinct-2"] == {"mean": None, "posts_left_out": 6}
    assert base["metrics"]["valid"]["sd_over_seeds"] is None
    difference = data["differences"]["poly <&> |"]["valid"]
    # of seed 0 alone
    assert difference["mean"] == pytest.approx(3.5 / 12) and difference["low"] > 0
    assert difference["seeds"] == 1 and difference["p_holm"] >= difference["p"]
    assert "lora-grpo" not in data["differences"]
    assert data["pareto"] == ["poly <&> |"]
    assert data["stages"][0] == {"arm": "lora-grpo", "stage": "sft", "seconds": 10.5,
                                 "tokens_per_second": 100.0, "peak_bytes": 2.0 * 2 ** 30}
    text = (out / "report.txt").read_text()
    assert "distinct-2 in 6 posts of base" in text and "0.292 ±" in text
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 15 and "distinct-2" not in shown
    assert "poly <&> \\|" in (out / "report.md").read_text()
    assert {"limit, independent", "limit, joint"} <= set(re.findall(
        "limit, [a-z]+", (out / "pass_at_k.svg").read_text()))
    for name in ("pass_at_k.svg", "pass1_pass5.svg", "pass1_pass10.svg", "quality_diversity.svg"):
        page = (out / name).read_text()
        words_in = [element.text for element in ElementTree.fromstring(page).iter() if element.text]
        assert {"lora-grpo", "poly <&> |", "base"} <= set(words_in)
        # the namespace alone: nothing is fetched
        assert "href" not in page and page.count("http") == 1
        assert "nan" not in page


def test_settings_that_are_off_are_not_named(runs, tmp_path):
    for run in runs:
        path = Path(run) / "evaluation.json"
        whole = json.loads(path.read_text())
        whole["settings"] |= {"reward_model": None, "nf4": False, "dtype": "torch.float32",
                              "top_p": 1.0}
        path.write_text(json.dumps(whole))
    report.report(runs, tmp_path / "out")
    for name in ("report.txt", "report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "dtype float32, top_p 1.0" in text, name
        assert not any(word in text for word in ("None", "reward_model", "nf4", "torch.")), name


def test_report_of_few_completions_omits_what_n_cannot_show(tmp_path):
    folder = write_run(tmp_path / "few", 0, None, lambda i: 4)
    path = tmp_path / "few" / "evaluation.json"
    data = json.loads(path.read_text())
    data["records"] = [record(name=f"p{i}") for i in range(3)]
    path.write_text(json.dumps(data))
    assert report.report([folder], tmp_path / "out")["ks"] == [1, 2, 3]
    data["records"] = [record([["warm"]], name=f"p{i}", n=1) for i in range(3)]
    path.write_text(json.dumps(data))
    summary = report.report([folder], tmp_path / "out")
    assert summary["ks"] == [1] and summary["arms"]["few"]["metrics"]["pass@1"]["mean"] == 0.5


def refused(capsys, out, *arguments):
    """The one line of stderr of a report that must exit with 2 and write nothing."""
    assert evaluate.main(["report", *arguments, "--out", str(out)]) == 2
    message = capsys.readouterr()
    assert not out.exists() and message.out == ""
    assert message.err.startswith("error: ") and message.err.count("\n") == 1
    return message.err


def test_report_compares_like_with_like(runs, tmp_path, capsys):
    out = tmp_path / "out"
    fewer = write_run(tmp_path / "fewer", 0, "other", lambda i: 2, posts=5)
    message = refused(capsys, out, *runs, fewer)
    assert runs[0] in message and fewer in message and "the posts" in message
    changed = write_run(tmp_path / "changed", 0, "other", lambda i: 2, post="other text, same id")
    assert "the posts" in refused(capsys, out, *runs, changed)
    hotter = write_run(tmp_path / "hotter", 2, "lora-grpo", lambda i: 2,
                       settings={"temperature": 0.7})
    message = refused(capsys, out, *runs, hotter)
    assert runs[0] in message and hotter in message and "temperature (1.0 and 0.7)" in message
    assert "same arm and seed" in refused(capsys, out, *runs, runs[0])
    assert "lora-grpo, poly" in refused(capsys, out, *runs, "--against", "nobody")
    alone = write_run(tmp_path / "alone", 2, "lora-grpo", lambda i: 2, posts=1)
    assert "fewer than 2" in refused(capsys, out, alone)


EVALUATION = '{"version": 2, "domain": "d", "settings": {}, "records": %s}'


@pytest.mark.parametrize("name, content, said", [
    ("config.json", "{}", "seed"),
    ("config.json", '{"seed": true}', "seed"), ("config.json", "[1]", "a JSON"),
    ("config.json", '{"seed": 1, "arm": "a\\u0000b"}', "arm"), ("evaluation.json", "{", "JSON"),
    ("evaluation.json", '{"version": 1}', "version"),
    ("metrics.jsonl", '{"event": "end"}\noops', "line 2"),
    ("evaluation.json", None, "missing"),
    ("evaluation.json", EVALUATION % "[]", "fewer than 2"),
    ("evaluation.json", EVALUATION % "[{}]", "record 1"),
    ("evaluation.json", EVALUATION % "3", "records")])
def test_report_names_the_broken_file(runs, tmp_path, capsys, name, content, said):
    path = Path(runs[1]) / name
    path.unlink() if content is None else path.write_text(content)
    message = refused(capsys, tmp_path / "out", runs[1])
    assert said in message and (str(path) in message or "fewer" in said)


@pytest.mark.slow
def test_report_keeps_an_earlier_report_when_it_fails(runs, tmp_path, capsys):
    out = tmp_path / "out"
    report.report(runs, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert evaluate.main(["report", *runs, "nowhere", "--out", str(out)]) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(InputError):
        report.report(runs, Path(runs[0]) / "config.json")


@pytest.mark.slow
def test_seeds_may_have_posts_of_their_own(tmp_path):
    """Fresh posts for each seed: a t-interval over the seeds' means, and differences paired by
    seed."""
    runs = []
    for seed in (0, 1, 2):
        for arm in ("lora", "poly"):
            text = f"asked of seed {seed}"
            right = lambda i: (2 + i % 2 + seed) if arm == "lora" else 12 - seed
            runs.append(write_run(tmp_path / f"{arm}{seed}", seed, arm, right, post=text))
    summary = report.report(runs, tmp_path / "out", "lora")
    assert not summary["same_posts_for_all_seeds"]
    row = summary["arms"]["lora"]["metrics"]["valid"]
    half = t_quantile(2) * (1 / 12) / 3 ** 0.5
    assert (row["mean"] == pytest.approx(3.5 / 12) and row["high"] - row["mean"]
            == pytest.approx(half))
    gain = summary["differences"]["poly"]["valid"]
    gains = np.array([12 - s - (2.5 + s) for s in (0, 1, 2)]) / 12
    half = t_quantile(2) * gains.std(ddof=1) / 3 ** 0.5
    assert (gain["mean"], gain["p"]) == pytest.approx((gains.mean(), 2 / 8))
    assert gain["high"] - gain["mean"] == pytest.approx(half)
    said = report.report(runs, tmp_path / "out", "lora", endpoint=("poly", "lora"))["primary"]
    assert said[0].startswith("pass@5: poly is") and 1 <= len(said) <= 3
    text = (tmp_path / "out" / "report.txt").read_text()
    assert f"{said[0]}." in text
    # three seeds cannot reject anything: no p in any cell, and a sentence that says so
    assert "the smallest possible p is 0.25, before Holm's factor of 6" in text
    assert "] p " not in text and "after Holm" not in text
    said = report.report(runs, tmp_path / "out", "lora", endpoint=("lora", "poly"))["primary"]
    assert "not shown to be superior" in said[0] and len(said) == 1
    with pytest.raises(InputError, match="nobody"):
        report.report(runs, tmp_path / "out", "lora", endpoint=("nobody", "poly"))
    with pytest.raises(InputError, match="rival"):
        report.report(runs, tmp_path / "out", "lora", endpoint=("poly",))
    both = report.report(runs, tmp_path / "out", "lora",
                         endpoint=("poly", "lora", "poly"))["primary"]
    assert [note.split(":")[1].split()[-1] for note in both
            if note.startswith("pass@5")] == ["lora", "poly"]


@pytest.mark.slow
def test_the_limit_stands_beside_the_arms(runs, tmp_path):
    summary = report.report(runs, tmp_path / "out", "lora-grpo")
    limit = summary["limits"]["5"]
    assert limit["independent"] == pytest.approx(attainable((0.5, 0.3, 0.2), 5))
    assert limit["independent"] < limit["joint"] == pytest.approx(1)
    for arm in summary["arms"].values():
        valid = arm["metrics"]["valid"]["mean"]
        assert arm["limits"]["5"] == pytest.approx(attainable((0.5, 0.3, 0.2), 5, valid))
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "share of limit(1) @5" in text and "Coverage" in text
    # each arm's dotted line ends at the limit at its own validity, above the arm
    for k in (5, 10):
        page = (tmp_path / "out" / f"pass1_pass{k}.svg").read_text()
        lines = re.findall(r'stroke-dasharray="1 4" points="[\d.]+,([\d.]+) [\d.]+,([\d.]+)"', page)
        grid = re.findall(r'x="56.0" y="([\d.]+)"[^>]*>([\d.]+)<', page)
        (y0, v0), (y1, v1) = [(float(y) - 4, float(v)) for y, v in (grid[0], grid[-1])]
        value = lambda y: v0 + (float(y) - y0) * (v1 - v0) / (y1 - y0)
        assert len(lines) == len(summary["arms"])
        for (low, high), arm in zip(lines, summary["arms"].values()):
            assert value(low) == pytest.approx(arm["metrics"][f"pass@{k}"]["mean"], abs=0.002)
            assert value(high) == pytest.approx(arm["limits"][str(k)], abs=0.002)


def plain_run(folder, seed, arm, passed, scale):
    """A run in a domain without voices."""
    run = Path(write_run(folder, seed, arm, lambda i: 1))
    path = run / "evaluation.json"
    value = json.loads(path.read_text())
    for r in value["records"]:
        del r["voices"], r["readers"]
        r["passed"] = [True] * passed + [False] * (12 - passed)
    path.write_text(json.dumps(value | {"scale": scale}))
    return str(run)


def test_pass_at_k_is_hidden_where_most_replies_pass(tmp_path, capsys):
    """A LoRA of 3 steps had Pass@10 1.00: passing must be rare for a reply to another post, and
    the base must leave a margin."""
    good = {"people": 0.6, "shuffled": 0.05, "truncated": 0.3, "threshold": 0.4,
            "interval": [0.37, 0.4567]}
    runs = [plain_run(tmp_path / "base", 0, "base", 1, good),
            plain_run(tmp_path / "b", 0, "poly", 3, good)]
    summary = report.report(runs, tmp_path / "out", "base")
    text = (tmp_path / "out" / "report.txt").read_text()
    assert summary["refused"] is None and "pass@5" in text and "a shuffled one 5%" in text
    assert "the bar is a reward of 0.400, 95% interval by intents 0.370 to 0.457" in text
    assert "a held-out human one 60%" in text and "Drafts that pass" in text and "users" not in text
    assert "(of replies, this share passes" in (
        tmp_path / "out" / "report.md").read_text().partition("| arm")[0]
    for name, scale, passed in (("easy", good | {"shuffled": 0.4}, 1), ("full", good, 9)):
        runs = [plain_run(tmp_path / f"{name}0", 0, "base", passed, scale),
                plain_run(tmp_path / f"{name}1", 0, "poly", 10, scale)]
        summary = report.report(runs, tmp_path / name, "base", endpoint=("poly", "base"))
        text = (tmp_path / name / "report.txt").read_text()
        assert summary["refused"] in text and "pass@5" not in text.replace("Pass@", "")
        assert list(summary["differences"]["poly"]) == ["valid"] and "could see" not in text
        assert all(row["mean"] is None for n, row in summary["arms"]["poly"]["metrics"].items()
                   if n.partition("@")[0] in ("pass", "longest", "pick_random", "pick_reward"))
        assert summary["arms"]["poly"]["metrics"]["pass@5"]["mean"] is None
        ElementTree.parse(tmp_path / name / "pass_at_k.svg")
        summary = report.report(runs, tmp_path / name, "base", endpoint=("poly", "base"))
        assert set(summary["differences"]["poly"]) == {"valid"}                # nor indirectly
        assert not any("pass@" in note for note in summary["notes"] + summary["primary"])
        picks = [n for n in summary["arms"]["poly"]["metrics"] if n.startswith("pick_")]
        assert picks and all(summary["arms"]["poly"]["metrics"][n]["mean"] is None for n in picks)


def test_equal_adapters_and_warnings_are_named(tmp_path):
    """The polychromic and the GRPO arm once ended with LoRA's own adapter, and no word about it."""
    runs = [write_run(tmp_path / arm, 0, arm, lambda i: 3, settings={"adapter": "same"})
            for arm in ("lora", "poly")]
    log = tmp_path / "poly" / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"event": "end", "warnings": ["gated_D was 0"]})
                   + "\n")
    report.report(runs, tmp_path / "out")
    text = (tmp_path / "out" / "report.txt").read_text()
    assert ("lora (seed 0), poly (seed 0) are equal, bit for bit" in text
            and "poly: gated_D was 0" in text)


@pytest.mark.slow
def test_a_setting_without_effect_is_named(tmp_path):
    """poly@0.1 and poly@3 with one adapter between them were taken for one run at two
    temperatures, and so was an arm trained as x@1 but measured at another temperature than
    the rest."""
    run = lambda arm, heat=1.0, of=None, **own: write_run(
        tmp_path / f"{arm}-{heat}", 0, arm, lambda i: 3, of=of,
        settings={"temperature": heat} | own)
    again = run("poly@0.1@0.5", 0.5, of="poly@0.1", adapter="same")
    one = run("poly@0.1", adapter="same")
    report.report([one, again], tmp_path / "out")
    assert "equal, bit for bit" not in (tmp_path / "out" / "report.txt").read_text()
    report.report([one, again, run("poly@3", adapter="same")], tmp_path / "other")
    assert "poly@0.1 (seed 0), poly@3 (seed 0) are equal, bit for bit" in (
        tmp_path / "other" / "report.txt").read_text()
    for pair in ([one, run("x@1", 0.5)], [run("x@2", 0.5), run("y", 1.0)]):
        with pytest.raises(files.InputError, match="differ in temperature"):
            report.report(pair, tmp_path / "no")


def test_arms_are_paired_by_seed_whatever_their_order(tmp_path):
    """Paired by place, arms whose seeds differ or stand in another order would be compared
    across posts and seeds."""
    right = {3: 2, 5: 8, 7: 5}
    runs = [write_run(tmp_path / f"a{seed}", seed, "a", lambda i, seed=seed: right[seed] + 1)
            for seed in (5, 3)]
    runs += [write_run(tmp_path / f"b{seed}", seed, "b", lambda i, seed=seed: right[seed])
             for seed in (3, 7, 5)]
    arms = report_runs.group_runs(runs, (1, 5))
    for one in (arms["a"], arms["a"][::-1]):
        for other in (arms["b"], arms["b"][::-1]):
            row = summary.paired(one, other, "valid")
            assert row["seeds"] == 2 and row["mean"] == pytest.approx(1 / 12)
            # every seed and post differs by one draft
            assert row["low"] == pytest.approx(row["high"])
    assert summary.paired(arms["a"], [run for run in arms["b"] if run["seed"] == 7],
                          "valid") is None


def test_the_primary_endpoint_needs_the_interval_not_the_mean(tmp_path):
    """An arm whose mean is above the other's by chance alone is not shown to be superior."""
    def compared(name, rights):
        runs = []
        for arm, of in rights.items():
            runs += [write_run(tmp_path / f"{name}-{arm}{seed}", seed, arm, lambda i, c=c: c)
                     for seed, c in enumerate(of)]
        arms = report_runs.group_runs(runs, (1, 5, 10))
        return summary.primary(arms, "a",
                               "b"), {k: summary.paired(arms["a"], arms["b"], f"pass@{k}")
                                      for k in (1, 5, 10)}
    notes, rows = compared("chance", {"a": (1, 6, 3), "b": (3, 2, 1)})
    assert rows[5]["mean"] > 0.03 and rows[5]["low"] < 0
    assert (len(notes) == 1 and notes[0].startswith("pass@5: a is not shown to be superior to b")
            and notes[0].endswith("and what follows is not tested"))
    notes, rows = compared("clear", {"a": (3, 4, 3), "b": (1, 1, 1)})
    assert all(row["low"] > 0 for row in rows.values()) and "not shown" not in " ".join(notes)
    assert [note.split(":")[0] for note in notes] == ["pass@5", "pass@1", "pass@10"]
    assert "a is not inferior to b" in notes[1] and "margin 0.02" in notes[1]


def test_a_path_through_training_ends_with_the_whole_run(tmp_path):
    """grpo itself, of 120 steps, was drawn before its stops at 20 and 80; a weight's zero does
    stand first."""
    arms = [("grpo", 120), ("grpo@80", 80), ("grpo@20", 20), ("poly", 40), ("poly@1", 40)]
    summary = report.report([write_run(tmp_path / arm, 0, arm, lambda i: 3, steps=n)
                             for arm, n in arms], tmp_path / "out")
    assert pictures.curves_of({arm: arm for arm in summary["arms"]}, summary) == {
        "grpo": ["grpo@20", "grpo@80", "grpo"], "poly": ["poly", "poly@1"]}


def test_names_in_a_record_cannot_inject_markup(tmp_path, capsys):
    """Scores and settings are named by the file: a name with a line end began a row of the
    sheet, with a formula."""
    nasty = "a\n=cmd|x,\u202e\x1b[31m<u>|\u2067"
    for i, arm in enumerate(("one", "two")):
        write_run(tmp_path / arm, 0, arm, lambda post: 3 + i,
                  settings={"embedder": nasty, nasty: 1}, rewards=[0.5] * 12,
                  scores={nasty: [0.1] * 12, ",=1": [0.2] * 12})
    assert evaluate.main(["report", str(tmp_path / "one"), str(tmp_path / "two"),
                          "--out", str(tmp_path / "out")]) == 0
    rows = list(csv.reader((tmp_path / "out" / "report.csv").read_text().splitlines()))
    assert {len(row) for row in rows} == {6} and any("=cmd" in row[1] for row in rows)
    assert not any(cell.startswith(("=", "+", "@")) for row in rows for cell in row)
    shown = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()
             if path.suffix != ".json"}
    assert len(shown) > 5 and "<u>" not in shown["report.html"]
    for name, text in (shown | {"the screen": capsys.readouterr().out}).items():
        assert not set("\u202e\x1b\u2067") & set(text), name


# ---- Files with gaps -----------------------------------------------------------------------------

@pytest.mark.slow
def test_a_report_shows_sets_of_a_size_that_nobody_asked_for(root, capsys):
    """Pass@4 of beams in sets of 4 was in no table, and alone it was an IndexError."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    measured(capsys, w["lora"], "--data", w["eval"], "--decoder", "beams", "--set-size", "4",
             "--n", "12")
    assert evaluate.main(["report", w["lora"] + "@beams", "--out", str(root / "report")]) == 0
    assert json.loads((root / "report/report.json").read_text())["ks"] == [4]
    measured(capsys, w["lora"], "--data", w["eval"])
    assert "10 drafts a post, too few for any of --ks" in refusal(
        capsys, evaluate.main, "report", w["lora"], "--ks", "50", "--out", root / "never")


# ---- The report ----------------------------------------------------------------------------------

@pytest.mark.slow
def test_notes_of_unequal_seeds_say_whose_interval_is_over_what(tmp_path, capsys):
    """An arm of one seed was said to have an interval over seeds, and took away the warning of
    the others."""
    runs = []
    for arm, seeds in (("a", (1, 2, 3)), ("b", (1,)), ("c", (1, 2, 3))):
        for seed in seeds:
            runs.append(write_run(tmp_path / f"{arm}{seed}", seed, arm,
                                  lambda i: i % 3 + 2 * (arm == "c") + seed % 2,
                                  post=f"of seed {seed}"))
    assert evaluate.main(["report", *runs, "--out", str(tmp_path / "r"), "--against", "a"]) == 0
    out = " ".join((tmp_path / "r" / "report.txt").read_text().split())
    assert "of one seed, and so over posts alone: b" in out and "p values are left out" in out
    assert "--primary needs pass@5" in refusal(capsys, evaluate.main, "report", *runs,
                                               "--out", tmp_path / "r", "--ks", "1,3",
                                               "--primary", "c", "a")


# ---- Drafts and embeddings -----------------------------------------------------------------------

def test_the_report_says_how_completions_were_sampled_and_truncated(world, tmp_path,
                                                                    capsys):  # noqa: F811
    """E2, E6: n, temperature, the longest draft, entropy and the share of drafts cut off."""
    measure = ["measure", "--model", world["model"], "--base-out", str(tmp_path / "bare"),
               "--data", world["eval"], "--n", "10",
               "--max-new-tokens", "5"]
    assert (evaluate.main(measure) == 0
            and evaluate.main(["report", str(tmp_path / "bare"), "--out", str(tmp_path / "r")])
            == 0)
    text = (tmp_path / "r" / "report.txt").read_text()
    header = next(line.split() for line in text.splitlines() if line.startswith("arm ")
                  and "truncated" in line)
    assert "entropy" in header and "n 10, temperature 1.0" in text and "max_new_tokens 5" in text
    known = json.loads((tmp_path / "r" / "report.json").read_text())["arms"]["base"]["metrics"]
    records = files.read_object(tmp_path / "bare" / "evaluation.json")["records"]
    cut = [not whole for r in records for whole in r["finished"]]
    assert (known["truncated"]["mean"] == pytest.approx(sum(cut) / len(cut))
            and known["entropy"]["mean"] > 0)
    capsys.readouterr()
    assert (evaluate.main([*measure, "--temperature", "0"]) == 2
            and "one draft" in capsys.readouterr().err)
