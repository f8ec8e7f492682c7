"""Qwen3, written out: config, layers, three heads, loading and saving, 4-bit weights, scoring; and
a BERT encoder, for embeddings.

Read it in this order: Config -> RMSNorm, rotary -> Attention, MLP, Block -> Qwen3 -> Rows ->
token_logprobs. Parameter names are Hugging Face's, so a downloaded checkpoint loads strictly and a
saved one loads elsewhere. A block does not know whether it trains, reads a prompt or writes the
next token: it hands q, k, v to `attend`. Two things differ from a textbook transformer, for speed:
  * the loss needs the vocabulary only at reply tokens, so these positions alone are projected, in
    chunks (token_logprobs, token_losses);
  * a post is read once for its k drafts: one row holds a post and all its drafts (pack).
"""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from data import ChatFormat, render_chat
from embedders import SentenceFormat, sentence_format
from files import InputError, beside, fetch, read_json, read_template, short, write_json
from hub import read_tensors, tensor_shapes
from sandbox import render_template


# ---- Configuration -------------------------------------------------------------------------------

LARGEST = 2 ** 24            # no width or count of a network is above it
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass
class Config:
    """The fields of a Qwen3 config.json that shape the network. head_dim is not hidden_size
    / heads."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False
    dtype: str = "float32"   # of the stored weights
    extra: dict = field(default_factory=dict)  # all else in config.json, written back when saved

    @classmethod
    def from_dict(cls, d):
        """Reads config.json as the hub has it (rope_theta, torch_dtype) and as transformers 5
        writes it (rope_parameters.rope_theta, dtype). Raises InputError for what this file does not
        implement, and for values of a wrong type or size, before anything is built from them."""
        if not isinstance(d, dict):
            raise InputError("config.json is not a JSON object")
        if d.get("model_type", "qwen3") != "qwen3":
            raise InputError(f"config.json describes a {short(d['model_type'])} model: give a "
                             "dense Qwen3 one (model_type qwen3)")
        if d.get("quantization_config"):
            raise InputError("config.json has a quantization_config: quantised checkpoints are not "
                             "read: give the one in bfloat16 (--nf4 quantises it when it is "
                             "loaded)")
        for key, fine in (("attention_bias", False), ("use_sliding_window", False),
                          ("hidden_act", "silu")):
            if (d.get(key) or fine) != fine:
                raise InputError(f"config.json sets {key} to {short(d[key])}: only {fine!r} is "
                                 "implemented")
        theta = read_rope(d)
        # Nothing that shapes the network is guessed: with a wrong head_dim the model still loads,
        # and writes nonsense.
        sizes = [n for n, kind in cls.__annotations__.items() if kind is int]
        try:
            values = {k: d[k] for k in sizes}
        except KeyError as e:
            raise InputError(f"config.json lacks {e.args[0]!r}: it is not a complete Qwen3 "
                             "configuration") from None
        known = {"torch_dtype", *ROPE_KEYS, *cls.__dataclass_fields__}
        dtype = str(d.get("torch_dtype") or d.get("dtype") or "float32").removeprefix("torch.")
        config = cls(**values, rope_theta=theta, rms_norm_eps=d.get("rms_norm_eps", 1e-6),
                     tie_word_embeddings=d.get("tie_word_embeddings", False), dtype=dtype,
                     extra={k: v for k, v in d.items() if k not in known})
        config.check()
        config.rope_theta = float(theta)
        return config

    def check(self):
        """InputError for a value that no network has."""
        wrong = [n for n, kind in self.__annotations__.items()
                 if kind is int and not (type(getattr(self, n)) is int
                                         and 1 <= getattr(self, n) <= LARGEST)]
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            wrong += [] if number and 0 < value < 1e18 else [name]
        wrong += [] if isinstance(self.tie_word_embeddings, bool) else ["tie_word_embeddings"]
        wrong += [] if self.dtype in DTYPES else ["dtype"]
        if not wrong and self.num_attention_heads % self.num_key_value_heads:
            wrong = ["num_key_value_heads"]
        if not wrong and self.head_dim % 2:
            wrong = ["head_dim"]
        if wrong:
            raise InputError(f"config.json has {wrong[0]} = {short(getattr(self, wrong[0]))}, "
                             "which is not valid for a Qwen3")

    def to_dict(self):
        """config.json in the hub's layout."""
        fields = [k for k in self.__dataclass_fields__ if k not in ("dtype", "extra")]
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
                "max_position_embeddings": 40960, "attention_bias": False, **self.extra,
                **{k: getattr(self, k) for k in fields}, "torch_dtype": self.dtype}


ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "rope_type")
# Factors of 1 scale nothing in these kinds, unless one of the other settings is there.
SCALED_ROPE = ("linear", "yarn", "llama3")
ROPE_EXTRAS = ("attention_factor", "mscale", "mscale_all_dim", "short_factor", "long_factor")


