"""Phase one: LoRA fine-tuning with a diversity term, L = L_quality - lambda * D(generations).

    python polylora.py base --data base.jsonl --out runs/base    # a small Qwen3 from nothing
    python polylora.py sft --model Qwen/Qwen3-8B --data sft.jsonl --out runs/poly --lambda 0.3
    torchrun --nproc-per-node=8 polylora.py sft ...              # the same step, over 8 GPUs

L_quality is the mean cross-entropy over reply tokens. D is the mean pairwise cosine distance
between the embeddings of k drafts sampled from the model being trained. Sampling has no derivative,
so D's gradient is the score function's: each draft's log-probability is pushed by how much the
draft adds to D (measure, pair_advantages; then diversity_loss). In order: D, the quality that gates
it, the SFT losses, the SFT step, the commands. LoRA and adapter files stand in adapters.py."""

import argparse
import dataclasses
import math
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import data
from adapters import (  # noqa: F401  (LoRA by the door through which it is looked for)
    ADAPTERS, LINEARS, Budget, LoRALinear, adapter, adapter_state, add_adapter, add_lora, base,
    drop_lora, frozen_copy, kind_of, load_adapter, lora_layers, merge_lora, read_adapter_config,
    save_adapter, shape_of, trained, wise_command)
from data import InputError, command
from embedders import SentenceFormat, sentence_format
from generate import straight_through_loss
from metrics import edit_distance, ngram_distance, plain_words, repeated_tokens
from model import Bert, predicting_states, token_logprobs, token_losses
from ranks import set_gradient
from trainer import (Session, Tally, add_cross_entropy, announce, base_command, batch_visits,
                     check_common, common_flags, load_model, same_base, seed_of, start_folder,
                     tally_completions, train)

# ---- Diversity -----------------------------------------------------------------------------------

def gated(delta, quality, floor):
    """Distances delta (P, k, k) without their diagonal; with quality (floor + delta_ij) q_i q_j."""
    if quality is not None:
        q = quality.float()
        delta = (floor + delta) * q[..., None] * q[..., None, :]
    return delta - torch.diag_embed(delta.diagonal(dim1=-2, dim2=-1))


def pair_distances(embeddings, quality=None, floor=0.0):
    """delta_ij = 1 - e_i . e_j, when gated (floor + delta_ij) q_i q_j; zero on the diagonal.
    (P, k, dim) -> (P, k, k) in fp32."""
    e = embeddings.float()
    return gated(1 - e @ e.transpose(-1, -2), quality, floor)


def pair_mean(pairs):
    """D (P,) of distances (P, k, k): their mean, 2/(k(k-1)) sum_{i<j} delta_ij."""
    k = pairs.shape[-1]
    if k < 2:
        raise InputError("diversity needs at least two drafts (k >= 2)")
    return pairs.sum((-1, -2)) / (k * (k - 1))


def diversity(embeddings, quality=None, floor=0.0):
    """D (P,) of unit embeddings (P, k, dim): the mean pairwise cosine distance.

    With quality (P, k) in [0, 1] each pair counts (floor + delta_ij) q_i q_j: drafts that are
    wrong earn nothing by being different, and with a floor two right ones are worth something even
    when alike."""
    return pair_mean(pair_distances(embeddings, quality, floor))


def pair_advantages(pairs):
    """a_i = D - D_without_i (P, k): what draft i adds to D. With it, E[sum_i a_i grad log pi(y_i)]
    = grad E[D].

    D_without_i does not depend on y_i, so subtracting it leaves the score-function gradient
    unbiased. With k = 2 there is no D without i; the baseline is then 0: unbiased too, but noisier.
    """
    k, total = pairs.shape[-1], pair_mean(pairs)
    if k == 2:
        return total[:, None].expand(-1, 2)
    without = (pairs.sum((-1, -2))[:, None] - 2 * pairs.sum(-1)) / ((k - 1) * (k - 2))
    return total[:, None] - without


def diversity_advantages(embeddings, quality=None, floor=0.0):
    """pair_advantages of the cosine distance."""
    return pair_advantages(pair_distances(embeddings, quality, floor))


def leave_one_out(measure, *parts):
    """pair_advantages for any D: a_i = D - D_without_i (P, k), D = measure(*parts) (P,), each part
    (P, k, ..) or None."""
    k, total = next(x.shape[1] for x in parts if x is not None), measure(*parts)
    if k == 2:
        return total[:, None].expand(-1, 2)
    others = [[j for j in range(k) if j != i] for i in range(k)]
    without = [measure(*(x if x is None else x[:, o] for x in parts)) for o in others]
    return total[:, None] - torch.stack(without, 1)


def log_det(embeddings, quality=None, classes=None):
    """log det(I + L), L_ij = q_i q_j e_i . e_j: the volume that the drafts span (DQO, arXiv
    2509.04784, with the I that keeps it finite)."""
    e = embeddings.float()
    e = e if quality is None else e * quality.float()[..., None]
    return torch.logdet(e @ e.mT + torch.eye(e.shape[1], device=e.device))


def vendi(embeddings, quality=None, classes=None):
    """The Vendi score: exp(-sum w log w), w the eigenvalues of the cosines / k, from 1 to k (arXiv
    2210.02410); times the mean quality (arXiv 2405.02449)."""
    e = embeddings.float()
    w = torch.linalg.eigvalsh(e @ e.mT / e.shape[1]).clamp(min=0)
    score = torch.special.entr(w).sum(-1).exp()
    return score if quality is None else score * quality.float().mean(-1)


def alike(classes):
    """(.., k, k) bool of answer_classes (.., k): do two drafts give one answer? A draft without an
    answer is like itself alone."""
    same = (classes[..., None] == classes[..., None, :]) & (classes >= 0)[..., None]
    return same | torch.eye(classes.shape[-1], dtype=torch.bool, device=classes.device)


def distinct_answers(embeddings, quality=None, classes=None):
    """Different answers over k; with quality each counts by its drafts' mean quality."""
    counted = (classes >= 0).float() if quality is None else (classes >= 0) * quality.float()
    return (counted / alike(classes).sum(-1)).mean(-1)


