"""Tests of methods/sandbox.py."""

import gzip
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import data
from helpers import ROOT
from methods import code
from methods import sandbox
from methods import solutions
from support.files import InputError
from support import posts as support_posts


TASKS = ROOT.parent / "shared/data"

RIGHT, TEST = "def f(x):\n    return x + 1\n", "assert f(1) == 2\nassert f([1][0] + 1) == 3\n"

SECONDS = 2


def run(program, test=TEST, **more):
    return sandbox.run_program(program, test, allowed=True, **({"seconds": SECONDS} | more))


def works():
    try:
        return run(RIGHT, seconds=30).passed
    except sandbox.NotAllowed:
        return False


pytestmark = pytest.mark.skipif(not works(),
                                reason="this machine has no namespaces for the sandbox")


# Each would pass, or do harm, if it could: f is wrong, or the program does what nobody may do and
# only then is
# f right, so that a pass shows what was not prevented.
HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n       "
                 " pass",
    "endless output": "while True:\n    try:\n        print('x' * 10000)\n    except OSError:\n    "
                      "    pass",
    "memory bomb": "a = []\nwhile True:\n    a.append(bytearray(1 << 24))\n",
    "memory in files": "import os\nfor i in range(1000):\n    open(f'f{i}', 'w').write('x' * 10 ** "
                       "6)\n" + RIGHT,
    "sleep": "import time\ntime.sleep(1000)",
    "endless loop in a call": "def f(x):\n    while True:\n        pass",
    "reading passwords": "open('/etc/passwd').read()\n" + RIGHT,
    "reading a home": "import os\nassert os.listdir(os.path.expanduser('~')) or "
                      "os.listdir('/root')\n" + RIGHT,
    "network": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)\n" + RIGHT,
    "writing outside": "open('/usr/lib/forged', 'w').write('x')\n" + RIGHT,
    "writing to the harness": "open('TMP/forged', 'w').write('x')\n" + RIGHT,
    "killing its parent": "import os, signal\nassert os.getppid()\nos.kill(os.getppid(), "
                          "signal.SIGKILL)\n" + RIGHT,
    "killing everybody": "import os\nos.kill(-1, 9)\n",
    "leaving at once": "import os\nos._exit(0)",
    "leaving in a call": "import os\ndef f(x):\n    os._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "printing the mark": "import os, sys\nfor i in range(64):\n    try:\n        os.write(i, "
                         "b'{\"passed\": true, \"why\":"
                         " \"\", \"output\": \"\"}\\n')\n    except OSError:\n        pass\n",
    "patching built-ins": "import builtins, ast\nbuiltins.exec = builtins.compile = lambda *a: "
                          "None\n"
                          "AssertionError = builtins.AssertionError = Warning\ndef f(x):\n    "
                          "return 0",
    "patching the checker": "import sys\nm = sys.modules['__main__']\nm.examine = lambda *a: "
                            "(True, '')\n"
                            "m.answer(True)\nm.decode = m.Caller.ask = lambda *a: 2\ndef f(x):\n   "
                            " return 0",
    "an equal of all": "class E(int):\n    def __eq__(self, other):\n        return True\ndef "
                       "f(x):\n    return E(7)",
    "an object equal to all": "class E:\n    def __eq__(self, other):\n        return True\ndef "
                              "f(x):\n    return E()",
    "reading the tests": "import gc, sys, os\nseen = []\nframe = sys._getframe()\nwhile frame:\n"
                         "    seen.append(str(frame.f_locals)); frame = frame.f_back\n"
                         "seen += [str(o) for o in gc.get_objects() if type(o) in (dict, list, "
                         "tuple)]\n"
                         "assert any('MARK' + chr(69) + 'D' in s for s in seen)\n" + RIGHT,
    "taking the walls down": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
                             "assert libc.unshare(0x10000000) == 0 or libc.mount(b'tmpfs', "
                             "b'/usr', b'tmpfs', 0, None)"
                             " == 0 or libc.chroot(b'/tmp') == 0\n" + RIGHT,
}


