"""What a run is about to do: posts, steps, tokens, memory and, with --dry-run, its time."""

import math
import time
from pathlib import Path
from typing import NamedTuple

from support import cost
from support.embedders import TOKENS_A_PASS


MIB = 2 ** 20


def announce(session, step_fn):
    """Print the plan of a run before its first step. With --dry-run, time a few steps, which change
    nothing, print how long the run would take, and end the command."""
    session.say(plan_text(session))
    if session.args.dry_run:
        seconds = time_steps(session, step_fn)
        session.say(f"plan {Path(session.args.out).name}: {session.args.steps} steps, about "
                    f"{seconds:.0f} s")
        session.ranks.close()
        raise SystemExit(0)


def plan_text(session):
    """One line about a run: posts, steps, tokens, memory."""
    args = session.args
    model = session.model
    work = step_work(session)
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    trained = 12 * sum(p.numel() for p in session.params)  # a gradient and Adam's two, in fp32
    return (f"{Path(args.out).name}: {len(session.posts)} posts, {args.steps} steps of "
            f"{args.batch}, up to some {work.tokens * args.steps:,.0f} tokens; memory: weights "
            f"{size_text(weights)}, training {size_text(trained)}, passes and sampling about "
            f"{size_text(pass_bytes(session, work))}")


class Work(NamedTuple):
    """What one step processes, on average."""
    tokens: float            # prompts, replies and completions
    sampled_prompts: float   # prompts that get k completions


def step_work(session):
    """The Work of a step. Lengths are those of the first 64 posts, and a completion may be as long
    as --max-new-tokens. Its tokens count twice, as in the log: they are sampled, then scored."""
    args = session.args
    some = range(min(64, len(session.posts)))
    prompt_length = sum(len(session.prompt(i)) for i in some) / len(some)
    reply_tokens = 0
    sampled_prompts = 0
    if session.stage == "grpo":              # its posts need no reply
        sampled_prompts = args.batch / args.updates
    else:
        lengths = [len(session.encode_reply(session.posts[i].replies[0])) for i in some]
        reply_tokens = args.batch * (prompt_length + sum(lengths) / len(some))
        if getattr(args, "lam", 0) or getattr(args, "lambda_share", 0):
            sampled_prompts = min(args.draft_posts, args.batch) / args.draft_every
    longest = getattr(args, "k", 0) * getattr(args, "max_new_tokens", 0)
    return Work(reply_tokens + sampled_prompts * (prompt_length + 2 * longest), sampled_prompts)


def longest_of(session, some):
    """Tokens of the longest of these prompts."""
    return max(len(session.prompt(i)) for i in some)


def load_of(session, checkpointing=None):
    """The cost.Load of a session's step on one rank."""
    args = session.args
    model = session.model
    world = session.ranks.world
    some = range(min(64, len(session.posts)))
    prompt = longest_of(session, some)
    k = getattr(args, "k", 1)
    new_tokens = getattr(args, "max_new_tokens", 0)
    batch = math.ceil(args.batch / world)
    grpo = session.stage == "grpo"
    sampled = batch if grpo else 0
    passes = []                              # (rows, tokens of a row)
    if not grpo:
        reply = max(len(session.encode_reply(session.posts[i].replies[0])) for i in some)
        passes.append((batch, prompt + reply - 1))
        if getattr(args, "lam", 0) or getattr(args, "lambda_share", 0):
            sampled = math.ceil(min(args.draft_posts, args.batch) / world)
    if sampled:
        row = min(prompt + k * (new_tokens - 1), max(args.micro_tokens, prompt + new_tokens))
        passes.append((sampled, row))
    largest = max(passes, key=lambda p: min(p[0], max(1, args.micro_tokens // p[1])) * p[1])
    rows = min(largest[0], max(1, args.micro_tokens // largest[1]))
    embeds = getattr(session, "embedder", None) is not None
    params = sum(p.numel() for p in session.params)
    return cost.Load(
        train_tokens=sum(n * row for n, row in passes), pass_tokens=rows * largest[1],
        row=largest[1], shared=bool(sampled) and largest is passes[-1] and k > 1, prompts=sampled,
        places=max(1, min(sampled, args.max_rows // k)) if sampled else 0, k=k, prompt=prompt,
        new_tokens=new_tokens, adapter=params, copies=int(bool(sampled)),
        rank=getattr(args, "rank", 16),
        embedded=min(TOKENS_A_PASS, sampled * k * new_tokens) if embeds else 0,
        itemsize=model.dtype.itemsize, nf4=getattr(args, "nf4", False),
        checkpointing=model.checkpointing if checkpointing is None else checkpointing,
        vocab=model.vocab)


def memory(session):
    return cost.memory(session.model.config, load_of(session))


def pass_bytes(session, work):
    """Bytes of the larger of a training pass's activations and the sampler's KV cache."""
    args = session.args
    model = session.model
    config = model.config
    # Kept for the backward pass, a token and block: the block's input, or what its products read.
    width = config.hidden_size
    if not model.checkpointing:
        width = 10 * config.hidden_size + 4 * config.intermediate_size
    tokens = min(args.micro_tokens, work.tokens)
    activations = tokens * config.num_hidden_layers * width * model.dtype.itemsize
    if not work.sampled_prompts:
        return activations
    key_width = config.num_key_value_heads * config.head_dim
    cache_token = 2 * config.num_hidden_layers * key_width * model.dtype.itemsize
    rows = min(args.max_rows, args.batch * args.k)
    return max(activations, cache_token * rows * args.max_new_tokens)


def size_text(size):
    """Bytes as a text, in MiB or GiB."""
    if size > 512 * MIB:
        return f"{size / MIB / 1024:.1f} GiB"
    return f"{size / MIB:.0f} MiB"


def time_steps(session, step_fn):
    """The seconds that the whole run would take, from a few steps. The first step only warms up;
    the others are whole cycles of steps with and without sampling."""
    args = session.args
    cycle = max(getattr(args, "draft_every", 1), getattr(args, "updates", 1))
    count = cycle * math.ceil(2 / cycle)
    for step in range(count + 1):
        if step == 1:
            began = time.perf_counter()
        step_fn(step)
        for p in session.params:
            p.grad = None
    return (time.perf_counter() - began) / count * args.steps
