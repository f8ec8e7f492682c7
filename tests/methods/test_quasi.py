"""Tests of methods/quasi.py."""

import json
import math
import shutil

import pytest
import torch

import evaluate
from helpers import refusal
from methods.quasi import even_points, quasi_completions, token_at
from support.draws import uniforms

FIRST = torch.tensor([0.5, 0.3, 0.15, 0.05])
SECOND = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1],
                       [0.0, 0.0, 0.5, 0.5]])


def two_tokens(sets, size, seed=1):
    """(sets, size) numbers 4 first + second of completions of two tokens over four."""
    noise, = uniforms([seed], sets * size, 4)
    u = torch.cat([even_points(some) for some in noise[:, :2].split(size)])
    first, u = token_at(FIRST.expand(len(u), -1), u, noise[:, 2])
    second, _ = token_at(SECOND[first], u, noise[:, 3])
    return (4 * first + second).view(sets, size)


def chi_square(outcomes):
    """Of outcomes (N,) against the exact probabilities of the 16 (two of them impossible)."""
    exact = (FIRST[:, None] * SECOND).flatten().double()
    counts = outcomes.bincount(minlength=16).double()
    assert not counts[exact == 0].any()
    want = exact * len(outcomes)
    kept = exact > 0
    return float(((counts - want) ** 2 / want)[kept].sum())


def test_each_completion_of_a_set_is_exactly_distributed():
    """Chi-square with 13 degrees of freedom: above 42.5 once in 10,000."""
    drawn = two_tokens(6000, 5)
    for place in range(5):
        assert chi_square(drawn[:, place]) < 42.5
    biased = torch.where(drawn[:, 0] == 0, 5, drawn[:, 0])     # the test would see this
    assert chi_square(biased) > 42.5


def test_a_set_covers_more_than_independent_completions():
    """Of each first token a set of n has n p, but for less than 2; so all sets have the commonest,
    and the mean number of different outcomes is above that of independent sampling."""
    drawn = two_tokens(3000, 5)
    first = drawn // 4
    for token, p in enumerate(FIRST.tolist()):
        counts = (first == token).sum(1)
        assert float((counts - 5 * p).abs().max()) < 2
    assert bool((first == 0).any(1).all())
    exact = (FIRST[:, None] * SECOND).flatten().double()
    independent = float((1 - (1 - exact) ** 5).sum())
    different = sum(len(set(row)) for row in drawn.tolist()) / len(drawn)
    assert different > independent + 0.2


@pytest.mark.slow
def test_a_set_of_one_is_independent_sampling():
    assert chi_square(two_tokens(20_000, 1)[:, 0]) < 42.5


def test_long_completions_do_not_run_out_of_bits():
    """A fair coin 300 times: 52 bits would be used up after 52 tosses."""
    noise, = uniforms([3], 2000, 302)
    u = even_points(noise[:, :2])
    coin = torch.tensor([0.5, 0.5]).expand(2000, -1)
    tosses = []
    for step in range(300):
        token, u = token_at(coin, u, noise[:, 2 + step])
        tosses.append(token)
    heads = torch.stack(tosses, 1).double()
    for part in (heads[:, :30], heads[:, 100:200], heads[:, 200:]):
        assert abs(float(part.mean()) - 0.5) < 4 * 0.5 / math.sqrt(part.numel())
    late = heads[:, 250:]
    again = (late[:, 1:] == late[:, :-1]).double().mean()
    assert abs(float(again) - 0.5) < 0.01


def test_log_probabilities_are_the_models_own_and_stop_ends_a_completion(parts):
    _, tokenizer, model = parts
    noise, = uniforms([5], 6, 9)
    stop = [3, 7, 20]
    tokens, logprobs, finished = quasi_completions(model, [5, 9, 11], 3, noise, max_new_tokens=7,
                                                   stop_ids=stop, temperature=0.7)
    for ids, logp, ended in zip(tokens, logprobs, finished):
        assert len(ids) == len(logp) and ended == (ids[-1] in stop)
        assert not set(ids[:-1]) & set(stop)
        logits = model(torch.tensor([[5, 9, 11, *ids]]))[0, 2:-1] / 0.7
        want = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(logp), want, atol=1e-4)
    again = quasi_completions(model, [5, 9, 11], 3, noise, max_new_tokens=7, stop_ids=stop,
                              temperature=0.7)
    assert again[0] == tokens


@pytest.mark.slow
def test_it_is_measured_as_whole_sets(world, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(world["lora"], run)
    flags = ["measure", str(run), "--data", world["eval"], "--n", "11", "--max-new-tokens", "4",
             "--decoder", "quasi"]
    assert evaluate.main([*flags, "--top-p", "0.9"]) == 0
    written = json.loads((tmp_path / "run@quasi" / "evaluation.json").read_text())
    assert written["settings"]["decoding"]["independent"] is False
    assert all(len(r["drafts"]) == 10 and r["set"] == 5 for r in written["records"])
    assert "above 0" in refusal(capsys, evaluate.main, *flags, "--temperature", "0")
