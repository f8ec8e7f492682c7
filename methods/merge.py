"""`lora.py merge`: a run's adapter in the weights of its base, as a checkpoint for other programs,
and how much its logits differ from those of base and adapter."""

import torch
import torch.nn.functional as F
from torch import nn

import data
from lora import replace_module
from methods.nf4 import NF4
from model import Block, Config, Qwen3, full_attention, rms_norm, rotary
from support.checkpoint import same_base, start_folder
from support.evaluations import config_of
from support.files import InputError, fetch, read_json, read_template, write_json, write_text
from support.hub import empty_model
from support.merge import Stored, atomic_folder, read_update, write_merged
from support.peft_files import read_adapter_config
from support.registry import COMMANDS
from trainer import load_chat


# ---- Logits, one block in memory at a time -------------------------------------------------------

# What the merged checkpoint is compared on, in the base's chat format.
POSTS = ("Just adopted a kitten!", "My train is late again, third time this week.",
         "What should I cook tonight?", "I finally finished my first marathon :)")


@torch.no_grad()
def logits_of(config, rows, stored, update=None, nf4=False):
    """The logits (T, V), fp32, of each of `rows`, tensors (1, T) of token ids, one after the other
    and in one tensor: of the checkpoint `stored`, with the adapter `update` on its layers, if any,
    and its blocks in NF4, if asked. One block's weights are in memory at a time."""
    changed = update.names() if update else ()

    def weight(name):
        if name in changed and update.kind == "full":
            return update.weight(name, None)
        return stored(name)
    embedding = weight("model.embed_tokens.weight")
    states = [F.embedding(tokens, embedding) for tokens in rows]
    del embedding
    for index in range(config.num_hidden_layers):
        block = read_block(config, index, weight, nf4)
        if update and update.kind != "full":
            put_on(block, index, update)
        for place, x in enumerate(states):
            positions = torch.arange(x.shape[1])[None]
            rope = rotary(positions, config.head_dim, config.rope_theta, x.dtype)
            states[place] = block(x, rope, full_attention(), index)
    hidden = rms_norm(torch.cat(states, 1)[0], weight("model.norm.weight"), config.rms_norm_eps)
    tied = config.tie_word_embeddings
    return hidden @ weight("model.embed_tokens.weight" if tied else "lm_head.weight").t()


def read_block(config, index, weight, nf4):
    """Block `index` with the weights of weight(name)."""
    with torch.device("meta"):
        block = Block(config)
    tensors = {}
    for name in block.state_dict():
        tensors[name] = weight(f"model.layers.{index}.{name}")
    block.load_state_dict(tensors, assign=True)
    if nf4:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                replace_module(block, name, NF4(layer.weight, layer.bias))
    return block


def put_on(block, index, update):
    """Puts the adapter's layers of block `index` on it."""
    for name, layer in list(block.named_modules()):
        full = f"model.layers.{index}.{name}"
        if f"{full}.weight" in update.names():
            replace_module(block, name, update.layer(full, layer))


def difference(a, b):
    """(largest absolute difference of two tensors of logits (T, V), number of positions whose
    likeliest token differs)."""
    return float((a - b).abs().max()), int((a.argmax(-1) != b.argmax(-1)).sum())


# ---- What other programs need and a base may lack ------------------------------------------------

