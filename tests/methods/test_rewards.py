"""Tests of methods/rewards.py."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import rewards
from methods import judge
from methods import reward_model
from methods import rewards as methods_rewards
from methods.rewards import JudgeReward, RelevanceReward, reply_form
from model import Qwen3
from support import files
from support import posts as support_posts
from support.posts import Post


# ---- Rewards -------------------------------------------------------------------------------------

def test_relevance_rewards_no_copies_repetition_or_single_words():
    """A reward of cosine alone is hacked by echoing the post."""
    form, post = reply_form, "my bus is late again this morning"
    assert (form(post, "oh no, that is annoying") == 1 and form(post, post) == 0
            and form(post, "") == 0)
    assert form(post, "ha ha ha ha ha") == pytest.approx(1 / 4)
    assert form(post, "oh my") == pytest.approx(2 / 3)
    assert form(post, "my bus is late too") == pytest.approx(1 / 3) and form(post, "my bus is") == 0
    assert form(post, " ".join(map(str, range(120)))) == pytest.approx(0.5)
    embed = lambda texts: F.normalize(torch.tensor([[[1.0, 0], [1, 0], [0, 1], [-1, 0]]]), dim=-1)
    completions = ["oh no, how sad", "so very far off", "the very opposite of it"]
    reward = RelevanceReward(embed, data.Replies([]))
    assert reward([Post("1", "post", ("r",))], [completions]) == [pytest.approx([1, 0.5, 0])]


def test_the_judge_separates_more_than_fifty_completions_in_bf16(parts):
    """Two logits near 20, rounded to bf16, are an eighth apart or equal: some ten different
    probabilities among 4,000."""
    _, tokenizer, model = parts
    judge = JudgeReward(model, tokenizer, data.Replies([]))
    draws = torch.Generator().manual_seed(0)
    hidden = (1 + 0.1 * torch.randn(4000, 24, generator=draws)).bfloat16()
    heads = (20 / 24 + 0.3 * torch.randn(2, 24, generator=draws)).bfloat16()
    rounded = (hidden @ heads.t()).float()
    assert 15 < rounded.mean() < 25 and len(set(rounded.softmax(-1)[:, 0].tolist())) < 100
    judge.model = SimpleNamespace(last_hidden=lambda tokens, lengths: hidden,
                                  head_weight=lambda: Rowed(heads))
    assert len(set(judge.values(None, None).tolist())) > 1000


class Rowed:
    """A head of which only the rows of two words are asked for."""

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, words):
        assert len(words) == 2
        return self.rows


def test_rows_of_a_reward_are_what_its_calls_say():
    """All pairs at once, each text embedded once, must earn what a call would give them."""
    posts = [Post(f"{i}", f"a post of {i} things",
                  tuple(f"{i} reply {j}" for j in range(2 + i % 2))) for i in range(5)]
    texts = ["one reply", "two things", "a post of 3 things", "3 reply 1", ""]
    vectors = {}

    def embed(groups):
        found = [[vectors.setdefault(t, torch.nn.functional.normalize(torch.randn(7), dim=0))
                  for t in group] for group in groups]
        return torch.stack([torch.stack(group) for group in found])
    for reward in (rewards.AgreementReward(embed), RelevanceReward(embed, data.Replies(posts))):
        called = reward(posts[:1], [texts])[0], reward(posts[3:4], [texts])[0]
        rows = list(reward.rows(posts, texts))
        assert (len(rows) == 5 and len(set(called[0])) == 5
                and all(row.shape == (5,) for row in rows))
        assert rows[0].tolist() == pytest.approx(called[0], abs=1e-6)
        assert rows[3].tolist() == pytest.approx(called[1], abs=1e-6)


@pytest.mark.slow
def test_judges_and_reward_models_are_asked_in_their_own_template(world, tmp_path):
    """All were shown Qwen3's hybrid chat, an empty think block and no system turn, whatever
    their template says."""
    template = ("{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe "
                "brief.<|im_end|>\n{% endif %}"
                "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] "
                "}}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    base, trained = tmp_path / "base", tmp_path / "trained"
    shutil.copytree(world["model"], base)
    (base / "chat_template.jinja").write_text(template)
    posts = [support_posts.Post("1", "Hi", ("Hello.", "Hey."))]
    heads = reward_model.new_heads(Qwen3.from_pretrained(base), 1, 2, 4)
    reward_model.save_heads(heads, trained, str(base))
    session = lambda folder: SimpleNamespace(
        args=SimpleNamespace(reward_model=str(folder), judge=str(folder), dtype="auto",
                             spread_penalty=1.0, nf4=False),
        run=None, ranks=SimpleNamespace(device=torch.device("cpu")), domain=data.Replies(posts))
    for asked_one in (rewards.make_reward("judge", session(base)),
                      rewards.make_reward("model", session(trained)),
                      judge.Asked.load(session(base))):
        ids = asked_one.chat(posts[0], "Ho.")
        text = asked_one.tokenizer.decode(ids, skip_special_tokens=False)
        assert (text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
                and "<think>" not in text), type(asked_one)
    (base / "chat_template.jinja").write_text("[INST] {{ messages[0]['content'] }} [/INST]")
    for load in (lambda: rewards.make_reward("judge", session(base)),
                 lambda: rewards.make_reward("model", session(trained)),
                 lambda: judge.Asked.load(session(base))):
        with pytest.raises(files.InputError, match="chat template"):
            load()


def test_reward_model_and_judge_read_one_chat_at_a_time_as_in_a_batch(world):
    """Right padding must not reach the scored token; the judge is P(yes) against P(no) and lies
    in (0, 1)."""
    tokenizer = data.load_tokenizer(world["model"])
    config = Qwen3.from_pretrained(world["model"]).config
    torch.manual_seed(5)
    scorer = Qwen3(config, lm_head=False, score_head=True).eval()
    posts, domain = data.load_posts(world["eval"])[:2], data.Replies([])
    completions = [["yes", "a much longer reply, word upon word upon word"], ["no"]]
    for reward in (methods_rewards.ModelReward(scorer, tokenizer, domain, batch=2),
                   methods_rewards.JudgeReward(Qwen3.from_pretrained(world["model"]), tokenizer,
                                               domain, batch=3)):
        got = reward(posts, completions)
        alone = [[reward([p], [[t]])[0][0] for t in ts] for p, ts in zip(posts, completions)]
        assert [len(r) for r in got] == [2, 1]
        assert all(a == pytest.approx(b, abs=1e-5) for r, s in zip(got, alone)
                   for a, b in zip(r, s))
        assert len({round(x, 6) for r in got for x in r}) == 3
    assert all(0 < x < 1 for r in got for x in r)
