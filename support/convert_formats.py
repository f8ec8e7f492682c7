"""The formats in which people have data: how a row is recognised, and the posts that are in it.

A row is a JSON object, or a line of a table. A format's `lines` makes of it the lines of a file of
posts (docs/DATA.md), and counts in `lost` what of the row they do not hold."""

import re
from collections.abc import Callable
from typing import NamedTuple


class Format(NamedTuple):
    """A format that `data.py convert` reads."""
    name: str                    # for --format
    about: str                   # what its rows are, for messages
    fields: Callable             # (row) -> names of the fields that show it; () if it is another's
    lines: Callable              # (row, every turn?, lost) -> [line, ..]; ValueError says why none
    reads: tuple                 # names of further fields that are read


# ---- Values --------------------------------------------------------------------------------------

ASKS = ("prompt", "instruction", "question", "query", "input")

ANSWERS = ("completion", "response", "output", "answer", "reply", "target", "solution")

# Fields that may hold an answer, in formats that are not known.
OTHER_ANSWERS = ("chosen", "rejected", "target", "completions", "responses", "generation",
                 "generated_text", "assistant", "answers", "outputs", "story", "text", "code",
                 "canonical_solution", "reference", "references", "ideal", "expected", "summary",
                 "label", "utterance")

CHATS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "utterances")

IDS = ("id", "tweet_id", "task_id", "question_id", "prompt_id", "conversation_id", "conv_id")

WITHOUT_TEXT = "an empty text, or one that is no text"


def given(row, *names):
    """The names of a row's fields that hold something."""
    return tuple(name for name in names if row.get(name) not in (None, "", []))


def text_of(value):
    """A text: a string, or the texts of a list of parts, as {"type": "text", "text": ..}."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        value = "\n\n".join(text_of(part.get("text")) for part in value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(WITHOUT_TEXT)
    return value.strip()


def with_id(row, line):
    """A line with the row's id, if it has one."""
    for name in IDS:
        if type(row.get(name)) in (str, int) and row[name] != "":
            return {"id": row[name]} | line
    return line


# ---- Chats ---------------------------------------------------------------------------------------

ROLES = {"system": "system", "developer": "system",
         "user": "user", "human": "user", "prompter": "user",
         "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
         "model": "assistant", "ai": "assistant"}

SPEAKERS = {"user": "User", "assistant": "Assistant", "a": "A", "b": "B"}


def is_chat(value):
    """Is it a list of turns, each an object with who speaks?"""
    return (isinstance(value, list) and bool(value)
            and all(isinstance(turn, dict) and ("role" in turn or "from" in turn)
                    for turn in value))


def turns_of(chat, lost=None):
    """[(role, text), ..] of a list of turns in either way of writing them. Where `lost` is given,
    a chat ends before the first turn that cannot be read, and the rest is counted there."""
    turns = []
    for turn in chat:
        try:
            turns.append(turn_of(turn))
        except ValueError as e:
            if lost is None or len(turns) < 2:
                raise
            lost[f"the rest of a chat, from {e} on"] += 1
            break
    return turns


def turn_of(turn):
    """(role, text) of a turn."""
    role = turn.get("role", turn.get("from"))
    role = ROLES.get(role.lower()) if isinstance(role, str) else None
    if role is None:
        raise ValueError("a turn of another role than system, user and assistant")
    return role, text_of(turn.get("content", turn.get("value")))


def joined(turns):
    """The turns, with successive ones of one role made one."""
    found = []
    for role, text in turns:
        if found and found[-1][0] == role:
            text = f"{found.pop()[1]}\n\n{text}"
        found.append((role, text))
    return found


def prompt_of(turns):
    """The text that puts turns to a model: a single one as it is, more of them as a transcript,
    each with its speaker; a system's text in front."""
    parts = [text for role, text in turns if role == "system"]
    spoken = [(role, text) for role, text in turns if role != "system"]
    for role, text in spoken:
        parts.append(text if len(spoken) == 1 else f"{SPEAKERS[role]}: {text}")
    return "\n\n".join(parts)


def exchanges(turns, every, lost, first="user"):
    """[(prompt, reply), ..] of turns: the first turn of `first` and the answer to it; with `every`
    each answer, with all turns before it in its prompt."""
    before = []
    found = []
    for role, text in joined(turns):
        asked = any(speaker == first for speaker, _ in before)
        if role in (first, "system"):
            pass
        elif not asked:
            lost["turns of the assistant before the user's first"] += 1
            continue
        else:
            found.append((prompt_of(before), text))
        before.append((role, text))
    if not found:
        raise ValueError("a chat without an answer")
    if before[-1][0] == first:
        lost["last turns without an answer"] += 1
    if every:
        return found
    if len(found) > 1:
        lost["later answers of a chat (--turns all takes each, with the turns before it)"] += \
            len(found) - 1
    return found[:1]


def chat_fields(kind):
    """The `fields` of chats whose turns have their speaker in the field `kind`."""
    def fields(row):
        for name in CHATS:
            if is_chat(row.get(name)) and kind in row[name][0]:
                return (name, kind, "content" if kind == "role" else "value")
        return ()
    return fields


