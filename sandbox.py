"""Running programs that nobody has read: the tests of code drafts, where they can do no harm.

    verdict = run_program(program, test, allowed=allowance(args.allow_code_execution))
    verdict.passed, verdict.why, verdict.output

Three processes, each a child of the one before, none of which holds anything of ours:

    guard    a fresh interpreter (python -I -S, no environment, a session of its own). It makes
             namespaces (network, mount, pid, ipc; user too unless it is root) and is killed by an
             alarm.
    checker  pid 1 of these namespaces: its end is the end of everything in them, daemons included.
             Its root is an empty tmpfs with Python's library and the system's shared libraries,
             read-only, and one small folder to write in. It gives up root, for a user that nobody
             else is, runs the tests and writes the verdict.
    program  pid 1 of a namespace below, without capabilities, under limits. It loads the program
             and answers the checker's calls over two pipes.

The verdict cannot be forged: the program never holds the pipe that it goes through, sees neither
checker nor guard, and is forked before the tests are read, so that they are not in its memory
either. What a call returns is rebuilt by the checker from plain values: `==` is the checker's, not
one that the program's class defines; built-in names and modules in the tests are the checker's too.
What remains: a kernel's own faults (there is no seccomp filter, no virtual machine), the time and
memory that the limits allow, reading the shared libraries of this machine. Linux only."""

import ast
import builtins
import ctypes
import json
import os
import re
import signal
import subprocess
import textwrap
import sys
import types
from dataclasses import dataclass

try:
    import resource
except ImportError:                        # Windows has none, and no namespaces either
    resource = None

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 32, 4096, 16384, 1 << 18)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP = 1, 4, 38, 24
NOBODY, OWN_USERS = 65534, 2 ** 30
LONGEST = 2 ** 20                # bytes of one message of the program, and of its output file
SHOWN = 2000                     # characters of output and reasons that are handed on
NAMESPACES = "namespaces: "      # begins the reason when the machine does not allow any


class NotAllowed(ValueError):
    """Programs may not be run here: says why, and what would change that."""


@dataclass(frozen=True)
class Verdict:
    """passed: all tests ran and held. why: the first thing that went wrong. output: the beginning
    of what the program wrote."""
    passed: bool
    why: str = ""
    output: str = ""


def allowance(given):
    """The value of --allow-code-execution (False: absent, yes or as-root) -> True; NotAllowed
    where programs may not be run."""
    if not given:
        raise NotAllowed("drafts of code are judged by running them: give --allow-code-execution "
                         "if this machine may run programs that nobody has read, in a sandbox")
    if not sys.platform.startswith("linux"):
        raise NotAllowed("the sandbox for code needs Linux's namespaces: use another machine")
    if os.geteuid() == 0 and given != "as-root":
        raise NotAllowed("programs that nobody has read are not run by root: start as another "
                         "user, or give --allow-code-execution as-root (the sandbox then gives "
                         "root up itself)")
    return True


def run_program(program, test, *, allowed, setup="", names=None, seconds=10, memory=512):
    """Verdict of a program's text under the test's text.

    setup is run by the checker before the test. names: what the tests take from the program;
    None: every name they use that is no built-in and no module. seconds: of wall time and of
    processor time; memory in MiB. NotAllowed where the machine has no namespaces for us."""
    if not allowed:
        raise NotAllowed("run_program needs allowance()")
    job = json.dumps({"program": program, "test": test, "setup": setup, "names": names})
    limits = json.dumps({"seconds": int(seconds), "memory": int(memory)})
    guard = subprocess.Popen([sys.executable, "-I", "-S", os.path.abspath(__file__), limits],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}, cwd="/",
                             stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        said, _ = guard.communicate(job.encode(), timeout=seconds + 20)
    except subprocess.TimeoutExpired:        # the guard's alarm comes first, unless it was stopped
        said = b""
    finally:
        guard.kill()
        guard.communicate()
    try:
        verdict = Verdict(**json.loads(said))
    except ValueError:
        late = guard.returncode == -signal.SIGALRM
        return Verdict(False, "out of time" if late else "the sandbox ended without a verdict")
    if verdict.why.startswith(NAMESPACES):
        raise NotAllowed(f"the sandbox for code cannot be made on this machine ({verdict.why}): "
                         "it needs user namespaces (sysctl user.max_user_namespaces, and the "
                         "container's leave)")
    return verdict


