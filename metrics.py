"""What drafts are worth: metrics of one post, the limit of what is attainable, intervals.

Pure functions of texts, counts and numbers: nothing here knows a model, a file or a run. A number
that cannot be computed is an error, never a zero."""

import functools
import itertools
import math
import re
import unicodedata
from collections import Counter

import numpy as np

from data import normalise

KS = (1, 2, 3, 5, 10, 20)  # the k of Pass@k; 5 is the app in every choice of settings


# ---- Metrics of one post -------------------------------------------------------------------------

def pass_at_k(n, c, k):
    """Chance that k of n drafts, drawn without replacement, hold one of the c right: 1 - C(n-c, k)
    / C(n, k).

    Unbiased for independent drafts (Chen et al. 2021, arXiv 2107.03374, eq. 1); 1 - (1 - c/n)^k is
    not, it reads low. ValueError unless n >= k >= 1 and 0 <= c <= n."""
    if not n >= k >= 1:
        raise ValueError(f"pass@{k} needs k between 1 and the number of drafts, and there are {n} "
                         "drafts")
    if not 0 <= c <= n:
        raise ValueError(f"{c} right drafts among {n} is not a count")
    every = math.comb(n, k)  # whole numbers up to the one division, so nothing rounds for large n
    return (every - math.comb(n - c, k)) / every


def max_at_k(rewards, k):
    """Unbiased estimate of E[best of k rewards] from n >= k real rewards: the mean maximum
    over k-subsets.

    The i-th smallest reward is the maximum of C(i-1, k-1) subsets (PKPO, arXiv 2505.15201,
    max_g@k). Equals pass_at_k for rewards of 0 and 1. ValueError for k outside 1..n or a reward
    that is not finite."""
    n = len(rewards)
    if not n >= k >= 1 or not all(map(math.isfinite, rewards)):
        raise ValueError(f"max@{k} needs at least {k} finite rewards and k >= 1, got "
                         f"{list(rewards)}")
    every = math.comb(n, k)
    return math.fsum(math.comb(i, k - 1) / every * reward
                     for i, reward in enumerate(sorted(rewards)))


def pick_at_k(passed, scores, k):
    """What the draft with the highest score of k is worth, on average over the k-subsets of n
    drafts: best-of-k by a selector that sees `scores` alone. passed (n,): what each draft is worth.
    Among equal scores each is as likely to be picked, so equal scores throughout are a random
    reader, pass_at_k(n, c, 1). ValueError for k outside 1..n or a score that is not finite."""
    n = len(passed)
    if not n >= k >= 1 or len(scores) != n or not all(map(math.isfinite, scores)):
        raise ValueError(f"a pick of {k} needs at least {k} drafts, each with a finite score")
    ranked = sorted(zip(scores, passed), reverse=True)
    every, total, i = math.comb(n, k), 0.0, 0
    for _, tied in itertools.groupby(ranked, key=lambda pair: pair[0]):
        worth = [value for _, value in tied]
        # The (i+1)-th best is the best of C(n-1-i, k-1) subsets.
        subsets = sum(math.comb(n - 1 - j, k - 1) for j in range(i, i + len(worth)))
        total += subsets / every * math.fsum(worth) / len(worth)
        i += len(worth)
    return total


# Scripts without spaces between words: Thai, Lao, Khmer, Japanese, Chinese. There a character
# counts.
UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"


@functools.cache
def word_patterns():
    """The patterns of plain_words and words. Made once, when first asked for: of a hundred thousand
    characters they hold the marks that continue a letter, as in Hindi or in accents written apart,
    which are no part of \\w."""
    marks = "".join(c for c in map(chr, range(0x300, 0x1f000)) if unicodedata.category(c)[0] == "M")
    letters = rf"[^\W{UNSPACED}]+(?:[{marks}]+[^\W{UNSPACED}]*)*"
    return (re.compile(rf"[\w{marks}]+"),
            re.compile(rf"[{UNSPACED}]|{letters}(?:['’]{letters})*|[^\w\s]"))


def plain_words(text):
    """Lower-cased words of letters, marks, digits and _, by which drafts are compared."""
    return word_patterns()[0].findall(unicodedata.normalize("NFC", text.lower()))