def read_rope(d):
    """rope_theta of a config.json, wherever the writer put it: beside the other fields (the hub's
    files), in rope_parameters (transformers 5) or in rope_scaling, which transformers reads first.
    Raises if the angles are scaled, or if two places disagree."""
    thetas = [d["rope_theta"]] if "rope_theta" in d else []
    types = [{"rope_type": d["rope_type"]}] if d.get("rope_type") is not None else []
    for key in ("rope_scaling", "rope_parameters"):
        value = d.get(key) or {}
        if not isinstance(value, dict):
            raise InputError(f"config.json has {key} = {short(value)}: it must be a JSON object or "
                             "null")
        types.append(value)
        if value.get("rope_theta") is not None:
            thetas.append(value["rope_theta"])
    for value in types:
        check_unscaled(value)
    if not thetas:
        raise InputError("config.json lacks 'rope_theta': it is not a complete Qwen3 configuration")
    if any(theta != thetas[0] for theta in thetas):
        raise InputError(f"config.json has rope_theta = {short(thetas[0])} and, in rope_scaling or "
                         f"rope_parameters, {short(thetas[-1])}: make them equal")
    return thetas[0]


def check_unscaled(value):
    """Raises unless a rope_scaling or rope_parameters object leaves the rotary angles as they
    are."""
    kind = value.get("rope_type") or value.get("type") or "default"
    scaled = kind != "default"
    if kind in SCALED_ROPE:
        scaled = value.get("factor") != 1 or any(value.get(key) for key in ROPE_EXTRAS)
    if scaled:
        raise InputError(f"config.json scales the rotary angles ({short(kind)}): only plain angles "
                         "are implemented: remove rope_scaling to use the model at its trained "
                         "length")


# ---- Layers --------------------------------------------------------------------------------------

def rms_norm(x, weight, eps):
    """x over its root mean square along the last dimension, times weight (D,) or (heads, D)."""
    # fp32 statistics, back to the input's dtype, and only then the weight: the other order flips a
    # quarter of all bf16 outputs against the released model.
    if x.dtype == torch.float32 and weight.dim() == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    return weight * F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rotary(positions, head_dim, theta, dtype):
    """cos and sin, each positions.shape + (1, head_dim / 2): the 1 is the heads'. Made in fp32,
    never a buffer, which model.to(bfloat16) would round: an inverse frequency in bf16 is off by
    radians at position 4,000."""
    # The formula and the device (CPU) of transformers: theta ** -x differs from 1 / theta ** x in
    # the last bit, which bf16 logits show.
    even = torch.arange(0, head_dim, 2, device="cpu", dtype=torch.float32)
    inverse = 1.0 / theta ** (even / head_dim)
    angles = positions.unsqueeze(-1).float() * inverse.to(positions.device, non_blocking=True)
    return angles.cos().to(dtype).unsqueeze(-2), angles.sin().to(dtype).unsqueeze(-2)


def rotate(x, rope):
    """Split-half rotation of x (B, T, heads, D): dimension i turns with i + D/2, not with i + 1."""
    (cos, sin), (a, b) = rope, x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, rope, attend, layer):
        heads = (*x.shape[:2], -1, self.head_dim)                  # x (B, T, hidden)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), rope)  # (B, T, H, D): norm, then rotary
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), rope)  # (B, T, KV, D)
        v = self.v_proj(x).view(heads)                             # (B, T, KV, D): v is not normed
        return self.o_proj(attend(layer, q, k, v).flatten(2))      # (B, T, hidden)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c.hidden_size, c.rms_norm_eps), Attention(c)
        self.post_attention_layernorm, self.mlp = RMSNorm(c.hidden_size, c.rms_norm_eps), MLP(c)

    def forward(self, x, rope, attend, layer):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


def full_attention(mask=None):
    """The `attend` of training and scoring. mask (B, 1, T, T) bool, True where row i may look at
    column j; None is plain causal, right for rows that are padded on the right. is_causal is only
    used where both lengths are equal: torch aligns it to the top left."""
    def attend(layer, q, k, v):  # q (B, T, H, D), k and v (B, T, KV, D)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        v = v.transpose(1, 2)
        if mask is not None and q.is_cuda:
            # CUDA's fast kernel with a mask wants a k and v for every head.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                             enable_gqa=True)
        return out.transpose(1, 2)
    return attend


# ---- The model and its heads ---------------------------------------------------------------------