def answer_classes(domain, posts, texts):
    """Ids (P, k) of drafts, P lists of k: equal ids, equal answers. An answer is the voices that a
    draft is right in, or without a verifier its text but for case and punctuation; -1 is none."""
    ids, find = [], domain.voices_of
    for post, group in zip(posts, texts):
        keys = [frozenset(find(post, t)) if domain.voices else data.normalise(t) for t in group]
        seen = {}
        ids.append([seen.setdefault(key, len(seen)) if key else -1 for key in keys])
    return torch.tensor(ids)


def word_distances(distance):
    """texts, P lists of k -> (P, k, k) of a distance between their words."""
    def of_group(texts):
        words = [plain_words(text) for text in texts]
        return [[distance(a, b) for b in words] for a in words]
    return lambda drafts: torch.tensor([of_group(texts) for texts in drafts.texts])


@dataclasses.dataclass
class Drafts:
    """What a diversity may look at: k drafts for each of P posts."""
    texts: list
    embeddings: torch.Tensor | None           # (P, k, dim), unit length
    quality: torch.Tensor | None              # (P, k) in [0, 1], the gate's
    classes: torch.Tensor                     # (P, k), answer_classes
    floor: float = 0.0


class Diversity(NamedTuple):
    """A line of DIVERSITIES. `pairs`: Drafts -> distances (P, k, k), whose mean is D; or `of`: D
    (P,) of embeddings, quality and classes."""
    about: str
    pairs: Callable | None = None
    of: Callable | None = None
    embeds: bool = True


DIVERSITIES = {
    "cosine": Diversity("mean pairwise cosine distance of embeddings",
                        lambda drafts: pair_distances(drafts.embeddings)),
    "dpp": Diversity("log-determinant of the embeddings' kernel (arXiv 2509.04784)", of=log_det),
    "vendi": Diversity("Vendi score of the embeddings (arXiv 2210.02410)", of=vendi),
    "distinct": Diversity("different right answers over k", of=distinct_answers, embeds=False),
    "floor": Diversity("no distance: a pair counts its gate's quality alone (an ablation)",
                       lambda drafts: torch.ones(alike(drafts.classes).shape), embeds=False),
    "ngram": Diversity("words and word pairs not shared", word_distances(ngram_distance),
                       embeds=False),
    "levenshtein": Diversity("edit distance of the words", word_distances(edit_distance),
                             embeds=False),
}


def measure(name, drafts):
    """D (P,) by its name in DIVERSITIES, and its advantages (P, k). drafts: a Drafts, or a
    grpo.Group, which has the same fields."""
    kind = DIVERSITIES[name]
    if kind.pairs:
        pairs = gated(kind.pairs(drafts), drafts.quality, drafts.floor)
        return pair_mean(pairs), pair_advantages(pairs)
    parts = drafts.embeddings, drafts.quality, drafts.classes
    return kind.of(*parts), leave_one_out(kind.of, *parts)


class Embedder:
    """Texts -> unit vectors by a FROZEN model: an embedding model (pooling "last", Qwen3's last
    token; or "bert", a model.Bert), or the base model of the run ("mean" of its final hidden states
    over the text).

    Hidden states of a language model all point one way (cosines near 1), so the mean is centred on
    `corpus`, the replies of the run's data (of prompts without any, the prompts). Only the reply is
    embedded, never its prompt; an empty reply is the end-of-text token alone."""

    def __init__(self, model, tokenizer, *, pooling="mean", corpus=(), batch=256, form=None):
        self.model, self.tokenizer = model, tokenizer
        self.pooling = pooling
        own = model.form if pooling == "bert" else SentenceFormat()
        self.form = form or own              # what a sentence-transformers folder says
        self.batch, self.centre = batch, None
        self.end = tokenizer.token_to_id("<|endoftext|>")
        if pooling == "mean":
            if not corpus:
                raise InputError("the embedder needs reply texts to centre on: the data file has "
                                 "none")
            self.centre = self.vectors(list(corpus)[:2048]).mean(0)

    @torch.no_grad()
    def vectors(self, texts):
        """(texts, dim) in fp32, not centred."""
        bert, last = self.pooling == "bert", self.pooling == "last"
        texts = [self.form.text(text) for text in texts]
        ids = [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=bert)]
        if not bert:                         # a BERT's begin with [CLS] and end with [SEP]
            ids = [i + [self.end] if last else i or [self.end] for i in ids]
        longest = self.model.longest if bert else self.form.longest
        if longest is not None:              # a text too long loses its end, but not its last mark
            ids = [i if len(i) <= longest else i[:longest - 1] + i[-1:] for i in ids]
        order, out = sorted(range(len(ids)), key=lambda i: len(ids[i])), [None] * len(ids)
        with base(self.model):
            for some in (order[i:i + self.batch] for i in range(0, len(ids), self.batch)):
                lengths = torch.tensor([len(ids[i]) for i in some])
                tokens = torch.zeros(len(some), int(lengths.max()), dtype=torch.long)
                for row, i in zip(tokens, some):
                    row[:len(ids[i])] = torch.tensor(ids[i])
                pooled = self.pool(tokens.to(self.model.device), lengths.to(self.model.device))
                pooled = self.form.vectors(pooled)
                for i, vector in zip(some, pooled):
                    out[i] = vector
        if self.model.lockstep:
            self.model.lockstep.wait()
        return torch.stack(out)

    def pool(self, tokens, lengths):
        """One vector (B, dim) in fp32 for each row of tokens (B, T), padded on the right."""
        if self.pooling == "bert":
            return self.model(tokens, lengths)
        if self.pooling == "last":
            return self.model.last_hidden(tokens, lengths).float()
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        return (self.model.hidden(tokens).float() * mask[..., None]).sum(1) / lengths[:, None]

    def __call__(self, drafts):
        """Unit embeddings (P, k, dim) of texts given as P lists of k."""
        flat = self.vectors([t for texts in drafts for t in texts])
        if self.centre is not None:
            flat = flat - self.centre
        return F.normalize(flat, dim=-1).view(len(drafts), -1, flat.shape[-1])