def words(text):
    """Lower-cased words ("don't" is one), single characters of scripts without spaces, and single
    punctuation marks or emoji: what all metrics count."""
    return word_patterns()[1].findall(unicodedata.normalize("NFC", text.lower()))


def ngrams(tokens, n):
    """Counter of the n-grams (tuples) of a token list; empty when the list is shorter than n."""
    return Counter(zip(*(tokens[i:] for i in range(n))))


def distinct_n(texts, n):
    """Different n-grams / all n-grams over the drafts of one post, in (0, 1]; higher is
    more diverse.

    The form that divides by n-grams (Li et al. 2016, arXiv 1510.03055, divide by words). It falls
    with length: read it beside the mean length. A draft shorter than n words adds nothing;
    ValueError when no draft has an n-gram."""
    counts = Counter()
    for text in texts:
        counts.update(ngrams(words(text), n))
    if not counts:
        raise ValueError(f"distinct-{n} needs a draft of at least {n} words")
    return len(counts) / counts.total()


def expectation_adjusted_distinct(texts, vocabulary):
    """EAD (Liu et al. 2022, arXiv 2202.13587): different words over the number expected of as many
    draws from `vocabulary` words, N / (V (1 - ((V - 1) / V)^C)); unlike distinct-1 it does not fall
    with length. ValueError when no draft has a word."""
    tokens = [word for text in texts for word in words(text)]
    if not tokens:
        raise ValueError("EAD needs a draft with a word")
    return len(set(tokens)) / (vocabulary * (1 - (1 - 1 / vocabulary) ** len(tokens)))


def duplicate_rate(texts):
    """The share of drafts that say what an earlier one said, letter case, punctuation and spacing
    aside (of drafts without a letter spacing alone); in [0, 1 - 1/n]. Empty drafts are alike."""
    return 1 - len({normalise(text) or "".join(text.split()) for text in texts}) / len(texts)


def edit_distance(a, b):
    """Levenshtein's distance of two lists of words, over the longer one's length."""
    row = range(len(b) + 1)
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1] / max(len(a), len(b), 1)


def ngram_distance(a, b):
    """The share of words and word pairs that only one of two lists of words has (Jaccard)."""
    a, b = ({*words, *zip(words, words[1:])} for words in (a, b))
    return len(a ^ b) / max(len(a | b), 1)


def repeated_tokens(ids, n=4):
    """For each of the ids: does it lie in an n-gram that the list had before?"""
    seen, flags = set(), [False] * len(ids)
    for start in range(len(ids) - n + 1):
        gram = tuple(ids[start:start + n])
        if gram in seen:
            flags[start:start + n] = [True] * n
        seen.add(gram)
    return flags


def near_duplicates(texts, share=0.8):
    """For each text the index of the first earlier one that it nearly repeats, or None: of the
    words of both (metrics.words, letters and digits alone), `share` or more are common (Dice's
    coefficient of the two multisets). Texts without any word are alike when their characters
    are."""
    bags = []
    for text in texts:
        counted = Counter(word for word in words(text) if normalise(word))
        bags.append(counted or Counter(text.split() or [""]))
    out = []
    for i, bag in enumerate(bags):
        alike = (j for j in range(i) if 2 * (bag & bags[j]).total()
                 >= share * (bag.total() + bags[j].total()))
        out.append(next(alike, None))
    return out


