"""Tests of train.sh."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate
import grpo
import polylora
from helpers import PROGRAMS, ROOT, TOPICS, asked, lines, parsed, tiny_config
from support import checks
from support import registry
from support import studies


@pytest.mark.multirank
def test_no_flag_clashes_with_torchrun():
    """torchrun reads the whole command line for its own options and their beginnings, the
    program's part too."""
    from torch.distributed.run import get_args_parser
    parsers = [polylora.parser(), grpo.parser(), evaluate.parser()]
    subs = [p for parser in parsers for a in parser._actions if isinstance(a.choices, dict)
            for p in a.choices.values()]
    flags = {f for p in (*parsers, *subs) for a in p._actions for f in a.option_strings
             if f.startswith("--")}
    assert {"--from", "--samples", "--lambda", "--shard"} <= flags
    for flag in flags - {"--start", "--n"}:
        args = get_args_parser().parse_args(["--nproc-per-node=1", "program.py", "command", flag,
                                             "1"])
        assert args.training_script_args == ["command", flag, "1"]
    # or the other names are not needed
    for flag in ("--start", "--n"):
        with pytest.raises(SystemExit):
            get_args_parser().parse_args(["program.py", flag, "1"])


ARMS = ["lora", "poly-dpp", "sft-gem", "sft-ba-lora", "lora-grpo", "dpp-grpo", "lora-passk"]


def write_posts(folder):
    posts = folder / "posts.jsonl"
    posts.write_text('{"post": "one post", "reply": "a reply"}\n')
    return str(posts)


def launch(folder, *command):
    """Run a launch as typed, in the repository, with everything it writes in `folder`."""
    outside = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    small = ["--posts", "10", "--steps", "2", "--base-steps", "3", "--samples", "10",
             "--seeds", "7", "--out", str(folder / "study")]
    return subprocess.run([*command, *small], cwd=ROOT, capture_output=True, text=True, timeout=900,
                          env=outside | {"OMP_NUM_THREADS": "1", "PATH": path})