def load_embedder(session):
    """session.embedder by --embedder: the base model, a BERT encoder or a Qwen3-Embedding."""
    args, device = session.args, session.ranks.device
    if args.embedder == "base":
        corpus = list(islice((r for p in session.posts for r in p.replies or (p.post,)), 2048))
        session.embedder = Embedder(session.model, session.tokenizer, corpus=corpus)
        return
    if session.run:
        session.run.made_from("embedder")
    tokenizer = data.load_tokenizer(args.embedder)
    folder = data.fetch(args.embedder)
    config = data.read_json(folder / "config.json")
    if isinstance(config, dict) and config.get("model_type") == "bert":
        model = Bert.from_pretrained(args.embedder, device=device)
        session.embedder = Embedder(model, tokenizer, pooling="bert")
    elif isinstance(config, dict) and config.get("model_type", "qwen3") == "qwen3":
        if tokenizer.token_to_id("<|endoftext|>") is None:
            raise InputError(f"{folder}/tokenizer.json has no token <|endoftext|>, whose state is "
                             "the embedding: give a Qwen3-Embedding or a BERT encoder")
        model = load_model(args.embedder, args, device)
        form = sentence_format(folder, "last", model.config.hidden_size, device)
        session.embedder = Embedder(model, tokenizer, pooling="last", form=form)
    else:
        kind = config.get("model_type") if isinstance(config, dict) else config
        raise InputError(f"--embedder {args.embedder}: its config.json describes a "
                         f"{data.short(kind)} model: give a Qwen3-Embedding, a BERT encoder such as "
                         "all-MiniLM-L6-v2, or base")


# ---- Quality, which gates D ----------------------------------------------------------------------

def held_out(post):
    """(the post without its first reply, that reply): how people's own replies are scored by what
    compares a draft with them. A post with one reply keeps it."""
    if not post.replies:
        raise InputError(f"the post {data.short(post.id)} has no reply to set a scale by: use a "
                         "gate that needs none (--gate none)")
    rest = dataclasses.replace(post, replies=post.replies[1:] or post.replies, voices=())
    return rest, post.replies[0]


def turned(verdicts, share, streams, purpose):
    """Verdicts of 0 and 1 (P, k, ..), `share` of them turned round by the posts' random streams:
    what a study of a noisy verifier lets training see."""
    if not share:
        return verdicts
    draws = (torch.Generator().manual_seed(seed_of(stream, purpose)) for stream in streams)
    odds = torch.stack([torch.rand(verdicts.shape[1:], generator=draw) for draw in draws])
    return torch.where(odds < share, 1 - verdicts, verdicts)


class Gate:
    """The quality q in [0, 1] of drafts that D is multiplied with, on a scale set by people: 0 is
    what a reply to another post scores, 1 what people's own replies score, measured on the run's
    posts. Without the scale a likelihood of 0.04 would make D a thousandth of itself.

    verifier    1 where the domain finds the draft right, which is on that scale already
    likelihood  mean log-probability per token under the frozen base
    reward      the run's reward (phase two); a verifier's is on that scale already
    auto        verifier where replies have voices, else reward, or likelihood in phase one
    """

    def __init__(self, session, name, sample=256):
        if name == "auto":
            scored = "likelihood" if session.stage == "sft" else "reward"
            name = "verifier" if session.domain.voices else scored
        self.session, self.name = session, name
        verdict = getattr(session.reward, "best", None) if name == "reward" else None
        self.low, self.high = 0.0, verdict or 1.0
        if name == "verifier" and not session.domain.voices:
            raise InputError("--gate verifier needs a domain with a verifier: use --gate "
                             "likelihood for real posts")
        if name == "likelihood" or name == "reward" and not verdict:
            self.measure(session.posts[:sample])

    def measure(self, posts):
        if len(posts) < 2:
            raise InputError(f"--gate {self.name} needs two posts or more to set its scale")
        cut = [held_out(post) for post in posts]
        half = len(posts) // 2
        others = [cut[(i + half) % len(cut)][1] for i in range(len(cut))]
        asked = [post for post, _ in cut]
        self.high = float(self.score(asked, [[reply] for _, reply in cut]).mean())
        self.low = float(self.score(asked, [[reply] for reply in others]).mean())
        if not self.low < self.high:
            raise InputError(f"--gate {self.name} cannot tell people's replies to a post "
                             f"({self.high:.3g} on average) from replies to another "
                             f"({self.low:.3g}): use another gate")
        self.session.say(f"gate by {self.name}: 0 at {self.low:.3g} (replies to another post), 1 "
                         f"at {self.high:.3g} (people's own), over {len(posts)} posts")

    def score(self, posts, texts, ids=None, streams=None):
        """The raw score (P, k) of P lists of k texts, or of their token ids where given."""
        session = self.session
        if self.name == "reward":
            streams = range(len(posts)) if streams is None else streams
            return torch.tensor(session.reward(posts, texts, streams))
        if ids is None:
            ids = [[data.encode_reply(session.tokenizer, t) for t in ts] for ts in texts]
        chats = [session.domain.messages(post) for post in posts]
        prompts = [data.encode_prompt(session.tokenizer, chat, session.chat) for chat in chats]
        return mean_logprobs(session, list(zip(prompts, ids)))

    def __call__(self, visits, samples, texts, streams=None):
        """q (P, k) on the CPU; None for --gate none."""
        posts = [self.session.posts[v.index] for v in visits]
        if self.name == "none":
            return None
        if self.name == "verifier":
            find = self.session.domain.voices_of
            right = [[bool(find(post, t)) for t in ts] for post, ts in zip(posts, texts)]
            flip = getattr(self.session.args, "flip", 0.0)
            return turned(torch.tensor(right).float(), flip, streams, "gate")
        ids = samples.tokens if self.name == "likelihood" else None
        score = self.score(posts, texts, ids, streams)
        return ((score - self.low) / (self.high - self.low)).clamp(0, 1)


@torch.no_grad()
def mean_logprobs(session, pairs):
    """Mean log-probability per token (P, k) under the base, for P pairs (prompt ids, k lists
    of ids)."""
    total, count = torch.zeros(2, sum(len(drafts) for _, drafts in pairs))
    with base(session.model):
        for rows in session.micro_batches(pairs):
            logp, _ = token_logprobs(session.model, rows, session.args.temperature)
            total.index_add_(0, rows.draft.cpu(), logp.cpu())
            count.index_add_(0, rows.draft.cpu(), torch.ones(len(logp)))
    return (total / count).view(len(pairs), -1)


# ---- SFT losses: fp32 logits (N, V) of reply tokens, their targets (N,) -> losses (N,) -----------

