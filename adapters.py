"""Adapters: LoRA layers beside frozen weights, and their files in PEFT's layout.

An adapter says what trains and nothing else: the model's code does not know that it is there. "The
base model" is a thing of its own (`with base(model)`): what training started from, whatever the
adapter did to the weights. In order: the layer, putting it on a model, the base and copies, files,
merging."""

import math
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from data import InputError, beside, read_json, write_json
from model import NF4, Parts, read_tensors

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- LoRA ----------------------------------------------------------------------------------------
#
# x ──> W (frozen, any dtype) ─────────────> + ──> y      A (r, in): random; B (out, r): zero, so
# └──> A ──> (.., r) ──> B ──> * alpha/r ────┘            that the first forward is the base's own

class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x. W, a tensor or an NF4, keeps its name and dtype; A and B are
    fp32 (Adam's steps on a bf16 A round to nothing at small learning rates) and are cast to the
    input's dtype for the product."""

    def __init__(self, linear, rank, alpha, dropout=0.0):
        super().__init__()
        self.weight, self.scale = linear.weight, alpha / rank
        self.dropout, self.enabled = dropout, True
        self.in_features, self.out_features = linear.in_features, linear.out_features
        make = dict(bias=False, dtype=torch.float32, device=linear.weight.device)
        self.lora_A = nn.Linear(linear.in_features, rank, **make)
        self.lora_B = nn.Linear(rank, linear.out_features, **make)

    def forward(self, x):
        nf4 = isinstance(self.weight, NF4)
        y = self.weight(x) if nf4 else F.linear(x, self.weight)                          # (.., out)
        if not self.enabled:
            return y
        dropped = F.dropout(x, self.dropout, self.training)
        low = F.linear(dropped, self.lora_A.weight.to(x.dtype))                          # (.., r)
        # In place: the frozen product needs nothing of y for its backward, so the sum takes no
        # second (.., out) tensor.
        B = self.lora_B.weight.t().to(x.dtype)
        y.flatten(0, -2).addmm_(low.flatten(0, -2), B, alpha=self.scale)
        return y

    def decoding_parts(self, dtype):
        """What generation joins into one product with other layers' (model.Parts)."""
        if not self.enabled:
            return Parts(self.weight)
        A, B = (part.weight.detach().to(dtype) for part in (self.lora_A, self.lora_B))
        return Parts(self.weight, A, B, self.scale)

    def merged_weight(self):
        """W + (alpha / r) B A in fp32. Rounded to bf16 most of a small update would be lost."""
        weight = self.weight.dense() if isinstance(self.weight, NF4) else self.weight.float()
        return torch.addmm(weight, self.lora_B.weight, self.lora_A.weight, alpha=self.scale)


def lora_layers(model):
    """name -> LoRALinear, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model, rank, alpha, *, dropout=0.0, targets=LINEARS, seed=0):
    """Put LoRA on every linear layer whose last name is in `targets`; the rest of the model is
    frozen. Returns model.

    A is drawn as PEFT draws it (Kaiming uniform, a = sqrt(5)) from a generator of its own on the
    CPU: the same on every rank and device. The token head and the embedding are never wrapped:
    tied, one would corrupt the other."""
    unknown = set(targets) - set(LINEARS)
    if unknown or not targets:
        raise InputError(f"LoRA target {min(unknown, default='')!r} is no linear layer of Qwen3: "
                         f"choose from {', '.join(LINEARS)}")
    if rank < 1:
        raise InputError(f"the LoRA rank is {rank}: it must be at least 1")
    if lora_layers(model):
        raise InputError("the model has LoRA layers already: merge them or load into them")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    wanted = [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in targets]
    for name, linear in wanted:
        layer = LoRALinear(linear, rank, alpha, dropout)
        bound = 1 / math.sqrt(linear.in_features)
        start = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            layer.lora_A.weight.copy_(start)
            layer.lora_B.weight.zero_()
        layer.train(linear.training)  # a new module trains: dropout would then make answers noisy
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def adapter_state(model):
    """name -> parameter of A and B, named as in the model:
    model.layers.0.self_attn.q_proj.lora_A.weight and so on."""
    return {f"{name}.{part}.weight": getattr(layer, part).weight
            for name, layer in lora_layers(model).items() for part in ("lora_A", "lora_B")}


@contextmanager
def base(model):
    """Within: the base model, the one that training started from. Everything that compares with it
    goes through here (embedder, gate, measuring), since "the adapter off" is only how plain LoRA
    does it."""
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


PREFIX = "base_model.model."  # PEFT's, before the model's own names


def save_adapter(model, folder, base="", revision=None):
    """adapter_config.json and adapter_model.safetensors, as PEFT writes and reads them."""
    layers = lora_layers(model)
    if not layers:
        raise InputError("save_adapter: the model has no LoRA layers")
    first, folder = next(iter(layers.values())), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rank = first.lora_A.out_features
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
              "revision": revision, "r": rank, "lora_alpha": first.scale * rank,
              "lora_dropout": first.dropout, "bias": "none", "fan_in_fan_out": False,
              "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
              "modules_to_save": None, "use_rslora": False, "use_dora": False,
              "init_lora_weights": True, "inference_mode": True}
    tensors = {PREFIX + n: p.detach().cpu().contiguous() for n, p in adapter_state(model).items()}
    with beside(folder / "adapter_model.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)


def read_adapter_config(folder):
    """adapter_config.json of a plain LoRA adapter, checked before anything is built from it."""
    path = Path(folder) / "adapter_config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object: it is no adapter's configuration")
    for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern",
                "fan_in_fan_out"):
        if config.get(key):
            raise InputError(f"{path} sets {key}: only plain LoRA is implemented")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise InputError(f"{path} is not a plain LoRA adapter's")
    if not {"r", "lora_alpha", "target_modules"} <= config.keys():
        raise InputError(f"{path} lacks r, lora_alpha or target_modules: the adapter is incomplete")
    number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
    rank, alpha = config["r"], config["lora_alpha"]
    dropout = config.get("lora_dropout") or 0.0
    targets = config["target_modules"]
    if type(rank) is not int or not 1 <= rank <= 2 ** 16:
        raise InputError(f"{path}: r is {str(rank)[:40]}: a rank is a whole number from 1 to 65,536"
                         f"")
    if not number(alpha) or not 0 < abs(alpha) < 1e9 or not number(dropout) or not 0 <= dropout < 1:
        raise InputError(f"{path}: lora_alpha or lora_dropout is no number that can be worked with")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise InputError(f"{path}: target_modules must be a list of names")
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), (str, type(None))):
            raise InputError(f"{path}: {key} must be a text")
    return config


def load_adapter(model, folder, *, dropout=None):
    """Put the adapter in `folder` (PEFT's layout) on the model, or into the LoRA layers that it
    has. Returns model.

    Raises InputError when the files are missing, ask for what this code lacks, or fit
    another model."""
    folder = Path(folder)
    config = read_adapter_config(folder)
    tensors = read_tensors(folder, file="adapter_model.safetensors")
    stored = {n.removeprefix(PREFIX): t for n, t in tensors.items()}
    held = {n.rpartition(".lora_")[0].rpartition(".")[2] for n in stored}
    if not set(config["target_modules"]) <= held or any(t.dim() != 2 for t in stored.values()):
        raise InputError(f"{folder}/adapter_model.safetensors lacks matrices of a target module "
                         "that its configuration names: the adapter is incomplete")
    ranks = {t.shape[0] for n, t in stored.items() if n.endswith("lora_A.weight")}
    if ranks != {config["r"]}:  # before anything of that size is built
        raise InputError(f"{folder}/adapter_config.json says r = {config['r']}, its tensors have "
                         "another rank: the adapter does not fit itself")
    if not lora_layers(model):
        add_lora(model, config["r"], config["lora_alpha"], targets=tuple(config["target_modules"]))
    own = adapter_state(model)
    odd = sorted(own.keys() ^ stored.keys())
    odd = odd or sorted(n for n in own if own[n].shape != stored[n].shape)
    if odd:
        raise InputError(f"the adapter in {folder} does not fit this model (first difference: "
                         f"{odd[0]!r}): it was trained on another one, or on other layers")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(stored[name])
    for layer in lora_layers(model).values():
        layer.scale = config["lora_alpha"] / config["r"]
        layer.dropout = (config.get("lora_dropout") or 0.0) if dropout is None else dropout
    return model


def drop_lora(model, weight_of=lambda layer: layer.weight):
    """Replace every LoRA layer by a plain linear: with its frozen weight, so the base model is
    back. Returns model."""
    for name, layer in lora_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = weight_of(layer)
        if isinstance(weight, NF4):
            linear = weight
        else:
            linear.weight = nn.Parameter(weight, requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return model


def merge_lora(model, dtype=torch.float32):
    """Replace every LoRA layer by a plain linear with W + (alpha / r) B A, added in fp32.
    Returns the model in `dtype`: fp32 by default, since rounding the sum to bf16 drops most of a
    small update."""
    return drop_lora(model, LoRALinear.merged_weight).to(dtype)
