"""Judging runs: n completions for each held-out post, scored; drafts for one post.

Everything is counted within a post, then averaged over posts: completions of different posts differ
anyway, so pooling them would hide a model that always says the same thing. Pass@k asks whether any
of k completions pleases the user whom the reward draws. A number that cannot be computed is an
error, or is left out and counted, never a zero.

    python evaluate.py measure runs/lora-1 runs/poly-1 --data eval.jsonl --base-out runs/base-1
    python evaluate.py measure runs/lora-1 --data eval.jsonl --decoder beams  # runs/lora-1@beams
    python evaluate.py report runs/base-1 runs/lora-1 runs/poly-1 --out results --against lora
    python evaluate.py drafts runs/poly-1 "Just adopted a kitten!"
    python evaluate.py ask runs/lora-1 runs/poly-1 --out picks.csv

Read `measure_run` and `some_records` first. A record's fields are described in report/runs.py,
its metrics in metrics.py."""

import argparse
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass

import torch
from tqdm import tqdm

from generate import SAMPLING
from lora import drop_lora, load_adapter
from metrics import vendi_score
from polylora import diversity
from rewards import AgreementReward, make_reward
from support import registry
from support.checkpoint import peak_bytes, same_base, stalled
from support.checks import (alone, check_decoder, check_measure, same_domain,
                            trained_domain)
from support.evaluations import (alike, compare_words, finished, jobs_of, measured, name_model,
                                 write_evaluation)
from support.files import InputError, command, printable
from support.flags import decoding_flags, drafts_flags, flag_groups, measure_flags
from support.pass_bar import bar
from support.picks import converse
from support.plan import announce_measure
from support.posts import Post
from support.registry import DECODERS, DOMAINS, MEASURES, REWARDS, add_commands
from support.steplog import Tally, tally_completions
from trainer import Session, Visit, load_embedder


# ---- Measuring runs: n completions for each held-out post, scored --------------------------------

def measure(args):
    """Write evaluation.json into each run folder. A run measured already, on the same posts by the
    same model with the same settings, is not measured again."""
    check_measure(args)
    runs = [finished(run) for run in args.runs]
    if runs:
        name_model(args, runs[0])
    if not args.model:
        raise InputError("give runs to measure, or --model with --base-out")
    args.out = str(runs[0] if runs else args.bare)
    session = Session(args, "measure")
    session.load()
    for run in runs:
        same_domain(run, session.domain)
        same_base(run, args)
    if args.dry_run:
        load_measures(session)
        announce_measure(session, rehearse)
        return
    every = jobs_of(session, runs)
    jobs = [job for job in every if not measured(job.folder, job.settings)]
    session.ranks.barrier()
    session.say(f"measure: {len(session.posts)} posts with {args.n} drafts, {len(jobs)} of "
                f"{len(runs) + bool(args.bare)} runs")
    scale = load_measures(session) if jobs else None
    for job in jobs:
        change_adapter(session, job)
        args.seed = job.settings["seed"]  # the run's own seed, the same for every method
        measure_run(session, job.folder, job.settings, scale, job.config)
    session.say(compare_words([job.folder for job in every]))
    session.ranks.close()


def load_measures(session):
    """Load what scores completions: embedder, reward, judge, and what the decoder needs. Returns
    the scale of a reward without a verifier."""
    args = session.args
    scale = None
    session.shard_model()
    load_embedder(session)
    session.selector = None
    if not session.domain.styles:
        session.reward = make_reward(args.reward, session)
        session.threshold, scale = passing(session, session.reward)
    elif args.reward in REWARDS and REWARDS[args.reward].selects:
        # The verifier says what is right, this reward what is picked of k.
        session.selector = make_reward(args.reward, session)
    for row in MEASURES.values():
        if row.load is not None:
            row.load(session)
    session.helper = decoding_helper(session)
    return scale


def passing(session, reward):
    """(threshold, scale) of a reward without a verifier: see support/pass_bar.py. Without people's
    replies a completion passes above --pass-above, or a judge's when "yes" is likelier than "no";
    there is no scale."""
    if all(post.replies for post in session.posts):
        return bar(session.posts, reward, isinstance(reward, AgreementReward))
    threshold = session.args.pass_above
    if threshold is None and session.args.reward in REWARDS:
        threshold = REWARDS[session.args.reward].passes
    if threshold is None:
        raise InputError("some of these posts have no replies, whose reward would say what passes: "
                         "use --reward judge, or say which reward passes with --pass-above")
    return threshold, None


def change_adapter(session, job):
    """Put the adapter of a job's run on the model, in place of the last one."""
    if session.args.shard:               # modules of a sharded model cannot be exchanged
        session.load_model()
        if session.args.embedder == "base":
            session.embedder.model = session.model
    drop_lora(session.model)
    if job.settings["adapter"]:
        load_adapter(session.model, job.run / "adapter", dropout=0.0)
        alone(session.model, session.args.decoder)
    session.shard_model()


