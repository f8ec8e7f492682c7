"""Tests of methods/decoders.py."""

import json
import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
from engine import generate
from generate import Samples
from helpers import PROMPTS, STOPS, build, next_logits
from lora import add_adapter, lora_layers
from methods import decoders
from methods.decoders import (
    best_of, contrastive_completions, diverse_beams, informative, majority, read_list,
    read_verbalized, rewarded,
)
from methods import judge
from methods import likelihoods
from methods.likelihoods import completion_scores
from model import pack
from support.checks import check_decoder
from support.draws import uniforms
from support import files
from support import registry
from support.registry import DECODERS
from trainer import Visit


def logp_after(model, prompt, ids):
    return next_logits(model, prompt, ids + [0])[-1].log_softmax(-1)


def slow_beams(model, prompt, k, groups, penalty, length, stops=()):
    """The same search over whole texts: every candidate of every group, each scored by a plain
    forward."""
    width = k // groups
    beams = [[([], 0.0, False)] for _ in range(groups)]
    for _ in range(length):
        if all(done for group in beams for *_, done in group):
            break
        taken = [0] * model.vocab
        for g, group in enumerate(beams):
            grown = []
            for ids, score, done in group:
                if done:
                    grown.append((ids, score, True, None))
                    continue
                logp = logp_after(model, prompt, ids)
                grown += [(ids + [t], score + float(logp[t]) - penalty * taken[t], t in stops, t)
                          for t in range(model.vocab)]
            best = sorted(grown, key=lambda beam: -beam[1])[:width]
            for *_, token in best:
                if token is not None:
                    taken[token] += 1
            beams[g] = [beam[:3] for beam in best]
    return [ids for group in beams for ids, *_ in group]


@pytest.mark.slow
@pytest.mark.parametrize("k, groups, penalty", [(4, 2, 0.7), (4, 4, 3.0), (3, 1, 0.5), (4, 2, 0.0),
                                                (1, 1, 1.0)])
@pytest.mark.parametrize("stops", [(), tuple(STOPS)])
def test_diverse_beams_are_those_of_a_plain_search(k, groups, penalty, stops):
    model = build()
    for prompt in PROMPTS[:2]:
        got, logprobs, finished = diverse_beams(model, prompt, k, groups=groups, penalty=penalty,
                                                max_new_tokens=4,
                                                stop_ids=stops)
        assert got == slow_beams(model, prompt, k, groups, penalty, 4, stops)
        for ids, logs, done in zip(got, logprobs, finished):
            assert done == (ids[-1] in stops)
            want = next_logits(model, prompt, ids).log_softmax(-1)[range(len(ids)), ids]
            assert logs == pytest.approx(want.tolist(), abs=1e-4)


def test_the_penalty_drives_groups_apart():
    """Without one, groups of one beam are all the greedy text; with a huge one they begin apart."""
    model = build()
    same, *_ = diverse_beams(model, PROMPTS[0], 3, groups=0, penalty=0.0, max_new_tokens=4)
    apart, *_ = diverse_beams(model, PROMPTS[0], 3, groups=0, penalty=1e3, max_new_tokens=4)
    assert same == generate(model, PROMPTS[:1], k=3, max_new_tokens=4, temperature=0.0).tokens[0]
    assert all(len({ids[step] for ids in apart}) == 3 for step in range(4))
    with pytest.raises(files.InputError, match="5 beams"):
        diverse_beams(model, PROMPTS[0], 5, groups=2, penalty=1.0, max_new_tokens=4)


@pytest.mark.peers
def test_beams_are_transformers(tmp_path):
    """Without a stop id, where both rank by the sum of what the search counts."""
    transformers = pytest.importorskip("transformers")
    model = build()
    model.save_pretrained(tmp_path)
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.float32)
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0)
    old = hasattr(transformers, "HammingDiversityLogitsProcessor")
    for k, groups, penalty in ((3, 1, 0.0), *([(4, 2, 0.7), (4, 4, 3.0)] if old else [])):
        more = dict(num_beam_groups=groups, diversity_penalty=penalty) if groups > 1 else {}
        want = theirs.generate(torch.tensor([PROMPTS[0]]), num_beams=k, num_return_sequences=k,
                               max_new_tokens=5,
                               do_sample=False, length_penalty=0.0, eos_token_id=None, **more)
        got, *_ = diverse_beams(model, PROMPTS[0], k, groups=groups, penalty=penalty,
                                max_new_tokens=5)
        assert sorted(got) == sorted(want[:, len(PROMPTS[0]):].tolist())