def render_template(template, chats, seconds=3, memory=512):
    """The text that a checkpoint's chat template, in Jinja, makes of each chat; ValueError where it
    makes none. A template is a program, too: Jinja keeps it from files and from Python's objects,
    and bounds neither its loops nor its products. So a child does the work, which is ended after
    `seconds` of processor time and has `memory` MiB."""
    job = json.dumps({"template": template, "chats": chats, "seconds": seconds, "memory": memory})
    try:
        ran = subprocess.run([sys.executable, os.path.abspath(__file__), "template"],
                             input=job.encode(), capture_output=True, timeout=20 * seconds)
        said = json.loads(ran.stdout)
    except (ValueError, subprocess.TimeoutExpired):
        raise ValueError("it takes too much time or memory") from None
    if isinstance(said, str):
        raise ValueError(said)
    return said


def render(job):
    """What the child of render_template does: writes the texts, or one text that says why not."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # comes with torch
    for name, value in (("CPU", job["seconds"]), ("AS", job["memory"] << 20)):
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        except (AttributeError, OSError, ValueError):  # Windows has no limits, macOS not all
            pass
    try:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(job["template"])
        said = [template.render(messages=chat, add_generation_prompt=True, enable_thinking=False,
                                bos_token="", eos_token="") for chat in job["chats"]]
        said = said if max(map(len, said)) < LONGEST else "it writes a megabyte"
    except Exception as e:                   # somebody's program: it may fail in any way
        said = f"{type(e).__name__}: {str(e)[:SHOWN]}"
    print(json.dumps(said))


# ---- Tasks, in the formats of HumanEval and MBPP -------------------------------------------------

def as_post(d):
    """The fields of ours that a line in HumanEval's or MBPP's format, or a prompt, stands for. A
    task's tests: {setup, test, names, head}, see run_program; head opens every program."""
    text = lambda *names: [d[n] if isinstance(d.get(n), str) else "" for n in names]
    if d.get("post") is not None or d.get("tweet") is not None:
        return {}
    if "entry_point" in d:
        prompt, answer, test, name = text("prompt", "canonical_solution", "test", "entry_point")
        if not (prompt and answer and test and name.isidentifier()):
            raise ValueError('a task needs texts "prompt", "canonical_solution" and "test", and a '
                             'name "entry_point"')
        return {"id": d.get("task_id"), "replies": {"right": fenced(prompt + answer)},
                "post": f"Complete this Python function:\n\n{fenced(prompt)}",
                "tests": {"setup": prompt + "    pass\n", "test": f"{test}\ncheck({name})\n",
                          "names": [name], "head": prompt}}
    if "test_list" in d:
        said, answer, setup = text("text", "code", "test_setup_code")
        tests = d["test_list"]
        if not (said and answer and isinstance(tests, list) and tests
                and all(isinstance(t, str) for t in tests)):
            raise ValueError('a task needs texts "text" and "code", and a list "test_list"')
        return {"id": d.get("task_id"), "replies": {"right": fenced(answer)},
                "post": f"{said}\n\nYour code must pass this test:\n\n{fenced(tests[0])}",
                "tests": {"setup": setup, "test": "\n".join(tests), "names": names_of(answer),
                          "head": ""}}
    return {"post": d["prompt"]} if d.get("prompt") is not None else {}


def names_of(answer):
    """The functions and classes of a program; None where this Python cannot read it."""
    try:
        body = ast.parse(answer).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def fenced(code):
    return f"```python\n{code.rstrip()}\n```"


