"""Judging runs: unbiased Pass@k, diversity and quality of drafts, intervals, the report.

A run is judged by n drafts for each held-out post. Everything is counted within a post, then
averaged over posts: drafts of different posts differ anyway, so pooling them would hide a model
that always says the same thing. Pass@k asks whether any of k drafts pleases the reader whom the
reward draws; how far that can go at all is known where the readers' shares are (attainable). A
number that cannot be computed is an error, or is left out and counted, never a zero.

    python evaluate.py measure runs/lora-1 runs/poly-1 --data eval.jsonl --bare runs/base-1
    python evaluate.py measure runs/lora-1 --data eval.jsonl --decoder beams  # runs/lora-1@beams
    python evaluate.py report runs/base-1 runs/lora-1 runs/poly-1 --out results --against lora
    python evaluate.py drafts runs/poly-1 "Just adopted a kitten!"
    python evaluate.py ask runs/lora-1 runs/poly-1 --out picks.csv

Records are described in report.py, metrics in metrics.py."""

import argparse
import dataclasses
import hashlib
import json
import math
import re
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import people
from adapters import base, drop_lora, load_adapter, read_adapter_config
from data import InputError, command, printable, read_json, write_text
from decoders import DECODERS, alone, check_decoder, draft_scores
from metrics import (  # noqa: F401  (metrics by the door through which they are looked for)
    KS, distinct_n, pair_quantile, pareto_front, pass_at_k, self_bleu, separation, vendi_score)
from polylora import (
    diversity, listed, load_embedder, pair_distances, same_domain, trained_domain)
from report import read_object, report
from rewards import REWARDS, AgreementReward, JudgeReward, make_reward, reward_model_inputs
from trainer import (
    Session, Tally, Visit, adapter_hash, allow_code_flag, checkpoint_hash, load_chat, load_model,
    model_flags, peak_bytes, same_base, stalled, tally_completions)

# ---- Measuring runs: n drafts for each held-out post, scored -------------------------------------

def measure(args):
    """Write evaluation.json into each run folder. A run measured already, on the same posts by the
    same model with the same settings, is not measured again."""
    if args.n < 10:
        raise InputError(f"--n {args.n}: Pass@10 needs at least 10 drafts a post (twice as many "
                         "are better)")
    if args.temperature == 0 and args.decoder == "sampling":
        raise InputError("--temperature 0 writes one draft n times: give one above 0 to measure")
    if args.judge_drafts < 1:
        raise InputError(f"--judge-drafts {args.judge_drafts}: at least 1")
    check_decoder(args, args.n)
    runs = [finished(run) for run in args.runs]
    if runs:
        name_model(args, runs[0])
    if not args.model:
        raise InputError("give runs to measure, or --model with --bare")
    args.out = str(runs[0] if runs else args.bare)
    session = Session(args, "measure")
    session.load()
    for run in runs:
        same_domain(run, session.domain)
        same_base(run, args)
    if args.dry_run:
        rehearse(session)
        return
    jobs = [job for job in jobs_of(session, runs) if not measured(job[1], job[2])]
    session.ranks.barrier()
    session.say(f"measure: {len(session.posts)} posts with {args.n} drafts, {len(jobs)} of "
                f"{len(runs) + bool(args.bare)} runs")
    scale = load_measures(session) if jobs else None
    for run, to, own, config in jobs:
        if args.shard:  # modules of a sharded model cannot be exchanged
            session.load_model()
            if args.embedder == "base":
                session.embedder.model = session.model
        drop_lora(session.model)
        if own["adapter"]:
            load_adapter(session.model, run / "adapter", dropout=0.0)
            alone(session.model, args.decoder)
        session.shard_model()
        args.seed = own["seed"]  # a run's drafts are drawn from its own seed, the same in every arm
        measure_run(session, to, own, scale, config)
    session.ranks.close()