def gem_loss(logits, target, beta=0.7, logsigmoid=False):
    """GEM (arXiv 2408.16673): -sum_v q_v w_v (log p_y - log p_v), q = softmax(z / beta) and w held
    fixed; w is 1 (linear) or sigmoid((z_v - z_y) / 100). The linear one has exactly the gradient of
    beta CE(z / beta): cross-entropy, sampled hotter, is what to compare it with."""
    logp, own = logits.log_softmax(-1), target[:, None]
    weight = (logits / beta).softmax(-1)
    if logsigmoid:
        weight = weight * (0.01 * (logits - logits.gather(-1, own))).sigmoid()
    return (weight.detach() * (logp - logp.gather(-1, own))).sum(-1)


def entropy_loss(logits, target, weight=0.1):
    """Cross-entropy less weight times the entropy of the token's distribution (the confidence
    penalty, arXiv 1701.06548)."""
    logp = logits.log_softmax(-1)
    return F.nll_loss(logp, target, reduction="none") + weight * (logp.exp() * logp).sum(-1)


def sed_loss(logits, target, weight=0.2, top=10, mass=0.95):
    """SED-SFT (arXiv 2602.07464): cross-entropy plus weight (p_y - 1/2)^2 where the `top` likeliest
    tokens hold less than `mass`: there the target need not have it all. (Its code sets the mass
    from the base's sums of 10 tokens and trains on sums of 2 unless told otherwise; here it is 10,
    and the mass is fixed.)"""
    p = logits.softmax(-1)
    unsure = p.topk(min(top, p.shape[-1])).values.sum(-1) < mass
    own = p.gather(-1, target[:, None])[:, 0]
    return F.cross_entropy(logits, target, reduction="none") + weight * (own - 0.5) ** 2 * unsure


def unlikelihood_loss(logits, target, earlier, weight=1.0):
    """Cross-entropy less weight times the sum of log(1 - p_c) over the reply's earlier tokens c
    (N, C), padded with -1 (arXiv 1908.04319, eq. 5)."""
    logp = logits.log_softmax(-1)
    repeated = torch.log1p(-logp.gather(-1, earlier.clamp(min=0)).exp().clamp(max=1 - 1e-6))
    penalty = repeated.masked_fill(earlier < 0, 0.0).sum(-1)
    return F.nll_loss(logp, target, reduction="none") - weight * penalty


def earlier_tokens(session, rows):
    """For each reply token the different tokens before it, itself apart: (N, C), padded with -1."""
    seen, lists = {}, []
    for draft, token in zip(rows.draft.tolist(), rows.target.tolist()):
        before = seen.setdefault(draft, {})
        lists.append(torch.tensor([t for t in before if t != token], dtype=torch.long))
        before[token] = None
    padded = nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1)
    return (padded.to(rows.target.device),)


def ba_lora_regularizer(logits, base_logits, draft, heat=2.0, top=20, leading=10):
    """BA-LoRA's three terms (arXiv 2408.04556, v6), weighed 0.025, 0.005 and 0.005: heat^2 KL(base
    || model) at temperature `heat`; minus the entropy of the renormalised `top` largest logits;
    minus the `leading` singular values' sum over the Frobenius norm. That is of each reply's own
    logits (its tokens, V), draft (N,), where the paper's code takes the batch's: so the gradient
    does not depend on how replies are packed. The first weight stays, where its code lets it fall
    to a tenth."""
    model, teacher = ((z / heat).log_softmax(-1) for z in (logits, base_logits))
    drift = heat ** 2 * (teacher.exp() * (teacher - model)).sum(-1)
    best = logits.topk(min(top, logits.shape[-1])).values.log_softmax(-1)
    focus = (best.exp() * best).sum(-1)
    rank = torch.zeros_like(focus)
    for i in draft.unique().tolist():
        z = logits[draft == i]
        squares = torch.linalg.eigvalsh(z @ z.mT).clamp(min=1e-12)             # of singular values
        share = squares[-leading:].sqrt().sum() / squares.sum().sqrt()
        rank = torch.where(draft == i, -share, rank)
    return 0.025 * drift + 0.005 * focus + 0.005 * rank


def ba_lora_loss(logits, target, base_hidden, draft, head, weight=1.0):
    base_logits = F.linear(base_hidden, head).float()
    extra = ba_lora_regularizer(logits, base_logits, draft)
    return F.cross_entropy(logits, target, reduction="none") + weight * extra


def ba_lora_nlu_loss(logits, target, base_hidden, draft, head, weight=1.0, heat=2.0):
    """Cross-entropy and the first term of BA-LoRA's form for understanding: 0.15 heat^2 KL(base ||
    model). Its other two are of states, not of logits: covariance_penalty."""
    model = (logits / heat).log_softmax(-1)
    teacher = (F.linear(base_hidden, head).float() / heat).log_softmax(-1)
    drift = heat ** 2 * (teacher.exp() * (teacher - model)).sum(-1)
    return F.cross_entropy(logits, target, reduction="none") + weight * 0.15 * drift


def covariance_penalty(hidden, draft, weight=1.0, leading=5):
    """The other two terms of BA-LoRA's form for understanding, on hidden states (arXiv 2408.04556),
    of each reply's own states Z (n, D), at each of its tokens: 0.03 (1/D) sum_{i != j} C_ij^2, C
    the covariance, and -0.03 times the share of the `leading` singular values in the sum of all.
    hidden (N, D), draft (N,) -> (N,). A reply of one token has no covariance: 0."""
    out = torch.zeros(len(hidden), device=hidden.device)
    for i in draft.unique().tolist():
        z = hidden[draft == i].float()
        n, centred = len(z), z - z.mean(0)
        # |C|^2 of all entries by the (n, n) products, which C's own D^2 entries would dwarf.
        whole = (centred @ centred.mT).square().sum() - centred.square().sum(0).square().sum()
        values = torch.linalg.eigvalsh(z @ z.mT).clamp(min=1e-12).sqrt()       # singular values
        share = values[-leading:].sum() / values.sum()
        mixed = whole / max(n - 1, 1) ** 2 / z.shape[1]
        out = torch.where(draft == i, weight * 0.03 * (mixed - share), out)
    return out


def base_states(session, rows):
    """The base's final hidden states (N, hidden), and the token's draft (N,)."""
    with torch.no_grad(), base(session.model):
        return predicting_states(session.model, rows), rows.draft


def ended(tokens, stops):
    """Whether each completion of tokens, P lists of k, ends with a stop token: P lists of k."""
    return [[ids[-1] in stops for ids in group] for group in tokens]


