"""Tests of methods/reward_model.py."""

import copy
import gzip
import json
import math
import types

import pytest
import torch
from safetensors.torch import load_file

import data
import evaluate
import grpo
import lora
import polylora
import rewards
import trainer
from helpers import (
    QWEN3_GOLDEN, SHORT, STOP, Share, both_take, build_model, command, gap, grpo_args,
    load_tiny, measured, nearly, places, refusal, right_padded, sft_args, tiny_qwen,
    train_heads, whole_and_cut,
)
from methods import reward_model
from methods import rewards as methods_rewards
from model import Qwen3
from support import checkpoint
from support import files as support_files
from support.files import InputError
from support import posts
from trainer import Visit


# ---- Embeddings and scores -----------------------------------------------------------------------

def test_scores(tmp_path):
    want = QWEN3_GOLDEN["heads"]
    model = load_tiny(tmp_path, True, head="score")
    tokens, lengths = right_padded(want["sequences"], pad=STOP)
    with torch.no_grad():
        got, padding = model.score(tokens, lengths), model.score(tokens,
                                                                 torch.full((2,), tokens.shape[1]))
    assert got.shape == (2,) and gap(got, want["scores"]) < 1e-4
    # read at the last column
    assert gap(padding, want["scores"]) > 0.05


def test_heads_that_a_checkpoint_lacks_are_refused(tmp_path):
    with pytest.raises(InputError, match="score"):
        load_tiny(tmp_path / "a", True).score(torch.tensor([[7, 8]]), torch.tensor([2]))
    with pytest.raises(InputError, match="head"):
        load_tiny(tmp_path / "b", False, head="score")(torch.tensor([[7, 8]]))


def write(path, *lines):
    (gzip.open if path.name.endswith("gz") else open)(path,
                                                      "wt").write("\n".join(map(json.dumps, lines))
                                                                  + "\n")
    return path


# ---- Preferences ---------------------------------------------------------------------------------

def test_picks_likes_and_other_people_s_replies(tmp_path):
    picks = [{"post": "Hi", "drafts": ["a", "b", "c"], "pick": 1},
             {"post": "Hi", "drafts": ["b", "d"], "pick": 1}]
    found = reward_model.load_preferences(write(tmp_path / "picks.jsonl", *picks))
    assert [(p.post.replies, p.likes) for p in found] == [(("a", "b", "c"), [0, 1, 0]),
                                                          (("b", "d"), [0, 1])]
    assert reward_model.usable(found, "auto", "x") == ("likes", found)
    tweets = [{"tweet": "Hi", "reply": "a", "reply_likes": 3},
              {"tweet": "Yo", "reply": "z", "reply_likes": 3},
              {"tweet": "hi!", "reply": "b", "reply_likes": 9.5},
              {"tweet": "Yo", "reply": "y", "reply_likes": 3}]
    found = reward_model.load_preferences(write(tmp_path / "likes.jsonl.gz", *tweets))
    assert [(p.post.replies, p.likes) for p in found] == [(("a", "b"), [3, 9.5]),
                                                          (("z", "y"), [3, 3])]
    # equal likes say nothing
    kind, kept = reward_model.usable(found, "auto", "x")
    assert (kind == "likes" and kept == found[:1] and reward_model.usable(found, "others", "x")
            == ("others", found))
    plain = [{"post": "Hi", "replies": ["a", "b"]}, {"post": "Yo", "replies": ["c"]}]
    found = reward_model.load_preferences(write(tmp_path / "posts.jsonl", *plain))
    assert reward_model.usable(found, "auto", "x")[0] == "others" and found[0].likes is None
    with pytest.raises(InputError, match="nothing to compare"):
        reward_model.usable(found, "likes", "x")
    with pytest.raises(InputError, match="nothing to compare"):
        reward_model.usable(found[:1], "auto", "x")


@pytest.mark.parametrize("line", ['{"post": "Hi", "drafts": ["a", "b"], "pick": 2}',
                                  '{"post": "Hi", "drafts": ["a"]}',
                                  '{"post": "Hi", "drafts": ["a", "b"], "pick": -1}', "[1]", "{",
                                  '{"post": "Hi", "drafts": 3, "pick": 0}',
                                  '{"post": "Hi", "drafts": ["a", "b"], "pick": true}',
                                  '{"post": "Hi", "reply": "a", "reply_likes": "many"}',
                                  '{"post": "Hi", "reply": "a", "reply_likes": NaN}'])
