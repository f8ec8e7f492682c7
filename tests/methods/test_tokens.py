"""Tests of methods/tokens.py."""

import math

import pytest
import torch

import grpo
from grpo import policy_loss
from helpers import (
    Share, gradient, grads_of, grpo_session, nearly, on_two_ranks, rewards_by_length,
    styles_by_length,
)
from methods import tokens
from support.steplog import Tally
from trainer import batch_visits


# ---- Tokens --------------------------------------------------------------------------------------

def test_covariances_choose_the_clipped_tokens():
    logp, a = torch.tensor([-1.0, -2, -3, -6]), torch.tensor([2.0, -2, 1, 3])
    cov = tokens.token_covariances(logp, a)
    assert cov.tolist() == pytest.approx([(x + 3) * (y - 1)
                                          for x, y in zip(logp.tolist(), a.tolist())])
    many = torch.arange(1000) / 100.0                                          # 0, 0.01, .. 9.99
    assert tokens.kl_cov(many, share=0.01).nonzero().flatten().tolist() == list(range(990, 1000))
    assert tokens.kl_cov(many).sum() == 1 and tokens.kl_cov(many)[999]
    for seed in range(5):
        chosen = tokens.clip_cov(many, seed, share=0.05)
        assert chosen.sum() == 50 and bool(((many[chosen] > 1) & (many[chosen] < 5)).all())
        assert torch.equal(chosen, tokens.clip_cov(many, seed, share=0.05))
    assert (not torch.equal(chosen, tokens.clip_cov(many, 9, share=0.05))
            and tokens.clip_cov(many, 0).sum() == 1)
    # no more than there are
    assert tokens.clip_cov(many, 0, share=0.9).sum() == 399
    assert tokens.clip_cov(many, 0, 0.9, low=2.0,
                           high=2.025).nonzero().flatten().tolist() == [201, 202]
    assert tokens.clip_cov(torch.zeros(5), 0).sum() == 0
    together = sum(tokens.clip_cov(many, seed, share=0.05).float() for seed in range(200))
    assert together[101:500].min() > 5 and together[101:500].max() < 60        # evenly


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_chosen_tokens_lose_their_gradient_or_pay_kl(advantage):
    """Ratios e^0.5 and e^-0.5 are both beyond the clip of 0.2."""
    logp, old, a = torch.tensor([-1.0, -2.0, -1.0,
                                 -2.0]), torch.tensor([-1.5, -1.5, -1.5,
                                                       -1.5]), torch.full((4,), advantage)
    chosen = torch.tensor([True, True, False, False])

    def loss_and_slope(tokens):
        x = logp.clone().requires_grad_()
        loss, _, _ = policy_loss(x, old, a, denominator=1, tokens=tokens, chosen=chosen)
        loss.backward()
        return loss.item(), x.grad.tolist()
    plain, asked = (policy_loss(logp, old, a, denominator=1, reference=ref)[0]
                    for ref in (None, old - 1))
    # no beta was given: no penalty
    assert plain == asked
    up, down = math.exp(0.5), math.exp(-0.5)
    clipped = [max(-advantage * r, -advantage * min(max(r, 0.8), 1.2)) for r in (up, down)]
    assert loss_and_slope("clip-cov")[0] == pytest.approx(sum(clipped), rel=1e-5)
    assert loss_and_slope("clip-cov")[1][:2] == [0, 0]
    loss, slopes = loss_and_slope("kl-cov")                                    # nothing is clipped
    assert loss == pytest.approx(-2 * advantage * (up + down) + 1.0, rel=1e-5)
    assert slopes == pytest.approx([-advantage * up + 1, -advantage * down - 1, -advantage * up,
                                    -advantage * down])


@pytest.mark.parametrize("name", ["clip-cov", "kl-cov"])
def test_tokens_are_chosen_from_the_whole_step(parts, name):
    """However they are packed, at the places of the largest covariances as the drafts were
    written."""
    flags = ("--tokens", name, "--token-share", "0.2", "--updates", "2")
    for budget in ("100000", "40"):
        s = grpo_session(parts, *flags, "--micro-tokens", budget)
        s.reward = rewards_by_length
        batches, count = grpo.rollout(s, 0, Tally())
        s.batches, s.token_count = batches, count
        logp = torch.cat([b.sampled for b in batches])
        a = torch.cat([b.advantages for b in batches])
        chosen = torch.cat([b.chosen for b in batches])
        cov = tokens.token_covariances(logp, a)
        assert len(logp) == count and 0 < chosen.sum() <= max(1, int(0.2 * count))
        if name == "kl-cov":
            assert (chosen.sum() == max(1, int(0.2 * count))
                    and cov[chosen].min() >= cov[~chosen].max() - 1e-6)
        else:
            assert bool(((cov[chosen] > 1) & (cov[chosen] < 5)).all())
        assert torch.isfinite(sum(p.abs().sum()
                                  for p in gradient(s, lambda t: grpo.grpo_step(s, 1))[0].values()))


# ---- Ranks and resumption ------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("useful", [(0, 2, 3, 4), (0, 2)])
def test_ranks_with_unequal_posts_choose_their_own_tokens(parts, useful):
    """After --resample rank 0 has three of four posts, or both of two: assigned anew in turn the
    marks were another rank's, and a rank without any post left the others waiting."""
    flags = (
        "--resample 1 --tokens kl-cov --token-share 0.3 --updates 2 --diversity-weight 0".split()
    )

    def go(ranks):
        s = grpo_session(parts, *flags, "--batch", "6")
        first = [s.posts[v.index].key for v in batch_visits(len(s.posts), 6, 0, s.args.seed)]
        good = {first[i] for i in useful}
        s.ranks, s.domain.styles_of = ranks, styles_by_length(s.domain)

        # of the second attempt none is useful
        def reward(posts, completions, seeds):
            rows = [[float(i) * (p.key in good) for i in range(len(ts))]
                    for p, ts in zip(posts, completions)]
            good.clear()
            return rows
        s.reward = reward
        batches, count = grpo.rollout(s, 0, Tally())
        s.batches, s.token_count = batches, count
        grpo.grpo_step(s, 1)
        marked = [(int(t), bool(c)) for b in batches for t, c in zip(b.rows.target, b.chosen)]
        return grads_of(s, 0), count, marked
    want, count, marked = go(Share())
    one, two = on_two_ranks(go)
    assert one[1] == two[1] == count > 0 and sorted(one[2] + two[2]) == sorted(marked)
    assert (not two[2]) == (useful == (0, 2)) and sum(c for _, c in marked) > 1
    nearly(one[0], want)
    nearly(two[0], want)