def add_unlikely(session, visits, step, tally, weight=1.0):
    """Adds sequence-level unlikelihood (arXiv 1908.04319, eq. 7-8): weight times the sum of -log(1
    - p) over those tokens of k drafts that repeat an earlier 4-gram, over the drafts' tokens. (The
    drafts are sampled, where the paper decodes greedily.)"""
    prompts, samples, texts = session.sample_drafts(visits, step, session.args.k)
    tally_completions(tally, ended(samples.tokens, session.stops), texts)
    drafts = [d for ds in samples.tokens for d in ds]
    count, = session.ranks.sum([sum(map(len, drafts))])
    flags = list(map(repeated_tokens, drafts))
    for rows in session.micro_batches(list(zip(prompts, samples.tokens))):
        logp, _ = token_logprobs(session.model, rows, session.args.temperature)
        unlikely = -torch.log1p(-logp.exp().clamp(max=1 - 1e-6)) * rows.by_token(flags).to(logp)
        (weight * unlikely.sum() / count).backward()
        tally.add("unlikely", unlikely.sum().detach(), len(logp))
        tally.add("tokens", rows.tokens.numel() + len(logp))


def bonbon_loss(best, worst, base_best, base_worst, n, alpha=0.005):
    """BoNBoN (arXiv 2406.00832): alpha (-log pi(best)) + (1 - alpha) (h - (n - 1) H_{n-1})^2, h =
    log [pi(best) pi_0(worst) / (pi(worst) pi_0(best))], H the harmonic number: what h is on average
    under the best-of-n policy itself. All (P, ..), log-probabilities of whole drafts."""
    gap = (best - base_best) - (worst - base_worst)
    target = (n - 1) * sum(1 / i for i in range(1, n))
    return alpha * -best + (1 - alpha) * (gap - target) ** 2


def add_bonbon(session, visits, step, tally, alpha=0.005):
    """Adds BoNBoN's loss, a mean over posts: k drafts of the base, scored by the reward, best and
    worst. Posts whose drafts all earn the same have neither. Every member of an ensemble learns
    from both, by its own probability ratio."""
    args, posts = session.args, [session.posts[v.index] for v in visits]
    with base(session.model):
        prompts, samples, texts = session.sample_drafts(visits, step, args.k)
    tally_completions(tally, ended(samples.tokens, session.stops), texts)
    streams = [session.stream("reader", step, v) for v in visits]
    rewards = torch.tensor(session.reward(posts, texts, streams))
    tally.add("reward", rewards.sum(), rewards.numel())
    two = torch.stack((rewards.argmax(1), rewards.argmin(1)), 1).tolist()
    useful = (rewards.amax(1) > rewards.amin(1)).tolist()
    count, = session.ranks.sum([sum(useful)])
    # Draft d of a post is scored by member d mod M: M copies of the best, then M of the worst.
    members = session.model.members
    pairs = [(prompt, [drafts[i] for i in chosen for _ in range(members)])
             for prompt, drafts, chosen, good in zip(prompts, samples.tokens, two, useful) if good]

    def scored():
        """(P, 2, M) whole log-probabilities of best and worst by each member."""
        total = torch.zeros(2 * members * len(pairs), device=session.ranks.device)
        for rows in session.micro_batches(pairs):
            with torch.no_grad():
                logp, _ = token_logprobs(session.model, rows, args.temperature)
            total.index_add_(0, rows.draft, logp)
        return total.view(-1, 2, members)
    with base(session.model):
        first = scored()
    # The loss couples two drafts that may lie in two micro-batches: its slope first, then theirs.
    now = scored().requires_grad_()
    losses = bonbon_loss(*now.unbind(1), *first.unbind(1), args.k, alpha)
    slope, = torch.autograd.grad(losses.sum() / (max(count, 1) * members), now)
    for rows in session.micro_batches(pairs):
        logp, _ = token_logprobs(session.model, rows, args.temperature)
        (slope.flatten()[rows.draft] * logp).sum().backward()
        tally.add("tokens", 3 * rows.tokens.numel())
    tally.add("loss", losses.sum().detach(), losses.numel())


class Loss(NamedTuple):
    """A line of SFT_LOSSES. function(logits, target, *extra) -> losses (N,)."""
    about: str
    function: Callable | None = None          # None: cross-entropy, the short way
    knob: str = ""                            # the function's argument that --loss-value sets
    extra: Callable | None = None             # (session, rows) -> tensors of N rows
    states: Callable | None = None            # (hidden (N, D), draft, value) -> losses (N,)
    drafts: Callable | None = None            # adds the part of fresh drafts, see add_unlikely
    whole: bool = False                       # does it look at a reply's tokens together?
    replies: bool = True                      # does it learn from people's replies at all?


SFT_LOSSES = {
    "ce": Loss("cross-entropy"),
    "gem": Loss("GEM, linear; value: beta, 0.7 (arXiv 2408.16673)", gem_loss, "beta"),
    "gem-logsigmoid": Loss("GEM's default form; value: beta, 0.7 (arXiv 2408.16673)",
                           partial(gem_loss, logsigmoid=True), "beta"),
    "entropy": Loss("less the entropy; value: its weight, 0.1 (arXiv 1701.06548)", entropy_loss,
                    "weight"),
    "unlikelihood": Loss("against repeated tokens; value: weight, 1 (arXiv 1908.04319)",
                         unlikelihood_loss, "weight", earlier_tokens),
    "ba-lora": Loss("three regularizers; value: times their weights, 1 (arXiv 2408.04556)",
                    ba_lora_loss, "weight", base_states, whole=True),
    "ba-lora-nlu": Loss("its form for understanding, on hidden states; value: as ba-lora "
                        "(arXiv 2408.04556)",
                        ba_lora_nlu_loss, "weight", base_states, covariance_penalty),
    "sed": Loss("SED-SFT; value: its weight, 0.2 (arXiv 2602.07464)", sed_loss, "weight"),
    "unlikelihood-sequence": Loss("against 4-grams that k drafts repeat; value: weight, 1 (arXiv "
                                  "1908.04319)", knob="weight", drafts=add_unlikely),
    "bonbon": Loss("BoNBoN, best and worst of k drafts of the base; value: alpha, 0.005 (arXiv "
                   "2406.00832)", knob="alpha", drafts=add_bonbon, replies=False),
}


