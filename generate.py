"""k completions for each prompt: the plain cached loop, the samplers, the embedder of texts.

Read `plain_loop` and `sample` first. They are the reference: engine.py does the same faster and is
tested against them token for token on CPUs. Each completion draws from its own stream of random
numbers, so it depends neither on what else is in the batch nor on which of the two loops samples
it, up to rounding: a GPU picks its kernels by shape, and a token may change where two are about
equally likely. Other decoders, such as beam search, are in methods/decoders.py."""

from dataclasses import dataclass
from functools import wraps

import torch
import torch.nn.functional as F

from lora import base
from model import full_attention
from support.draws import draw, uniforms
from support.embedders import SentenceFormat, passes_of
from support.files import InputError
from support.products import logits_of


@dataclass
class Samples:
    """tokens[prompt][sample] is a list of ids with the stop id kept; logprobs has the same shape,
    under the distribution sampled from; finished[prompt][sample] is False when max_new_tokens cut
    it off."""
    tokens: list
    logprobs: list
    finished: list


def over_members(write):
    """`write` (generate or generate_plain), for ensembles of LoRAs too: completion d of each prompt
    is sampled by member d mod M (methods/ensemble.py). `seed` is a number, or a list of one seed a
    prompt; ValueError if that list has another length."""
    @wraps(write)
    def whole(model, prompts, *, k=1, seed=0, progress=None, **settings):
        one_seed = not hasattr(seed, "__len__")
        seeds = [(seed, p) for p in range(len(prompts))] if one_seed else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one a prompt")
        settings |= {"k": k, "seed": seeds, "progress": progress}
        if model.ensemble is None or k < 1:
            return write(model, prompts, **settings)
        return model.ensemble.sample(write, model, prompts, **settings)
    return whole


NOT_FINITE = ("the model's logits are not finite (NaN or infinity), so nothing can be sampled from "
              "them: training has diverged, or a number overflows: lower the learning rate, use an "
              "earlier checkpoint, or give --dtype float32")


# ---- The plain loop ------------------------------------------------------------------------------

class DecodingState:
    """The state of `rows` completions of one prompt (a list of ids) over a plain cache of keys and
    values that grows: `logits()` (rows, V) in fp32 of each row's next token; `read` appends a token
    to each row. Every decoder that works token by token is built on it."""

    def __init__(self, model, prompt, rows):
        self.model = model
        self.cache = {}                      # layer -> (k, v), each (rows, T, KV, D)
        self.length = len(prompt)
        tokens = torch.tensor([prompt], device=model.device)                   # (1, T)
        last = model.hidden(tokens, attend=self.attend)[:, -1]
        self.hidden = last.expand(rows, -1)                                    # (rows, hidden)
        shape = (rows, -1, -1, -1)           # one prefill, then a row for each completion
        for layer, (k, v) in self.cache.items():
            self.cache[layer] = k.expand(shape), v.expand(shape)

    def attend(self, layer, q, k, v, visible=full_attention()):  # q (rows, 1 or T, H, D)
        if layer in self.cache:
            old_k, old_v = self.cache[layer]
            k = torch.cat((old_k, k), 1)
            v = torch.cat((old_v, v), 1)
        self.cache[layer] = k, v
        if q.shape[1] == k.shape[1]:         # the prompt: causal
            return visible(layer, q, k, v)
        q = q.transpose(1, 2)                                                  # (rows, H, 1, D)
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)
        # One query sees all keys: is_causal would align it to the top left and show it the first
        # key only.
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out.transpose(1, 2)

    def logits(self):
        logits = logits_of(self.hidden, self.model.head_weight())              # (rows, V)
        if not bool(torch.isfinite(logits).all()):
            raise InputError(NOT_FINITE)
        return logits

    def read(self, tokens, parents=None):
        """Append tokens (rows,); parents (rows,): the row that each new row continues."""
        if parents is not None:
            for layer, (k, v) in self.cache.items():
                self.cache[layer] = k[parents], v[parents]
        positions = torch.full((len(tokens), 1), self.length, device=tokens.device)
        hidden = self.model.hidden(tokens[:, None], positions, self.attend)
        self.hidden = hidden[:, 0]
        self.length += 1


@torch.no_grad()
def plain_loop(model, prompt, rows, max_new_tokens, choose):
    """`rows` completions of one prompt (a list of ids), as id lists: read the prompt once, then one
    token at a time over a growing cache of keys and values.

    choose(logits, step) -> (tokens (rows,), parents (rows,) or None) decides: logits (rows, V) fp32
    of the next token. parents says which row each new row continues, so that beam search can be
    built on this; None is each its own. A token of -1 ends its row. The first call has equal
    rows."""
    state = DecodingState(model, prompt, rows)
    written = [[] for _ in range(rows)]
    for step in range(max_new_tokens):
        chosen, parents = choose(state.logits(), step)
        if parents is not None:
            written = [list(written[parent]) for parent in parents.tolist()]
        for row, token in zip(written, chosen.tolist()):
            if token >= 0:
                row.append(token)
        if bool((chosen < 0).all()):
            break
        state.read(chosen.clamp(min=0), parents)
    return written


