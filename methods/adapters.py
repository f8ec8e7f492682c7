"""Other adapters than LoRA: rsLoRA, DoRA, PiSSA, several in parallel, and none (all weights)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lora import LoRALinear, Parts, adapter_state, kaiming
from support.files import InputError
from support.registry import ADAPTERS


class RsLoRALinear(LoRALinear):
    """y = W x + (alpha / sqrt(r)) B A x: the update's size does not shrink with the rank
    (arXiv 2312.03732)."""
    kind = "rslora"

    def set_alpha(self, alpha):
        self.alpha = float(alpha)
        self.scale = alpha / math.sqrt(self.rank)


class DoRALinear(LoRALinear):
    """y = (m / |V|) V x + b with V = W + (alpha / r) B A, |V| (out,) the norms of its rows, which
    pass no gradient, and m = |W| at first: direction and magnitude train apart (arXiv 2402.09353;
    the detached norm: its section 4.3). Dropout is A's alone, where PEFT's also reaches W x."""
    kind = "dora"
    trains = (*LoRALinear.trains, "lora_magnitude_vector")

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
        if not self.enabled:
            return y
        gain = self.gain().to(x.dtype)
        y = y * gain
        # b is in y already. Where m has not moved the gain is 1, and y stays the base's own.
        return y if self.bias is None else y + self.bias * (1 - gain)

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
        self.register_buffer("lora_A0", torch.zeros_like(self.lora_A.weight))
        self.register_buffer("lora_B0", torch.zeros_like(self.lora_B.weight))

    def start(self, generator):
        U, S, V = torch.linalg.svd(self.frozen_weight(), full_matrices=False)
        if self.rank > len(S):
            raise InputError(f"PiSSA of rank {self.rank}: a layer has {len(S)} singular values: "
                             "lower --rank")
        root = (S[:self.rank] / self.scale).sqrt()
        self.lora_A0.copy_(root[:, None] * V[:self.rank])
        self.lora_B0.copy_(U[:, :self.rank] * root)
        self.lora_A.weight.copy_(self.lora_A0)
        self.lora_B.weight.copy_(self.lora_B0)

    def factors(self):
        A = self.lora_A.weight
        B = self.lora_B.weight
        return torch.cat((A, A - self.lora_A0)), torch.cat((B - self.lora_B0, self.lora_B0), 1)

    def stored(self):
        """As the plain LoRA of rank 2r that it is, which any reader of PEFT's files adds to W."""
        A = self.lora_A.weight.detach()
        B = self.lora_B.weight.detach()
        return {"lora_A.weight": torch.cat((A, self.lora_A0)),
                "lora_B.weight": torch.cat((B, -self.lora_B0), 1)}

    def take(self, tensors):
        A, A0 = tensors["lora_A.weight"].chunk(2)
        B, B0 = tensors["lora_B.weight"].chunk(2, 1)
        self.lora_A.weight.copy_(A)
        self.lora_B.weight.copy_(B)
        self.lora_A0.copy_(A0)
        self.lora_B0.copy_(-B0)


# ---- Several adapters in parallel ----------------------------------------------------------------

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

    def zeros_of_members(self, width):
        """A parameter (M, width) of zeros, in fp32."""
        return nn.Parameter(torch.zeros(self.members, width, device=self.lora_A.weight.device))


class MultiLoRALinear(ParallelLinear):
    """g_i is learned, a number for each output, zero at first: so the first forward is the base's
    although B is random as A is (arXiv 2311.11501)."""
    kind = "multilora"
    trains = (*LoRALinear.trains, "lora_gates")

    def __init__(self, linear, *args, **kwargs):
        super().__init__(linear, *args, **kwargs)
        self.lora_gates = self.zeros_of_members(self.out_features)

    def start(self, generator):
        for part in (self.lora_A.weight, self.lora_B.weight):
            kaiming(part, generator)
        self.lora_gates.zero_()

    def factors(self):
        return self.lora_A.weight, self.lora_B.weight * self.spread(self.lora_gates.t())


