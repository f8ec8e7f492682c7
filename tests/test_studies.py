"""Tests of studies.py."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate
import study
from helpers import PROGRAMS, ROOT
from support import checks
from support import jobs
from support import registry
from support import studies


NAMES = sorted(path.stem for path in (ROOT / "studies").glob("[!_]*.toml"))

GIVEN_A_MODEL = ("small-model", "smollm2")

OF_THE_TOY_TASK = """primary trials rates map cover fresh lambda full losses adapters diversities
    objectives controls paths temperature free valid few noisy blind valid-trials blind-trials
    noisy-trials few-trials""".split()


def load(name, *flags):
    model = ["--model", "some/model"] if name.startswith(GIVEN_A_MODEL) else []
    return studies.load(study.parser().parse_args(["show", name, *model, *flags]))


def arms_of(name, *flags):
    return load(name, *flags).arms


def commands_of(name, *flags, seed=11):
    """[(program, namespace)] of one seed, with the report."""
    loaded = load(name, *flags)
    model = "some/model" if name.startswith(GIVEN_A_MODEL) else None
    listed, _ = study.stages(loaded, seed, "out", model)
    commands = [study.command_of(stage) for stage in listed]
    args = study.parser().parse_args(["show", name, "--out", "out"])
    args.model = model
    commands.append(study.report_of(loaded, args))
    parsed = []
    for path, *words in commands:
        program = Path(path).stem
        parsed.append((program, PROGRAMS[program].parser().parse_args(words)))
    return parsed


def test_every_study_of_the_old_launcher_is_there():
    assert set(OF_THE_TOY_TASK) <= set(NAMES) and len(OF_THE_TOY_TASK) == 24


@pytest.mark.slow_after(12)
@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_a_study_is_one_that_the_programs_take(name):
    """And each arm starts from one that came before it."""
    made, measured = set(), []
    for program, args in commands_of(name, "--seeds", "11"):
        if program == "data":
            continue
        if program == "evaluate":
            measured.append(args)
            continue
        if program == "polylora" and args.command == "sft":
            checks.check_sft(args)
        if program == "grpo":
            assert args.start in made
            assert ("set_size" not in registry.OBJECTIVES[args.advantage].needs
                    or args.set_size < args.k)
            checks.check_diversity(args)
        if program == "polylora" and args.command == "interpolate":
            assert set(args.folders) <= made
        assert args.out not in made
        made.add(args.out)
    *measures, report = measured
    assert measures and {args.reward for args in measures} == {"auto"}
    runs = {run for run in report.runs if "@" not in Path(run).name}
    assert runs <= made | {measures[0].bare} and set(measures[0].runs) <= runs


def test_arms_of_the_studies():
    """What the records say of each study's arms."""
    assert {f"{arm}+steps={n}" for n in (20, 40, 80)
            for arm in ("lora-grpo", "lora-passk", "lora-cover", "poly-grpo", "dpp-cover")
            } <= arms_of("paths").keys()
    for name, ratio, rival in (("valid", 6, "lora-grpo+beta=0.3+lr=0.0005"),
                               ("blind", 3, "lora-grpo+beta=0.3")):
        arms = arms_of(name)
        assert arms["dpp-grpo"].flags["diversity-share"] == ratio and rival in arms
        assert "diversity-share" not in arms["dpp-then-passk"].flags
    losses = {f"sft-{name}" for name in registry.SFT_LOSSES if name != "ce"}
    adapters = {f"lora-{name}" for name in registry.ADAPTERS if name not in ("lora", "full")}
    diversities = {f"poly-{name}" for name in registry.DIVERSITIES if name != "cosine"}
    objectives = {f"lora-{name}" for name in registry.OBJECTIVES} - {"lora-group", "lora-coverage"}
    assert losses <= arms_of("losses").keys() and adapters <= arms_of("adapters").keys()
    assert diversities <= arms_of("diversities").keys()
    assert objectives | {"lora-grpo", "lora-cover"} <= arms_of("objectives").keys()
    for name in ("few", "few-trials"):             # groups of four in both phases
        found = {str(arm.flags.get("k", 4)) for arm in arms_of(name).values()}
        assert found == {"4"}


