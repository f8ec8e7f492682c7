"""The path of a training step through the files of the method.

    python tests/test_trace.py            # prints it: a function a line, indented by who calls whom

Four steps are traced on a tiny model: GRPO and SFT, by default and with the diversity term. What
stands behind one name is one line, whatever it calls: sampling (Session.sample_completions), the
model (model.py), the embedder, and the data (data.py: chat format, tokens, the domain with its
verifier). The tests bound how many functions a reader meets on the way, where the embedder and the
data count as one each, and check that D, the objective and the verifier are evaluated once."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from helpers import ROOT


FILES = ("grpo.py", "polylora.py", "rewards.py", "trainer.py", "data.py", "lora.py", "generate.py",
         "metrics.py")

MODEL = "the model"
SAMPLING = "sampling"
DATA = "the data and the verifier"
EMBEDDER = "the embedder"
STEPS = {"grpo": "grpo_step", "polylora": "sft_step"}

HIDDEN = ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>", "<lambda>")  # of their function

STYLES = {"plain": "Feed it", "warm": "How lovely, feed it well", "brief": "Food"}


# What a run of each kind adds to the flags that keep it small.
DPP = ["--diversity", "dpp", "--gate", "verifier"]

RUNS = {"GRPO": ("grpo", []),
        "GRPO with D": ("grpo", ["--diversity-weight", "1", *DPP]),
        "SFT": ("polylora", []),
        "SFT with D": ("polylora", ["--lambda", "0.3", *DPP])}


# The most functions, and files, that the path of each may have. Lower them when a step gets
# shorter.
MOST = {"GRPO": (12, 4), "GRPO with D": (20, 6), "SFT": (10, 3), "SFT with D": (17, 4)}


# ---- The trace -----------------------------------------------------------------------------------

class Call:
    """A function on the path, and those that it calls, in the order of their first calls."""

    def __init__(self, file, name, line):
        self.file = file
        self.name = name
        self.line = line
        self.times = 0
        self.calls = {}                       # code object -> Call

    def walk(self, depth=0):
        """(depth, Call) of all below this one."""
        for call in self.calls.values():
            yield depth, call
            yield from call.walk(depth + 1)


class Trace:
    """The calls of a step, by sys.setprofile: a tree of the functions of FILES, and of leaves,
    below which nothing is shown. `ran`: how often each function of `watched`, a mapping from code
    objects to names, was called."""

    def __init__(self, watched):
        self.root = Call("", "", 0)
        self.stack = [self.root]              # a frame a Call: its own, or its caller's
        self.below_leaf = 0                   # frames below a leaf
        self.ran = Counter()
        self.watched = watched

    def __call__(self, frame, event, argument):
        if event == "call":
            self.enter(frame)
        elif event == "return":
            self.leave()

    def enter(self, frame):
        code = frame.f_code
        if code in self.watched:
            self.ran[self.watched[code]] += 1
        if self.below_leaf:
            self.below_leaf += 1
            return
        call = self.stack[-1]
        file = file_of(code)
        leaf = leaf_of(file, code)
        if leaf:
            call = self.called(call, leaf, Call(file, leaf, 0))
        elif file in FILES:
            call = self.called(call, code, Call(file, name_of(frame), code.co_firstlineno))
        self.below_leaf = int(leaf is not None)
        self.stack.append(call)

    def called(self, caller, key, call):
        call = caller.calls.setdefault(key, call)
        call.times += 1
        return call

    def leave(self):
        if self.below_leaf > 1:
            self.below_leaf -= 1
            return
        self.below_leaf = 0
        self.stack.pop()

    def functions(self):
        """{(file, name)} of the functions of FILES on the path, each counted once; sampling and
        the model are not among them."""
        found = set()
        for _, call in self.root.walk():
            if call.name not in (SAMPLING, MODEL):
                found.add((call.file, call.name))
        return found

    def files(self):
        return {file for file, _ in self.functions()}

    def lines(self):
        """The path as an indented list."""
        for depth, call in self.root.walk():
            times = f"  x{call.times}" if call.times > 1 else ""
            place = f"{call.file}:{call.line}" if call.line else call.file
            yield f"{'  ' * depth}{call.name}  ({place}){times}"


def file_of(code):
    """The file at the top of the repository that a function stands in; "" for any other. An
    expression's own frame belongs to the function around it, and counts as none."""
    path = Path(code.co_filename)
    if path.parent != ROOT or code.co_name in HIDDEN:
        return ""
    return path.name


def leaf_of(file, code):
    """The leaf that a function opens, or None."""
    if file == "model.py":
        return MODEL
    if file == "data.py":
        return DATA
    if file == "trainer.py" and code.co_name == "sample_completions":
        return SAMPLING
    if file == "generate.py" and code.co_qualname == "Embedder.__call__":
        return EMBEDDER
    return None


def name_of(frame):
    """A function's name, with its class if it is a method."""
    code = frame.f_code
    if code.co_argcount and code.co_varnames[0] == "self":
        return f"{type(frame.f_locals['self']).__name__}.{code.co_name}"
    return code.co_name


