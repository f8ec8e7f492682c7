"""The sandbox against programs that mean harm, and the formats of tasks."""

import gzip
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import data
import sandbox
from data import InputError

TASKS = Path(__file__).resolve().parent.parent.parent / "shared/data"
RIGHT, TEST = "def f(x):\n    return x + 1\n", "assert f(1) == 2\nassert f([1][0] + 1) == 3\n"
SECONDS = 2


def run(program, test=TEST, **more):
    return sandbox.run_program(program, test, allowed=True, **({"seconds": SECONDS} | more))


def works():
    try:
        return run(RIGHT, seconds=30).passed
    except sandbox.NotAllowed:
        return False


pytestmark = pytest.mark.skipif(not works(), reason="this machine has no namespaces for the sandbox")

# Each would pass, or do harm, if it could: f is wrong, or the program does what nobody may do and only then is
# f right, so that a pass shows what was not prevented.
HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "endless output": "while True:\n    try:\n        print('x' * 10000)\n    except OSError:\n        pass",
    "memory bomb": "a = []\nwhile True:\n    a.append(bytearray(1 << 24))\n",
    "memory in files": "import os\nfor i in range(1000):\n    open(f'f{i}', 'w').write('x' * 10 ** 6)\n" + RIGHT,
    "sleep": "import time\ntime.sleep(1000)",
    "endless loop in a call": "def f(x):\n    while True:\n        pass",
    "reading passwords": "open('/etc/passwd').read()\n" + RIGHT,
    "reading a home": "import os\nassert os.listdir(os.path.expanduser('~')) or os.listdir('/root')\n" + RIGHT,
    "network": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)\n" + RIGHT,
    "writing outside": "open('/usr/lib/forged', 'w').write('x')\n" + RIGHT,
    "writing to the harness": "open('TMP/forged', 'w').write('x')\n" + RIGHT,
    "killing its parent": "import os, signal\nassert os.getppid()\nos.kill(os.getppid(), signal.SIGKILL)\n" + RIGHT,
    "killing everybody": "import os\nos.kill(-1, 9)\n",
    "leaving at once": "import os\nos._exit(0)",
    "leaving in a call": "import os\ndef f(x):\n    os._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "printing the mark": "import os, sys\nfor i in range(64):\n    try:\n        os.write(i, b'{\"passed\": true, \"why\":"
                         " \"\", \"output\": \"\"}\\n')\n    except OSError:\n        pass\n",
    "patching built-ins": "import builtins, ast\nbuiltins.exec = builtins.compile = lambda *a: None\n"
                          "AssertionError = builtins.AssertionError = Warning\ndef f(x):\n    return 0",
    "patching the checker": "import sys\nm = sys.modules['__main__']\nm.examine = lambda *a: (True, '')\n"
                            "m.answer(True)\nm.decode = m.Caller.ask = lambda *a: 2\ndef f(x):\n    return 0",
    "an equal of all": "class E(int):\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return E(7)",
    "an object equal to all": "class E:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return E()",
    "reading the tests": "import gc, sys, os\nseen = []\nframe = sys._getframe()\nwhile frame:\n"
                         "    seen.append(str(frame.f_locals)); frame = frame.f_back\n"
                         "seen += [str(o) for o in gc.get_objects() if type(o) in (dict, list, tuple)]\n"
                         "assert any('MARK' + chr(69) + 'D' in s for s in seen)\n" + RIGHT,
    "taking the walls down": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
                             "assert libc.unshare(0x10000000) == 0 or libc.mount(b'tmpfs', b'/usr', b'tmpfs', 0, None)"
                             " == 0 or libc.chroot(b'/tmp') == 0\n" + RIGHT,
}


def test_hostile_programs_neither_pass_nor_harm_and_all_end_in_time(tmp_path):
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
    assert not list(tmp_path.iterdir()) and not Path("/usr/lib/forged").exists() and run(RIGHT, seconds=30).passed


def test_a_child_left_behind_is_ended_and_output_is_capped():
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
    return [line.parent.name for line in Path("/proc").glob("[0-9]*/cmdline") if mark in text_of(line)]


def text_of(path):
    try:
        return path.read_bytes()
    except OSError:                          # it has ended
        return b""


def test_the_environment_is_empty_and_the_folder_too():
    program = ("import os, sys\ndef f(x):\n    return [sorted(os.environ), os.getcwd(), os.listdir('.'), "
               "os.getpid(), os.getppid(), os.getuid() == 0, sys.argv[2:]]\n")
    got = run(program, "raise ValueError(f(1))", seconds=30).why
    assert got in (f"ValueError: {[e, '/tmp', [], 1, 0, False, []]}" for e in ([], ["LC_CTYPE"])), got


