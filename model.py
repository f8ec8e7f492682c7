"""Qwen3, written out: config, layers, three heads, loading and saving, scoring, and k-draft generation.

Read it in this order: Config -> RMSNorm, rotary -> Attention, MLP, Block -> Qwen3 -> token_logprobs -> generate.
Parameter names are Hugging Face's, so a downloaded checkpoint loads strictly and a saved one loads elsewhere.
A block does not know whether it trains, reads a prompt or writes the next token: it hands q, k, v to
`attend`. Four things differ from a textbook transformer, all of them for speed:
  * the loss needs the vocabulary only at reply tokens, so `token_logprobs` projects those positions alone, in chunks;
  * a post is read once for its k drafts, in training (one row holds a post and its drafts, data.pack) as well as
    in generation (`Drafts` stores the post's keys and values once and k short tails);
  * drafts are written by `Fused`, the same blocks with fewer and larger products, and on a GPU by CUDA graphs;
  * each draft has its own stream of random numbers, so it does not depend on what else is in the batch.
"""

import json
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


class InputError(ValueError):
    """Wrong input from the user: one clear sentence with the place and the mend. A command's exit code 2."""


# ---- Configuration ---------------------------------------------------------------------------------------------

@dataclass
class Config:
    """The fields of a Qwen3 config.json that shape the network. head_dim is not hidden_size / heads."""
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
    dtype: str = "float32"            # of the stored weights
    extra: dict = field(default_factory=dict)         # all else in config.json, written back by save_pretrained

    @classmethod
    def from_dict(cls, d):
        """Reads config.json as the hub has it (rope_theta, torch_dtype) and as transformers 5 writes it
        (rope_parameters.rope_theta, dtype). Raises InputError for what this file does not implement."""
        rope = d.get("rope_parameters") or {}
        if d.get("model_type", "qwen3") != "qwen3":
            raise InputError(f"config.json describes a {d['model_type']!r} model: give a Qwen3 one")
        for key, fine in (("attention_bias", False), ("use_sliding_window", False), ("hidden_act", "silu"),
                          ("rope_scaling", None), ("rope_type", "default")):
            if ((rope | d).get(key) or fine) != fine:
                raise InputError(f"config.json sets {key} to {(rope | d)[key]!r}: only {fine!r} is implemented")
        # nothing that shapes the network is guessed: a wrong head_dim or rope_theta still loads, and babbles
        try:
            values = {k: d[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                        "num_attention_heads", "num_key_value_heads", "head_dim")}
            theta = d["rope_theta"] if "rope_theta" in d else rope["rope_theta"]
        except KeyError as e:
            raise InputError(f"config.json lacks {e.args[0]!r}: it is not a complete Qwen3 configuration") from None
        known = {"rope_theta", "torch_dtype", "rope_parameters", *cls.__dataclass_fields__}
        return cls(**values, rope_theta=float(theta), rms_norm_eps=d.get("rms_norm_eps", 1e-6),
                   tie_word_embeddings=d.get("tie_word_embeddings", False),
                   dtype=str(d.get("torch_dtype") or d.get("dtype") or "float32").removeprefix("torch."),
                   extra={k: v for k, v in d.items() if k not in known})

    def to_dict(self):
        """config.json in the hub's layout."""
        d = {k: getattr(self, k) for k in self.__dataclass_fields__ if k not in ("dtype", "extra")}
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
                "max_position_embeddings": 40960, "attention_bias": False} | self.extra | d | {"torch_dtype": self.dtype}


# ---- Layers ----------------------------------------------------------------------------------------------------

def rms_norm(x, weight, eps):
    """x over its root mean square along the last dimension, times weight (D,) or (heads, D)."""
    # fp32 statistics, back to the input's dtype, and only then the weight: the other order flips a quarter of
    # all bf16 outputs against the released model.
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
    """cos and sin, each positions.shape + (1, head_dim / 2): the 1 is the heads'. Made in fp32, never a buffer, which
    model.to(bfloat16) would round: an inverse frequency in bf16 is off by radians at position 4,000."""
    inverse = theta ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions.unsqueeze(-1).float() * inverse
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
        self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps), RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, rope, attend, layer):
        heads = (*x.shape[:2], -1, self.head_dim)                              # (B, T, heads, D)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), rope)              # norm per head, then rotary
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), rope)
        v = self.v_proj(x).view(heads)                                         # v is not normed
        return self.o_proj(attend(layer, q, k, v).flatten(2))


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
    """The `attend` of training and scoring. mask (B, 1, T, T) bool, True where row i may look at column j;
    None is plain causal, right for rows that are padded on the right. is_causal is only used where both
    lengths are equal: torch aligns it to the top left."""
    def attend(layer, q, k, v):  # q (B, T, H, D), k and v (B, T, KV, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if mask is not None and q.is_cuda:  # CUDA's fast kernel with a mask wants a k and v for every head
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True).transpose(1, 2)
    return attend


# ---- The model and its heads -----------------------------------------------------------------------------------

