"""The whole chain through the programs' own mains, on a tweets file and a checkpoint written here; wrong
input; train.sh."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import decoders
import evaluate
import grpo
import polylora
import rewards
import trainer
from model import Config, Qwen3
from tiny import qwen_tokenizer
from trainer import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
QWEN_TOKENIZER = qwen_tokenizer()
TOPICS = ("kettle", "bus", "lecture", "garden", "match", "storm")


def write_tweets(path, count=30):
    """Tweets in the layout of a scraped file: one reply a line, several lines a tweet, fields nobody
    reads."""
    with open(path, "w", encoding="utf-8") as f:
        for i in range(count):
            for likes, reply in enumerate((f"Poor {TOPICS[i % 6]}, I feel you", f"Number {i}? Tell us more!")):
                f.write(json.dumps({"tweet_id": 1000 + i, "tweet": f"My {TOPICS[i % 6]} let me down, part {i}", "reply": reply,
                                    "reply_likes": likes, "reply_author": "someone"}) + "\n")


def write_model(folder, tokenizer=None):
    """A random Qwen3 of two layers with a tokenizer: Qwen3's own, or a small one trained on the tweets'
    words."""
    if tokenizer is None:
        tokenizer = train_tokenizer([f"My {t} let me down, part 7. Tell us more! Poor one, I feel you" for t in TOPICS], 300)
    torch.manual_seed(54)  # one that by chance finds people's replies likelier than exchanged ones
    rows = tokenizer.get_vocab_size() + 7                                      # padding rows, as Qwen3 has
    model = Qwen3(Config(rows, 32, 64, 2, 4, 2, 16, tie_word_embeddings=True))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """{"model", "sft", "grpo", "eval", "lora": a finished SFT run}: what most tests start from."""
    root = tmp_path_factory.mktemp("world")
    write_tweets(root / "tweets.jsonl")
    assert data.main(["split", "--data", str(root / "tweets.jsonl"), "--sizes", "sft=12,grpo=10,eval=6", "--out", str(root)]) == 0
    paths = {name: str(root / f"{name}.jsonl") for name in ("sft", "grpo", "eval")}
    paths |= {"model": str(write_model(root / "model")), "lora": str(root / "lora"), "root": root}
    assert polylora.main(sft_args(paths, "lora")) == 0
    return paths


def sft_args(world, out, *more):
    return ["sft", "--model", world["model"], "--data", world["sft"], "--out", str(Path(world["sft"]).parent / out), "--steps", "2",
            "--batch", "4", "--k", "3", "--draft-posts", "2", "--max-new-tokens", "5", "--rank", "2", *more]


def grpo_args(world, out, *more):
    return ["--start", world["lora"], "--data", world["grpo"], "--out", str(Path(world["grpo"]).parent / out), "--steps", "2",
            "--batch", "2", "--k", "4", "--max-new-tokens", "5", *more]


def lines(folder):
    return [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def chain(world, root, capsys):
    assert polylora.main(sft_args(world, "poly", "--lambda", "0.3", "--gate", "likelihood")) == 0
    assert grpo.main(grpo_args(world, "ours", "--start", str(root / "poly"), "--diversity-weight", "1", "--gate", "likelihood",
                               "--beta", "0.04", "--updates", "2")) == 0
    assert evaluate.main(["measure", str(root / "poly"), str(root / "ours"), "--bare", str(root / "bare"), "--data", world["eval"],
                          "--n", "10", "--max-new-tokens", "5"]) == 0
    runs = [str(root / r) for r in ("bare", "poly", "ours")]
    assert evaluate.main(["report", *runs, "--out", str(root / "report"), "--against", "poly"]) == 0
    capsys.readouterr()
    assert evaluate.main(["drafts", str(root / "ours"), "My kettle sings", "--k", "3", "--max-new-tokens", "5"]) == 0
    shown = capsys.readouterr().out.strip().splitlines()
    assert shown[0].startswith("1. ") and 1 <= sum(x[:2] in ("1.", "2.", "3.") for x in shown) <= 3


def test_the_chain_from_tweets_to_report(world, capsys):
    """SFT with D, GRPO with KL, diversity and two updates a rollout, measuring, report, drafts: on
    real-layout posts."""
    root = world["root"]
    chain(world, root, capsys)
    report = json.loads((root / "report" / "report.json").read_text())
    assert set(report["arms"]) == {"base", "poly", "ours"}
    for picture in ("pass_at_k.svg", "quality_diversity.svg"):
        ElementTree.parse(root / "report" / picture)
    for run in ("poly", "ours"):
        *steps, end = [x for x in lines(root / run) if x.get("stage") != "measure"]
        assert [x["step"] for x in steps] == [1, 2] and end["event"] == "end"
        assert end["peak_bytes"] > 1e6 and end["tokens_per_second"] > 0
        assert all(x["D"] > 0 for x in steps if "D" in x) and "D" in steps[0]
    assert "kl" in lines(root / "ours")[0]
    moved = [torch.equal(a, b) for a, b in zip(*(list(adapter_of(root / r).values()) for r in ("poly", "ours")))]
    assert not all(moved)


def adapter_of(run):
    from safetensors.torch import load_file
    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


@pytest.mark.skipif(not QWEN_TOKENIZER.exists(), reason="Qwen3's tokenizer.json is neither beside the repository nor installed")
def test_the_chain_with_qwen3s_own_tokenizer(world, tmp_path, capsys):
    """151,669 tokens and their padding rows through every stage."""
    other = world | {"model": str(write_model(tmp_path / "model", data.load_tokenizer(QWEN_TOKENIZER)))}
    for name in ("sft", "grpo", "eval"):
        (tmp_path / f"{name}.jsonl").write_text(Path(world[name]).read_text())
        other[name] = str(tmp_path / f"{name}.jsonl")
    chain(other, tmp_path, capsys)


def test_lambda_and_seed_change_the_adapter_and_resume_does_not(world):
    """D reaches the weights (lambda 0 and 0.5 differ), the same command gives the same bits, another seed
    does not."""
    same, other, again = "t-lam", "t-lam2", "t-plain"
    assert polylora.main(sft_args(world, same, "--lambda", "0.5")) == 0
    assert polylora.main(sft_args(world, other, "--lambda", "0.5", "--seed", "2")) == 0
    assert polylora.main(sft_args(world, again)) == 0
    plain, lam, lam2, lora = (adapter_of(Path(world["root"]) / r) for r in (again, same, other, "lora"))
    assert all(torch.equal(plain[n], lora[n]) for n in plain)
    assert any(not torch.equal(plain[n], lam[n]) for n in plain)
    assert any(not torch.equal(lam2[n], lam[n]) for n in lam)


def test_a_dry_run_writes_nothing_and_its_figures_are_those_of_the_run(world, tmp_path, capsys):
    """Posts, steps, tokens and memory before the first step, and a time; of five arms of days nothing was said."""
    args = sft_args(world, "x", "--out", str(tmp_path / "run"), "--lambda", "0.5", "--steps", "5", "--draft-every", "2")
    with pytest.raises(SystemExit) as stop:
        polylora.main([*args, "--dry-run"])
    planned, time_said = capsys.readouterr().out.strip().splitlines()[-2:]
    assert stop.value.code == 0 and not (tmp_path / "run").exists()
    assert polylora.main(args) == 0 and planned in capsys.readouterr().out
    steps, end = lines(tmp_path / "run")[:-1], lines(tmp_path / "run")[-1]
    assert planned.startswith(f"run: 12 posts, {len(steps)} steps of 4")
    tokens = int(re.search(r"some ([\d,]+) tokens", planned)[1].replace(",", ""))
    assert tokens / 2 < sum(x["tokens"] for x in steps) < 1.2 * tokens
    seconds = int(re.fullmatch(r"plan run: 5 steps, about (\d+) s", time_said)[1])
    assert seconds < 5 * end["seconds"] + 2 and end["seconds"] < 5 * seconds + 2  # a machine may be busy
    later = grpo_args(world, "x", "--start", str(tmp_path / "none"), "--model", world["model"], "--out", str(tmp_path / "rl"))
    with pytest.raises(SystemExit):
        grpo.main([*later, "--dry-run"])     # before its start exists
    many = tmp_path / "many.jsonl"                                             # of 64 posts or more the first, alone, ended it
    many.write_text("".join(json.dumps((x := json.loads(line)) | {"id": f"{i}-{copy}", "post": f"{x['post']} {copy}"}) + "\n" for copy in range(12)
                            for i, line in enumerate(Path(world["eval"]).read_text().splitlines())))
    shutil.copy(Path(world["eval"]).parent / "domain.json", tmp_path / "domain.json")
    assert evaluate.main(["measure", world["lora"], "--data", str(many), "--n", "10", "--max-new-tokens", "5",
                          "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "plan rl: 2 steps" in said and "plan measure: 72 posts with 10 drafts" in said
    assert not (tmp_path / "rl").exists() and not (Path(world["lora"]) / "evaluation.json").exists()


def test_a_dry_run_s_time_is_that_of_drafting_and_plain_steps_in_their_shares(monkeypatch):
    """Every third step drafts and takes ten times as long: timing only one kind is wrong by a factor. By a clock of its
    own."""
    now, moved = [0.0], torch.zeros(1, requires_grad=True)
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: now[0])

    def step(number):
        now[0] += 30 if number == 0 else 0.3 if number % 3 == 0 else 0.03      # the first one warms up
        moved.grad = torch.ones(1)
    session = SimpleNamespace(args=SimpleNamespace(steps=300, draft_every=3), params=[moved])
    assert trainer.rehearse(session, step) == pytest.approx(100 * (0.3 + 2 * 0.03)) and moved.grad is None


def test_a_run_whose_rewards_are_all_zero_says_so(world, tmp_path, monkeypatch, capsys):
    """At once, and in its end line: such an arm ended with LoRA's own adapter, and no word about it."""
    nothing = lambda posts, drafts, streams=None: [[0.0] * len(texts) for texts in drafts]
    monkeypatch.setattr(grpo, "make_reward", lambda name, session: nothing)
    assert grpo.main(grpo_args(world, "x", "--out", str(tmp_path / "dead"), "--steps", "6", "--k", "2")) == 0
    assert "warning: dead, step 5: reward was 0 for 5 steps" in capsys.readouterr().out
    assert any("reward was 0" in w for w in lines(tmp_path / "dead")[-1]["warnings"])


