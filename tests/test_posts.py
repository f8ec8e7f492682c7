"""Data files as people have them: public formats, equal posts, fields that stand twice, and messages for files that
are something else."""

import gzip
import json

import pytest

import data
import people
import rewards
from data import InputError


def write(path, *rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def refused(capsys, *arguments):
    """What `data.py check` says of a file that it refuses."""
    assert data.main(["check", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


# ---- Formats of a line ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("reply", ["completion", "response", "chosen", "reply"])
def test_the_reply_to_a_prompt_is_read_and_survives_a_split(tmp_path, capsys, reply):
    """Only the prompt was read: check said 0 replies, and split wrote files without them."""
    more = {"rejected": "no"} if reply == "chosen" else {}
    path = write(tmp_path / "a.jsonl", *({"prompt": f"Say {w}.", reply: f" {w}!"} | more for w in ("one", "two", "six")))
    posts = data.load_posts(path)
    assert [(p.post, p.replies) for p in posts] == [("Say one.", ("one!",)), ("Say two.", ("two!",)), ("Say six.", ("six!",))]
    domain = data.load_domain(path, "auto", posts)
    assert domain.messages(posts[0]) == [{"role": "user", "content": "Say one."}]  # not as a post to be replied to
    assert data.main(["split", "--data", str(path), "--sizes", "sft=3", "--out", str(tmp_path / "s")]) == 0
    assert ("rewards.py train" in capsys.readouterr().out) == (reply == "chosen")
    kept = data.load_posts(tmp_path / "s" / "sft.jsonl")
    assert sorted(p.replies for p in kept) == [("one!",), ("six!",), ("two!",)]
    assert data.load_domain(tmp_path / "s" / "sft.jsonl", "auto", kept).name == domain.name == "stories"


def test_sft_learns_from_prompts_and_completions_and_refuses_a_prompt_alone(tmp_path, capsys):
    """Prompts were taken for posts without replies as such."""
    import polylora
    base = write(tmp_path / "base.jsonl", *({"post": f"hello {i}", "replies": {"a": f"hi {i}", "b": "yo"}} for i in range(20)))
    assert polylora.main(["base", "--data", str(base), "--out", str(tmp_path / "base"), "--steps", "1", "--batch", "4",
                          "--hidden", "16", "--layers", "1", "--heads", "2", "--vocab", "300"]) == 0
    model = str(tmp_path / "base" / "model")
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}"} for i in range(4)]
    flags = ["--steps", "1", "--batch", "2", "--lambda", "0", "--model", model, "--out"]
    assert polylora.main(["sft", "--data", str(write(tmp_path / "a.jsonl", *rows)), *flags, str(tmp_path / "a")]) == 0
    assert polylora.main(["sft", "--data", str(write(tmp_path / "b.jsonl", *rows, {"prompt": "Say 9."})), *flags, str(tmp_path / "b")]) == 2
    assert "has no reply to learn from" in capsys.readouterr().err


@pytest.mark.parametrize("row, named", [
    ({"prompt": "Say it.", "output": "it"}, '"output"'), ({"prompt": "Say it.", "rejected": "no"}, '"rejected"'),
    ({"prompt": "Say it.", "answer": "it"}, '"answer"'), ({"prompt": "Say it.", "text": "it"}, '"text"'),
    ({"prompt": "Add.", "code": "a + b"}, '"code"'),
    ({"prompt": "Say it.", "completion": "no", "label": False}, '"label"'),
    ({"prompt": "Say it.", "completion": "a", "response": "b"}, '"completion", "response"'),
    ({"post": "Say it.", "reply": "a", "replies": ["b"]}, '"replies", "reply"'),
    ({"prompt": [{"role": "user", "content": "Say it."}], "completion": "a"}, 'chat messages'),
    ({"prompt": "Say it.", "chosen": [{"role": "assistant", "content": "a"}]}, 'chat messages'),
    ({"messages": [{"role": "user", "content": "Hi"}]}, "chat messages"),
    ({"conversations": [{"from": "human", "value": "Hi"}]}, "ShareGPT"),
    ({"instruction": "Say it.", "input": "", "output": "it"}, "Alpaca"),
    ({"chosen": "a", "rejected": "b"}, "without a prompt"), ({"question": "a", "answer": "b"}, "questions and answers"),
    ({"headline": "a", "comment": "b"}, '"headline", "comment"')])
def test_a_line_whose_fields_would_be_lost_is_refused_and_they_are_named(tmp_path, capsys, row, named):
    said = refused(capsys, write(tmp_path / "a.jsonl", row))
    assert "a.jsonl, line 1: " in said and named in said


def test_fields_that_are_not_read_are_named(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", {"post": "One", "reply": "r", "lang": "en"}, {"post": "Two", "reply": "s", "votes": 3})
    assert data.main(["check", str(path), "--show", "0"]) == 0
    assert 'Fields that are not read: "lang", "votes"' in capsys.readouterr().out


def test_both_published_forms_of_mbpp_are_read(tmp_path):
    """The sanitized form says prompt for text, and has imports of its own: it was refused."""
    row = {"source_file": "x", "task_id": 7, "prompt": "Double it.", "code": "def aid(x):\n    return x\ndef twice(x):\n    return 2 * aid(x)",
           "test_imports": ["import math"], "test_list": ["assert twice(2) == 4", "assert math.isclose(twice(.5), 1)"]}
    full = {name: x for name, x in row.items() if name not in ("prompt", "test_imports")}
    for line, setup in ((row, "import math"), (full | {"text": "Double it.", "test_setup_code": "import math"}, "import math")):
        post, = data.load_posts(write(tmp_path / "a.jsonl", line))
        tests = json.loads(post.tests)
        assert tests["setup"] == setup and tests["names"][0] == "twice" and post.post.startswith("Double it.")
        assert data.make_domain("auto", [post]).name == "code"


@pytest.mark.parametrize("line", [
    '{"post": "One", "reply": "a", "reply": "b"}', '{"post": "One", "post": "Two", "reply": "b"}',
    '{"post": "One", "replies": {"warm": "a", "warm": "b"}}', '{"prompt": "One", "chosen": "a", "rejected": "b", "chosen": "c"}'])
def test_a_field_that_stands_twice_is_refused_because_one_would_be_lost(tmp_path, capsys, line):
    """Python's reader keeps the last without a word, in a mapping of replies too."""
    path = write(tmp_path / "a.jsonl", {"post": "Zero", "reply": "z"}, line)
    assert "line 2: the field" in (said := refused(capsys, path)) and "stands twice" in said
    with pytest.raises(InputError, match="stands twice"):
        rewards.load_preferences(path)
    assert [p.post for p in data.load_posts(path, skip_bad_lines=True)] == ["Zero"]


# ---- Preferences ---------------------------------------------------------------------------------------------

def test_reward_models_learn_from_chosen_and_rejected_replies(tmp_path):
    """Such lines were posts without replies, and training ended in an IndexError."""
    rows = [{"prompt": "Say it.", "chosen": "it", "rejected": "no"}, {"prompt": "Say it.", "chosen": "It is.", "rejected": "never"},
            {"post": "Hi", "chosen": "Hello!", "rejected": "hello"}]
    found = rewards.load_preferences(write(tmp_path / "a.jsonl", *rows))
    assert [(p.post.replies, p.likes) for p in found] == [
        (("it", "no"), [1.0, 0.0]), (("It is.", "never"), [1.0, 0.0]), (("Hello!",), [1.0])]
    kind, kept = rewards.usable(found, "auto", "a.jsonl")
    assert kind == "likes" and kept == found[:2]
    for index in range(2):
        assert rewards.draw_pair(kept, rewards.Visit(index, 0), kind, rewards.random.Random(0)) == kept[index].post.replies


def test_reward_models_learn_from_labelled_completions(tmp_path):
    rows = [{"prompt": "Say it.", "completion": "it", "label": True}, {"prompt": "say it", "completion": "no", "label": False}]
    found, = rewards.load_preferences(write(tmp_path / "a.jsonl", *rows))
    assert (found.post.replies, found.likes) == (("it", "no"), [1.0, 0.0])


def test_prompts_without_replies_are_no_preferences(tmp_path):
    with pytest.raises(InputError, match="line 1: a prompt without a reply"):
        rewards.load_preferences(write(tmp_path / "a.jsonl", {"prompt": "Say it."}, {"prompt": "Say that."}))


# ---- When two posts are one ----------------------------------------------------------------------------------

ONE = [("My bus is late", "my bus is LATE!"), ("Same  post.", "same\npost"), ("It\u2019s late", "It's late"), ("Wow !", "wow"),
       ("Caf\u00e9", "CAFE\u0301"), ("What now ?!", "What now?"), ("...and then", "And then"), ("\uff21\uff22", "AB"),
       ("soft\u00adly", "softly"), ("One, two; three: four", "one two three four"), ("\u4eca\u5929\u3002", "\u4eca\u5929"),
       ("Post 3!", "post 3"), ("\u00bfD\u00f3nde?", "D\u00f3nde?"), ("so \u2014 yes", "So - yes")]
TWO = [("I like C++", "I like C"), ("I like C#", "I like C"), ("It costs 5.5", "It costs 55"), ("It is -5", "It is 5"),
       ("late :(", "late :)"), ("x < y", "x > y"), ("f(x)", "f[x]"), ("we're here", "were here"), ("a hot dog", "a hotdog"),
       ("2+2", "22"), ("$5 more", "5 more"), ("5% more", "5 more"), ("ok \U0001f44d", "ok \U0001f44e"), ("x\u00b2", "x2"),
       ("You did it?", "You did it."), ("is 5! large", "is 5 large"), ("#1 fan", "1 fan"), ("and/or", "andor"), ("at 1:30", "at 130"),
       ("I <3 it", "I 3 it"), ("10 - 4", "10 + 4"), ("\u0915\u093f", "\u0915\u0940"), ("r\u00e9sum\u00e9", "resume"),
       ("```\na = 1\n```", "```\nA = 1\n```"), ("```\nif a:\n  b\nc\n```", "```\nif a:\n  b\n  c\n```")]


@pytest.mark.parametrize("a, b", ONE)
def test_posts_that_read_the_same_are_one(tmp_path, a, b):
    posts = data.load_posts(write(tmp_path / "a.jsonl", {"post": a, "reply": "x"}, {"post": b, "reply": "y"}))
    assert [p.replies for p in posts] == [("x", "y")]


@pytest.mark.parametrize("a, b", TWO)
def test_posts_that_differ_in_a_sign_with_a_meaning_are_two(tmp_path, a, b):
    """Letters, marks and digits alone were compared, so that the second was lost, or its replies joined the first's."""
    posts = data.load_posts(write(tmp_path / "a.jsonl", {"post": a, "reply": "x"}, {"post": b, "reply": "y"}))
    assert [(p.post, p.replies) for p in posts] == [(a, ("x",)), (b, ("y",))]
    assert sorted(map(len, data.split_posts(list(posts), [1, 1], 0))) == [1, 1]


def task(prompt, answer, test):
    return {"entry_point": "f", "prompt": prompt, "canonical_solution": answer, "test": test}


def test_tasks_of_code_that_differ_in_brackets_or_letter_case_are_two(tmp_path):
    """HumanEval/61 was dropped as equal to /56; with equal keys they would share random numbers and verdicts."""
    rows = [task(f'def f(s):\n    """Count each {c}."""\n', f"    return s.count({c!r})\n", f"def check(c):\n    assert c({c!r}) == 1\n")
            for c in "<([aA"]
    posts = data.load_posts(write(tmp_path / "a.jsonl", *rows))
    assert len(posts) == 5 and posts.dropped == 0 and len({p.key for p in posts}) == 5


def test_merged_lines_are_counted_and_the_first_is_named(tmp_path, capsys):
    rows = [{"post": "Other", "reply": "p"}, {"post": "Late again", "reply": "a"}, {"post": "late again!", "reply": "b"},
            {"post": "Late again", "reply": "c"}]
    path = write(tmp_path / "a.jsonl", *rows)
    assert data.main(["check", str(path), "--show", "0"]) == 0
    assert data.main(["split", "--data", str(path), "--sizes", "a=2", "--out", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().out
    assert said.count("2 lines merged with an earlier line of the same post (first: line 3 with line 2)") == 2


# ---- Files that are something else ---------------------------------------------------------------------------

ROWS = [{"post": f"p{i}", "reply": "r"} for i in range(3)]
OTHER = {
    "array.json": (json.dumps(ROWS).encode(), "JSON array"), "indented.json": (json.dumps(ROWS, indent=2).encode(), "JSON array"),
    "objects.json": ("\n".join(json.dumps(row, indent=1) for row in ROWS).encode(), "over several lines"),
    "object.json": (json.dumps({"data": ROWS}, indent=1).encode(), "over several lines"),
    "posts.csv": (b"post,reply\nhello there,yes\n", "CSV"), "tabs.tsv": (b"id\tpost\treply\n1\ta\tb\n", "TSV"),
    "semicolons.csv": (b"\xef\xbb\xbfpost;reply\na;b\n", "CSV"), "posts.parquet": (b"PAR1" + bytes(range(256)), "Parquet"),
    "posts.xlsx": (b"PK\x03\x04" + bytes(99), "Excel"), "packed.jsonl": (gzip.compress(b"{}"), "ends in .gz"),
    "plain.jsonl.gz": (b'{"post": "a", "reply": "b"}\n', "does not end in .gz"), "page.jsonl": (b"<!DOCTYPE html>\n<html>", "web page"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "wide.jsonl": ('{"post": "a"}'.encode("utf-16"), "UTF-16"), "empty.jsonl": (b"\n", "it is empty")}


@pytest.mark.parametrize("name", OTHER)
def test_a_file_of_another_format_is_called_by_its_name(tmp_path, capsys, name):
    """"line 1: not JSON (--skip-bad-lines leaves such lines out)" was said of valid JSON, and of every table: the
    advice would have left out the whole file."""
    content, wanted = OTHER[name]
    (tmp_path / name).write_bytes(content)
    said = refused(capsys, tmp_path / name)
    assert wanted in said and "skip-bad-lines" not in said
    assert wanted in refused(capsys, tmp_path / name, "--skip-bad-lines")
    with pytest.raises(InputError) as e:
        rewards.usable(rewards.load_preferences(tmp_path / name), "auto", tmp_path / name)
    assert wanted in str(e.value) or name == "empty.jsonl"


@pytest.mark.parametrize("name", ["array.json", "indented.json", "posts.csv", "semicolons.csv"])
def test_the_command_that_a_message_gives_makes_the_file(tmp_path, capsys, monkeypatch, name):
    import subprocess
    import sys
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(OTHER[name][0])
    said = refused(capsys, name)
    command = said[said.index("python -c"):said.index("posts.jsonl") + len("posts.jsonl")]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    assert len(data.load_posts("posts.jsonl")) == (3 if "json" in name else 1)


def test_a_folder_in_place_of_a_file_is_called_a_folder(tmp_path, capsys):
    assert "is a folder" in refused(capsys, tmp_path)


def test_the_domain_of_code_needs_tasks_and_says_so(tmp_path, capsys):
    assert "needs posts that all have tests" in refused(capsys, write(tmp_path / "a.jsonl", *ROWS), "--domain", "code")


def test_a_bad_line_from_a_pipe_is_named(tmp_path, capsys):
    """A pipe cannot be opened again to see what its file is: that would wait for ever."""
    import os
    import threading
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("[1, 2]\n"))
    writer.start()
    assert "line 1: not a JSON object" in refused(capsys, tmp_path / "pipe")
    writer.join()


def test_when_every_line_is_bad_the_reason_is_said(tmp_path, capsys):
    """"holds no posts" of a file whose every line lacks one field."""
    path = write(tmp_path / "a.jsonl", {"headline": "a"}, {"headline": "b"})
    said = refused(capsys, path, "--skip-bad-lines")
    assert "every line is bad" in said and '"headline"' in said


def test_a_line_that_is_no_json_says_where(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", {"post": "a", "reply": "b"}, '{"post": "a" "reply": "b"}')
    assert "line 2: not JSON (Expecting ',' delimiter, character 14)" in refused(capsys, path)


# ---- Sheets of picks -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, wanted", [
    (None, "there is no file"), ("folder", "is a folder"), (b"PK\x03\x04\x00", "save it as CSV UTF-8"),
    ("it\u00e9m".encode("cp1252"), "save it as CSV UTF-8"), (b'{"post": "a", "pick": 0}\n', "rewards.py train"),
    (b"item,set,pick\n1,A," + b"x" * 200_000 + b"\n", "field larger"), (b"a,b\n1,2\n", "no column 'item'")])
def test_a_sheet_of_picks_that_is_none_says_what_it_is(tmp_path, content, wanted):
    """A missing file was to be saved as CSV UTF-8; a long cell was a traceback."""
    path = tmp_path / "picks.csv"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=wanted) as e:
        people.read_picks(path, {"items": {}})
    assert ("save it as CSV" in str(e.value)) == ("save it" in wanted)