def rehearse(session, some=8):
    """--dry-run: the time that drafts for a few posts take, and scoring them, for all posts of one
    run."""
    decode, few = DECODERS[session.args.decoder].function, min(some, len(session.posts))
    load_measures(session)
    for count in (1, few):                   # the first one warms up
        began, mine = time.perf_counter(), list(range(count))
        samples, texts = decode(session, [Visit(i, 0) for i in mine], session.args.n, None,
                                session.helper)
        make_records(session, mine, samples, texts)
    seconds = time.perf_counter() - began
    seconds *= len(session.posts) / few / session.ranks.world
    what = "measure" if session.args.decoder == "sampling" else session.args.decoder
    session.say(f"plan {what}: {len(session.posts)} posts with {session.args.n} drafts, a run: "
                f"about {seconds:.0f} s")
    session.ranks.close()


def jobs_of(session, runs):
    """(run, folder to write to, settings, its config.json or None) of all that is to be measured.
    With another decoder, or --name, a run is measured into a folder of its own, RUN@NAME, which is
    an arm of its own in a report."""
    args, settings = session.args, measure_settings(session)
    name = args.name or ("" if args.decoder == "sampling" else args.decoder)
    if not re.fullmatch(r"[\w.+-]*", name):
        raise InputError(f"--name {name}: letters, digits, and . + - _ alone")
    tail, jobs = f"@{name}" if name else "", []
    for run in ([Path(args.bare)] if args.bare else []) + runs:
        config = config_of(run) if run in runs else {"arm": "base"}
        seed = config.get("seed", args.seed)
        own = settings | {"seed": seed, "adapter": adapter_hash(run / "adapter")}
        arm = config.get("arm") or run.resolve().name
        about = {"seed": seed, "arm": arm + tail, "model": args.model}
        about |= {"measured_of": arm} if tail else {}
        about |= {"embedder": config["embedder"]} if "embedder" in config else {}
        to = run.with_name(run.name + tail)
        if tail and (to / "adapter").exists():
            raise InputError(f"{to} is a run of its own, which this would write over: "
                             "give another --name")
        there = config_of(to)
        held = (to / "adapter").exists() or there and there.get("arm") != arm + tail
        if held and run not in runs:
            raise InputError(f"--bare {to} holds a run or a model: give another folder")
        jobs.append((run, to, own, about if tail or "seed" not in config else None))
    return jobs


def load_measures(session):
    """Load what scores drafts: embedder, reward, judge, and what the decoder needs. -> the scale of
    a reward without a verifier."""
    args, scale = session.args, None
    session.shard_model()
    load_embedder(session)
    session.agreement = session.selector = None  # a draft agrees with a reply of a larger cosine
    if not session.domain.voices:
        session.reward = make_reward(args.reward, session)
        session.threshold, scale = passing(session, session.reward)
        if any(len(post.replies) > 1 for post in session.posts):
            answered = [post for post in session.posts if post.replies]
            session.agreement, _ = bar(answered, AgreementReward(session.embedder))
    elif args.reward in ("model", "judge"):  # a verifier says what is right, this what is picked
        session.selector = make_reward(args.reward, session)
    session.judge = Asked.load(session) if args.judge else None
    session.helper = decoding_helper(session)
    return scale


def finished(folder):
    """A run's folder, as a Path with a name; InputError where it holds no adapter. One that was
    trained elsewhere, in PEFT's layout in FOLDER/adapter, will do."""
    if not (Path(folder) / "adapter" / "adapter_config.json").exists():
        raise InputError(f"{folder}: no adapter there: give runs of polylora.py sft or grpo.py, or "
                         "folders with one in PEFT's layout in FOLDER/adapter")
    return Path(folder) if Path(folder).name not in ("", "..") else Path(folder).resolve()


def config_of(run):
    """A run's config.json; empty where the adapter was not trained here."""
    path = run / "config.json"
    return read_object(path) if path.exists() else {}


def name_model(args, run):
    """Fill in the base model and its revision from a run, where no --model was given."""
    if not args.model:
        adapter = read_adapter_config(run / "adapter")
        args.model = config_of(run).get("model") or adapter.get("base_model_name_or_path")
        args.revision = args.revision or adapter.get("revision")