# Contrastive
@pytest.mark.parametrize("temperature, plausible", [(0.0, 0.1), (1.0, 0.1), (0.7, 0.0), (1.0, 1.0)])
def test_contrastive_drafts_are_those_of_a_plain_loop(temperature, plausible):
    expert, amateur = build(), build(seed=4)
    prompt, length = PROMPTS[0], 5
    noise = uniforms([7], 3, length)[0]
    got, logprobs, finished = contrastive_completions(
        expert, (amateur, nullcontext), prompt, noise, plausible=plausible,
        max_new_tokens=length, stop_ids=STOPS, temperature=temperature)
    for row in range(3):
        ids, logs = [], []
        while len(ids) < length and not (ids and ids[-1] in STOPS):
            logp, weak = logp_after(expert, prompt, ids), logp_after(amateur, prompt, ids)
            scores = torch.tensor([float(a - b) if float(a.exp())
                                   >= plausible * float(logp.exp().max()) else -math.inf
                                   for a, b in zip(logp, weak)])
            if temperature == 0:
                ids.append(int(scores.argmax()))
            else:
                p = (scores / temperature).softmax(-1)
                ids.append(int((p.double().cumsum(-1) <= noise[row, len(ids)]).sum()))
                logs.append(float(p[ids[-1]].log()))
        assert got[row] == ids and finished[row] == (ids[-1] in STOPS)
        assert temperature == 0 or logprobs[row] == pytest.approx(logs, abs=1e-4)
    if temperature == 0:
        assert got[0] == got[1] == got[2]
    if plausible == 1:                       # only the expert's best is left
        assert got[:1] == generate(expert, [prompt], max_new_tokens=length, temperature=0.0,
                                   stop_ids=STOPS).tokens[0]
    with pytest.raises(files.InputError, match="tokens"):
        contrastive_completions(expert, (build(vocab_size=43), nullcontext), prompt, noise,
                                plausible=0.1, max_new_tokens=2, temperature=1.0)


# The best of several
class Chosen:
    """A session that writes what it is told to."""

    def __init__(self, completions, pool, **flags):
        self.args = SimpleNamespace(pool=pool, **flags)
        self.completions = completions                 # P lists of k pool texts

    def sample_completions(self, visits, step, k, progress=None):
        tokens = [[[i] for i in range(k)] for _ in self.completions]
        samples = Samples(tokens, tokens, [[True] * k for _ in self.completions])
        return ["prompt"] * len(self.completions), samples, self.completions


def test_the_best_of_each_pool_is_kept_with_its_tokens():
    """Two posts, two drafts each from pools of three: a draft comes from its own pool alone."""
    session = Chosen([["a", "bbb", "cc", "d", "e", "ff"], ["x", "x", "x", "yy", "z", "yy"]], 3)
    score = lambda session, visits, prompts, tokens, texts, helper: [[len(t) for t in row]
                                                                     for row in texts]
    samples, texts = best_of(score)(session, ["v", "w"], 2)
    assert texts == [["bbb", "ff"], ["x", "yy"]] and samples.tokens == [[[1], [5]], [[0], [3]]]
    assert samples.finished == [[True, True]] * 2


def test_best_of_n_draws_the_same_users_on_any_rank():
    """Numbered along a rank's list, a post's readers hung on which posts stood before it."""
    session = SimpleNamespace(posts=list("abcd"), seed_for=lambda *name: name)
    seen = lambda visits: rewarded(session, visits, None, None, None,
                                   lambda posts, texts, seeds: list(zip(posts, seeds)))
    alone = seen([Visit(3, 0)] * 2)
    assert alone == seen([Visit(0, 0)] * 2 + [Visit(3, 0)] * 2)[2:] and len(set(alone)) == 2


def test_self_consistency_takes_the_majority():
    texts = [["Yes!", "no", "yes"], ["", "", "so"], ["a", "b", "c"]]
    assert majority(None, None, None, None, texts, None) == [[2, 1, 2], [0, 0, 1], [1, 1, 1]]
    samples, kept = DECODERS["self-consistency"].function(
        Chosen([["no", "Yes!", "yes", "", "", "so"]], 3), ["v"], 2)
    assert kept == [["Yes!", "so"]]


