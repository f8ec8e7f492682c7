"""Adapters: what trains beside, or instead of, frozen weights, and their files in PEFT's layout.

An adapter says what trains and nothing else: the model's code does not know that it is there. "The
base model" is a thing of its own (`with base(model)`): what training started from, whatever the
adapter did to the weights. In order: the layers, the register, putting one on a model, the base and
copies, what some ask for in each step, files, merging."""

import math
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from data import (InputError, await_file, base_hash, beside, first_rank, read_json, short,
                  write_json)
from hub import read_tensors
from model import NF4, Parts
from peft_files import (LINEARS, adalora_masks, adapted_layers, check_layer_settings,
                        check_settings, fill_cut_triplets, is_number, read_config_file)


# ---- LoRA ----------------------------------------------------------------------------------------
#
# x ──> W (frozen, any dtype) ─────────────> + ──> y      A (r, in): random; B (out, r): zero, so
# └──> A ──> (.., r) ──> B ──> * alpha/r ────┘            that the first forward is the base's own

def kaiming(weight, generator):
    """Fills a (rows, in) weight as PEFT draws A (Kaiming uniform, a = sqrt(5)), on the CPU."""
    bound = 1 / math.sqrt(weight.shape[1])
    weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x (arXiv 2106.09685). W, a tensor or an NF4, keeps its name and
    dtype; A and B are fp32 (Adam's steps on a bf16 A round to nothing at small learning rates) and
    are cast to the input's dtype for the product.

    The other kinds say by `factors` what stands for A and B. All of theirs is named lora_*:
    parameters in `trains` train, other parameters and buffers are kept, and what state_dict holds
    goes into the adapter's file. `width`: the rows of A."""
    kind, trains = "lora", ("lora_A.weight", "lora_B.weight")

    def __init__(self, linear, rank, alpha, dropout=0.0, width=None):
        super().__init__()
        self.weight, self.rank, self.width = linear.weight, rank, width or rank
        self.set_alpha(alpha)
        self.dropout, self.enabled = dropout, True
        self.in_features, self.out_features = linear.in_features, linear.out_features
        make = dict(bias=False, dtype=torch.float32, device=linear.weight.device)
        self.lora_A = nn.Linear(linear.in_features, self.width, **make)
        self.lora_B = nn.Linear(self.width, linear.out_features, **make)

    @staticmethod
    def width_of(rank, members):
        return rank

    def set_alpha(self, alpha):
        self.alpha, self.scale = float(alpha), alpha / self.rank

    def start(self, generator):
        """The values before the first step."""
        kaiming(self.lora_A.weight, generator)
        self.lora_B.weight.zero_()

    def factors(self):
        """(A, B): the update of W is scale B A."""
        return self.lora_A.weight, self.lora_B.weight

    def gated(self, low, x):
        """low (.., width) = A x, for kinds that weigh it by x."""
        return low

    def forward(self, x):
        nf4 = isinstance(self.weight, NF4)
        y = self.weight(x) if nf4 else F.linear(x, self.weight)                          # (.., out)
        if not self.enabled:
            return y
        A, B = self.factors()
        dropped = F.dropout(x, self.dropout, self.training)
        low = self.gated(F.linear(dropped, A.to(x.dtype)), x)                            # (.., r)
        # In place: the frozen product needs nothing of y for its backward, so the sum takes no
        # second (.., out) tensor.
        y.flatten(0, -2).addmm_(low.flatten(0, -2), B.t().to(x.dtype), alpha=self.scale)
        return y

    def decoding_parts(self, dtype):
        """What generation joins into one product with other layers' (model.Parts)."""
        if not self.enabled:
            return Parts(self.weight)
        A, B = (part.detach().to(dtype) for part in self.factors())
        return Parts(self.weight, A, B, self.scale)

    def merged_weight(self):
        """W + (alpha / r) B A in fp32. Rounded to bf16 most of a small update would be lost."""
        weight = self.weight.dense() if isinstance(self.weight, NF4) else self.weight.float()
        A, B = self.factors()
        return torch.addmm(weight, B, A, alpha=self.scale)

    def stored(self):
        """name -> tensor of the adapter's file."""
        return {n: t for n, t in self.state_dict().items() if n.startswith("lora_")}

    def take(self, tensors):
        """The inverse of stored."""
        for name, own in self.stored().items():
            own.copy_(tensors[name])


class RsLoRALinear(LoRALinear):
    """y = W x + (alpha / sqrt(r)) B A x: the update's size does not shrink with the rank
    (arXiv 2312.03732)."""
    kind = "rslora"

    def set_alpha(self, alpha):
        self.alpha, self.scale = float(alpha), alpha / math.sqrt(self.rank)


class DoRALinear(LoRALinear):
    """y = (m / |V|) V x with V = W + (alpha / r) B A, |V| (out,) the norms of its rows, which pass
    no gradient, and m = |W| at first: direction and magnitude train apart (arXiv 2402.09353; the
    detached norm: its section 4.3). Dropout is A's alone, where PEFT's also reaches W x."""
    kind, trains = "dora", (*LoRALinear.trains, "lora_magnitude_vector")

    def __init__(self, linear, *args, **kwargs):
        super().__init__(linear, *args, **kwargs)
        empty = torch.empty(self.out_features, device=linear.weight.device)
        self.lora_magnitude_vector = nn.Parameter(empty)

    def start(self, generator):
        super().start(generator)
        self.lora_magnitude_vector.copy_(self.norms())

    @torch.no_grad()
    def norms(self):
        return super().merged_weight().norm(dim=1).clamp_min(1e-12)

    def gain(self):
        return self.lora_magnitude_vector / self.norms()

    def forward(self, x):
        y = super().forward(x)
        return y * self.gain().to(x.dtype) if self.enabled else y

    def decoding_parts(self, dtype):
        parts = super().decoding_parts(dtype)
        parts.gain = self.gain().detach().to(dtype) if self.enabled else None
        return parts

    def merged_weight(self):
        return self.gain()[:, None] * super().merged_weight()


class PiSSALinear(LoRALinear):
    """y = (W - s B0 A0) x + s B A x, s = alpha / r: A = A0 and B = B0 start as the r largest
    singular directions of W = U S V^T, A0 = sqrt(S_r / s) V_r^T and B0 = U_r sqrt(S_r / s), and the
    residue is frozen (arXiv 2404.02948).

    W itself stays, as the base model; B A - B0 A0 is added as (B - B0) A + B0 (A - A0), which is
    exactly zero at first, where the difference of two large products would be rounding."""
    kind = "pissa"

    def __init__(self, linear, *args, **kwargs):
        super().__init__(linear, *args, **kwargs)
        for name, part in (("lora_A0", self.lora_A), ("lora_B0", self.lora_B)):
            self.register_buffer(name, torch.zeros_like(part.weight))

    def start(self, generator):
        weight = self.weight.dense() if isinstance(self.weight, NF4) else self.weight.float()
        U, S, V = torch.linalg.svd(weight, full_matrices=False)
        if self.rank > len(S):
            raise InputError(f"PiSSA of rank {self.rank}: a layer has {len(S)} singular values: "
                             "lower --rank")
        root = (S[:self.rank] / self.scale).sqrt()
        self.lora_A0.copy_(root[:, None] * V[:self.rank])
        self.lora_B0.copy_(U[:, :self.rank] * root)
        self.lora_A.weight.copy_(self.lora_A0)
        self.lora_B.weight.copy_(self.lora_B0)

    def factors(self):
        A, B = self.lora_A.weight, self.lora_B.weight
        return torch.cat((A, A - self.lora_A0)), torch.cat((B - self.lora_B0, self.lora_B0), 1)

    def stored(self):
        """As the plain LoRA of rank 2r that it is, which any reader of PEFT's files adds to W."""
        A, B = self.lora_A.weight.detach(), self.lora_B.weight.detach()
        return {"lora_A.weight": torch.cat((A, self.lora_A0)),
                "lora_B.weight": torch.cat((B, -self.lora_B0), 1)}

    def take(self, tensors):
        A, A0 = tensors["lora_A.weight"].chunk(2)
        B, B0 = tensors["lora_B.weight"].chunk(2, 1)
        for own, new in ((self.lora_A.weight, A), (self.lora_B.weight, B), (self.lora_A0, A0),
                         (self.lora_B0, -B0)):
            own.copy_(new)


class AdaLoRALinear(LoRALinear):
    """y = W x + (alpha / width) P diag(E) Q x, P = lora_B, Q = lora_A, E zero at first: the least
    important triplets are cut, over all layers, from width = 1.5 r a layer to r (arXiv 2303.10512;
    see Budget). P and Q are kept near orthogonal (see orthogonality)."""
    kind, trains = "adalora", (*LoRALinear.trains, "lora_E")

    def __init__(self, linear, *args, **kwargs):
        super().__init__(linear, *args, **kwargs)
        empty = self.lora_A.weight.new_empty
        self.lora_E = nn.Parameter(empty(self.width, 1))
        # Not of the adapter's file, but of a checkpoint: which triplets are kept, and for each
        # tensor the moving averages of importance and of its uncertainty.
        self.register_buffer("lora_mask", torch.ones_like(self.lora_E), persistent=False)
        for name in ("A", "B", "E"):
            shape = self.get_parameter(dict(zip("ABE", self.trains))[name]).shape
            for average in ("mean", "spread"):
                zero = torch.zeros(shape, device=self.lora_E.device)
                self.register_buffer(f"lora_{average}_{name}", zero, persistent=False)

    @staticmethod
    def width_of(rank, members):
        return math.ceil(1.5 * rank)

    def set_alpha(self, alpha):
        self.alpha, self.scale = float(alpha), alpha / self.width

    def start(self, generator):
        for part in (self.lora_A.weight, self.lora_B.weight):
            part.copy_(0.02 * torch.randn(part.shape, generator=generator))
        self.lora_E.zero_()

    def factors(self):
        return self.lora_A.weight * self.lora_E, self.lora_B.weight

    def orthogonality(self):
        """|P^T P - I|^2 + |Q Q^T - I|^2 (equation 4)."""
        A, B = self.lora_A.weight, self.lora_B.weight
        one = torch.eye(self.width, device=A.device)
        return ((A @ A.t() - one) ** 2).sum() + ((B.t() @ B - one) ** 2).sum()

    def importance(self, decay=0.85):
        """(width,), after a step: of each triplet, s(E) + mean s(P) + mean s(Q), where s is the
        moving average of I = |w dL/dw| times that of |I - its average| (equations 8 to 11)."""
        s = {}
        for name, path in zip("ABE", self.trains):
            p = self.get_parameter(path)
            mean, spread = (self.get_buffer(f"lora_{x}_{name}") for x in ("mean", "spread"))
            now = (p * p.grad).abs()
            mean.lerp_(now, 1 - decay)
            spread.lerp_((now - mean).abs(), 1 - decay)
            s[name] = mean * spread
        return s["E"].squeeze(1) + s["A"].mean(1) + s["B"].mean(0)

    def stored(self):
        """In PEFT's names: its A, B and E are bare parameters."""
        return {n.removesuffix(".weight"): t for n, t in super().stored().items()}


class LoRILinear(LoRALinear):
    """y = W x + (alpha / r) (B * M) A x: A stays as it was drawn, and of B only the tenth trains
    that is largest, over all layers, after a calibration: a tenth of the steps, where the paper
    makes a whole run for it (arXiv 2504.07448; see Budget)."""
    kind, trains = "lori", ("lora_B.weight",)

    def __init__(self, linear, *args, **kwargs):
        super().__init__(linear, *args, **kwargs)
        self.lora_A.weight.requires_grad_(False)
        self.register_buffer("lora_mask", torch.ones_like(self.lora_B.weight).detach())

    def factors(self):
        return self.lora_A.weight, self.lora_B.weight * self.lora_mask


# ---- Several adapters side by side ---------------------------------------------------------------

class ParallelLinear(LoRALinear):
    """M adapters of rank r each, stacked to one of rank M r: y = W x + (alpha / r) times the sum of
    g_i B_i A_i x. The kinds differ in what weighs the members."""

    members = property(lambda self: self.width // self.rank)

    @staticmethod
    def width_of(rank, members):
        return rank * members

    def spread(self, gates):
        """(.., M) -> (.., M r)."""
        return gates.repeat_interleave(self.rank, -1)


class MultiLoRALinear(ParallelLinear):
    """g_i is learned, a number for each output, zero at first: so the first forward is the base's
    although B is random as A is (arXiv 2311.11501)."""
    kind, trains = "multilora", (*LoRALinear.trains, "lora_gates")

    def __init__(self, linear, *args, **kwargs):
        super().__init__(linear, *args, **kwargs)
        zeros = torch.zeros(self.members, self.out_features, device=linear.weight.device)
        self.lora_gates = nn.Parameter(zeros)

    def start(self, generator):
        for part in (self.lora_A.weight, self.lora_B.weight):
            kaiming(part, generator)
        self.lora_gates.zero_()

    def factors(self):
        return self.lora_A.weight, self.lora_B.weight * self.spread(self.lora_gates.t())


class MoALinear(ParallelLinear):
    """g = softmax(R x), of each token: a mixture of adapters with a router (R zero at first), as in
    LoRAMoE (arXiv 2312.09979) without its balancing loss."""
    kind, trains = "moa", (*LoRALinear.trains, "lora_router")

    def __init__(self, linear, *args, **kwargs):
        super().__init__(linear, *args, **kwargs)
        zeros = torch.zeros(self.members, self.in_features, device=linear.weight.device)
        self.lora_router = nn.Parameter(zeros)

    def start(self, generator):
        super().start(generator)
        self.lora_router.zero_()

    def gated(self, low, x):
        logits = F.linear(x, self.lora_router.to(x.dtype))                               # (.., M)
        return low * self.spread(logits.float().softmax(-1).to(x.dtype))

    def decoding_parts(self, dtype):
        return None if self.enabled else Parts(self.weight)

    def merged_weight(self):
        raise InputError("a mixture of adapters has a weight for each token: it cannot be merged")


class Deal:
    """Which member of an ensemble computes: one for all (a number), or one a row, (B,)."""

    def __init__(self, members):
        self.members, self.of = members, 0


class EnsembleLinear(ParallelLinear):
    """M LoRA members over one base in one pass (LoRA-Ensemble, arXiv 2405.14438): g_i is 1 for the
    row's own member and 0 for others. They see the same replies and differ by their random A; the k
    drafts of a post are dealt over them, draft d to member d mod M. `deal` is the model's, set by
    add_lora."""
    kind, deal = "ensemble", None

    def own(self):
        return slice(self.deal.of * self.rank, (self.deal.of + 1) * self.rank)

    def factors(self):
        if isinstance(self.deal.of, torch.Tensor):
            return super().factors()
        return self.lora_A.weight[self.own()], self.lora_B.weight[:, self.own()]

    def gated(self, low, x):
        of = self.deal.of
        if not isinstance(of, torch.Tensor):
            return low
        own = self.spread(F.one_hot(of, self.members).to(x.dtype))                       # (B, M r)
        return low * own[:, None]

    def merged_weight(self):
        raise InputError("an ensemble is several models: it cannot be merged into one")


# ---- The register --------------------------------------------------------------------------------

class Adapter(NamedTuple):
    layer: object    # a LoRALinear, or None: all weights train
    peft_type: str   # in adapter_config.json
    about: str


ADAPTERS = {
    "lora": Adapter(LoRALinear, "LORA", "W + alpha/r B A (arXiv 2106.09685)"),
    "rslora": Adapter(RsLoRALinear, "LORA", "LoRA scaled by alpha/sqrt(r) (arXiv 2312.03732)"),
    "dora": Adapter(DoRALinear, "LORA", "direction and magnitude apart (arXiv 2402.09353)"),
    "pissa": Adapter(PiSSALinear, "LORA", "starts as W's largest singular directions (arXiv "
                                          "2404.02948)"),
    "adalora": Adapter(AdaLoRALinear, "ADALORA", "ranks dealt by importance, from 1.5 r to r on "
                                                 "average (arXiv 2303.10512)"),
    "lori": Adapter(LoRILinear, "LORI", "A frozen, a tenth of B trains (arXiv 2504.07448)"),
    "multilora": Adapter(MultiLoRALinear, "MULTILORA", "--members LoRAs with learned scales (arXiv "
                                                       "2311.11501)"),
    "moa": Adapter(MoALinear, "MOA", "--members LoRAs mixed by a router of tokens (arXiv "
                                     "2312.09979)"),
    "ensemble": Adapter(EnsembleLinear, "ENSEMBLE", "--members LoRAs that share out the k drafts "
                                                    "(arXiv 2405.14438)"),
    "full": Adapter(None, "FULL", "no adapter: all weights train, beside a copy of the base")}


def lora_layers(model):
    """name -> LoRALinear, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_adapter(model, kind, rank, alpha, **options):
    """Any of ADAPTERS on a model; returns it."""
    if ADAPTERS[kind].layer is None:
        return train_in_full(model)
    return add_lora(model, rank, alpha, kind=kind, **options)


def add_lora(model, rank, alpha, *, dropout=0.0, targets=LINEARS, seed=0, kind="lora", members=4,
             width=None, layers=None):
    """Put LoRA, or another of ADAPTERS' layers, on every linear layer whose last name is in
    `targets`, or on those of the full names `layers`; the rest of the model is frozen. Returns
    model.

    A is drawn from a generator of its own on the CPU: the same on every rank and device (seed None:
    nothing is drawn, a file follows). The token head and the embedding are never wrapped: tied, one
    would corrupt the other."""
    unknown = set(targets) - set(LINEARS)
    if unknown or not targets:
        raise InputError(f"LoRA target {min(unknown, default='')!r} is no linear layer of Qwen3: "
                         f"choose from {', '.join(LINEARS)}")
    if rank < 1:
        raise InputError(f"the LoRA rank is {rank}: it must be at least 1")
    if adapter_state(model):
        raise InputError("the model has LoRA layers already: merge them or load into them")
    make = ADAPTERS[kind].layer
    width = width or make.width_of(rank, members)
    model.requires_grad_(False)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    wanted = [(n, m) for n, m in model.named_modules()
              if (n.rpartition(".")[2] in targets if layers is None else n in layers)]
    if kind == "ensemble":
        model.deal = Deal(width // rank)
    for name, linear in wanted:
        layer = make(linear, rank, alpha, dropout, width)
        layer.deal = model.deal
        if generator:
            with torch.no_grad():
                layer.start(generator)
        layer.train(linear.training)  # a new module trains: dropout would then make answers noisy
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def train_in_full(model):
    """All weights train; the base model is kept beside them. Returns model."""
    if adapter_state(model) or any(isinstance(m, NF4) for m in model.modules()):
        raise InputError("--adapter full trains the weights themselves: they cannot be in 4 bits, "
                         "or under an adapter")
    model.original = {name: p.detach().clone() for name, p in model.named_parameters()}
    return model.requires_grad_(True)


def adapter_state(model):
    """name -> parameter of all that trains, named as in the model:
    model.layers.0.self_attn.q_proj.lora_A.weight and so on."""
    if model.original is not None:
        return dict(model.named_parameters())
    return {f"{name}.{path}": layer.get_parameter(path)
            for name, layer in lora_layers(model).items() for path in layer.trains}


def trained(model):
    """The list of all that trains; InputError where its dtype would lose the steps."""
    params = list(adapter_state(model).values())
    if any(p.dtype != torch.float32 for p in params):
        raise InputError("all weights train, and in bfloat16 most of Adam's steps would round to "
                         "nothing: give --dtype float32")
    return params


@contextmanager
def base(model):
    """Within: the base model, the one that training started from. Everything that compares with it
    goes through here (embedder, gate, measuring), since "the adapter off" is only how plain LoRA
    does it."""
    if model.original is not None:
        with adapter(model, model.original):
            yield model
        return
    layers = lora_layers(model).values()
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


def frozen_copy(model):
    """The trained tensors as they stand, by name: the reference of a KL."""
    return {name: p.detach().clone() for name, p in adapter_state(model).items()}


@contextmanager
def adapter(model, state):
    """Within: the model with the trained tensors `state` (as from frozen_copy) in place of
    its own."""
    own = {name: p.data for name, p in adapter_state(model).items()}
    try:
        for name, p in adapter_state(model).items():
            p.data = state[name]
        yield model
    finally:
        for name, p in adapter_state(model).items():
            p.data = own[name]


# ---- What some adapters ask for in each step -----------------------------------------------------

class Budget:
    """What AdaLoRA and LoRI do beside the gradient step, for trainer.train; nothing for the others.
    `kept`: tensors that a checkpoint needs beside what trains.

    `steps`: of the phase that decides what is kept; None: an earlier phase has decided.
    AdaLoRA: triplets kept, over all layers: width each in the first tenth of the steps, r each in
    the last three tenths, in between r + (width - r)(1 - share)^3 (equation 12). LoRI: after a
    tenth of the steps the mask is set and B begins again at zero; Adam's averages go on."""
    KEPT = 0.1               # LoRI: of B
    ORTHOGONAL = 0.5         # AdaLoRA: weight of orthogonality, mean over the matrices P and Q

    def __init__(self, model, steps=None):
        self.layers, self.steps = list(lora_layers(model).values()), steps
        self.kept = [b for n, b in model.named_buffers() if ".lora_" in n]
        self.kinds, self.chosen = {layer.kind for layer in self.layers}, False
        if "adalora" in self.kinds and steps is None:
            for layer in self.layers:
                layer.lora_mask.copy_(layer.lora_E != 0)

    def before(self):
        """Adds the regulariser's gradient, once the step's is summed over ranks: it is the same on
        each of them."""
        if "adalora" in self.kinds:
            total = sum(layer.orthogonality() for layer in self.layers)
            (self.ORTHOGONAL * total / (2 * len(self.layers))).backward()

    @torch.no_grad()
    def after(self, step):
        """After optimizer step `step`, with its gradient still there."""
        if "adalora" in self.kinds:
            self.cut_triplets(step)
        if "lori" in self.kinds:
            if self.steps and not self.chosen and step + 1 >= max(1, self.steps // 10):
                if all(bool(layer.lora_mask.all()) for layer in self.layers):  # else: resumed
                    self.choose_entries()
                self.chosen = True           # not at a step that was skipped, but at the next one
            for layer in self.layers:
                layer.lora_B.weight.mul_(layer.lora_mask)

    def triplets(self, step):
        """How many AdaLoRA keeps after step `step`."""
        rank, width = self.layers[0].rank, self.layers[0].width
        first, last = self.steps // 10, self.steps - 3 * self.steps // 10
        share = min(max((step + 1 - first) / max(1, last - first), 0), 1)
        return round(len(self.layers) * (rank + (width - rank) * (1 - share) ** 3))

    def cut_triplets(self, step):
        if self.steps:
            scores = torch.cat([layer.importance() for layer in self.layers])
            best = scores.topk(min(self.triplets(step), len(scores))).indices
            mask = torch.zeros_like(scores).index_fill_(0, best, 1).split(self.layers[0].width)
            for layer, part in zip(self.layers, mask):
                layer.lora_mask.copy_(part[:, None])
        for layer in self.layers:
            layer.lora_E.mul_(layer.lora_mask)

    def choose_entries(self):
        sizes = torch.cat([layer.lora_B.weight.abs().flatten() for layer in self.layers])
        best = sizes.topk(max(1, int(self.KEPT * len(sizes)))).indices
        mask = torch.zeros_like(sizes).index_fill_(0, best, 1)
        parts = mask.split([layer.lora_mask.numel() for layer in self.layers])
        for layer, part in zip(self.layers, parts):
            layer.lora_mask.copy_(part.view_as(layer.lora_mask))
            layer.lora_B.weight.zero_()


# ---- Files ---------------------------------------------------------------------------------------

PREFIX = "base_model.model."  # PEFT's, before the model's own names
MARKS = {"rslora": "use_rslora", "dora": "use_dora"}  # of PEFT's configuration


def save_adapter(model, folder, base="", revision=None):
    """adapter_config.json and adapter_model.safetensors, as PEFT writes and reads them for lora,
    rslora, dora, adalora, and pissa as a plain LoRA of rank 2r; the others' are of the same
    make, under names of their own."""
    layers, folder = lora_layers(model), Path(folder)
    if not adapter_state(model):
        raise InputError("save_adapter: the model has no LoRA layers")
    config = {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "revision": revision}
    if layers:
        config |= layer_config(next(iter(layers.values())))
        config["target_modules"] = target_names(model, layers)
        stored = {f"{n}.{part}": t for n, layer in layers.items()
                  for part, t in layer.stored().items()}
    else:
        config["peft_type"], stored = "FULL", adapter_state(model)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + n: t.detach().cpu().contiguous() for n, t in stored.items()}
    with beside(folder / "adapter_model.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)


def target_names(model, layers):
    """target_modules of a configuration: the last names of the layers with LoRA, or, where some
    layers of these names are without it, their full names."""
    short_names = sorted({name.rpartition(".")[2] for name in layers})
    covered = [name for name in module_names(model) if name.rpartition(".")[2] in short_names]
    return short_names if covered == list(layers) else list(layers)


def layer_config(layer):
    """A layer's part of adapter_config.json."""
    kind = layer.kind
    config = {"peft_type": ADAPTERS[kind].peft_type, "r": layer.rank, "lora_alpha": layer.alpha,
              "lora_dropout": layer.dropout, "bias": "none", "fan_in_fan_out": False,
              "modules_to_save": None, "use_rslora": kind == "rslora", "use_dora": kind == "dora",
              "init_lora_weights": True, "inference_mode": True}
    if kind == "pissa":
        config |= {"r": 2 * layer.rank, "lora_alpha": 2 * layer.alpha, "pissa_rank": layer.rank}
    if kind == "adalora":
        config |= {"r": layer.width, "init_r": layer.width, "target_r": layer.rank,
                   "total_step": 1, "tinit": 0, "tfinal": 0}
    if isinstance(layer, ParallelLinear):
        config["members"] = layer.members
    return config


def marks_of(config):
    """The kinds beside plain LoRA that a configuration of PEFT's type LORA asks for."""
    marks = [kind for kind, mark in MARKS.items() if config.get(mark)]
    if config.get("init_lora_weights") == "pissa" or config.get("pissa_rank"):
        marks.append("pissa")
    return marks


def kind_of(config):
    """The name in ADAPTERS of a configuration's adapter; None for one that is not here."""
    kinds = [kind for kind, row in ADAPTERS.items() if row.peft_type == config.get("peft_type")]
    if kinds[:1] != ["lora"]:
        return kinds[0] if kinds else None
    marks = marks_of(config)
    return None if len(marks) > 1 else [*marks, "lora"][0]


def read_adapter_config(folder):
    """adapter_config.json, checked before anything is built from it."""
    path = Path(folder) / "adapter_config.json"
    config = read_config_file(folder)
    kind = kind_of(config)
    check_settings(path, config, ("rank_pattern",) if kind == "adalora" else ())
    if kind is None and config.get("peft_type") == "LORA":
        raise InputError(f"{path} asks for {' and '.join(marks_of(config))} together: one at a "
                         "time is implemented")
    if kind is None:
        known = sorted({row.peft_type for row in ADAPTERS.values()})
        raise InputError(f"{path} has peft_type {short(config.get('peft_type'))}: implemented are "
                         f"{', '.join(known)}")
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), (str, type(None))):
            raise InputError(f"{path}: {key} must be a text")
    if kind != "full":
        check_layer_config(path, config)
    return config


def check_layer_config(path, config):
    for key in ("r", "lora_alpha", "target_modules"):
        if config.get(key) is None:
            raise InputError(f"{path} lacks {key}: the adapter is incomplete")
    alpha, dropout = config["lora_alpha"], config.get("lora_dropout") or 0.0
    for key in ("r", "init_r", "target_r", "pissa_rank", "members"):
        if key in config and (type(config[key]) is not int or not 1 <= config[key] <= 2 ** 16):
            raise InputError(f"{path}: {key} is {short(config[key])}: a rank is a whole number "
                             "from 1 to 65,536")
    if not is_number(alpha) or not 0 < abs(alpha) < 1e9:
        raise InputError(f"{path}: lora_alpha is {short(alpha)}: it must be a number other than 0")
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise InputError(f"{path}: lora_dropout is {short(dropout)}: it is from 0 to below 1")
    check_layer_settings(path, config)
    kind = kind_of(config)
    wants = {"adalora": ("init_r", "target_r")}.get(kind, ())
    wants = ("members",) if issubclass(ADAPTERS[kind].layer, ParallelLinear) else wants
    lacking = [key for key in wants if key not in config]
    if lacking:
        raise InputError(f"{path} lacks {lacking[0]}: the adapter is incomplete")
    if "pissa_rank" in config and config["r"] != 2 * config["pissa_rank"]:
        raise InputError(f"{path}: r must be twice pissa_rank")
    if kind == "adalora":
        adalora_masks(path, config)


def shape_of(config):
    """add_lora's rank, alpha and width for a checked configuration; the rows of the file's A."""
    rank, alpha = config["r"], config["lora_alpha"]
    width = rank * config.get("members", 1)
    if "pissa_rank" in config:
        return dict(rank=rank // 2, alpha=alpha / 2, width=rank // 2), rank
    if kind_of(config) == "adalora":
        rank, width = config["target_r"], config["init_r"]
    return dict(rank=rank, alpha=alpha, width=width), width


def load_adapter(model, folder, *, dropout=None):
    """Put the adapter in `folder` (PEFT's layout) on the model, or into the LoRA layers that it
    has. Returns model.

    Raises InputError when the files are missing, ask for what this code lacks, or fit
    another model."""
    folder = Path(folder)
    config = read_adapter_config(folder)
    kind = kind_of(config)
    stored = adapter_tensors(folder)
    if kind == "full":
        own = adapter_state(model if model.original is not None else train_in_full(model))
        check_fit(folder, own, stored)
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(stored[name])
        return model
    path = folder / "adapter_config.json"
    if kind == "adalora":
        stored = fill_cut_triplets(folder, stored, adalora_masks(path, config))
    shape, rows = shape_of(config)
    names = adapted_layers(path, config, module_names(model), stored)
    check_rows(folder, config, stored, rows, names)
    if not lora_layers(model):
        computed = config.get("init_lora_weights") == "pissa"  # what it departs from is not stored
        add_lora(model, **shape, layers=names, kind=kind, seed=0 if computed else None)
    layers = lora_layers(model)
    if {layer.kind for layer in layers.values()} != {kind}:
        raise InputError(f"the adapter in {folder} is {kind}'s, the model has another's layers")
    if config.get("init_lora_weights") == "pissa":
        stored = beside_start(layers, stored)
    own = {f"{name}.{part}": t for name, layer in layers.items()
           for part, t in layer.stored().items()}
    check_fit(folder, own, stored)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.take({part: stored[f"{name}.{part}"] for part in layer.stored()})
            layer.set_alpha(shape["alpha"])
            layer.dropout = (config.get("lora_dropout") or 0.0) if dropout is None else dropout
    return model


def adapter_tensors(folder):
    """name in the model -> tensor of an adapter's file."""
    tensors = read_tensors(folder, file="adapter_model.safetensors")
    odd = sorted(name for name in tensors if not name.startswith(PREFIX))
    if odd:
        raise InputError(f"{folder}/adapter_model.safetensors has a tensor {short(odd[0])}: PEFT's "
                         f"names begin with {PREFIX}")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def module_names(model):
    """Names of the layers that PEFT could put LoRA on, the tied token head among them."""
    inside = ("lora_A", "lora_B")
    names = [name for name, module in model.named_modules()
             if isinstance(module, (nn.Linear, nn.Embedding, NF4, LoRALinear))
             and name.rpartition(".")[2] not in inside]
    return names if "lm_head" in names else [*names, "lm_head"]


def beside_start(layers, stored):
    """PEFT's file of a PiSSA adapter holds A and B alone, to be added to a residue that it makes
    anew from W: with A0 and B0, made anew as well, it is PiSSALinear.stored."""
    whole = dict(stored)
    for name, layer in layers.items():
        names, start = [f"{name}.{part}" for part in layer.trains], (layer.lora_A0, -layer.lora_B0)
        for axis, (full, part) in enumerate(zip(names, start)):
            if full in stored and stored[full].shape == part.shape:
                whole[full] = torch.cat((stored[full].to(part), part), axis)
    return whole


def check_rows(folder, config, stored, rows, names):
    """A file against its configuration, before anything of that size is built."""
    held = {n.rpartition(".lora_")[0] for n in stored if ".lora_A" in n}
    matrices = {n: t for n, t in stored.items() if ".lora_A" in n or ".lora_B" in n}
    lacking, others = [name for name in names if name not in held], sorted(held - set(names))
    if lacking and others:
        raise InputError(f"{folder}/adapter_model.safetensors has matrices of {short(others[0])} "
                         f"and none of {short(lacking[0])}: it does not fit this model: its names are "
                         "of another model, or under another prefix")
    if lacking or any(t.dim() != 2 for t in matrices.values()):
        raise InputError(f"{folder}/adapter_model.safetensors lacks matrices of "
                         f"{short((lacking or sorted(matrices))[0])}, which its configuration "
                         "names: it was not saved in full (ZeRO-3 without gathering leaves such "
                         "files)")
    if {t.shape[0] for n, t in matrices.items() if ".lora_A" in n} != {rows}:
        raise InputError(f"{folder}/adapter_config.json says r = {config['r']}, its tensors have "
                         "another rank: the adapter does not fit itself")


def check_fit(folder, own, stored):
    """InputError unless both have the same names and shapes."""
    lacks, more = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    shapes = sorted(n for n in own.keys() & stored.keys() if own[n].shape != stored[n].shape)
    if lacks:
        difference = f"lacks {short(lacks[0])}"
    elif more:
        difference = f"has {short(more[0])}, which the model lacks"
    elif shapes:
        name = shapes[0]
        difference = (f"has {short(name)} in shape {tuple(stored[name].shape)}, the model in "
                      f"{tuple(own[name].shape)}")
    else:
        return
    raise InputError(f"the adapter in {folder} does not fit this model: it {difference}: it was "
                     "trained on another model, or on other layers")


# ---- Taking off, merging, interpolating ----------------------------------------------------------

def drop_lora(model, weight_of=lambda layer: layer.weight):
    """Replace every LoRA layer by a plain linear: with its frozen weight, so the base model is
    back. Returns model."""
    if model.original is not None:
        for name, p in model.named_parameters():
            p.data = model.original[name]
        model.original = None
        return model.requires_grad_(False)
    for name, layer in lora_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = weight_of(layer)
        if isinstance(weight, NF4):
            linear = weight
        else:
            linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    model.deal = None
    return model


def merge_lora(model, dtype=torch.float32):
    """Replace every LoRA layer by a plain linear with W + (alpha / r) B A, or what its kind makes
    of that, in fp32. Returns the model in `dtype`: fp32 by default, since rounding the sum to bf16
    drops most of a small update."""
    if model.original is not None:
        model.original = None
        return model.requires_grad_(False).to(dtype)
    return drop_lora(model, lambda layer: layer.merged_weight()).to(dtype)


def interpolate_adapters(folder_a, folder_b, weight, out, scale):
    """The adapter whose update is scale ((1 - weight) that of a + weight that of b), in `out`: of
    two LoRAs one of rank r_a + r_b, A = [A_a; A_b], B = [(1 - weight) s_a B_a, weight s_b B_b]
    (WiSE-FT, arXiv 2109.01903; for Pass@k arXiv 2504.10478)."""
    folders = [Path(folder_a), Path(folder_b)]
    configs = [read_adapter_config(folder) for folder in folders]
    a, b = (read_tensors(folder, file="adapter_model.safetensors") for folder in folders)
    kinds = {kind_of(config) for config in configs}
    if len({config.get("base_model_name_or_path") for config in configs}) > 1:
        raise InputError(f"{folders[0]} and {folders[1]} are adapters of different base models")
    if not kinds <= {"lora", "rslora", "pissa"} or a.keys() != b.keys():
        raise InputError(f"{folders[0]} and {folders[1]} cannot be interpolated: both must be of "
                         "lora, rslora or pissa, on the same layers")
    if any(config.get("init_lora_weights") == "pissa" for config in configs):
        raise InputError("a PiSSA adapter that leaves its start to be computed cannot be "
                         "interpolated: save it converted to LoRA")
    shares = [share * config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora")
                                              else config["r"])
              for share, config in zip((1 - weight, weight), configs)]
    tensors = {}
    for name in a:
        both = (a[name].float(), b[name].float())
        if "lora_A" in name:
            tensors[name] = torch.cat(both)
        else:
            tensors[name] = torch.cat([share * part for share, part in zip(shares, both)], 1)
    rank = configs[0]["r"] + configs[1]["r"]
    config = {k: v for k, v in configs[1].items() if k != "pissa_rank"}
    config |= {"r": rank, "lora_alpha": scale * rank, "use_rslora": False, "lora_dropout": 0.0}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with beside(out / "adapter_model.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})
    write_json(out / "adapter_config.json", config)


def wise_command(sub):
    """`wise`: what lies between two adapters (WiSE-FT)."""
    w = sub.add_parser("wise", help="an adapter between two others, as a run to measure")
    add = w.add_argument
    add("folders", nargs=2, metavar="RUN", help="two finished runs, or adapter folders: A, then B")
    add("--weight", type=float, default=0.5, help="of B's update; A's has 1 - weight")
    add("--scale", type=float, default=1.0, help="of the sum: 0.5 halves the adapter's alpha")
    add("--out", required=True, help="folder to make: a run's if B is a run")
    w.set_defaults(run=run_wise)


def run_wise(args):
    runs, out = [Path(f) for f in args.folders], Path(args.out)
    inside = [run / "adapter" if (run / "adapter").is_dir() else run for run in runs]
    if len({*map(base_hash, runs)} - {None}) > 1:  # one name may have been two models
        raise InputError(f"{runs[0]} and {runs[1]} were trained on different base models")
    if not 0 <= args.weight <= 1 or not 0 < args.scale < math.inf:
        raise InputError("--weight is from 0 to 1, and --scale above 0")
    nested, is_run = inside[1] != runs[1], (runs[1] / "done.json").exists()
    place = out / "adapter" if nested else out
    last = out / "done.json" if is_run else place / "adapter_config.json"  # what is written last
    if not first_rank():
        await_file(last)
        return
    killed = {"adapter", "config.json"} if nested else {"adapter_model.safetensors"}
    held = {p.name for p in out.iterdir() if p.suffix != ".partial"} if out.exists() else set()
    if last.exists() or not held <= killed:  # what a killed call leaves is made again
        raise InputError(f"{out} exists: choose another --out")
    interpolate_adapters(*inside, args.weight, place, args.scale)
    if is_run:  # what `evaluate.py measure` reads of a run
        mark = {"wise": [str(run) for run in runs], "weight": args.weight, "scale": args.scale}
        for name in ("config.json", "done.json"):
            write_json(out / name, read_json(runs[1] / name) | mark)