class Backbone(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Qwen3(nn.Module):
    """A dense Qwen3 with the heads its checkpoint has: token logits (lm_head, or the tied
    embedding), a scalar `score` (reward models), or none (embedders). `vocab` is the number of
    token ids that are real: the rows above it pad the matrix and are never sampled or scored (Qwen3
    has 151,936 rows for 151,669 tokens)."""

    def __init__(self, config, *, lm_head=True, score_head=False):
        super().__init__()
        self.config, self.model = config, Backbone(config)
        self.vocab = config.vocab_size
        self.has_logits, self.has_score = lm_head, score_head
        if lm_head and not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if score_head:
            # Not as an attribute: that name is the method's.
            self._modules["score"] = nn.Linear(config.hidden_size, 1, bias=False)
        self.checkpointing = False           # recompute blocks in the backward pass
        self.lockstep = None                 # ranks.Lockstep, when ranks share the weights
        self.graphs = None                   # decode by CUDA graphs; None: on a GPU
        self.kept_batch = None               # what the next rollout takes again (generate.py)
        self.original = None                 # name -> weight before all of them train (adapters.py)
        self.deal = None                     # of an ensemble: who computes which row (adapters.py)

    device = property(lambda self: self.model.embed_tokens.weight.device)
    dtype = property(lambda self: self.model.norm.weight.dtype)
    members = property(lambda self: self.deal.members if self.deal else 1)  # of an ensemble

    def head_weight(self, rows=None):
        """(vocab, hidden): the rows of the output matrix that stand for real tokens, or its
        first `rows`."""
        if not self.has_logits:
            raise InputError("this checkpoint has no token head (an embedder or a reward model): "
                             "it cannot write text")
        tied = self.config.tie_word_embeddings
        weight = self.model.embed_tokens.weight if tied else self.lm_head.weight
        return weight[:rows or self.vocab]

    def hidden(self, tokens, positions=None, attend=None):
        """Final normed hidden states (B, T, hidden) of tokens (B, T), or of what stands for their
        embeddings (B, T, hidden); positions (B, T), by default 0..T-1."""
        if self.lockstep:
            self.lockstep()
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        attend = attend or full_attention()
        x = tokens if tokens.is_floating_point() else self.model.embed_tokens(tokens)
        rope = rotary(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for i, block in enumerate(self.model.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, attend, i, use_reentrant=False)
            else:
                x = block(x, rope, attend, i)
        return self.model.norm(x)

    def forward(self, tokens):
        """Logits (B, T, V), padding rows included. For study and tests: training never holds
        this tensor."""
        return F.linear(self.hidden(tokens), self.head_weight(self.config.vocab_size))

    def last_hidden(self, tokens, lengths):
        hidden = self.hidden(tokens)  # padded on the right: causal is enough
        return hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1]

    def embed(self, tokens, lengths):
        """Unit-length fp32 embeddings (B, hidden): the last attended token, as Qwen3-Embedding is
        read. tokens (B, T) padded on the right, lengths (B,)."""
        return F.normalize(self.last_hidden(tokens, lengths).float(), dim=-1)

    def score(self, tokens, lengths):
        """A reward model's scalar (B,) in fp32 at the last attended token, as
        Qwen3ForSequenceClassification's."""
        if not self.has_score:
            raise InputError("this checkpoint has no scalar head (score.weight): give a reward "
                             "model")
        return self._modules["score"](self.last_hidden(tokens, lengths)).float().squeeze(-1)

    @classmethod
    def from_pretrained(cls, path, *, revision=None, device=None, dtype=None, nf4=False):
        """A model from a folder or a hub name, in `dtype` or as stored. nf4: the blocks' linear
        layers in 4 bits, made on the device one by one: it holds no two in full. Built on meta and
        loaded strictly: a tensor that is missing, unknown or of another shape is an InputError.
        Names without `model.`, as Qwen3-Embedding's, are read too."""
        model = load_checkpoint(cls, fetch(path, revision), "cpu" if nf4 else device, dtype)
        return quantise(model, device) if nf4 else model

    def save_pretrained(self, folder, *, shard_bytes=5_000_000_000):
        """config.json and model.safetensors, or shards and their index: the hub's layout."""
        folder = Path(folder)
        if any(isinstance(m, NF4) for m in self.modules()):
            raise InputError("a model in NF4 cannot be saved: save its adapter, and load the "
                             "checkpoint in full to merge")
        folder.mkdir(parents=True, exist_ok=True)
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        bare = not self.has_logits and not self.has_score  # an embedder: its names lack `model.`
        tensors = {n.removeprefix("model.") if bare else n: t for n, t in self.state_dict().items()}
        # It keeps joined layers together.
        plan = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
        for file, names in plan.filename_to_tensors.items():
            with beside(folder / file) as path:
                part = {n: tensors[n].contiguous() for n in names}
                save_file(part, path, metadata={"format": "pt"})
        index, kept = folder / "model.safetensors.index.json", {*plan.filename_to_tensors}
        if plan.is_sharded:
            kept.add(index.name)
            write_json(index, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
        ours = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
        for old in folder.iterdir():         # an old index would have its shards read again
            if ours.fullmatch(old.name) and old.name not in kept:
                old.unlink()
        write_json(folder / "config.json", self.config.to_dict())


# ---- Loading -------------------------------------------------------------------------------------

def checked_layout(cls, folder, config):
    """The model on meta, and what its tensors are called in the files: the headers are compared
    with config.json before memory is taken. InputError names the first difference."""
    shapes = tensor_shapes(folder)
    bare = "embed_tokens.weight" in shapes   # an embedder: no `model.`, no head
    if bare:
        shapes = {f"model.{name}": shape for name, shape in shapes.items()}
    score = "score.weight" in shapes
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)   # some writers store the tied copy too
    if config.num_hidden_layers > len(shapes):  # before as many are built
        raise InputError(f"the checkpoint in {folder} has {len(shapes)} tensors, its config.json "
                         f"says num_hidden_layers = {config.num_hidden_layers}: it lacks tensors")
    with torch.device("meta"):
        model = cls(config, lm_head=not (bare or score), score_head=score)
    same_layout(folder, model, shapes)
    return model, "model." if bare else ""


def same_layout(folder, model, shapes):
    """InputError with the first difference between a model and the {name: shape} of its files."""
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    for problem, names in (("lacks", wanted.keys() - shapes.keys()),
                           ("has an unknown", shapes.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"the checkpoint in {folder} {problem} tensor {short(min(names))}"
                             f"{more}: its config.json describes another network")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise InputError(f"tensor {name!r} in {folder} has shape {shapes[name]}, config.json "
                             f"asks for {shape}")


def load_checkpoint(cls, folder, device=None, dtype=None):
    config = Config.from_dict(read_json(folder / "config.json"))
    dtype = dtype or getattr(torch, config.dtype)
    model, prefix = checked_layout(cls, folder, config)
    tensors = read_tensors(folder, device or "cpu", dtype)
    tensors = {prefix + name: t for name, t in tensors.items()}
    if config.tie_word_embeddings:
        copy = tensors.pop("lm_head.weight", None)
        if copy is not None and not torch.equal(copy, tensors["model.embed_tokens.weight"]):
            raise InputError(f"the checkpoint in {folder} has an lm_head.weight of its own, and "
                             "its config.json sets tie_word_embeddings: set that to false")
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()  # frozen: a phase says what it trains


def chat_format(folder):
    """The ChatFormat of a checkpoint's folder, by its own template: tried on two short chats and
    compared with what render_chat writes. Without a template: Qwen3's. InputError for a template
    that writes anything else."""
    template = read_template(Path(folder))
    if template is None:
        return ChatFormat()
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
             {"role": "user", "content": "three"}]
    told = [{"role": "system", "content": "zero"}, *turns]
    try:
        alone, after = render_template(template, (turns, told), tokens=special_tokens(folder))
    except (ValueError, OSError) as e:
        raise InputError(f"the chat template in {folder} fails on a chat of user and assistant "
                         f"turns ({' '.join(str(e).split())[:100]}): give a checkpoint whose chat "
                         "format is ChatML, as Qwen3's") from None
    default = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", alone, re.DOTALL)
    formats = [ChatFormat(think_block, default[1] if default else "", think_history)
               for think_block, think_history in ((True, False), (True, True), (False, False))]
    for chat in formats:
        if all(render_chat(messages, add_generation_prompt=True, chat=chat) == text
               for messages, text in ((turns, alone), (told, after))):
            return chat
    raise InputError(f"the chat template in {folder} {template_difference(formats, told, after)}: "
                     "give a checkpoint whose chat format is ChatML, as Qwen3's")


def special_tokens(folder):
    """name -> text of the special tokens in a folder's tokenizer_config.json, such as eos_token."""
    file = Path(folder) / "tokenizer_config.json"
    config = read_json(file) if file.exists() else {}
    tokens = {}
    for name, value in config.items() if isinstance(config, dict) else ():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def template_difference(formats, messages, text):
    """Says where a template's text of a chat leaves the nearest of the known formats."""
    if "<|im_start|>" not in text or "<|im_end|>" not in text:
        return "marks turns by other tokens than <|im_start|> and <|im_end|>"
    known = [render_chat(messages, add_generation_prompt=True, chat=chat) for chat in formats]
    shared = max((os.path.commonprefix([text, other]) for other in known), key=len)
    return (f"marks turns as ChatML does, but after {shared[-20:]!r} writes "
            f"{text[len(shared):][:40]!r}, which no known format does")


# ---- A sentence encoder: BERT, the mean of its last states ---------------------------------------

class Bert(nn.Module):
    """A BERT encoder (arXiv 1810.04805), read as sentence-transformers' commonest kind is, such as
    all-MiniLM-L6-v2: the mean of the last hidden states over a text's tokens, [CLS] and [SEP] among
    them. Names are Hugging Face's; the pooler of its files is not used. Unlike Qwen3 each norm
    stands behind its sum, positions are a learnt table, and every token sees every other."""
    lockstep = original = None               # never spread over ranks, never trained

    def __init__(self, config):
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        norm = lambda: nn.LayerNorm(width, eps=config["layer_norm_eps"])
        tables = {"word": "vocab_size", "position": "max_position_embeddings",
                  "token_type": "type_vocab_size"}
        self.embeddings = nn.ModuleDict({f"{name}_embeddings": nn.Embedding(config[size], width)
                                         for name, size in tables.items()} | {"LayerNorm": norm()})
        closing = lambda size: nn.ModuleDict({"dense": nn.Linear(size, width), "LayerNorm": norm()})
        looking = lambda: nn.ModuleDict({n: nn.Linear(width, width)
                                         for n in ("query", "key", "value")})
        layer = lambda: nn.ModuleDict({
            "attention": nn.ModuleDict({"self": looking(), "output": closing(width)}),
            "intermediate": nn.ModuleDict({"dense": nn.Linear(width, inner)}),
            "output": closing(inner)})
        layers = nn.ModuleList(layer() for _ in range(config["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.heads, self.longest = config["num_attention_heads"], config["max_position_embeddings"]
        self.form = SentenceFormat()         # what its folder says beside the encoder

    device = property(lambda self: self.embeddings["LayerNorm"].weight.device)

    def forward(self, tokens, lengths):
        """Vectors (B, hidden) in fp32, not normed, of tokens (B, T) padded on the right."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        real = positions < lengths[:, None]                                    # (B, T)
        tables = self.embeddings
        x = tables["word_embeddings"](tokens) + tables["position_embeddings"](positions)
        x = tables["LayerNorm"](x + tables["token_type_embeddings"].weight[0])  # one text: type 0
        for layer in self.encoder["layer"]:
            attention, looking = layer["attention"], layer["attention"]["self"]
            q, k, v = (looking[n](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                       for n in ("query", "key", "value"))                     # (B, H, T, D)
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
            x = self.close(attention["output"], x, seen.transpose(1, 2).flatten(2))
            inner = F.gelu(layer["intermediate"]["dense"](x))                  # exact, by erf
            x = self.close(layer["output"], x, inner)
        return (x * real[..., None]).sum(1) / lengths[:, None]

    @staticmethod
    def close(part, x, y):
        return part["LayerNorm"](x + part["dense"](y))

    @classmethod
    def from_pretrained(cls, path, *, revision=None, device=None):
        """A frozen encoder in fp32 from a folder or a hub name, loaded strictly, and `form`, what
        the folder says beside it; InputError for another network, or for one that is pooled in
        another way than by the mean."""
        folder = fetch(path, revision)
        config = bert_config(folder)
        unused = r"(bert\.)?(pooler\.|cls\.|embeddings\.position_ids)"
        rename = lambda name: "" if re.match(unused, name) else name.removeprefix("bert.")
        shapes = tensor_shapes(folder, rename)
        if config["num_hidden_layers"] > len(shapes):
            raise InputError(f"the checkpoint in {folder} has {len(shapes)} tensors, too few for "
                             f"num_hidden_layers = {config['num_hidden_layers']}")
        with torch.device("meta"):
            model = cls(config)
        same_layout(folder, model, shapes)
        tensors = read_tensors(folder, device or "cpu", torch.float32, rename=rename)
        model.load_state_dict(tensors, strict=True, assign=True)
        model.form = sentence_format(folder, "mean", config["hidden_size"], device or "cpu")
        model.longest = min(model.longest, model.form.longest or model.longest)
        return model.requires_grad_(False).eval()


def bert_config(folder):
    """config.json of a BERT encoder, checked before anything is built from it."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder}/config.json does not hold a JSON object")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "max_position_embeddings", "type_vocab_size")
    wrong = [n for n in sizes if type(config.get(n)) is not int or not 1 <= config[n] <= LARGEST]
    wrong += [n for n, fine in (("hidden_act", "gelu"), ("model_type", "bert"),
                                ("position_embedding_type", "absolute"))
              if config.get(n, fine) != fine]
    eps = config.get("layer_norm_eps")
    wrong += [] if isinstance(eps, float) and 0 < eps < 1 else ["layer_norm_eps"]
    if not wrong and config["hidden_size"] % config["num_attention_heads"]:
        wrong = ["num_attention_heads"]
    if wrong:
        raise InputError(f"{folder}/config.json has {wrong[0]} = {short(config.get(wrong[0]))}: "
                         "only BERT encoders with absolute positions and exact GELU are read")
    return config


# ---- Four-bit weights ----------------------------------------------------------------------------

# Quantiles of a normal distribution scaled to [-1, 1], with an exact zero (QLoRA, arXiv 2305.14314,
# appendix E).
NF4_VALUES = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
              -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
              0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
              0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def nf4_tables():
    """(256, 2), the two values that each byte stands for; and the 256 values that code scales
    (dynamic data type, arXiv 1511.04561, as bitsandbytes has it): 0, 1 and +-10^-i times the
    middles of 2^(6-i) equal parts of [0.1, 1]."""
    values, edges = torch.tensor(NF4_VALUES), [torch.linspace(0.1, 1, 2 ** i + 1) for i in range(7)]
    positive = torch.cat([(e[:-1] + e[1:]) / 2 * 10.0 ** (i - 6) for i, e in enumerate(edges)])
    dynamic = torch.cat((-positive, positive, torch.tensor([0.0, 1.0]))).sort().values
    return torch.cartesian_prod(values, values), dynamic


def nearest(x, values):
    """Index of the nearest of the sorted `values`; the lower one of two that are equally near."""
    return torch.bucketize(x, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8)


class NF4(nn.Module):
    """A frozen linear layer with 4.127 bits a weight: NF4 with double quantisation (QLoRA), equal
    to bitsandbytes'. Each 64 values in a row share a scale, their largest magnitude; the scales
    less their mean are coded in 8 bits that share a scale in their turn for each 256."""

    def __init__(self, weight):
        super().__init__()
        self.shape = weight.shape
        self.out_features, self.in_features = weight.shape
        blocks = F.pad(weight.detach().float().flatten(), (0, -weight.numel() % 64)).view(-1, 64)
        largest = blocks.abs().amax(1)
        scaled = blocks * (1 / largest.clamp_min(1e-30))[:, None]
        codes = nearest(scaled, blocks.new_tensor(NF4_VALUES))
        mean = largest.mean()
        scales = F.pad(largest - mean, (0, -len(largest) % 256)).view(-1, 256)
        outer = scales.abs().amax(1).clamp_min(1e-30)
        # The first of two values lies in the upper half of a byte. fp32 is kept as its bits:
        # model.to(bfloat16) would round it.
        self.register_buffer("codes", codes[:, ::2] << 4 | codes[:, 1::2])     # (blocks, 32)
        pairs, dynamic = (t.to(weight.device) for t in nf4_tables())
        coded = nearest(scales / outer[:, None], dynamic).flatten()[:len(largest)]
        self.register_buffer("scales", coded)
        self.register_buffer("outer", torch.cat((outer, mean[None])).view(torch.int32))
        tables = torch.cat((pairs.flatten(), dynamic)).view(torch.int32)
        self.register_buffer("tables", tables, persistent=False)

    device = property(lambda self: self.codes.device)
    weight = property(lambda self: self)  # what LoRA takes over from a linear layer

    def dense(self, dtype=torch.float32):
        """The weight (out, in), computed in fp32 and rounded to `dtype`."""
        outer, tables = self.outer.view(torch.float32), self.tables.view(torch.float32)
        shared = outer[:-1].repeat_interleave(256)[:len(self.scales)]
        scales = tables[512:][self.scales.int()] * shared + outer[-1]
        values = F.embedding(self.codes.int(), tables[:512].view(256, 2)).flatten(1)
        weight = (values * scales[:, None]).to(dtype)
        return weight.flatten()[:math.prod(self.shape)].view(self.shape)

    def forward(self, x):
        """x W^T, W made dense again in the backward pass: kept, it would undo what NF4 saves."""
        product = lambda x: F.linear(x, self.dense(x.dtype))
        if not torch.is_grad_enabled():
            return product(x)
        return checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)


def quantise(model, device=None):
    """The blocks' linear layers as NF4, in place, one by one on `device`; all else keeps its dtype.
    The model, on `device`."""
    for part in (part for block in model.model.layers for part in (block.self_attn, block.mlp)):
        for name, linear in [(n, m) for n, m in part.named_children() if isinstance(m, nn.Linear)]:
            setattr(part, name, NF4(linear.weight.to(device)))
    return model.to(device)


@dataclass
class Parts:
    """What a linear layer is made of, for generation to join with others': y = gain * (x W^T +
    scale (x A^T) B^T). weight W (out, in) or an NF4; A (r, in) and B (out, r), or None; gain (out,)
    or None."""
    weight: object
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    scale: float = 1.0
    gain: torch.Tensor | None = None


# ---- Batches: rows of tokens for one forward pass ------------------------------------------------

@dataclass
class Rows:
    """Token rows for one forward pass. A row holds one post and all its drafts, so the post is
    computed once:

        tokens     post post post | a a a | b b | c c c c | pad        (B, T)
        owner        -1   -1   -1 | 0 0 0 | 1 1 | 2 2 2 2 | -2         (B, T)  which draft
        positions     0    1    2 | 3 4 5 | 3 4 | 3 4 5 6 | 0          (B, T)  all follow the post

    A token sees the post and its own draft up to itself. The N reply tokens to be predicted are
    listed flat: `predict`, where in the flattened (B T) rows the state stands that predicts it (for
    a first token the post's last, for all drafts); `target`, its id; `draft`, which draft it is of,
    counted over all groups in the order given to pack. `member` (B,): of an ensemble of LoRAs, the
    one that a row is computed by, None without: a row holds drafts of one member, since a post's
    states are its member's own."""
    tokens: torch.Tensor
    positions: torch.Tensor
    owner: torch.Tensor
    predict: torch.Tensor
    target: torch.Tensor
    draft: torch.Tensor
    shared: bool
    member: torch.Tensor | None = None

    def mask(self):
        """(B, 1, T, T) bool, True where row i may look at column j; None when no row holds two
        drafts: plain causal."""
        if not self.shared:
            return None
        owner, t = self.owner, self.tokens.shape[1]
        seen = (owner[:, None, :] == -1) | (owner[:, None, :] == owner[:, :, None])
        return (seen & torch.ones(t, t, dtype=torch.bool, device=owner.device).tril())[:, None]

    def by_token(self, drafts):
        """What lists `drafts`, one a draft, say of its tokens, at the predicted tokens (N,)."""
        order = self.draft.unique_consecutive().tolist()
        return torch.tensor([x for d in order for x in drafts[d]], device=self.draft.device)


def pack(groups, tokens_per_batch, device="cpu", members=1):
    """Groups (prompt ids, [draft ids, ...]) -> list of Rows, each of at most `tokens_per_batch`
    padded tokens.

    Groups are sorted by length so that rows of a batch are alike; one too long for the budget is
    split between its drafts (each part reads the post again), as one is whose drafts are dealt over
    the members of an ensemble, draft d to member d mod M. A draft's last token is only predicted,
    so it is not part of the row."""
    parts, first = [], 0
    for prompt, drafts in groups:
        for member in range(min(members, len(drafts))):
            part, size = [], len(prompt)
            for i in range(member, len(drafts), members):
                if part and size + len(drafts[i]) - 1 > tokens_per_batch:
                    parts.append((prompt, part, size, member))
                    part, size = [], len(prompt)
                part.append((first + i, drafts[i]))
                size += len(drafts[i]) - 1
            parts.append((prompt, part, size, member))
        first += len(drafts)
    parts.sort(key=lambda p: -p[2])
    batches, start = [], 0
    while start < len(parts):
        count = max(1, tokens_per_batch // parts[start][2])
        batches.append(_rows(parts[start:start + count], device, members))
        start += count
    return batches


def _rows(parts, device, members):
    width = parts[0][2]  # the longest comes first
    tokens, positions = np.zeros((2, len(parts), width), dtype=np.int64)
    owner = np.full((len(parts), width), -2)
    predict, target = [], []
    which = []
    for b, (prompt, drafts, *_) in enumerate(parts):
        p = at = len(prompt)
        tokens[b, :p], positions[b, :p] = prompt, np.arange(p)
        owner[b, :p] = -1
        for j, (index, draft) in enumerate(drafts):
            n = len(draft) - 1
            tokens[b, at:at + n] = draft[:-1]
            positions[b, at:at + n] = np.arange(p, p + n)
            owner[b, at:at + n] = j
            predict += [b * width + p - 1, *range(b * width + at, b * width + at + n)]
            target += draft
            which += [index] * len(draft)
            at += n
    put = lambda x: torch.as_tensor(x, dtype=torch.long).to(device, non_blocking=True)
    return Rows(put(tokens), put(positions), put(owner), put(predict), put(target), put(which),
                shared=any(len(drafts) > 1 for _, drafts, *_ in parts),
                member=put([p[3] for p in parts]) if members > 1 else None)


# ---- Scoring: log-probabilities of given tokens --------------------------------------------------

def chunk_size(vocab, device):
    """Tokens whose fp32 logits fill 64 MiB (CPU) or 256 MiB (GPU): enough to keep a
    product busy."""
    return max(16, (2 ** 26 if device.type == "cuda" else 2 ** 24) // vocab)


def chunks(count, vocab, device, draft=None):
    """Slices of N tokens; with draft (N,), the draft of each in order, none is cut through."""
    size = chunk_size(vocab, device)
    if draft is None:
        return [slice(start, start + size) for start in range(0, count, size)]
    out, start = [], 0
    ends = [*(draft.diff().nonzero().flatten() + 1).tolist(), count]
    for end, following in zip(ends, [*ends[1:], math.inf]):
        if following - start > size:
            out.append(slice(start, end))
            start = end
    return out


class SelectedLogprobs(torch.autograd.Function):
    """log softmax(h W^T / T)[target] and the entropy of that softmax, for a frozen W, in chunks of
    tokens. A token's log-probability depends on its own hidden state alone: its gradient is one
    vector, (onehot(target) - softmax) W / T, made while the chunk's softmax is at hand and scaled
    by backward. Exact for every loss of log-probabilities; (N, hidden) is kept, not (N, vocab)."""

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature):
        logprob, entropy = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        slope = torch.empty_like(hidden) if hidden.requires_grad else None
        for some in chunks(len(hidden), len(weight), hidden.device):
            logits = F.linear(hidden[some], weight).float().div_(temperature)  # (chunk, V)
            total = logits.logsumexp(-1, keepdim=True)
            chosen = target[some, None]
            logprob[some] = logits.gather(-1, chosen).sub_(total).squeeze(-1)
            p = (logits - total).exp_()
            entropy[some] = total.squeeze(-1) - torch.linalg.vecdot(p, logits)
            if slope is not None:
                # In fp32 and in one product: W[target] - p W, each rounded to bf16, cancels where
                # the model is confident, and leaves nothing but rounding.
                error = p.neg_().scatter_add_(1, chosen, torch.ones_like(p[:, :1]))
                slope[some] = (error.div_(temperature).to(weight.dtype) @ weight)
        ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(slope)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        slope, = ctx.saved_tensors
        return (slope * grad[:, None]).to(slope.dtype), None, None, None


def selected_logprobs(hidden, weight, target, temperature=1.0):
    """The same by plain autograd, with a full (N, V) tensor: the reference."""
    return logprob_and_entropy(F.linear(hidden, weight).float() / temperature, target)


class TokenLosses(torch.autograd.Function):
    """fn's losses (N,) of tokens under a frozen W, in chunks. A token's loss depends on the hidden
    states of its chunk alone, mostly on its own, so the gradient of their sum is a vector a token,
    taken by autograd while the chunk's logits are at hand: (N, hidden) is kept, not (N, vocab)."""

    @staticmethod
    def forward(ctx, fn, hidden, weight, target, temperature, cuts, *extra):
        losses, slope = hidden.new_empty(len(hidden), dtype=torch.float32), torch.empty_like(hidden)
        for some in cuts:
            with torch.enable_grad():
                states = hidden[some].detach().requires_grad_()
                logits = F.linear(states, weight).float() / temperature        # (chunk, V)
                loss = fn(logits, target[some], *(x[some] for x in extra))
                slope[some], = torch.autograd.grad(loss.sum(), states)
            losses[some] = loss.detach()
        ctx.save_for_backward(slope)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        slope, = ctx.saved_tensors
        return None, (slope * grad[:, None]).to(slope.dtype), *[None] * 8


def in_chunks(fn, hidden, weight, target, temperature, cuts, *extra):
    """fn(logits (n, V) fp32, target (n,), *extra) -> (n,) or a tuple of such, over all N tokens,
    chunk by chunk; logits are made again in the backward pass. The way when W itself trains."""
    def of(states, weight, target, *extra):
        return fn(F.linear(states, weight).float() / temperature, target, *extra)
    parts = []
    for some in cuts:
        cut = (x[some] for x in extra)
        parts.append(checkpoint(of, hidden[some], weight, target[some], *cut, use_reentrant=False))
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(column) for column in zip(*parts))
    return torch.cat(parts)


def logprob_and_entropy(logits, target):
    """log softmax(logits)[target] (n,), and the softmax's entropy (n,) without gradient."""
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, target[:, None]).squeeze(-1)
    return chosen, -(logp.exp() * logp).sum(-1).detach()


