"""Tests of evaluate.py's metrics, intervals and report: by hand, by enumeration over subsets, against nltk.

`python tests/test_evaluate.py` (with nltk installed) writes golden/self_bleu.json again.
"""

import itertools
import json
import math
import random
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate  # noqa: E402
from evaluate import (  # noqa: E402
    InputError, bootstrap_interval, distinct_n, max_at_k, paired_interval, pareto_front, pass_at_k,
    post_metrics, self_bleu, vendi_score, words)

GOLDEN = Path(__file__).parent / "golden" / "self_bleu.json"
DRAFTS = {
    "replies": ["That is great news, well done!", "Well done, that is great.", "Oh no, not again...",
                "that IS great news", "Great news! Great news! Great news!"],
    "identical": ["see you at the park tomorrow"] * 4,
    "nothing shared": ["alpha beta gamma", "delta epsilon zeta", "eta theta iota"],
    "one word": ["yes", "yes", "no"],
    "an empty draft": ["", "thanks a lot for asking", "thanks for asking"],
    "repeats are clipped": ["the the the the the", "the cat sat", "the the end"],
    "short beside long": ["good luck", "good luck with the new job and the long way", "good luck, friend"],
    "two lengths equally near": ["a b c d e", "a b c d", "a b c d e f"],
}


def nltk_self_bleu(texts, max_n=4):
    """The direct form: nltk's sentence BLEU of each draft with all the others as references."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    drafts, smooth = [words(text) for text in texts], SmoothingFunction(epsilon=0.1).method1
    return sum(sentence_bleu(drafts[:i] + drafts[i + 1:], draft, (1 / max_n,) * max_n, smooth)
               for i, draft in enumerate(drafts)) / len(drafts)


def slow_self_bleu(texts, max_n=4):
    """The definition, with every reference's n-grams counted again for every draft."""
    drafts, scores = [words(text) for text in texts], []
    for i, draft in enumerate(drafts):
        others, product = drafts[:i] + drafts[i + 1:], 1.0
        for n in range(1, max_n + 1):
            grams = Counter(tuple(draft[j:j + n]) for j in range(len(draft) - n + 1))
            hits = sum(min(times, max(sum(tuple(other[j:j + n]) == gram for j in range(len(other) - n + 1))
                                      for other in others)) for gram, times in grams.items())
            if n == 1 and hits == 0:
                product = 0.0
                break
            product *= ((hits or 0.1) / max(1, sum(grams.values()))) ** (1 / max_n)
        closest = min((len(other) for other in others), key=lambda length: (abs(length - len(draft)), length))
        scores.append(product and product * min(1.0, math.exp(1 - closest / len(draft))))
    return sum(scores) / len(scores)


def random_drafts(seed):
    rng, tokens = random.Random(seed), "a b c d e f , !".split()
    return [" ".join(rng.choice(tokens) for _ in range(rng.randint(0, 9))) for _ in range(6)] + ["a b"]


# Pass@k and max@k