def self_bleu(texts, max_n=4):
    """Mean BLEU of each draft against all the others of its post, in [0, 1]; lower is more diverse.

    Orders 1..max_n weigh the same; no match in an order counts as 0.1 (nltk's method1 smoothing);
    the brevity penalty takes the other draft closest in length, the shorter of two. A draft that
    shares no word with another scores 0, and so does an empty one, as in nltk. ValueError for fewer
    than 2 drafts or when all are empty."""
    drafts = [words(text) for text in texts]
    if len(drafts) < 2 or not any(drafts):
        raise ValueError("self-BLEU needs two drafts and at least one word")
    matches = []  # [order][draft] -> (clipped matches, n-grams)
    for n in range(1, max_n + 1):
        counts = [ngrams(draft, n) for draft in drafts]
        best, second = {}, {}  # an n-gram's two largest counts and whose the largest is:
        owner = {}
        for i, count in enumerate(counts):  # enough to know its maximum over all drafts but one
            for gram, times in count.items():
                if times > best.get(gram, 0):
                    second[gram] = best.get(gram, 0)
                    best[gram], owner[gram] = times, i
                elif times > second[gram]:
                    second[gram] = times
        matches.append([(sum(min(times, second[gram] if owner[gram] == i else best[gram])
                             for gram, times in count.items()), max(1, count.total()))
                        for i, count in enumerate(counts)])
    scores, lengths = [], [len(draft) for draft in drafts]
    for i, length in enumerate(lengths):
        if matches[0][i][0] == 0:
            scores.append(0.0)
            continue
        _, closest = min((abs(other - length), other) for j, other in enumerate(lengths) if j != i)
        logs = [math.log((matched[i][0] or 0.1) / matched[i][1]) for matched in matches]
        scores.append(min(1.0, math.exp(1 - closest / length)) * math.exp(math.fsum(logs) / max_n))
    return math.fsum(scores) / len(scores)


def vendi_score(embeddings):
    """Effective number of different drafts, in [1, n]: exp of the entropy of the eigenvalues of E
    E^T / n.

    embeddings (n, dim) with unit rows (Friedman and Dieng 2023, arXiv 2210.02410);
    ValueError otherwise."""
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2 or not len(rows) or not np.allclose((rows ** 2).sum(1), 1, atol=2e-3):
        raise ValueError("the Vendi score needs embeddings (n, dim) of unit length, got shape "
                         f"{rows.shape}")
    values = np.linalg.eigvalsh(rows @ rows.T / len(rows))
    values = values[values > 1e-12]  # 0 log 0 = 0; rounding leaves eigenvalues of about -1e-17
    return float(np.exp(-(values * np.log(values)).sum()))


def separation(distances, answers):
    """How well a distance tells answers apart, an AUC: of a pair of drafts with one answer and a
    pair with two, how often is the latter the farther apart? Ties count half; .5 is chance.
    distances (n, n); answers, n hashables. None where either kind of pair is missing."""
    i, j = np.triu_indices(len(answers), 1)
    far, same = distances[i, j], np.array([answers[a] == answers[b] for a, b in zip(i, j)], bool)
    near, far = np.sort(far[same]), far[~same]
    if not len(near) or not len(far):
        return None
    below = np.searchsorted(near, far, "left") + np.searchsorted(near, far, "right")
    return float(below.mean() / 2 / len(near))


def pareto_front(points):
    """Indices of the points (quality, diversity), both better when larger, that no other
    point beats.

    A point is beaten by one at least as good in both and better in one, so equal points
    stay together."""
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise ValueError("a Pareto front needs rows of finite numbers")
    return [i for i, point in enumerate(points)
            if not ((points >= point).all(axis=1) & (points > point).any(axis=1)).any()]


