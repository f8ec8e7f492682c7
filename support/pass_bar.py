"""The bar that a completion has to pass where no verifier says what is right.

The bar is the reward that 19 of 20 replies to other posts do not exceed. How often people's own
replies pass it says what the bar is worth."""

import dataclasses
import math

import numpy as np

from support.files import InputError
from support.student_t import t_quantile


MOST_PAIRS = 20_000_000                  # of a post and a reply to another: four bytes each

MOST_ASKED = 20_000                      # where a model has to be asked about each

SOME = 32                                # posts that are scored together: a bound on memory


def bar(posts, reward, compares_replies=False):
    """(threshold, scale) from people's replies: a completion passes when it earns more than 19 of
    20 replies that were written to posts of another intent (of posts without intents, to another
    post), over all pairs of a post and such a reply. Each is compared as a completion is, with all
    replies of the post. Posts with several replies set it, where there are two or more such posts.

    scale: the threshold, its 95% interval by intents, the number of pairs, and the shares that pass
    it of people's replies, each held out from its post once (which leaves one reply less to be near
    to), of those replies' first halves (truncated), and of replies to other posts by the bar of the
    other half of the intents (shuffled; of four or more). A share is None where it cannot be
    computed, or where a reward that compares with the post's replies would compare a reply with
    itself alone."""
    whole = [post for post in posts if len(post.replies) > 1]
    single = len(whole) < 2
    if single:                           # one reply a post: the post keeps it when it is scored
        whole = posts
    values, first, second = stranger_pairs(whole, reward)
    threshold, interval = pair_quantile(values, first, second)
    scale = {"people": None, "truncated": None, "threshold": threshold, "interval": interval,
             "pairs": len(values), "shuffled": shuffled_share(values, first, second)}
    if not (single and compares_replies):
        rests, texts = each_held_out(whole)
        halves = [first_half(text) for text in texts]
        scale["people"] = float((earned(reward, rests, texts) > threshold).mean())
        scale["truncated"] = float((earned(reward, rests, halves) > threshold).mean())
    return threshold, scale


def first_half(text):
    """The first half of a text's words; of an odd number, one more."""
    parts = text.split()
    return " ".join(parts[:(len(parts) + 1) // 2])


def intents_of(posts):
    """(P,) a number for each post, shared by posts of one intent; its own where it has none, and
    where all are of one intent."""
    numbers = {}
    found = []
    for i, post in enumerate(posts):
        name = (post.intent, None if post.intent else i)
        found.append(numbers.setdefault(name, len(numbers)))
    if len(numbers) == 1:
        return np.arange(len(posts))
    return np.array(found)


def stranger_pairs(posts, reward):
    """(values, intents of the posts, intents of the replies), each (N,): what every reply to a post
    of another intent earns as a completion for a post. Of more pairs than MOST_PAIRS (MOST_ASKED
    for a reward that asks a model about each) every post has equally many, drawn at random."""
    if len(posts) < 2:
        raise InputError("what passes is set by replies to other posts, and there is one post with "
                         "replies: give two or more, or a reward with --pass-above")
    texts = []
    for post in posts:
        texts.extend(post.replies)
    intents = intents_of(posts)
    authors = np.repeat(intents, [len(post.replies) for post in posts])
    fast = hasattr(reward, "rows")       # compares embeddings, instead of asking a model
    other = strangers(intents, authors, MOST_PAIRS if fast else MOST_ASKED)
    values = []
    if fast:
        for row, places in zip(reward.rows(posts, texts), other):
            values.append(np.asarray(row, dtype=np.float32)[places])
    else:
        for i, places in enumerate(other):
            row, = reward([posts[i]], [[texts[j] for j in places]], [i])
            values.append(np.asarray(row, dtype=np.float32))
    first = np.repeat(intents, [len(places) for places in other])
    return np.concatenate(values), first, authors[np.concatenate(other)]


def strangers(intents, authors, most):
    """For each post the places of the replies to posts of another intent, `most` of all posts
    together."""
    other = [np.flatnonzero(authors != intent) for intent in intents]
    each = most // len(intents)
    total = sum(len(places) for places in other)
    if total <= each * len(intents):
        return other
    rng = np.random.default_rng(0)
    return [np.sort(rng.permutation(places)[:max(1, each)]) for places in other]


def shuffled_share(values, first, second):
    """The share of replies to other posts that pass by a bar which they did not set: the bar of one
    half of the intents on the other half, both ways. None of fewer than four intents."""
    even = (first % 2 == 0) & (second % 2 == 0)
    odd = (first % 2 == 1) & (second % 2 == 1)
    if not even.any() or not odd.any():
        return None
    shares = []
    for here, there in ((even, odd), (odd, even)):
        threshold = np.quantile(values[here], 0.95, method="higher")
        shares.append(float((values[there] > threshold).mean()))
    return sum(shares) / 2


def each_held_out(posts):
    """(posts, texts): every reply, and its post without it. A post with one reply keeps it."""
    rests = []
    texts = []
    for post in posts:
        for place, text in enumerate(post.replies):
            rest = post.replies[:place] + post.replies[place + 1:]
            rests.append(dataclasses.replace(post, replies=rest or post.replies, styles=()))
            texts.append(text)
    return rests, texts


def earned(reward, posts, texts):
    """(N,) what each text earns as a completion for its post, some posts at a time."""
    values = []
    for i in range(0, len(posts), SOME):
        some = posts[i:i + SOME]
        completions = [[text] for text in texts[i:i + SOME]]
        rows = reward(some, completions, range(i, i + len(some)))
        values.extend(row[0] for row in rows)
    return np.array(values, dtype=np.float32)


# ---- The bar's interval --------------------------------------------------------------------------

def share_error(values, first, second):
    """Standard error of the mean of values (N,), one a pair of clusters numbered first and second
    (N,): the delete-one-cluster jackknife, where a cluster takes with it every pair that it is in.
    With p_c the mean without cluster c, the square is (C - 1)/C sum_c (p_c - mean p_c)^2. None
    where nothing is left without some cluster."""
    values = np.asarray(values, dtype=np.float64)
    alone = first == second
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
