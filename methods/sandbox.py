"""Running programs that nobody has read, where they can do no harm: tests of code completions.

    verdict = run_program(program, test, allowed=allowance(args.allow_code_execution))
    verdict.passed, verdict.why, verdict.output

Three processes, each a child of the one before, none of which has access to this process:

    guard    a fresh interpreter (python -I -S, no environment, its own session). It makes
             namespaces (network, mount, pid, ipc; user too unless it is root) and is killed by an
             alarm.
    checker  pid 1 of these namespaces: when it ends, everything in them ends, daemons included.
             Its root is an empty tmpfs with Python's library and the system's shared libraries,
             read-only, and one small folder to write in. It gives up root for a user id that
             nobody else has, runs the tests and writes the verdict.
    program  pid 1 of a namespace below, without capabilities, under limits. It loads the program
             and answers the checker's calls over two pipes.

The verdict cannot be forged. The program never holds the pipe on which it is sent, sees neither
checker nor guard, and is forked before the tests are read, so that they are not in its memory. A
value that a call returns is rebuilt by the checker if it is of one of Python's own types or of
numpy: `==` with it is the checker's, not one that the program's class defines. Built-in names and
modules in the tests are the checker's too. Other objects stay in their process and are used
through the pipes: the program's by the tests, the tests' functions and objects by the program. An
object of the program is never equal to a value of the checker, and cannot be added to one or
compared with one, so that no class can pass for the right answer; between two objects of the
program their class decides. numpy may be imported if it is installed.

What remains: faults of the kernel (there is no seccomp filter, no virtual machine), the time and
memory that the limits allow, reading the shared libraries of this machine. Linux only."""

import ast
import builtins
import copy
import ctypes
import importlib.util
import json
import operator
import os
import re
import signal
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
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

SHOWN = 2000                     # characters of output and reasons that are kept

NAMESPACES = "namespaces: "      # how the reason begins if the machine does not allow any


class NotAllowed(ValueError):
    """Programs may not be run here. The message says why, and how to change that."""


@dataclass(frozen=True)
class Verdict:
    """What came of a program's tests."""
    passed: bool                 # all tests ran and held
    why: str = ""                # the first thing that went wrong
    output: str = ""             # the beginning of what the program wrote


def allowance(given):
    """True if programs may be run, else NotAllowed is raised. given: the value of
    --allow-code-execution: False (absent), yes or as-root."""
    if not given:
        raise NotAllowed("completions of code are judged by running them: give "
                         "--allow-code-execution if this machine may run programs that nobody has "
                         "read, in a sandbox")
    if not sys.platform.startswith("linux"):
        raise NotAllowed("the sandbox for code needs Linux's namespaces: use another machine")
    if os.geteuid() == 0 and given != "as-root":
        raise NotAllowed("programs that nobody has read are not run by root: start as another "
                         "user, or give --allow-code-execution as-root (the sandbox then gives up "
                         "root itself)")
    return True


def run_program(program, test, *, allowed, setup="", names=None, seconds=10, memory=512):
    """The Verdict of a program (its text) under a test (its text).

    setup is run by the checker before the test. names: what the tests take from the program;
    None: every name they use that is neither built-in nor a module. seconds: of wall time and of
    processor time. memory: in MiB. NotAllowed if the machine grants no namespaces."""
    if not allowed:
        raise NotAllowed("run_program needs allowance()")
    job = json.dumps({"program": program, "test": test, "setup": setup, "names": names})
    limits = json.dumps({"numpy": numpy_folders(), "seconds": int(seconds), "memory": int(memory)})
    guard = subprocess.Popen([sys.executable, "-I", "-S", os.path.abspath(__file__), limits],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}, cwd="/",
                             stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        said, _ = guard.communicate(job.encode(), timeout=seconds + 20)
    except subprocess.TimeoutExpired:        # the guard's alarm is earlier, unless it was stopped
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
                         "container's permission)")
    return verdict


