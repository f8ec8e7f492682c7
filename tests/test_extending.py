"""docs/EXTENDING.md: every file that it shows is saved in methods/ of a copy of this repository and
used there.

The checks of what the examples compute, and the runs that train and measure with them, are in this
file too. The copy runs it as a script, so that the process of the tests registers no name."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "EXTENDING.md"
LEFT_OUT = (".git", "runs", "shared", "results", "experiments", "studies", "golden", "__pycache__",
            ".pytest_cache")
KINDS = ("objective", "diversity", "SFT loss", "adapter", "reward", "domain", "decoder", "embedder",
         "metric")
# The names that a command's --help-all lists.
LISTED = {("grpo.py",): ("raft", "question", "openings"),
          ("polylora.py", "sft"): ("openings", "focal", "lora-fa"),
          ("data.py", "split"): ("acrostic",),
          ("evaluate.py", "measure"): ("sample-and-rank",)}
ADAPTER = "adapter/adapter_model.safetensors"


def blocks():
    """{file: text} of the page's blocks, whose first line is `# methods/NAME.py`."""
    page = PAGE.read_text(encoding="utf-8")
    found = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        first, _, text = block.partition("\n")
        found[re.fullmatch(r"# (methods/\w+\.py)", first)[1]] = text
    return found


# ---- Tests ------------------------------------------------------------------------------------

def copy_of_the_repository(folder):
    """The repository without what no command needs."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return folder


def run(copy, *arguments):
    """A command in the copy, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, timeout=600,
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository with every file of the page in methods/."""
    folder = copy_of_the_repository(tmp_path_factory.mktemp("extending") / "copy")
    for name, text in blocks().items():
        assert not (folder / name).exists(), f"{name} would replace a file of the repository"
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def used(copy):
    """What the copy prints when it uses the examples, see use_everything."""
    done = run(copy, "tests/test_extending.py")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def metrics_of(copy, name):
    log = (copy / "made" / name / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in log.splitlines()]


def assert_D_trains(steps):
    """D is a share of pairs, and in one step at least it has a gradient."""
    assert all(0 <= line["D"] <= 1 for line in steps)
    assert any(0 < line["D"] < 1 and line["D_share"] > 0 for line in steps)


def test_the_page_has_a_short_file_for_each_kind_of_entry():
    page = PAGE.read_text(encoding="utf-8")
    for kind in KINDS:
        assert re.search(rf"^## An? {kind}\b", page, re.MULTILINE), kind
    files = blocks()
    assert len(files) == len(KINDS) == page.count("```python")
    for name, text in files.items():
        lines = text.splitlines()
        assert 8 <= len(lines) <= 30 and max(map(len, lines)) <= 100, name


@pytest.mark.slow
def test_help_lists_every_name(copy):
    """Started as a program, whose own file is imported a second time by those in methods/."""
    for command, names in LISTED.items():
        shown = run(copy, *command, "--help-all")
        if shown.returncode == 2:              # a command whose --help hides nothing
            shown = run(copy, *command, "--help")
        assert shown.returncode == 0, shown.stderr[-2000:]
        for name in names:
            said = " ".join(shown.stdout.split()).replace("- ", "-")    # lines break at hyphens
            assert re.search(rf"\b{name}\b", said), (command, name)
        if command == ("grpo.py",):
            assert "RAFT (arXiv 2304.06767)" in " ".join(shown.stdout.split())


@pytest.mark.slow
def test_the_examples_compute_what_they_say(used):
    for check in CHECKS:
        assert f"{check.__name__}: holds" in used


@pytest.mark.slow
def test_a_file_of_the_new_domain_is_read_as_it(used):
    assert "domain acrostic" in used and re.search(r"(voices|styles) right", used)
    assert "7 posts, 7 replies" in used


@pytest.mark.slow
def test_phase_one_trains_with_the_loss_the_adapter_and_the_diversity(copy, used):
    steps = metrics_of(copy, "sft")[:2]
    for line in steps:
        assert line["grad_norm"] > 0 and line["loss"] > 0 and "ce" not in line
    assert_D_trains(steps)
    adapter = load_file(copy / "made" / "sft" / ADAPTER)
    config = json.loads((copy / "made" / "sft" / "adapter" / "adapter_config.json").read_text())
    assert config["lora_fa"] and config["peft_type"] == "LORA"
    assert all(bool(tensor.any()) for tensor in adapter.values())    # lora_B began at zero


@pytest.mark.slow
def test_phase_two_trains_with_the_objective_the_reward_and_the_diversity(copy, used):
    steps = metrics_of(copy, "grpo")[:2]
    for line in steps:
        assert line["advantage"] > 0 and line["grad_norm"] > 0 and 0 <= line["reward"] <= 1
    assert_D_trains(steps)
    before = load_file(copy / "made" / "sft" / ADAPTER)
    after = load_file(copy / "made" / "grpo" / ADAPTER)
    assert before.keys() == after.keys()
    for name, tensor in after.items():                               # in phase two, too, A stays
        assert torch.equal(tensor, before[name]) == ("lora_A" in name)


@pytest.mark.slow
def test_the_verifier_of_the_new_domain_is_the_reward_of_phase_two(copy, used):
    """The default reward hears the domain's own verdicts."""
    assert all("reward" in line and "valid" in line for line in metrics_of(copy, "verified")[:2])


