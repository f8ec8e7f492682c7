"""Does D see what people see? The command `evaluate.py embedder`.

    python evaluate.py embedder posts.jsonl --model Qwen/Qwen3-0.6B --embedder base char-ngrams

D is made of distances between an embedder's vectors. If these do not separate replies that people
would call different from replies that they would call the same, D rewards something else. The
command measures that on people's own replies, before any training."""

import random
from typing import NamedTuple

import numpy as np
import torch

import data
from polylora import pair_distances
from support.files import InputError, printable
from support.flags import flag_groups, model_flags
from support.posts import normalise
from support.registry import COMMANDS, DOMAINS, add_flags
from trainer import Session, named_embedder

BLIND = 0.7                      # the AUC below which D by an embedder cannot help
WORDINGS = 4                     # replies drawn in each style of a post
RESAMPLES = 200
MOST = 400                       # replies that are compared


class Labelled(NamedTuple):
    """Replies that are compared, each wording once."""
    texts: list                  # N texts
    kinds: np.ndarray            # (N,) numbers: people call replies of one kind the same
    clusters: np.ndarray         # (N,) numbers of intents, or of posts without one
    what: str                    # what a kind is, for a sentence


# ---- Labels from people's replies ----------------------------------------------------------------

def intents(posts):
    """Posts by intent, in the file's order: lists of posts; a post without an intent is alone."""
    found = {}
    for i, post in enumerate(posts):
        found.setdefault(post.intent or (i,), []).append(post)
    return list(found.values())


def by_style(posts, domain, most=MOST, seed=0):
    """Labelled by style: of each intent some wordings in each style, by the domain. A wording in
    more than one style of its intent has no label and is left out."""
    groups = intents(posts)
    rng = random.Random(f"sight {seed}")
    rng.shuffle(groups)
    texts, kinds, clusters = [], [], []
    for cluster, group in enumerate(groups):
        styles = {}                          # wording -> (text, its styles)
        for _ in range(WORDINGS):
            post = rng.choice(group)
            for style in domain.styles:
                text = domain.reply(post, style, rng)
                styles.setdefault(normalise(text), (text, set()))[1].add(style)
        for text, own in styles.values():
            if len(own) == 1:
                texts.append(text)
                kinds.append(domain.styles.index(*own))
                clusters.append(cluster)
        if len(texts) >= most:
            break
    return Labelled(texts, np.array(kinds), np.array(clusters), "style")


def by_answer(posts, most=MOST, seed=0):
    """Labelled by answer: the replies to one intent, or to one post, are of one kind. A wording
    that answers several intents is left out."""
    groups = intents(posts)
    random.Random(f"sight {seed}").shuffle(groups)
    owners = {}                              # wording -> the intents that it answers
    wordings = []
    for cluster, group in enumerate(groups):
        wordings.append({})
        for post in group:
            for reply in post.replies:
                wordings[-1].setdefault(normalise(reply), reply)
                owners.setdefault(normalise(reply), set()).add(cluster)
    texts, clusters = [], []
    for cluster, own in enumerate(wordings):
        kept = [text for key, text in own.items() if len(owners[key]) == 1]
        if len(kept) > 1:
            texts += kept
            clusters += [cluster] * len(kept)
        if len(texts) >= most:
            break
    numbers = np.array(clusters, int)
    return Labelled(texts, numbers, numbers, "answer")


# ---- The AUC -------------------------------------------------------------------------------------

def of_one(labelled):
    """(of one kind, of one intent, comparable), each (N, N) bool: equal wordings are never apart
    and so no evidence, and neither is a reply with itself."""
    keys = np.array([normalise(text) for text in labelled.texts])
    return (labelled.kinds[:, None] == labelled.kinds,
            labelled.clusters[:, None] == labelled.clusters, keys[:, None] != keys)


def several_wordings(labelled):
    """Has some intent two wordings of one kind, and another kind?"""
    one_kind, one_intent, apart = of_one(labelled)
    same = (one_kind & one_intent & apart).any(1)
    return bool((same & (~one_kind & one_intent & apart).any(1)).any())


def comparable(labelled):
    """(same, other), each (N, N) bool: with which replies a reply is compared, of its own kind and
    of another. Styles are compared within an intent where one has several wordings of a style;
    else with replies to other intents, so that the topic tells nothing."""
    one_kind, one_intent, apart = of_one(labelled)
    if labelled.what == "answer":
        where = np.ones_like(apart)
    else:
        where = one_intent if several_wordings(labelled) else ~one_intent
    return one_kind & where & apart, ~one_kind & where & apart


class Sorted(NamedTuple):
    """Each reply's pairs in order of distance, all (N, N)."""
    order: np.ndarray            # the other reply at each place
    start: np.ndarray            # the first place of the run of equal distances that it is in
    end: np.ndarray              # one more than the last place of that run
    same: np.ndarray             # bool: is the other reply compared as one of its kind,
    other: np.ndarray            # or as one of another?


def in_order(distances, same, other):
    """The Sorted of distances (N, N); distances that differ by less than 1e-6 are equal."""
    order = np.argsort(distances, axis=1, kind="stable")
    steps = np.diff(np.take_along_axis(distances, order, 1), axis=1) > 1e-6
    edge = np.ones((len(order), 1), bool)
    place = np.arange(len(order))
    first = np.concatenate([edge, steps], 1)
    last = np.concatenate([steps, edge], 1)
    start = np.maximum.accumulate(np.where(first, place, 0), 1)
    ends = np.where(last, place + 1, len(order) + 1)
    end = np.minimum.accumulate(ends[:, ::-1], 1)[:, ::-1]
    return Sorted(order, start, end, np.take_along_axis(same, order, 1),
                  np.take_along_axis(other, order, 1))


