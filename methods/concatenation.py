"""An embedder made of several, for --embedder A+B: the mean of their cosines."""

from pathlib import Path

import torch

from support.files import InputError
from support.registry import EMBEDDERS
from trainer import named_embedder


class Concatenation:
    """Texts -> unit vectors (P, k, sum of dims): the parts' unit vectors side by side, each divided
    by the root of their number, so that the cosine is the mean of the parts' cosines."""
    centre = None

    def __init__(self, parts):
        self.parts = parts

    def __call__(self, texts):
        """Unit vectors (P, k, dim) of texts given as P lists of k."""
        vectors = [part(texts).float() for part in self.parts]
        device = vectors[0].device
        joined = torch.cat([vector.to(device) for vector in vectors], -1)
        return joined / len(self.parts) ** 0.5


def is_sum(name):
    """Is it NAME+NAME, and not a folder with a + in its name?"""
    return "+" in name and not Path(name).exists()


@EMBEDDERS.add("concatenation", "--embedder A+B: several side by side, the mean of their cosines",
               claims=is_sum)
def load_concatenation(name, session):
    names = name.split("+")
    if "" in names:
        raise InputError(f"--embedder {name}: write NAME+NAME, each base, char-ngrams, word-ngrams "
                         "or the folder of an embedding model")
    if session.args.shard and "base" in names:
        raise InputError(f"--embedder {name}: the base cannot be one of several embedders with "
                         "--shard: leave out base, or --shard")
    return Concatenation([named_embedder(session, part) for part in names])
