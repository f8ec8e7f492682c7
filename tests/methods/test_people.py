"""Tests of methods/people.py: coverage of people's own replies and of unit tests."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

import data
import grpo
from grpo import coverage_advantages
from helpers import (all_tuples, exact_gradient, expected_estimate, gap, grpo_args, in_double,
                     lines, policy, refusal)
from methods import people
from methods.features import right_by_person, shares_of_people
from methods.people import dirichlet_coverage, dirichlet_weights, equal_shares, unit_tests
from metrics import post_metrics
from support.posts import Post, normalise, save_posts


# ---- Replies are styles --------------------------------------------------------------------------

TEXTS = ["How nice", "So sorry", "Well, well", "how NICE!", "qwerty"]


class Exact:
    """An embedder for which texts are equal or unrelated: a direction for each wording."""

    def __init__(self):
        self.known = {}

    def __call__(self, texts):
        rows = []
        for group in texts:
            places = [self.known.setdefault(normalise(text), len(self.known)) for text in group]
            rows.append(torch.eye(64)[places])
        return torch.stack(rows)


def toy(styled):
    """A Session of two posts whose replies are in three styles, or are three people's."""
    styles = ("warm", "sorry", "dry") if styled else ()
    posts = [Post("a", "first", tuple(TEXTS[:3]), styles),
             Post("b", "second", ("Rain", "Sun", "Snow"), styles)]
    domain = data.make_domain("auto", posts, popularity=0)  # equal popularity, as people have
    s = SimpleNamespace(posts=posts, domain=domain, embedder=Exact(), agreement=None,
                        args=SimpleNamespace(flip=0.0), say=print)
    people.prepare_people(s)
    return s


def test_coverage_of_replies_is_coverage_of_styles_where_replies_are_styles(monkeypatch):
    """By enumeration: equal verdicts and advantages for every tuple of completions, and the
    expected gradient is that of the share of people pleased by a set."""
    in_double(monkeypatch)
    drawn = all_tuples(len(TEXTS), 4)
    texts = [[TEXTS[i] for i in row] for row in drawn.tolist()]
    found = []
    for styled in (True, False):
        s = toy(styled)
        posts = [s.posts[0]] * len(texts)
        right = right_by_person(s, posts, texts, range(len(texts))).double()
        shares = shares_of_people(s, posts, texts, None).double()
        found.append((right, shares, coverage_advantages(right, shares, 2)))
    for of_styles, of_people in zip(*found):
        assert of_styles.shape == of_people.shape and gap(of_styles, of_people) < 1e-6
    assert found[0][0].sum() > 0
    theta, pairs = policy(len(TEXTS), seed=3), all_tuples(len(TEXTS), 2)
    person = torch.tensor([0, 1, 2, 0, 3])[pairs]
    pleased = torch.stack([(person == j).any(1).double() for j in range(3)], 1).mean(1)
    want = exact_gradient(theta, pairs, pleased)
    got = expected_estimate(theta, drawn, found[1][2])
    assert gap(got, want * (4 / 2 - 1)) < 1e-6 and want.abs().max() > 0.01


def test_pass_at_k_for_people_is_coverage_at_k_where_replies_are_styles():
    voices = [["warm"], [], ["warm"], ["dry"], []]
    styles = ["warm", "sorry", "dry"]
    shared = {"id": "a", "post": "a", "intent": "", "drafts": ["w x", "y", "w x", "z", "q"],
              "rewards": [0.0] * 5, "finished": [True] * 5, "semantic": 0.5, "vendi": 2.0}
    by_style = post_metrics(shared | {"voices": voices, "readers": {s: 1 / 3 for s in styles}},
                            ks=(1, 2, 3))
    agrees = [[styles.index(s) for s in own] for own in voices]
    by_people = post_metrics(shared | {"agrees": agrees, "people": 3,
                                       "passed": [bool(own) for own in voices]}, ks=(1, 2, 3))
    for k in (1, 2, 3):
        assert by_people[f"recall@{k}"] == pytest.approx(by_style[f"coverage@{k}"])


def test_the_bar_is_the_one_of_an_evaluation():
    from methods.metrics import load_agreement
    s = toy(styled=False)
    trained = s.agreement
    load_agreement(s)
    assert s.agreement == trained == 0       # wordings of other posts are unrelated


# ---- Ordinary replies ----------------------------------------------------------------------------

@pytest.mark.slow
def test_two_steps_on_ordinary_replies(world, monkeypatch):
    """A random model's completions agree with nobody: a low bar lets some agree."""
    monkeypatch.setattr(people, "pair_quantile", lambda *values: (0.05, None))
    assert grpo.main(grpo_args(world, "covered", "--advantage", "coverage", "--set-size", "2",
                               "--embedder", "char-ngrams", "--batch", "4", "--k", "6",
                               "--max-new-tokens", "12")) == 0
    steps = lines(world["root"] / "covered")[:2]
    assert any(step["advantage"] > 0 and step["grad_norm"] > 0 for step in steps)