def numpy_folders():
    """numpy's folder and that of the libraries it was built with; [] if it is not installed."""
    try:
        found = importlib.util.find_spec("numpy")
    except (ImportError, ValueError):
        return []
    if found is None or not found.origin:
        return []
    folder = os.path.dirname(os.path.realpath(found.origin))
    return [f for f in (folder, folder + ".libs") if os.path.isdir(f)]


# ---- Tasks, in the formats of HumanEval and MBPP -------------------------------------------------

def as_task(d):
    """A line in HumanEval's or MBPP's format as fields of a post; {} for any other line. A task's
    tests are {setup, test, names, head}, see run_program; every program begins with head."""
    if "entry_point" in d:
        return human_eval_task(d)
    return mbpp_task(d) if "test_list" in d else {}


def texts_of(d, *names):
    return [d[name] if isinstance(d.get(name), str) else "" for name in names]


def human_eval_task(d):
    prompt, answer, test, name = texts_of(d, "prompt", "canonical_solution", "test", "entry_point")
    if not (prompt and answer and test and name.isidentifier()):
        raise ValueError('a task needs texts "prompt", "canonical_solution" and "test", and a '
                         'name "entry_point"')
    names = [name, *classes_of(prompt + "    pass\n")]
    return {"id": d.get("task_id"), "replies": {"right": fenced(prompt + answer)},
            "post": f"Complete this Python function:\n\n{fenced(prompt)}",
            "tests": {"setup": prompt + "    pass\n", "test": f"{test}\ncheck({name})\n",
                      "names": names, "head": prompt}}


def mbpp_task(d):
    """A task of MBPP, in either form: the full one has "text" and "test_setup_code", the sanitized
    one "prompt" and "test_imports"."""
    said, prompt, answer, setup = texts_of(d, "text", "prompt", "code", "test_setup_code")
    said, tests, imports = said or prompt, d["test_list"], d.get("test_imports") or []
    if not (said and answer and tests and all_texts(tests) and all_texts(imports)):
        raise ValueError('a task needs texts "text" (or "prompt") and "code", and a list '
                         '"test_list" of texts')
    test = "\n".join(tests)
    names = names_of(answer)
    if names:                                # first the one that the test calls, not its helpers
        names = sorted(names, key=lambda n: not re.search(rf"\b{re.escape(n)}\b", test))
    return {"id": d.get("task_id"), "replies": {"right": fenced(answer)},
            "post": f"{said}\n\nYour code must pass this test:\n\n{fenced(tests[0])}",
            "tests": {"setup": "\n".join([*imports, setup] if setup else imports),
                      "test": test, "names": names, "head": ""}}


def all_texts(values):
    return isinstance(values, list) and all(isinstance(v, str) for v in values)


def classes_of(code):
    """The names of the classes that a program defines at its top level; [] if this Python cannot
    parse it."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [n.name for n in body if isinstance(n, ast.ClassDef)]


def names_of(answer):
    """The names of a program's functions and classes; None if this Python cannot parse it."""
    try:
        body = ast.parse(answer).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def fenced(code):
    return f"```python\n{code.rstrip()}\n```"


def checked_tests(tests):
    """The tests of a task as save_posts writes them; ValueError for anything else."""
    kinds = {"setup": str, "test": str, "names": (list, type(None)), "head": str}
    if not isinstance(tests, dict) or tests.keys() != kinds.keys() or not all(
            isinstance(tests[k], kind) for k, kind in kinds.items()):
        raise ValueError('"tests" is not what data.py split writes')
    return tests


FENCE = re.compile(r"^(?P<before>[^\n`~]*)(?:```+|~~~+)(?P<info>[^\n`]*)\n"
                   r"(?P<code>.*?)(?:```|~~~|\Z)", re.M | re.S)


def blocks_of(completion):
    """The code of each fenced block of a completion. A block may be indented, in a list or in a
    quotation; the line of the opening fence is not part of it."""
    found = []
    for match in FENCE.finditer(completion):
        code, before = match["code"], match["before"]
        if before.lstrip().startswith(">"):
            code = re.sub(r"^[ \t]*>[ \t]?", "", code, flags=re.M)
        elif before:
            code = re.sub(rf"^[ \t]{{1,{len(before.expandtabs())}}}", "", code, flags=re.M)
        found.append(code)
    return found


