"""Measures what the project's own steps hold in GPU memory, without a GPU: tensors on the meta
device have a shape and no contents, say that they are on cuda:0, and their live bytes are counted.

    python tests/meta_memory.py            Qwen3-0.6B and 8B, next to the plan's figures

Counted: every storage, in the allocator's blocks of 512 bytes, from its first tensor to its last.
Not counted: CUDA's context, workspaces of libraries, fragments, and what a captured graph keeps.
Attention and RMSNorm are CUDA's fused kernels: they keep their inputs and outputs alone."""

import argparse
import itertools
import sys
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
import grpo
import model as model_file
import polylora
import trainer
from generate import Embedder, Samples
from lora import add_lora, frozen_copy, trained
from methods import nf4
from model import Config, Qwen3
from support import cost, plan, registry
from support.ranks import Ranks
from trainer import Session

GPU = torch.device("cuda", 0)

PARTS = ("sft", "sft with D", "grpo")    # steps that are measured

SHAPES = {name: dict(zip(cost.FIELDS, row)) for name, row in cost.QWEN3.items()}


# ---- Tensors on meta that say they are on a GPU --------------------------------------------------

def is_meta(x):
    return isinstance(x, torch.Tensor) and x.is_meta


def zeros(x):
    """What the host reads of a tensor without contents."""
    return torch.zeros(x.shape, dtype=x.dtype)


class Attention(torch.autograd.Function):
    """What CUDA's fused attention keeps: its inputs, its result (B, T, H, D) and a number a row."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        out = q.new_empty(*q.transpose(1, 2).shape[:3], v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32), bias)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, sums, _ = ctx.saved_tensors
        wide = [x.new_empty(x.shape[0], q.shape[1], *x.shape[2:]) for x in (k, v)]
        del wide                             # a gradient a head, summed where heads share keys
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class Norm(torch.autograd.Function):
    """What CUDA's fused RMSNorm keeps: its input and a number a row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad), None


def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    if attn_mask is None:
        return Attention.apply(q, k, v, None)
    # A mask of bools becomes a bias, and its rows are filled up to a multiple of 16.
    bias = torch.zeros_like(attn_mask, dtype=q.dtype)
    bias.masked_fill_(attn_mask.logical_not(), -torch.inf)
    if bias.shape[-1] % 16:
        bias = F.pad(bias, (0, -bias.shape[-1] % 16))[..., :bias.shape[-1]]
    return Attention.apply(q, k, v, bias)


READS = {torch.Tensor.tolist: lambda x: zeros(x).tolist(),
         torch.Tensor.item: lambda x: zeros(x).item(),
         torch.Tensor.__float__: lambda x: 0.0,
         torch.Tensor.__int__: lambda x: 0,
         torch.Tensor.__index__: lambda x: 0,
         torch.Tensor.__bool__: lambda x: False,
         torch.Tensor.cpu: zeros,
         torch.Tensor.numpy: lambda x: zeros(x).numpy(),
         torch.Tensor.is_cuda.__get__: lambda x: True,
         torch.Tensor.device.__get__: lambda x: GPU}


def on_meta(device):
    """The device that stands for `device`."""
    is_gpu = isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"
    return torch.device("meta") if is_gpu else device


class PretendedGPU(TorchFunctionMode):
    """cuda:0 is the meta device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunction():
            if args and is_meta(args[0]):
                if function in READS:
                    return READS[function](args[0])
                asked = [str(x) for x in (*args[1:2], *kwargs.values())]
                if function is torch.Tensor.to and "cpu" in asked:
                    return zeros(args[0])
            if "device" in kwargs:
                kwargs["device"] = on_meta(kwargs["device"])
            if function is torch.Tensor.to and isinstance(args[1], (str, torch.device)):
                args = (args[0], on_meta(args[1]), *args[2:])
        if function is F.rms_norm and is_meta(args[0]):
            return Norm.apply(args[0], kwargs["weight"])
        if function is F.scaled_dot_product_attention and is_meta(args[0]):
            return attention(*args, **kwargs)
        return function(*args, **kwargs)


def checkpoint_within(function, *args, **settings):
    """checkpoint, whose second computation is on the pretended GPU, too: autograd leaves modes of
    functions."""
    def again(*args):
        active = torch._C._is_torch_function_mode_enabled()
        with nullcontext() if active else PretendedGPU():
            return function(*args)
    return checkpoint(again, *args, determinism_check="none", **settings)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages on meta that are alive: `live`, and the most, `peak`."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.alive = {}                                # id of a storage -> a reference to it

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if is_meta(x):
                self.add(x.untyped_storage())
        return out

    def add(self, storage):
        key = id(storage)
        if key in self.alive:
            return
        size = -(-storage.nbytes() // 512) * 512
        self.live += size
        self.peak = max(self.peak, self.live)

        def free(reference):
            del self.alive[key]
            self.live -= size
        self.alive[key] = weakref.ref(storage, free)

    @contextmanager
    def most(self, into, name):
        """Within: into[name] becomes the most bytes that lived at once."""
        self.peak = self.live
        yield
        into[name] = self.peak


# ---- The steps of the project around such a model ------------------------------------------------

@dataclass
class Case:
    """What is measured: a model and the flags of train.sh's commands."""
    name: str
    layers: int | None = None    # fewer than the model has
    nf4: bool = False
    world: int = 1
    checkpointing: bool = True
    batch: int = 16
    draft_posts: int = 8
    k: int = 8
    prompt: int = 128            # tokens of every prompt
    reply: int = 32
    max_new_tokens: int = 100
    micro_tokens: int = 16384
    max_rows: int = 256

    def text(self):
        words = [self.name, "NF4" if self.nf4 else "bf16"]
        words.append(f"{self.world} rank{'s' * (self.world > 1)}")
        return ", ".join(words + ["checkpointing"] * self.checkpointing)