def test_pass_at_k_table():
    assert [pass_at_k(10, c, 5) for c in (0, 10, 6, 1)] == [0.0, 1.0, 1.0, 0.5]
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3, abs=1e-15)
    assert pass_at_k(16, 1, 8) == 0.5
    assert pass_at_k(10, 2, 5) == pytest.approx(7 / 9, abs=1e-15)
    assert pass_at_k(2000, 1, 1000) == 0.5  # no overflow, no loss


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            drafts = [True] * c + [False] * (n - c)
            subsets = [any(subset) for subset in itertools.combinations(drafts, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased_and_the_plug_in_form_is_not():
    p, n, k = 0.2, 10, 5
    chance = [math.comb(n, c) * p ** c * (1 - p) ** (n - c) for c in range(n + 1)]
    ours = sum(w * pass_at_k(n, c, k) for c, w in enumerate(chance))
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(chance))
    assert ours == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert plug_in < ours - 0.05


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2), (0, 0, 1)])
def test_pass_at_k_refuses_what_it_cannot_estimate(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_max_at_k_is_the_mean_maximum_over_all_subsets():
    rewards = [0.3, -1.0, 2.5, 0.3, 0.0, 1.25]
    for k in range(1, 7):
        best = [max(subset) for subset in itertools.combinations(rewards, k)]
        assert max_at_k(rewards, k) == pytest.approx(sum(best) / len(best), abs=1e-12)
    for c in range(7):
        assert max_at_k([0.0] * (6 - c) + [1.0] * c, 3) == pytest.approx(pass_at_k(6, c, 3), abs=1e-12)
    for wrong in (([1.0, 2.0], 3), ([1.0], 0), ([1.0, math.nan], 1)):
        with pytest.raises(ValueError):
            max_at_k(*wrong)


# Diversity

def test_words():
    assert words("Don't STOP, it’s 5pm!! 🎉") == ["don't", "stop", ",", "it’s", "5pm", "!", "!", "🎉"]
    assert words("  \n") == []


def test_distinct_n_by_hand():
    texts = ["the cat sat", "The cat ran", ""]  # bigrams: the cat, cat sat, the cat, cat ran
    assert distinct_n(texts, 1) == 4 / 6
    assert distinct_n(texts, 2) == 3 / 4
    assert distinct_n(["a b", "c"], 2) == 1.0  # no bigram across two drafts
    with pytest.raises(ValueError, match="distinct-4"):
        distinct_n(texts, 4)


@pytest.mark.parametrize("name", DRAFTS)
def test_self_bleu_golden(name):
    assert self_bleu(DRAFTS[name]) == pytest.approx(json.loads(GOLDEN.read_text())[name], abs=1e-12)


def test_self_bleu_is_the_definition():
    for texts in [*DRAFTS.values(), *map(random_drafts, range(40))]:
        for max_n in (2, 4):
            assert self_bleu(texts, max_n) == pytest.approx(slow_self_bleu(texts, max_n), abs=1e-12)


def test_self_bleu_is_nltks():
    pytest.importorskip("nltk")
    for texts in [*DRAFTS.values(), *map(random_drafts, range(40))]:
        for max_n in (3, 4):
            assert self_bleu(texts, max_n) == pytest.approx(nltk_self_bleu(texts, max_n), abs=1e-12)


def test_self_bleu_limits_and_errors():
    assert self_bleu(["one two three four five"] * 3) == pytest.approx(1.0, abs=1e-12)
    assert self_bleu(["a b", "c d"]) == 0.0
    for texts in (["alone"], ["", " "]):
        with pytest.raises(ValueError):
            self_bleu(texts)


def test_vendi_score():
    assert vendi_score(np.tile([0.6, 0.8], (5, 1))) == pytest.approx(1, abs=1e-9)
    assert vendi_score(np.eye(5)) == pytest.approx(5, abs=1e-9)
    pairs = [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert vendi_score(pairs) == pytest.approx(2, abs=1e-9)
    assert vendi_score([[1, 0], [1, 0], [1, 0], [0, 1]]) == pytest.approx(4 / 3 ** 0.75, abs=1e-9)
    for wrong in ([[2.0, 0.0], [1.0, 0.0]], [1.0, 0.0], np.zeros((0, 3))):
        with pytest.raises(ValueError):
            vendi_score(wrong)


def test_pareto_front():
    points = [(1, 5), (2, 4), (2, 4), (2, 3), (5, 1), (0, 5), (3, 1)]
    assert pareto_front(points) == [0, 1, 2, 4]
    with pytest.raises(ValueError):
        pareto_front([(1, math.nan)])


# Intervals

def test_bootstrap_interval_covers_and_repeats():
    rng, hits, widths = np.random.default_rng(1), 0, []
    for trial in range(200):
        low, high = bootstrap_interval(rng.normal(0.5, 0.2, 60), draws=400)
        hits, widths = hits + (low < 0.5 < high), widths + [high - low]
    assert 175 <= hits <= 199  # 95% of 200, less a little for the percentile form, give or take 3 sd
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.2 / 60 ** 0.5, rel=0.1)
    values = rng.random(30)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    narrow, wide = bootstrap_interval(values, level=0.5), bootstrap_interval(values)
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]
    for wrong in ([1.0], [], [1.0, math.nan], [[1.0, 2.0]]):
        with pytest.raises(ValueError):
            bootstrap_interval(wrong)


