"""k drafts for each post. First the plain cached loop, the page to read; then samplers; then the
fast engine, which is tested against the plain loop token for token. Other ways to k drafts, such as
beams, are in decoders.py.

What the fast engine does otherwise, all of it for speed: a post is read once for its k drafts and
its keys and values are stored once (DraftBatch); blocks have fewer and larger products (Fused); a
finished post gives its place to a waiting one, and the batch shrinks when none wait (Decoder); on a
GPU a step is replayed as a CUDA graph. Each draft draws from its own stream of random numbers, so
it does not depend on what else is in the batch, nor on which of the two loops writes it."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps

import numpy as np
import torch
import torch.nn.functional as F

from data import InputError
from model import NF4, Parts, full_attention, rms_norm, rotary


@dataclass
class Samples:
    """tokens[prompt][draft] is a list of ids with the stop id kept; logprobs has the same shape,
    under the distribution sampled from; finished[prompt][draft] is False when max_new_tokens cut
    it off."""
    tokens: list
    logprobs: list
    finished: list


def dealt(write):
    """`write` (generate or generate_plain) for ensembles too: of each prompt's k drafts, draft d is
    member d mod M's, which writes its share as a model of its own; its seeds have one more part."""
    @wraps(write)
    def whole(model, prompts, *, k=1, seed=0, progress=None, **settings):
        seeds = list(seed) if hasattr(seed, "__len__") else [(seed, p) for p in range(len(prompts))]
        if model.deal is None or k < 1:
            return write(model, prompts, k=k, seed=seeds, progress=progress, **settings)
        out = Samples(*([[None] * k for _ in prompts] for _ in range(3)))
        for member in range(min(model.deal.members, k)):
            model.deal.of, own = member, range(member, k, model.deal.members)
            parts = [(*s, member) if isinstance(s, tuple) else (s, member) for s in seeds]
            part = write(model, prompts, k=len(own), seed=parts, **settings,
                         progress=None if member else progress)
            for field in ("tokens", "logprobs", "finished"):
                for row, drafts in zip(getattr(out, field), getattr(part, field)):
                    row[member::model.deal.members] = drafts
        model.deal.of = 0
        return out
    return whole


NOT_FINITE = ("the model's logits are not finite (NaN or infinity), so nothing can be sampled from "
              "them: training has diverged, or a number overflows: lower the learning rate, use an "
              "earlier checkpoint, or give --dtype float32")


# ---- The plain loop ------------------------------------------------------------------------------