def test_posts_with_one_reply_are_refused_in_one_sentence(world, tmp_path, capsys):
    posts = [Post(str(i), f"post {i}", (f"reply {i}",)) for i in range(4)]
    save_posts(posts, tmp_path / "one.jsonl")
    flags = grpo_args(world | {"grpo": str(tmp_path / "one.jsonl")}, "refused", "--advantage",
                      "coverage", "--set-size", "2")
    said = refusal(capsys, grpo.main, *flags)
    assert "two or more to a post" in said and "--advantage maxk" in said


def test_posts_with_fewer_people_have_no_shares_of_others():
    shares = equal_shares([2, 3])
    assert shares.tolist() == [[0.5, 0.5, 0.0], pytest.approx([1 / 3] * 3)]
    s = toy(styled=False)
    posts = [Post("c", "third", ("How nice", "Rain")), s.posts[0]]
    right = right_by_person(s, posts, [["rain", "Sun"], ["So sorry", "How nice"]], range(2))
    assert right.tolist() == [[[0, 1, 0], [0, 0, 0]], [[0, 1, 0], [1, 0, 0]]]


# ---- Dirichlet weights ---------------------------------------------------------------------------

def test_dirichlet_weights_are_shares_on_average_and_zero_for_nobody():
    shares = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25] * 4])
    weights = dirichlet_weights(shares, torch.tensor([1, 2]), count=4000)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4000).double())
    assert torch.allclose(weights.mean(1), shares.double(), atol=0.02)
    assert not weights[0, :, 3].any() and float(weights[1].std()) > 0.1
    again = dirichlet_weights(shares, torch.tensor([1, 2]), count=4000)
    assert torch.equal(weights, again)


def test_dirichlet_coverage_is_the_mean_over_users_of_the_best_of_a_set():
    right = torch.randint(2, (1, 5, 3), generator=torch.Generator().manual_seed(3)).double()
    shares, seeds = torch.tensor([[0.5, 0.3, 0.2]]).double(), torch.tensor([7])
    weights = dirichlet_weights(shares, seeds)[0]
    sets = list(itertools.combinations(range(5), 2))
    values = [sum(max(float(w @ right[0, i]) for i in chosen) for w in weights) / len(weights)
              for chosen in sets]
    mean = sum(values) / len(values)
    want = [sum(v for v, chosen in zip(values, sets) if i in chosen) / 4 - mean for i in range(5)]
    got = dirichlet_coverage(right, shares, seeds, 2)
    assert gap(got[0], torch.tensor(want)) < 1e-6 and got.abs().max() > 0.01
    one = torch.ones(1, 1).double()          # of one style the weight is 1: coverage
    single = dirichlet_coverage(right[..., :1], one, seeds, 2)
    assert gap(single, coverage_advantages(right[..., :1], one, 2)) < 1e-6


# ---- Unit tests ----------------------------------------------------------------------------------

def task(test):
    fields = {"setup": "", "test": test, "names": ["f"], "head": ""}
    return Post("t", "t", ("def f(x): return x",), ("right",), tests=json.dumps(fields))


def test_a_task_is_cut_at_its_assertions():
    cut = unit_tests(task("assert f(1) == 1\ny = 2\nassert f(y) == 2"))
    assert [one["test"] for one in cut] == ["assert f(1) == 1", "y = 2\nassert f(y) == 2"]
    assert all(one["names"] == ["f"] for one in cut)
    whole = "for n in 1, 2:\n    assert f(n) == n"
    assert [one["test"] for one in unit_tests(task(whole))] == [whole]


def test_a_task_of_human_eval_is_cut_inside_its_function():
    """f = abs passes the first test and the third. `assert True` is no test."""
    whole = ("WORD = 'w'\n\ndef check(g):\n    assert True, 'said'\n    assert g(1) == 1\n"
             "    two = -2\n    assert g(two) == two\n    for n in (two,):\n        two = n\n"
             "    assert g(3) == 3\ncheck(f)\n")
    cut = unit_tests(task(whole))
    passed = []
    for one in cut:
        names = {"f": abs}
        try:
            exec(one["test"], names)
        except AssertionError:
            passed.append(False)
        else:
            passed.append(names["WORD"] == "w")
    assert passed == [True, False, True]
    assert "for n" not in cut[1]["test"] and "for n" in cut[2]["test"]


def test_of_code_the_people_are_the_unit_tests(monkeypatch):
    """f = lambda x: x passes the first two of three tests, x * x the first and the third."""
    posts = [task("assert f(1) == 1\nassert f(2) == 2\nassert f(3) == 9"), task("assert f(1) == 1")]
    domain = data.make_domain("auto", posts)

    def passes(test, text):
        names = {}
        exec(f"f = {text}", names)
        try:
            exec(test["test"], names)
        except AssertionError:
            return False
        return True
    monkeypatch.setattr(domain, "passes", passes)
    s = SimpleNamespace(domain=domain, args=SimpleNamespace(flip=0.0))
    texts = [["lambda x: x", "lambda x: x * x"], ["lambda x: x", "lambda x: 0"]]
    right = right_by_person(s, posts, texts, range(2))
    assert right.tolist() == [[[1, 1, 0], [1, 0, 1]], [[1, 0, 0], [0, 0, 0]]]
    shares = shares_of_people(s, posts, texts, None)
    assert shares.tolist() == [pytest.approx([1 / 3] * 3), [1, 0, 0]]