class Backbone(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Qwen3(nn.Module):
    """A dense Qwen3 with the heads its checkpoint has: token logits (lm_head, or the tied embedding), a scalar `score`
    (reward models), or none (embedders). `vocab` is the number of token ids that are real: the rows above it pad the
    matrix and are never sampled or scored (Qwen3 has 151,936 rows for 151,669 tokens)."""

    def __init__(self, config, *, lm_head=True, score_head=False):
        super().__init__()
        self.config, self.model, self.vocab = config, Backbone(config), config.vocab_size
        self.has_logits, self.has_score = lm_head or config.tie_word_embeddings, score_head
        if lm_head and not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if score_head:
            self._modules["score"] = nn.Linear(config.hidden_size, 1, bias=False)        # the name is the method's
        # Recompute blocks in the backward pass instead of keeping activations; ranks that share the weights
        # (polylora.Lockstep); decode by CUDA graphs (None: on a GPU), by torch.compile; what the next rollout reuses.
        self.checkpointing, self.lockstep, self.graphs, self.compiled, self.drafts = False, None, None, False, None

    device = property(lambda self: self.model.embed_tokens.weight.device)
    dtype = property(lambda self: self.model.norm.weight.dtype)

    def head_weight(self, rows=None):
        """(vocab, hidden): the rows of the output matrix that stand for real tokens, or its first `rows`."""
        if not self.has_logits:
            raise InputError("this checkpoint has no token head (an embedder or a reward model): it cannot write text")
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return weight[:rows or self.vocab]

    def hidden(self, tokens, positions=None, attend=None):
        """Final normed hidden states (B, T, hidden) of tokens (B, T); positions (B, T), by default 0..T-1."""
        self.lockstep and self.lockstep()
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        attend, x = attend or full_attention(), self.model.embed_tokens(tokens)
        rope = rotary(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for i, block in enumerate(self.model.layers):
            save = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, rope, attend, i, use_reentrant=False) if save else block(x, rope, attend, i)
        return self.model.norm(x)

    def forward(self, tokens):
        """Logits (B, T, V), padding rows included. For study and tests: training never holds this tensor."""
        return F.linear(self.hidden(tokens), self.head_weight(self.config.vocab_size))

    def last_hidden(self, tokens, lengths):
        hidden = self.hidden(tokens)  # padded on the right: causal is enough
        return hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1]

    def embed(self, tokens, lengths):
        """Unit-length fp32 embeddings (B, hidden): the last attended token, as Qwen3-Embedding is read.
        tokens (B, T) padded on the right, lengths (B,)."""
        return F.normalize(self.last_hidden(tokens, lengths).float(), dim=-1)

    def score(self, tokens, lengths):
        """A reward model's scalar (B,) in fp32 at the last attended token, as Qwen3ForSequenceClassification's."""
        if not self.has_score:
            raise InputError("this checkpoint has no scalar head (score.weight): give a reward model")
        return self._modules["score"](self.last_hidden(tokens, lengths)).float().squeeze(-1)

    @classmethod
    def from_pretrained(cls, path, *, revision=None, device=None, dtype=None, nf4=False):
        """A model from a folder or a hub name, in `dtype` or as stored. nf4: the blocks' linear layers in 4 bits, made on
        the device one by one: it holds no two in full. Built on meta and loaded strictly: a missing, unknown or wrong-
        shaped tensor raises InputError with its name. Names without `model.`, as Qwen3-Embedding's, are read too."""
        model = load_checkpoint(cls, fetch(path, revision), "cpu" if nf4 else device, dtype)
        return quantise(model, device) if nf4 else model

    def save_pretrained(self, folder, *, shard_bytes=5_000_000_000):
        """config.json and model.safetensors, or numbered shards and their index, in Hugging Face's layout."""
        folder = Path(folder)
        if any(isinstance(m, NF4) for m in self.modules()):
            raise InputError("a model in NF4 cannot be saved: save its adapter, and load the checkpoint in full to merge")
        folder.mkdir(parents=True, exist_ok=True)
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        bare = not self.has_logits and not self.has_score  # an embedder: its names lack `model.`
        tensors = {n.removeprefix("model.") if bare else n: t for n, t in self.state_dict().items()}
        plan = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)     # keeps joined layers together
        for file, names in plan.filename_to_tensors.items():
            save_file({n: tensors[n].contiguous() for n in names}, folder / file, metadata={"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")


# ---- Loading ---------------------------------------------------------------------------------------------------

def fetch(path, revision=None):
    """The local folder of a checkpoint: `path` itself, or a snapshot of that name on the Hugging Face hub."""
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path) or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        raise InputError(f"no model folder at {str(path)!r}: give a folder with config.json, or a hub name (owner/name)")
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as e:  # the hub client's errors are many: offline, no such repository, no such revision, no access
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"model {str(path)!r} is no local folder and could not be fetched from the hub ({reason}): "
                         "check the name, the revision and the connection") from None


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except ValueError as e:
        raise InputError(f"{path} is not valid JSON ({e})") from None


def read_tensors(folder, device="cpu", dtype=None, file="model.safetensors"):
    """name -> tensor from `file`, or from every shard its index names."""
    index = folder / f"{file}.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else [file]
    tensors = {}
    for file in files:
        if not (folder / file).exists():
            raise InputError(f"{folder / file} is missing: the checkpoint is incomplete")
        try:
            with safe_open(folder / file, "pt", device=str(device)) as f:
                for name in f.keys():
                    tensors[name] = f.get_tensor(name).to(dtype)
        except (SafetensorError, OSError) as e:
            raise InputError(f"{folder / file} cannot be read as safetensors ({e}): fetch it again") from None
    return tensors


