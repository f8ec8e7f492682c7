"""Further diversities D: Vendi score, distinct answers, distances of words."""

import torch

from support.files import InputError
from support.registry import DIVERSITIES
from support.words import plain_words


def edit_distance(a, b):
    """The Levenshtein distance of two lists of words, divided by the longer one's length."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above = row
        row = [i]
        for j, y in enumerate(b, 1):
            replace = above[j - 1] + (x != y)
            row.append(min(above[j] + 1, row[-1] + 1, replace))
    return row[-1] / max(len(a), len(b), 1)


def ngram_distance(a, b):
    """The fraction of words and word pairs that only one of two lists of words has (Jaccard)."""
    grams_a = {*a, *zip(a, a[1:])}
    grams_b = {*b, *zip(b, b[1:])}
    return len(grams_a ^ grams_b) / max(len(grams_a | grams_b), 1)


@DIVERSITIES.add("vendi", "Vendi score of the embeddings (arXiv 2210.02410)", into="of")
def vendi(embeddings, quality=None, classes=None):
    """The Vendi score (P,), from 1 to k: exp(-sum w log w), w the eigenvalues of the cosines (k, k)
    over k (arXiv 2210.02410). With quality, times the mean quality (arXiv 2405.02449)."""
    e = embeddings.float()
    w = torch.linalg.eigvalsh(e @ e.mT / e.shape[1]).clamp(min=0)
    score = torch.special.entr(w).sum(-1).exp()
    return score if quality is None else score * quality.float().mean(-1)


def alike(classes):
    """(.., k, k) bool: whether two completions give the same answer, by classes (.., k) (see
    features.answer_classes). A completion without an answer has only itself."""
    same = (classes[..., None] == classes[..., None, :]) & (classes >= 0)[..., None]
    return same | torch.eye(classes.shape[-1], dtype=torch.bool, device=classes.device)


@DIVERSITIES.add("distinct", "different right answers over k", needs=("classes",), into="of")
def distinct_answers(embeddings, quality=None, classes=None):
    """The number of different answers over k (P,); with quality, each answer counts by the mean
    quality of its completions."""
    counted = (classes >= 0).float()
    if quality is not None:
        counted = counted * quality.float()
    return (counted / alike(classes).sum(-1)).mean(-1)


@DIVERSITIES.add("nearest", "distance to the nearest other, as in MoDA (arXiv 2609.14896)",
                 into="of")
def nearest_distance(embeddings, quality=None, classes=None):
    """The mean over completions of the cosine distance to the nearest other one (P,): min over
    others in place of the mean (MoDA, arXiv 2609.14896). With quality, q_i min_j (1 - q_j e_i .
    e_j): a wrong completion is near to nobody, and earns nothing itself."""
    e = embeddings.float()
    cosines = e @ e.mT
    if quality is not None:
        cosines = cosines * quality.float()[..., None, :]
    itself = torch.eye(e.shape[1], dtype=torch.bool, device=e.device)
    nearest = (1 - cosines).masked_fill(itself, float("inf")).amin(-1)         # (P, k)
    return (nearest if quality is None else nearest * quality.float()).mean(-1)


def word_distances(texts, distance):
    """(P, k, k): distance(words, words) of each two of the texts, P lists of k."""
    groups = []
    for group in texts:
        words = [plain_words(text) for text in group]
        groups.append([[distance(a, b) for b in words] for a in words])
    return torch.tensor(groups)


@DIVERSITIES.add("ngram", "words and word pairs not shared", needs=("texts",), into="pairs")
def ngram_distances(features):
    """ngram_distance (P, k, k) of the completions."""
    return word_distances(features.texts, ngram_distance)


@DIVERSITIES.add("levenshtein", "edit distance of the words", needs=("texts",), into="pairs")
def levenshtein_distances(features):
    """edit_distance (P, k, k) of the completions."""
    return word_distances(features.texts, edit_distance)


def check_floor(args):
    """Raise InputError without a gate, whose quality is all that this diversity has."""
    if args.gate == "none":
        raise InputError("--diversity floor is a gate's quality and nothing else: give a --gate")


@DIVERSITIES.add("floor", "no distance: a pair counts its gate's quality alone (an ablation)",
                 needs=("classes",), into="pairs", check=check_floor)
def no_distance(features):
    """1 for each pair (P, k, k): when gated, a pair counts by its quality alone."""
    return torch.ones(alike(features.classes).shape)
