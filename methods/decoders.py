"""Decoders: ways to k completions for a post, by name, for evaluate.py's --decoder.

A decoder is (session, visits, k, progress, helper) -> (Samples, texts): for each visit k
completions by the model and the flags of a trainer.Session; `helper` is what else it needs (an
amateur model, a reward). Completions of one post are independent of each other, or, where DECODERS
says joint, sampled jointly in sets of --set-size, which follow one another: Pass@k of such
completions is that of whole sets. In order: token by token, over the plain loop of generate.py; the
best of several samples; sets asked for in one prompt; the registry's entries."""

import math
import re
from collections import Counter
from contextlib import nullcontext

import torch

import data
from engine import generate
from generate import SAMPLING, DecodingState, Samples, plain_loop, sample
from lora import base
from methods.likelihoods import completion_scores
from rewards import make_reward
from support.checkpoint import checkpoint_hash
from support.draws import uniforms
from support.files import InputError
from support.posts import Post, normalise
from support.registry import DECODERS, REWARDS
from trainer import load_model, sampling_of


def texts_of(session, tokens):
    """The texts of P lists of id lists."""
    out = []
    for completions in tokens:
        out.append([data.decode(session.tokenizer, ids) for ids in completions])
    return out


# ---- Token by token, over the plain loop ---------------------------------------------------------

def by_post(write):
    """A decoder from write(session, visit, prompt, k, helper) -> (tokens, logprobs, finished) of
    the k completions of one post."""
    def decode(session, visits, k, progress=None, helper=None):
        if session.model.lockstep:
            raise InputError("--decoder beams, contrastive and quasi write post by post, which "
                             "weights spread over ranks cannot: leave out --shard")
        out = Samples([], [], [])
        for visit in visits:
            prompt = session.prompt(visit.index)
            tokens, logprobs, finished = write(session, visit, prompt, k, helper)
            out.tokens.append(tokens)
            out.logprobs.append(logprobs)
            out.finished.append(finished)
            if progress:
                progress(1)
        return out, texts_of(session, out.tokens)
    return decode