def checked_tests(tests):
    """What save_posts writes of a task's tests; ValueError for anything else."""
    kinds = {"setup": str, "test": str, "names": (list, type(None)), "head": str}
    if not isinstance(tests, dict) or tests.keys() != kinds.keys() or not all(
            isinstance(tests[k], kind) for k, kind in kinds.items()):
        raise ValueError('"tests" is not what data.py split writes')
    return tests


def program_of(draft, head, names):
    """The program in a draft: its fenced block, the first that defines the function asked for, or
    all of it. After the task's head, so that its imports are there; where the function is not
    defined anew, what is there is its body."""
    name = re.escape(names[0]) if names else ""
    defined = lambda text: not name or re.search(rf"^\s*def +{name}\b|^{name}\s*=", text, re.M)
    blocks = re.findall(r"(?:```|~~~)[ \t]*\w*[ \t\r]*\n(.*?)(?:```|~~~|\Z)", draft, re.S) or [draft]
    code = next(filter(defined, blocks), blocks[0])
    if head and defined(code):
        return f"{head}    pass\n\n{code}"
    if head and code[:1].strip():
        # A draft is stripped, of its first line's indent too; one that is flat was written so.
        flat = re.search(r"^\S", code.partition("\n")[2], re.M)
        code = textwrap.indent(code, "    ") if flat else f"    {code}"
    return head + code


# ---- The guard and the walls ---------------------------------------------------------------------