def load_checkpoint(cls, folder, device=None, dtype=None):
    config = Config.from_dict(read_json(folder / "config.json"))
    dtype, device = dtype or getattr(torch, config.dtype), device or "cpu"
    tensors = read_tensors(folder, device, dtype)
    bare = "embed_tokens.weight" in tensors  # an embedder: no `model.`, no head
    if bare:
        tensors = {f"model.{name}": t for name, t in tensors.items()}
    score = "score.weight" in tensors
    if config.tie_word_embeddings:
        copy = tensors.pop("lm_head.weight", None)  # some writers store the tied copy too
        if copy is not None and not torch.equal(copy, tensors["model.embed_tokens.weight"]):
            raise InputError(f"the checkpoint in {folder} has an lm_head.weight of its own, and its config.json sets "
                             "tie_word_embeddings: set that to false")
    with torch.device("meta"):
        model = cls(config, lm_head=not (bare or score), score_head=score)
    wanted = {name: p.shape for name, p in model.state_dict().items()}
    for problem, names in (("lacks", wanted.keys() - tensors.keys()), ("has an unknown", tensors.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"the checkpoint in {folder} {problem} tensor {min(names)!r}{more}: its config.json "
                             "describes another network")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise InputError(f"tensor {name!r} in {folder} has shape {tuple(tensors[name].shape)}, config.json asks for {tuple(shape)}")
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()  # frozen: a phase says what it trains


# ---- Four-bit weights ------------------------------------------------------------------------------------------

# Quantiles of a normal distribution scaled to [-1, 1], with an exact zero (QLoRA, arXiv 2305.14314, appendix E).
NF4_VALUES = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
              0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def nf4_tables():
    """(256, 2), the two values that each byte stands for; and the 256 values that code scales (dynamic data type, arXiv
    1511.04561, as bitsandbytes has it): 0, 1 and +-10^-i times the middles of 2^(6-i) equal parts of [0.1, 1]."""
    values, edges = torch.tensor(NF4_VALUES), [torch.linspace(0.1, 1, 2 ** i + 1) for i in range(7)]
    positive = torch.cat([(e[:-1] + e[1:]) / 2 * 10.0 ** (i - 6) for i, e in enumerate(edges)])
    return torch.cartesian_prod(values, values), torch.cat((-positive, positive, torch.tensor([0.0, 1.0]))).sort().values


def nearest(x, values):
    """Index of the nearest of the sorted `values`; the lower one of two that are equally near."""
    return torch.bucketize(x, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8)


class NF4(nn.Module):
    """A frozen linear layer with 4.127 bits a weight: NF4 with double quantisation (QLoRA), equal to bitsandbytes'.
    Each 64 values in a row share a scale, their largest magnitude; the scales less their mean are coded in 8 bits
    that share a scale in their turn for each 256."""

    def __init__(self, weight):
        super().__init__()
        self.shape, (self.out_features, self.in_features) = weight.shape, weight.shape
        blocks = F.pad(weight.detach().float().flatten(), (0, -weight.numel() % 64)).view(-1, 64)
        largest = blocks.abs().amax(1)
        codes = nearest(blocks * (1 / largest.clamp_min(1e-30))[:, None], blocks.new_tensor(NF4_VALUES))
        mean = largest.mean()
        scales = F.pad(largest - mean, (0, -len(largest) % 256)).view(-1, 256)
        outer = scales.abs().amax(1).clamp_min(1e-30)
        # The first of two values lies in the upper half of a byte. fp32 is kept as its bits: model.to(bfloat16) would round it.
        self.register_buffer("codes", codes[:, ::2] << 4 | codes[:, 1::2])                # (blocks, 32)
        pairs, dynamic = (t.to(weight.device) for t in nf4_tables())
        self.register_buffer("scales", nearest(scales / outer[:, None], dynamic).flatten()[:len(largest)])
        self.register_buffer("outer", torch.cat((outer, mean[None])).view(torch.int32))
        self.register_buffer("tables", torch.cat((pairs.flatten(), dynamic)).view(torch.int32), persistent=False)

    device = property(lambda self: self.codes.device)
    weight = property(lambda self: self)  # what LoRA takes over from a linear layer

    def dense(self, dtype=torch.float32):
        """The weight (out, in), computed in fp32 and rounded to `dtype`."""
        outer, tables = self.outer.view(torch.float32), self.tables.view(torch.float32)
        scales = tables[512:][self.scales.int()] * outer[:-1].repeat_interleave(256)[:len(self.scales)] + outer[-1]
        weight = (F.embedding(self.codes.int(), tables[:512].view(256, 2)).flatten(1) * scales[:, None]).to(dtype)
        return weight.flatten()[:math.prod(self.shape)].view(self.shape)

    def forward(self, x):
        """x W^T, W made dense again in the backward pass: kept, it would undo what NF4 saves."""
        product = lambda x: F.linear(x, self.dense(x.dtype))
        again = torch.is_grad_enabled()
        return checkpoint(product, x, use_reentrant=False, preserve_rng_state=False) if again else product(x)


def quantise(model, device=None):
    """The blocks' linear layers as NF4, in place, one by one on `device`; all else keeps its dtype. The model, on `device`."""
    for part in (part for block in model.model.layers for part in (block.self_attn, block.mlp)):
        for name, linear in [(n, m) for n, m in part.named_children() if isinstance(m, nn.Linear)]:
            setattr(part, name, NF4(linear.weight.to(device)))
    return model.to(device)


# ---- Scoring: log-probabilities of given tokens ----------------------------------------------------------------

def chunk_size(vocab, device):
    """Tokens whose fp32 logits fill 64 MiB (CPU) or 256 MiB (GPU): enough to keep a matrix product busy."""
    return max(16, (2 ** 26 if device.type == "cuda" else 2 ** 24) // vocab)


class SelectedLogprobs(torch.autograd.Function):
    """log softmax(h W^T / T)[target] and the entropy of that softmax, for a frozen W, in chunks of tokens.
    A token's log-probability depends on its own hidden state alone, so its gradient is one vector, (W[target]
    - softmax . W) / T. Forward computes it while the chunk's softmax is at hand; backward only scales it: exact
    for every loss of log-probabilities, without a second projection, and (N, hidden) is kept, not (N, vocab)."""

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature):
        logprob, entropy = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        slope = torch.empty_like(hidden) if hidden.requires_grad else None
        size = chunk_size(len(weight), hidden.device)
        for s in (slice(i, i + size) for i in range(0, len(hidden), size)):
            logits = F.linear(hidden[s], weight).float().div_(temperature)     # (chunk, V)
            total = logits.logsumexp(-1, keepdim=True)
            logprob[s] = logits.gather(-1, target[s, None]).sub_(total).squeeze(-1)
            p = (logits - total).exp_()
            entropy[s] = total.squeeze(-1) - torch.linalg.vecdot(p, logits)
            if slope is not None:
                slope[s] = (weight[target[s]] - p.to(weight.dtype) @ weight).div_(temperature)
        ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(slope)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad, _):
        slope, = ctx.saved_tensors
        return (slope * grad[:, None]).to(slope.dtype), None, None, None


