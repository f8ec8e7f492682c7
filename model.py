"""Qwen3 in plain PyTorch: the network, rows of packed completions, log-probabilities of tokens.

Reading order: Config -> RMSNorm, rotary, Attention, MLP, Block -> Qwen3 -> Rows, pack ->
token_logprobs. Parameter names are Hugging Face's, so a downloaded checkpoint loads strictly and a
saved one loads elsewhere (the files: support/hub.py). A block does not know whether it trains,
reads a prompt or decodes: it hands q, k, v to `attend`. Two things differ from a textbook
transformer, for speed:
  * the loss needs logits at completion tokens only: only these positions are projected to the
    vocabulary, in chunks (token_logprobs);
  * a prompt is computed once for its k completions: they share one row (pack).
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from support.files import InputError, fetch, read_json
from support.hub import load_model, save_model
from support.model_config import config_fields
from support.packing import plan_batches, rounded_up
from support.products import logits_of
from support.registry import FORMATS


@dataclass
class Config:
    """The fields of a Qwen3 config.json that shape the network. head_dim is a field of its own: it
    is not hidden_size / num_attention_heads."""
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
    attention_bias: bool = False     # of q, k, v and o
    dtype: str = "float32"   # of the stored weights
    extra: dict = field(default_factory=dict)  # all else in config.json, written back when saved

    @classmethod
    def from_dict(cls, d):
        """The checked configuration in a config.json (a dict)."""
        return cls(**config_fields(d))

    def to_dict(self):
        """config.json in the hub's layout."""
        shape = {k: v for k, v in vars(self).items() if k not in ("dtype", "extra")}
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
                "max_position_embeddings": 40960, **self.extra, **shape, "torch_dtype": self.dtype}


# ---- Layers --------------------------------------------------------------------------------------

def rms_norm(x, weight, eps):
    """x over its root mean square along the last dimension, times weight (D,) or (heads, D)."""
    # fp32 statistics, back to the input's dtype, and only then the weight: the other order flips a
    # quarter of all bf16 outputs against the released model. F.rms_norm takes the statistics in
    # fp32 for any dtype.
    if x.dtype == torch.float32 and weight.dim() == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    return weight * F.rms_norm(x, x.shape[-1:], None, eps)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

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
    """Split-half rotation of x (B, T, heads, D): dimension i is paired with i + D/2, not i + 1."""
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        q = c.num_attention_heads * c.head_dim
        kv = c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=c.attention_bias)
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
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, attend, layer):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


# cuDNN's attention makes a plan for each new (batch, width), about a second each: a rollout and its
# scoring have new ones at every step. The other kernels make none.
torch.backends.cuda.enable_cudnn_sdp(False)


def full_attention(mask=None):
    """The `attend` of training and scoring. mask (B, 1, T, T) bool, True where row i may look at
    column j; None is plain causal, right for rows that are padded on the right."""
    def attend(layer, q, k, v):  # q (B, T, H, D), k and v (B, T, KV, D)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if q.is_cuda and (mask is not None or q.dtype == torch.float32):
            # CUDA's fast kernel for a mask or fp32 wants a k and v for every head.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        dtype = q.dtype
        if q.device.type == "cpu":   # whose backward pass in half precision is 2 to 4 times slower
            q, k, v = q.float(), k.float(), v.float()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                             enable_gqa=True)
        return out.to(dtype).transpose(1, 2)
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
    embedding), a scalar `score` (reward models), or none (embedders). `vocab` is the number of real
    token ids: the rows above it pad the matrix and are never sampled or scored (Qwen3 has 151,936
    rows for 151,669 tokens)."""

    def __init__(self, config, *, lm_head=True, score_head=False):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.vocab = config.vocab_size
        self.has_logits = lm_head
        self.has_score = score_head
        if lm_head and not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if score_head:
            # Not as an attribute: that name is the method's.
            self._modules["score"] = nn.Linear(config.hidden_size, 1, bias=False)
        self.checkpointing = False           # recompute blocks in the backward pass
        self.lockstep = None                 # ranks.Lockstep, when ranks share the weights
        self.graphs = None                   # decode by CUDA graphs; None: on a GPU
        self.kept_batch = None               # memory that the next rollout reuses (engine.py)
        self.original = None                 # name -> weight before all of them trained (lora.py)
        self.ensemble = None                     # of an ensemble: who computes which row (methods/)

    device = property(lambda self: self.model.embed_tokens.weight.device)
    dtype = property(lambda self: self.model.norm.weight.dtype)
    members = property(lambda self: self.ensemble.members if self.ensemble else 1)  # of an ensemble

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

    def head_weight(self, rows=None):
        """(vocab, hidden): the rows of the output matrix that stand for real tokens, or its first
        `rows`."""
        if not self.has_logits:
            raise InputError("this checkpoint has no token head (an embedder or a reward model): "
                             "it cannot write text")
        tied = self.config.tie_word_embeddings
        weight = self.model.embed_tokens.weight if tied else self.lm_head.weight
        return weight[:rows or self.vocab]

    def forward(self, tokens):
        """Logits (B, T, V), padding rows included. For study and tests: training never holds this
        tensor."""
        return F.linear(self.hidden(tokens), self.head_weight(self.config.vocab_size))

    def last_hidden(self, tokens, lengths):
        """Hidden states (B, hidden) of the last token of each row; tokens (B, T) are padded on the
        right, so that plain causal attention is enough; lengths (B,)."""
        hidden = self.hidden(tokens)
        return hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1]

    def embed(self, tokens, lengths):
        """Unit embeddings (B, hidden) in fp32: the last token's, as Qwen3-Embedding is read."""
        return F.normalize(self.last_hidden(tokens, lengths).float(), dim=-1)

    def score(self, tokens, lengths):
        """A reward model's scalars (B,) in fp32, at the last token, as
        Qwen3ForSequenceClassification's."""
        if not self.has_score:
            raise InputError("this checkpoint has no scalar head (score.weight): give a reward "
                             "model")
        return self._modules["score"](self.last_hidden(tokens, lengths)).float().squeeze(-1)

    @classmethod
    def from_pretrained(cls, path, *, revision=None, device=None, dtype=None, nf4=False):
        """A frozen model from a folder or a hub name, in `dtype` or as stored. nf4: the blocks'
        linear layers in 4 bits, made on the device one by one."""
        folder = fetch(path, revision)
        config = Config.from_dict(read_json(folder / "config.json"))
        model = load_model(cls, config, folder, "cpu" if nf4 else device, dtype)
        return FORMATS["nf4"].function(model, device) if nf4 else model

    def save_pretrained(self, folder, *, shard_bytes=5_000_000_000):
        """Writes config.json and model.safetensors, or shards and their index: the hub's layout."""
        save_model(self, folder, shard_bytes)


