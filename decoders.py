"""Decoders: ways to k drafts for a post, by name, for evaluate.py's --decoder.

A decoder is (session, visits, k, progress, helper) -> (Samples, texts): for each visit k drafts by
the model and the flags of a trainer.Session; `helper` is what else it needs (an amateur model, a
reward). Drafts of one post are independent of each other, or, where DECODERS says joint, hang
together in sets of --set-size, which follow one another: Pass@k of such drafts is that of whole
sets. In order: token by token, over the plain loop of generate.py; the best of several samples;
sets asked for in one prompt; the register."""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

import data
from data import InputError
from generate import (SAMPLING, Reader, Samples, generate, plain_loop, sample, sampling_of,
                      uniforms)
from model import pack, token_logprobs


def texts_of(session, tokens):
    return [[data.decode(session.tokenizer, d) for d in drafts] for drafts in tokens]


def sampled(session, visits, k, progress=None, helper=None):
    return session.sample_drafts(visits, 0, k, progress)[1:]


# ---- Token by token, over the plain loop ---------------------------------------------------------

def by_post(write):
    """A decoder from write(session, visit, prompt, k, helper) -> (tokens, logprobs, finished) of
    the k drafts of one post."""
    def decode(session, visits, k, progress=None, helper=None):
        if session.model.lockstep:
            raise InputError("--decoder beams and contrastive write post by post, which weights "
                             "spread over ranks cannot: leave out --shard")
        out = Samples([], [], [])
        for visit in visits:
            drafts = write(session, visit, session.prompt(visit.index), k, helper)
            for kept, new in zip((out.tokens, out.logprobs, out.finished), drafts):
                kept.append(new)
            if progress:
                progress(1)
        return out, texts_of(session, out.tokens)
    return decode


def diverse_beams(model, prompt, k, *, groups, penalty, max_new_tokens, stop_ids=()):
    """k drafts by beam search in `groups` groups of k / groups beams, 0: one beam a group (arXiv
    1610.02424, algorithm 1, Hamming diversity) -> (tokens, logprobs, finished), the best of each
    group first. One group: plain beam search.

    At each step a group takes the best of its beams' continuations by
    score + log p(token) - penalty * (how many beams of earlier groups took that token now), and the
    penalty stays in the score. A beam that has ended keeps its place while its score is among the
    best; lengths are not normalised. logprobs are the model's own. InputError unless groups divide
    k."""
    groups = groups or k
    if k % groups:
        raise InputError(f"{k} beams cannot be dealt to {groups} groups: let --beam-groups divide "
                         "--set-size")
    width = k // groups
    scores = torch.full((k,), -math.inf, device=model.device)
    scores[::width] = 0                      # rows begin alike: one beam a group
    done = torch.zeros(k, dtype=torch.bool, device=model.device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=model.device)
    logprobs = [[] for _ in range(k)]

    def choose(logits, step):
        nonlocal done, logprobs
        logp, vocab = logits.log_softmax(-1), logits.shape[1]
        taken, picks = torch.zeros(vocab, device=logits.device), []
        for first in range(0, k, width):
            rows = slice(first, first + width)
            total = scores[rows, None] + logp[rows] - penalty * taken
            total[done[rows]] = -math.inf    # an ended beam has one continuation, itself:
            total[done[rows], 0] = scores[rows][done[rows]]
            scores[rows], place = total.flatten().topk(width)
            parents, tokens = place // vocab + first, place % vocab
            tokens = tokens.masked_fill(done[parents], -1)
            taken += tokens[tokens >= 0].bincount(minlength=vocab)
            picks.append((tokens, parents))
        tokens, parents = (torch.cat(x) for x in zip(*picks))
        gained = logp[parents, tokens.clamp(min=0)].tolist()
        logprobs = [logprobs[p] + [gain] if token >= 0 else logprobs[p]
                    for p, token, gain in zip(parents.tolist(), tokens.tolist(), gained)]
        done = done[parents] | torch.isin(tokens, stops)
        return tokens, parents
    written = plain_loop(model, prompt, k, max_new_tokens, choose)
    return written, logprobs, done.tolist()


def write_beams(session, visit, prompt, k, helper):
    args = session.args
    return diverse_beams(session.model, prompt, args.set_size, groups=args.beam_groups,
                         penalty=args.beam_penalty, max_new_tokens=args.max_new_tokens,
                         stop_ids=session.stops)


