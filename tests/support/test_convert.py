"""Tests of support/convert.py, convert_files.py and convert_formats.py: files in the formats that
people have become files of posts."""

import copy
import gzip
import json
import random
import re
import shlex
import subprocess
import sys
import types

import pytest

import data
import evaluate
import grpo
import polylora
import rewards
from helpers import ROOT, refusal, write_model
from methods import reward_model
from support.convert_formats import FORMATS
from support.files import InputError
from support.picks import kept_pick


# ---- Small files of every format -----------------------------------------------------------------

def chat(i, *more, role="role", content="content", user="user", assistant="assistant"):
    turns = [(user, f"Question {i}?"), (assistant, f"Answer {i}."), *more]
    return [{role: who, content: text} for who, text in turns]


def table(*rows):
    return "".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows)


COUNT = 8

EACH = range(COUNT)

MORE = [("human", "And?"), ("gpt", "Then that.")]

MBPP = [{"source_file": "x", "task_id": i, "prompt": f"Add {i}.",
         "code": f"def add(a):\n    return a + {i}", "test_imports": [],
         "test_list": [f"assert add(1) == {i + 1}"]} for i in EACH]

BENCH = [{"question_id": i, "category": "writing", "turns": [f"Write {i}.", "Shorter."]}
         for i in EACH]

# name of the file -> (its rows or text, flags, what a line holds)
FILES = {
    "messages.jsonl": ([{"messages": [{"role": "system", "content": "Be kind."}, *chat(i)]}
                        for i in EACH], [],
                       {"prompt": "Be kind.\n\nQuestion 0?", "completion": "Answer 0."}),
    "sharegpt.json": ([{"id": f"a{i}", "conversations": chat(
        i, *MORE, role="from", content="value", user="human", assistant="gpt")} for i in EACH],
        ["--turns", "all"],
        {"id": "a0", "prompt": "Question 0?", "completion": "Answer 0."}),
    "alpaca.json": ([{"instruction": f"Sum up {i}.", "input": "It rains.", "output": f"Rain {i}."}
                     for i in EACH], [],
                    {"prompt": "Sum up 0.\n\nIt rains.", "completion": "Rain 0."}),
    "pairs.json": ([{"prompt": f"Say {i}.", "completion": f"It is {i}"} for i in EACH], [],
                   {"prompt": "Say 0.", "completion": "It is 0"}),
    "questions.jsonl": ([{"question": f"Why {i}?", "answer": f"Because {i}"} for i in EACH], [],
                        {"prompt": "Why 0?", "completion": "Because 0"}),
    "dpo.jsonl": ([{"prompt": chat(i)[:1], "chosen": chat(i)[1:],
                    "rejected": [{"role": "assistant", "content": "No."}]} for i in EACH], [],
                  {"prompt": "Question 0?", "reply": "Answer 0.", "drafts": ["Answer 0.", "No."],
                   "pick": 0}),
    "transcripts.jsonl": ([{"chosen": f"\n\nHuman: Hi {i}\n\nAssistant: Hello",
                            "rejected": f"\n\nHuman: Hi {i}\n\nAssistant: What?"} for i in EACH],
                          [], {"prompt": "Hi 0", "reply": "Hello", "drafts": ["Hello", "What?"],
                               "pick": 0}),
    "kto.json": ([{"prompt": f"Say {i // 2}.", "completion": f"It is {i}", "label": i % 2 == 0}
                  for i in EACH], [],
                 {"prompt": "Say 0.", "completion": "It is 0", "reply_likes": 1}),
    "columns.csv": (table(("n", "headline", "comment"),
                          *((i, f"News, {i}", f"So it goes {i}") for i in EACH)),
                    ["--post-column", "headline", "--reply-column", "comment"],
                    {"post": "News, 0", "reply": "So it goes 0"}),
    "support.csv": (table(("tweet_id", "inbound", "text", "in_response_to_tweet_id"),
                          *((i, True, f"My bus {i} is late", "") for i in EACH),
                          *((i + COUNT, False, f"Sorry {i}", f"{i}.0") for i in EACH)),
                    ["--post-column", "text", "--reply-to", "in_response_to_tweet_id"],
                    {"id": "8", "post": "My bus 0 is late", "reply": "Sorry 0"}),
    "dialogs.jsonl": ([{"dialog": [f"Hi {i}", "Hello", "Bye"], "act": [1, 2, 3]} for i in EACH], [],
                      {"post": "Hi 0", "reply": "Hello"}),
    "posts.json": ([{"post": f"Post {i}", "replies": ["Yes", "No"]} for i in EACH], [],
                   {"post": "Post 0", "replies": ["Yes", "No"]}),
    "mbpp.json": (MBPP, [], MBPP[0] | {"source_file": None}),
    "bench.jsonl": (BENCH, [], {"id": 0, "prompt": "Write 0.", "intent": "writing"})}