def diverse_beams(model, prompt, k, *, groups, penalty, max_new_tokens, stop_ids=()):
    """k completions by beam search in `groups` groups of k / groups beams, 0: one beam a group
    (arXiv 1610.02424, algorithm 1, Hamming diversity) -> (tokens, logprobs, finished), the best of
    each group first. One group: plain beam search.

    At each step a group takes the best of its beams' continuations by
    score + log p(token) - penalty * (how many beams of earlier groups took that token now), and the
    penalty stays in the score. A beam that has ended keeps its place while its score is among the
    best; lengths are not normalised. logprobs are the model's own. InputError unless groups divide
    k."""
    groups = groups or k
    if k % groups:
        raise InputError(f"{k} beams cannot be split into {groups} groups: let --beam-groups "
                         "divide --set-size")
    width = k // groups
    scores = torch.full((k,), -math.inf, device=model.device)
    scores[::width] = 0                      # rows begin equal: one beam a group
    done = torch.zeros(k, dtype=torch.bool, device=model.device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=model.device)
    logprobs = [[] for _ in range(k)]

    def choose_group(logp, first, taken):
        """(tokens, parents) of the group of beams that begins with the row `first`."""
        rows = slice(first, first + width)
        total = scores[rows, None] + logp[rows] - penalty * taken
        ended = done[rows]
        total[ended] = -math.inf             # an ended beam has one continuation, itself:
        total[ended, 0] = scores[rows][ended]
        scores[rows], place = total.flatten().topk(width)
        vocab = logp.shape[1]
        parents = place // vocab + first
        tokens = place % vocab
        return tokens.masked_fill(done[parents], -1), parents

    def choose(logits, step):
        nonlocal done, logprobs
        logp = logits.log_softmax(-1)
        vocab = logp.shape[1]
        taken = torch.zeros(vocab, device=logp.device)  # by beams of earlier groups
        picked = []
        for first in range(0, k, width):
            tokens, parents = choose_group(logp, first, taken)
            taken += tokens[tokens >= 0].bincount(minlength=vocab)
            picked.append(torch.stack((tokens, parents)))
        tokens, parents = torch.cat(picked, 1)
        gained = logp[parents, tokens.clamp(min=0)].tolist()
        extended = []
        for parent, token, gain in zip(parents.tolist(), tokens.tolist(), gained):
            extended.append(logprobs[parent] + ([gain] if token >= 0 else []))
        logprobs = extended
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
def contrastive_completions(model, amateur, prompt, noise, *, plausible, max_new_tokens,
                            stop_ids=(), **sampling):
    """Completions that an expert finds likelier than an amateur does (arXiv 2210.15097, eqs. 2 and
    3) -> (tokens, logprobs, finished). A token scores log p_expert - log p_amateur where p_expert
    is at least `plausible` times its largest, else it cannot be written. The paper searches for the
    best sum with beams; here each of the k completions samples from the softmax of the scores, so
    that they are independent; temperature 0 takes the best token at each step.

    amateur: (model, context): what is read within context(model). noise: (k, max_new_tokens) of
    `uniforms`; logprobs are of the distribution sampled from."""
    other, within = amateur
    if other.vocab != model.vocab:
        raise InputError(f"the amateur has {other.vocab} tokens and the expert {model.vocab}: give "
                         "an --amateur with the same tokenizer")
    k = len(noise)
    noise = noise.to(model.device)
    with within(other):
        state = DecodingState(other, prompt, k)
    done = [False] * k
    logprobs = [[] for _ in range(k)]

    def choose(logits, step):
        nonlocal done
        logp = logits.log_softmax(-1)
        weaker = state.logits().log_softmax(-1)
        p = logp.exp()
        implausible = p < plausible * p.amax(-1, keepdim=True)
        scores = (logp - weaker).masked_fill(implausible, -math.inf)
        tokens, chances = sample(scores, noise[:, step], **sampling)
        with within(other):
            state.read(tokens)
        ended = torch.tensor(done, device=tokens.device)
        for row, chance in zip(logprobs, chances.masked_fill(ended, math.nan).tolist()):
            if not math.isnan(chance):
                row.append(chance)
        done = [d or t in stop_ids for d, t in zip(done, tokens.tolist())]
        return tokens.masked_fill(ended, -1), None

    written = plain_loop(model, prompt, k, max_new_tokens, choose)
    return written, logprobs, done


def write_contrastive(session, visit, prompt, k, helper):
    args = session.args
    noise, = uniforms([session.seed_for(session.stage, 0, visit)], k, args.max_new_tokens)
    settings = {"temperature": 1.0} | sampling_of(args)
    return contrastive_completions(
        session.model, helper, prompt, noise, plausible=args.plausible,
        max_new_tokens=args.max_new_tokens, stop_ids=session.stops, **settings)


def majority(session, visits, prompts, tokens, texts, helper):
    """Self-consistency (arXiv 2203.11171): how many of the candidates give the same answer. Answers
    are compared as texts, letter case, punctuation and spacing aside; an empty one is none."""
    out = []
    for group in texts:
        answers = [normalise(text) or "".join(text.split()) for text in group]
        counts = Counter(a for a in answers if a)
        out.append([counts[a] for a in answers])
    return out


def rewarded(session, visits, prompts, tokens, texts, helper):
    """Best-of-n: what a candidate earns. Each completion is chosen for a user of its own."""
    seen = Counter()                         # a post's completions, in turn: on any rank the same
    seeds = []
    for visit in visits:
        seeds.append(session.seed_for("best", seen[visit], visit))
        seen[visit] += 1
    return helper([session.posts[v.index] for v in visits], texts, seeds)


def informative(session, visits, prompts, tokens, texts, helper):
    """MMI-antiLM (arXiv 1510.03055, eq. 9): log p(y | x) - lambda log p(y), in which y without x is
    the reply to an empty post. The paper's reward for length is left out, and all tokens of y
    count, where it takes the first ones."""
    empty = data.encode_prompt(session.tokenizer, session.domain.messages(Post("", "", ())),
                               session.chat)
    given, _ = completion_scores(session, list(zip(prompts, tokens)))
    alone, _ = completion_scores(session, [(empty, completions) for completions in tokens])
    weight = session.args.mmi
    scores = []
    for with_post, without in zip(given, alone):
        scores.append([a - weight * b for a, b in zip(with_post, without)])
    return scores