def test_values_go_to_the_program_and_back_as_they_are():
    values = [None, True, 10 ** 500, -1, 0.1, float("inf"), "é\n", b"\x00", (1, [2, {3}]), {"a": (1,), 2: frozenset([1])},
              2 + 1j, [], set()]
    assert run("def f(x):\n    return x", f"inf = float('inf')\nfor v in {values!r}:\n    assert f(v) == v\n"
               "    assert type(f(v)) is type(v)", seconds=30) == sandbox.Verdict(True)
    program = ("class Node:\n    def __init__(self, v):\n        self.v = v\n"
               "def g(n):\n    return n.v + n.next.v\ndef h(x):\n    raise KeyError('no')\n")
    test = ("a = Node(1)\na.next = Node(4)\nassert g(a) == 5 and a.v == 1 and a == a and a != Node(1)\ntry:\n"
            "    h(1)\n    assert False\nexcept KeyError:\n    pass")
    assert run(program, test, seconds=30).passed


def test_what_decides_a_test_is_the_checkers_own():
    program = "class math:\n    isclose = lambda *a: True\ndef abs(x):\n    return 0\ndef f(x):\n    return 9.0"
    assert not run(program, "assert math.isclose(f(1), 2)", setup="import math", seconds=30).passed
    assert not run(program, "assert math.isclose(f(1), 2)", seconds=30).passed
    assert not run(program, "assert abs(f(1) - 2) < 1", seconds=30).passed


def test_running_code_is_off_and_refused_to_root_unless_told_otherwise(monkeypatch):
    with pytest.raises(sandbox.NotAllowed, match="--allow-code-execution"):
        sandbox.allowance(False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(sandbox.NotAllowed, match="as-root"):
        sandbox.allowance("yes")
    assert sandbox.allowance("as-root")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert sandbox.allowance("yes")


HUMAN_EVAL = {"task_id": "HumanEval/900", "prompt": "from math import floor\n\ndef half(x):\n    \"\"\"x / 2, down.\"\"\"\n",
              "canonical_solution": "    return floor(x / 2)\n", "entry_point": "half",
              "test": "def check(candidate):\n    assert candidate(5) == 2\n    assert candidate(4) == 2\n"}
MBPP = {"task_id": 901, "text": "Write a function to double a number.", "code": "def twice(x):\r\n  return 2 * x",
        "test_setup_code": "", "test_list": ["assert twice(2) == 4", "assert twice(0) == 0"], "challenge_test_list": []}


def code_posts(tmp_path, *lines):
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    posts = data.load_posts(tmp_path / "tasks.jsonl")
    domain = data.load_domain(tmp_path / "tasks.jsonl", "auto", posts)
    domain.permit("as-root")
    return posts, domain


def test_tasks_in_both_formats_are_read_split_and_judged(tmp_path):
    posts, domain = code_posts(tmp_path, HUMAN_EVAL, MBPP)
    assert domain.name == "code" and domain.voices == ("right",) and domain.popularity_of(posts[0]) == {"right": 1}
    human, mbpp = posts
    assert "assert twice(2) == 4" in mbpp.post and "twice(0)" not in mbpp.post and human.id == "HumanEval/900"
    drafts = [human.replies[0], "Sure:\n```python\ndef half(x):\n    return floor(x / 2)\n```\nDone.",
              "    return x // 2", "```\ndef half(x):\n    return x / 2\n```", "I cannot.", ""]
    assert [domain.voices_of(human, d) for d in drafts] == [("right",)] * 3 + [()] * 3
    assert [domain.voices_of(mbpp, d) for d in (mbpp.replies[0], "def twice(x): return 4", "import os; os._exit(0)")] == [
        ("right",), (), ()]
    data.save_posts(posts, tmp_path / "again.jsonl")
    assert data.load_posts(tmp_path / "again.jsonl") == posts
    locked = data.Code(posts)
    with pytest.raises(InputError, match="allowance|--allow"):
        locked.voices_of(human, "x")
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
        assert domain.voices_of(post, post.replies[0]) == ("right",), post.id
        assert domain.voices_of(post, post.replies[0].replace("return", "return None and")) == ()


def test_prompts_without_replies_are_stories(tmp_path):
    lines = [{"id": f"s{i}", "prompt": f"Tell a story about {w}."} for i, w in enumerate(("rain", "a boat", "ants"))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    posts = data.load_posts(tmp_path / "prompts.jsonl")
    domain = data.load_domain(tmp_path / "prompts.jsonl", "auto", posts)
    assert domain.name == "stories" and not domain.voices and posts[1].post == "Tell a story about a boat."
    assert domain.messages(posts[0]) == [{"role": "user", "content": "Tell a story about rain."}]
    data.save_posts(posts, tmp_path / "again.jsonl")
    assert data.load_posts(tmp_path / "again.jsonl") == posts
    with pytest.raises(InputError, match="no verifier"):
        domain.voices_of(posts[0], "x")
    with pytest.raises(InputError, match="no reply to learn from"):
        domain.reply(posts[0], None, None)