def program_of(completion, head, names):
    """The program in a completion: the first fenced block that defines the wanted function, with
    what it needs of the other blocks; without blocks all of it. The task's head comes first, for
    its imports; if the function is not defined again, the code is the body of the head's."""
    name = re.escape(names[0]) if names else ""

    def defined(text):
        there = rf"^\s*(async +)?(def|class) +{name}\b|^{name}\s*="
        return not name or re.search(there, text, re.M)
    blocks = blocks_of(completion) or [completion]
    code = next(filter(defined, blocks), blocks[0])
    if defined(code):
        code = needed(textwrap.dedent(code), blocks) + textwrap.dedent(code)
    if head and defined(code):
        return f"{head}    pass\n\n{code}"
    if head and code[:1].strip():
        # A completion is stripped, and so its first line has lost its indent. If another line has
        # none, the whole was written without.
        flat = re.search(r"^\S", code.partition("\n")[2], re.M)
        code = textwrap.indent(code, "    ") if flat else f"    {code}"
    return head + code


def needed(code, blocks):
    """The other blocks that define names which the code uses but does not define."""
    chosen, before = code, ""
    others = [textwrap.dedent(b) for b in blocks if textwrap.dedent(b) != chosen]
    for _ in range(len(others)):             # a helper may need a helper
        used, own = names_in(before + chosen)
        more = [b for b in others if names_in(b)[1] & (used - own)]
        if not more:
            break
        others.remove(more[0])
        before = more[0].rstrip() + "\n\n" + before
    return before


def names_in(code):
    """(names that a program uses, names that its top level defines); two empty sets if this Python
    cannot parse it."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set(), set()
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    own = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            own |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        else:
            own |= {n.id for n in ast.walk(node)
                    if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return used, own


# ---- The guard and the new root ------------------------------------------------------------------

def call(name, *args):
    """Call a function of libc; OSError if it fails. Python 3.11 has no os.unshare, and no version
    has mount, prctl or capset."""
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


class OnlyNumpy:
    """Finds numpy, and no other package, in the folder where walls puts it."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "numpy":
            return importlib.machinery.PathFinder.find_spec(name, [PACKAGES])
        return None


PACKAGES = "/packages"           # in the new root