def call(name, *args):
    """A function of libc; OSError when it fails. Python 3.11 has no os.unshare, and no version has
    mount, prctl or capset."""
    libc = ctypes.CDLL(None, use_errno=True)
    args = [a.encode() if isinstance(a, str) else a for a in args]
    if getattr(libc, name)(*args) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def guard(limits):
    """Make the namespaces, fork the checker and wait for it."""
    signal.alarm(limits["seconds"] + 1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        if os.geteuid():
            uid, gid = os.geteuid(), os.getegid()
            call("unshare", CLONE_NEWUSER)
            write("/proc/self/setgroups", "deny")
            write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
            write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
        call("unshare", CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC)
    except OSError as e:
        return answer(False, NAMESPACES + str(e))
    number = OWN_USERS + os.getpid()         # limits of processes are counted by user
    child = os.fork()
    if not child:
        checker(limits, number)
        os._exit(0)
    os.close(0)
    os.close(1)
    os.waitpid(child, 0)


def walls():
    """A root of nothing but Python's library and the shared libraries, read-only, and /tmp, which
    is empty and small. It is gone with the namespace. The old root is taken off: there is no way
    back to it."""
    call("mount", None, "/", None, MS_REC | MS_PRIVATE, None)
    base, root = "/tmp", "/tmp/jail"         # any folder: the mounts are seen in here alone
    library = os.path.dirname(os.path.abspath(os.__file__))
    places = [library, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"]
    kept = [p for p in dict.fromkeys(map(os.path.realpath, places)) if os.path.isdir(p)]
    opened = [(p, os.open(p, os.O_PATH)) for p in kept]
    links = [(p, os.readlink(p)) for p in places if os.path.islink(p)]
    call("mount", "tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,nr_inodes=2k,mode=755")
    held = MS_NOSUID | MS_NODEV | MS_RDONLY
    for place, fd in opened:                 # by descriptor: /tmp may have held one
        os.makedirs(root + place, exist_ok=True)
        call("mount", f"/proc/self/fd/{fd}", root + place, None, MS_BIND | MS_REC, None)
        call("mount", None, root + place, None, MS_REMOUNT | MS_BIND | held, None)
        os.close(fd)
    for place, target in links:
        if not os.path.lexists(root + place):
            os.makedirs(os.path.dirname(root + place), exist_ok=True)
            os.symlink(target, root + place)
    for folder in (root + "/tmp", base + "/old"):
        os.makedirs(folder, exist_ok=True)
    call("mount", "tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV,
         "size=8m,nr_inodes=256,mode=777")
    call("pivot_root", base, base + "/old")
    os.chdir("/")
    call("umount2", "/old", 2)               # MNT_DETACH
    call("mount", None, "/", None, MS_REMOUNT | MS_BIND | held, None)
    os.chroot("/jail")                       # in a chroot no user namespace can be made
    os.chdir("/tmp")


def limit(limits, processes):
    """Of one process; what it starts inherits them. Those of processes are counted in the
    namespace."""
    for name, value in (("CPU", limits["seconds"]), ("AS", limits["memory"] << 20),
                        ("NPROC", processes), ("FSIZE", LONGEST), ("NOFILE", 64), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def drop_capabilities():
    """Of the user namespace: with them the walls could be taken down from inside."""
    for number in range(64):
        try:
            call("prctl", PR_CAPBSET_DROP, number, 0, 0, 0)
        except OSError:
            break                            # no such capability
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())


# ---- The checker: it runs the tests --------------------------------------------------------------

def answer(passed, why="", output=""):
    """The verdict, on the pipe to our own process."""
    verdict = {"passed": passed, "why": why[:SHOWN], "output": output[:SHOWN]}
    os.write(1, json.dumps(verdict).encode())


def checker(limits, user):
    """Pid 1: builds the walls, forks the program's process, then reads the job and tests it."""
    walls()
    out = os.open("/tmp/output", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink("/tmp/output")
    there, here = os.pipe(), os.pipe()
    call("unshare", CLONE_NEWPID)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)    # a change of user would undo it
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    if not os.fork():
        serve(there[0], here[1], out, limits)
    os.close(there[0])
    os.close(here[1])
    drop_capabilities()
    limit(limits | {"memory": 2 * limits["memory"]}, 0)
    job = json.loads(read_all(0))
    try:
        verdict = examine(Caller(here[0], there[1]), job)
    except BaseException as e:  # whatever a test, or what the program sent, raises is a failure
        verdict = False, f"{type(e).__name__}: {e}"
    answer(*verdict, os.pread(out, SHOWN, 0).decode(errors="replace"))


def read_all(fd):
    parts = []
    while part := os.read(fd, 1 << 16):
        parts.append(part)
    return b"".join(parts)


def examine(caller, job):
    """Load the program, run the tests -> (passed, why)."""
    offered = caller.ask("load", job["program"])
    names = job["names"]
    nodes = [*ast.walk(ast.parse(job["setup"])), *ast.walk(ast.parse(job["test"]))]
    used = sorted({n.id for n in nodes if isinstance(n, ast.Name)})
    owners = {n.value.id for n in nodes if isinstance(n, ast.Attribute)
              and isinstance(n.value, ast.Name)}
    # Never the program's: `math.isclose` decides a test.
    space = {name: __import__(name) for name in owners & sys.stdlib_module_names}
    if names is None:
        names = [n for n in used if n not in space and not hasattr(builtins, n)]
    taken = {n: offered[n] for n in names if n in offered}
    space |= taken
    exec(compile(job["setup"], "setup", "exec"), space)
    space |= taken                           # the setup may hold a stub of the same name
    exec(compile(job["test"], "test", "exec"), space)
    return True, ""


class Caller:
    """The checker's end of the pipes: asks, and takes the answer for plain values."""

    def __init__(self, reading, writing):
        self.reading, self.writing = reading, writing

    def ask(self, what, *args):
        send(self.writing, [what, [encode(a, handle_of) for a in args]])
        kind, value = json.loads(receive(self.reading))
        if kind == "raised":
            error = getattr(builtins, str(value[0]), None)
            good = isinstance(error, type) and issubclass(error, Exception)
            try:
                raised = (error if good else RuntimeError)(str(value[1]))
            except TypeError:
                raised = RuntimeError(str(value[1]))
            raise raised
        return decode(value, lambda number: Remote(self, number))


class Remote:
    """Something of the program's that is no plain value: a function, a class, an object. Equal to
    itself alone, whatever it says."""

    def __init__(self, caller, number):
        self.__dict__.update(_caller=caller, _number=number)

    def __call__(self, *args, **named):
        return self._caller.ask("call", self, list(args), named)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._caller.ask("get", self, name)

    def __setattr__(self, name, value):
        self._caller.ask("set", self, name, value)

    def __iter__(self):
        return iter(self._caller.ask("list", self))

    def __eq__(self, other):
        return isinstance(other, Remote) and other._number == self._number

    __hash__ = None


def handle_of(value):
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"a {type(value).__name__} cannot be handed to the program")


# ---- Values on the pipes -------------------------------------------------------------------------

def encode(value, handle):
    """A value as JSON: plain ones by kind, subclasses as what they derive from, anything else by
    the number that handle(value) gives."""
    if value is None or value is True or value is False:
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            plain = kind.__pos__(value) if kind is not str else str.__str__(value)
            return ["i", hex(plain)] if kind is int else plain
    for letter, kind in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
        if isinstance(value, kind):
            return [letter, [encode(v, handle) for v in kind.__iter__(value)]]
    if isinstance(value, dict):
        return ["d", [[encode(k, handle), encode(v, handle)] for k, v in dict.items(value)]]
    if isinstance(value, complex):
        return ["c", [value.real, value.imag]]
    if isinstance(value, (bytes, bytearray)):
        return ["b", bytes(value).hex()]
    if isinstance(value, type) and value.__module__ == "builtins":
        return ["y", value.__name__]
    return ["h", handle(value)]


def decode(value, thing):
    """encode's inverse; thing(number) finds what a number stands for."""
    if not isinstance(value, list):
        return value
    letter, inner = value
    if letter in "ltsz":
        kind = {"l": list, "t": tuple, "s": set, "z": frozenset}[letter]
        return kind(decode(v, thing) for v in inner)
    if letter == "d":
        return {decode(k, thing): decode(v, thing) for k, v in inner}
    simple = {"i": lambda x: int(x, 16), "c": lambda x: complex(*x), "b": bytes.fromhex,
              "h": thing, "y": PLAIN_TYPES.__getitem__}
    return simple[letter](inner)


PLAIN_TYPES = {k: v for k, v in vars(builtins).items() if isinstance(v, type)}


def send(fd, message):
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(fd, line):]