def post_metrics(record, ks=KS, vocabulary=10_000):
    """One post's record -> {metric: float}.

    With voices, pass@k = sum over v of readers[v] * pass_at_k(n, c_v, k), c_v the number of drafts
    right in voice v: the exact mean over readers drawn by their shares and over k of the n drafts,
    so no reader is simulated; coverage@k is the same under even tastes. `valid` is the share of
    right drafts, `stances` the number of voices among them. Without voices c is the number of
    passed drafts, and recall@k, where a post has several people's replies, the share of them that
    some of k drafts agrees with. longest@k and pick_X@k, from k = 2, are how often the draft
    passes that a reader takes of k who picks by length or by X: reward, likelihood, random, the
    record's own "scores"; an oracle's pick is pass@k. `words` is the mean length in tokens,
    `truncated` the share cut off; `separation` is evaluate.py's own. Of a record with "set", whose
    drafts hang together in sets of that size, each metric is the mean over the sets that have it,
    and k is that size alone. distinct-n, ead and self-bleu are absent where no draft is long
    enough. ValueError says which field is wrong."""
    drafts, n = record["drafts"], len(record["drafts"])
    check_record(record)
    if "set" in record:
        return of_sets(record, record["set"], vocabulary)
    if "voices" in record:
        out, passed = pleasing(record, ks)
    else:
        passed = [float(p) for p in record["passed"]]
        out = {f"pass@{k}": pass_at_k(n, int(sum(passed)), k) for k in ks}
        out["valid"] = sum(passed) / n
    if "agrees" in record:
        counts = Counter(reply for some in record["agrees"] for reply in set(some))
        chances = {k: [pass_at_k(n, counts[r], k) for r in range(record["people"])] for k in ks}
        out |= {f"recall@{k}": math.fsum(p) / len(p) for k, p in chances.items()}
    lengths = [len(words(draft)) for draft in drafts]
    # The longest first: of k drafts the i-th longest is the longest of C(n-1-i, k-1) subsets.
    by_length = [passed[i] for i in sorted(range(n), key=lambda i: (-len(drafts[i]), i))]
    picks = {k: math.fsum(math.comb(n - 1 - i, k - 1) * p for i, p in enumerate(by_length))
             for k in ks if k > 1}
    out |= {f"longest@{k}": total / math.comb(n, k) for k, total in picks.items()}
    out |= picked(record, passed, [k for k in ks if k > 1])
    if max(lengths) >= 1:  # where every draft is too short there is nothing to count
        out["ead"] = expectation_adjusted_distinct(drafts, vocabulary)
        if n > 1:
            out["self-bleu"] = self_bleu(drafts)
    out |= {f"distinct-{i}": distinct_n(drafts, i) for i in (1, 2) if max(lengths) >= i}
    out |= {"duplicates": duplicate_rate(drafts), "semantic": record["semantic"],
            "vendi": record["vendi"], "reward": math.fsum(record["rewards"]) / n,
            f"max@{max(ks)}": max_at_k(record["rewards"], max(ks)), "words": sum(lengths) / n,
            "truncated": sum(not done for done in record["finished"]) / n}
    out |= likelihoods(record) | judged(record)
    out |= {"separation": record["separation"]} if "separation" in record else {}
    for name, value in out.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, not a finite number")
    return out


# Fields of a record with an entry a draft: those that every record has, and those that some have.
ALWAYS, SOMETIMES = ("rewards", "finished"), ("agrees", "logprobs", "entropies", "base_logprobs",
                                              "tokens")


def check_record(record):
    """ValueError for a field that lacks an entry a draft, or sets that do not divide the drafts."""
    n = len(record["drafts"])
    names = [*ALWAYS, "voices" if "voices" in record else "passed"]
    names += [name for name in SOMETIMES if name in record]
    fields = {name: record[name] for name in names} | record.get("scores", {})
    for name, values in fields.items():
        if len(values) != n or not n:
            raise ValueError(f'"{name}" has {len(values)} entries for {n} drafts')
    size = record.get("set", 1)
    if type(size) is not int or size < 1 or n % size:
        raise ValueError(f'{n} drafts are not made of sets of {size!r} ("set")')


def of_sets(record, size, vocabulary):
    """post_metrics of drafts that are not independent: each set a record of its own, k its size."""
    each = [name for name in (*ALWAYS, *SOMETIMES, "drafts", "voices", "passed") if name in record]
    rows = []
    for start in range(0, len(record["drafts"]), size):
        some = slice(start, start + size)
        part = {k: v for k, v in record.items() if k != "set"} | {k: record[k][some] for k in each}
        if "scores" in record:
            part["scores"] = {name: v[some] for name, v in record["scores"].items()}
        if "judge" in record and start:      # the judge reads the first drafts of a post
            del part["judge"]
        rows.append(post_metrics(part, (size,), vocabulary))
    names = dict.fromkeys(name for row in rows for name in row)
    found = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def pleasing(record, ks):
    """({pass@k, coverage@k, valid, stances}, what each draft is worth) of drafts by voice."""
    readers, n = record.get("readers"), len(record["drafts"])
    if not readers or min(readers.values()) < 0 or abs(math.fsum(readers.values()) - 1) > 1e-6:
        raise ValueError('drafts judged by voice need "readers", shares by voice that sum to 1')
    counts = Counter(voice for right in record["voices"] for voice in set(right))
    if set(counts) - set(readers):
        raise ValueError(f"no reader likes the voice {sorted(set(counts) - set(readers))[0]!r}")
    chances = {k: {v: pass_at_k(n, counts[v], k) for v in readers} for k in ks}
    out = {f"pass@{k}": math.fsum(readers[v] * p[v] for v in p) for k, p in chances.items()}
    out |= {f"coverage@{k}": math.fsum(p.values()) / len(p) for k, p in chances.items()}
    out |= {"valid": sum(map(bool, record["voices"])) / n, "stances": float(len(counts))}
    return out, [math.fsum(readers[v] for v in set(right)) for right in record["voices"]]