@over_members
def generate_plain(model, prompts, *, k=1, max_new_tokens, stop_ids=(), seed, progress=None,
                   **sampling):
    """What `generate` returns, by the plain loop, prompt by prompt: the reference."""
    out = Samples([], [], [])
    sampling = {"temperature": 1.0} | sampling
    for p, prompt in enumerate(prompts):
        noise, = uniforms([seed[p]], k, max_new_tokens).to(model.device)       # (k, length)
        logprobs = [[] for _ in range(k)]
        done = torch.zeros(k, dtype=torch.bool)

        def choose(logits, step):
            tokens, logp = sample(logits, noise[:, step], **sampling)
            ended = done.clone()
            for row, token in enumerate(tokens.tolist()):
                if not ended[row]:
                    logprobs[row].append(float(logp[row]))
                    done[row] = token in stop_ids
            return tokens.masked_fill(ended.to(tokens.device), -1), None

        out.tokens.append(plain_loop(model, prompt, k, max_new_tokens, choose))
        out.logprobs.append(logprobs)
        out.finished.append(done.tolist())
    return out


# ---- The sampler ---------------------------------------------------------------------------------

def sample(logits, uniform, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """One token per row: ids and log-probs (R,), from fp32 logits (R, V) and uniform numbers (R,)
    in [0, 1).

    The log-prob is that of `kept_probabilities`, renormalised. Temperature 0 takes the largest
    logit; its log-prob is the model's own, at T = 1."""
    if temperature == 0:
        logp, token = logits.log_softmax(-1).max(-1)
        return token, logp
    p = kept_probabilities(logits, temperature, top_k, top_p, min_p)
    token, total = draw(p, uniform)
    logp = (p.gather(-1, token) / total).log().float()
    return token.squeeze(-1), logp.squeeze(-1)


def kept_probabilities(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """The tokens' probabilities (R, V) at a temperature above 0, those that are not kept at 0, the
    others not renormalised. Temperature first, then top-k, top-p, min-p, each on what the former
    kept (Hugging Face's order)."""
    p = (logits if temperature == 1 else logits / temperature).softmax(-1)
    if top_k:
        likeliest = p.topk(min(top_k, p.shape[-1])).values
        p = p.masked_fill(p < likeliest[:, -1:], 0)
    if top_p < 1:
        p = p / p.sum(-1, keepdim=True)
        ordered, index = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered          # mass above this token; the first has 0
        ordered = ordered.masked_fill(before >= top_p, 0)
        p = torch.empty_like(p).scatter_(-1, index, ordered)
    if min_p:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    return p


SAMPLING = ("temperature", "top_k", "top_p", "min_p")


# ---- The embedder --------------------------------------------------------------------------------

class Embedder:
    """Texts -> unit vectors by a FROZEN model: the base model of the run (pooling "mean", of its
    final hidden states over the text) or an embedding model ("last": Qwen3-Embedding's last token).
    EMBEDDERS has others.

    Hidden states of a language model all point one way (cosines near 1), so the mean is centred on
    `corpus`, the replies of the run's data (of prompts without any, the prompts). Only the reply is
    embedded, never its prompt; an empty reply is the end-of-text token alone."""

    def __init__(self, model, tokenizer, *, pooling="mean", corpus=(), batch=256, form=None):
        """batch: the most texts of a pass; its padded tokens are at most TOKENS_A_PASS."""
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.batch = batch
        self.form = form or SentenceFormat()  # what a sentence-transformers folder says
        self.centre = None
        self.end = tokenizer.token_to_id("<|endoftext|>")
        if pooling == "mean":
            if not corpus:
                raise InputError("the embedder needs reply texts to centre on: the data file has "
                                 "none")
            self.centre = self.vectors(list(corpus)[:2048]).mean(0)

    @torch.no_grad()
    def vectors(self, texts):
        """(texts, dim) in fp32, not centred; each of the texts is read once."""
        place = {}
        for text in texts:
            place.setdefault(text, len(place))
        ids = self.token_ids([self.form.text(text) for text in place])
        ids = [self.cut(row) for row in ids]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        vectors = [None] * len(ids)
        with base(self.model):
            for some in passes_of(order, list(map(len, ids)), self.batch):
                pooled = self.pooled([ids[i] for i in some])
                for i, vector in zip(some, pooled):
                    vectors[i] = vector
        if self.model.lockstep:
            self.model.lockstep.wait()
        return torch.stack(vectors)[list(map(place.get, texts))]

    def cut(self, ids):
        """A text's ids without what is too long: it loses its end, but not its last mark."""
        longest = self.longest
        if longest is None or len(ids) <= longest:
            return ids
        return ids[:longest - 1] + ids[-1:]

    def pooled(self, ids):
        """(texts, dim) of lists of ids, in one forward pass."""
        lengths = torch.tensor([len(row) for row in ids])
        tokens = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
        for row, own in zip(tokens, ids):
            row[:len(own)] = torch.tensor(own)
        device = self.model.device
        pooled = self.pool(tokens.to(device), lengths.to(device))
        return self.form.vectors(pooled)

    @property
    def longest(self):
        """Tokens of the longest text, special ones included; None: no limit."""
        return self.form.longest

    def token_ids(self, texts):
        """A list of ids for each text, never empty."""
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        if self.pooling == "last":
            return [e.ids + [self.end] for e in encoded]
        return [e.ids or [self.end] for e in encoded]

    def pool(self, tokens, lengths):
        """One vector (B, dim) in fp32 for each row of tokens (B, T), padded on the right."""
        if self.pooling == "last":
            return self.model.last_hidden(tokens, lengths).float()
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        mask = positions < lengths[:, None]                                    # (B, T)
        hidden = self.model.hidden(tokens).float() * mask[..., None]
        return hidden.sum(1) / lengths[:, None]

    def __call__(self, texts):
        """Unit embeddings (P, k, dim) of texts given as P lists of k."""
        flat = []
        for group in texts:
            flat.extend(group)
        vectors = self.vectors(flat)
        if self.centre is not None:
            vectors = vectors - self.centre
        unit = F.normalize(vectors, dim=-1)
        return unit.view(len(texts), -1, unit.shape[-1])
