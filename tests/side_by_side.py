"""pytest --jobs N: N processes share out the test files; each takes the next that is left."""

import argparse
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

NO_TESTS = int(pytest.ExitCode.NO_TESTS_COLLECTED)


def pytest_addoption(parser):
    parser.addoption("--jobs", type=int, default=1,
                     help="processes that run test files side by side (default: 1)")
    parser.addoption("--taken", help=argparse.SUPPRESS)   # folder: an entry for each file taken


def pytest_cmdline_main(config):
    """Run the same command in --jobs processes. The first one's output is shown as it comes, the
    others' when they end."""
    jobs = config.getoption("jobs")
    if jobs < 2 or config.option.collectonly:
        return None
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "pytest", *config.invocation_params.args, "--jobs=1",
                 f"--taken={folder}"]    # with =, so that pytest takes no value for a test's path
        first = subprocess.Popen(words)
        others = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                  for _ in range(jobs - 1)]
        codes = [first.wait()]
        for process in others:
            said, _ = process.communicate()
            sys.stdout.flush()
            sys.stdout.buffer.write(said)
            codes.append(process.returncode)
    ran = [code for code in codes if code != NO_TESTS]    # one may find no file left
    return max(ran, key=abs, default=NO_TESTS)


@cache
def take(folder, path):
    """Is the test file this process's?"""
    try:
        os.mkdir(Path(folder) / str(path).replace(os.sep, "+"))
    except FileExistsError:
        return False
    return True


def pytest_collection_modifyitems(config, items):
    """The small files of the folders last: they fill up what the large ones leave."""
    if config.getoption("taken"):
        items.sort(key=lambda item: len(item.path.parts))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    folder = item.config.getoption("taken")
    if folder and not take(folder, item.path):
        return True                          # nothing to do: another process runs it
    return None
