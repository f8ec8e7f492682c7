"""The same sampling as generate.py's plain loop, fast, and tested equal to it, token for token.

A prompt is read once for its k completions and its keys and values are stored once (DecodeBatch);
blocks have fewer and larger products (FusedBlocks); a finished prompt gives its place to a waiting
one, and the batch shrinks when none wait (Scheduler); on a GPU a step is replayed as a CUDA graph.
Each completion has random numbers of its own and does not depend on what else is in the batch."""

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
from support.draws import uniforms
from support.files import InputError


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
    """Weights (out_i, in) as one tensor (sum of out_i, in). They become views of it: nothing is
    stored twice. Weights that already lie one after the other in one storage stay where they are,
    so that a second call gives the same tensor."""
    if not adjacent(weights):
        whole = torch.cat([w.data for w in weights])
        sizes = [len(w) for w in weights]
        for weight, part in zip(weights, whole.split(sizes)):
            weight.data = part
    rows = sum(len(w) for w in weights)
    columns = weights[0].shape[1]
    return weights[0].data.as_strided((rows, columns), (columns, 1))


def adjacent(weights):
    """Do the tensors follow one another in one storage?"""
    for first, second in zip(weights, weights[1:]):
        same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        if not same or second.data_ptr() != first.data_ptr() + first.nbytes:
            return False
    return True


def decoding_parts_of(layer, dtype):
    """The Parts of a linear layer: as it says itself; a plain one is its weight. None if the layer
    cannot be fused; it is then called directly."""
    if hasattr(layer, "decoding_parts"):
        return layer.decoding_parts(dtype)
    return Parts(layer.weight)


class FusedLinear:
    """Linear layers that read the same input, as one matrix product: (.., in) -> (.., sum of outs).
    Low-rank updates are products of their own, all A as one and all B as one block-diagonal: added
    to W they would be rounded in bf16."""

    def __init__(self, layers, dtype):
        self.layers = layers
        self.scale = 1.0
        self.A = None                                  # (sum of r, in)
        self.B = None                                  # (sum of r, sum of outs)
        self.gain = None                               # (sum of outs,)
        self.tensors = []                              # made of adapters, which train
        parts = [decoding_parts_of(layer, dtype) for layer in layers]
        self.whole = any(p is None for p in parts)     # call the layers one by one
        if self.whole:
            return
        self.nf4 = [p.weight for p in parts if getattr(p.weight, "quantised", False)]
        self.weight = None if self.nf4 else joined([p.weight for p in parts])
        self.fuse_updates(parts)
        self.fuse_gains(parts, dtype)
        self.tensors = [t for t in (self.A, self.B, self.gain) if t is not None]

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

    def key(self):
        """What a captured graph takes for granted of it."""
        if self.whole:
            return [id(layer) for layer in self.layers]
        weights = [w.codes.data_ptr() for w in self.nf4] or [self.weight.data_ptr()]
        shapes = [None if t is None else t.shape for t in (self.A, self.B, self.gain)]
        return weights, self.scale, shapes

    def __call__(self, x):
        if self.whole:
            return torch.cat([layer(x) for layer in self.layers], -1)
        if self.nf4:
            y = torch.cat([w(x) for w in self.nf4], -1)
        else:
            y = linear(x, self.weight)
        if self.A is not None:
            low = linear(x, self.A).flatten(0, -2)
            y.flatten(0, -2).addmm_(low, self.B, alpha=self.scale)
        return y if self.gain is None else y * self.gain


@dataclass
class FusedBlock:
    """A transformer block for decoding: its norms and its four products."""
    norm: object
    q_norm: object
    k_norm: object
    mlp_norm: object
    qkv: FusedLinear
    out: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear

    @classmethod
    def of(cls, block, dtype):
        attention = block.self_attn
        mlp = block.mlp
        return cls(block.input_layernorm, attention.q_norm, attention.k_norm,
                   block.post_attention_layernorm,
                   FusedLinear((attention.q_proj, attention.k_proj, attention.v_proj), dtype),
                   FusedLinear((attention.o_proj,), dtype),
                   FusedLinear((mlp.gate_proj, mlp.up_proj), dtype),
                   FusedLinear((mlp.down_proj,), dtype))

    def products(self):
        return [self.qkv, self.out, self.gate_up, self.down]


