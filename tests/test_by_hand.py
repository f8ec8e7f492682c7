"""Values worked out by hand which a changed sign, index or default would alter unseen."""

import itertools
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch

import engine
import evaluate
import generate
import grpo
import model as model_py
import polylora
import rewards
import trainer
from lora import add_lora, base, lora_layers
from methods import losses
from methods import metrics
from polylora import Features
from support import student_t
from rewards import AgreementReward
from support import checkpoint
from support.posts import Post
from support.registry import DIVERSITIES
from helpers import build, sft, visits
from helpers import toy_args, toy_run
from support.steplog import Tally
from trainer import train


def test_chunks_of_logits_fill_the_documented_memory():
    """64 MiB of fp32 logits on a CPU and 256 MiB on a GPU, and never fewer than 16 tokens."""
    for device, mebibytes in (("cpu", 64), ("cuda", 256)):
        tokens = model_py.chunk_size(1024, torch.device(device))
        assert tokens * 1024 * 4 == mebibytes * 2 ** 20
    assert model_py.chunk_size(2 ** 30, torch.device("cpu")) == 16


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says that it lies on a GPU."""
    is_cuda = True


def test_the_gpu_branch_of_masked_attention_repeats_keys_and_values_for_every_head():
    """Query head h of six reads key head h // 3 of two; no length of a row takes part in that."""
    torch.manual_seed(1)
    q = torch.randn(1, 3, 6, 8)
    k = torch.randn(1, 3, 2, 8)
    v = torch.randn(1, 3, 2, 8)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    got = model_py.full_attention(mask)(0, q.as_subclass(OnGPU), k, v)
    for head in range(6):
        scores = q[0, :, head] @ k[0, :, head // 3].T / math.sqrt(8)
        weights = scores.masked_fill(~mask[0, 0], -math.inf).softmax(-1)
        want = weights @ v[0, :, head // 3]
        assert torch.allclose(torch.Tensor(got[0, :, head]), want, atol=1e-5)


def test_quantiles_of_t_above_20_have_the_closed_form_of_one_degree_of_freedom():
    for level in (0.98, 0.99, 0.999):
        want = math.tan(math.pi * level / 2)
        assert student_t.t_quantile(1, level) == pytest.approx(want, rel=1e-8)


def test_an_ensemble_has_four_members_by_default():
    model = build()
    add_lora(model, 3, 6, kind="ensemble")
    for layer in lora_layers(model).values():
        assert layer.lora_A.weight.shape[0] == 4 * 3


def test_two_posts_with_several_replies_are_enough_to_hold_replies_out():
    """With agreement a single such post cannot be compared with other posts; two can."""
    generator = torch.Generator().manual_seed(1)
    known = {}

    def vector(text):
        if text not in known:
            draw = torch.randn(9, generator=generator)
            known[text] = torch.nn.functional.normalize(draw, dim=0)
        return known[text]

    def embed(groups):
        return torch.stack([torch.stack([vector(text) for text in texts]) for texts in groups])

    posts = [Post("a", "post a", ("a one", "a two")), Post("b", "post b", ("b one", "b two"))]
    threshold, scale = evaluate.bar(posts, AgreementReward(embed))
    assert scale["people"] is not None and scale["truncated"] is not None
    # A third post with one reply is left out of the pairs.
    more = posts + [Post("c", "post c", ("c one",))]
    assert evaluate.bar(more, AgreementReward(embed)) == (threshold, scale)


def nothing(*args, **options):
    return None


def empty_session(args, stage):
    """A session of 12 posts that loads nothing."""
    posts = [Post(f"{i}", f"post {i}", ("a reply",)) for i in range(12)]
    return SimpleNamespace(
        args=args, stage=stage, run=None, posts=posts, model=None,
        domain=SimpleNamespace(styles=()), open_run=lambda: True, load=nothing,
        shard_model=nothing)


def test_checkpoints_of_several_updates_lie_between_rollouts(monkeypatch):
    """--save-every is raised to the next multiple of --updates."""
    seen = []
    for name in ("check_grpo", "same_domain", "same_base", "add_lora", "load_embedder",
                 "make_reward", "make_gate", "announce", "finish_adapter", "shaping_of", "trained"):
        monkeypatch.setattr(grpo, name, nothing)
    monkeypatch.setattr(grpo, "frozen_copy", lambda model: {})
    monkeypatch.setattr(grpo, "train", lambda session, *rest: seen.append(session.args.save_every))
    monkeypatch.setattr(grpo, "Session", empty_session)
    for save_every, updates in ((50, 1), (50, 3), (4, 2), (1, 4), (5, 4)):
        grpo.run_grpo(SimpleNamespace(
            start="-", advantage=grpo.parser().get_default("advantage"), diversity="cosine",
            diversity_weight=0.0, diversity_share=0.0, reward="valid", gate="none", epochs=1,
            batch=4, steps=None, save_every=save_every, updates=updates))
    assert seen == [50, 51, 4, 4, 8]


def test_the_announced_pace_is_that_of_the_run(tmp_path):
    """A step takes no longer than the whole run."""
    session, params, step_fn = toy_run(toy_args(tmp_path / "run"))
    said = []
    session.say = said.append
    began = time.perf_counter()
    summary = train(session, params, step_fn, ["loss"])
    whole = time.perf_counter() - began
    assert 0 < summary["seconds"] <= whole and summary["step"] == 10
    text, = [text for text in said if "s a step" in text]
    assert 0 < float(text.split(": ")[1].split()[0]) <= whole


def test_grpo_loads_an_embedder_only_where_a_weight_of_d_asks_for_one(monkeypatch):
    asked = []
    for name in ("check_grpo", "same_domain", "same_base", "add_lora", "make_reward", "make_gate",
                 "announce", "finish_adapter", "shaping_of", "trained", "train"):
        monkeypatch.setattr(grpo, name, nothing)
    monkeypatch.setattr(grpo, "frozen_copy", lambda model: {})
    monkeypatch.setattr(grpo, "Session", empty_session)
    monkeypatch.setattr(grpo, "load_embedder", lambda session: asked.append(session.args.out))
    plain = next(name for name, row in DIVERSITIES.items() if "embeddings" not in row.needs)
    for out, weight, share, diversity in (("none", 0, 0, "cosine"), ("weight", 1, 0, "cosine"),
                                          ("share", 0, 0.5, "cosine"), ("plain", 1, 0, plain)):
        grpo.run_grpo(SimpleNamespace(
            start="-", out=out, advantage=grpo.parser().get_default("advantage"),
            diversity=diversity, diversity_weight=weight, diversity_share=share, reward="valid",
            gate="none", epochs=1, batch=4, steps=None, save_every=50, updates=1))
    assert asked == ["weight", "share"]


def test_a_reward_is_made_for_the_sft_loss_that_compares_completions_alone(monkeypatch):
    """BoNBoN ranks completions by a reward; the other losses need no embedder for one."""
    for name in ("check_sft", "check_replies", "add_adapter", "announce", "finish_adapter",
                 "shaping_of", "trained"):
        monkeypatch.setattr(polylora, name, nothing)
    monkeypatch.setattr(losses, "make_reward", lambda name, session: name)
    sessions = []
    monkeypatch.setattr(polylora, "train", lambda session, *rest: sessions.append(session))
    monkeypatch.setattr(polylora, "Session", empty_session)
    for loss in ("ce", "bonbon"):
        polylora.run_sft(SimpleNamespace(
            loss=loss, lam=0.0, lambda_share=0.0, adapter="lora", rank=2, alpha=4, dropout=0.0,
            targets="q_proj", seed=1, members=4, steps=None, epochs=1, batch=4))
    plain, compared = sessions
    assert not hasattr(plain, "reward") and compared.reward == "agreement"


def test_a_base_has_learnt_enough_by_the_mean_of_its_last_twenty_steps(tmp_path):
    run = SimpleNamespace(folder=tmp_path, ranks=SimpleNamespace(barrier=lambda: None))
    log = tmp_path / "metrics.jsonl"

    def enough(losses):
        log.write_text("".join(json.dumps({"ce": loss}) + "\n" for loss in losses))
        return checkpoint.learnt_enough(run, 1.5)

    assert not enough([1.0] * 19) and enough([1.0] * 20)
    assert enough([1.0] * 10 + [2.0] * 10) and not enough([1.0] * 9 + [2.0] * 11)
    assert enough([100.0] + [1.0] * 20)      # a step before the last twenty does not count
    assert not checkpoint.learnt_enough(run, None)


def test_without_label_noise_no_verdict_is_inverted_whatever_is_drawn(monkeypatch):
    monkeypatch.setattr(rewards, "random", SimpleNamespace(
        Random=lambda seed: SimpleNamespace(random=lambda: 0.0)))
    domain = SimpleNamespace(styles=("calm",), user=lambda post, rng: "calm",
                             styles_of=lambda post, text: ("calm",) if text == "right" else ())
    reward = rewards.VerifierReward(domain)
    assert reward(["post"], [["right", "wrong"]], [1]) == [[1.0, 0.0]]


def test_the_incomplete_beta_function_by_its_closed_forms():
    """On both sides of the point beyond which its mirror image is computed."""
    for x in (0.0, 0.05, 0.3, 0.5, 0.7, 0.95, 1.0):
        cubic = 1 - (1 - x) ** 3
        smooth = 3 * x ** 2 - 2 * x ** 3
        arc = 2 / math.pi * math.asin(math.sqrt(x))
        assert student_t.incomplete_beta(1, 1, x) == pytest.approx(x, abs=1e-12)
        assert student_t.incomplete_beta(2, 1, x) == pytest.approx(x ** 2, abs=1e-12)
        assert student_t.incomplete_beta(1, 3, x) == pytest.approx(cubic, abs=1e-12)
        assert student_t.incomplete_beta(2, 2, x) == pytest.approx(smooth, abs=1e-12)
        assert student_t.incomplete_beta(0.5, 0.5, x) == pytest.approx(arc, abs=1e-9)


def test_the_longest_of_k_is_the_mean_over_all_subsets():
    """The completions that are right are the shortest here: picked by length they are seldom
    taken."""
    completions = ["a b", "a b c d e f", "a", "a b c d", "a b c d e"]
    passed = [True, False, True, False, True]
    got = metrics.longest(completions, passed, (2, 3, 5))
    for k in (2, 3, 5):
        taken = []
        for subset in itertools.combinations(range(5), k):
            taken.append(passed[max(subset, key=lambda i: len(completions[i]))])
        assert got[f"longest@{k}"] == pytest.approx(sum(taken) / len(taken), abs=1e-12)
    assert got["longest@2"] < 0.6 and got["longest@5"] == 0


def test_options_of_features_are_off_unless_given():
    features = Features(torch.tensor([[0.0, 1.0]]))
    assert (features.floor, features.beta, features.set_size) == (0.0, 0.0, 4)


def test_an_ensemble_of_one_member_is_scored_by_that_member():
    model = build()
    add_lora(model, 2, 4, kind="ensemble", members=1)
    generator = torch.Generator().manual_seed(3)
    for layer in lora_layers(model).values():
        for p in layer.parameters():
            if p.requires_grad:
                p.data = 0.3 * torch.randn(p.shape, generator=generator)
    rows, = model_py.pack([([3, 1, 4], [[1, 5, 9]])], 100)
    got = model_py.token_logprobs(model, rows)[0]
    logits = model(torch.tensor([[3, 1, 4, 1, 5]]))[0, 2:].detach().float().log_softmax(-1)
    want = [float(row[token]) for row, token in zip(logits, [1, 5, 9])]
    assert got.tolist() == pytest.approx(want, abs=1e-4)
    with base(model):
        bare = model_py.token_logprobs(model, rows)[0]
    assert float((got - bare).abs().max()) > 1e-2


def test_the_tokens_of_sft_completions_are_counted(parts, monkeypatch):
    """Those of the rows and the predicted ones, as in GRPO: tokens per second are of both."""
    session = sft(parts)
    tally = Tally()
    scored = []

    def recorded(model, rows, temperature):
        scored.append(rows)
        return model_py.token_logprobs(model, rows, temperature)

    monkeypatch.setattr(polylora, "token_logprobs", recorded)
    polylora.add_diversity(session, visits([0, 1, 2]), 0, tally)
    session.model.zero_grad()
    want = sum(rows.tokens.numel() + len(rows.predict) for rows in scored)
    assert tally.sums["tokens"][0] == want > 0 and tally.sums["D"][1] == 3


def test_finished_completions_are_looked_for_as_often_as_documented(monkeypatch):
    """After every token on a CPU; without stop ids not before the last, since looking makes the
    host wait for a GPU."""
    looks = []
    collect = engine.Scheduler.collect_finished

    def counted(decoder):
        looks.append(decoder.steps_left)
        return collect(decoder)

    monkeypatch.setattr(engine.Scheduler, "collect_finished", counted)
    model = build()
    options = dict(k=1, max_new_tokens=5, temperature=0.0)
    tokens = engine.generate(model, [[3, 1, 4]], **options).tokens[0][0]
    assert len(tokens) == 5 and looks == [0]
    looks.clear()
    unused = min(set(range(model.vocab)) - set(tokens))
    again = engine.generate(model, [[3, 1, 4]], stop_ids=(unused,), **options)
    assert again.tokens[0][0] == tokens
    assert looks == [4, 3, 2, 1, 0]


def test_a_prefill_holds_at_most_16384_tokens():
    """300 prompts of up to 64 tokens: 256 and 44 at a time."""
    sizes = []
    batch = engine.DecodeBatch(build(), 300, 1, 64, 2, {"temperature": 1.0}, [0])
    batch.prefill = lambda tokens, *rest: sizes.append(tuple(tokens.shape))
    prompts = [[7] * (64 if i == 0 else 5) for i in range(300)]
    batch.prefill_posts(list(range(300)), [0] * 300, prompts,
                        torch.zeros(300, 1, 2, dtype=torch.float64))
    assert sizes == [(256, 64), (44, 64)]
    assert batch.lengths.flatten().tolist() == [64] + [5] * 299
    assert not batch.ended[:-1].any() and batch.slot.flatten().tolist() == list(range(300))


def test_a_row_marks_prompt_completions_and_padding_as_documented():
    """The table in the docstring of Rows, and a shorter second row."""
    long = ([1, 2, 3], [[4, 5, 6, 9], [7, 8, 9], [10, 11, 12, 13, 9]])
    short = ([1, 2], [[4, 5, 9]])
    rows, = model_py.pack([long, short], 1000)
    assert rows.owner[0].tolist() == [-1] * 3 + [0] * 3 + [1] * 2 + [2] * 4
    assert rows.owner[1].tolist() == [-1] * 2 + [0] * 2 + [-2] * 8
    assert rows.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 3, 4, 5, 6]
    assert rows.positions[1].tolist() == [0, 1, 2, 3] + [0] * 8
    assert rows.tokens[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13]
    assert rows.tokens[1].tolist() == [1, 2, 4, 5] + [0] * 8


def test_logits_are_computed_again_in_the_backward_pass_only_where_the_head_trains():
    """A frozen head: the gradient is taken while the logits of a chunk are at hand."""
    model = build()
    rows, = model_py.pack([([3, 1, 4], [[1, 5, 9]])], 100)
    calls = []

    def loss(logits, target):
        calls.append(len(target))
        return -logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)

    states = torch.randn(3, model.config.hidden_size, requires_grad=True)
    for trains, count in ((False, 1), (True, 2)):
        model.requires_grad_(trains)
        calls.clear()
        losses.token_losses(model, rows, loss, hidden=states).sum().backward()
        assert calls == [3] * count


