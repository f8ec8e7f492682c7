"""adapter_config.json as PEFT writes it: what is read has PEFT's logits, what is not implemented is refused by its name.
tests/golden/peft_files.json holds what PEFT wrote and computed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import (add_adapter, adapter_state, interpolate_adapters, load_adapter, lora_layers, read_adapter_config,
                      save_adapter)
from data import InputError
from model import Config, Qwen3
from tiny import (LINEARS, PEFT_FILES, PEFT_KINDS, cut_triplets, sequence, tiny_adapter, tiny_config, tiny_weights,
                  write_adapter, write_checkpoint, write_json)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "peft_files.json").read_text())
RANK, ALPHA, SEED = GOLDEN["rank"], GOLDEN["alpha"], GOLDEN["seed"]


def base():
    config = tiny_config(True)
    model = Qwen3(Config.from_dict(config))
    model.load_state_dict(tiny_weights(config, 7))
    return model.requires_grad_(False).eval()


def last_two(model):
    with torch.no_grad():
        return model(torch.tensor([GOLDEN["tokens"]]))[0, -2:]


def gap(a, b):
    return (a - torch.as_tensor(b)).abs().max().item()


def written(folder, name):
    """The folder that PEFT wrote for a case of the golden file, its tensors drawn anew."""
    case = GOLDEN["cases"][name]
    drawn = tiny_adapter(tiny_config(True), RANK, SEED, "dora" if case["config"]["use_dora"] else "lora")
    folder.mkdir(exist_ok=True)
    write_json(folder / "adapter_config.json", case["config"])
    save_file({n: drawn[n] for n in case["tensors"]}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder, torch.tensor(case["last_two"])


def plain(folder, kind="lora", **changes):
    """A plain adapter on all linear layers with further settings in its configuration."""
    return write_adapter(folder, tiny_adapter(tiny_config(True), RANK, SEED, kind), RANK, ALPHA, **changes)


# ---- Which layers ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PEFT_FILES)
def test_what_peft_s_settings_choose_has_peft_s_logits(name, tmp_path):
    folder, want = written(tmp_path / "a", name)
    model = load_adapter(base(), folder)
    assert gap(last_two(model), want) < 1e-4 < 1e-2 < gap(last_two(base()), want)
    held = {n.removeprefix("base_model.model.").rpartition(".lora_")[0] for n in GOLDEN["cases"][name]["tensors"]}
    assert set(lora_layers(model)) == held


@pytest.mark.parametrize("name", ["layers_to_transform", "exclude_modules", "target pattern", "full names", "dora on some layers"])
def test_an_adapter_on_some_layers_is_saved_with_these_layers_alone(name, tmp_path):
    """GRPO goes on from such an adapter and saves it."""
    folder, want = written(tmp_path / "a", name)
    save_adapter(load_adapter(base(), folder), tmp_path / "b")
    again = load_adapter(base(), tmp_path / "b")
    assert gap(last_two(again), want) < 1e-4
    assert load_file(tmp_path / "b" / "adapter_model.safetensors").keys() == set(GOLDEN["cases"][name]["tensors"])


def test_all_layers_of_a_name_are_saved_by_that_name(tmp_path):
    save_adapter(add_adapter(base(), "lora", 2, 4, targets=("q_proj", "up_proj")), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "up_proj"]


@pytest.mark.parametrize("changes, match", [
    ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head'"), ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    ({"target_modules": ["c_attn"]}, "no linear layers"), ({"target_modules": []}, "target_modules"),
    ({"target_modules": None}, "lacks target_modules"), ({"target_modules": 3}, "target_modules must be"),
    ({"target_modules": ["q_proj", None]}, "target_modules must be"), ({"exclude_modules": 3}, "exclude_modules must be"),
    ({"layers_to_transform": "0"}, "layer numbers"), ({"layers_to_transform": [0, True]}, "layer numbers"),
    ({"layers_to_transform": [9]}, "no linear layers"), ({"layers_to_transform": [0], "layers_pattern": "h"}, "layers_pattern"),
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


# ---- Settings that change the function -------------------------------------------------------------------

OTHER_FUNCTIONS = {
    "alora_invocation_tokens": [301, 44], "layer_replication": [[0, 2], [1, 3]], "modules_to_save": ["lm_head"],
    "rank_pattern": {"q_proj": 64}, "alpha_pattern": {"q_proj": 64}, "trainable_token_indices": [1, 2], "use_qalora": True,
    "lora_bias": True, "target_parameters": ["mlp.experts"], "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1e-4}, "velora_config": {"num_groups": 2}, "monteclora_config": {"num_samples": 4},
    "megatron_config": {"hidden_size": 8}, "fan_in_fan_out": True, "bias": "all", "a_setting_of_tomorrow": 1,
    "another_of_tomorrow": "yes"}


@pytest.mark.parametrize("key", OTHER_FUNCTIONS)
def test_a_setting_that_changes_the_function_is_refused_by_its_name(key, tmp_path):
    """By an allow-list: what is not known must be switched off."""
    folder = plain(tmp_path, **{key: OTHER_FUNCTIONS[key]})
    with pytest.raises(InputError, match=f"'{key}'.*not implemented"):
        load_adapter(base(), folder)
    with pytest.raises(InputError, match=f"'{key}'.*not implemented"):
        interpolate_adapters(folder, folder, 0.5, tmp_path / "between", 1)


@pytest.mark.parametrize("start", ["olora", "corda", "loftq", "lora_ga", "pissa_niter_16", "of tomorrow", 3])
def test_a_start_that_changes_the_weights_under_the_adapter_is_refused(start, tmp_path):
    with pytest.raises(InputError, match=f"init_lora_weights to '?{start}"):
        load_adapter(base(), plain(tmp_path, init_lora_weights=start))


def test_every_setting_of_peft_s_that_is_switched_off_is_read(tmp_path):
    """The golden configurations hold all keys that PEFT 0.21 writes; each alone, and one of tomorrow."""
    want = last_two(load_adapter(base(), plain(tmp_path / "want")))
    every = GOLDEN["cases"]["gaussian"]["config"]
    assert set(OTHER_FUNCTIONS) - {"a_setting_of_tomorrow", "another_of_tomorrow"} <= set(every)
    off = {key: every[key] for key in OTHER_FUNCTIONS if key in every} | {"of_tomorrow": None, "also": False, "and": []}
    descriptive = {"peft_version": "9.9", "auto_mapping": {"base_model_class": "Qwen3ForCausalLM", "unsloth_fixed": True},
                   "eva_config": {"rho": 2.0}, "corda_config": {"a": 1}, "loftq_config": {"loftq_bits": 4},
                   "lora_ga_config": {"a": 1}, "megatron_core": "megatron.core", "qalora_group_size": 16,
                   "ensure_weight_tying": True, "runtime_config": {"ephemeral_gpu_offload": False}}
    folder = plain(tmp_path / "a", **off | descriptive)
    assert gap(last_two(load_adapter(base(), folder)), want) == 0


def test_two_kinds_of_lora_at_once_are_named(tmp_path):
    with pytest.raises(InputError, match="rslora and dora together"):
        load_adapter(base(), plain(tmp_path, use_rslora=True, use_dora=True))
    with pytest.raises(InputError, match="peft_type 'LOHA'"):
        load_adapter(base(), plain(tmp_path, peft_type="LOHA"))


@pytest.mark.parametrize("changes, match", [({"lora_alpha": 0}, "lora_alpha is 0"), ({"lora_alpha": "16"}, "lora_alpha is '16'"),
                                            ({"lora_dropout": 1.0}, "lora_dropout is 1.0"), ({"r": 0}, "r is 0")], ids=str)
def test_numbers_that_cannot_be_worked_with_are_named(changes, match, tmp_path):
    with pytest.raises(InputError, match=match):
        load_adapter(base(), plain(tmp_path, **changes))


# ---- AdaLoRA ---------------------------------------------------------------------------------------------

def adalora(folder, **changes):
    pattern = GOLDEN["rank_pattern"]["pattern"]
    drawn = tiny_adapter(tiny_config(True), RANK, SEED, "adalora")
    settings = PEFT_KINDS["adalora"] | {"rank_pattern": pattern} | changes
    return write_adapter(folder, cut_triplets(drawn, pattern), RANK, ALPHA, **settings)


def test_adalora_whose_budget_has_ended_has_peft_s_logits(tmp_path):
    """rank_pattern says which triplets the file holds; the first layer keeps none."""
    model, want = load_adapter(base(), adalora(tmp_path / "a")), torch.tensor(GOLDEN["rank_pattern"]["last_two"])
    assert gap(last_two(model), want) < 2e-4 < 0.1 < gap(last_two(base()), want)
    save_adapter(model, tmp_path / "b")
    again = load_adapter(base(), tmp_path / "b")
    assert gap(last_two(again), last_two(model)) == 0
    kept = sum(map(sum, GOLDEN["rank_pattern"]["pattern"].values()))
    assert kept == sum(int((layer.lora_E != 0).sum()) for layer in lora_layers(again).values())


def test_adalora_saved_with_its_cut_triplets_and_with_the_adapter_s_name_is_read(tmp_path):
    """As older PEFTs left it."""
    pattern = {f"base_model.model.{key}.default": kept for key, kept in GOLDEN["rank_pattern"]["pattern"].items()}
    whole = tiny_adapter(tiny_config(True), RANK, SEED, "adalora")
    cut = load_adapter(base(), adalora(tmp_path / "a", rank_pattern=pattern))
    kept = {f"{n.removesuffix('.default')}": torch.tensor(k)[:, None] for n, k in pattern.items()}
    whole = {n: t * kept[n] if n in kept else t for n, t in whole.items()}
    uncut = write_adapter(tmp_path / "b", whole, RANK, ALPHA, **PEFT_KINDS["adalora"], rank_pattern=pattern)
    assert gap(last_two(load_adapter(base(), uncut)), last_two(cut)) < 1e-5


@pytest.mark.parametrize("pattern, match", [
    ([True], "JSON object"), ({"model.layers.0.self_attn.q_proj.lora_E": [True, False]}, "4 booleans"),
    ({"model.layers.0.self_attn.q_proj.lora_E": 3}, "4 booleans"), ({"model.layers.9.q_proj.lora_E": [True] * 4}, "layers.9"),
    ({next(n for n, k in GOLDEN["rank_pattern"]["pattern"].items() if sum(k) == 2): [True] * 3 + [False]}, "2 triplets.*keeps 3")],
                         ids=str)
def test_a_rank_pattern_that_does_not_fit_its_tensors_is_refused(pattern, match, tmp_path):
    folder = adalora(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", config | {"rank_pattern": pattern})
    with pytest.raises(InputError, match=match):
        load_adapter(base(), folder)


def test_live_adalora_as_peft_s_own_training_leaves_it(tmp_path):
    """Budget ended, saved by save_pretrained: read with its logits."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config, tokens = tiny_config(True), torch.tensor([sequence(2, 20)])
    write_checkpoint(tmp_path / "base", config, tiny_weights(config, 7))
    torch.manual_seed(0)
    settings = peft.AdaLoraConfig(init_r=6, target_r=2, tinit=2, tfinal=3, deltaT=1, total_step=12, lora_alpha=9,
                                  task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj", "down_proj"])
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
        assert gap(ours(tokens), model(tokens).logits) < 1e-3 < 0.1 < gap(base()(tokens), model(tokens).logits)


# ---- Files that are no adapter, or not a whole one -------------------------------------------------------

def test_an_adapter_in_a_format_that_can_run_code_says_how_to_convert_it(tmp_path):
    folder = plain(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="adapter_model.bin.*only safetensors.*PeftModel"):
        load_adapter(base(), folder)


def test_a_folder_around_an_adapter_and_a_whole_model_are_called_that(tmp_path):
    plain(tmp_path / "out" / "checkpoint-10")
    with pytest.raises(InputError, match="checkpoint-10 holds an adapter"):
        read_adapter_config(tmp_path / "out")
    folder = write_checkpoint(tmp_path / "model", tiny_config(True), tiny_weights(tiny_config(True), 7))
    with pytest.raises(InputError, match="whole model.*--model"):
        read_adapter_config(folder)


@pytest.mark.parametrize("prefix", ["base_model.model.model.language_model.", "base_model.model._orig_mod.model.",
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