class Reader:
    """A prompt (a list of ids) that `rows` drafts go on from, over a plain cache of keys and values
    that grows: `logits()` (rows, V) in fp32 of each row's next token, `read` gives the rows their
    tokens. Every decoder that goes token by token is built on it."""

    def __init__(self, model, prompt, rows):
        self.model, self.cache = model, {}   # layer -> (k, v), each (rows, T, KV, D)
        self.length = len(prompt)
        tokens = torch.tensor([prompt], device=model.device)
        self.hidden = model.hidden(tokens, attend=self.attend)[:, -1].expand(rows, -1)
        for layer, (k, v) in self.cache.items():  # one prefill, then a row for each draft
            self.cache[layer] = k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)

    def attend(self, layer, q, k, v, visible=full_attention()):  # q (rows, 1 or T, H, D)
        if layer in self.cache:
            k, v = (torch.cat((old, new), 1) for old, new in zip(self.cache[layer], (k, v)))
        self.cache[layer] = k, v
        if q.shape[1] == k.shape[1]:         # the prompt: causal
            return visible(layer, q, k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        # One query sees all keys: is_causal would align it to the top left and show it the first
        # alone.
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    def logits(self):
        logits = F.linear(self.hidden, self.model.head_weight()).float()       # (rows, V)
        if not bool(torch.isfinite(logits).all()):
            raise InputError(NOT_FINITE)
        return logits

    def read(self, tokens, parents=None):
        """One more token a row, tokens (rows,); parents (rows,): the row that each goes on from."""
        if parents is not None:
            self.cache = {layer: (k[parents], v[parents]) for layer, (k, v) in self.cache.items()}
        positions = torch.full((len(tokens), 1), self.length, device=tokens.device)
        self.hidden = self.model.hidden(tokens[:, None], positions, self.attend)[:, 0]
        self.length += 1


@torch.no_grad()
def plain_loop(model, prompt, rows, max_new_tokens, choose):
    """Write `rows` continuations of one prompt (a list of ids), the plain way: read the prompt
    once, then one token at a time over a growing cache of keys and values. Returns a list of
    id lists.

    choose(logits, step) -> (tokens (rows,), parents (rows,) or None) decides: logits (rows, V) fp32
    of the next token. parents says which row each new row goes on from, so that beams can be built
    on this; None is each its own. A token of -1 ends its row. The first call has equal rows."""
    reader, written = Reader(model, prompt, rows), [[] for _ in range(rows)]
    for step in range(max_new_tokens):
        chosen, parents = choose(reader.logits(), step)
        if parents is not None:
            written = [list(written[p]) for p in parents.tolist()]
        for row, token in zip(written, chosen.tolist()):
            if token >= 0:
                row.append(token)
        if bool((chosen < 0).all()):
            break
        reader.read(chosen.clamp(min=0), parents)
    return written


@dealt
def generate_plain(model, prompts, *, k=1, max_new_tokens, stop_ids=(), seed, progress=None,
                   **sampling):
    """What `generate` returns, by the plain loop: the reference, post by post."""
    out, sampling = Samples([], [], []), {"temperature": 1.0} | sampling
    for p, prompt in enumerate(prompts):
        noise = uniforms([seed[p]], k, max_new_tokens)[0].to(model.device)     # (k, length)
        logprobs, done = [[] for _ in range(k)], torch.zeros(k, dtype=torch.bool)

        def choose(logits, step):
            tokens, logp = sample(logits, noise[:, step], **sampling)
            for row in (~done).nonzero()[:, 0].tolist():
                logprobs[row].append(float(logp[row]))
            ended = done.clone()
            done.logical_or_(torch.tensor([t in stop_ids for t in tokens.tolist()]))
            return tokens.masked_fill(ended.to(tokens.device), -1), None
        out.tokens.append(plain_loop(model, prompt, k, max_new_tokens, choose))
        out.logprobs.append(logprobs)
        out.finished.append(done.tolist())
    return out


# ---- Samplers ------------------------------------------------------------------------------------

def inverse(mass, target):
    """The first index (R, 1) whose cumulative weight in mass (R, N) is above target (R, 1),
    whatever rounding did to that: never one of weight zero, which low-precision multinomials
    have hit."""
    target = target.clamp(min=0).minimum(mass[:, -1:] * (1 - 2 ** -50))
    index = torch.searchsorted(mass, target, right=True)
    return index.clamp_(max=mass.shape[-1] - 1)                                # of nan: the last


def draw(p, uniform, size=128):
    """Ids (R, 1) of weights p (R, V) and the weights' sums (R, 1): the inverse of the
    cumulative distribution, in float64, at uniform (R,) in [0, 1). Of a large vocabulary first
    the block of `size` ids is drawn and then the id in it: on a CPU 30 times faster than a
    cumulative sum of all."""
    sums = p
    if p.numel() > 2 ** 16 and p.shape[-1] >= size:
        whole = p.shape[-1] // size * size
        blocks = p[:, :whole].unflatten(-1, (-1, size)).sum(-1)
        sums = torch.cat((blocks, p[:, whole:].sum(-1, keepdim=True)), -1)
    mass = sums.double().cumsum(-1)
    target = uniform[:, None] * mass[:, -1:]
    index = inverse(mass, target)
    if sums is not p:
        ids = (index * size + torch.arange(size, device=p.device)).clamp_(max=p.shape[-1] - 1)
        inside = p.gather(1, ids).double().cumsum(-1)
        index = ids.gather(1, inverse(inside, target - (mass - sums).gather(1, index)))
    return index, mass[:, -1:]


def sample(logits, uniform, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """One token per row: ids and log-probs (R,), from fp32 logits (R, V) and uniform numbers (R,)
    in [0, 1). Temperature first, then top-k, top-p, min-p, each on what the former kept (Hugging
    Face's order); the log-prob is of the renormalised rest. Temperature 0 takes the largest logit;
    its log-prob is the model's own, at T = 1."""
    if temperature == 0:
        logp, token = logits.log_softmax(-1).max(-1)
        return token, logp
    p = (logits if temperature == 1 else logits / temperature).softmax(-1)
    if top_k:
        p = p.masked_fill(p < p.topk(min(top_k, p.shape[-1])).values[:, -1:], 0)
    if top_p < 1:
        ordered, index = (p / p.sum(-1, keepdim=True)).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered          # mass above this token; the first has 0
        ordered = ordered.masked_fill(before >= top_p, 0)
        p = torch.empty_like(p).scatter_(-1, index, ordered)
    if min_p:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    token, total = draw(p, uniform)
    return token.squeeze(-1), (p.gather(-1, token) / total).log().float().squeeze(-1)


def straight_through_loss(logp, target, noise, slope, heat):
    """-D (N,) by the straight-through Gumbel estimator (arXiv 1611.01144): BIASED, an ablation. D's
    slope at the one-hot vectors of the tokens `target` is slope (N, V). By uniform noise (N, V),
    log p + g are Gumbel scores, the largest the target's; their softmax at temperature `heat`, with
    g held, stands for the one-hot vector."""
    clocks, own = -noise.clamp(min=1e-20).log(), target[:, None]
    first = clocks.gather(1, own)                                  # exp(-score) of the target
    scores = -(clocks / logp.exp() + first).scatter(1, own, first).log()
    soft = ((logp + (scores - logp).detach()) / heat).softmax(-1)
    return -(soft * slope).sum(-1)


def uniforms(seeds, k, length):
    """(prompts, k, length) float64 numbers in [0, 1): draft d of a prompt with seed s reads the
    stream of (s, d), whatever rank or batch it is in. SplitMix64 (Steele, Lea and Flood 2014):
    number t of a stream is a hash of its start + t times the golden ratio's bits, so that all are
    made at once."""
    def mix(z):
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return z ^ z >> np.uint64(31)

    golden, start = np.uint64(0x9E3779B97F4A7C15), np.zeros(len(seeds), np.uint64)
    parts = [s if isinstance(s, (tuple, list)) else (s,) for s in seeds]
    for column in zip(*parts, strict=True):            # every seed has as many parts
        bits = np.array([int(x) % 2 ** 64 for x in column], np.uint64)
        start = mix(start + golden ^ bits)
    start = mix(start[:, None] + golden ^ np.arange(k, dtype=np.uint64))
    bits = mix(start[..., None] + golden * np.arange(1, length + 1, dtype=np.uint64))
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0 ** -53)


# ---- The fast engine: blocks with fewer and larger products --------------------------------------

def linear(x, weight):
    """x W^T without gradient. On a CPU large fp32 products go to oneDNN, 1.4 to 2.9 times faster
    than the BLAS behind F.linear (AMD EPYC, 2 threads, 1 to 256 rows)."""
    large = x.numel() * len(weight) >= 2 ** 21         # below, oneDNN's set-up costs what it gains
    cpu = x.dtype == torch.float32 and x.device.type == "cpu"
    if large and cpu and hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # a private name
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def joined(weights):
    """Weights (out_i, in) as one (sum of out_i, in) tensor; they become its views: nothing is
    stored twice."""
    starts, ends = [w.data_ptr() for w in weights], [w.data_ptr() + w.nbytes for w in weights]
    if starts[1:] != ends[:-1] or len({w.untyped_storage().data_ptr() for w in weights}) > 1:
        whole = torch.cat([w.data for w in weights])
        for weight, part in zip(weights, whole.split([len(w) for w in weights])):
            weight.data = part
    shape = sum(map(len, weights)), weights[0].shape[1]
    return weights[0].data.as_strided(shape, (shape[1], 1))


def parts_of(layer, dtype):
    """What a linear layer is made of (model.Parts), as it says itself; a plain one is its weight.
    None: it cannot be taken apart, and is called as it is."""
    if hasattr(layer, "decoding_parts"):
        return layer.decoding_parts(dtype)
    return Parts(layer.weight)


class Product:
    """Linear layers that read the same input, as one matrix product: (.., in) -> (.., sum of outs).
    Low-rank updates stay beside it, all A as one product and all B as one block-diagonal: added to
    W they would be rounded in bf16."""

    def __init__(self, layers, dtype):
        self.layers, self.tensors = layers, []
        self.scale = 1.0
        parts = [parts_of(layer, dtype) for layer in layers]
        self.whole = any(p is None for p in parts)     # call the layers one by one
        if self.whole:
            return
        self.nf4 = [p.weight for p in parts if isinstance(p.weight, NF4)]
        self.weight = None if self.nf4 else joined([p.weight for p in parts])
        low = [p for p in parts if p.A is not None]
        if low:
            A = torch.cat([p.A for p in low])                                  # (sum of r, in)
            empty = A.new_empty
            B = torch.block_diag(*[p.B if p.A is not None else empty(p.weight.shape[0], 0)
                                   for p in parts])                    # (sum of out, sum of r)
            self.tensors, self.scale = [A, B.t()], low[0].scale
        if any(p.gain is not None for p in parts):
            ones = lambda p: torch.ones(p.weight.shape[0], device=layers[0].weight.device)
            gain = torch.cat([ones(p) if p.gain is None else p.gain for p in parts])
            self.tensors = [*(self.tensors or [None, None]), gain.to(dtype)]

    def key(self):
        """What a recorded step takes for granted of it."""
        if self.whole:
            return [id(layer) for layer in self.layers]
        places = [w.codes.data_ptr() for w in self.nf4] or [self.weight.data_ptr()]
        return places, self.scale, [None if t is None else t.shape for t in self.tensors]

    def __call__(self, x):
        if self.whole:
            return torch.cat([layer(x) for layer in self.layers], -1)
        y = torch.cat([w(x) for w in self.nf4], -1) if self.nf4 else linear(x, self.weight)
        if not self.tensors:
            return y
        A, B, *gain = self.tensors
        if A is not None:
            y.flatten(0, -2).addmm_(linear(x, A).flatten(0, -2), B, alpha=self.scale)
        return y * gain[0] if gain else y


class Fused:
    """The blocks for decoding, without gradient: one product for q, k and v, one for gate and
    up; q and k normed and rotated together. A step has few rows: the number of operations
    decides its time."""

    def __init__(self, model, length):
        self.config, self.blocks = model.config, []
        c = model.config
        positions = torch.arange(length, device=model.device)
        cos, sin = rotary(positions, c.head_dim, c.rope_theta, model.dtype)
        self.rope = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)      # (length, 1, D) each
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            products = [Product(layers, model.dtype) for layers in (
                (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
                (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,))]
            norms = (block.input_layernorm, attention.q_norm, attention.k_norm,
                     block.post_attention_layernorm)
            self.blocks.append((*norms, *products))

    def products(self):
        return [product for block in self.blocks for product in block[4:]]

    def tensors(self):
        """What was computed from adapters: to be refreshed before each rollout."""
        return [t for p in self.products() for t in p.tensors if t is not None]

    def key(self):
        """What a recorded step took for granted of the weights."""
        return [p.key() for p in self.products()]

    def __call__(self, x, positions, attend):
        """x (B, T, hidden) after the last block, before the final norm."""
        c = self.config
        heads, kv = c.num_attention_heads, c.num_key_value_heads
        # Idle drafts age on, beyond the table.
        cos, sin = (table[positions.clamp(max=len(table) - 1)] for table in self.rope)
        for i, (norm, q_norm, k_norm, mlp_norm, qkv, out, gate_up, down) in enumerate(self.blocks):
            qkv = qkv(norm(x)).unflatten(-1, (-1, c.head_dim))                 # (B, T, H + 2 KV, D)
            weight = torch.cat((q_norm.weight.expand(heads, -1), k_norm.weight.expand(kv, -1)))
            qk = rms_norm(qkv[..., :heads + kv, :], weight, c.rms_norm_eps)
            qk = qk * cos + qk.roll(c.head_dim // 2, -1) * sin                 # both halves at once
            q, k = qk[..., :heads, :], qk[..., heads:, :]
            v = qkv[..., heads + kv:, :]
            x = x + out(attend(i, q, k, v).flatten(2))
            gate, up = gate_up(mlp_norm(x)).chunk(2, -1)
            x = x + down(F.silu(gate) * up)
        return x


# ---- The fast engine: the batch of drafts and its cache ------------------------------------------

class DraftBatch:
    """A batch of drafts on the device: P places for posts, k drafts each; called as `attend`, it is
    the cache of keys and values (with M columns of each draft's own):

        place 0   post post post post  | draft 0:  5 6 . 3 4      the ring: step s of the batch
                                       | draft 1:  5 6 . 3 4      writes column s mod M of every row
        place 1   post post            | draft 0:  . 6 . . .      it entered one step ago, and sees
                                       | draft 1:  . 6 . . .      the newest column alone

    A post's keys and values are stored once, (P, KV, L, D), and shared by its k drafts; the drafts'
    own are a ring (P, KV, k, M, D). A post that entered `age` steps ago sees the last `age`
    columns, so a newcomer takes a finished post's place without moving anything: softmax does not
    mind the order of columns, and rotary positions are in k already.

    What was written lies in tables with a line for each draft that the batch began with, whose last
    column is a waste bin for idle places; `slot` says which line a row writes. All state is tensors
    that stay where they are, a smaller batch a prefix of the same memory; `step` reads nothing of
    the host: one CUDA graph serves for `window` columns of the ring."""

    def __init__(self, model, places, k, prompt_length, length, sampling, stop_ids, window=1,
                 graphs=False):
        c, new = model.config, dict(device=model.device)
        self.model, self.sampling = model, sampling
        self.window = window
        self.ring = length                   # M: the longest draft
        self.graphs = graphs                 # replay steps as CUDA graphs?
        self.pool, self.captured = None, {}  # the graphs' memory; (shape, columns) -> graph
        self.slot = None
        self.fused = None if model.lockstep else Fused(model, prompt_length + length)
        layers, kv = c.num_hidden_layers, c.num_key_value_heads
        self.prompt_cache = torch.zeros(layers, 2, places, kv, prompt_length, c.head_dim, **new,
                                        dtype=model.dtype)
        self.own_cache = torch.zeros(layers, 2, places * kv * k * length * c.head_dim, **new,
                                     dtype=model.dtype)
        self.columns = torch.arange(max(prompt_length, length), **new)
        self.clock = torch.zeros(1, dtype=torch.long, **new)
        self.stops = torch.tensor(sorted(stop_ids), dtype=torch.long, **new)
        rows = places * k
        self.tokens = torch.zeros(rows, length + 1, dtype=torch.long, **new)
        self.noise = torch.zeros(rows, length + 1, dtype=torch.float64, **new)
        self.logprobs = torch.zeros(rows, length + 1, **new)
        self.stopped = torch.zeros(rows, dtype=torch.bool, **new)
        self.all_places = torch.zeros(2, places, dtype=torch.long, **new)
        self.all_rows = torch.zeros(2, rows, dtype=torch.long, **new)
        self.restart(places, k)

    def restart(self, places, k):
        """An empty batch of that many places, at most as many as it was made for."""
        self.steps = 0
        self.clock.zero_()
        self.resize(places, k)
        torch.arange(places * k, out=self.slot.view(-1))

    def clear(self):
        """Forget what earlier rollouts wrote. A masked column weighs 0, but 0 * NaN is NaN: one NaN
        that stayed in the caches would spoil every later rollout."""
        for cache in (self.prompt_cache, self.own_cache, self.logprobs):
            cache.zero_()

    def resize(self, places, k):
        """Take the first of the memory for `places` posts of k drafts."""
        self.lengths, self.age = self.all_places[:, :places]   # of the post; steps since it entered
        self.slot, self.newest = self.all_rows[:, :places * k].view(2, places, k)
        _, _, _, kv, _, dim = self.prompt_cache.shape
        own = self.own_cache[..., :places * kv * k * self.ring * dim]
        own = own.view(-1, 2, places, kv, k, self.ring, dim)
        self.caches = [(*p[:, :places], *o) for p, o in zip(self.prompt_cache, own)]

    def hidden(self, tokens, positions, attend):
        if self.fused is None:               # the weights are spread over ranks
            return self.model.hidden(tokens, positions, attend)
        backbone = self.model.model
        return backbone.norm(self.fused(backbone.embed_tokens(tokens), positions, attend))

    def prefill_posts(self, places, prompts, noise):
        """Posts `prompts` (id lists) take the places `places` (a list): one prefill for the k
        drafts of each, whose first tokens come from its last logits. noise (posts, k, length)
        of `uniforms`."""
        device, longest = self.clock.device, max(map(len, prompts))
        tokens = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        places = torch.tensor(places, device=device)
        slots = self.slot[places].flatten()
        self.noise[slots, :noise.shape[-1]] = noise.flatten(0, 1).to(device)
        self.stopped[slots] = False
        self.lengths[places], self.age[places] = lengths, 0
        size = max(1, 2 ** 14 // longest)    # prefills batch well, to a limit
        for some in (slice(i, i + size) for i in range(0, len(prompts), size)):
            self.prefill(tokens[some], lengths[some], places[some])

    def prefill(self, tokens, lengths, places):
        """Read posts (n, T) of the given lengths (n,) into the places (n,); sample the first token
        of each draft."""
        def attend(layer, q, k, v, causal=full_attention()):
            for cache, new in zip(self.caches[layer], (k, v)):
                cache[places, :, :tokens.shape[1]] = new.transpose(1, 2)
            return causal(layer, q, k, v)
        hidden = self.hidden(tokens, self.columns[None, :tokens.shape[1]], attend)
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        logits = linear(last, self.model.head_weight()).float()                # (n, V)
        self.record(logits[:, None].expand(-1, self.slot.shape[1], -1), places)

    def record(self, logits, rows):
        """Sample one token for each draft of the places `rows` from logits (rows, k, V),
        note it."""
        slot, age = self.slot[rows], self.age[rows, None]
        line = (slot, age.clamp(max=self.ring).expand_as(slot))
        noise = self.noise[line].flatten()
        token, logprob = sample(logits.flatten(0, 1), noise, **self.sampling)
        token = token.view_as(slot)
        self.tokens[line], self.logprobs[line] = token, logprob.view_as(slot)
        self.newest[rows] = token
        self.stopped[slot] |= (token[..., None] == self.stops).any(-1) & (age < self.ring)

    def step(self):
        """Write one more token of every draft."""
        prompt = self.columns[:self.prompt_cache.shape[-2]] < self.lengths[:, None]
        own = (self.clock - self.columns[:self.used]) % self.ring <= self.age[:, None]
        unseen = ~torch.cat((prompt, own), 1)                                  # (P, L + used)
        bias = torch.zeros(unseen.shape, device=unseen.device).masked_fill_(unseen, -math.inf)
        attend = partial(self, bias[:, None, None, None], self.clock % self.ring)
        positions = (self.lengths + self.age)[:, None].expand_as(self.newest).reshape(-1, 1)
        hidden = self.hidden(self.newest.reshape(-1, 1), positions, attend)[:, 0]
        self.clock.add_(1)
        self.age.add_(1)
        logits = linear(hidden, self.model.head_weight()).float()              # (P k, V)
        self.record(logits.view(*self.slot.shape, -1), slice(None))

    def __call__(self, bias, column, layer, q, k, v):
        """Attention of one new token per draft over [the post's cache, the draft's own], to which
        bias (P, 1, 1, 1, L + used) says who sees what and column (1,) where the new k and v go. q
        (P k, 1, H, D), k and v (P k, 1, KV, D)."""
        prompt_k, prompt_v, own_k, own_v = self.caches[layer]
        places, kv, drafts, _, dim = own_k.shape
        for cache, new in ((own_k, k), (own_v, v)):
            new = new.view(places, drafts, kv, 1, dim).transpose(1, 2)
            cache.index_copy_(3, column, new)
        own_k, own_v = own_k[..., :self.used, :], own_v[..., :self.used, :]
        q = q.view(places, drafts, kv, -1, dim).transpose(1, 2).contiguous()   # (P, KV, k, G, D)
        shared = q.flatten(2, 3) @ prompt_k.transpose(-1, -2)  # all drafts against the one copy
        own = q @ own_k.transpose(-1, -2)
        scores = torch.cat((shared.unflatten(2, q.shape[2:4]), own), -1)
        p = torch.add(bias, scores, alpha=dim ** -0.5).softmax(-1).to(q.dtype)
        shared, own = p.split((prompt_k.shape[2], self.used), -1)
        out = (shared.flatten(2, 3) @ prompt_v).unflatten(2, q.shape[2:4]) + own @ own_v
        return out.transpose(1, 2).reshape(places * drafts, 1, -1, dim)

    def advance(self):
        """One step, replayed as a CUDA graph from the second time in a shape on."""
        self.steps += 1
        self.used = min(self.ring, math.ceil(self.steps / self.window) * self.window)
        shape = (*self.slot.shape, self.used)
        if shape in self.captured:
            self.captured[shape].replay()
            return
        self.step()                          # the first time kernels are loaded
        if self.graphs:
            self.captured[shape] = self.capture()

    def capture(self):
        """A CUDA graph of `step`: it notes the kernels and runs none."""
        graph = torch.cuda.CUDAGraph()
        try:                                 # other threads (NCCL's) may go on meanwhile
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.step()
        except RuntimeError as e:
            raise InputError(f"the decoding step could not be made a CUDA graph ({e}): add "
                             "--no-graphs") from e
        self.pool = graph.pool()             # one memory pool for all of them
        return graph

    def shrink(self, places, drafts):
        """Go on with the given places (P',) alone and, in each, the given drafts (P', k')."""
        old = self.caches
        rows = [table[places].gather(1, drafts) for table in (self.slot, self.newest)]
        now = (self.lengths[places], self.age[places], *rows)
        own = drafts[:, None, :, None, None]
        own = own.expand(-1, old[0][2].shape[1], -1, *old[0][2].shape[3:])
        self.resize(*drafts.shape)
        for mine, new in zip((self.lengths, self.age, self.slot, self.newest), now):
            mine.copy_(new)
        for before, after in zip(old, self.caches):
            for i, cache in enumerate(before):
                kept = cache[places]
                after[i].copy_(kept if i < 2 else kept.gather(2, own))


class Decoder:
    """Who is written where: the prompts that wait, the places that are idle, what is finished."""

    def __init__(self, batch, prompts, k, length, seeds):
        self.batch, self.prompts = batch, prompts
        self.seeds = seeds
        self.k, self.length = k, length
        places = len(batch.slot)
        self.waiting, self.idle = list(range(len(prompts))), list(range(places))
        self.post = [None] * places          # the prompt of a place
        self.block = list(range(places))     # the part of the tables that a place writes
        # Tokens each place may still write: on the host, so nobody waits for it.
        self.tokens_left = [math.inf] * places
        self.written = [None] * len(prompts)  # (tokens, logprobs), each (k, length)

    def refill(self):
        """Idle places take the next prompts; returns how many."""
        count = min(len(self.idle), len(self.waiting))
        places, self.idle = self.idle[:count], self.idle[count:]
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        noise = uniforms([self.seeds[p] for p in taken], self.k, self.length)
        self.batch.prefill_posts(places, [self.prompts[p] for p in taken], noise)
        for place, post in zip(places, taken):
            self.post[place], self.tokens_left[place] = post, self.length - 1
        return count

    def advance(self):
        self.batch.advance()
        self.tokens_left = [n - 1 for n in self.tokens_left]

    def collect_finished(self):
        """Read the places whose drafts are all finished; with nobody waiting, shrink to the others.
        -> does anybody write?"""
        batch, left = self.batch, np.array(self.tokens_left)
        writing = ~batch.stopped[batch.slot].cpu().numpy() & (left > 0)[:, None]     # (P, k)
        writing[self.idle] = False
        done = (~writing.any(1)).nonzero()[0].tolist()
        finished = [p for p in done if left[p] < math.inf]
        self.read(finished)
        self.idle = sorted(self.idle + finished)
        for place in self.idle:              # never due for a look
            self.tokens_left[place] = math.inf
        rows, widest = writing.any(1).nonzero()[0].tolist(), int(writing.sum(1).max())
        if not self.waiting and 0 < 2 * len(rows) * widest <= writing.size:
            # Rows stay rectangular: the unfinished drafts of each post first.
            order = np.argsort(~writing[rows], axis=1, kind="stable")[:, :widest]
            self.tokens_left = [self.tokens_left[i] for i in rows]
            self.post = [self.post[i] for i in rows]
            self.block = [self.block[i] for i in rows]
            self.idle = []
            device = batch.clock.device
            batch.shrink(*(torch.as_tensor(x, device=device) for x in (rows, order)))
        return bool(rows)

    def read(self, places):
        """Copy the tables' lines of finished places to the host. Non-finite logits give a
        log-probability of NaN: they are noticed here, where the host waits anyway."""
        if not places:
            return
        lines = [self.block[p] * self.k + i for p in places for i in range(self.k)]
        lines = torch.tensor(lines, device=self.batch.clock.device)
        tables = [t[lines, :self.length].cpu().view(len(places), self.k, -1)
                  for t in (self.batch.tokens, self.batch.logprobs)]
        if bool(tables[1].isnan().any()):
            raise InputError(NOT_FINITE)
        for place, *both in zip(places, *tables):
            self.written[self.post[place]] = both

    def samples(self, stop_ids):
        """Cut each draft after its first stop id: a generated one, since a prompt may hold
        stop ids."""
        stops, out = set(stop_ids), Samples([], [], [])
        for drafts, logprobs in ((t.tolist(), p.tolist()) for t, p in self.written):
            ends = [next((i + 1 for i, t in enumerate(d) if t in stops), self.length)
                    for d in drafts]
            out.tokens.append([d[:e] for d, e in zip(drafts, ends)])
            out.logprobs.append([p[:e] for p, e in zip(logprobs, ends)])
            out.finished.append([d[e - 1] in stops for d, e in zip(drafts, ends)])
        return out


def batch_for(model, places, k, prompt_length, length, sampling, stop_ids):
    """A DraftBatch for this work. With CUDA graphs the last one is kept with the model: any that is
    large enough serves, and one that is too small gives way to one that covers both."""
    graphs = model.device.type == "cuda" if model.graphs is None else model.graphs
    if model.lockstep or not graphs:
        return DraftBatch(model, places, k, prompt_length, length, sampling, stop_ids)
    rules = k, sampling, tuple(stop_ids), model.vocab
    sizes, kept = (places, prompt_length, length), model.kept_batch
    if kept is not None and kept.rules == rules:
        fused = Fused(model, 0)
        if kept.fused.key() == fused.key() and all(a >= b for a, b in zip(kept.sizes, sizes)):
            for old, new in zip(kept.fused.tensors(), fused.tensors()):
                old.copy_(new)               # adapters have trained since
            kept.clear()
            kept.restart(places, k)
            return kept
        sizes = tuple(map(max, kept.sizes, sizes))
    model.kept_batch = kept = None           # first free, then allocate
    places_made, prompt_length, length = sizes
    prompt_length = math.ceil(prompt_length / 64) * 64
    batch = DraftBatch(model, places_made, k, prompt_length, length, sampling, stop_ids, window=64,
                       graphs=True)
    batch.rules, batch.sizes = rules, (places_made, prompt_length, length)
    batch.restart(places, k)
    model.kept_batch = batch
    return batch


@dealt
@torch.no_grad()
def generate(model, prompts, *, k=1, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
             stop_ids=(), seed=0, max_rows=256, look_every=None, progress=None):
    """k drafts for each prompt (a list of ids) -> Samples.

    At most `max_rows` drafts are written at a time: while prompts wait, one takes the place of each
    whose k drafts are finished; when none wait, the batch shrinks to what is unfinished. `seed`: an
    int (prompt p then draws from (seed, p)) or one int or tuple per prompt; draft d of a prompt
    with seed s depends on (s, d) alone. Finished drafts are looked for every `look_every` tokens:
    by default 1 on a CPU, 16 on a GPU, where looking waits for the device. `progress(n)` is told of
    the n prompts that have been taken up. InputError for what cannot be generated."""
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    check_generation(model, prompts, k, max_new_tokens, **sampling)
    if not prompts:
        return Samples([], [], [])
    look_every = look_every or (16 if model.device.type == "cuda" else 1)
    places = max(1, min(len(prompts), max_rows // k))
    batch = batch_for(model, places, k, max(map(len, prompts)), max_new_tokens, sampling, stop_ids)
    decoder, writing = Decoder(batch, prompts, k, max_new_tokens, seed), True
    step = 0
    # Operations cost less in inference mode; FSDP does not work in it.
    with nullcontext() if model.lockstep else torch.inference_mode():
        while writing or decoder.waiting:
            if decoder.waiting and len(decoder.idle) >= max(1, places // 4):  # prefills batch well
                taken, writing = decoder.refill(), True
                if progress:
                    progress(taken)
            elif writing:
                decoder.advance()
            step += 1
            if stop_ids and step % look_every == 0 or min(decoder.tokens_left) <= 0:
                writing = decoder.collect_finished()
    if model.lockstep:
        model.lockstep.wait()
    return decoder.samples(stop_ids)


def check_generation(model, prompts, k, max_new_tokens, temperature, top_k, top_p, min_p):
    ids_known = all(max(p) < model.vocab for p in prompts if len(p))
    for good, what in (
            (k >= 1, f"k is {k}: at least one draft"),
            (temperature >= 0, f"temperature is {temperature}: 0 or more"),
            (max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}: at least 1"),
            (0 < top_p <= 1, f"top_p is {top_p}: above 0, at most 1"),
            (top_k >= 0, f"top_k is {top_k}: 0 or more"),
            (0 <= min_p < 1, f"min_p is {min_p}: 0 or more, below 1"),
            (all(len(p) for p in prompts), "a prompt is empty: give at least one token"),
            (ids_known, "a prompt holds a token id that the model lacks")):
        if not good:
            raise InputError(f"generate: {what}")


SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def sampling_of(args):
    """The flags of sampling that a command has, as arguments of `generate`."""
    return {name: getattr(args, name) for name in SAMPLING if hasattr(args, name)}