def test_paired_interval_sees_a_small_difference_between_unequal_posts():
    rng = np.random.default_rng(2)
    hard = rng.random(100)
    a, b = hard + 0.02 + rng.normal(0, 0.01, 100), hard + rng.normal(0, 0.01, 100)
    low, high = paired_interval(a, b)
    assert 0 < low < 0.02 < high < 0.04
    assert bootstrap_interval(a)[0] < bootstrap_interval(b)[1]  # unpaired intervals overlap
    assert paired_interval(b, a) == pytest.approx((-high, -low))
    with pytest.raises(ValueError):
        paired_interval(a, b[:-1])


# One post

TASTES = {"warm": 0.5, "dry": 0.3, "terse": 0.2}


def record(voices=None, *, name="p0", n=4, **changed):
    voices = [["warm"], [], ["warm", "dry"], []] if voices is None else voices
    return {"id": name, "post": f"text of {name}", "drafts": [f"draft {i} of many" for i in range(n)],
            "voices": voices, "rewards": [float(bool(right)) for right in voices],
            "finished": [True] * (n - 1) + [False], "semantic": 0.25, "vendi": 2.0} | changed


def test_post_metrics_with_voices_by_enumeration():
    voices = [["warm"], [], ["warm", "dry"], [], ["dry", "dry"], []]  # a voice named twice is still one draft
    got = post_metrics(record(voices, n=6, rewards=[1, 0, 2.5, 0, 1, 0]), TASTES, ks=(1, 2, 5))
    for k in (1, 2, 5):
        subsets = list(itertools.combinations(voices, k))
        pleased = sum(share * sum(any(voice in right for right in subset) for subset in subsets)
                      for voice, share in TASTES.items())
        assert got[f"pass@{k}"] == pytest.approx(pleased / len(subsets), abs=1e-12)
    assert (got["valid"], got["stances"], got["reward"]) == (0.5, 2.0, 0.75)
    assert got["max@5"] == pytest.approx((5 * 2.5 + 1) / 6)
    assert (got["truncated"], got["words"], got["semantic"], got["vendi"]) == (1 / 6, 4.0, 0.25, 2.0)
    assert got["distinct-1"] == 9 / 24 and "self-bleu" in got and "distinct-2" in got


def test_post_metrics_without_voices():
    plain = record(passed=[True, False, False, False], rewards=[0.9, 0.1, 0.2, 0.4])
    del plain["voices"]
    got = post_metrics(plain, None, ks=(1, 3))
    assert got["pass@1"] == 0.25 and got["pass@3"] == 0.75 and got["valid"] == 0.25 and "stances" not in got


def test_post_metrics_leaves_out_what_no_draft_can_show():
    empty = post_metrics(record(drafts=["", "", " ", ""]), TASTES, ks=(1,))
    assert not {"distinct-1", "distinct-2", "self-bleu"} & set(empty) and empty["words"] == 0
    short = post_metrics(record(drafts=["yes", "no", "", "yes"]), TASTES, ks=(1,))
    assert short["distinct-1"] == 2 / 3 and "distinct-2" not in short


@pytest.mark.parametrize("changed, tastes, ks", [
    ({}, TASTES, (5,)), ({}, None, (1,)), ({}, {"warm": 1.0}, (1,)), ({}, TASTES | {"dry": 0.9}, (1,)),
    ({"rewards": [1.0]}, TASTES, (1,)), ({"semantic": None}, TASTES, (1,)), ({"finished": []}, TASTES, (1,)),
    ({"rewards": [math.inf, 0, 0, 0]}, TASTES, (1,)), ({"vendi": math.nan}, TASTES, (1,))])
