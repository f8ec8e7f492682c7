"""Rewards: what a draft earns, by a verifier, by likeness to people's replies, by another Qwen3.

    python rewards.py train --model Qwen/Qwen3-0.6B --data picks.jsonl --out runs/reward
    python grpo.py --reward model --reward-model runs/reward ...

A reward is called with P posts, for each a list of texts, and the step's random streams; it returns
P lists of floats. REWARDS names them for --reward; `make_reward` makes one for a session. In order:
rewards, single-stream SPO's values of posts, D's weight beside a reward, reward models and their
training on preferences."""

import argparse
import gzip
import json
import math
import random
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import data
import formats
from adapters import (LINEARS, PREFIX, adapter, adapter_state, add_lora, drop_lora, lora_layers,
                      save_adapter)
from data import InputError, beside, command, read_json, write_json
from model import read_tensors, token_logprobs
from files import chat_hash, combined_hash
from polylora import load_embedder, trained_domain
from trainer import (INPUTS, Input, Session, Tally, Visit, announce, batch_visits, check_common,
                     checkpoint_hash, common_flags, file_hash, load_chat, load_model, model_hash,
                     seed_of, train)

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
        self.best = 1.0 + valid_weight       # a right draft's: people's scale, nothing to measure

    def __call__(self, posts, drafts, streams):
        return [self.of_post(*each) for each in zip(posts, drafts, streams)]

    def of_post(self, post, texts, stream):
        rng = random.Random(stream)
        reader, out = self.domain.reader(post, rng), []
        for text in texts:
            voices = self.domain.voices_of(post, text)
            right = bool(voices) if self.any_voice else reader in voices
            turned, also = (rng.random() < self.flip for _ in range(2))        # each verdict alone
            out.append(float(right != turned) + self.valid_weight * (bool(voices) != also))
        return out


def overlong_penalty(lengths, longest, cache):
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), added to rewards: from 0 at
    longest - cache tokens to -1 at the longest draft."""
    return ((longest - cache - lengths) / cache).clamp(-1, 0)


def voice_rows(domain, post, texts):
    """For each text a row of 0 and 1: in which of the domain's voices it is right."""
    found = [domain.voices_of(post, text) for text in texts]
    return [[float(voice in right) for voice in domain.voices] for right in found]


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

    def rows(self, posts, texts):
        """For each post what each of the texts would earn, an array (T,); every text is embedded
        once, where a call embeds it for each post."""
        vectors = self.embedder([list(texts)])[0]
        said = self.embedder([[post.post for post in posts]])[0]
        for post, vector in zip(posts, said):
            form = torch.tensor([self.domain.form(post.post, text) for text in texts])
            yield ((1 + (vectors @ vector).cpu()) / 2 * form).numpy()


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

    def rows(self, posts, texts):
        """For each post what each of the texts would earn, an array (T,); every text is embedded
        once, where a call embeds it for each post."""
        vectors = self.embedder([list(texts)])[0]
        replies = self.embedder([[text for post in posts for text in post.replies]])[0]
        for people in replies.split([len(post.replies) for post in posts]):
            yield (vectors @ people.T).amax(1).cpu().numpy()


class ModelReward:
    """A Qwen3 reward model's scalar (Qwen3ForSequenceClassification) for the chat of post and
    draft, written as that model's own template does (`form`). Control strings in post and draft are
    broken: a draft that spells <|im_end|> must not end its turn."""

    def __init__(self, model, tokenizer, domain, form=data.ChatFormat(), batch=32):
        self.model, self.tokenizer, self.form = model, tokenizer, form
        self.domain, self.batch = domain, batch

    def chat(self, post, text):
        turns = [*self.domain.messages(post), {"role": "assistant", "content": text}]
        return data.encode_chat(self.tokenizer, turns, add_generation_prompt=False, chat=self.form)

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