def measure_run(session, run, settings, scale, config):
    """Measure the model as it stands: evaluation.json, config.json of what is no run of training
    (config, else None), and a line in metrics.jsonl. Each rank measures its share of the posts."""
    began = time.perf_counter()
    ranks = session.ranks
    mine = ranks.share(list(range(len(session.posts))))
    with tqdm(total=len(mine), desc=f"measure {run.name}", unit="post", disable=not ranks.main,
              mininterval=0.5 if sys.stderr.isatty() else 15) as progress:
        samples, texts = decode(session, mine, progress.update)
    rounds = math.ceil(len(session.posts) / ranks.world / SOME)
    records = ranks.gather(make_records(session, mine, samples, texts, rounds))
    tokens = 0
    for completions in samples.tokens:
        tokens += sum(len(ids) for ids in completions)
    tokens, = ranks.sum([tokens])
    seconds = time.perf_counter() - began
    if not ranks.main:
        return
    warnings = stalled(shares_of(records))
    for warning in warnings:
        session.say(f"warning: {run.name}: {warning}")
    end = {"event": "end", "stage": "measure", "seconds": seconds,
           "tokens_per_second": tokens / seconds, "peak_bytes": peak_bytes(ranks.device),
           "ranks": ranks.world, "device": ranks.device.type, "warnings": warnings}
    result = {"version": 2, "domain": session.domain.name, "settings": settings, "scale": scale,
              "records": records}
    write_evaluation(run, result, config, end)


def decode(session, mine, progress=None):
    """(Samples, texts): n completions by --decoder for each of the posts of indices `mine`."""
    visits = [Visit(i, 0) for i in mine]
    sampler = DECODERS[session.args.decoder].function
    return sampler(session, visits, session.args.n, progress, session.helper)


def shares_of(records):
    """{number that support/checkpoint.py warns about: its mean} over a run's completions: how many
    were cut off, are empty, are identical within their post, and are right or pass."""
    tally = Tally()
    ended = [record.get("finished", []) for record in records]
    texts = [record.get("drafts", []) for record in records]
    tally_completions(tally, ended, texts)
    for record in records:
        right = record.get("voices", [])
        passed = record.get("passed", [])
        tally.add("valid", sum(map(bool, right)), len(right))
        tally.add("passed", sum(passed), len(passed))
    return {name: total / count for name, (total, count) in tally.sums.items() if count}


def rehearse(session, count):
    """What measuring does for the first `count` posts, without results."""
    mine = list(range(count))
    samples, texts = decode(session, mine)
    make_records(session, mine, samples, texts)


# ---- Records -------------------------------------------------------------------------------------

SOME = 32  # posts whose completions are embedded and scored together, at most: bounds memory


@dataclass
class Scored:
    """n completions for each of P posts, as MEASURES see them."""
    posts: list
    prompts: list                # P lists of ids
    tokens: list                 # P lists of n lists of ids
    texts: list                  # P lists of n texts
    embeddings: torch.Tensor     # (P, n, dim)