@pytest.mark.slow
def test_a_run_is_measured_by_the_decoder_the_embedder_and_the_metric(copy, used):
    place = copy / "made" / "grpo@sample-and-rank" / "evaluation.json"
    evaluation = json.loads(place.read_text(encoding="utf-8"))
    assert evaluation["domain"] == "acrostic"
    assert evaluation["settings"]["decoding"]["name"] == "sample-and-rank"
    assert evaluation["settings"]["embedder"].endswith("bag")
    assert all(len(record["drafts"]) == 10 for record in evaluation["records"])
    report = (copy / "made" / "report" / "report.json").read_text(encoding="utf-8")
    assert '"questions"' in report


@pytest.mark.slow
def test_two_entries_of_one_name_are_an_error_that_names_both_files(tmp_path):
    copy = copy_of_the_repository(tmp_path / "copy")
    text = blocks()["methods/raft.py"]
    (copy / "methods" / "raft.py").write_text(text, encoding="utf-8")
    (copy / "methods" / "raft_again.py").write_text(text, encoding="utf-8")
    failed = run(copy, "grpo.py", "--help")
    assert failed.returncode != 0 and "'raft'" in failed.stderr
    last = failed.stderr.strip().splitlines()[-1]
    assert "raft.py" in last and "raft_again.py" in last


@pytest.mark.slow
def test_a_file_that_cannot_be_imported_is_named(tmp_path):
    copy = copy_of_the_repository(tmp_path / "copy")
    (copy / "methods" / "unfinished.py").write_text("from no_such_package import anything\n")
    failed = run(copy, "data.py", "--help")
    assert failed.returncode != 0 and "no_such_package" in failed.stderr
    assert "methods/unfinished.py" in failed.stderr.replace(os.sep, "/")


# ---- In the copy, as a script --------------------------------------------------------------------

def check_objective(bag):
    """RAFT marks the best completions; its expected gradient is the declared one, by enumeration
    of k completions that are right with probability p."""
    from methods.raft import raft_advantages, raft_scale
    from support.registry import OBJECTIVES
    assert raft_advantages(torch.tensor([[1.0, 0, 0.5]])).tolist() == [[1, 0, 0]]
    equal = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    assert raft_advantages(equal).tolist() == [[1, 0, 1], [1, 1, 1]]
    k = 4
    logit = torch.tensor(-0.7, requires_grad=True)
    logp = torch.stack((logit.neg().sigmoid().log(), logit.sigmoid().log()))   # of wrong, right
    outcomes = torch.cartesian_prod(*[torch.tensor([0, 1])] * k)
    each = logp[outcomes]                                                      # (2^k, k)
    chance = each.sum(1).exp().detach()
    surrogate = (chance[:, None] * raft_advantages(outcomes.float()) * each).sum()
    got, = torch.autograd.grad(surrogate, logit, retain_graph=True)
    p = logp[1].exp()
    of_p, = torch.autograd.grad(p, logit)
    scale = raft_scale(SimpleNamespace(rewards=torch.zeros(1, k)))
    assert torch.isclose(got, scale * (1 - (1 - p.detach()) ** (k - 1)) * of_p, rtol=1e-5)
    assert OBJECTIVES["raft"].gradient_scale is raft_scale


