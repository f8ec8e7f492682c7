"""What passes between the tests of a task and the program: functions, objects, numpy; the program in a draft; and known
solutions, which are run before anything depends on a verdict."""

import json

import pytest

import data
import sandbox
import solutions
from data import InputError
from test_sandbox import HUMAN_EVAL, MBPP, pytestmark  # noqa: F401  (skips where there are no namespaces)

numpy_installed = bool(sandbox.importlib.util.find_spec("numpy"))


def verdict(program, test, **more):
    return sandbox.run_program(program, test, allowed=True, seconds=30, **more)


# ---- Values, functions and objects ---------------------------------------------------------------------------

STACK = """
class Empty(Exception):
    pass

class Stack:
    def __init__(self, items=()):
        self.items = list(items)
    def __len__(self):
        return len(self.items)
    def __getitem__(self, i):
        return self.items[i]
    def __setitem__(self, i, value):
        self.items[i] = value
    def __str__(self):
        return f"Stack{self.items}"
    def __eq__(self, other):
        return self.items == other.items
    def __lt__(self, other):
        return self.items < other.items
    def __add__(self, other):
        return Stack(self.items + other.items)
    def __hash__(self):
        return hash(tuple(self.items))
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.items = []
    def pop(self):
        if not self.items:
            raise Empty("nothing left")
        return self.items.pop()
"""
PASSES = {
    "a function of the test's": ("def f(g, x):\n    return g(g(x))", "assert f(lambda v: v + 1, 2) == 4"),
    "a function called back with a function": ("def f(g, x):\n    return g(lambda v: v * x)", "assert f(lambda h: h(3), 2) == 6"),
    "a function as a key": ("def f(xs, key):\n    return sorted(xs, key=key)", "assert f(['bb', 'a'], len) == f(['bb', 'a'], lambda s: len(s)) == ['a', 'bb']"),
    "a decorator": ("import functools\ndef f(g):\n    @functools.wraps(g)\n    def h(*a):\n        return g(*a) + 1\n    return h",
                    "@f\ndef g(x):\n    return 2 * x\nassert g(2) == 5"),
    "a function that comes back": ("def f(x):\n    return lambda y: x + y", "assert f(1)(2) == 3"),
    "functions of the library": ("def f(g, *a):\n    return g(*a)", "import math, operator\nassert f(math.floor, 2.5) == 2\n"
                                 "assert f(str.upper, 'a') == 'A' and f(operator.add, 1, 2) == 3 and f(sorted, [2, 1]) == [1, 2]"),
    "an exception in a callback": ("def f(g):\n    try:\n        return g()\n    except ValueError as e:\n        return str(e)",
                                   "def g():\n    raise ValueError('no')\nassert f(g) == 'no'"),
    "generators and views": ("def f(xs):\n    return sum(xs)", "assert f(x for x in range(4)) == 6 == f({1: 6}.values())\nassert f(map(int, '12')) == 3"),
    "an endless generator": ("def f():\n    n = 0\n    while True:\n        yield n\n        n += 1",
                             "import itertools\ng = f()\nassert next(g) == 0 and list(itertools.islice(g, 2)) == [1, 2]"),
    "kinds of the library": ("def f(x):\n    return x", "import datetime as d, uuid\nfrom collections import *\nfrom decimal import Decimal\n"
                             "from fractions import Fraction\nfrom array import array\n"
                             "for v in (deque([1], 3), Decimal('1.50'), Fraction(1, 3), d.date(2020, 2, 1), d.datetime(2020, 2, 1, 3),\n"
                             "          d.time(1, 2), d.timedelta(1, 2), Counter('aab'), OrderedDict(a=1), defaultdict(list, {1: [2]}),\n"
                             "          range(3), slice(1, 2), ..., bytearray(b'x'), array('i', [1]), uuid.UUID(int=3)):\n"
                             "    assert f(v) == v and type(f(v)) is type(v), v\n"
                             "assert f(Counter('aab')).most_common(1) == [('a', 2)]"),
    "named tuples": ("from collections import namedtuple\nP = namedtuple('P', 'a b')\ndef f(x):\n    return P(x, [x])", "assert f(1).b == [1] and f(1) == (1, [1])"),
    "an argument changed in place": ("def f(xs, d, m):\n    xs.sort()\n    d['n'] = len(xs)\n    m[0][0] = 9",
                                     "xs, d, m = [3, 1], {}, [[1], [2]]\nrow = m[0]\nassert f(xs, d, m=m) is None\n"
                                     "assert (xs, d, m, row) == ([1, 3], {'n': 2}, [[9], [2]], [9])"),
    "an object's own operations": (STACK, "s = Stack([1, 2])\nassert len(s) == 2 and s[0] == 1 and 2 in s and 5 not in s\n"
                                   "assert str(s) == f'{s}' == 'Stack[1, 2]' and list(s) == [1, 2] and isinstance(s, Stack)\n"
                                   "s[0] = 7\nassert s.pop() == 2 and s.items == [7]\n"
                                   "with s as t:\n    assert t[0] == 7\nassert len(s) == 0"),
    "two objects": (STACK, "a, b = Stack([1]), Stack([2])\nassert a == Stack([1]) != b and a + b == Stack([1, 2]) and a < b\n"
                    "assert sorted([b, a])[0].items == [1] and len({a, Stack([1]), b}) == 2"),
    "an exception of the program's": (STACK, "try:\n    Stack().pop()\n    assert False\nexcept Empty as e:\n    assert str(e) == 'nothing left'"),
    "an exception of the library's": ("import json\ndef f(x):\n    return json.loads(x)", "import json\ntry:\n    f('{')\n    assert False\nexcept json.JSONDecodeError:\n    pass"),
    "an object of the test's": ("def f(node):\n    total = 0\n    while node:\n        total += node.value\n        node = node.next\n    return total",
                                "class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\n"
                                "assert f(Node(1, Node(2))) == 3"),
}