def measure_settings(session):
    """Everything that a record depends on, but for the run's own seed and adapter. Files count by
    what is in them: posts with their intents and styles, the base with its tokenizer and chat
    template, embedder, reward model and judge."""
    args = session.args
    posts = [(p.id, p.post, p.replies, p.voices, p.intent, p.tests) for p in session.posts]
    texts = hashlib.sha256(repr(posts).encode()).hexdigest()
    return {"n": args.n, "temperature": args.temperature, "top_p": args.top_p,
            "max_new_tokens": args.max_new_tokens, "reward": args.reward,
            "reward_model": args.reward_model, "embedder": args.embedder, "posts": texts,
            "model": checkpoint_hash(args.model, args.revision), "dtype": str(session.model.dtype),
            "nf4": args.nf4, "readers": session.domain.record(), **bar_settings(session),
            **optional_settings(args)}


def bar_settings(session):
    """How the bar of a reward is set, so that an evaluation by another bar is measured again."""
    return {} if session.domain.voices else {"bar": "all pairs"}


def optional_settings(args):
    """What is left out where it is as it always was: evaluations from before it stay valid."""
    way, out = DECODERS[args.decoder], {}
    if args.decoder != "sampling" or args.top_k or args.min_p:
        knobs = {name: getattr(args, name) for name in way.knobs}
        out["decoding"] = {"name": args.decoder, "independent": not way.joint} | knobs
        if args.decoder == "contrastive" and args.amateur != "base":
            out["decoding"]["amateur_hash"] = checkpoint_hash(args.amateur)
    if args.embedder != "base":
        out["embedder_hash"] = checkpoint_hash(args.embedder)
    asked = {args.reward, args.best_by if args.decoder == "best-of-n" else args.reward}
    if "model" in asked:
        out["spread_penalty"] = args.spread_penalty
    if asked & {"model", "judge"} and args.reward_model:
        out["reward_model_hash"] = reward_model_inputs(args.reward_model)
    if args.pass_above is not None:
        out["pass_above"] = args.pass_above
    if args.judge:
        out["judge"] = [checkpoint_hash(args.judge), args.judge_drafts]
    return out


def decoding_helper(session):
    """What the decoder needs beside the policy: an amateur model, a reward, or nothing."""
    args = session.args
    if args.decoder == "best-of-n":
        return make_reward(args.best_by, session)
    if args.decoder != "contrastive":
        return None
    if args.amateur == "base":
        return session.model, base
    amateur = load_model(args.amateur, args, session.ranks.device)
    amateur.vocab = min(amateur.vocab, data.vocabulary(data.load_tokenizer(args.amateur)))
    return amateur, nullcontext


def measured(run, settings):
    path = run / "evaluation.json"
    return path.exists() and read_object(path).get("settings") == settings


def passing(session, reward):
    """(threshold, scale) of a reward without a verifier: see bar. Without people's replies a draft
    passes above --pass-above, or a judge's when "yes" is likelier than "no"; there is no scale."""
    if all(post.replies for post in session.posts):
        return bar(session.posts, reward)
    above, judge = session.args.pass_above, session.args.reward == "judge"
    if above is None and not judge:
        raise InputError("some of these posts have no replies, whose reward would say what passes: "
                         "use --reward judge, or say which reward passes with --pass-above")
    return 0.5 if above is None else above, None


MOST_PAIRS = 20_000_000                  # of a post and a reply to another: four bytes each
MOST_ASKED = 20_000                      # where a model has to be asked about each