@pytest.mark.parametrize("name", ["valid-trials", "blind-trials", "noisy-trials", "few-trials",
                                  "smollm2-styles-trials", "smollm2-replies-trials"])
def test_trials_give_each_method_as_many_settings(name):
    counted = {}
    for arm in arms_of(name):
        counted[arm.partition("+")[0]] = counted.get(arm.partition("+")[0], 0) + 1
    methods = ("lora-passk", "lora-cover", "dpp-then-cover", "dpp-cover")
    if name.startswith("smollm2"):
        assert set(counted.values()) == {3} and len(counted) == 10
        return
    if name in ("valid-trials", "blind-trials"):
        methods = ("lora-grpo", "dpp-then-grpo", "lora-passk", "dpp-then-passk", "dpp-grpo")
    else:
        published = {"lora-polyepo", "lora-darling", "lora-dra", "lora-polychromic"}
        rates = [arm.flags["lr"] for arm in arms_of(name).values() if
                 arm.name.partition("+")[0] in published]
        assert rates.count(1e-3) == 4
    assert {counted[method] for method in methods} == {4 if name == "few-trials" else 6}


@pytest.mark.parametrize("name, endpoint", [
    ("primary", ["poly-grpo", "lora-cover", "lora-passk"]),
    ("cover", ["dpp-cover", "lora-cover"]),
    ("few", ["dpp-cover", "lora-cover", "lora-passk"]),
    ("noisy", ["dpp-cover", "lora-cover", "lora-passk"]),
    ("fresh", ["dpp-cover@0.75", "lora-cover@0.75", "lora-passk@0.75"])])
def test_the_endpoint_is_tested_where_its_arms_are_asked(name, endpoint):
    _, report = commands_of(name)[-1]
    assert report.primary == endpoint
    assert set(endpoint) <= {Path(run).name for run in report.runs}
    assert load(name, "--arms", "lora").endpoint == []


def test_other_temperatures_than_a_study_s_own():
    loaded = load("fresh", "--temperatures", "0.5")
    assert loaded.temperatures == [0.5] and loaded.endpoint == []
    loaded = load("valid", "--temperatures", "0.5", ".75")
    listed, folders = study.stages(loaded, 11, "out")
    measured = [evaluate.parser().parse_args(study.command_of(stage)[1:])
                for stage in listed if stage.phase == "measure"]
    heats = [(args.temperature, args.name) for args in measured[1:]]
    assert heats == [(0.5, "0.5"), (0.75, "0.75")]
    words = study.report_of(loaded, study.parser().parse_args(["show", "valid", "--out", "out"]))
    assert {f"{folders['dpp-grpo']}{tail}" for tail in ("", "@0.5", "@0.75")} <= set(words)


@pytest.mark.slow
def test_an_arm_s_name_has_one_meaning_and_a_meaning_one_name():
    """Over all studies: runs of one identity have one name, and a name has one identity in a
    setting. So nothing is trained twice under two names."""
    names, identities = {}, {}
    for name in NAMES:
        setting = studies.read_toml(name)["setting"]
        _, folders = study.stages(load(name), 11, "out", "some/model")
        for arm, folder in folders.items():
            names.setdefault(folder.split("/")[2], set()).add(arm)
            identities.setdefault((setting, arm), set()).add(folder)
    assert all(len(found) == 1 for found in names.values())
    assert all(len(found) == 1 for found in identities.values())


def test_equal_arms_of_two_studies_are_trained_once():
    """The plain SFT run of the toy task serves every setting; SFT with D where its gate is the
    same; GRPO does not where the reward is another."""
    _, toy = study.stages(load("primary"), 11, "out")
    _, valid = study.stages(load("valid"), 11, "out")
    _, blind = study.stages(load("blind"), 11, "out")
    assert toy["base"] == valid["base"] == blind["base"]
    assert toy["lora"] == valid["lora"] == blind["lora"]
    assert toy["poly"] == valid["poly"] != blind["poly"]
    assert len({toy["lora-grpo"], valid["lora-grpo"], blind["lora-grpo"]}) == 3