def receive(fd):
    """One line. EOFError when the other side is gone or talks without end."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(fd, 1 << 16)
        line += part
        if not part or len(line) > 4 * LONGEST:
            raise EOFError("the program ended, or broke the pipe")
    return line


# ---- The program's process -----------------------------------------------------------------------

def serve(reading, writing, out, limits):
    """Load the program and answer calls. From the program's first line on nothing in this process
    is to be trusted: all that it can do is to answer wrongly."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for fd, target in ((reading, 3), (writing, 4), (out, 5)):
        os.dup2(os.dup2(fd, target + 20), target + 40)
    for fd, source in enumerate((45, 45, 45, 43, 44)):   # input: the output's file, at its end
        os.dup2(source, fd)
    os.closerange(5, 256)
    drop_capabilities()
    limit(limits, 16)
    sys.stdout.reconfigure(line_buffering=True)
    sys.setrecursionlimit(10_000)
    things = []

    def number(value):
        things.append(value)
        return len(things) - 1
    while True:
        what, args = json.loads(receive(3))
        try:
            args = [decode(a, things.__getitem__) for a in args]
            said = ["value", encode(perform(what, *args), number)]
        except BaseException as e:
            said = ["raised", [type(e).__name__, str(e)[:SHOWN]]]
        send(4, said)


def perform(what, *args):
    if what == "load":
        space = types.ModuleType("program").__dict__
        sys.modules["program"] = types.ModuleType("program")
        exec(compile(args[0], "program", "exec"), space)
        return {k: v for k, v in space.items() if not k.startswith("__")}
    if what == "call":
        return args[0](*args[1], **args[2])
    return {"get": getattr, "set": setattr, "list": list}[what](*args)


if __name__ == "__main__":
    if sys.argv[1] == "template":
        render(json.load(sys.stdin))
    else:
        sys.set_int_max_str_digits(0)
        guard(json.loads(sys.argv[1]))