# What data.ChatFormat() writes: Qwen3's format without thinking, for a base that has no template.
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}
"""


def fill_in(folder, tokenizer):
    """Writes what other programs need and the base lacks: a chat template, the tokenizer's class,
    the tokens that end a reply. Returns the names of the files written or completed."""
    written = []
    if read_template(folder) is None:
        write_text(folder / "chat_template.jinja", TEMPLATE)
        written.append("chat_template.jinja")
    if not (folder / "tokenizer_config.json").exists():
        write_json(folder / "tokenizer_config.json",
                   {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
                    "clean_up_tokenization_spaces": False})
        written.append("tokenizer_config.json")
    path = folder / "generation_config.json"
    settings = read_json(path) if path.exists() else {"do_sample": True, "temperature": 1.0}
    ends = settings.get("eos_token_id") or []
    ends = ends if isinstance(ends, list) else [ends]
    lacking = [i for i in data.stop_ids(tokenizer) if i not in ends]
    if lacking:                  # Qwen3's base models end at <|endoftext|> alone, replies do not
        write_json(path, settings | {"eos_token_id": lacking + ends})
        written.append(path.name)
    return written


# ---- The command ---------------------------------------------------------------------------------

@COMMANDS.add("merge", "a checkpoint with a run's adapter in its weights", program="lora")
def merge_command(sub):
    """Add `merge` to the commands of lora.py."""
    m = sub.add_parser("merge", help="write a run's base with its adapter in the weights, for "
                                     "transformers, vLLM and llama.cpp")
    add = m.add_argument
    add("adapter", metavar="RUN", help="a finished run, or an adapter folder in PEFT's layout")
    add("--out", required=True, help="folder to make")
    add("--dtype", default="float32", choices=("float32", "bfloat16"),
        help="of the merged weights; default: float32. bfloat16 is half as large, and rounds away "
             "part of a small update: the logits' difference, which is printed, shows how much")
    add("--model", default=None, help="the base model; default: the one that the run names")
    add("--revision", default=None, help="commit, tag or branch of the base on the hub")
    m.set_defaults(run=run_merge)


def run_merge(args):
    folder = start_folder(args.adapter)
    run = folder.parent if folder.name == "adapter" else folder
    name_base(args, run, folder)
    base = fetch(args.model, args.revision)
    config = Config.from_dict(read_json(base / "config.json"))
    stored = Stored(base)
    if "score.weight" in stored.shapes or "model.embed_tokens.weight" not in stored.shapes:
        raise InputError(f"{args.model} is no model that writes text: give the base of the run by "
                         "--model")
    model = empty_model(Qwen3, config, base, dict(stored.shapes), embedder=False)
    update = read_update(folder, model)
    tokenizer, chat = load_chat(base)
    same_base(folder, args)
    with atomic_folder(args.out) as new:
        write_merged(base, stored, update, new, getattr(torch, args.dtype),
                     config.tie_word_embeddings)
        made = fill_in(new, tokenizer)
        rows = []
        for post in POSTS:
            turns = [{"role": "user", "content": post}]
            rows.append(torch.tensor([data.encode_prompt(tokenizer, turns, chat)]))
        lines = compared(config, rows, stored, update, Stored(new), config_of(run).get("nf4"))
    print(f"{args.out}: {args.model} with {folder} ({update.kind}) in its weights, {args.dtype}")
    if made:
        print(f"written for other programs, since the base lacks them: {', '.join(made)}")
    print("\n".join(lines))
    print("how to serve it: docs/SERVING.md")


def name_base(args, run, folder):
    """Set args.model and args.revision to the run's where no --model is given."""
    config = read_adapter_config(folder)
    if not args.model:
        args.model = config_of(run).get("model") or config.get("base_model_name_or_path")
        args.revision = args.revision or config.get("revision")
    if not args.model:
        raise InputError(f"{folder}/adapter_config.json does not name its base model: give --model")


def compared(config, rows, stored, update, merged, nf4):
    """Lines that say how much the merged checkpoint's logits differ from those of base and adapter,
    and, where the run held its base in 4 bits, from those that it trained with."""
    got = logits_of(config, rows, merged)
    largest, changed = difference(got, logits_of(config, rows, stored, update))
    lines = [f"max |logit difference| from base + adapter: {largest:.2g}, on {len(got)} tokens of "
             f"{len(rows)} prompts; the likeliest next token differs at {changed}"]
    if nf4:
        largest, changed = difference(got, logits_of(config, rows, stored, update, nf4=True))
        lines.append(f"the run trained on the base in 4 bits, and its logits differ from those on "
                     f"the full base by up to {largest:.2g}; the likeliest next token differs at "
                     f"{changed}")
    return lines