def test_whatever_a_run_is_made_from_is_in_its_identity():
    """The whole chain: data, base and start; a change there is another run, not a stale one."""
    _, usual = study.stages(load("primary"), 11, "out")
    for change, same in (("data.writers=4", ()), ("base.steps=5", ()), ("sft.lr=0.1", ("base",)),
                         ("grpo.lr=0.1", ("base", "lora", "poly", "lora-cover")),
                         ("measure.n=20", usual)):
        _, folders = study.stages(load("primary", "--set", change), 11, "out")
        assert {arm for arm in folders if folders[arm] == usual[arm]} == set(same), change
    _, other = study.stages(load("primary", "--model", "a/b"), 11, "out", "a/b")
    _, another = study.stages(load("primary", "--model", "c/d"), 11, "out", "c/d")
    assert len({usual["lora"], other["lora"], another["lora"]}) == 3
    assert len({usual["base"], other["base"], another["base"]}) == 3


def test_a_flag_of_one_arm_changes_no_other():
    """A weight of D once changed the norm at which three other arms held theirs."""
    changed = arms_of("map", "--set", "values.weight=7.9")
    for name, arm in arms_of("map").items():
        ours = changed[name].flags
        different = {flag for flag in arm.flags if arm.flags[flag] != ours[flag]}
        assert different == ({"diversity-weight"} if "diversity-weight" in arm.flags else set())


def test_decoders_with_flags_are_measured_under_each_of_their_arms():
    arms = ["lora", "poly-dpp", "lora-grpo", "lora-cover", "dpp-cover"]
    *commands, (_, report) = commands_of("quasi")
    decoded = [args for program, args in commands if getattr(args, "decoder", "") == "quasi"]
    assert [args.set_size for args in decoded] == [5, 10]
    assert [args.name for args in decoded] == [None, "quasi+set-size=10"]
    assert all([Path(run).name for run in args.runs] == arms for args in decoded)
    for name in ("quasi", "quasi+set-size=10"):
        measured = [Path(run).name for run in report.runs if run.endswith(f"@{name}")]
        assert measured == [f"{arm}@{name}" for arm in arms] * 5    # seeds
    assert load("quasi", "--arms", "lora").decoders["of"] == ["lora"]
    assert load("quasi", "--arms", "poly").decoders["names"] == []


def test_any_arm_may_be_asked_by_its_name():
    arms = arms_of("primary", "--arms", "lora", "lora-cover+set-size=5+lr=7e-4")
    arm = arms["lora-cover+set-size=5+lr=0.0007"]
    assert (arm.flags["set-size"], arm.flags["lr"], arm.starts) == (5, 7e-4, ("lora",))
    same = arms_of("primary", "--arms", "lora", "lora-cover+set-size=4+beta=0+lr=2e-3")
    assert list(same) == ["lora", "lora-cover"]    # these are its flags anyway
    arms = arms_of("lambda", "--arms", "poly+lambda=2", "poly-then-grpo+sft.lambda=2")
    assert arms["poly-then-grpo+sft.lambda=2"].starts == ("poly+lambda=2",)


@pytest.mark.parametrize("flags, word", [
    (["primary", "--arms", "lora", "lroa-grpo"], "lroa-grpo"),
    (["primary", "--arms", "lora-grpo"], "starts from lora"),
    (["primary", "--arms", "lora+rnak=3"], "--rnak"),
    (["primary", "--arms", "lora+rank=four"], "four"),
    (["primary", "--arms", "lora+rank"], "FLAG=VALUE"),
    (["primary", "--arms", "lora", "lora-grpo+advantage=grpoo"], "grpoo"),
    (["primary", "--set", "rank=4"], "SECTION.FLAG=VALUE"),
    (["primary", "--set", "sfft.rank=4"], "SECTION"),
    (["primary", "--set", "base.hiden=4"], "--hiden"),
    (["primary", "--set", "measure.sample=4"], "sample"),
    (["primary", "--seeds", "eleven"], "eleven"),
    (["nothing"], "no study nothing"),
    (["small-model"], "--model")])
def test_wrong_input_is_refused_before_anything_runs(capsys, flags, word):
    assert study.main(["show", *flags]) == 2
    said = capsys.readouterr()
    assert word in said.err and len(said.err.strip().splitlines()) == 1


def write_study(folder, monkeypatch, **files):
    """A studies folder of the real settings and arms and of these files."""
    for path in (ROOT / "studies").glob("_*.toml"):
        (folder / path.name).write_text(path.read_text())
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    monkeypatch.setattr(studies, "STUDIES", folder)


