"""Qwen3, written out: config, layers, three heads, loading and saving, scoring, and k-draft generation.

Read it in this order: Config -> RMSNorm / rotary -> Attention, MLP, Block -> Qwen3 -> token_logprobs ->
generate.

Parameter names are Hugging Face's, so a downloaded checkpoint loads strictly and a saved one loads elsewhere.
A block does not know whether it trains, reads a prompt or writes the next token: it hands q, k, v to
`attend`. Three things differ from a textbook transformer, all of them for speed:
  * the loss needs the vocabulary only at reply tokens, so `token_logprobs` projects those positions alone, in chunks;
  * a post is read once for its k drafts, in training (one row holds a post and its drafts, data.pack) as well as
    in generation (`Drafts` stores the post's keys and values once and k short tails);
  * each draft has its own stream of random numbers, so it does not depend on what else is in the batch.
"""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


class InputError(ValueError):
    """Wrong input from the user: one clear sentence with the place and the mend. Commands print it and exit
    with 2."""


# ----------------------------------------------------------------------------------------------------------------
# Configuration

@dataclass
class Config:
    """The fields of a Qwen3 config.json that shape the network. head_dim is independent of hidden_size /
    heads."""
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
    # everything else in config.json, written back by save_pretrained
    extra: dict = field(default_factory=dict)

    @classmethod
    def from_dict(cls, d):
        """Reads config.json as the hub has it (rope_theta, torch_dtype) and as transformers 5 writes it
        (rope_parameters.rope_theta, dtype). Raises InputError for what this file does not implement."""
        rope = d.get("rope_parameters") or {}
        if d.get("model_type", "qwen3") != "qwen3":
            raise InputError(f"config.json describes a {d['model_type']!r} model: give a Qwen3 one")
        for key, fine in (("attention_bias", False), ("use_sliding_window", False), ("hidden_act", "silu"),
                          ("rope_scaling", None)):
            if (d.get(key) or fine) != fine:
                raise InputError(f"config.json sets {key} to {d[key]!r}: only {fine!r} is implemented")
        if rope.get("rope_type", "default") != "default":
            raise InputError(f"config.json sets rope_type to {rope['rope_type']!r}: only 'default' is implemented")
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


# ----------------------------------------------------------------------------------------------------------------
# Layers

class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        # fp32 statistics, back to the input's dtype, and only then the weight: the other order flips a
        # quarter of all bf16 outputs against the released model.
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


def rotary(positions, head_dim, theta, dtype):
    """cos and sin, each positions.shape + (1, head_dim / 2): the 1 is the heads'.

    Made afresh in fp32 on every forward: a buffer would be rounded by model.to(bfloat16), and an inverse
    frequency in bf16 is off by radians at position 4,000.
    """
    inverse = theta ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions.unsqueeze(-1).float() * inverse
    return angles.cos().to(dtype).unsqueeze(-2), angles.sin().to(dtype).unsqueeze(-2)


def rotate(x, rope):
    """Split-half rotation as in Hugging Face (dimension i turns with i + D/2, not with i + 1). x (B, T,
    heads, D)."""
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


# ----------------------------------------------------------------------------------------------------------------
# The model and its heads

