"""How the commands wire together what other tests check part by part: the seeds that ranks get, what a session takes
from a tokenizer and a template, temperatures and references of several updates, numbers that a log must get right.

A function may be right and be called with the wrong thing: each of these places was broken on purpose, and all other
tests passed."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapters
import data
import evaluate
import generate
import grpo
import polylora
import trainer
from adapters import LINEARS
from generate import Fused
from model import token_logprobs
from polylora import Embedder
from test_grpo import rl, step_gradient
from test_polylora import Share, build, parts, session  # noqa: F401  (parts: a fixture)
from test_study import grpo_args, lines, sft_args, world  # noqa: F401  (world: a fixture)
from trainer import Session, Visit

TEMPLATE = ("{%- for m in messages %}{%- if loop.first and m.role != 'system' %}{{- '<|im_start|>system\nBe brief.<|im_end|>\n' }}"
            "{%- endif %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
            "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")


# ---- A session ----------------------------------------------------------------------------------------------

def test_a_session_knows_the_real_tokens_both_stops_and_the_model_s_own_chat(world, tmp_path):  # noqa: F811
    """M8, F2, G5, R16: padding rows could be sampled, one stop be forgotten, the policy be asked in another's format."""
    folder = tmp_path / "model"
    shutil.copytree(world["model"], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    args = grpo.parser().parse_args(["--start", "-", "--model", str(folder), "--data", world["grpo"], "--out", str(tmp_path / "o")])
    s = Session(args, "grpo")
    s.load()
    assert s.model.vocab == data.vocabulary(s.tokenizer) < s.model.config.vocab_size
    assert set(s.stops) == {s.tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")}
    asked = s.tokenizer.decode(s.prompt(0), skip_special_tokens=False)
    assert asked.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n") and "<think>" not in asked
    s.ranks.close()


def test_flags_left_out_are_what_the_card_says():
    """L2, L13, R9: no weight decay, no dropout, all seven linears, no KL."""
    sft_, rl_ = (p.parse_args([*flags, "--data", "-", "--out", "-"]) for p, flags in (
        (polylora.parser(), ["sft", "--model", "-"]), (grpo.parser(), ["--start", "-"])))
    assert (sft_.weight_decay, sft_.dropout, rl_.weight_decay, rl_.beta) == (0, 0, 0, 0)
    assert sft_.targets == ",".join(LINEARS) and len(LINEARS) == 7


def test_ranks_begin_at_one_adapter_and_drop_out_apart(world, monkeypatch, tmp_path):  # noqa: F811
    """G8, L10: with a rank in A's seed the ranks would train different adapters; without one in dropout's they would
    drop the same entries."""
    starts, drops = [], []
    add = polylora.add_adapter
    monkeypatch.setattr(polylora, "add_adapter", lambda *a, seed, **k: (starts.append(seed), add(*a, seed=seed, **k))[1])
    seed = torch.manual_seed
    for rank in (0, 1):
        seen = []
        monkeypatch.setattr(torch, "manual_seed", lambda x, seen=seen: (seen.append(x), seed(x))[1])
        ranks = trainer.Ranks.__init__
        monkeypatch.setattr(trainer.Ranks, "__init__", lambda self, *a, r=rank, of=ranks, **k: (of(self, *a, **k), vars(self).update(rank=r))[0])
        monkeypatch.setattr(trainer.Ranks, "main", True, raising=False)
        out = tmp_path / f"r{rank}"
        assert polylora.main(sft_args(world, "x", "--out", str(out), "--dropout", "0.1")) == 0
        monkeypatch.setattr(trainer.Ranks, "__init__", ranks)
        drops.append(seen)
    assert starts[0] == starts[1] and len(drops[0]) == len(drops[1]) >= 2
    assert not set(drops[0]) & set(drops[1])


# ---- The GRPO step ---------------------------------------------------------------------------------------------

def test_phase_two_starts_at_its_start_without_dropout(world, tmp_path):  # noqa: F811
    """L6, L7: a reference of zeros, the bare base, makes a KL at the first step; the start adapter's dropout makes what
    is scored another policy than what was sampled."""
    start = tmp_path / "start"
    shutil.copytree(Path(world["lora"]) / "adapter", start)
    tensors = load_file(start / "adapter_model.safetensors")
    torch.manual_seed(1)
    save_file({n: t + 0.2 * torch.randn_like(t) for n, t in tensors.items()}, start / "adapter_model.safetensors")
    config = data.read_json(start / "adapter_config.json")
    data.write_json(start / "adapter_config.json", config | {"lora_dropout": 0.5})
    assert grpo.main(grpo_args(world, "x", "--start", str(start), "--out", str(tmp_path / "run"), "--beta", "0.1")) == 0
    assert data.read_json(tmp_path / "run" / "adapter" / "adapter_config.json")["lora_dropout"] == 0
    first = lines(tmp_path / "run")[0]
    assert abs(first["kl"]) < 1e-6 and first["mismatch"] < 1e-4 and first["far_off"] == 0


def batches(s):
    tally = trainer.Tally()
    made, _ = grpo.rollout(s, 0, tally)
    return made, tally


def test_old_and_reference_are_scored_at_the_temperature_of_the_drafts(parts):  # noqa: F811
    """R2: at T = 1 beside drafts of T = .7 every ratio is wrong."""
    s = rl(parts, "--temperature", "0.7", "--updates", "2", "--beta", "0.3")
    for batch in batches(s)[0]:
        with torch.no_grad():
            old = token_logprobs(s.model, batch.rows, 0.7)[0]
            with adapters.adapter(s.model, s.start):
                reference = token_logprobs(s.model, batch.rows, 0.7)[0]
        assert torch.equal(batch.old, old) and torch.equal(batch.reference, reference)
        assert float((old - token_logprobs(s.model, batch.rows, 1.0)[0]).abs().max()) > 0.05


def test_old_is_the_training_path_s_and_the_log_says_how_far_sampling_s_was(parts):  # noqa: F811
    """R13: the sampler's log-probabilities must not stand in for those of training."""
    s = rl(parts, "--updates", "2")
    plain, _ = batches(s)
    write = s.sample_drafts

    def shifted(*a):
        prompts, samples, texts = write(*a)
        moved = [[[p + 1 for p in draft] for draft in some] for some in samples.logprobs]
        return prompts, generate.Samples(samples.tokens, moved, samples.finished), texts
    s.sample_drafts = shifted
    moved, tally = batches(s)
    assert all(torch.equal(a.old, b.old) for a, b in zip(plain, moved))
    means = tally.means(Share(), ["mismatch", "far_off"])
    assert means["mismatch"] == pytest.approx(1, abs=1e-4) and means["far_off"] == 1


def test_entropy_and_the_spread_of_rewards_in_the_log_are_those_of_the_step(parts):  # noqa: F811
    """R14: a name in the log with 0 for its value says as little as no name."""
    s = rl(parts, "--beta", "0")
    _, tally = step_gradient(s)
    entropies, off = [], []
    for batch in s.batches:
        logp, entropy = token_logprobs(s.model, batch.rows, 1.0)
        entropies += entropy.tolist()
        off += (logp - batch.sampled).abs().tolist()
    rewards = grpo.draw(s, tally.visits, 0).group.rewards
    means = tally.means(Share(), ["entropy", "mismatch", "reward_std", "reward"])
    assert means["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5) and means["entropy"] > 0.5
    assert means["mismatch"] == pytest.approx(sum(off) / len(off), rel=0.5, abs=1e-7) and means["mismatch"] > 0
    assert means["reward_std"] == pytest.approx(float(rewards.std(1, correction=0).mean()), rel=1e-5) and means["reward_std"] > 0.05
    assert means["reward"] == pytest.approx(float(rewards.mean()), rel=1e-5)


# ---- Drafts and embeddings -----------------------------------------------------------------------------------

def test_the_fast_engine_s_angles_are_right_far_out_in_bf16():
    """M4: positions in bf16 are whole numbers up to 256 alone."""
    model = build(dtype=torch.bfloat16)
    c, at = model.config, 4095
    angles = at * c.rope_theta ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    cos, sin = (table[at].flatten().double() for table in Fused(model, 4096).rope)
    half = c.head_dim // 2
    assert float((cos[:half] - angles.cos()).abs().max()) < 0.01 and float((sin[half:] - angles.sin()).abs().max()) < 0.01


def test_positions_count_from_zero_and_go_on_with_the_drafts(monkeypatch):
    """G1: an offset common to prompt and drafts changes nothing that the others compare, and everything for a model
    with other attention than full rotary."""
    model, seen = build(), []
    call = Fused.__call__
    monkeypatch.setattr(Fused, "__call__", lambda self, x, positions, attend: (seen.append(positions.clone()), call(self, x, positions, attend))[1])
    prompt = [3, 1, 4, 1, 5]
    generate.generate(model, [prompt], k=2, max_new_tokens=4, stop_ids=[], seed=1)
    first, *later = seen
    assert first.flatten().tolist() == [0, 1, 2, 3, 4]
    assert [set(p.flatten().tolist()) for p in later] == [{5 + i} for i in range(len(later))] and len(later) >= 3


def test_what_is_measured_is_the_ids_that_were_sampled(parts):  # noqa: F811
    """G10: a text encoded again may be other tokens than those that were drawn."""
    s = session(parts, grpo.parser(), ["--start", "-", "--k", "6", "--temperature", "1"], stage="measure")
    s.args.decoder, s.agreement, s.judge, s.selector = "sampling", None, None, None
    mine = [0, 1, 2, 3]
    _, samples, texts = s.sample_drafts([Visit(i, 0) for i in mine], 0, 6)
    records = evaluate.make_records(s, mine, samples, texts)
    again = [[data.encode_reply(s.tokenizer, t) for t in some] for some in texts]
    assert any(a != ids for some, drafts in zip(again, samples.tokens) for a, ids in zip(some, drafts))  # else no test
    for record, drafts, logprobs in zip(records, samples.tokens, samples.logprobs):
        assert record["tokens"] == list(map(len, drafts))
        assert record["logprobs"] == pytest.approx([math.fsum(p) for p in logprobs], abs=1e-3)


def test_an_embedding_model_reads_its_last_token_and_the_base_is_averaged_in_fp32(parts):  # noqa: F811
    """E4: Qwen3-Embedding pools the end token that is put behind each text, padded or alone; means of bf16 states
    are taken in fp32."""
    _, tokenizer, model = parts
    end, texts = tokenizer.token_to_id("<|endoftext|>"), ["the bus is late", "oh", ""]
    got = Embedder(model, tokenizer, pooling="last")([texts])[0]
    for vector, text in zip(got, texts):
        ids = torch.tensor([[*tokenizer.encode(text, add_special_tokens=False).ids, end]])
        want = torch.nn.functional.normalize(model.hidden(ids)[0, -1].float(), dim=0)
        assert torch.allclose(vector, want, atol=1e-5)
    low = copy.deepcopy(model).to(torch.bfloat16)
    long = "my bus is late again this morning and " * 12
    vector, = Embedder(low, tokenizer, corpus=["a b"]).vectors([long])
    ids = torch.tensor([tokenizer.encode(long, add_special_tokens=False).ids])
    exact = low.hidden(ids)[0].double().mean(0)
    assert vector.dtype == torch.float32 and float((vector.double() - exact).abs().max()) < 1e-5 * float(exact.abs().max())


def test_the_report_says_how_drafts_were_made_and_how_many_were_cut(world, tmp_path, capsys):  # noqa: F811
    """E2, E6: n, temperature, the longest draft, entropy and the share of drafts cut off."""
    measure = ["measure", "--model", world["model"], "--bare", str(tmp_path / "bare"), "--data", world["eval"], "--n", "10",
               "--max-new-tokens", "5"]
    assert evaluate.main(measure) == 0 and evaluate.main(["report", str(tmp_path / "bare"), "--out", str(tmp_path / "r")]) == 0
    text = (tmp_path / "r" / "report.txt").read_text()
    header = next(line.split() for line in text.splitlines() if line.startswith("arm ") and "truncated" in line)
    assert "entropy" in header and "n 10, temperature 1.0" in text and "max_new_tokens 5" in text
    known = json.loads((tmp_path / "r" / "report.json").read_text())["arms"]["base"]["metrics"]
    records = evaluate.read_object(tmp_path / "bare" / "evaluation.json")["records"]
    cut = [not whole for r in records for whole in r["finished"]]
    assert known["truncated"]["mean"] == pytest.approx(sum(cut) / len(cut)) and known["entropy"]["mean"] > 0
    capsys.readouterr()
    assert evaluate.main([*measure, "--temperature", "0"]) == 2 and "one draft" in capsys.readouterr().err