def chat_lines(row, every, lost):
    chat, *_ = (row[name] for name in CHATS if is_chat(row.get(name)))
    turns = turns_of(chat, lost)
    if isinstance(row.get("system"), str) and row["system"].strip():
        turns = [("system", row["system"].strip()), *turns]
    pairs = exchanges(turns, every, lost)
    return [with_id(row, {"prompt": prompt, "completion": reply}) for prompt, reply in pairs]


def dialog_fields(row):
    """A list of texts, said in turn by two people."""
    for name in CHATS:
        value = row.get(name)
        if isinstance(value, list) and len(value) > 1 and all(isinstance(x, str) for x in value):
            return (name,)
    return ()


def dialog_lines(row, every, lost):
    name, = dialog_fields(row)
    turns = []
    for number, text in enumerate(row[name]):
        turns.append(("ab"[number % 2], text_of(text)))
    found = [(prompt_of(turns[:i]), turns[i][1]) for i in range(1, len(turns))]
    if not every and len(found) > 1:
        lost["later answers of a chat (--turns all takes each, with the turns before it)"] += \
            len(found) - 1
        found = found[:1]
    return [with_id(row, {"post": post, "reply": reply}) for post, reply in found]


# ---- A prompt and its answer ---------------------------------------------------------------------

def pair_fields(row):
    asks = given(row, *ASKS)[:1]
    answers = given(row, *ANSWERS)
    if not asks or not answers:
        return ()
    more = given(row, "input") if asks == ("instruction",) else ()
    return (*asks, *more, *answers)


def alpaca_fields(row):
    names = given(row, "instruction", "input", "output")
    return names if "instruction" in names and "output" in names else ()


def put(row, name):
    """The text of a prompt in a row's field: a text or a chat; an instruction with its input."""
    value = row[name]
    if is_chat(value):
        return prompt_of(joined(turns_of(value)))
    text = text_of(value)
    if name == "instruction" and given(row, "input"):
        text += "\n\n" + text_of(row["input"])
    if name != "system" and given(row, "system"):
        text = text_of(row["system"]) + "\n\n" + text
    return text


def said(value):
    """An answer's text: a text, or a chat's last turn, the assistant's."""
    if not is_chat(value):
        return text_of(value)
    role, text = turns_of(value)[-1]
    if role != "assistant":
        raise ValueError("an answer whose last turn is not the assistant's")
    return text


def pair_lines(row, every, lost):
    ask, *_ = given(row, *ASKS)
    answer, *more = given(row, *ANSWERS)
    if more:
        raise ValueError(f'two answers, "{answer}" and "{more[0]}"')
    return [with_id(row, {"prompt": put(row, ask), "completion": said(row[answer])})]


def prompt_fields(row):
    others = given(row, *ANSWERS, *OTHER_ANSWERS)
    return given(row, "prompt") if not others else ()


def prompt_lines(row, every, lost):
    return [with_id(row, {"prompt": put(row, "prompt")})]


def bench_fields(row):
    turns = row.get("turns")
    texts = isinstance(turns, list) and turns and all(isinstance(x, str) for x in turns)
    return ("question_id", "turns") if texts and "question_id" in row else ()


def bench_lines(row, every, lost):
    """A question of MT-bench: its first turn, with the reference answer if there is one."""
    line = {"prompt": text_of(row["turns"][0])}
    if isinstance(row.get("category"), str):
        line["intent"] = row["category"]
    reference = row.get("reference")
    if isinstance(reference, list) and reference:
        line["completion"] = text_of(reference[0])
    if len(row["turns"]) > 1:
        lost["later turns of a question, which ask about an answer that is not in the file"] += \
            len(row["turns"]) - 1
    return [with_id(row, line)]


# ---- Preferences ---------------------------------------------------------------------------------

def choice_fields(row):
    names = given(row, "chosen", "rejected")
    return (*given(row, *ASKS)[:1], *names) if len(names) == 2 else ()


