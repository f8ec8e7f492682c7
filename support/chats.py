"""Chats of untrusted text: control strings, checks of a tokenizer, and chat templates."""

import functools
import os
import re
from pathlib import Path

from support.files import InputError, read_json, read_template
from support.template import render_template


# ---- Control strings -----------------------------------------------------------------------------

CONTROL = re.compile(r"<(?:\|\w+\||/?(?:think|tool_call|tool_response))>")


@functools.lru_cache(maxsize=8)
def control_of(tokenizer):
    """A pattern of a tokenizer's control strings: all that look like Qwen3's, and its own special
    tokens, such as SmolLM2's <file_sep>."""
    own = []
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.special and len(token.content) > 1:
            own.append(token.content)
    own.sort(key=len, reverse=True)
    return re.compile("|".join([CONTROL.pattern, *map(re.escape, own)]))


def harmless(text, control=CONTROL):
    """A user's text with its control strings broken by an invisible character: a post that holds
    <|im_end|> must not end a turn."""
    return control.sub(lambda found: f"{found[0][0]}\u200b{found[0][1:]}", text)


def without_control(text, control=CONTROL):
    """A reply to learn from, without its control strings: if they were broken by an invisible
    character, that character would be learnt. Removing one may put together another."""
    while control.search(text):
        text = control.sub("", text)
    return text


# ---- Checks of a tokenizer -----------------------------------------------------------------------

SAMPLE_TEXT = "Ab, 12 \u00e9 \u4e16\u754c \U0001f44b ok"


def no_tokenizer(folder):
    """What is wrong with a checkpoint folder that has no tokenizer.json, and how to fix it."""
    if (folder / "adapter_config.json").exists():
        return "the folder is an adapter's: give its base model here, and the adapter as a run"
    for name in ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"):
        if (folder / name).exists():
            return (f"the folder has {name}, a tokenizer in an older format: convert it once with "
                    "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")
    return "copy the tokenizer of the model's source next to the weights"


def check_vocabulary(file, ids):
    """Raise InputError if a tokenizer.json has more ids than config.json gives the model rows."""
    config_file = file.with_name("config.json")
    if not config_file.exists():
        if file.with_name("adapter_config.json").exists():
            raise InputError(f"{config_file} is missing: {no_tokenizer(file.parent)}")
        return
    config = read_json(config_file)
    rows = config.get("vocab_size") if isinstance(config, dict) else None
    if not isinstance(rows, int):            # the model says what else is wrong there
        return
    if not 0 < ids <= rows:
        raise InputError(f"{file} has ids up to {ids - 1}, and config.json in the same folder has "
                         f"rows for {rows} tokens: they are of different checkpoints, or tokens "
                         "were added without resize_token_embeddings")


def check_marks(tokenizer, file):
    """Raise InputError if a tokenizer lacks the marks of ChatML's turns."""
    for mark in ("<|im_start|>", "<|im_end|>"):
        ids = tokenizer.encode(mark, add_special_tokens=False).ids
        if ids != [tokenizer.token_to_id(mark)]:
            raise InputError(f"{file} has no token {mark}: give a checkpoint with Qwen3's chat "
                             "format")


def check_round_trip(text, file):
    """Raise InputError unless `text`, SAMPLE_TEXT encoded with stop tokens and decoded, is equal
    to SAMPLE_TEXT."""
    if "<|im_end|>" in text or "<|endoftext|>" in text:
        raise InputError(f"{file} does not mark <|im_end|> or <|endoftext|> as special tokens, "
                         "so they would be part of every reply: set \"special\": true there")
    if text != SAMPLE_TEXT:
        raise InputError(f"{file} does not give a text back as it was ({SAMPLE_TEXT!r} became "
                         f"{text[:40]!r}): it is not a byte-level tokenizer such as Qwen3's")


# ---- Think blocks --------------------------------------------------------------------------------

def split_thought(message):
    """(thought, answer) of an assistant's message. The thought is its reasoning_content, or what
    is in the think block of its content."""
    content = message["content"]
    if message.get("reasoning_content") is not None:
        return message["reasoning_content"].strip("\n"), content
    before, mark, answer = content.rpartition("</think>")
    if not mark:
        return "", content
    return before.rpartition("<think>")[2].strip("\n"), answer.lstrip("\n")


# ---- A checkpoint's chat template ----------------------------------------------------------------

CHATML = "give a checkpoint whose chat format is ChatML, as Qwen3's"

TURNS = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
         {"role": "user", "content": "three"}]

PROBES = (TURNS, [{"role": "system", "content": "zero"}, *TURNS])    # without and with system


def template_texts(folder):
    """What the folder's own chat template makes of each of PROBES; None without a template."""
    template = read_template(Path(folder))
    if template is None:
        return None
    try:
        return render_template(template, PROBES, tokens=special_tokens(folder))
    except (ValueError, OSError) as e:
        reason = " ".join(str(e).split())[:100]
        raise InputError(f"the chat template in {folder} fails on a chat of user and assistant "
                         f"turns ({reason}): {CHATML}") from None


def default_system(text):
    """The system turn that a template puts into a chat without one; "" if it puts in none."""
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", text, re.DOTALL)
    return found[1] if found else ""


def special_tokens(folder):
    """name -> text of the special tokens in a folder's tokenizer_config.json, such as eos_token."""
    file = Path(folder) / "tokenizer_config.json"
    config = read_json(file) if file.exists() else {}
    if not isinstance(config, dict):
        return {}
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def unknown_template(folder, known, text):
    """The message for a template that writes `text`: where that departs from the nearest of the
    known formats' texts."""
    if "<|im_start|>" not in text or "<|im_end|>" not in text:
        difference = "marks turns by other tokens than <|im_start|> and <|im_end|>"
    else:
        shared = max((os.path.commonprefix([text, other]) for other in known), key=len)
        difference = (f"marks turns as ChatML does, but after {shared[-20:]!r} writes "
                      f"{text[len(shared):][:40]!r}, which no known format does")
    return f"the chat template in {folder} {difference}: {CHATML}"
