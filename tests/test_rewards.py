"""Tests of rewards.py."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
import grpo
import polylora
import rewards
import trainer
from helpers import grpo_args, grpo_session, places, refusal, rl, session, sft_args, step_gradient
from methods import metrics
from methods import pocket
from rewards import AgreementReward, VerifierReward
from support import draws
from support import files
from support.files import InputError
from support import posts as support_posts
from support.posts import Post
from trainer import Visit


# ---- Rewards -------------------------------------------------------------------------------------

def test_a_user_is_drawn_by_popularity_for_each_prompt():
    """One fixed reader a post would teach the model to guess him; drafts of other voices earn
    nothing."""
    posts = pocket.pocket_posts(60, seed=2)
    domain = data.make_domain("pocket", posts)
    reward, seen = VerifierReward(domain), {v: 0 for v in domain.styles}
    completions = [[*p.replies, "not a reply"] for p in posts]
    for step in range(20):
        seeds = [1000 * step + i for i in range(60)]
        got = reward(posts, completions, seeds)
        assert (all(sum(g) == 1 and g[-1] == 0 for g in got)
                and got == reward(posts, completions, seeds))
        for g, p in zip(got, posts):
            seen[p.styles[g.index(1.0)]] += 1
    assert len({tuple(reward(posts[:1], completions[:1], [s])[0]) for s in range(20)}) > 1
    for style, share in domain.popularity_of(posts[0]).items():
        assert abs(seen[style] / 1200 - share) < 0.06
    valid = VerifierReward(domain, any_style=True)
    assert valid(posts, completions, range(60)) == [[1.0] * 6 + [0.0]] * 60
    both = VerifierReward(domain, valid_weight=0.25)(posts, completions, range(60))
    assert all(sorted(g) == [0.0] + [0.25] * 5 + [1.25] for g in both)
    noisy = [VerifierReward(domain, any_style=True, flip=0.15)(posts, completions, range(i, i + 60))
             for i in (0, 0, 60, 120)]
    assert noisy[0] == noisy[1] != noisy[2]
    inverted = [r != w for rs in noisy[1:] for g in rs for r, w in zip(g, [1.0] * 6 + [0.0])]
    assert sum(inverted) / len(inverted) == pytest.approx(0.15, abs=0.03)
    with pytest.raises(InputError, match="by style"):
        VerifierReward(data.Replies([]))


def test_agreement_is_similarity_to_the_nearest_human_reply():
    vectors = {"north": [0.0, 1], "east": [1.0, 0], "north-east": [0.6, 0.8], "south": [0.0, -1]}
    embed = lambda texts: torch.tensor([[vectors[t] for t in ts] for ts in texts])
    posts = [Post("1", "p", ("north", "east")), Post("2", "q", ("south",))]
    got = AgreementReward(embed)(posts, [["north-east", "south"], ["north-east", "south", "north"]])
    assert got == [pytest.approx([0.8, 0]), pytest.approx([-0.8, 1, -1])]


# ---- The step, on a real session around a tiny model ---------------------------------------------

def test_rewards_are_computed_for_the_users_of_the_step(parts):
    """Who reads a draft depends on seed, step and visit, apart from what drew the draft itself:
    from the sampler's own stream the reader would be no chance beside the draft."""
    s, asked = rl(parts), []
    plain = s.reward
    s.reward = lambda posts, completions, seeds: (asked.append((posts, list(seeds))),
                                                  plain(posts, completions, seeds))[1]
    visits = [trainer.Visit(3, 0), trainer.Visit(3, 1), trainer.Visit(1, 0)]
    for step in (0, 5):
        group = grpo.collect(s, visits, step).features
        posts, seeds = asked.pop()
        assert posts == [s.posts[v.index] for v in visits] and group.seeds.tolist() == seeds
        assert seeds == [files.seed_of(4, "reader", step, s.posts[v.index].key, v.epoch)
                         for v in visits]
        assert not set(seeds) & {s.seed_for(s.stage, step, v) for v in visits}


def test_a_gate_by_reward_does_not_ask_the_reward_again(parts):
    """A judge or a reward model would be paid twice, and noise be drawn anew."""
    s, asked = rl(parts, "--gate", "none"), []
    plain = s.reward
    s.reward = lambda *a: (asked.append(a), plain(*a))[1]
    s.gate = polylora.Gate.__new__(polylora.Gate)
    s.gate.session, s.gate.name, s.gate.low, s.gate.high = s, "reward", 0.0, 0.5
    features = grpo.collect(s, [trainer.Visit(3, 0)], 0).features
    assert len(asked) == 1
    assert torch.equal(features.quality, (features.rewards / 0.5).clamp(0, 1))


# ---- Every entry of the registries takes steps ---------------------------------------------------