def check_diversity(bag):
    """D is the share of pairs that begin differently."""
    from polylora import Features, measure_diversity
    texts = [["A cat sat", "a cat ran", "The dog"], ["", "", ""]]
    found = measure_diversity("openings", Features(texts=texts))
    assert torch.allclose(found.value, torch.tensor([2 / 3, 0.0]))
    assert found.advantages[0, 2] > found.advantages[0, 0] and not found.advantages[1].any()


def check_loss(bag):
    """gamma 0 is cross-entropy; gamma 2 weighs a token by (1 - p)^2 and has a gradient."""
    from methods.focal import focal_loss
    logits = torch.tensor([[2.0, 0, -1], [0, 0, 3]], requires_grad=True)
    target = torch.tensor([0, 1])
    entropy = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    assert torch.allclose(focal_loss(logits, target, gamma=0.0), entropy)
    p = (-entropy).exp()
    assert torch.allclose(focal_loss(logits, target), (1 - p) ** 2 * entropy)
    grad, = torch.autograd.grad(focal_loss(logits, target).sum(), logits)
    assert grad[0, 0] < 0 and grad[1, 1] < 0


def check_adapter(bag):
    """B trains and A does not; the first forward is the base's."""
    from methods.lora_fa import LoRAFALinear
    from lora import add_adapter, trained
    from model import Config, Qwen3
    torch.manual_seed(0)
    model = Qwen3(Config(40, 16, 24, 1, 2, 1, 8))
    tokens = torch.arange(12)[None]
    before = model(tokens)
    add_adapter(model, "lora-fa", 2, 4)
    assert torch.equal(model(tokens), before)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == len(trained(model)) == 7 and all("lora_B" in name for name in names)
    assert all(isinstance(m, LoRAFALinear) for m in model.modules() if hasattr(m, "lora_A"))


def check_reward(bag):
    from support.registry import REWARDS
    reward = REWARDS["question"].function(None)
    assert reward([None, None], [["Why? ", "No."], ["", "? no"]], [1, 2]) == [[1, 0], [0, 0]]


def check_domain(bag):
    """The verifier, and the toy task's own replies, which are right."""
    import data
    from support.files import InputError
    from support.posts import Post
    from support.registry import WORLDS
    post = Post("1", "Cat", ("Calm and tall",), ("right",))
    domain = data.make_domain("acrostic", [post])
    styles = [domain.styles_of(post, text) for text in ("come as three", "cat", "")]
    assert styles == [("right",), (), ()]
    made = WORLDS["acrostic"].function(50, 3)
    assert len({post.post for post in made}) == 50
    assert all(domain.styles_of(post, post.replies[0]) == ("right",) for post in made)
    with pytest.raises(InputError, match="4096 posts"):
        WORLDS["acrostic"].function(5000, 3)


def check_decoder(bag):
    """Each completion is the likeliest of its own four samples."""
    from generate import Samples
    from methods.sample_and_rank import sample_and_rank
    logprobs = [[-1.0], [-3.0], [-2.0, -2.0], [-0.5, -0.6], [-9.0], [-8.0], [-7.0], [-8.0]]
    tokens = [[number] * len(own) for number, own in enumerate(logprobs)]
    finished = [number % 2 == 0 for number in range(8)]
    texts = [str(number) for number in range(8)]

    def sample_completions(visits, step, k, progress):
        return None, Samples([tokens], [logprobs], [finished]), [texts]
    session = SimpleNamespace(sample_completions=sample_completions)
    kept, kept_texts = sample_and_rank(session, [None], 2)
    assert kept_texts == [["0", "6"]] and kept.tokens == [[[0], [6]]]
    assert kept.logprobs == [[[-1.0], [-7.0]]] and kept.finished == [[True, True]]


