"""Tests of evaluate.py."""

import dataclasses
import json
import math
import random
import shutil
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import grpo
import polylora
import rewards
from helpers import (
    SHORT, Share, adapter_of, grpo_args, lines, measured, places, qwen_tokenizer, record,
    refusal, session, sft_args, train_heads, write_model,
)
from lora import drop_lora
from methods.likelihoods import completion_scores
from metrics import post_metrics, vendi_score
from model import Qwen3
from support import checkpoint
from support import files
from support.files import InputError
from support import pass_bar
from support import posts as support_posts
from support.posts import Post
from trainer import Visit


def test_many_completions_are_measured_quickly():
    """1,000 drafts of 12 words, 20 posts of 50: a tenth of what must take less than a minute."""
    rng, vocabulary = random.Random(0), [f"word{i}" for i in range(300)]
    texts = [[" ".join(rng.choices(vocabulary, k=12)) for _ in range(50)] for _ in range(20)]
    vectors = np.random.default_rng(0).normal(size=(20, 50, 64))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    began = time.process_time()
    for completions, rows in zip(texts, vectors):
        post_metrics(record([["warm"]] * 50, n=50, drafts=completions, vendi=vendi_score(rows)))
    assert time.process_time() - began < 6


def likeness_of_words(seed):
    """A reward: how near a text is to the nearest of a post's replies, drawn once for each pair
    of texts, and larger where both begin with the same word."""
    rng, known = random.Random(seed), {}

    def one(text, reply):
        return known.setdefault((text, reply), rng.random() + (text.split()[0] == reply.split()[0]))

    def reward(posts, completions, seeds):
        return [[max(one(text, reply) for reply in post.replies) for text in texts]
                for post, texts in zip(posts, completions)]
    return reward


def value(reward, post, text, replies=None):
    """What one text earns as a draft to a post, perhaps to the post with other replies; as it is
    kept, in fp32."""
    post = dataclasses.replace(post, replies=tuple(replies or post.replies))
    return float(np.float32(reward([post], [[text]], [0])[0][0]))


def bar_of(posts, reward):
    """(threshold, scale) of completions of these posts."""
    return evaluate.passing(SimpleNamespace(posts=posts, args=SimpleNamespace(reward="auto")),
                            reward)


def test_the_bar_is_above_19_of_20_replies_to_another_post():
    """The bar is the 95% quantile over all pairs of a post and a reply to another one, each
    compared with all replies of the post: of one random pairing of first replies it moved by
    .04 and more with the pairing."""
    posts = [Post(f"{i}", f"post {i}", (f"{i} first", f"{i} second", f"{i} third"))
             for i in range(20)]
    reward = likeness_of_words(3)
    threshold, scale = bar_of(posts, reward)
    pairs = sorted(value(reward, post, text) for post in posts for other in posts
                   if other is not post
                   for text in other.replies)
    assert scale["pairs"] == len(pairs) == 20 * 19 * 3
    assert threshold == scale["threshold"] == pairs[math.ceil(0.95 * (len(pairs) - 1))]
    assert scale["interval"][0] <= threshold <= scale["interval"][1] != scale["interval"][0]


def test_a_completion_at_the_bar_does_not_pass(parts):
    """The bar is a reply's own reward: the replies that set it are not above it, nor is a draft
    that says the same."""
    s = session(parts, grpo.parser(), ["--start", "-", "--k", "4", "--temperature", "1"],
                stage="measure")
    s.args.decoder, s.agreement, s.judge, s.selector = "sampling", None, None, None
    s.domain, s.threshold = data.Replies(s.posts), 0.5
    s.reward = lambda posts, completions, seeds: [[0.25, 0.5, np.nextafter(0.5, 1), 1.0]
                                                  for _ in posts]
    _, samples, texts = s.sample_completions([Visit(i, 0) for i in (0, 1)], 0, 4)
    for one in evaluate.make_records(s, [0, 1], samples, texts):
        assert one["passed"] == [False, False, True, True] and one["rewards"][1] == 0.5


