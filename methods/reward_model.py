"""Reward models: `rewards.py train` fits LoRA and a scalar head to preferences by Bradley-Terry;
--reward model and --reward judge use one.

In order: the preferences in a file; the members of a reward model and their loss; saving, loading
and using them; the command."""

import gzip
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
from lora import adapter, adapter_state, add_lora, drop_lora, lora_layers, save_adapter
from methods.rewards import JudgeReward, ModelReward
from support.checkpoint import checkpoint_hash, input_hash, model_hash
from support.checks import check_common, trained_domain
from support.files import (InputError, atomic_write, chat_hash, combined_hash, file_hash, read_json,
                           seed_of, short, write_json)
from support.flags import common_flags, flag_groups
from support.formats import REPLIES
from support.hub import read_tensors
from support.peft_files import LINEARS, PREFIX
from support.plan import announce
from support.posts import (Post, bad_line, cannot_be_read, is_unpicked, normalise, post_of,
                           read_line)
from support.registry import COMMANDS, DOMAINS, REWARDS
from support.steplog import Tally
from trainer import Session, batch_visits, load_chat, load_model, train


# ---- Preferences ---------------------------------------------------------------------------------

class Preferences(NamedTuple):
    """Replies of one post, and how many people liked each."""
    post: Post
    likes: list | None       # None: not known, but all are people's replies
    alone: bool = False      # a choice among these very replies, not to be merged with others
    domain: str = ""         # of the run whose completions were chosen from; "" if not recorded


def parse_preference(line, number):
    """The Preferences of one JSON line, None of a choice where none was picked; ValueError says
    what is wrong with it.

    A line is either a choice, {"post", "drafts", "pick"} or {"prompt", "chosen", "rejected"}, where
    the pick counts as one like and the others as none; or a line of posts, whose reply may have
    `reply_likes`, or a `label` that is true or false."""
    d = read_line(line)
    if is_unpicked(d):
        return None
    if isinstance(d.get("rejected"), str) and isinstance(d.get("chosen"), str):
        d = d | {"drafts": [d.pop("chosen"), d.pop("rejected")], "pick": 0}
    if isinstance(d.get("label"), bool):
        d = d | {"reply_likes": float(d.pop("label"))}
    if isinstance(d.get("drafts"), list):
        return parse_choice(d, number)
    post = post_of(d, number, 20_000)
    likes = d.get("reply_likes")
    if likes is not None and (not isinstance(likes, (int, float)) or not math.isfinite(likes)):
        raise ValueError("reply_likes is no number")
    if not post.replies:
        raise ValueError("a prompt without a reply: there is nothing to prefer")
    return Preferences(post, None if likes is None else [likes] * len(post.replies))


def parse_choice(d, number):
    """The Preferences of a line with `drafts` and a `pick` among them."""
    pick = d.get("pick")
    completions = d["drafts"]
    if type(pick) is not int or not 0 <= pick < len(completions):
        raise ValueError(f"pick must be the place of a draft, from 0 to {len(completions) - 1}")
    # An empty text was not there to choose, and one that equals the pick is no worse.
    normal = [normalise(text) if isinstance(text, str) else text for text in completions]
    kept = []
    for i, text in enumerate(normal):
        if i == pick or text not in ("", normal[pick]):
            kept.append(i)
    fields = {}
    for name, value in d.items():
        if name not in REPLIES:
            fields[name] = value
    fields["replies"] = [completions[i] for i in kept]
    post = post_of(fields, number, 20_000)
    domain = d.get("domain", "")
    if domain and domain not in DOMAINS:
        raise ValueError(f"there is no domain {short(domain)}")
    return Preferences(post, [float(i == pick) for i in kept], True, domain)


def preferences_domain(path, name, preferences):
    """The domain whose chat format a reward model is trained in: for picks that of the run that
    wrote the completions, else as for any file of posts."""
    posts = [p.post for p in preferences]
    picked = sorted({p.domain for p in preferences if p.domain})
    if name == "auto" and len(picked) > 1:
        names = ", ".join(picked)
        raise InputError(f"{path} holds picks of runs of the domains {names}, which put posts in "
                         "different ways: train on one at a time, or choose by --domain")
    if picked and name in ("auto", *picked):
        chosen = picked[0] if name == "auto" else name
        return DOMAINS[chosen].function(posts)
    return data.load_domain(path, name, posts)


