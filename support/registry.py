"""What flags can choose by name, and how a file in methods/ adds a name.

    @OBJECTIVES.add("rloo", "RLOO (arXiv 2402.14740)", gradient_scale=sample_scale)
    def rloo_advantages(rewards): ...

The method's own files register their entries and never import methods/. `load` imports every file
of methods/, and the commands of report/, when a command starts or a registry is first read. An
entry (row) is a NamedTuple whose fields say what it needs and does; a hook that is None is not
called."""

import importlib
import pkgutil
import sys
from collections.abc import Callable, MutableMapping
from typing import NamedTuple

import torch


class Registry(MutableMapping):
    """name -> row, in the order of registration: the core's rows first, then methods/ by file."""

    def __init__(self, kind, row):
        self.kind = kind         # what the rows are, for messages
        self.row = row           # the rows' class
        self.rows = {}
        self.files = {}          # name -> (file, module) that registered it

    def add(self, name, about="", *, into="function", **fields):
        """A decorator that registers a function, class or other object as a row's field `into`."""
        caller = sys._getframe(1).f_globals
        file = caller.get("__file__", "?")
        module = caller["__name__"]

        def register(function):
            old_file, old_module = self.files.get(name, (None, None))
            # A program that was started as a script is imported again under its own name.
            if old_file and old_module != "__main__":
                raise KeyError(f"two {self.kind}s are called {name!r}: in {old_file} and in "
                               f"{file}: rename one of them")
            fields.setdefault("about", about)
            self.rows[name] = self.row(**{into: function}, **fields)
            self.files[name] = (file, module)
            return function
        return register

    def __getitem__(self, name):
        load()
        return self.rows[name]

    def __setitem__(self, name, row):
        self.rows[name] = row

    def __delitem__(self, name):
        del self.rows[name]

    def __iter__(self):
        load()
        return iter(self.rows)

    def __len__(self):
        load()
        return len(self.rows)

    def values(self):
        load()
        return self.rows.values()

    def items(self):
        load()
        return self.rows.items()


LOADED = []                      # not empty once `load` has begun


def load():
    """Import every file of methods/, and report/commands.py, once."""
    if LOADED:
        return
    LOADED.append(True)                      # first: these files may read registries
    try:
        methods = importlib.import_module("methods")
        for module in pkgutil.iter_modules(methods.__path__, "methods."):
            importlib.import_module(module.name)
        importlib.import_module("report.commands")
    except BaseException:
        LOADED.clear()
        raise


def listed(table):
    """The names of a registry with a line each, for a flag's help: the method's own entries and the
    number of the others; all of them with --help-all."""
    core = []
    for name in table:
        _, module = table.files[name]
        if not module.startswith("methods."):
            core.append(name)
    shown = list(table) if "--help-all" in sys.argv or not core else core
    lines = []
    for name in shown:
        row = table[name]
        paper = getattr(row, "paper", "")
        lines.append(f"{name}: {row.about}" + (f" ({paper})" if paper else ""))
    if len(shown) < len(table):
        lines.append(f"{len(table) - len(shown)} more: --help-all")
    return "; ".join(lines)


def add_flags(registry, parser):
    """Add the flags that rows of a registry bring along to a parser or a group of one."""
    for row in registry.values():
        if row.flags is not None:
            row.flags(parser)


def add_features(features, names, session, posts, samples, seeds):
    """Compute the fields of a polylora.Features that either phase looks at, each once: verdicts,
    the gate's quality (which reads `valid` and `rewards`), embeddings, and those of the named
    fields that FEATURES knows."""
    texts = features.texts
    if session.domain.styles:
        features.valid = torch.tensor(session.domain.valid(posts, texts))
    if session.gate is not None:
        features.quality = session.gate(features, posts, samples)
    if session.embedder is not None:
        features.embeddings = session.embedder(texts).cpu()                    # (P, k, dim)
    for name in names:
        if name in FEATURES and getattr(features, name, None) is None:
            setattr(features, name, FEATURES[name].function(session, posts, texts, seeds))


def has_features(features, names):
    """Has the step computed all the named fields of a polylora.Features?"""
    return all(getattr(features, name, None) is not None for name in names)


def prepare_features(session, names):
    """Prepare those of the named features that need it."""
    for name in names:
        if name in FEATURES and FEATURES[name].prepare is not None:
            FEATURES[name].prepare(session)


def add_commands(program, sub):
    """Add the commands that files in methods/ or report/ register for a program."""
    for row in COMMANDS.values():
        if row.program == program:
            row.function(sub)