def walls(packages):
    """Make a root with only Python's library, the packages' folders and the shared libraries,
    read-only, and /tmp, which is empty and small. It ends with the namespace. The old root is
    unmounted: there is no way back to it."""
    call("mount", None, "/", None, MS_REC | MS_PRIVATE, None)
    base, root = "/tmp", "/tmp/jail"         # any folder: the mounts are visible only here
    library = os.path.dirname(os.path.abspath(os.__file__))
    places = [library, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"]
    kept = [p for p in dict.fromkeys(map(os.path.realpath, places)) if os.path.isdir(p)]
    targets = [(p, p) for p in kept]
    targets += [(p, f"{PACKAGES}/{os.path.basename(p)}") for p in packages]
    opened = [(target, os.open(p, os.O_PATH)) for p, target in targets]
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
    """Set the limits of this process, which its children inherit. The number of processes is
    counted in the namespace."""
    for name, value in (("CPU", limits["seconds"]), ("AS", limits["memory"] << 20),
                        ("NPROC", processes), ("FSIZE", LONGEST), ("NOFILE", 64), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def drop_capabilities():
    """Drop those of the user namespace, with which the new root could be undone from inside."""
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
    """Write the verdict to the pipe that run_program reads."""
    verdict = {"passed": passed, "why": why[:SHOWN], "output": output[:SHOWN]}
    os.write(1, json.dumps(verdict).encode())


def checker(limits, user):
    """Pid 1: make the new root, fork the program's process, then read the job and test it."""
    walls(limits["numpy"])
    if limits["numpy"]:
        sys.meta_path.append(OnlyNumpy)
        os.putenv("OPENBLAS_NUM_THREADS", "1")  # its threads take memory; os.environ stays empty
    out = os.open("/tmp/output", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink("/tmp/output")
    there, here = os.pipe(), os.pipe()
    call("unshare", CLONE_NEWPID)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)    # a change of user resets it
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    if not os.fork():
        serve(there[0], here[1], out, limits)
    os.close(there[0])
    os.close(here[1])
    drop_capabilities()
    limit(limits | {"memory": 2 * limits["memory"]}, 0)
    job = json.loads(read_all(0))
    try:
        verdict = examine(Caller(here[0], there[1], allowed_of_tests, strict=True), job)
    except BaseException as e:  # whatever a test, or a value of the program's, raises is a failure
        verdict = False, f"{type(e).__name__}: {e}"
    answer(*verdict, os.pread(out, SHOWN, 0).decode(errors="replace"))


def read_all(fd):
    parts = []
    while part := os.read(fd, 1 << 16):
        parts.append(part)
    return b"".join(parts)


TESTS = "tests"                  # the module of the tests' own classes and functions


def examine(caller, job):
    """(passed, why): load the program and run the tests."""
    offered = set(caller.ask("load", job["program"]))
    names = job["names"]
    nodes = [*ast.walk(ast.parse(job["setup"])), *ast.walk(ast.parse(job["test"]))]
    used = sorted({n.id for n in nodes if isinstance(n, ast.Name)})
    owners = {n.value.id for n in nodes if isinstance(n, ast.Attribute)
              and isinstance(n.value, ast.Name)}
    imported = {(a.asname or a.name).partition(".")[0] for n in nodes
                if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    # Never the program's: a test may depend on `math.isclose`.
    space = {name: __import__(name) for name in owners & sys.stdlib_module_names}
    for name in owners & {"np", "numpy"} - imported:
        if importlib.util.find_spec("numpy"):
            space[name] = importlib.import_module("numpy")
    if names is None:
        names = [n for n in used if n not in space and not hasattr(builtins, n)
                 and n not in imported]
    taken = caller.ask("names", [n for n in names if n in offered])
    space |= taken | {"__name__": TESTS}
    exec(compile(job["setup"], "setup", "exec"), space)
    space |= taken                           # the setup may define a stub of the same name
    exec(compile(job["test"], "test", "exec"), space)
    return True, ""


def allowed_of_tests(what, thing, *args):
    """Do what the program asks of the tests' functions and objects, if it is allowed: to call those
    that it was given, to advance an iterator, and any operation on an object whose class the tests
    define. Names that begin with _ give access to Python's internals and are refused."""
    own = type(thing).__module__ == TESTS
    if what == "call":
        good = own or isinstance(thing, CALLED) or getattr(thing, "__module__", "") == TESTS
    elif what in ("get", "set"):
        public = own and isinstance(args[0], str) and not args[0].startswith("_")
        if not public and (what == "set" or args[0] not in ("__name__", "__doc__")):
            raise AttributeError(args[0])
        good = True
    elif what in ("isinstance", "issubclass"):
        good = isinstance(thing, type) and thing.__module__ == TESTS
    else:
        good = own or what in ("iter", "next") and isinstance(thing, Iterator)
    if not good:
        raise TypeError(f"{what} of a {type(thing).__name__} of the tests' is not for the program")
    return OPERATIONS[what](thing, *args)


CALLED = (types.FunctionType, types.MethodType, types.BuiltinMethodType)

OPERATIONS = {
    "call": lambda thing, args, named: thing(*args, **named),
    "get": getattr, "set": setattr, "list": list, "len": len, "iter": iter, "next": next,
    "reversed": reversed, "str": str, "repr": repr, "format": format, "bool": bool, "hash": hash,
    "int": int, "float": float, "index": operator.index, "abs": abs, "round": round,
    "negative": operator.neg, "positive": operator.pos, "inverted": operator.invert,
    "item": operator.getitem, "set item": operator.setitem, "delete item": operator.delitem,
    "copy": copy.copy, "deep copy": copy.deepcopy,
    "isinstance": lambda kind, thing: isinstance(thing, kind),
    "issubclass": lambda kind, other: issubclass(other, kind),
    "enter": lambda thing: thing.__enter__(),
    "exit": lambda thing: thing.__exit__(None, None, None),
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge, "add": operator.add, "sub": operator.sub,
    "mul": operator.mul, "truediv": operator.truediv, "floordiv": operator.floordiv,
    "mod": operator.mod, "pow": operator.pow, "matmul": operator.matmul, "and": operator.and_,
    "or": operator.or_, "xor": operator.xor}


class Caller:
    """One end of the pipes: asks the other process, and answers what it asks in the meantime.

    perform(what, *args) does what is asked. strict: this is the checker, which trusts nothing that
    it receives."""

    def __init__(self, reading, writing, perform, strict=False):
        self.reading, self.writing, self.perform = reading, writing, perform
        self.strict = strict
        self.things, self.numbers = [], {}   # objects that the other side knows by number
        self.errors = {}                     # local classes for the other side's exceptions

    def ask(self, what, *args):
        send(self.writing, [what, [self.encode(a) for a in args]])
        while True:
            kind, *said = json.loads(receive(self.reading))
            if kind == "raised":
                raise self.error(*said)
            if kind == "value":
                value, changed = said
                for place, new in changed:
                    which, key = place
                    refresh(args[which][key], self.decode(new))
                return self.decode(value)
            self.answer(kind, *said)

    def answer(self, what, args):
        try:
            given = [self.decode(a) for a in args]
            value = self.encode(self.perform(what, *given))
            said = ["value", value, self.changes(given, args) if what == "call" else []]
        except BaseException as e:           # a program may fail in any way
            said = ["raised", *self.described(e)]
        send(self.writing, said)

    def changes(self, given, sent):
        """[[argument, place], new value] of each argument that a call has changed."""
        _, (_, values), (_, pairs) = sent
        places = [((1, i), given[1][i], old) for i, old in enumerate(values)]
        places += [((2, name), given[2][name], old) for name, old in pairs]
        out = []
        for place, value, old in places:
            if isinstance(old, list) and old[0] not in "ihoygcbrzx" and (
                    new := self.encode(value)) != old:
                out.append([place, new])
        return out

    # -- Values as JSON: ["letter", inner], or a plain value as itself --

    def encode(self, value):
        """A value as JSON: plain ones by type, subclasses as the type they derive from, values of
        the library and of numpy by what they are made from, anything else by a number."""
        if value is None or value is True or value is False:
            return value
        if type(value) not in PLAIN:
            special = self.special(value)
            if special is not None:
                return special
        for kind in (int, float, str):
            if isinstance(value, kind):
                plain = kind.__pos__(value) if kind is not str else str.__str__(value)
                return ["i", hex(plain)] if kind is int else plain
        for letter, kind in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
            if isinstance(value, kind):
                return [letter, [self.encode(v) for v in kind.__iter__(value)]]
        if isinstance(value, dict):
            return ["d", [[self.encode(k), self.encode(v)] for k, v in dict.items(value)]]
        if isinstance(value, complex):
            return ["c", [value.real, value.imag]]
        if isinstance(value, (bytes, memoryview)):
            return ["b", bytes(value).hex()]
        if isinstance(value, bytearray):
            return ["m", bytes(value).hex()]
        return ["o", self.number(value)]

    def special(self, value):
        """JSON of a value that is not plain but can be rebuilt, or is the other side's, or None."""
        if isinstance(value, Remote):
            return ["h", value._number]
        if isinstance(value, type):
            return self.encode_type(value)
        if isinstance(value, types.ModuleType) and self.strict:
            raise TypeError("a module cannot be handed to the program")
        if isinstance(value, range):
            return ["r", [value.start, value.stop, value.step]]
        if isinstance(value, (type({}.keys()), type({}.values()), type({}.items()))):
            return ["l", [self.encode(v) for v in value]]
        numpy = sys.modules.get("numpy")
        if numpy and isinstance(value, (numpy.ndarray, numpy.generic)):
            return self.encode_array(value, numpy)
        for kind in type(value).__mro__:
            taken = LIBRARY.get(f"{kind.__module__}.{kind.__qualname__}")
            if taken:
                return ["v", [f"{kind.__module__}.{kind.__qualname__}",
                              self.encode(taken.parts(value))]]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            fields = [str(name) for name in value._fields]
            return ["n", [type(value).__name__, fields, [self.encode(v) for v in value]]]
        if self.strict and callable(value):
            return self.by_name(value)
        return None

    def encode_type(self, kind):
        if PLAIN_TYPES.get(kind.__name__) is kind:
            return ["y", kind.__name__]
        if "_number" in vars(kind):          # a local class for one of the other side's exceptions
            return ["h", kind._number]
        if issubclass(kind, BaseException) and kind.__module__ != TESTS:
            return ["x", [self.number(kind), names_of_bases(kind)]]
        return self.by_name(kind) if self.strict else None

    def by_name(self, value):
        """JSON of a function or class of Python's own library, its name; None for any other."""
        owner = getattr(value, "__objclass__", value)      # str, of str.upper
        module, name = getattr(owner, "__module__", None), getattr(value, "__qualname__", "")
        if not is_library(module):
            return None
        try:
            found = operator.attrgetter(name)(sys.modules[module])
        except (AttributeError, KeyError):
            return None
        return ["g", [module, name]] if found is value else None

    def encode_array(self, value, numpy):
        array = numpy.asarray(value)
        if array.dtype.kind not in DTYPES:
            return ["l", [self.encode(v) for v in array.tolist()]]
        array = numpy.ascontiguousarray(array).reshape(array.shape)
        return ["a", [array.dtype.str, list(array.shape), array.tobytes().hex(),
                      isinstance(value, numpy.generic)]]

    def number(self, value):
        """The number by which the other side knows an object of this side, always the same one."""
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.things)
            self.things.append(value)        # kept, so that its id is not reused
        return self.numbers[id(value)]

    def decode(self, value):
        """The value that `encode` made JSON of."""
        if not isinstance(value, list):
            return value
        letter, inner = value
        if letter in "ltsz":
            kind = {"l": list, "t": tuple, "s": set, "z": frozenset}[letter]
            return kind(self.decode(v) for v in inner)
        if letter == "d":
            return {self.decode(k): self.decode(v) for k, v in inner}
        if letter == "n":
            name, fields, values = inner
            kind = sys.modules["collections"].namedtuple(name, fields)
            return kind(*(self.decode(v) for v in values))
        if letter == "v":
            return LIBRARY[inner[0]].made(self.decode(inner[1]))
        if letter == "x":
            return self.error_class(inner[1], inner[0])
        if letter == "g" and not self.strict:  # the program loads nothing into the checker
            return operator.attrgetter(inner[1])(importlib.import_module(inner[0]))
        simple = {"i": lambda x: int(x, 16), "c": lambda x: complex(*x), "b": bytes.fromhex,
                  "m": bytearray.fromhex, "r": lambda x: range(*x), "a": array_of,
                  "h": self.things.__getitem__, "o": lambda x: Remote(self, x),
                  "y": PLAIN_TYPES.__getitem__}
        return simple[letter](inner)

    # -- Exceptions --

    def described(self, error):
        """(names of its class and bases, text, arguments or None, number) of an exception."""
        try:
            args = self.encode(list(error.args))
        except BaseException:
            args = None
        try:
            text = str(error)[:SHOWN]
        except BaseException:                # a class may define a __str__ that fails
            text = ""
        return names_of_bases(type(error)), text, args, self.number(error)

    def error(self, bases, text, args, number):
        """The exception that the other side has raised, of a class of this side."""
        kind = self.error_class(bases)
        try:
            given = tuple(self.decode(args)) if args else (text,)
            error = kind.__new__(kind, *given)
            error.args = given
        except Exception:
            error = RuntimeError(text)
        if "_text" in dir(kind):
            error._text, error._remote = text, Remote(self, number)
        return error

    def error_class(self, bases, number=None):
        """This side's class for an exception: the same one if it is of Python's library, else a
        local class of the same name, derived from the nearest that both sides know."""
        (module, name), *rest = bases
        kind = None
        if is_library(module):
            kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            return kind
        if (module, name) not in self.errors:
            parent = self.error_class(rest) if rest else RuntimeError
            self.errors[module, name] = type(str(name), (parent,), {
                "_text": "", "_remote": None, "__str__": lambda e: e._text or ", ".join(map(
                    str, e.args)), "__getattr__": attribute_of_error})
        kind = self.errors[module, name]
        if number is not None:
            kind._number = number
        return kind


def is_library(module):
    """Is it the name of a module of Python's own library?"""
    top = str(module).partition(".")[0]
    return top in sys.stdlib_module_names and top not in ("__main__", TESTS)


def attribute_of_error(error, name):
    if name.startswith("_") or error._remote is None:
        raise AttributeError(name)
    return getattr(error._remote, name)


def names_of_bases(kind):
    return [[k.__module__, k.__qualname__] for k in kind.__mro__ if issubclass(k, BaseException)]


def refresh(old, new):
    """Give an argument that a call has changed its new content; False if its type is immutable."""
    if isinstance(old, list) and isinstance(new, list):
        same = len(old) == len(new) and all(type(a) is type(b) for a, b in zip(old, new))
        for i in range(len(old) if same else 0):
            if not refresh(old[i], new[i]):  # an inner list stays the same object
                old[i] = new[i]
        if not same:
            old[:] = new
    elif isinstance(old, (dict, set)) and isinstance(new, (dict, set)):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray) and isinstance(new, bytearray):
        old[:] = new
    elif type(old).__name__ == "deque" and type(new).__name__ == "deque":
        old.clear()
        old.extend(new)
    elif type(old).__name__ == "ndarray" and type(new).__name__ == "ndarray":
        old[...] = new
    elif isinstance(old, tuple) and isinstance(new, tuple):
        for a, b in zip(old, new):
            refresh(a, b)
    else:
        return False
    return True


class Remote:
    """An object of the other process that is not a plain value: a function, a class, an instance.
    Operations on it are done there.

    In the checker it can only be equal to another such object, whatever its class defines, and an
    operator between it and a value of the checker is not passed on."""

    def __init__(self, caller, number):
        self.__dict__.update(_caller=caller, _number=number)

    def __call__(self, *args, **named):
        return self._caller.ask("call", self, list(args), named)

    def __getattr__(self, name):
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        return self._caller.ask("get", self, name)

    def __setattr__(self, name, value):
        self._caller.ask("set", self, name, value)

    def __iter__(self):
        if self._caller.strict:              # in one answer if it has an end
            try:
                length = len(self)
            except Exception:
                length = None
            if length is not None:
                return iter(self._caller.ask("list", self))
        return self._caller.ask("iter", self)

    def __contains__(self, value):
        return any(value is each or value == each for each in self)

    def __hash__(self):
        return self._caller.ask("hash", self)

    def __instancecheck__(self, thing):
        return isinstance(thing, Remote) and self._caller.ask("isinstance", self, thing)

    def __subclasscheck__(self, kind):
        return isinstance(kind, Remote) and self._caller.ask("issubclass", self, kind)

    def __round__(self, *digits):
        return self._caller.ask("round", self, *digits)

    def __exit__(self, *error):
        return self._caller.ask("exit", self)

    def __deepcopy__(self, memo):
        return self._caller.ask("deep copy", self)


def forwarded(what):
    """A method of Remote that is done by the other process."""
    def method(self, *args):
        return self._caller.ask(what, self, *args)
    return method


def joined(what):
    """An operator of Remote: in the checker only between two objects of the program."""
    def method(self, other):
        if self._caller.strict and not isinstance(other, Remote):
            return NotImplemented
        return self._caller.ask(what, self, other)
    return method


for special, operation in {
        "len": "len", "next": "next", "reversed": "reversed", "str": "str", "repr": "repr",
        "format": "format", "bool": "bool", "int": "int", "float": "float", "index": "index",
        "abs": "abs", "neg": "negative", "pos": "positive", "invert": "inverted",
        "getitem": "item", "setitem": "set item", "delitem": "delete item", "copy": "copy",
        "enter": "enter"}.items():
    setattr(Remote, f"__{special}__", forwarded(operation))


for special in ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv",
                "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(Remote, f"__{special}__", joined(special))


# ---- Values on the pipes -------------------------------------------------------------------------

PLAIN = (int, float, str, list, tuple, set, frozenset, dict, complex, bytes)

PLAIN_TYPES = {k: v for k, v in vars(builtins).items() if isinstance(v, type)}

DTYPES = "biufcSUmM"             # numpy's kinds whose values are plain bytes


@dataclass(frozen=True)
class Kind:
    """A type of the library: value -> plain parts, and back."""
    parts: object
    made: object


def library(name):
    return importlib.import_module(name)


def deque_parts(d):
    return [list(d), d.maxlen]


def factory_of(d):
    return d.default_factory if d.default_factory in PLAIN_TYPES.values() else None


LIBRARY = {
    "decimal.Decimal": Kind(lambda d: library("decimal").Decimal.__str__(d),
                            lambda text: library("decimal").Decimal(text)),
    "fractions.Fraction": Kind(lambda f: [f.numerator, f.denominator],
                               lambda x: library("fractions").Fraction(*x)),
    "datetime.datetime": Kind(lambda d: d.isoformat(),
                              lambda text: library("datetime").datetime.fromisoformat(text)),
    "datetime.date": Kind(lambda d: [d.year, d.month, d.day],
                          lambda x: library("datetime").date(*x)),
    "datetime.time": Kind(lambda t: t.isoformat(),
                          lambda text: library("datetime").time.fromisoformat(text)),
    "datetime.timedelta": Kind(lambda d: [d.days, d.seconds, d.microseconds],
                               lambda x: library("datetime").timedelta(*x)),
    "collections.deque": Kind(deque_parts, lambda x: library("collections").deque(*x)),
    "collections.Counter": Kind(dict, lambda x: library("collections").Counter(x)),
    "collections.OrderedDict": Kind(dict, lambda x: library("collections").OrderedDict(x)),
    "collections.defaultdict": Kind(lambda d: [factory_of(d), dict(d)],
                                    lambda x: library("collections").defaultdict(*x)),
    "array.array": Kind(lambda a: [a.typecode, a.tolist()],
                        lambda x: library("array").array(*x)),
    "uuid.UUID": Kind(str, lambda text: library("uuid").UUID(text)),
    "pathlib.PurePosixPath": Kind(str, lambda text: library("pathlib").PurePosixPath(text)),
    "builtins.slice": Kind(lambda x: [x.start, x.stop, x.step], lambda x: slice(*x)),
    "builtins.ellipsis": Kind(str, lambda text: ...)}


def array_of(parts):
    """The numpy array, or number, of [dtype, shape, bytes in hex, is it a number]."""
    numpy = library("numpy")
    kind, shape, text, single = parts
    if not re.fullmatch(rf"[<>|=]?[{DTYPES}]\d*(\[\w+\])?", kind):
        raise ValueError("no kind of numbers")
    array = numpy.frombuffer(bytes.fromhex(text), numpy.dtype(kind)).reshape(shape).copy()
    return array[()] if single else array


def send(fd, message):
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(fd, line):]


def receive(fd):
    """One line. EOFError if the other side has ended, or if the line is too long."""
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
    can be trusted, but all that it can do is to answer wrongly."""
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
    caller = Caller(3, 4, perform)
    while True:
        caller.answer(*json.loads(receive(3)))


def load(program):
    """The names that a program defines, once its text has been run."""
    space = types.ModuleType("program").__dict__
    sys.modules["program"] = types.ModuleType("program")
    LOADED.append(space)
    exec(compile(program, "program", "exec"), space)
    return [name for name in space if not name.startswith("__")]


LOADED = []                      # the program's names, in its own process


def perform(what, *args):
    """Do what the checker asks of the program's process."""
    if what == "load":
        return load(*args)
    if what == "names":
        return {name: LOADED[0][name] for name in args[0]}
    return OPERATIONS[what](*args)


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)
    guard(json.loads(sys.argv[1]))
