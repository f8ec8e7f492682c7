"""Metrics of one post besides Pass@k, Distinct-n, Self-BLEU and Vendi, and what two of them add to
its record."""

import itertools
import math
from collections import Counter

import numpy as np

from metrics import expectation_adjusted_distinct, pass_at_k
from polylora import pair_distances
from rewards import AgreementReward
from support.pass_bar import bar
from support.posts import normalise
from support.registry import MEASURES, METRICS
from support.words import words


def max_at_k(rewards, k):
    """Unbiased estimate of E[best of k rewards] from n >= k rewards: the mean maximum over all
    k-subsets.

    The i-th smallest reward is the maximum of C(i-1, k-1) subsets (PKPO, arXiv 2505.15201,
    max_g@k). Equals pass_at_k for rewards of 0 and 1. ValueError for k outside 1..n or a reward
    that is not finite."""
    n = len(rewards)
    if not n >= k >= 1 or not all(map(math.isfinite, rewards)):
        raise ValueError(f"max@{k} needs at least {k} finite rewards and k >= 1, got "
                         f"{list(rewards)}")
    every = math.comb(n, k)
    ordered = sorted(rewards)
    return math.fsum(math.comb(i, k - 1) / every * ordered[i] for i in range(n))


def pick_at_k(passed, scores, k):
    """What the completion with the highest score of k is worth, on average over the k-subsets of n:
    best-of-k by a selector that sees `scores` only. passed (n,): what each completion is worth.

    Completions with equal scores are equally likely to be picked, so equal scores throughout give
    a random pick, pass_at_k(n, c, 1). ValueError for k outside 1..n or a score that is not
    finite."""
    n = len(passed)
    if not n >= k >= 1 or len(scores) != n or not all(map(math.isfinite, scores)):
        raise ValueError(f"a pick of {k} needs at least {k} completions, each with a finite score")
    ranked = sorted(zip(scores, passed), reverse=True)
    every = math.comb(n, k)
    total = 0.0
    first = 0                                  # the rank of the best of a run of equal scores
    for _, tied in itertools.groupby(ranked, key=lambda pair: pair[0]):
        worth = [value for _, value in tied]
        last = first + len(worth)
        # The completion at rank i (from 0) is the best of C(n-1-i, k-1) subsets.
        subsets = sum(math.comb(n - 1 - rank, k - 1) for rank in range(first, last))
        total += subsets / every * math.fsum(worth) / len(worth)
        first = last
    return total


def longest(completions, passed, ks):
    """{longest@k}, k >= 2: what the longest of k is worth, on average over k-subsets."""
    n = len(completions)
    order = sorted(range(n), key=lambda i: (-len(completions[i]), i))
    out = {}
    for k in ks:
        if k > 1:  # the completion at rank i is the longest of C(n-1-i, k-1) subsets
            terms = [math.comb(n - 1 - rank, k - 1) * passed[i] for rank, i in enumerate(order)]
            out[f"longest@{k}"] = math.fsum(terms) / math.comb(n, k)
    return out


def picked(record, passed, ks):
    """{pick_X@k} for the selectors X whose scores the record has."""
    scores = {"reward": record["rewards"], "random": [0.0] * len(passed)}
    if "logprobs" in record:
        scores["likelihood"] = record["logprobs"]
    scores |= record.get("scores", {})
    out = {}
    for k in ks:
        for name, values in scores.items():
            out[f"pick_{name}@{k}"] = pick_at_k(passed, values, k)
    return out


def likelihoods(record):
    """What the policy and the base say about the completions, per token and at temperature 1: the
    policy's entropy and mean log-probability in nats, and the base's perplexity,
    exp(- sum log p_base / tokens) of all the post's completions together. {} if not measured."""
    if "tokens" not in record:
        return {}
    tokens = sum(record["tokens"])
    base = math.fsum(record["base_logprobs"]) / tokens
    return {"entropy": math.fsum(record["entropies"]) / tokens,
            "logprob": math.fsum(record["logprobs"]) / tokens,
            "perplexity": math.exp(-base)}


def judged(record):
    """A judge's mean probability of yes by rubric; and, of completions against a person's reply in
    both orders: `wins`, a tie counting half, and `ties`, when the two orders disagree."""
    if "judge" not in record:
        return {}
    verdicts = dict(record["judge"])
    pairs = verdicts.pop("pairs", None)       # P(completion is better), shown first and second
    out = {f"judge-{name}": math.fsum(values) / len(values) for name, values in verdicts.items()}
    if pairs:
        won = [point(first) + point(second) for first, second in pairs]
        out["judge-wins"] = sum(won) / 2 / len(won)
        out["judge-ties"] = won.count(1) / len(won)
    return out


def point(chance):
    """1 if better is likelier than not, 1/2 if undecided, 0 otherwise."""
    if chance == 0.5:
        return 0.5
    return 1 if chance > 0.5 else 0