def predicting_states(model, rows):
    """Final hidden states (N, hidden) from which the N reply tokens of `rows` are predicted."""
    if model.deal is not None:
        model.deal.of = 0 if rows.member is None else rows.member
    hidden = model.hidden(rows.tokens, rows.positions, full_attention(rows.mask()))
    return hidden.flatten(0, 1)[rows.predict]


def token_losses(model, rows, fn, temperature=1.0, extra=(), whole=False, hidden=None):
    """Losses (N,) fp32, with gradient, of the N reply tokens in `rows`, by any function of a
    token's logits: fn(logits (n, V) fp32, target (n,), *extra) -> (n,), called chunk by chunk.
    `extra`: tensors with N rows that are cut along, such as the base model's states. `whole`: fn
    looks at a draft's tokens together, which then lie in one chunk and weigh alike. `hidden`:
    predicting_states, where they are at hand."""
    hidden = predicting_states(model, rows) if hidden is None else hidden
    weight = model.head_weight()
    cuts = chunks(len(hidden), len(weight), hidden.device, rows.draft if whole else None)
    if weight.requires_grad or not hidden.requires_grad:
        return in_chunks(fn, hidden, weight, rows.target, temperature, cuts, *extra)
    return TokenLosses.apply(fn, hidden, weight, rows.target, temperature, cuts, *extra)


def token_logprobs(model, rows, temperature=1.0):
    """Log-probabilities, with gradient, and entropies, two fp32 (N,), of the N reply tokens in
    `rows` (pack) under the softmax at `temperature`: the distribution that generate samples from
    without truncation."""
    hidden, weight = predicting_states(model, rows), model.head_weight()
    if weight.requires_grad:
        cuts = chunks(len(hidden), len(weight), hidden.device)
        return in_chunks(logprob_and_entropy, hidden, weight, rows.target, temperature, cuts)
    return SelectedLogprobs.apply(hidden, weight, rows.target, temperature)


def add_mismatch(tally, scored, sampled):
    """Adds how far training's log-probabilities are from sampling's: mean, and share beyond .1."""
    off = (scored - sampled).abs()
    tally.add("mismatch", off.sum(), len(off))
    tally.add("far_off", (off > 0.1).sum(), len(off))
