"""What the phases share: seeds, the order of posts, the training loop, the session, the embedder.

A phase is a function `step(number)` that leaves the gradient of the whole step on the parameters;
`train` is the loop around it. No random state is saved: every random number is a function of
(seed, purpose, step, post, completion), whichever rank or batch it is drawn in. Only dropout
depends on the step, the rank and its micro-batches. So a resumed run equals an undisturbed one, in
every bit on CPUs; kernels of GPUs that add in any order make them equal up to rounding."""

import functools
import math
import random
import signal
import sys
import time
from array import array
from itertools import islice
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
from data import chat_format
from engine import generate      # as generate.generate_plain, faster
from generate import SAMPLING, Embedder
from lora import save_adapter
from model import Qwen3, pack, token_logprobs
from support.card import prompt_of, write_card
from support.checkpoint import RunFolder, learnt_enough, leave, peak_bytes, replay
from support.embedders import sentence_format
from support.files import InputError, duration, fetch, printable, read_json, seed_of, short
from support.plan import plan_without_weights
from support.progress import numbers_of
from support.ranks import Ranks, Signals, choose_dtype, shard
from support.registry import EMBEDDERS


# ---- The order of posts --------------------------------------------------------------------------

class Visit(NamedTuple):
    """Post `index` in its `epoch`-th pass over the file. A small file is passed more than once
    within a step; seeds depend on the pass too, so that noise is never repeated."""
    index: int
    epoch: int
    attempt: int = 0             # of a step that resamples (methods/resample.py)


@functools.lru_cache(maxsize=4)  # shuffling a million places takes a second
def epoch_order(count, seed, epoch):
    """The places 0 .. count - 1 in the order of an epoch."""
    order = array("L", range(count))
    random.Random(seed_of(seed, "epoch", epoch)).shuffle(order)
    return order


def batch_visits(count, size, step, seed):
    """The `size` visits of a step, over all ranks; each epoch goes over all `count` posts."""
    visits = []
    for number in range(step * size, (step + 1) * size):
        epoch, place = divmod(number, count)
        visits.append(Visit(epoch_order(count, seed, epoch)[place], epoch))
    return visits


# ---- The loop ------------------------------------------------------------------------------------