# ---- Batches: rows of tokens for one forward pass ------------------------------------------------

@dataclass
class Rows:
    """Token rows for one forward pass. A row holds one prompt and all its completions, so the
    prompt is computed once:

        tokens     prompt prompt | a a a | b b | c c c c | pad        (B, T)
        owner          -1     -1 | 0 0 0 | 1 1 | 2 2 2 2 | -2         (B, T)  which completion
        positions       0      1 | 2 3 4 | 2 3 | 2 3 4 5 | 0          (B, T)  all follow the prompt

    A token sees the prompt and its own completion up to itself; a completion's last token predicts
    nothing and is left out. The N completion tokens that are
    predicted are listed flat: `predict`, where in the flattened (B T) rows the state stands that
    predicts it (for first tokens the prompt's last); `target`, its id; `completion`, the number
    of its completion, counted over all groups in the order given to pack. `member` (B,): of an
    ensemble of LoRAs, the one that computes a row, whose completions are its own; None without."""
    tokens: torch.Tensor
    positions: torch.Tensor
    owner: torch.Tensor
    predict: torch.Tensor
    target: torch.Tensor
    completion: torch.Tensor
    shared: bool             # does a row hold two completions?
    member: torch.Tensor | None = None

    def mask(self):
        """(B, 1, T, T) bool, True where row i may look at column j; None when no row holds two
        completions: plain causal."""
        if not self.shared:
            return None
        owner = self.owner
        length = self.tokens.shape[1]
        seen = (owner[:, None, :] == -1) | (owner[:, None, :] == owner[:, :, None])
        causal = torch.ones(length, length, dtype=torch.bool, device=owner.device).tril()
        return (seen & causal)[:, None]

    def by_token(self, completions):
        """Lists of numbers, one list a completion in pack's order and one number a token, as a
        tensor (N,) at the predicted tokens."""
        flat = []
        for index in self.completion.unique_consecutive().tolist():
            flat.extend(completions[index])
        return torch.tensor(flat, device=self.completion.device)


def pack(groups, tokens_per_batch, device="cpu", members=1):
    """Groups (prompt ids, [completion ids, ...]) -> list of Rows, each of at most
    `tokens_per_batch` padded tokens, of rows of similar length. On a GPU a batch is a multiple of
    64 tokens wide: fewer shapes, for which the allocator finds the last batch's memory again.

    A group too long for the budget is split between its completions (each part reads the prompt
    again). So is one whose completions belong to the members of an ensemble: completion d to member
    d mod M."""
    unit = 64 if torch.device(device).type == "cuda" else 1
    batches = plan_batches(groups, tokens_per_batch, members, unit)
    return [rows_tensors(rows, device, members, unit) for rows in batches]