def reply_losses(session, rows):
    """The losses (N,) of --loss, with their gradient."""
    args, kind = session.args, SFT_LOSSES[session.args.loss]
    options = {} if args.loss_value is None else {kind.knob: args.loss_value}
    if kind.extra is base_states:
        with base(session.model):            # all weights train: its own head, not the teacher's
            options["head"] = session.model.head_weight().detach()
    extra = kind.extra(session, rows) if kind.extra else ()
    hidden = predicting_states(session.model, rows)
    losses = token_losses(session.model, rows, partial(kind.function, **options), extra=extra,
                          whole=kind.whole, hidden=hidden)
    if kind.states:
        value = 1.0 if args.loss_value is None else args.loss_value
        losses = losses + kind.states(hidden, rows.draft, value)
    return losses


def add_drafts_loss(session, visits, step, tally):
    """Adds what --loss makes of drafts of this rank's share of the posts."""
    args, kind = session.args, SFT_LOSSES[session.args.loss]
    options = {} if args.loss_value is None else {kind.knob: args.loss_value}
    kind.drafts(session, session.deal(visits), step, tally, **options)


# ---- Phase one -----------------------------------------------------------------------------------

def diversity_loss(logp, draft, advantages, posts):
    """The diversity term without its lambda: -(1 / posts) sum over drafts of a_i log pi(y_i), log
    pi summed over the draft's tokens, stop token included. logp (N,) and draft (N,): which draft
    each token is of; advantages: flat, one a draft."""
    return -(advantages.detach()[draft] * logp).sum() / posts


def token_slopes(session, rows, slopes):
    """(N, V): what D gains by a little of each token at each place, passed back from `slopes` at
    the drafts' embeddings (drafts, dim) through the frozen base, which reads mixtures of its token
    vectors as it reads tokens."""
    order = rows.draft.unique_consecutive()
    with base(session.model):
        table = session.model.model.embed_tokens.weight.detach()[:session.model.vocab]
        x = table[rows.target].requires_grad_()
        words = ~torch.isin(rows.target, torch.tensor(sorted(session.stops), device=x.device))
        lengths = torch.stack([words[rows.draft == d].sum() for d in order]).clamp(min=1)
        padded = nn.utils.rnn.pad_sequence([x[rows.draft == d] for d in order], batch_first=True)
        pooled = session.embedder.pool(padded, lengths)
        back, = torch.autograd.grad((pooled * slopes[order]).sum(), x)
    return back.float() @ table.float().t()


