"""The tools of this folder run: benchmarks, the fault harness, hostile files."""

import ast
import json
import os
import subprocess
import sys

import pytest

from helpers import ROOT


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="trials are forked")
def test_kills_at_random_instants_do_not_change_the_adapter():
    """The short form of tests/faults.py."""
    ran = subprocess.run([sys.executable, "tests/faults.py", "--trials", "5", "--seed", "1"],
                         cwd=ROOT, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                         timeout=600)
    assert ran.returncode == 0 and "5 of 5" in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of the address space")
def test_hostile_files_do_no_harm():
    """A hundred mutants of each of six kinds: the short form of tests/hostile.py."""
    ran = subprocess.run([sys.executable, "tests/hostile.py", "--count", "100", "--seed", "1"],
                         cwd=ROOT, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                         timeout=600)
    assert ran.returncode == 0 and ran.stdout.count(" 0 faults") == 6, ran.stdout + ran.stderr


@pytest.mark.slow
def test_the_measure_of_many_drafts_runs(monkeypatch, capsys):
    import bench_measure
    import torch
    monkeypatch.setitem(bench_measure.DECODERS, "sampling", bench_measure.DECODERS["sampling"])
    assert bench_measure.one(100, torch.get_num_threads()) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["drafts"] == 100 and min(row["measure"], row["report"], row["processor"],
                                         row["written"]) > 0)


@pytest.mark.slow
def test_the_measure_of_many_drafts_prints_a_line_for_each_number(capfd):
    import bench_measure
    assert bench_measure.main(["--drafts", "100,150", "--threads", "1"]) == 0
    rows = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert rows[0][0] == "drafts" and [row[0] for row in rows[1:]] == ["100", "150"]


@pytest.mark.slow
def test_quick_run_prints_a_table_and_writes_every_time(tmp_path):
    file = tmp_path / "bench.json"
    bench = (ROOT / "tests").joinpath("bench.py")
    run = subprocess.run([sys.executable, bench, "--quick", "--json", file], capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    report, cases = json.loads(file.read_text()), ["generate", "grpo", "sft", "pocket", "pocket-16"]
    assert [c["case"] for c in report["cases"]] == cases
    assert all(len(times) == 2 for c in report["cases"] for times in c["seconds"].values())
    assert len(report["checks"]) >= 3 and all(c["passed"] for c in report["checks"])
    last = run.stdout.splitlines()[-len(cases) - 1:]
    assert last[0].startswith("case") and len({len(line) for line in last}) == 1


@pytest.mark.slow
def test_the_lists_of_what_is_changed_name_functions_that_are_there():
    import mutate
    for table in (mutate.REGISTRIES, mutate.CORE):
        for file, names in table.items():
            top_level = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
            assert set(names.split()) <= {mutate.name_of(top) for top in top_level}, file