@pytest.mark.slow
def test_hostile_programs_fail_harmlessly_and_end_in_time(tmp_path):
    """Each in the usual run, some side by side; a right program passes when they are done."""
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])

        def one(name):
            began = time.monotonic()
            program = HOSTILE[name].replace("PORT", port).replace("TMP", str(tmp_path))
            return run(program, TEST + "# MARKED\n"), time.monotonic() - began
        with ThreadPoolExecutor(6) as pool:
            found = dict(zip(HOSTILE, pool.map(one, HOSTILE)))
    assert [name for name, (verdict, _) in found.items() if verdict.passed] == []
    assert max(seconds for _, seconds in found.values()) < SECONDS + 15
    why = {name: verdict.why for name, (verdict, _) in found.items()}
    assert why["sleep"] == "out of time"
    assert all(why.values())
    assert run(HOSTILE["reading passwords"], seconds=30).why.startswith("FileNotFoundError")
    assert run(HOSTILE["memory bomb"], memory=96, seconds=30).why.startswith("MemoryError")
    assert (not list(tmp_path.iterdir()) and not Path("/usr/lib/forged").exists()
            and run(RIGHT, seconds=30).passed)


def test_orphan_processes_are_killed_and_output_is_capped():
    program = ("import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
               "        time.sleep(600)\n    os._exit(0)\nprint('y' * 100000)\n" + RIGHT)
    memory = 600 + os.getpid() % 300         # tells this sandbox from others on the machine
    verdict = run(program, seconds=20, memory=memory)
    assert verdict.passed and verdict.output == "y" * sandbox.SHOWN
    end = time.monotonic() + 10
    while children(memory) and time.monotonic() < end:
        time.sleep(0.05)
    assert not children(memory)


def children(memory):
    """Processes of a sandbox of that memory, forks included: they have its command line."""
    mark = f'"memory": {memory}}}'.encode()
    return [line.parent.name for line in Path("/proc").glob("[0-9]*/cmdline")
            if mark in text_of(line)]


def text_of(path):
    try:
        return path.read_bytes()
    except OSError:                          # it has ended
        return b""


def test_the_environment_is_empty_and_the_folder_too():
    program = ("import os, sys\ndef f(x):\n    return [sorted(os.environ), os.getcwd(), "
               "os.listdir('.'), "
               "os.getpid(), os.getppid(), os.getuid() == 0, sys.argv[2:]]\n")
    got = run(program, "raise ValueError(f(1))", seconds=30).why
    assert got in (f"ValueError: {[e, '/tmp', [], 1, 0, False, []]}"
                   for e in ([], ["LC_CTYPE"])), got


def test_values_go_to_the_program_and_back_as_they_are():
    values = [None, True, 10 ** 500, -1, 0.1, float("inf"), "é\n", b"\x00", (1, [2, {3}]),
              {"a": (1,), 2: frozenset([1])},
              2 + 1j, [], set()]
    assert run("def f(x):\n    return x",
               f"inf = float('inf')\nfor v in {values!r}:\n    assert f(v) == v\n"
               "    assert type(f(v)) is type(v)", seconds=30) == sandbox.Verdict(True)
    program = ("class Node:\n    def __init__(self, v):\n        self.v = v\n"
               "def g(n):\n    return n.v + n.next.v\ndef h(x):\n    raise KeyError('no')\n")
    test = ("a = Node(1)\na.next = Node(4)\nassert g(a) == 5 and a.v == 1 and a == a and a != "
            "Node(1)\ntry:\n"
            "    h(1)\n    assert False\nexcept KeyError:\n    pass")
    assert run(program, test, seconds=30).passed