def load_preferences(path, skip_bad_lines=False):
    """The Preferences in a file of JSON lines, plain or .gz. Lines with likes of one post are
    merged; a pick stays on its own, since it was made among its own completions."""
    found = Merged()
    number = 0
    bad = 0
    message = ""                             # for the case that every line is bad
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    found.add(parse_preference(line, number))
                except ValueError as e:
                    first = not found.preferences
                    if not skip_bad_lines:
                        raise InputError(bad_line(path, number, e, first)) from None
                    message = message or bad_line(path, number, e, first, every=True)
                    bad += 1
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: give --data a file of preferences") from None
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(cannot_be_read(path, number, e)) from None
    if bad and not found.preferences:
        raise InputError(message)
    if bad:
        print(f"{path}: {bad} bad lines left out", file=sys.stderr)
    return found.preferences


class Merged:
    """A list of Preferences in which lines with likes of one post are one."""

    def __init__(self):
        self.preferences = []
        self.position = {}                   # post -> where its likes are in the list

    def add(self, new):
        """Add a line's Preferences; None adds nothing."""
        if new is None:
            return
        if new.alone or not new.likes:
            self.preferences.append(new)
            return
        position = self.position.get(new.post.same)
        if position is None:
            self.position[new.post.same] = len(self.preferences)
            self.preferences.append(new)
            return
        old = self.preferences[position]
        post = replace(old.post, replies=old.post.replies + new.post.replies)
        self.preferences[position] = Preferences(post, old.likes + new.likes)


def usable(found, kind, path):
    """(kind, the Preferences that pairs can be drawn from). kind is likes, others, or auto: likes
    if any post has replies with unequal likes."""
    unequal = [p for p in found if p.likes and max(p.likes) > min(p.likes)]
    if kind == "auto":
        kind = "likes" if unequal else "others"
    kept = unequal if kind == "likes" else found
    needed = 1 if kind == "likes" else 2
    if len(kept) < needed:
        raise InputError(f"{path} holds nothing to compare: give it picks, lines of prompt, chosen "
                         "and rejected, posts with several replies of unequal reply_likes, or two "
                         "posts or more with replies")
    return kind, kept


def draw_pair(preferences, visit, kind, rng):
    """(better, worse) texts for a post: replies with unequal likes, or a reply to it and one to
    another post."""
    post = preferences[visit.index].post
    likes = preferences[visit.index].likes
    if kind == "likes":
        pairs = []
        for i, a in enumerate(likes):
            for j, b in enumerate(likes):
                if a > b:
                    pairs.append((i, j))
        better, worse = rng.choice(pairs)
        return post.replies[better], post.replies[worse]
    other = (visit.index + rng.randrange(1, len(preferences))) % len(preferences)
    return rng.choice(post.replies), rng.choice(preferences[other].post.replies)


# ---- Members: LoRA and a scalar head each, on one frozen base ------------------------------------

class Heads(nn.Module):
    """M members on one frozen Qwen3, each with LoRA matrices and a scalar head of its own. A member
    is {name in adapter_state: tensor, "score": (1, hidden)}."""

    def __init__(self, model, members):
        super().__init__()
        self.model = model
        self.members = members

    def forward(self, tokens, lengths):
        """The hidden states (B, hidden) at the chats' last tokens."""
        return self.model.last_hidden(tokens, lengths)

    def scores(self, tokens, lengths):
        """The members' scores (M, B), fp32, of chats, tokens (B, T) padded on the right."""
        out = []
        for member in self.members:
            # The member's tensors take the place of the model's by functional_call, not by a copy
            # in place, which autograd would miss: all members' graphs exist at the same time.
            tensors = {}
            for name, tensor in member.items():
                if name != "score":
                    tensors[f"model.{name}"] = tensor
            hidden = torch.func.functional_call(self, tensors, (tokens, lengths))
            out.append((hidden.float() @ member["score"].t()).squeeze(-1))
        return torch.stack(out)

    def parameters_of_members(self):
        """The tensors that train."""
        tensors = []
        for member in self.members:
            tensors.extend(member.values())
        return tensors

    def spread(self):
        """How different the members are (UP-RLHF, arXiv 2401.00243, eq. 12): the mean over LoRA
        layers of the nuclear norm over the Frobenius norm of the members' A matrices, stacked. It
        is 1 if all are equal and of rank one, and at most the root of the number of rows."""
        ratios = []
        for name in self.members[0]:
            if name.endswith("lora_A.weight"):
                a = torch.cat([member[name] for member in self.members])
                ratios.append(torch.linalg.matrix_norm(a, "nuc") / a.norm())
        return torch.stack(ratios).mean()