def learning_rate(step, steps, peak, warmup, schedule):
    """Linear warm-up over `warmup` steps, then a cosine to zero, or constant."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def train(session, params, step_fn, names, shaping=None):
    """The loop of every phase: step, clip, update, log, save. Returns the line that ends the log.

    step_fn(step) leaves the whole step's gradient, summed over ranks, on `params` and returns a
    Tally; `names` are the means to log. A step whose gradient or loss is not finite is skipped and
    counted; five in a row stop the run. A base ends earlier, once it has learnt as much as --until
    asks. `shaping`: what an adapter does before and after each update (support/shaping.py)."""
    with session.run, Signals() as signals, session.ranks.together():
        loop = Loop(session, params, names, shaping)
        for step in loop.bar:
            loop.update(step, step_fn)
            if loop.may_end(step, signals):
                break
        return loop.finish(step)


class Loop:
    """The state of a training loop."""

    def __init__(self, session, params, names, shaping):
        args = session.args
        self.session = session
        self.params = params
        self.names = names
        self.shaping = shaping
        self.kept = [*params, *(shaping.kept if shaping else ())]      # what a checkpoint holds
        self.optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, args.beta2),
                                           weight_decay=args.weight_decay, fused=True)
        self.first = session.run.restore(self.kept, self.optimizer)
        self.began = time.perf_counter()
        if set(session.ranks.gather([self.first])) != {self.first}:
            raise InputError(f"the ranks find different checkpoints in {session.run.folder}: it "
                             "must be one folder that all machines share")
        self.signals, self.skipped = replay(session.run)
        self.in_a_row = 0                     # skipped steps
        self.tokens = 0
        self.bar = tqdm(range(self.first, args.steps), initial=self.first, total=args.steps,
                        desc=session.run.folder.name, unit="step", disable=not session.ranks.main,
                        mininterval=0.5 if sys.stderr.isatty() else 15)

    def update(self, step, step_fn):
        """One step, its update and its line of the log."""
        args = self.session.args
        ranks = self.session.ranks
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup, args.schedule)
        torch.manual_seed(seed_of(args.seed, "dropout", step, ranks.rank))
        tally = step_fn(step)
        if self.shaping:
            self.shaping.before()
        norm = float(torch.nn.utils.clip_grad_norm_(self.params, args.clip))
        means = tally.means(ranks, self.names)  # all ranks', so that all skip a step or none
        losses = [means[name] for name in ("loss", "ce") if name in means]
        finite = all(math.isfinite(value) for value in (norm, *losses))
        if finite:
            self.optimizer.step()
            if self.shaping:
                self.shaping.after(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        worked, = ranks.sum([tally.sums.get("tokens", (0, 0))[0]])
        self.tokens += worked
        line = {"step": step + 1, "lr": self.optimizer.param_groups[0]["lr"],
                "grad_norm": norm if finite else None}
        line |= {name: value for name, value in means.items() if math.isfinite(value)}
        line |= {"seconds": time.perf_counter() - start, "tokens": worked,
                 "peak_bytes": peak_bytes(ranks.device)}
        self.log(line)
        if self.in_a_row == 5:
            raise InputError(self.not_finite(step))

    def log(self, line):
        run = self.session.run
        run.log(line)
        for warning in self.signals.warnings_of(line):
            self.session.say(f"warning: {run.folder.name}, step {line['step']}: {warning}")
        self.bar.set_postfix(numbers_of(self.session.stage, line, self.names), refresh=False)

    def not_finite(self, step):
        ids = [self.session.posts[visit.index].id[:40] for visit in self.session.visits[:20]]
        posts = ", ".join(map(printable, ids))
        return (f"step {step + 1} of {self.session.run.folder}: gradient or loss not finite five "
                f"times in a row (posts {posts}): lower --lr, or use --dtype float32")

    def may_end(self, step, signals):
        """Is the run over after this step? Writes checkpoints, and ends the program after a
        signal."""
        args = self.session.args
        run = self.session.run
        last = step + 1 == args.steps or learnt_enough(run, getattr(args, "until", None))
        signalled, = self.session.ranks.sum([signals.seen])
        # Completions are no part of a checkpoint: none is written while some are still to be used.
        stop = signalled and (step + 1) % getattr(args, "updates", 1) == 0
        if not last and (stop or (step + 1) % args.save_every == 0):
            run.save(step + 1, self.kept, self.optimizer)
        if stop and not last:
            leave(self.session, self.bar, step + 1, signals.seen or signal.SIGTERM)
        if step - self.first == 2 and not last:
            pace = (time.perf_counter() - self.began) / 3
            left = duration(pace * (args.steps - step - 1))
            self.session.say(f"{run.folder.name}: {pace:.2g} s a step, about {left} to the end")
        return last

    def finish(self, step):
        """The line that ends the log."""
        ranks = self.session.ranks
        seconds = time.perf_counter() - self.began
        summary = {"event": "end", "stage": self.session.stage, "step": step + 1,
                   "seconds": seconds, "peak_bytes": peak_bytes(ranks.device),
                   "skipped": self.skipped,
                   "tokens_per_second": self.tokens / seconds if self.tokens else None,
                   "ranks": ranks.world, "device": str(ranks.device.type),
                   "warnings": self.signals.said}
        self.session.run.log(summary)
        return summary


# ---- The session ---------------------------------------------------------------------------------

class Session:
    """What a phase or a measurement works with: flags, ranks, posts, tokenizer, model."""

    run = None                    # the run folder, of a phase that has one
    posts = None                  # a sequence of posts
    domain = None                 # how posts are put to the model and completions are judged
    tokenizer = None
    chat = None                   # the checkpoint's chat format
    model = None                  # the policy: frozen base and adapter
    stops = None                  # token ids that end a completion
    embedder = None               # texts -> unit vectors, for D and for rewards
    gate = None                   # completions -> quality in [0, 1], which D is multiplied with
    reward = None                 # (posts, texts, seeds) -> rewards
    params = None                 # the tensors that train
    visits = ()                   # the step's, over all ranks
    start = None                  # phase two: the starting adapter, frozen
    batches = None                # phase two: the micro-batches of the rollout in use
    token_count = None            # phase two: their completion tokens, over all ranks
    first_diversity = None        # phase two: D of the first step that sampled
    values = None                 # values of posts (methods/spo.py)
    preferences = None            # what a reward model trains on (methods/reward_model.py)
    heads = None                  # the reward models that train
    helper = None                 # what a decoder needs beside the policy
    selector = None               # the reward that picks the best of k, when measuring
    agreement = None              # the cosine above which a completion agrees with a reply
    threshold = None              # the reward above which a completion passes
    judge = None                  # a judge of completions (methods/judge.py)

    def __init__(self, args, stage):
        self.args = args
        self.stage = stage        # "base", "sft", "grpo", "measure": part of every seed
        self.ranks = Ranks(f"{stage}:{args.out}", args.device)

    def open_run(self):
        """Make or reopen the run folder; False, with a word, when it is finished already. A dry
        run has none."""
        if getattr(self.args, "dry_run", False):
            return True
        self.run = RunFolder(self.args, self.ranks)
        if self.run.done:
            self.say(f"{self.run.folder}: done already")
            if self.ranks.main:
                self.run.tidy()
            self.ranks.close()
        return not self.run.done

    def say(self, text):
        if self.ranks.main:
            print(text, flush=True)

    def load(self):
        """The data, then the frozen model: a bad line is found before gigabytes are read."""
        self.load_posts()
        plan_without_weights(self)           # a dry run of a model that is not there ends here
        self.load_model()

    def load_posts(self):
        args = self.args
        self.posts = data.load_posts(args.data, skip_bad_lines=args.skip_bad_lines)
        self.domain = data.load_domain(args.data, args.domain, self.posts)
        if self.stage != "base":
            self.domain.prepare(args)

    def load_model(self):
        args = self.args
        self.tokenizer, self.chat = load_chat(args.model, args.revision)
        if args.shard and (self.ranks.world == 1 or args.nf4):
            raise InputError("--shard spreads the weights over several ranks, without --nf4: start "
                             "it by torchrun --nproc-per-node=N")
        if self.run:
            self.run.made_from("model", "model_chat")
        self.model = load_model(args.model, args, self.ranks.device, args.revision, args.nf4,
                                args.shard)
        real = data.vocabulary(self.tokenizer)  # the matrix's rows above are padding
        self.model.vocab = min(self.model.vocab, real)
        self.stops = data.stop_ids(self.tokenizer)

    def shard_model(self):
        """With --shard, once the adapter is on the model: spread it over the ranks."""
        if self.args.shard:
            shard(self.model, self.ranks)

    def passes(self, batches):
        """The batches, for a pass through the model each; then, with --shard, wait for ranks that
        have more."""
        yield from batches
        if self.model.lockstep:
            self.model.lockstep.wait()

    def micro_batches(self, pairs):
        """Rows (model.pack) of at most --micro-tokens tokens, from (prompt ids, [completion ids,
        ..]) pairs."""
        rows = pack(pairs, self.args.micro_tokens, self.ranks.device, self.model.members)
        return self.passes(rows)

    def prompt(self, index):
        return self.prompt_of(self.posts[index])

    def prompt_of(self, post):
        """The token ids of a post in the checkpoint's chat format, up to where the reply begins."""
        return data.encode_prompt(self.tokenizer, self.domain.messages(post), self.chat)

    def encode_reply(self, text):
        return data.encode_reply(self.tokenizer, text)

    def seed_for(self, purpose, step, visit):
        """The seed of a visit's random numbers for one purpose, on whichever rank it is."""
        parts = (self.args.seed, purpose, step, self.posts[visit.index].key, visit.epoch)
        return seed_of(*parts, visit.attempt) if visit.attempt else seed_of(*parts)

    def sample_completions(self, visits, step, k, progress=None):
        """k completions for each visit: (prompts, Samples, texts), prompts P lists of ids, texts P
        lists of k."""
        args = self.args
        prompts = [self.prompt(visit.index) for visit in visits]
        seeds = [self.seed_for(self.stage, step, visit) for visit in visits]
        samples = generate(self.model, prompts, k=k, max_new_tokens=args.max_new_tokens,
                           stop_ids=self.stops, seed=seeds, max_rows=args.max_rows,
                           progress=progress, **sampling_of(args))
        texts = []
        for group in samples.tokens:
            texts.append([data.decode(self.tokenizer, ids) for ids in group])
        return prompts, samples, texts


