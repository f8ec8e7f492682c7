"""Writes a Qwen2 (Qwen2.5) or Llama checkpoint as a Qwen3 one that computes the same logits.

    python -m support.to_qwen3 Qwen2.5-0.5B-Instruct qwen2.5-as-qwen3

Qwen3 normalises the queries and keys of each head, the others do not. Under an epsilon E that is
huge beside mean(q^2), a norm with the weight sqrt(E) leaves q as it is:

    sqrt(E) q / sqrt(mean(q^2) + E)  =  q (1 - mean(q^2) / 2E + ..)

But all norms of a Qwen3 share E. So the residual stream x is held s = sqrt(E / eps) times as large,
eps being the checkpoint's own epsilon: then s x / sqrt(mean(s^2 x^2) + E) is the old norm of x.
What writes to the stream is multiplied by s: the embedding, o_proj with its bias, down_proj. A tied
head is the embedding: the last norm's weight is divided by s. Another head stays as it is.

s is a power of 2, which rounds no weight, and the smallest that makes E at least 2^38: mean(q^2) /
2E is then below fp32's rounding, 2^-24, for queries and keys of up to 180 in root mean square, and
squares of the stream stay far from the largest number. float16 cannot hold numbers of that size."""

import argparse
import math
import sys

import torch

from support.files import InputError, command, fetch, read_json, short, write_json
from support.hub import same_layout, write_tensors
from support.merge import Stored, atomic_folder, copy_beside
from support.model_config import check_values, config_fields


SMALLEST_EPSILON = 2 ** 38

# Settings of either architecture with the only value that is implemented, and that may be left out.
IMPLEMENTED = {"mlp_bias": False, "partial_rotary_factor": 1, "use_mrope": False}

NORMS = ("q_norm.weight", "k_norm.weight")   # what Qwen3 has and they have not

# What config.json goes on to say.
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


# ---- The configuration ---------------------------------------------------------------------------

def source_fields(config):
    """The fields of a Qwen2's or Llama's config.json under their Qwen3 names, checked, and whether
    q, k and v have a bias and o has one. InputError for what has no counterpart in Qwen3."""
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ("qwen2", "llama"):
        raise InputError(f"config.json describes a {short(kind)} model: qwen2 and llama can be "
                         "written as a Qwen3")
    check_values(config, IMPLEMENTED, "has a counterpart in Qwen3")
    layers = config.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise InputError("config.json has layer_types other than full_attention: not implemented")
    given = {key: value for key, value in config.items() if value is not None}
    bias = kind == "qwen2" or given.get("attention_bias", False)
    fields = config_fields(assumed(given) | given | {"model_type": "qwen3", "attention_bias": bias})
    fields["extra"] = {key: config[key] for key in KEPT if key in config}
    return fields, kind == "llama" and bias


def assumed(given):
    """What transformers takes for fields that a Qwen2's or Llama's config.json leaves out."""
    values = {"rms_norm_eps": 1e-6}
    parameters = given.get("rope_parameters")
    if not isinstance(parameters, dict) or parameters.get("rope_theta") is None:
        values["rope_theta"] = 10000.0
    heads = given.get("num_attention_heads")
    hidden = given.get("hidden_size")
    if type(heads) is int and type(hidden) is int and heads > 0:
        values["num_key_value_heads"] = heads
        values["head_dim"] = hidden // heads
    return values


def qwen3_shapes(c):
    """{name: shape} of the tensors of a Qwen3 with these fields."""
    hidden = c["hidden_size"]
    inner = c["intermediate_size"]
    q = c["num_attention_heads"] * c["head_dim"]
    kv = c["num_key_value_heads"] * c["head_dim"]
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden),
                 "o_proj": (hidden, q)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden,
             "self_attn.q_norm": c["head_dim"], "self_attn.k_norm": c["head_dim"]}
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], hidden)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, size in norms.items():
            shapes[f"{layer}.{name}.weight"] = (size,)
        for name, shape in attention.items():
            shapes[f"{layer}.self_attn.{name}.weight"] = shape
            if c["attention_bias"]:
                shapes[f"{layer}.self_attn.{name}.bias"] = shape[:1]
        for name, shape in mlp.items():
            shapes[f"{layer}.mlp.{name}.weight"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], hidden)
    return shapes