HEAD = 'question = "?"\nsetting = "_toy"\nseeds = "1"\n'


@pytest.mark.parametrize("text, word", [
    (HEAD + 'arms = ["lora"\n', "mine.toml"),
    (HEAD + 'arms = ["lora"]\n[arm]\nlora = {sft = {rank = 2}}\n', "has a meaning in _arms.toml"),
    (HEAD + 'arms = ["lora", "two"]\n[arm]\ntwo = {sft = {lambda = 0}}\n', "are the same"),
    (HEAD + 'arms = ["two"]\n[arm]\ntwo = {sft = {k = "$kk"}}\n', "no kk"),
    (HEAD + 'arms = ["lora"]\ndecoders = {of = ["loar"], names = ["beams"]}\n', "loar"),
    (HEAD + 'arms = ["lora"]\ndecoders = {of = ["lora"], names = ["beams+n"]}\n', "FLAG=VALUE")])
def test_a_study_file_that_is_wrong(tmp_path, monkeypatch, capsys, text, word):
    write_study(tmp_path, monkeypatch, mine=text)
    assert study.main(["show", "mine"]) == 2
    said = capsys.readouterr().err
    assert word in said and len(said.strip().splitlines()) == 1


def test_what_is_shown_can_be_pasted(tmp_path, capsys):
    out = tmp_path / "my runs"
    assert study.main(["show", "free", "--seeds", "11 12", "--out", str(out)]) == 0
    shown = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert all(words[0] == "python" for words in shown)
    *commands, report = [words[1:] for words in shown]
    listed, folders = study.stages(load("free"), 12, str(out))
    assert commands[len(listed):] == [study.command_of(stage) for stage in listed]
    assert folders["lora"] in report and f"{folders['lora']}@mmi" in report
    assert str(out) in folders["lora"] and "lora-grpo" in report


