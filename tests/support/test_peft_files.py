"""Tests of support/peft_files.py."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import (
    LINEARS, PEFT_FILES, PEFT_KINDS, ROOT, build_model, cut_triplets, gap as adapters_gap, gap
    as parity_gap, load_tiny, logits_of, sequence, shake_all, tiny_adapter, tiny_config,
    tiny_weights, with_adapter, write_adapter, write_checkpoint, write_json,
)
from lora import (
    adapter_state, add_adapter, add_lora, load_adapter, lora_layers, save_adapter, trained,
)
from methods.interpolate import interpolate_adapters
from methods.nf4 import quantise
from model import Config, Qwen3
from support.files import InputError
from support.peft_files import read_adapter_config


# ---- Adapters ------------------------------------------------------------------------------------

@pytest.mark.peers
def test_live_adapter_from_peft(tmp_path):
    """PEFT's own file, on three of the seven linears: the order of target_modules in it is a
    set's."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from lora import load_adapter
    model, tokens = load_tiny(tmp_path / "base", True), sequence(2, 20)
    base = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", init_lora_weights=False,
                               target_modules=["q_proj", "o_proj", "down_proj"])
    theirs = peft.get_peft_model(base, settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want = theirs(torch.tensor([tokens])).logits[0]
    assert parity_gap(want, logits_of(model, tokens)) > 0.1
    assert parity_gap(want, logits_of(load_adapter(model, tmp_path / "adapter"), tokens)) < 1e-4


@pytest.mark.peers
def test_live_adapter_to_peft(tmp_path, recwarn):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from lora import add_lora, lora_layers, save_adapter
    model, tokens = load_tiny(tmp_path / "base", False), sequence(2, 20)
    add_lora(model, 4, 6)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter")
    base = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "base")
    recwarn.clear()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    # a missing key is only a warning
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]
    with torch.no_grad():
        want = theirs(torch.tensor([tokens])).logits[0]
        assert parity_gap(want, logits_of(model, tokens)) < 1e-4
        merged = theirs.merge_and_unload()(torch.tensor([tokens])).logits[0]
    assert parity_gap(merged, logits_of(model, tokens)) < 1e-4


# ---- LoRA ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("key, value", [
    ("init_lora_weights", "olora"), ("init_lora_weights", "pissa_niter_4"),
    ("modules_to_save", ["lm_head"]),
    ("rank_pattern", {"q_proj": 8}), ("bias", "all"), ("peft_type", "IA3")])
def test_an_adapter_that_asks_for_more_than_lora_is_refused(tmp_path, key, value):
    """Read as plain LoRA, such an adapter gives another model's output without a word."""
    save_adapter(add_lora(build_model(), 4, 8), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match=f"{key}|LoRA"):
        load_adapter(build_model(), tmp_path)


def damage(tmp_path, what):
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    if what == "no weights":
        file.unlink()
    elif what == "cut weights":
        file.write_bytes(file.read_bytes()[:100])
    elif what == "no config":
        config.unlink()
    elif what == "no rank":
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items()
                                      if k != "r"}))
    elif what == "a tensor too few":
        tensors = load_file(file)
        tensors.pop(min(tensors))
        save_file(tensors, file)


@pytest.mark.parametrize("what", ["no weights", "cut weights", "no config", "no rank",
                                  "a tensor too few"])
def test_a_damaged_adapter_is_an_input_error(tmp_path, what):
    """A copy that broke off is the user's everyday mistake: one sentence that names the folder,
    not a traceback."""
    save_adapter(add_lora(build_model(), 4, 8), tmp_path)
    damage(tmp_path, what)
    with pytest.raises(InputError, match=str(tmp_path)):
        load_adapter(build_model(), tmp_path)


# ---- Files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, change", [
    ("moa", {"members": None}), ("moa", {"members": 0}), ("ensemble", {"members": 2}),
    ("adalora", {"init_r": 5}),
    ("adalora", {"target_r": "4"}), ("pissa", {"pissa_rank": 3}), ("dora", {"use_rslora": True}),
    ("lori", {"peft_type": "LORA"}), ("lora", {"peft_type": "MOA", "members": 1}),
    ("full", {"peft_type": "LORA"})], ids=str)
