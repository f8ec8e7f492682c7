"""Tests of methods/losses.py."""

import copy
import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import data
import lora
import model as model_module
import polylora
import trainer
from helpers import (
    GROUPS, Largest, close, fixed_completions, gap, gradient, nearly, nll, packed, sft_session,
    shake, trainable,
)
from methods import losses
from methods.losses import TokenLosses, token_losses
from model import pack, predicting_states, token_logprobs
from support import checks
from support.files import InputError
from support import registry
from support import steplog
from support.steplog import Tally
from trainer import Visit


# ---- Any loss of a token's logits, chunk by chunk ------------------------------------------------

def entropy(logits, target):
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def tempered(logits, target):
    """GEM's linear form: -log p_y + sum_v q_v log p_v with q the sharpened softmax, held fixed."""
    logp, q = logits.log_softmax(-1), (logits / 0.7).softmax(-1).detach()
    return (q * logp).sum(-1) - logp.gather(-1, target[:, None]).squeeze(-1)


def away(logits, target, other):
    """KL from another model's distribution, given by its states."""
    return (other.softmax(-1) * (other.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("fn", [nll, entropy, tempered, away])
def test_token_losses_are_plain_autograd_s(monkeypatch, fn, trained_head):
    """Value and gradient of every loss, in chunks, against full logits; a trained head gets its
    own."""
    monkeypatch.setattr(model_module, "chunk_size", lambda vocab, device: 7)
    results = []
    for way in ("ours", "plain"):
        model = trainable()
        model.lm_head.requires_grad_(trained_head)
        rows, = pack(GROUPS, 10_000)
        extra = (torch.randn(len(rows.target), 41, generator=torch.Generator().manual_seed(2)),) \
            if fn is away else ()
        if way == "ours":
            losses = token_losses(model, rows, fn, 0.8, extra)
        else:
            hidden = model.hidden(rows.tokens, rows.positions,
                                  model_module.full_attention(rows.mask()))
            states = hidden.flatten(0, 1)[rows.predict]
            losses = fn(F.linear(states, model.head_weight()).float() / 0.8, rows.target, *extra)
        (losses * torch.linspace(-1, 2, len(losses))).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": losses.detach()} | grads)
    close(*results)
    assert ("lm_head.weight" in results[0]) == trained_head


def test_the_fast_case_is_the_general_one():
    model, (rows,) = trainable(), pack(GROUPS, 10_000)
    logp, _ = token_logprobs(model, rows, 0.8)
    assert float((logp + token_losses(model, rows, nll, 0.8)).abs().max()) < 1e-5
    with torch.no_grad():
        assert float((logp + token_losses(model, rows, nll, 0.8)).abs().max()) < 1e-5


def test_chunks_hold_whole_completions(monkeypatch):
    monkeypatch.setattr(losses, "chunk_size", lambda vocab, device: 5)
    for lengths, want in (([2, 2, 2, 1, 9, 1], [(0, 4), (4, 7), (7, 16), (16, 17)]),
                          ([5], [(0, 5)]), ([7, 5], [(0, 7), (7, 12)]),
                          ([1] * 6, [(0, 5), (5, 6)])):
        completion = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        cuts = losses.whole_chunks(completion, 9)
        assert [(c.start, c.stop) for c in cuts] == want


def test_no_loss_keeps_logits(monkeypatch):
    monkeypatch.setattr(model_module, "chunk_size", lambda vocab, device: 16)
    hidden, saved = torch.randn(64, 8, requires_grad=True), []
    with saved_tensors_hooks(lambda x: (saved.append(tuple(x.shape)), x)[1],
                             lambda x: x), Largest() as watch:
        cuts = model_module.chunks(64, 3000, hidden.device)
        TokenLosses.apply(entropy, hidden, torch.randn(3000, 8), torch.arange(64), 1.0,
                          cuts).sum().backward()
    assert (64, 8) in saved and watch.numel <= 16 * 3000
    assert not any(shape and shape[-1] == 3000 and shape[0] > 16 for shape in saved)


# ---- SFT losses ----------------------------------------------------------------------------------

def tokens(n=5, vocab=9, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, vocab, generator=draw, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(0, vocab, (n,), generator=draw)


def slope(loss, logits):
    return torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]


@pytest.mark.parametrize("beta", [0.7, 1.0, 0.3])
def test_linear_gem_has_the_gradient_of_cross_entropy_at_another_temperature(beta):
    """beta CE(z / beta), exactly; at beta = 1 plain cross-entropy. Its value is that of the sum
    over v."""
    z, y = tokens()
    loss = losses.gem_loss(z, y, beta)
    want = slope(beta * F.cross_entropy(z / beta, y, reduction="none"), z)
    assert gap(slope(loss, z), want) < 1e-15
    logp, q = z.log_softmax(-1), (z / beta).softmax(-1)
    by_hand = [-sum(q[n, v] * (logp[n, y[n]] - logp[n, v]) for v in range(9)) for n in range(5)]
    assert gap(loss, torch.stack(by_hand)) < 1e-14


def test_logsigmoid_gem_is_nearly_half_of_the_linear():
    """Each v is weighed by sigmoid((z_v - z_y)/100), held fixed like q."""
    z, y = tokens(seed=1)
    loss = losses.gem_loss(z, y, 0.7, logsigmoid=True)
    w = (((z - z.gather(1, y[:, None])) / 100).sigmoid() * (z / 0.7).softmax(-1)).detach()
    logp = z.log_softmax(-1)
    want = -(w * (logp.gather(1, y[:, None]) - logp)).sum(-1)
    assert gap(loss, want) < 1e-14 and gap(slope(loss, z), slope(want, z)) < 1e-14
    linear = slope(losses.gem_loss(z, y, 0.7), z)
    assert 1e-4 < gap(slope(loss, z), linear / 2) < 0.02 * float(linear.abs().max())
    assert torch.equal(losses.gem_loss(z, y), losses.gem_loss(z, y, 0.7, logsigmoid=False))
    assert torch.equal(registry.SFT_LOSSES["gem-logsigmoid"].function(z, y), loss)


def test_the_entropy_loss_by_its_distribution():
    z, y = tokens(seed=2)
    entropy = torch.distributions.Categorical(logits=z).entropy()
    ce = F.cross_entropy(z, y, reduction="none")
    assert gap(losses.entropy_loss(z, y), ce - 0.1 * entropy) < 1e-14
    assert gap(slope(losses.entropy_loss(z, y, 2.0), z), slope(ce - 2.0 * entropy, z)) < 1e-14


def rows_of(*replies):
    return packed([([1, 2], [list(r) for r in replies])])


def test_unlikelihood_counts_the_reply_s_earlier_tokens():
    """Each once, never the target, never another reply's."""
    rows = rows_of([4, 0, 4, 4, 6], [7, 0])
    earlier, = losses.earlier_tokens(None, rows)
    assert [sorted(t for t in row if t >= 0) for row in earlier.tolist()] == [[], [4], [0], [0],
                                                                              [0, 4], [], [7]]
    z, y = tokens(7, seed=3)[0] * 3, rows.target                               # some chances near 1
    p, ce = z.softmax(-1), F.cross_entropy(z, y, reduction="none")
    want = [ce[n] - 0.5 * sum((1 - p[n, c]).log() for c in row if c >= 0)
            for n, row in enumerate(earlier.tolist())]
    got = losses.unlikelihood_loss(z, y, earlier, 0.5)
    assert (gap(got, torch.stack(want)) < 1e-12 and gap(slope(got, z), slope(torch.stack(want), z))
            < 1e-12)
    assert gap(losses.unlikelihood_loss(z, y, earlier), ce + 2 * (got - ce)) < 1e-12
    likely = torch.tensor([[0.9, 0.1]]).log()
    got = losses.unlikelihood_loss(likely, torch.tensor([1]), torch.tensor([[0]])).item()
    assert got == pytest.approx(-2 * math.log(0.1), rel=1e-5)
    sure = torch.tensor([[100.0, 0.0]], requires_grad=True)                    # 1 - p rounds to 0
    loss = losses.unlikelihood_loss(sure, torch.tensor([1]), torch.tensor([[0]]))
    assert torch.isfinite(slope(loss, sure)).all()


def ba_lora_by_torch(z, base, completion, heat, top, leading):
    """KL, entropy and singular values as torch has them, with the paper's weights."""
    student, teacher = (z / heat).log_softmax(-1), (base / heat).log_softmax(-1)
    kl = heat ** 2 * F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    entropy = torch.distributions.Categorical(logits=z.topk(top).values).entropy()
    spectra = {i: torch.linalg.svdvals(z[completion == i]) for i in completion.tolist()}
    rank = [spectra[i][:leading].sum() / spectra[i].norm() for i in completion.tolist()]
    return 0.025 * kl - 0.005 * entropy - 0.005 * torch.stack(rank)


def test_ba_lora_s_three_terms():
    """Each reply by itself: one of 13 tokens, so that ten singular values are not all, and one
    of 3."""
    completion = torch.tensor([0] * 12 + [1, 1, 0, 1])
    z, y = tokens(16, 40, seed=4)
    base = tokens(16, 40, seed=5)[0].detach()
    for scale in (1, 1e-2):  # small logits too
        for options in ({}, {"heat": 3.0}, {"top": 5}, {"leading": 2}):
            settings = dict(heat=2.0, top=20, leading=10) | options
            want = ba_lora_by_torch(scale * z, base, completion, **settings)
            got = losses.ba_lora_regularizer(scale * z, base, completion, **options)
            assert gap(got, want) < 1e-9 and gap(slope(got, z), slope(want, z)) < 1e-8
    head = torch.randn(40, 6).double()
    # some states, and their logits
    hidden = torch.linalg.lstsq(head, base.T).solution.T
    near = losses.ba_lora_regularizer(z, F.linear(hidden, head).float(), completion)
    loss = losses.ba_lora_loss(z, y, hidden, completion, head, weight=3.0)
    assert gap(loss, F.cross_entropy(z, y, reduction="none") + 3 * near) < 1e-12
    assert torch.equal(losses.ba_lora_loss(z, y, hidden, completion, head),
                       losses.ba_lora_loss(z, y, hidden, completion, head, weight=1.0))
    # a vocabulary below 20
    assert losses.ba_lora_regularizer(z[:, :4], base[:, :4], completion).shape == (16,)


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.SFT_LOSSES)
def test_every_sft_loss_takes_two_steps_and_moves_the_adapter(parts, name):
    s = sft_session(parts, "--loss", name)
    s.params = list(lora.adapter_state(s.model).values())
    before, optimizer, lines = lora.frozen_copy(s.model), torch.optim.AdamW(s.params, lr=1e-3), []
    for step in range(2):
        lines.append(polylora.sft_step(s, step).means(s.ranks, steplog.SFT_LOGGED))
        optimizer.step()
        optimizer.zero_grad()
    # of the completions it samples
    shares = {"truncated", "empty", "identical"}
    logged = {"ce": {"ce"}, "unlikelihood-sequence": {"ce", "unlikely"} | shares,
              "bonbon": {"loss", "reward"} | shares, "ebft": {"ce", "reward"} | shares}
    assert all(set(line) == logged.get(name, {"loss"}) for line in lines)
    assert all(math.isfinite(x) for line in lines for x in line.values())
    assert all(not torch.equal(p, before[n]) for n, p in lora.adapter_state(s.model).items())


@pytest.mark.parametrize("name", [n for n, loss in registry.SFT_LOSSES.items() if loss.function])
def test_the_loss_by_chunks_is_that_of_whole_logits(parts, name):
    """BA-LoRA's third term couples a reply's tokens, so that it must see them all."""
    s, kind = sft_session(parts, "--loss", name), registry.SFT_LOSSES[name]
    groups = [(s.prompt(i), [data.encode_reply(s.tokenizer, s.posts[i].replies[0])])
              for i in range(4)]
    rows = packed(groups)
    got, _ = gradient(s, lambda tally: losses.reply_losses(s, rows).sum().backward())
    options = {"head": s.model.head_weight()} if name.startswith("ba-lora") else {}
    extra = kind.extra(s, rows) if kind.extra else ()

    def plain(tally):
        logits = F.linear(predicting_states(s.model, rows), s.model.head_weight())
        loss = kind.function(logits, rows.target, *extra, **options).sum()
        if kind.states:
            loss = loss + kind.states(predicting_states(s.model, rows), rows.completion).sum()
        loss.backward()
    want, _ = gradient(s, plain)
    scale = max(float(g.abs().max()) for g in want.values())
    assert scale > 0 and max(gap(got[n], g) for n, g in want.items()) < 1e-4 * scale


@pytest.mark.slow_after(3)
@pytest.mark.parametrize("name", registry.SFT_LOSSES)
def test_every_sft_loss_has_one_denominator_however_rows_are_packed(parts, name, monkeypatch):
    """And however the chunks fall that logits are made in: one of BA-LoRA's terms is of a whole
    reply."""
    grads = []
    for size, chunk in (("100000", 10_000), ("40", 3)):
        monkeypatch.setattr(model_module, "chunk_size", lambda vocab, device: chunk)
        monkeypatch.setattr(losses, "chunk_size", lambda vocab, device: chunk)
        s = sft_session(parts, "--loss", name, "--micro-tokens", size)
        s.params = list(lora.adapter_state(s.model).values())
        grads.append(gradient(s, lambda tally: polylora.sft_step(s, 0))[0])
    scale = max(float(g.abs().max()) for g in grads[0].values())
    assert scale > 0 and max(gap(grads[1][n], g) for n, g in grads[0].items()) < 1e-4 * scale


def test_hidden_states_and_logits_come_from_one_pass(parts, monkeypatch):
    """With --shard a second pass of its own crossed the other ranks', which hung."""
    passes, way = [], model_module.predicting_states
    monkeypatch.setattr(losses, "predicting_states",
                        lambda *a: (passes.append(torch.is_grad_enabled()), way(*a))[1])
    monkeypatch.setattr(model_module, "predicting_states", None)
    s = sft_session(parts, "--loss", "ba-lora-nlu")
    rows = packed([(s.prompt(0), [[5, 6, 7]])])
    losses.reply_losses(s, rows)
    # the base's states, and these
    assert passes == [False, True]


@pytest.mark.slow
def test_the_loss_s_hyper_parameter_reaches_it(parts):
    """gem at beta 1 is cross-entropy; ba-lora without its terms too; at the defaults they
    differ."""
    def grads(*flags):
        s = sft_session(parts, *flags)
        s.params = list(lora.adapter_state(s.model).values())
        return torch.cat([g.flatten()
                          for g in gradient(s, lambda tally: polylora.sft_step(s, 0))[0].values()])
    plain = grads("--loss", "ce")
    for name, value in (("gem", "1"), ("entropy", "0"), ("unlikelihood", "0"), ("ba-lora", "0"),
                        ("ba-lora-nlu", "0"), ("sed", "0")):
        assert gap(grads("--loss", name, "--loss-value", value),
                   plain) < 1e-5 * float(plain.abs().max())
        assert gap(grads("--loss", name), plain) > 1e-3 * float(plain.abs().max())


def test_ba_lora_s_teacher_is_the_base(parts):
    s = sft_session(parts, "--loss", "ba-lora")
    rows = packed([(s.prompt(i), [[5, 6, 7]]) for i in range(3)])
    hidden, completion = losses.base_states(s, rows)
    with lora.base(s.model):
        want, _ = model_module.token_logprobs(s.model, rows)
    logits = F.linear(hidden, s.model.head_weight())
    got = logits.log_softmax(-1).gather(1, rows.target[:, None])[:, 0]
    assert gap(got, want) < 1e-4 and not hidden.requires_grad and completion is rows.completion
    assert gap(got, model_module.token_logprobs(s.model, rows)[0]) > 1e-3


# ---- SFT losses ----------------------------------------------------------------------------------

def test_sed_pulls_to_a_half_where_the_model_is_unsure():
    """Over four tokens: two hold 0.97 of the first row's mass and 0.7 of the second's."""
    p = torch.tensor([[0.6, 0.37, 0.02, 0.01], [0.4, 0.3, 0.2, 0.1]]).double()
    z, y = p.log().requires_grad_(), torch.tensor([1, 0])
    ce = F.cross_entropy(z, y, reduction="none")
    assert gap(losses.sed_loss(z, y, top=2), ce + torch.tensor([0, 0.2 * 0.01])) < 1e-8
    assert gap(losses.sed_loss(z, y, 3.0, top=2, mass=0.99),
               ce + 3 * (torch.tensor([0.37, 0.4]) - 0.5) ** 2) < 1e-6
    # ten are more than there are
    assert torch.equal(losses.sed_loss(z, y), ce)
    z, y = tokens(6, 30, seed=8)
    z = (0.2 * z).detach().requires_grad_()                                    # flat: all unsure
    own = z.softmax(-1)[torch.arange(6), y]
    want = slope(F.cross_entropy(z, y, reduction="none") + 0.2 * (own - 0.5) ** 2, z)
    assert gap(slope(losses.sed_loss(z, y), z), want) < 1e-12
    top = torch.full((1, 30), 1e-9).double()
    # ten hold 0.96, nine 0.864
    top[0, :10], top[0, 10] = 0.096, 0.04
    loss = losses.sed_loss(top.log(), torch.tensor([0]))
    assert loss.item() == pytest.approx(-math.log(0.096), abs=1e-6)
    top[0, :10], top[0, 10] = 0.094, 0.06                                      # 0.94
    assert losses.sed_loss(top.log(), torch.tensor([0])).item() == pytest.approx(
        -math.log(0.094) + 0.2 * (0.094 - 0.5) ** 2, abs=1e-6)


def test_ba_lora_on_states_by_torch():
    """Covariance and singular values as torch has them, each reply by itself; one of one token
    has neither."""
    completion = torch.tensor([0] * 7 + [1, 1, 0, 1, 2])
    h = torch.randn(12, 5, dtype=torch.float64,
                    generator=torch.Generator().manual_seed(2)).float().requires_grad_()

    def plain(weight, leading):
        out = torch.zeros(12)
        for i in (0, 1):
            z = h[completion == i]
            c, s = torch.cov(z.T), torch.linalg.svdvals(z)
            off = (c ** 2).sum() - (c.diagonal() ** 2).sum()
            penalty = weight * 0.03 * (off / 5 - s[:leading].sum() / s.sum())
            out = torch.where(completion == i, penalty, out)
        # its one singular value is all
        return torch.where(completion == 2, -weight * 0.03, out)
    for weight, leading in ((1.0, 2), (2.0, 1)):
        got = losses.covariance_penalty(h, completion, weight, leading)
        want = plain(weight, leading)
        # Reply 0 has 8 tokens in 5 dimensions: 3 of its singular values are zero. Computed as roots
        # of eigenvalues, which are right to eps s_1^2 in fp32, they come out as up to
        # sqrt(eps) s_1, in the sum that the share is of.
        s = torch.linalg.svdvals(h[completion == 0].detach().double())
        share = s[:leading].sum() / s.sum()
        rounding = weight * 0.03 * share * 3 * math.sqrt(2 ** -23) * s[0] / s.sum()
        of_0 = completion == 0
        assert rounding < 2e-5 and gap(got[of_0], want[of_0]) < 1e-6 + rounding
        assert (gap(got[completion > 0], want[completion > 0]) < 1e-6
                and gap(slope(got[:11], h), slope(want[:11], h)) < 2e-4)
    assert torch.equal(losses.covariance_penalty(h, completion),
                       losses.covariance_penalty(h, completion, 1.0, 5))
    z, y = tokens(5, 9, seed=6)
    head, hidden = torch.randn(9, 4).double(), torch.randn(5, 4).double()
    teacher = F.linear(hidden, head)
    for heat in (2.0, 3.0):
        kl = heat ** 2 * F.kl_div((z / heat).log_softmax(-1), (teacher / heat).log_softmax(-1),
                                  log_target=True,
                                  reduction="none").sum(-1)
        got = losses.ba_lora_nlu_loss(z, y, hidden, None, head, 2.0, heat)
        assert gap(got, F.cross_entropy(z, y, reduction="none") + 2 * 0.15 * kl) < 1e-5
    assert torch.equal(losses.ba_lora_nlu_loss(z, y, hidden, None, head),
                       losses.ba_lora_nlu_loss(z, y, hidden, None, head, 1.0, 2.0))


def test_repeated_tokens_are_those_of_n_grams_seen_before():
    ids = [1, 2, 3, 4, 9, 1, 2, 3, 4, 5, 2, 3, 4, 5]
    flags = [0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1]
    assert losses.repeated_tokens(ids) == [bool(f) for f in flags]
    assert (losses.repeated_tokens([7, 7, 7], 2) == [False, True, True]
            and losses.repeated_tokens([1, 2]) == [0, 0])
    assert losses.repeated_tokens([1, 1, 2, 2, 1], 1) == [False, True, False, True, True]


def whole(s, prompt, completion):
    """log pi(draft) by a plain forward, with its gradient."""
    logits = s.model(torch.tensor([prompt + completion]))[0, len(prompt) - 1:-1]
    logp = (logits[:, :s.model.vocab] / s.args.temperature).log_softmax(-1)
    return logp[torch.arange(len(completion)), torch.tensor(completion)]


@pytest.mark.parametrize("budget", ["100000", "40"])
def test_unlikelihood_of_completions_by_hand(parts, budget):
    completions = [[9, 8, 7, 6, 9, 8, 7, 6, 5], [5, 6, 5, 6, 7]]
    s = sft_session(parts, "--loss", "unlikelihood-sequence", "--temperature", "0.8",
                    "--micro-tokens", budget)
    fixed_completions(s, lambda v: completions[:1 + v.index % 2])
    visits = [Visit(1, 0), Visit(2, 0)]
    got, tally = gradient(s, lambda t: losses.add_unlikely(s, visits, 0, t, 3.0))
    want, _ = gradient(s,
                       lambda t: (3.0 * sum(-(1 - whole(s, s.prompt(v.index),
                                                        completions[0])[4:8].exp()).log().sum()
                                            for v in visits) / (9 + 5 + 9)).backward())
    nearly(got, want)
    plain, _ = gradient(s, lambda t: losses.add_unlikely(s, visits, 0, t))
    # weight 1 where none is given
    nearly({name: 3 * g for name, g in plain.items()}, want)
    assert tally.sums["unlikely"][1] == 23
    rows = s.micro_batches([(s.prompt(v.index), completions[:1 + v.index % 2]) for v in visits])
    assert tally.sums["tokens"][0] == sum(r.tokens.numel() for r in rows) + 23


@pytest.mark.parametrize("budget", ["100000", "40"])
def test_bonbon_by_hand(parts, budget):
    """Three drafts of two posts: the best and the worst by the reward; a post whose drafts all
    earn alike adds nothing. n = 3: (n - 1) H_{n-1} = 2 (1 + 1/2) = 3; n = 8: 18.15, the
    constant of the paper's code."""
    completions = [[9, 8, 7], [6, 6], [5, 9, 9, 4]]
    s = sft_session(parts, "--loss", "bonbon", "--k", "3", "--micro-tokens", budget,
                    "--temperature", "0.9")
    fixed_completions(s, lambda v: completions)
    s.reward = lambda posts, texts, seeds: [[0.3, 0.9, 0.1], [0.5, 0.5, 0.5], [0.7, 0.1, 0.4]]
    visits, pairs = [Visit(1, 0), Visit(2, 0), Visit(3, 0)], {1: (completions[1], completions[2]),
                                                              3: (completions[0], completions[1])}
    got, tally = gradient(s, lambda t: losses.add_bonbon(s, visits, 0, t, 0.2))

    def plain(t):
        total = 0
        for i, (best, worst) in pairs.items():
            with torch.no_grad(), lora.base(s.model):
                first = whole(s, s.prompt(i), best).sum() - whole(s, s.prompt(i), worst).sum()
            a, b = whole(s, s.prompt(i), best).sum(), whole(s, s.prompt(i), worst).sum()
            total = total + (0.2 * -a + 0.8 * (a - b - first - 3.0) ** 2) / 2
        t.add("loss", total.detach() * 2, 2)
        total.backward()
    want, by_hand = gradient(s, plain)
    nearly(got, want, 1e-3)
    assert tally.sums["loss"] == pytest.approx(by_hand.sums["loss"], rel=1e-4)
    rows = s.micro_batches([(s.prompt(i), pair) for i, pair in pairs.items()])
    # twice forward, once the base
    assert tally.sums["tokens"][0] == 3 * sum(r.tokens.numel() for r in rows)
    zero = torch.zeros(1)
    assert losses.bonbon_loss(zero, zero, zero, zero, 8,
                              0.0).item() == pytest.approx((1 / (2 * 0.0275482094)) ** 2, rel=1e-6)
    assert losses.bonbon_loss(zero - 2, zero, zero, zero, 8, 1.0).item() == 2
    assert losses.bonbon_loss(zero - 2, zero, zero, zero,
                              3).item() == pytest.approx(0.005 * 2 + 0.995 * 25)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("budget", ["100000", "40"])
@pytest.mark.parametrize("members", [2, 3, 4])
def test_bonbon_teaches_every_member_of_an_ensemble_as_it_would_alone(parts, members, budget):
    """Best and worst were shared out over the members by their place: of four members two
    learnt, one from the best alone and one from the worst alone."""
    completions = [[9, 8, 7], [6, 6], [5, 9, 9, 4]]
    s = sft_session(parts, "--loss", "bonbon", "--k", "3", "--micro-tokens", budget)
    s.model = shake(lora.add_lora(copy.deepcopy(parts[2]), 3, 6, seed=2, kind="ensemble",
                                  members=members), 0.1)
    s.model.vocab = s.tokenizer.get_vocab_size()
    fixed_completions(s, lambda v: completions)
    s.reward = lambda posts, texts, seeds: [[0.3, 0.9, 0.1], [0.5, 0.5, 0.5], [0.7, 0.1, 0.4]]
    pairs = {1: (completions[1], completions[2]), 3: (completions[0], completions[1])}
    got, tally = gradient(s, lambda t: losses.add_bonbon(s, [Visit(1, 0), Visit(2, 0), Visit(3, 0)],
                                                         0, t, 0.2))

    def alone(t):
        for member in range(members):
            for i, (best, worst) in pairs.items():
                with torch.no_grad(), lora.base(s.model):
                    first = whole(s, s.prompt(i), best).sum() - whole(s, s.prompt(i), worst).sum()
                s.model.ensemble.of = member
                a, b = whole(s, s.prompt(i), best).sum(), whole(s, s.prompt(i), worst).sum()
                loss = 0.2 * -a + 0.8 * (a - b - first - 3.0) ** 2
                t.add("loss", loss.detach())
                (loss / (2 * members)).backward()
        s.model.ensemble.of = 0
    want, by_hand = gradient(s, alone)
    nearly(got, want, 1e-3)
    assert tally.sums["loss"] == pytest.approx(by_hand.sums["loss"], rel=1e-4)
    for name, slope in got.items():
        if name.endswith("lora_B.weight"):                                     # (out, members rank)
            assert (slope.unflatten(1, (members, -1)).abs().amax((0, 2)) > 0).all(), name


def test_bonbon_samples_from_the_base(parts):
    s = sft_session(parts, "--loss", "bonbon", "--k", "3")
    seen, write = [], s.sample_completions
    s.sample_completions = lambda *a: (seen.append((a, write(*a))), seen[-1][1])[1]
    losses.add_bonbon(s, [Visit(1, 0), Visit(2, 0)], 0, Tally())
    (args, (prompts, samples, _)), = seen
    rows = packed(list(zip(prompts, samples.tokens)))
    with torch.no_grad(), lora.base(s.model):
        logp = model_module.token_logprobs(s.model, rows, s.args.temperature)[0]
    said = torch.tensor([p for ds in samples.logprobs for d in ds for p in d])
    order = torch.argsort(rows.completion, stable=True)
    assert gap(logp[order], said) < 1e-4
    nothing = sft_session(parts, "--loss", "bonbon", "--k", "3")
    nothing.reward = lambda posts, texts, seeds: [[0.5] * len(ts) for ts in texts]
    polylora.sft_step(nothing, 0)
    assert all(p.grad is None or float(p.grad.abs().max()) == 0 for p in nothing.params)


@pytest.mark.parametrize("flags, word",
                         [("--loss bonbon --k 1", "--k 2"),
                          ("--loss bonbon --temperature 0", "sampled"),
                          ("--loss unlikelihood-sequence --temperature 0", "sampled")])
def test_empty_completions_are_refused(flags, word):
    args = polylora.parser().parse_args(["sft", "--model", "-", "--data", "-", "--out", "-",
                                         *flags.split()])
    with pytest.raises(InputError, match=word):
        checks.check_sft(args)


# ---- Objectives and losses -----------------------------------------------------------------------

def test_ba_lora_s_teacher_keeps_its_own_head_when_all_weights_train(world,
                                                                     monkeypatch):  # noqa: F811
    """Its logits were the base's states by the trained head: the term that should pull back was
    none."""
    model = trainer.load_model(world["model"], types.SimpleNamespace(dtype="float32"),
                               torch.device("cpu"))
    before = model.head_weight().detach().clone()
    lora.add_adapter(model, "full", 2, 4)
    with torch.no_grad():
        model.head_weight().add_(torch.randn_like(before))
    seen = {}
    monkeypatch.setattr(losses, "predicting_states", lambda model, rows: None)
    monkeypatch.setattr(losses, "token_losses",
                        lambda model, rows, function, **_: seen.update(function.keywords)
                        or torch.zeros(1))
    session = types.SimpleNamespace(args=types.SimpleNamespace(loss="ba-lora", loss_value=None),
                                    model=model)
    losses.reply_losses(session, types.SimpleNamespace(completion=None))
    assert torch.equal(seen["head"], before) and not seen["head"].requires_grad
    assert not torch.equal(model.head_weight(), before)
