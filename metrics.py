"""What the completions of one post are worth: Pass@k, Distinct-n, Self-BLEU, the Vendi score.

Pure functions of texts, counts and numbers: nothing here knows a model, a file or a run. What a
word is, in any script, is in support/words.py. A number that cannot be computed is an error, never
a zero."""

import math
from collections import Counter

import numpy as np

from support.posts import different_share
from support.registry import METRICS
from support.words import words


KS = (1, 2, 3, 5, 10, 20)  # the k of Pass@k; 5 is the app in every choice of settings


# ---- Metrics of one post -------------------------------------------------------------------------

def pass_at_k(n, c, k):
    """Chance that k of n completions, drawn without replacement, contain one of the c right ones:
    1 - C(n-c, k) / C(n, k).

    Unbiased for independent completions (Chen et al. 2021, arXiv 2107.03374, eq. 1), where
    1 - (1 - c/n)^k reads low. ValueError unless n >= k >= 1 and 0 <= c <= n."""
    if not n >= k >= 1:
        raise ValueError(f"pass@{k} needs k between 1 and the number of completions, which is {n}")
    if not 0 <= c <= n:
        raise ValueError(f"{c} right completions among {n} is not a count")
    every = math.comb(n, k)
    # Integers up to the one division: nothing is rounded for large n.
    return (every - math.comb(n - c, k)) / every


def ngrams(tokens, n):
    """Counter of the n-grams (tuples) of a token list; empty when the list is shorter than n."""
    return Counter(tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1))


def distinct_n(texts, n):
    """Different n-grams / all n-grams over the completions of one post, in (0, 1]; higher is more
    diverse.

    The form that divides by n-grams (Li et al. 2016, arXiv 1510.03055, divide by words). It falls
    with length: read it with the mean length. A text shorter than n words adds nothing;
    ValueError when no text has an n-gram."""
    counts = Counter()
    for text in texts:
        counts.update(ngrams(words(text), n))
    if not counts:
        raise ValueError(f"distinct-{n} needs a completion of at least {n} words")
    return len(counts) / counts.total()


def expectation_adjusted_distinct(texts, vocabulary):
    """EAD (Liu et al. 2022, arXiv 2202.13587): different words over the number expected of as many
    draws from `vocabulary` words, N / (V (1 - ((V - 1) / V)^C)). Unlike distinct-1 it does not fall
    with length. ValueError when no text has a word."""
    tokens = []
    for text in texts:
        tokens.extend(words(text))
    if not tokens:
        raise ValueError("EAD needs a completion with a word")
    expected = vocabulary * (1 - (1 - 1 / vocabulary) ** len(tokens))
    return len(set(tokens)) / expected


def duplicate_rate(texts):
    """The share of texts that repeat an earlier one (see support.posts.different_share), in
    [0, 1 - 1/n]. Empty texts are equal."""
    return 1 - different_share(texts)


def self_bleu(texts, max_n=4):
    """Mean BLEU of each text against all the others, in [0, 1]; lower is more diverse.

    Orders 1..max_n weigh the same; an order without a match counts as 0.1 (nltk's method1
    smoothing); the brevity penalty takes the other text closest in length, the shorter of two. A
    text that shares no word with another scores 0, and so does an empty one, as in nltk. ValueError
    for fewer than 2 texts or when all are empty."""
    tokenised = [words(text) for text in texts]
    if len(tokenised) < 2 or not any(tokenised):
        raise ValueError("self-BLEU needs two completions and at least one word")
    matches = [clipped_matches(tokenised, n) for n in range(1, max_n + 1)]
    lengths = list(map(len, tokenised))
    scores = []
    for i, length in enumerate(lengths):
        if matches[0][i][0] == 0:
            scores.append(0.0)
            continue
        logs = []
        for order in matches:
            matched, total = order[i]
            logs.append(math.log((matched or 0.1) / total))
        others = lengths[:i] + lengths[i + 1:]
        closest = min(others, key=lambda other: (abs(other - length), other))
        brevity = min(1.0, math.exp(1 - closest / length))
        scores.append(brevity * math.exp(math.fsum(logs) / max_n))
    return math.fsum(scores) / len(scores)


def clipped_matches(tokenised, n):
    """For each text (clipped n-gram matches against all the others, its number of n-grams).

    An n-gram's largest count over all texts but one follows from its two largest counts and the
    owner of the largest."""
    counts = [ngrams(tokens, n) for tokens in tokenised]
    best = {}
    second = {}
    owner = {}
    for i, count in enumerate(counts):
        for gram, times in count.items():
            if times > best.get(gram, 0):
                second[gram] = best.get(gram, 0)
                best[gram] = times
                owner[gram] = i
            elif times > second[gram]:
                second[gram] = times
    result = []
    for i, count in enumerate(counts):
        matched = 0
        for gram, times in count.items():
            elsewhere = second[gram] if owner[gram] == i else best[gram]
            matched += min(times, elsewhere)
        result.append((matched, max(1, count.total())))
    return result