def test_a_configuration_that_does_not_fit_its_tensors_is_refused(kind, change, tmp_path):
    save_adapter(with_adapter(kind), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config = {k: v for k, v in (config | change).items() if v is not None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=str(tmp_path)):
        load_adapter(build_model(), tmp_path)


def test_adapters_do_not_load_into_another_kind_nor_full_over_four_bits(tmp_path):
    save_adapter(with_adapter("lora"), tmp_path)
    with pytest.raises(InputError, match="another's layers"):
        load_adapter(with_adapter("rslora"), tmp_path)
    with pytest.raises(InputError, match="4 bits"):
        with_adapter("full", quantise(build_model()))
    with pytest.raises(InputError, match="already"):
        with_adapter("lora", with_adapter("full"))
    with pytest.raises(InputError, match="float32"):
        trained(with_adapter("full", build_model(torch.bfloat16)))
    assert trained(with_adapter("lora", build_model(torch.bfloat16)))


# ---- PEFT ----------------------------------------------------------------------------------------

GOLDEN = ROOT / "tests" / "golden" / "adapters.json"


def svd_rounding(model):
    """How far rounding in fp32 turns the r largest singular directions of a layer's weight, as a
    share of what they multiply, in the worst layer: eps S_1 / (S_r - S_r+1) (Wedin's
    theorem)."""
    worst = 0.0
    for layer in lora_layers(model).values():
        values = torch.linalg.svdvals(layer.weight.double())
        distance = values[layer.rank - 1] - values[layer.rank]
        worst = max(worst, float(2 ** -23 * values[0] / distance))
    return worst


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_adapters_of_peft_s_kinds_have_its_logits(kind, tmp_path):
    want, config = json.loads(GOLDEN.read_text()), tiny_config(True)
    tensors = tiny_adapter(config, want["rank"], want["seed"], kind)
    write_adapter(tmp_path / "a", tensors, want["rank"], want["alpha"], **PEFT_KINDS[kind])
    model = Qwen3.from_pretrained(write_checkpoint(tmp_path / "base", config,
                                                   tiny_weights(config, 7)))
    score = lambda: model(torch.tensor([want["tokens"]]))[0, -2:].detach()
    plain = adapters_gap(score(), torch.tensor(want["last_two"][kind]))
    load_adapter(model, tmp_path / "a")
    rounding = 1e-4
    if kind == "pissa":
        # PEFT's file holds A and B only; what they started from is computed again from W by an SVD
        # in fp32, there
        # when the golden file was written and here, and processors round it differently.
        rounding += 2 * svd_rounding(model) * float(score().abs().max())
    assert rounding < 1e-3
    assert adapters_gap(score(), torch.tensor(want["last_two"][kind])) < rounding < 0.1 < plain
    assert {layer.kind for layer in lora_layers(model).values()} == {kind}


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["lora", *PEFT_KINDS])
def test_live_ours_read_by_peft_and_peft_s_by_us(kind, tmp_path, recwarn):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config, tokens = tiny_config(True), torch.tensor([sequence(2, 20)])
    write_checkpoint(tmp_path / "base", config, tiny_weights(config, 7))
    theirs = lambda: transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "base",
                                                                   dtype=torch.float32)
    ours = lambda: Qwen3.from_pretrained(tmp_path / "base")
    model = shake_all(with_adapter(kind, ours()), 0.1)
    save_adapter(model, tmp_path / "ours")
    recwarn.clear()
    read = peft.PeftModel.from_pretrained(theirs(), tmp_path / "ours").eval()
    # a missing key is only a warning
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]
    with torch.no_grad():
        assert (adapters_gap(read(tokens).logits, model(tokens)) < 1e-4
                and adapters_gap(model(tokens), ours()(tokens)) > 0.1)
    common = dict(lora_alpha=5, task_type="CAUSAL_LM",
                  target_modules=["q_proj", "o_proj", "down_proj"])
    if kind == "adalora":
        settings = peft.AdaLoraConfig(init_r=6, target_r=4, total_step=100, tinit=1, tfinal=1,
                                      **common)
    else:
        settings = peft.LoraConfig(r=3, **common, **PEFT_KINDS.get(kind, {}))
    written = peft.get_peft_model(theirs(), settings).eval()
    with torch.no_grad():
        for name, p in written.named_parameters():
            if "lora_" in name:
                p.add_(0.1 * torch.randn(p.shape))
        written.save_pretrained(tmp_path / "theirs")
        model = load_adapter(ours(), tmp_path / "theirs")
        assert (adapters_gap(written(tokens).logits, model(tokens)) < 1e-4
                and adapters_gap(model(tokens), ours()(tokens)) > 0.1)


