"""Tests of support/posts.py."""

import gzip
import json
import random
import shlex

import numpy as np
import pytest

import data
import polylora
import trainer
from helpers import GOOD, SHARED, write as data_write
from methods import reward_model
from report import people
from support.files import InputError
from support import posts as support_posts
from support.posts import Post


def test_all_layouts_of_a_line_are_read_and_extra_fields_left_alone(tmp_path):
    rows = [GOOD, {"id": 2, "post": "Two", "replies": {"warm": "w", "blunt": "b"}, "intent": "x",
                   "likes": [1]},
            {"post": "Three", "reply": "r"},
            {"tweet_id": 9, "tweet": "Four", "reply": "t", "reply_likes": 3}]
    posts = data.load_posts(data_write(tmp_path / "a.jsonl", *rows))
    assert [p.post for p in posts] == ["Rain again.", "Two", "Three", "Four"]
    assert posts[0].replies == ("Bring an umbrella.", "Stay in!") and posts[0].styles == ()
    assert (posts[1].styles == ("warm", "blunt") and posts[1].replies == ("w", "b")
            and posts[1].intent == "x")
    assert posts[3].id == "9" and posts[3].replies == ("t",)
    support_posts.save_posts(posts, tmp_path / "b.jsonl")
    assert data.load_posts(tmp_path / "b.jsonl") == posts


def test_a_byte_order_mark_and_null_fields_are_read_over(tmp_path):
    path = data_write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
                      {"post": None, "tweet": "Two", "replies": None, "reply": "r"})
    assert [(p.post, len(p.replies)) for p in data.load_posts(path)] == [("Rain again.", 2),
                                                                         ("Two", 1)]


def test_gzip_is_read_and_lines_of_one_post_merge(tmp_path):
    rows = [{"tweet": "My bus is late", "reply": "one"},
            {"tweet": "my bus is LATE!", "reply": "two"}, {"tweet": "Other", "reply": "x"}]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as f:
        f.write("\n".join(map(json.dumps, rows)))
    posts = data.load_posts(tmp_path / "a.jsonl.gz")
    assert [(p.post, p.replies) for p in posts] == [("My bus is late", ("one", "two")),
                                                    ("Other", ("x",))]


def test_lines_made_useless_by_a_styled_post_are_counted(tmp_path, capsys):
    """Of a post with replies by style the first line counts; the others vanished without a word."""
    rows = [{"post": "Hi", "replies": {"a": "one", "b": "two"}},
            {"post": "hi!", "replies": {"a": "three", "b": "four"}},
            {"post": "Yo", "reply": "x"}, {"post": "yo", "replies": {"a": "y", "b": "z"}},
            {"post": "Ho", "reply": "p"},
            {"post": "ho", "reply": "q"}]
    path = data_write(tmp_path / "posts.jsonl", *rows)
    posts = data.load_posts(path)
    assert [p.replies for p in posts] == [("one", "two"), ("x",), ("p", "q")] and posts.dropped == 2
    assert data.main(["split", "--data", str(path), "--sizes", "a=3", "--domain", "replies",
                      "--out", str(tmp_path / "s")]) == 0
    assert data.main(["check", str(path), "--domain", "replies"]) == 0
    assert capsys.readouterr().out.count(
        "2 lines left out: their post stands in an earlier line") == 2


