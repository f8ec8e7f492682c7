"""What a run is about to do: posts, steps, tokens, memory and, with --dry-run, its time. It decides
whether activations are recomputed. A dry run of a model that is not there needs its config.json
alone."""

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from support import cost
from support.embedders import TOKENS_A_PASS
from support.hub import config_without_weights
from support.model_config import config_fields
from support.ranks import choose_dtype, environment_number


MIB = 2 ** 20

MARGIN = 1.15                    # the allocator's fragments, and what a formula cannot know


def announce(session, step_fn):
    """Decide on --checkpointing, and print the plan of a run before its first step. With --dry-run,
    time a few steps, which change nothing, print how long the run would take, and end the
    command."""
    decide_checkpointing(session)
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
    work = step_work(session)
    memory = memory_of(session, session.model.checkpointing)
    return (f"{Path(args.out).name}: {len(session.posts)} posts, {args.steps} steps of "
            f"{args.batch}, up to some {work.tokens * args.steps:,.0f} tokens; "
            f"{memory_text(memory, session.model.checkpointing)}")


def memory_text(memory, checkpointing):
    """The cost.Memory of a run as words."""
    cache = f", sampling {size_text(memory.cache)}" if memory.cache else ""
    how = ", with --checkpointing" if checkpointing else ""
    return (f"memory about {size_text(memory.total)}: weights {size_text(memory.weights)}, "
            f"training {size_text(memory.training)}{cache}, passes {size_text(memory.work)}{how}")


class Work(NamedTuple):
    """What one step processes, on average."""
    tokens: float            # prompts, replies and completions
    sampled_prompts: float   # prompts that get k completions


def step_work(session):
    """The Work of a step. Lengths are those of the first 64 posts, and a completion may be as long
    as --max-new-tokens. Its tokens count twice, as in the log: they are sampled, then scored."""
    args = session.args
    prompts, replies = lengths_of(session)
    prompt_length = sum(prompts) / len(prompts)
    reply_tokens = 0
    sampled_prompts = 0
    if session.stage == "grpo":              # its posts need no reply
        sampled_prompts = args.batch / args.updates
    else:
        reply_tokens = args.batch * (prompt_length + sum(replies) / len(replies))
        if getattr(args, "lam", 0) or getattr(args, "lambda_share", 0):
            sampled_prompts = min(args.draft_posts, args.batch) / args.draft_every
    longest = getattr(args, "k", 0) * getattr(args, "max_new_tokens", 0)
    return Work(reply_tokens + sampled_prompts * (prompt_length + 2 * longest), sampled_prompts)


def lengths_of(session):
    """Tokens of the first 64 posts' prompts, and of their first replies: phase one's posts have
    one, and no other phase needs them."""
    some = range(min(64, len(session.posts)))
    prompts = [len(session.prompt(i)) for i in some]
    if session.stage == "grpo":
        return prompts, [0]
    return prompts, [len(session.encode_reply(session.posts[i].replies[0])) for i in some]


# ---- Memory, and --checkpointing -----------------------------------------------------------------