def check_embedder(bag):
    """Unit vectors; equal texts are equal, texts of other tokens are orthogonal."""
    from data import load_tokenizer
    from support.registry import EMBEDDERS
    embed = EMBEDDERS["bag-of-tokens"].function(bag, load_tokenizer(bag), "cpu")
    vectors = embed([["ant bear", "ant bear"], ["", "."]])
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(2, 2))
    assert torch.equal(vectors[0, 0], vectors[0, 1]) and float(vectors[1, 0] @ vectors[1, 1]) == 0


def check_metric(bag):
    from support.registry import METRICS
    record = {"drafts": ["Why?", "No.", "", "So? "]}
    assert METRICS["questions"].function(record, [0.0] * 4, (1, 2), 100) == {"questions": 0.5}


CHECKS = (check_objective, check_diversity, check_loss, check_adapter, check_reward, check_domain,
          check_decoder, check_embedder, check_metric)


def write_model(folder):
    """A random Qwen3 of two layers, with a tokenizer trained on the words of the toy task; beside
    it, in `bag`, a folder for --embedder."""
    from methods.acrostic import ANIMALS
    from methods.small_base import train_tokenizer
    from model import Config, Qwen3
    tokenizer = train_tokenizer([" ".join(ANIMALS)] * 3, 300)
    torch.manual_seed(1)
    config = Config(tokenizer.get_vocab_size(), 32, 64, 2, 4, 2, 16, tie_word_embeddings=True)
    model = Qwen3(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    bag = folder.parent / "bag"
    bag.mkdir()
    (bag / "config.json").write_text('{"model_type": "bag-of-tokens"}')
    shutil.copy(folder / "tokenizer.json", bag)


def use_everything(made):
    """Check the examples, then split, train and measure with them in the folder `made`."""
    import data
    import evaluate
    import grpo
    import polylora
    from support import registry
    registry.load()
    write_model(made / "model")
    for check in CHECKS:
        check(made / "bag")
        print(f"{check.__name__}: holds")
    parts = made / "parts"
    acrostic = ["--domain", "acrostic"]
    succeeds(data, "split", "--data", "acrostic", *acrostic, "--sizes", "sft=7,grpo=6,eval=4",
             "--out", parts)
    succeeds(data, "check", parts / "sft.jsonl")
    words = made / "words.jsonl"
    words.write_text('{"post": "Cat", "replies": {"right": "Calm and tall"}}\n'
                     '{"post": "Dog", "replies": {"right": "Do or go"}}\n')
    succeeds(data, "split", "--data", words, *acrostic, "--sizes", "sft=1,eval=1",
             "--out", made / "own")
    succeeds(data, "check", made / "own" / "sft.jsonl")
    small = ["--batch", "4", "--steps", "2", "--k", "4", "--max-new-tokens", "6", "--lr", "1e-3",
             "--temperature", "0.1", "--device", "cpu"]
    succeeds(polylora, "sft", "--model", made / "model", "--data", parts / "sft.jsonl",
             "--out", made / "sft", "--rank", "2", "--draft-posts", "2",
             "--loss", "focal", "--loss-value", "1", "--adapter", "lora-fa",
             "--lambda", "0.3", "--diversity", "openings", *small)
    start = ["--start", made / "sft", "--data", parts / "grpo.jsonl", *small]
    succeeds(grpo, *start, "--out", made / "grpo", "--advantage", "raft", "--reward", "question",
             "--diversity-weight", "0.5", "--diversity", "openings")
    succeeds(grpo, *start, "--out", made / "verified")
    succeeds(evaluate, "measure", made / "grpo", "--data", parts / "eval.jsonl", "--n", "10",
             "--max-new-tokens", "6", "--decoder", "sample-and-rank", "--embedder", made / "bag",
             "--device", "cpu")
    succeeds(evaluate, "report", made / "grpo@sample-and-rank", "--out", made / "report",
             "--ks", "1,2")


def succeeds(program, *arguments):
    """Run a program's main; AssertionError unless it ends without an error."""
    assert program.main([str(argument) for argument in arguments]) == 0, arguments


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))              # for pytest, conftest.py does it
    torch.set_num_threads(1)
    use_everything(Path("made").resolve())
