"""An ensemble of LoRAs over one base, which share the k completions (arXiv 2405.14438)."""

import torch
import torch.nn.functional as F

from generate import Samples
from methods.adapters import ParallelLinear, members_config
from support.files import InputError
from support.registry import ADAPTERS


class Ensemble:
    """Which member of an ensemble computes, `of`: one for all (a number), or one a row, (B,)."""

    def __init__(self, members):
        self.members = members
        self.of = 0

    def sample(self, write, model, prompts, *, k, seed, progress, **settings):
        """Samples by `write` (generate or generate_plain): each member samples its share of the k
        completions as a model of its own; its seeds have one more part."""
        out = Samples([], [], [])
        for _ in prompts:
            out.tokens.append([None] * k)
            out.logprobs.append([None] * k)
            out.finished.append([None] * k)
        for member in range(min(self.members, k)):
            self.of = member
            own = slice(member, k, self.members)
            seeds = []
            for s in seed:
                parts = s if isinstance(s, tuple) else (s,)
                seeds.append((*parts, member))
            part = write(model, prompts, k=len(range(k)[own]), seed=seeds, **settings,
                         progress=None if member else progress)
            for p in range(len(prompts)):
                out.tokens[p][own] = part.tokens[p]
                out.logprobs[p][own] = part.logprobs[p]
                out.finished[p][own] = part.finished[p]
        self.of = 0
        return out


class EnsembleLinear(ParallelLinear):
    """M LoRA members over one base in one pass (LoRA-Ensemble, arXiv 2405.14438): g_i is 1 for the
    row's own member and 0 for others. They see the same replies and differ by their random A;
    completion d of a prompt is member d mod M's. `ensemble` is the model's, set by add_lora."""
    kind = "ensemble"
    ensemble = None

    def own(self):
        return slice(self.ensemble.of * self.rank, (self.ensemble.of + 1) * self.rank)

    def factors(self):
        if isinstance(self.ensemble.of, torch.Tensor):
            return super().factors()
        return self.lora_A.weight[self.own()], self.lora_B.weight[:, self.own()]

    def gated(self, low, x):
        of = self.ensemble.of
        if not isinstance(of, torch.Tensor):
            return low
        own = self.spread(F.one_hot(of, self.members).to(x.dtype))                       # (B, M r)
        return low * own[:, None]

    def merged_weight(self):
        raise InputError("an ensemble is several models: it cannot be merged into one")


def put_ensemble(model, members):
    model.ensemble = Ensemble(members)


ADAPTERS.add("ensemble", "--members LoRAs that share the k completions (arXiv 2405.14438)",
             peft_type="ENSEMBLE", into="layer", config=members_config, wants=("members",),
             on_model=put_ensemble)(EnsembleLinear)