class HeadsReward(ModelReward):
    """The reward models of rewards.py train: the members' mean less `penalty` times their spread,
    the (population) standard deviation (arXiv 2401.00243, eq. 14)."""

    def __init__(self, heads, tokenizer, domain, form=data.ChatFormat(), penalty=1.0):
        super().__init__(heads.model, tokenizer, domain, form)
        self.heads, self.penalty = heads, penalty

    def values(self, tokens, lengths):
        scores = self.heads.scores(tokens, lengths)
        return scores.mean(0) - self.penalty * scores.std(0, correction=0)


class JudgeReward(ModelReward):
    """A Qwen3 chat model's probability of "yes" against "no" when asked whether the draft is a good
    reply, in [0, 1]."""

    def chat(self, post, text):
        question = (f"Somebody posted:\n\n{post.post}\n\nA reply:\n\n{text}\n\nWould the person be "
                    "glad to get this reply: is it to the point, natural and kind? Answer yes or "
                    "no.")
        turns = [{"role": "user", "content": question}]
        return data.encode_chat(self.tokenizer, turns, add_generation_prompt=True, chat=self.form)

    def values(self, tokens, lengths):
        words = [self.tokenizer.encode(w, add_special_tokens=False).ids[0] for w in ("yes", "no")]
        # In fp32: two logits of 20 in bf16 are 1/8 apart or equal, which leaves some fifty values.
        head = self.model.head_weight()[words].float()
        return (self.model.last_hidden(tokens, lengths).float() @ head.t()).softmax(-1)[:, 0]


def verifier(**how):
    """A line's make(session) for the domain's own verdicts."""
    def make(session):
        args = session.args
        return VerifierReward(session.domain, valid_weight=getattr(args, "valid_weight", 0.0),
                              flip=getattr(args, "flip", 0.0), **how)
    return make


def embedded(reward):
    """make(session) for a reward by the session's embedder."""
    def make(session):
        bare = [post for post in session.posts if not post.replies]
        if bare and reward is AgreementReward:
            raise InputError(f"the post {data.short(bare[0].id)} has no reply that a draft could "
                             "agree with: leave such posts out, or use --reward relevance")
        if session.args.embedder == "base" and len(session.posts) < 2:
            raise InputError("the base's states of one post alone tell no draft from another: name "
                             "an embedding model by --embedder, or choose by a reward model")
        if session.embedder is None:
            load_embedder(session)
        return reward(session.embedder, session.domain)
    return make


def reward_model_hash(path):
    """What tells reward models of one name from each other: of a folder of rewards.py train its
    members' adapters, of a Qwen3 trainer.model_hash."""
    places = member_folders(path)
    return [file_hash(p / "adapter_model.safetensors") for p in places] or model_hash(path, None)


def reward_model_inputs(path):
    """One hash of all that a reward model is made from: its weights, tokenizer and chat template,
    and of members of rewards.py train their base's."""
    places = member_folders(path)
    if not places:
        return combined_hash(reward_model_hash(path), chat_hash(path))
    config = read_json(places[0] / "adapter_config.json")
    base = checkpoint_hash(config.get("base_model_name_or_path"), config.get("revision"))
    return combined_hash(reward_model_hash(path), base)


INPUTS["reward_model"] = Input(lambda args: reward_model_inputs(args.reward_model), "reward model",
                               "reward_model")


def check_format(session, folder):
    """Warn where a reward model was trained on posts that were put to it in another way than this
    run puts them."""
    record, post = trained_domain(folder), data.Post("any", "Any post", ())
    if record is None:
        return
    known = data.DOMAINS[record["domain"]]([post])
    if known.messages(post) != session.domain.messages(post):
        session.say(f"warning: the reward model {folder} was trained on posts as the domain "
                    f"{known.name!r} puts them, and judges here as {session.domain.name!r} does: "
                    "train it on picks of these runs, or with --domain")