def test_what_decides_a_test_is_the_checkers_own():
    program = (
        "class math:\n    isclose = lambda *a: True\ndef abs(x):\n    return 0\ndef f(x):\n   "
        " return 9.0"
    )
    assert not run(program, "assert math.isclose(f(1), 2)", setup="import math", seconds=30).passed
    assert not run(program, "assert math.isclose(f(1), 2)", seconds=30).passed
    assert not run(program, "assert abs(f(1) - 2) < 1", seconds=30).passed


def test_running_code_is_off_by_default_and_refused_to_root(monkeypatch):
    with pytest.raises(sandbox.NotAllowed, match="--allow-code-execution"):
        sandbox.allowance(False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(sandbox.NotAllowed, match="as-root"):
        sandbox.allowance("yes")
    assert sandbox.allowance("as-root")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert sandbox.allowance("yes")


HUMAN_EVAL = {"task_id": "HumanEval/900",
              "prompt": "from math import floor\n\ndef half(x):\n    \"\"\"x / 2, down.\"\"\"\n",
              "canonical_solution": "    return floor(x / 2)\n", "entry_point": "half",
              "test": "def check(candidate):\n    assert candidate(5) == 2\n    assert "
                      "candidate(4) == 2\n"}

MBPP = {"task_id": 901, "text": "Write a function to double a number.",
        "code": "def twice(x):\r\n  return 2 * x",
        "test_setup_code": "", "test_list": ["assert twice(2) == 4", "assert twice(0) == 0"],
        "challenge_test_list": []}


def code_posts(tmp_path, *lines):
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    posts = data.load_posts(tmp_path / "tasks.jsonl")
    domain = data.load_domain(tmp_path / "tasks.jsonl", "auto", posts)
    domain.permit("as-root")
    return posts, domain


@pytest.mark.slow
def test_tasks_in_both_formats_are_read_split_and_judged(tmp_path):
    posts, domain = code_posts(tmp_path, HUMAN_EVAL, MBPP)
    assert (domain.name == "code" and domain.styles == ("right",) and domain.popularity_of(posts[0])
            == {"right": 1})
    human, mbpp = posts
    assert ("assert twice(2) == 4" in mbpp.post and "twice(0)" not in mbpp.post
            and human.id == "HumanEval/900")
    completions = [human.replies[0],
                   "Sure:\n```python\ndef half(x):\n    return floor(x / 2)\n```\nDone.",
                   "    return x // 2", "```\ndef half(x):\n    return x / 2\n```", "I cannot.", ""]
    assert [domain.styles_of(human, d) for d in completions] == [("right",)] * 3 + [()] * 3
    wrong = ("def twice(x): return 4", "import os; os._exit(0)")
    assert [domain.styles_of(mbpp, d) for d in (mbpp.replies[0], *wrong)] == [("right",), (), ()]
    support_posts.save_posts(posts, tmp_path / "again.jsonl")
    assert data.load_posts(tmp_path / "again.jsonl") == posts
    locked = code.Code(posts)
    with pytest.raises(InputError, match="allowance|--allow"):
        locked.styles_of(human, "x")
    for bad in ({**HUMAN_EVAL, "test": 3}, {**MBPP, "test_list": []}, {**MBPP, "test_list": [1]}):
        with pytest.raises(InputError, match="a task needs"):
            code_posts(tmp_path, bad)


@pytest.mark.parametrize("name", ["HumanEval", "mbpp"])
def test_some_public_tasks_run_end_to_end_from_their_file(name, tmp_path):
    file = TASKS / f"{name}.jsonl.gz"
    if not file.exists():
        pytest.skip(f"no {file.name} here")
    with gzip.open(file) as lines:
        chosen = [json.loads(line) for line in list(lines)[4::41]][:4]
    posts, domain = code_posts(tmp_path, *chosen)
    for post in posts:
        assert domain.styles_of(post, post.replies[0]) == ("right",), post.id
        assert domain.styles_of(post, post.replies[0].replace("return", "return None and")) == ()


numpy_installed = bool(sandbox.importlib.util.find_spec("numpy"))


def verdict(program, test, **more):
    return sandbox.run_program(program, test, allowed=True, seconds=30, **more)


# ---- Values, functions and objects ---------------------------------------------------------------

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
    "a function of the test's": (
        "def f(g, x):\n    return g(g(x))",
        "assert f(lambda v: v + 1, 2) == 4",
    ),
    "a function called back with a function": (
        "def f(g, x):\n    return g(lambda v: v * x)",
        "assert f(lambda h: h(3), 2) == 6",
    ),
    "a function as a key": (
        "def f(xs, key):\n    return sorted(xs, key=key)",
        "assert f(['bb', 'a'], len) == f(['bb', 'a'], lambda s: len(s)) == ['a', 'bb']",
    ),
    "a decorator": (
        (
            "import functools\ndef f(g):\n    @functools.wraps(g)\n    def h(*a):\n        "
            "return g(*a) + 1\n    return h"
        ),
        "@f\ndef g(x):\n    return 2 * x\nassert g(2) == 5",
    ),
    "a function that comes back": ("def f(x):\n    return lambda y: x + y", "assert f(1)(2) == 3"),
    "functions of the library": (
        "def f(g, *a):\n    return g(*a)",
        (
            "import math, operator\nassert f(math.floor, 2.5) == 2\n"
            "assert f(str.upper, 'a') == 'A' and f(operator.add, 1, 2) == 3 "
            "and f(sorted, [2, 1]) == [1, 2]"
        ),
    ),
    "an exception in a callback": (
        (
            "def f(g):\n    try:\n        return g()\n    except ValueError "
            "as e:\n        return str(e)"
        ),
        "def g():\n    raise ValueError('no')\nassert f(g) == 'no'",
    ),
    "generators and views": (
        "def f(xs):\n    return sum(xs)",
        "assert f(x for x in range(4)) == 6 == f({1: 6}.values())\nassert f(map(int, '12')) == 3",
    ),
    "an endless generator": (
        "def f():\n    n = 0\n    while True:\n        yield n\n        n += 1",
        "import itertools\ng = f()\nassert next(g) == 0 and list(itertools.islice(g, 2)) == [1, 2]",
    ),
    "kinds of the library": (
        "def f(x):\n    return x",
        (
            "import datetime as d, uuid\nfrom collections import *\nfrom decimal "
            "import Decimal\n"
            "from fractions import Fraction\nfrom array import array\n"
            "for v in (deque([1], 3), Decimal('1.50'), Fraction(1, 3), "
            "d.date(2020, 2, 1), d.datetime(2020, 2, 1, 3),\n"
            "          d.time(1, 2), d.timedelta(1, 2), Counter('aab'), "
            "OrderedDict(a=1), defaultdict(list, {1: [2]}),\n"
            "          range(3), slice(1, 2), ..., bytearray(b'x'), array('i', "
            "[1]), uuid.UUID(int=3)):\n"
            "    assert f(v) == v and type(f(v)) is type(v), v\n"
            "assert f(Counter('aab')).most_common(1) == [('a', 2)]"
        ),
    ),
    "named tuples": (
        (
            "from collections import namedtuple\nP = namedtuple('P', 'a b')\ndef f(x):\n  "
            "  return P(x, [x])"
        ),
        "assert f(1).b == [1] and f(1) == (1, [1])",
    ),
    "an argument changed in place": (
        "def f(xs, d, m):\n    xs.sort()\n    d['n'] = len(xs)\n    m[0][0] = 9",
        (
            "xs, d, m = [3, 1], {}, [[1], [2]]\nrow = m[0]\nassert f(xs, "
            "d, m=m) is None\n"
            "assert (xs, d, m, row) == ([1, 3], {'n': 2}, [[9], [2]], [9])"
        ),
    ),
    "an object's own operations": (
        STACK,
        (
            "s = Stack([1, 2])\nassert len(s) == 2 and s[0] == 1 and "
            "2 in s and 5 not in s\n"
            "assert str(s) == f'{s}' == 'Stack[1, 2]' and list(s) == [1, 2] "
            "and isinstance(s, Stack)\n"
            "s[0] = 7\nassert s.pop() == 2 and s.items == [7]\n"
            "with s as t:\n    assert t[0] == 7\nassert len(s) == 0"
        ),
    ),
    "two objects": (
        STACK,
        (
            "a, b = Stack([1]), Stack([2])\nassert a == Stack([1]) != b and a + b "
            "== Stack([1, 2]) and a < b\n"
            "assert sorted([b, a])[0].items == [1] and len({a, Stack([1]), b}) == 2"
        ),
    ),
    "an exception of the program's": (
        STACK,
        (
            "try:\n    Stack().pop()\n    assert False\nexcept Empty as "
            "e:\n    assert str(e) == 'nothing left'"
        ),
    ),
    "an exception of the library's": (
        "import json\ndef f(x):\n    return json.loads(x)",
        "import json\ntry:\n    f('{')\n    assert False\nexcept json.JSONDecodeError:\n    pass",
    ),
    "an object of the test's": (
        (
            "def f(node):\n    total = 0\n    while node:\n        total += "
            "node.value\n        node = node.next\n    return total"
        ),
        (
            "class Node:\n    def __init__(self, value, next=None):\n        "
            "self.value, self.next = value, next\n"
            "assert f(Node(1, Node(2))) == 3"
        ),
    ),
}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", PASSES)
def test_what_a_right_program_and_its_tests_hand_each_other_arrives(name):
    """Each was judged wrong: only plain values went through the pipes."""
    program, test = PASSES[name]
    assert verdict(program, test) == sandbox.Verdict(True)


