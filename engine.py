"""The same sampling as generate.py's plain loop, fast, and tested equal to it, token for token.

A prompt is read once for its k completions and its keys and values are stored once (DecodeBatch);
blocks have fewer and larger products and fewer kernels (FusedBlocks, Pointwise); a finished
completion gives its slot to a waiting one, and the batch shrinks when none wait (Scheduler); on a
GPU a step is replayed as a CUDA graph. Each completion has random numbers of its own and does not
depend on what else is in the batch."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from generate import NOT_FINITE, Samples, over_members, sample
from lora import Parts
from model import full_attention, rms_norm, rotary
from support.compiled import one_kernel
from support.draws import uniforms
from support.files import InputError
from support.layouts import Layout, first_layout, fitting, smaller
from support.packing import rounded_up
from support.products import logits_of, scores_of


# ---- The fast engine: blocks with fewer and larger products --------------------------------------

def linear(x, weight, bias=None):
    """x W^T + b without gradient. On a CPU large fp32 products go to oneDNN, 1.4 to 2.9 times
    faster than the BLAS behind F.linear (AMD EPYC, 2 threads, 1 to 256 rows)."""
    large = x.numel() * len(weight) >= 2 ** 21         # below, oneDNN's set-up costs what it gains
    cpu = x.dtype == torch.float32 and x.device.type == "cpu"
    if large and cpu and hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # a private name
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def joined(weights, spare=0):
    """Weights (out_i, in) as one tensor (sum of out_i + spare, in), its last `spare` rows free for
    the caller. They become views of it: nothing is stored twice. Weights that already lie one after
    the other in one storage stay where they are, so that a second call gives the same tensor."""
    sizes = [len(w) for w in weights]
    rows = sum(sizes) + spare
    columns = weights[0].shape[1]
    if not adjacent(weights) or spare_rows(weights) < spare:
        parts = [w.data for w in weights]
        whole = torch.cat([*parts, parts[0].new_zeros(spare, columns)])
        whole.untyped_storage().spare_rows = spare
        for weight, part in zip(weights, whole.split([*sizes, spare])):
            weight.data = part
    return weights[0].data.as_strided((rows, columns), (columns, 1))


def spare_rows(weights):
    """Free rows behind adjacent weights. Only `joined` marks a storage: behind other weights a
    checkpoint's next ones may lie."""
    return getattr(weights[0].untyped_storage(), "spare_rows", 0)


def adjacent(weights):
    """Do the tensors follow one another in one storage?"""
    for first, second in zip(weights, weights[1:]):
        same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        if not same or second.data_ptr() != first.data_ptr() + first.nbytes:
            return False
    return True


def decoding_parts_of(layer, dtype):
    """The Parts of a linear layer: as it says itself; a plain one is its weight and bias. None if
    the layer cannot be fused; it is then called directly."""
    if hasattr(layer, "decoding_parts"):
        return layer.decoding_parts(dtype)
    return Parts(layer.weight, bias=layer.bias)


