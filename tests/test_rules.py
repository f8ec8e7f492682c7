"""Rules of a from-scratch implementation that no other test holds: each names what breaks without it."""

import inspect

import pytest
import torch

import data
import evaluate
import generate as engine
import grpo
import metrics
import polylora
from generate import DraftBatch, Reader, generate
from model import pack
from test_generate import PROMPTS, STOPS, build
from test_grpo import rl, step_gradient
from test_polylora import Share, lora_layers, parts, session, shake
from trainer import Visit


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_no_row_of_a_mask_is_empty():
    """Padding that may look at nothing gives NaN in some kernels, and zeros in others."""
    groups = [([1, 2, 3], [[4, 5], [6], [7, 8, 9, 10, 11]]), ([12], [[13, 14], [15]])]
    rows, = pack(groups, 1000)
    assert rows.owner.shape[0] == 2 and int((rows.tokens[1] == 0).sum()) > 2   # the second row is padded
    assert bool(rows.mask().any(-1).all())


def test_caches_hold_the_key_heads_alone():
    """Repeated for every query head, keys and values would take twice the memory here and four times on Qwen3-8B."""
    model = build()
    heads, shared = model.config.num_attention_heads, model.config.num_key_value_heads
    assert heads == 2 * shared
    batch = DraftBatch(model, 3, 4, 9, 6, {"temperature": 1.0}, [0])
    number = 2 * model.config.num_hidden_layers * shared * model.config.head_dim * 3 * (9 + 4 * 6)
    assert batch.prompt_cache.numel() + batch.own_cache.numel() == number
    with torch.no_grad():
        reader = Reader(model, PROMPTS[2], 5)
        reader.read(torch.arange(5))
    assert all(x.shape == (5, 10, shared, model.config.head_dim) for kv in reader.cache.values() for x in kv)


def test_tokens_are_drawn_in_fp32_whatever_the_weights_are(monkeypatch):
    """The log-softmax of bf16 logits is off by 0.02: more than a third of all ratios would be off by 2%."""
    seen, draw = set(), engine.sample
    monkeypatch.setattr(engine, "sample", lambda logits, *a, **more: (seen.add(logits.dtype), draw(logits, *a, **more))[1])
    model = build().to(torch.bfloat16)
    generate(model, PROMPTS[:2], k=2, max_new_tokens=3, stop_ids=STOPS)
    assert seen == {torch.float32}


def test_training_cannot_truncate_what_it_samples():
    """Drafts cut by top-p and scored in full have a mean ratio of 0.9: no phase knows the flags."""
    for p, flags in ((grpo.parser(), ["--start", "-"]), (polylora.parser(), ["sft", "--model", "-"])):
        args = p.parse_args([*flags, "--data", "-", "--out", "-"])
        assert engine.sampling_of(args) == {"temperature": 1.0}
        with pytest.raises(SystemExit):
            p.parse_args([*flags, "--data", "-", "--out", "-", "--top-p", "0.9"])


def test_what_a_step_s_log_must_say(parts):
    """A GRPO loss near zero says nothing: reward, its spread, entropy, clipping, dead groups, lengths and cut drafts do."""
    s = rl(parts)
    cut, write = [], s.sample_drafts

    def watched(*a):
        out = write(*a)
        cut.extend(not f for fs in out[1].finished for f in fs)
        return out
    s.sample_drafts = watched
    _, tally = step_gradient(s)
    wanted = {"reward", "reward_std", "entropy", "clipped", "zero_variance", "length", "truncated", "mismatch", "D"}
    assert wanted <= set(tally.sums) & set(grpo.LOGGED)
    assert tally.means(Share(), ["truncated"])["truncated"] == sum(cut) / 24 and 0 < sum(cut) < 25


def test_nothing_waits_for_other_ranks_while_drafts_are_written():
    """Ranks finish writing at different times; a collective in that loop hangs. Only spread weights need one."""
    assert not {"ranks", "dist", "Ranks"} & set(vars(engine))
    assert "all_reduce" not in inspect.getsource(engine) and "barrier" not in inspect.getsource(engine)


def test_modes_leave_the_weights_alone():
    """A merge at eval() and an unmerge at train() drift, and a checkpoint saved in between adds the update twice."""
    model = shake(polylora.add_lora(build().to(torch.bfloat16), 4, 8))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for _ in range(20):
        model.train()
        model.eval()
    assert lora_layers(model) and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_stops_are_the_turn_s_end_and_the_text_s_end(parts):
    """A chat ends by <|im_end|>, a base by <|endoftext|>: with one of them the other writes on to the limit."""
    tokenizer = parts[1]
    assert set(data.stop_ids(tokenizer)) == {tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")}
    think = tokenizer.token_to_id("<think>")
    assert data.decode(tokenizer, [think, *data.encode_reply(tokenizer, "yes")]) == "<think>yes"  # no special token


def test_training_and_measuring_ask_one_verifier(parts):
    """With rules of its own for the evaluation, a study measures something else than it trains."""
    s = session(parts, grpo.parser(), ["--start", "-", "--reward", "valid", "--k", "4"], stage="grpo")
    s.reward = grpo.make_reward("valid", s)
    strange = lambda post, text: tuple(s.domain.voices[len(text) % 3 - 1:len(text) % 3])
    s.domain.voices_of = strange
    s.args.decoder, s.agreement, s.judge, s.selector = "sampling", None, None, None
    visits = [Visit(i, 0) for i in range(3)]
    drawn = grpo.draw(s, visits, 0)
    records = evaluate.make_records(s, [0, 1, 2], drawn.samples, drawn.texts)
    assert [[float(bool(v)) for v in r["voices"]] for r in records] == drawn.group.rewards.tolist()
    assert 0 < float(drawn.group.rewards.mean()) < 1
    found = [metrics.separation(*apart(s, r)) for r in records]
    assert any(found) and [r.get("separation") for r in records] == pytest.approx(found, abs=1e-6)


def apart(s, record):
    """The cosine distances of a record's right drafts, each wording once, and their voices."""
    right = {text: tuple(voices) for text, voices in zip(record["drafts"], record["voices"]) if voices}
    vectors = s.embedder([list(right)])[0].double()
    return (1 - vectors @ vectors.T).float().numpy(), list(right.values())


def test_ranks_measure_every_post_once_and_in_order(monkeypatch, tmp_path, parts):
    """Each rank its share, gathered: not the first rank alone, and nothing twice."""
    s = session(parts, grpo.parser(), ["--start", "-"], stage="measure")
    s.args.n, s.args.decoder, s.helper = 2, "sampling", None
    dealt = []

    class Both(Share):
        def gather(self, items):
            other = [{"id": s.posts[i].id} for i in range(len(s.posts))[1::2]]
            dealt.append(len(items))
            return [x for pair in zip(items, other) for x in pair]
    s.ranks = Both(0, 2)
    monkeypatch.setattr(evaluate, "make_records", lambda session, mine, *a: [{"id": s.posts[i].id} for i in mine])
    run = tmp_path / "run"
    run.mkdir()
    evaluate.measure_run(s, run, {}, None, None)
    records = evaluate.read_object(run / "evaluation.json")["records"]
    assert dealt == [6] and [r["id"] for r in records] == [p.id for p in s.posts]
