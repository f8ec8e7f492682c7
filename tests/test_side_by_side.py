"""Tests of side_by_side.py, pytest's --jobs."""

import subprocess
import sys
from pathlib import Path

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
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).with_name(f"test_{Path(name).name}.py").write_text(FILE)
    words = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-c", "/dev/null",
             "--rootdir", ".", "-o", f"pythonpath={ROOT / 'tests'}", "--jobs", "2"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_every_test_runs_once_whoever_takes_its_file(tmp_path):
    """A process skips files of one folder and goes on in the next: nothing of a folder is left set
    up."""
    names = [f"{folder}/{name}" for folder in "xyz" for name in "abc"]
    ran = run(tmp_path, *names)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    written = [path.read_text() for path in tmp_path.rglob("*.ran")]
    assert written == ["0 1 2 "] * len(names)
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