class FusedLinear:
    """Linear layers that read the same input, as one matrix product: (.., in) -> (.., sum of outs).
    Low-rank updates are products of their own, all A as one and all B as one block-diagonal: added
    to W they would be rounded in bf16. `extend`: A lies behind W, and one product reads both; a
    kernel less on a GPU."""

    def __init__(self, layers, dtype, extend=False):
        self.layers = layers
        self.scale = 1.0
        self.A = None                                  # (sum of r, in)
        self.B = None                                  # (sum of r, sum of outs)
        self.gain = None                               # (sum of outs,)
        self.bias = None                               # (rows of W and of A behind it,)
        self.shift = None                              # (sum of outs,): bias (1 - gain)
        self.tensors = []                              # those of `made` that are there
        parts = [decoding_parts_of(layer, dtype) for layer in layers]
        self.whole = any(p is None for p in parts)     # call the layers one by one
        if self.whole:
            return
        self.nf4 = [p.weight for p in parts if getattr(p.weight, "quantised", False)]
        self.extended = extend and not self.nf4 and any(p.A is not None for p in parts)
        self.rows = sum(p.weight.shape[0] for p in parts)
        self.fuse_updates(parts)
        self.fuse_gains(parts, dtype)
        self.fuse_weights(parts)
        self.fuse_biases(parts)
        self.tensors = [t for t in self.made() if t is not None]

    def made(self):
        """What is computed from the layers' tensors, and not a view of them; None where it is not
        there."""
        return self.A, self.B, self.gain, self.bias, self.shift

    def fuse_updates(self, parts):
        low_rank = [p for p in parts if p.A is not None]
        if not low_rank:
            return
        self.scale = low_rank[0].scale
        self.A = torch.cat([p.A for p in low_rank])
        blocks = []
        for part in parts:
            without = self.A.new_empty(part.weight.shape[0], 0)
            blocks.append(without if part.A is None else part.B)
        self.B = torch.block_diag(*blocks).t()

    def fuse_gains(self, parts, dtype):
        if all(p.gain is None for p in parts):
            return
        device = self.layers[0].weight.device
        gains = []
        for part in parts:
            ones = torch.ones(part.weight.shape[0], device=device)
            gains.append(ones if part.gain is None else part.gain)
        self.gain = torch.cat(gains).to(dtype)

    def fuse_weights(self, parts):
        self.weight = None
        if self.nf4:
            return
        spare = rounded_up(len(self.A), 8) if self.extended else 0  # rows of y stay aligned
        self.weight = joined([p.weight for p in parts], spare)
        if self.extended:
            behind = self.weight[self.rows:self.rows + len(self.A)]
            self.A = behind.copy_(self.A)

    def fuse_biases(self, parts):
        """Biases are added in the product with W, before the gain, which is not for them: `shift`
        makes up for it."""
        known = [p.bias for p in parts if p.bias is not None]
        if not known:
            return
        biases = []
        for part in parts:
            zeros = known[0].new_zeros(part.weight.shape[0])
            biases.append(zeros if part.bias is None else part.bias)
        whole = torch.cat(biases).detach()
        if self.gain is not None:
            self.shift = whole * (1 - self.gain)
        if not self.nf4:
            self.bias = F.pad(whole, (0, len(self.weight) - self.rows))

    def key(self):
        """What a captured graph takes for granted of it."""
        if self.whole:
            return [id(layer) for layer in self.layers]
        weights = [w.codes.data_ptr() for w in self.nf4] or [self.weight.data_ptr()]
        shapes = [None if t is None else t.shape for t in self.made()]
        return weights, self.scale, shapes

    def __call__(self, x):
        if self.whole:
            return torch.cat([layer(x) for layer in self.layers], -1)
        if self.nf4:
            y = torch.cat([w(x) for w in self.nf4], -1)
        else:
            y = linear(x, self.weight, self.bias)
        if self.A is not None:
            low = y[..., self.rows:self.rows + len(self.A)] if self.extended else linear(x, self.A)
            y = y[..., :self.rows]
            y.flatten(0, -2).addmm_(low.flatten(0, -2), self.B, alpha=self.scale)
        if self.gain is not None:
            y = y * self.gain
        return y if self.shift is None else y + self.shift


# ---- The fast engine: element-wise parts ---------------------------------------------------------

def add_norm(x, y, weight, eps):
    """x + y, and its norm."""
    x = x + y
    return x, rms_norm(x, weight, eps)


def norm_and_rotate(heads, weight, cos, sin, eps):
    """Queries and keys (B, T, heads, D): normalised by weight (heads, D), then rotated."""
    x = rms_norm(heads, weight, eps)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def attention_weights(bias, shared, own, scale, dtype):
    """The softmax over scores of the prompts' columns and of a completion's own, (.., L + M)."""
    scores = torch.cat((shared, own), -1)
    return torch.add(bias, scores, alpha=scale).softmax(-1).to(dtype)


def add_heads(shared, own):
    """shared + own (P, KV, k, G, D) as (P k, 1, H, D)."""
    places, kv, count, group, dim = own.shape
    return (shared + own).transpose(1, 2).reshape(places * count, 1, kv * group, dim)


class Pointwise:
    """The element-wise parts of a block, one kernel each where Triton is there to compile them; as
    they are written with --no-graphs."""

    def __init__(self, model):
        def kernel(function):
            return function if model.graphs is False else one_kernel(function, model.device)
        self.add_norm = kernel(add_norm)
        self.norm_and_rotate = kernel(norm_and_rotate)
        self.swiglu = kernel(swiglu)
        self.attention_weights = kernel(attention_weights)
        self.add_heads = kernel(add_heads)


@dataclass
class FusedBlock:
    """A transformer block for decoding: its norms and its four products."""
    norm: object
    qk_weight: torch.Tensor                  # (H + KV, D): the weights of q's and of k's norm
    mlp_norm: object
    qkv: FusedLinear
    out: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear

    @classmethod
    def of(cls, block, model, extend):
        dtype = model.dtype
        config = model.config
        attention = block.self_attn
        mlp = block.mlp
        qk_weight = torch.cat((
            attention.q_norm.weight.detach().expand(config.num_attention_heads, -1),
            attention.k_norm.weight.detach().expand(config.num_key_value_heads, -1)))
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        return cls(block.input_layernorm, qk_weight, block.post_attention_layernorm,
                   FusedLinear((q, k, v), dtype, extend),
                   FusedLinear((attention.o_proj,), dtype, extend),
                   FusedLinear((mlp.gate_proj, mlp.up_proj), dtype, extend),
                   FusedLinear((mlp.down_proj,), dtype, extend))

    def products(self):
        return [self.qkv, self.out, self.gate_up, self.down]