# ---- Rows ----------------------------------------------------------------------------------------

def group_scale(features):
    """The gradient_scale of objectives that subtract the group's mean: k - 1."""
    return features.rewards.shape[1] - 1


def set_scale(features):
    """The gradient_scale of set_advantages: N/k - 1 for sets of k of N completions."""
    return features.rewards.shape[1] / features.set_size - 1


class Objective(NamedTuple):
    """--advantage. The expected policy gradient of its advantages is gradient_scale(features) times
    the gradient of what it maximises (apart from quotients by a group's own std). D's advantages
    are scaled by the same factor, so that --diversity-weight means the same for every objective and
    k."""
    function: Callable                       # -> advantages (P, k)
    about: str
    needs: tuple = ("rewards",)              # its arguments: names of polylora.Features' fields
    gradient_scale: Callable = group_scale   # Features -> float, or (P, 1)
    least: int = 1                           # the smallest --set-size
    largest: Callable | None = None          # k -> the largest --set-size; None: k - 1
    alone: bool = False                      # does it work with --k 1?
    shards: bool = True                      # does it run with --shard?
    own_kl: bool = False                     # is the KL in its advantages, and so not in the loss?
    observe: Callable | None = None          # (session, visits, features, samples, step)

    def advantages(self, features):
        """Its advantages (P, k) for these Features."""
        arguments = [getattr(features, name) for name in self.needs]
        return self.function(*arguments)


class Diversity(NamedTuple):
    """--diversity. Either `pairs`: polylora.Features -> distances (P, k, k), whose mean is D; or
    `of`: (embeddings, quality, classes) -> D (P,)."""
    about: str
    pairs: Callable | None = None
    of: Callable | None = None
    needs: tuple = ("embeddings",)           # names of polylora.Features' fields
    check: Callable | None = None            # (args): InputError for flags that do not fit


class Feature(NamedTuple):
    """A field of polylora.Features that only some objectives and diversities need.
    function(session, posts, texts, seeds) -> its value."""
    function: Callable
    about: str
    prepare: Callable | None = None          # (session), once posts and model are loaded


class Loss(NamedTuple):
    """--loss of phase one. function(logits, target, *extra) -> losses (N,)."""
    about: str
    function: Callable | None = None         # None: cross-entropy, without materialised logits
    knob: str = ""                           # the function's argument that --loss-value sets
    extra: Callable | None = None            # (session, rows) -> tensors of N rows
    base_head: bool = False                  # does it take `head`, the base's output head?
    states: Callable | None = None           # (hidden (N, D), reply of each token (N,), value)
    #                                          -> losses (N,), added to the function's
    completions: Callable | None = None      # (session, visits, step, tally): adds the gradient
    #                                          of a loss on sampled completions
    whole: bool = False                      # does it need a reply's tokens in one chunk?
    replies: bool = True                     # does it learn from people's replies at all?
    losses: Callable | None = None           # (session, rows) -> losses (N,); None: cross-entropy
    prepare: Callable | None = None          # (session), once posts and model are loaded
    check: Callable | None = None            # (args): InputError for flags that do not fit


class Adapter(NamedTuple):
    """--adapter."""
    layer: object                            # a lora.LoRALinear, or None: all weights train
    peft_type: str                           # in adapter_config.json
    about: str
    put: Callable | None = None              # (model) -> model, where there is no layer
    on_model: Callable | None = None         # (model, members), before the layers are made
    shaping: Callable | None = None          # (model, steps) -> support.shaping.Shaping
    config: Callable | None = None           # (layer) -> further keys of adapter_config.json
    marked: Callable | None = None           # (config) -> is this file's "LORA" of this kind?
    wants: tuple = ()                        # keys that its adapter_config.json must have
    settings: tuple = ()                     # settings of that file that only it may have
    check: Callable | None = None            # (path, config): InputError for settings that clash
    shape: Callable | None = None            # (config) -> peft_files.shape_of, where it differs
    restore: Callable | None = None          # (path, config, stored) -> stored, with gaps filled
    complete: Callable | None = None         # (layers, stored) -> stored, with what a start needs


class Reward(NamedTuple):
    """--reward. function(session) -> reward(posts, texts, seeds) -> P lists of floats."""
    function: Callable
    about: str
    selects: bool = False                    # can it pick the best of k without a verifier?
    passes: float | None = None              # the reward above which a completion passes, if known
    settings: Callable | None = None         # (args) -> what an evaluation records of it