BAD = {"not JSON": b"{'a': 1}", "not UTF-8": b'{"post": "\xff", "reply": "x"}',
       "not a JSON object": b"[1]", '"post"': {"reply": "x"},
       '"replies"': {"post": "x"}, "a reply is not a text": {"post": "x", "replies": ["fine", 3]},
       "is empty": {"post": "x", "reply": "  "},
       "no letter": {"post": "?!", "reply": "x"}, "more than": {"post": "x" * 30_000, "reply": "x"},
       "no \"post\"": {"post": 7, "reply": "x"},
       "no \"replies\"": {"post": "x", "replies": []},
       "in a style has no letter": {"post": "x", "replies": {"warm": "!!", "blunt": "no"}},
       "half a character": b'{"post": "x \\ud83d", "reply": "y"}',
       "not JSON ": b'{"post": "x", "reply": "y", "n": ' + b"9" * 5000 + b"}"}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_line_stops_with_file_line_and_reason_or_is_skipped_and_counted(tmp_path, reason,
                                                                              capsys):
    path = data_write(tmp_path / "posts.jsonl", GOOD, BAD[reason], GOOD | {"post": "Sun."})
    with pytest.raises(InputError) as e:
        data.load_posts(path)
    assert ("posts.jsonl, line 2" in str(e.value) and reason in str(e.value)
            and "\n" not in str(e.value))
    assert len(data.load_posts(path, skip_bad_lines=True)) == 2
    assert "1 bad lines left out (first: line 2)" in capsys.readouterr().err