class Backbone(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Qwen3(nn.Module):
    """A dense Qwen3 with the heads its checkpoint has: token logits (lm_head, or the tied embedding), a
    scalar `score` (reward models), or none (embedders).

    `vocab` is the number of token ids that are real: the rows above it pad the matrix and are never sampled
    or scored (Qwen3 has 151,936 rows for 151,669 tokens).
    """

    def __init__(self, config, *, lm_head=True, score_head=False):
        super().__init__()
        self.config, self.model, self.vocab = config, Backbone(config), config.vocab_size
        self.has_logits, self.has_score = lm_head or config.tie_word_embeddings, score_head
        if lm_head and not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if score_head:
            # the name `score` is the method's
            self._modules["score"] = nn.Linear(config.hidden_size, 1, bias=False)
        # recompute each block in the backward pass instead of keeping its activations
        self.checkpointing = False

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.model.norm.weight.dtype

    def head_weight(self):
        """(vocab, hidden): the rows of the output matrix that stand for real tokens."""
        if not self.has_logits:
            raise InputError("this checkpoint has no token head (an embedder or a reward model): it cannot write text")
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return weight[:self.vocab]

    def hidden(self, tokens, positions=None, attend=None):
        """Final normed hidden states (B, T, hidden) of tokens (B, T); positions (B, T), by default 0..T-1."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        attend, x = attend or full_attention(), self.model.embed_tokens(tokens)
        rope = rotary(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for i, block in enumerate(self.model.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, attend, i, use_reentrant=False)
            else:
                x = block(x, rope, attend, i)
        return self.model.norm(x)

    def forward(self, tokens):
        """Logits (B, T, V) over the whole matrix, padding rows included. For study and tests: training uses
        token_logprobs, which never holds this tensor."""
        self.head_weight()
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return F.linear(self.hidden(tokens), weight)

    def last_hidden(self, tokens, lengths):
        hidden = self.hidden(tokens)  # padded on the right: causal is enough
        return hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1]

    def embed(self, tokens, lengths):
        """Unit-length fp32 embeddings (B, hidden): the last attended token, as Qwen3-Embedding is read.
        tokens (B, T) padded on the right, lengths (B,)."""
        return F.normalize(self.last_hidden(tokens, lengths).float(), dim=-1)

    def score(self, tokens, lengths):
        """A reward model's scalar (B,) in fp32 at the last attended token (Qwen3ForSequenceClassification,
        one label)."""
        if not self.has_score:
            raise InputError("this checkpoint has no scalar head (score.weight): give a reward model")
        return self._modules["score"](self.last_hidden(tokens, lengths)).float().squeeze(-1)

    @classmethod
    def from_pretrained(cls, path, *, revision=None, device=None, dtype=None):
        """A model from a folder or a hub name. dtype None keeps the stored one.

        Built on meta and loaded strictly: a missing, unknown or wrong-shaped tensor raises InputError with
        its name. Qwen3-Embedding's tensors lack the leading `model.`; both spellings are read.
        """
        return load_checkpoint(cls, fetch(path, revision), device, dtype)

    def save_pretrained(self, folder, *, shard_bytes=5_000_000_000):
        """config.json and model.safetensors (or numbered shards with their index) in Hugging Face's
        layout."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        shards, size = [{}], 0
        bare = not self.has_logits and not self.has_score  # an embedder: its names lack `model.`
        for name, tensor in self.state_dict().items():
            name = name.removeprefix("model.") if bare else name
            if size and size + tensor.nbytes > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = tensor.contiguous()
            size += tensor.nbytes
        names = ["model.safetensors"] if len(shards) == 1 else [
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for file, shard in zip(names, shards):
            save_file(shard, folder / file, metadata={"format": "pt"})
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(t.nbytes for s in shards for t in s.values())},
                     "weight_map": {n: file for file, shard in zip(names, shards) for n in shard}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------------
# Loading

def fetch(path, revision=None):
    """The local folder of a checkpoint: `path` itself, or a snapshot of that name on the Hugging Face hub."""
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path) or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        raise InputError(f"no model folder at {str(path)!r}: give a folder with config.json, or a hub name (owner/name)")
    from huggingface_hub import snapshot_download
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
            raise InputError(f"tensor {name!r} in {folder} has shape {tuple(tensors[name].shape)}, "
                             f"config.json asks for {tuple(shape)}")
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()  # frozen: a phase says what it trains


# ----------------------------------------------------------------------------------------------------------------
# Scoring: log-probabilities of given tokens

