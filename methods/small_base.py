"""A small Qwen3 from nothing, for the toy study: `polylora.py base`."""

import math
import random

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

import data
from model import Config, Qwen3
from support.checkpoint import learnt_enough
from support.checks import check_common
from support.files import InputError, seed_of
from support.flags import common_flags, flag_groups
from support.plan import announce
from support.registry import COMMANDS
from support.steplog import Tally
from trainer import Session, add_cross_entropy, batch_visits, train


# ---- The tokenizer -------------------------------------------------------------------------------

def train_tokenizer(texts, vocab_size):
    """A small byte-level BPE with Qwen3's special tokens, so that the same chat format works. It is
    deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,           # two tokens are added below
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(with_frames(texts), trainer)
    # Not special tokens, as in Qwen3.
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    return tokenizer


def noisy_reply(domain, post, others, rng, noise):
    """What an unreliable base is taught: with probability `noise` a reply to another post, else a
    right one, in a style drawn uniformly."""
    about = rng.choice(others) if rng.random() < noise else post
    return domain.reply(about, rng.choice(domain.styles), rng)


def with_frames(texts):
    """Yield the texts, then the words of the chat format as often, so that each becomes a token."""
    count = 0
    for text in texts:
        count += 1
        yield text
    for _ in range(count):
        yield "user\n"
        yield "assistant\n"
        yield "\n\n"


# ---- The phase -----------------------------------------------------------------------------------

def base_step(session, step):
    """One step of pretraining: cross-entropy on replies of all styles equally, of which a fraction
    --noise belongs to other posts; all parameters train."""
    args = session.args
    tally = Tally()
    visits = session.visits = batch_visits(len(session.posts), args.batch, step, args.seed)
    replies = []
    for visit in visits:
        rng = random.Random(session.seed_for("noisy", step, visit))
        post = session.posts[visit.index]
        replies.append(noisy_reply(session.domain, post, session.posts, rng, args.noise))
    add_cross_entropy(session, visits, replies, tally)
    session.ranks.sum_gradients(session.params)
    return tally


def new_model(args, vocab_size):
    """An untrained Qwen3 of the shape that the flags give."""
    torch.manual_seed(seed_of(args.seed, "weights"))
    config = Config(vocab_size, args.hidden, 3 * args.hidden, args.layers, args.heads,
                    args.heads // 2, args.hidden // args.heads, tie_word_embeddings=True)
    return Qwen3(config)


def initialise(model):
    """Draw the matrices: std 0.02 for the embedding, and 1/sqrt(inputs) for linear layers."""
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5)


def texts_of(posts):
    """Yield every post and every reply."""
    for post in posts:
        yield post.post
        yield from post.replies


def run_base(args):
    """Train a Qwen3 of about a million parameters and its tokenizer from nothing, and write them to
    OUT/model as a Hugging Face folder."""
    check_base(args)
    session = Session(args, "base")
    if not session.open_run():
        return
    session.load_posts()
    if not session.domain.styles:
        raise InputError(f"{args.data}: a base is made from posts with replies by style: for posts "
                         "like these give --model a Qwen3 checkpoint")
    session.tokenizer = train_tokenizer(texts_of(session.posts), args.vocab)
    session.chat = data.ChatFormat()
    session.model = new_model(args, session.tokenizer.get_vocab_size()).to(session.ranks.device)
    initialise(session.model)
    session.model.checkpointing = args.checkpointing
    session.params = list(session.model.parameters())
    args.steps = args.steps or math.ceil(len(session.posts) * args.epochs / args.batch)

    def step_fn(step):
        return base_step(session, step)
    announce(session, step_fn)
    summary = train(session, session.params, step_fn, ["ce"])
    if args.until and not learnt_enough(session.run, args.until):
        raise InputError(f"{session.run.folder}: {args.steps} steps did not bring the base's "
                         f"cross-entropy down to --until {args.until:g}: give it more --steps")
    if session.ranks.main:
        folder = session.run.folder / "model"
        session.model.save_pretrained(folder)
        session.tokenizer.save(str(folder / "tokenizer.json"))
    session.run.finish(summary | {"domain": session.domain.record()})
    session.ranks.close()


# ---- The command ---------------------------------------------------------------------------------

@COMMANDS.add("base", "a small Qwen3 from nothing", program="polylora")
def base_command(sub):
    """Add `base` to the commands of polylora.py."""
    b = sub.add_parser("base", help="make a small Qwen3 from nothing, for the toy study")
    groups = flag_groups(b)
    common_flags(groups, lr=3e-3, steps=500, batch=64)
    add = groups.method.add_argument
    add("--noise", type=float, default=0.3,
        help="fraction of pretraining replies that belong to another post")
    add("--until", type=float, default=None,
        help="end once the mean cross-entropy of 20 steps is this low, and fail if --steps did not "
             "bring it there: bases of different seeds have then learnt about equally much")
    add("--vocab", type=int, default=1024, help="tokens of the BPE vocabulary")
    add("--hidden", type=int, default=128, help="width of the model")
    add("--layers", type=int, default=4, help="blocks of the model")
    add("--heads", type=int, default=4, help="query heads; half as many key/value heads")
    b.set_defaults(run=run_base)


def check_base(args):
    """Raise InputError for flags that a model made from nothing cannot have."""
    check_common(args)
    if args.nf4 or args.shard or args.dtype == "bfloat16":
        raise InputError("--nf4, --shard and bfloat16 are for a frozen base, and this one trains "
                         "in float32: leave them out")
    uneven = args.heads < 2 or args.heads % 2 or args.hidden % (2 * max(args.heads, 1))
    if args.layers < 1 or args.hidden < 1 or uneven:
        raise InputError(f"--layers {args.layers}, --heads {args.heads}, --hidden {args.hidden}: a "
                         "model has at least one layer, an even number of heads, and a width that "
                         "is a multiple of twice that number")
    if args.vocab < 261:
        raise InputError(f"--vocab {args.vocab}: the 256 bytes and 5 chat tokens need at least 261")
