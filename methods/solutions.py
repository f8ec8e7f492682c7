"""The known solutions of tasks of code: each is run once, under its own tests.

A sandbox that lacks a package, or cannot pass a value on, silently judges every completion wrong;
the known solution shows it before anything is trained."""

import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from methods import sandbox
from methods.sandbox import program_of, run_program
from support.files import InputError, file_hash, write_json


PATIENCE = 30                    # seconds of the second try: three times what a completion has

MANY = 100                       # if there are more, a message says that they run: it takes a while

MOST_KEPT = 50_000               # passes remembered: more than the public sets have tasks


def failing_solutions(posts, allowed):
    """{place of a task: why its known solution fails}. Those that passed before, with the same
    Python, numpy and sandbox, are not run again. One that fails is run once more, alone and with
    more time, because a busy machine may be the reason."""
    known = remembered()
    jobs = {}
    for place, post in enumerate(posts):
        job = job_of(post)
        mark = mark_of(job)
        if mark not in known:
            jobs[place] = mark, job
    if len(jobs) > MANY:
        print(f"running {len(jobs)} known solutions, once", file=sys.stderr)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ran = pool.map(lambda each: run(each[1], allowed), jobs.values())
        first = dict(zip(jobs, ran))
    failing = {}
    for place, verdict in first.items():
        if not verdict.passed:
            verdict = run(jobs[place][1], allowed, seconds=PATIENCE)
        if not verdict.passed:
            failing[place] = verdict.why or "no reason"
    passed = [mark for place, (mark, _) in jobs.items() if place not in failing]
    if passed:
        remember([*known, *passed])
    return failing


def job_of(post):
    """run_program's arguments for a task's known solution."""
    tests = json.loads(post.tests)
    place = post.styles.index("right") if "right" in post.styles else 0
    program = program_of(post.replies[place], tests.pop("head"), tests["names"])
    return tests | {"program": program}


def run(job, allowed, **limits):
    return run_program(allowed=allowed, **job, **limits)


def mark_of(job):
    """The key by which a pass is remembered: a hash of all that it depends on."""
    try:
        numpy = version("numpy")
    except PackageNotFoundError:
        numpy = None
    parts = [job, sys.version, numpy, file_hash(sandbox.__file__)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cache_file():
    """The file that remembers passes, in XDG_CACHE_HOME or in .cache of the user's home."""
    place = os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache"
    return Path(place) / "polychromic-lora" / "known-solutions.json"


def remembered():
    """{mark: None} of what has passed; empty if the file cannot be read."""
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict.fromkeys(found) if isinstance(found, list) else {}


def remember(marks):
    """Write what has passed. If the file cannot be written, the solutions are only run again."""
    try:
        write_json(cache_file(), marks[-MOST_KEPT:])
    except (InputError, OSError):
        pass