def transcript(text):
    """[(role, text), ..] of a text of turns that begin with Human: and Assistant:."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text)
    turns = []
    for name, said in zip(parts[1::2], parts[2::2]):
        turns.append((ROLES["human" if name == "Human" else "assistant"], text_of(said)))
    return turns


def choice_lines(row, every, lost):
    """A pick of two drafts. Without a prompt both are whole chats that differ in the end only."""
    asks = given(row, *ASKS)
    if asks:
        prompt = put(row, asks[0])
        drafts = [said(row["chosen"]), said(row["rejected"])]
    else:
        chats = []
        for name in ("chosen", "rejected"):
            value = row[name]
            turns = turns_of(value) if is_chat(value) else transcript(text_of(value))
            if len(turns) < 2 or turns[-1][0] != "assistant":
                raise ValueError("a choice without a prompt")
            chats.append(turns)
        good, bad = chats
        if good[:-1] != bad[:-1]:
            raise ValueError("two replies to different prompts")
        prompt = prompt_of(joined(good[:-1]))
        drafts = [good[-1][1], bad[-1][1]]
    if drafts[0] == drafts[1]:
        raise ValueError("a choice between equal replies")
    return [with_id(row, {"prompt": prompt, "reply": drafts[0], "drafts": drafts, "pick": 0})]


def label_fields(row):
    pair = pair_fields(row)
    return (*pair, "label") if pair and label_of(row) is not None else ()


def label_of(row):
    """Whether people liked a completion; None if the row does not say so."""
    label = row.get("label")
    if isinstance(label, bool):
        return label
    words = {"true": True, "1": True, "false": False, "0": False}
    return words.get(label.strip().lower()) if isinstance(label, str) else None


def label_lines(row, every, lost):
    """A completion with its likes, 1 or 0. One that people did not like keeps its label too, by
    which SFT leaves it out."""
    line, = pair_lines(row, every, lost)
    liked = label_of(row)
    return [line | {"reply_likes": int(liked)} | ({} if liked else {"label": False})]


# ---- Posts and tasks, as they are ----------------------------------------------------------------

POST = ("post", "tweet", "prompt", "reply", "replies", "completion", "response", "chosen",
        "rejected", "intent", "tests", "label", "reply_likes", "drafts", "pick", "run", "domain")

TASK = ("prompt", "entry_point", "canonical_solution", "test", "text", "code", "test_list",
        "test_imports", "test_setup_code")


def post_fields(row):
    posts = given(row, "post", "tweet")
    replies = given(row, "reply", "replies", "completion", "response", "drafts")
    return (*posts[:1], *replies[:1]) if posts and (replies or "prompt" in row) else ()


def task_fields(row):
    if given(row, "entry_point", "prompt", "canonical_solution", "test")[3:]:
        return ("entry_point", "canonical_solution", "test")
    return given(row, "code", "test_list") if given(row, "code", "test_list")[1:] else ()


def kept(names):
    """The `lines` of a format whose fields stay as they are."""
    def lines(row, every, lost):
        line = {name: row[name] for name in names if row.get(name) is not None}
        for name in IDS[:3]:
            if row.get(name) is not None:
                line[name] = row[name]
        return [line]
    return lines


# A row is of the first format that has its fields.
FORMATS = {}
for one in (
        Format("code", "tasks of code", task_fields, kept(TASK), TASK),
        Format("posts", "posts and replies", post_fields, kept(POST), POST),
        Format("mt-bench", "MT-bench questions", bench_fields, bench_lines,
               ("category", "reference")),
        Format("dpo", "preferences (DPO)", choice_fields, choice_lines, ("system",)),
        Format("kto", "labelled completions (KTO)", label_fields, label_lines, ("system",)),
        Format("messages", "chat messages", chat_fields("role"), chat_lines, ("system",)),
        Format("sharegpt", "ShareGPT conversations", chat_fields("from"), chat_lines,
               ("system",)),
        Format("dialog", "conversations of two people", dialog_fields, dialog_lines, ()),
        Format("alpaca", "Alpaca instructions", alpaca_fields, pair_lines, ("system",)),
        Format("pairs", "prompts with completions", pair_fields, pair_lines, ("system",)),
        Format("prompts", "prompts", prompt_fields, prompt_lines, ("system",))):
    FORMATS[one.name] = one


def format_of(rows):
    """The Format that most of some rows have; None if they have none."""
    votes = {}
    for row in rows:
        for name, form in FORMATS.items():
            if form.fields(row):
                votes[name] = votes.get(name, 0) + 1
                break
    return FORMATS[max(votes, key=votes.get)] if votes else None


# ---- Columns, which somebody names ---------------------------------------------------------------

PARENTS = ("in_response_to_tweet_id", "in_reply_to_status_id", "in_reply_to_tweet_id",
           "in_reply_to_id", "in_reply_to", "parent_id", "reply_to", "reply_to_id")

TEXTS = ("text", "body", "content", "tweet", "post", "message", "comment", "full_text", "utterance")


def likely_columns(rows):
    """The flags that name the columns of some rows of no known format: of threads, if a column
    seems to hold the id of what a row answers, else the two with the longest texts, in their order;
    () if there are no two."""
    names = {}
    for row in rows:
        for name, value in row.items():
            names[name] = names.get(name, 0) + (len(value) if isinstance(value, str) else 0)
    parents = [name for name in names if name.lower() in PARENTS]
    texts = [name for name in names if name.lower() in TEXTS and names[name]]
    if parents and texts and any(name in IDS for name in names):
        return ("--post-column", texts[0], "--reply-to", parents[0])
    longest = [name for name in names if names[name] and name not in ("rejected", *IDS)]
    longest = sorted(longest, key=names.get)[-2:]
    if len(longest) < 2:
        return ()
    post, reply = (name for name in names if name in longest)
    return ("--post-column", post, "--reply-column", reply)


def columns(post, reply):
    """The Format of rows whose post and reply are in these two columns."""
    def fields(row):
        return (post, reply)

    def lines(row, every, lost):
        for name in (post, reply):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(f'no text in the column "{name}"')
        ask = "prompt" if post in ASKS else "post"
        return [with_id(row, {ask: row[post].strip(), "reply": row[reply].strip()})]
    return Format("columns", "columns", fields, lines, ())