def make_records(session, mine, samples, texts, rounds=1):
    """One record for each of the posts of indices `mine` (fields: report/runs.py), some at a
    time, in equally many rounds on every rank."""
    records = []
    for i in range(rounds):
        part = slice(len(mine) * i // rounds, len(mine) * (i + 1) // rounds)
        records += some_records(session, mine[part], samples.tokens[part], samples.finished[part],
                                texts[part])
    return records


def some_records(session, mine, tokens, ended, texts):
    """The records of the posts of indices `mine`, scored together; tokens, texts and whether they
    ended by a stop token are their completions', P lists of n."""
    posts = []
    prompts = []
    records = []
    for place, i in enumerate(mine):
        post = session.posts[i]
        posts.append(post)
        prompts.append(session.prompt(i))
        records.append({"id": post.id, "post": post.post, "intent": post.intent,
                        "drafts": texts[place], "finished": ended[place]})
    embeddings = each_once(session.embedder, texts)
    add_diversity(session, records, embeddings)
    if session.domain.styles:
        add_verdicts(session, records, posts, texts)
    else:
        rewards = session.reward(posts, texts, range(len(posts)))
        for record, row in zip(records, rewards):
            record["rewards"] = row
            record["passed"] = [reward > session.threshold for reward in row]
    scored = Scored(posts, prompts, tokens, texts, embeddings)
    for row in MEASURES.values():
        row.function(session, records, scored)
    return records


def each_once(embed, texts):
    """embed(texts), P lists of k -> (P, k, dim), with equal texts embedded once."""
    place = {}
    index = [[place.setdefault(text, len(place)) for text in some] for some in texts]
    return embed([list(place)])[0][torch.tensor(index)]


def add_diversity(session, records, embeddings):
    """The mean cosine distance and the Vendi score of each post's completions; of a decoder that
    samples them jointly, the means over the sets."""
    joint = DECODERS[session.args.decoder].joint
    size = session.args.set_size if joint else embeddings.shape[1]
    sets = embeddings.unflatten(1, (-1, size))                       # (P, sets, size, dim)
    distances = diversity(sets.flatten(0, 1)).view(len(records), -1).mean(1).tolist()
    for record, distance, own_sets in zip(records, distances, sets.cpu().numpy()):
        scores = [vendi_score(vectors) for vectors in own_sets]
        record["semantic"] = distance
        record["vendi"] = sum(scores) / len(scores)
        if joint:
            record["set"] = size


def add_verdicts(session, records, posts, texts):
    """The styles in which each completion is right, and its reward: the exact mean over users."""
    scores = None
    if session.selector is not None:
        scores = session.selector(posts, texts, range(len(posts)))
    for i, (record, post) in enumerate(zip(records, posts)):
        popularity = session.domain.popularity_of(post)
        right = [list(session.domain.styles_of(post, text)) for text in texts[i]]
        record["voices"] = right
        record["readers"] = popularity
        record["alike"] = alike(session.domain, post)
        record["rewards"] = []
        for styles in right:
            record["rewards"].append(math.fsum(popularity[style] for style in styles))
        if scores is not None:
            record["scores"] = {session.args.reward: scores[i]}


# ---- Drafts for one post -------------------------------------------------------------------------

def show_completions(args):
    """Print k drafts for one post, as an app would show them; drafts that say the same are shown
    once, with their number. Without a post: a prompt that keeps picks (support/picks.py)."""
    run = finished(args.folder)
    if args.k < 1:
        raise InputError(f"--k {args.k}: at least 1 draft")
    if args.post is not None and not args.post.strip():
        raise InputError("the post is empty: give its text in quotes")
    name_model(args, run)
    args.out = args.folder
    args.n = args.set_size = args.k
    check_decoder(args, args.k)
    session = Session(args, "drafts")
    same_base(run, args)
    session.load_model()
    load_adapter(session.model, run / "adapter", dropout=0.0)
    alone(session.model, args.decoder)
    session.shard_model()
    record = trained_domain(run)
    domain = DOMAINS[record["domain"] if record else "replies"].function

    def write(post):
        session.posts = [Post("drafts", post, ())]
        session.domain = domain(session.posts)
        session.helper = decoding_helper(session)
        _, texts = decode(session, [0])
        return texts[0]

    if args.post is None:
        if session.ranks.world > 1:
            raise InputError("the prompt of `drafts` is for one process: start it without torchrun")
        converse(write, run, args.picks or run / "picks.jsonl", sys.stdin, domain=domain.name)
    else:
        different = Counter(write(args.post))
        for number, (text, times) in enumerate(different.items(), 1):
            note = f"   (x{times})" if times > 1 else ""
            print(f"{number}. {printable(text)}{note}")
    session.ranks.close()


# ---- Decoders ------------------------------------------------------------------------------------

@DECODERS.add("sampling", "temperature, top-k, nucleus, min-p, in that order",
              paper="arXiv 1904.09751, 2407.01082", knobs=SAMPLING)
def sampled(session, visits, k, progress=None, helper=None):
    _, samples, texts = session.sample_completions(visits, 0, k, progress)
    return samples, texts


def decoding_helper(session):
    """What the decoder needs besides the policy: an amateur model, a reward, or nothing."""
    helper = DECODERS[session.args.decoder].helper
    return None if helper is None else helper(session)


# ---- Commands ------------------------------------------------------------------------------------

def parser():
    """The commands; each sets `run`, what to do with its arguments."""
    p = argparse.ArgumentParser(description="Judge runs by Pass@k, diversity, quality.")
    sub = p.add_subparsers(required=True, dest="command", metavar="COMMAND")
    m = sub.add_parser("measure", help="draft replies to held-out posts with each run, score them")
    groups = flag_groups(m)
    measure_flags(m, groups)
    decoding_flags(groups)
    m.set_defaults(run=measure)
    d = sub.add_parser("drafts", help="write k drafts for one post, as an app would show them")
    groups = flag_groups(d)
    drafts_flags(d, groups)
    decoding_flags(groups)
    d.set_defaults(run=show_completions)
    add_commands("evaluate", sub)
    return p


def main(argv=None):
    """Command line; returns the exit code: 0, or 2 after wrong input, with one line on stderr."""
    registry.load()
    return command(parser(), argv)


if __name__ == "__main__":
    # Files in methods/ import this one by its name: run that copy, not a second one.
    from evaluate import main
    sys.exit(main())
