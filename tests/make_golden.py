"""Writes tests/golden/*.json: what transformers, PEFT and bitsandbytes compute from the checkpoints
of tests/helpers.py.

    pip install torch transformers peft bitsandbytes
    python tests/make_golden.py

Run again only when helpers.py changes; the tests compare with the files, whether or not the peers
are there.
"""

import base64
import json
import math
import sys
import tempfile
from pathlib import Path

import bitsandbytes
import peft
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from transformers import (
    BertModel, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3ForSequenceClassification,
    Qwen3Model,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers import (
    OTHERS, PEFT_FILES, PEFT_KINDS, cut_triplets, fingerprint, nf4_weight, other_checkpoint,
    rank_pattern, sequence, tiny_adapter, tiny_bert, tiny_config, tiny_weights, weights_mark,
    write_adapter, write_checkpoint,
)

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = {"transformers": transformers.__version__, "peft": peft.__version__,
            "torch": torch.__version__}
SEED, RANK, ALPHA = 7, 4, 6  # alpha / rank = 1.5: neither 1 nor alpha, so a forgotten scale shows
LENGTHS = (9, 160)  # of the scored sequences; 160 turns the rotary angles many times round
PROMPT_LENGTHS, NEW_TOKENS = (3, 7, 12), 12


def rounded(x):
    """Nested lists of floats with 7 significant digits."""
    if isinstance(x, torch.Tensor):
        x = x.tolist()
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return float(f"{x:.7g}") if isinstance(x, float) else x


def load(cls, folder, **changes):
    model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **changes)
    return model.eval()


def logits_of(model, tokens):
    """The two last rows in full, and a fingerprint of every row."""
    logits = model(torch.tensor([tokens])).logits[0]                           # (T, V)
    return {"tokens": tokens, "last_two": rounded(logits[-2:]),
            "fingerprints": rounded(fingerprint(logits))}


def logprobs_of(model, prompt, continuation, temperature):
    logits = model(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1:-1]
    logp = (logits / temperature).log_softmax(-1)
    return rounded(logp.gather(-1, torch.tensor(continuation)[:, None]).squeeze(-1))


def greedy_of(model):
    """Greedy continuations, each prompt alone and uncached; a left-padded batch with a cache must
    agree."""
    prompts, out = [sequence(100 + n, n) for n in PROMPT_LENGTHS], []
    margin = math.inf
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            top = model(torch.tensor([ids])).logits[0, -1].topk(2)
            margin = min(margin, float(top.values[0] - top.values[1]))
            ids.append(int(top.indices[0]))
        out.append(ids[len(prompt):])
    assert margin > 0.01, \
        f"a near tie ({margin}): other machines may choose differently; take another seed"
    widest = max(PROMPT_LENGTHS)
    padded = torch.tensor([[0] * (widest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (widest - len(p)) + [1] * len(p) for p in prompts])
    model.generation_config.eos_token_id = None  # as many tokens for every prompt
    batch = model.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS,
                           pad_token_id=0, temperature=None, top_p=None, top_k=None)
    assert batch[:, widest:].tolist() == out, "transformers disagrees with itself"
    return {"prompts": prompts, "continuations": out, "smallest_margin": rounded(margin)}


def causal(folder, tied):
    config = tiny_config(tied)
    weights = tiny_weights(config, SEED)
    model = load(Qwen3ForCausalLM, write_checkpoint(folder / "base", config, weights))
    sequences = [sequence(20 + n, n) for n in LENGTHS]
    prompt, continuation = sequence(30, 8), sequence(31, 10)
    logprobs = {str(t): logprobs_of(model, prompt, continuation, t) for t in (1.0, 0.7)}
    golden = {"versions": VERSIONS, "tied": tied, "seed": SEED, "weights": weights_mark(weights),
              "logits": [logits_of(model, s) for s in sequences], "greedy": greedy_of(model),
              "logprobs": {"prompt": prompt, "continuation": continuation, "at": logprobs}}
    adapter = tiny_adapter(config, RANK, SEED + 1)
    place = write_adapter(folder / "adapter", adapter, RANK, ALPHA)
    adapted = PeftModel.from_pretrained(model, place).eval()
    golden["adapter"] = {"rank": RANK, "alpha": ALPHA, "seed": SEED + 1,
                         "weights": weights_mark(adapter), **logits_of(adapted, sequences[0])}
    return golden


