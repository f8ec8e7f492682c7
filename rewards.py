"""Rewards: what a draft earns, by a verifier, by likeness to people's replies, by another Qwen3.

A reward is called with P posts, for each a list of texts, and the step's random streams; it returns
P lists of floats. REWARDS names them for --reward; `make_reward` makes one for a session."""

import random

import torch

import data
from data import InputError
from polylora import load_embedder
from trainer import load_model


class VerifierReward:
    """1 when the draft is right in the voice of this post's reader, drawn anew at every visit by
    the readers' shares; or, with any_voice, when it is right in any voice.

    valid_weight adds that much for being right in any voice; flip is the share of verdicts that are
    turned round, for studies of a noisy verifier.
    """

    def __init__(self, domain, *, any_voice=False, valid_weight=0.0, flip=0.0):
        if not domain.voices:
            raise InputError("--reward reader and valid need replies by voice: use agreement, "
                             "relevance, model or judge for posts like these")
        self.domain, self.any_voice = domain, any_voice
        self.valid_weight, self.flip = valid_weight, flip

    def __call__(self, posts, drafts, streams):
        return [self.of_post(*each) for each in zip(posts, drafts, streams)]

    def of_post(self, post, texts, stream):
        rng = random.Random(stream)
        reader, out = self.domain.reader(post, rng), []
        for text in texts:
            voices = self.domain.voices_of(post, text)
            right = bool(voices) if self.any_voice else reader in voices
            turned = self.flip and rng.random() < self.flip
            out.append(float(right != turned) + self.valid_weight * bool(voices))
        return out


class RelevanceReward:
    """For posts without a verifier, in [0, 1]: (1 + cosine of draft and post) / 2, times the
    domain's `form` (length, words not copied, no repetition). The cheapest reward, and easy to
    game: for a study of people use agreement, a reward model or a judge."""

    def __init__(self, embedder, domain):
        self.embedder, self.domain = embedder, domain

    def __call__(self, posts, drafts, streams=None):
        groups = [[post.post, *texts] for post, texts in zip(posts, drafts)]
        flat = self.embedder([[t for group in groups for t in group]])[0]
        rewards = []
        for vectors, (said, *texts) in zip(flat.split([len(g) for g in groups]), groups):
            cosines = (vectors[1:] @ vectors[0]).tolist()
            rewards.append([(1 + cosine) / 2 * self.domain.form(said, text)
                            for cosine, text in zip(cosines, texts)])
        return rewards


class AgreementReward:
    """For posts with people's replies, in [-1, 1]: the largest cosine between the draft and any of
    the post's replies, by a frozen embedder: does the draft say what some person said?"""

    def __init__(self, embedder, domain=None):
        self.embedder = embedder

    def __call__(self, posts, drafts, streams=None):
        groups = [[*post.replies, *texts] for post, texts in zip(posts, drafts)]
        flat = self.embedder([[t for group in groups for t in group]])[0]
        rewards = []
        for vectors, post in zip(flat.split([len(g) for g in groups]), posts):
            people, own = vectors[:len(post.replies)], vectors[len(post.replies):]
            rewards.append((own @ people.T).amax(1).tolist())
        return rewards


class ModelReward:
    """A Qwen3 reward model's scalar (Qwen3ForSequenceClassification) for the chat of post and
    draft, without a system turn. Control strings in post and draft are broken: a draft that spells
    <|im_end|> must not end its turn."""

    def __init__(self, model, tokenizer, domain, batch=32):
        self.model, self.tokenizer = model, tokenizer
        self.domain, self.batch = domain, batch

    def chat(self, post, text):
        turns = [*self.domain.messages(post), {"role": "assistant", "content": text}]
        return data.encode_chat(self.tokenizer, turns, add_generation_prompt=False)

    @torch.no_grad()
    def __call__(self, posts, drafts, streams=None):
        ids = [self.chat(p, t) for p, ts in zip(posts, drafts) for t in ts]
        scores, device = [], self.model.device
        for some in (ids[i:i + self.batch] for i in range(0, len(ids), self.batch)):
            lengths = torch.tensor([len(x) for x in some])
            rows = [torch.tensor(x) for x in some]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            scores += self.values(tokens.to(device), lengths.to(device)).tolist()
        flat = iter(scores)
        return [[next(flat) for _ in ts] for ts in drafts]

    def values(self, tokens, lengths):
        return self.model.score(tokens, lengths)


class JudgeReward(ModelReward):
    """A Qwen3 chat model's probability of "yes" against "no" when asked whether the draft is a good
    reply, in [0, 1]."""

    def chat(self, post, text):
        question = (f"Somebody posted:\n\n{post.post}\n\nA reply:\n\n{text}\n\nWould the person be "
                    "glad to get this reply: is it to the point, natural and kind? Answer yes or "
                    "no.")
        turns = [{"role": "user", "content": question}]
        return data.encode_chat(self.tokenizer, turns, add_generation_prompt=True)

    def values(self, tokens, lengths):
        words = [self.tokenizer.encode(w, add_special_tokens=False).ids[0] for w in ("yes", "no")]
        # In fp32: two logits of 20 in bf16 are 1/8 apart or equal, which leaves some fifty values.
        head = self.model.head_weight()[words].float()
        return (self.model.last_hidden(tokens, lengths).float() @ head.t()).softmax(-1)[:, 0]


def verifier(**how):
    def make(session):
        args = session.args
        return VerifierReward(session.domain, valid_weight=getattr(args, "valid_weight", 0.0),
                              flip=getattr(args, "flip", 0.0), **how)
    return make


def embedded(reward):
    def make(session):
        if session.embedder is None:
            load_embedder(session)
        return reward(session.embedder, session.domain)
    return make


def scored(name, reward, head):
    """A reward by another Qwen3, which must have that head."""
    def make(session):
        args = session.args
        if not args.reward_model:
            raise InputError(f"--reward {name} needs --reward-model, a Qwen3 folder or hub name")
        model = load_model(args.reward_model, args, session.ranks.device)
        if not getattr(model, head):
            missing = {"has_score": "scalar head (score.weight)", "has_logits": "token head"}[head]
            raise InputError(f"--reward-model {args.reward_model} has no {missing}: --reward "
                             f"{name} needs one")
        return reward(model, data.load_tokenizer(args.reward_model), session.domain)
    return make


REWARDS = {  # name -> (make(session), one line)
    "reader": (verifier(), "1 if right for the post's reader, who likes one voice"),
    "valid": (verifier(any_voice=True), "1 if right in any voice"),
    "agreement": (embedded(AgreementReward), "likeness to the nearest of people's own replies"),
    "relevance": (embedded(RelevanceReward), "likeness to the post, and form: cheap, easily gamed"),
    "model": (scored("model", ModelReward, "has_score"), "a Qwen3 reward model's scalar"),
    "judge": (scored("judge", JudgeReward, "has_logits"), "a Qwen3's probability of yes"),
}


def reward_name(name, session):
    """auto: reader where replies have voices, agreement where most posts have several people's
    replies, else relevance."""
    if name != "auto":
        return name
    if session.domain.voices:
        return "reader"
    several = sum(len(p.replies) > 1 for p in session.posts)
    return "agreement" if 2 * several > len(session.posts) else "relevance"


def make_reward(name, session):
    """The reward called `name` for a loaded Session."""
    return REWARDS[reward_name(name, session)][0](session)