@pytest.mark.parametrize("name", PASSES)
def test_what_a_right_program_and_its_tests_hand_each_other_arrives(name):
    """Each was judged wrong: only plain values went through the pipes."""
    program, test = PASSES[name]
    assert verdict(program, test) == sandbox.Verdict(True)


ALIKE = "class E:\n    def __init__(self, *a):\n        pass\n" + "".join(
    f"    def __{name}__(self, *a):\n        return {value}\n" for name, value in {
        "eq": "True", "ne": "False", "lt": "True", "le": "True", "gt": "True", "ge": "True", "sub": "self", "rsub": "self",
        "add": "self", "truediv": "self", "abs": "0.0", "float": "0.0", "contains": "True", "array": "0", "hash": "0",
        "bool": "True", "radd": "self", "mul": "self"}.items()) + "def f(x):\n    return E()\n"
FORGED = {
    "equal": "assert f(1) == 2", "equal from the other side": "assert 2 == f(1)", "in a list": "assert [f(1)] == [2]",
    "in a deque": "from collections import deque\nassert deque([f(1)]) == deque([2])", "close": "assert abs(f(1) - 2) < 1e-6",
    "closer": "assert abs(2 - f(1)) < 1e-6", "isclose": "import math\nassert math.isclose(f(1), 2)", "less": "assert f(1) < 2",
    "between": "assert 1 < f(1) < 3", "one of": "assert f(1) in (2, 3)", "holding": "assert 2 in f(1)",
    "a ratio": "assert abs(f(1) / 2 - 1) < 1e-6", "a key": "assert {2: 3}[f(1)] == 3"}


@pytest.mark.parametrize("name", FORGED)
def test_an_object_that_says_yes_to_everything_does_not_pass(name):
    assert not verdict(ALIKE, FORGED[name]).passed


@pytest.mark.parametrize("program", [
    "def f(g):\n    return g.__globals__", "def f(g):\n    return g.__code__", "def f(g):\n    return type(g)._caller.perform('get', g, '__globals__')",
    "def f(g):\n    return g._caller.ask('get', g, '__globals__')", "def f(g):\n    return g._caller.ask('set', g, '__code__', None)",
    "def f(g):\n    return g._caller.ask('load', 'x = 1')", "def f(g):\n    return g._caller.ask('getattr', g, 'x')",
    "def f(g):\n    g._number = 10 ** 6\n    return g(1)"])