def write(folder, name):
    content, *_ = FILES[name]
    if name.endswith(".jsonl"):
        content = "".join(json.dumps(row) + "\n" for row in content)
    elif name.endswith(".json"):
        content = json.dumps(content, indent=1)
    (folder / name).write_text(content)
    return folder / name


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def converted(folder, path, *flags):
    """The lines that a file becomes; they are a file that is read without a word."""
    out = folder / "out.jsonl"
    out.unlink(missing_ok=True)
    assert data.main(["convert", str(path), "--out", str(out), *flags]) == 0
    return lines_of(out)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return str(folder)


def sft(model, file, out, *more):
    return polylora.main(["sft", "--data", str(file), "--model", model, "--out", str(out),
                          "--steps", "2", "--batch", "2", "--rank", "2", "--lambda", "0", *more])


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_small_file_of_each_format_converts_splits_and_trains(tmp_path, model, name):
    _, flags, wanted = FILES[name]
    found = converted(tmp_path, write(tmp_path, name), *flags)
    assert found[0] == {key: value for key, value in wanted.items() if value is not None}
    assert len(found) == COUNT * (2 if "--turns" in flags else 1)
    code = ["--allow-code-execution", "as-root"] if name == "mbpp.json" else []
    out = str(tmp_path / "out.jsonl")
    assert data.main(["check", out, *code]) == 0
    assert data.main(["split", "--data", out, "--sizes", "sft=2,eval=2", "--out",
                      str(tmp_path / "parts"), *code]) == 0
    part = str(tmp_path / "parts" / "sft.jsonl")
    if name == "bench.jsonl":                    # questions alone: there is nothing to imitate
        assert sft(model, part, tmp_path / "no") == 2
        start = tmp_path / "start"
        assert sft(model, converted(tmp_path, write(tmp_path, "pairs.json")) and out, start) == 0
        assert grpo.main(["--data", part, "--start", str(start), "--out", str(tmp_path / "run"),
                          "--steps", "2", "--batch", "2", "--k", "3", "--max-new-tokens",
                          "4"]) == 0
    else:
        assert sft(model, part, tmp_path / "run", *code) == 0
    assert (tmp_path / "run" / "done.json").exists()


