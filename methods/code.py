"""The domain `code`: a completion is right if its program passes the task's tests."""

import json
import sys

from data import Domain
from methods.sandbox import (NotAllowed, allowance, as_task, checked_tests, program_of,
                             run_program)
from methods.solutions import failing_solutions
from support.files import InputError, first_rank, printable, short
from support.posts import Chosen
from support.registry import DOMAINS


def allowed(given):
    """True if --allow-code-execution lets programs be run, else InputError."""
    try:
        return allowance(given)
    except NotAllowed as e:
        raise InputError(str(e)) from None


def allow_code_flag(parser):
    parser.add_argument(
        "--allow-code-execution", nargs="?", const="yes", default=False, choices=("yes", "as-root"),
        help="let completions of code, and the known solutions of their tasks, be run, in a "
             "sandbox; as-root: even if root asks")


@DOMAINS.add("code", "tasks of code, judged by their tests", fields=as_task, tests=checked_tests,
             flags=allow_code_flag)
class Code(Domain):
    """Tasks of code. There is one style, `right`. Programs are run only after permit."""
    name = "code"
    exclusive = True

    def __init__(self, posts, **users):
        super().__init__(posts, **users)
        self.posts = posts
        self.permitted = False

    @staticmethod
    def claims(post):
        return bool(post.tests)

    def prepare(self, args):
        self.permit(args.allow_code_execution)

    def permit(self, given):
        """Let completions be run, once every task's known solution has passed its own tests: where
        it fails, every completion would, and nothing would show it."""
        self.permitted = allowed(given)
        if first_rank():
            self.refuse(self.failing())

    def refuse(self, failing):
        """Raise InputError if known solutions fail: how many, which, and why."""
        if not failing:
            return
        shown = []
        for place, why in list(failing.items())[:3]:
            shown.append(f"{short(self.posts[place].id)}: {why[:200]}")
        if len(failing) > 3:
            shown.append("..")
        raise InputError(
            f"the known solution of {len(failing)} of {len(self.posts)} tasks does not pass its "
            f"own tests, so that no completion could ({'; '.join(shown)}): correct these tasks, or "
            "leave them out by data.py split --allow-code-execution --skip-bad-lines")

    def judged(self, posts, args):
        """The posts, or with --skip-bad-lines those whose known solution passes. Known solutions
        are run only with --allow-code-execution."""
        if not args.allow_code_execution:
            print(f"{len(posts)} tasks of code, whose known solutions were not run: give "
                  "--allow-code-execution to run them, in a sandbox")
            return posts
        self.permitted = allowed(args.allow_code_execution)
        failing = self.failing()
        if not args.skip_bad_lines or len(failing) == len(posts):
            self.refuse(failing)
        for place, why in list(failing.items())[:5]:
            print(printable(f"{args.data}: {short(posts[place].id)}: its known solution fails: "
                            f"{why[:200]}"), file=sys.stderr)
        left_out = f"; {len(failing)} tasks left out" if failing else ""
        print(f"{len(posts) - len(failing)} of {len(posts)} known solutions pass their tests"
              f"{left_out}")
        if not failing:
            return posts
        return Chosen(posts, [i for i in range(len(posts)) if i not in failing])

    def failing(self):
        """{place of a task: why its known solution fails}."""
        try:
            return failing_solutions(self.posts, self.permitted)
        except NotAllowed as e:
            raise InputError(str(e)) from None

    def judge(self, post, text):
        return ("right",) if self.passes(json.loads(post.tests), text) else ()

    def passes(self, task, text):
        """Does a completion pass the tests of a task, which is {setup, test, names, head}?"""
        tests = dict(task)
        program = program_of(text, tests.pop("head"), tests["names"])
        try:
            return run_program(program, allowed=self.permitted, **tests).passed
        except NotAllowed as e:
            raise InputError(str(e)) from None
