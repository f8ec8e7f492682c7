"""Coverage without styles: the people whom a set of completions pleases are those who replied.

A post with several replies is a set of people. A completion pleases a person when it agrees with
that person's reply by the bar that an evaluation uses (support/pass_bar.py). For tasks of code the
people are the unit tests, and a completion pleases those that it passes. The verdicts are the
feature `right`, so that --advantage coverage, which knows styles, takes them too.

This is the set reward of Vector Policy Optimization (VPO, arXiv 2605.22817), E_w[max over the set
of w . r], r a completion's vector of verdicts: coverage has one-hot w, one person at a time;
coverage-dirichlet has people who weigh several replies."""

import ast
import json
import random

import torch
from torch.nn.utils.rnn import pad_sequence

from grpo import coverage_advantages
from methods.code import Code
from rewards import AgreementReward
from support.files import InputError, short
from support.pass_bar import pair_quantile, stranger_pairs
from support.registry import OBJECTIVES, set_scale
from trainer import load_embedder

BAR_POSTS = 500                  # training posts that set the bar
PEOPLE = 64                      # weights drawn for a post by coverage-dirichlet


# ---- People's own replies ------------------------------------------------------------------------

def prepare_people(session):
    """What `right` needs where there is no verifier: an embedder, and session.agreement, the cosine
    above which a completion agrees with a reply, measured on the training posts. Raises InputError
    for posts with fewer than two replies."""
    if session.domain.styles:
        return
    for post in session.posts:
        if len(post.replies) < 2:
            raise InputError("--advantage coverage covers styles, or people's own replies, two or "
                             f"more to a post: the post {short(post.id)} has {len(post.replies)}: "
                             "leave such posts out, or use --advantage maxk")
    if session.embedder is None:
        load_embedder(session)
    posts = list(session.posts)
    if len(posts) > BAR_POSTS:
        posts = random.Random("bar").sample(posts, BAR_POSTS)
    values, first, second = stranger_pairs(posts, AgreementReward(session.embedder))
    session.agreement, _ = pair_quantile(values, first, second)
    session.say(f"coverage: a completion pleases a person when its cosine to their reply is above "
                f"{session.agreement:.3g}, which 19 of 20 replies to other posts are not")


def agreement_by_reply(session, posts, texts):
    """(P, k, R) in 0, 1: does the completion agree with each of the post's replies? A post with
    fewer than R has zeros there."""
    sizes = [len(post.replies) for post in posts]
    replies = [reply for post in posts for reply in post.replies]
    people = session.embedder([replies])[0].split(sizes)
    rows = []
    for vectors, own in zip(session.embedder(texts), people):
        rows.append((own @ vectors.T > session.agreement).float().cpu())       # (its R, k)
    return pad_sequence(rows, batch_first=True).transpose(1, 2)


def equal_shares(sizes):
    """(P, R): each of a post's people has the same share; zeros where it has fewer than R."""
    return pad_sequence([torch.full((size,), 1 / size) for size in sizes], batch_first=True)


# ---- Unit tests ----------------------------------------------------------------------------------

def unit_tests(post):
    """The tests of a task of code, each alone: a list of what Code runs. A task's test is cut at
    the assertions of its function `check`, or else at those of its top level, each with all
    statements before it that are none. A test without such assertions stays whole."""
    task = json.loads(post.tests)
    tree = ast.parse(task["test"])
    checks = [node for node in tree.body if isinstance(node, ast.FunctionDef)
              and node.name == "check"]
    cut = checks[0] if checks else tree                    # HumanEval's tests are in a function
    shared = []
    tests = []
    for statement in cut.body:
        if not isinstance(statement, ast.Assert):
            shared.append(statement)
        elif not isinstance(statement.test, ast.Constant):           # `assert True` tests nothing
            tests.append([*shared, statement])
    asserted = []
    for body in tests:
        cut.body = body
        asserted.append(ast.unparse(tree))
    return [task | {"test": test} for test in asserted or [task["test"]]]


def passes_by_test(session, posts, texts):
    """(P, k, T) in 0, 1: does the completion pass each unit test?"""
    rows = []
    for post, group in zip(posts, texts):
        tests = unit_tests(post)
        verdicts = []
        for test in tests:
            verdicts.append([float(session.domain.passes(test, text)) for text in group])
        rows.append(torch.tensor(verdicts))                                    # (its T, k)
    return pad_sequence(rows, batch_first=True).transpose(1, 2)


def is_code(session):
    return isinstance(session.domain, Code)


# ---- Dirichlet weights ---------------------------------------------------------------------------

def dirichlet_weights(shares, seeds, count=PEOPLE):
    """(P, count, S) weights w of users, each summing to 1, drawn from a Dirichlet of concentration
    S times the shares (P, S), by the prompts' seeds; 0 where the share is 0."""
    drawn = []
    for row, seed in zip(shares, seeds.tolist()):
        known = row > 0
        concentration = (row[known] * int(known.sum())).double()
        generator = torch.Generator().manual_seed(seed)
        gammas = torch._standard_gamma(concentration.expand(count, -1), generator=generator)
        weights = torch.zeros(count, len(row), dtype=torch.double)
        weights[:, known] = gammas / gammas.sum(1, keepdim=True)
        drawn.append(weights)
    return torch.stack(drawn)


@OBJECTIVES.add("coverage-dirichlet", "coverage, users like several styles (arXiv 2605.22817)",
                needs=("right", "shares", "seeds", "set_size"), gradient_scale=set_scale)
def dirichlet_coverage(right, shares, seeds, n):
    """VPO's set reward (arXiv 2605.22817): f = E_w[max over the set of w . r], r the verdicts by
    style or person, w ~ Dirichlet: coverage_advantages with PEOPLE users whom a completion pleases
    by their own weights of what it is right in."""
    weights = dirichlet_weights(shares, seeds).to(right)                       # (P, M, S)
    graded = right @ weights.mT                                                # (P, k, M)
    even = torch.full(weights.shape[:2], 1 / weights.shape[1]).to(right)
    return coverage_advantages(graded, even, n)
