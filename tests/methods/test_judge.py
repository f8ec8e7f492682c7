"""Tests of methods/judge.py."""

from types import SimpleNamespace

import pytest

from methods import judge as methods_judge
from support import posts


class Preferring:
    """A judge that prefers a place, and beyond that one text: says yes by what it is asked."""

    def __call__(self, posts, completions):
        def yes(question):
            if "Reply A" not in question:
                return 0.5
            a, b = question.partition("Reply A:\n\n")[2].partition("\n\nReply B:\n\n")[::2]
            better = "best" in a or ("worst" in b and "best" not in b)
            worse = "worst" in a or "best" in b
            # else the first place
            return 0.9 if better else 0.1 if worse else 0.7
        return [[yes(q) for q in row] for row in completions]


def test_a_judge_sees_each_pair_in_both_orders():
    """A win is one in both places; a judge that goes by the place alone gives ties, and a tie
    counts half."""
    session = SimpleNamespace(args=SimpleNamespace(judge_drafts=3), judge=Preferring())
    records = [{"drafts": ["the best one", "the worst one", "like any", "never read"]}]
    methods_judge.add_judgement(session, records,
                                SimpleNamespace(posts=[posts.Post("p", "a post",
                                                                  ("a person's reply",))]))
    judge = records[0]["judge"]
    assert judge["pairs"] == [pytest.approx([0.9, 0.9]), pytest.approx([0.1, 0.1]),
                              pytest.approx([0.7, 0.3])]
    assert all(len(judge[name]) == 3 for name in methods_judge.RUBRICS)
    from methods.metrics import judged
    assert (judged(records[0])["judge-wins"] == 0.5 and judged(records[0])["judge-ties"]
            == pytest.approx(1 / 3))