def scored(name, reward, head):
    """make(session) for a reward by another Qwen3, which must have that head."""
    def make(session):
        args = session.args
        if not args.reward_model:
            raise InputError(f"--reward {name} needs --reward-model, a Qwen3 folder or hub name")
        if getattr(session, "run", None):
            session.run.made_from("reward_model")
        if head == "has_score" and member_folders(args.reward_model):
            check_format(session, args.reward_model)
            heads, tokenizer, form = load_heads(args.reward_model, args, session.ranks.device)
            return HeadsReward(heads, tokenizer, session.domain, form, args.spread_penalty)
        model = load_model(args.reward_model, args, session.ranks.device)
        if not getattr(model, head):
            missing = {"has_score": "scalar head (score.weight)", "has_logits": "token head"}[head]
            raise InputError(f"--reward-model {args.reward_model} has no {missing}: --reward "
                             f"{name} needs one")
        tokenizer, form = load_chat(args.reward_model)
        return reward(model, tokenizer, session.domain, form)
    return make


REWARDS = {  # name -> (make(session), one line)
    "reader": (verifier(), "1 if right for the post's reader, who likes one voice"),
    "valid": (verifier(any_voice=True), "1 if right in any voice"),
    "agreement": (embedded(AgreementReward), "likeness to the nearest of people's own replies"),
    "relevance": (embedded(RelevanceReward), "likeness to the post, and form: cheap, easily gamed"),
    "model": (scored("model", ModelReward, "has_score"), "a Qwen3 reward model's scalar, or the "
              "mean of several less their spread"),
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


# ---- Single-stream SPO's values ------------------------------------------------------------------

def kept_share(kl, half=0.06, low=0.875, high=0.96):
    """Single-stream SPO's rho = 2^(-kl / half), held between low and high (arXiv 2509.13232): what
    is kept of a post's count when the policy has moved by `kl` nats a token since its last visit.
    """
    return min(max(2 ** (-kl / half), low), high)


class Values:
    """Single-stream SPO's value of each post: the mean of Beta(right, wrong). A visit with rewards
    r in [0, 1] makes right = rho right + sum r, wrong = rho wrong + sum (1 - r), rho = kept_share.
    A post's first visit starts from 8 = 1/(1 - 0.875) drafts of the policy as it is then.

    The KL is the mean over tokens of log pi_then - log pi_now on the drafts of the last visit. All
    of that stands in OUT/values.jsonl, a line a draw, written after the draw: the values at a step
    are a function of the lines of earlier steps, so a resumed run goes on from the same ones."""
    FIRST = 8

    def __init__(self, session, step):
        self.session, self.known, self.path = session, {}, None
        if getattr(session, "run", None) is None:
            return
        self.path = session.run.folder / "values.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in filter(None, lines):
            try:
                line = json.loads(line)
            except ValueError:  # torn by a kill; its step is made again
                continue
            if line["step"] < step:
                self.known.update(line["posts"])

    def __call__(self, visits, step):
        """The values (P,) before this step's rewards."""
        session, known = self.session, self.known
        keys = [session.posts[v.index].key for v in visits]
        new = {k: Visit(v.index, -1) for k, v in zip(keys, visits) if k not in known}
        if new:
            first = list(new.values())
            _, samples, texts = session.sample_drafts(first, step, self.FIRST)
            streams = [session.stream("reader", step, v) for v in first]
            earned = session.reward([session.posts[v.index] for v in first], texts, streams)
            for key, r, tokens, logprobs in zip(new, earned, samples.tokens, samples.logprobs):
                known[key] = {"right": float(sum(r)), "wrong": float(sum(1 - x for x in r)),
                              "tokens": tokens, "logprobs": logprobs}
        counts = [(known[k]["right"], known[k]["wrong"]) for k in keys]
        return torch.tensor([right / (right + wrong) for right, wrong in counts])

    def learn(self, visits, rewards, samples, step):
        """Count this step's rewards (P, k)."""
        session, mine = self.session, []
        if not bool(((rewards >= 0) & (rewards <= 1)).all()):
            raise InputError("--advantage single-stream-spo needs rewards from 0 to 1")
        moved = self.drift(visits)
        for i, (visit, r) in enumerate(zip(visits, rewards)):
            key = session.posts[visit.index].key
            old, rho = self.known[key], kept_share(moved[i])
            mine.append((key, {"right": rho * old["right"] + float(r.sum()),
                               "wrong": rho * old["wrong"] + float((1 - r).sum()),
                               "tokens": samples.tokens[i], "logprobs": samples.logprobs[i]}))
        fresh = dict(session.ranks.gather(mine))
        self.known.update(fresh)
        if self.path and session.ranks.main:
            try:
                with open(self.path, "a", encoding="utf-8") as file:  # first the end of a torn line
                    file.write("\n" + json.dumps({"step": step, "posts": fresh}))
            except OSError as e:
                raise InputError(f"{self.path} cannot be written ({e}): make room, then go on with "
                                 "--resume") from None

    @torch.no_grad()
    def drift(self, visits):
        """For each visit log pi_then - log pi_now, the mean over its post's last drafts' tokens."""
        session = self.session
        last = [self.known[session.posts[v.index].key] for v in visits]
        then = [[p for draft in each["logprobs"] for p in draft] for each in last]
        post = torch.tensor([i for i, each in enumerate(last) for _ in each["tokens"]])
        pairs = [(session.prompt(v.index), each["tokens"]) for v, each in zip(visits, last)]
        now = torch.zeros(len(visits))
        for rows in session.micro_batches(pairs):
            logp, _ = token_logprobs(session.model, rows, session.args.temperature)
            now.index_add_(0, post[rows.draft.cpu()], logp.cpu())
        return [(sum(p) - float(n)) / len(p) for p, n in zip(then, now)]


# ---- What D weighs beside the reward -------------------------------------------------------------

SCHEDULES = {  # name -> (factor from the share of steps done and the share of D lost, one line)
    "constant": (lambda done, lost: 1.0, "1"),
    "rising": (lambda done, lost: 2 * done, "from 0 to 2 in a straight line"),
    "falling": (lambda done, lost: 2 - 2 * done, "from 2 to 0 in a straight line"),
    "held": (lambda done, lost: min(max(10 * lost, 0.0), 4.0),
             "by what the drafts' D has lost since the first step: 1 for a tenth of it, at most 4"),
}


def scheduled(session, step, spread):
    """The factor of --diversity-schedule in a step; spread: the mean D of its drafts, over all
    ranks. Kept is that of the first step that has drafts, which the log says after a resume, and on
    a rank that had none of them."""
    args = session.args
    if args.diversity_schedule == "held" and not hasattr(session, "first_spread"):
        log = step and session.run.folder / "metrics.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log and log.exists() else []
        known = (line["D"] for line in map(json.loads, filter(None, lines)) if "D" in line)
        session.first_spread = next(known, spread)
    first = getattr(session, "first_spread", 0.0)
    factor, _ = SCHEDULES[args.diversity_schedule]
    return factor(step / max(1, args.steps - 1), (first - spread) / abs(first) if first else 0.0)


def spread_weight(args, own, spread, factor, tally):
    """D's weight in this step, from the squared norms, over all ranks, of the objective's
    advantages and of D's at weight 1, and the schedule's factor. --diversity-share sets it so that
    D's part has that share of the objective's norm. The log's D_share is left out where the
    objective's is zero, and D is then left out where its share is to be held."""
    if not own:
        return 0.0 if args.diversity_share else factor * args.diversity_weight
    weight, ratio = factor * args.diversity_weight, math.sqrt(spread / own)
    if args.diversity_share:
        weight = factor * args.diversity_share / ratio if ratio else 0.0
        tally.add("D_weight", weight)
    if weight:
        tally.add("D_share", weight * ratio)
    return weight


# ---- Reward models: LoRA and a scalar head, by Bradley-Terry -------------------------------------

class Preferences(NamedTuple):
    """Replies of one post, and how many people liked each; likes None: not known, all are people's.
    alone: a choice among these very replies, not to be joined with others of the same post.
    `domain`: of the run whose drafts were picked from, "" where the line does not say it."""
    post: data.Post
    likes: list | None
    alone: bool = False
    domain: str = ""


def parse_preference(line, number):
    """One JSON line -> Preferences; ValueError says what is wrong with it. Either a choice,
    {"post", "drafts", "pick"} or {"prompt", "chosen", "rejected"}, where the pick has one like and
    others none; or a line of posts, whose reply may have `reply_likes`, or a `label` that is true
    or false."""
    d = data.read_line(line)
    if isinstance(d.get("rejected"), str) and isinstance(d.get("chosen"), str):
        d = d | {"drafts": [d.pop("chosen"), d.pop("rejected")], "pick": 0}
    if isinstance(d.get("label"), bool):
        d = d | {"reply_likes": float(d.pop("label"))}
    if not isinstance(d.get("drafts"), list):
        post = data.post_of(d, number, 20_000)
        likes = d.get("reply_likes")
        if likes is not None and (not isinstance(likes, (int, float)) or not math.isfinite(likes)):
            raise ValueError("reply_likes is no number")
        if not post.replies:
            raise ValueError("a prompt without a reply: there is nothing to prefer")
        return Preferences(post, None if likes is None else [likes] * len(post.replies))
    pick, drafts = d.get("pick"), d["drafts"]
    if type(pick) is not int or not 0 <= pick < len(drafts):
        raise ValueError(f"pick must be the place of a draft, from 0 to {len(drafts) - 1}")
    # An empty draft was none to choose, and one that says what the pick says is no worse.
    said = [data.normalise(text) if isinstance(text, str) else text for text in drafts]
    kept = [i for i, text in enumerate(said) if i == pick or text not in ("", said[pick])]
    replies = [drafts[i] for i in kept]
    chosen = {name: x for name, x in d.items() if name not in formats.REPLIES}
    post = data.post_of(chosen | {"replies": replies}, number, 20_000)
    domain = d.get("domain", "")
    if domain and domain not in data.DOMAINS:
        raise ValueError(f"there is no domain {data.short(domain)}")
    return Preferences(post, [float(i == pick) for i in kept], True, domain)


def preferences_domain(path, name, preferences):
    """The domain whose chat format a reward model is trained in: of picks the run's that wrote the
    drafts, else as of any file of posts."""
    posts = [p.post for p in preferences]
    picked = sorted({p.domain for p in preferences if p.domain})
    if name == "auto" and len(picked) > 1:
        raise InputError(f"{path} holds picks of runs of the domains {', '.join(picked)}, which put "
                         "posts in different ways: train on one at a time, or choose by --domain")
    if picked and name in ("auto", *picked):
        return data.DOMAINS[picked[0] if name == "auto" else name](posts)
    return data.load_domain(path, name, posts)


def load_preferences(path, skip_bad_lines=False):
    """The Preferences in a file, JSON lines, plain or .gz. Lines with likes of one post are one;
    a pick stands alone, since it was made among its own drafts."""
    found, liked, bad, number = [], {}, 0, 0
    first = ""                               # what to say if every line is bad
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    each = parse_preference(line, number) if line.strip() else None
                except ValueError as e:
                    if not skip_bad_lines:
                        raise InputError(data.bad_line(path, number, e, not found)) from None
                    first = first or data.bad_line(path, number, e, not found, every=True)
                    bad += 1
                    continue
                if each is None:
                    continue
                if each.alone or not each.likes:
                    found.append(each)
                    continue
                place = liked.setdefault(each.post.same, len(found))
                if place == len(found):
                    found.append(each)
                    continue
                old = found[place]
                post = replace(old.post, replies=old.post.replies + each.post.replies)
                found[place] = Preferences(post, old.likes + each.likes)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: give --data a file of preferences") from None
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(data.cannot_be_read(path, number, e)) from None
    if bad and not found:
        raise InputError(first)
    if bad:
        print(f"{path}: {bad} bad lines left out", file=sys.stderr)
    return found


def usable(found, kind, path):
    """(kind, Preferences that pairs can be drawn from). kind: likes, others, or auto: likes where
    any post has replies of unequal likes."""
    unequal = [p for p in found if p.likes and max(p.likes) > min(p.likes)]
    kind = ("likes" if unequal else "others") if kind == "auto" else kind
    kept = unequal if kind == "likes" else found
    if len(kept) < (1 if kind == "likes" else 2):
        raise InputError(f"{path} holds nothing to compare: give it picks, lines of prompt, chosen "
                         "and rejected, posts with several replies of unequal reply_likes, or two "
                         "posts or more with replies")
    return kind, kept


def draw_pair(preferences, visit, kind, rng):
    """(better, worse) texts of a visit: of unequal likes, or a reply and one to another post."""
    post, likes = preferences[visit.index].post, preferences[visit.index].likes
    if kind == "likes":
        pairs = [(i, j) for i, a in enumerate(likes) for j, b in enumerate(likes) if a > b]
        i, j = rng.choice(pairs)
        return post.replies[i], post.replies[j]
    other = (visit.index + rng.randrange(1, len(preferences))) % len(preferences)
    return rng.choice(post.replies), rng.choice(preferences[other].post.replies)


class Heads(nn.Module):
    """One frozen Qwen3 under M members, each LoRA matrices and a scalar head of its own: a member
    is {name of adapter_state: tensor, "score": (1, hidden)}."""

    def __init__(self, model, members):
        super().__init__()
        self.model, self.members = model, members

    def forward(self, tokens, lengths):
        return self.model.last_hidden(tokens, lengths)

    def scores(self, tokens, lengths):
        """(M, B) fp32 at the last token of tokens (B, T), padded on the right."""
        out = []
        for member in self.members:
            # The member's tensors in place of the model's, without a change that autograd would
            # miss: all members' graphs live side by side.
            own = {f"model.{n}": t for n, t in member.items() if n != "score"}
            hidden = torch.func.functional_call(self, own, (tokens, lengths))
            out.append((hidden.float() @ member["score"].t()).squeeze(-1))
        return torch.stack(out)

    def parameters_of_members(self):
        return [t for member in self.members for t in member.values()]

    def spread(self):
        """UP-RLHF's measure of how unlike the members are (arXiv 2401.00243, eq. 12): the mean over
        LoRA layers of the nuclear over the Frobenius norm of the members' A, one above the other.
        From 1, all alike and of rank one, to the root of the rows' number."""
        names = [n for n in self.members[0] if n.endswith("lora_A.weight")]
        stacked = [torch.cat([member[n] for member in self.members]) for n in names]
        return torch.stack([torch.linalg.matrix_norm(a, "nuc") / a.norm() for a in stacked]).mean()


def new_heads(model, count, rank, alpha, dropout=0.0, targets=LINEARS, seed=0):
    """Heads of `count` members that have learnt nothing yet; each starts elsewhere."""
    members, hidden = [], model.config.hidden_size
    for m in range(count):
        if lora_layers(model):
            drop_lora(model)
        add_lora(model, rank, alpha, dropout=dropout, targets=targets, seed=seed_of(seed, m))
        draw = torch.Generator().manual_seed(seed_of(seed, m, "score"))
        score = torch.randn(1, hidden, generator=draw) * hidden ** -0.5
        member = {n: p.detach().clone() for n, p in adapter_state(model).items()}
        member["score"] = score.to(model.device)
        members.append({n: t.requires_grad_() for n, t in member.items()})
    model.requires_grad_(False)
    return Heads(model, members)


def preference_loss(better, worse):
    """Bradley-Terry of the members' mean (arXiv 2401.00243, eq. 12): -log sigmoid(mean_m
    r_m(better) - mean_m r_m(worse)). (M, B) each -> (B,)."""
    return -F.logsigmoid(better.mean(0) - worse.mean(0))


def padded(rows, device):
    """Lists of ids -> tokens (B, T) padded on the right, lengths (B,)."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    return tokens.to(device), torch.tensor([len(r) for r in rows], device=device)


def preference_step(session, step):
    """One step: the mean loss over the step's pairs, less --member-spread times Heads.spread."""
    args, ranks, heads = session.args, session.ranks, session.heads
    visits, tally = batch_visits(len(session.posts), args.batch, step, args.seed), Tally()
    tally.visits = visits
    chats = []
    for visit in session.deal(visits):
        rng = random.Random(session.stream("pair", step, visit))
        pair = draw_pair(session.preferences, visit, args.pairs, rng)
        chats.append([session.reward.chat(session.posts[visit.index], text) for text in pair])
    chats.sort(key=lambda pair: max(map(len, pair)))
    session.model.train()                                                      # for its dropout
    size = max(1, args.micro_tokens // (2 * max(map(len, chats[-1]))))
    for some in (chats[i:i + size] for i in range(0, len(chats), size)):
        tokens, lengths = padded([ids for pair in some for ids in pair], ranks.device)
        better, worse = heads.scores(tokens, lengths).view(-1, len(some), 2).unbind(-1)
        losses, margin = preference_loss(better, worse), (better - worse).mean(0)
        (losses.sum() / args.batch).backward()
        tally.add("loss", losses.sum().detach(), len(some))
        tally.add("accuracy", (margin > 0).sum(), len(some))
        tally.add("disagreement", (better - worse).std(0, correction=0).sum().detach(), len(some))
        tally.add("tokens", len(heads.members) * tokens.numel())
    session.model.eval()
    if len(heads.members) > 1 and ranks.main:  # of all ranks' gradients, which are summed, once
        spread = heads.spread()
        (-args.member_spread * spread).backward()
        tally.add("spread", spread.detach())
    ranks.sum_gradients(session.params)
    return tally


def save_heads(heads, folder, base, revision=None):
    """FOLDER/adapter, or adapter-0, adapter-1, .. of several members: what PEFT writes of LoRA for
    sequence classification whose `score` is saved along."""
    single = len(heads.members) == 1
    for m, member in enumerate(heads.members):
        place = Path(folder) / ("adapter" if single else f"adapter-{m}")
        with adapter(heads.model, {n: t.detach() for n, t in member.items() if n != "score"}):
            save_adapter(heads.model, place, base, revision)
        tensors = read_tensors(place, file="adapter_model.safetensors")
        tensors[f"{PREFIX}score.weight"] = member["score"].detach().cpu().contiguous()
        with beside(place / "adapter_model.safetensors") as path:
            save_file(tensors, path, metadata={"format": "pt"})
        config = read_json(place / "adapter_config.json")
        write_json(place / "adapter_config.json",
                   config | {"task_type": "SEQ_CLS", "modules_to_save": ["score"]})


def member_folders(folder):
    """The members' adapter folders in a folder of rewards.py train; [] when it is none."""
    places = [Path(folder) / "adapter", *sorted(Path(folder).glob("adapter-*"),
                                                key=lambda p: (len(p.name), p.name))]
    places = [p for p in places if (p / "adapter_config.json").is_file()]
    kinds = [read_json(p / "adapter_config.json") for p in places]
    return places if all(isinstance(k, dict) and k.get("modules_to_save") == ["score"]
                         for k in kinds) else []


def load_heads(folder, args, device):
    """(Heads, tokenizer, ChatFormat) of a folder of rewards.py train, on the base that its adapters
    name."""
    places = member_folders(folder)
    config, members = read_json(places[0] / "adapter_config.json"), []
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    numbers = all(isinstance(config.get(n), (int, float)) for n in ("r", "lora_alpha"))
    targets = config.get("target_modules")
    if not isinstance(base, str) or not numbers or not isinstance(targets, list):
        raise InputError(f"{places[0]}/adapter_config.json lacks the base model, r, lora_alpha or "
                         "target_modules: train the reward model again")
    model = load_model(base, args, device, revision, getattr(args, "nf4", False))
    add_lora(model, config["r"], config["lora_alpha"], targets=tuple(targets))
    wanted = {n: p.shape for n, p in adapter_state(model).items()}
    wanted["score.weight"] = (1, model.config.hidden_size)
    for place in places:
        stored = read_tensors(place, file="adapter_model.safetensors")
        stored = {n.removeprefix(PREFIX): t.float().to(device) for n, t in stored.items()}
        if {n: t.shape for n, t in stored.items()} != wanted:
            raise InputError(f"the reward model in {place} does not fit its base {base}: train it "
                             "again")
        members.append({n: t for n, t in stored.items() if n != "score.weight"}
                       | {"score": stored["score.weight"]})
    model.requires_grad_(False)
    return Heads(model.eval(), members), *load_chat(base, revision)


LOGGED = ["loss", "accuracy", "disagreement", "spread"]


def run_train(args):
    """Reward models from preferences: OUT/adapter, or OUT/adapter-0 .. of several members."""
    check_common(args)
    if args.shard or args.checkpointing:
        raise InputError("reward models are trained without --shard and --checkpointing")
    session = Session(args, "reward")
    if not session.open_run():
        return
    found = load_preferences(args.data, args.skip_bad_lines)
    args.pairs, session.preferences = usable(found, args.pairs, args.data)
    session.posts = [p.post for p in session.preferences]
    session.domain = preferences_domain(args.data, args.domain, session.preferences)
    session.load_model()
    heads = new_heads(session.model, args.members, args.rank, args.alpha, args.dropout,
                      args.targets.split(","), seed_of(args.seed, "members"))
    session.heads, session.params = heads, heads.parameters_of_members()
    session.reward = HeadsReward(heads, session.tokenizer, session.domain, session.chat)
    session.say(f"{len(session.posts)} posts, pairs by {args.pairs}, {args.members} member(s)")
    args.steps = args.steps or math.ceil(len(session.posts) * args.epochs / args.batch)
    step_fn = lambda step: preference_step(session, step)
    announce(session, step_fn)
    summary = train(session, session.params, step_fn, LOGGED)
    if session.ranks.main:
        save_heads(heads, session.run.folder, args.model, args.revision)
    session.run.finish(summary | {"domain": session.domain.record()})
    session.ranks.close()


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sub = p.add_subparsers(dest="command", required=True)
    t = sub.add_parser("train", help="reward models from picks, likes, or replies and others'")
    add = t.add_argument
    add("--model", required=True, help="Qwen3 checkpoint under the reward: folder or hub name")
    common_flags(t, lr=1e-4, steps=0, batch=16)
    add("--pairs", default="auto", choices=("auto", "likes", "others"),
        help="what is better: likes, the pick or the reply with more reply_likes; others, a reply "
             "to the post than one to another post; auto: likes where there are any")
    add("--rank", type=int, default=16, help="LoRA rank r of each member")
    add("--alpha", type=float, default=16, help="LoRA alpha: the update is scaled by alpha / r")
    add("--dropout", type=float, default=0.0, help="LoRA dropout")
    add("--targets", default=",".join(LINEARS), help="linear layers with LoRA, comma-separated")
    add("--members", type=int, default=1,
        help="reward models on one frozen base, trained as their mean (UP-RLHF, arXiv 2401.00243)")
    add("--member-spread", type=float, default=0.1,
        help="weight of the nuclear over the Frobenius norm of the members' A, which keeps them "
             "apart")
    t.set_defaults(run=run_train)
    return p


def main(argv=None):
    return command(parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