def reply_aucs(pairs, weights):
    """(N,) for each reply: of a reply of its kind and one of another, how often is the latter the
    farther away? Ties count half; nan where there is none of either. pairs: a Sorted; weights (N,):
    how often each reply is there."""
    near = pairs.same * weights[pairs.order]
    far = pairs.other * weights[pairs.order]
    nothing = np.zeros((len(near), 1))
    below = np.concatenate([nothing, np.cumsum(near, 1)], 1)  # of its kind, before each place
    strictly = np.take_along_axis(below, pairs.start, 1)
    at_most = np.take_along_axis(below, pairs.end, 1)
    won = (far * (strictly + at_most) / 2).sum(1)
    total = near.sum(1) * far.sum(1)
    return np.divide(won, total, out=np.full(len(near), np.nan), where=total > 0)


def auc(distances, labelled, resamples=RESAMPLES, seed=0):
    """(AUC, low, high): the mean over replies of reply_aucs, and its 95% bootstrap interval by
    intents: an intent that is drawn twice counts twice, as what is compared and as what it is
    compared with. None where nothing can be compared."""
    pairs = in_order(distances, *comparable(labelled))
    values = reply_aucs(pairs, np.ones(len(labelled.texts)))
    if np.isnan(values).all():
        return None
    rng = np.random.default_rng(seed)
    count = labelled.clusters.max() + 1
    means = []
    for _ in range(resamples):
        drawn = np.bincount(rng.integers(count, size=count), minlength=count)
        weights = drawn[labelled.clusters].astype(float)
        again = reply_aucs(pairs, weights)
        counted = ~np.isnan(again) & (weights > 0)
        if counted.any():
            means.append(np.average(again[counted], weights=weights[counted]))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.nanmean(values)), float(low), float(high)


def sentence(name, labelled, found):
    """What the AUC says of D by this embedder."""
    if found is None:
        return (f"embedder {name}: not known: no two of these replies are of one {labelled.what} "
                "in different words, so nothing says what people call the same")
    value, low, high = found
    intents_seen = len(set(labelled.clusters.tolist()))
    said = (f"embedder {name}: AUC {value:.2f} [{low:.2f}, {high:.2f}] for another "
            f"{labelled.what} ({len(labelled.texts)} replies of {intents_seen} intents or posts): ")
    if value < BLIND:
        undecided = f", though its interval holds {BLIND}" if high >= BLIND else ""
        if labelled.what == "style" and not several_wordings(labelled):
            return (f"{said}warning: D by it does not see styles from one intent to another, below "
                    f"{BLIND}{undecided}: it can only pay for other wordings")
        return f"{said}warning: D by it cannot help, below {BLIND}{undecided}"
    undecided = f", though its interval holds {BLIND}" if low < BLIND else ""
    return f"{said}D by it can help{undecided}"


# ---- The command ---------------------------------------------------------------------------------

def labelled_replies(session, what, most):
    """The Labelled replies of a session's posts; "auto" is style where replies have styles."""
    styled = bool(session.domain.styles)
    if what == "style" and not styled:
        raise InputError("--labels style needs posts with replies by style: use --labels answer")
    if what == "style" or what == "auto" and styled:
        return by_style(session.posts, session.domain, most)
    return by_answer(session.posts, most)


def check_embedders(args):
    """`evaluate.py embedder`: a line for each embedder."""
    args.out = args.data
    args.embedder = ""
    session = Session(args, "embedder")
    session.posts = data.load_posts(args.data, skip_bad_lines=args.skip_bad_lines)
    session.domain = data.load_domain(args.data, args.domain, session.posts)  # judges nothing here
    if any("base" in name.split("+") for name in args.embedders):
        if not args.model:
            raise InputError("--embedder base is the frozen model itself: give its --model")
        session.load_model()
        session.shard_model()
    labelled = labelled_replies(session, args.labels, args.replies)
    for name in args.embedders:
        embed = named_embedder(session, name)
        found = None
        if len(labelled.texts) > 1:
            found = auc(text_distances(embed, labelled.texts), labelled)
        session.say(printable(sentence(name, labelled, found)))
    session.ranks.close()


@torch.no_grad()
def text_distances(embed, texts):
    """(N, N) cosine distances of texts."""
    return pair_distances(embed([texts]))[0].cpu().numpy()


@COMMANDS.add("embedder", "does D see what people see?", program="evaluate")
def embedder_command(sub):
    p = sub.add_parser("embedder",
                       help="how well an embedder's distances separate people's own replies")
    groups = flag_groups(p)
    add = p.add_argument
    add("data", help="posts with replies, JSON lines (.gz too): training posts")
    add("--embedder", dest="embedders", nargs="+", default=["base"], metavar="NAME",
        help="as in training: base, char-ngrams, word-ngrams, a folder or hub name, or several "
             "joined by +")
    add("--model", help="Qwen3 checkpoint, for --embedder base")
    add("--labels", default="auto", choices=("auto", "style", "answer"),
        help="what makes two replies different: another style, or another intent (post) that they "
             "answer; auto: style where replies have styles")
    add("--replies", type=int, default=MOST, help="replies that are compared, at least")
    add("--domain", default="auto", help=f"auto, {', '.join(DOMAINS)}")
    add("--skip-bad-lines", action="store_true", help="skip, count and report unreadable lines")
    add_flags(DOMAINS, p)
    model_flags(groups)
    p.set_defaults(run=check_embedders)