def test_the_program_reaches_nothing_of_the_checkers_behind_a_function_that_it_was_handed(program):
    got = verdict(program, "def g(x):\n    return x\nf(g)\nraise SystemError('reached')")
    assert not got.passed and "reached" not in got.why


def test_the_programs_own_name_of_a_module_decides_nothing():
    program = "class np:\n    allclose = lambda *a: True\nclass math:\n    isclose = np.allclose\ndef f(x):\n    return 9.0"
    assert not verdict(program, "import numpy as np\nassert np.allclose(f(1), 2)").passed
    assert not verdict(program, "assert np.allclose(f(1), 2)", names=None).passed


@pytest.mark.skipif(not numpy_installed, reason="numpy is not installed")
@pytest.mark.parametrize("program, test", [
    ("def f(x):\n    return 2 * x", "import numpy as np\nassert np.allclose(f(2.0), 4.0)"),
    ("import numpy as np\ndef f(x):\n    return np.array(x) * 2", "import numpy as np\nassert (f([1, 2]) == np.array([2, 4])).all() and f([1]).dtype == int"),
    ("import numpy as np\ndef f(a):\n    a *= 2\n    return a.sum()", "import numpy as np\na = np.ones(3)\nassert f(a) == 6 and a.tolist() == [2, 2, 2]"),
    ("import numpy as np\ndef f(a):\n    return np.linalg.inv(a)", "assert np.allclose(f(np.array([[2., 0], [0, 2]])), [[.5, 0], [0, .5]])")])
def test_numpy_may_be_imported_by_tests_and_programs(program, test):
    """ModuleNotFoundError, inside the sandbox and shown nowhere: every draft was judged wrong."""
    assert verdict(program, test) == sandbox.Verdict(True)
    assert not verdict("def f(x):\n    return 0 * x", "import numpy as np\nassert np.allclose(f(2.0), 4.0)").passed


def test_no_other_package_can_be_imported():
    for name in ("torch", "pytest", "tokenizers"):
        assert "No module named" in verdict(f"import {name}", "").why


# ---- The program in a draft ----------------------------------------------------------------------------------

HEAD = 'def add(x, y):\n    """The sum."""\n'
DEFINITION = "def add(x, y):\n    return x + y\n"


def indented(text, mark):
    return "".join(mark + line for line in text.splitlines(keepends=True))


DRAFTS = {
    "in a list": "1. Here:\n" + indented(f"```python\n{DEFINITION}```", "   "),
    "behind a list's number": f"1. ```python\n{indented(DEFINITION, '   ')}   ```",
    "in a quotation": indented(f"```python\n{DEFINITION}```", "> "),
    "with an attribute": f'```python title="a.py"\n{DEFINITION}```', "with braces": f"```{{.python .numberLines}}\n{DEFINITION}```",
    "with four backticks": f"````python\n{DEFINITION}````", "indented inside": f"```\n{indented(DEFINITION, '    ')}```",
    "after a helper": "```python\ndef plus(a, b):\n    return a + b\n```\nThen:\n```python\ndef add(x, y):\n    return plus(x, y)\n```",
    "before a helper": "```python\ndef add(x, y):\n    return plus(x, y)\n```\nand\n```python\nfrom operator import add as sum_of\n"
                       "def plus(a, b):\n    return sum_of(a, b)\n```",
    "after a shell's": f"```bash\npip install add\n```\n```python\n{DEFINITION}```",
    "with a use that fails": f"```python\n{DEFINITION}```\nUse:\n```python\nprint(add(1))\n```",
    "a body in a fence in a list": "- so:\n  ```python\n      return x + y\n  ```"}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("head", [HEAD, ""])
def test_the_program_in_a_draft_is_found(name, head):
    if name.startswith("a body") and not head:
        pytest.skip("a body needs the head")
    space = {}
    exec(sandbox.program_of(DRAFTS[name], head, ["add"]), space)
    assert space["add"](2, 3) == 5


# ---- Known solutions -----------------------------------------------------------------------------------------