class Scored:
    """As much of a session as scoring needs, around a random model."""

    def __init__(self, weight):
        self.model, self.args, self.chat = build(), SimpleNamespace(mmi=weight), None
        self.passes = lambda batches: batches


def test_completion_scores_sum_over_their_tokens():
    session, pairs = Scored(0.5), [([3, 9, 4], [[1, 2], [5]]), ([7], [[8, 9, 10], [11, 12]])]
    logprobs, entropies = completion_scores(session, pairs)
    for (prompt, completions), logs, entropy in zip(pairs, logprobs, entropies):
        for ids, a, b in zip(completions, logs, entropy):
            logp = next_logits(session.model, prompt, ids).log_softmax(-1)
            assert a == pytest.approx(float(logp[range(len(ids)), ids].sum()), abs=1e-4)
            assert b == pytest.approx(float(-(logp.exp() * logp).sum()), abs=1e-4)


def test_equal_completions_are_scored_once_and_ensembles_per_member(monkeypatch):
    session = Scored(0.5)
    pairs, seen = [([3, 9], [[1, 2], [5], [1, 2], [1, 2]]), ([7], [[1, 2], [5], [5]])], []
    monkeypatch.setattr(likelihoods, "pack", lambda groups, *rest: seen.append(groups)
                        or pack(groups, *rest))
    (first, second), _ = completion_scores(session, pairs)
    assert (first == [first[0], first[1], first[0], first[0]]
            and second == [second[0], second[1], second[1]])
    assert [len(completions) for _, completions in seen[0]] == [2, 2]
    add_adapter(session.model, "ensemble", 2, 4, members=2)
    for layer in lora_layers(session.model).values():
        layer.lora_B.weight.data.normal_(generator=torch.Generator().manual_seed(5))
    (first, second), _ = completion_scores(session, pairs)
    for (prompt, completions), got in zip(pairs, (first, second)):
        for d, (ids, value) in enumerate(zip(completions, got)):
            session.model.ensemble.of = d % 2
            logp = next_logits(session.model, prompt, ids).log_softmax(-1)
            assert value == pytest.approx(float(logp[range(len(ids)), ids].sum()), abs=1e-4)
    assert first[0] != pytest.approx(first[3], abs=1e-2)  # one text, two members


def test_mmi_by_hand(monkeypatch):
    session = Scored(0.5)
    session.tokenizer = session.domain = SimpleNamespace(messages=lambda post: [post.post])
    monkeypatch.setattr(data, "encode_prompt", lambda tokenizer, messages, chat: [6]
                        if messages == [""] else None)
    (got,) = informative(session, None, [[3, 9, 4]], [[[1, 2], [5]]], None, None)
    (given,), _ = completion_scores(session, [([3, 9, 4], [[1, 2], [5]])])
    (alone,), _ = completion_scores(session, [([6], [[1, 2], [5]])])
    assert got == pytest.approx([a - 0.5 * b for a, b in zip(given, alone)])


# A set in one prompt
def test_a_numbered_list_is_read_line_by_line():
    assert read_list("Sure:\n1. Great!\n 2) Oh no...\n(3) 3. is odd\nby the way") == ["Great!",
                                                                                      "Oh no...",
                                                                                      "3. is odd"]
    assert read_list("") == read_list("no list at all") == read_list("1.\n2. ") == []
    assert read_list("1. مرحبا بك\n2. 今天很好\n3. 👍") == ["مرحبا بك", "今天很好", "👍"]


def test_verbalized_replies_are_sampled_by_their_probabilities():
    """Exponential clocks: the first to ring is each reply with its own probability."""
    text = "0.6 | a\n30% | b\n 0.1|c\n| d\n1.2.3 | e\nx | f"
    first, noise = {"a": 0, "b": 0, "c": 0}, uniforms([3], 2000, 6)[0]
    for row in noise:
        drawn = read_verbalized(text, row)
        assert sorted(drawn) == ["a", "b", "c", "d", "e"] and drawn[3:] == ["d", "e"]
        first[drawn[0]] += 1
    for reply, p in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
        assert abs(first[reply] / 2000 - p) < 5 * math.sqrt(p * (1 - p) / 2000)
    # per cent are hundredths: both ring at once
    assert read_verbalized("50% | a\n0.5 | b", [0.3, 0.3]) == ["a", "b"]
    assert read_verbalized("", noise[0]) == []


