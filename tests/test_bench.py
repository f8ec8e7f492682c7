"""The benchmark runs: its figures are for a person on a quiet machine to read, not for a test."""

import json
import subprocess
import sys
from pathlib import Path


def test_the_measure_of_many_drafts_runs(monkeypatch, capsys):
    import bench_measure
    import torch
    monkeypatch.setitem(bench_measure.DECODERS, "sampling", bench_measure.DECODERS["sampling"])
    assert bench_measure.one(100, torch.get_num_threads()) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["drafts"] == 100 and min(row["measure"], row["report"], row["processor"], row["written"]) > 0


def test_quick_run_prints_a_table_and_writes_every_time(tmp_path):
    file = tmp_path / "bench.json"
    bench = Path(__file__).with_name("bench.py")
    run = subprocess.run([sys.executable, bench, "--quick", "--json", file], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report, cases = json.loads(file.read_text()), ["generate", "grpo", "sft", "pocket", "pocket-16"]
    assert [c["case"] for c in report["cases"]] == cases
    assert all(len(times) == 2 for c in report["cases"] for times in c["seconds"].values())
    assert len(report["checks"]) >= 3 and all(c["passed"] for c in report["checks"])
    last = run.stdout.splitlines()[-len(cases) - 1:]
    assert last[0].startswith("case") and len({len(line) for line in last}) == 1