@torch.no_grad()
def contrastive_drafts(model, amateur, prompt, noise, *, plausible, max_new_tokens, stop_ids=(),
                       **sampling):
    """Drafts that an expert finds likelier than an amateur does (arXiv 2210.15097, eqs. 2 and 3) ->
    (tokens, logprobs, finished). A token scores log p_expert - log p_amateur where p_expert is at
    least `plausible` times its largest, else it cannot be written. The paper searches for the best
    sum with beams; here each of the k drafts samples from the softmax of the scores, so that they
    are independent; temperature 0 takes the best token at each step.

    amateur: (model, context): what is read within context(model). noise: (k, max_new_tokens) of
    `uniforms`; logprobs are of the distribution sampled from."""
    other, within = amateur
    if other.vocab != model.vocab:
        raise InputError(f"the amateur has {other.vocab} tokens and the expert {model.vocab}: give "
                         "an --amateur with the same tokenizer")
    k, noise = len(noise), noise.to(model.device)
    with within(other):
        reader = Reader(other, prompt, k)
    done, logprobs = [False] * k, [[] for _ in range(k)]

    def choose(logits, step):
        nonlocal done
        logp, weaker = logits.log_softmax(-1), reader.logits().log_softmax(-1)
        p = logp.exp()
        scores = logp - weaker
        scores = scores.masked_fill(p < plausible * p.amax(-1, keepdim=True), -math.inf)
        tokens, chances = sample(scores, noise[:, step], **sampling)
        with within(other):
            reader.read(tokens)
        ended = torch.tensor(done, device=tokens.device)
        for row, chance in zip(logprobs, chances.masked_fill(ended, math.nan).tolist()):
            if not math.isnan(chance):
                row.append(chance)
        done = [d or t in stop_ids for d, t in zip(done, tokens.tolist())]
        return tokens.masked_fill(ended, -1), None
    return plain_loop(model, prompt, k, max_new_tokens, choose), logprobs, done


def write_contrastive(session, visit, prompt, k, helper):
    args = session.args
    noise = uniforms([session.stream(session.stage, 0, visit)], k, args.max_new_tokens)[0]
    return contrastive_drafts(session.model, helper, prompt, noise, plausible=args.plausible,
                              max_new_tokens=args.max_new_tokens, stop_ids=session.stops,
                              **{"temperature": 1.0} | sampling_of(args))


# ---- The best of several samples -----------------------------------------------------------------

@torch.no_grad()
def draft_scores(session, pairs, temperature=1.0):
    """(log-probability, entropy) of the drafts of (prompt ids, list of ids) pairs under the model
    as it stands: each P lists of sums over the draft's tokens, stop token included. Equal drafts of
    a post are scored once, but in an ensemble, where draft d is scored by member d mod M."""
    members, all_drafts = session.model.members, [list(map(tuple, drafts)) for _, drafts in pairs]
    once = all_drafts if members > 1 else [list(dict.fromkeys(drafts)) for drafts in all_drafts]
    sizes, groups = list(map(len, once)), [(prompt, some) for (prompt, _), some in zip(pairs, once)]
    sums = torch.zeros(2, sum(sizes), dtype=torch.float64)
    for rows in session.passes(pack(groups, 2 ** 14, session.model.device, members)):
        for total, values in zip(sums, token_logprobs(session.model, rows, temperature)):
            total.index_add_(0, rows.draft.cpu(), values.double().cpu())
    at = [range(len(drafts)) if members > 1 else list(map(some.index, drafts))
          for drafts, some in zip(all_drafts, once)]
    return [[part[list(i)].tolist() for part, i in zip(total.split(sizes), at)] for total in sums]


def majority(session, visits, prompts, tokens, texts, helper):
    """Self-consistency (arXiv 2203.11171): how many of the candidates give the same answer. Answers
    are compared as texts, letter case, punctuation and spacing aside; an empty one is none."""
    out = []
    for group in texts:
        answers = [data.normalise(text) or "".join(text.split()) for text in group]
        counts = Counter(a for a in answers if a)
        out.append([counts[a] for a in answers])
    return out


