"""Embedders without a model: hashed counts of character or word n-grams, for --embedder.

    python grpo.py --embedder char-ngrams ...

They see wording where the base's states see topics, and cost nothing. `python evaluate.py embedder`
says which of them sees what people call different."""

import zlib

import torch
import torch.nn.functional as F

from support.registry import EMBEDDERS
from support.words import words

DIM = 2048
LONGEST = 4_000                  # characters of a text that count: a bound on time


def char_ngrams(text):
    """The character n-grams, n from 2 to 4, of the words of a text, each between two blanks."""
    grams = []
    for word in words(text):
        padded = f" {word} "
        for n in (2, 3, 4):
            grams.extend(padded[i:i + n] for i in range(len(padded) - n + 1))
    return grams


def word_ngrams(text):
    """The words, punctuation included, and the pairs of neighbouring words of a text."""
    tokens = ["^", *words(text), "$"]
    pairs = [f"{a} {b}" for a, b in zip(tokens, tokens[1:])]
    return tokens[1:-1] + pairs


def hashed(grams, dim=DIM):
    """A unit vector (dim,) of n-grams: each adds 1 or -1 at a place, both by its hash, so that two
    grams that share a place are as likely to cancel as to add up (arXiv 0902.2206); then the square
    root of each entry's size, so that a repeated gram counts less. Nothing has a place, too."""
    vector = torch.zeros(dim)
    for gram in grams or [""]:
        code = zlib.crc32(gram.encode())
        vector[(code >> 1) % dim] += 1 - 2 * (code & 1)
    if not vector.any():                     # every gram is cancelled by another
        return hashed([""], dim)
    return F.normalize(vector.sign() * vector.abs().sqrt(), dim=0)


class NgramEmbedder:
    """Texts -> unit vectors (P, k, DIM) by `grams`, a function text -> n-grams. Each text of a call
    is hashed once."""
    centre = None

    def __init__(self, grams):
        self.grams = grams

    def __call__(self, texts):
        """Unit vectors (P, k, DIM) of texts given as P lists of k."""
        known = {}
        vectors = []
        for group in texts:
            for text in group:
                if text not in known:
                    known[text] = hashed(self.grams(text[:LONGEST]))
                vectors.append(known[text])
        return torch.stack(vectors).view(len(texts), -1, DIM)


KINDS = {"char-ngrams": char_ngrams, "word-ngrams": word_ngrams}


def is_kind(name):
    return name in KINDS


@EMBEDDERS.add("ngrams", "--embedder char-ngrams or word-ngrams: hashed counts, no model",
               claims=is_kind)
def load_ngrams(name, session):
    return NgramEmbedder(KINDS[name])
