"""LoRA: low-rank updates that train while the weights are frozen, and their files in PEFT's layout.

The model's code does not know that an adapter is there. "The base model" is what training started
from, whatever the adapter did to the weights: `with base(model)`. Reading order: the layer, putting
it on a model, the base and copies, files, merging. The other adapters are in methods/adapters.py
and methods/pruned.py.

    python lora.py merge RUN --out FOLDER         # one checkpoint of base and adapter, to serve
    python lora.py push RUN owner/name --private  # the adapter and its model card, to the hub"""

import argparse
import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from support import registry
from support.files import InputError, command
from support.peft_files import (LINEARS, check_fit, check_targets, layer_config, module_names,
                                read_adapter, target_names, write_adapter)
from support.registry import ADAPTERS, add_commands


# ---- The layer -----------------------------------------------------------------------------------
#
# x ──> W (frozen, any dtype) ─────────────> + ──> y      A (r, in): random; B (out, r): zero, so
# └──> A ──> (.., r) ──> B ──> * alpha/r ────┘            that the first forward is the base's own

@dataclass
class Parts:
    """What a linear layer is made of, for generation to fuse with others': y = gain * (x W^T +
    scale (x A^T) B^T) + bias. weight W (out, in) or an NF4, which adds the bias itself; A (r, in)
    and B (out, r), or None; gain and bias (out,) or None."""
    weight: object
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    scale: float = 1.0
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def kaiming(weight, generator):
    """Fills a (rows, in) weight as PEFT draws A (Kaiming uniform, a = sqrt(5)), on the CPU."""
    bound = 1 / math.sqrt(weight.shape[1])
    weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / r) B A x (arXiv 2106.09685). W, a tensor or an NF4, and the bias b,
    where there is one, keep their names and dtype; A and B are fp32 (Adam's steps on a bf16 A
    round to nothing at small learning rates) and are cast to the input's dtype for the product.

    The other kinds say by `factors` what stands for A and B. All of theirs is named lora_*:
    parameters in `trains` train, other parameters and buffers are kept, and what state_dict holds
    goes into the adapter's file. `width`: the rows of A."""
    kind = "lora"
    trains = ("lora_A.weight", "lora_B.weight")

    def __init__(self, linear, rank, alpha, dropout=0.0, width=None):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias              # frozen, or None
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.rank = rank
        self.width = width or rank
        self.set_alpha(alpha)
        self.dropout = dropout
        self.enabled = True
        make = dict(bias=False, dtype=torch.float32, device=linear.weight.device)
        self.lora_A = nn.Linear(linear.in_features, self.width, **make)
        self.lora_B = nn.Linear(self.width, linear.out_features, **make)

    @staticmethod
    def width_of(rank, members):
        return rank

    def set_alpha(self, alpha):
        self.alpha = float(alpha)
        self.scale = alpha / self.rank

    def start(self, generator):
        """Sets the values before the first step."""
        kaiming(self.lora_A.weight, generator)
        self.lora_B.weight.zero_()

    def factors(self):
        """(A, B): the update of W is scale B A."""
        return self.lora_A.weight, self.lora_B.weight

    def gated(self, low, x):
        """low (.., width) = A x, for kinds that weigh it by x."""
        return low

    def is_nf4(self):
        return getattr(self.weight, "quantised", False)

    def forward(self, x):
        if self.is_nf4():
            y = self.weight(x)                                                         # (.., out)
        else:
            y = F.linear(x, self.weight, self.bias)
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
        """What generation fuses into one product with other layers'."""
        if not self.enabled:
            return Parts(self.weight, bias=self.bias)
        A, B = self.factors()
        return Parts(self.weight, A.detach().to(dtype), B.detach().to(dtype), self.scale,
                     bias=self.bias)

    def frozen_weight(self):
        """W (out, in) in fp32."""
        return self.weight.dense() if self.is_nf4() else self.weight.float()

    def merged_weight(self):
        """W + (alpha / r) B A in fp32. Rounded to bf16 most of a small update would be lost."""
        A, B = self.factors()
        return torch.addmm(self.frozen_weight(), B, A, alpha=self.scale)

    def stored(self):
        """name -> tensor of the adapter's file."""
        return {n: t for n, t in self.state_dict().items() if n.startswith("lora_")}

    def take(self, tensors):
        """The inverse of stored."""
        for name, own in self.stored().items():
            own.copy_(tensors[name])