def test_label_noise_is_the_same_for_every_caller(parts):
    """Of 15% of verdicts turned round, D's gate and the coverage objective saw none: in a study
    of noise the arms with D were told more than their rivals."""
    s, clean = (grpo_session(parts, "--gate", "verifier", "--label-noise", share,
                             "--advantage", "coverage", "--set-size", "2")
                for share in ("0.3", "0"))
    visits = trainer.batch_visits(len(s.posts), 6, 0, 1)
    for x in (s, clean):
        x.domain.styles_of = lambda post, text: x.domain.styles[len(text) % 2:1]
        x.gate = polylora.Gate(x, "verifier")
    got, want, again = (grpo.collect(x, visits, 0).features for x in (s, clean, s))
    assert torch.equal(got.quality, again.quality) and torch.equal(got.right, again.right)
    assert torch.equal(got.valid, want.valid) and torch.equal(want.right.amax(-1), want.valid)
    assert (torch.equal(want.quality, want.valid)
            and 0 < (got.quality != want.quality).float().mean() < 0.7)
    assert 0.15 < (got.right != want.right).float().mean() < 0.45
    many = draws.with_label_noise(torch.ones(50, 40), 0.15, range(50), "x")
    assert many.mean() == pytest.approx(0.85, abs=0.03)
    assert not torch.equal(many, draws.with_label_noise(torch.ones(50, 40), 0.15, range(50),
                                                           "y"))
    both = rewards.VerifierReward(data.make_domain("auto", s.posts), any_style=True,
                                  valid_weight=4.0, flip=0.3)
    earned = [r for row in both(s.posts, [["?"] * 60 for _ in s.posts], range(12)) for r in row]
    assert sum(r >= 4 for r in earned) / 720 == pytest.approx(0.3, abs=0.06)


def test_agreement_embeds_in_one_call_on_every_rank():
    """A call a post: with --shard, ranks whose posts have other numbers of replies waited for
    ever."""
    calls = []

    def embed(groups):
        calls.append(groups)
        return torch.eye(9)[torch.tensor([[len(t) for t in texts] for texts in groups])]
    session = SimpleNamespace(embedder=embed, agreement=0.5)
    posts = [support_posts.Post("1", "p", ("aa",)), support_posts.Post("2", "q", ("a", "aaa")),
             support_posts.Post("3", "r", ("aaaa", "a"))]
    completions = torch.eye(9)[torch.tensor([[1, 2]] * 3)]
    records = [{}, {}, {}]
    metrics.add_agreement(session, records, SimpleNamespace(posts=posts, embeddings=completions))
    assert records == [{}, {"agrees": [[0], []], "people": 2}, {"agrees": [[1], []], "people": 2}]
    first = SimpleNamespace(posts=posts[:1], embeddings=completions[:1])
    metrics.add_agreement(session, [{}], first)
    assert len(calls) == 2


# ---- Drafts chosen by a reward -------------------------------------------------------------------

def test_agreement_with_a_post_that_has_no_reply_is_refused_before_the_first_step(root, capsys):
    """It ended in a traceback at the first such post."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    rows = [{"post": f"number {i} broke", "replies": ["Oh no", "Poor you"]} for i in range(6)]
    Path(w["grpo"]).write_text("".join(json.dumps(row) + "\n"
                                       for row in [*rows, {"prompt": "a tale of kettles"}]))
    assert "has no reply" in refusal(capsys, grpo.main,
                                     *grpo_args(w, "never", "--domain", "replies"))
    assert not (root / "never").exists()


def test_a_step_asks_the_verifier_once_about_each_completion(parts):
    """Reward, gate, objective and log all need the verdict; running a program four times is four
    times the cost."""
    flags = ["--advantage", "coverage", "--set-size", "2", "--gate", "verifier",
             "--reward", "reader", "--valid-weight", "0.5",
             "--diversity-weight", "1"]
    s = rl(parts, *flags)
    s.reward = rewards.make_reward("reader", s)
    asked, judge, sampled, sample = [], s.domain.judge, [], s.sample_completions
    s.domain.judge = lambda post, text: (asked.append((post.id, text)), judge(post, text))[1]

    def sample_and_note(visits, *more):
        drawn = sample(visits, *more)
        sampled.append((visits, drawn[2]))
        return drawn
    s.sample_completions = sample_and_note
    step_gradient(s)
    (visits, texts), = sampled
    completions = {(s.posts[visit.index].id, text) for visit, group in zip(visits, texts)
                   for text in group}
    assert len(completions) > 12 and sorted(asked) == sorted(completions)


def test_training_and_evaluation_use_one_verifier(parts):
    """With rules of its own for the evaluation, a study measures something else than it trains."""
    s = session(parts, grpo.parser(), ["--start", "-", "--reward", "valid", "--k", "4"],
                stage="grpo")
    s.reward = rewards.make_reward("valid", s)
    strange = lambda post, text: tuple(s.domain.styles[len(text) % 3 - 1:len(text) % 3])
    s.domain.styles_of = strange
    s.args.decoder, s.agreement, s.judge, s.selector = "sampling", None, None, None
    visits = [Visit(i, 0) for i in range(3)]
    drawn = grpo.collect(s, visits, 0)
    records = evaluate.make_records(s, [0, 1, 2], drawn.samples, drawn.features.texts)
    assert [[float(bool(v)) for v in r["voices"]]
            for r in records] == drawn.features.rewards.tolist()
    assert 0 < float(drawn.features.rewards.mean()) < 1
    found = [metrics.separation(*apart(s, r)) for r in records]
    assert any(found) and [r.get("separation") for r in records] == pytest.approx(found, abs=1e-6)


def apart(s, record):
    """The cosine distances of a record's right drafts, each wording once, and their voices."""
    right = {text: tuple(styles) for text, styles in zip(record["drafts"], record["voices"])
             if styles}
    vectors = s.embedder([list(right)])[0].double()
    return (1 - vectors @ vectors.T).float().numpy(), list(right.values())