def test_a_short_set_is_filled_with_wrong_completions(monkeypatch):
    """Of two posts, two sets of three each: lists of four and of one, one cut off."""
    said, asked = [["1. a\n2. b\n3. c\n4. d", "1. e"], ["", "2) f\n3: g\nh"]], {}
    monkeypatch.setattr(data, "encode_prompt", lambda tokenizer, turns, chat: turns)
    monkeypatch.setattr(data, "encode_reply", lambda tokenizer, text: list(text))
    monkeypatch.setattr(decoders, "texts_of", lambda session, tokens: tokens)

    def fake(model, prompts, **kw):
        asked.update(kw, prompts=prompts)
        return Samples(said, [], [[True, False], [True, True]])
    monkeypatch.setattr(decoders, "generate", fake)
    args = SimpleNamespace(set_size=3, pool=5, max_new_tokens=7, max_rows=9, temperature=0.6,
                           top_p=0.9, top_k=0, min_p=0.0)
    domain = SimpleNamespace(messages=lambda post: [{"role": "system", "content": "s"},
                                                    {"role": "user", "content": post}])
    session = SimpleNamespace(args=args, stage="measure", posts=["p", "q"], model=None,
                              tokenizer=None, chat="c", stops=(2,),
                              seed_for=lambda *parts: hash(parts) % 1000, texts=None,
                              domain=domain)
    visits = [Visit(1, 0), Visit(0, 3)]
    samples, texts = DECODERS["list"].function(session, visits, 7)
    assert (texts == [["a", "b", "c", "e", "", ""], ["", "", "", "f", "g", ""]]
            and samples.logprobs == [[[]] * 6] * 2)
    assert (samples.finished == [[True] * 3 + [False] * 3, [True] * 6]
            and samples.tokens[0] == [["a"], ["b"], ["c"], ["e"], [], []])
    assert [turns[0]["content"] for turns in asked["prompts"]] == ["s", "s"]
    assert [turns[1]["content"].split("\n\n") for turns in asked["prompts"]] == [
        [post, "Write 3 different replies, each on a line of its own, numbered from 1 to 3."]
        for post in "qp"]
    assert (asked["k"] == 2 and asked["max_new_tokens"] == 21 and asked["stop_ids"] == (2,)
            and asked["temperature"] == 0.6)
    assert (asked["seed"] == [session.seed_for("measure", 0, v) for v in visits]
            and asked["max_rows"] == 9)
    said[:] = [["0 | a\n1 | b\n0 | c\n0 | d\n0 | e", "1 | f"], ["", ""]]
    _, texts = DECODERS["verbalized"].function(session, visits, 6)
    # five are asked for, three kept
    assert texts[0] == ["b", "a", "c", "f", "", ""] and asked["max_new_tokens"] == 35
    many = [SimpleNamespace(**vars(session) | {"seed_for": lambda *parts, i=i: i})
            for i in range(40)]
    said[:] = [["1 | a\n1 | b\n1 | c", "1 | a\n1 | b\n1 | c"]]
    firsts = [tuple(DECODERS["verbalized"].function(s, visits[:1], 6)[1][0][::3]) for s in many]
    assert ({x for x, _ in firsts} == {x for _, x in firsts} == set("abc")
            and any(x != y for x, y in firsts))


