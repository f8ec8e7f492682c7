"""Tests of methods/resample.py."""

import pytest

import grpo
from helpers import Share, both_take, grads_of, grpo_session, rl, step_gradient
from methods.resample import resampled
from support.steplog import Tally


# ---- The step, on a real session around a tiny model ---------------------------------------------

@pytest.mark.slow
def test_resampling_keeps_the_same_posts_on_any_number_of_ranks(parts):
    """DAPO's dynamic sampling: groups of equal rewards give way to further posts; who is kept is
    decided in the order of the whole batch, so that one rank and two take the same step."""
    def phase(ranks):
        s = rl(parts, "--resample", "3", "--diversity-weight", "0", "--beta", "0", ranks=ranks)
        s.reward = lambda posts, completions, seeds: [
            [float(i == 0 and sum(p.key.encode()) % 3 == 0) for i in range(len(ts))]
            for p, ts in zip(posts, completions)]
        return s
    whole = phase(Share())
    drawn = resampled(whole, 0, Tally())
    rewards = drawn.features.rewards
    assert bool((rewards.amax(1) > rewards.amin(1)).all()) and 0 < len(rewards) <= 6
    assert len(set(drawn.visits)) == len(drawn.visits) and len(whole.visits) > 6

    class Pair(Share):
        """Rank r of two, which knows what the other one would say."""
        def gather(self, mine):
            every = [None] * 6
            every[self.rank::2] = mine
            other = self.other.pop(0) if self.world == 2 else None
            every[1 - self.rank::2] = other
            return every
    flags = []
    spy = phase(Share())
    spy.ranks.gather = lambda items: (flags.append(items), items)[1]
    resampled(spy, 0, Tally())
    kept = []
    for rank in (0, 1):
        ranks = Pair(rank, 2)
        ranks.other = [f[1 - rank::2] for f in flags]
        kept.append(resampled(phase(ranks), 0, Tally()).visits)
    assert sorted(kept[0] + kept[1]) == sorted(drawn.visits)
    few = phase(Share())
    few.reward = lambda posts, completions, seeds: [[0.0] * len(ts) for ts in completions]
    # nothing useful was found
    grads, _ = step_gradient(few)
    assert all(float(g.abs().max()) == 0 for g in grads.values())


# ---- Ranks and resumption ------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("useful", [4, 12])
def test_two_ranks_resample_as_one(parts, useful):
    """Posts of equal rewards are replaced by others; every twelfth post is useful, so that a
    rank ends with none."""
    def go(ranks):
        s = grpo_session(parts, "--resample", "5", "--beta", "0.1", "--diversity-weight", "0.2")
        places = {post.key: i for i, post in enumerate(s.posts)}
        s.ranks, s.start = ranks, {n: 0.5 * p for n, p in s.start.items()}
        s.reward = lambda posts, completions, seeds: [
            [float(i % 3 == 0 and places[p.key] % useful == 0) for i in range(len(ds))]
            for p, ds in zip(posts, completions)]
        tally = grpo.grpo_step(s, 0)
        empty.append(not s.batches)
        assert tally.sums["zero_variance"][0] > 0
        return grads_of(s, 0)
    empty = []
    both_take(go, go(Share()))
    assert any(empty) == (useful == 12)
