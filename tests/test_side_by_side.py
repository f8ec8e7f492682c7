"""Tests of side_by_side.py, pytest's --jobs."""

import subprocess
import sys

import pytest

from helpers import ROOT

FILE = """
import pathlib
import pytest

@pytest.mark.parametrize("number", range(3))
def test_of_this_file(number):
    with open(pathlib.Path(__file__).with_suffix(".ran"), "a") as file:
        file.write(f"{number} ")
    assert pathlib.Path(__file__).name != "test_wrong.py" or number != 1
"""


def run(folder, *names):
    (folder / "conftest.py").write_text('pytest_plugins = ["side_by_side"]\n')
    for name in names:
        (folder / f"test_{name}.py").write_text(FILE)
    words = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", ".", "-o",
             f"pythonpath={ROOT / 'tests'}", "--jobs", "2"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_every_test_runs_once_whoever_takes_its_file(tmp_path):
    ran = run(tmp_path, "a", "b", "c")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [(tmp_path / f"test_{name}.ran").read_text() for name in "abc"] == ["0 1 2 "] * 3
    assert ran.stdout.count("passed") + ran.stdout.count("no tests ran") == 2


@pytest.mark.slow
def test_a_failure_of_either_process_is_one_of_the_command(tmp_path):
    ran = run(tmp_path, "a", "wrong")
    assert ran.returncode == 1 and "1 failed" in ran.stdout and "test_wrong" in ran.stdout
    assert (tmp_path / "test_a.ran").read_text() == "0 1 2 "


@pytest.mark.slow
def test_a_file_that_nobody_can_take_is_no_error(tmp_path):
    ran = run(tmp_path)
    assert ran.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