def rewarded(session, visits, prompts, tokens, texts, helper):
    """Best-of-n: what a candidate earns. Each draft is chosen for a reader of its own."""
    seen = Counter()                         # a post's drafts, in turn: on any rank the same
    streams = []
    for visit in visits:
        streams.append(session.stream("best", seen[visit], visit))
        seen[visit] += 1
    return helper([session.posts[v.index] for v in visits], texts, streams)


def informative(session, visits, prompts, tokens, texts, helper):
    """MMI-antiLM (arXiv 1510.03055, eq. 9): log p(y | x) - lambda log p(y), in which y without x is
    the reply to an empty post. The paper's reward for length is left out, and all tokens of y
    count, where it takes the first ones."""
    empty = data.encode_prompt(session.tokenizer, session.domain.messages(data.Post("", "", ())),
                               session.chat)
    given, _ = draft_scores(session, list(zip(prompts, tokens)))
    alone, _ = draft_scores(session, [(empty, drafts) for drafts in tokens])
    weight = session.args.mmi
    return [[a - weight * b for a, b in zip(*both)] for both in zip(given, alone)]


def best_of(score):
    """A decoder that samples --pool candidates for each of the k drafts and keeps the one of the
    highest score, the first of equals: its k drafts are independent, at --pool times the cost.
    score(session, visits, prompts, tokens, texts, helper) -> P k lists of --pool numbers, the
    arguments having a row for each draft."""
    def decode(session, visits, k, progress=None, helper=None):
        pool = session.args.pool
        prompts, samples, texts = session.sample_drafts(visits, 0, k * pool, progress)
        deal = lambda rows: [row[i:i + pool] for row in rows for i in range(0, k * pool, pool)]
        repeat = lambda items: [item for item in items for _ in range(k)]
        scores = score(session, repeat(visits), repeat(prompts), deal(samples.tokens), deal(texts),
                       helper)
        best = [max(range(pool), key=row.__getitem__) for row in scores]

        def kept(rows):
            flat = [group[i] for group, i in zip(deal(rows), best)]
            return [flat[i:i + k] for i in range(0, len(flat), k)]
        parts = samples.tokens, samples.logprobs, samples.finished
        return Samples(*map(kept, parts)), kept(texts)
    return decode


# ---- A set in one prompt -------------------------------------------------------------------------

LIST = "Write {n} different replies, each on a line of its own, numbered from 1 to {n}."
VERBALIZED = ("Write {n} different replies, each on a line of its own: the probability of that "
              "reply, from 0 to 1, then a bar |, then the reply.")


def read_list(text, noise=None):
    """The replies of a numbered list, in order."""
    found = re.findall(r"^[ \t]*\(?\d+[.):][ \t]*(\S.*)$", text, re.MULTILINE)
    return [reply.strip() for reply in found]


def read_verbalized(text, noise):
    """The replies of lines "probability | reply", drawn without replacement by those probabilities
    (noise: uniform numbers, one a line): the order in which exponential clocks of these rates
    ring. A probability of 0 or none at all comes last."""
    found = re.findall(r"^[ \t]*([\d.]*)(%?)[ \t]*\|[ \t]*(\S.*)$", text, re.MULTILINE)
    rings = []
    for (number, percent, reply), u in zip(found, noise):
        try:
            rate = float(number) / (100 if percent else 1)
        except ValueError:                   # "" or "0.3.1"
            rate = 0.0
        rings.append((-math.log1p(-float(u)) / rate if rate > 0 else math.inf, reply.strip()))
    return [reply for _, reply in sorted(rings, key=lambda ring: ring[0])]