def test_every_decoder_names_its_paper_and_bad_flags_are_refused():
    flags = dict(pool=8, plausible=0.1, mmi=0.5, beam_penalty=0.5, beam_groups=0, set_size=5,
                 temperature=1.0)
    assert {n for n, way in DECODERS.items() if way.joint} == {
        "beams", "list", "verbalized", "quasi", "roles"}
    for name, way in DECODERS.items():
        assert "arXiv" in way.paper and way.about
        check_decoder(SimpleNamespace(decoder=name, **flags), 10)
    for name, good in (("mmi", dict(pool=1, mmi=0)), ("sampling", dict(plausible=0)),
                       ("sampling", dict(plausible=1)),
                       ("beams", dict(beam_penalty=0, beam_groups=1)),
                       ("beams", dict(set_size=10, beam_groups=5)),
                       ("list", dict(set_size=1)), ("list", dict(set_size=10)),
                       ("verbalized", dict(pool=5))):
        check_decoder(SimpleNamespace(decoder=name, **flags | good), 10)
    for name, wrong in (("mmi", dict(pool=0)), ("sampling", dict(plausible=2)),
                        ("sampling", dict(plausible=-0.1)),
                        ("beams", dict(beam_groups=2)), ("beams", dict(beam_groups=-1)),
                        ("beams", dict(beam_penalty=-1)),
                        ("beams", dict(set_size=6, beam_groups=4)), ("list", dict(set_size=0)),
                        ("list", dict(set_size=11)), ("verbalized", dict(pool=4)),
                        ("mmi", dict(mmi=-1))):
        with pytest.raises(files.InputError, match="--"):
            check_decoder(SimpleNamespace(decoder=name, **flags | wrong), 10)


@pytest.mark.slow
def test_every_decoder_is_measured_and_reported_as_a_method(world, tmp_path, capsys):
    """Each writes RUN@NAME and leaves RUN alone; joint ones hold whole sets; the report sets
    them side by side. The judge's and the agreement's columns come with it."""
    run = tmp_path / "run"
    shutil.copytree(world["lora"], run)
    common = ["measure", str(run), "--data", world["eval"], "--n", "10", "--max-new-tokens", "4",
              "--pool", "5"]
    assert evaluate.main([*common, "--judge", world["model"], "--judge-drafts", "2"]) == 0
    before = (run / "evaluation.json").read_bytes()
    assert evaluate.main([*common, "--top-k", "5", "--name", "top+k=5"]) == 0
    names = [name for name in registry.DECODERS if name != "sampling"]
    for name in names:
        assert evaluate.main([*common, "--decoder", name]) == 0, capsys.readouterr().err
        written = json.loads((tmp_path / f"run@{name}" / "evaluation.json").read_text())
        joint = registry.DECODERS[name].joint
        assert written["settings"]["decoding"]["independent"] is not joint
        for r in written["records"]:
            assert (len(r["drafts"]) == (5 if name == "beams" else 10)
                    and r.get("set") == (5 if joint else None))
            assert len(r["agrees"]) == len(r["tokens"]) == len(r["base_logprobs"]) == len(
                r["drafts"])
    assert (run / "evaluation.json").read_bytes() == before
    runs = [str(run), *(f"{run}@{name}" for name in ["top+k=5", *names])]
    assert evaluate.main(["report", *runs, "--out", str(tmp_path / "report"), "--ks", "1,5"]) == 0
    arms = json.loads((tmp_path / "report" / "report.json").read_text())["arms"]
    assert list(arms) == ["run", "run@top+k=5", *(f"run@{name}" for name in names)]
    for name, arm in arms.items():
        assert (arm["metrics"]["recall@5"]["mean"] is not None
                and arm["metrics"]["perplexity"]["mean"] > 1)
        joint = name.partition("@")[2] in ("beams", "list", "verbalized", "quasi", "roles")
        assert (arm["metrics"]["recall@1"]["mean"] is None) == joint
    verdicts = arms["run"]["metrics"]
    assert all(0 <= verdicts[f"judge-{x}"]["mean"] <= 1 for x in [*judge.RUBRICS, "wins", "ties"])
    assert arms["run@mmi"]["metrics"]["judge-wins"]["mean"] is None
    capsys.readouterr()
    for name in ("beams", "list", "mmi"):
        assert evaluate.main(["drafts", str(run), "My kettle sings", "--k", "3",
                              "--max-new-tokens", "4", "--decoder", name]) == 0
    assert capsys.readouterr().out.count("1. ") == 3
    assert evaluate.main([*common, "--decoder", "list", "--set-size", "11"]) == 2
    assert evaluate.main([*common, "--name", "a/b"]) == 2
    shutil.copytree(run, trained := tmp_path / "run@20")
    assert evaluate.main([*common, "--name", "20"]) == 2 and "run@20" in capsys.readouterr().err
    # a stop at 20 steps, not run at another setting
    assert (trained / "evaluation.json").read_bytes() == before