def rows_tensors(rows, device, members, unit=1):
    """The planned rows of one batch, the longest first -> Rows."""
    width = rounded_up(rows[0].length, unit)
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    owner = np.full((len(rows), width), -2)
    predict = []
    target = []
    number = []
    for b, row in enumerate(rows):
        end = len(row.prompt)
        tokens[b, :end] = row.prompt
        positions[b, :end] = np.arange(end)
        owner[b, :end] = -1
        start = end
        for j, completion in enumerate(row.completions):
            n = len(completion) - 1
            tokens[b, start:start + n] = completion[:-1]
            positions[b, start:start + n] = np.arange(end, end + n)
            owner[b, start:start + n] = j
            # The prompt's last state predicts the first token, the completion's own the others.
            predict.append(b * width + end - 1)
            predict.extend(range(b * width + start, b * width + start + n))
            target.extend(completion)
            number.extend([row.indices[j]] * len(completion))
            start += n

    def tensor(values):
        return torch.as_tensor(values, dtype=torch.long).to(device, non_blocking=True)
    return Rows(tensor(tokens), tensor(positions), tensor(owner), tensor(predict), tensor(target),
                tensor(number), shared=any(len(row.completions) > 1 for row in rows),
                member=tensor([row.member for row in rows]) if members > 1 else None)


# ---- Log-probabilities of given tokens -----------------------------------------------------------

def chunk_size(vocab, device):
    """Tokens whose fp32 logits fill 64 MiB (CPU) or 256 MiB (GPU): enough to keep a product
    busy."""
    return max(16, (2 ** 26 if device.type == "cuda" else 2 ** 24) // vocab)


def chunks(count, vocab, device):
    """Slices of `count` tokens, chunk_size each."""
    size = chunk_size(vocab, device)
    return [slice(start, start + size) for start in range(0, count, size)]


class SelectedLogprobs(torch.autograd.Function):
    """log softmax(h W^T / T)[target] and the entropy of that softmax, for a frozen W, in chunks of
    tokens. A token's log-probability depends on its own hidden state only: its gradient is one
    vector, (onehot(target) - softmax) W / T, computed while the chunk's softmax is at hand and
    scaled in backward. Exact for every loss of log-probabilities; (N, hidden) is kept, not (N,
    vocab)."""

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature):
        logprob = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy = torch.empty_like(logprob)
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        for some in chunks(len(hidden), len(weight), hidden.device):
            logits = logits_of(hidden[some], weight).div_(temperature)         # (chunk, V)
            total = logits.logsumexp(-1, keepdim=True)
            chosen = target[some, None]
            logprob[some] = logits.gather(-1, chosen).sub_(total).squeeze(-1)
            p = (logits - total).exp_()
            entropy[some] = total.squeeze(-1) - torch.linalg.vecdot(p, logits)
            if grad_hidden is not None:
                # In fp32 and in one product: W[target] - p W, each rounded to bf16, cancels where
                # the model is confident, and leaves nothing but rounding.
                error = p.neg_().scatter_add_(1, chosen, torch.ones_like(p[:, :1]))
                error = error.div_(temperature).to(weight.dtype)
                grad_hidden[some] = error @ weight
        ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(grad_hidden)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        grad_hidden, = ctx.saved_tensors
        return (grad_hidden * grad[:, None]).to(grad_hidden.dtype), None, None, None


def selected_logprobs(hidden, weight, target, temperature=1.0):
    """The same by plain autograd, with a full (N, V) tensor: the reference, and, in chunks, what
    trains all weights."""
    logp = (F.linear(hidden, weight).float() / temperature).log_softmax(-1)
    chosen = logp.gather(-1, target[:, None]).squeeze(-1)
    return chosen, -(logp.exp() * logp).sum(-1).detach()


def predicting_states(model, rows):
    """Final hidden states (N, hidden) from which the N completion tokens of `rows` are
    predicted."""
    if model.ensemble is not None:
        model.ensemble.of = 0 if rows.member is None else rows.member
    hidden = model.hidden(rows.tokens, rows.positions, full_attention(rows.mask()))
    return hidden.flatten(0, 1)[rows.predict]


def token_logprobs(model, rows, temperature=1.0):
    """Log-probabilities, with gradient, and entropies, two fp32 (N,), of the N completion tokens in
    `rows` (pack) under the softmax at `temperature`: the distribution that generate samples from
    without truncation."""
    hidden = predicting_states(model, rows)
    weight = model.head_weight()
    if weight.requires_grad:  # all weights train: the backward pass computes logits again
        parts = [checkpoint(selected_logprobs, hidden[some], weight, rows.target[some], temperature,
                            use_reentrant=False)
                 for some in chunks(len(hidden), len(weight), hidden.device)]
        logprobs, entropies = zip(*parts)
        return torch.cat(logprobs), torch.cat(entropies)
    return SelectedLogprobs.apply(hidden, weight, rows.target, temperature)