ADAPTERS.add("lora", "W + alpha/r B A (arXiv 2106.09685)", peft_type="LORA",
             into="layer")(LoRALinear)


# ---- Putting one on a model ----------------------------------------------------------------------

def lora_layers(model):
    """name -> LoRALinear, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_adapter(model, kind, rank, alpha, **options):
    """Puts any of ADAPTERS on a model; returns it."""
    if ADAPTERS[kind].put is not None:
        return ADAPTERS[kind].put(model)
    return add_lora(model, rank, alpha, kind=kind, **options)


def add_lora(model, rank, alpha, *, dropout=0.0, targets=LINEARS, seed=0, kind="lora", members=4,
             width=None, layers=None):
    """Puts LoRA, or another of ADAPTERS' layers, on every linear layer whose last name is in
    `targets`, or on those of the full names `layers`; the rest of the model is frozen. Returns
    model.

    A is drawn from a generator of its own on the CPU: the same on every rank and device (seed None:
    nothing is drawn, a file follows). The token head and the embedding are never wrapped: tied, one
    would corrupt the other."""
    check_targets(targets)
    if rank < 1:
        raise InputError(f"the LoRA rank is {rank}: it must be at least 1")
    if adapter_state(model):
        raise InputError("the model has LoRA layers already: merge them or load into them")
    make = ADAPTERS[kind].layer
    width = width or make.width_of(rank, members)
    model.requires_grad_(False)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if ADAPTERS[kind].on_model is not None:
        ADAPTERS[kind].on_model(model, width // rank)
    for name, linear in list(model.named_modules()):
        wanted = name.rpartition(".")[2] in targets if layers is None else name in layers
        if not wanted:
            continue
        layer = make(linear, rank, alpha, dropout, width)
        layer.ensemble = model.ensemble
        if generator:
            with torch.no_grad():
                layer.start(generator)
        layer.train(linear.training)  # a new module trains: dropout would then make answers noisy
        replace_module(model, name, layer)
    return model


def replace_module(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def adapter_state(model):
    """name -> parameter of all that trains, named as in the model:
    model.layers.0.self_attn.q_proj.lora_A.weight and so on."""
    if model.original is not None:           # all weights train
        return dict(model.named_parameters())
    state = {}
    for name, layer in lora_layers(model).items():
        for part in layer.trains:
            state[f"{name}.{part}"] = layer.get_parameter(part)
    return state


def trained(model):
    """The list of all that trains; InputError where its dtype would lose the steps."""
    params = list(adapter_state(model).values())
    if any(p.dtype != torch.float32 for p in params):
        raise InputError("all weights train, and in bfloat16 most of Adam's steps would round to "
                         "nothing: give --dtype float32")
    return params


# ---- The base model, and copies ------------------------------------------------------------------

@contextmanager
def base(model):
    """Within: the base model. Everything that compares with it goes through here (embedder, gate,
    measuring), since "the adapter off" is only how plain LoRA does it."""
    if model.original is not None:
        with adapter(model, model.original):
            yield model
        return
    layers = list(lora_layers(model).values())
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
    """Within: the model with the trained tensors `state` (as from frozen_copy) in place of its
    own."""
    params = adapter_state(model)
    own = {name: p.data for name, p in params.items()}
    try:
        for name, p in params.items():
            p.data = state[name]
        yield model
    finally:
        for name, p in params.items():
            p.data = own[name]


# ---- Files ---------------------------------------------------------------------------------------

def save_adapter(model, folder, base_name="", revision=None):
    """Writes adapter_config.json and adapter_model.safetensors, as PEFT writes and reads them for
    lora, rslora, dora, adalora, and for pissa as a plain LoRA of rank 2r; the others' are built
    the same way, under names of their own."""
    layers = lora_layers(model)
    if not adapter_state(model):
        raise InputError("save_adapter: the model has no LoRA layers")
    config = {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name),
              "revision": revision}
    if layers:
        config |= layer_config(next(iter(layers.values())))
        config["target_modules"] = target_names(list(layers), module_names(model))
        tensors = stored_tensors(layers)
    else:
        config["peft_type"] = "FULL"
        tensors = adapter_state(model)
    write_adapter(folder, config, tensors)


def stored_tensors(layers):
    """name in the model -> tensor of the adapter's file."""
    tensors = {}
    for name, layer in layers.items():
        for part, tensor in layer.stored().items():
            tensors[f"{name}.{part}"] = tensor
    return tensors