def vendi_score(embeddings):
    """Effective number of different completions, in [1, n]: exp of the entropy of the eigenvalues
    of E E^T / n.

    embeddings (n, dim) with unit rows (Friedman and Dieng 2023, arXiv 2210.02410); ValueError
    otherwise."""
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2 or not len(rows) or not np.allclose((rows ** 2).sum(1), 1, atol=2e-3):
        raise ValueError("the Vendi score needs embeddings (n, dim) of unit length, got shape "
                         f"{rows.shape}")
    values = np.linalg.eigvalsh(rows @ rows.T / len(rows))
    values = values[values > 1e-12]  # 0 log 0 = 0; rounding leaves eigenvalues of about -1e-17
    return float(np.exp(-(values * np.log(values)).sum()))


def post_metrics(record, ks=KS, vocabulary=10_000):
    """One post's record -> {metric: float}.

    With styles ("voices"), pass@k = sum over styles s of users[s] * pass_at_k(n, c_s, k), c_s the
    number of completions right in style s: the exact mean over users drawn by popularity and over k
    of the n completions, so no user is simulated; coverage@k is the same with equal popularity.
    `valid` is the share of right completions, `stances` the number of styles among them.
    Without styles c is the number of passed completions, and recall@k of methods/metrics.py, where
    a post has several people's replies, the share of them that some of k completions agrees with.
    longest@k and pick_X@k of methods/metrics.py (k >= 2): how often the completion passes that is
    picked from k by length or by X: reward, likelihood, random, the record's own "scores"; an
    oracle's pick is pass@k. `words` is the mean length, `truncated` the share cut off.
    distinct-n, ead and self-bleu are absent where no completion is long enough. Completions that
    are sampled jointly ("set") are for report/sets.py. ValueError says which field is wrong."""
    check_record(record)
    completions = record["drafts"]
    if "voices" in record:
        out, passed = pleasing(record, ks)
    else:
        passed = list(map(float, record["passed"]))
        out = passing(passed, ks)
    out |= text_metrics(completions)
    out |= {"duplicates": duplicate_rate(completions), "semantic": record["semantic"],
            "vendi": record["vendi"], "reward": math.fsum(record["rewards"]) / len(completions),
            "truncated": record["finished"].count(False) / len(completions)}
    for row in METRICS.values():
        out |= row.function(record, passed, ks, vocabulary)
    for name, value in out.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, not a finite number")
    return out


# Fields of a record with an entry a completion: those that every record has, and optional ones.
ALWAYS = ("rewards", "finished")
SOMETIMES = ("agrees", "logprobs", "entropies", "base_logprobs", "tokens")


def check_record(record):
    """ValueError for a field that lacks an entry a completion."""
    n = len(record["drafts"])
    fields = {}
    for name in (*ALWAYS, "voices" if "voices" in record else "passed", *SOMETIMES):
        if name in record or name not in SOMETIMES:
            fields[name] = record[name]
    fields |= record.get("scores", {})
    for name, values in fields.items():
        if len(values) != n or not n:
            raise ValueError(f'"{name}" has {len(values)} entries for {n} completions')


def pleasing(record, ks):
    """({pass@k, coverage@k, valid, stances}, what each completion is worth) by style."""
    users = record.get("readers")
    if not users or min(users.values()) < 0 or abs(math.fsum(users.values()) - 1) > 1e-6:
        raise ValueError('completions judged by style need "readers", popularity that sums to 1')
    counts = Counter()
    for right in record["voices"]:
        counts.update(set(right))
    unknown = sorted(set(counts) - set(users))
    if unknown:
        raise ValueError(f"no user likes the style {unknown[0]!r}")
    n = len(record["drafts"])
    out = {}
    for k in ks:
        chances = []
        weighted = []
        for style, share in users.items():
            chance = pass_at_k(n, counts[style], k)
            chances.append(chance)
            weighted.append(share * chance)
        out[f"pass@{k}"] = math.fsum(weighted)
        out[f"coverage@{k}"] = math.fsum(chances) / len(chances)
    out["valid"] = sum(map(bool, record["voices"])) / n
    out["stances"] = float(len(counts))
    worth = []
    for right in record["voices"]:
        worth.append(math.fsum(users[style] for style in set(right)))
    return out, worth


def text_metrics(completions):
    """{words, self-bleu, distinct-n}: those that the completions are long enough for."""
    lengths = [len(words(completion)) for completion in completions]
    out = {"words": sum(lengths) / len(lengths)}
    if max(lengths) >= 1:
        out["distinct-1"] = distinct_n(completions, 1)
    if max(lengths) >= 1 and len(completions) > 1:
        out["self-bleu"] = self_bleu(completions)
    if max(lengths) >= 2:
        out["distinct-2"] = distinct_n(completions, 2)
    return out


def passing(passed, ks):
    """{pass@k, valid} of completions that passed or not."""
    n = len(passed)
    right = int(sum(passed))
    out = {}
    for k in ks:
        out[f"pass@{k}"] = pass_at_k(n, right, k)
    out["valid"] = sum(passed) / n
    return out