def picked(record, passed, ks):
    """{pick_X@k} for the selectors X whose scores the record has."""
    scores = {"reward": record["rewards"], "random": [0.0] * len(passed)}
    if "logprobs" in record:
        scores["likelihood"] = record["logprobs"]
    scores |= record.get("scores", {})
    return {f"pick_{name}@{k}": pick_at_k(passed, values, k)
            for k in ks for name, values in scores.items()}


def likelihoods(record):
    """What the policy and the base say about the drafts, per token and at temperature 1: the
    policy's entropy and mean log-probability in nats, and the base's perplexity,
    exp(- sum log p_base / tokens) of all the post's drafts together. Absent where not measured."""
    if "tokens" not in record:
        return {}
    tokens = sum(record["tokens"])
    mean = {name: math.fsum(record[name]) / tokens
            for name in ("logprobs", "entropies", "base_logprobs")}
    return {"entropy": mean["entropies"], "logprob": mean["logprobs"],
            "perplexity": math.exp(-mean["base_logprobs"])}


def judged(record):
    """A judge's mean probability of yes by rubric; and, of drafts against a person's reply, in both
    orders: `wins`, a tie counting half, and `ties`, when the two orders do not agree."""
    if "judge" not in record:
        return {}
    verdicts = dict(record["judge"])
    pairs = verdicts.pop("pairs", None)      # chances that the draft is better, shown (1st, 2nd)
    out = {f"judge-{name}": math.fsum(values) / len(values) for name, values in verdicts.items()}
    if pairs:
        point = lambda p: (p > 0.5) + (p == 0.5) / 2
        won = [point(a) + point(b) for a, b in pairs]          # 2: in both orders, 1: a tie
        out |= {"judge-wins": sum(won) / 2 / len(won), "judge-ties": won.count(1) / len(won)}
    return out


# ---- The limit: the best that any policy can do under known readers ------------------------------

def best_shares(readers, k, valid=1.0, first=0.0):
    """The shares q of voices, summing to 1, with which independent drafts that are right with
    probability `valid` please readers best: the maximum of first * P_1 + (1 - first) * P_k, where
    P_k = sum_j readers_j (1 - (1 - valid q_j)^k). Concave, so the derivative by each used q_j is
    one number, found by bisection. readers: a tuple of shares; -> array of the same length."""
    readers = np.asarray(readers, dtype=np.float64)
    if k == 1 or first >= 1:
        return np.eye(len(readers))[int(readers.argmax())]

    def shares(slope):
        # slope = readers valid (first + (1 - first) k (1 - valid q)^(k-1)), solved for q
        rest = (slope / (np.maximum(readers, 1e-300) * valid) - first) / ((1 - first) * k)
        return np.clip((1 - np.clip(rest, 0, 1) ** (1 / (k - 1))) / valid, 0, 1)
    low, high = 0.0, float(readers.max() * valid * (first + (1 - first) * k))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle).sum() > 1 else (low, middle)
    q = shares(high)
    # Where the optimum is flat (first near 1) bisection ends beside it: the rest goes to the best
    # liked.
    q[int(readers.argmax())] += 1 - q.sum()
    return q


def pleased(readers, q, k, valid):
    return float((np.asarray(readers) * (1 - (1 - valid * np.asarray(q)) ** k)).sum())


@functools.lru_cache(maxsize=None)
def attainable(readers, k, valid=1.0):
    """The largest Pass@k of independent drafts under these readers (a tuple of shares): the limit
    that every arm is drawn against. A joint policy, which deals its k drafts over the voices, may
    exceed it: up to the k largest shares together."""
    return pleased(readers, best_shares(readers, k, valid), k, valid)