def add_straight_through(session, streams, drafts, pairs, posts):
    """Adds the gradient of -D, a mean over `posts`, by straight_through_loss. Beside its own bias,
    what a token does to the chances of later ones is left out."""
    args, device = session.args, session.ranks.device
    vectors = session.embedder.vectors([t for texts in drafts.texts for t in texts])
    vectors = (vectors - session.embedder.centre).cpu().unflatten(0, (-1, args.k)).requires_grad_()
    unit = dataclasses.replace(drafts, embeddings=F.normalize(vectors, dim=-1))
    slopes, = torch.autograd.grad(measure(args.diversity, unit)[0].sum() / posts, vectors)
    for rows in session.micro_batches(pairs):
        slope = token_slopes(session, rows, slopes.flatten(0, 1).to(device))
        logits = F.linear(predicting_states(session.model, rows), session.model.head_weight())
        draws = {d: torch.Generator().manual_seed(seed_of(streams[d // args.k], d % args.k))
                 for d in rows.draft.unique_consecutive().tolist()}
        noise = [torch.rand(logits.shape[1], generator=draws[d]) for d in rows.draft.tolist()]
        logp = (logits.float() / args.temperature).log_softmax(-1)
        straight_through_loss(logp, rows.target, torch.stack(noise).to(device), slope,
                              args.gumbel_heat).sum().backward()


D_GRADIENTS = {"score": ("the score function's, unbiased",), "straight-through": (
    "straight-through Gumbel softmax, BIASED, an ablation (arXiv 1611.01144)",)}


def add_diversity(session, visits, step, tally):
    """Adds the gradient of -D, D the mean over the step's drafting posts of the diversity of k
    fresh drafts."""
    args, mine = session.args, visits[session.ranks.rank::session.ranks.world]
    if not mine:
        return
    prompts, samples, texts = session.sample_drafts(mine, step, args.k)
    quality = session.gate(mine, samples, texts, [session.stream("gate", step, v) for v in mine])
    classes = answer_classes(session.domain, [session.posts[v.index] for v in mine], texts)
    embeddings = session.embedder(texts).cpu() if session.embedder else None    # (P, k, dim)
    drafts = Drafts(texts, embeddings, quality, classes, args.gate_floor)
    value, advantages = measure(args.diversity, drafts)
    advantages = advantages.flatten().to(session.ranks.device)
    pairs = list(zip(prompts, samples.tokens))
    if args.d_gradient == "straight-through":
        streams = [session.stream("gumbel", step, visit) for visit in mine]
        add_straight_through(session, streams, drafts, pairs, len(visits))
    for rows in session.micro_batches(pairs) if args.d_gradient == "score" else ():
        logp, _ = token_logprobs(session.model, rows, args.temperature)
        diversity_loss(logp, rows.draft, advantages, len(visits)).backward()
        tally.add("tokens", rows.tokens.numel() + len(logp))
    if quality is not None:
        tally.add("gated_D", value.sum(), len(mine))
        tally.add("quality", quality.sum(), quality.numel())
        value, _ = measure(args.diversity, dataclasses.replace(drafts, quality=None))
    tally.add("D", value.sum(), len(mine))
    tally_completions(tally, samples.finished, texts)


def sft_step(session, step):
    """One step of L = L_quality - lambda * D, lambda in nats per token for one unit of D.

    The two gradients are summed over ranks apart, so that D's share, the norm of its part over
    the cross-entropy's, can be logged, or held: --lambda-share sets lambda by it at every
    drafting step."""
    args, ranks = session.args, session.ranks
    visits = batch_visits(len(session.posts), args.batch, step, args.seed)
    tally = Tally(visits)

    def reply(visit):
        post, rng = session.posts[visit.index], random.Random(session.stream("reply", step, visit))
        return session.domain.reply(post, session.domain.writer(post, rng), rng)
    session.model.train()
    kind = SFT_LOSSES[args.loss]
    if kind.replies:
        losses = reply_losses if kind.function else None
        add_cross_entropy(session, visits, reply, tally, losses)
    session.model.eval()  # drafts are written and scored without dropout
    if kind.drafts:
        add_drafts_loss(session, visits, step, tally)
    if not (args.lam or args.lambda_share) or step % args.draft_every:
        ranks.sum_gradients(session.params)
        return tally
    of_losses = ranks.take_gradient(session.params)
    add_diversity(session, visits[:args.draft_posts], step, tally)
    of_minus_D = ranks.take_gradient(session.params)
    # Steps without drafts in between leave D's weight unchanged on average: it counts draft_every
    # times.
    weight = args.lam * args.draft_every
    ratio = float(of_minus_D.norm()) / max(float(of_losses.norm()), 1e-30)
    if args.lambda_share and ratio:
        weight = args.lambda_share / ratio
    set_gradient(session.params, of_losses + weight * of_minus_D)
    if ranks.main:  # equal on all ranks already: their mean over one
        tally.add("D_share", weight * ratio)
        tally.add("lambda", weight)
    return tally


SFT_LOGGED = ["ce", "loss", "unlikely", "reward", "D", "gated_D", "quality", "D_share", "lambda",
              "truncated", "empty", "identical"]


def run_sft(args):
    """The SFT phase: a LoRA adapter, new or that of --start trained further, in OUT/adapter."""
    start = check_sft(args)
    session = Session(args, "sft")
    if not session.open_run():
        return
    session.load()
    bare = [at for (*_, empty), at in data.kinds_of(session.posts).items() if empty]
    if bare:
        raise InputError(f"the post {data.short(session.posts[bare[0]].id)} has no reply to learn "
                         "from: give posts with replies (grpo.py and evaluate.py need none)")
    drafting = args.lam or args.lambda_share
    if args.loss == "bonbon":
        from rewards import make_reward  # which is made of what stands here
        session.reward = make_reward("valid" if session.domain.voices else "agreement", session)
    if start:
        load_start(session, start)
    else:
        add_adapter(session.model, args.adapter, args.rank, args.alpha, dropout=args.dropout,
                    targets=args.targets.split(","), seed=seed_of(args.seed, "lora"),
                    members=args.members)
    session.shard_model()
    if drafting:
        if args.shard and min(args.draft_posts, args.batch) < session.ranks.world:
            raise InputError(f"--shard needs a drafting post for each of the {session.ranks.world} "
                             "ranks: raise --draft-posts and --batch")
        if DIVERSITIES[args.diversity].embeds:
            load_embedder(session)
        session.gate = Gate(session, args.gate)
    args.steps = args.steps or math.ceil(len(session.posts) * args.epochs / args.batch)
    session.params = trained(session.model)
    step_fn = lambda step: sft_step(session, step)
    announce(session, step_fn)
    summary = train(session, session.params, step_fn, SFT_LOGGED,
                    Budget(session.model, None if start else args.steps))
    finish_adapter(session, summary)


def finish_adapter(session, summary):
    """The result of either phase: OUT/adapter, then done.json with the domain that it was
    trained for."""
    if session.ranks.main:
        save_adapter(session.model, session.run.folder / "adapter", session.args.model,
                     session.args.revision)
    session.run.finish(summary | {"domain": session.domain.record()})
    session.ranks.close()


def trained_domain(run):
    """The record of the domain that a finished run was trained for; None where nothing says it."""
    done = Path(run) / "done.json"
    record = data.read_json(done).get("domain") if done.exists() else None
    if isinstance(record, str):  # written before voices and readers were fixed at the split
        record = {"domain": record}
    if record is not None and record.get("domain") not in data.DOMAINS:
        raise InputError(f"{done}: there is no domain {data.short(record.get('domain'))}: train "
                         "that run again")
    return record


def same_domain(run, domain):
    """InputError when a finished run was trained for another domain than `domain`."""
    record = trained_domain(run)
    if record is not None and record != domain.record():
        raise InputError(f"{run} was trained for the domain {record.get('domain')!r} with voices "
                         f"{', '.join(record.get('voices', [])) or 'none'}; these posts are of "
                         f"{domain.name!r} with {', '.join(domain.voices) or 'none'}, or with "
                         "other readers: use the parts of one split")


# ---- An adapter to start from --------------------------------------------------------------------

def check_start(args):
    """Fill in the base model from the adapter at --start; returns that adapter's folder."""
    start = start_folder(args.start)
    if not (start / "adapter_config.json").exists():
        raise InputError(f"--start {args.start}: no adapter there: give a finished run of "
                         "polylora.py sft, or a folder with adapter_config.json")
    config = read_adapter_config(start)
    if not args.model:
        args.model = config.get("base_model_name_or_path")
        args.revision = args.revision or config.get("revision")
    if not args.model:
        raise InputError(f"{start}/adapter_config.json does not name its base model: give --model")
    return start


# What --start decides, and what a new adapter is without it.
NEW_ADAPTER = {"adapter": "lora", "rank": 16, "alpha": 16, "members": 4, "targets": LINEARS}


def shape_from_start(args, start):
    """Set the flags that say what the adapter is to those of the adapter in `start`; InputError for
    one that asks for something else."""
    config = read_adapter_config(start)
    own = {"adapter": kind_of(config)}
    if own["adapter"] != "full":
        shape, _ = shape_of(config)
        own |= {"rank": shape["rank"], "alpha": shape["alpha"],
                "targets": ",".join(sorted(config["target_modules"]))}
    if "members" in config:
        own["members"] = config["members"]
    for name, value in own.items():
        asked, new = getattr(args, name), NEW_ADAPTER[name]
        if name == "targets":  # in any order
            asked, new = (",".join(sorted(names)) for names in (asked.split(","), new))
        if asked not in (new, value):
            raise InputError(f"--{name} {asked}: the adapter at --start has {value}: leave that "
                             "flag out, or train a new adapter without --start")
        setattr(args, name, value)


def load_start(session, start):
    """Put the adapter in `start` on the session's model, to be trained further."""
    args = session.args
    same_base(args.start, args)
    record = trained_domain(args.start)
    if record is not None and record["domain"] != session.domain.name:
        session.say(f"warning: {args.start} was trained for the domain {record['domain']!r}; these "
                    f"posts are put to it as {session.domain.name!r} does")
    if session.run:
        session.run.made_from("start")
    load_adapter(session.model, start, dropout=args.dropout)


# ---- Commands ------------------------------------------------------------------------------------

def listed(table):
    """"name: one line; .." of a register, for a flag's help."""
    about = {name: getattr(row, "about", row[-1]) for name, row in table.items()}
    return "; ".join(f"{name}: {text}" for name, text in about.items())


def check_diversity(args):
    if args.diversity == "floor" and args.gate == "none":
        raise InputError("--diversity floor is a gate's quality and nothing else: give a --gate")
    if args.gate_floor and DIVERSITIES[args.diversity].of:
        raise InputError(f"--gate-floor is for distances of pairs: --diversity {args.diversity} "
                         "has none")


def draft_flags(p, k):
    """Flags of the drafts a phase samples and of the diversity among them."""
    add = p.add_argument
    add("--k", type=int, default=k, help="drafts for each post")
    add("--max-new-tokens", type=int, default=100,
        help="longest draft, in tokens, stop token included")
    add("--temperature", type=float, default=1.0,
        help="of sampling, and of the distribution whose log-probabilities are trained")
    add("--diversity", default="cosine", choices=list(DIVERSITIES),
        help=f"what D is, of the k drafts. {listed(DIVERSITIES)}")
    add("--gate", default="none", choices=("none", "auto", "verifier", "likelihood", "reward"),
        help="quality in [0, 1] that D is multiplied with, on people's scale: none (plain D), the "
             "verifier, likelihood under the base, or reward (phase two); auto: verifier where "
             "replies have voices, else reward, or likelihood in phase one")
    add("--gate-floor", type=float, default=0.0,
        help="what a gated pair of drafts is worth even when alike, added to its distance: more "
             "weight on quality beside diversity")
    add("--flip", type=float, default=0.0,
        help="share of the verifier's verdicts turned round, in reward, gate and coverage")
    add("--embedder", default="base",
        help="what embeds drafts: base (the frozen model itself, mean of its hidden states, "
             "centred), or the folder or hub name of a BERT sentence encoder (all-MiniLM-L6-v2) or "
             "of a Qwen3-Embedding")


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sub = p.add_subparsers(dest="command", required=True)
    base_command(sub)
    f = sub.add_parser("sft", help="phase one: LoRA fine-tuning, with --lambda > 0 for diversity")
    add = f.add_argument
    add("--model", default=None, help="Qwen3 checkpoint: folder or hub name; with --start, by "
                                      "default the one that its adapter names")
    add("--start", "--from", default=None,
        help="train the adapter of this finished run, or of this folder in PEFT's layout, further, "
             "with a new optimizer and schedule; another --seed visits the posts in another order")
    common_flags(f, lr=2e-4, steps=0, batch=16)
    add("--adapter", default=NEW_ADAPTER["adapter"], choices=list(ADAPTERS),
        help=f"what trains. {listed(ADAPTERS)}")
    add("--members", type=int, default=NEW_ADAPTER["members"],
        help="LoRAs of rank r side by side, for the adapters that have several")
    add("--rank", type=int, default=NEW_ADAPTER["rank"], help="LoRA rank r")
    add("--alpha", type=float, default=NEW_ADAPTER["alpha"],
        help="LoRA alpha: the update is scaled by alpha / r")
    add("--dropout", type=float, default=0.0, help="LoRA dropout in the cross-entropy passes")
    add("--targets", default=",".join(NEW_ADAPTER["targets"]), help="linear layers with LoRA, comma-separated")
    add("--loss", default="ce", choices=list(SFT_LOSSES),
        help=f"of the reply's tokens. {listed(SFT_LOSSES)}")
    add("--loss-value", type=float, default=None, help="the number that --loss names; default: its "
                                                       "paper's")
    add("--lambda", dest="lam", type=float, default=0.0,
        help="weight of D, in nats per token for one unit of D")
    add("--lambda-share", type=float, default=0.0,
        help="instead of --lambda: the norm of D's part of a drafting step's gradient over the "
             "cross-entropy's, held by setting lambda at each such step")
    draft_flags(f, 4)
    add("--d-gradient", default="score", choices=list(D_GRADIENTS),
        help=f"how D's gradient is estimated. {listed(D_GRADIENTS)}")
    add("--gumbel-heat", type=float, default=1.0,
        help="temperature of straight-through's softmax: lower, less biased and noisier")
    add("--draft-every", type=int, default=1, help="steps between those that sample drafts")
    add("--draft-posts", type=int, default=8,
        help="posts of such a step that get k drafts, over all ranks")
    f.set_defaults(run=run_sft)
    wise_command(sub)
    return p


def check_sft(args):
    """Find wrong flags before anything is loaded; returns the folder of --start's adapter, None for
    a new adapter."""
    check_common(args)
    if not (args.model or args.start):
        raise InputError("give --model, a Qwen3 checkpoint, or --start, an adapter to train "
                         "further")
    check_sft_losses(args)
    if not args.start:
        return None
    start = check_start(args)
    shape_from_start(args, start)
    return start


def check_sft_losses(args):
    """InputError for flags of D and of the loss that do not go together."""
    drafting = args.lam or args.lambda_share
    if args.lam and args.lambda_share:
        raise InputError("--lambda and --lambda-share both set the weight of D: give one of them")
    if drafting and args.k < 2:
        raise InputError(f"--lambda {args.lam:g} needs drafts to compare: give --k 2 or more (k is "
                         f"{args.k})")
    if drafting and args.temperature <= 0:
        raise InputError("--temperature must be above 0: the gradient of D needs drafts that are "
                         "sampled")
    check_diversity(args)
    if args.d_gradient != "score" and (args.diversity != "cosine" or args.embedder != "base"
                                       or args.shard or args.gumbel_heat <= 0):
        raise InputError(f"--d-gradient {args.d_gradient} is for --diversity cosine with "
                         "--embedder base, without --shard, at a --gumbel-heat above 0")
    if args.loss_value is not None and not SFT_LOSSES[args.loss].knob:
        raise InputError(f"--loss-value has no meaning for --loss {args.loss}")
    if args.loss == "bonbon" and args.k < 2:
        raise InputError(f"--loss bonbon compares drafts: give --k 2 or more (k is {args.k})")
    if SFT_LOSSES[args.loss].drafts and args.temperature <= 0:
        raise InputError(f"--loss {args.loss} needs drafts that are sampled: --temperature must be "
                         "above 0")
    if args.gate == "reward":
        raise InputError("--gate reward is for phase two, which has a reward: use likelihood or "
                         "verifier")


def main(argv=None):
    return command(parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
