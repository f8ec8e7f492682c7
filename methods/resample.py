"""--resample: replaces prompts whose rewards are all equal (DAPO, arXiv 2503.14476)."""

import copy
import dataclasses

import torch

from grpo import collect
from support.files import seed_of
from support.registry import ROLLOUTS
from support.steplog import equal_rewards
from trainer import batch_visits


def mapped(work, *values):
    """A dataclass like `values`, dataclasses of one kind: each tensor and list in it is
    work(that of the first value, that of the second, ..); everything else is the first value's."""
    first = values[0]
    if isinstance(first, (torch.Tensor, list)):
        return work(*values)
    if not dataclasses.is_dataclass(first):
        return first
    new = copy.copy(first)
    for name in vars(first):
        setattr(new, name, mapped(work, *(getattr(value, name) for value in values)))
    return new


def take(drawn, chosen):
    """A Rollout of only those prompts of `drawn` whose positions are in `chosen`."""
    def at_chosen(x):
        return x[chosen] if isinstance(x, torch.Tensor) else [x[i] for i in chosen]
    return mapped(at_chosen, drawn)


def concatenate(*parts):
    """One tensor or list of several. Where tensors differ in a later dimension (posts with unequal
    numbers of replies), the smaller ones are filled with zeros."""
    if not isinstance(parts[0], torch.Tensor):
        return sum(parts, [])
    shape = torch.tensor([part.shape[1:] for part in parts]).amax(0).tolist()
    filled = []
    for part in parts:
        whole = part.new_zeros(len(part), *shape)
        whole[tuple(map(slice, part.shape))] = part
        filled.append(whole)
    return torch.cat(filled)


def joined(parts):
    """Several Rollouts as one."""
    return mapped(concatenate, *parts)


def sample_attempt(session, step, attempt):
    """The Rollout of this rank's prompts in one attempt of the step, each of other prompts."""
    args = session.args
    seed = seed_of(args.seed, "resample", attempt) if attempt else args.seed
    visits = batch_visits(len(session.posts), args.batch, step // args.updates, seed)
    visits = [visit._replace(attempt=attempt) for visit in visits]
    session.visits.extend(visits)
    return collect(session, session.ranks.share(visits), step)


def wants_resampling(args):
    """Whether --resample is given."""
    return args.resample > 0


def resample_flag(p):
    """Add --resample."""
    p.add_argument("--resample", type=int, default=0,
                   help="how many times prompts with equal rewards are replaced by others (DAPO's "
                        "dynamic sampling)")


@ROLLOUTS.add("resample", "prompts with equal rewards are replaced", wanted=wants_resampling,
              flags=resample_flag)
def resampled(session, step, tally):
    """The Rollout of this rank's prompts of a step. Prompts whose rewards are all equal teach
    nothing; further prompts are sampled in their place, up to --resample times (DAPO's dynamic
    sampling, arXiv 2503.14476). Which prompts are kept does not depend on the number of ranks."""
    args = session.args
    ranks = session.ranks
    session.visits = []
    parts = []
    missing = args.batch
    for attempt in range(1 + args.resample):
        drawn = sample_attempt(session, step, attempt)
        equal = equal_rewards(drawn.features.rewards)
        tally.add("zero_variance", equal.sum(), len(equal))
        useful = ranks.gather((~equal).tolist())                   # in the order of the prompts
        mine = []                                                  # positions on this rank
        for i, good in enumerate(useful):
            if not good or not missing:
                continue
            missing -= 1
            if i % ranks.world == ranks.rank:
                mine.append(i // ranks.world)
        parts.append(take(drawn, mine))
        if not missing:
            break
    return joined(parts)