def test_a_study_over_a_base_in_four_bits(world, tmp_path, capsys):
    """--nf4 through SFT, GRPO, measuring and drafts: another base than in full, and adapters as usual."""
    run, full = str(tmp_path / "nf4"), str(tmp_path / "full")
    for out, flags in ((run, ["--nf4"]), (full, [])):
        assert polylora.main(sft_args(world, "x", "--lambda", "0.3", "--out", out, *flags)) == 0
    assert any(not torch.equal(a, b) for a, b in zip(adapter_of(run).values(), adapter_of(full).values()))
    assert grpo.main(grpo_args(world, "x", "--start", run, "--out", str(tmp_path / "g"), "--nf4", "--beta", "0.1")) == 0
    assert evaluate.main(["measure", run, "--data", world["eval"], "--n", "10", "--max-new-tokens", "5", "--nf4"]) == 0
    assert evaluate.main(["drafts", run, "My kettle sings", "--max-new-tokens", "5", "--nf4"]) == 0
    capsys.readouterr()
    for flags, word in ((["--shard"], "torchrun"), (["--shard", "--nf4"], "--nf4")):
        assert polylora.main(sft_args(world, "x", "--out", str(tmp_path / "no"), *flags)) == 2
        assert word in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert polylora.main(["base", "--data", "pocket", "--out", str(tmp_path / "no"), "--nf4"]) == 2


SHARDED ="""
import json, os, sys
import torch, torch.distributed as dist
import evaluate, grpo, polylora, trainer
torch.set_num_threads(1)
world, root = json.loads(sys.argv[1]), sys.argv[2]
spread = []
shard = trainer.shard
trainer.shard = lambda model, ranks: (shard(model, ranks), spread.append(
    [p.to_local().numel() / p.numel() for n, p in model.named_parameters() if n.endswith("q_proj.weight")]))
generate = trainer.generate
def together(model, *a, **k):
    samples, ranks = generate(model, *a, **k), torch.ones(1)
    dist.all_reduce(ranks)                       # whatever is done in common next
    assert ranks == 2
    return samples
trainer.generate = together
for how in ([], ["--shard", "--checkpointing"]):
    name = "sharded" if how else "whole"
    sft, out = f"{root}/{name}-sft", f"{root}/{name}-grpo"
    few = ["--micro-tokens", "40", "--max-rows", "4", "--max-new-tokens", "5", "--steps", "2", "--gate", "likelihood", "--warmup", "0", *how]
    assert polylora.main(["sft", "--model", world["model"], "--data", world["sft"], "--out", sft, "--batch", "5", "--k", "3",
                          "--draft-posts", "3", "--rank", "2", "--lambda", "0.3", "--lr", "0.01", *few]) == 0
    assert grpo.main(["--start", sft, "--data", world["grpo"], "--out", out, "--batch", "3", "--k", "4", "--updates", "2",
                      "--beta", "0.04", "--diversity-weight", "1", "--lr", "0.01", *few]) == 0
    assert evaluate.main(["measure", sft, out, "--data", world["eval"], "--n", "10", "--max-new-tokens", "5", *how[:1]]) == 0
assert len(spread) == 5 and all(0.4 < x < 0.6 for parts in spread for x in parts), spread
"""