class Way(NamedTuple):
    """--decoder. function(session, visits, k, progress, helper) -> (Samples, texts)."""
    function: Callable
    about: str
    paper: str
    knobs: tuple = ()                        # the flags that it reads
    joint: bool = False                      # are completions made in sets of --set-size?
    helper: Callable | None = None           # (session) -> what it needs in addition to the policy
    reward: str = ""                         # the flag, if any, that names a reward it asks
    check: Callable | None = None            # (args, k): InputError for flags that do not fit
    settings: Callable | None = None         # (args) -> what records say of it, with its knobs
    flags: Callable | None = None            # (parser)


class DomainRow(NamedTuple):
    """--domain. function: a data.Domain."""
    function: type
    about: str = ""
    fields: Callable | None = None           # (a line's dict) -> fields of ours that it stands for
    tests: Callable | None = None            # (the field "tests") -> the same, checked
    flags: Callable | None = None            # (parser)


class World(NamedTuple):
    """A toy task: data.py split --data NAME. function(count, seed) -> posts."""
    function: Callable
    about: str = ""


class Schedule(NamedTuple):
    """--diversity-schedule. function(session, step, mean D of the step) -> factor; None: 1."""
    function: Callable | None
    about: str


class TokenRule(NamedTuple):
    """--tokens. function(covariances (N,), seed, share) -> bool (N,); None: no token is chosen."""
    function: Callable | None
    about: str
    chosen: Callable | None = None           # (session, advantages, logprobs, step) -> P k lists
    change: Callable | None = None           # (loss (N,), gap (N,), chosen (N,)) -> loss (N,)
    clips: bool = True                       # are ratios clipped as usual?
    flags: Callable | None = None            # (parser)


class DGradient(NamedTuple):
    """--d-gradient. function(session, seeds, features, pairs, posts) adds the gradient of -D; None:
    the score function's."""
    function: Callable | None
    about: str
    check: Callable | None = None            # (args): InputError for flags that do not fit
    flags: Callable | None = None            # (parser)


class EmbedderRow(NamedTuple):
    """A model_type for --embedder. function(path, tokenizer, device) -> generate.Embedder; of a
    row that claims names, function(name, session)."""
    function: Callable
    about: str
    claims: Callable | None = None           # (name) -> is it this row's, whatever it is a name of?


class Metric(NamedTuple):
    """A metric of one post. function(record, passed, ks, vocabulary) -> {name: float}, see
    metrics.py."""
    function: Callable
    about: str


class Measure(NamedTuple):
    """What evaluate.py adds to records. function(session, records, scored: an evaluate.Scored)."""
    function: Callable
    about: str
    check: Callable | None = None            # (args): InputError for flags that do not fit
    settings: Callable | None = None         # (args) -> what an evaluation records of it
    load: Callable | None = None             # (session), once for all runs
    flags: Callable | None = None            # (parser)


class Command(NamedTuple):
    """A command of a program. function(subparsers) adds its parser."""
    function: Callable
    about: str
    program: str                             # polylora, rewards, evaluate, lora


class Format(NamedTuple):
    """How frozen weights are held. function(model, device) -> model."""
    function: Callable
    about: str


class RolloutRow(NamedTuple):
    """Another way to sample a step's completions. function(session, step, tally) -> grpo.Rollout.
    """
    function: Callable
    about: str
    wanted: Callable                         # (args) -> bool
    flags: Callable | None = None            # (parser)


# ---- Registries ----------------------------------------------------------------------------------

OBJECTIVES = Registry("objective", Objective)
DIVERSITIES = Registry("diversity", Diversity)
SFT_LOSSES = Registry("loss", Loss)
ADAPTERS = Registry("adapter", Adapter)
REWARDS = Registry("reward", Reward)
DECODERS = Registry("decoder", Way)
DOMAINS = Registry("domain", DomainRow)
WORLDS = Registry("toy task", World)
SCHEDULES = Registry("schedule", Schedule)
TOKENS = Registry("token rule", TokenRule)
D_GRADIENTS = Registry("gradient of D", DGradient)
EMBEDDERS = Registry("embedder", EmbedderRow)
METRICS = Registry("metric", Metric)
MEASURES = Registry("measure", Measure)
COMMANDS = Registry("command", Command)
FORMATS = Registry("weight format", Format)
ROLLOUTS = Registry("rollout", RolloutRow)
FEATURES = Registry("feature", Feature)