def load_model(path, args, device, revision=None, nf4=False, shard=False):
    """The Qwen3 at `path` as the flags want it; one to be spread over ranks is read into the
    host's memory."""
    dtype = choose_dtype(args.dtype, device)
    where = "cpu" if shard else device
    model = Qwen3.from_pretrained(path, revision=revision, device=where, dtype=dtype, nf4=nf4)
    model.checkpointing = bool(getattr(args, "checkpointing", False))  # None: support/plan.py
    model.graphs = False if getattr(args, "no_graphs", False) else None
    return model


def load_chat(path, revision=None):
    """(tokenizer, ChatFormat) of the checkpoint at `path`, both checked."""
    tokenizer = data.load_tokenizer(path, revision=revision)
    data.check_chat(tokenizer, path)
    return tokenizer, chat_format(fetch(path, revision))


# ---- Shared by the phases ------------------------------------------------------------------------

def add_cross_entropy(session, visits, replies, tally, losses=None):
    """Add the gradient of the mean token cross-entropy of the step's replies, one text a visit, or
    of another loss, losses(session, rows) -> (N,).

    Every rank counts the whole batch's tokens: the one denominator of all ranks' and micro-batches'
    sums."""
    members = session.model.members           # all members of an ensemble learn from every reply
    pairs = []
    count = 0
    for visit, reply in zip(visits, replies):
        ids = data.encode_reply(session.tokenizer, reply)
        pairs.append((session.prompt(visit.index), [ids] * members))
        count += members * len(ids)
    for rows in session.micro_batches(pairs[session.ranks.rank::session.ranks.world]):
        if losses:
            loss = losses(session, rows)
            name = "loss"
        else:
            logp, _ = token_logprobs(session.model, rows)
            loss = -logp
            name = "ce"
        (loss.sum() / count).backward()
        tally.add(name, loss.sum().detach(), len(loss))
        tally.add("tokens", rows.tokens.numel())