class Words:
    """A tokenizer: each word is a token."""

    def encode(self, text, add_special_tokens=False):
        return SimpleNamespace(ids=[7] * len(text.split()))

    def encode_batch(self, texts, add_special_tokens=False):
        return [self.encode(text) for text in texts]

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(["word"] * len(ids))

    def token_to_id(self, text):
        return 5

    def get_added_tokens_decoder(self):
        return {}


class ManyRanks(Ranks):
    """The first rank of `world`, whose others add nothing."""

    def __init__(self, world):
        self.rank, self.world, self.main = 0, world, True
        self.device, self.monitor = GPU, None

    def sum(self, values):
        return list(values)


def session_of(case, stage, model):
    """A Session of a phase on the model, as its command makes one."""
    session = Session.__new__(Session)
    session.stage, session.model, session.ranks = stage, model, ManyRanks(case.world)
    args = {"sft": polylora.parser().parse_args, "grpo": grpo.parser().parse_args}[stage]
    words = ["--data", "-", "--out", "o"]
    words = ["sft", "--model", "-", *words] if stage == "sft" else ["--start", "-", *words]
    session.args = args(words)
    for name in ("batch", "k", "max_new_tokens", "micro_tokens", "max_rows", "draft_posts"):
        setattr(session.args, name, getattr(case, name))
    session.args.steps, session.args.nf4 = 100, case.nf4
    session.tokenizer, session.stops = Words(), [5]
    reply = " ".join(["word"] * (case.reply - 1))      # the stop token follows
    posts = [SimpleNamespace(id=str(i), key=i, post="a post", replies=(reply,), intent="")
             for i in range(64)]
    session.posts = posts
    session.domain = SimpleNamespace(styles=(), author=lambda post, rng: None,
                                     reply=lambda post, author, rng: post.replies[0])
    session.prompt = lambda index: [7] * case.prompt
    session.gate = lambda *_: None
    session.reward = lambda posts, texts, seeds: [[0.0, 1.0] * (case.k // 2) for _ in posts]
    session.params = trained(model)
    return session


def model_of(case):
    """The frozen model, on the pretended GPU."""
    config = Config(**SHAPES[case.name], dtype="bfloat16")
    config.num_hidden_layers = case.layers or config.num_hidden_layers
    with torch.device("meta"):
        made = Qwen3(config).to(torch.bfloat16)
    made.requires_grad_(False).eval()
    made.vocab = cost.REAL_TOKENS
    if case.nf4:
        nf4.quantise(made, GPU)
    made.checkpointing = case.checkpointing
    made.graphs = True
    return made


def adam(params):
    """Adam's two moments."""
    return [torch.zeros_like(p) for p in params for _ in range(2)]


class Enough(Exception):
    """The largest step of a rollout is done."""


def largest_step(batch):
    """DecodeBatch.advance that computes the step in which completions are longest, and no other."""
    batch.used = batch.ring
    batch.step()
    raise Enough


def rollout(model, prompts, *, k, max_new_tokens, **settings):
    """`generate` up to its largest step: completions that were cut off."""
    try:
        engine.generate(model, prompts, k=k, max_new_tokens=max_new_tokens, **settings)
    except Enough:
        pass
    count = range(len(prompts))
    return Samples(tokens=[[[7] * max_new_tokens for _ in range(k)] for _ in count],
                   logprobs=[[[0.0] * max_new_tokens for _ in range(k)] for _ in count],
                   finished=[[False] * k for _ in count])


@contextmanager
def pretended(monkeypatch):
    """Within: a pretended GPU whose live bytes are counted."""
    registry.load()
    for module in (model_file, nf4):
        monkeypatch.setattr(module, "checkpoint", checkpoint_within)
    monkeypatch.setattr(engine.DecodeBatch, "advance", largest_step)
    monkeypatch.setattr(trainer, "generate", rollout)
    monkeypatch.setattr(model_file.Rows, "by_token", lambda rows, completions: torch.zeros(
        len(rows.completion), device=rows.completion.device))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    live = LiveBytes()
    with live, PretendedGPU():
        yield live


def measure(case, monkeypatch, parts=PARTS):
    """{part: most bytes alive}: "weights" of the frozen model, a step of each phase, "cache", what
    a rollout leaves, and "embedder", the most that embedding 512 texts takes in addition."""
    found = {}
    with pretended(monkeypatch) as live:
        model = model_of(case)
        found["weights"] = live.live
        add_lora(model, 16, 16)
        for part in parts:
            measure_step(case, part, model, live, found)
    return found


def step_of(case, part, model):
    """(Session, function) of the step that a part is."""
    session = session_of(case, part.split()[0], model)
    session.args.lambda_share = 0.3 * ("D" in part)
    if part == "grpo":
        session.start = frozen_copy(model)
    if part != "sft":
        session.embedder = Embedder(model, session.tokenizer, corpus=["a few words"])
    return session, polylora.sft_step if session.stage == "sft" else grpo.grpo_step


def measure_step(case, part, model, live, found):
    """Add a part's figures, and the cache's and the embedder's with phase two."""
    session, step = step_of(case, part, model)
    moments = adam(session.params)
    with live.most(found, part):
        step(session, 0)
    del moments
    for p in session.params:
        p.grad = None
    before = live.live
    model.kept_batch = session.batches = None
    if part == "grpo":
        found["cache"] = before - live.live
        with live.most(found, "embedder"):
            session.embedder.vectors([" ".join(["word"] * case.max_new_tokens)] * 512)
        found["embedder"] -= live.live


def planned(case, part, monkeypatch):
    """The plan's figures for a part, a cost.Memory: from a session whose model has one block."""
    with pretended(monkeypatch):
        session, _ = step_of(replace(case, layers=1), part, small_model(case))
        load = plan.load_of(session, case.checkpointing)
    whole = cost.shape_of(case.name)
    return cost.memory(whole, replace(load, adapter=cost.adapter_numbers(whole, 16)))


def small_model(case):
    """One block of the model, with LoRA."""
    return add_lora(model_of(replace(case, layers=1)), 16, 16)


def extrapolated(case, monkeypatch, few=2, more=4, **settings):
    """`measure` of the whole model, from two that have fewer blocks: peaks are linear in them."""
    small = measure(replace(case, layers=few), monkeypatch, **settings)
    large = measure(replace(case, layers=more), monkeypatch, **settings)
    blocks = SHAPES[case.name]["num_hidden_layers"]
    return {name: small[name] + (large[name] - small[name]) * (blocks - few) / (more - few)
            for name in small}


# ---- The command ---------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--names", nargs="+", default=["Qwen3-0.6B", "Qwen3-8B"],
                        choices=list(cost.QWEN3), help="models")
    parser.add_argument("--whole", action="store_true",
                        help="measure every block, instead of two models of fewer blocks")
    args = parser.parse_args(argv)
    for name, world, quantised, checkpointing in itertools.product(
            args.names, (1, 8), (False, True), (False, True)):
        case = Case(name, nf4=quantised, world=world, checkpointing=checkpointing)
        with pytest.MonkeyPatch.context() as patch:
            show(case, measure(case, patch) if args.whole else extrapolated(case, patch), patch)


def show(case, found, monkeypatch):
    """Print what was measured and, of each step, what the plan says."""
    print(case.text())
    for name, size in found.items():
        text = f"  {name:12}{size / cost.GIB:8.2f} GiB"
        if name in PARTS:
            memory = planned(case, name, monkeypatch)
            parts = ", ".join(f"{k} {v / cost.GIB:.2f}" for k, v in memory._asdict().items())
            text += f"   plan {memory.total / cost.GIB:.2f} ({memory.total / size - 1:+.0%}): "
            text += parts
        print(text, flush=True)


if __name__ == "__main__":
    main()