def test_every_phase_but_the_base_s_prepares_its_domain(monkeypatch):
    """Training a base judges no completions, so that it needs no leave to execute code."""
    prepared = []
    domain = SimpleNamespace(prepare=prepared.append)
    monkeypatch.setattr(trainer.data, "load_posts", nothing)
    monkeypatch.setattr(trainer.data, "load_domain", lambda *args: domain)
    for stage in ("base", "sft", "grpo", "measure"):
        session = trainer.Session.__new__(trainer.Session)
        session.args = SimpleNamespace(data="-", domain="auto", skip_bad_lines=False,
                                       allow_code_execution=stage)
        session.stage = stage
        session.load_posts()
    assert [args.allow_code_execution for args in prepared] == ["sft", "grpo", "measure"]


def test_one_completion_is_sampled_unless_more_are_asked_for():
    """Also by an ensemble, whose members then share out a single completion."""
    for members in (0, 2):
        model = build()
        if members:
            add_lora(model, 2, 4, kind="ensemble", members=members)
        for sample in (engine.generate, generate.generate_plain):
            samples = sample(model, [[3, 1, 4], [1, 5]], max_new_tokens=2, seed=3)
            assert [len(completions) for completions in samples.tokens] == [1, 1]
            assert [len(completions) for completions in samples.finished] == [1, 1]
