"""Files in HumanEval's or MBPP's format, every task of them: the known solution must pass, an empty
one must not.

    python tests/check_tasks.py HumanEval.jsonl.gz mbpp.jsonl.gz --allow-code-execution

Minutes on two cores. Exit code 1 when any task went wrong; each is named."""

import argparse
import gzip
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json  # noqa: E402

from methods import sandbox  # noqa: E402
from support import posts  # noqa: E402
from methods.code import allow_code_flag  # noqa: E402


def judge(line, number, allowed):
    """(id, does the known solution pass, does an empty one pass, why not)."""
    post = posts.parse_line(line, number, 10 ** 6)
    tests = json.loads(post.tests)
    head = tests.pop("head")
    right = sandbox.program_of(post.replies[0], head, tests["names"])
    empty = "".join(f"def {name}(*a, **k):\n    pass\n" for name in tests["names"])
    run = lambda program: sandbox.run_program(program, allowed=allowed, seconds=60, **tests)
    first = run(right)
    return post.id, first.passed, run(empty).passed, first.why


def main():
    p = argparse.ArgumentParser()
    p.add_argument("files", nargs="+")
    allow_code_flag(p)
    args = p.parse_args()
    allowed, wrong = sandbox.allowance(args.allow_code_execution), 0
    for file in args.files:
        with gzip.open(file) as lines, ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(lambda job: judge(job[1], job[0], allowed), enumerate(lines, 1)))
        odd = [each for each in found if not each[1] or each[2]]
        print(f"{file}: {len(found)} tasks, {sum(f[1] for f in found)} known solutions pass, "
              f"{sum(f[2] for f in found)} empty ones do", *odd, sep="\n  ", flush=True)
        wrong += len(odd)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
