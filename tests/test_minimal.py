"""Tests of minimal.py."""

import ast
import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

from helpers import ROOT


FILE = ROOT / "docs" / "minimal.py"


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_answers(minimal):
    shape = (minimal.PROMPTS, minimal.STYLES, minimal.LENGTH)
    answers = torch.randint(minimal.STYLES, minimal.VOCAB, shape)
    answers[:, :, 0] = torch.arange(minimal.STYLES)
    return answers


# ---- Size and imports ----------------------------------------------------------------------------

def test_has_at_most_200_lines_and_11_nodes_a_code_line():
    text = FILE.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    code_lines = {node.lineno for node in nodes if hasattr(node, "lineno")}
    assert len(text.splitlines()) <= 200
    assert max(len(line) for line in text.splitlines()) <= 100
    assert len(nodes) / len(code_lines) <= 11


def test_imports_only_torch_and_the_standard_library():
    imported = set()
    for node in ast.walk(ast.parse(FILE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert "torch" in imported
    assert imported - {"torch"} <= set(sys.stdlib_module_names)


# ---- The policy ----------------------------------------------------------------------------------

def test_probabilities_of_all_completions_sum_to_one(minimal):
    torch.manual_seed(0)
    policy = minimal.Policy()
    every = torch.cartesian_prod(*[torch.arange(minimal.VOCAB)] * minimal.LENGTH)
    prompts = torch.full((len(every),), 3)
    with torch.no_grad():
        total = minimal.log_prob(policy, prompts, every).sum(1).exp().sum()
    assert abs(total.item() - 1) < 1e-4


@pytest.mark.slow
def test_sample_draws_completions_as_often_as_log_prob_says(minimal):
    torch.manual_seed(0)
    policy = minimal.Policy()
    with torch.no_grad():
        policy.head.weight.mul_(8)          # away from uniform, so that a wrong order would show
    draws = minimal.sample(policy, torch.full((40_000,), 3))
    seen, counts = draws.unique(dim=0, return_counts=True)
    common = counts > 150
    assert common.sum() >= 5
    with torch.no_grad():
        logp = minimal.log_prob(policy, torch.full((len(seen),), 3), seen).sum(1)
    expected = logp[common].exp() * len(draws)
    deviations = (counts[common] - expected) / expected.sqrt()
    assert deviations.abs().max() < 5


# ---- D and its gradient --------------------------------------------------------------------------

# Four outcomes: two near each other, one far away, one of half quality.
EMBEDDINGS = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0], [0.6, 0.0, 0.8]])

LOGITS = torch.tensor([0.7, -0.3, 0.1, 0.4], dtype=torch.float64)


def all_groups(k):
    """Every ordered group of k of the four outcomes, (4^k, k)."""
    return torch.tensor(list(itertools.product(range(4), repeat=k)))


@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("quality", [(1.0, 1.0, 1.0, 1.0), (1.0, 0.0, 1.0, 0.5)])
def test_diversity_advantages_give_the_exact_gradient_of_expected_d(minimal, k, quality):
    groups = all_groups(k)
    embeddings = EMBEDDINGS.double()[groups]
    gate = torch.tensor(quality, dtype=torch.float64)[groups]
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(0)[groups]                    # (4^k, k)
    probability = logp.sum(1).exp()                         # of each group
    expected_d = (probability * minimal.diversity(embeddings, gate)).sum()
    exact, = torch.autograd.grad(expected_d, logits, retain_graph=True)

    advantages = minimal.diversity_advantages(embeddings, gate)
    surrogate = (probability.detach() * (advantages * logp).sum(1)).sum()
    estimated, = torch.autograd.grad(surrogate, logits)
    assert exact.abs().max() > 0.01
    assert torch.allclose(estimated, exact, atol=1e-7, rtol=0)


def test_diversity_is_the_mean_over_pairs(minimal):
    quality = torch.tensor([[1.0, 0.5, 1.0]])
    embeddings = EMBEDDINGS[:3].unsqueeze(0)
    pairs = [(1 - 0.8) * 0.5, 1.0, 1.0 * 0.5]
    assert minimal.diversity(embeddings, quality).item() == pytest.approx(sum(pairs) / 3)


def test_diversity_advantages_are_two_over_k_of_the_distance_to_the_others_less_their_d(minimal):
    """a_i = (2 / k) (d_i - D_without_i), d_i the mean distance of y_i to the others."""
    embeddings = EMBEDDINGS.unsqueeze(0)
    advantages = minimal.diversity_advantages(embeddings, torch.ones(1, 4))[0]
    for i in range(4):
        others = [j for j in range(4) if j != i]
        distances = 1 - EMBEDDINGS[others] @ EMBEDDINGS[i]
        without_i = minimal.diversity(embeddings[:, others], torch.ones(1, 3))[0]
        expected = 2 / 4 * (distances.mean() - without_i)
        assert advantages[i].item() == pytest.approx(expected.item(), abs=1e-6)


def test_d_of_one_completion_is_an_error(minimal):
    with pytest.raises(AssertionError, match="2 or more completions"):
        minimal.diversity(EMBEDDINGS[:1].unsqueeze(0), torch.ones(1, 1))
    with pytest.raises(AssertionError, match="2 or more completions"):
        minimal.diversity_advantages(EMBEDDINGS[:2].unsqueeze(0), torch.ones(1, 2))


