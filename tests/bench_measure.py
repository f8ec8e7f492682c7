"""How long many drafts take to be measured, and how much memory: evaluate.py measure and report,
whole, but for the writing of the drafts, which come from the pocket world's own grammar.

    python tests/bench_measure.py     # 2,500, 10,000 and 40,000 drafts, each in its own process
    python tests/bench_measure.py --drafts 10000 --threads 2

A model of the pocket study's shape with random weights embeds the drafts and tells their
likelihoods. Each line: drafts, seconds of measure and of report, of the processor in both, MB that
their largest memory grew by, and the drafts' own MB: their evaluation.json."""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
EACH = 50                                                                      # drafts of a post


def from_grammar(session, visits, k, progress=None, helper=None):
    """In place of a decoder: right replies in voices drawn evenly, some of them broken."""
    tokens, texts, rng = [], [], random.Random(session.args.seed)
    for visit in visits:
        post = session.posts[visit.index]
        said = [session.domain.reply(post, rng.choice(session.domain.styles), rng)
                for _ in range(k)]
        said = [text if rng.random() < 0.6 else text[:rng.randrange(len(text))] for text in said]
        texts.append(said)
        tokens.append([data.encode_reply(session.tokenizer, text) for text in said])
    return Samples(tokens, None, [[True] * k for _ in visits]), texts


def prepare(folder, completions):
    """Held-out posts, and a model of the pocket study's shape."""
    posts = max(2, completions // EACH)
    data.main(["split", "--data", "pocket", "--sizes", f"eval={posts}", "--out", str(folder)])
    some = data.load_posts(folder / "eval.jsonl")[:200]
    tokenizer = train_tokenizer([text for p in some for text in (p.post, *p.replies)], 1024)
    model = Qwen3(Config(1024, 192, 576, 2, 6, 3, 32, tie_word_embeddings=True))
    model.save_pretrained(folder / "model")
    tokenizer.save(str(folder / "model" / "tokenizer.json"))


def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def one(completions, threads):
    torch.set_num_threads(threads)
    DECODERS["sampling"] = DECODERS["sampling"]._replace(function=from_grammar)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder, completions)
        Qwen3.from_pretrained(folder / "model")
        before, seconds, worked = peak(), [], time.process_time()
        run = str(folder / "run")
        measure = ["measure", "--base-out", run, "--model", str(folder / "model"), "--n", str(EACH),
                   "--data", str(folder / "eval.jsonl")]
        for command in (measure, ["report", run, "--out", str(folder / "report")]):
            began = time.perf_counter()
            if evaluate.main(command):
                return 1
            seconds.append(time.perf_counter() - began)
        written = (folder / "run" / "evaluation.json").stat().st_size
    print(json.dumps({"drafts": completions, "measure": seconds[0], "report": seconds[1],
                      "growth": peak() - before, "written": written,
                      "processor": time.process_time() - worked}))
    return 0


def main(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--drafts", default="2500,10000,40000", help="how many, comma-separated")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.one:
        return one(args.one, args.threads)
    print(f"{'drafts':>8} {'measure s':>10} {'report s':>10} {'CPU s':>10} {'growth MB':>10} "
          f"{'written MB':>10}")
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    for completions in args.drafts.split(","):
        command = [sys.executable, __file__, "--one", completions, "--threads", str(args.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
        if done.returncode:
            return 1
        row = json.loads(done.stdout.splitlines()[-1])
        print(f"{row['drafts']:>8} {row['measure']:>10.1f} {row['report']:>10.1f} "
              f"{row['processor']:>10.1f} {row['growth'] / 1e6:>10.1f} "
              f"{row['written'] / 1e6:>10.1f}", flush=True)
    return 0


import torch  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
from support.registry import DECODERS  # noqa: E402
from generate import Samples  # noqa: E402
from model import Config, Qwen3  # noqa: E402
from methods.small_base import train_tokenizer  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