class FusedBlocks:
    """The blocks for decoding, without gradient: one product for q, k and v, one for gate and up; q
    and k are normalised and rotated together. A step has few rows: the number of operations decides
    its time. `extend`: see FusedLinear; by default on a GPU."""

    def __init__(self, model, length, extend=None):
        self.config = model.config
        extend = model.device.type == "cuda" if extend is None else extend
        self.pointwise = Pointwise(model)
        positions = torch.arange(length, device=model.device)
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta, model.dtype)
        self.cos = torch.cat((cos, cos), -1)                                   # (length, 1, D)
        self.sin = torch.cat((-sin, sin), -1)                                  # (length, 1, D)
        self.blocks = [FusedBlock.of(block, model, extend) for block in model.model.layers]

    def products(self):
        found = []
        for block in self.blocks:
            found.extend(block.products())
        return found

    def tensors(self):
        """What was computed from weights that may train: to be refreshed before each rollout."""
        found = []
        for block in self.blocks:
            found.append(block.qk_weight)
            for product in block.products():
                found.extend(product.tensors)
        return found

    def key(self):
        """What a captured graph takes for granted of the weights."""
        return [product.key() for product in self.products()]

    def __call__(self, x, positions, attend):
        """x (B, T, hidden) after the last block, before the final norm."""
        # Positions of idle rows run on, beyond the table.
        positions = positions.clamp(max=len(self.cos) - 1)
        cos = self.cos[positions]
        sin = self.sin[positions]
        add = self.pointwise.add_norm
        first = self.blocks[0].norm
        normed = rms_norm(x, first.weight, first.eps)
        for layer, block in enumerate(self.blocks):
            q, k, v = self.heads(block, block.qkv(normed), cos, sin)
            attended = block.out(attend(layer, q, k, v).flatten(2))
            x, normed = add(x, attended, block.mlp_norm.weight, block.mlp_norm.eps)
            y = block.down(self.pointwise.swiglu(block.gate_up(normed)))
            if block is self.blocks[-1]:
                return x + y
            following = self.blocks[layer + 1].norm
            x, normed = add(x, y, following.weight, following.eps)

    def heads(self, block, qkv, cos, sin):
        """q (B, T, H, D), k and v (B, T, KV, D); q and k normalised and rotated."""
        c = self.config
        heads = c.num_attention_heads
        both = heads + c.num_key_value_heads
        qkv = qkv.unflatten(-1, (-1, c.head_dim))                              # (B, T, H + 2 KV, D)
        qk = self.pointwise.norm_and_rotate(qkv[..., :both, :], block.qk_weight, cos, sin,
                                            c.rms_norm_eps)
        return qk[..., :heads, :], qk[..., heads:, :], qkv[..., both:, :]


# ---- The fast engine: the batch of completions and its cache -------------------------------------