ALIKE = "class E:\n    def __init__(self, *a):\n        pass\n" + "".join(
    f"    def __{name}__(self, *a):\n        return {value}\n" for name, value in {
        "eq": "True", "ne": "False", "lt": "True", "le": "True", "gt": "True", "ge": "True",
        "sub": "self", "rsub": "self",
        "add": "self", "truediv": "self", "abs": "0.0", "float": "0.0", "contains": "True",
        "array": "0", "hash": "0",
        "bool": "True", "radd": "self", "mul": "self"}.items()) + "def f(x):\n    return E()\n"

FORGED = {
    "equal": "assert f(1) == 2", "equal from the other side": "assert 2 == f(1)",
    "in a list": "assert [f(1)] == [2]",
    "in a deque": "from collections import deque\nassert deque([f(1)]) == deque([2])",
    "close": "assert abs(f(1) - 2) < 1e-6",
    "closer": "assert abs(2 - f(1)) < 1e-6", "isclose": "import math\nassert math.isclose(f(1), 2)",
    "less": "assert f(1) < 2",
    "between": "assert 1 < f(1) < 3", "one of": "assert f(1) in (2, 3)",
    "holding": "assert 2 in f(1)",
    "a ratio": "assert abs(f(1) / 2 - 1) < 1e-6", "a key": "assert {2: 3}[f(1)] == 3"}