@METRICS.add("longest", "what the longest of k is worth")
def pick_longest(record, passed, ks, vocabulary):
    return longest(record["drafts"], passed, ks)


@METRICS.add("picks", "what is picked of k by a selector's scores")
def picks(record, passed, ks, vocabulary):
    return picked(record, passed, [k for k in ks if k > 1])


@METRICS.add("ead", "expectation-adjusted distinct words (arXiv 2202.13587)")
def ead(record, passed, ks, vocabulary):
    if not any(words(completion) for completion in record["drafts"]):
        return {}
    return {"ead": expectation_adjusted_distinct(record["drafts"], vocabulary)}


@METRICS.add("max", "the best reward of k (arXiv 2505.15201)")
def best_reward(record, passed, ks, vocabulary):
    return {f"max@{max(ks)}": max_at_k(record["rewards"], max(ks))}


@METRICS.add("likelihoods", "entropy, log-probability, the base's perplexity")
def of_likelihoods(record, passed, ks, vocabulary):
    return likelihoods(record)


@METRICS.add("judge", "a judge's verdicts")
def of_judge(record, passed, ks, vocabulary):
    return judged(record)


# ---- Does D see what is counted? -----------------------------------------------------------------

def separation(distances, answers):
    """How well a distance separates answers, an AUC: of a pair with one answer and a pair with two,
    how often is the latter the farther apart? Ties count half; .5 is chance. distances (n, n);
    answers, n hashables. None where either kind of pair is missing."""
    i, j = np.triu_indices(len(answers), 1)
    pairs = distances[i, j]
    same = np.array([answers[a] == answers[b] for a, b in zip(i, j)], bool)
    near = np.sort(pairs[same])
    far = pairs[~same]
    if not len(near) or not len(far):
        return None
    below = np.searchsorted(near, far, "left") + np.searchsorted(near, far, "right")
    return float(below.mean() / 2 / len(near))


def add_separation(session, records, scored):
    """How well D's distances separate the styles of right completions, each wording once: equal
    ones are never apart."""
    if not session.domain.styles:
        return
    for record, vectors in zip(records, scored.embeddings):
        last = {}                            # wording -> the last right completion with it
        for i, text in enumerate(record["drafts"]):
            if record["voices"][i]:
                last[normalise(text)] = i
        kept = list(last.values())
        distances = pair_distances(vectors[None, kept])[0].cpu().numpy()
        value = separation(distances, [tuple(record["voices"][i]) for i in kept])
        if value is not None:
            record["separation"] = value


MEASURES.add("separation", "whether D's distances separate styles")(add_separation)


@METRICS.add("separation", "whether D's distances separate styles, an AUC")
def of_separation(record, passed, ks, vocabulary):
    return {"separation": record["separation"]} if "separation" in record else {}


# ---- Agreement with several people's replies -----------------------------------------------------

def load_agreement(session):
    """Set the cosine above which a completion agrees with a reply: what 19 of 20 replies to other
    posts do not exceed. For posts with several people's replies, without a verifier."""
    session.agreement = None
    several = any(len(post.replies) > 1 for post in session.posts)
    if several and not session.domain.styles:
        answered = [post for post in session.posts if post.replies]
        reward = AgreementReward(session.embedder)
        session.agreement, _ = bar(answered, reward, compares_replies=True)


def add_agreement(session, records, scored):
    """Which of people's replies each completion agrees with, on posts that have several."""
    if session.agreement is None:
        return
    # In one call, also where there are none: with --shard all ranks make equally many.
    sizes = []
    texts = []
    for post in scored.posts:
        replies = post.replies if len(post.replies) > 1 else ()
        sizes.append(len(replies))
        texts.extend(replies)
    people = session.embedder([texts or [""]])[0][:len(texts)].split(sizes)
    for record, vectors, replies in zip(records, scored.embeddings, people):
        if len(replies):
            close = vectors @ replies.T > session.agreement
            record["agrees"] = [row.nonzero()[:, 0].tolist() for row in close]
            record["people"] = len(replies)


MEASURES.add("agreement", "which of several people's replies a completion agrees with",
             load=load_agreement)(add_agreement)


def recalled(record, ks):
    """{recall@k}: the share of people's replies that some of k completions agrees with."""
    n = len(record["drafts"])
    counts = Counter()
    for replies in record["agrees"]:
        counts.update(set(replies))
    out = {}
    for k in ks:
        chances = [pass_at_k(n, counts[reply], k) for reply in range(record["people"])]
        out[f"recall@{k}"] = math.fsum(chances) / len(chances)
    return out


@METRICS.add("recall", "the share of people's replies that some of k agrees with")
def recall(record, passed, ks, vocabulary):
    return recalled(record, ks) if "agrees" in record else {}