def source_shapes(shapes, o_bias):
    """Those of a Qwen3's {name: shape} that its source has too: without norms per head, and without
    a bias of o unless it has one."""
    added = NORMS if o_bias else (*NORMS, "o_proj.bias")
    return {name: shape for name, shape in shapes.items() if not name.endswith(added)}


def scales_of(eps, dtype):
    """(s, sqrt(E)) as `dtype` holds them. E is the square of the rounded sqrt(E), so that queries
    keep their size exactly; s^2 eps differs from it by the rounding."""
    root = math.sqrt(eps)
    s = 2.0 ** math.ceil(math.log2(math.sqrt(SMALLEST_EPSILON) / root))
    return s, torch.tensor(root * s, dtype=dtype).item()


# ---- The weights ---------------------------------------------------------------------------------

WRITES_TO_STREAM = ("embed_tokens.weight", "o_proj.weight", "o_proj.bias", "down_proj.weight")


def read_shapes(stored, tied):
    """{name: shape} of a checkpoint's tensors without those that say nothing of their own: the
    rotary angles of old files, a copy of the tied head."""
    shapes = {}
    for name, shape in stored.shapes.items():
        if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight"):
            shapes[name] = shape
    return shapes


def converted(name, shape, stored, s, root, tied):
    """The tensor `name` of the Qwen3, in fp32; stored: the checkpoint's Stored."""
    if name.endswith(NORMS):
        return torch.full(shape, root)
    if name not in stored.shapes:            # o_proj.bias
        return torch.zeros(shape)
    tensor = stored(name)
    if name.endswith(WRITES_TO_STREAM):
        return tensor * s
    return tensor / s if tied and name == "model.norm.weight" else tensor


def convert(source, out, dtype=None, revision=None):
    """Writes the Qwen3 folder `out` from the Qwen2 or Llama folder (or hub name) `source`, in
    `dtype`, by default the checkpoint's own (float16: float32). Returns (model_type, dtype, s)."""
    folder = fetch(source, revision)
    config = read_json(folder / "config.json")
    fields, o_bias = source_fields(config)
    dtype = dtype or ("bfloat16" if fields["dtype"] == "bfloat16" else "float32")
    extra = fields.pop("extra")
    s, root = scales_of(fields["rms_norm_eps"], getattr(torch, dtype))
    fields |= {"rms_norm_eps": root ** 2, "dtype": dtype}
    stored = Stored(folder)
    tied = fields["tie_word_embeddings"]
    if fields["num_hidden_layers"] > len(stored.shapes):  # before as many are listed
        raise InputError(f"the checkpoint in {folder} has too few tensors for num_hidden_layers")
    shapes = qwen3_shapes(fields)
    same_layout(folder, source_shapes(shapes, o_bias), read_shapes(stored, tied))
    with atomic_folder(out) as new:
        write_tensors(new / "model.safetensors", shapes, getattr(torch, dtype),
                      lambda name: converted(name, shapes[name], stored, s, root, tied))
        fields["torch_dtype"] = fields.pop("dtype")
        write_json(new / "config.json",
                   {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
                    "hidden_act": "silu", **extra, **fields, "residual_scale": s})
        copy_beside(folder, new)
    return config["model_type"], dtype, s


# ---- The command ---------------------------------------------------------------------------------

def parser():
    p = argparse.ArgumentParser(
        prog="python -m support.to_qwen3",
        description="Write a Qwen2 (Qwen2.5) or Llama checkpoint as a Qwen3 one of equal logits.")
    p.add_argument("folder", metavar="FOLDER", help="folder in the hub's layout, or a hub name")
    p.add_argument("out", metavar="OUT", help="folder to make")
    p.add_argument("--dtype", choices=("float32", "bfloat16"),
                   help="of the weights written; default: the checkpoint's own, of float16 float32")
    p.add_argument("--revision", help="commit, tag or branch of the checkpoint on the hub")
    p.set_defaults(run=run)
    return p


def run(args):
    kind, dtype, s = convert(args.folder, args.out, args.dtype, args.revision)
    print(f"{args.out}: {args.folder} ({kind}) as a Qwen3, {dtype}")
    print(f"its residual stream is {s:.0f} (2^{math.log2(s):.0f}) times as large: LoRA on o_proj "
          "and down_proj would need an alpha as many times as large to move as in the original, "
          "so leave them out (--targets q_proj,k_proj,v_proj,gate_proj,up_proj)")


if __name__ == "__main__":
    sys.exit(command(parser()))