class FusedBlocks:
    """The blocks for decoding, without gradient: one product for q, k and v, one for gate and up; q
    and k are normalised and rotated together. A step has few rows: the number of operations decides
    its time."""

    def __init__(self, model, length):
        self.config = model.config
        positions = torch.arange(length, device=model.device)
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta, model.dtype)
        self.cos = torch.cat((cos, cos), -1)                                   # (length, 1, D)
        self.sin = torch.cat((-sin, sin), -1)                                  # (length, 1, D)
        self.blocks = [FusedBlock.of(block, model.dtype) for block in model.model.layers]

    def products(self):
        found = []
        for block in self.blocks:
            found.extend(block.products())
        return found

    def tensors(self):
        """What was computed from adapters: to be refreshed before each rollout."""
        found = []
        for product in self.products():
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
        for layer, block in enumerate(self.blocks):
            q, k, v = self.heads(block, block.qkv(block.norm(x)), cos, sin)
            x = x + block.out(attend(layer, q, k, v).flatten(2))
            gate, up = block.gate_up(block.mlp_norm(x)).chunk(2, -1)
            x = x + block.down(F.silu(gate) * up)
        return x

    def heads(self, block, qkv, cos, sin):
        """q (B, T, H, D), k and v (B, T, KV, D); q and k normalised and rotated."""
        c = self.config
        heads = c.num_attention_heads
        both = heads + c.num_key_value_heads
        qkv = qkv.unflatten(-1, (-1, c.head_dim))                              # (B, T, H + 2 KV, D)
        weight = torch.cat((block.q_norm.weight.expand(heads, -1),
                            block.k_norm.weight.expand(both - heads, -1)))
        qk = rms_norm(qkv[..., :both, :], weight, c.rms_norm_eps)
        qk = qk * cos + qk.roll(c.head_dim // 2, -1) * sin
        return qk[..., :heads, :], qk[..., heads:, :], qkv[..., both:, :]


# ---- The fast engine: the batch of completions and its cache -------------------------------------

class DecodeBatch:
    """A batch of completions on the device: P places for prompts, k completions each. Called as
    `attend`, it is the cache of keys and values (with M columns of each completion's own):

        place 0   prompt prompt prompt | sample 0:  5 6 . 3 4     the ring: step s of the batch
                                       | sample 1:  5 6 . 3 4     writes column s mod M of every row
        place 1   prompt prompt        | sample 0:  . 6 . . .     it entered one step ago, and sees
                                       | sample 1:  . 6 . . .     the newest column only

    A prompt's keys and values are stored once, (P, KV, L, D), and shared by its k completions; the
    completions' own are a ring (P, KV, k, M, D). A prompt that entered `age` steps ago sees the
    last `age` columns, so a new prompt takes a finished one's place without moving anything:
    softmax does not depend on the order of columns, and rotary positions are in k already.

    Results are written to tables with a line for each completion that the batch began with; their
    last column takes what idle places write. `slot` says which line a row writes. All state is
    tensors that stay where they are, and a smaller batch is a prefix of the same memory. `step`
    reads nothing on the host, so that one CUDA graph serves for `window` columns of the ring."""

    def __init__(self, model, places, k, prompt_length, length, sampling, stop_ids, window=1,
                 graphs=False):
        self.model = model
        self.sampling = sampling
        self.window = window
        self.ring = length                   # M: the longest completion
        self.graphs = graphs                 # replay steps as CUDA graphs?
        self.pool = None                     # the graphs' memory
        self.captured = {}                   # (places, k, columns used) -> graph
        self.fused = None if model.lockstep else FusedBlocks(model, prompt_length + length)
        c = model.config
        layers = c.num_hidden_layers
        kv = c.num_key_value_heads
        new = {"device": model.device}
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
        """Use the first part of the memory, for `places` prompts of k completions."""
        self.lengths = self.all_places[0, :places]             # (P,) of the prompts
        self.age = self.all_places[1, :places]                 # (P,) steps since the prompt entered
        rows = self.all_rows[:, :places * k].view(2, places, k)
        self.slot = rows[0]                                    # (P, k) line of the tables
        self.newest = rows[1]                                  # (P, k) the last token sampled
        _, _, _, kv, _, dim = self.prompt_cache.shape
        own = self.own_cache[..., :places * kv * k * self.ring * dim]
        own = own.view(-1, 2, places, kv, k, self.ring, dim)
        self.caches = []                                       # per layer: k, v, own k, own v
        for prompt_layer, own_layer in zip(self.prompt_cache, own):
            prompt_k, prompt_v = prompt_layer[:, :places]
            own_k, own_v = own_layer
            self.caches.append((prompt_k, prompt_v, own_k, own_v))

    def hidden(self, tokens, positions, attend):
        if self.fused is None:               # the weights are spread over ranks
            return self.model.hidden(tokens, positions, attend)
        backbone = self.model.model
        return backbone.norm(self.fused(backbone.embed_tokens(tokens), positions, attend))

    def prefill_posts(self, places, prompts, noise):
        """The prompts (id lists) take the places `places` (a list): one prefill for the k
        completions of each, whose first tokens come from its last logits. noise (prompts, k,
        length) of `uniforms`."""
        device = self.clock.device
        longest = max(len(prompt) for prompt in prompts)
        padded = []
        for prompt in prompts:
            padded.append([*prompt, *[0] * (longest - len(prompt))])
        tokens = torch.tensor(padded, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        places = torch.tensor(places, device=device)
        slots = self.slot[places].flatten()
        self.noise[slots, :noise.shape[-1]] = noise.flatten(0, 1).to(device)
        self.stopped[slots] = False
        self.lengths[places] = lengths
        self.age[places] = 0
        size = max(1, 2 ** 14 // longest)    # prompts a pass: prefills batch well, to a limit
        for start in range(0, len(prompts), size):
            some = slice(start, start + size)
            self.prefill(tokens[some], lengths[some], places[some])

    def prefill(self, tokens, lengths, places):
        """Read prompts (n, T) of the given lengths (n,) into the places (n,); sample the first
        token of each completion."""
        width = tokens.shape[1]

        def attend(layer, q, k, v, causal=full_attention()):
            prompt_k, prompt_v, _, _ = self.caches[layer]
            prompt_k[places, :, :width] = k.transpose(1, 2)
            prompt_v[places, :, :width] = v.transpose(1, 2)
            return causal(layer, q, k, v)
        hidden = self.hidden(tokens, self.columns[None, :width], attend)
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        logits = linear(last, self.model.head_weight()).float()                # (n, V)
        self.record(logits[:, None].expand(-1, self.slot.shape[1], -1), places)

    def record(self, logits, rows):
        """Sample one token for each completion of the places `rows` from logits (rows, k, V) and
        write it to the tables."""
        slot = self.slot[rows]
        age = self.age[rows, None]
        column = age.clamp(max=self.ring).expand_as(slot)
        noise = self.noise[slot, column].flatten()
        token, logprob = sample(logits.flatten(0, 1), noise, **self.sampling)
        token = token.view_as(slot)
        self.tokens[slot, column] = token
        self.logprobs[slot, column] = logprob.view_as(slot)
        self.newest[rows] = token
        stops = (token[..., None] == self.stops).any(-1)
        self.stopped[slot] |= stops & (age < self.ring)

    def step(self):
        """Sample one more token of every completion."""
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
        """Attention of one new token per completion over [the prompt's cache, its own]: bias (P, 1,
        1, 1, L + used) says who sees what, column (1,) where the new k and v go. q (P k, 1, H, D),
        k and v (P k, 1, KV, D)."""
        prompt_k, prompt_v, own_k, own_v = self.caches[layer]
        places, kv, count, _, dim = own_k.shape
        for cache, new in ((own_k, k), (own_v, v)):
            new = new.view(places, count, kv, 1, dim).transpose(1, 2)
            cache.index_copy_(3, column, new)
        own_k = own_k[..., :self.used, :]
        own_v = own_v[..., :self.used, :]
        q = q.view(places, count, kv, -1, dim).transpose(1, 2).contiguous()    # (P, KV, k, G, D)
        shape = q.shape[2:4]
        shared = q.flatten(2, 3) @ prompt_k.transpose(-1, -2)  # all k against the one copy
        own = q @ own_k.transpose(-1, -2)
        scores = torch.cat((shared.unflatten(2, shape), own), -1)
        p = torch.add(bias, scores, alpha=dim ** -0.5).softmax(-1).to(q.dtype)
        p_shared, p_own = p.split((prompt_k.shape[2], self.used), -1)
        out = (p_shared.flatten(2, 3) @ prompt_v).unflatten(2, shape) + p_own @ own_v
        return out.transpose(1, 2).reshape(places * count, 1, -1, dim)

    def advance(self):
        """One step; replayed as a CUDA graph from the second time in a shape on."""
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
        """A CUDA graph of `step`: kernels are recorded, not run."""
        graph = torch.cuda.CUDAGraph()
        try:                                 # other threads (NCCL's) may go on meanwhile
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.step()
        except RuntimeError as e:
            raise InputError(f"the decoding step could not be made a CUDA graph ({e}): add "
                             "--no-graphs") from e
        self.pool = graph.pool()             # one memory pool for all of them
        return graph

    def shrink(self, places, samples):
        """Keep the given places (P',) and, in each, the given completions (P', k')."""
        old_caches = self.caches
        lengths = self.lengths[places]
        age = self.age[places]
        slot = self.slot[places].gather(1, samples)
        newest = self.newest[places].gather(1, samples)
        kv, _, ring, dim = old_caches[0][2].shape[1:]
        own = samples[:, None, :, None, None].expand(-1, kv, -1, ring, dim)
        self.resize(*samples.shape)
        self.lengths.copy_(lengths)
        self.age.copy_(age)
        self.slot.copy_(slot)
        self.newest.copy_(newest)
        for old, new in zip(old_caches, self.caches):
            prompt_k, prompt_v, own_k, own_v = old
            new[0].copy_(prompt_k[places])
            new[1].copy_(prompt_v[places])
            new[2].copy_(own_k[places].gather(2, own))
            new[3].copy_(own_v[places].gather(2, own))


class Scheduler:
    """The scheduler: waiting prompts, idle places, finished completions."""

    def __init__(self, batch, prompts, k, length, seeds):
        self.batch = batch
        self.prompts = prompts
        self.seeds = seeds
        self.k = k
        self.length = length
        places = len(batch.slot)
        self.waiting = list(range(len(prompts)))
        self.idle = list(range(places))
        self.post = [None] * places          # the prompt of a place
        self.block = list(range(places))     # the part of the tables that a place writes
        # Tokens each place may still sample: counted on the host, so nobody waits for the device.
        self.tokens_left = [math.inf] * places
        self.written = [None] * len(prompts)  # (tokens, logprobs), each (k, length)

    def refill(self):
        """Idle places take the next prompts; returns how many."""
        count = min(len(self.idle), len(self.waiting))
        places = self.idle[:count]
        taken = self.waiting[:count]
        self.idle = self.idle[count:]
        self.waiting = self.waiting[count:]
        noise = uniforms([self.seeds[p] for p in taken], self.k, self.length)
        self.batch.prefill_posts(places, [self.prompts[p] for p in taken], noise)
        for place, post in zip(places, taken):
            self.post[place] = post
            self.tokens_left[place] = self.length - 1
        return count

    def advance(self):
        self.batch.advance()
        self.tokens_left = [n - 1 for n in self.tokens_left]

    def collect_finished(self):
        """Read the places whose completions are all finished; if no prompt waits, shrink to the
        others. Returns whether any place is still sampling."""
        left = np.array(self.tokens_left)
        stopped = self.batch.stopped[self.batch.slot].cpu().numpy()            # (P, k)
        writing = ~stopped & (left > 0)[:, None]
        writing[self.idle] = False
        done = (~writing.any(1)).nonzero()[0].tolist()
        finished = [place for place in done if left[place] < math.inf]
        self.read(finished)
        self.idle = sorted(self.idle + finished)
        for place in self.idle:              # never due for a look
            self.tokens_left[place] = math.inf
        busy = writing.any(1).nonzero()[0].tolist()
        widest = int(writing.sum(1).max())
        if not self.waiting and 0 < 2 * len(busy) * widest <= writing.size:
            self.shrink(busy, writing, widest)
        return bool(busy)

    def shrink(self, busy, writing, widest):
        """Go on with the busy places, each with the `widest` completions that come first when the
        unfinished ones are put first: rows stay rectangular."""
        order = np.argsort(~writing[busy], axis=1, kind="stable")[:, :widest]
        self.tokens_left = [self.tokens_left[place] for place in busy]
        self.post = [self.post[place] for place in busy]
        self.block = [self.block[place] for place in busy]
        self.idle = []
        device = self.batch.clock.device
        self.batch.shrink(torch.as_tensor(busy, device=device),
                          torch.as_tensor(order, device=device))

    def read(self, places):
        """Copy the tables' lines of finished places to the host. Non-finite logits give a
        log-probability of NaN: they are noticed here, where the host waits anyway."""
        if not places:
            return
        lines = []
        for place in places:
            first = self.block[place] * self.k
            lines.extend(range(first, first + self.k))
        lines = torch.tensor(lines, device=self.batch.clock.device)
        shape = (len(places), self.k, self.length)
        tokens = self.batch.tokens[lines, :self.length].cpu().view(shape)
        logprobs = self.batch.logprobs[lines, :self.length].cpu().view(shape)
        if bool(logprobs.isnan().any()):
            raise InputError(NOT_FINITE)
        for i, place in enumerate(places):
            self.written[self.post[place]] = tokens[i], logprobs[i]

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


def batch_for(model, places, k, prompt_length, length, sampling, stop_ids):
    """A DecodeBatch for this work. With CUDA graphs the last one is kept with the model: one that
    is large enough is used again; one that is too small is replaced by one that covers both."""
    graphs = model.device.type == "cuda" if model.graphs is None else model.graphs
    if model.lockstep or not graphs:
        return DecodeBatch(model, places, k, prompt_length, length, sampling, stop_ids)
    rules = k, sampling, tuple(stop_ids), model.vocab
    sizes = (places, prompt_length, length)
    kept = model.kept_batch
    if kept is not None and kept.rules == rules:
        fused = FusedBlocks(model, 0)
        same_weights = kept.fused.key() == fused.key()
        large_enough = all(a >= b for a, b in zip(kept.sizes, sizes))
        if same_weights and large_enough:
            for old, new in zip(kept.fused.tensors(), fused.tensors()):
                old.copy_(new)               # adapters have trained since
            kept.clear()
            kept.restart(places, k)
            return kept
        sizes = tuple(map(max, kept.sizes, sizes))
    model.kept_batch = kept = None           # first free, then allocate
    places_made, prompt_length, length = sizes
    prompt_length = math.ceil(prompt_length / 64) * 64
    batch = DecodeBatch(model, places_made, k, prompt_length, length, sampling, stop_ids, window=64,
                       graphs=True)
    batch.rules = rules
    batch.sizes = (places_made, prompt_length, length)
    batch.restart(places, k)
    model.kept_batch = batch
    return batch


@over_members
@torch.no_grad()
def generate(model, prompts, *, k=1, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
             stop_ids=(), seed=0, max_rows=256, look_every=None, progress=None):
    """k completions for each prompt (a list of ids) -> Samples.

    At most `max_rows` completions (at least one prompt's k) are sampled at a time: while prompts
    wait, one takes the place of each whose k completions are finished; when none wait, the batch
    shrinks to what is unfinished.
    `seed`: an int (prompt p then draws from (seed, p)) or one int or tuple per prompt; completion d
    of a prompt with seed s depends on (s, d) only. Finished completions are looked for every
    `look_every` tokens: by default 1 on a CPU, 16 on a GPU, where looking waits for the device.
    `progress(n)` is called with the number of prompts just begun. InputError for settings that
    cannot be used."""
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    check_generation(model, prompts, k, max_new_tokens, **sampling)
    if not prompts:
        return Samples([], [], [])
    look_every = look_every or (16 if model.device.type == "cuda" else 1)
    places = max(1, min(len(prompts), max_rows // k))
    longest = max(len(prompt) for prompt in prompts)
    batch = batch_for(model, places, k, longest, max_new_tokens, sampling, stop_ids)
    decoder = Scheduler(batch, prompts, k, max_new_tokens, seed)
    writing = True
    step = 0
    # Operations cost less in inference mode; FSDP does not work in it.
    with nullcontext() if model.lockstep else torch.inference_mode():
        while writing or decoder.waiting:
            if decoder.waiting and len(decoder.idle) >= max(1, places // 4):  # prefills batch well
                taken = decoder.refill()
                writing = True
                if progress:
                    progress(taken)
            elif writing:
                decoder.advance()
            step += 1
            due = stop_ids and step % look_every == 0
            if due or min(decoder.tokens_left) <= 0:
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