def test_the_list_names_every_study(capsys):
    assert study.main(["list"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == NAMES
    assert all(line.endswith(("?", ".")) for line in said)


# ---- Running -------------------------------------------------------------------------------------

def stub(folder, monkeypatch, script):
    """Programs are run by a shell script that gets their words."""
    fake = folder / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(jobs.sys, "executable", str(fake))
    return folder / "said"


@pytest.mark.slow
def test_a_run_makes_every_stage_once_and_then_the_report(tmp_path, monkeypatch, capsys):
    said = tmp_path / "said"
    stub(tmp_path, monkeypatch, f'echo "$STUDY_STAGE $@" >> "{said}"')
    flags = ["free", "--seeds", "11-12", "--out", str(tmp_path / "o"), "--jobs", "2"]
    assert study.main(["run", *flags]) == 0
    *stages, report = said.read_text().splitlines()
    assert len(stages) == 2 * 12 and "report" in report
    names = [line.split()[0] for line in stages]
    assert len(set(names)) == len(names)           # ranks meet under a stage's name
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    assert sorted(line.partition(" ")[2] for line in [*stages, report]) == sorted(
        line.partition(" ")[2] for line in printed)
    # An interpolated adapter that is there is not asked for again; other stages keep their names.
    _, folders = study.stages(load("free"), 11, str(tmp_path / "o"))
    Path(folders["lora-half"]).mkdir(parents=True)
    (Path(folders["lora-half"]) / "done.json").write_text("{}")
    said.unlink()
    assert study.main(["run", *flags]) == 0
    again = said.read_text().splitlines()[:-1]
    gone = {line for line in stages if "seed11" in line and "lora-half --scale" in line}
    assert len(gone) == 1 and set(again) == set(stages) - gone


@pytest.mark.slow
def test_a_failed_stage_ends_the_other_seeds_and_says_how_to_repeat_it(tmp_path, monkeypatch,
                                                                       capsys):
    beat = tmp_path / "beat"
    stub(tmp_path, monkeypatch, f"""case "$*" in
  *seed11/*lora-grpo*) sleep 1; exit 7 ;;
  *seed12/*sft*) while true; do date +%s%N > {beat}; sleep 0.1; done ;;
esac""")
    flags = ["primary", "--seeds", "11-12", "--out", str(tmp_path / "my o"), "--jobs", "2"]
    assert study.main(["run", *flags]) == 2
    said = capsys.readouterr().err
    assert "exit code 7" in said and "to repeat it alone: python" in said
    words = shlex.split(said.partition("to repeat it alone: ")[2])
    _, folders = study.stages(load("primary"), 11, str(tmp_path / "my o"))
    assert words[:2] == ["python", str(ROOT / "grpo.py") if Path.cwd() != ROOT else "grpo.py"]
    assert folders["lora-grpo"] in words
    time.sleep(0.2)
    last = beat.read_text()
    time.sleep(0.5)
    assert beat.read_text() == last                # nobody writes any more


def test_a_plan_costs_every_run_of_every_seed(tmp_path, monkeypatch, capsys):
    said = tmp_path / "said"
    stub(tmp_path, monkeypatch, f"""echo "$@" >> "{said}"
case "$*" in
  *measure*) echo "plan measure: 9 posts, a run: about 2 s" ;;
  *--dry-run) echo "plan x: 5 steps, about 30 s" ;;
esac""")
    assert study.main(["plan", "fresh", "--jobs", "1", "--out", str(tmp_path / "o")]) == 0
    printed = capsys.readouterr().out
    one = 30 * 7 + 2 * (7 + 6)                     # a base, six arms; two measurings of them
    assert f"about {12 * one / 60:.0f} minutes (12 x {one} s)" in printed
    assert str(tmp_path / "o") in printed and not (tmp_path / "o").exists()
    trained = [line for line in said.read_text().splitlines() if "--dry-run" not in line]
    assert len(trained) == 2 and trained[1].endswith("--steps 1")


@pytest.mark.multirank
def test_seeds_side_by_side(monkeypatch):
    """One a GPU, else one a core; three seeds on two cores all at once: a second round would leave
    a core idle."""
    monkeypatch.setattr(jobs.os, "cpu_count", lambda: 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [jobs.default_jobs(seeds, 0) for seeds in (1, 2, 3, 4, 12)] == [1, 2, 3, 2, 2]
    assert [jobs.default_jobs(3, gpus) for gpus in (1, 2, 8)] == [1, 2, 3]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert jobs.default_jobs(3, 0) == 1 and jobs.default_jobs(3, 8) == 3
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [jobs.environment(n, 2)["CUDA_VISIBLE_DEVICES"] for n in range(3)] == ["4", "6", "4"]


@pytest.mark.slow
@pytest.mark.multirank
def test_a_tiny_study_runs_to_its_report_and_is_found_done(tmp_path):
    """From nothing, two ranks, an interpolated adapter; then the same command again."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
             "study.py", "run", "primary", "--out", str(tmp_path / "my o"), "--seeds", "7",
             "--arms", "lora", "lora-grpo", "lora-wise"]
    for change in ("data.sizes=base=30,sft=10,grpo=10,eval=4", "base.steps=2",
                   "base.until=false", "sft.steps=1",
                   "grpo.steps=1", "grpo.batch=4", "measure.n=10"):
        words += ["--set", change]
    first = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert first.returncode == 0, first.stderr[-2000:]
    assert (tmp_path / "my o" / "report-primary" / "report.json").exists()
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("done already") == 3


@pytest.mark.slow
def test_the_writers_of_a_file_can_be_narrow_and_its_users_not():
    found = []
    for name in ("posts", "narrow"):
        split = next(args for program, args in commands_of(name, "--data", "my posts.jsonl")
                     if program == "data")
        assert split.data == "my posts.jsonl" and split.seed == 0
        found.append((split.popularity, split.writers, split.permute, split.by))
    assert found == [(1.5, None, False, "post"), (0.7, 3.0, True, "post")]


def test_every_setting_with_a_base_of_its_own_is_float32_on_every_machine():
    """bfloat16, a GPU's default, is another study: these rates were chosen in float32."""
    found = 0
    for path in studies.STUDIES.glob("_*.toml"):
        setting = studies.read_setting(path.stem) if path.stem != "_arms" else {}
        if "base" not in setting:
            continue
        found += 1
        for section in ("sft", "grpo", "measure"):
            assert setting[section]["dtype"] == "float32", (path.stem, section)
    assert found >= 8