def test_the_base_s_likelihood_is_the_base_s(parts):
    s = session(parts, grpo.parser(), ["--start", "-", "--k", "3", "--temperature", "1"],
                stage="measure")
    s.args.decoder, s.agreement, s.judge, s.selector = "sampling", None, None, None
    visits = [Visit(i, 0) for i in (0, 4)]
    prompts, samples, texts = s.sample_completions(visits, 0, 3)
    records = evaluate.make_records(s, [0, 4], samples, texts)
    own, _ = completion_scores(s, list(zip(prompts, samples.tokens)))
    drop_lora(s.model)
    bare, _ = completion_scores(s, list(zip(prompts, samples.tokens)))
    for one, policy, base in zip(records, own, bare):
        assert (one["logprobs"] == pytest.approx(policy, abs=1e-3) and one["base_logprobs"]
                == pytest.approx(base, abs=1e-3))
        assert max(abs(a - b) for a, b in zip(policy, base)) > 0.1


def test_every_reply_is_held_out_once():
    """The first replies alone said that people pass 71% of the time where all five places
    together say 52%."""
    posts = [Post(f"{i}", f"post {i}", (f"{i} first", f"{i} second of it", f"x{i} third"))
             for i in range(30)]
    reward = likeness_of_words(4)
    threshold, scale = bar_of(posts, reward)
    held, cut = [], []
    for post in posts:
        for text in post.replies:
            rest = [reply for reply in post.replies if reply != text]
            held.append(value(reward, post, text, rest) > threshold)
            cut.append(value(reward, post, " ".join(text.split()[:(len(text.split()) + 1) // 2]),
                             rest) > threshold)
    assert scale["people"] == sum(held) / 90 and scale["truncated"] == sum(cut) / 90
    # the first replies alone say otherwise
    assert 0.5 < scale["people"] < 0.8 and sum(held[::3]) / 30 > 0.9


def test_a_shuffled_reply_is_judged_by_a_bar_that_it_did_not_set():
    posts = [Post(f"{i}", f"post {i}", (f"{i} first", f"{i} second")) for i in range(12)]
    reward = likeness_of_words(5)
    scale = bar_of(posts, reward)[1]
    halves = [[value(reward, post, text) for post in posts[half::2] for other in posts[half::2]
               if other is not post
               for text in other.replies] for half in (0, 1)]
    bars = [np.quantile(half, 0.95, method="higher") for half in halves]
    assert scale["shuffled"] == pytest.approx(((np.array(halves[0]) > bars[1]).mean()
                                               + (np.array(halves[1]) > bars[0]).mean()) / 2)
    assert scale["shuffled"] != (np.array(halves[0]) > bars[0]).mean()
    # too few for a half without the other
    session.posts = posts[:3]
    assert evaluate.passing(session, reward)[1]["shuffled"] is None
    session.posts = posts[:1]
    with pytest.raises(InputError, match="one post with replies"):
        evaluate.passing(session, reward)


def test_shuffled_replies_come_from_another_intent():
    """Posts of one scene share their replies: drawn from there, a reply to another post passes,
    and the bar rises."""
    posts = [Post(f"{i}", f"post {i}", (f"first of {i % 3}", f"second of {i % 3}"),
                  intent=str(i % 3)) for i in range(12)]
    seen = []

    def reward(posts, completions, seeds):
        seen.extend((post.intent, text.split()[-1]) for post, texts in zip(posts, completions)
                    for text in texts)
        return [[1.0 for _ in texts] for texts in completions]
    assert bar_of(posts, reward)[1]["pairs"] == 12 * 8 * 2
    assert (all(a != b for a, b in seen[:192]) and all(b in (a, "of") for a, b in seen[192:])
            and len(seen) == 192 + 48)
    # one scene: another post's, as it may be
    session.posts = [dataclasses.replace(post, intent="0") for post in posts]
    assert evaluate.passing(session, reward)[1]["pairs"] == 12 * 11 * 2
    session.posts = [dataclasses.replace(post, intent="" if i % 2 else "even")
                     for i, post in enumerate(posts)]
    assert evaluate.passing(session, reward)[1]["pairs"] == 6 * 6 * 2 + 6 * 11 * 2


def test_of_too_many_pairs_every_post_meets_as_many(monkeypatch):
    posts = [Post(f"{i}", f"post {i}", (f"{i} first", f"{i} second"), intent=str(i % 4))
             for i in range(12)]
    met = []

    def reward(posts, completions, seeds):
        met.append((posts[0].id, tuple(completions[0])))
        return [[1.0 for _ in texts] for texts in completions]
    monkeypatch.setattr(pass_bar, "MOST_ASKED", 60)
    values, first, second = pass_bar.stranger_pairs(posts, reward)
    assert len(values) == 60 and (np.bincount(first) == 15).all() and (first != second).all()
    for name, texts in met:
        assert (len(set(texts)) == 5
                and all(int(text.split()[0]) % 4 != int(name) % 4 for text in texts))
    # not the same five for all
    assert len({texts for _, texts in met}) == 12


def test_the_error_of_a_share_of_pairs_is_the_jackknife_s():
    rng = np.random.default_rng(1)
    # pairs within a cluster, too
    first, second = rng.integers(0, 7, 200), rng.integers(0, 7, 200)
    values = rng.random(200)
    means = [values[(first != c) & (second != c)].mean() for c in range(7)]
    want = math.sqrt(6 / 7 * sum((m - np.mean(means)) ** 2 for m in means))
    assert pass_bar.share_error(values, first, second) == pytest.approx(want, rel=1e-12)
    # a number that no cluster has
    keep = (first != 3) & (second != 3)
    means.pop(3)
    without = [values[keep & (first != c) & (second != c)].mean() for c in range(7) if c != 3]
    want = math.sqrt(5 / 6 * sum((m - np.mean(without)) ** 2 for m in without))
    assert pass_bar.share_error(values[keep], first[keep],
                                second[keep]) == pytest.approx(want, rel=1e-12)
    assert pass_bar.share_error(np.ones(4), np.array([0, 1, 0, 1]), np.array([1, 0, 1, 0])) is None


def test_the_interval_of_the_bar_holds_the_true_quantile():
    """Of 300 draws of 30 posts whose replies differ in how near they are to any post: a nominal
    95%."""
    rng, covered = np.random.default_rng(2), 0
    first, second = (~np.eye(30, dtype=bool)).nonzero()
    for _ in range(300):
        values = 0.6 * rng.standard_normal(30)[first] + 0.6 * rng.standard_normal(30)[second]
        # together of variance 1
        values += math.sqrt(1 - 2 * 0.36) * rng.standard_normal(len(first))
        q, (low, high) = pass_bar.pair_quantile(values, first, second)
        assert low <= q <= high and q in values
        covered += low <= 1.6448536 <= high
    assert 0.9 <= covered / 300 <= 0.99, covered
    assert pass_bar.pair_quantile(np.arange(3.0), np.array([0, 0, 1]),
                                  np.array([1, 1, 0])) == (2.0, None)


def test_a_reply_compared_with_itself_does_not_measure_people():
    """With one reply a post agreement finds it in itself: 100% of people would pass, and nothing
    would be said by it."""
    posts = [Post(f"{i}", f"post {i}", (f"{i} only",)) for i in range(12)]
    session = SimpleNamespace(posts=posts, args=SimpleNamespace(reward="agreement"))
    draw = torch.Generator().manual_seed(1)
    known = {}
    vector = lambda text: known.setdefault(text,
                                           torch.nn.functional.normalize(
                                               torch.randn(9, generator=draw), dim=0))
    embed = lambda groups: torch.stack([torch.stack([vector(t) for t in texts])
                                        for texts in groups])
    threshold, scale = evaluate.passing(session, rewards.AgreementReward(embed))
    assert scale["people"] is None and scale["truncated"] is None and 0 <= scale["shuffled"] < 0.5
    relevance = lambda posts, completions, seeds: [[float(p.id == t.split()[0]) for t in ts]
                                                   for p, ts in zip(posts, completions)]
    # compared with the post, which is another text
    assert evaluate.passing(session, relevance)[1]["people"] == 1


QWEN_TOKENIZER = qwen_tokenizer()


def chain(world, root, capsys):
    assert polylora.main(sft_args(world, "poly", "--lambda", "0.3", "--gate", "likelihood")) == 0
    assert grpo.main(grpo_args(world, "ours", "--start", str(root / "poly"),
                               "--diversity-weight", "1", "--gate", "likelihood",
                               "--beta", "0.04", "--updates", "2")) == 0
    assert evaluate.main(["measure", str(root / "poly"), str(root / "ours"),
                          "--base-out", str(root / "bare"), "--data", world["eval"],
                          "--n", "10", "--max-new-tokens", "5"]) == 0
    runs = [str(root / r) for r in ("bare", "poly", "ours")]
    assert evaluate.main(["report", *runs, "--out", str(root / "report"), "--against", "poly"]) == 0
    capsys.readouterr()
    assert evaluate.main(["drafts", str(root / "ours"), "My kettle sings", "--k", "3",
                          "--max-new-tokens", "5"]) == 0
    shown = capsys.readouterr().out.strip().splitlines()
    assert shown[0].startswith("1. ") and 1 <= sum(x[:2] in ("1.", "2.", "3.") for x in shown) <= 3


def test_the_chain_from_tweets_to_report(world, capsys):
    """SFT with D, GRPO with KL, diversity and two updates a rollout, measuring, report, drafts: on
    real-layout posts."""
    root = world["root"]
    chain(world, root, capsys)
    report = json.loads((root / "report" / "report.json").read_text())
    assert set(report["arms"]) == {"base", "poly", "ours"}
    for picture in ("pass_at_k.svg", "quality_diversity.svg"):
        ElementTree.parse(root / "report" / picture)
    for run in ("poly", "ours"):
        *steps, end = [x for x in lines(root / run) if x.get("stage") != "measure"]
        assert [x["step"] for x in steps] == [1, 2] and end["event"] == "end"
        assert end["peak_bytes"] > 1e6 and end["tokens_per_second"] > 0
        assert all(x["D"] > 0 for x in steps if "D" in x) and "D" in steps[0]
    assert "kl" in lines(root / "ours")[0]
    moved = [torch.equal(a, b)
             for a, b in zip(*(list(adapter_of(root / r).values()) for r in ("poly", "ours")))]
    assert not all(moved)


@pytest.mark.skipif(not QWEN_TOKENIZER.exists(),
                    reason="Qwen3's tokenizer.json is neither beside the repository nor installed")
def test_the_chain_with_qwen3s_own_tokenizer(world, tmp_path, capsys):
    """151,669 tokens and their padding rows through every stage."""
    other = world | {"model": str(write_model(tmp_path / "model",
                                              data.load_tokenizer(QWEN_TOKENIZER)))}
    for name in ("sft", "grpo", "eval"):
        (tmp_path / f"{name}.jsonl").write_text(Path(world[name]).read_text())
        other[name] = str(tmp_path / f"{name}.jsonl")
    chain(other, tmp_path, capsys)


@pytest.mark.slow
def test_an_evaluation_is_redone_when_its_inputs_change(world, tmp_path, monkeypatch):
    """Another file of equal length, another adapter, dtype, 4 bits, seed or model returned 0
    with the old records; and another seed's config.json came to stand over old drafts."""
    run, bare = tmp_path / "run", tmp_path / "bare"
    shutil.copytree(world["lora"], run)
    adapter = run / "adapter" / "adapter_model.safetensors"

    def measured(*more, data_file=world["eval"]):
        args = ["measure", str(run), "--base-out", str(bare), "--data", data_file, "--n", "10",
                "--max-new-tokens", "3", *more]
        assert evaluate.main(args) == 0
        return [json.loads((f / "evaluation.json").read_text()) for f in (run, bare)]
    first = measured()
    before = (run / "evaluation.json").stat().st_mtime_ns
    assert measured() == first and (run / "evaluation.json").stat().st_mtime_ns == before
    posts = data.load_posts(world["eval"])
    changed = tmp_path / "eval.jsonl"
    support_posts.save_posts([support_posts.Post(p.id, p.post + " now", p.replies) for p in posts],
                             changed)
    texts = measured(data_file=str(changed))
    assert [r["post"] for r in texts[0]["records"]] != [r["post"] for r in first[0]["records"]]
    assert measured("--dtype", "bfloat16")[0]["settings"]["dtype"] == "torch.bfloat16"
    bits = measured("--nf4")[1]
    assert bits["settings"]["nf4"] and not first[1]["settings"]["nf4"]
    assert [r["drafts"] for r in bits["records"]] != [r["drafts"] for r in first[1]["records"]]
    other = measured("--seed", "5")[1]
    assert json.loads((bare / "config.json").read_text())["seed"] == other["settings"]["seed"] == 5
    assert [r["drafts"] for r in other["records"]] != [r["drafts"] for r in first[1]["records"]]
    tensors = adapter_of(run)
    shutil.copy(adapter, tmp_path / "kept")
    from safetensors.torch import save_file
    save_file({n: t + 1.0 for n, t in tensors.items()}, adapter, metadata={"format": "pt"})
    again = measured()[0]
    assert again["settings"]["adapter"] != first[0]["settings"]["adapter"]
    assert [r["drafts"] for r in again["records"]] != [r["drafts"] for r in first[0]["records"]]
    model = tmp_path / "model"
    shutil.copytree(world["model"], model)
    weights = Qwen3.from_pretrained(model)
    weights.model.norm.weight.data.mul_(0.5)
    weights.save_pretrained(model)
    config = json.loads((run / "config.json").read_text())
    # of older days
    (run / "config.json").write_text(json.dumps({k: v for k, v in config.items()
                                                 if k != "model_hash"}))
    assert measured("--model", str(model))[1]["settings"]["model"] != first[1]["settings"]["model"]
    monkeypatch.setattr(checkpoint, "fetch",
                        lambda name, revision: Path(world["model"] if revision else model))
    assert checkpoint.model_hash("a/b", None) != checkpoint.model_hash("a/b", "abc123")


def test_each_run_is_measured_with_its_own_seed(world, tmp_path, monkeypatch):
    """Drafts of all runs from --seed would tie the seeds together, which count as drawn apart."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, seed in ((first, 3), (second, 8)):
        shutil.copytree(world["lora"], folder)
        config = files.read_json(folder / "config.json")
        files.write_json(folder / "config.json", config | {"seed": seed})
    seen, measure_run = [], evaluate.measure_run
    monkeypatch.setattr(evaluate, "measure_run",
                        lambda s, to, *rest: (seen.append((to.name, s.args.seed)),
                                              measure_run(s, to, *rest)))
    flags = ["--data", world["eval"], "--n", "10", "--max-new-tokens", "3", "--seed", "5"]
    assert evaluate.main(["measure", str(first), str(second), "--base-out", str(tmp_path / "bare"),
                          *flags]) == 0
    assert seen == [("bare", 5), ("first", 3), ("second", 8)]
    kept = {name: files.read_json(tmp_path / name / "evaluation.json")
            for name in ("bare", "first", "second")}
    assert {name: value["settings"]["seed"] for name, value in kept.items()} == dict(seen)
    completions = [[r["drafts"] for r in kept[name]["records"]] for name in ("first", "second")]
    # one adapter, two seeds
    assert completions[0] != completions[1]


@pytest.mark.slow
def test_scores_do_not_depend_on_the_chunk_of_posts(world, tmp_path, monkeypatch):
    """In rounds of at most SOME posts, so that memory does not grow with the posts: the same
    records, but for rounding."""
    args = ["--data", world["eval"], "--model", world["model"], "--n", "10",
            "--max-new-tokens", "5"]
    made, some_records, sizes = [], evaluate.some_records, []
    monkeypatch.setattr(evaluate, "some_records", lambda s, mine, *rest: sizes.append(len(mine))
                        or some_records(s, mine, *rest))
    for some in (32, 2, 4):
        monkeypatch.setattr(evaluate, "SOME", some)
        assert evaluate.main(["measure", "--base-out", str(tmp_path / str(some)), *args]) == 0
        made.append(json.loads((tmp_path / str(some) / "evaluation.json").read_text())["records"])
    assert [r["id"] for r in made[0]] == [r["id"] for r in made[1]] == [r["id"] for r in made[2]]
    assert len(made[0]) == 6 and sizes == [6, 2, 2, 2, 3, 3]
    for a, b in [*zip(made[0], made[1]), *zip(made[0], made[2])]:
        assert (a["drafts"] == b["drafts"]
                and a["semantic"] == pytest.approx(b["semantic"], abs=1e-5))
        assert a["rewards"] == pytest.approx(b["rewards"], abs=1e-5)
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-3)


def test_an_adapter_trained_elsewhere_can_be_measured(world, tmp_path, capsys):
    """A folder that holds nothing but PEFT's files: its base is the one they name, its seed
    --seed."""
    shutil.copytree(Path(world["lora"]) / "adapter", tmp_path / "theirs" / "adapter")
    few = ["--data", world["eval"], "--n", "10", "--max-new-tokens", "5", "--seed", "3"]
    assert evaluate.main(["measure", str(tmp_path / "theirs"), *few]) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (config["arm"], config["seed"], config["model"]) == ("theirs", 3, world["model"])
    assert (evaluate.main(["measure", str(tmp_path / "theirs"), *few]) == 0
            and "0 of 1 runs" in capsys.readouterr().out)
    assert evaluate.main(["report", str(tmp_path / "theirs"),
                          "--out", str(tmp_path / "report")]) == 0
    assert evaluate.main(["drafts", str(tmp_path / "theirs"), "My kettle broke", "--k", "2",
                          "--max-new-tokens", "5"]) == 0
    assert (evaluate.main(["measure", str(tmp_path), *few]) == 2
            and "PEFT's layout" in capsys.readouterr().err)


# ---- Drafts chosen by a reward -------------------------------------------------------------------

def test_best_of_n_needs_a_reward_that_separates_completions(root, capsys):
    """The base's states were centred on the post itself: cosines of rounding noise chose the
    draft; and a reward model, the way that the prompt's picks lead to, ended in a traceback."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    best = ["drafts", w["lora"], "hello", "--decoder", "best-of-n", "--k", "2", "--pool", "2",
            *SHORT]
    assert "embedding model" in refusal(capsys, evaluate.main, *best)
    said = refusal(capsys, evaluate.main, *best, "--best-by", "agreement")
    assert "no reply that a completion could agree with" in said
    assert evaluate.main([*best, "--best-by", "model",
                          "--reward-model", train_heads(w, 1, members="2")]) == 0
    assert "at least 1" in refusal(capsys, evaluate.main, "drafts", w["lora"], "hello", "--k", "0")


# ---- Files that stand in the way -----------------------------------------------------------------

@pytest.mark.slow
def test_the_bare_base_is_measured_into_no_run_and_no_model(root, capsys):
    """--base-out wrote its config.json over a checkpoint's, and over a run's."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    for folder in (w["lora"], w["model"]):
        before = (Path(folder) / "config.json").read_bytes()
        assert "--base-out" in refusal(capsys, evaluate.main, "measure", "--model", w["model"],
                                   "--base-out", folder, "--data",
                                   w["eval"], "--n", "10", *SHORT)
        assert (Path(folder) / "config.json").read_bytes() == before
    bare = ["--base-out", root / "bare", "--model", w["model"], "--data", w["eval"]]
    assert measured(capsys, *bare, "--name", "hot") == measured(capsys, *bare) == "1 of 1 runs"
    # again, into what it wrote itself
    assert measured(capsys, *bare, "--temperature", "0.9") == "1 of 1 runs"


# ---- Drafts and embeddings -----------------------------------------------------------------------

def test_evaluation_scores_the_sampled_ids(parts):  # noqa: F811
    """G10: a text encoded again may be other tokens than those that were drawn."""
    s = session(parts, grpo.parser(), ["--start", "-", "--k", "6", "--temperature", "1"],
                stage="measure")
    s.args.decoder, s.agreement, s.judge, s.selector = "sampling", None, None, None
    mine = [0, 1, 2, 3]
    _, samples, texts = s.sample_completions([Visit(i, 0) for i in mine], 0, 6)
    records = evaluate.make_records(s, mine, samples, texts)
    again = [[data.encode_reply(s.tokenizer, t) for t in some] for some in texts]
    # else no test
    assert any(a != ids for some, completions in zip(again, samples.tokens)
               for a, ids in zip(some, completions))
    for record, completions, logprobs in zip(records, samples.tokens, samples.logprobs):
        assert record["tokens"] == list(map(len, completions))
        assert record["logprobs"] == pytest.approx([math.fsum(p) for p in logprobs], abs=1e-3)


def test_ranks_measure_every_post_once_and_in_order(monkeypatch, tmp_path, parts):
    """Each rank its share, gathered: not the first rank alone, and nothing twice."""
    s = session(parts, grpo.parser(), ["--start", "-"], stage="measure")
    s.args.n, s.args.decoder, s.helper = 2, "sampling", None
    assigned = []

    class Both(Share):
        def gather(self, items):
            other = [{"id": s.posts[i].id} for i in range(len(s.posts))[1::2]]
            assigned.append(len(items))
            return [x for pair in zip(items, other) for x in pair]
    s.ranks = Both(0, 2)
    monkeypatch.setattr(evaluate, "make_records",
                        lambda session, mine, *a: [{"id": s.posts[i].id} for i in mine])
    run = tmp_path / "run"
    run.mkdir()
    evaluate.measure_run(s, run, {}, None, None)
    records = files.read_object(run / "evaluation.json")["records"]
    assert assigned == [6] and [r["id"] for r in records] == [p.id for p in s.posts]