@pytest.mark.slow_after(4)
@pytest.mark.parametrize("name", FORGED)
def test_an_object_that_says_yes_to_everything_does_not_pass(name):
    assert not verdict(ALIKE, FORGED[name]).passed


@pytest.mark.slow
@pytest.mark.parametrize("program", [
    "def f(g):\n    return g.__globals__", "def f(g):\n    return g.__code__",
    "def f(g):\n    return type(g)._caller.perform('get', g, '__globals__')",
    "def f(g):\n    return g._caller.ask('get', g, '__globals__')",
    "def f(g):\n    return g._caller.ask('set', g, '__code__', None)",
    "def f(g):\n    return g._caller.ask('load', 'x = 1')",
    "def f(g):\n    return g._caller.ask('getattr', g, 'x')",
    "def f(g):\n    g._number = 10 ** 6\n    return g(1)"])
def test_the_program_reaches_nothing_of_the_checkers_behind_a_function_that_it_was_handed(program):
    got = verdict(program, "def g(x):\n    return x\nf(g)\nraise SystemError('reached')")
    assert not got.passed and "reached" not in got.why


def test_the_programs_own_name_of_a_module_decides_nothing():
    program = (
        "class np:\n    allclose = lambda *a: True\nclass math:\n    isclose = np.allclose\ndef"
        " f(x):\n    return 9.0"
    )
    assert not verdict(program, "import numpy as np\nassert np.allclose(f(1), 2)").passed
    assert not verdict(program, "assert np.allclose(f(1), 2)", names=None).passed