def best_of(score):
    """A decoder that samples --pool candidates for each of the k completions and keeps the one of
    the highest score, the first of equals: its k completions are independent, at --pool times the
    cost. score(session, visits, prompts, tokens, texts, helper) -> P k lists of --pool numbers, the
    arguments having a row for each completion."""
    def decode(session, visits, k, progress=None, helper=None):
        pool = session.args.pool
        prompts, samples, texts = session.sample_completions(visits, 0, k * pool, progress)
        scores = score(session, repeated(visits, k), repeated(prompts, k),
                       split_rows(samples.tokens, pool), split_rows(texts, pool), helper)
        best = [max(range(pool), key=row.__getitem__) for row in scores]

        def kept(rows):
            groups = split_rows(rows, pool)
            chosen = [group[i] for group, i in zip(groups, best)]
            return split_rows([chosen], k)

        out = Samples(kept(samples.tokens), kept(samples.logprobs), kept(samples.finished))
        return out, kept(texts)
    return decode


def repeated(items, k):
    """Each item k times."""
    return [item for item in items for _ in range(k)]


def split_rows(rows, size):
    """The rows' parts of `size` entries, as rows of their own."""
    parts = []
    for row in rows:
        for start in range(0, len(row), size):
            parts.append(row[start:start + size])
    return parts


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
        time = -math.log1p(-float(u)) / rate if rate > 0 else math.inf
        rings.append((time, reply.strip()))
    return [reply for _, reply in sorted(rings, key=lambda ring: ring[0])]