def test_embeddings_are_counts_of_unit_length(minimal):
    embeddings = minimal.embed(torch.tensor([[[5, 6, 7], [7, 6, 5], [5, 5, 5], [8, 9, 10]]]))
    assert torch.allclose(embeddings.norm(dim=-1), torch.ones(1, 4))
    cosines = (embeddings @ embeddings.mT)[0, 0]
    assert torch.allclose(cosines, torch.tensor([1, 1, 1 / 3 ** 0.5, 0]))


# ---- GRPO ----------------------------------------------------------------------------------------

def test_group_advantages(minimal):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0] * 4, [0.0] * 4])
    advantages = minimal.group_advantages(rewards)
    std = (0.25 * 0.75) ** 0.5
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]) / (std + 1e-4)
    assert torch.allclose(advantages[0], expected)
    assert (advantages[1:] == 0).all()


@pytest.mark.parametrize("ratio, advantage, value, gradient", [
    (1.0, 2.0, -2.0, -2.0), (1.5, 2.0, -2.4, 0.0), (0.5, 2.0, -1.0, -1.0),
    (1.0, -2.0, 2.0, 2.0), (1.5, -2.0, 3.0, 3.0), (0.5, -2.0, 1.6, 0.0)])
def test_policy_loss_clips_only_what_already_moved_too_far(
        minimal, ratio, advantage, value, gradient):
    old_logp = torch.tensor([[-1.0]])
    logp = (old_logp + torch.tensor(ratio).log()).requires_grad_()
    loss = minimal.policy_loss(logp, old_logp, torch.tensor([[advantage]]))
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-5)
    assert logp.grad.item() == pytest.approx(gradient, abs=1e-5)


def test_policy_loss_on_policy_has_the_gradient_of_the_whole_completions(minimal):
    torch.manual_seed(0)
    policy = minimal.Policy()
    prompts = torch.arange(6)
    tokens = minimal.sample(policy, prompts)
    advantages = torch.randn(6, 1)
    logp = minimal.log_prob(policy, prompts, tokens)
    loss = minimal.policy_loss(logp, logp.detach(), advantages)
    score = (advantages.squeeze(1) * logp.sum(1)).sum() / tokens.numel()
    found = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
    expected = torch.autograd.grad(-score, list(policy.parameters()))
    for one, other in zip(found, expected):
        assert one.abs().max() > 0
        assert torch.allclose(one, other, atol=1e-7)


# ---- Pass@k --------------------------------------------------------------------------------------

def test_pass_at_k_is_the_fraction_of_subsets_with_a_good_sample(minimal):
    for n, k in itertools.product(range(1, 8), range(1, 8)):
        if k > n:
            with pytest.raises(AssertionError, match="needs at least"):
                minimal.pass_at_k(n, torch.tensor([0]), k)
            continue
        found = minimal.pass_at_k(n, torch.arange(n + 1), k)
        for c in range(n + 1):
            subsets = list(itertools.combinations(range(n), k))
            hits = [subset for subset in subsets if min(subset) < c]    # the first c are good
            assert found[c].item() == pytest.approx(len(hits) / len(subsets), abs=1e-6)


def test_is_right_names_the_style(minimal):
    torch.manual_seed(0)
    answers = make_answers(minimal)
    groups = answers.clone()
    groups[:, 1, 2] = (groups[:, 1, 2] + 1) % minimal.VOCAB     # one wrong token
    right = minimal.is_right(answers, groups)
    expected = torch.eye(minimal.STYLES, dtype=torch.bool)
    expected[1, 1] = False
    assert (right == expected).all()
    swapped = minimal.is_right(answers, groups.roll(1, dims=0))     # another prompt's answers
    assert swapped.float().mean() < 0.05


# ---- What it shows -------------------------------------------------------------------------------

@pytest.mark.slow
def test_grpo_loses_pass_at_5_and_with_d_it_does_not():
    command = [sys.executable, str(FILE), "--seeds", "2", "--steps", "60"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    header, *rows = run.stdout.splitlines()
    assert header.split() == ["Pass@1", "Pass@5", "D", "right"]
    table = {}
    for row in rows:
        numbers = [float(cell.split()[0]) for cell in row[10:].split("   ")]
        table[row[:10].strip()] = dict(zip(header.split(), numbers))
        assert row.count(" +- ") == 4
    assert list(table) == ["start", "GRPO", "GRPO + D"]
    start, grpo, grpo_d = table.values()
    assert grpo["Pass@1"] > start["Pass@1"] + 0.1
    assert grpo["Pass@5"] < start["Pass@5"] - 0.1
    assert grpo_d["Pass@1"] > start["Pass@1"] + 0.03
    assert grpo_d["Pass@5"] > start["Pass@5"] - 0.02
    assert grpo_d["Pass@5"] > grpo["Pass@5"] + 0.1
    assert grpo_d["right"] > start["right"] + 0.1


@pytest.mark.slow
def test_without_the_distance_the_gate_alone_does_not_keep_pass_at_5(minimal, monkeypatch):
    def fraction_of_right_pairs(embeddings, quality):
        k = quality.shape[1]
        ordered_pairs = quality.sum(1) ** 2 - (quality ** 2).sum(1)
        return ordered_pairs / (k * (k - 1))

    torch.manual_seed(0)
    answers = make_answers(minimal)
    start = minimal.Policy()
    minimal.fit_start(start, answers)
    before = minimal.evaluate(start, answers)
    monkeypatch.setattr(minimal, "diversity", fraction_of_right_pairs)
    minimal.train(start, answers, 60, 8.0)
    monkeypatch.undo()
    after = minimal.evaluate(start, answers)
    assert after[1] < before[1] - 0.1       # Pass@5
    assert after[3] > before[3] + 0.1       # the fraction of right completions