def test_post_metrics_refuses(changed, tastes, ks):
    with pytest.raises(ValueError):
        post_metrics(record(**changed), tastes, ks)


# The report

def write_run(folder, seed, arm, right, *, posts=6, end=True, settings=None, **changed):
    """A run of 12 drafts a post in which right(post number) of them please the warm reader."""
    folder.mkdir(parents=True)
    records = [record([["warm"]] * right(i) + [[]] * (12 - right(i)), name=f"p{i}", n=12, **changed)
               for i in range(posts)]
    (folder / "config.json").write_text(json.dumps({"seed": seed} | ({"arm": arm} if arm else {})))
    settings = {"n": 12, "temperature": 1.0, "split": "test"} | (settings or {})
    (folder / "evaluation.json").write_text(json.dumps(
        {"version": 1, "domain": "pocket", "settings": settings, "tastes": TASTES, "records": records}))
    lines = [{"event": "step", "loss": math.nan}]
    if end:
        lines.append({"event": "end", "stage": "sft", "seconds": 10.0 + seed, "tokens_per_second": 100,
                      "peak_bytes": (seed + 1) * 2 ** 30})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / "a0", 0, "lora-grpo", lambda i: 2 + i % 2),
            write_run(tmp_path / "b0", 0, "poly <&> |", lambda i: 6, semantic=0.5),
            write_run(tmp_path / "a1", 1, "lora-grpo", lambda i: 4 + i % 2),
            write_run(tmp_path / "base", 0, None, lambda i: 1 + i, end=False, semantic=0, drafts=["a"] * 12)]