PEFT_FILES_GOLDEN = json.loads((ROOT / "tests" / "golden" / "peft_files.json").read_text())

RANK, ALPHA, SEED = PEFT_FILES_GOLDEN["rank"], PEFT_FILES_GOLDEN["alpha"], PEFT_FILES_GOLDEN["seed"]


def base():
    config = tiny_config(True)
    model = Qwen3(Config.from_dict(config))
    model.load_state_dict(tiny_weights(config, 7))
    return model.requires_grad_(False).eval()


def last_two(model):
    with torch.no_grad():
        return model(torch.tensor([PEFT_FILES_GOLDEN["tokens"]]))[0, -2:]


def gap(a, b):
    return (a - torch.as_tensor(b)).abs().max().item()


def written(folder, name):
    """The folder that PEFT wrote for a case of the golden file, its tensors drawn anew."""
    case = PEFT_FILES_GOLDEN["cases"][name]
    drawn = tiny_adapter(tiny_config(True), RANK, SEED, "dora" if case["config"]["use_dora"]
                         else "lora")
    folder.mkdir(exist_ok=True)
    write_json(folder / "adapter_config.json", case["config"])
    save_file({n: drawn[n] for n in case["tensors"]}, folder / "adapter_model.safetensors",
              metadata={"format": "pt"})
    return folder, torch.tensor(case["last_two"])


def plain(folder, kind="lora", **changes):
    """A plain adapter on all linear layers with further settings in its configuration."""
    return write_adapter(folder, tiny_adapter(tiny_config(True), RANK, SEED, kind), RANK, ALPHA,
                         **changes)


# ---- Which layers --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PEFT_FILES)
def test_what_peft_s_settings_choose_has_peft_s_logits(name, tmp_path):
    folder, want = written(tmp_path / "a", name)
    model = load_adapter(base(), folder)
    assert gap(last_two(model), want) < 1e-4 < 1e-2 < gap(last_two(base()), want)
    held = {n.removeprefix("base_model.model.").rpartition(".lora_")[0]
            for n in PEFT_FILES_GOLDEN["cases"][name]["tensors"]}
    assert set(lora_layers(model)) == held


@pytest.mark.parametrize("name", ["layers_to_transform", "exclude_modules", "target pattern",
                                  "full names", "dora on some layers"])
def test_an_adapter_on_some_layers_is_saved_with_these_layers_alone(name, tmp_path):
    """GRPO goes on from such an adapter and saves it."""
    folder, want = written(tmp_path / "a", name)
    save_adapter(load_adapter(base(), folder), tmp_path / "b")
    again = load_adapter(base(), tmp_path / "b")
    assert gap(last_two(again), want) < 1e-4
    assert load_file(tmp_path / "b" / "adapter_model.safetensors").keys() == set(
        PEFT_FILES_GOLDEN["cases"][name]["tensors"])


