"""pytest --jobs N: N processes share out the test files; each takes the next that is left."""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
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


def take(folder, path):
    """Is the test file this process's?"""
    try:
        os.mkdir(Path(folder) / str(path).replace(os.sep, "+"))
    except FileExistsError:
        return False
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Run the files that this process takes. The small ones of the folders come last: they fill up
    what the large ones leave."""
    folder = session.config.getoption("taken")
    if not folder or session.testsfailed:    # collecting failed: pytest's own loop says so
        return None
    items = sorted(session.items, key=lambda item: len(item.path.parts))
    for path, of_file in itertools.groupby(items, key=lambda item: item.path):
        if not take(folder, path):
            continue
        of_file = list(of_file)
        for item, following in zip(of_file, [*of_file[1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
    return True