@pytest.mark.slow_after(1)
@pytest.mark.skipif(not numpy_installed, reason="numpy is not installed")
@pytest.mark.parametrize("program, test", [
    ("def f(x):\n    return 2 * x", "import numpy as np\nassert np.allclose(f(2.0), 4.0)"),
    ("import numpy as np\ndef f(x):\n    return np.array(x) * 2",
     "import numpy as np\nassert (f([1, 2]) == np.array([2, 4])).all() and f([1]).dtype == int"),
    ("import numpy as np\ndef f(a):\n    a *= 2\n    return a.sum()",
     "import numpy as np\na = np.ones(3)\nassert f(a) == 6 and a.tolist() == [2, 2, 2]"),
    ("import numpy as np\ndef f(a):\n    return np.linalg.inv(a)",
     "assert np.allclose(f(np.array([[2., 0], [0, 2]])), [[.5, 0], [0, .5]])")])
def test_numpy_may_be_imported_by_tests_and_programs(program, test):
    """ModuleNotFoundError, inside the sandbox and shown nowhere: every draft was judged wrong."""
    assert verdict(program, test) == sandbox.Verdict(True)
    assert not verdict("def f(x):\n    return 0 * x",
                       "import numpy as np\nassert np.allclose(f(2.0), 4.0)").passed


def test_no_other_package_can_be_imported():
    for name in ("torch", "pytest", "tokenizers"):
        assert "No module named" in verdict(f"import {name}", "").why


# ---- The program in a draft ----------------------------------------------------------------------

HEAD = 'def add(x, y):\n    """The sum."""\n'

DEFINITION = "def add(x, y):\n    return x + y\n"


def indented(text, mark):
    return "".join(mark + line for line in text.splitlines(keepends=True))