def bias(folder):
    """Logits with attention_bias, tied and untied: q, k, v and o have a bias that is not zero."""
    tokens = sequence(20 + LENGTHS[0], LENGTHS[0])
    golden = {"versions": VERSIONS, "seed": SEED, "logits": {}}
    for tied in (True, False):
        config = tiny_config(tied, attention_bias=True)
        place = write_checkpoint(folder / f"bias {tied}", config, tiny_weights(config, SEED))
        model = load(Qwen3ForCausalLM, place)
        golden["logits"]["tied" if tied else "untied"] = logits_of(model, tokens)
    return golden


def to_qwen3(folder):
    """Logits and greedy continuations of a tiny Qwen2 and a tiny Llama, which support/to_qwen3.py
    writes as Qwen3."""
    tokens = sequence(20 + LENGTHS[0], LENGTHS[0])
    golden = {"versions": VERSIONS, "seed": SEED, "cases": {}}
    for name, (kind, tied, changes) in OTHERS.items():
        cls = {"qwen2": Qwen2ForCausalLM, "llama": LlamaForCausalLM}[kind]
        model = load(cls, other_checkpoint(folder / name, kind, tied, **changes))
        golden["cases"][name] = {"logits": logits_of(model, tokens), "greedy": greedy_of(model)}
    return golden