def load_for(stage, args, world, prompt, reply, **known):
    """The cost.Load of a step on one of `world` ranks; prompt, reply: tokens of the longest ones.
    known: what the flags do not say."""
    k = getattr(args, "k", 1)
    new_tokens = getattr(args, "max_new_tokens", 0)
    batch = math.ceil(args.batch / world)
    passes = []                              # (rows on this rank, tokens of a row, predicted ones)
    sampled = batch
    if stage != "grpo":
        passes.append((batch, prompt + reply - 1, reply))
        weighs_D = getattr(args, "lam", 0) or getattr(args, "lambda_share", 0)
        sampled = math.ceil(min(args.draft_posts, args.batch) / world) if weighs_D else 0
    if sampled:                              # a group that is too long for a pass is split
        row = min(prompt + k * (new_tokens - 1), max(args.micro_tokens, prompt + new_tokens - 1))
        passes.append((sampled, row, min(k * new_tokens, row)))

    def at_once(rows, row):
        return min(rows, max(1, args.micro_tokens // row))
    largest = max(passes, key=lambda one: at_once(*one[:2]) * one[1])
    rows, row, predicted = largest
    rows = at_once(rows, row)
    return cost.Load(
        train_tokens=sum(n * tokens for n, tokens, _ in passes), pass_tokens=rows * row, row=row,
        shared=bool(sampled) and k > 1 and largest == passes[-1], predicted=rows * predicted,
        prompts=sampled, places=min(sampled, max(1, args.max_rows // k)), k=k, prompt=prompt,
        new_tokens=new_tokens, copies=int(bool(sampled)), rank=getattr(args, "rank", 16),
        nf4=args.nf4, **known)


def load_of(session, checkpointing):
    """The cost.Load of a session's step."""
    model = session.model
    ranks = session.ranks
    prompts, replies = lengths_of(session)
    graphs = ranks.device.type == "cuda" if model.graphs is None else model.graphs
    load = load_for(session.stage, session.args, ranks.world, max(prompts), max(replies),
                    adapter=sum(p.numel() for p in session.params), vocab=model.vocab,
                    itemsize=model.dtype.itemsize, checkpointing=checkpointing,
                    graphs=graphs and not model.lockstep)
    if getattr(session, "embedder", None) is None:
        return load
    return load.embedding(TOKENS_A_PASS)


def memory_of(session, checkpointing):
    """The cost.Memory of a session's step; the weights are those that it holds."""
    embedder = getattr(getattr(session, "embedder", None), "model", None)
    models = {id(m): m for m in (session.model, embedder) if m is not None}
    weights = 0
    for model in models.values():
        for x in (*model.parameters(), *model.buffers()):
            weights += local_bytes(x)
    weights -= sum(p.nbytes for p in session.params)
    return cost.memory(session.model.config, load_of(session, checkpointing), weights)


def local_bytes(x):
    """The bytes of a tensor that this rank holds."""
    return x.to_local().nbytes if hasattr(x, "to_local") else x.nbytes


def free_bytes(device):
    """Memory that this process may still take: of the GPU, or this rank's share of the host's; None
    if the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux
        return None
    return available / max(1, environment_number("LOCAL_WORLD_SIZE", 1))


def decide_checkpointing(session):
    """Set --checkpointing where it is not given: on if the step would not fit into the free memory
    without it. All ranks decide alike: with --shard a block is put together by all of them."""
    args = session.args
    if args.checkpointing is None:
        args.checkpointing = session.stage != "reward" and too_large(session)
        if args.checkpointing:
            session.say("activations are recomputed in the backward pass, since they would not "
                        "fit into the free memory (--no-checkpointing keeps them)")
    session.model.checkpointing = args.checkpointing


def too_large(session):
    """Whether the step would need more than the free memory on any rank without --checkpointing."""
    free = free_bytes(session.ranks.device)
    memory = memory_of(session, checkpointing=False)
    needed = MARGIN * (memory.total - memory.weights)
    too_much, = session.ranks.sum([float(free is not None and needed > free)])
    return too_much > 0


def size_text(size):
    """Bytes as a text, in MiB or GiB."""
    if size > 512 * MIB:
        return f"{size / MIB / 1024:.1f} GiB"
    return f"{size / MIB:.0f} MiB"


# ---- Time ----------------------------------------------------------------------------------------

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


def announce_measure(session, rehearse, some=8):
    """--dry-run of measuring: print how long one run takes over all posts, from a few;
    rehearse(session, count) measures the first `count`."""
    args = session.args
    few = min(some, len(session.posts))
    rehearse(session, 1)                     # warms up
    began = time.perf_counter()
    rehearse(session, few)
    seconds = time.perf_counter() - began
    seconds *= len(session.posts) / few / session.ranks.world
    what = "measure" if args.decoder == "sampling" else args.decoder
    session.say(f"plan {what}: {len(session.posts)} posts with {args.n} drafts, a run: "
                f"about {seconds:.0f} s")
    session.ranks.close()


# ---- A dry run without weights -------------------------------------------------------------------

BYTES_A_TOKEN = 4                # of a post, where there is no tokenizer to count with

FRAME = 16                       # tokens of the chat format around a post


def plan_without_weights(session):
    """In a dry run of a model whose weights are not on this machine: print the plan by config.json
    alone, and end the command. Else do nothing."""
    args = session.args
    config = config_without_weights(args.model, args.revision) if args.dry_run else None
    if config is None:
        return
    config = SimpleNamespace(**config_fields(config))
    name = Path(args.out).name
    session.say(f"{name}: by {args.model}'s config.json alone, whose weights are not here: tokens "
                f"are guessed from bytes, times from this machine's rates")
    dtype = choose_dtype(args.dtype, session.ranks.device)
    card = measured_card(session.ranks.device, dtype)
    if session.stage == "measure":
        plan_measure(session, config, card, dtype)
    else:
        plan_training(session, config, card, dtype, name)
    session.ranks.close()
    raise SystemExit(0)


def plan_training(session, config, card, dtype, name):
    """Print what a run of either phase would take."""
    args = session.args
    load = guessed_load(session, config, dtype)
    free = free_bytes(session.ranks.device)
    if args.checkpointing is None:
        needed = MARGIN * cost.memory(config, load).total
        load = load.recomputing(free is not None and needed > free)
    else:
        load = load.recomputing(args.checkpointing)
    steps = args.steps or (math.ceil(len(session.posts) * args.epochs / args.batch)
                           * getattr(args, "updates", 1))
    memory = cost.memory(config, load)
    session.say(f"{name}: {len(session.posts)} posts, {steps} steps of {args.batch}; "
                f"{memory_text(memory, load.checkpointing)}")
    if free is not None and MARGIN * memory.total > free:
        session.say(f"warning: {name} needs more than the {size_text(free)} that are free here")
    seconds = steps * cost.step_seconds(config, load, card)
    session.say(f"plan {name}: {steps} steps, about {seconds:.0f} s")


def plan_measure(session, config, card, dtype):
    """Print how long completions of all posts would take, as evaluate.py's own dry run does."""
    args = session.args
    prompt, _ = guessed_lengths(session)
    posts = math.ceil(len(session.posts) / session.ranks.world)
    places = min(posts, max(1, args.max_rows // args.n))
    load = cost.Load(train_tokens=0, pass_tokens=0, row=0, shared=False, prompts=posts,
                     places=places, k=args.n, prompt=prompt, new_tokens=args.max_new_tokens,
                     itemsize=dtype.itemsize, nf4=args.nf4, vocab=config.vocab_size)
    seconds = cost.step_seconds(config, load.embedding(TOKENS_A_PASS), card)
    session.say(f"plan measure: {len(session.posts)} posts with {args.n} drafts, a run: about "
                f"{seconds:.0f} s")


def guessed_load(session, config, dtype):
    """The cost.Load of a step of either phase, where there is neither model nor tokenizer."""
    args = session.args
    ranks = session.ranks
    prompt, reply = guessed_lengths(session)
    adapter = cost.adapter_numbers(config, getattr(args, "rank", 16))
    graphs = ranks.device.type == "cuda" and not args.no_graphs and not args.shard
    load = load_for(session.stage, args, ranks.world, prompt, reply, adapter=adapter,
                    itemsize=dtype.itemsize, vocab=config.vocab_size, graphs=graphs,
                    shards=ranks.world if args.shard else 1)
    return load.embedding(TOKENS_A_PASS) if load.prompts else load


def guessed_lengths(session):
    """Tokens of the longest prompt and reply among the first 64 posts, guessed from their bytes."""
    prompts = []
    replies = [0]
    for place in range(min(64, len(session.posts))):
        post = session.posts[place]
        texts = [message["content"] for message in session.domain.messages(post)]
        prompts.append(sum(len(text.encode()) for text in texts) // BYTES_A_TOKEN + FRAME)
        replies += [len(reply.encode()) // BYTES_A_TOKEN + 2 for reply in post.replies[:1]]
    return max(prompts), max(replies)


def measured_card(device, dtype):
    """The cost.Card of this machine: a product and a copy are timed."""
    size = 4096 if device.type == "cuda" else 512
    a = torch.ones(size, size, dtype=dtype, device=device)
    large = torch.ones(size * size * 8, dtype=torch.uint8, device=device)

    def rate(amount, function):
        function()                           # warms up
        synchronise(device)
        began = time.perf_counter()
        for _ in range(3):
            function()
        synchronise(device)
        return 3 * amount / max(time.perf_counter() - began, 1e-9)
    products = rate(2 * size ** 3, lambda: a @ a)
    moved = rate(2 * large.numel(), large.clone)
    return cost.Card("this machine", 0, products, moved, cost.LINK)


def synchronise(device):
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