@pytest.mark.parametrize("name", ["dpo.jsonl", "kto.json"])
def test_reward_models_learn_from_converted_preferences(tmp_path, model, name):
    converted(tmp_path, write(tmp_path, name))
    out = str(tmp_path / "out.jsonl")
    kept = reward_model.usable(reward_model.load_preferences(out), "auto", out)[1]
    assert {tuple(p.likes) for p in kept} == {(1.0, 0.0)}
    assert len(kept) == (COUNT if name == "dpo.jsonl" else COUNT // 2)
    assert rewards.main(["train", "--model", model, "--data", out, "--out", str(tmp_path / "r"),
                         "--steps", "2", "--batch", "2", "--rank", "2"]) == 0


def test_a_completion_that_people_did_not_like_is_no_reply_to_learn_from(tmp_path, capsys):
    converted(tmp_path, write(tmp_path, "kto.json"))
    posts = data.load_posts(tmp_path / "out.jsonl")
    assert [p.replies for p in posts] == [(f"It is {i}",) for i in (0, 2, 4, 6)]
    assert '4 lines left out, whose "label" is false' in capsys.readouterr().err


# ---- A file that is not converted yet ------------------------------------------------------------

FIELDS = {
    "messages.jsonl": 'JSON lines of chat messages (fields "messages", "role", "content")',
    "sharegpt.json": 'a JSON array of ShareGPT conversations (fields "conversations", "from"',
    "alpaca.json": 'of Alpaca instructions (fields "instruction", "input", "output")',
    "pairs.json": 'of prompts with completions (fields "prompt", "completion")',
    "questions.jsonl": 'of prompts with completions (fields "question", "answer")',
    "dpo.jsonl": 'of preferences (DPO) (fields "prompt", "chosen", "rejected")',
    "transcripts.jsonl": 'of preferences (DPO) (fields "chosen", "rejected")',
    "kto.json": 'of labelled completions (KTO) (fields "prompt", "completion", "label")',
    "columns.csv": 'a table (CSV) with the columns "n", "headline", "comment"',
    "support.csv": '"tweet_id", "inbound", "text", "in_response_to_tweet_id"',
    "dialogs.jsonl": 'of conversations of two people (fields "dialog")',
    "posts.json": 'a JSON array of posts and replies (fields "post", "replies")',
    "mbpp.json": 'a JSON array of tasks of code (fields "code", "test_list")',
    "bench.jsonl": 'JSON lines of MT-bench questions (fields "question_id", "turns")'}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_command_says_how_to_convert_such_a_file(tmp_path, capsys, monkeypatch, name):
    """The format, its fields, and a command that works as it is pasted."""
    path = write(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    said = refusal(capsys, data.main, "check", name)
    parts = ["split", "--data", name, "--sizes", "a=1", "--out", "parts"]
    assert refusal(capsys, data.main, *parts) == said
    assert refusal(capsys, polylora.main, "sft", "--data", name, "--model", "m", "--out",
                   "r") == said
    assert refusal(capsys, rewards.main, "train", "--data", name, "--model", "m", "--out",
                   "r") == said
    assert refusal(capsys, evaluate.main, "measure", "--data", name, "--model", "m", "--bare",
                   "r") == said
    assert FIELDS[name] in said
    words = shlex.split(said[said.index("python "):])
    if name == "alpaca.json":
        subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
    else:
        assert data.main(words[2:]) == 0
    assert len(data.load_posts(tmp_path / words[-1])) >= COUNT // 2
    assert path.exists()


def test_rows_of_no_known_format_are_named_with_a_command_that_guesses_the_columns(tmp_path,
                                                                                 capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"votes": 3, "headline": "Rain again", "comment": "It is only water"}\n')
    said = refusal(capsys, data.main, "check", path)
    assert '"votes", "headline", "comment"' in said
    assert "--post-column headline --reply-column comment --out a-posts.jsonl" in said
    assert refusal(capsys, data.main, "convert", path, "--out", tmp_path / "b").endswith(
        said[said.index("if two"):])


# ---- Chats, tables, threads ----------------------------------------------------------------------

def test_each_answer_of_a_chat_has_the_turns_before_it_in_its_prompt(tmp_path, capsys):
    turns = [{"role": "assistant", "content": "Welcome."}, {"role": "system", "content": "Rhyme."},
             *chat(0, ("user", "And?"), ("user", "So?"), ("assistant", "Thus."), ("user", "Bye."))]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([turns]))             # an array of chats, each a list of turns
    first, second = converted(tmp_path, path, "--turns", "all")
    assert first == {"prompt": "Rhyme.\n\nQuestion 0?", "completion": "Answer 0."}
    assert second == {"prompt": "Rhyme.\n\nUser: Question 0?\n\nAssistant: Answer 0.\n\n"
                                "User: And?\n\nSo?", "completion": "Thus."}
    said = capsys.readouterr().out
    assert "1 x turns of the assistant before the user's first" in said
    assert "1 x last turns without an answer" in said
    assert converted(tmp_path, path) == [first]
    assert "1 x later answers of a chat" in capsys.readouterr().out


def test_what_is_left_out_is_counted_by_reason(tmp_path, capsys):
    rows = [{"messages": chat(0)}, {"messages": chat(1)[:1]}, {"messages": chat(2)[:1]},
            {"messages": [{"role": "tool", "content": "x"}]}, {"text": "alone"},
            {"messages": chat(3, ("user", " "))}, {"messages": chat(4), "score": 3}]
    path = tmp_path / "a.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text + '{"messages": [\n' + '{"messages": 1, "messages": 2}\n')
    assert len(converted(tmp_path, path)) == 3
    said = capsys.readouterr().out
    assert "9 rows" in said and "3 lines, 3 posts" in said
    for reason in ("2 x a chat without an answer", "1 x a turn of another role than system",
                   '1 x no messages row, but one with "text"', "from an empty text",
                   "1 x a line that is not JSON", '1 x the field "messages" stands twice'):
        assert reason in said
    assert 'Fields that are not read: "score"' in said


def test_merged_and_repeated_lines_are_counted(tmp_path, capsys):
    path = tmp_path / "a.json"
    pairs = [("Hi", "a"), ("hi!", "b"), ("Hi", "a"), ("Bye", "c")]
    path.write_text(json.dumps([{"question": q, "answer": a} for q, a in pairs]))
    converted(tmp_path, path)
    said = capsys.readouterr().out
    assert "4 lines, 2 posts with 3 replies" in said
    assert "2 lines repeat the post of an earlier line" in said and "line 2 with line 1" in said
    assert "1 replies are repeated, too" in said
    assert data.main(["check", str(tmp_path / "out.jsonl"), "--show", "0"]) == 0
    said = capsys.readouterr().out
    assert "4 lines, 2 posts, 3 replies" in said and "1 replies are repeated" in said


def test_threads_are_followed_and_what_has_no_beginning_is_counted(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    rows = [("t3_a", "Rain", None), ("b", "Sun", "a"), ("c", "Snow", "t1_b"), ("d", "Hail", "zz"),
            ("e", "Fog", "f"), ("f", "Mist", "e"), ("g", "Wind", ""), ("", "Ice", "a"),
            ("b", "Sleet", "a"), ("h", "", "a")]
    path.write_text("".join(json.dumps({"id": i, "body": text, "parent_id": parent}) + "\n"
                            for i, text, parent in rows))
    flags = ["--post-column", "body", "--reply-to", "parent_id"]
    assert converted(tmp_path, path, *flags) == [{"id": "b", "post": "Rain", "reply": "Sun"}]
    said = capsys.readouterr().out
    for reason in ("1 x answers deeper in a thread", "1 x an answer in a thread whose beginning",
                   "2 x an answer in a thread that leads back to itself", "1 x no id",
                   "1 x no text", "1 x an id that an earlier row has",
                   "1 x a beginning that nobody answers"):
        assert reason in said
    last = converted(tmp_path, path, *flags, "--turns", "all", "--as", "prompt")[-1]
    assert last == {"id": "c", "prompt": "A: Rain\n\nB: Sun", "reply": "Snow"}


@pytest.mark.parametrize("flags, word", [
    (["--post-column", "a"], "needs --reply-column"), (["--reply-to", "b"], "needs --post-column"),
    (["--reply-column", "b"], "--post-column"),
    (["--post-column", "no", "--reply-column", "b"], 'no column "no": its columns are "a", "b"'),
    (["--post-column", "a", "--reply-to", "b"], "no column of ids"),
    (["--post-column", "a", "--reply-to", "b", "--id-column", "i"], 'no column "i"')])
def test_columns_that_are_not_there_are_named(tmp_path, capsys, flags, word):
    (tmp_path / "a.csv").write_text("a,b\nx,y\n")
    assert word in refusal(capsys, data.main, "convert", tmp_path / "a.csv", "--out",
                           tmp_path / "o", *flags)
    assert not (tmp_path / "o").exists()


def test_a_file_that_exists_is_not_written_over(tmp_path, capsys):
    path = write(tmp_path, "pairs.json")
    before = path.read_bytes()
    assert "would be written over" in refusal(capsys, data.main, "convert", path, "--out", path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("pack", [False, True])
def test_a_long_array_is_read_bit_by_bit(tmp_path, monkeypatch, pack):
    """The steps in which it is read fall anywhere: inside objects, texts and escapes."""
    from support import convert_files
    rows = [{"prompt": f"Say \u00e9 {i}", "completion": "\\\"]}" * i + "x"} for i in range(40)]
    text = json.dumps(rows, indent=3) + "\n"
    path = tmp_path / "a.json"
    path.write_bytes(gzip.compress(text.encode()) if pack else text.encode())
    wanted = converted(tmp_path, path)
    assert wanted == rows
    for step in (1, 2, 7, 64):
        monkeypatch.setattr(convert_files, "STEP", step)
        assert converted(tmp_path, path) == rows


def test_a_damaged_array_keeps_what_is_before_the_damage(tmp_path, capsys):
    path = write(tmp_path, "pairs.json")
    path.write_text(path.read_text()[:-30])
    assert len(converted(tmp_path, path)) == COUNT - 1
    assert "1 x damaged JSON, and all behind it" in capsys.readouterr().out


def test_one_object_that_holds_the_rows_is_opened(tmp_path):
    path = tmp_path / "a.json"
    for indent in (None, 1):
        path.write_text(json.dumps({"version": 2, "data": FILES["alpaca.json"][0]}, indent=indent))
        assert len(converted(tmp_path, path)) == COUNT


def test_parquet_is_read_where_pyarrow_is_installed(tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + bytes(20))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    said = refusal(capsys, data.main, "convert", path, "--out", tmp_path / "o")
    assert "which pyarrow reads: pip install pyarrow" in said
    assert "data.py convert" in refusal(capsys, data.main, "check", path)

    class ParquetFile:
        def __init__(self, name):
            assert name == str(path)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def iter_batches(self, size):
            for row in FILES["alpaca.json"][0]:
                yield types.SimpleNamespace(to_pylist=lambda: [row])
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    module = types.ModuleType("pyarrow.parquet")
    module.ParquetFile = ParquetFile
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    assert len(converted(tmp_path, path)) == COUNT


# ---- Whatever the file holds ---------------------------------------------------------------------

SNIPPETS = ['{', '}', '[', ']', '"', ',', ':', '\\', '\n', '\x00', '\ud83d', 'null', '1e999',
            '-', '9' * 5000, '[' * 3000, 'NaN', 'true', '"id": {}', '\ufeff', '\r', "'", '""',
            '"prompt": 3', '"messages": [3]', '"role": null', '"label": 2', '\\ud800', '{}']


def mutated(text, rng):
    """The text with some of it cut out, doubled, exchanged, or replaced by something hostile."""
    raw = text.encode()
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(raw) + 1)
        end = min(len(raw), start + rng.choice((0, 1, 1, 5, 40, 400)))
        way = rng.randrange(5)
        if way == 0:
            new = b""
        elif way == 1:
            new = raw[start:end] * 2
        elif way == 2:
            new = rng.choice(SNIPPETS).encode("utf-8", "surrogatepass")
        elif way == 3:
            new = bytes(rng.randrange(256) for _ in range(rng.randint(1, 4)))
        else:
            other = rng.randrange(len(raw) + 1)
            new = raw[other:other + end - start]
        raw = raw[:start] + new + raw[end:]
    return gzip.compress(raw) if rng.random() < 0.02 else raw


VALUES = [None, 3, 2.5, True, "", " ", [], {}, [1], [{}], [[{}]], {"a": 1}, 10 ** 30, float("nan"),
          "\ud800", "x" * 30_000, ["a", "b"], {"role": "user"}, [{"role": "user", "content": "a"}],
          [{"role": 3, "content": [{"text": "q"}]}, {"from": "gpt", "value": "b"}],
          "\n\nHuman: a\n\nAssistant: b"]


def places_in(value):
    """(container, key) of everything inside a JSON value."""
    found = []
    keys = ()
    if isinstance(value, dict):
        keys = value
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        found += [(value, key), *places_in(value[key])]
    return found


def changed(rows, rng):
    """JSON of the rows with some values, of some other field too, exchanged."""
    rows = copy.deepcopy(rows[:4])
    names = sorted({name for content, *_ in FILES.values() for name in content[0]
                    if isinstance(content[0], dict)})
    for _ in range(rng.randint(1, 5)):
        value = copy.deepcopy(rng.choice(VALUES))
        if rng.random() < 0.5:
            rng.choice(rows)[rng.choice(names)] = value
        else:
            container, key = rng.choice(places_in(rng.choice(rows)))
            container[key] = value
    return json.dumps(rows).encode()


@pytest.mark.slow
def test_of_2000_mutated_files_each_is_converted_or_refused_in_one_sentence(tmp_path, capsys,
                                                                            monkeypatch):
    """And what is written is read again."""
    rng = random.Random(29)
    parser = data.parser()
    monkeypatch.setattr(data, "parser", lambda: parser)      # made once; and no wait for the disk
    monkeypatch.setattr("support.files.os.fsync", lambda file: None)
    texts = {name: write(tmp_path, name).read_text() for name in FILES}
    counts = [0, 0]
    for number in range(2000):
        name = rng.choice(list(FILES))
        path = tmp_path / f"mutated-{name}"
        whole = name.endswith(".csv") or rng.random() < 0.5
        path.write_bytes(mutated(texts[name], rng) if whole else changed(FILES[name][0], rng))
        flags = FILES[name][1] if rng.random() < 0.8 else ["--turns", "all"]
        out = tmp_path / "o.jsonl"
        code = data.main(["convert", str(path), "--out", str(out), *flags])
        said = capsys.readouterr().err.splitlines()
        counts[code > 0] += 1
        if code:
            assert code == 2 and len(said) == 1 and said[0].startswith("error: "), (number, said)
            assert not out.exists()
        else:
            assert all(text.endswith("train learns from them") for text in said), (number, said)
            if any(line.get("label") is not False for line in lines_of(out)):
                assert len(data.load_posts(out))
            out.unlink()
        if number % 4 == 0:
            data.main(["check", str(path), "--show", "0"])       # nor does this raise
        capsys.readouterr()
    assert min(counts) > 100 and not list(tmp_path.glob("*.partial"))


def test_a_file_that_ends_early_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(gzip.compress(json.dumps([{"prompt": f"Say {i} {random.random()}",
                                                "completion": "b"}
                                               for i in range(9)]).encode())[:-40])
    args = data.parser().parse_args(["convert", str(path), "--out", str(tmp_path / "o")])
    with pytest.raises(InputError, match="is it whole"):
        args.run(args)


# ---- docs/DATA.md --------------------------------------------------------------------------------

DOCS = (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8")


def test_the_script_of_the_notes_makes_posts_with_replies_by_style(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, = [block for block in re.findall(r"```python\n(.*?)```", DOCS, re.S)
               if "styles" in block]
    styles = ("professional", "friendly", "witty", "caring", "enthusiastic")
    for style in styles:
        rows = [("I am sad", f"{style} 1"), ("I am so sad", f"{style} 1"), ("Hi", f"{style} 2")]
        rows += [("Only here", "x")] * (style == "witty")
        text = "Question\tAnswer\tSource\n" + "".join(f"{q}\t{a}\ts\n" for q, a in rows)
        (tmp_path / f"{style}.tsv").write_text(text)
    exec(script, {})
    posts = data.load_posts(tmp_path / "personality_chat.jsonl")
    assert [(p.post, p.intent) for p in posts] == [("I am sad", "00"), ("I am so sad", "00"),
                                                   ("Hi", "01")]
    assert posts[2].styles == styles and data.make_domain("auto", posts).name == "voices"


def test_the_formats_of_the_notes_are_those_there_are():
    rows = re.findall(r"^\| (`\S+`(?:, `\S+`)?) \| ", DOCS, re.M)
    named = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    assert set(FORMATS) <= named
    parser = data.parser()
    block, = [block for block in re.findall(r"```\n(.*?)```", DOCS, re.S) if "convert" in block]
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        assert parser.parse_args(words[2:]).command == "convert"


def test_picks_are_given_as_they_are(tmp_path, model, capsys):
    path = tmp_path / "picks.jsonl"
    picks = [kept_pick(f"Post {i % 3}", [f"Draft {i}", "Other"], 0, "runs/a", "replies")
             for i in range(4)]
    path.write_text("".join(json.dumps(pick) + "\n" for pick in picks))
    assert data.main(["check", str(path), "--show", "0"]) == 0
    assert "4 lines, 3 posts, 4 replies" in capsys.readouterr().out
    assert sft(model, path, tmp_path / "sft") == 0
    assert rewards.main(["train", "--model", model, "--data", str(path), "--out",
                         str(tmp_path / "r"), "--steps", "2", "--batch", "2", "--rank", "2"]) == 0


def test_rows_with_bytes_of_another_encoding_are_counted(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_bytes("question,answer\nCaf\u00e9?,Yes\nTea?,No\n".encode("latin-1"))
    assert converted(tmp_path, path) == [{"prompt": "Tea?", "completion": "No"}]
    assert "1 x bytes that are not UTF-8: save the file as UTF-8" in capsys.readouterr().out
