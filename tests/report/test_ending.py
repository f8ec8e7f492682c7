"""Tests of report/ending.py: what a report prints, and which p values it shows."""

import re
from pathlib import Path

import pytest

from helpers import write_run
from report import report, runs as report_runs, summary
from report.stats import least_p, sign_flip


ARMS = {"base": 1, "lora": 3, "sft-gem": 3, "sft-ba-lora": 3, "poly-dpp": 4, "lora-grpo": 4,
        "dpp-grpo": 6, "lora-passk": 5}


def study(folder, seeds=(1, 2, 3), arms=tuple(ARMS)):
    """Folders of measured runs of the bare study's arms, each with its own number of right
    drafts."""
    made = []
    for seed in seeds:
        for arm in arms:
            run = Path(write_run(folder / f"seed{seed}" / arm, seed, arm,
                                 lambda i, c=ARMS[arm]: min(12, c + (i + seed) % 2)))
            if arm != "base":
                (run / "adapter").mkdir()
            made.append(str(run))
    return made


@pytest.mark.slow
def test_the_bare_study_ends_in_at_most_25_lines(tmp_path, capsys):
    """One table, a sentence of verdict, where the rest is, the next command: it ended in some
    eighty lines of tables."""
    out = tmp_path / "report"
    report.report(study(tmp_path), out, "lora-grpo", endpoint=("dpp-grpo", "lora-passk"))
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= 25 and max(map(len, shown[:11])) <= 100
    assert re.fullmatch(r"method +Pass@1 +Pass@5 +Pass@10 +D", shown[2])
    assert [line.split()[0] for line in shown[3:11]] == list(ARMS)
    assert re.fullmatch(r"dpp-grpo( +\d\.\d{3} ±\d\.\d{3}){3} +\d\.\d{3}", shown[9])
    verdict, = (line for line in shown if line.startswith("Verdict: "))
    assert "dpp-grpo is superior to lora-passk" in verdict
    assert any(f"Look at {out / 'report.html'}" in line and str(out / "report.txt") in line
               for line in shown)
    assert shown[-1].startswith(f"Next: python evaluate.py drafts {tmp_path / 'seed1/dpp-grpo'}")
    text = (out / "report.txt").read_text()
    assert len(text.splitlines()) > 60 and "Standard deviation over seeds" in text
    page = (out / "report.html").read_text()
    assert "dpp-grpo is superior to lora-passk" in page and "Standard deviation over seeds" in page


@pytest.mark.slow
def test_the_verdict_without_a_primary_endpoint(tmp_path, capsys):
    runs = study(tmp_path, arms=("base", "lora", "sft-gem", "dpp-grpo"))
    report.report(runs, tmp_path / "r", "lora")
    shown = capsys.readouterr().out
    assert "pass@5 is higher for dpp-grpo and lower for base, against lora" in shown
    assert str(tmp_path / "seed1/dpp-grpo") in shown
    report.report(runs, tmp_path / "s")
    shown = capsys.readouterr().out
    assert "3 methods share the highest Pass@10, 0.500; differences with intervals" in shown
    report.report(runs[:2], tmp_path / "one")
    assert "Verdict: lora has the highest Pass@10, 0.500" in capsys.readouterr().out
    report.report(study(tmp_path / "b", arms=("base",)), tmp_path / "t")
    assert "Next: more seeds" in capsys.readouterr().out


@pytest.mark.parametrize("n", [2, 5, 8, 17, 20])
def test_the_smallest_p_is_that_of_equal_signs(n):
    p = sign_flip([1.0] * n)
    assert p == pytest.approx(least_p(n)) if n <= 16 else least_p(n) <= p < 20 * least_p(n)


@pytest.mark.slow
@pytest.mark.parametrize("seeds, p", [(3, False), (11, True)])
def test_p_values_are_shown_where_they_could_reject(tmp_path, capsys, seeds, p):
    """Six tests: after Holm 11 seeds can give p = 0.006, three seeds 1."""
    runs = study(tmp_path, range(seeds), ("lora", "dpp-grpo"))
    found = summary.summarise(report_runs.group_runs(runs), "lora")
    assert found["can_reject"] is p
    report.report(runs, tmp_path / "r", "lora")
    text = (tmp_path / "r" / "report.txt").read_text()
    assert ("] p 0." in text, "p after Holm" in text, "p values are left out" in text) == (p, p,
                                                                                         not p)


@pytest.mark.slow
def test_a_warning_of_a_run_is_in_the_ending(tmp_path, capsys):
    runs = study(tmp_path, arms=("lora", "dpp-grpo"))
    with open(Path(runs[0]) / "metrics.jsonl", "a") as file:
        file.write('{"event": "end", "stage": "measure", "warnings": ["valid is 0: look"]}\n')
    report.report(runs, tmp_path / "r")
    assert "Note: lora: valid is 0: look." in capsys.readouterr().out