DRAFTS = {
    "in a list": "1. Here:\n" + indented(f"```python\n{DEFINITION}```", "   "),
    "behind a list's number": f"1. ```python\n{indented(DEFINITION, '   ')}   ```",
    "in a quotation": indented(f"```python\n{DEFINITION}```", "> "),
    "with an attribute": f'```python title="a.py"\n{DEFINITION}```',
    "with braces": f"```{{.python .numberLines}}\n{DEFINITION}```",
    "with four backticks": f"````python\n{DEFINITION}````",
    "indented inside": f"```\n{indented(DEFINITION, '    ')}```",
    "after a helper": "```python\ndef plus(a, b):\n    return a + b\n```\nThen:\n```python\ndef "
                      "add(x, y):\n    return plus(x, y)\n```",
    "before a helper": "```python\ndef add(x, y):\n    return plus(x, "
                       "y)\n```\nand\n```python\nfrom operator import add as sum_of\n"
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


# ---- Known solutions -----------------------------------------------------------------------------

BROKEN = HUMAN_EVAL | {"task_id": "b/1", "prompt": "def third(x):\n    \"\"\"x / 3.\"\"\"\n",
                       "entry_point": "third",
                       "canonical_solution": "    return x / 3\n",
                       "test": "import no_such_module\ndef check(c):\n    assert c(3) == 1\n"}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tasks(tmp_path, *rows):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ALLOWED = ["--allow-code-execution", "as-root"]


@pytest.mark.slow
def test_a_task_that_its_own_solution_fails_is_refused_with_the_reason(tmp_path, capsys, cache):
    """It was taken, and every draft for it judged wrong without a word."""
    path = tasks(tmp_path, HUMAN_EVAL, BROKEN, MBPP)
    split = ["split", "--data", str(path), "--sizes", "sft=2", "--out", str(tmp_path / "s")]
    for command in (["check", str(path)], split):
        assert data.main([*command, *ALLOWED]) == 2
        said = capsys.readouterr().err
        assert ("the known solution of 1 of 3 tasks" in said and "b/1" in said
                and "no_such_module" in said)
    posts = data.load_posts(path)
    # what every phase does before its first step
    with pytest.raises(InputError, match="1 of 3 tasks .*no_such_module"):
        data.load_domain(path, "auto", posts).permit("as-root")
    assert not (tmp_path / "s").exists()
    assert data.main([*split, *ALLOWED, "--skip-bad-lines"]) == 0
    said = capsys.readouterr()
    assert ("2 of 3 known solutions pass their tests; 1 tasks left out" in said.out
            and "no_such_module" in said.err)
    assert sorted(p.id for p in data.load_posts(tmp_path / "s" / "sft.jsonl")) == ["901",
                                                                                   "HumanEval/900"]


def test_check_says_when_solutions_were_not_run(tmp_path, capsys, cache):
    assert data.main(["check", str(tasks(tmp_path, HUMAN_EVAL, BROKEN))]) == 0
    assert "2 tasks of code, whose known solutions were not run" in capsys.readouterr().out


@pytest.mark.slow
def test_a_known_solution_that_passed_is_not_run_again_and_one_that_failed_is(tmp_path, monkeypatch,
                                                                              cache):
    posts = data.load_posts(tasks(tmp_path, HUMAN_EVAL, BROKEN))
    ran = []
    run = sandbox.run_program
    monkeypatch.setattr(solutions, "run_program",
                        lambda **job: (ran.append(job["program"]), run(**job))[1])
    assert list(solutions.failing_solutions(posts, True)) == [1]
    first = len(ran)
    assert list(solutions.failing_solutions(posts, True)) == [1]
    assert first == 3 and ["third" in program for program in ran[first:]] == [True, True]
    changed = data.load_posts(tasks(tmp_path,
                                    HUMAN_EVAL | {"test": "def check(c):\n    assert c(5) == 3\n"}))
    # other tests: no pass of before counts
    assert list(solutions.failing_solutions(changed, True)) == [0]


def test_a_cache_that_cannot_be_written_or_read_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    posts = data.load_posts(tasks(tmp_path, HUMAN_EVAL))
    assert solutions.failing_solutions(posts,
                                       True) == {} == solutions.failing_solutions(posts, True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    solutions.cache_file().parent.mkdir()
    solutions.cache_file().write_text("{")
    assert solutions.failing_solutions(posts, True) == {}


@pytest.mark.multirank
def test_one_rank_alone_runs_the_known_solutions(tmp_path, monkeypatch, cache):
    path = tasks(tmp_path, BROKEN)
    domain = data.load_domain(path, "auto", data.load_posts(path))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    domain.permit("as-root")
    assert domain.permitted


def test_classes_of_a_task_s_prompt_live_in_the_program(tmp_path):
    prompt = ("class Node:\n    def __init__(self, value, next=None):\n        self.value, "
              "self.next = value, next\n\n"
              "def total(node):\n    \"\"\"The sum of a list of nodes.\"\"\"\n")
    row = {"entry_point": "total", "prompt": prompt,
           "canonical_solution": "    return node.value + total(node.next) if node else 0\n",
           "test": "def check(c):\n    assert c(Node(1, Node(2))) == 3\n"}
    post, = data.load_posts(tasks(tmp_path, row))
    domain = data.make_domain("auto", [post])
    domain.permit("as-root")
    assert domain.styles_of(post, post.replies[0]) == ("right",)
    assert domain.styles_of(post, "```python\ndef total(node):\n    return 4\n```") == ()