def test_missing_empty_and_truncated_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no file"):
        data.load_posts(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="holds no posts"):
        data.load_posts(data_write(tmp_path / "empty.jsonl", b""))
    whole = gzip.compress(b"".join(json.dumps(GOOD | {"post": str(i)}).encode() + b"\n"
                                   for i in range(5000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="is it whole"):
        data.load_posts(tmp_path / "cut.jsonl.gz")


@pytest.mark.skipif(not (SHARED / "data" / "personality_chat.jsonl.gz").exists(),
                    reason="PersonalityChat is not beside the repository")
def test_personality_chat_loads():
    posts = data.load_posts(SHARED / "data" / "personality_chat.jsonl.gz")
    domain = data.make_domain("auto", posts)
    # 9 differ in punctuation alone
    assert 7900 < len(posts) <= 7937 and domain.name == "voices" and len(domain.styles) == 5
    assert all(domain.styles_of(p, p.replies[0])[0] == "professional" for p in posts[:200])


# ---- Readers and writers, fixed at the split -----------------------------------------------------

def test_ids_may_clash_because_seeds_depend_on_the_post(tmp_path):
    """`"id": null` named every post 'None', and files joined into one repeat theirs: all posts then
    shared a random stream and a reader."""
    rows = [{"id": None, "post": f"p {i}", "reply": "r"} for i in range(3)]
    rows += [{"id": "a", "post": f"q {i}", "reply": "r"} for i in range(3)]
    rows += [{"id": "a-2", "post": "taken", "reply": "r"},
             {"tweet_id": 7, "id": None, "post": "t", "reply": "r"}]
    posts = data.load_posts(data_write(tmp_path / "a.jsonl", *rows))
    names = [p.id for p in posts]
    assert names[:4] == ["line-1", "line-2", "line-3", "a"] and names[6:] == ["a-2", "7"]
    assert len(set(names)) == len(posts) == 8
    assert len({p.key for p in posts}) == 8
    assert Post("x", "Same post!", ()).key == Post("y", "same  post", ()).key


def test_texts_are_compared_by_characters_not_by_their_encoding(tmp_path):
    """Decomposed and composed letters are the same; Hindi and Thai words that differ in their marks
    are not."""
    assert support_posts.normalise("Caf\u00e9") == support_posts.normalise(
        "cafe\u0301") != support_posts.normalise("cafe")
    # ki, kee
    assert support_posts.normalise("\u0915\u093f") != support_posts.normalise("\u0915\u0940")
    assert support_posts.normalise("\u0e44\u0e01\u0e48") != support_posts.normalise(
        "\u0e44\u0e01\u0e25")
    assert (support_posts.normalise("\uff21\uff22 1\u00b2") == "ab12"
            and support_posts.normalise("?! \u2014") == "")
    rows = [{"post": p, "reply": p} for p in ("\u0915\u093f", "\u0915\u0940", "Caf\u00e9",
                                              "cafe\u0301")]
    posts = data.load_posts(data_write(tmp_path / "a.jsonl", *rows))
    # marks merge no posts
    assert [p.post for p in posts] == ["\u0915\u093f", "\u0915\u0940", "Caf\u00e9"]


def test_replies_to_learn_from_lose_their_control_strings(tokenizer):
    """Broken by a zero-width space, as in a post, the space itself would be learnt and written."""
    reply = data.encode_reply(tokenizer, "a <|im_end|><think>b <|im<|im_end|>_end|> c")
    assert data.decode(tokenizer, reply) == "a b  c" and reply.count(
        tokenizer.token_to_id("<|im_end|>")) == 1
    chat = data.encode_chat(tokenizer, [{"role": "user", "content": "u<|im_end|>"},
                                        {"role": "assistant", "content": "x<|im_start|>y"}],
                            add_generation_prompt=False)
    assert chat.count(tokenizer.token_to_id("<|im_end|>")) == 2
    assert chat.count(tokenizer.token_to_id("<|im_start|>")) == 2


# ---- Large and hostile files ---------------------------------------------------------------------

def listed(path):
    """What load_posts gives, the plain way: every post of the file in a list."""
    posts, seen = {}, set()
    for number, line in enumerate((gzip.open if path.suffix == ".gz" else open)(path, "rb"), 1):
        if line.strip():
            support_posts.merge(posts, support_posts.parse_line(line, number, 20_000))
    posts = list(posts.values())
    given = {p.id for p in posts}
    for i, post in enumerate(posts):
        if post.id in seen:
            name = next(n for k in range(2, 99) if (n := f"{post.id}-{k}") not in given | seen)
            posts[i] = post = Post(name, post.post, post.replies, post.styles, post.intent)
        seen.add(post.id)
    return posts


@pytest.mark.parametrize("seed", range(12))
def test_posts_read_from_their_file_are_those_of_a_list(tmp_path, seed):
    """Order, merging, ids, domain and splits, of files with repeated posts and ids, blank lines
    and .gz."""
    rng, rows = random.Random(seed), []
    for i in range(60):
        row = {"post": rng.choice(("Pöst", "PÖST", "post")) + f" {rng.randrange(25)}"
               + rng.choice(("", "!?")), "intent": rng.choice("abcdefgh")}
        replies = [f"r{rng.randrange(4)}" for _ in range(rng.randrange(1, 4))]
        row["replies"] = (dict(zip("uvw", replies)) if seed % 3 == 0 and rng.random() < 0.9
                          else replies)
        row |= {"id": rng.choice(("x", "y", "x-2", 7, None,
                                  "line-3"))} if rng.random() < 0.7 else {}
        rows.append(b"" if rng.random() < 0.1 else row)
    path = data_write(tmp_path / "a.jsonl", *[r for r in rows if r] + [b"", b" "])
    if seed % 2:
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    posts, plain = data.load_posts(path), listed(path)
    assert (list(posts) == plain and posts[-1] == plain[-1] and posts[2:5] == plain[2:5]
            and len(posts) == len(plain))
    shuffled = list(plain)
    random.Random(f"split {seed}").shuffle(shuffled)
    for parts in (data.split_posts(posts, [4, 7], seed), data.split_posts(plain, [4, 7], seed)):
        assert [list(p) for p in parts] == [shuffled[:4], shuffled[4:11]]
    chosen = [[list(p) for p in data.split_by_intent(x, {"sft": 2, "eval": 2}, 1).values()]
              for x in (posts, plain)]
    assert chosen[0] == chosen[1]

    def domain(x):
        try:
            return data.make_domain("auto", x).record()
        except InputError as e:
            return str(e)
    assert domain(posts) == domain(plain)


@pytest.mark.slow
def test_of_a_million_posts_few_bytes_each_are_kept(tmp_path):
    """A list of posts took three bytes for each of the file's. And equal ids, separated by
    counting up from 2 each, took a minute for 20,000."""
    path = tmp_path / "a.jsonl"
    with open(path, "w") as f:
        for i in range(20_000):
            f.write(json.dumps({"id": "same", "post": f"post {i // 2} " + "word " * (i % 2),
                                "replies": ["r " * 50]}) + "\n")
    posts = data.load_posts(path)
    kept = [v for v in vars(posts).values() if isinstance(v, np.ndarray)]
    assert sum(v.nbytes for v in kept) <= 24 * len(posts) and all(v.base is None for v in kept)
    assert posts[19_999].id == "same-20000" and posts[0].id == "same"
    for _ in posts:
        assert len(posts.recent) <= 256
    path.write_text("\n" + path.read_text())
    with pytest.raises(InputError, match="was changed while it was in use"):
        list(posts)


def test_a_line_without_end_is_no_post(tmp_path, monkeypatch, capsys):
    """A packed megabyte is a line of a gigabyte, and lists within it take eight times as much."""
    monkeypatch.setattr(support_posts, "LONGEST_LINE", 5000)
    path = tmp_path / "a.jsonl.gz"
    rows = [json.dumps(GOOD).encode(), b"[" * 300_000, json.dumps(GOOD | {"post": "Sun"}).encode()]
    path.write_bytes(gzip.compress(b"\n".join(rows)))
    with pytest.raises(InputError, match="line 2: a line of more than 5,000 bytes"):
        data.load_posts(path)
    assert [p.post for p in data.load_posts(path, skip_bad_lines=True)] == ["Rain again.", "Sun"]


def test_the_ascii_shortcut_equals_full_normalisation():
    text = "".join(map(chr, range(128))) * 2
    assert support_posts.normalise(text) == support_posts.normalise(text + "\u2014")
    assert support_posts.normalise("It's 5 o'clock_ [OK]") == "its5oclockok"


def write(path, *rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n"
                   for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def refused(capsys, *arguments):
    """What `data.py check` says of a file that it refuses."""
    assert data.main(["check", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


# ---- Formats of a line ---------------------------------------------------------------------------

@pytest.mark.parametrize("reply", ["completion", "response", "chosen", "reply"])
def test_the_reply_to_a_prompt_is_read_and_survives_a_split(tmp_path, capsys, reply):
    """Only the prompt was read: check said 0 replies, and split wrote files without them."""
    more = {"rejected": "no"} if reply == "chosen" else {}
    path = write(tmp_path / "a.jsonl",
                 *({"prompt": f"Say {w}.", reply: f" {w}!"} | more for w in ("one", "two", "six")))
    posts = data.load_posts(path)
    assert [(p.post, p.replies) for p in posts] == [("Say one.", ("one!",)),
                                                    ("Say two.", ("two!",)),
                                                    ("Say six.", ("six!",))]
    domain = data.load_domain(path, "auto", posts)
    # not as a post to be replied to
    assert domain.messages(posts[0]) == [{"role": "user", "content": "Say one."}]
    assert data.main(["split", "--data", str(path), "--sizes", "sft=3",
                      "--out", str(tmp_path / "s")]) == 0
    assert ("rewards.py train" in capsys.readouterr().out) == (reply == "chosen")
    kept = data.load_posts(tmp_path / "s" / "sft.jsonl")
    assert sorted(p.replies for p in kept) == [("one!",), ("six!",), ("two!",)]
    assert data.load_domain(tmp_path / "s" / "sft.jsonl", "auto",
                            kept).name == domain.name == "stories"


def test_sft_learns_from_prompts_and_completions_and_refuses_a_prompt_alone(tmp_path, capsys):
    """Prompts were taken for posts without replies as such."""
    base = write(tmp_path / "base.jsonl",
                 *({"post": f"hello {i}", "replies": {"a": f"hi {i}", "b": "yo"}}
                   for i in range(20)))
    assert polylora.main(["base", "--data", str(base), "--out", str(tmp_path / "base"),
                          "--steps", "1", "--batch", "4",
                          "--hidden", "16", "--layers", "1", "--heads", "2", "--vocab", "300"]) == 0
    model = str(tmp_path / "base" / "model")
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}"} for i in range(4)]
    flags = ["--steps", "1", "--batch", "2", "--lambda", "0", "--model", model, "--out"]
    assert polylora.main(["sft", "--data", str(write(tmp_path / "a.jsonl", *rows)), *flags,
                          str(tmp_path / "a")]) == 0
    assert polylora.main(["sft",
                          "--data", str(write(tmp_path / "b.jsonl", *rows, {"prompt": "Say 9."})),
                          *flags, str(tmp_path / "b")]) == 2
    assert "has no reply to learn from" in capsys.readouterr().err


@pytest.mark.parametrize("row, named", [
    ({"prompt": "Say it.", "output": "it"}, '"output"'),
    ({"prompt": "Say it.", "rejected": "no"}, '"rejected"'),
    ({"prompt": "Say it.", "answer": "it"}, '"answer"'),
    ({"prompt": "Say it.", "text": "it"}, '"text"'),
    ({"prompt": "Add.", "code": "a + b"}, '"code"'),
    ({"prompt": "Say it.", "completion": "no", "label": False}, 'every "label" is false'),
    ({"prompt": "Say it.", "completion": "a", "response": "b"}, '"completion", "response"'),
    ({"post": "Say it.", "reply": "a", "replies": ["b"]}, '"replies", "reply"'),
    ({"prompt": [{"role": "user", "content": "Say it."}], "completion": "a"},
     '"prompt", "completion"'),
    ({"prompt": "Say it.", "chosen": [{"role": "assistant", "content": "a"}]},
     'a list of chat messages'),
    ({"messages": [{"role": "user", "content": "Hi"}]}, "chat messages"),
    ({"conversations": [{"from": "human", "value": "Hi"}]}, "ShareGPT"),
    ({"instruction": "Say it.", "input": "", "output": "it"}, "Alpaca"),
    ({"chosen": "a", "rejected": "b"}, "preferences"),
    ({"question": "a", "answer": "b"}, '"question", "answer"'),
    ({"headline": "a", "comment": "b"}, '"headline", "comment"')])
def test_a_line_whose_fields_would_be_lost_is_refused_and_they_are_named(tmp_path, capsys, row,
                                                                         named):
    path = write(tmp_path / "a.jsonl", row)
    said = refused(capsys, path)
    assert named in said and ("data.py convert" in said or "a.jsonl, line 1: " in said
                              or "holds no posts" in said)
    # a later line is named with its number
    write(path, {"prompt": "One", "completion": "two"}, row)
    if row.get("label") is not False:
        assert "a.jsonl, line 2: " in refused(capsys, path)


def test_fields_that_are_not_read_are_named(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", {"post": "One", "reply": "r", "lang": "en"},
                 {"post": "Two", "reply": "s", "votes": 3})
    assert data.main(["check", str(path), "--show", "0"]) == 0
    assert 'Fields that are not read: "lang", "votes"' in capsys.readouterr().out


def test_both_published_forms_of_mbpp_are_read(tmp_path):
    """The sanitized form says prompt for text, and has imports of its own: it was refused."""
    row = {"source_file": "x", "task_id": 7, "prompt": "Double it.",
           "code": "def aid(x):\n    return x\ndef twice(x):\n    return 2 * aid(x)",
           "test_imports": ["import math"],
           "test_list": ["assert twice(2) == 4", "assert math.isclose(twice(.5), 1)"]}
    full = {name: x for name, x in row.items() if name not in ("prompt", "test_imports")}
    for line, setup in ((row, "import math"),
                        (full | {"text": "Double it.", "test_setup_code": "import math"},
                         "import math")):
        post, = data.load_posts(write(tmp_path / "a.jsonl", line))
        tests = json.loads(post.tests)
        assert (tests["setup"] == setup and tests["names"][0] == "twice"
                and post.post.startswith("Double it."))
        assert data.make_domain("auto", [post]).name == "code"


@pytest.mark.parametrize("line", [
    '{"post": "One", "reply": "a", "reply": "b"}', '{"post": "One", "post": "Two", "reply": "b"}',
    '{"post": "One", "replies": {"warm": "a", "warm": "b"}}',
    '{"prompt": "One", "chosen": "a", "rejected": "b", "chosen": "c"}'])
def test_a_field_that_stands_twice_is_refused_because_one_would_be_lost(tmp_path, capsys, line):
    """Python's reader keeps the last without a word, in a mapping of replies too."""
    path = write(tmp_path / "a.jsonl", {"post": "Zero", "reply": "z"}, line)
    assert "line 2: the field" in (said := refused(capsys, path)) and "stands twice" in said
    with pytest.raises(InputError, match="stands twice"):
        reward_model.load_preferences(path)
    assert [p.post for p in data.load_posts(path, skip_bad_lines=True)] == ["Zero"]


# ---- Preferences ---------------------------------------------------------------------------------

def test_reward_models_learn_from_chosen_and_rejected_replies(tmp_path):
    """Such lines were posts without replies, and training ended in an IndexError."""
    rows = [{"prompt": "Say it.", "chosen": "it", "rejected": "no"},
            {"prompt": "Say it.", "chosen": "It is.", "rejected": "never"},
            {"post": "Hi", "chosen": "Hello!", "rejected": "hello"}]
    found = reward_model.load_preferences(write(tmp_path / "a.jsonl", *rows))
    assert [(p.post.replies, p.likes) for p in found] == [
        (("it", "no"), [1.0, 0.0]), (("It is.", "never"), [1.0, 0.0]), (("Hello!",), [1.0])]
    kind, kept = reward_model.usable(found, "auto", "a.jsonl")
    assert kind == "likes" and kept == found[:2]
    for index in range(2):
        assert reward_model.draw_pair(kept, trainer.Visit(index, 0), kind,
                                      reward_model.random.Random(0)) == kept[index].post.replies


def test_reward_models_learn_from_labelled_completions(tmp_path):
    rows = [{"prompt": "Say it.", "completion": "it", "label": True},
            {"prompt": "say it", "completion": "no", "label": False}]
    found, = reward_model.load_preferences(write(tmp_path / "a.jsonl", *rows))
    assert (found.post.replies, found.likes) == (("it", "no"), [1.0, 0.0])


def test_prompts_without_replies_are_no_preferences(tmp_path):
    with pytest.raises(InputError, match="line 1: a prompt without a reply"):
        reward_model.load_preferences(write(tmp_path / "a.jsonl", {"prompt": "Say it."},
                                            {"prompt": "Say that."}))


# ---- When two posts are one ----------------------------------------------------------------------

ONE = [("My bus is late", "my bus is LATE!"), ("Same  post.", "same\npost"),
       ("It\u2019s late", "It's late"), ("Wow !", "wow"),
       ("Caf\u00e9", "CAFE\u0301"), ("What now ?!", "What now?"), ("...and then", "And then"),
       ("\uff21\uff22", "AB"),
       ("soft\u00adly", "softly"), ("One, two; three: four", "one two three four"),
       ("\u4eca\u5929\u3002", "\u4eca\u5929"),
       ("Post 3!", "post 3"), ("\u00bfD\u00f3nde?", "D\u00f3nde?"), ("so \u2014 yes", "So - yes")]

TWO = [("I like C++", "I like C"), ("I like C#", "I like C"), ("It costs 5.5", "It costs 55"),
       ("It is -5", "It is 5"),
       ("late :(", "late :)"), ("x < y", "x > y"), ("f(x)", "f[x]"), ("we're here", "were here"),
       ("a hot dog", "a hotdog"),
       ("2+2", "22"), ("$5 more", "5 more"), ("5% more", "5 more"),
       ("ok \U0001f44d", "ok \U0001f44e"), ("x\u00b2", "x2"),
       ("You did it?", "You did it."), ("is 5! large", "is 5 large"), ("#1 fan", "1 fan"),
       ("and/or", "andor"), ("at 1:30", "at 130"),
       ("I <3 it", "I 3 it"), ("10 - 4", "10 + 4"), ("\u0915\u093f", "\u0915\u0940"),
       ("r\u00e9sum\u00e9", "resume"),
       ("```\na = 1\n```", "```\nA = 1\n```"),
       ("```\nif a:\n  b\nc\n```", "```\nif a:\n  b\n  c\n```")]


@pytest.mark.parametrize("a, b", ONE)
def test_posts_that_read_the_same_are_one(tmp_path, a, b):
    posts = data.load_posts(write(tmp_path / "a.jsonl", {"post": a, "reply": "x"},
                                  {"post": b, "reply": "y"}))
    assert [p.replies for p in posts] == [("x", "y")]


@pytest.mark.parametrize("a, b", TWO)
def test_posts_that_differ_in_a_sign_with_a_meaning_are_two(tmp_path, a, b):
    """Letters, marks and digits alone were compared, so that the second was lost, or its replies
    joined the first's."""
    posts = data.load_posts(write(tmp_path / "a.jsonl", {"post": a, "reply": "x"},
                                  {"post": b, "reply": "y"}))
    assert [(p.post, p.replies) for p in posts] == [(a, ("x",)), (b, ("y",))]
    assert sorted(map(len, data.split_posts(list(posts), [1, 1], 0))) == [1, 1]


def task(prompt, answer, test):
    return {"entry_point": "f", "prompt": prompt, "canonical_solution": answer, "test": test}


def test_tasks_of_code_that_differ_in_brackets_or_letter_case_are_two(tmp_path):
    """HumanEval/61 was dropped as equal to /56; with equal keys they would share random numbers
    and verdicts."""
    rows = [task(f'def f(s):\n    """Count each {c}."""\n', f"    return s.count({c!r})\n",
                 f"def check(c):\n    assert c({c!r}) == 1\n")
            for c in "<([aA"]
    posts = data.load_posts(write(tmp_path / "a.jsonl", *rows))
    assert len(posts) == 5 and posts.dropped == 0 and len({p.key for p in posts}) == 5


def test_merged_lines_are_counted_and_the_first_is_named(tmp_path, capsys):
    rows = [{"post": "Other", "reply": "p"}, {"post": "Late again", "reply": "a"},
            {"post": "late again!", "reply": "b"},
            {"post": "Late again", "reply": "c"}]
    path = write(tmp_path / "a.jsonl", *rows)
    assert data.main(["check", str(path), "--show", "0"]) == 0
    assert data.main(["split", "--data", str(path), "--sizes", "a=2",
                      "--out", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().out
    assert said.count("2 lines merged with an earlier line of the same post (first: line 3 with "
                      "line 2)") == 2


# ---- Files that are something else ---------------------------------------------------------------

ROWS = [{"post": f"p{i}", "reply": "r"} for i in range(3)]

OTHER = {
    "array.json": (json.dumps(ROWS).encode(), "JSON array"),
    "indented.json": (json.dumps(ROWS, indent=2).encode(), "JSON array"),
    "objects.json": ("\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
                     "over several lines"),
    "object.json": (json.dumps({"data": ROWS}, indent=1).encode(), 'a list "data"'),
    "posts.csv": (b"post,reply\nhello there,yes\n", "CSV"),
    "tabs.tsv": (b"id\tpost\treply\n1\ta\tb\n", "TSV"),
    "semicolons.csv": (b"\xef\xbb\xbfpost;reply\na;b\n", "CSV"),
    "posts.parquet": (b"PAR1" + bytes(range(256)), "Parquet"),
    "posts.xlsx": (b"PK\x03\x04" + bytes(99), "Excel"),
    "packed.jsonl": (gzip.compress(b"{}"), "ends in .gz"),
    "plain.jsonl.gz": (b'{"post": "a", "reply": "b"}\n', "does not end in .gz"),
    "page.jsonl": (b"<!DOCTYPE html>\n<html>", "web page"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                      "git lfs pull"),
    "wide.jsonl": ('{"post": "a"}'.encode("utf-16"), "UTF-16"),
    "empty.jsonl": (b"\n", "it is empty")}


@pytest.mark.parametrize("name", OTHER)
def test_a_file_of_another_format_is_called_by_its_name(tmp_path, capsys, name):
    """"line 1: not JSON (--skip-bad-lines leaves such lines out)" was said of valid JSON, and of
    every table: the advice would have left out the whole file."""
    content, wanted = OTHER[name]
    (tmp_path / name).write_bytes(content)
    said = refused(capsys, tmp_path / name)
    assert wanted in said and "skip-bad-lines" not in said
    assert wanted in refused(capsys, tmp_path / name, "--skip-bad-lines")
    with pytest.raises(InputError) as e:
        reward_model.usable(reward_model.load_preferences(tmp_path / name), "auto", tmp_path / name)
    assert wanted in str(e.value) or name == "empty.jsonl"


@pytest.mark.parametrize("name", ["array.json", "indented.json", "objects.json", "object.json",
                                  "posts.csv", "tabs.tsv", "semicolons.csv"])
def test_the_command_that_a_message_gives_makes_the_file(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(OTHER[name][0])
    said = refused(capsys, name)
    words = shlex.split(said[said.index("python "):])
    assert data.main(words[2:]) == 0
    assert len(data.load_posts(words[-1])) == (3 if "json" in name else 1)


def test_a_folder_in_place_of_a_file_is_called_a_folder(tmp_path, capsys):
    assert "is a folder" in refused(capsys, tmp_path)


def test_the_domain_of_code_needs_tasks_and_says_so(tmp_path, capsys):
    assert "needs posts that all have tests" in refused(capsys, write(tmp_path / "a.jsonl", *ROWS),
                                                        "--domain", "code")


def test_a_bad_line_from_a_pipe_is_named(tmp_path, capsys):
    """A pipe cannot be opened again to see what its file is: that would wait for ever."""
    import os
    import threading
    os.mkfifo(tmp_path / "pipe")
    author = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("[1, 2]\n"))
    author.start()
    assert "line 1: not a JSON object" in refused(capsys, tmp_path / "pipe")
    author.join()


def test_when_every_line_is_bad_the_reason_is_said(tmp_path, capsys):
    """"holds no posts" of a file whose every line lacks one field."""
    path = write(tmp_path / "a.jsonl", {"headline": "a"}, {"headline": "b"})
    said = refused(capsys, path, "--skip-bad-lines")
    assert "every line is bad" in said and '"headline"' in said


def test_a_line_that_is_no_json_says_where(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", {"post": "a", "reply": "b"}, '{"post": "a" "reply": "b"}')
    assert "line 2: not JSON (Expecting ',' delimiter, character 14)" in refused(capsys, path)


# ---- Sheets of picks -----------------------------------------------------------------------------

@pytest.mark.parametrize("content, wanted", [
    (None, "there is no file"), ("folder", "is a folder"),
    (b"PK\x03\x04\x00", "save it as CSV UTF-8"),
    ("it\u00e9m".encode("cp1252"), "save it as CSV UTF-8"),
    (b'{"post": "a", "pick": 0}\n', "rewards.py train"),
    (b"item,set,pick\n1,A," + b"x" * 200_000 + b"\n", "field larger"),
    (b"a,b\n1,2\n", "no column 'item'")])
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


# ---- Files with gaps -----------------------------------------------------------------------------

def test_no_intent_and_intent_null_are_the_same():
    """null was the intent "None": a scene of its own to split by, one cluster in an interval."""
    row = {"post": "Hi", "reply": "Yo"}
    intents = [support_posts.parse_line(json.dumps(row | more).encode(), 1, 99).intent
               for more in ({}, {"intent": None}, {"intent": 0})]
    assert intents == ["", "", "0"]
