"""Tests of methods/sight.py, the embedders of methods/ngrams.py and methods/concatenation.py."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
from helpers import refusal, session
from methods import pocket, sight
from methods.ngrams import DIM, NgramEmbedder, char_ngrams, word_ngrams
from methods.sight import Labelled, auc, by_answer, by_style, comparable, in_order, reply_aucs
from polylora import parser
from support.checkpoint import embedder_hash
from support.posts import Post, save_posts
from trainer import load_embedder


def labelled(kinds, clusters, what="style"):
    texts = [f"reply {i}" for i in range(len(kinds))]
    return Labelled(texts, np.array(kinds), np.array(clusters), what)


def distances_of(vectors):
    unit = F.normalize(vectors, dim=-1)
    return (1 - unit @ unit.T).numpy()


def by_hand(distances, same, other, weights):
    """reply_aucs in loops."""
    out = []
    for i in range(len(distances)):
        won = total = 0.0
        for j, far in itertools.product(range(len(distances)), repeat=2):
            if same[i, j] and other[i, far]:
                pairs = weights[j] * weights[far]
                gap = distances[i, far] - distances[i, j]
                total += pairs
                won += pairs * (0.5 if abs(gap) < 1e-6 else float(gap > 0))
        out.append(won / total if total else np.nan)
    return np.array(out)


@pytest.mark.parametrize("what", ["style", "answer"])
def test_the_auc_of_each_reply_is_the_share_of_pairs_with_ties_by_half(what):
    draw = np.random.default_rng(2)
    some = labelled(draw.integers(3, size=14), np.arange(14) // 4, what)
    if what == "answer":
        some = some._replace(kinds=some.clusters)
    distances = draw.integers(4, size=(14, 14)) / 4        # many are equal
    same, other = comparable(some)
    weights = draw.integers(3, size=14).astype(float)
    got = reply_aucs(in_order(distances, same, other), weights)
    want = by_hand(distances, same, other, weights)
    assert np.allclose(got, want, equal_nan=True) and np.isfinite(got).any()


def test_a_blind_embedder_is_called_blind_and_a_seeing_one_is_not():
    """60 replies of 20 intents in 3 styles: one embedder sees the style through noise, the other
    sees the intent alone, the third nothing."""
    some = labelled(np.tile(range(3), 20), np.repeat(range(20), 3))
    noise = torch.randn(60, 8)
    by_kind = F.one_hot(torch.tensor(some.kinds), 8) * 6 + noise
    topic = torch.randn(20, 8)[torch.tensor(some.clusters)] * 6 + noise
    seeing, topical, blind = (auc(distances_of(x), some) for x in (by_kind, topic, noise))
    assert seeing[0] > 0.9 and 0.4 < topical[0] < 0.6 and 0.4 < blind[0] < 0.6
    for value, low, high in (seeing, topical, blind):
        assert low < value < high and high - low < 0.3
    assert "can help" in sight.sentence("e", some, seeing)
    for found in (topical, blind):           # one wording of a style in each intent
        assert "warning: D by it does not see styles" in sight.sentence("e", some, found)
    answers = some._replace(kinds=some.clusters, what="answer")
    assert "warning: D by it cannot help" in sight.sentence("e", answers, auc(distances_of(noise),
                                                                              answers))
    assert "not known" in sight.sentence("e", some, None)
    assert "its interval holds" in sight.sentence("e", some, (0.72, 0.68, 0.76))


def test_an_interval_by_intents_is_wider_than_one_that_takes_replies_as_independent():
    """Ten nearly equal replies to each of 12 intents, of one style each: 12 facts, not 120."""
    style = torch.arange(12) % 2
    vectors = F.one_hot(style, 4).float() + 0.7 * torch.randn(12, 4)
    vectors = vectors.repeat_interleave(10, 0) + 0.05 * torch.randn(120, 4)
    widths = []
    for clusters in (np.arange(120) // 10, np.arange(120)):
        some = labelled(style.repeat_interleave(10).numpy(), clusters)
        _, low, high = auc(distances_of(vectors), some)
        widths.append(high - low)
    assert widths[0] > 2 * widths[1] > 0


def test_styles_are_compared_within_an_intent_where_a_style_has_several_wordings():
    posts = pocket.pocket_posts(60, seed=2)
    domain = data.make_domain("auto", posts)
    several = by_style(posts, domain)
    same, other = comparable(several)
    one_intent = several.clusters[:, None] == several.clusters
    assert same.any() and not (same & ~one_intent).any() and not (other & ~one_intent).any()
    one = [Post(str(i), f"post {i}", (f"dry {i}", f"warm {i}", "both"), ("dry", "warm", "odd"),
                intent=str(i)) for i in range(8)]
    single = by_style(one, data.make_domain("auto", one))
    same, other = comparable(single)
    one_intent = single.clusters[:, None] == single.clusters
    assert same.any() and other.any() and not ((same | other) & one_intent).any()


def test_a_wording_in_two_styles_or_of_two_intents_has_no_label():
    posts = [Post("a", "a", ("yes", "Yes!", "no"), ("dry", "warm", "odd"), intent="1"),
             Post("b", "b", ("yes", "well", "hm"), ("dry", "warm", "odd"), intent="2")]
    styled = by_style(posts, data.make_domain("auto", posts))
    assert sorted(styled.texts) == ["hm", "no", "well", "yes"]
    assert styled.texts.count("yes") == 1    # of the second intent, where it is dry alone
    answers = by_answer(posts)
    assert sorted(answers.texts) == ["hm", "well"]


def test_ngrams_see_wording_and_are_unit_vectors():
    for grams in (char_ngrams, word_ngrams):
        embed = NgramEmbedder(grams)
        near, far, alike, empty = embed([["how nice of you", "how nice of them"],
                                         ["how nice of you", "rain again"],
                                         ["How nice of you", "how nice of you"], ["", ""]])
        assert near.shape == (2, DIM)
        for pair in (near, far, alike, empty):
            assert torch.allclose(pair.norm(dim=-1), torch.ones(2))
        assert near[0] @ near[1] > 0.4 > 0.15 > far[0] @ far[1]
        assert alike[0] @ alike[1] == pytest.approx(1)


def test_signed_hashing_keeps_cosines_of_unrelated_texts_near_zero():
    """Without signs, grams that share a place would only add up."""
    texts = [" ".join(f"{a}{b}{a}" for b in "bcdfgh") for a in "aeiouy"]
    vectors, = NgramEmbedder(char_ngrams)([texts])
    cosines = (vectors @ vectors.T)[~torch.eye(len(texts), dtype=torch.bool)]
    assert abs(float(cosines.mean())) < 0.1


def test_a_concatenation_has_the_mean_of_the_cosines(parts):
    texts = [["how nice of you", "how nice of them", "rain again"]]
    grams = {}
    for name in ("base", "char-ngrams", "word-ngrams", "base+char-ngrams+word-ngrams"):
        s = session(parts, parser(), ["sft", "--model", "-", "--embedder", name])
        load_embedder(s)
        vectors = s.embedder(texts)[0]
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(3), atol=1e-5)
        grams[name] = vectors @ vectors.T
    joined = grams.pop("base+char-ngrams+word-ngrams")
    assert torch.allclose(joined, sum(grams.values()) / 3, atol=1e-5)


def test_names_of_embedders_without_files_have_hashes_of_their_own():
    names = ("char-ngrams", "word-ngrams", "char-ngrams+word-ngrams", "base+char-ngrams")
    assert len({embedder_hash(name) for name in names}) == 4


def test_the_command_prints_a_line_for_each_embedder(world, capsys):
    assert evaluate.main(["embedder", world["sft"], "--model", world["model"], "--embedder",
                          "base", "char-ngrams", "--labels", "answer"]) == 0
    first, second = capsys.readouterr().out.strip().splitlines()[-2:]
    assert first.startswith("embedder base: ") and second.startswith("embedder char-ngrams: ")


def test_posts_with_one_reply_are_no_error_and_no_number(tmp_path, capsys):
    posts = [Post(str(i), f"post {i}", (f"reply {i}",)) for i in range(4)]
    save_posts(posts, tmp_path / "posts.jsonl")
    assert evaluate.main(["embedder", str(tmp_path / "posts.jsonl"), "--embedder",
                          "word-ngrams"]) == 0
    assert "not known" in capsys.readouterr().out
    said = refusal(capsys, evaluate.main, "embedder", str(tmp_path / "posts.jsonl"), "--embedder",
                   "base")
    assert "--model" in said
    said = refusal(capsys, evaluate.main, "embedder", str(tmp_path / "posts.jsonl"), "--embedder",
                   "word-ngrams", "--labels", "style")
    assert "--labels answer" in said


def test_phase_one_trains_with_ngrams_by_name(world, tmp_path):
    import polylora
    out = tmp_path / "run"
    assert polylora.main(["sft", "--model", world["model"], "--data", world["sft"], "--out",
                          str(out), "--steps", "2", "--batch", "4", "--lambda", "0.3", "--k", "3",
                          "--max-new-tokens", "6", "--embedder", "base+char-ngrams"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["embedder"] == "base+char-ngrams" and config["embedder_hash"]
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert 0 < steps[0]["D"] < 1 and steps[0]["D_share"] > 0