def finish_adapter(session, summary):
    """The result of either phase: OUT/adapter with its model card, then done.json with the domain
    that it was trained for."""
    summary = summary | {"domain": session.domain.record()}
    if session.ranks.main:
        folder = session.run.folder / "adapter"
        save_adapter(session.model, folder, session.args.model, session.args.revision)
        write_card(folder, session.run.config, summary, prompt_of(session.domain))
    session.run.finish(summary)
    session.ranks.close()


def sampling_of(args):
    """The flags of sampling that a command has, as arguments of `generate`."""
    return {name: getattr(args, name) for name in SAMPLING if hasattr(args, name)}


def load_embedder(session):
    """Set session.embedder by --embedder: the base model, a registered kind, or a
    Qwen3-Embedding."""
    if session.run and session.args.embedder != "base":
        session.run.made_from("embedder")
    session.embedder = named_embedder(session, session.args.embedder)


def named_embedder(session, name):
    """The embedder that --embedder NAME means."""
    args = session.args
    if name == "base":
        texts = (reply for post in session.posts for reply in post.replies or (post.post,))
        corpus = list(islice(texts, 2048))
        return Embedder(session.model, session.tokenizer, corpus=corpus)
    for row in EMBEDDERS.values():
        if row.claims is not None and row.claims(name):
            return row.function(name, session)
    device = session.ranks.device
    tokenizer = data.load_tokenizer(name)
    folder = fetch(name)
    config = read_json(folder / "config.json")
    kind = str(config.get("model_type", "qwen3")) if isinstance(config, dict) else short(config)
    if kind in EMBEDDERS and EMBEDDERS[kind].claims is None:
        return EMBEDDERS[kind].function(name, tokenizer, device)
    if kind == "qwen3":
        return qwen3_embedder(name, args, folder, tokenizer, device)
    raise InputError(f"--embedder {name}: its config.json describes a {short(kind)} model: give a "
                     "Qwen3-Embedding, a BERT encoder such as all-MiniLM-L6-v2, or base")


def qwen3_embedder(name, args, folder, tokenizer, device):
    if tokenizer.token_to_id("<|endoftext|>") is None:
        raise InputError(f"{folder}/tokenizer.json has no token <|endoftext|>, whose state is the "
                         "embedding: give a Qwen3-Embedding or a BERT encoder")
    model = load_model(name, args, device)
    form = sentence_format(folder, "last", model.config.hidden_size, device)
    return Embedder(model, tokenizer, pooling="last", form=form)