class DecodeBatch:
    """A batch of completions on the device: P places of w slots, one completion each. Called as
    `attend`, it is the cache of keys and values (with M columns of each completion's own):

        place 0   prompt prompt prompt | slot 0:  5 6 . 3 4       the ring: step s of the batch
                                       | slot 1:  5 6 . 3 4       writes column s mod M of every row
        place 1   prompt prompt        | slot 0:  . 6 . . .       it entered one step ago, and sees
                                       | slot 1:  5 6 . 3 4       the newest column only

    A prompt's keys and values are stored once, for all its completions, in a page of its place's
    strip: H prompts take turns in its columns, (P, KV, L H, D). The completions' own are a ring
    (P, KV, w, M, D). A completion that entered `age` steps ago sees the last `age` columns, so a
    new one takes a finished one's slot without moving anything: softmax does not depend on the
    order of columns, and rotary positions are in k already.

    Results are written to tables with a line for each of the k completions of each page; their last
    column takes what idle slots write, their last line is nobody's. `slot` says which line a row
    writes. A place's lines begin in the order of its prompts: `next` counts those that have begun,
    `given` those that may; a slot whose completion has ended takes the next one (`enter`), on the
    device. All state is tensors that stay where they are, and a smaller batch is a prefix of the
    same memory. `step` reads nothing on the host, so that one CUDA graph serves for `window`
    columns of the ring."""

    def __init__(self, model, places, k, prompt_length, length, sampling, stop_ids, window=1,
                 graphs=False, pages=1, slots=None):
        self.model = model
        self.sampling = sampling
        self.window = window
        self.ring = length                   # M: the longest completion
        self.k = k
        self.graphs = graphs                 # replay steps as CUDA graphs?
        self.pool = None                     # the graphs' memory
        self.captured = {}                   # the shape of a step -> graph
        self.warm = set()                    # shapes of steps that were made once
        self.strips = {}                     # pages -> (token, page) of the columns of a strip
        self.fused = None if model.lockstep else FusedBlocks(model, prompt_length + length)
        self.pointwise = Pointwise(model)
        slots = slots or k
        rows = places * slots
        lines = places * pages * k
        c = model.config
        column = c.num_key_value_heads * c.head_dim            # numbers of one token's k or v
        layers = c.num_hidden_layers
        new = {"device": model.device}
        self.prompt_cache = torch.zeros(layers, 2, places * pages * prompt_length * column, **new,
                                        dtype=model.dtype)
        self.own_cache = torch.zeros(layers, 2, rows * length * column, **new, dtype=model.dtype)
        self.prompt_length = prompt_length   # L: the longest prompt
        self.columns = torch.arange(max(prompt_length, length), **new)
        self.clock = torch.zeros(1, dtype=torch.long, **new)
        self.last = torch.zeros(1, dtype=torch.long, **new)    # the last token's number
        self.stops = torch.tensor(sorted(stop_ids), dtype=torch.long, **new)
        self.tokens = torch.zeros(lines + 1, length + 1, dtype=torch.long, **new)
        self.noise = torch.zeros(lines + 1, length + 1, dtype=torch.float64, **new)
        self.logprobs = torch.zeros(lines + 1, length + 1, **new)
        self.ended = torch.zeros(lines + 1, dtype=torch.bool, **new)
        self.nobody = lines
        self.all_pages = torch.zeros(places * pages, dtype=torch.long, **new)
        self.numbers = torch.arange(max(rows, places * pages, k), **new)
        self.all_places = torch.zeros(2, len(self.numbers), dtype=torch.long, **new)
        self.all_rows = torch.zeros(4, rows, dtype=torch.long, **new)
        self.restart(Layout(places, slots, pages), length, prompt_length)

    def restart(self, layout, length, width):
        """An empty batch of that shape, at most as large as it was made for, for completions of at
        most `length` tokens and prompts of at most `width`."""
        self.steps = 0
        self.used = self.window
        self.clock.zero_()
        self.last.fill_(length - 1)
        self.set_width(width)
        self.resize(layout)
        self.queued = layout.slots < self.k or layout.pages > 1
        self.ended.fill_(True)
        for state in (self.all_pages, self.all_places, self.all_rows):
            state.zero_()
        self.slot.fill_(self.nobody)

    def clear(self):
        """Forget what earlier rollouts wrote. A masked column weighs 0, but 0 * NaN is NaN: one NaN
        that stayed in the caches would spoil every later rollout."""
        for cache in (self.prompt_cache, self.own_cache, self.logprobs):
            cache.zero_()

    def set_width(self, width):
        """Attend to that many columns of a prompt: the longest one's, rounded up with graphs."""
        self.width = min(self.prompt_length, rounded_up(width, self.window))

    def resize(self, layout):
        """Use the first part of the memory for a batch of that shape."""
        self.layout = layout
        places, slots, pages = layout.places, layout.slots, layout.pages
        rows = self.all_rows[:, :layout.rows].view(4, places, slots)
        self.slot = rows[0]                                    # (P, w) line of the tables
        self.newest = rows[1]                                  # (P, w) the last token sampled
        self.age = rows[2]                                     # (P, w) steps since it entered
        self.page = rows[3]                                    # (P, w) the page of its prompt
        self.lengths = self.all_pages[:places * pages].view(places, pages)     # of the prompts
        self.next = self.all_places[0, :places]                # (P,) lines that have begun
        self.given = self.all_places[1, :places]               # (P,) lines that may begin
        if pages not in self.strips:
            columns = torch.arange(self.prompt_length * pages, device=self.clock.device)
            self.strips[pages] = columns // pages, columns % pages
        c = self.model.config
        kv = c.num_key_value_heads
        strip = self.prompt_length * pages
        prompt = self.prompt_cache[..., :places * strip * kv * c.head_dim]
        prompt = prompt.view(-1, 2, places, kv, strip, c.head_dim)
        own = self.own_cache[..., :layout.rows * self.ring * kv * c.head_dim]
        own = own.view(-1, 2, places, kv, slots, self.ring, c.head_dim)
        self.caches = []                                       # per layer: k, v, own k, own v
        for prompt_layer, own_layer in zip(prompt, own):
            self.caches.append((*prompt_layer, *own_layer))

    def hidden(self, tokens, positions, attend):
        if self.fused is None:               # the weights are spread over ranks
            return self.model.hidden(tokens, positions, attend)
        backbone = self.model.model
        return backbone.norm(self.fused(backbone.embed_tokens(tokens), positions, attend))

    def logits(self, hidden):
        """(N, V) in fp32 of hidden states (N, hidden)."""
        return logits_of(hidden, self.model.head_weight(), linear)

    # -- Prompts enter

    def prefill_posts(self, places, pages, prompts, noise):
        """The prompts (id lists) take the given pages of the given places (two lists): one prefill
        for the k completions of each, whose first tokens come from its last logits; they begin as
        slots are free. noise (prompts, k, length) of `uniforms`."""
        device = self.clock.device
        longest = max(len(prompt) for prompt in prompts)
        width = rounded_up(longest, self.window)
        padded = []
        for prompt in prompts:
            padded.append([*prompt, *[0] * (width - len(prompt))])
        tokens = torch.tensor(padded, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        places = torch.tensor(places, device=device)
        pages = torch.tensor(pages, device=device)
        blocks = places * self.layout.pages + pages                            # (n,)
        lines = blocks[:, None] * self.k + torch.arange(self.k, device=device)
        self.noise[lines.flatten(), :noise.shape[-1]] = noise.flatten(0, 1).to(device)
        self.leave(blocks)
        self.ended[lines] = False
        self.lengths[places, pages] = lengths
        self.given.index_add_(0, places, torch.full_like(places, self.k))
        size = max(1, 2 ** 14 // width)      # prompts a pass: prefills batch well, to a limit
        for start in range(0, len(prompts), size):
            some = slice(start, start + size)
            self.prefill(tokens[some], lengths[some], places[some], pages[some], lines[some])
        self.enter()

    def leave(self, blocks):
        """Slots let go of the lines of these blocks (n,), which get new prompts."""
        own = (self.slot // self.k)[..., None] == blocks                       # (P, w, n)
        self.slot.masked_fill_(own.any(-1), self.nobody)

    def prefill(self, tokens, lengths, places, pages, lines):
        """Read prompts (n, T) of the given lengths (n,) into the pages; sample the first token of
        each completion, for the lines (n, k)."""
        width = tokens.shape[1]

        def attend(layer, q, k, v, causal=full_attention()):
            for strip, new in zip(self.caches[layer], (k, v)):
                strip = strip.unflatten(2, (self.prompt_length, -1))
                strip[places, :, :width, pages] = new.transpose(1, 2)
            return causal(layer, q, k, v)
        hidden = self.hidden(tokens, self.columns[None, :width], attend)
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        logits = self.logits(last)                                             # (n, V)
        self.record(logits[:, None].expand(-1, self.k, -1), lines, torch.zeros_like(lines))

    def enter(self):
        """Slots whose completions have ended take the next ones of their place."""
        free = self.ended[self.slot]                                           # (P, w)
        number = free.cumsum(1).sub_(1).add_(self.next[:, None])
        begins = free & (number < self.given[:, None])
        lines = self.k * self.layout.pages   # of a place
        number = number % lines
        line = number + (self.numbers[:len(number)] * lines)[:, None]
        line = torch.where(begins, line, self.slot)
        self.slot.copy_(line)
        self.newest.copy_(torch.where(begins, self.tokens[line, 0], self.newest))
        self.page.copy_(torch.where(begins, number // self.k, self.page))
        self.age.masked_fill_(begins, 0)
        self.next.add_(begins.sum(1))

    # -- Steps

    def record(self, logits, lines, age):
        """Sample one token from logits (a, b, V) for each of the lines (a, b), as number `age` of
        its completion, and write it to the tables. Returns the tokens (a, b)."""
        column = age.clamp(max=self.ring)
        noise = self.noise[lines, column].flatten()
        token, logprob = sample(logits.flatten(0, 1), noise, **self.sampling)
        token = token.view_as(lines)
        self.tokens[lines, column] = token
        self.logprobs[lines, column] = logprob.view_as(lines)
        stops = (token[..., None] == self.stops).any(-1)
        self.ended[lines] |= stops | (age >= self.last)
        return token

    def step(self):
        """Sample one more token of every completion."""
        if self.queued:
            self.enter()
        lengths = self.lengths.gather(1, self.page)                            # (P, w)
        token, page = (x[:self.width * self.layout.pages] for x in self.strips[self.layout.pages])
        prompt = token < lengths[..., None]                                    # (P, w, L H)
        if self.layout.pages > 1:
            prompt &= page == self.page[..., None]
        own = (self.clock - self.columns[:self.used]) % self.ring <= self.age[..., None]
        unseen = ~torch.cat((prompt, own), -1)                                 # (P, w, L H + used)
        bias = torch.zeros(unseen.shape, device=unseen.device).masked_fill_(unseen, -math.inf)
        attend = partial(self, bias[:, None, :, None], self.clock % self.ring)
        positions = (lengths + self.age).view(-1, 1)
        hidden = self.hidden(self.newest.view(-1, 1), positions, attend)[:, 0]
        self.clock.add_(1)
        self.age.add_(1)
        logits = self.logits(hidden).view(*self.slot.shape, -1)                # (P, w, V)
        self.newest.copy_(self.record(logits, self.slot, self.age))

    def __call__(self, bias, column, layer, q, k, v):
        """Attention of one new token per completion over [the prompt's cache, its own]: bias (P, 1,
        w, 1, L H + used) says who sees what, column (1,) where the new k and v go. q (P w, 1,
        heads, D), k and v (P w, 1, KV, D)."""
        prompt_k, prompt_v, own_k, own_v = self.caches[layer]
        places, kv, count, _, dim = own_k.shape
        for cache, new in ((own_k, k), (own_v, v)):
            new = new.view(places, count, kv, 1, dim).transpose(1, 2)
            cache.index_copy_(3, column, new)
        own_k = own_k[..., :self.used, :]
        own_v = own_v[..., :self.used, :]
        columns = self.width * self.layout.pages
        prompt_k = prompt_k[:, :, :columns]
        prompt_v = prompt_v[:, :, :columns]
        q = q.view(places, count, kv, -1, dim).transpose(1, 2).contiguous()    # (P, KV, w, G, D)
        shape = q.shape[2:4]
        shared = scores_of(q.flatten(2, 3), prompt_k)  # all slots against the one copy
        own = scores_of(q, own_k)
        p = self.pointwise.attention_weights(bias, shared.unflatten(2, shape), own, dim ** -0.5,
                                             q.dtype)
        p_shared, p_own = p.split((columns, self.used), -1)
        shared = (p_shared.flatten(2, 3) @ prompt_v).unflatten(2, shape)
        return self.pointwise.add_heads(shared, p_own @ own_v)

    def advance(self):
        """One step; replayed as a CUDA graph from the third time in a shape on."""
        self.steps += 1
        self.used = min(self.ring, rounded_up(self.steps, self.window))
        layout = self.layout
        shape = (layout.places, layout.slots, layout.pages, self.width, self.used, self.queued)
        if shape in self.captured:
            self.captured[shape].replay()
            return
        self.step()                          # the first time kernels are loaded
        if self.graphs and shape in self.warm:
            self.captured[shape] = self.capture()
        self.warm.add(shape)

    def capture(self):
        """A CUDA graph of `step`: kernels are recorded, not run."""
        graph = torch.cuda.CUDAGraph()
        try:                                 # other threads (NCCL's) may go on meanwhile
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            raise InputError(f"the decoding step could not be made a CUDA graph ({e}): add "
                             "--no-graphs") from e
        self.pool = graph.pool()             # one memory pool for all of them
        return graph

    def shrink(self, small):
        """Go on as a Smaller batch, in which nothing waits."""
        device = self.clock.device
        slots, pages, page = (torch.as_tensor(x, device=device)
                              for x in (small.slots, small.pages, small.page))
        old_caches = self.caches
        idle = slots < 0
        slots = slots.clamp(min=0)
        lines = self.slot.flatten()[slots].masked_fill(idle, self.nobody)
        newest = self.newest.flatten()[slots]
        age = self.age.flatten()[slots]
        lengths = self.lengths.flatten()[pages]
        slot_place, slot = slots // self.layout.slots, slots % self.layout.slots
        page_place, from_page = pages // self.layout.pages, pages % self.layout.pages
        self.resize(small.layout)
        self.queued = False
        for new, value in ((self.slot, lines), (self.newest, newest), (self.age, age),
                           (self.page, page), (self.lengths, lengths)):
            new.copy_(value)
        for old, new in zip(old_caches, self.caches):
            strips = []
            for strip in old[:2]:
                strip = strip.unflatten(2, (self.prompt_length, -1))
                strip = strip[page_place, :, :, from_page]                     # (P', H', KV, L, D)
                strips.append(strip.permute(0, 2, 3, 1, 4).flatten(2, 3))
            rings = [ring[slot_place, :, slot].transpose(1, 2) for ring in old[2:]]
            for target, value in zip(new, (*strips, *rings)):
                target.copy_(value)


# A smaller batch is worth its copying if it costs so much of a step or less. On a GPU copying is
# cheap beside the steps between two looks.
WORTH = {"cpu": 3 / 4, "cuda": 15 / 16}


class Scheduler:
    """Who is sampled where: waiting prompts, the prompts of each place's pages, finished
    completions. The device takes a place's completions in turn; the host gives it prompts, reads
    what is finished and, when nothing waits, makes the batch smaller."""

    def __init__(self, batch, prompts, k, length, seeds):
        self.batch = batch
        self.prompts = prompts
        self.seeds = seeds
        self.k = k
        self.length = length
        self.pages = batch.layout.pages
        self.waiting = list(range(len(prompts)))
        if len(prompts) > batch.layout.places:  # pages of similar length at a time, longest first
            self.waiting.sort(key=lambda p: -len(prompts[p]))
        self.given = [0] * batch.layout.places  # how many prompts a place has got
        # The prompt of a block, the k lines of the tables of a page: place * pages + page, as the
        # batch began.
        self.post = {}
        # Steps until a completion may reach its length: counted on the host, so that nobody waits
        # for the device.
        self.steps_left = math.inf
        self.writing = True                  # is any completion being sampled?
        self.pending = 0                     # completions that wait for a slot
        self.written = [None] * len(prompts)  # (tokens, logprobs), each (k, length)

    def free_pages(self):
        """(place, page) pairs for the next prompts, those of the idlest places first: a place's
        prompts take its pages in turn."""
        found = []
        for place, given in enumerate(self.given):
            for ahead in range(self.pages):
                page = (given + ahead) % self.pages
                if place * self.pages + page in self.post:
                    break
                found.append((ahead - self.pages, place, page))
        busy = {place: 0 for place in range(len(self.given))}
        for block in self.post:
            busy[block // self.pages] += 1
        found.sort(key=lambda entry: (busy[entry[1]] + entry[0] + self.pages, entry[1]))
        return [(place, page) for _, place, page in found]

    def may_refill(self):
        """Prefills batch well: do prompts wait, and are enough pages free?"""
        if not self.waiting:
            return False
        return not self.writing or len(self.free_pages()) >= max(1, len(self.given) // 4)

    def refill(self):
        """Free pages take the next prompts; returns how many."""
        places, pages = zip(*self.free_pages()[:len(self.waiting)])
        taken = self.waiting[:len(places)]
        self.waiting = self.waiting[len(places):]
        for place, page, post in zip(places, pages, taken):
            self.post[place * self.pages + page] = post
            self.given[place] += 1
        if self.batch.queued:
            self.batch.set_width(max(len(self.prompts[p]) for p in self.post.values()))
        noise = uniforms([self.seeds[p] for p in taken], self.k, self.length)
        self.batch.prefill_posts(list(places), list(pages), [self.prompts[p] for p in taken], noise)
        self.steps_left = min(self.steps_left, self.length - 1)
        self.writing = True
        return len(taken)

    def advance(self):
        self.batch.advance()
        self.steps_left -= 1

    def collect_finished(self):
        """Read the prompts whose completions are all finished; if nothing waits, go on with a
        smaller batch. Returns whether anything is still to be sampled."""
        batch = self.batch
        shape = batch.slot.shape
        parts = [batch.ended, batch.given - batch.next]
        parts += [x.flatten() for x in (batch.slot, batch.age, batch.page)]
        state = torch.cat(parts).cpu().numpy()                                 # one wait
        ended, pending, slot, age, page = np.split(state, np.cumsum([len(x) for x in parts[:-1]]))
        self.pending = int(pending.sum()) if batch.queued else 0
        ended = ended.astype(bool)
        whole = ended[:-1].reshape(-1, self.k).all(1)
        self.read([block for block in self.post if whole[block]])
        writing = ~ended[slot].reshape(shape)                                  # (P, w)
        self.writing = bool(writing.any()) or self.pending > 0
        left = self.length - 1 - age.reshape(shape)[writing]
        soonest = int(left.min()) if len(left) else 1
        self.steps_left = max(1, soonest) if self.writing else math.inf
        if self.writing and not self.waiting and not self.pending:
            small = smaller(batch.layout, writing, page.reshape(shape), batch.width,
                            len(batch.all_pages), WORTH[batch.clock.device.type],
                            fixed=batch.graphs)
            if small:
                batch.shrink(small)
        return self.writing

    def read(self, blocks):
        """Copy the tables' lines of finished blocks to the host. Non-finite logits give a
        log-probability of NaN: they are noticed here, where the host waits anyway."""
        if not blocks:
            return
        lines = torch.tensor(blocks, device=self.batch.clock.device)[:, None] * self.k
        lines = lines + self.batch.numbers[:self.k]                            # (blocks, k)
        tokens = self.batch.tokens[lines, :self.length].cpu()
        logprobs = self.batch.logprobs[lines, :self.length].cpu()
        if bool(logprobs.isnan().any()):
            raise InputError(NOT_FINITE)
        for i, block in enumerate(blocks):
            self.written[self.post.pop(block)] = tokens[i], logprobs[i]

    def samples(self, stop_ids):
        """The Samples: each completion cut after its first stop id (a sampled one: a prompt may
        contain stop ids)."""
        stops = set(stop_ids)
        out = Samples([], [], [])
        for tokens, logprobs in self.written:
            completions = []
            chances = []
            finished = []
            for ids, logp in zip(tokens.tolist(), logprobs.tolist()):
                end = end_of(ids, stops)
                completions.append(ids[:end])
                chances.append(logp[:end])
                finished.append(ids[end - 1] in stops)
            out.tokens.append(completions)
            out.logprobs.append(chances)
            out.finished.append(finished)
        return out


def end_of(ids, stops):
    """The number of ids up to the first stop id, that one included; all of them without one."""
    for place, token in enumerate(ids, 1):
        if token in stops:
            return place
    return len(ids)


def free_bytes(device):
    """Memory of the device that is free, what torch holds in reserve included; None: no limit."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return None
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def layout_for(model, count, k, max_rows, prompt_length, length):
    """The Layout for `count` prompts of k completions: what half of the device's free memory
    holds."""
    layout = first_layout(count, k, max_rows, prompt_length)
    free = free_bytes(model.device)
    if free is None:
        return layout
    if model.kept_batch is not None:
        free += model.kept_batch.prompt_cache.nbytes + model.kept_batch.own_cache.nbytes
    c = model.config
    token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize
    return fitting(layout, token * length, token * prompt_length, free)


def batch_for(model, layout, k, prompt_length, length, sampling, stop_ids):
    """A DecodeBatch for this work. With CUDA graphs the last one is kept with the model: one that
    is large enough is used again; one that is too small is replaced by one that covers both; one
    that is more than twice too long is let go."""
    graphs = model.device.type == "cuda" if model.graphs is None else model.graphs
    if model.lockstep or not graphs:
        return DecodeBatch(model, layout.places, k, prompt_length, length, sampling, stop_ids,
                           pages=layout.pages, slots=layout.slots)
    rules = k, sampling, tuple(stop_ids), model.vocab
    # Prompts are rounded up, that rollouts of about the same lengths find the same batch.
    sizes = (layout.rows, layout.places * layout.pages, rounded_up(prompt_length, 64), length)
    kept = model.kept_batch
    if kept is not None and kept.rules == rules and kept.sizes[2] <= 2 * sizes[2]:
        fused = FusedBlocks(model, 0)
        same_weights = kept.fused.key() == fused.key()
        large_enough = all(a >= b for a, b in zip(kept.sizes, sizes))
        if same_weights and large_enough:
            for old, new in zip(kept.fused.tensors(), fused.tensors()):
                old.copy_(new)               # adapters have trained since
            kept.clear()
            kept.restart(layout, length, prompt_length)
            return kept
        sizes = tuple(map(max, kept.sizes, sizes))
    model.kept_batch = kept = None           # first free, then allocate
    rows, pages, prompt_length_made, length_made = sizes
    batch = DecodeBatch(model, 1, k, prompt_length_made, length_made, sampling, stop_ids, window=64,
                        graphs=True, pages=pages, slots=rows)
    batch.rules = rules
    batch.sizes = sizes
    batch.restart(layout, length, prompt_length)
    model.kept_batch = batch
    return batch


@over_members
@torch.no_grad()
def generate(model, prompts, *, k=1, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
             stop_ids=(), seed=0, max_rows=256, look_every=None, progress=None):
    """k completions for each prompt (a list of ids) -> Samples.

    At most `max_rows` completions are sampled at a time, fewer where the memory is short: while
    some wait, one takes the slot of each that is finished; when none wait, the batch shrinks to
    what is unfinished.
    `seed`: an int (prompt p then draws from (seed, p)) or one int or tuple per prompt; completion d
    of a prompt with seed s depends on (s, d) only. Finished prompts are looked for every
    `look_every` tokens: by default 1 on a CPU; on a GPU, where looking waits for the device, 16,
    and 6 when nothing waits any more, since the batch then shrinks.
    `progress(n)` is called with the number of prompts just begun. InputError for settings that
    cannot be used."""
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    check_generation(model, prompts, k, max_new_tokens, **sampling)
    if not prompts:
        return Samples([], [], [])
    longest = max(len(prompt) for prompt in prompts)
    layout = layout_for(model, len(prompts), k, max_rows, longest, max_new_tokens)
    batch = batch_for(model, layout, k, longest, max_new_tokens, sampling, stop_ids)
    decoder = Scheduler(batch, prompts, k, max_new_tokens, seed)
    on_gpu = model.device.type == "cuda"
    writing = True
    step = 0
    # Operations cost less in inference mode; FSDP does not work in it.
    with nullcontext() if model.lockstep else torch.inference_mode():
        while writing or decoder.waiting:
            if decoder.may_refill():
                taken = decoder.refill()
                writing = True
                if progress:
                    progress(taken)
            elif writing:
                decoder.advance()
            step += 1
            often = 16 if decoder.waiting or decoder.pending else 6
            due = stop_ids and step % (look_every or (often if on_gpu else 1)) == 0
            if due or decoder.steps_left <= 0:
                writing = decoder.collect_finished()
    if model.lockstep:
        model.lockstep.wait()
    return decoder.samples(stop_ids)


def check_generation(model, prompts, k, max_new_tokens, temperature, top_k, top_p, min_p):
    """InputError, with one sentence, for what cannot be generated."""
    known = all(max(prompt) < model.vocab for prompt in prompts if len(prompt))
    for good, what in (
            (k >= 1, f"k is {k}: at least one completion"),
            (temperature >= 0, f"temperature is {temperature}: 0 or more"),
            (max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}: at least 1"),
            (0 < top_p <= 1, f"top_p is {top_p}: above 0, at most 1"),
            (top_k >= 0, f"top_k is {top_k}: 0 or more"),
            (0 <= min_p < 1, f"min_p is {min_p}: 0 or more, below 1"),
            (all(len(prompt) for prompt in prompts), "a prompt is empty: give at least one token"),
            (known, "a prompt holds a token id that the model lacks")):
        if not good:
            raise InputError(f"generate: {what}")