def test_a_bad_line_is_one_sentence_or_left_out(tmp_path, capsys, line):
    path = tmp_path / "picks.jsonl"
    path.write_text('{"post": "Hi", "drafts": ["a", "b"], "pick": 0}\n\n' + line + "\n")
    with pytest.raises(InputError, match="picks.jsonl, line 3: "):
        reward_model.load_preferences(path)
    assert (len(reward_model.load_preferences(path, True)) == 1
            and "1 bad lines" in capsys.readouterr().err)
    with pytest.raises(InputError, match="no file"):
        reward_model.load_preferences(tmp_path / "none")


class First:
    """A random.Random that takes the n-th choice."""
    def __init__(self, n):
        self.n = n

    def choice(self, items):
        return items[self.n % len(items)]

    def randrange(self, low, high):
        return low + self.n % (high - low)


def test_pairs_are_of_unequal_likes_or_of_other_posts():
    post = lambda *replies: posts.Post("x", "Hi", replies)
    liked = [reward_model.Preferences(post("a", "b", "c"), [2, 5, 2])]
    assert {reward_model.draw_pair(liked, Visit(0, 0), "likes", First(n))
            for n in range(9)} == {("b", "a"), ("b", "c")}
    three = [reward_model.Preferences(post(*r), None) for r in (("a", "b"), ("c",), ("d",))]
    drawn = {reward_model.draw_pair(three, Visit(0, 0), "others", First(n)) for n in range(9)}
    assert {b for _, b in drawn} == {"c", "d"} and {a for a, _ in drawn} == {"a", "b"}
    assert {reward_model.draw_pair(three, Visit(2, 0), "others", First(n))[1]
            for n in range(9)} <= {"a", "b", "c"}
    assert {reward_model.draw_pair(three[:2], Visit(1, 0), "others", First(n))[1]
            for n in range(9)} == {"a", "b"}


# ---- The members ---------------------------------------------------------------------------------

def made(count=3, **changes):
    heads = reward_model.new_heads(build_model(**changes), count, 2, 6, seed=5)
    draw = torch.Generator().manual_seed(3)
    for member in heads.members:
        for name, t in member.items():
            if "lora_B" in name:
                t.data.copy_(0.2 * torch.randn(t.shape, generator=draw))
    return heads


TOKENS, LENGTHS = torch.tensor([[3, 9, 4, 17, 30], [2, 8, 1, 0, 0],
                                [5, 6, 7, 8, 0]]), torch.tensor([5, 3, 4])


def alone(heads, m):
    """Member m's scores by a model that is it."""
    model = copy.deepcopy(heads.model)
    for name, p in lora.adapter_state(model).items():
        p.data.copy_(heads.members[m][name])
    return (model.last_hidden(TOKENS, LENGTHS) @ heads.members[m]["score"].T)[:, 0]