# ---- The steps that are traced -------------------------------------------------------------------

def write_world(root):
    """A random Qwen3 of two layers and its tokenizer, posts with replies in three styles, and a
    finished SFT run, which phase two starts from. Returns their places."""
    import data
    import polylora
    from methods.small_base import train_tokenizer
    from model import Config, Qwen3
    posts = root / "posts.jsonl"
    with open(posts, "w", encoding="utf-8") as file:
        for pet in ("cat", "dog", "hen", "goat", "pony", "newt", "fish", "bee"):
            replies = {style: f"{text}, the {pet}" for style, text in STYLES.items()}
            file.write(json.dumps({"post": f"My {pet} is hungry", "replies": replies}) + "\n")
    texts = [f"My cat is hungry. {text}, the dog" for text in STYLES.values()]
    tokenizer = train_tokenizer(texts, 300)
    torch.manual_seed(2)
    model = Qwen3(Config(tokenizer.get_vocab_size(), 32, 64, 2, 4, 2, 16, tie_word_embeddings=True))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(root / "model")
    tokenizer.save(str(root / "model" / "tokenizer.json"))
    parts = root / "parts"
    sizes = ["--sizes", "sft=4,grpo=4"]
    assert data.main(["split", "--data", str(posts), *sizes, "--out", str(parts)]) == 0
    world = {"root": root, "model": str(root / "model"), "sft": str(parts / "sft.jsonl"),
             "grpo": str(parts / "grpo.jsonl"), "start": str(root / "start")}
    assert polylora.main(arguments(world, "polylora", "start")) == 0
    return world


def arguments(world, program, out):
    """The flags of a run of two steps of two posts with four completions."""
    flags = ["--steps", "2", "--batch", "2", "--k", "4", "--max-new-tokens", "6", "--device", "cpu",
             "--out", str(world["root"] / out)]
    if program == "grpo":
        return ["--start", world["start"], "--data", world["grpo"], *flags]
    return ["sft", "--model", world["model"], "--data", world["sft"], "--rank", "2",
            "--draft-posts", "2", *flags]


def watched_functions():
    """{code object: name} of what must be evaluated once."""
    import data
    import grpo
    import polylora
    return {polylora.measure_diversity.__code__: "D", grpo.group_advantages.__code__: "objective",
            data.Domain.judge.__code__: "verifier"}


def traced(world, name):
    """The Trace of the second step of a run; the first one fills caches."""
    import grpo
    import polylora
    program, more = RUNS[name]
    module = {"grpo": grpo, "polylora": polylora}[program]
    step_of = getattr(module, STEPS[program])
    trace = Trace(watched_functions())

    def step(session, number):
        if number == 0:
            return step_of(session, number)
        sys.setprofile(trace)
        try:
            return step_of(session, number)
        finally:
            sys.setprofile(None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, STEPS[program], step)
        assert module.main([*arguments(world, program, name.replace(" ", "-")), *more]) == 0
    return trace


# ---- Tests ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    world = write_world(tmp_path_factory.mktemp("trace"))
    return {name: traced(world, name) for name in RUNS}


@pytest.mark.parametrize("name", list(RUNS))
def test_a_step_is_a_short_path(traces, name):
    trace = traces[name]
    functions, files = MOST[name]
    path = "\n".join(trace.lines())
    assert len(trace.functions()) <= functions, path
    assert len(trace.files()) <= files, path


def test_the_trace_sees_the_step(traces):
    """A trace that lost frames would be short for a wrong reason."""
    for name, trace in traces.items():
        program, _ = RUNS[name]
        first, = trace.root.calls.values()
        assert (first.file, first.name) == (f"{program}.py", STEPS[program])
        shown = [call.name for _, call in trace.root.walk()]
        assert MODEL in shown and DATA in shown and (SAMPLING in shown) == (name != "SFT")
        assert trace.stack == [trace.root] and trace.below_leaf == 0


def test_D_is_evaluated_once(traces):
    assert traces["GRPO with D"].ran["D"] == traces["SFT with D"].ran["D"] == 1


def test_the_objective_is_evaluated_once(traces):
    assert traces["GRPO"].ran["objective"] == traces["GRPO with D"].ran["objective"] == 1


@pytest.mark.parametrize("name", ["GRPO", "GRPO with D", "SFT with D"])
def test_the_verifier_is_asked_once_about_each_completion(traces, name):
    """Two posts with four completions each: reward, gate, log and classes share one verdict."""
    assert traces[name].ran["verifier"] == 8


if __name__ == "__main__":
    import contextlib
    import io
    import tempfile
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            place = write_world(Path(folder))
            found = {name: traced(place, name) for name in RUNS}
    for name, trace in found.items():
        print(f"{name}: {len(trace.functions())} functions in {len(trace.files())} files, beside "
              "sampling and the model")
        print("\n".join("  " + line for line in trace.lines()), "\n")