def digest(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@pytest.mark.multirank
def test_two_ranks_run_the_whole_study_and_bash_finds_it_done(tmp_path):
    first = launch(tmp_path, "torchrun", "--standalone", "--nproc-per-node=2", "train.sh")
    assert first.returncode == 0, first.stderr[-3000:]
    report = json.loads((tmp_path / "study" / "report" / "report.json").read_text())
    assert list(report["arms"]) == ["base", *ARMS]
    assert "Pass@10" in first.stdout and report["differences"]["dpp-grpo"]["stances"]
    ending = first.stdout.rpartition("python evaluate.py report ")[2].splitlines()[1:]
    assert len(ending) <= 25 and ending[-1].startswith("Next: python evaluate.py drafts ")
    records = lines(tmp_path / "study" / "seed7" / "dpp-grpo")
    ends = [record for record in records if record.get("event") == "end"]
    assert [end["stage"] for end in ends] == ["grpo", "measure"]
    assert all(end["ranks"] == 2 for end in ends)
    before = digest(tmp_path / "study" / "seed7")
    again = launch(tmp_path, "bash", "train.sh")
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("done already") == 1 + len(ARMS)
    assert digest(tmp_path / "study" / "seed7") == before


@pytest.mark.parametrize("arguments, word", [
    (["--modle", "x"], "--modle"), (["--model", "x"], "--data"), (["--seeds"], "value"),
    (["--data", "no/such/file.jsonl"], "no/such/file.jsonl"), (["--nf4"], "--model"),
    (["--data", "README.md"], "study.py run posts"), (["--steps", "40,x"], "one number"),
    (["--samples", "5"], "--samples"), (["--posts", "9"], "--posts"),
    (["--diversity", "vendi"], "vendi"), (["--study", "fresh"], "python study.py run fresh")])
def test_wrong_arguments_are_refused_in_one_sentence(arguments, word):
    ran = subprocess.run(["bash", "train.sh", *arguments], cwd=ROOT, capture_output=True,
                         text=True, timeout=60)
    assert ran.returncode == 2 and word in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_it_fits_on_a_page_and_runs_on_the_bash_of_macos():
    """That is bash 3.2: no `wait -n`, no arrays by name, no change of case; and under `set -u` an
    empty array counts as unset."""
    page = (ROOT / "train.sh").read_text()
    assert page.count("\n") <= 120
    text = page + (ROOT / "support" / "launch.sh").read_text()
    newer = (r"wait -n|\b(mapfile|readarray|coproc)\b|\b(declare|local|typeset) -\w*[Ang]|"
             r"\$\{\w+(\[\w\])?(,|\^|@[A-Z])|&>>|\|&|;&|\[-1\]|\bEPOCH|\$\{!?\w+: -\d|\[\[ -v ")
    assert re.search(newer, text) is None
    empty = set(re.findall(r"\b(\w+)=\(\)", text))
    assert {"everywhere", "measured"} <= empty
    for name in empty - {"reported"}:            # which holds something where it is used
        every, guarded = f'"${{{name}[@]}}"', f'${{{name}[@]+"${{{name}[@]}}"}}'
        assert text.count(every) == text.count(guarded) > 0, name


def check_commands(commands, folder, seed):
    """Every command is one that the programs take, and each arm starts from one made before it."""
    made = []
    for args in parsed(commands, "polylora"):
        if args.command == "sft":
            checks.check_sft(args)
        made.append(Path(args.out).name)
    for args in parsed(commands, "grpo"):
        assert Path(args.start).name in made
        assert "set_size" not in registry.OBJECTIVES[args.advantage].needs or args.set_size < args.k
        checks.check_diversity(args)
        made.append(Path(args.out).name)
    *looked, measured, report = parsed(commands, "evaluate")
    if looked:                                   # a given model: does D see what people see?
        assert len(looked) == 1 and looked[0].model == measured.model
        assert looked[0].embedders == [measured.embedder]
    arms = [name for name in made if name != "base-model"]
    assert measured.runs == [f"{folder}/o/seed{seed}/{name}" for name in arms]
    assert report.runs == [measured.bare, *measured.runs]
    assert report.against == "lora-grpo" and set(report.primary) <= set(arms)
    return arms


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("gpus", [0, 1])
def test_every_command_is_one_that_the_programs_take(tmp_path, gpus):
    assert check_commands(asked(tmp_path, "--seeds", "5", gpus=gpus), tmp_path, 5) == ARMS
    model = ["--model", "some/model", "--data", write_posts(tmp_path)]
    assert check_commands(asked(tmp_path, *model, gpus=gpus), tmp_path, 1) == ARMS
    assert [args.data for args in parsed(asked(tmp_path, *model, gpus=gpus), "evaluate")
            if args.command == "embedder"] == [f"{tmp_path}/o/data/sft.jsonl"]
    plain = check_commands(asked(tmp_path, "--diversity", "cosine", "--seeds", "5"), tmp_path, 5)
    assert plain == [{"poly-dpp": "poly", "dpp-grpo": "poly-grpo"}.get(arm, arm) for arm in ARMS]


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("diversity", ["dpp", "cosine"])
def test_an_arm_is_what_the_studies_call_by_its_name(tmp_path, diversity):
    """The same flags as in studies/_arms.toml on the toy task: one name has one meaning. So the
    polychromic arms of the default are the recipe that measured best."""
    setting, library = studies.read_setting("_toy"), studies.read_toml("_arms")
    commands = asked(tmp_path, "--seeds", "5", "--diversity", diversity)
    compared = []
    for program, words in commands:
        args = PROGRAMS[program].parser().parse_args(words)
        name = Path(getattr(args, "out", None) or "measure").name
        if name in library:
            arm = studies.make_arm(name, library, setting)
            parser = studies.parser_of(arm.phase)
            ours = {k: v for k, v in vars(args).items() if v != parser.get_default(k)}
            places = ("out", "data", "model", "start", "seed", "resume", "command", "run")
            ours = {k: v for k, v in ours.items() if k not in places}
            assert ours == studies.meaning(arm.phase, arm.flags, name), name
            if arm.starts:
                assert Path(args.start).name == arm.starts[0]
            compared.append(name)
    assert len(compared) == len(ARMS)
    base, = (args for args in parsed(commands, "polylora") if args.command == "base")
    flags = studies.meaning("base", setting["base"], "base")
    assert {name: getattr(base, name) for name in flags} == flags
    split, = parsed(commands, "data")
    flags = studies.meaning("data", setting["data"], "data")
    assert {name: getattr(split, name) for name in flags} == flags


@pytest.mark.slow
@pytest.mark.multirank
def test_rates_of_the_toy_task_are_not_those_of_the_full_study(tmp_path):
    """A rate that its trials doubled there would train an 8B model at 4e-3."""
    for gpus in (0, 1):
        commands = asked(tmp_path, "--model", "m", "--data", write_posts(tmp_path), gpus=gpus)
        assert {args.lr for args in parsed(commands, "polylora")} == {2e-4}
        assert {args.lr for args in parsed(commands, "grpo")} == {2e-5}
        assert {args.dtype for args in parsed(commands, "grpo")} == {"auto"}


@pytest.mark.slow
@pytest.mark.multirank
def test_the_toy_task_is_float32_on_every_machine(tmp_path):
    commands = asked(tmp_path, "--seeds", "5", gpus=1)
    sft = [args for args in parsed(commands, "polylora") if args.command == "sft"]
    measured = parsed(commands, "evaluate")[0]
    assert {args.dtype for args in [*sft, *parsed(commands, "grpo"), measured]} == {"float32"}


@pytest.mark.slow
@pytest.mark.multirank
def test_a_launch_of_many_ranks_gives_each_a_post(tmp_path):
    for ranks, drafted, batch in (8, 8, 16), (16, 16, 16), (24, 24, 24):
        commands = asked(tmp_path, "--model", "m", "--data", write_posts(tmp_path), gpus=8,
                         ranks=ranks)
        sft, rl = parsed(commands, "polylora"), parsed(commands, "grpo")
        assert {(args.draft_posts, args.batch) for args in sft} == {(drafted, batch)}
        assert {args.batch for args in rl} == {batch}


@pytest.mark.multirank
def test_no_two_stages_of_a_seed_share_a_name(tmp_path):
    """The second of two would read the first one's addresses."""
    asked(tmp_path, "--seeds", "11", ranks=2)
    *numbers, _ = (tmp_path / "said.stages").read_text().split()   # the report has no ranks
    assert len(set(numbers)) == len(numbers) == 3 + len(ARMS)


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("gpus, cards", [(0, {""}), (1, {""}), (2, {"0", "1"})])
def test_seeds_side_by_side_are_capped_by_the_gpus(tmp_path, gpus, cards):
    """Three seeds on one GPU run one after the other, on two each takes its turn."""
    commands = asked(tmp_path, gpus=gpus, env={"CUDA_VISIBLE_DEVICES": "",
                                               "PYTORCH_CUDA_ALLOC_CONF": "mine"}.items())
    told = [line.split(" ") for line in (tmp_path / "said.env").read_text().splitlines()]
    assert {card for card, _ in told[:-1]} == cards
    assert {conf for _, conf in told} == {"mine"}            # one that is set is kept
    seeds = [re.search(r"/seed(\d)", " ".join(words))[1] for _, words in commands[:-1]]
    if gpus == 1:
        assert seeds == sorted(seeds)
    assert sorted(set(seeds)) == ["1", "2", "3"]


@pytest.mark.multirank
def test_expandable_segments_are_asked_of_cuda(tmp_path):
    outside = {"PYTORCH_CUDA_ALLOC_CONF": ""}
    asked(tmp_path, "--seeds", "5", gpus=1, env=outside.items())
    assert "expandable_segments:True" in (tmp_path / "said.env").read_text()


@pytest.mark.slow
@pytest.mark.multirank
def test_folders_with_blanks_and_commands_that_can_be_pasted(tmp_path):
    folder = tmp_path / "my runs ü"
    folder.mkdir()
    commands = asked(folder, "--seeds", "5", "--embedder", "my embedder")
    assert check_commands(commands, folder, 5) == ARMS
    printed = (folder / "printed").read_text().splitlines()
    pasted = [shlex.split(line)[1:] for line in printed if line.startswith("python ")]
    assert [(Path(words[0]).stem, words[1:]) for words in pasted] == commands
    assert {args.embedder for args in parsed(commands, "grpo")} == {"my embedder"}


@pytest.mark.slow
@pytest.mark.multirank
def test_the_full_study_holds_d_at_the_norm_of_the_reward(tmp_path):
    for diversity, name in (("dpp", "dpp-grpo"), ("cosine", "poly-grpo")):
        commands = asked(tmp_path, "--model", "m", "--data", write_posts(tmp_path),
                         "--diversity", diversity)
        args, = (x for x in parsed(commands, "grpo") if Path(x.out).name == name)
        assert (args.diversity_share, args.diversity_weight, args.gate) == (1, 0, "auto")
        assert args.diversity == diversity
        args, = (x for x in parsed(commands, "polylora") if x.lambda_share)
        assert (args.lambda_share, args.gate, args.diversity) == (0.3, "likelihood", diversity)


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("styles", [False, True])
def test_the_full_study_runs_on_replies_with_and_without_styles(
        world, tmp_path, capsys, monkeypatch, styles):
    posts, rows = tmp_path / "posts.jsonl", []
    for i in range(22):
        replies = {"curious": f"Number {i}? Tell us more!",
                   "warm": f"Poor {TOPICS[i % 6]}, I feel you"}
        rows.append({"post": f"My {TOPICS[i % 6]} let me down, part {i}",
                     "replies": replies if styles else list(replies.values())})
    posts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands = asked(tmp_path, "--model", world["model"], "--data", str(posts), "--posts", "10",
                     "--steps", "2,2", "--samples", "10")
    measure = polylora.Gate.measure

    def measure_or_fixed(gate, some):
        """A random model's likelihoods tell nothing: a fixed scale in place of theirs."""
        if gate.name == "likelihood":
            gate.low, gate.high = -8.0, -6.0
        else:
            measure(gate, some)
    monkeypatch.setattr(polylora.Gate, "measure", measure_or_fixed)
    for program, words in commands:
        words = ["24" if word == "100" else word for word in words]     # shorter samples
        assert PROGRAMS[program].main(words) == 0, capsys.readouterr().err
    arms = json.loads((tmp_path / "o" / "report" / "report.json").read_text())["arms"]
    assert set(arms) == {"base", *ARMS}


@pytest.mark.slow
@pytest.mark.multirank
def test_what_is_asked_for_every_command_reaches_every_command(tmp_path):
    commands = asked(tmp_path, "--model", "m", "--data", write_posts(tmp_path), "--nf4",
                     "--allow-code-execution", "as-root", "--reward", "model",
                     "--reward-model", "my scorer", "--posts", "20")
    looked, measured, _ = parsed(commands, "evaluate")
    for args in [looked, *parsed(commands, "polylora"), *parsed(commands, "grpo"), measured]:
        assert args.nf4 and args.allow_code_execution == "as-root"
    for args in [*parsed(commands, "grpo"), measured]:
        assert (args.reward, args.reward_model) == ("model", "my scorer")
    assert parsed(commands, "data")[0].sizes == "sft=20,grpo=20,eval=4"


@pytest.mark.slow
@pytest.mark.multirank
def test_data_is_read_as_check_reads_it_and_a_small_file_makes_small_parts(tmp_path):
    """985 posts were too few for the 5,500 of the default."""
    posts = write_posts(tmp_path)
    asks = ["--model", "m", "--data", posts]
    split, = parsed(asked(tmp_path, *asks, "--domain", "replies", "--skip-bad-lines"), "data")
    assert (split.domain, split.skip_bad_lines, split.fit) == ("replies", True, True)
    split, = parsed(asked(tmp_path, *asks, "--posts", "20"), "data")
    assert (split.domain, split.skip_bad_lines, split.fit) == ("auto", False, False)


@pytest.mark.multirank
def test_help():
    ran = subprocess.run(["bash", "train.sh", "--help"], cwd=ROOT, capture_output=True, text=True,
                         timeout=60)
    assert ran.returncode == 0 and "--diversity" in ran.stdout and "torchrun train.sh" in ran.stdout


@pytest.mark.multirank
def test_a_dry_run_prints_the_commands_that_would_run_and_the_whole_cost(tmp_path):
    fake, said = tmp_path / "python", tmp_path / "said"
    fake.write_text(f'#!/bin/sh\n[ "$1" != -c ] || {{ echo 0; exit; }}\necho "$@" >> {said}\n'
                    'case "$*" in\n  *measure*) echo "plan measure: 9 posts, a run: about 2 s" ;;\n'
                    '  *--dry-run) echo "plan x: 5 steps, about 30 s" ;;\nesac\n')
    fake.chmod(0o755)
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "STUDY_PYTHON": str(fake)}
    ran = subprocess.run(["bash", "train.sh", "--out", str(tmp_path / "o"), "--dry-run", "--jobs",
                          "1"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    printed = [line for line in ran.stdout.splitlines() if line.startswith("python ")]
    assert len(printed) == 3 + len(ARMS) and str(tmp_path / "o/seed1/lora") in ran.stdout
    assert not any("dry-run" in line for line in printed)
    one = 8 * 30 + 8 * 2                         # a base and seven arms; eight runs measured
    assert f"about {3 * one / 60:.0f} minutes (3 x {one} s)" in ran.stdout
    trained = [line for line in said.read_text().splitlines() if "--dry-run" not in line]
    assert len(trained) == 2 and "split" in trained[0] and trained[1].endswith("--steps 1")
    assert not list(tmp_path.glob("o*"))


def dry_run(folder, *flags):
    """A dry run of train.sh on a machine whose hub client is offline."""
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "STUDY_PYTHON": sys.executable,
                        "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    return subprocess.run(["bash", "train.sh", "--dry-run", "--out", str(folder / "o"), *flags],
                          cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.multirank
def test_too_few_posts_name_the_flag_and_leave_nothing_behind(tmp_path):
    ran = dry_run(tmp_path, "--model", "m", "--data", write_posts(tmp_path))
    assert ran.returncode == 2 and "there are 1 different ones" in ran.stderr
    assert "--posts of train.sh" in ran.stderr and not list(tmp_path.glob("o*"))


@pytest.mark.slow
@pytest.mark.multirank
def test_a_dry_run_of_a_folder_without_weights_plans_from_its_config(tmp_path):
    model, posts = tmp_path / "model", tmp_path / "posts.jsonl"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(tiny_config(True)))
    posts.write_text("".join(json.dumps({"post": f"My bus {i} is late", "reply": "Mine too"}) + "\n"
                             for i in range(30)))
    before = digest(tmp_path)
    ran = dry_run(tmp_path, "--model", str(model), "--data", str(posts), "--posts", "10")
    assert ran.returncode == 0, ran.stderr
    assert len(re.findall(r"^plan \S+: 1 steps, about \d+ s$", ran.stdout, re.MULTILINE)) == 7
    assert "plan measure: 2 posts with 20 drafts" in ran.stdout
    assert "The whole study: about" in ran.stdout and digest(tmp_path) == before


@pytest.mark.multirank
def test_more_ranks_than_gpus_are_a_sentence_of_the_first_rank(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 2\n")
    fake.chmod(0o755)
    for rank in "01":
        env = os.environ | {"RANK": rank, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4",
                            "STUDY_PYTHON": str(fake)}
        ran = subprocess.run(["bash", "train.sh"], cwd=ROOT, env=env, capture_output=True,
                             text=True, timeout=60)
        said = "error: train.sh: 4 ranks for 2 GPUs: start torchrun --nproc-per-node=2\n"
        assert (ran.returncode, ran.stderr) == (2, said if rank == "0" else "")


@pytest.mark.multirank
def test_checkpointing_is_left_to_the_plan(tmp_path):
    """Always on it took up to half more time on 8 x 80 GB, where 30 GiB do without."""
    commands = asked(tmp_path, "--model", "m", "--data", write_posts(tmp_path))
    trained = parsed(commands, "polylora") + parsed(commands, "grpo")
    assert len(trained) == len(ARMS) and {args.checkpointing for args in trained} == {None}


@pytest.mark.slow
@pytest.mark.multirank
def test_flags_that_save_memory_reach_the_commands_that_have_them(tmp_path):
    commands = asked(tmp_path, "--model", "m", "--data", write_posts(tmp_path), "--micro-tokens",
                     "4096", "--max-rows", "64")
    trained = parsed(commands, "polylora") + parsed(commands, "grpo")
    _, measured, _ = parsed(commands, "evaluate")      # embedder, measure, report
    assert {args.micro_tokens for args in trained} == {4096}
    assert {args.max_rows for args in [*trained, measured]} == {64}


@pytest.mark.slow
@pytest.mark.multirank
def test_a_launch_runs_on_its_own_python_and_a_failed_seed_ends_the_others(tmp_path):
    """PATH's python may have no torch; and a seed that lives on would have no parent."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexit 99\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "1",
                        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    few = ["--model", "m", "--data", write_posts(tmp_path), "--out", str(tmp_path / "a")]
    ran = subprocess.run([sys.executable, "train.sh", *few], cwd=ROOT, env=env,
                         capture_output=True, text=True, timeout=300)
    assert ran.returncode == 2 and "asked for" in ran.stderr
    assert "to repeat it alone: python data.py split" in ran.stderr

    fake, beat = tmp_path / "fake", tmp_path / "beat"
    fake.write_text(f"""#!/bin/sh
case "$*" in
  -c*) echo 0; exit 0 ;;
  *data.py*) exit 0 ;;
  *seed1/*) sleep 1; exit 7 ;;
esac
while true; do date +%s%N > {beat}; sleep 0.1; done
""")
    fake.chmod(0o755)
    env |= {"STUDY_PYTHON": str(fake), "STUDY_GROUP": "own"}
    ran = subprocess.run(["bash", "train.sh", "--seeds", "1 2", "--jobs", "2", "--out",
                          str(tmp_path / "b")], cwd=ROOT, env=env, capture_output=True, text=True,
                         timeout=120, start_new_session=True)
    assert ran.returncode == 7 and "exit code 7" in ran.stderr and "seed1" in ran.stderr
    time.sleep(0.3)
    last = beat.read_text()
    time.sleep(0.5)
    assert beat.read_text() == last              # nobody writes any more


@pytest.mark.slow
@pytest.mark.multirank
def test_the_page_may_be_edited_while_it_runs(tmp_path):
    """bash reads a script as it goes: an edit during a run of hours would end it anywhere."""
    (tmp_path / "support").mkdir()
    for name in ("train.sh", "support/launch.sh"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "data.py").write_text("open('train.sh', 'w').write('exit 9\\n' * 500)\n")
    for name in ("polylora", "grpo", "evaluate"):
        (tmp_path / f"{name}.py").write_text("import sys\nprint('ran', sys.argv[1])\n")
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
    ran = subprocess.run([sys.executable, "train.sh", "--seeds", "1"], cwd=tmp_path, env=env,
                         capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "train.sh").read_text().startswith("exit 9")
    assert ran.stdout.count("ran ") == 3 + len(ARMS)
    assert "ran report" in ran.stdout
