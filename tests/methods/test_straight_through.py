"""Tests of methods/straight_through.py."""

import copy

import pytest
import torch
import torch.nn.functional as F

import lora
import polylora
from helpers import (
    OUTCOMES, all_tuples, both_take, diversity_advantages, exact_gradient, expected_estimate,
    gap, gradient, grads_of, in_double, nearly, policy, sft_session,
)
from lora import add_adapter
from methods import straight_through
from support import checks
from support import files
from support.files import InputError
from trainer import batch_visits


# ---- D's gradient, straight through --------------------------------------------------------------

def straight_through_mean(theta, drawn, heat, draws=1500):
    """The estimate's expectation, over all tuples and, by many draws, over its noise."""
    vectors = OUTCOMES[drawn].clone().requires_grad_()
    slope, = torch.autograd.grad(polylora.diversity(F.normalize(vectors, dim=-1)).sum(), vectors)
    # at the one-hot vectors
    slope = (slope @ OUTCOMES.T).flatten(0, 1)
    logp, tokens = theta.log_softmax(0), drawn.flatten()
    chance = logp.detach()[drawn].sum(1).exp().repeat_interleave(drawn.shape[1])
    noise = torch.rand(draws, len(tokens), 4, generator=torch.Generator().manual_seed(5),
                       dtype=torch.float64)
    loss = straight_through.straight_through_loss(
        logp.expand(draws * len(tokens), 4), tokens.repeat(draws), noise.flatten(0, 1),
        slope.repeat(draws, 1), heat)
    return -torch.autograd.grad((loss * chance.repeat(draws)).sum() / draws, theta,
                                retain_graph=True)[0]


def test_straight_through_is_biased_but_nearly_parallel_to_the_gradient_of_d(monkeypatch):
    """Two drafts of a token each, by enumeration: the score function's estimate is the exact
    gradient; this one is a quarter as long at heat 1 and not half as long at 0.2, and turned,
    though lower heat helps."""
    in_double(monkeypatch)
    theta, drawn = policy(4, seed=2), all_tuples(4, 2)
    exact = exact_gradient(theta, drawn, polylora.diversity(OUTCOMES[drawn]))
    assert gap(expected_estimate(theta, drawn, diversity_advantages(OUTCOMES[drawn])), exact) < 1e-6
    found = [straight_through_mean(theta, drawn, heat) for heat in (1.0, 0.5, 0.2)]
    lengths = [float(g.norm() / exact.norm()) for g in found]
    turns = [float(F.cosine_similarity(g, exact, dim=0)) for g in found]
    assert lengths == pytest.approx([0.26, 0.36, 0.45], abs=0.03)
    assert turns == pytest.approx([0.956, 0.981, 0.992], abs=0.005)


@pytest.mark.slow
def test_the_scores_are_gumbel_s_given_the_largest():
    """Noise drawn for a token drawn by p: unconditionally the scores are log p + Gumbel, each by
    itself: so is their softmax on average, and their largest is the token's."""
    p, draw = torch.tensor([0.5, 0.3, 0.2]).double(), torch.Generator().manual_seed(1)
    n, logp = 60_000, p.log().expand(60_000, 3)
    token = torch.multinomial(p, n, True, generator=draw)
    noise = torch.rand(n, 3, generator=draw, dtype=torch.float64)
    soft = lambda heat: torch.stack([-straight_through.straight_through_loss(logp, token, noise,
                                                                             torch.eye(3).double()[
                                                                                 [v]], heat)
                                     for v in range(3)], 1)
    assert gap(soft(1e-4), F.one_hot(token, 3)) < 0.5 and torch.equal(soft(0.7).argmax(1), token)
    free = p.log() - (-torch.rand(n, 3, generator=draw, dtype=torch.float64).log()).log()
    for heat in (0.5, 2.0):
        for power in (1, 2):
            assert gap(soft(heat).pow(power).mean(0),
                       (free / heat).softmax(-1).pow(power).mean(0)) < 0.006
    # g is held: the slope of a softmax of x + g
    x = logp[:50].clone().requires_grad_()
    weight = torch.tensor([[1.0, -2.0, 0.5]]).double()
    got, = torch.autograd.grad(straight_through.straight_through_loss(x, token[:50], noise[:50],
                                                                      weight, 0.7).sum(), x)
    q = soft(0.7)[:50]
    assert gap(got, -q * (weight - (q * weight).sum(-1, keepdim=True)) / 0.7) < 1e-9


