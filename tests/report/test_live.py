"""Tests of report/live.py: the page of a study while it runs."""

import json
import threading
import time
from pathlib import Path

import pytest

import evaluate
from helpers import refusal, write_run
from report import commands, live


def begin(folder, seed, arm, steps=10, **config):
    folder.mkdir(parents=True)
    settings = {"seed": seed, "arm": arm, "steps": steps, "command": "sft"} | config
    (folder / "config.json").write_text(json.dumps(settings))


def train(folder, upto, seconds=2.0):
    lines = [{"step": i + 1, "ce": 4 - i / 10, "D": 0.5, "seconds": seconds} for i in range(upto)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines)
                                          + '{"step": 99, "ce"')       # is just being written


def measure(folder, seed, arm, right):
    """As if the run had been measured: its evaluation, and only that."""
    made = Path(write_run(folder.parent / f"made-{seed}-{arm}", seed, arm, lambda i: right))
    log = folder / "metrics.jsonl"
    if log.exists():
        log.write_text(log.read_text().rpartition("\n")[0] + "\n")    # its last line is whole
    (folder / "evaluation.json").write_text((made / "evaluation.json").read_text())


def follow(monkeypatch, *moments):
    """In place of each wait, the next of the moments happens; -> the page as each of them finds
    it."""
    pages = []
    left = list(moments)

    def sleep(seconds):
        pages.append(Path("report/report.html").read_text())
        left.pop(0)()
    monkeypatch.setattr(live.time, "sleep", sleep)
    return pages


@pytest.mark.slow
def test_the_page_follows_a_study_until_every_run_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lora, poly = tmp_path / "lora", tmp_path / "poly"
    pages = follow(
        monkeypatch,
        lambda: (begin(lora, 1, "lora"), train(lora, 4), begin(poly, 1, "poly")),
        lambda: (measure(lora, 1, "lora", 3), train(poly, 6, 30.0)),
        lambda: (poly / "done.json").write_text("{}"),
        lambda: measure(poly, 1, "poly", 5))
    assert commands.main(["lora", "poly", "--live", "--every", "7", "--against", "lora"]) == 0
    waiting, training, half, trained = pages
    assert all('http-equiv="refresh" content="7"' in page for page in pages)
    assert waiting.count("waiting") == 2 and "0 of 2 runs are measured" in waiting
    assert "step 4 of 10, 2 s a step" in training and "12 s" in training and "begun" in training
    assert "ce 3.700, D 0.500" in training and "<svg" in training and "Pass@1" not in training
    assert "1 of 2 runs are measured" in half and "step 6 of 10, 30 s a step" in half
    assert "2 min" in half and "pass@5" in half and "Drafts side by side" in half
    assert "trained, not measured yet" in trained
    last = Path("report/report.html").read_text()
    assert "refresh" not in last and "Difference from lora" in last
    assert set(json.loads(Path("report/report.json").read_text())["arms"]) == {"lora", "poly"}
    shown = capsys.readouterr().out
    assert "Look at report/report.html: it is rebuilt every 7 s" in shown and "Verdict" in shown


@pytest.mark.slow
def test_a_study_s_folder_stands_for_its_runs_and_is_complete_with_its_report(tmp_path,
                                                                             monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = tmp_path / "study"
    begin(study / "seed1" / "base-model", 1, "base-model", command="base")
    begin(study / "seed1" / "lora", 1, "lora")
    found = live.find_runs(["study"])
    assert found == ([Path("study/seed1/lora")], True)
    pages = follow(monkeypatch, lambda: measure(study / "seed1" / "lora", 1, "lora", 3),
                   lambda: begin(study / "seed2" / "lora", 2, "lora"),
                   lambda: measure(study / "seed2" / "lora", 2, "lora", 4),
                   lambda: ((study / "report").mkdir(),
                            (study / "report" / "report.json").write_text("{}")))
    # what measure() makes beside a run would be found, too
    monkeypatch.setattr(live, "runs_below", lambda folder, find=live.runs_below: [
        run for run in find(folder) if "made" not in run.name])
    assert commands.main(["study", "--live"]) == 0
    assert ["1 of 1" in pages[1], "1 of 2" in pages[2], "2 of 2" in pages[3]] == [True] * 3
    assert json.loads(Path("report/report.json").read_text())["arms"]["lora"]["seeds"] == [1, 2]


def test_ctrl_c_leaves_the_page_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def stop():
        raise KeyboardInterrupt
    follow(monkeypatch, lambda: begin(tmp_path / "lora", 1, "lora"), stop)
    assert commands.main(["lora", "--live"]) == 0
    page = Path("report/report.html").read_text()
    assert "begun" in page and "refresh" not in page
    assert "stopped: report/report.html" in capsys.readouterr().out


def test_runs_that_cannot_be_compared_are_a_sentence_on_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", 1, "a", lambda i: 3)
    write_run(tmp_path / "b", 1, "b", lambda i: 3, settings={"temperature": 0.5})
    pages = follow(monkeypatch, lambda: write_run(tmp_path / "c", 1, "c", lambda i: 3))
    assert commands.main(["a", "b", "c", "--live"]) == 2         # as the report does in the end
    assert "differ in temperature" in pages[0] and "0 of" not in pages[0]


@pytest.mark.slow
def test_a_short_interval(tmp_path, monkeypatch):
    """The clock is not replaced: the page is there while the run is, and it ends by itself."""
    monkeypatch.chdir(tmp_path)
    run, page = tmp_path / "lora", Path("report/report.html")
    codes = []
    follower = threading.Thread(target=lambda: codes.append(
        evaluate.main(["report", "lora", "--live", "--every", "0.05"])), daemon=True)
    follower.start()

    def wait_for(text):
        end = time.monotonic() + 60
        while not (page.exists() and text in page.read_text()):
            assert time.monotonic() < end
            time.sleep(0.02)
    wait_for("waiting")
    begin(run, 1, "lora")
    wait_for("begun")
    train(run, 3)
    wait_for("step 3 of 10")
    measure(run, 1, "lora", 3)
    follower.join(60)
    assert codes == [0] and "refresh" not in page.read_text()


@pytest.mark.parametrize("every", ["0", "-1", "nan"])
def test_an_interval_is_above_zero(tmp_path, capsys, every):
    assert "--every" in refusal(capsys, commands.main, tmp_path, "--live", "--every", every)