def reader_shares(record):
    """The shares of a post's readers by reply, largest first: voices that share a string (`alike`)
    can be pleased by one draft."""
    readers = record["readers"]
    together = {v: group[0] for group in record.get("alike", ()) for v in group}
    sums = Counter()
    for voice, share in readers.items():
        sums[together.get(voice, voice)] += share
    return tuple(sorted((round(s, 12) for s in sums.values()), reverse=True))


def mean_limit(shares, k, valid=1.0):
    """attainable, averaged over posts: shares is Counter of reader_shares."""
    return sum(attainable(s, k, valid) * n for s, n in shares.items()) / shares.total()


def front(shares, k=5, valid=1.0, points=40):
    """[(Pass@1, Pass@k)] of the policies that no other beats in both: the best w P_1 + (1 - w) P_k
    for w from 0 to 1, averaged over posts."""
    out = []
    for w in 1 - np.linspace(1, 0, points) ** 2:
        point = np.zeros(2)
        for s, n in shares.items():
            q = best_shares(s, k, valid, float(w))
            both = [pleased(s, q, 1, valid), pleased(s, q, k, valid)]
            point += n / shares.total() * np.array(both)
        out.append(tuple(point.tolist()))
    return out


def below_limit(curve, limit, steps=200):
    """Mean height of the front `limit` above a method's curve, both [(Pass@1, Pass@k)], over the
    curve's own span of Pass@1: the area between the two, a unit of Pass@1. 0 is the best there is.
    """
    (xs, ys), (across, up) = np.array(sorted(curve)).T, np.array(sorted(limit)).T
    grid = np.linspace(xs[0], xs[-1], steps)
    return float((np.interp(grid, across, up) - np.interp(grid, xs, ys)).mean())


# ---- Intervals over seeds and posts --------------------------------------------------------------

@functools.lru_cache(maxsize=4096)
def t_quantile(df, level=0.95):
    """The two-sided quantile of Student's t, by bisection on its distribution function (the
    incomplete beta function as a continued fraction: Numerical Recipes 6.4)."""
    def tail(t):  # P(|T| > t)
        x = df / (df + t * t)
        return incomplete_beta(df / 2, 0.5, x)
    low, high = 0.0, 20.0
    while tail(high) > 1 - level:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) > 1 - level else (low, middle)
    return high


def incomplete_beta(a, b, x):
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    scale = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
                     + a * math.log(x) + b * math.log(1 - x))
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, its mirror image does not
        return 1 - incomplete_beta(b, a, 1 - x)
    fraction, c = 1.0, 1.0
    d = 0.0
    for i in range(300):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + term * d)
        c = 1 + term / c
        fraction *= c * d
        if abs(1 - c * d) < 1e-12:
            break
    return scale * (fraction - 1) / a


def interval(values, clusters, shared, level=0.95):
    """(mean, low, high) of `values`, a list over seeds of arrays over posts, with `clusters`, the
    list of their posts' labels (intents): seeds and posts both count as drawn.

    Posts of its own for each seed (shared False): a t-interval over the seeds' means, which hold
    both. The same posts for all seeds: seeds crossed with clusters. With m_s the seeds' means, g_c
    the clusters' and w_c their shares of posts, var = A + B - I, A = var(m_s)/S, B = C/(C-1) sum
    w_c^2 (g_c - g)^2 and I the interaction that both hold, with Satterthwaite's degrees of freedom.
    One seed: clusters alone (training again is then not in it). Simulated coverage of a nominal
    95%: 94 to 97% for 3, 5 and 12 seeds by 70 clusters, whichever of the two spreads more
    (tests/test_evaluate.py). ValueError for fewer than 2 posts or a value that is not finite."""
    values = [np.asarray(v, dtype=np.float64) for v in values]
    if not all(v.ndim == 1 and len(v) > 1 and np.isfinite(v).all() for v in values):
        raise ValueError("an interval needs at least 2 finite values a seed, one a post")
    means = np.array([v.mean() for v in values])
    seeds, mean = len(values), float(means.mean())
    if seeds > 1 and not shared:
        spread, df = float(means.var(ddof=1)) / seeds, seeds - 1
    else:
        spread, df = crossed_spread(np.stack(values), clusters[0])
    half = t_quantile(df, level) * math.sqrt(spread)
    return mean, mean - half, mean + half


