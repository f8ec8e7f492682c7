"""Generation."""
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
import numpy as np
import torch
import torch.nn.functional as F
from data import InputError
from model import *
from model import NF4, full_attention, rms_norm, rotary


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