def bar(posts, reward):
    """(threshold, scale) from people's replies: a draft passes when it earns more than 19 of 20
    replies that were written to posts of another intent (of posts without intents, to another
    post), over all pairs of a post and such a reply. Each is compared as a draft is, with all
    replies of the post.

    The scale holds the threshold, its 95% interval by intents, the number of pairs, and what share
    passes by it of people's replies, each held out from its post once (which leaves one reply less
    to be near to), of those replies' first halves (truncated), and of replies to other posts by the
    bar of the other half of the intents (shuffled; of four or more). None where a reply would be
    compared with itself alone, or cannot be computed."""
    whole = [post for post in posts if len(post.replies) > 1]
    single = len(whole) < 2
    if single:                               # one reply a post: it is scored beside itself
        whole = posts
    values, first, second = stranger_pairs(whole, reward)
    threshold, interval = pair_quantile(values, first, second)
    scale = {"people": None, "truncated": None, "threshold": threshold, "interval": interval,
             "pairs": len(values), "shuffled": shuffled_share(values, first, second)}
    if not (single and isinstance(reward, AgreementReward)):
        rests, texts = each_held_out(whole)
        halves = [" ".join(t.split()[:(len(t.split()) + 1) // 2]) for t in texts]
        scale["people"] = float((earned(reward, rests, texts) > threshold).mean())
        scale["truncated"] = float((earned(reward, rests, halves) > threshold).mean())
    return threshold, scale


def intents_of(posts):
    """(P,) a number for each post, shared by posts of one intent; its own where it has none, and
    where all are of one intent."""
    names = [(post.intent, None if post.intent else i) for i, post in enumerate(posts)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    if len(numbers) == 1:
        return np.arange(len(posts))
    return np.array([numbers[name] for name in names])


def stranger_pairs(posts, reward):
    """(values, intents of the posts, intents of the replies), each (N,): what every reply to a post
    of another intent earns as a draft to a post. Of more pairs than MOST_PAIRS (MOST_ASKED for a
    reward that asks a model about each) every post meets as many, drawn at random."""
    if len(posts) < 2:
        raise InputError("what passes is set by replies to other posts, and there is one post with "
                         "replies: give two or more, or a reward with --pass-above")
    texts = [text for post in posts for text in post.replies]
    intents = intents_of(posts)
    authors = np.repeat(intents, [len(post.replies) for post in posts])
    other = [np.flatnonzero(authors != intent) for intent in intents]
    most = (MOST_PAIRS if hasattr(reward, "rows") else MOST_ASKED) // len(posts)
    if sum(map(len, other)) > most * len(posts):
        rng = np.random.default_rng(0)
        other = [np.sort(rng.permutation(places)[:max(1, most)]) for places in other]
    values = []
    if hasattr(reward, "rows"):
        for row, places in zip(reward.rows(posts, texts), other):
            values.append(np.asarray(row, dtype=np.float32)[places])
    else:
        for i, (post, places) in enumerate(zip(posts, other)):
            row, = reward([post], [[texts[j] for j in places]], [i])
            values.append(np.asarray(row, dtype=np.float32))
    first = np.repeat(intents, [len(places) for places in other])
    return np.concatenate(values), first, authors[np.concatenate(other)]


def shuffled_share(values, first, second):
    """The share of replies to other posts that pass by a bar which they did not set: the bar of one
    half of the intents on the other half, both ways. None of fewer than four intents."""
    inside = [(first % 2 == half) & (second % 2 == half) for half in (0, 1)]
    if not all(part.any() for part in inside):
        return None
    shares = []
    for here, there in (inside, inside[::-1]):
        threshold = np.quantile(values[here], 0.95, method="higher")
        shares.append(float((values[there] > threshold).mean()))
    return sum(shares) / 2


def each_held_out(posts):
    """(posts, texts): every reply, and its post without it. A post with one reply keeps it."""
    rests, texts = [], []
    for post in posts:
        for place, text in enumerate(post.replies):
            rest = post.replies[:place] + post.replies[place + 1:]
            rests.append(dataclasses.replace(post, replies=rest or post.replies, voices=()))
            texts.append(text)
    return rests, texts


def earned(reward, posts, texts):
    """(N,) what each text earns as a draft to its post, some posts at a time."""
    values = []
    for i in range(0, len(posts), SOME):
        some = posts[i:i + SOME]
        drafts = [[text] for text in texts[i:i + SOME]]
        values += [row[0] for row in reward(some, drafts, range(i, i + len(some)))]
    return np.array(values, dtype=np.float32)


def measure_run(session, run, settings, scale, config):
    """evaluation.json, config.json of what is no run of training (config, else None), and a line in
    metrics.jsonl for the model as it stands; posts are dealt to the ranks."""
    began, args = time.perf_counter(), session.args
    ranks = session.ranks
    mine = session.deal(list(range(len(session.posts))))
    with tqdm(total=len(mine), desc=f"measure {run.name}", unit="post", disable=not ranks.main,
              mininterval=0.5 if sys.stderr.isatty() else 15) as bar:
        visits = [Visit(i, 0) for i in mine]
        samples, texts = DECODERS[args.decoder].function(session, visits, args.n, bar.update,
                                                         session.helper)
    rounds = max(1, len(session.posts) // ranks.world // SOME)
    records = ranks.gather(make_records(session, mine, samples, texts, rounds))
    written, = ranks.sum([sum(len(d) for drafts in samples.tokens for d in drafts)])
    seconds = time.perf_counter() - began
    if not ranks.main:
        return
    warnings = stalled(shares_of(records))
    for warning in warnings:
        session.say(f"warning: {run.name}: {warning}")
    result = {"version": 2, "domain": session.domain.name, "settings": settings, "scale": scale,
              "records": records}
    end = {"event": "end", "stage": "measure", "seconds": seconds,
           "tokens_per_second": written / seconds, "peak_bytes": peak_bytes(ranks.device),
           "ranks": ranks.world, "device": ranks.device.type, "warnings": warnings}
    files = {"evaluation.json": json.dumps(result, ensure_ascii=False) + "\n"}
    if config:
        files = {"config.json": json.dumps(config, indent=2) + "\n"} | files
    for name, text in files.items():
        write_text(run / name, text)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(end) + "\n")


def shares_of(records):
    """{number of trainer.STALLS: its mean} over a run's completions: how many were cut off, are
    empty, are identical within their post, and are right or pass."""
    tally = Tally()
    tally_completions(tally, [record.get("finished", []) for record in records],
                      [record.get("drafts", []) for record in records])
    for record in records:
        right, passed = record.get("voices", []), record.get("passed", [])
        tally.add("valid", sum(map(bool, right)), len(right))
        tally.add("passed", sum(passed), len(passed))
    return {name: total / count for name, (total, count) in tally.sums.items() if count}


SOME = 32  # posts whose drafts are embedded and scored together: a bound on memory


def make_records(session, mine, samples, texts, rounds=1):
    """One record for each of the posts of indices `mine` (fields: report.py), some at a time, in
    as many rounds on every rank."""
    edges = [len(mine) * i // rounds for i in range(rounds + 1)]
    return [record for start, end in zip(edges, edges[1:])
            for record in some_records(session, mine[start:end], samples.tokens[start:end],
                                       samples.finished[start:end], texts[start:end])]


def some_records(session, mine, tokens, finished, texts):
    domain, posts = session.domain, [session.posts[i] for i in mine]
    joint = DECODERS[session.args.decoder].joint
    embeddings = each_once(session.embedder, texts)
    size = session.args.set_size if joint else embeddings.shape[1]
    sets = embeddings.unflatten(1, (-1, size))                       # (P, sets, size, dim)
    spread = diversity(sets.flatten(0, 1)).view(len(posts), -1).mean(1).tolist()
    vendi = [[vendi_score(s) for s in some] for some in sets.cpu().numpy()]
    reward = session.selector if domain.voices else session.reward
    rewards = reward and reward(posts, texts, range(len(posts)))
    records = []
    for i, post in enumerate(posts):
        record = {"id": post.id, "post": post.post, "intent": post.intent, "drafts": texts[i],
                  "finished": finished[i], "semantic": spread[i],
                  "vendi": sum(vendi[i]) / len(vendi[i])}
        record |= {"set": size} if joint else {}
        if domain.voices:  # the reward is the exact mean over readers
            readers = domain.popularity_of(post)
            right = [list(domain.voices_of(post, t)) for t in texts[i]]
            record |= {"voices": right, "readers": readers, "alike": alike(domain, post),
                       "rewards": [math.fsum(readers[v] for v in voices) for voices in right]}
            record |= {"scores": {session.args.reward: rewards[i]}} if reward else {}
            # Does D see what is counted? Each right wording once: equal ones are never apart.
            said = map(data.normalise, texts[i])
            kept = list({text: j for j, text in enumerate(said) if right[j]}.values())
            apart = pair_distances(embeddings[i:i + 1, kept])[0].cpu().numpy()
            apart = separation(apart, [tuple(right[j]) for j in kept])
            record |= {} if apart is None else {"separation": apart}
        else:
            passed = [r > session.threshold for r in rewards[i]]
            record |= {"rewards": rewards[i], "passed": passed}
        records.append(record)
    add_likelihoods(session, records, list(zip(map(session.prompt, mine), tokens)))
    if session.agreement is not None:
        add_agreement(session, records, posts, embeddings)
    if session.judge:
        add_judgement(session, records, posts)
    return records


def each_once(embed, texts):
    """embed(texts), P lists of k -> (P, k, dim), with equal texts embedded once."""
    place = {text: i for i, text in enumerate(dict.fromkeys(t for some in texts for t in some))}
    return embed([list(place)])[0][torch.tensor([[place[t] for t in some] for some in texts])]


def add_likelihoods(session, records, pairs):
    """How likely the drafts are, and how open the policy was as it wrote them: sums over each
    draft's tokens at temperature 1. pairs: (prompt ids, drafts' ids)."""
    sums = dict(zip(("logprobs", "entropies"), draft_scores(session, pairs)))
    with base(session.model):
        sums["base_logprobs"], _ = draft_scores(session, pairs)
    for i, (record, (_, drafts)) in enumerate(zip(records, pairs)):
        record["tokens"] = [len(draft) for draft in drafts]
        record |= {name: [round(x, 4) for x in rows[i]] for name, rows in sums.items()}


def add_agreement(session, records, posts, embeddings):
    """Which of people's replies each draft agrees with, on posts that have several: a cosine above
    what 19 of 20 replies to other posts reach."""
    # In one call, also where there are none: with --shard all ranks make as many.
    sizes = [len(post.replies) if len(post.replies) > 1 else 0 for post in posts]
    texts = [text for post, n in zip(posts, sizes) for text in post.replies[:n]]
    people = session.embedder([texts or [""]])[0][:len(texts)].split(sizes)
    for record, n, drafts, replies in zip(records, sizes, embeddings, people):
        if n:
            close = drafts @ replies.T > session.agreement
            record["agrees"] = [row.nonzero()[:, 0].tolist() for row in close]
            record["people"] = n


# ---- A judge -------------------------------------------------------------------------------------

RUBRICS = {
    "helpfulness": "Does the reply help the person, or give them what they hoped to get?",
    "coherence": "Is the reply whole and well formed, and does it make sense?",
    "relevance": "Is the reply about what the post says?"}
PAIR = "Is reply A a better reply to the post than reply B?"


class Asked(JudgeReward):
    """A Qwen3 chat model's probability of "yes" against "no" to whole questions: called with P
    posts and P lists of questions."""

    def chat(self, post, text):
        turns = [{"role": "user", "content": f"{text} Answer yes or no."}]
        return data.encode_chat(self.tokenizer, turns, add_generation_prompt=True, chat=self.form)

    @classmethod
    def load(cls, session):
        folder = session.args.judge
        model = load_model(folder, session.args, session.ranks.device)
        if not model.has_logits:
            raise InputError(f"--judge {folder} has no token head: give a Qwen3 chat model")
        tokenizer, form = load_chat(folder)
        return cls(model, tokenizer, session.domain, form)


def add_judgement(session, records, posts):
    """The judge on the first --judge-drafts drafts of each post: three rubrics; and each draft
    beside the person's (the post's first) reply, once as A and once as B, since judges prefer
    a place."""
    for record, post in zip(records, posts):
        drafts = record["drafts"][:session.args.judge_drafts]
        said, judge = f"Somebody posted:\n\n{post.post}\n\n", {}
        for name, question in RUBRICS.items():
            asked = [f"{said}A reply:\n\n{draft}\n\n{question}" for draft in drafts]
            judge[name], = session.judge([post], [asked])
        both = lambda a, b: f"{said}Reply A:\n\n{a}\n\nReply B:\n\n{b}\n\n{PAIR}"
        if post.replies:
            first, = session.judge([post], [[both(draft, post.replies[0]) for draft in drafts]])
            second, = session.judge([post], [[both(post.replies[0], draft) for draft in drafts]])
            judge["pairs"] = [[a, 1 - b] for a, b in zip(first, second)]
        record["judge"] = judge


def alike(domain, post):
    """Groups of voices whose reply to the post is the same string."""
    groups = {}
    for voice, reply in zip(post.voices, post.replies) if domain.name == "voices" else ():
        groups.setdefault(data.normalise(reply), []).append(voice)
    return [group for group in groups.values() if len(group) > 1]


def show_drafts(args):
    """Print k drafts for one post, as an app would show them; drafts that say the same are shown
    once, with their number. Without a post: a prompt that keeps picks (people.converse)."""
    run = finished(args.folder)
    if args.k < 1:
        raise InputError(f"--k {args.k}: at least 1 draft")
    if args.post is not None and not args.post.strip():
        raise InputError("the post is empty: give its text in quotes")
    name_model(args, run)
    args.out, args.set_size = args.folder, args.k
    check_decoder(args, args.k)
    session = Session(args, "drafts")
    same_base(run, args)
    session.load_model()
    load_adapter(session.model, run / "adapter", dropout=0.0)
    alone(session.model, args.decoder)
    session.shard_model()
    record = trained_domain(run)
    domain = data.DOMAINS[record["domain"] if record else "replies"]

    def write(post):
        session.posts = [data.Post("drafts", post, ())]
        session.domain = domain(session.posts)
        way = DECODERS[args.decoder]
        _, (texts,) = way.function(session, [Visit(0, 0)], args.k, None, decoding_helper(session))
        return texts
    if args.post is None:
        if session.ranks.world > 1:
            raise InputError("the prompt of `drafts` is for one process: start it without torchrun")
        people.converse(write, run, args.picks or run / "picks.jsonl", sys.stdin,
                        domain=domain.name)
    else:
        for number, (text, times) in enumerate(Counter(write(args.post)).items(), 1):
            print(f"{number}. {printable(text)}" + (f"   (x{times})" if times > 1 else ""))
    session.ranks.close()


# ---- Commands ------------------------------------------------------------------------------------

def decoder_flags(p):
    add = p.add_argument
    add("--top-k", type=int, default=0, help="sample from the likeliest tokens alone; 0: from all")
    add("--min-p", type=float, default=0.0,
        help="sample from tokens of at least this share of the likeliest one's probability")
    papers = {name: (f"{way.about} ({way.paper})",) for name, way in DECODERS.items()}
    add("--decoder", default="sampling", choices=list(DECODERS),
        help=listed(papers))
    add("--pool", type=int, default=8,
        help="candidates for each draft (self-consistency, best-of-n, mmi), or to ask for "
             "(verbalized)")
    add("--best-by", default="auto", choices=("auto", *REWARDS), help="reward of best-of-n")
    add("--mmi", type=float, default=0.5, help="weight of log p(y) in mmi")
    add("--amateur", default="base",
        help="of contrastive: base, or the folder or hub name of a Qwen3 with the same tokenizer")
    add("--plausible", type=float, default=0.1,
        help="contrastive: least share of the expert's largest probability")
    add("--beam-groups", type=int, default=0,
        help="groups of beams, which divide the set; 0: each beam is one, 1: plain beam search")
    add("--beam-penalty", type=float, default=0.5,
        help="off a token's log-probability for each beam of an earlier group that took it")


def parser():
    """The commands; each sets `run`, what to do with its arguments."""
    p = argparse.ArgumentParser(description="Judge runs by Pass@k, diversity, quality.")
    sub = p.add_subparsers(required=True, dest="command", metavar="COMMAND")
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    m = sub.add_parser("measure", help="draft replies to held-out posts with each run, score them",
                       **form)
    add = m.add_argument
    add("runs", nargs="*", metavar="RUN",
        help="finished runs of polylora.py sft or grpo.py, all on one base model")
    add("--data", required=True, help="held-out posts, JSON lines")
    add("--bare", metavar="FOLDER",
        help="also measure the base model without adapter, as a run in this folder")
    add("--n", "--samples", type=int, default=64,
        help="drafts for each post: at least 10, for Pass@10, and more than the largest k is "
             "better (after torchrun write --samples: it takes --n for an option of its own)")
    add("--seed", type=int, default=1,
        help="of --bare's drafts; a run's drafts use the run's own seed")
    add("--reward", default="auto", choices=("auto", *REWARDS),
        help="what a draft earns, in domains without a verifier; model or judge, in the others: "
             "another selector of the best of k")
    add("--pass-above", type=float, default=None,
        help="the reward above which a draft passes, for posts without people's replies; default: "
             "0.5 with --reward judge")
    add("--reward-model", help="Qwen3 folder or hub name for --reward model or judge, or a folder "
                               "of rewards.py train")
    add("--domain", default="auto",
        help=f"how drafts are scored: auto, {', '.join(data.DOMAINS)}")
    allow_code_flag(m)
    add("--embedder", default="base",
        help="what embeds drafts: base, or the folder or hub name of an embedding model")
    add("--judge", metavar="FOLDER",
        help="a Qwen3 chat model that judges helpfulness, coherence and relevance, and drafts "
             "against a person's reply")
    add("--judge-drafts", type=int, default=4, help="drafts of a post that the judge reads")
    add("--set-size", type=int, default=5,
        help="drafts in a set of a decoder whose drafts hang together (beams, list, verbalized): "
             "their Pass@k is of whole sets, so for this k alone; beams write one set, others as "
             "many as fit into --n")
    add("--name", help="measure into RUN@NAME, an arm of its own; default: the decoder's name, and "
                       "RUN itself for sampling")
    add("--skip-bad-lines", action="store_true",
        help="skip, count and report unreadable lines of --data")
    add("--dry-run", action="store_true",
        help="say how long the drafts of one run would take, and write nothing")
    m.set_defaults(run=measure)
    d = sub.add_parser("drafts", help="write k drafts for one post, as an app would show them",
                       **form)
    d.add_argument("folder", metavar="RUN", help="finished run of polylora.py sft or grpo.py")
    d.add_argument("post", nargs="?",
                   help="the post, in quotes; without it, a prompt: type posts, pick drafts")
    d.add_argument("--picks", metavar="JSONL",
                   help="where the prompt keeps picks; default: RUN/picks.jsonl")
    d.add_argument("--k", type=int, default=5, help="drafts to write")
    d.add_argument("--seed", type=int, default=1,
                   help="of the sampling: another seed, other drafts")
    d.add_argument("--reward-model", help="Qwen3 folder or hub name for --best-by model or judge, "
                                          "or a folder of rewards.py train")
    d.add_argument("--embedder", default="base", help="what embeds drafts for --best-by")
    d.set_defaults(run=show_drafts)
    for q in (m, d):
        q.add_argument("--model",
                       help="Qwen3 checkpoint under the adapters; default: the first run's")
        q.add_argument("--max-new-tokens", type=int, default=100,
                       help="longest draft, in tokens, stop token included")
        q.add_argument("--temperature", type=float, default=1.0,
                       help="of sampling; 0 is greedy, so that all drafts are equal")
        q.add_argument("--top-p", type=float, default=1.0,
                       help="smallest share of probability to sample from")
        q.add_argument("--spread-penalty", type=float, default=1.0,
                       help="how many times their spread is taken off the mean of several reward "
                            "models")
        decoder_flags(q)
        model_flags(q)
    r = sub.add_parser("report", help="compare measured runs: tables and pictures", **form)
    add = r.add_argument
    add("runs", nargs="+", metavar="RUN",
        help="folder of a measured run; runs whose config.json names the same arm are its seeds")
    add("--out", required=True, metavar="FOLDER", help="folder for the report, made if need be")
    add("--against", metavar="ARM", help="arm from which paired differences are taken")
    add("--primary", nargs="+", metavar="ARM",
        help="after the runs: test the primary endpoint of the first arm against each of the "
             "others: Pass@5 superior, then Pass@1 not inferior, then Pass@10 superior")
    add("--ks", type=numbers, default=KS, metavar="K,K", help="the k of Pass@k")
    r.set_defaults(run=lambda args: report(args.runs, args.out, args.against, args.ks,
                                           endpoint=args.primary))
    people.commands(sub, form)
    return p


def numbers(text):
    """"1,5,10" -> (1, 5, 10): whole numbers from 1 up, each once, for --ks."""
    ks = tuple(sorted({int(word) for word in text.split(",")}))
    if ks[0] < 1:
        raise ValueError
    return ks


def main(argv=None):
    """Command line; returns the exit code: 0, or 2 after wrong input, said in one line
    on stderr."""
    return command(parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