@torch.no_grad()
def load_adapter(model, folder, *, dropout=None):
    """Puts the adapter in `folder` (PEFT's layout) on the model, or into the LoRA layers that it
    has. Returns model.

    Raises InputError when the files are missing, ask for what this code lacks, or fit another
    model."""
    file = read_adapter(folder, module_names(model))
    row = ADAPTERS[file.kind]
    if row.layer is None:                    # all weights
        own = adapter_state(model if model.original is not None else row.put(model))
        check_fit(folder, own, file.tensors)
        for name, p in own.items():
            p.copy_(file.tensors[name])
        return model
    if not lora_layers(model):
        add_lora(model, **file.shape, layers=file.layers, kind=file.kind,
                 seed=0 if file.lacks_start else None)
    layers = lora_layers(model)
    if {layer.kind for layer in layers.values()} != {file.kind}:
        raise InputError(f"the adapter in {folder} is {file.kind}'s, the model has another's "
                         "layers")
    tensors = row.complete(layers, file.tensors) if file.lacks_start else file.tensors
    check_fit(folder, stored_tensors(layers), tensors)
    for name, layer in layers.items():
        layer.take({part: tensors[f"{name}.{part}"] for part in layer.stored()})
        layer.set_alpha(file.shape["alpha"])
        layer.dropout = file.dropout if dropout is None else dropout
    return model


# ---- Taking off, merging -------------------------------------------------------------------------

def drop_lora(model):
    """Takes the adapter off: the base model is back. Returns model."""
    if model.original is not None:
        for name, p in model.named_parameters():
            p.data = model.original[name]
        model.original = None
        return model.requires_grad_(False)
    for name, layer in lora_layers(model).items():
        replace_module(model, name, plain_linear(layer, layer.weight))
    model.ensemble = None
    return model


def merge_lora(model, dtype=torch.float32):
    """Replaces every LoRA layer by a plain linear with W + (alpha / r) B A, or what its kind makes
    of that, in fp32. Returns the model in `dtype`: fp32 by default, since rounding the sum to bf16
    drops most of a small update."""
    if model.original is not None:
        model.original = None
        return model.requires_grad_(False).to(dtype)
    for name, layer in lora_layers(model).items():
        replace_module(model, name, plain_linear(layer, layer.merged_weight()))
    model.ensemble = None
    return model.to(dtype)


def plain_linear(layer, weight):
    """The linear layer with a LoRA layer's sizes and bias and a frozen `weight`; an NF4 is one
    itself."""
    if getattr(weight, "quantised", False):
        return weight
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = layer.bias
    return linear


# ---- Commands ------------------------------------------------------------------------------------

def parser():
    """The commands, `merge` and `push`, are registered by files in methods/."""
    p = argparse.ArgumentParser(description="From a trained adapter to a model in use.")
    add_commands("lora", p.add_subparsers(required=True, dest="command", metavar="COMMAND"))
    return p


def main(argv=None):
    registry.load()
    return command(parser(), argv)


if __name__ == "__main__":
    # Files in methods/ import this one by its name: run that copy, not a second one.
    from lora import main
    sys.exit(main())