def crossed_spread(table, clusters):
    """(variance of the mean of table (seeds, posts), its degrees of freedom): see interval."""
    labels, where = np.unique(np.asarray(clusters), return_inverse=True)
    if len(labels) < 2:                      # one cluster: posts stand for themselves
        where = np.arange(table.shape[1])
    sizes = np.bincount(where)
    count, share = len(sizes), sizes / sizes.sum()
    cells = np.stack([np.bincount(where, row) for row in table]) / sizes       # (S, C)
    seeds, by_cluster = cells @ share, cells.mean(0)
    mean = seeds.mean()
    posts = count / (count - 1) * float((share ** 2 * (by_cluster - mean) ** 2).sum())
    if len(table) == 1:
        return posts, count - 1
    runs = float(seeds.var(ddof=1)) / len(table)
    rest = cells - seeds[:, None] - by_cluster + mean
    both = float((share ** 2 * (rest ** 2).sum(0)).sum()) / (len(table) * (len(table) - 1))
    spread = max(runs + posts - both, runs, posts, 1e-300)  # never less than either
    df = spread ** 2 / (runs ** 2 / (len(table) - 1) + posts ** 2 / (count - 1) + 1e-300)
    return spread, max(1.0, df)


def share_error(values, first, second):
    """Standard error of the mean of values (N,), one a pair of clusters numbered first and second
    (N,): the delete-one-cluster jackknife, where a cluster takes with it every pair that it is in.
    With p_c the mean without cluster c, the square is (C - 1)/C sum_c (p_c - mean p_c)^2. None
    where nothing is left without some cluster."""
    values, alone = np.asarray(values, dtype=np.float64), first == second
    size = int(max(first.max(), second.max())) + 1

    def in_cluster(weights):
        total = np.bincount(first, weights, size) + np.bincount(second, weights, size)
        return total - np.bincount(first, weights * alone, size)
    number = in_cluster(np.ones(len(values)))
    present = number > 0
    left = len(values) - number[present]
    if left.min() <= 0:
        return None
    means = (values.sum() - in_cluster(values)[present]) / left
    count = len(means)
    return math.sqrt((count - 1) / count * float(((means - means.mean()) ** 2).sum()))


def pair_quantile(values, first, second, share=0.95, level=0.95):
    """(q, interval) of the values of pairs: q stands at place ceil(share (N - 1)) of the sorted
    values, counted from 0. The interval is Woodruff's (1952): the quantiles of share -+ t e, e
    being the standard error of the share above q by clusters (share_error); None where that cannot
    be computed."""
    q = float(np.quantile(values, share, method="higher"))
    error = share_error(values > q, first, second)
    if error is None:
        return q, None
    count = len(np.union1d(first, second))
    half = t_quantile(count - 1, level) * error
    ends = np.quantile(values, [max(0.0, share - half), min(1.0, share + half)], method="higher")
    return q, [float(end) for end in ends]


def sign_flip(differences):
    """The exact two-sided p of "the mean is 0", flipping the sign of each difference (2^n ways; a
    random 20,000 of them above n = 16, and the differences as they are): what n seeds can show at
    best is 2 / 2^n."""
    d = np.asarray(differences, dtype=np.float64)
    if len(d) <= 16:
        signs = np.array(list(itertools.product((1, -1), repeat=len(d))))
    else:  # without their own signs p could be 0, which no test by chance can show
        signs = np.random.default_rng(0).choice((1, -1), size=(20_000, len(d)))
        signs = np.vstack((np.ones(len(d)), signs))
    means = np.abs(signs @ d)
    return float((means >= abs(d.sum()) - 1e-12).mean())


def holm(p):
    """Holm's adjustment of {name: p}: all together keep the level."""
    out, largest = {}, 0.0
    for i, name in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, (len(p) - i) * p[name]))
        out[name] = largest
    return out