def new_heads(model, count, rank, alpha, dropout=0.0, targets=LINEARS, seed=0):
    """Heads of `count` untrained members, each with an initialisation of its own."""
    members = []
    hidden = model.config.hidden_size
    for m in range(count):
        if lora_layers(model):
            drop_lora(model)
        add_lora(model, rank, alpha, dropout=dropout, targets=targets, seed=seed_of(seed, m))
        generator = torch.Generator().manual_seed(seed_of(seed, m, "score"))
        score = torch.randn(1, hidden, generator=generator) * hidden ** -0.5
        member = {}
        for name, p in adapter_state(model).items():
            member[name] = p.detach().clone().requires_grad_()
        member["score"] = score.to(model.device).requires_grad_()
        members.append(member)
    model.requires_grad_(False)
    return Heads(model, members)


def preference_loss(better, worse):
    """Bradley-Terry of the members' mean (arXiv 2401.00243, eq. 12): -log sigmoid(mean_m
    r_m(better) - mean_m r_m(worse)). (M, B) each -> (B,)."""
    return -F.logsigmoid(better.mean(0) - worse.mean(0))


def padded(rows, device):
    """(tokens (B, T) padded on the right, lengths (B,)) of lists of token ids."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    lengths = torch.tensor([len(r) for r in rows], device=device)
    return tokens.to(device), lengths


def preference_step(session, step):
    """One step: the mean loss over the step's pairs, minus --member-spread times Heads.spread."""
    args = session.args
    ranks = session.ranks
    heads = session.heads
    tally = Tally()
    session.visits = batch_visits(len(session.posts), args.batch, step, args.seed)
    chats = pairs_of_chats(session, step, session.visits)
    session.model.train()                                                      # for its dropout
    longest = max(map(len, chats[-1]))
    size = max(1, args.micro_tokens // (2 * longest))                          # pairs in one pass
    for start in range(0, len(chats), size):
        some = chats[start:start + size]
        flat = []
        for pair in some:
            flat.extend(pair)
        tokens, lengths = padded(flat, ranks.device)
        scores = heads.scores(tokens, lengths).view(-1, len(some), 2)          # (M, B, 2)
        better, worse = scores.unbind(-1)
        losses = preference_loss(better, worse)
        margin = better - worse
        (losses.sum() / args.batch).backward()
        tally.add("loss", losses.sum().detach(), len(some))
        tally.add("accuracy", (margin.mean(0) > 0).sum(), len(some))
        tally.add("disagreement", margin.std(0, correction=0).sum().detach(), len(some))
        tally.add("tokens", len(heads.members) * tokens.numel())
    session.model.eval()
    if len(heads.members) > 1 and ranks.main:  # once: the ranks' gradients are summed
        spread = heads.spread()
        (-args.member_spread * spread).backward()
        tally.add("spread", spread.detach())
    ranks.sum_gradients(session.params)
    return tally


def pairs_of_chats(session, step, visits):
    """This rank's pairs of a step as token ids, [better, worse] each, shortest first."""
    pairs = []
    for visit in session.ranks.share(visits):
        rng = random.Random(session.seed_for("pair", step, visit))
        texts = draw_pair(session.preferences, visit, session.args.pairs, rng)
        post = session.posts[visit.index]
        pairs.append([session.reward.chat(post, text) for text in texts])
    pairs.sort(key=longest_of)
    return pairs


def longest_of(pair):
    """The length of the longer chat of a pair."""
    return max(map(len, pair))


# ---- Saving and loading --------------------------------------------------------------------------

def save_heads(heads, folder, base, revision=None):
    """Write FOLDER/adapter, or adapter-0, adapter-1, .. of several members, as PEFT writes LoRA for
    sequence classification whose `score` is saved with it."""
    single = len(heads.members) == 1
    for m, member in enumerate(heads.members):
        place = Path(folder) / ("adapter" if single else f"adapter-{m}")
        of_lora = {name: t.detach() for name, t in member.items() if name != "score"}
        with adapter(heads.model, of_lora):
            save_adapter(heads.model, place, base, revision)
        tensors = read_tensors(place, file="adapter_model.safetensors")
        tensors[f"{PREFIX}score.weight"] = member["score"].detach().cpu().contiguous()
        with atomic_write(place / "adapter_model.safetensors") as path:
            save_file(tensors, path, metadata={"format": "pt"})
        config = read_json(place / "adapter_config.json")
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        write_json(place / "adapter_config.json", config)


def member_folders(folder):
    """The members' adapter folders in a folder of rewards.py train, in order; [] if it is none."""
    numbered = sorted(Path(folder).glob("adapter-*"), key=shorter_first)
    places = []
    for place in (Path(folder) / "adapter", *numbered):
        path = place / "adapter_config.json"
        if not path.is_file():
            continue
        config = read_json(path)
        if not isinstance(config, dict) or config.get("modules_to_save") != ["score"]:
            return []
        places.append(place)
    return places


def shorter_first(path):
    """A key that sorts adapter-2 before adapter-10."""
    return len(path.name), path.name


def load_heads(folder, args, device):
    """(Heads, tokenizer, ChatFormat) of a folder of rewards.py train, on the base that its adapters
    name."""
    places = member_folders(folder)
    config = read_json(places[0] / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    revision = config.get("revision")
    targets = config.get("target_modules")
    has_numbers = all(isinstance(config.get(n), (int, float)) for n in ("r", "lora_alpha"))
    if not isinstance(base, str) or not has_numbers or not isinstance(targets, list):
        raise InputError(f"{places[0]}/adapter_config.json lacks the base model, r, lora_alpha or "
                         "target_modules: train the reward model again")
    model = load_model(base, args, device, revision, args.nf4)
    add_lora(model, config["r"], config["lora_alpha"], targets=tuple(targets))
    members = [load_member(place, model, base, device) for place in places]
    model.requires_grad_(False)
    tokenizer, form = load_chat(base, revision)
    return Heads(model.eval(), members), tokenizer, form


def load_member(place, model, base, device):
    """A member's tensors from its adapter folder; InputError if they do not fit the model."""
    wanted = {name: p.shape for name, p in adapter_state(model).items()}
    wanted["score.weight"] = (1, model.config.hidden_size)
    stored = {}
    for name, tensor in read_tensors(place, file="adapter_model.safetensors").items():
        stored[name.removeprefix(PREFIX)] = tensor.float().to(device)
    if {name: tensor.shape for name, tensor in stored.items()} != wanted:
        raise InputError(f"the reward model in {place} does not fit its base {base}: train it "
                         "again")
    score = stored.pop("score.weight")
    return stored | {"score": score}


def reward_model_hash(path):
    """What distinguishes reward models of one name: the hashes of the members' adapters in a folder
    of rewards.py train, else checkpoint.model_hash."""
    hashes = [file_hash(place / "adapter_model.safetensors") for place in member_folders(path)]
    return hashes or model_hash(path, None)


def reward_model_inputs(path):
    """One hash of everything that a reward model is made from: its weights, tokenizer and chat
    template; for members of rewards.py train also those of their base."""
    places = member_folders(path)
    if not places:
        return combined_hash(reward_model_hash(path), chat_hash(path))
    config = read_json(places[0] / "adapter_config.json")
    base = checkpoint_hash(config.get("base_model_name_or_path"), config.get("revision"))
    return combined_hash(reward_model_hash(path), base)


@input_hash("reward_model", "reward model", "reward_model")
def hash_of_reward_model(args):
    """The hash of the reward model that a run uses."""
    return reward_model_inputs(args.reward_model)


# ---- --reward model and --reward judge -----------------------------------------------------------

class HeadsReward(ModelReward):
    """The reward of rewards.py train's reward models: the members' mean minus `penalty` times their
    (population) standard deviation (arXiv 2401.00243, eq. 14)."""

    def __init__(self, heads, tokenizer, domain, form=data.ChatFormat(), penalty=1.0):
        super().__init__(heads.model, tokenizer, domain, form)
        self.heads = heads
        self.penalty = penalty

    def values(self, tokens, lengths):
        """The scores (B,) of chats, tokens (B, T) padded on the right."""
        scores = self.heads.scores(tokens, lengths)
        return scores.mean(0) - self.penalty * scores.std(0, correction=0)


def check_format(session, folder):
    """Warn if a reward model was trained on posts that were put to it in another way than this run
    puts them."""
    record = trained_domain(folder)
    if record is None:
        return
    post = Post("any", "Any post", ())
    known = DOMAINS[record["domain"]].function([post])
    if known.messages(post) != session.domain.messages(post):
        session.say(f"warning: the reward model {folder} was trained on posts as the domain "
                    f"{known.name!r} puts them, and judges here as {session.domain.name!r} does: "
                    "train it on picks of these runs, or with --domain")


def reward_model_flag(session, name):
    """The value of --reward-model, recorded as an input of the run; InputError without one."""
    path = session.args.reward_model
    if not path:
        raise InputError(f"--reward {name} needs --reward-model, a Qwen3 folder or hub name")
    if session.run:
        session.run.made_from("reward_model")
    return path


def model_settings(args):
    """What an evaluation records of --reward model."""
    return {"spread_penalty": args.spread_penalty} | judge_settings(args)


def judge_settings(args):
    """What an evaluation records of --reward judge."""
    if not args.reward_model:
        return {}
    return {"reward_model_hash": reward_model_inputs(args.reward_model)}


@REWARDS.add("model", "a Qwen3 reward model's scalar; of several, mean less standard deviation",
             selects=True, settings=model_settings)
def model_reward(session):
    """The reward of --reward model, by a folder of rewards.py train or a Qwen3 with a scalar head.
    """
    args = session.args
    path = reward_model_flag(session, "model")
    device = session.ranks.device
    if member_folders(path):
        check_format(session, path)
        heads, tokenizer, form = load_heads(path, args, device)
        return HeadsReward(heads, tokenizer, session.domain, form, args.spread_penalty)
    model = load_model(path, args, device)
    if not model.has_score:
        raise InputError(f"--reward-model {path} has no scalar head (score.weight): --reward model "
                         "needs one")
    tokenizer, form = load_chat(path)
    return ModelReward(model, tokenizer, session.domain, form)


@REWARDS.add("judge", "a Qwen3's probability of yes", selects=True, settings=judge_settings,
             passes=0.5)
def judge_reward(session):
    """The reward of --reward judge, by a Qwen3 chat model."""
    path = reward_model_flag(session, "judge")
    model = load_model(path, session.args, session.ranks.device)
    if not model.has_logits:
        raise InputError(f"--reward-model {path} has no token head: --reward judge needs one")
    tokenizer, form = load_chat(path)
    return JudgeReward(model, tokenizer, session.domain, form)


# ---- The command ---------------------------------------------------------------------------------

LOGGED = ["loss", "accuracy", "disagreement", "spread"]


def run_train(args):
    """Train reward models from preferences, into OUT/adapter, or OUT/adapter-0 .. of several."""
    check_common(args)
    if args.shard or args.checkpointing:
        raise InputError("reward models are trained without --shard and --checkpointing: leave "
                         "them out")
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
    session.heads = heads
    session.params = heads.parameters_of_members()
    session.reward = HeadsReward(heads, session.tokenizer, session.domain, session.chat)
    session.say(f"{len(session.posts)} posts, pairs by {args.pairs}, {args.members} member(s)")
    args.steps = args.steps or math.ceil(len(session.posts) * args.epochs / args.batch)

    def step_fn(step):
        return preference_step(session, step)
    announce(session, step_fn)
    summary = train(session, session.params, step_fn, LOGGED)
    if session.ranks.main:
        save_heads(heads, session.run.folder, args.model, args.revision)
    session.run.finish(summary | {"domain": session.domain.record()})
    session.ranks.close()


@COMMANDS.add("train", "reward models from preferences", program="rewards")
def train_command(sub):
    """Add `train` to the commands of rewards.py."""
    t = sub.add_parser("train", help="reward models from picks, likes, or replies and others'")
    add = t.add_argument
    add("--model", required=True, help="Qwen3 checkpoint under the reward: folder or hub name")
    groups = flag_groups(t)
    common_flags(groups, lr=1e-4, steps=0, batch=16)
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
        help="weight of the nuclear over the Frobenius norm of the members' A matrices, which "
             "keeps the members different")
    t.set_defaults(run=run_train)