BROKEN = HUMAN_EVAL | {"task_id": "b/1", "prompt": "def third(x):\n    \"\"\"x / 3.\"\"\"\n", "entry_point": "third",
                       "canonical_solution": "    return x / 3\n", "test": "import no_such_module\ndef check(c):\n    assert c(3) == 1\n"}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tasks(tmp_path, *rows):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ALLOWED = ["--allow-code-execution", "as-root"]


def test_a_task_that_its_own_solution_fails_is_refused_with_the_reason(tmp_path, capsys, cache):
    """It was taken, and every draft for it judged wrong without a word."""
    path = tasks(tmp_path, HUMAN_EVAL, BROKEN, MBPP)
    split = ["split", "--data", str(path), "--sizes", "sft=2", "--out", str(tmp_path / "s")]
    for command in (["check", str(path)], split):
        assert data.main([*command, *ALLOWED]) == 2
        said = capsys.readouterr().err
        assert "the known solution of 1 of 3 tasks" in said and "b/1" in said and "no_such_module" in said
    posts = data.load_posts(path)
    with pytest.raises(InputError, match="1 of 3 tasks .*no_such_module"):  # what every phase does before its first step
        data.load_domain(path, "auto", posts).permit("as-root")
    assert not (tmp_path / "s").exists()
    assert data.main([*split, *ALLOWED, "--skip-bad-lines"]) == 0
    said = capsys.readouterr()
    assert "2 of 3 known solutions pass their tests; 1 tasks left out" in said.out and "no_such_module" in said.err
    assert sorted(p.id for p in data.load_posts(tmp_path / "s" / "sft.jsonl")) == ["901", "HumanEval/900"]


def test_without_leave_to_run_code_check_says_that_solutions_were_not_run(tmp_path, capsys, cache):
    assert data.main(["check", str(tasks(tmp_path, HUMAN_EVAL, BROKEN))]) == 0
    assert "2 tasks of code, whose known solutions were not run" in capsys.readouterr().out


def test_a_known_solution_that_passed_is_not_run_again_and_one_that_failed_is(tmp_path, monkeypatch, cache):
    posts = data.load_posts(tasks(tmp_path, HUMAN_EVAL, BROKEN))
    ran = []
    run = solutions.run_program
    monkeypatch.setattr(solutions, "run_program", lambda **job: (ran.append(job["program"]), run(**job))[1])
    assert list(solutions.failing_solutions(posts, True)) == [1]
    first = len(ran)
    assert list(solutions.failing_solutions(posts, True)) == [1]
    assert first == 3 and ["third" in program for program in ran[first:]] == [True, True]
    changed = data.load_posts(tasks(tmp_path, HUMAN_EVAL | {"test": "def check(c):\n    assert c(5) == 3\n"}))
    assert list(solutions.failing_solutions(changed, True)) == [0]          # other tests: no pass of before counts


def test_a_cache_that_cannot_be_written_or_read_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    posts = data.load_posts(tasks(tmp_path, HUMAN_EVAL))
    assert solutions.failing_solutions(posts, True) == {} == solutions.failing_solutions(posts, True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    solutions.cache_file().parent.mkdir()
    solutions.cache_file().write_text("{")
    assert solutions.failing_solutions(posts, True) == {}


def test_one_rank_alone_runs_the_known_solutions(tmp_path, monkeypatch, cache):
    path = tasks(tmp_path, BROKEN)
    domain = data.load_domain(path, "auto", data.load_posts(path))
    monkeypatch.setenv("RANK", "1")
    domain.permit("as-root")
    assert domain.permitted


def test_classes_of_a_task_s_prompt_live_in_the_program(tmp_path):
    prompt = ("class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\n\n"
              "def total(node):\n    \"\"\"The sum of a list of nodes.\"\"\"\n")
    row = {"entry_point": "total", "prompt": prompt, "canonical_solution": "    return node.value + total(node.next) if node else 0\n",
           "test": "def check(c):\n    assert c(Node(1, Node(2))) == 3\n"}
    post, = data.load_posts(tasks(tmp_path, row))
    domain = data.make_domain("auto", [post])
    domain.permit("as-root")
    assert domain.voices_of(post, post.replies[0]) == ("right",)
    assert domain.voices_of(post, "```python\ndef total(node):\n    return 4\n```") == ()