def heads(folder):
    """The last token's final hidden state (as Qwen3-Embedding is read) and a reward model's score.

    Both say that they are tied, as the small published ones do; no file of theirs has an lm_head.
    """
    config, sequences = tiny_config(True), [sequence(50, 5), sequence(51, 11)]
    weights = tiny_weights(config, SEED, prefix="", head=None)
    embedder = load(Qwen3Model, write_checkpoint(folder / "embedder", config, weights))
    last = [embedder(torch.tensor([s])).last_hidden_state[0, -1] for s in sequences]
    config = tiny_config(True, architectures=["Qwen3ForSequenceClassification"],
                         id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    weights = tiny_weights(config, SEED, head="score")
    reward = load(Qwen3ForSequenceClassification,
                  write_checkpoint(folder / "reward", config, weights))
    scores = [float(reward(torch.tensor([s])).logits[0, 0]) for s in sequences]
    widest = max(map(len, sequences))
    padded = torch.tensor([s + [0] * (widest - len(s)) for s in sequences])
    batch = reward(padded, attention_mask=(padded > 0).long()).logits[:, 0]
    assert torch.allclose(batch, torch.tensor(scores), atol=1e-5), \
        "transformers disagrees with itself"
    return {"versions": VERSIONS, "seed": SEED, "sequences": sequences,
            "last_hidden": [rounded(h) for h in last], "scores": rounded(scores)}


def bert(folder):
    """The mean of a BERT encoder's last states over each text's tokens, as sentence-transformers
    takes it."""
    model = load(BertModel, write_checkpoint(folder / "bert", *tiny_bert()))
    sequences = [sequence(60, 5, 61), sequence(61, 12, 61), sequence(62, 32, 61)]
    means = [model(torch.tensor([s])).last_hidden_state[0].mean(0) for s in sequences]
    return {"versions": VERSIONS, "sequences": sequences, "means": [rounded(m) for m in means]}


def adapters(folder):
    """What PEFT's other kinds of LoRA make of one adapter each."""
    config, tokens = tiny_config(True), sequence(20 + LENGTHS[0], LENGTHS[0])
    base = write_checkpoint(folder / "adapted", config, tiny_weights(config, SEED))
    golden = {"versions": VERSIONS, "rank": RANK, "alpha": ALPHA, "seed": SEED + 1,
              "tokens": tokens, "last_two": {}}
    for kind, changes in PEFT_KINDS.items():
        tensors = tiny_adapter(config, RANK, SEED + 1, kind)
        place = write_adapter(folder / kind, tensors, RANK, ALPHA, **changes)
        model = PeftModel.from_pretrained(load(Qwen3ForCausalLM, base), place).eval()
        golden["last_two"][kind] = rounded(model(torch.tensor([tokens])).logits[0, -2:])
    return golden


def peft_files(folder):
    """The layers that PEFT's settings choose, the configuration that it then writes, and its
    logits; and an AdaLoRA adapter whose budget has cut triplets."""
    config, tokens = tiny_config(True), sequence(20 + LENGTHS[0], LENGTHS[0])
    base = write_checkpoint(folder / "chosen", config, tiny_weights(config, SEED))
    golden = {"versions": VERSIONS, "rank": RANK, "alpha": ALPHA, "seed": SEED + 1,
              "tokens": tokens, "cases": {}}
    for name, changes in PEFT_FILES.items():
        kind = "dora" if changes.get("use_dora") else "lora"
        drawn = tiny_adapter(config, RANK, SEED + 1, kind)
        settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM", **changes)
        model = peft.get_peft_model(load(Qwen3ForCausalLM, base), settings)
        own = peft.get_peft_model_state_dict(model)
        place = folder / name
        # Its configuration, and tensors that are exchanged for the drawn ones.
        model.save_pretrained(place)
        save_file({n: drawn[n] for n in own}, place / "adapter_model.safetensors",
                  metadata={"format": "pt"})
        read = PeftModel.from_pretrained(load(Qwen3ForCausalLM, base), place).eval()
        written = json.loads((place / "adapter_config.json").read_text())
        written["base_model_name_or_path"] = None
        golden["cases"][name] = {"config": written, "tensors": sorted(own),
                                 "last_two": rounded(read(torch.tensor([tokens])).logits[0, -2:])}
    pattern = rank_pattern(config, RANK, SEED)
    drawn = cut_triplets(tiny_adapter(config, RANK, SEED + 1, "adalora"), pattern)
    changes = PEFT_KINDS["adalora"] | {"rank_pattern": pattern}
    place = write_adapter(folder / "rank_pattern", drawn, RANK, ALPHA, **changes)
    read = PeftModel.from_pretrained(load(Qwen3ForCausalLM, base), place).eval()
    golden["rank_pattern"] = {"pattern": pattern,
                              "last_two": rounded(read(torch.tensor([tokens])).logits[0, -2:])}
    return golden


def nf4():
    """bitsandbytes' NF4 with double quantisation. Its CPU code takes the second nearest 8-bit value
    where two are nearly as near; this weight has no such place, or the test against our nearest
    value would fail."""
    weight = nf4_weight()
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    bytes_of = lambda t: base64.b64encode(t.flatten().numpy().tobytes()).decode()
    some = bitsandbytes.functional.dequantize_4bit(codes, state).flatten()[::997]
    dense = {"float32": some.float().tolist(), "bfloat16": some.bfloat16().tolist()}
    return {"versions": VERSIONS | {"bitsandbytes": bitsandbytes.__version__},
            "codes": bytes_of(codes), "scales": bytes_of(state.absmax),
            "outer": state.state2.absmax.tolist(), "mean": float(state.offset), "dense": dense}


def dump(name, golden):
    """JSON with each list of numbers on one line."""
    def text(x, indent):
        if isinstance(x, dict):
            lines = (f"{indent} {json.dumps(k)}: {text(v, indent + ' ')}" for k, v in x.items())
            return "{\n" + ",\n".join(lines) + "}"
        if isinstance(x, list) and x and isinstance(x[0], (list, dict)):
            return "[" + f",\n{indent} ".join(text(v, indent + " ") for v in x) + "]"
        return json.dumps(x, separators=(",", ":"))
    (GOLDEN / name).write_text(text(golden, "") + "\n", encoding="utf-8")
    print(name, (GOLDEN / name).stat().st_size, "bytes")


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for tied, name in ((True, "tied"), (False, "untied")):
            dump(f"qwen3_{name}.json", causal(Path(folder) / name, tied))
        dump("qwen3_heads.json", heads(Path(folder)))
        dump("qwen3_bias.json", bias(Path(folder)))
        dump("to_qwen3.json", to_qwen3(Path(folder)))
        dump("bert.json", bert(Path(folder)))
        dump("adapters.json", adapters(Path(folder)))
        dump("peft_files.json", peft_files(Path(folder)))
    dump("nf4.json", nf4())


if __name__ == "__main__":
    main()
