"""Tests of methods/ebft.py."""

import pytest
import torch
import torch.nn.functional as F

import polylora
from helpers import (all_tuples, exact_gradient, expected_estimate, gap, gradient, in_double, lines,
                     policy, refusal, sft_args, sft_session, visits)
from methods.ebft import add_ebft, feature_advantages, feature_rewards
from polylora import diversity, pair_advantages, pair_distances


def outcomes():
    """Unit vectors of five outcomes and of the person's reply."""
    draw = torch.Generator().manual_seed(5)
    vectors = F.normalize(torch.randn(6, 4, generator=draw).double(), dim=-1)
    return vectors[:5], vectors[5]


def test_rewards_by_hand():
    e = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]])
    got = feature_rewards(e, torch.tensor([[1.0, 0.0]]))
    want = [2 * 1.0 - 0.6, 2 * 0.6 - (0.6 + 0.8), 0.0 - 0.8]
    assert got[0].tolist() == pytest.approx(want)
    assert feature_rewards(e, torch.tensor([[1.0, 0.0]]), 0.0)[0].tolist() == pytest.approx(
        [2.0, 1.2, 0.0])


@pytest.mark.parametrize("n, fraction", [(2, 0.0), (3, 0.5), (4, 2 / 3), (5, 0.75)])
def test_ebft_trains_D_at_n_minus_2_over_n_minus_1_of_its_weight_and_we_at_all_of_it(
        monkeypatch, n, fraction):
    """By enumeration. D = 1 - phi_1 . phi_2, so that -grad E[phi_1 . phi_2] is grad E[D]."""
    in_double(monkeypatch)
    vectors, person = outcomes()
    theta, drawn = policy(5, seed=n), all_tuples(5, n)
    e = vectors[drawn]
    people = person.expand(len(drawn), -1)
    of_quality = exact_gradient(theta, all_tuples(5, 1), 2 * (vectors @ person))
    of_D = exact_gradient(theta, all_tuples(5, 2), diversity(vectors[all_tuples(5, 2)]))
    assert of_D.abs().max() > 0.01
    plain = expected_estimate(theta, drawn, feature_advantages(e, people, 0.0)) / n
    both = expected_estimate(theta, drawn, feature_advantages(e, people, 1.0)) / n
    assert gap(plain, of_quality) < 1e-6
    assert gap(both - plain, fraction * of_D) < 1e-6
    ours = expected_estimate(theta, drawn, pair_advantages(pair_distances(e)))
    assert gap(ours, of_D) < 1e-6


def test_the_loss_adds_the_gradient_of_its_advantages(parts):
    """The step's gradient is that of -mean A log pi of the same completions, by autograd."""
    s = sft_session(parts, "--loss", "ebft", "--k", "4")
    s.embedder = lambda texts: torch.stack([
        F.normalize(torch.tensor([[1.0, len(text) % 5, len(text) % 3] for text in group]), dim=-1)
        for group in texts])
    some = visits([0, 1, 2])
    got, tally = gradient(s, lambda tally: add_ebft(s, some, 0, tally))
    prompts, samples, texts = s.sample_completions(some, 0, 4)
    import random
    replies = []
    for visit in some:
        rng = random.Random(s.seed_for("reply", 0, visit))
        post = s.posts[visit.index]
        replies.append(s.domain.reply(post, s.domain.author(post, rng), rng))
    a = feature_advantages(s.embedder(texts), s.embedder([[r] for r in replies])[:, 0])

    def by_hand(_):
        from model import token_logprobs
        for rows in s.micro_batches(list(zip(prompts, samples.tokens))):
            logp, _ = token_logprobs(s.model, rows, s.args.temperature)
            (-(a.flatten()[rows.completion] * logp).sum() / 12).backward()
    want, _ = gradient(s, by_hand)
    assert max(float(g.abs().max()) for g in want.values()) > 1e-4
    for name in want:
        assert gap(got[name], want[name]) < 1e-5
    assert "reward" in tally.sums


def test_it_may_sample_at_every_third_step_at_three_times_the_weight(parts):
    """As D does: 0, 0, then three times the gradient of a step of its own."""
    each, third = (sft_session(parts, "--loss", "ebft", "--k", "4", "--draft-every", every)
                   for every in ("1", "3"))
    for s in (each, third):
        s.embedder = lambda texts: torch.stack([
            F.normalize(torch.tensor([[1.0, len(text) % 5] for text in group]), dim=-1)
            for group in texts])
    some = visits([0, 1])
    for step in (4, 5):
        nothing, tally = gradient(third, lambda tally: add_ebft(third, some, step, tally))
        assert not tally.sums and all(not g.abs().max() for g in nothing.values())
    want, _ = gradient(each, lambda tally: add_ebft(each, some, 6, tally))
    got, _ = gradient(third, lambda tally: add_ebft(third, some, 6, tally))
    assert max(float(g.abs().max()) for g in want.values()) > 1e-4
    for name in want:
        assert gap(got[name], 3 * want[name]) < 1e-5


def test_phase_one_trains_with_ebft(world):
    assert polylora.main(sft_args(world, "ebft", "--loss", "ebft", "--embedder",
                                  "char-ngrams")) == 0
    steps = lines(world["root"] / "ebft")[:2]
    assert all(step["ce"] > 0 and step["grad_norm"] > 0 and "reward" in step for step in steps)


def test_two_completions_are_refused(world, capsys):
    said = refusal(capsys, polylora.main, *sft_args(world, "no", "--loss", "ebft", "--k", "2"))
    assert "(k - 2)/(k - 1)" in said and "--k 3" in said