def test_report_writes_what_was_measured(runs, tmp_path, capsys):
    out = tmp_path / "out" / "deep"
    assert evaluate.main(["report", *runs, "--out", str(out), "--against", "lora-grpo"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "report.json", "report.md", "report.txt", "pass_at_k.svg", "quality_diversity.svg"}
    data = json.loads((out / "report.json").read_text())
    assert list(data["arms"]) == ["lora-grpo", "poly <&> |", "base"] and data["posts"] == 6
    lora, base = data["arms"]["lora-grpo"], data["arms"]["base"]
    valid = lora["metrics"]["valid"]
    assert lora["seeds"] == [0, 1] and valid["mean"] == pytest.approx(3.5 / 12)
    assert valid["per_seed"] == pytest.approx([2.5 / 12, 4.5 / 12])
    assert valid["sd_over_seeds"] == pytest.approx(2 / 12 / 2 ** 0.5)
    assert valid["low"] < valid["mean"] < valid["high"]
    interval = bootstrap_interval([(3 + i % 2) / 12 for i in range(6)])
    assert (valid["low"], valid["high"]) == pytest.approx(interval, abs=1e-12)
    assert lora["metrics"]["pass@10"]["mean"] == pytest.approx(
        0.5 * np.mean([pass_at_k(12, c, 10) for c in (2, 3, 4, 5)]), abs=1e-12)
    assert base["metrics"]["distinct-2"] == {"mean": None, "posts_left_out": 6}
    assert base["metrics"]["valid"]["sd_over_seeds"] is None
    difference = data["differences"]["poly <&> |"]["valid"]
    assert difference["mean"] == pytest.approx(2.5 / 12) and difference["low"] > 0
    assert "lora-grpo" not in data["differences"]
    assert data["pareto"] == ["poly <&> |"]
    assert data["stages"][0] == {"arm": "lora-grpo", "stage": "sft", "seconds": 10.5,
                                 "tokens_per_second": 100.0, "peak_bytes": 2.0 * 2 ** 30}
    text = (out / "report.txt").read_text()
    assert capsys.readouterr().out == text and "distinct-2 in 6 posts of base" in text and "0.292 ±" in text
    assert "poly <&> \\|" in (out / "report.md").read_text()
    for name in ("pass_at_k.svg", "quality_diversity.svg"):
        page = (out / name).read_text()
        words_in = [element.text for element in ElementTree.fromstring(page).iter() if element.text]
        assert {"lora-grpo", "poly <&> |", "base"} <= set(words_in)
        assert "href" not in page and page.count("http") == 1  # the namespace alone: nothing is fetched
        assert "nan" not in page


def test_report_of_one_run_and_few_drafts_leaves_out_what_n_cannot_show(tmp_path):
    folder = write_run(tmp_path / "few", 0, None, lambda i: 4)
    path = tmp_path / "few" / "evaluation.json"
    data = json.loads(path.read_text())
    data["records"] = [record(name=f"p{i}") for i in range(3)]
    path.write_text(json.dumps(data))
    assert evaluate.report([folder], tmp_path / "out")["ks"] == [1, 3]
    data["records"] = [record([["warm"]], name=f"p{i}", n=1) for i in range(3)]
    path.write_text(json.dumps(data))
    summary = evaluate.report([folder], tmp_path / "out")
    assert summary["ks"] == [1] and summary["arms"]["few"]["metrics"]["pass@1"]["mean"] == 0.5


def refused(capsys, out, *arguments):
    """The one line of stderr of a report that must exit with 2 and write nothing."""
    assert evaluate.main(["report", *arguments, "--out", str(out)]) == 2
    message = capsys.readouterr()
    assert not out.exists() and message.out == ""
    assert message.err.startswith("error: ") and message.err.count("\n") == 1
    return message.err


def test_report_compares_like_with_like(runs, tmp_path, capsys):
    out = tmp_path / "out"
    fewer = write_run(tmp_path / "fewer", 2, "lora-grpo", lambda i: 2, posts=5)
    message = refused(capsys, out, *runs, fewer)
    assert runs[0] in message and fewer in message and "the posts" in message
    changed = write_run(tmp_path / "changed", 2, "lora-grpo", lambda i: 2, post="other text, same id")
    assert "the posts" in refused(capsys, out, *runs, changed)
    hotter = write_run(tmp_path / "hotter", 2, "lora-grpo", lambda i: 2, settings={"temperature": 0.7})
    message = refused(capsys, out, *runs, hotter)
    assert runs[0] in message and hotter in message and "temperature (1.0 and 0.7)" in message
    assert "same arm and seed" in refused(capsys, out, *runs, runs[0])
    assert "lora-grpo, poly" in refused(capsys, out, *runs, "--against", "nobody")
    alone = write_run(tmp_path / "alone", 2, "lora-grpo", lambda i: 2, posts=1)
    assert "fewer than 2" in refused(capsys, out, alone)


EVALUATION = '{"version": 1, "domain": "d", "settings": {}, "tastes": null, "records": %s}'


@pytest.mark.parametrize("name, content, said", [
    ("config.json", "{}", "seed"),
    ("config.json", '{"seed": true}', "seed"), ("config.json", "[1]", "a JSON"),
    ("config.json", '{"seed": 1, "arm": "a\\u0000b"}', "arm"), ("evaluation.json", "{", "JSON"),
    ("evaluation.json", '{"version": 2}', "version"), ("metrics.jsonl", '{"event": "end"}\noops', "line 2"),
    ("evaluation.json", None, "missing"),
    ("evaluation.json", EVALUATION % "[]", "fewer than 2"),
    ("evaluation.json", EVALUATION % "[{}]", "record 1"),
    ("evaluation.json", EVALUATION % "3", "records")])
def test_report_names_the_broken_file(runs, tmp_path, capsys, name, content, said):
    path = Path(runs[1]) / name
    path.unlink() if content is None else path.write_text(content)
    message = refused(capsys, tmp_path / "out", runs[1])
    assert said in message and (str(path) in message or "fewer" in said)


def test_report_keeps_an_earlier_report_when_it_fails(runs, tmp_path, capsys):
    out = tmp_path / "out"
    evaluate.report(runs, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert evaluate.main(["report", *runs, "nowhere", "--out", str(out)]) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(InputError):
        evaluate.report(runs, Path(runs[0]) / "config.json")


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    golden = {name: nltk_self_bleu(texts) for name, texts in DRAFTS.items()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