def test_weights_that_are_spread_over_ranks_give_the_same_study(world, tmp_path):
    """FSDP2 over two ranks that have unequal numbers of micro-batches, of decoding steps, of posts: nobody waits
    for ever, and adapters and drafts are those of whole weights."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1",
                        "TORCHELASTIC_USE_AGENT_STORE": "True"}
    job = [sys.executable, "-c", SHARDED, json.dumps({n: str(p) for n, p in world.items()}), str(tmp_path)]
    ranks = [subprocess.Popen(job, cwd=ROOT, env=env | {"RANK": r, "LOCAL_RANK": r}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True) for r in "01"]
    try:
        said = [p.communicate(timeout=600)[0] for p in ranks]
    finally:
        [p.kill() for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], said[0][-3000:] + said[1][-3000:]
    for stage in ("sft", "grpo"):
        whole, sharded = (adapter_of(tmp_path / f"{how}-{stage}") for how in ("whole", "sharded"))
        assert max(float((whole[n] - sharded[n]).abs().max()) for n in whole) < 2e-4
        assert max(float(t.abs().max()) for n, t in whole.items() if "lora_B" in n) > 0.01
        drafts = [[r["drafts"] for r in json.loads((tmp_path / f"{how}-{stage}" / "evaluation.json").read_text())["records"]]
                  for how in ("whole", "sharded")]
        assert drafts[0] == drafts[1]


def digest(folder):
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def wrong_commands(w):
    """name -> (main, arguments, a word of the sentence)."""
    root, bad = w["root"], w["root"] / "bad.jsonl"
    bad.write_text('{"post": "fine", "reply": "fine"}\n{"post": "no reply"}\n')
    sft, rl = (lambda *a: (polylora.main, sft_args(w, "never", *a))), (lambda *a: (grpo.main, grpo_args(w, "never", *a)))
    return {
        "no such model": (*sft("--model", str(root / "nothing")), "nothing"),
        "no such file": (*sft("--data", str(root / "none.jsonl")), "none.jsonl"),
        "bad line": (*sft("--data", str(bad)), "line 2"),
        "lambda with k = 1": (*sft("--lambda", "1", "--k", "1"), "--k 2"),
        "negative lambda": (*sft("--lambda", "-1"), "--lambda"),
        "unknown domain": (*sft("--domain", "poetry"), "poetry"),
        "domain that does not fit": (*sft("--domain", "pocket"), "pocket"),
        "no verifier": (*sft("--lambda", "1", "--gate", "verifier"), "verifier"),
        "unknown layer": (*sft("--targets", "lm_head"), "lm_head"),
        "rank 0": (*sft("--rank", "0"), "rank"),
        "set size above k": (*rl("--advantage", "passk", "--set-size", "4"), "--set-size"),
        "one draft": (*rl("--k", "1"), "--k 1"),
        "no start": (*rl("--start", str(root / "nothing")), "nothing"),
        "no reward model": (*rl("--reward", "judge"), "--reward-model"),
        "reader without voices": (*rl("--reward", "reader"), "reader"),
        "reward model without a head": (*rl("--reward", "model", "--reward-model", w["model"]), "score"),
        "adapter of another model": (*rl("--model", str(root / "other")), "adapter"),
        "another configuration": (polylora.main, sft_args(w, "lora", "--lr", "0.5"), "lr"),
        "a folder of something else": (polylora.main, sft_args(w, "model"), "model"),
        "k above n": (evaluate.main, ["measure", w["lora"], "--data", w["eval"], "--n", "5"], "--n 5"),
        "measuring no run": (evaluate.main, ["measure", str(root / "model"), "--data", w["eval"]], "adapter"),
        "drafts of no run": (evaluate.main, ["drafts", str(root / "nothing"), "hello"], "nothing"),
        "drafts for nothing": (evaluate.main, ["drafts", w["lora"], "  "], "empty"),
        "report of no run": (evaluate.main, ["report", str(root / "nothing"), "--out", str(root / "never")], "nothing"),
        "sizes": (data.main, ["split", "--data", w["sft"], "--sizes", "a=9,b=9", "--out", str(root / "never")], "12"),
        "split without sizes": (data.main, ["split", "--data", w["sft"], "--sizes", "a", "--out", str(root / "never")], "--sizes"),
    }


@pytest.fixture(scope="module")
def other_model(world):
    torch.manual_seed(0)
    tokenizer = data.load_tokenizer(world["model"])
    Qwen3(Config(tokenizer.get_vocab_size(), 48, 64, 2, 4, 2, 16, tie_word_embeddings=True)).save_pretrained(world["root"] / "other")
    tokenizer.save(str(world["root"] / "other" / "tokenizer.json"))


def test_wrong_input_gives_one_sentence_and_code_2(world, other_model, capsys):
    """Every wrong input: exit code 2, one line that names the place, no traceback, and not a byte changed on
    disk."""
    for name, (main, args, word) in wrong_commands(world).items():
        before = digest(world["root"])
        capsys.readouterr()
        assert main(args) == 2, name
        said = capsys.readouterr().err.strip().splitlines()
        assert said[-1].startswith("error: ") and word in said[-1] and "Traceback" not in " ".join(said), (name, said)
        assert sum(x.startswith("error: ") for x in said) == 1, (name, said)
        assert digest(world["root"]) == before, name


def test_unknown_flags_and_help_exit_as_programs_do():
    for main in (polylora.main, grpo.main, evaluate.main, data.main):
        with pytest.raises(SystemExit) as stop:
            main(["--no-such-flag"])
        assert stop.value.code == 2
        with pytest.raises(SystemExit) as stop:
            main(["--help"])
        assert stop.value.code == 0
    for room in (polylora, evaluate, data, rewards):                           # `polylora.py wise --help` ended in a traceback
        for command in room.parser()._subparsers._group_actions[0].choices.values():
            assert "--help" in command.format_help()


def launch(tmp_path, *command):
    """Run a launch of train.sh as typed, in the repository, with everything it writes in tmp_path."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
        "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    small = ["--posts", "10", "--steps", "2", "--base-steps", "3", "--seeds", "7", "--out", str(tmp_path / "study")]
    return subprocess.run([*command, *small], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_torchrun_with_two_ranks_runs_the_whole_study_and_bash_finds_it_done(tmp_path):
    """`torchrun --nproc-per-node=2 train.sh` makes the report from nothing; `bash train.sh` then has nothing
    left to do."""
    first = launch(tmp_path, "torchrun", "--standalone", "--nproc-per-node=2", "train.sh")
    assert first.returncode == 0, first.stderr[-3000:]
    report = json.loads((tmp_path / "study" / "report" / "report.json").read_text())
    assert list(report["arms"]) == ["base", "lora", "poly", "lora-grpo", "lora-passk", "lora-cover",
                                    "poly-grpo"]
    assert "pass@10" in first.stdout and report["differences"]["poly-grpo"]["stances"]
    ends = [x for x in lines(tmp_path / "study" / "seed7" / "poly-grpo") if x.get("event") == "end"]
    assert [x["stage"] for x in ends] == ["grpo", "measure"] and all(x["ranks"] == 2 for x in ends)
    before = digest(tmp_path / "study" / "seed7")
    again = launch(tmp_path, "bash", "train.sh")
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("done already") == 7 and digest(tmp_path / "study" / "seed7") == before


def test_torchrun_leaves_the_programs_flags_alone():
    """torchrun reads the whole command line for its own options and their beginnings, the program's part too."""
    from torch.distributed.run import get_args_parser
    parsers = [polylora.parser(), grpo.parser(), evaluate.parser()]
    subs = [p for parser in parsers for a in parser._actions if isinstance(a.choices, dict) for p in a.choices.values()]
    flags = {f for p in (*parsers, *subs) for a in p._actions for f in a.option_strings if f.startswith("--")}
    assert {"--from", "--samples", "--lambda", "--shard"} <= flags
    for flag in flags - {"--start", "--n"}:
        args = get_args_parser().parse_args(["--nproc-per-node=1", "program.py", "command", flag, "1"])
        assert args.training_script_args == ["command", flag, "1"]
    for flag in ("--start", "--n"):                                            # or the other names are not needed
        with pytest.raises(SystemExit):
            get_args_parser().parse_args(["program.py", flag, "1"])


@pytest.mark.parametrize("arguments, word", [(["--modle", "x"], "--modle"), (["--model", "x"], "--data"),
                                             (["--data", "no/such/file.jsonl"], "no/such/file.jsonl"), (["--seeds"], "value"), (["--nf4"], "--model"),
                                             (["--share", "1"], "--lambda"), (["--narrow"], "--data"), (["--steps", "40,x"], "one number"), (["--temperatures", "0.5,1"], "blanks"),
                                             (["--temperatures", "0.5 0.7.5"], "blanks")])
def test_train_sh_refuses_wrong_arguments(arguments, word):
    ran = subprocess.run(["bash", "train.sh", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 2 and word in ran.stderr and len(ran.stderr.strip().splitlines()) == 1


def test_train_sh_is_for_the_bash_of_macos_too():
    """Its bash is 3.2: without `wait -n`, arrays by name, changes of case; and under `set -u` an array that
    is empty counts as unset."""
    text = (ROOT / "train.sh").read_text()
    newer = (r"wait -n|\b(mapfile|readarray|coproc)\b|\b(declare|local|typeset) -\w*[Ang]|\$\{\w+(\[\w\])?(,|\^|@[A-Z])|"
             r"&>>|\|&|;&|\[-1\]|\bEPOCH|\$\{!?\w+: -\d|\[\[ -v ")
    assert re.search(newer, text) is None
    empty = set(re.findall(r"\b(\w+)=\(\)", text))
    assert {"held", "split", "until", "code", "extra"} <= empty
    for name in empty - {"workers", "runs"}:                                   # which hold something where they are used
        every, guarded = f'"${{{name}[@]}}"', f'${{{name}[@]+"${{{name}[@]}}"}}'
        assert text.count(every) == text.count(guarded), name


STUDIES = "primary trials rates map cover fresh lambda full losses adapters diversities objectives controls paths temperature free valid few noisy blind valid-trials blind-trials noisy-trials few-trials".split()


def asked(tmp_path, *flags, ranks=1, gpu=False):
    """The commands of a launch of train.sh, [[program's path, word, ..], ..], by a python that only writes down
    what it is asked, and in `stages` under which number; a rank of `ranks`, on a machine with a GPU or without."""
    fake, said = tmp_path / "python", tmp_path / "said"
    fake.write_text(f'#!/bin/sh\n[ "$1" != -c ] || {{ echo {gpu}; exit; }}\necho "$@" >> {said}\n'
                    f'echo "$STUDY_STAGE" >> {tmp_path}/stages\n')
    fake.chmod(0o755)
    said.unlink(missing_ok=True)
    (tmp_path / "stages").unlink(missing_ok=True)
    env = os.environ | {"RANK": "0", "WORLD_SIZE": str(ranks), "STUDY_PYTHON": str(fake)}
    ran = subprocess.run(["bash", "train.sh", "--out", str(tmp_path / "o"), *flags], cwd=ROOT, env=env,
                         capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return [line.split() for line in said.read_text().splitlines()]


@pytest.mark.parametrize("study", STUDIES)
def test_every_command_of_a_named_study_is_one_that_the_programs_take(tmp_path, study):
    """And each arm starts from one that came before it."""
    made, measured = set(), []
    for room, *words in asked(tmp_path, "--study", study, "--seeds", "11"):
        room = Path(room).name
        if room == "data.py":
            continue
        args = {"polylora.py": polylora, "grpo.py": grpo, "evaluate.py": evaluate}[room].parser().parse_args(words)
        if room == "evaluate.py":
            measured.append(args)
            continue
        if room == "polylora.py" and words[0] == "sft":
            polylora.check_sft(args)
        if room == "grpo.py":
            assert Path(args.start) in made and (" set" not in grpo.OBJECTIVES[args.advantage].takes or args.set_size < args.k)
            grpo.check_diversity(args)
        if room == "polylora.py" and words[0] == "wise":
            assert {Path(run) for run in args.folders} <= made
        made.add(Path(args.out))
    *measures, report = measured
    assert measures and {args.reward for args in measures} == {"auto"}
    assert {Path(run) for run in report.runs if "@" not in Path(run).name} - {tmp_path / "o/seed11/base"} <= made
    names = {path.name for path in made}
    if study == "cover":
        assert report.primary == ["dpp-cover@1", "lora-cover"]
    if study == "paths":
        assert {f"{arm}@{n}" for arm in ("lora-grpo", "lora-passk", "lora-cover", "poly-grpo", "dpp-cover@1")
                for n in (20, 40, 80)} <= names
    if study in ("valid", "blind"):  # each method's best of its six trials
        shares = {Path(args.out).name: args.diversity_share for args in map(grpo.parser().parse_args, (
            words for room, *words in asked(tmp_path, "--study", study) if room.endswith("grpo.py")))}
        assert shares["dpp-grpo"] == {"valid": 6, "blind": 3}[study] and not shares["dpp-then-passk"]
        assert {"valid": "lora-kl-slow", "blind": "lora-kl@0.3"}[study] in shares
    if study.endswith("-trials"):  # as many for each method
        tried = [name.rsplit("-at-")[0].rsplit("-", 1)[0] for name in names if name.startswith("try-")]
        sets = study in ("noisy-trials", "few-trials")
        assert {name: tried.count(name) for name in tried} == dict.fromkeys(
            ("try-passk", "try-cover", "try-dpp-cover", "try-both") if sets else
            ("try-grpo", "try-dpp-kl", "try-passk", "try-dpp-passk", "try-dpp-grpo"), 4 if study == "few-trials" else 6)
        assert not sets or {f"lora-{name}-at-1e-3" for name in ("polyepo", "darling", "dra", "polychromic")} <= names
    if study == "fresh":  # each at its best of five temperatures on seeds 11 to 13
        assert report.primary == ["dpp-cover@1@0.75", "lora-cover@0.75", "lora-passk@0.75"]
        assert set(report.primary) <= {Path(run).name for run in report.runs}
    if study.startswith("few"):  # groups of four in both phases
        assert {words[words.index("--k") + 1] for _, *words in asked(tmp_path, "--study", study) if "--k" in words} == {"4"}
    if study in ("few", "noisy"):
        assert report.primary == ["dpp-cover@1", "lora-cover", "lora-passk"]
    if study == "primary":
        assert report.primary == ["poly-grpo", "lora-cover", "lora-passk"]
    wanted = {"losses": {f"sft-{name}" for name in polylora.SFT_LOSSES if name != "ce"},
              "adapters": {f"lora-{name}" for name in polylora.ADAPTERS if name not in ("lora", "full")},
              "diversities": {f"poly-{name}" for name in polylora.DIVERSITIES if name != "cosine"},
              "objectives": {f"lora-{name}" for name in grpo.OBJECTIVES} - {
                  "lora-group", "lora-coverage"} | {"lora-grpo", "lora-cover"}}
    assert wanted.get(study, set()) <= names


def test_small_worlds_rates_are_not_those_of_the_full_study(tmp_path):
    """Arms that their two trials gave another rate trained an 8B model at 2e-3 and 4e-3, twenty to a hundred times
    the others'; lora-slow was 25 times as fast, and lora-long shorter."""
    posts = tmp_path / "posts.jsonl"
    posts.write_text("")
    arms = "lora poly poly-dpp sft-gem lora-adalora lora-long lora-grpo lora-rloo lora-clip-cov lora-slow lora-fast dpp-cover@1"
    for gpu, first, then in (True, 2e-4, 2e-5), (False, 2e-3, 3e-4):
        said = asked(tmp_path, "--model", "some/model", "--data", str(posts), "--jobs", "1", "--arms", arms, gpu=gpu)
        trained = {"grpo.py": grpo.parser(), "polylora.py": polylora.parser()}
        trained = {Path(args.out).name: args for args in (
            trained[Path(room).name].parse_args(words) for room, *words in said if Path(room).name in trained)}
        assert set(trained) == set(arms.split())
        for name, args in trained.items():
            rate = then if hasattr(args, "start") else first
            assert args.lr == pytest.approx(rate * {"lora-slow": 0.5, "lora-fast": 2}.get(name, 1)), name
        long, usual = trained["lora-long"], trained["lora"]
        assert (long.steps, long.epochs) == ((0, 2.8) if gpu else (252, 1)) and usual.steps == (0 if gpu else 90)


def test_a_launch_of_many_ranks_gives_each_a_post(tmp_path):
    posts = tmp_path / "posts.jsonl"
    posts.write_text("")
    for ranks, drafted, batch in (8, 8, 16), (16, 16, 16), (24, 24, 24):
        said = asked(tmp_path, "--model", "m", "--data", str(posts), gpu=True, ranks=ranks)
        sft = [polylora.parser().parse_args(words) for room, *words in said if room.endswith("polylora.py")]
        rl = [grpo.parser().parse_args(words) for room, *words in said if room.endswith("grpo.py")]
        assert sft and rl and {(a.draft_posts, a.batch) for a in sft} == {(drafted, batch)} and {a.batch for a in rl} == {batch}


@pytest.mark.parametrize("study", ["fresh", "free", "temperature"])
def test_no_two_stages_of_a_seed_meet_under_one_name(tmp_path, study):
    """The second measuring of the same runs called the dead ports of the first; also where one rank finds an arm
    done that another does not."""
    asked(tmp_path, "--study", study, "--seeds", "11", ranks=2)
    *numbers, _ = (tmp_path / "stages").read_text().split()                    # the report has no ranks
    assert len(set(numbers)) == len(numbers) > 5
    done = tmp_path / "o" / "seed11" / "lora-half"
    done.mkdir(parents=True)
    (done / "done.json").write_text("{}")
    asked(tmp_path, "--study", study, "--seeds", "11", ranks=2)
    *now, _ = (tmp_path / "stages").read_text().split()
    assert now[-2:] == numbers[-2:] and (len(now) == len(numbers) - 1 if study == "free" else now == numbers)


def test_any_study_may_be_measured_at_other_temperatures(tmp_path):
    said = asked(tmp_path, "--study", "valid", "--seeds", "11", "--temperatures", "0.5 .75")
    *measured, report = [evaluate.parser().parse_args(words) for room, *words in said if room.endswith("evaluate.py")]
    assert [(args.temperature, args.name) for args in measured[1:]] == [(0.5, "0.5"), (0.75, ".75")]
    assert {"dpp-grpo", "dpp-grpo@0.5", "dpp-grpo@.75"} <= {Path(run).name for run in report.runs}


def test_any_trial_may_be_asked_by_its_name(tmp_path):
    said = asked(tmp_path, "--arms", "lora try-cover-5-at-7e-4", "--seeds", "11")
    args, = [grpo.parser().parse_args(words) for room, *words in said if room.endswith("grpo.py")]
    assert (Path(args.out).name, args.advantage, args.set_size, args.lr) == ("try-cover-5-at-7e-4", "coverage", 5, 7e-4)


@pytest.mark.parametrize("flags, word", [(["--arms", "lora lroa-grpo"], "lroa-grpo"),
                                         (["--arms", "lora poly", "--temperatures", "0.5 0.3"], "poly@0.3"),
                                         (["--arms", "lora try-cover-four-at-1e-3"], "no arm try-cover-four-at-1e-3"),
                                         # A trial's rate is a small world's.
                                         (["--model", "some/model", "--data", "README.md", "--arms", "lora try-cover-4-at-1e-3"],
                                          "no arm try-cover-4-at-1e-3")])
def test_arms_that_do_not_exist_or_would_share_a_folder_are_refused_before_anything_runs(flags, word):
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "STUDY_PYTHON": "false"}
    ran = subprocess.run(["bash", "train.sh", *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 2 and word in ran.stderr and len(ran.stderr.strip().splitlines()) == 1


def test_folders_may_have_blanks_in_their_names(tmp_path):
    """After all the training the arms to measure were cut at the blank."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    fake, said = folder / "python", folder / "said"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done >> "$(dirname "$0")/said"\n')
    fake.chmod(0o755)
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "STUDY_PYTHON": str(fake)}
    launch = lambda *more: subprocess.run(["bash", "train.sh", "--out", str(folder / "o"), "--seeds", "1", *more], cwd=ROOT,
                                          env=env, capture_output=True, text=True, timeout=600)
    assert launch("--arms", "lora").returncode == 0
    assert str(folder / "o/seed1/lora") in said.read_text().splitlines()
    assert said.read_text().splitlines().count(str(folder / "o/seed1/lora")) == 3   # trained, measured, reported
    ran = launch("--embedder", "my embedder")
    assert ran.returncode == 2 and "--embedder my embedder" in ran.stderr


def test_the_full_study_holds_d_at_the_reward_s_norm_unless_a_weight_is_given(tmp_path):
    posts = tmp_path / "posts.jsonl"
    posts.write_text("")
    for more, share, weight, gate in ((), 1, 0, "auto"), (("--weight", "2"), 0, 2, "auto"):
        said = asked(tmp_path, "--model", "some/model", "--data", str(posts), "--jobs", "1", *more)
        line, = (x for x in said if x[0].endswith("grpo.py") and any(word.endswith("seed1/poly-grpo") for word in x))
        args = grpo.parser().parse_args(line[1:])
        assert (args.diversity_share, args.diversity_weight, args.gate) == (share, weight, gate)
        cpu = Path("/proc/cpuinfo")
        native = cpu.exists() and any(flag in cpu.read_text() for flag in ("avx512_bf16", "amx_bf16"))
        assert args.dtype == ("bfloat16" if native else "auto")


@pytest.mark.parametrize("world_flags", [(), ("--data", "posts"), ("--model", "some/model", "--data", "posts")])
def test_weight_changes_d_s_weight_and_no_share(tmp_path, world_flags):
    """--weight 7.9 for 8 halved --diversity-share of three arms that do not use --weight."""
    posts = tmp_path / "posts.jsonl"
    posts.write_text("")
    flags = [str(posts) if word == "posts" else word for word in world_flags]
    shares, weights = [], []
    for weight in ("7.9", "8", "4", "1"):
        said = asked(tmp_path, *flags, "--arms", "lora poly poly-dpp poly-grpo poly-passk-d poly-cover-d dpp-grpo", "--seeds", "1", "--jobs", "1",
                     "--weight", weight)
        args = [grpo.parser().parse_args(words[1:]) for words in said if words[0].endswith("grpo.py")]
        by_name = {Path(a.out).name: a for a in args}
        shares.append([by_name[name].diversity_share for name in ("poly-passk-d", "poly-cover-d", "dpp-grpo")])
        weights.append(by_name["poly-grpo"].diversity_weight)
    assert weights == [7.9, 8, 4, 1] and all(share == shares[0] for share in shares) and min(shares[0]) > 0


@pytest.mark.parametrize("voices", [False, True])
def test_the_full_study_s_own_commands_run_on_replies_with_and_without_voices(world, tmp_path, capsys, monkeypatch, voices):
    """Phase two of `train.sh --model` ended in a sentence, after hours, on every file of replies by voice."""
    posts = tmp_path / "posts.jsonl"
    answers = lambda i: {"curious": f"Number {i}? Tell us more!", "warm": f"Poor {TOPICS[i % 6]}, I feel you"}
    rows = [{"post": f"My {TOPICS[i % 6]} let me down, part {i}", "replies": answers(i)} for i in range(22)]
    rows = rows if voices else [row | {"replies": list(row["replies"].values())} for row in rows]
    posts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = asked(tmp_path, "--model", world["model"], "--data", str(posts), "--jobs", "1", "--posts", "10", "--steps", "2,2",
                 "--samples", "10")
    by_rewards, by_chance = polylora.Gate.measure, {"low": -8.0, "high": -6.0}  # a random model's likelihoods tell nothing
    monkeypatch.setattr(polylora.Gate, "measure", lambda gate, some: vars(gate).update(by_chance)
                        if gate.name == "likelihood" else by_rewards(gate, some))
    rooms = {"data": data, "polylora": polylora, "grpo": grpo, "evaluate": evaluate}
    for room, *words in said:
        if words[0] != "import":                                               # torch.cuda is asked for first
            assert rooms[Path(room).stem].main(words) == 0, capsys.readouterr().err
    arms = json.loads((tmp_path / "o" / "report" / "report.json").read_text())["arms"]
    assert set(arms) == {"base", "lora", "poly", "lora-grpo", "lora-passk", "poly-grpo"}


def test_a_file_s_writers_can_be_narrow_and_its_readers_not(tmp_path):
    posts = tmp_path / "posts.jsonl"
    posts.write_text(json.dumps({"post": "Hi", "replies": {"warm": "Hello!", "blunt": "Yes?"}}) + "\n")
    readers = []
    for flags in ([], ["--narrow"]):
        words = next(words for room, *words in asked(tmp_path, "--data", str(posts), "--seeds", "11", *flags) if "split" in words)
        args = data.parser().parse_args(words)
        readers.append((args.popularity, args.writers, args.permute, args.by))
    assert readers == [(1.5, None, False, "post"), (0.7, 3.0, True, "post")]


@pytest.mark.parametrize("given, sft, then", [("7,3", 7, 3), ("5", 5, 5)])
def test_both_phases_may_have_steps_of_their_own(tmp_path, given, sft, then):
    said = asked(tmp_path, "--seeds", "11", "--arms", "lora lora-grpo", "--steps", given)
    steps = {Path(room).stem: vars(parser.parse_args(words))["steps"] for room, *words in said
             for name, parser in (("polylora", polylora.parser()), ("grpo", grpo.parser()))
             if Path(room).stem == name and words[0] != "base"}
    assert steps == {"polylora": sft, "grpo": then}


def test_train_sh_help():
    ran = subprocess.run(["bash", "train.sh", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0 and "--lambda" in ran.stdout


def test_judges_and_reward_models_are_asked_in_their_own_template(world, tmp_path):
    """All were shown Qwen3's hybrid chat, an empty think block and no system turn, whatever their template says."""
    template = ("{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
                "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    base, trained = tmp_path / "base", tmp_path / "trained"
    shutil.copytree(world["model"], base)
    (base / "chat_template.jinja").write_text(template)
    posts = [data.Post("1", "Hi", ("Hello.", "Hey."))]
    heads = rewards.new_heads(Qwen3.from_pretrained(base), 1, 2, 4)
    rewards.save_heads(heads, trained, str(base))
    session = lambda folder: SimpleNamespace(
        args=SimpleNamespace(reward_model=str(folder), judge=str(folder), dtype="auto", spread_penalty=1.0),
        ranks=SimpleNamespace(device=torch.device("cpu")), domain=data.Replies(posts))
    for asked_one in (rewards.make_reward("judge", session(base)), rewards.make_reward("model", session(trained)),
                      evaluate.Asked.load(session(base))):
        ids = asked_one.chat(posts[0], "Ho.")
        text = asked_one.tokenizer.decode(ids, skip_special_tokens=False)
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n") and "<think>" not in text, type(asked_one)
    (base / "chat_template.jinja").write_text("[INST] {{ messages[0]['content'] }} [/INST]")
    for load in (lambda: rewards.make_reward("judge", session(base)), lambda: rewards.make_reward("model", session(trained)),
                 lambda: evaluate.Asked.load(session(base))):
        with pytest.raises(data.InputError, match="chat template"):
            load()


def test_reward_model_and_judge_read_one_chat_at_a_time_as_in_a_batch(world):
    """Right padding must not reach the scored token; the judge is P(yes) against P(no) and lies in (0, 1)."""
    tokenizer = data.load_tokenizer(world["model"])
    config = Qwen3.from_pretrained(world["model"]).config
    torch.manual_seed(5)
    scorer = Qwen3(config, lm_head=False, score_head=True).eval()
    posts, domain = data.load_posts(world["eval"])[:2], data.Replies([])
    drafts = [["yes", "a much longer reply, word upon word upon word"], ["no"]]
    for reward in (rewards.ModelReward(scorer, tokenizer, domain, batch=2),
                   rewards.JudgeReward(Qwen3.from_pretrained(world["model"]), tokenizer, domain, batch=3)):
        got = reward(posts, drafts)
        alone = [[reward([p], [[t]])[0][0] for t in ts] for p, ts in zip(posts, drafts)]
        assert [len(r) for r in got] == [2, 1]
        assert all(a == pytest.approx(b, abs=1e-5) for r, s in zip(got, alone) for a, b in zip(r, s))
        assert len({round(x, 6) for r in got for x in r}) == 3
    assert all(0 < x < 1 for r in got for x in r)


def test_the_worked_example_of_how_to_add_a_method_applies_and_runs(world, tmp_path):
    """The README's diff, applied to a copy: the method's own test passes, --help lists it, and a run of
    two steps trains by it."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    diff = page.split("## How to add a method", 1)[1].split("```diff\n", 1)[1].split("```", 1)[0]
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__"))
    (copy / "raft.diff").write_text(diff, encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    subprocess.run(["git", "apply", "raft.diff"], cwd=copy, check=True, timeout=600)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = lambda *a: subprocess.run([sys.executable, *a], cwd=copy, env=env, capture_output=True,
                                    text=True, timeout=600)
    tested = run("-m", "pytest", "tests/test_grpo.py", "-k", "raft", "-p", "no:cacheprovider")
    assert tested.returncode == 0, tested.stdout[-2000:]
    assert "RAFT (arXiv 2304.06767)" in " ".join(run("grpo.py", "--help").stdout.split())
    trained = run("grpo.py", *grpo_args(world, "x", "--out", str(tmp_path / "run"), "--advantage", "raft"))
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert "lora-raft " in (copy / "train.sh").read_text() and lines(tmp_path / "run")[0]["advantage"] > 0


def test_a_stage_refuses_posts_of_another_domain_than_its_start_was_trained_for(world, tmp_path, capsys):
    """Inferred anew from each file, GRPO and evaluation ran as another domain than SFT, with exit 0."""
    assert data.main(["split", "--data", "pocket", "--sizes", "grpo=6", "--out", str(tmp_path)]) == 0
    other = str(tmp_path / "grpo.jsonl")
    assert grpo.main(grpo_args(world, "never", "--data", other)) == 2
    assert "was trained for the domain 'replies'" in capsys.readouterr().err
    assert evaluate.main(["measure", world["lora"], "--data", other, "--n", "10"]) == 2
    assert "was trained for the domain 'replies'" in capsys.readouterr().err
    assert not (Path(world["root"]) / "never").exists()


def test_a_stage_refuses_the_same_voices_under_other_readers(tmp_path):
    """Voices in another order, or another popularity, are other readers: what was rewarded and what is
    judged would differ."""
    posts = data.pocket_posts(4)
    trained = data.make_domain("auto", posts)
    data.write_json(tmp_path / "done.json", {"domain": trained.record()})
    grpo.same_domain(tmp_path, data.make_domain("auto", posts))
    grpo.same_domain(tmp_path / "somebody's adapter", trained)                 # says nothing of a domain
    for other in (data.Pocket(posts, voices=trained.voices[::-1]), data.Pocket(posts, popularity=0.7),
                  data.Pocket(posts, permute=True), data.Pocket(posts, writers=3.0), data.Domain(posts)):
        with pytest.raises(data.InputError, match="was trained for the domain 'pocket'"):
            grpo.same_domain(tmp_path, other)
    data.write_json(tmp_path / "done.json", {"domain": "pocket"})                # an older version's
    with pytest.raises(data.InputError, match="with voices none"):
        grpo.same_domain(tmp_path, trained)


def test_an_evaluation_of_anything_else_is_made_again(world, tmp_path, monkeypatch):
    """Another file of equal length, another adapter, dtype, 4 bits, seed or model returned 0 with the old
    records; and another seed's config.json came to stand over old drafts."""
    run, bare = tmp_path / "run", tmp_path / "bare"
    shutil.copytree(world["lora"], run)
    adapter = run / "adapter" / "adapter_model.safetensors"

    def measured(*more, data_file=world["eval"]):
        args = ["measure", str(run), "--bare", str(bare), "--data", data_file, "--n", "10",
                "--max-new-tokens", "3", *more]
        assert evaluate.main(args) == 0
        return [json.loads((f / "evaluation.json").read_text()) for f in (run, bare)]
    first = measured()
    before = (run / "evaluation.json").stat().st_mtime_ns
    assert measured() == first and (run / "evaluation.json").stat().st_mtime_ns == before
    posts = data.load_posts(world["eval"])
    changed = tmp_path / "eval.jsonl"
    data.save_posts([data.Post(p.id, p.post + " now", p.replies) for p in posts], changed)
    texts = measured(data_file=str(changed))
    assert [r["post"] for r in texts[0]["records"]] != [r["post"] for r in first[0]["records"]]
    assert measured("--dtype", "bfloat16")[0]["settings"]["dtype"] == "torch.bfloat16"
    bits = measured("--nf4")[1]
    assert bits["settings"]["nf4"] and not first[1]["settings"]["nf4"]
    assert [r["drafts"] for r in bits["records"]] != [r["drafts"] for r in first[1]["records"]]
    other = measured("--seed", "5")[1]
    assert json.loads((bare / "config.json").read_text())["seed"] == other["settings"]["seed"] == 5
    assert [r["drafts"] for r in other["records"]] != [r["drafts"] for r in first[1]["records"]]
    tensors = adapter_of(run)
    shutil.copy(adapter, tmp_path / "kept")
    from safetensors.torch import save_file
    save_file({n: t + 1.0 for n, t in tensors.items()}, adapter, metadata={"format": "pt"})
    again = measured()[0]
    assert again["settings"]["adapter"] != first[0]["settings"]["adapter"]
    assert [r["drafts"] for r in again["records"]] != [r["drafts"] for r in first[0]["records"]]
    model = tmp_path / "model"
    shutil.copytree(world["model"], model)
    weights = Qwen3.from_pretrained(model)
    weights.model.norm.weight.data.mul_(0.5)
    weights.save_pretrained(model)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "model_hash"}))  # of older days
    assert measured("--model", str(model))[1]["settings"]["model"] != first[1]["settings"]["model"]
    monkeypatch.setattr(trainer, "fetch", lambda name, revision: Path(world["model"] if revision else model))
    assert trainer.model_hash("a/b", None) != trainer.model_hash("a/b", "abc123")


def test_every_run_is_measured_with_drafts_of_its_own_seed(world, tmp_path, monkeypatch):
    """Drafts of all runs from --seed would tie the seeds together, which count as drawn apart."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, seed in ((first, 3), (second, 8)):
        shutil.copytree(world["lora"], folder)
        config = data.read_json(folder / "config.json")
        data.write_json(folder / "config.json", config | {"seed": seed})
    seen, measure_run = [], evaluate.measure_run
    monkeypatch.setattr(evaluate, "measure_run", lambda s, to, *rest: (seen.append((to.name, s.args.seed)), measure_run(s, to, *rest)))
    flags = ["--data", world["eval"], "--n", "10", "--max-new-tokens", "3", "--seed", "5"]
    assert evaluate.main(["measure", str(first), str(second), "--bare", str(tmp_path / "bare"), *flags]) == 0
    assert seen == [("bare", 5), ("first", 3), ("second", 8)]
    kept = {name: data.read_json(tmp_path / name / "evaluation.json") for name in ("bare", "first", "second")}
    assert {name: value["settings"]["seed"] for name, value in kept.items()} == dict(seen)
    drafts = [[r["drafts"] for r in kept[name]["records"]] for name in ("first", "second")]
    assert drafts[0] != drafts[1]                                              # one adapter, two seeds


def test_every_decoder_is_measured_and_reported_as_an_arm_of_its_own(world, tmp_path, capsys):
    """Each writes RUN@NAME and leaves RUN alone; joint ones hold whole sets; the report sets them side by
    side. The judge's and the agreement's columns come with it."""
    run = tmp_path / "run"
    shutil.copytree(world["lora"], run)
    common = ["measure", str(run), "--data", world["eval"], "--n", "10", "--max-new-tokens", "4", "--pool", "5"]
    assert evaluate.main([*common, "--judge", world["model"], "--judge-drafts", "2"]) == 0
    before = (run / "evaluation.json").read_bytes()
    assert evaluate.main([*common, "--top-k", "5", "--name", "top5"]) == 0
    names = [name for name in decoders.DECODERS if name != "sampling"]
    for name in names:
        assert evaluate.main([*common, "--decoder", name]) == 0, capsys.readouterr().err
        written = json.loads((tmp_path / f"run@{name}" / "evaluation.json").read_text())
        joint = decoders.DECODERS[name].joint
        assert written["settings"]["decoding"]["independent"] is not joint
        for r in written["records"]:
            assert len(r["drafts"]) == (5 if name == "beams" else 10) and r.get("set") == (5 if joint else None)
            assert len(r["agrees"]) == len(r["tokens"]) == len(r["base_logprobs"]) == len(r["drafts"])
    assert (run / "evaluation.json").read_bytes() == before
    runs = [str(run), *(f"{run}@{name}" for name in ["top5", *names])]
    assert evaluate.main(["report", *runs, "--out", str(tmp_path / "report"), "--ks", "1,5"]) == 0
    arms = json.loads((tmp_path / "report" / "report.json").read_text())["arms"]
    assert list(arms) == ["run", "run@top5", *(f"run@{name}" for name in names)]
    for name, arm in arms.items():
        assert arm["metrics"]["recall@5"]["mean"] is not None and arm["metrics"]["perplexity"]["mean"] > 1
        joint = name.partition("@")[2] in ("beams", "list", "verbalized")
        assert (arm["metrics"]["recall@1"]["mean"] is None) == joint
    verdicts = arms["run"]["metrics"]
    assert all(0 <= verdicts[f"judge-{x}"]["mean"] <= 1 for x in [*evaluate.RUBRICS, "wins", "ties"])
    assert arms["run@mmi"]["metrics"]["judge-wins"]["mean"] is None
    capsys.readouterr()
    for name in ("beams", "list", "mmi"):
        assert evaluate.main(["drafts", str(run), "My kettle sings", "--k", "3", "--max-new-tokens", "4", "--decoder", name]) == 0
    assert capsys.readouterr().out.count("1. ") == 3
    assert evaluate.main([*common, "--decoder", "list", "--set-size", "11"]) == 2
    assert evaluate.main([*common, "--name", "a/b"]) == 2
    shutil.copytree(run, trained := tmp_path / "run@20")
    assert evaluate.main([*common, "--name", "20"]) == 2 and "run@20" in capsys.readouterr().err
    assert (trained / "evaluation.json").read_bytes() == before       # a stop at 20 steps, not run at another setting


def test_prompts_for_stories_from_file_to_report(world, tmp_path, capsys):
    """Prompts alone can be measured and trained on by GRPO, not by SFT; a judge passes above a half, or
    above what the user says."""
    asked = [{"id": i, "prompt": f"Tell a story about the {TOPICS[i % 6]}, number {i}"} for i in range(6)]
    told = [line | {"prompt": f"Please: {line['prompt']}", "reply": f"Poor {TOPICS[i % 6]}, I feel you"}
            for i, line in enumerate(asked)]
    for name, rows, size in (("bare", asked, "eval=6"), ("told", told, "sft=6")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        domain = ["--domain", "stories"] * (name == "told")
        assert data.main(["split", "--data", str(tmp_path / f"{name}.jsonl"), "--sizes", size, "--out", str(tmp_path / name), *domain]) == 0
    posts, run = str(tmp_path / "bare" / "eval.jsonl"), str(tmp_path / "poly")
    sft = lambda file, out: sft_args(world, out, "--data", str(file), "--out", str(tmp_path / out), "--lambda", "0.3", "--gate", "none")
    assert polylora.main(sft(posts, "none")) == 2 and "no reply to learn from" in capsys.readouterr().err
    assert polylora.main(sft(tmp_path / "told" / "sft.jsonl", "poly")) == 0
    judge = ["--reward", "judge", "--reward-model", world["model"]]
    assert grpo.main(grpo_args(world, "ours", "--start", run, "--data", posts, "--out", str(tmp_path / "grpo"), *judge)) == 0
    assert all(0 < line["different"] <= 1 for line in lines(tmp_path / "grpo") if "reward" in line)
    measure = ["measure", run, str(tmp_path / "grpo"), "--data", posts, "--n", "10", "--max-new-tokens", "5"]
    assert evaluate.main(measure) == 2 and "--pass-above" in capsys.readouterr().err
    assert evaluate.main([*measure, *judge, "--judge", world["model"], "--judge-drafts", "2"]) == 0
    records = json.loads((tmp_path / "poly" / "evaluation.json").read_text())["records"]
    assert all(r["passed"] == [x > 0.5 for x in r["rewards"]] and "pairs" not in r["judge"] for r in records)
    assert evaluate.main([*measure, *judge, "--pass-above", "0.9"]) == 0
    again = json.loads((tmp_path / "poly" / "evaluation.json").read_text())
    assert [r["drafts"] for r in again["records"]] == [r["drafts"] for r in records] and again["settings"]["pass_above"] == 0.9
    assert all(r["passed"] == [x > 0.9 for x in r["rewards"]] for r in again["records"])
    assert evaluate.main(["report", run, str(tmp_path / "grpo"), "--out", str(tmp_path / "report"), "--against", "poly"]) == 0
    arm = json.loads((tmp_path / "report" / "report.json").read_text())["arms"]["poly"]["metrics"]
    assert {"valid", "max@10", "semantic", "ead"} <= set(arm)


class Preferring:
    """A judge that prefers a place, and beyond that one text: says yes by what it is asked."""

    def __call__(self, posts, drafts):
        def yes(question):
            if "Reply A" not in question:
                return 0.5
            a, b = question.partition("Reply A:\n\n")[2].partition("\n\nReply B:\n\n")[::2]
            better = "best" in a or ("worst" in b and "best" not in b)
            worse = "worst" in a or "best" in b
            return 0.9 if better else 0.1 if worse else 0.7                    # else the first place
        return [[yes(q) for q in row] for row in drafts]


def test_a_judge_sees_each_pair_in_both_orders():
    """A win is one in both places; a judge that goes by the place alone gives ties, and a tie counts half."""
    session = SimpleNamespace(args=SimpleNamespace(judge_drafts=3), judge=Preferring())
    records = [{"drafts": ["the best one", "the worst one", "like any", "never read"]}]
    evaluate.add_judgement(session, records, [data.Post("p", "a post", ("a person's reply",))])
    judge = records[0]["judge"]
    assert judge["pairs"] == [pytest.approx([0.9, 0.9]), pytest.approx([0.1, 0.1]), pytest.approx([0.7, 0.3])]
    assert all(len(judge[name]) == 3 for name in evaluate.RUBRICS)
    from metrics import judged
    assert judged(records[0])["judge-wins"] == 0.5 and judged(records[0])["judge-ties"] == pytest.approx(1 / 3)


def test_drafts_are_scored_alike_some_posts_at_a_time(world, tmp_path, monkeypatch):
    """In rounds, so that memory does not grow with the posts: the same records, but for rounding."""
    args = ["--data", world["eval"], "--model", world["model"], "--n", "10", "--max-new-tokens", "5"]
    made, some_records, sizes = [], evaluate.some_records, []
    monkeypatch.setattr(evaluate, "some_records", lambda s, mine, *rest: sizes.append(len(mine)) or some_records(s, mine, *rest))
    for some in (32, 2):
        monkeypatch.setattr(evaluate, "SOME", some)
        assert evaluate.main(["measure", "--bare", str(tmp_path / str(some)), *args]) == 0
        made.append(json.loads((tmp_path / str(some) / "evaluation.json").read_text())["records"])
    assert [r["id"] for r in made[0]] == [r["id"] for r in made[1]] and len(made[0]) == 6 and sizes == [6, 2, 2, 2]
    for a, b in zip(*made):
        assert a["drafts"] == b["drafts"] and a["semantic"] == pytest.approx(b["semantic"], abs=1e-5)
        assert a["rewards"] == pytest.approx(b["rewards"], abs=1e-5)
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-3)


def test_the_base_s_revision_is_kept_with_the_adapter(world, tmp_path):
    """Trained on one revision, GRPO and measuring took the newest."""
    run = tmp_path / "run"
    assert polylora.main(sft_args(world, "x", "--out", str(run), "--revision", "abc123")) == 0
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["revision"] == "abc123"
    args = grpo.parser().parse_args(["--start", str(run), "--data", "-", "--out", "-"])
    grpo.check_grpo(args)
    assert (args.model, args.revision) == (world["model"], "abc123")
    for command in (["measure", str(run), "--data", "-"], ["drafts", str(run), "a post"]):
        args = evaluate.parser().parse_args(command)
        evaluate.name_model(args, run)
        assert (args.model, args.revision) == (world["model"], "abc123")


def test_an_adapter_on_another_base_is_refused(world, tmp_path, capsys):
    """It went onto any base of its shape: drafts of nonsense, and no word about it."""
    model = write_model(tmp_path / "model")
    other = Qwen3.from_pretrained(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    other.save_pretrained(model)
    few = ["--model", str(model), "--data", world["eval"], "--out", str(tmp_path / "x"), "--max-new-tokens", "4"]
    assert evaluate.main(["measure", world["lora"], *few[:4], "--n", "10", "--max-new-tokens", "4"]) == 2
    assert "was trained on another base" in capsys.readouterr().err
    assert grpo.main(["--start", world["lora"], "--steps", "1", "--k", "2", *few]) == 2
    assert "was trained on another base" in capsys.readouterr().err and not (tmp_path / "x").exists()
    run = ["sft", "--model", str(model), "--data", world["sft"], "--out", str(tmp_path / "run"), "--steps", "1"]
    assert polylora.main(run) == 0
    (tmp_path / "run" / "done.json").unlink()                                  # as if killed
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    other.save_pretrained(model)
    assert polylora.main([*run, "--resume"]) == 2 and "a run on another base" in capsys.readouterr().err


def test_agreement_is_embedded_in_one_call_whatever_posts_a_rank_has():
    """A call a post: with --shard, ranks whose posts have other numbers of replies waited for ever."""
    calls = []

    def embed(groups):
        calls.append(groups)
        return torch.eye(9)[torch.tensor([[len(t) for t in texts] for texts in groups])]
    session = SimpleNamespace(embedder=embed, agreement=0.5)
    posts = [data.Post("1", "p", ("aa",)), data.Post("2", "q", ("a", "aaa")), data.Post("3", "r", ("aaaa", "a"))]
    drafts = torch.eye(9)[torch.tensor([[1, 2]] * 3)]
    records = [{}, {}, {}]
    evaluate.add_agreement(session, records, posts, drafts)
    assert records == [{}, {"agrees": [[0], []], "people": 2}, {"agrees": [[1], []], "people": 2}]
    evaluate.add_agreement(session, [{}], posts[:1], drafts[:1])
    assert len(calls) == 2


def test_an_adapter_that_was_trained_elsewhere_is_measured_beside_ours(world, tmp_path, capsys):
    """A folder that holds nothing but PEFT's files: its base is the one they name, its seed --seed."""
    shutil.copytree(Path(world["lora"]) / "adapter", tmp_path / "theirs" / "adapter")
    few = ["--data", world["eval"], "--n", "10", "--max-new-tokens", "5", "--seed", "3"]
    assert evaluate.main(["measure", str(tmp_path / "theirs"), *few]) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (config["arm"], config["seed"], config["model"]) == ("theirs", 3, world["model"])
    assert evaluate.main(["measure", str(tmp_path / "theirs"), *few]) == 0 and "0 of 1 runs" in capsys.readouterr().out
    assert evaluate.main(["report", str(tmp_path / "theirs"), "--out", str(tmp_path / "report")]) == 0
    assert evaluate.main(["drafts", str(tmp_path / "theirs"), "My kettle broke", "--k", "2", "--max-new-tokens", "5"]) == 0
    assert evaluate.main(["measure", str(tmp_path), *few]) == 2 and "PEFT's layout" in capsys.readouterr().err


def test_train_sh_runs_on_the_python_of_its_launch_and_a_failed_seed_ends_the_others(tmp_path):
    """`venv/bin/torchrun train.sh` took PATH's python, without torch; and of two seeds side by side one
    failed while the other's program lived on without a parent."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexit 99\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    (tmp_path / "posts.jsonl").write_text('{"post": "one post", "reply": "a reply"}\n')
    few = ["--data", str(tmp_path / "posts.jsonl"), "--seeds", "1", "--out", str(tmp_path / "a")]
    ran = subprocess.run([sys.executable, "train.sh", *few], cwd=ROOT, env=env, capture_output=True,
                         text=True, timeout=600)
    assert ran.returncode == 2 and "--sizes" in ran.stderr and "to repeat it alone" in ran.stderr

    fake, beat = tmp_path / "fake", tmp_path / "beat"
    fake.write_text(f"""#!/bin/sh
case "$*" in
  *data.py*) exit 0 ;;
  *seed1/*) sleep 1; exit 7 ;;
esac
while true; do date +%s%N > {beat}; sleep 0.1; done
""")
    fake.chmod(0o755)
    env |= {"STUDY_PYTHON": str(fake), "STUDY_GROUP": "own"}
    ran = subprocess.run(["bash", "train.sh", "--seeds", "1 2", "--jobs", "2", "--out", str(tmp_path / "b")],
                         cwd=ROOT, env=env, capture_output=True, text=True, timeout=600,
                         start_new_session=True)
    assert ran.returncode == 7 and "exit code 7" in ran.stderr and "seed1" in ran.stderr
    time.sleep(0.3)
    last = beat.read_text()
    time.sleep(0.5)
    assert beat.read_text() == last                                            # nobody writes any more