def chunk_size(vocab, device):
    """Tokens whose fp32 logits fill 64 MiB (CPU) or 256 MiB (GPU): enough to keep a matrix product busy."""
    return max(16, (2 ** 26 if device.type == "cuda" else 2 ** 24) // vocab)


class SelectedLogprobs(torch.autograd.Function):
    """log softmax(h W^T / T)[target] and the entropy of that softmax, for a frozen W, in chunks of tokens.

    A token's log-probability depends on its own hidden state alone, so its gradient is one vector, (W[target]
    - softmax . W) / T. Forward computes it while the chunk's softmax is at hand; backward only scales it.
    That is exact for every loss of the log-probabilities, costs no second projection, and keeps (N, hidden)
    instead of (N, vocab).
    """

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
    """The same numbers by plain autograd, one full (N, V) tensor: the reference, and the way when W itself
    trains."""
    logp = (F.linear(hidden, weight).float() / temperature).log_softmax(-1)
    return logp.gather(-1, target[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1).detach()


def token_logprobs(model, rows, temperature=1.0):
    """Log-probabilities and entropies, two fp32 (N,), of the N reply tokens in `rows` (data.pack) under the
    softmax at `temperature`: the distribution that generate samples from without truncation. Only the first
    has a gradient."""
    hidden = model.hidden(rows.tokens, rows.positions, full_attention(rows.mask()))
    hidden, weight = hidden.flatten(0, 1)[rows.predict], model.head_weight()
    score = selected_logprobs if weight.requires_grad else SelectedLogprobs.apply
    return score(hidden, weight, rows.target, temperature)


# ----------------------------------------------------------------------------------------------------------------
# Generation

@dataclass
class Samples:
    """What generate returns. tokens[prompt][draft] is a list of ids with the stop id kept; logprobs has the
    same shape, under the distribution sampled from; finished[prompt][draft] is False when max_new_tokens cut
    it off."""
    tokens: list
    logprobs: list
    finished: list


def sample(logits, uniform, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """One token per row: ids and log-probs (R,), from fp32 logits (R, V) and uniform numbers (R,) in [0, 1).

    Temperature first, then top-k, top-p, min-p, each on what the former kept (Hugging Face's order); the
    log-prob is of the renormalised rest. Temperature 0 takes the largest logit; its log-prob is the model's
    own, at T = 1. The draw inverts the cumulative distribution in float64: one random number a token, and no
    id of probability zero can be hit, which low-precision multinomials have done.
    """
    if temperature == 0:
        logp, token = logits.log_softmax(-1).max(-1)
        return token, logp
    logp = (logits / temperature).log_softmax(-1)
    if top_k:
        kth = logp.topk(min(top_k, logp.shape[-1])).values[:, -1:]
        logp = logp.masked_fill(logp < kth, -math.inf).log_softmax(-1)
    if top_p < 1:
        ordered, index = logp.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass above this token; the first has 0
        ordered = ordered.masked_fill(before >= top_p, -math.inf)
        logp = torch.empty_like(logp).scatter_(-1, index, ordered).log_softmax(-1)
    if min_p:
        floor = logp.max(-1, keepdim=True).values + math.log(min_p)
        logp = logp.masked_fill(logp < floor, -math.inf).log_softmax(-1)
    mass = logp.exp().cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True).clamp_(max=logp.shape[-1] - 1)
    return token.squeeze(-1), logp.gather(-1, token).squeeze(-1)


def uniforms(seeds, k, length):
    """(prompts, k, length) float64 numbers in [0, 1): draft d of a prompt with seed s reads the stream of (s,
    d), whatever rank or batch it is in."""
    flat = [[int(x) for x in (s if isinstance(s, (tuple, list)) else (s,))] for s in seeds]
    return torch.from_numpy(np.stack([[np.random.default_rng([*s, d]).random(length) for d in range(k)] for s in flat]))


class Drafts:
    """The state of a decoding batch: P places for posts, k drafts each. As `attend` it is the KV cache.

    A post's keys and values are stored once, (P, KV, L, D), and shared by its k drafts; the drafts' own are a
    ring (P, KV, k, M, D) in which step s of the whole batch writes column s mod M for every row. A post that
    entered `age` steps ago sees the last `age` columns, so a newcomer takes a finished post's place without
    moving anything. Softmax does not mind the order of the columns: rotary positions went into k when it was
    written.
    """

    def __init__(self, model, places, k, prompt_length, length):
        c = model.config
        self.model, self.k, self.ring, self.step, self.filling = model, k, length, 0, None
        like = dict(device=model.device, dtype=model.dtype)
        shape, own = (places, c.num_key_value_heads, prompt_length, c.head_dim), (k, length, c.head_dim)
        self.prompt_k, self.prompt_v = ([torch.zeros(shape, **like) for _ in model.model.layers] for _ in range(2))
        self.own_k, self.own_v = ([torch.zeros(shape[:2] + own, **like) for _ in model.model.layers] for _ in range(2))
        self.lengths, self.age = torch.zeros(2, places, dtype=torch.long, device=model.device)
        self.bias = None

    def fill(self, places, prompts):
        """Read `prompts` (id lists) into `places` (a list of indices); returns logits (len(places), V) in
        fp32."""
        lengths = torch.tensor([len(p) for p in prompts], device=self.model.device)
        tokens = torch.zeros(len(prompts), int(max(map(len, prompts))), dtype=torch.long)
        for row, p in zip(tokens, prompts):
            row[:len(p)] = torch.tensor(p)
        places = torch.tensor(places, device=self.model.device)
        self.filling, causal = places, full_attention()

        def attend(layer, q, k, v):
            for cache, new in ((self.prompt_k, k), (self.prompt_v, v)):
                cache[layer][places, :, :tokens.shape[1]] = new.transpose(1, 2)
            return causal(layer, q, k, v)
        hidden = self.model.hidden(tokens.to(self.model.device), attend=attend)
        self.lengths[places], self.age[places] = lengths, 0
        last = hidden[torch.arange(len(prompts), device=hidden.device), lengths - 1]
        return F.linear(last, self.model.head_weight()).float()

    def next_logits(self, tokens):
        """Logits (P, k, V) in fp32 after the drafts' newest tokens (P, k)."""
        column = self.step % self.ring
        self.used = min(self.step + 1, self.ring)
        prompt = torch.arange(self.prompt_k[0].shape[2], device=tokens.device) < self.lengths[:, None]
        own = (column - torch.arange(self.used, device=tokens.device)) % self.ring <= self.age[:, None]
        seen = torch.cat((prompt, own), 1)                                     # (P, L + used)
        self.bias = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -math.inf)[:, None, None, None]
        positions = (self.lengths + self.age)[:, None].expand_as(tokens).reshape(-1, 1)
        hidden = self.model.hidden(tokens.reshape(-1, 1), positions, self)
        self.step += 1
        self.age += 1
        return F.linear(hidden[:, 0], self.model.head_weight()).float().unflatten(0, tokens.shape)

    def __call__(self, layer, q, k, v):
        """Attention of one new token per draft over [the post's cache, the draft's own]. q (P k, 1, H, D)."""
        places, kv_heads, _, dim = self.prompt_k[layer].shape
        column, used = self.step % self.ring, self.used
        for cache, new in ((self.own_k, k), (self.own_v, v)):
            cache[layer][:, :, :, column] = new.view(places, self.k, kv_heads, dim).transpose(1, 2)
        q = (q * dim ** -0.5).view(places, self.k, kv_heads, -1, dim).transpose(1, 2)       # (P, KV, k, G, D)
        shared = q.flatten(2, 3) @ self.prompt_k[layer].transpose(-1, -2)  # all drafts against the one copy
        own = q @ self.own_k[layer][..., :used, :].transpose(-1, -2)           # (P, KV, k, G, used)
        scores = torch.cat((shared.unflatten(2, q.shape[2:4]), own), -1).float() + self.bias
        shared, own = scores.softmax(-1).to(q.dtype).split((shared.shape[-1], used), -1)
        out = (shared.flatten(2, 3) @ self.prompt_v[layer]).unflatten(2, q.shape[2:4])
        out = out + own @ self.own_v[layer][..., :used, :]
        return out.transpose(1, 2).reshape(places * self.k, 1, -1, dim)

    def keep(self, places, drafts):
        """Shrink to the given places (P',) and, in each, the given drafts (P', k')."""
        own = drafts[:, None, :, None, None].expand(-1, self.own_k[0].shape[1], -1, *self.own_k[0].shape[3:])
        for i in range(len(self.own_k)):
            self.prompt_k[i], self.prompt_v[i] = self.prompt_k[i][places], self.prompt_v[i][places]
            self.own_k[i] = self.own_k[i][places].gather(2, own)
            self.own_v[i] = self.own_v[i][places].gather(2, own)
        self.lengths, self.age, self.k = self.lengths[places], self.age[places], drafts.shape[1]


class Decoder:
    """What is being written where: P places of k drafts, the prompts that wait, and the tokens written so
    far.

    Results live on the device, (prompts, k, max_new_tokens + 1), and are read once at the end. Their last
    column is a waste bin for places that are idle until a newcomer or a smaller batch.
    """

    def __init__(self, model, prompts, k, length, sampling, stop_ids, seeds, places):
        new = dict(device=model.device)
        self.prompts, self.k, self.length, self.sampling = prompts, k, length, sampling
        self.cache = Drafts(model, places, k, max(map(len, prompts)), length)
        self.noise = uniforms(seeds, k, length).to(model.device)
        self.stops = torch.tensor(sorted(stop_ids), dtype=torch.long, **new)
        self.tokens = torch.zeros(len(prompts), k, length + 1, dtype=torch.long, **new)
        self.logprobs = torch.zeros(len(prompts), k, length + 1, **new)
        self.stopped = torch.zeros(len(prompts), k, dtype=torch.bool, **new)
        self.post = torch.zeros(places, 1, dtype=torch.long, **new)  # the prompt each place works on
        self.draft = torch.arange(k, **new).repeat(places, 1)  # (P, k): the draft each row writes
        self.newest = torch.zeros(places, k, dtype=torch.long, **new)
        self.waiting, self.idle = list(range(len(prompts))), list(range(places))
        # tokens each place may still write: on the host, so nobody waits for it
        self.left = [math.inf] * places

    def refill(self):
        """Idle places take the next prompts: one prefill, then the first token of every draft from its last
        logits."""
        places, self.idle = self.idle[:len(self.waiting)], self.idle[len(self.waiting):]
        taken, self.waiting = self.waiting[:len(places)], self.waiting[len(places):]
        logits = self.cache.fill(places, [self.prompts[p] for p in taken])     # (places, V)
        rows = torch.tensor(places, device=logits.device)
        self.post[rows, 0] = torch.tensor(taken, device=logits.device)
        self.record(logits[:, None].expand(-1, self.k, -1), rows)
        for place in places:
            self.left[place] = self.length - 1

    def advance(self):
        self.record(self.cache.next_logits(self.newest), slice(None))
        self.left = [n - 1 for n in self.left]

    def record(self, logits, rows):
        """Sample one token for each draft in `rows` from logits (rows, k, V) and note it."""
        which = (self.post[rows], self.draft[rows], self.cache.age[rows, None].clamp(max=self.length))
        u = self.noise[(*which[:2], which[2].clamp(max=self.length - 1))]
        token, logprob = sample(logits.flatten(0, 1), u.flatten(), **self.sampling)
        token = token.view_as(u)
        self.tokens[which], self.logprobs[which], self.newest[rows] = token, logprob.view_as(u), token
        self.stopped[which[:2]] |= torch.isin(token, self.stops) & (which[2] < self.length)

    def look(self):
        """Find the places whose drafts are all finished; with nobody waiting, drop them and the finished
        rows."""
        # (P, k)
        writing = ~self.stopped[self.post, self.draft].cpu() & (torch.tensor(self.left) > 0)[:, None]
        writing[self.idle] = False
        self.idle = (~writing.any(1)).nonzero().flatten().tolist()
        for place in self.idle:
            self.left[place] = math.inf                                        # never due for a look
        rows, widest = writing.any(1).nonzero().flatten(), int(writing.sum(1).max())
        if not self.waiting and 0 < 2 * len(rows) * widest <= writing.numel():
            # Rows stay rectangular, for the shared prompt: each place keeps `widest` drafts, unfinished ones
            # first.
            order = writing[rows].int().argsort(dim=1, descending=True, stable=True)[:, :widest].to(self.post.device)
            self.left, self.idle, rows = [self.left[i] for i in rows], [], rows.to(self.post.device)
            self.cache.keep(rows, order)
            self.post, self.draft = self.post[rows], self.draft[rows].gather(1, order)
            self.newest = self.newest[rows].gather(1, order)
        return writing.any()

    def samples(self):
        """Cut each draft after its first stop id. Only generated tokens are looked at: a prompt may hold stop
        ids."""
        stops, out = set(self.stops.tolist()), Samples([], [], [])
        for drafts, logprobs in zip(self.tokens.tolist(), self.logprobs.tolist()):
            ends = [next((i + 1 for i, t in enumerate(d[:-1]) if t in stops), self.length) for d in drafts]
            out.tokens.append([d[:e] for d, e in zip(drafts, ends)])
            out.logprobs.append([p[:e] for p, e in zip(logprobs, ends)])
            out.finished.append([d[e - 1] in stops for d, e in zip(drafts, ends)])
        return out


@torch.no_grad()
def generate(model, prompts, *, k=1, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, stop_ids=(), seed=0,
             max_rows=256, look_every=None, progress=None):
    """k drafts for each prompt (a list of ids) -> Samples.

    One prefill per prompt serves its k drafts. At most `max_rows` drafts are written at a time: while prompts
    wait, one takes the place of each whose k drafts are finished; when none wait, the batch shrinks to what
    is unfinished. `seed`: an int (prompt p then draws from (seed, p)) or one int or tuple per prompt; draft d
    of a prompt with seed s depends on (s, d) alone. Finished drafts are looked for every `look_every` tokens:
    by default 1 on a CPU, 16 on a GPU, where looking waits for the device. `progress(n)` is told of the n
    prompts that have been taken up.
    """
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    check_generation(model, prompts, k, max_new_tokens, **sampling)
    if not prompts:
        return Samples([], [], [])
    seeds = [(seed, p) for p in range(len(prompts))] if isinstance(seed, int) else list(seed)
    look_every = look_every or (16 if model.device.type == "cuda" else 1)
    places = max(1, min(len(prompts), max_rows // k))
    decoder = Decoder(model, prompts, k, max_new_tokens, sampling, stop_ids, seeds, places)
    writing, step = True, 0
    while writing or decoder.waiting:
        # a few at a time: prefills batch well
        if decoder.waiting and len(decoder.idle) >= max(1, places // 4):
            before = len(decoder.waiting)
            decoder.refill()
            writing = True                                                     # the newcomers, if nobody else
            if progress:
                progress(before - len(decoder.waiting))
        elif writing:
            decoder.advance()
        step += 1
        if step % look_every == 0 or min(decoder.left) <= 0:
            writing = decoder.look()
    return decoder.samples()


def check_generation(model, prompts, k, max_new_tokens, temperature, top_k, top_p, min_p):
    for good, what in ((k >= 1, f"k is {k}: at least one draft"), (temperature >= 0, f"temperature is {temperature}: 0 or more"),
                       (max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}: at least 1"),
                       (0 < top_p <= 1, f"top_p is {top_p}: above 0, at most 1"), (top_k >= 0, f"top_k is {top_k}: 0 or more"),
                       (0 <= min_p < 1, f"min_p is {min_p}: 0 or more, below 1"),
                       (all(len(p) for p in prompts), "a prompt is empty: give at least one token"),
                       (all(max(p) < model.vocab for p in prompts if len(p)), "a prompt holds a token id that the model lacks")):
        if not good:
            raise InputError(f"generate: {what}")