def selected_logprobs(hidden, weight, target, temperature=1.0):
    """The same by plain autograd, with a full (N, V) tensor: the reference, and the way when W itself trains."""
    logp = (F.linear(hidden, weight).float() / temperature).log_softmax(-1)
    return logp.gather(-1, target[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1).detach()


def token_logprobs(model, rows, temperature=1.0):
    """Log-probabilities, with gradient, and entropies, two fp32 (N,), of the N reply tokens in `rows` (data.pack)
    under the softmax at `temperature`: the distribution that generate samples from without truncation."""
    hidden = model.hidden(rows.tokens, rows.positions, full_attention(rows.mask()))
    hidden, weight = hidden.flatten(0, 1)[rows.predict], model.head_weight()
    score = selected_logprobs if weight.requires_grad else SelectedLogprobs.apply
    return score(hidden, weight, rows.target, temperature)


# ---- Generation ------------------------------------------------------------------------------------------------

@dataclass
class Samples:
    """tokens[prompt][draft] is a list of ids with the stop id kept; logprobs has the same shape, under the
    distribution sampled from; finished[prompt][draft] is False when max_new_tokens cut it off."""
    tokens: list
    logprobs: list
    finished: list


def inverse(mass, target):
    """The first index (R, 1) whose cumulative weight in mass (R, N) is above target (R, 1), whatever rounding did to
    that: never one of weight zero, which low-precision multinomials have hit."""
    target = target.clamp(min=0).minimum(mass[:, -1:] * (1 - 2 ** -50))
    return torch.searchsorted(mass, target, right=True).clamp_(max=mass.shape[-1] - 1)     # of nan: the last


def draw(p, uniform, size=128):
    """Ids (R, 1) of weights p (R, V) and the weights' sums (R, 1): the inverse of the cumulative distribution, in
    float64, at uniform (R,) in [0, 1). Of a large vocabulary first the block of `size` ids is drawn and then the id in
    it: on a CPU 30 times faster than a cumulative sum of all."""
    sums = p
    if p.numel() > 2 ** 16 and p.shape[-1] >= size:
        whole = p.shape[-1] // size * size
        sums = torch.cat((p[:, :whole].unflatten(-1, (-1, size)).sum(-1), p[:, whole:].sum(-1, keepdim=True)), -1)
    mass = sums.double().cumsum(-1)
    target = uniform[:, None] * mass[:, -1:]
    index = inverse(mass, target)
    if sums is not p:
        ids = (index * size + torch.arange(size, device=p.device)).clamp_(max=p.shape[-1] - 1)
        inside = p.gather(1, ids).double().cumsum(-1)
        index = ids.gather(1, inverse(inside, target - (mass - sums).gather(1, index)))
    return index, mass[:, -1:]


def sample(logits, uniform, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """One token per row: ids and log-probs (R,), from fp32 logits (R, V) and uniform numbers (R,) in [0, 1).
    Temperature first, then top-k, top-p, min-p, each on what the former kept (Hugging Face's order); the log-prob
    is of the renormalised rest. Temperature 0 takes the largest logit; its log-prob is the model's own, at T = 1."""
    if temperature == 0:
        logp, token = logits.log_softmax(-1).max(-1)
        return token, logp
    p = (logits if temperature == 1 else logits / temperature).softmax(-1)
    if top_k:
        p = p.masked_fill(p < p.topk(min(top_k, p.shape[-1])).values[:, -1:], 0)
    if top_p < 1:
        ordered, index = (p / p.sum(-1, keepdim=True)).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered                                  # mass above this token; the first has 0
        p = torch.empty_like(p).scatter_(-1, index, ordered.masked_fill(before >= top_p, 0))
    if min_p:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    token, total = draw(p, uniform)
    return token.squeeze(-1), (p.gather(-1, token) / total).log().float().squeeze(-1)


def uniforms(seeds, k, length):
    """(prompts, k, length) float64 numbers in [0, 1): draft d of a prompt with seed s reads the stream of (s, d), whatever
    rank or batch it is in. SplitMix64 (Steele, Lea and Flood 2014): number t of a stream is a hash of its start + t
    times the golden ratio's bits, so that all are made at once."""
    def mix(z):
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return z ^ z >> np.uint64(31)

    golden, start = np.uint64(0x9E3779B97F4A7C15), np.zeros(len(seeds), np.uint64)
    parts = [s if isinstance(s, (tuple, list)) else (s,) for s in seeds]
    for column in zip(*parts, strict=True):                                    # every seed has as many parts
        start = mix(start + golden ^ np.array([int(x) % 2 ** 64 for x in column], np.uint64))
    start = mix(start[:, None] + golden ^ np.arange(k, dtype=np.uint64))
    bits = mix(start[..., None] + golden * np.arange(1, length + 1, dtype=np.uint64))
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0 ** -53)


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


compiled_onednn = torch.library.custom_op("polylora::onednn", onednn, mutates_args=())    # else it would want a packed copy
compiled_onednn.register_fake(lambda x, weight: x.new_empty(*x.shape[:-1], len(weight)))


def linear(x, weight):
    """x W^T without gradient. On a CPU large fp32 products go to oneDNN, 1.4 to 2.9 times faster than the BLAS behind
    F.linear (AMD EPYC, 2 threads, 1 to 256 rows), and compiled small ones to it as four: a fifth off a step of 8 rows."""
    compiling, outs = torch.compiler.is_compiling(), len(weight)
    onednn_has_it = x.dtype == torch.float32 and x.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if onednn_has_it and x.numel() * outs >= 2 ** (23 if compiling else 21):     # a custom operator costs 20 us
        return (compiled_onednn if compiling else onednn)(x, weight)
    if onednn_has_it and compiling and outs % 64 == 0:
        parts = torch.bmm(x.flatten(0, -2).expand(4, -1, -1), weight.view(4, -1, weight.shape[1]).transpose(1, 2))
        return parts.transpose(0, 1).reshape(*x.shape[:-1], outs)
    return F.linear(x, weight)


def joined(weights):
    """Weights (out_i, in) as one (sum of out_i, in) tensor; they become its views: nothing is stored twice."""
    starts, ends = [w.data_ptr() for w in weights], [w.data_ptr() + w.nbytes for w in weights]
    if starts[1:] != ends[:-1] or len({w.untyped_storage().data_ptr() for w in weights}) > 1:
        whole = torch.cat([w.data for w in weights])
        for weight, part in zip(weights, whole.split([len(w) for w in weights])):
            weight.data = part
    return weights[0].data.as_strided((sum(map(len, weights)), weights[0].shape[1]), (weights[0].shape[1], 1))


class Product:
    """Linear layers that read the same input, as one matrix product: (.., in) -> (.., sum of outs). LoRA stays
    beside it, all A as one product and all B as one block-diagonal: added to W it would be rounded in bf16."""

    def __init__(self, layers, dtype):
        on = [getattr(layer, "enabled", False) for layer in layers]            # polylora.LoRALinear
        self.nf4, self.tensors, self.scale = [x.weight for x in layers if isinstance(x.weight, NF4)], [], None
        self.weight = None if self.nf4 else joined([x.weight for x in layers])
        if any(on):
            self.scale = next(x.scale for x, lora in zip(layers, on) if lora)
            A = torch.cat([x.lora_A.weight for x, lora in zip(layers, on) if lora])
            B = torch.block_diag(*[x.lora_B.weight if lora else A.new_empty(x.weight.shape[0], 0) for x, lora in zip(layers, on)])
            self.tensors = [A.to(dtype), B.to(dtype).t()]

    def __call__(self, x):
        y = torch.cat([w(x) for w in self.nf4], -1) if self.nf4 else linear(x, self.weight)
        if self.tensors:
            A, B = self.tensors
            y.flatten(0, -2).addmm_(linear(x, A).flatten(0, -2), B, alpha=self.scale)
        return y


class Fused:
    """The blocks for decoding, without gradient: one product for q, k and v, one for gate and up; q and k normed and
    rotated together. A step has few rows, so the number of operations decides its time."""

    def __init__(self, model, length):
        c = model.config
        cos, sin = rotary(torch.arange(length, device=model.device), c.head_dim, c.rope_theta, model.dtype)
        self.rope = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)      # (length, 1, D) each
        self.config, self.blocks = c, []
        for a, m, block in ((b.self_attn, b.mlp, b) for b in model.model.layers):
            products = [Product(layers, model.dtype) for layers in (
                (a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (m.gate_proj, m.up_proj), (m.down_proj,))]
            self.blocks.append((block.input_layernorm, a.q_norm, a.k_norm, block.post_attention_layernorm, *products))

    def tensors(self):
        """What was computed from the adapter: to be refreshed before each rollout."""
        return [t for block in self.blocks for p in block[4:] for t in p.tensors]

    def __call__(self, x, positions, attend):
        """x (B, T, hidden) after the last block, before the final norm."""
        c = self.config
        heads, kv = c.num_attention_heads, c.num_key_value_heads
        cos, sin = (table[positions.clamp(max=len(table) - 1)] for table in self.rope)        # idle drafts age on
        for i, (norm, q_norm, k_norm, mlp_norm, qkv, out, gate_up, down) in enumerate(self.blocks):
            qkv = qkv(norm(x)).unflatten(-1, (-1, c.head_dim))                 # (B, T, H + 2 KV, D)
            weight = torch.cat((q_norm.weight.expand(heads, -1), k_norm.weight.expand(kv, -1)))
            qk = rms_norm(qkv[..., :heads + kv, :], weight, c.rms_norm_eps)
            qk = qk * cos + qk.roll(c.head_dim // 2, -1) * sin                 # rotate(), on both halves at once
            x = x + out(attend(i, qk[..., :heads, :], qk[..., heads:, :], qkv[..., heads + kv:, :]).flatten(2))
            gate, up = gate_up(mlp_norm(x)).chunk(2, -1)
            x = x + down(F.silu(gate) * up)
        return x


def recording(graph, inputs):
    """A backend of torch.compile for what is always called on the same tensors: its last call is in `recording.last`, to
    be made again without the checks of torch.compile, a fifth of a small model's time."""
    cpu = all(x.device.type == "cpu" for x in inputs if isinstance(x, torch.Tensor))
    run = torch._dynamo.lookup_backend("inductor")(graph, inputs, config_patches={"cpp_wrapper": cpu, "size_asserts": False})
    def call(*args):
        recording.last = partial(run, *args)
        return recording.last()
    return call


def matmul(a, b):
    """a @ b. On a CPU torch.compile fuses small or thin ones, as sums of products, with what is around them."""
    fused = torch.compiler.is_compiling() and not a.is_cuda and (a.shape[-2] < 8 or a.numel() * b.shape[-1] < 2 ** 18)
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2) if fused else a @ b


class Drafts:
    """A batch of drafts on the device: P places for posts, k drafts each; as `attend` it is the KV cache.

    A post's keys and values are stored once, (P, KV, L, D), and shared by its k drafts; the drafts' own are a ring (P, KV,
    k, M, D) in which step s of the whole batch writes column s mod M for every row. A post that entered `age` steps ago
    sees the last `age` columns, so a newcomer takes a finished post's place without moving anything: softmax does not
    mind the order of columns, rotary positions are in k already.

    What was written lies in tables with a line for each draft that the batch began with, whose last column is a waste bin
    for idle places; `slot` says which line a row writes. All state is tensors that stay where they are, a smaller batch a
    prefix of the same memory; `step` reads nothing of the host: one CUDA graph serves for `window` columns of the ring."""

    def __init__(self, model, places, k, prompt_length, length, sampling, stop_ids, window=1, graphs=False):
        c = model.config
        if model.compiled and not model.lockstep:
            self.step, self.prefill = (torch.compile(f, backend=recording, fullgraph=True) for f in (self.step, self.prefill))
        self.model, self.ring, self.sampling, self.window, self.slot = model, length, sampling, window, None
        self.graphs, self.pool, self.again, self.fused = graphs, None, {}, None if model.lockstep else Fused(model, prompt_length + length)
        new, layers, kv = dict(device=model.device), c.num_hidden_layers, c.num_key_value_heads
        self.prompt_cache = torch.zeros(layers, 2, places, kv, prompt_length, c.head_dim, **new, dtype=model.dtype)
        self.own_cache = torch.zeros(layers, 2, places * kv * k * length * c.head_dim, **new, dtype=model.dtype)
        self.columns, self.clock = torch.arange(max(prompt_length, length), **new), torch.zeros(1, dtype=torch.long, **new)
        self.stops = torch.tensor(sorted(stop_ids), dtype=torch.long, **new)
        self.tokens, self.noise = (torch.zeros(places * k, length + 1, dtype=t, **new) for t in (torch.long, torch.float64))
        self.logprobs, self.stopped = torch.zeros(places * k, length + 1, **new), torch.zeros(places * k, dtype=torch.bool, **new)
        self.all_places, self.all_rows = (torch.zeros(2, n, dtype=torch.long, **new) for n in (places, places * k))
        self.restart(places, k)

    def restart(self, places, k):
        """An empty batch of the full size."""
        self.steps = 0
        self.clock.zero_()
        if self.slot is None or self.slot.shape != (places, k):                # new, or the last rollout shrank it
            self.resize(places, k)
            torch.arange(places * k, out=self.slot.view(-1))

    def resize(self, places, k):
        """Take the first of the memory for `places` posts of k drafts."""
        self.lengths, self.age = self.all_places[:, :places]                   # of the post; steps since it entered
        self.slot, self.newest = self.all_rows[:, :places * k].view(2, places, k)
        _, _, _, kv, _, dim = self.prompt_cache.shape
        own = self.own_cache[..., :places * kv * k * self.ring * dim].view(-1, 2, places, kv, k, self.ring, dim)
        self.caches = [(*p[:, :places], *o) for p, o in zip(self.prompt_cache, own)]

    def hidden(self, tokens, positions, attend):
        if self.fused is None:                                                 # the weights are spread over ranks
            return self.model.hidden(tokens, positions, attend)
        return self.model.model.norm(self.fused(self.model.model.embed_tokens(tokens), positions, attend))

    def enter(self, places, prompts, noise):
        """Posts `prompts` (id lists) take the places `places` (a list): one prefill for the k drafts of each, whose
        first tokens come from its last logits. noise (posts, k, length) from `uniforms`."""
        device, longest = self.clock.device, max(map(len, prompts))
        rows = [[*p, *[0] * (longest - len(p))] for p in prompts]
        tokens, lengths, places = (torch.tensor(x, device=device) for x in (rows, [len(p) for p in prompts], places))
        slots, size = self.slot[places].flatten(), max(1, 2 ** 14 // longest)  # prefills batch well, to a limit
        self.noise[slots, :-1], self.stopped[slots] = noise.flatten(0, 1).to(device), False
        self.lengths[places], self.age[places] = lengths, 0
        for some in (slice(i, i + size) for i in range(0, len(prompts), size)):
            self.run((*self.slot.shape, tokens[some].shape), self.prefill, tokens[some], lengths[some], places[some])

    def prefill(self, tokens, lengths, places):
        """Read posts (n, T) of the given lengths (n,) into the places (n,); sample the first token of each draft."""
        def attend(layer, q, k, v, causal=full_attention()):
            for cache, new in zip(self.caches[layer], (k, v)):
                cache[places, :, :tokens.shape[1]] = new.transpose(1, 2)
            return causal(layer, q, k, v)
        hidden = self.hidden(tokens, self.columns[None, :tokens.shape[1]], attend)
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        logits = linear(last, self.model.head_weight()).float()
        self.record(logits[:, None].expand(-1, self.slot.shape[1], -1), places)

    def record(self, logits, rows):
        """Sample one token for each draft of the places `rows` from logits (rows, k, V) and note it."""
        slot, age = self.slot[rows], self.age[rows, None]
        line = (slot, age.clamp(max=self.ring).expand_as(slot))
        token, logprob = sample(logits.flatten(0, 1), self.noise[line].flatten(), **self.sampling)
        token = token.view_as(slot)
        self.tokens[line], self.logprobs[line], self.newest[rows] = token, logprob.view_as(slot), token
        self.stopped[slot] |= (token[..., None] == self.stops).any(-1) & (age < self.ring)

    def step(self):
        """Write one more token of every draft."""
        prompt = self.columns[:self.prompt_cache.shape[-2]] < self.lengths[:, None]
        own = (self.clock - self.columns[:self.used]) % self.ring <= self.age[:, None]
        unseen = ~torch.cat((prompt, own), 1)                                  # (P, L + used)
        bias = torch.zeros(unseen.shape, device=unseen.device).masked_fill_(unseen, -math.inf)[:, None, None, None]
        positions = (self.lengths + self.age)[:, None].expand_as(self.newest).reshape(-1, 1)
        hidden = self.hidden(self.newest.reshape(-1, 1), positions, partial(self, bias, self.clock % self.ring))[:, 0]
        self.clock.add_(1)                                                     # not +=: a compiled step pays for each attribute set
        self.age.add_(1)
        self.record(linear(hidden, self.model.head_weight()).float().view(*self.slot.shape, -1), slice(None))

    def __call__(self, bias, column, layer, q, k, v):
        """Attention of one new token per draft over [the post's cache, the draft's own], to which bias (P, 1, 1, 1, L +
        used) says who sees what and column (1,) where the new k and v go. q (P k, 1, H, D)."""
        prompt_k, prompt_v, own_k, own_v = self.caches[layer]
        places, kv, drafts, _, dim = own_k.shape
        for cache, new in ((own_k, k), (own_v, v)):
            cache.index_copy_(3, column, new.view(places, drafts, kv, 1, dim).transpose(1, 2))
        own_k, own_v = own_k[..., :self.used, :], own_v[..., :self.used, :]
        q = q.view(places, drafts, kv, -1, dim).transpose(1, 2).contiguous()   # (P, KV, k, G, D)
        shared = matmul(q.flatten(2, 3), prompt_k.transpose(-1, -2))           # all drafts against the one copy
        scores = torch.cat((shared.unflatten(2, q.shape[2:4]), matmul(q, own_k.transpose(-1, -2))), -1)
        p = torch.add(bias, scores, alpha=dim ** -0.5).softmax(-1).to(q.dtype)
        shared, own = p.split((prompt_k.shape[2], self.used), -1)
        out = matmul(shared.flatten(2, 3), prompt_v).unflatten(2, q.shape[2:4]) + matmul(own, own_v)
        return out.transpose(1, 2).reshape(places * drafts, 1, -1, dim)

    def advance(self):
        self.steps += 1
        self.used = min(self.ring, math.ceil(self.steps / self.window) * self.window)
        self.run((*self.slot.shape, self.used), self.step)

    def run(self, shape, work, *inputs):
        """work(*inputs). From the second time in this shape on what was recorded is repeated, with the new inputs in the
        place of the old: what torch.compile made, or a CUDA graph of `step`, which has no inputs (no launch costs)."""
        if shape in self.again:
            again, held = self.again[shape]
            for old, new in zip(held, inputs):
                old.copy_(new)
            return again()
        recording.last = None
        with torch._dynamo.config.patch(recompile_limit=1000) if self.model.compiled else nullcontext():
            work(*inputs)                                                      # the first time kernels are loaded, code is made
        again, recording.last = recording.last, None
        if self.graphs and not inputs:
            graph = torch.cuda.CUDAGraph()                                     # notes the kernels, runs none
            try:                                                               # other threads (NCCL's) may go on meanwhile
                with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                    work()
            except RuntimeError as e:
                raise InputError(f"the decoding step could not be made a CUDA graph ({e}): add --no-graphs") from e
            again, self.pool = graph.replay, graph.pool()                      # one memory pool for all of them
        if again:
            self.again[shape] = again, inputs

    def keep(self, places, drafts):
        """Shrink to the given places (P',) and, in each, the given drafts (P', k')."""
        old = self.caches
        now = (self.lengths[places], self.age[places], self.slot[places].gather(1, drafts), self.newest[places].gather(1, drafts))
        own = drafts[:, None, :, None, None].expand(-1, old[0][2].shape[1], -1, *old[0][2].shape[3:])
        self.resize(*drafts.shape)
        for mine, new in zip((self.lengths, self.age, self.slot, self.newest), now):
            mine.copy_(new)
        for before, after in zip(old, self.caches):
            for i, cache in enumerate(before):
                after[i].copy_(cache[places] if i < 2 else cache[places].gather(2, own))


class Decoder:
    """Who is written where: the prompts that wait, the places that are idle, and what is finished."""

    def __init__(self, drafts, prompts, k, length, seeds):
        self.drafts, self.prompts, self.k, self.length, self.seeds = drafts, prompts, k, length, seeds
        self.waiting, self.idle, places = list(range(len(prompts))), list(range(len(drafts.slot))), len(drafts.slot)
        self.post, self.block = [None] * places, list(range(places))           # the prompt of a place; its part of the tables
        self.left = [math.inf] * places      # tokens each place may still write: on the host, so nobody waits for it
        self.written = [None] * len(prompts)                                   # (tokens, logprobs), each (k, length)

    def refill(self):
        """Idle places take the next prompts; returns how many."""
        places, self.idle = self.idle[:len(self.waiting)], self.idle[len(self.waiting):]
        taken, self.waiting = self.waiting[:len(places)], self.waiting[len(places):]
        self.drafts.enter(places, [self.prompts[p] for p in taken], uniforms([self.seeds[p] for p in taken], self.k, self.length))
        for place, post in zip(places, taken):
            self.post[place], self.left[place] = post, self.length - 1
        return len(taken)

    def look(self):
        """Read the places whose drafts are all finished; with nobody waiting, drop them. -> does anybody write?"""
        d, left = self.drafts, np.array(self.left)
        writing = ~d.stopped[d.slot].cpu().numpy() & (left > 0)[:, None]       # (P, k)
        writing[self.idle] = False
        finished = [p for p in (~writing.any(1)).nonzero()[0].tolist() if left[p] < math.inf]
        self.read(finished)
        self.idle = sorted(self.idle + finished)
        self.left = [math.inf if p in self.idle else n for p, n in enumerate(self.left)]  # idle: never due for a look
        rows, widest = writing.any(1).nonzero()[0].tolist(), int(writing.sum(1).max())
        if not self.waiting and 0 < 2 * len(rows) * widest <= writing.size:
            order = np.argsort(~writing[rows], axis=1, kind="stable")[:, :widest]          # rows stay rectangular: the unfinished first
            self.left, self.post, self.block = ([x[i] for i in rows] for x in (self.left, self.post, self.block))
            self.idle = []
            d.keep(*(torch.as_tensor(x, device=d.clock.device) for x in (rows, order)))
        return bool(rows)

    def read(self, places):
        """Copy the tables' lines of finished places to the host."""
        if places:
            lines = torch.tensor([self.block[p] * self.k + i for p in places for i in range(self.k)], device=self.drafts.clock.device)
            tables = [t[lines, :-1].cpu().view(len(places), self.k, -1) for t in (self.drafts.tokens, self.drafts.logprobs)]
            for place, *both in zip(places, *tables):
                self.written[self.post[place]] = both

    def samples(self, stop_ids):
        """Cut each draft after its first stop id: a generated one, since a prompt may hold stop ids too."""
        stops, out = set(stop_ids), Samples([], [], [])
        for drafts, logprobs in ((t.tolist(), p.tolist()) for t, p in self.written):
            ends = [next((i + 1 for i, t in enumerate(d) if t in stops), self.length) for d in drafts]
            out.tokens.append([d[:e] for d, e in zip(drafts, ends)])
            out.logprobs.append([p[:e] for p, e in zip(logprobs, ends)])
            out.finished.append([d[e - 1] in stops for d, e in zip(drafts, ends)])
        return out


def drafts_for(model, places, k, prompt_length, length, sampling, stop_ids):
    """A Drafts of this size. With CUDA graphs or torch.compile the last one is kept with the model for the next."""
    graphs = model.device.type == "cuda" if model.graphs is None else model.graphs
    if model.lockstep or not (graphs or model.compiled):
        return Drafts(model, places, k, prompt_length, length, sampling, stop_ids)
    bucket = 64 if graphs else 16
    prompt_length = math.ceil(prompt_length / bucket) * bucket
    layers = [x for b in model.model.layers for part in b._modules.values() for x in (*part._modules.values(),) or (part,)]
    weights = [model.head_weight(), *(x.weight for x in (model.model.embed_tokens, model.model.norm, *layers))]
    lora = [x for x in layers if "lora_A" in x._modules]
    key = lambda: (places, k, prompt_length, length, sampling, tuple(stop_ids), model.vocab, graphs, model.compiled,
                   [(x.enabled, x.scale, x.lora_A.weight.shape) for x in lora], [getattr(w, "codes", w).data_ptr() for w in weights])
    if model.drafts is None or model.drafts[0] != key():
        model.drafts = None                                                    # first free, then allocate
        drafts = Drafts(model, places, k, prompt_length, length, sampling, stop_ids, window=bucket, graphs=graphs)
        model.drafts = key(), drafts                                           # it has joined, and moved, weights
    drafts = model.drafts[1]
    for old, new in zip(drafts.fused.tensors(), Fused(model, 0).tensors() if lora else ()):  # the adapter has trained since
        old.copy_(new)
    drafts.restart(places, k)
    return drafts


@torch.no_grad()
def generate(model, prompts, *, k=1, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, stop_ids=(), seed=0,
             max_rows=256, look_every=None, progress=None):
    """k drafts for each prompt (a list of ids) -> Samples.
    At most `max_rows` drafts are written at a time: while prompts wait, one takes the place of each whose k drafts are
    finished; when none wait, the batch shrinks to what is unfinished. `seed`: an int (prompt p then draws from (seed, p))
    or one int or tuple per prompt; draft d of a prompt with seed s depends on (s, d) alone. Finished drafts are looked
    for every `look_every` tokens: by default 1 on a CPU, 16 on a GPU, where looking waits for the device.
    `progress(n)` is told of the n prompts that have been taken up."""
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    check_generation(model, prompts, k, max_new_tokens, **sampling)
    if not prompts:
        return Samples([], [], [])
    seeds = list(seed) if hasattr(seed, "__len__") else [(seed, p) for p in range(len(prompts))]
    look_every = look_every or (16 if model.device.type == "cuda" else 1)
    places = max(1, min(len(prompts), max_rows // k))
    drafts = drafts_for(model, places, k, max(map(len, prompts)), max_new_tokens, sampling, stop_ids)
    decoder, writing, step = Decoder(drafts, prompts, k, max_new_tokens, seeds), True, 0
    with nullcontext() if model.lockstep else torch.inference_mode():          # its operations cost less; FSDP does not work in it
        while writing or decoder.waiting:
            if decoder.waiting and len(decoder.idle) >= max(1, places // 4):   # a few at a time: prefills batch well
                taken, writing = decoder.refill(), True                        # the newcomers, if nobody else
                progress(taken) if progress else None
            elif writing:
                drafts.advance()
                decoder.left = [n - 1 for n in decoder.left]
            step += 1
            if stop_ids and step % look_every == 0 or min(decoder.left) <= 0:
                writing = decoder.look()
    model.lockstep and model.lockstep.wait()
    return decoder.samples(stop_ids)


def check_generation(model, prompts, k, max_new_tokens, temperature, top_k, top_p, min_p):
    for good, what in ((k >= 1, f"k is {k}: at least one draft"), (temperature >= 0, f"temperature is {temperature}: 0 or more"),
                       (max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}: at least 1"),
                       (0 < top_p <= 1, f"top_p is {top_p}: above 0, at most 1"), (top_k >= 0, f"top_k is {top_k}: 0 or more"),
                       (0 <= min_p < 1, f"min_p is {min_p}: 0 or more, below 1"),
                       (all(len(p) for p in prompts), "a prompt is empty: give at least one token"),
                       (all(max(p) < model.vocab for p in prompts if len(p)), "a prompt holds a token id that the model lacks")):
        if not good:
            raise InputError(f"generate: {what}")