def in_one_prompt(request, read, candidates):
    """A decoder that asks for a whole set in one prompt, `request` under the post, and reads the
    replies out of the answer. A set that the model did not write in full is filled up with empty
    drafts, which are wrong. candidates(args) -> how many replies to ask for. The drafts' ids are
    those of their texts; they have no logprobs."""
    def decode(session, visits, k, progress=None, helper=None):
        args, size, count = session.args, session.args.set_size, candidates(session.args)
        asked = "\n\n" + request.format(n=count)
        prompts, seeds = [], [session.stream(session.stage, 0, v) for v in visits]
        for visit in visits:
            *before, last = session.domain.messages(session.posts[visit.index])
            turns = [*before, last | {"content": last["content"] + asked}]
            prompts.append(data.encode_prompt(session.tokenizer, turns, session.chat))
        samples = generate(session.model, prompts, k=k // size, stop_ids=session.stops, seed=seeds,
                           max_new_tokens=count * args.max_new_tokens, max_rows=args.max_rows,
                           progress=progress, **sampling_of(args))
        out, texts = Samples([], [], []), []
        draws = uniforms([session.stream("draw", 0, v) for v in visits], k // size, count)
        for lists, ended, noise in zip(texts_of(session, samples.tokens), samples.finished, draws):
            drafts, finished = [], []
            for text, whole, u in zip(lists, ended, noise):
                found = read(text, u)[:size]
                drafts += found + [""] * (size - len(found))
                finished += [whole] * size
            texts.append(drafts)
            out.finished.append(finished)
            out.tokens.append([data.encode_reply(session.tokenizer, text) for text in drafts])
            out.logprobs.append([[] for _ in drafts])
        return out, texts
    return decode


# ---- The register --------------------------------------------------------------------------------

class Way(NamedTuple):
    """A line of DECODERS."""
    function: Callable
    about: str
    paper: str
    knobs: tuple = SAMPLING                  # the flags that it reads
    joint: bool = False                      # drafts hang together in sets of --set-size


POOL, SET = (*SAMPLING, "pool"), (*SAMPLING, "set_size")
DECODERS = {
    "sampling": Way(sampled, "temperature, top-k, nucleus, min-p, in that order",
                    "arXiv 1904.09751, 2407.01082"),
    "beams": Way(by_post(write_beams), "diverse beam search, groups with a Hamming penalty",
                 "arXiv 1610.02424", ("set_size", "beam_groups", "beam_penalty"), True),
    "contrastive": Way(by_post(write_contrastive), "what an expert says and an amateur would not",
                       "arXiv 2210.15097", (*SAMPLING, "amateur", "plausible")),
    "self-consistency": Way(best_of(majority), "the most frequent of --pool answers",
                            "arXiv 2203.11171", POOL),
    "best-of-n": Way(best_of(rewarded), "the best of --pool candidates by the reward --best-by",
                     "arXiv 2009.01325", (*POOL, "best_by")),
    "mmi": Way(best_of(informative), "of --pool candidates the one that says most about the post",
               "arXiv 1510.03055", (*POOL, "mmi")),
    "list": Way(in_one_prompt(LIST, read_list, lambda args: args.set_size),
                "k different replies asked for in one prompt", "arXiv 2510.01171, its baseline",
                SET, True),
    "verbalized": Way(in_one_prompt(VERBALIZED, read_verbalized, lambda args: args.pool),
                      "--pool replies with their probabilities in one prompt, k drawn by them",
                      "arXiv 2510.01171", (*SET, "pool"), True),
}


def alone(model, decoder):
    """InputError for an ensemble under a decoder that is not plain sampling: draft d is member d's,
    and what others choose or search for would be of one member and scored by another."""
    if model.deal is not None and decoder != "sampling":
        raise InputError(f"--decoder {decoder}: an ensemble shares its drafts out over its members "
                         "by plain sampling alone")


def check_decoder(args, k):
    """InputError where the flags of --decoder do not fit together or to k drafts a post."""
    way, size = DECODERS[args.decoder], args.set_size
    for good, what in (
            (args.pool >= 1, f"--pool {args.pool}: at least 1 candidate"),
            (0 <= args.plausible <= 1, f"--plausible {args.plausible}: a share, 0 to 1"),
            (args.mmi >= 0, f"--mmi {args.mmi}: 0 or more"),
            (args.beam_penalty >= 0, f"--beam-penalty {args.beam_penalty}: 0 or more"),
            (args.beam_groups >= 0, f"--beam-groups {args.beam_groups}: 0 or more"),
            (not way.joint or 1 <= size <= k, f"--set-size {size}: 1 to the {k} drafts of a post"),
            (args.decoder != "beams" or size % (args.beam_groups or 1) == 0,
             f"--set-size {size}: --beam-groups {args.beam_groups} must divide it"),
            (args.decoder != "verbalized" or args.pool >= size,
             f"--pool {args.pool}: verbalized sampling asks for at least --set-size {size}")):
        if not good:
            raise InputError(what)