def test_all_layers_of_a_name_are_saved_by_that_name(tmp_path):
    save_adapter(add_adapter(base(), "lora", 2, 4, targets=("q_proj", "up_proj")), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [
        "q_proj", "up_proj"]


@pytest.mark.parametrize("changes, match", [
    ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head'"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    ({"target_modules": ["c_attn"]}, "no linear layers"),
    ({"target_modules": []}, "target_modules"),
    ({"target_modules": None}, "lacks target_modules"),
    ({"target_modules": 3}, "target_modules must be"),
    ({"target_modules": ["q_proj", None]}, "target_modules must be"),
    ({"exclude_modules": 3}, "exclude_modules must be"),
    ({"layers_to_transform": "0"}, "layer numbers"),
    ({"layers_to_transform": [0, True]}, "layer numbers"),
    ({"layers_to_transform": [9]}, "no linear layers"),
    ({"layers_to_transform": [0], "layers_pattern": "h"}, "layers_pattern"),
    ({"target_modules": list(LINEARS[:3])}, "does not fit.*which the model lacks")], ids=str)
def test_layers_that_cannot_be_adapted_are_refused(changes, match, tmp_path):
    with pytest.raises(InputError, match=match):
        load_adapter(base(), plain(tmp_path, **changes))


def test_a_pattern_that_would_run_for_ever_is_not_run(tmp_path):
    """A hostile configuration; the layers are those of the tensors."""
    folder = plain(tmp_path / "a")
    want = last_two(load_adapter(base(), folder))
    hostile = plain(tmp_path / "b", target_modules="(.*.*.*.*.*.*.*.*)*!")
    assert gap(last_two(load_adapter(base(), hostile)), want) == 0


def test_a_file_that_lacks_a_layer_that_its_configuration_names_is_refused(tmp_path):
    folder, _ = written(tmp_path, "layers_to_transform")
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", config | {"layers_to_transform": [0, 1, 2]})
    with pytest.raises(InputError, match="lacks matrices of.*layers.1"):
        load_adapter(base(), folder)


# ---- Settings that change the function -----------------------------------------------------------

OTHER_FUNCTIONS = {
    "alora_invocation_tokens": [301, 44], "layer_replication": [[0, 2], [1, 3]],
    "modules_to_save": ["lm_head"],
    "rank_pattern": {"q_proj": 64}, "alpha_pattern": {"q_proj": 64},
    "trainable_token_indices": [1, 2], "use_qalora": True,
    "lora_bias": True, "target_parameters": ["mlp.experts"], "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1e-4}, "velora_config": {"num_groups": 2},
    "monteclora_config": {"num_samples": 4},
    "megatron_config": {"hidden_size": 8}, "fan_in_fan_out": True, "bias": "all",
    "a_setting_of_tomorrow": 1,
    "another_of_tomorrow": "yes"}


@pytest.mark.parametrize("key", OTHER_FUNCTIONS)
def test_a_setting_that_changes_the_function_is_refused_by_its_name(key, tmp_path):
    """By an allow-list: what is not known must be switched off."""
    folder = plain(tmp_path, **{key: OTHER_FUNCTIONS[key]})
    with pytest.raises(InputError, match=f"'{key}'.*not implemented"):
        load_adapter(base(), folder)
    with pytest.raises(InputError, match=f"'{key}'.*not implemented"):
        interpolate_adapters(folder, folder, 0.5, tmp_path / "between", 1)


@pytest.mark.parametrize("start", ["olora", "corda", "loftq", "lora_ga", "pissa_niter_16",
                                   "of tomorrow", 3])
def test_a_start_that_changes_the_weights_under_the_adapter_is_refused(start, tmp_path):
    with pytest.raises(InputError, match=f"init_lora_weights to '?{start}"):
        load_adapter(base(), plain(tmp_path, init_lora_weights=start))


def test_every_setting_of_peft_s_that_is_switched_off_is_read(tmp_path):
    """The golden configurations hold all keys that PEFT 0.21 writes; each alone, and one of
    tomorrow."""
    want = last_two(load_adapter(base(), plain(tmp_path / "want")))
    every = PEFT_FILES_GOLDEN["cases"]["gaussian"]["config"]
    assert set(OTHER_FUNCTIONS) - {"a_setting_of_tomorrow", "another_of_tomorrow"} <= set(every)
    off = {key: every[key] for key in OTHER_FUNCTIONS if key in every} | {"of_tomorrow": None,
                                                                          "also": False, "and": []}
    descriptive = {"peft_version": "9.9", "auto_mapping": {"base_model_class": "Qwen3ForCausalLM",
                                                           "unsloth_fixed": True},
                   "eva_config": {"rho": 2.0}, "corda_config": {"a": 1},
                   "loftq_config": {"loftq_bits": 4},
                   "lora_ga_config": {"a": 1}, "megatron_core": "megatron.core",
                   "qalora_group_size": 16,
                   "ensure_weight_tying": True, "runtime_config": {"ephemeral_gpu_offload": False}}
    folder = plain(tmp_path / "a", **off | descriptive)
    assert gap(last_two(load_adapter(base(), folder)), want) == 0


def test_two_kinds_of_lora_at_once_are_named(tmp_path):
    with pytest.raises(InputError, match="rslora and dora together"):
        load_adapter(base(), plain(tmp_path, use_rslora=True, use_dora=True))
    with pytest.raises(InputError, match="peft_type 'LOHA'"):
        load_adapter(base(), plain(tmp_path, peft_type="LOHA"))


@pytest.mark.parametrize("changes, match",
                         [({"lora_alpha": 0}, "lora_alpha is 0"),
                          ({"lora_alpha": "16"}, "lora_alpha is '16'"),
                          ({"lora_dropout": 1.0}, "lora_dropout is 1.0"), ({"r": 0}, "r is 0")],
                         ids=str)
def test_numbers_that_cannot_be_worked_with_are_named(changes, match, tmp_path):
    with pytest.raises(InputError, match=match):
        load_adapter(base(), plain(tmp_path, **changes))


# ---- AdaLoRA -------------------------------------------------------------------------------------

def adalora(folder, **changes):
    pattern = PEFT_FILES_GOLDEN["rank_pattern"]["pattern"]
    drawn = tiny_adapter(tiny_config(True), RANK, SEED, "adalora")
    settings = PEFT_KINDS["adalora"] | {"rank_pattern": pattern} | changes
    return write_adapter(folder, cut_triplets(drawn, pattern), RANK, ALPHA, **settings)


def test_adalora_whose_budget_has_ended_has_peft_s_logits(tmp_path):
    """rank_pattern says which triplets the file holds; the first layer keeps none."""
    model, want = load_adapter(base(),
                               adalora(tmp_path / "a")), torch.tensor(
                                   PEFT_FILES_GOLDEN["rank_pattern"]["last_two"])
    assert gap(last_two(model), want) < 2e-4 < 0.1 < gap(last_two(base()), want)
    save_adapter(model, tmp_path / "b")
    again = load_adapter(base(), tmp_path / "b")
    assert gap(last_two(again), last_two(model)) == 0
    kept = sum(map(sum, PEFT_FILES_GOLDEN["rank_pattern"]["pattern"].values()))
    assert kept == sum(int((layer.lora_E != 0).sum()) for layer in lora_layers(again).values())


@pytest.mark.slow
def test_adalora_saved_with_its_cut_triplets_and_with_the_adapter_s_name_is_read(tmp_path):
    """As older PEFTs left it."""
    pattern = {f"base_model.model.{key}.default": kept
               for key, kept in PEFT_FILES_GOLDEN["rank_pattern"]["pattern"].items()}
    whole = tiny_adapter(tiny_config(True), RANK, SEED, "adalora")
    cut = load_adapter(base(), adalora(tmp_path / "a", rank_pattern=pattern))
    kept = {f"{n.removesuffix('.default')}": torch.tensor(k)[:, None] for n, k in pattern.items()}
    whole = {n: t * kept[n] if n in kept else t for n, t in whole.items()}
    uncut = write_adapter(tmp_path / "b", whole, RANK, ALPHA, **PEFT_KINDS["adalora"],
                          rank_pattern=pattern)
    assert gap(last_two(load_adapter(base(), uncut)), last_two(cut)) < 1e-5


CUT_TO_TWO = next(name for name, kept in PEFT_FILES_GOLDEN["rank_pattern"]["pattern"].items()
                  if sum(kept) == 2)


@pytest.mark.parametrize("pattern, match", [
    ([True], "JSON object"),
    ({"model.layers.0.self_attn.q_proj.lora_E": [True, False]}, "4 booleans"),
    ({"model.layers.0.self_attn.q_proj.lora_E": 3}, "4 booleans"),
    ({"model.layers.9.q_proj.lora_E": [True] * 4}, "layers.9"),
    ({CUT_TO_TWO: [True] * 3 + [False]}, "2 triplets.*keeps 3")], ids=str)
def test_a_rank_pattern_that_does_not_fit_its_tensors_is_refused(pattern, match, tmp_path):
    folder = adalora(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", config | {"rank_pattern": pattern})
    with pytest.raises(InputError, match=match):
        load_adapter(base(), folder)


@pytest.mark.peers
def test_live_adalora_as_peft_s_own_training_leaves_it(tmp_path):
    """Budget ended, saved by save_pretrained: read with its logits."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config, tokens = tiny_config(True), torch.tensor([sequence(2, 20)])
    write_checkpoint(tmp_path / "base", config, tiny_weights(config, 7))
    torch.manual_seed(0)
    settings = peft.AdaLoraConfig(init_r=6, target_r=2, tinit=2, tfinal=3, deltaT=1, total_step=12,
                                  lora_alpha=9,
                                  task_type="CAUSAL_LM",
                                  target_modules=["q_proj", "o_proj", "down_proj"])
    model = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.get_peft_model(model, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(12):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    kept = sum(map(sum, config["rank_pattern"].values()))
    assert 0 < kept < 6 * len(config["rank_pattern"])
    ours = load_adapter(Qwen3.from_pretrained(tmp_path / "base"), tmp_path / "a")
    with torch.no_grad():
        assert gap(ours(tokens), model(tokens).logits) < 1e-3 < 0.1 < gap(base()(tokens),
                                                                          model(tokens).logits)


# ---- Files that are no adapter, or not a whole one -----------------------------------------------

def test_an_adapter_in_a_format_that_can_run_code_says_how_to_convert_it(tmp_path):
    folder = plain(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="adapter_model.bin.*only safetensors.*PeftModel"):
        load_adapter(base(), folder)


def test_a_folder_around_an_adapter_and_a_whole_model_are_called_that(tmp_path):
    plain(tmp_path / "out" / "checkpoint-10")
    with pytest.raises(InputError, match="checkpoint-10 holds an adapter"):
        read_adapter_config(tmp_path / "out")
    folder = write_checkpoint(tmp_path / "model", tiny_config(True),
                              tiny_weights(tiny_config(True), 7))
    with pytest.raises(InputError, match="whole model.*--model"):
        read_adapter_config(folder)


@pytest.mark.parametrize("prefix",
                         ["base_model.model.model.language_model.",
                          "base_model.model._orig_mod.model.",
                          "model.", "base_model.model.base_model.model.model."])
def test_tensors_under_another_prefix_are_refused_by_the_first_name(prefix, tmp_path):
    folder = plain(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {n.replace("base_model.model.model.", prefix): t for n, t in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="names begin with|under another prefix"):
        load_adapter(base(), folder)


@pytest.mark.parametrize("tensors", [{}, "of size 0"], ids=str)
def test_an_adapter_without_numbers_is_called_unfinished(tensors, tmp_path):
    folder = plain(tmp_path)
    if tensors:
        tensors = {n: torch.zeros(0) for n in load_file(folder / "adapter_model.safetensors")}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not saved in full"):
        load_adapter(base(), folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "full"])
def test_an_adapter_with_a_number_that_is_not_finite_is_refused(kind, value, tmp_path):
    model = add_adapter(base(), kind, 4, 6)
    with torch.no_grad():
        list(adapter_state(model).values())[-1].view(-1)[3] = value
    save_adapter(model, tmp_path)
    with pytest.raises(InputError, match="not finite"):
        load_adapter(base(), tmp_path)


def test_an_adapter_s_damage_is_found_in_its_file_alone(tmp_path):
    """A copy of a good adapter still loads: the refusals above are of what was changed."""
    folder, want = written(tmp_path / "a", "gaussian")
    shutil.copytree(folder, tmp_path / "b")
    assert gap(last_two(load_adapter(base(), tmp_path / "b")), want) < 1e-4