def test_each_member_scores_as_if_it_were_alone_and_has_its_own_gradient():
    heads = made()
    scores = heads.scores(TOKENS, LENGTHS)
    assert scores.shape == (3, 3)
    for m in range(3):
        assert gap(scores[m], alone(heads, m)) < 1e-5
    assert min(gap(scores[i], scores[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 0.01
    scores[1].sum().backward()
    assert all(t.grad is not None for t in heads.members[1].values())
    assert all(float(t.grad.abs().max()) == 0 for m in (0, 2) for t in heads.members[m].values())
    assert all(p.grad is None and not p.requires_grad for p in heads.model.parameters())
    assert len(heads.parameters_of_members()) == sum(len(m) for m in heads.members)


def test_members_start_at_the_base_with_their_own_initialisation():
    heads = reward_model.new_heads(build_model(), 2, 2, 6, seed=5)
    base = build_model()
    for m in (0, 1):
        want = base.last_hidden(TOKENS, LENGTHS) @ heads.members[m]["score"].T
        assert gap(heads.scores(TOKENS, LENGTHS)[m], want[:, 0]) < 1e-5
    one, two = heads.members
    assert all(not torch.equal(one[n], two[n]) for n in one if "lora_B" not in n)
    again = reward_model.new_heads(build_model(), 2, 2, 6, seed=5).members[1]
    assert all(torch.equal(again[n], two[n]) for n in two)
    many = torch.cat([m["score"] for m in reward_model.new_heads(build_model(), 40, 1, 1,
                                                                 targets=("q_proj",)).members])
    assert many.std().item() == pytest.approx(24 ** -0.5, rel=0.1)


def test_member_diversity_of_copies_and_of_orthogonal_members():
    member = lambda rows: {"q.lora_A.weight": torch.tensor(rows),
                           "q.lora_B.weight": torch.ones(2, 1), "score": torch.ones(1, 4)}
    spread = lambda *rows: reward_model.Heads(build_model(),
                                              [member(r) for r in rows]).spread().item()
    assert spread([[1.0, 2, 0, 0]], [[2.0, 4, 0, 0]]) == pytest.approx(1)
    assert spread([[1.0, 0, 0, 0]], [[0.0, 0, 1, 0]]) == pytest.approx(2 ** 0.5)
    # singular values 3 and 4
    assert spread([[3.0, 0, 0, 0]], [[0.0, 0, 4, 0]]) == pytest.approx(7 / 5)
    two = [{**member([[1.0, 0, 0, 0]]), "k.lora_A.weight": torch.tensor([[3.0, 0]])},
           {**member([[0.0, 0, 1, 0]]), "k.lora_A.weight": torch.tensor([[0.0, 4]])}]
    assert reward_model.Heads(build_model(),
                              two).spread().item() == pytest.approx((2 ** 0.5 + 7 / 5) / 2)


def test_bradley_terry_of_the_members_mean_by_hand():
    better, worse = torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[0.5, 1.0], [0.5, 1.0]])
    got = reward_model.preference_loss(better, worse).tolist()
    assert got == pytest.approx([math.log(1 + math.exp(-1.5)), math.log(2)])


def test_the_reward_is_the_mean_minus_the_standard_deviation(parts):
    posts, tokenizer, model = parts
    heads = reward_model.new_heads(copy.deepcopy(model), 2, 2, 6, seed=5)
    domain, texts = data.make_domain("auto", posts), [["Good for you!", "No."], ["Yes, do.", "?"]]
    reward = lambda penalty: reward_model.HeadsReward(heads, tokenizer, domain,
                                                      penalty=penalty)(posts[:2], texts)
    ids = [[methods_rewards.ModelReward(model, tokenizer, domain).chat(p, t) for t in ts]
           for p, ts in zip(posts, texts)]
    tokens, lengths = reward_model.padded([x for ts in ids for x in ts], "cpu")
    assert (tokens.shape == (4, max(map(len, ids[0] + ids[1])))
            and lengths.tolist() == [len(x) for ts in ids for x in ts])
    with torch.no_grad():
        a, b = heads.scores(tokens, lengths).view(2, 2, 2)
    for penalty in (0.0, 1.0, 2.5):
        assert gap(torch.tensor(reward(penalty)), (a + b) / 2 - penalty * (a - b).abs() / 2) < 1e-5


# ---- The step and the command --------------------------------------------------------------------

def session_of(parts, *flags, ranks=None, members="2"):
    posts, tokenizer, model = parts
    s = trainer.Session.__new__(trainer.Session)
    s.args = rewards.parser().parse_args(["train", "--model", "-", "--data", "-", "--out", "-",
                                          "--batch", "6", "--members",
                                          members, "--pairs", "others", "--rank", "2",
                                          "--seed", "4", *flags])
    s.ranks, s.stage, s.posts, s.tokenizer = ranks or Share(), "reward", posts, tokenizer
    s.preferences = [reward_model.Preferences(p, None) for p in posts]
    s.domain, s.model = data.make_domain("auto", posts), copy.deepcopy(model)
    s.heads = reward_model.new_heads(s.model, s.args.members, 2, 6, seed=9)
    s.params = s.heads.parameters_of_members()
    s.reward = reward_model.HeadsReward(s.heads, tokenizer, s.domain)
    return s


def step_of(parts, *flags, ranks=None, members="2"):
    s = session_of(parts, *flags, ranks=ranks, members=members)
    tally = reward_model.preference_step(s, 0)
    grads = {f"{m}.{n}": torch.zeros_like(t) if t.grad is None else t.grad
             for m, member in enumerate(s.heads.members)
             for n, t in member.items()}
    return grads, tally, s


@pytest.mark.slow
def test_the_step_is_the_gradient_of_the_mean_loss_minus_diversity(parts):
    """However pairs are packed, and on two ranks; the spread is counted once."""
    got, tally, s = step_of(parts, "--member-spread", "0.5")
    import random
    losses, apart = [], []
    for visit in trainer.batch_visits(12, 6, 0, 4):
        pair = reward_model.draw_pair(s.preferences, visit, "others",
                                      random.Random(s.seed_for("pair", 0, visit)))
        assert (pair[0] in s.posts[visit.index].replies
                and pair[1] not in s.posts[visit.index].replies)
        scores = [s.heads.scores(*reward_model.padded([s.reward.chat(s.posts[visit.index], t)],
                                                      "cpu"))[:, 0] for t in pair]
        losses.append(-torch.nn.functional.logsigmoid(scores[0].mean() - scores[1].mean()))
        apart.append(float((scores[0] - scores[1]).std(correction=0)))
    loss = torch.stack(losses).mean() - 0.5 * s.heads.spread()
    want = torch.autograd.grad(loss, s.params)
    nearly(got, dict(zip(got, want)))
    means = tally.means(s.ranks, reward_model.LOGGED)
    assert means["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert means["spread"] == pytest.approx(s.heads.spread().item()) and 0 <= means["accuracy"] <= 1
    assert means["disagreement"] == pytest.approx(sum(apart) / 6, rel=1e-4)
    cut, _, _ = step_of(parts, "--member-spread", "0.5", "--micro-tokens", "60")
    nearly(cut, got)
    both_take(lambda ranks: step_of(parts, "--member-spread", "0.5", ranks=ranks)[0], got)
    single, tally, _ = step_of(parts, members="1")
    assert "spread" not in tally.sums and max(float(g.abs().max()) for g in single.values()) > 0


@pytest.mark.slow
def test_trained_members_learn_resume_and_reward(parts, files, tmp_path):
    """The whole command on picks of the longer reply: broken off, resumed bit for bit, and read
    as --reward model."""
    posts, tokenizer, model = parts
    lines = [{"post": p.post, "drafts": sorted(p.replies, key=len)[::5][:2], "pick": 1}
             for p in posts]
    picks = write(tmp_path / "picks.jsonl", *[x for x in lines if len(x["drafts"]) == 2])
    small = ("--steps 7 --batch 6 --members 2 --rank 2 --lr 3e-2 --save-every 2 --device cpu "
             "--warmup 1 --dropout 0.1").split()
    go = command(rewards.main, tmp_path, "train", *files[:2], "--data", str(picks), *small)
    members = whole_and_cut(go, reward_model, "preference_step", 3,
                            parts=("adapter-0", "adapter-1"))
    assert all("base_model.model.score.weight" in tensors for tensors in members.values())
    log = [json.loads(x) for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert log[6]["loss"] < log[0]["loss"] and log[6]["accuracy"] > log[0]["accuracy"]
    session = types.SimpleNamespace(args=types.SimpleNamespace(reward_model=str(tmp_path / "whole"),
                                                               dtype="auto", spread_penalty=0.5,
                                                               nf4=False),
                                    run=None, ranks=Share(), domain=data.make_domain("auto", posts),
                                    say=print)
    reward = rewards.make_reward("model", session)
    assert (isinstance(reward, reward_model.HeadsReward) and reward.penalty == 0.5
            and len(reward.heads.members) == 2)
    rated = reward(posts, [x["drafts"] for x in lines])
    assert sum(b > a for a, b in rated) > 0.7 * len(rated)
    config = support_files.read_json(tmp_path / "whole" / "adapter-1" / "adapter_config.json")
    support_files.write_json(tmp_path / "whole" / "adapter-1" / "adapter_config.json",
                             config | {"modules_to_save": None})
    assert (reward_model.member_folders(tmp_path / "whole") == []
            and reward_model.member_folders(tmp_path) == [])
    support_files.write_json(tmp_path / "whole" / "adapter-1" / "adapter_config.json", config)
    start = load_file(tmp_path / "whole" / "adapter-0" / "adapter_model.safetensors")
    start.pop("base_model.model.score.weight")
    reward_model.save_file(start, tmp_path / "whole" / "adapter-0" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="does not fit its base"):
        rewards.make_reward("model", session)


@pytest.mark.parametrize("flags", ["--members 0", "--member-spread -1", "--checkpointing",
                                   "--targets nothing", "--rank 0"])
def test_a_wrong_flag_of_reward_training_is_one_sentence(files, tmp_path, capsys, flags):
    code = rewards.main(["train", *files, "--out", str(tmp_path / "run"), "--steps", "1",
                         "--device", "cpu", *flags.split()])
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert code == 2 and len(said) == 1 and not (tmp_path / "run").exists()


def test_ranges_and_help_know_the_flags():
    said = " ".join(rewards.parser()._subparsers._group_actions[0].choices[
        "train"].format_help().split())
    assert "--members" in said and "UP-RLHF" in said and "reply_likes" in said
    assert grpo.parser().parse_args(["--start", "-", "--data", "-",
                                     "--out", "-"]).spread_penalty == 1.0


# ---- Peers ---------------------------------------------------------------------------------------

@pytest.mark.peers
def test_transformers_and_peft_score_alike(parts, tmp_path):
    """AutoModelForSequenceClassification under PEFT reads each member's folder; its scores are
    ours."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    posts, tokenizer, model = parts
    model.save_pretrained(tmp_path / "base")
    heads = reward_model.new_heads(copy.deepcopy(model), 2, 3, 6, seed=5)
    for member in heads.members:
        for name, t in member.items():
            t.data.add_(0.1 * torch.randn(t.shape))
    reward_model.save_heads(heads, tmp_path, str(tmp_path / "base"))
    rows = [torch.randint(7, 300, (n,)).tolist() for n in (9, 4, 6)]
    ours = heads.scores(*reward_model.padded(rows, "cpu"))
    for m in (0, 1):
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=1, dtype=torch.float32
        )
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / f"adapter-{m}").eval()
        with torch.no_grad():
            scores = torch.cat([theirs(torch.tensor([row])).logits[:, 0] for row in rows])
        assert gap(scores, ours[m]) < 1e-4 and gap(scores, ours[1 - m]) > 0.01


# ---- What is replaced under its name -------------------------------------------------------------

@pytest.mark.slow
def test_a_retrained_reward_model_invalidates_old_scores(root, capsys):
    """Old scores stayed, and a resumed run went on with other rewards."""
    w = places(root)
    by = ["--reward", "model", "--reward-model", train_heads(w, 1)]
    bare = ["--base-out", root / "bare", "--model", w["model"], "--data", w["eval"], *by]
    assert measured(capsys, *bare) == "1 of 1 runs" and measured(capsys, *bare) == "0 of 1 runs"
    assert polylora.main(sft_args(w, "lora")) == 0
    chosen = ["--decoder", "best-of-n", "--best-by", "model", *by[2:], w["lora"],
              "--data", w["eval"]]
    assert measured(capsys, *chosen) == "1 of 1 runs" and measured(capsys, *chosen) == "0 of 1 runs"
    assert measured(capsys, *chosen, "--spread-penalty", "5") == "1 of 1 runs"
    assert grpo.main(grpo_args(w, "run", *by)) == 0
    (root / "run" / "done.json").unlink()
    train_heads(w, 2)
    assert measured(capsys, *bare) == "1 of 1 runs"
    assert "another reward model" in refusal(capsys, grpo.main,
                                             *grpo_args(w, "run", *by, "--resume"))
    assert reward_model.reward_model_hash(w["model"]) == checkpoint.model_hash(w["model"], None)


# ---- Files that stand in the way -----------------------------------------------------------------

def test_a_tied_embedding_is_no_token_head_of_a_reward_model(tmp_path):
    """With tied embeddings a reward model passed for a judge, and could be fine-tuned as a
    writer."""
    for tie in (True, False):
        folder = tmp_path / str(tie)
        tiny_qwen(tie, lm_head=False, score_head=True).save_pretrained(folder)
        model = Qwen3.from_pretrained(folder)
        assert model.has_score and not model.has_logits
        tiny_qwen(tie).save_pretrained(folder)
        assert Qwen3.from_pretrained(folder).has_logits


# ---- Picks and the reward models that learn from them --------------------------------------------

def styled_posts(root, count=12):
    """Posts with replies in two styles, of the domain `voices`."""
    rows = [{"id": str(i), "post": f"My {topic} let me down, part {i}",
             "replies": {"kind": f"Poor {topic} {i}", "terse": f"No {topic} {i}"}}
            for i in range(count) for topic in ["kettle bus lecture garden".split()[i % 4]]]
    path = root / "styled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def picked(monkeypatch, run, place, posts=("My tram sings", "Another one")):
    """Picks of two posts, as a person makes them at the prompt of `drafts`."""
    answers = [line for post in posts for line in (post, "1")]
    monkeypatch.setattr("sys.stdin", answers)
    assert evaluate.main(["drafts", str(run), "--picks", str(place), "--k", "3", *SHORT]) == 0
    rows = [json.loads(line) for line in place.read_text().splitlines()]
    for row in rows:                         # of a random model: two drafts that differ
        row["drafts"], row["pick"], row["reply"] = ["one draft", "another draft"], 0, "one draft"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.slow
def test_a_reward_model_uses_the_chat_format_of_the_run_that_was_picked_from(root, capsys,
                                                                             monkeypatch):
    """Picks from a run with styles were learnt in the format of `replies`, and asked by grpo.py
    in the run's own."""
    w = places(root) | {"sft": styled_posts(root)}
    assert polylora.main(sft_args(w, "lora")) == 0
    place = root / "picks.jsonl"
    rows = picked(monkeypatch, root / "lora", place)
    assert {row["domain"] for row in rows} == {"voices"}
    asked_for, encode = [], data.encode_chat
    monkeypatch.setattr(data, "encode_chat", lambda tokenizer, messages, **more: (
        asked_for.append(messages), encode(tokenizer, messages, **more))[1])
    train = ["train", "--model", w["model"], "--data", str(place), "--steps", "2", "--batch", "2",
             "--rank", "2", "--out"]
    assert rewards.main([*train, str(root / "heads")]) == 0
    assert {chat[0]["content"] for chat in asked_for} == {"My tram sings", "Another one"}
    asked_for.clear()
    capsys.readouterr()
    by = ["--reward", "model", "--reward-model", str(root / "heads"), "--data", w["sft"]]
    assert grpo.main(grpo_args(w, "rl", *by)) == 0
    judged = [chat[0]["content"] for chat in asked_for if chat[-1]["role"] == "assistant"]
    # the post itself, as in training
    assert judged and all(text.startswith("My ") for text in judged)
    assert "judges here as" not in capsys.readouterr().out

    place.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "domain"}) + "\n"
                             for row in rows))
    # picks that do not say it
    assert rewards.main([*train, str(root / "older")]) == 0
    assert grpo.main(grpo_args(w, "rl2", *by[:3], str(root / "older"), *by[4:])) == 0
    assert "judges here as 'voices' does" in capsys.readouterr().out


def test_picks_from_two_domains_are_not_mixed(root, capsys, monkeypatch):
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    place = root / "picks.jsonl"
    rows = picked(monkeypatch, root / "lora", place)
    assert {row["domain"] for row in rows} == {"replies"}
    rows[1]["domain"] = "voices"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["train", "--model", w["model"], "--data", place, "--steps", "1", "--batch", "2",
             "--rank", "2", "--out", root / "heads"]
    assert "replies, voices" in refusal(capsys, rewards.main, *train)
    assert rewards.main([*map(str, train), "--domain", "voices"]) == 0
    assert support_files.read_json(root / "heads" / "done.json")["domain"]["domain"] == "voices"
    rows[1]["domain"] = "nonsense"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "no domain 'nonsense'" in refusal(capsys, rewards.main, *train[:-1], root / "other")