class MoALinear(ParallelLinear):
    """g = softmax(R x), of each token: a mixture of adapters with a router (R zero at first), as in
    LoRAMoE (arXiv 2312.09979) without its balancing loss."""
    kind = "moa"
    trains = (*LoRALinear.trains, "lora_router")

    def __init__(self, linear, *args, **kwargs):
        super().__init__(linear, *args, **kwargs)
        self.lora_router = self.zeros_of_members(self.in_features)

    def start(self, generator):
        super().start(generator)
        self.lora_router.zero_()

    def gated(self, low, x):
        logits = F.linear(x, self.lora_router.to(x.dtype))                               # (.., M)
        return low * self.spread(logits.float().softmax(-1).to(x.dtype))

    def decoding_parts(self, dtype):
        return None if self.enabled else Parts(self.weight, bias=self.bias)

    def merged_weight(self):
        raise InputError("a mixture of adapters has a weight for each token: it cannot be merged")


def train_in_full(model):
    """Makes all weights train, and keeps a copy of the base model. Returns model."""
    if adapter_state(model) or any(getattr(m, "quantised", False) for m in model.modules()):
        raise InputError("--adapter full trains the weights themselves: they cannot be in 4 bits, "
                         "or under an adapter")
    if "residual_scale" in model.config.extra:
        raise InputError("--adapter full takes steps of one size, and this checkpoint, written by "
                         "support.to_qwen3, has weights of very unlike sizes (residual_scale in "
                         "config.json): train an adapter")
    model.original = {name: p.detach().clone() for name, p in model.named_parameters()}
    return model.requires_grad_(True)


def with_start(layers, stored):
    """PiSSALinear.stored from PEFT's file, which holds A and B alone, to be added to a residue that
    is computed again from W: A0 and B0 are computed again as well."""
    whole = dict(stored)
    for name, layer in layers.items():
        starts = (("lora_A.weight", layer.lora_A0, 0), ("lora_B.weight", -layer.lora_B0, 1))
        for part, start, axis in starts:
            full = f"{name}.{part}"
            if full in stored and stored[full].shape == start.shape:
                whole[full] = torch.cat((stored[full].to(start), start), axis)
    return whole


def rslora_config(layer):
    return {"use_rslora": True}


def rslora_marked(config):
    return bool(config.get("use_rslora"))


def dora_config(layer):
    return {"use_dora": True}


def dora_marked(config):
    return bool(config.get("use_dora"))


def pissa_config(layer):
    """A plain LoRA of rank 2r, see PiSSALinear.stored."""
    return {"r": 2 * layer.rank, "lora_alpha": 2 * layer.alpha, "pissa_rank": layer.rank}


def pissa_marked(config):
    return config.get("init_lora_weights") == "pissa" or bool(config.get("pissa_rank"))


def pissa_shape(config):
    rank = config["r"]
    alpha = config["lora_alpha"]
    if "pissa_rank" in config:
        return dict(rank=rank // 2, alpha=alpha / 2, width=rank // 2), rank
    return dict(rank=rank, alpha=alpha, width=rank), rank


def members_config(layer):
    return {"members": layer.members}


ADAPTERS.add("rslora", "LoRA scaled by alpha/sqrt(r) (arXiv 2312.03732)", peft_type="LORA",
             into="layer", config=rslora_config, marked=rslora_marked)(RsLoRALinear)
ADAPTERS.add("dora", "direction and magnitude apart (arXiv 2402.09353)", peft_type="LORA",
             into="layer", config=dora_config, marked=dora_marked)(DoRALinear)
ADAPTERS.add("pissa", "starts as W's largest singular directions (arXiv 2404.02948)",
             peft_type="LORA", into="layer", config=pissa_config, marked=pissa_marked,
             shape=pissa_shape, complete=with_start)(PiSSALinear)
ADAPTERS.add("multilora", "--members LoRAs with learned scales (arXiv 2311.11501)",
             peft_type="MULTILORA", into="layer", config=members_config,
             wants=("members",))(MultiLoRALinear)
ADAPTERS.add("moa", "--members LoRAs mixed by a router of tokens (arXiv 2312.09979)",
             peft_type="MOA", into="layer", config=members_config, wants=("members",))(MoALinear)
ADAPTERS.add("full", "no adapter: all weights train; a copy of the base is kept", peft_type="FULL",
             into="layer", put=train_in_full)(None)