def straight_session(parts, *flags, ranks=None):
    flags = ("--lambda", "1", "--d-gradient", "straight-through", "--draft-posts", "4", "--k", "3",
             "--temperature", "0.8", *flags)
    return sft_session(parts, *flags, ranks=ranks)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_straight_through_is_the_gradient_of_relaxed_completions(parts, kind):
    """Written out in one graph: one-hot vectors with a softmax's slope, read by the frozen base,
    pooled, centred, D."""
    s, frozen = straight_session(parts, "--gumbel-heat", "0.6"), copy.deepcopy(parts[2])
    if kind == "full":
        add_adapter(lora.drop_lora(s.model), "full", 0, 0)
        for p in s.model.parameters():
            p.data.add_(0.01 * torch.randn(p.shape))
    visits = batch_visits(len(s.posts), 2, 0, 4)
    got, tally = gradient(s, lambda t: polylora.add_diversity(s, visits, 0, t))

    def plain(_):
        prompts, samples, texts = s.sample_completions(visits, 0, 3)
        table, total = frozen.model.embed_tokens.weight[:s.model.vocab], 0
        for visit, prompt, completions, words in zip(visits, prompts, samples.tokens, texts):
            vectors = []
            for d, completion in enumerate(completions):
                seed = files.seed_of(s.seed_for("gumbel", 0, visit), d)
                draw = torch.Generator().manual_seed(seed)
                logits = s.model(torch.tensor([prompt + completion]))[0, len(prompt) - 1:-1]
                logp = (logits[:, :s.model.vocab] / 0.8).log_softmax(-1)
                noise = torch.rand(logp.shape, generator=draw)
                hard = F.one_hot(torch.tensor(completion), s.model.vocab).float()
                first = -(hard * noise).sum(-1, keepdim=True).log()
                scores = -torch.where(hard > 0, first, -noise.log() / logp.exp() + first).log()
                soft = ((logp + (scores - logp).detach()) / 0.6).softmax(-1)
                x = (hard + soft - soft.detach()) @ table
                kept = max(1, sum(t not in s.stops for t in completion))
                mine = frozen.hidden(x[None])[0, :kept].mean(0)
                text = s.embedder.vectors([words[d]])[0]
                vectors.append(text - s.embedder.centre + mine - mine.detach())
            total = total + polylora.diversity(F.normalize(torch.stack(vectors),
                                                           dim=-1)[None])[0] / 2
        (-total).backward()
    want, _ = gradient(s, plain)
    nearly(got, want, 1e-3)
    assert tally.means(s.ranks, ["D"])["D"] > 0


@pytest.mark.slow
def test_straight_through_does_not_depend_on_packing_or_ranks(parts):
    def go(*flags, ranks=None):
        s = straight_session(parts, *flags, ranks=ranks)
        polylora.sft_step(s, 0)
        return grads_of(s, 0)
    want, score = go(), go("--d-gradient", "score")
    nearly(go("--micro-tokens", "40"), want)
    both_take(lambda ranks: go(ranks=ranks), want)
    size = max(float(g.abs().max()) for g in score.values())
    assert max(gap(want[n], score[n]) for n in want) > 0.05 * size
    with pytest.raises(AssertionError):
        nearly(go("--gumbel-heat", "0.3"), want, 1e-3)


@pytest.mark.parametrize("flags", ["--diversity vendi", "--embedder x", "--shard",
                                   "--gumbel-heat 0"])
def test_straight_through_is_for_the_plain_d(flags):
    args = polylora.parser().parse_args(["sft", "--model", "-", "--data", "-", "--out", "-",
                                         "--lambda", "1", "--d-gradient",
                                         "straight-through", *flags.split()])
    with pytest.raises(InputError, match="--d-gradient straight-through is for"):
        checks.check_sft(args)