def in_one_prompt(request, read, candidates):
    """A decoder that asks for a whole set in one prompt, `request` under the post, and reads the
    replies out of the answer. A set that the model did not write in full is filled up with empty
    completions, which are wrong. candidates(args) -> how many replies to ask for. The completions'
    ids are those of their texts; they have no logprobs."""
    def decode(session, visits, k, progress=None, helper=None):
        args = session.args
        size = args.set_size
        count = candidates(args)
        prompts = []
        seeds = []
        draw_seeds = []
        for visit in visits:
            prompts.append(asking_prompt(session, visit, request.format(n=count)))
            seeds.append(session.seed_for(session.stage, 0, visit))
            draw_seeds.append(session.seed_for("draw", 0, visit))
        answers = generate(session.model, prompts, k=k // size, stop_ids=session.stops, seed=seeds,
                           max_new_tokens=count * args.max_new_tokens, max_rows=args.max_rows,
                           progress=progress, **sampling_of(args))
        noise = uniforms(draw_seeds, k // size, count)
        out = Samples([], [], [])
        texts = []
        for p, lists in enumerate(texts_of(session, answers.tokens)):
            completions = []
            finished = []
            for i, text in enumerate(lists):
                found = read(text, noise[p][i])[:size]
                completions += found + [""] * (size - len(found))
                finished += [answers.finished[p][i]] * size
            texts.append(completions)
            out.finished.append(finished)
            out.tokens.append([data.encode_reply(session.tokenizer, text) for text in completions])
            out.logprobs.append([[] for _ in completions])
        return out, texts
    return decode


def asking_prompt(session, visit, request):
    """The ids of a post's prompt with a request under the post."""
    *before, last = session.domain.messages(session.posts[visit.index])
    asking = last | {"content": last["content"] + "\n\n" + request}
    return data.encode_prompt(session.tokenizer, [*before, asking], session.chat)


POOL = (*SAMPLING, "pool")
SET = (*SAMPLING, "set_size")


def check_pool(args, k):
    if args.pool < 1:
        raise InputError(f"--pool {args.pool}: at least 1 candidate")


def pool_flags(p):
    add = p.add_argument
    add("--pool", type=int, default=8,
        help="candidates for each completion (self-consistency, best-of-n, mmi), or to ask for "
             "(verbalized)")


def check_contrastive(args, k):
    if not 0 <= args.plausible <= 1:
        raise InputError(f"--plausible {args.plausible}: a share, 0 to 1")


def amateur_settings(args):
    return {} if args.amateur == "base" else {"amateur_hash": checkpoint_hash(args.amateur)}


def amateur_of(session):
    """(model, context) of --amateur, see contrastive_completions."""
    args = session.args
    if args.amateur == "base":
        return session.model, base
    amateur = load_model(args.amateur, args, session.ranks.device)
    amateur.vocab = min(amateur.vocab, data.vocabulary(data.load_tokenizer(args.amateur)))
    return amateur, nullcontext


def contrastive_flags(p):
    add = p.add_argument
    add("--amateur", default="base",
        help="of contrastive: base, or the folder or hub name of a Qwen3 with the same tokenizer")
    add("--plausible", type=float, default=0.1,
        help="contrastive: least share of the expert's largest probability")


def selecting_reward(session):
    return make_reward(session.args.best_by, session)


def best_flags(p):
    add = p.add_argument
    add("--best-by", default="auto", choices=("auto", *REWARDS), help="reward of best-of-n")


def check_mmi(args, k):
    if args.mmi < 0:
        raise InputError(f"--mmi {args.mmi}: 0 or more")


def mmi_flags(p):
    add = p.add_argument
    add("--mmi", type=float, default=0.5, help="weight of log p(y) in mmi")


def check_beams(args, k):
    if args.beam_penalty < 0:
        raise InputError(f"--beam-penalty {args.beam_penalty}: 0 or more")
    if args.beam_groups < 0:
        raise InputError(f"--beam-groups {args.beam_groups}: 0 or more")
    if args.decoder == "beams" and args.set_size % (args.beam_groups or 1):
        raise InputError(f"--set-size {args.set_size}: --beam-groups {args.beam_groups} must "
                         "divide it")


def beam_flags(p):
    add = p.add_argument
    add("--beam-groups", type=int, default=0,
        help="groups of beams, which divide the set; 0: each beam is one, 1: plain beam search")
    add("--beam-penalty", type=float, default=0.5,
        help="off a token's log-probability for each beam of an earlier group that took it")


def check_verbalized(args, k):
    if args.decoder == "verbalized" and args.pool < args.set_size:
        raise InputError(f"--pool {args.pool}: verbalized sampling asks for at least --set-size "
                         f"{args.set_size}")


DECODERS.add("beams", "diverse beam search, groups with a Hamming penalty",
             paper="arXiv 1610.02424", knobs=("set_size", "beam_groups", "beam_penalty"),
             joint=True, check=check_beams, flags=beam_flags)(by_post(write_beams))
DECODERS.add("contrastive", "what an expert says and an amateur would not",
             paper="arXiv 2210.15097", knobs=(*SAMPLING, "amateur", "plausible"),
             check=check_contrastive, settings=amateur_settings, flags=contrastive_flags,
             helper=amateur_of)(by_post(write_contrastive))
DECODERS.add("self-consistency", "the most frequent of --pool answers", paper="arXiv 2203.11171",
             knobs=POOL, check=check_pool, flags=pool_flags)(best_of(majority))
DECODERS.add("best-of-n", "the best of --pool candidates by the reward --best-by",
             paper="arXiv 2009.01325", knobs=(*POOL, "best_by"), flags=best_flags,
             helper=selecting_reward, reward="best_by")(best_of(rewarded))
DECODERS.add("mmi", "of --pool candidates the one that says most about the post",
             paper="arXiv 1510.03055", knobs=(*POOL, "mmi"), check=check_mmi,
             flags=mmi_flags)(best_of(informative))
list_decoder = in_one_prompt(LIST, read_list, lambda args: args.set_size)
DECODERS.add("list", "k different replies asked for in one prompt",
             paper="arXiv 2510.01171, its baseline", knobs=SET, joint=True)(list_decoder)
verbalized_decoder = in_one_prompt(VERBALIZED, read_verbalized, lambda args: args.pool)
DECODERS.add("verbalized", "--pool replies with their probabilities in one prompt, k drawn by them",
             paper="arXiv 2510.01171", knobs=(*SET, "pool"), joint=True,
             check=check_verbalized)(verbalized_decoder)
