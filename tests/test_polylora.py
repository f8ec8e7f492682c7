"""Tests of polylora.py."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import data
import model
import polylora
import rewards
from helpers import (
    OUTCOMES, QUALITY, Share, after, all_tuples, both_take, command, diversity_advantages,
    drafts_of, exact_gradient, expected_estimate, fixed_completions, gap, gradient, grads_of,
    in_double, metrics, nearly, policy, resumed, sft, sft_session, visits, styles_by_length,
    whole_and_cut,
)
from lora import base, lora_layers
from methods import features
from polylora import (Features, Gate, add_diversity, diversity, measure_diversity, pair_distances,
                      sft_step)
from support import files as support_files
from support.files import InputError
from support import posts
from support.registry import DIVERSITIES, SFT_LOSSES
from trainer import add_cross_entropy, batch_visits


# ---- Diversity -----------------------------------------------------------------------------------

def test_d_by_hand():
    """The mean over pairs, without the diagonal: three of four cosines are 0, -1, 0."""
    e = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [[0.6, 0.8], [0.6, 0.8], [0.6, 0.8]]])
    assert diversity(e).tolist() == pytest.approx([(1 + 2 + 1) / 3, 0], abs=1e-6)
    q = torch.tensor([[1.0, 0.5, 0.2], [1, 1, 1]])
    assert diversity(e, q).tolist() == pytest.approx([(1 * 0.5 + 2 * 0.2 + 1 * 0.1) / 3, 0],
                                                     abs=1e-6)
    assert diversity(e[:1, :2]).tolist() == [1.0]
    assert pair_distances(e)[0].tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    # duplicates earn nothing
    assert float(diversity_advantages(e)[1].abs().max()) < 1e-6
    for k in (0, 1):
        with pytest.raises(InputError, match="two completions"):
            diversity(e[:, :k])


def test_an_advantage_is_what_a_completion_adds_to_d():
    e, q = F.normalize(torch.randn(3, 5, 4), dim=-1), torch.rand(3, 5)
    for gate in (None, q):
        got = diversity_advantages(e, gate)
        for i in range(5):
            rest = [j for j in range(5) if j != i]
            without = diversity(e[:, rest], None if gate is None else gate[:, rest])
            assert gap(got[:, i], diversity(e, gate) - without) < 1e-6


@pytest.mark.parametrize("gated, floor", [(False, 0.0), (True, 0.0), (True, 1.0)])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_score_function_gradient_of_d_is_exact(monkeypatch, k, gated, floor):
    """The estimator's expectation over all k-tuples is grad E[D], with no constant between them,
    gate or no gate, floor or no floor."""
    in_double(monkeypatch)
    theta, drawn = policy(4), all_tuples(4, k)
    q = QUALITY[drawn] if gated else None
    want = exact_gradient(theta, drawn, diversity(OUTCOMES[drawn], q, floor))
    got = expected_estimate(theta, drawn, diversity_advantages(OUTCOMES[drawn], q, floor))
    assert float(want.abs().max()) > 0.01 and gap(got, want) < 1e-12
    # "novelty as a reward, less the group's mean" has another constant, zero at k = 2
    if not gated:
        pairs = pair_distances(OUTCOMES[drawn]).sum(-1) / (k - 1)
        novelty = expected_estimate(theta, drawn, pairs - pairs.mean(-1, keepdim=True))
        assert gap(novelty, (k / 2 - 1) * want) < 1e-12


def test_a_floor_rewards_correct_similar_completions_only():
    """(floor + delta) q q by hand: two equal right drafts and a wrong one; without a gate there
    is no floor."""
    e, q = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert diversity(e, q).item() == 0 and diversity(e, q, 0.6).item() == pytest.approx(0.2)
    assert diversity(e, None, 0.6).item() == diversity(e).item() == pytest.approx(2 / 3)
    right, _, wrong = diversity_advantages(e, q, 0.6)[0].tolist()
    assert right > 0 > wrong


def test_the_sampled_estimate_converges_to_the_gradient_of_d():
    """The same through sampling, in the fp32 that training uses: the mean of 60,000 estimates is
    grad E[D]."""
    theta, k, n = policy(4, seed=1), 4, 60_000
    drawn = torch.multinomial(theta.detach().softmax(-1), n * k, True).view(n, k)
    every = all_tuples(4, k)
    want = exact_gradient(theta, every, diversity(OUTCOMES[every]).double())
    a, logp = diversity_advantages(OUTCOMES[drawn]).double(), theta.log_softmax(-1)
    got, = torch.autograd.grad((a * logp[drawn]).sum() / n, theta)
    assert gap(got, want) < 0.05 * float(want.abs().max())


def test_a_detached_d_has_no_gradient_and_ours_does():
    """The failure that must not come back: D as a number computed from sampled text leaves every
    gradient unchanged."""
    theta, drawn = policy(4), torch.tensor([[0, 1, 3], [2, 2, 0]])
    quality_loss = -theta.log_softmax(-1)[1]
    plain, = torch.autograd.grad(quality_loss, theta, retain_graph=True)
    number = diversity(OUTCOMES[drawn]).mean().item()
    detached, = torch.autograd.grad(quality_loss - 3.0 * number, theta, retain_graph=True)
    assert torch.equal(detached, plain)
    ours = polylora.diversity_loss(theta.log_softmax(-1)[drawn].flatten(), torch.arange(6),
                                   diversity_advantages(OUTCOMES[drawn]).flatten(), 2)
    moved, = torch.autograd.grad(quality_loss + 3.0 * ours, theta)
    assert gap(moved, plain) > 0.1


# ---- The SFT step, on a real session around a tiny model -----------------------------------------

def ce_work(s, indices):
    replies = [s.posts[i].replies[i % len(s.posts[i].replies)] for i in indices]
    return lambda tally: add_cross_entropy(s, visits(indices), replies, tally)


def d_work(s, indices):
    return lambda tally: add_diversity(s, visits(indices), 0, tally)


def logprob_sum(s, prompt, completion, temperature):
    """log pi(draft | prompt) at a temperature by a plain full forward over the real tokens, with
    its gradient."""
    logits = s.model(torch.tensor([prompt + completion]))[0, len(prompt) - 1:-1]
    logp = (logits[:, :s.model.vocab] / temperature).log_softmax(-1)
    return logp[torch.arange(len(completion)), torch.tensor(completion)].sum()


def test_cross_entropy_is_the_mean_over_all_reply_tokens(parts):
    """One denominator for the step: a mean of micro-batch means weighs the tokens of long
    replies less."""
    s, indices = sft(parts, "--micro-tokens", "40"), [0, 1, 2, 3, 4]
    got, tally = gradient(s, ce_work(s, indices))
    replies = [(s.prompt(i),
                data.encode_reply(s.tokenizer, s.posts[i].replies[i % len(s.posts[i].replies)]))
               for i in indices]
    count = sum(len(r) for _, r in replies)

    def plain(_):
        (-sum(logprob_sum(s, p, r, 1.0) for p, r in replies) / count).backward()

    def means(_):
        (-sum(logprob_sum(s, p, r, 1.0) / len(r) for p, r in replies) / len(replies)).backward()
    want = gradient(s, plain)[0]
    nearly(got, want)
    with pytest.raises(AssertionError):
        nearly(gradient(s, means)[0], want, 1e-2)
    value = -sum(logprob_sum(s, p, r, 1.0).item() for p, r in replies) / count
    assert tally.means(s.ranks, ["ce"])["ce"] == pytest.approx(value, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["none", "likelihood"])
def test_lambda_moves_the_adapter_where_the_formula_says(parts, gate):
    """The step with lambda less the step without it is -lambda times grad of (1/P) sum_i a_i log
    pi(y_i): written out with plain forwards, log pi summed over the draft's tokens with its
    stop token, at the temperature of sampling."""
    lam = 0.7
    with_d, s = sft(parts, "--lambda", str(lam), "--gate", gate), sft(parts)
    got, plain = (gradient(x, lambda tally: sft_step(x, 0))[0] for x in (with_d, s))
    mine = batch_visits(len(s.posts), 6, 0, 4)[:4]
    prompts, samples, texts = s.sample_completions(mine, 0, 3)
    e = s.embedder(texts)
    q = torch.ones(4, 3)
    if gate != "none":
        q = with_d.gate(Features(texts=texts), [s.posts[v.index] for v in mine], samples)

    def term(_):
        for p in range(4):
            delta = [[float((1 - e[p, i] @ e[p, j]) * q[p, i] * q[p, j]) for j in range(3)]
                     for i in range(3)]
            total = (delta[0][1] + delta[0][2] + delta[1][2]) / 3
            for i, (j, l) in enumerate(((1, 2), (0, 2), (0, 1))):
                # D less the D of the other two
                a = total - delta[j][l]
                (-lam * a * logprob_sum(s, prompts[p], samples.tokens[p][i], 0.8) / 4).backward()
    want = gradient(s, term)[0]
    nearly({n: got[n] - plain[n] for n in got}, want, 1e-3)
    if gate == "none":
        with pytest.raises(AssertionError):  # nor does D vanish beside L_quality
            nearly(got, plain, 1e-2)


def test_sampling_every_second_step_keeps_d_s_weight(parts):
    """lambda means the same at every --draft-every: a drafting step counts for those without
    drafts."""
    def d_part(step, *flags):
        on, off = (sft(parts, *x) for x in (("--lambda", "0.5", *flags), flags))
        on, off = (gradient(x, lambda tally: sft_step(x, step))[0] for x in (on, off))
        return {n: on[n] - off[n] for n in on}
    each, second = d_part(0), d_part(0, "--draft-every", "2")
    nearly(second, {n: 2 * g for n, g in each.items()}, 1e-3)
    assert all(float(g.abs().max()) == 0 for g in d_part(1, "--draft-every", "2").values())


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("budget", [1, 60, 120, 100_000])
def test_the_gradient_does_not_depend_on_the_micro_batches(parts, budget):
    """1 x 8, 2 x 4, 4 x 2: --micro-tokens saves memory and changes nothing else."""
    for k, work in ((1, ce_work), (3, d_work)):
        runs = [sft(parts, "--lambda", "1", "--micro-tokens", str(b)) for b in (100_000, budget)]
        whole, cut = (gradient(s, work(s, list(range(8))))[0] for s in runs)
        nearly(cut, whole)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_gradients_of_two_ranks_add_up_to_the_whole(parts, count):
    """Each rank divides by the step's count, not its own, and draws the drafts that one process
    would have drawn."""
    for work in (ce_work, d_work):
        runs = [sft(parts, "--lambda", "1", ranks=r) for r in (Share(), Share(0, 2), Share(1, 2))]
        whole, one, two = (gradient(s, work(s, list(range(count)))) for s in runs)
        nearly({n: one[0][n] + two[0][n] for n in whole[0]}, whole[0])
        for name, (total, number) in whole[1].sums.items():
            # padding differs with the cut
            if name != "tokens":
                parts_ = [t.sums.get(name, (0, 0)) for _, t in (one, two)]
                assert [sum(x) for x in zip(*parts_)] == pytest.approx([total, number],
                                                                       rel=1e-4), name


def test_completions_are_sampled_without_dropout(parts):
    """Dropout in the cross-entropy passes only: drafts sampled under one mask and scored under
    another are off policy."""
    s = sft(parts, "--lambda", "1")
    for layer in lora_layers(s.model).values():
        layer.dropout = 0.5
    modes, write, ce = [], s.sample_completions, model.token_logprobs
    s.sample_completions = lambda *a: (modes.append(s.model.training), write(*a))[1]
    sft_step(s, 0)
    assert modes == [False] and not s.model.training and ce is model.token_logprobs


def test_the_likelihood_gate_is_the_base_s_mean_log_probability_on_people_s_scale(parts):
    """Of the base, or a policy that drifts to gibberish passes its own gate; and between what
    replies to another post score, 0, and what people's own score, 1: raw, it made D a
    thousandth of itself."""
    s = sft(parts)
    prompts, samples, texts = s.sample_completions(visits([0, 5]), 0, 3)
    gate = Gate.__new__(Gate)
    gate.session, gate.name, gate.low, gate.high = s, "likelihood", -6.0, 1.0
    got = gate(Features(texts=texts), [s.posts[0], s.posts[5]], samples)
    with torch.no_grad(), base(s.model):
        want = [[(float(logprob_sum(s, p, d, 0.8)) / len(d) + 6) / 7 for d in completions]
                for p, completions in zip(prompts, samples.tokens)]
    assert gap(got, torch.tensor(want).clamp(0, 1)) < 1e-5 and 0 < float(got.min()) < 1
    assert polylora.make_gate(s, "none") is None
    right = [[s.posts[0].replies[0], "nonsense"], ["?", s.posts[5].replies[2].upper()]]
    assert quality(s, "verifier", [0, 5], right).tolist() == [[1, 0], [0, 1]]


def quality(s, name, indices, texts):
    """q of texts by a gate, with the features that a step gives it."""
    posts = [s.posts[i] for i in indices]
    features = Features(texts=texts, seeds=torch.arange(1, len(posts) + 1))
    if s.domain.styles:
        features.valid = torch.tensor(s.domain.valid(posts, texts))
    if s.reward is not None:
        features.rewards = torch.tensor(s.reward(posts, texts, features.seeds.tolist()))
    return Gate(s, name)(features, posts, None)


def test_the_gate_s_scale_is_people_s(parts):
    """0 and 1 are what the session's own replies and exchanged ones score, measured, not assumed. A
    scale that is wrong by a factor of 1,000 would leave q near 0, or near 1, for both."""
    s = sft(parts)
    s.reward = lambda posts, completions, seeds: [[
        0.002 * (t in s.posts[[p.post for p in s.posts].index(p_.post)].replies) + 0.001
        for t in ts] for p_, ts in zip(posts, completions)]
    gate = Gate(s, "reward")
    assert (gate.low, gate.high) == (pytest.approx(0.001), pytest.approx(0.003))
    own = [[s.posts[i].replies[1], s.posts[(i + 5) % 12].replies[1]] for i in range(12)]
    q = quality(s, "reward", range(12), own)
    assert gap(q, torch.tensor([[1.0, 0.0]] * 12)) < 1e-4
    e = s.embedder(own)
    right = s.embedder([[p.replies[0], p.replies[1], p.replies[2]] for p in s.posts])
    replies = [list(p.replies[:3]) for p in s.posts]
    gated = diversity(right, quality(s, "reward", range(12), replies))
    assert gap(gated, diversity(right)) < 1e-3 and float(diversity(e, q).max()) < 1e-3
    s.reward = lambda posts, completions, seeds: [[0.5] * len(ts) for ts in completions]
    with pytest.raises(InputError, match="cannot tell people's replies"):
        Gate(s, "reward")


def test_a_verifier_s_reward_is_on_people_s_scale_already(parts):
    """Its scale was measured on posts whose replies were held out, where an exact verifier finds
    nothing right: phase two of train.sh --model ended there, after hours, on every file of
    replies by style."""
    s = sft(parts)
    s.posts = [dataclasses.replace(post, replies=post.replies[:1], styles=post.styles[:1])
               for post in s.posts]
    s.domain = data.Domain(s.posts)
    s.reward = rewards.VerifierReward(s.domain, any_style=True)
    own = [[s.posts[i].replies[0], "nonsense"] for i in (0, 5)]
    for name in ("reward", "verifier", "auto"):
        assert quality(s, name, [0, 5], own).tolist() == [[1, 0], [1, 0]]
    assert Gate(s, "auto").name == "verifier"
    s.reward = rewards.VerifierReward(s.domain, any_style=True, valid_weight=0.5)
    assert quality(s, "reward", [0, 5], own).tolist() == [[1, 0], [1, 0]]
    s.domain, s.stage = data.Replies([]), "grpo"
    s.reward = lambda posts, completions, seeds: [[float(t == p.replies[0]) for t in ts]
                                                  for p, ts in zip(posts, completions)]
    assert Gate(s, "auto").name == "reward"
    s.stage = "sft"
    assert Gate(s, "auto").name == "likelihood"


def test_lambda_share_keeps_the_gradient_ratio_of_d(parts):
    """At every drafting step |D's part| is that share of |cross-entropy's|, and it is logged; so
    is the share that a fixed lambda happens to have."""
    flat = lambda grads: torch.cat([g.flatten() for g in grads.values()])
    for share in (0.3, 2.0):
        s, without = sft(parts, "--lambda-share", str(share)), sft(parts)
        tallies = []
        whole = flat(gradient(s, lambda _: tallies.append(sft_step(s, 0)))[0])
        plain = flat(gradient(without, lambda _: sft_step(without, 0))[0])
        assert float((whole - plain).norm() / plain.norm()) == pytest.approx(share, rel=1e-3)
        assert tallies[0].sums["D_share"][0] == pytest.approx(share, rel=1e-5)
    s, tallies = sft(parts, "--lambda", "0.7"), []
    whole = flat(gradient(s, lambda _: tallies.append(sft_step(s, 0)))[0])
    got = float((whole - plain).norm() / plain.norm())
    assert tallies[0].sums["D_share"][0] == pytest.approx(got, rel=1e-3)


# ---- The command line ----------------------------------------------------------------------------

@pytest.mark.slow
def test_an_sft_run_from_the_command_line_resumes_bit_for_bit(files, tmp_path):
    """The whole phase, broken off in its fifth step and resumed: the adapter is the
    uninterrupted run's in every bit."""
    small = ("--steps 6 --batch 4 --lambda 0.5 --k 3 --draft-posts 2 --max-new-tokens 5 --rank 2 "
             "--dropout 0.2 --save-every 2 --max-rows 4").split()
    whole = whole_and_cut(command(polylora.main, tmp_path, "sft", *files, *small), polylora,
                          "sft_step", 4)["adapter"]
    assert all(float(x.abs().max()) > 0 for x in whole.values())
    assert [x["step"] for x in metrics(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6, 6]


def test_a_held_out_reply_is_the_first_and_the_post_keeps_the_others():
    post = posts.Post("a", "post", ("one", "two", "three"), ("x", "y", "z"), "intent")
    rest, reply = polylora.held_out(post)
    assert (rest.replies, reply, rest.styles, rest.intent) == (("two", "three"), "one", (),
                                                               "intent")
    alone, reply = polylora.held_out(posts.Post("a", "post", ("one",)))
    # a single reply is kept
    assert alone.replies == ("one",) and reply == "one"
    with pytest.raises(support_files.InputError, match="no reply"):
        polylora.held_out(posts.Post("a", "post", ()))


# ---- Diversities by hand -------------------------------------------------------------------------

def test_a_floor_rewards_good_pairs_regardless_of_distance():
    """(q0 q1 + q0 q2 + q1 q2) / 3 less the pair without each draft; ungated nothing is to be
    gained."""
    value, a, _ = measure_diversity("floor", drafts_of(quality=[0.5, 1.0, 0.2], classes=[0, 0, -1]))
    assert value.item() == pytest.approx((0.5 + 0.1 + 0.2) / 3)
    assert a[0].tolist() == pytest.approx([0.8 / 3 - 0.2, 0.8 / 3 - 0.1, 0.8 / 3 - 0.5])
    value, a, _ = measure_diversity("floor", drafts_of(classes=[0, 1, 2]))
    assert value.item() == 1 and a.abs().max() < 1e-6


def test_answers_are_styles_or_texts():
    class Domain:
        styles = ("warm", "dry")
        styles_of = staticmethod(lambda post, text: set(text.split()) & {"warm", "dry"})
    texts = [["warm", "dry", "neither", "dry warm", "so warm"], ["dry", "dry", "x", "y", "warm"]]
    assert features.answer_classes(Domain, [None] * 2,
                                   texts).tolist() == [[0, 1, -1, 2, 0], [0, 0, -1, -1, 1]]
    Domain.styles = ()
    Domain.styles_of = staticmethod(lambda post, text: None)
    texts = [["Yes!", "yes", "no", "?!", "yes yes"]]
    assert features.answer_classes(Domain, [None], texts).tolist() == [[0, 0, 1, -1, 2]]


# ---- Every line of the registers takes steps -----------------------------------------------------

def test_label_noise_reaches_the_gate_in_phase_one(parts):
    flags = ("--lambda", "1", "--gate", "verifier", "--label-noise", "0.4")
    s, seen = sft_session(parts, *flags), []
    s.domain.styles_of = lambda post, text: s.domain.styles[:1]
    s.gate = polylora.Gate(s, "verifier")
    ask = s.gate
    s.gate = lambda *a: (seen.append(ask(*a)), seen[-1])[1]
    for step in (0, 0, 1):
        polylora.sft_step(s, step)
    assert (torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
            and 0 < float(seen[0].mean()) < 1)


# ---- Ranks and resumption ------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", ["unlikelihood-sequence", "bonbon", "ba-lora-nlu", "sed"])
def test_two_ranks_take_the_sft_step_of_one(parts, name):
    def go(ranks):
        s = sft_session(parts, "--loss", name, "--max-new-tokens", "7", ranks=ranks)
        # a random model repeats nothing
        if name == "unlikelihood-sequence":
            repeating = [[9, 8, 7, 6, 9, 8, 7, 6, 5], [5, 6, 5, 6, 7]]
            fixed_completions(s, lambda visit: repeating[:1 + visit.index % 2])
        polylora.sft_step(s, 0)
        return grads_of(s, 0)
    both_take(go, go(Share()))


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", [*SFT_LOSSES, *DIVERSITIES, "straight-through"])
def test_20_sft_steps_move_the_adapter_alone_and_are_a_function_of_tensors_and_files(parts,
                                                                                     tmp_path,
                                                                                     name):
    def make():
        flags = (("--loss", name) if name in SFT_LOSSES
                 else ("--lambda", "1", "--draft-posts", "2", "--draft-every", "2",
                       *(("--diversity", name) if name in DIVERSITIES else
                         ("--d-gradient", name))))
        s = sft_session(parts, *flags, "--k", "3", "--batch", "2", "--max-new-tokens", "3")
        s.domain.styles_of = styles_by_length(s.domain)
        return s
    whole_run = after(make(), polylora.sft_step, tmp_path)
    assert all(torch.equal(a, b)
               for a, b in zip(whole_run, resumed(make(), polylora.sft_step, tmp_path)))
