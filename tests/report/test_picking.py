"""Tests of report/picking.py, report/pick_page.py and report/blind.py: the page for picks."""

import json
import math
import re
import tomllib
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import data
import evaluate
import polylora
import rewards
from helpers import HOSTILE, ROOT, refusal
from report import pick_page, picking
from serving import asked, lines_of, numbered, run_of, serving
from support.files import InputError, read_json


@pytest.fixture
def pair(tmp_path):
    return [run_of(tmp_path / f"run-{arm}", arm, numbered(text), posts=8)
            for arm, text in (("lora", "Anna"), ("poly", "Ben"))]


# ---- What is shown -------------------------------------------------------------------------------

def test_a_person_sees_the_drafts_of_all_runs_shuffled_and_without_names(pair, tmp_path):
    orders = set()
    with serving(asked(pair, tmp_path / "a.jsonl")) as client:
        for n in range(8):
            told = client.state()
            assert told["answered"] == n and told["total"] == 8
            assert "lora" not in json.dumps(told) and "poly" not in json.dumps(told)
            item = told["item"]
            texts = [draft["text"] for draft in item["drafts"]]
            i = item["post"][-1]
            assert sorted(texts) == sorted(numbered("Anna")(i) + numbered("Ben")(i))
            orders.add(tuple(text.startswith("Anna") for text in texts))
            assert client.pick(item["number"], n % 6)[0] == 200
        assert client.state() == {"total": 8, "answered": 8, "item": None, "undo": True}
    assert len(orders) > 4
    lines = lines_of(tmp_path / "a.jsonl")
    assert sorted(line["id"] for line in lines) == [f"p{i}" for i in range(8)]
    for n, line in enumerate(lines):
        assert line["pick"] == n % 6 and line["reply"] == line["drafts"][n % 6]
        for text, names in zip(line["drafts"], line["runs"]):
            assert names == ["lora" if text.startswith("Anna") else "poly"]
        assert (line["k"], line["domain"], line["intent"]) == (3, "replies",
                                                               f"about {int(line['id'][1]) // 2}")


def test_equal_drafts_are_shown_once_and_near_duplicates_are_marked(tmp_path):
    drafts = {"a": ["Sing a song", "Sing a song", "Sing a song!"], "b": ["Sing a song", " ", "No"]}
    runs = [run_of(tmp_path / arm, arm, lambda i, arm=arm: drafts[arm]) for arm in drafts]
    with serving(asked(runs, tmp_path / "p.jsonl")) as client:
        item = client.state()["item"]
        shown = {draft["text"]: draft for draft in item["drafts"]}
        assert sorted(shown) == ["", "No", "Sing a song", "Sing a song!"]
        assert [shown[t]["times"] for t in ("Sing a song", "Sing a song!", "No")] == [3, 1, 1]
        place = {draft["text"]: n for n, draft in enumerate(item["drafts"])}
        first, second = sorted((place["Sing a song"], place["Sing a song!"]))
        assert item["drafts"][second]["like"] == first and item["drafts"][first]["like"] is None
        status, told = client.pick(0, place[""])
        assert shown[""]["empty"] and status == 404 and "empty" in told["error"]
        assert client.pick(0, place["Sing a song"])[0] == 200
    [line] = lines_of(tmp_path / "p.jsonl")
    assert line["runs"][line["pick"]] == ["a", "b"]


def test_two_people_are_asked_the_same_and_more_posts_come_after_those_before(pair, tmp_path):
    def order(*more):
        items, count = picking.make_items(asked(pair, tmp_path / "x.jsonl", *more))
        return [item.line for item in items[:count]]
    assert order("--posts", "3") == order("--posts", "0")[:3]
    ids = [line["id"] for line in order("--posts", "0")]
    assert len(ids) == 8 and ids != sorted(ids)                    # "1 of 8" says nothing
    assert order() == order() != order("--seed", "2")


def test_what_a_file_of_posts_cannot_hold_is_cut_or_left_out(tmp_path, capsys):
    """A file that the page wrote is read by data.py, whatever a run's file held."""
    long = "a" * 30_000

    def drafts(i):
        return ["half \ud83d a sign", long, "line\nbreak \u202e back"]
    run = run_of(tmp_path / "a", "a", drafts)
    whole = read_json(Path(run) / "evaluation.json")
    whole["records"][0]["post"] = "..."
    whole["records"][1]["post"] = "half \ud83d"
    (Path(run) / "evaluation.json").write_text(json.dumps(whole))
    out = tmp_path / "p.jsonl"
    with serving(asked([run], out)) as client:
        assert "1 posts left out" in capsys.readouterr().out
        item = client.state()["item"]
        texts = sorted((draft["text"] for draft in item["drafts"]), key=len)
        assert texts == ["half ? a sign", "line\nbreak \ufffd back", long[:20_000]]
        for number in range(5):
            assert client.pick(number, number % 3)[0] == 200
    assert len(data.load_posts(out)) == 5


def test_prompts_stay_prompts(tmp_path):
    runs = [run_of(tmp_path / "a", "a", numbered("A"), domain="stories")]
    with serving(asked(runs, tmp_path / "p.jsonl")) as client:
        client.pick(0, 0)
    [post] = data.load_posts(tmp_path / "p.jsonl")
    assert post.prompt and data.make_domain("auto", [post]).name == "stories"


# ---- Who may ask ---------------------------------------------------------------------------------

def test_only_this_machine_and_only_who_knows_the_secret(pair, tmp_path):
    with serving(asked(pair, tmp_path / "p.jsonl")) as client:
        assert client.server.server_address[0] == "127.0.0.1"
        status, headers, page = client.ask("GET", "")
        assert status == 200 and page == (ROOT / "report" / "pick.html").read_bytes()
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer" and "Python" not in str(headers)
        for secret in ("x", client.server.secret[:-1], client.server.secret + "x", "%2e"):
            for method, path in (("GET", ""), ("GET", "state"), ("POST", "pick")):
                assert client.ask(method, path, secret=secret)[0] == 404
        # a name of another site that points here (DNS rebinding), an address of the network
        for host in ("evil.example", f"evil.example:{client.port}", f"192.168.1.2:{client.port}",
                     f"127.0.0.1.evil.example:{client.port}", "", None):
            assert client.ask("GET", "state", headers={"Host": host})[0] in (400, 403), host
            changed = {"Host": host, "Origin": f"http://{host}"}
            assert client.post("pick", {"item": 0, "pick": 0}, **changed)[0] in (400, 403)
        # forwarded from another port, as by ssh -L 9000:127.0.0.1:PORT
        assert client.ask("GET", "state", headers={"Host": "localhost:9000"})[0] == 200
        assert client.ask("GET", "../state")[0] == client.ask("GET", "state?x")[0] == 404
    assert len({pick_page.secrets.token_urlsafe(16) for _ in range(9)}) == 9
    assert lines_of(tmp_path / "p.jsonl") == []


def test_a_post_that_is_not_the_page_s_own_writes_nothing(pair, tmp_path):
    good = {"item": 0, "pick": 0}
    with serving(asked(pair, tmp_path / "p.jsonl")) as client:
        port = client.port
        wrong = {403: [dict(Origin=None), dict(Origin="null"), dict(Origin="http://evil.example"),
                       dict(Origin=f"https://127.0.0.1:{port}"),
                       dict(Origin=f"http://localhost:{port}"),
                       dict(Origin=f"http://127.0.0.1:{port + 1}")],
                 415: [dict(Content_Type="text/plain"), dict(Content_Type=None),
                       dict(Content_Type="application/x-www-form-urlencoded")],
                 411: [dict(Content_Length=None), dict(Content_Length="-1"),
                       dict(Content_Length="1e3"), dict(Content_Length="9" * 30),
                       dict(Transfer_Encoding="chunked")],
                 413: [dict(Content_Length="1001"), dict(Content_Length="999999999")]}
        for status, all_changes in wrong.items():
            for changes in all_changes:
                found, told = client.post("pick", good, **changes)
                assert found == status and told["error"].endswith("."), changes
        for body in (b"", b"{", b"[" * 900, b"[]", b"3", b"null", b"\xff", b"{}", b'{"item": 0}',
                     b'{"item": 0, "pick": 0, "reply": "mine"}'):
            assert client.post("pick", body)[0] == 400, body
        assert client.ask("GET", "pick")[0] == client.post("state", good)[0] == 404
        assert client.ask("PUT", "pick")[0] == 501
        assert lines_of(tmp_path / "p.jsonl") == []
        assert client.post("pick", good)[0] == 200
    assert len(lines_of(tmp_path / "p.jsonl")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("item, pick", [(-1, 0), (8, 0), ("0", 0), (True, 0), (0.0, 0), (None, 0),
                                        ([0], 0), (0, -1), (0, 6), (0, "1"), (0, True), (0, 1.0),
                                        (0, [1]), (0, {})])
def test_posts_and_drafts_that_there_are_not_are_refused(pair, tmp_path, item, pick):
    with serving(asked(pair, tmp_path / "p.jsonl")) as client:
        status, told = client.pick(item, pick)
        assert status == 404 and "no such" in told["error"]
    assert lines_of(tmp_path / "p.jsonl") == []


def test_hostile_drafts_reach_the_page_as_data_and_the_page_makes_text_of_them(tmp_path):
    run = run_of(tmp_path / "a", "a", lambda i: [HOSTILE, "</script><img src=x onerror=alert(1)>"])
    with serving(asked([run], tmp_path / "p.jsonl", "--k", "2")) as client:
        status, headers, found = client.ask("GET", "state")
        assert headers["Content-Type"] == "application/json"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert HOSTILE in [draft["text"] for draft in json.loads(found)["item"]["drafts"]]
    page = (ROOT / "report" / "pick.html").read_text(encoding="utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "//",
                 "src=", "url(", "@import"):
        assert word not in page, word
    assert not re.search(r"\son\w+\s*=", page) and re.findall("href=(\\S+)", page) == ['"data:,">']


# ---- The file ------------------------------------------------------------------------------------

def test_the_file_is_continued_where_the_person_stopped(pair, tmp_path):
    out = tmp_path / "new" / "p.jsonl"
    with serving(asked(pair, out, "--posts", "5")) as client:
        for number, pick in enumerate((2, None, 0)):
            assert client.pick(number, pick)[0] == 200
            assert [line["pick"] for line in lines_of(out)] == [2, None, 0][:number + 1]
        assert client.pick(1, 4)[0] == 409
    before = out.read_bytes()
    with serving(asked(pair, out, "--posts", "7")) as client:
        told = client.state()
        assert (told["answered"], told["total"], told["item"]["number"]) == (3, 7, 3)
        status, told = client.pick(2, 1)
        assert status == 409 and "already" in told["error"] and told["item"]["number"] == 3
        client.pick(3, 5)
    assert out.read_bytes().startswith(before)
    assert [line["pick"] for line in lines_of(out)] == [2, None, 0, 5]
    assert "reply" not in lines_of(out)[1]
    with serving(asked(pair, out, "--posts", "2")) as client:      # fewer than were answered
        told = client.state()
        assert told == {"total": 2, "answered": 2, "item": None, "undo": False}
        assert client.post("undo", {})[0] == 409
    assert len(lines_of(out)) == 4


def test_the_last_answer_can_be_taken_back(pair, tmp_path):
    out = tmp_path / "p.jsonl"
    with serving(asked(pair, out)) as client:
        assert client.post("undo", {})[0] == 409
        client.pick(0, 1)
        client.pick(1, 2)
        status, told = client.post("undo", {})
        assert status == 200 and told["item"]["number"] == 1 and len(lines_of(out)) == 1
        client.pick(1, None)
    with serving(asked(pair, out)) as client:
        assert client.post("undo", {}, Origin="http://evil.example")[0] == 403
        assert client.post("undo", {})[1]["item"]["number"] == 1
        told = client.post("undo", {})[1]
        assert told["item"]["number"] == 0 and not told["undo"] and lines_of(out) == []


def test_a_line_that_was_cut_off_is_asked_again(pair, tmp_path, capsys):
    out = tmp_path / "p.jsonl"
    with serving(asked(pair, out)) as client:
        client.pick(0, 1)
        client.pick(1, 2)
    whole = out.read_bytes()
    out.write_bytes(whole[:-1])              # as some editors save it: nothing is lost
    with serving(asked(pair, out)) as client:
        assert client.state()["answered"] == 2 and out.read_bytes() == whole
    for cut in (2, 30, len(whole.splitlines(keepends=True)[1]) - 7):
        out.write_bytes(whole[:-cut])
        capsys.readouterr()
        with serving(asked(pair, out)) as client:
            assert "last line is incomplete" in capsys.readouterr().out
            assert client.state()["item"]["number"] == 1 and len(lines_of(out)) == 1
            client.pick(1, 2)
        assert out.read_bytes() == whole


def test_a_file_of_something_else_is_not_touched(pair, tmp_path):
    out = tmp_path / "p.jsonl"
    with serving(asked(pair, out)) as client:
        client.pick(0, 1)
        client.pick(1, None)
    first, second = out.read_text(encoding="utf-8").splitlines(keepends=True)
    changed = json.loads(first) | {"pick": 7}
    for content in ("notes", "my notes\n", '{"post": "a", "drafts": ["b"], "pick": 0}\n',
                    first + first, first + second.replace("null", "true"), first + "[]\n",
                    json.dumps(changed) + "\n", first.replace('"k": 3', '"k": 4'),
                    first.replace('["lora"]', '["base"]', 1), first + "\n" + second,
                    first + '{"post": "mine"', first + '{"id": "p0", "post": "mine"}'):
        out.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match="another --out|is not readable JSON|hold a JSON"):
            pick_page.make_server(asked(pair, out))
        assert out.read_text(encoding="utf-8") == content
    out.write_text(first + second, encoding="utf-8")
    for more in (["--seed", "2"], ["--k", "2"]):
        with pytest.raises(InputError, match="another --out"):
            pick_page.make_server(asked(pair, out, *more))


def test_another_program_s_lines_stop_the_page_from_writing(pair, tmp_path):
    out = tmp_path / "p.jsonl"
    with serving(asked(pair, out)) as client, serving(asked(pair, out)) as other:
        assert client.pick(0, 1)[0] == 200
        status, told = other.pick(0, 2)
        assert status == 409 and "another program" in told["error"]
        assert other.post("undo", {})[0] == 409
        out.unlink()
        status, told = client.pick(1, 1)
        assert status == 500 and "cannot be written" in told["error"] and not out.exists()


def test_an_answer_that_does_not_fit_on_the_disk_leaves_no_half_line(pair, tmp_path, monkeypatch):
    out = tmp_path / "p.jsonl"
    whole = picking.write_whole

    def half(file, data):
        file.write(data[:len(data) // 2])
        raise OSError(28, "No space left on device")
    with serving(asked(pair, out)) as client:
        client.pick(0, 1)
        before = out.read_bytes()
        monkeypatch.setattr(picking, "write_whole", half)
        status, told = client.pick(1, 1)
        assert status == 500 and "No space left" in told["error"] and out.read_bytes() == before
        monkeypatch.setattr(picking, "write_whole", whole)
        assert client.pick(1, 1)[0] == 200
    assert [line["pick"] for line in lines_of(out)] == [1, 1]

    class Short:
        def write(self, data):
            return len(data) - 1
    with pytest.raises(OSError, match="space"):
        picking.write_whole(Short(), b"line")


@pytest.mark.slow
def test_concurrent_picks_do_not_interleave(tmp_path):
    """Lines of some 4,500 bytes, several at a time, and each post once."""
    run = run_of(tmp_path / "a", "a", lambda i: [f"{n} {i} " + "word " * 300 for n in range(3)],
                 posts=16)
    out = tmp_path / "p.jsonl"
    with serving(asked([run], out)) as client:
        with ThreadPoolExecutor(12) as pool:
            jobs = [(number, pick) for number in range(16) for pick in (0, 1, None)]
            statuses = list(pool.map(lambda job: client.pick(*job)[0], jobs))
    assert sorted(statuses) == [200] * 16 + [409] * 32
    lines = lines_of(out)
    assert len({line["id"] for line in lines}) == len(lines) == 16


# ---- The command ---------------------------------------------------------------------------------

def test_ctrl_c_says_what_was_saved_and_what_comes_next(pair, tmp_path, capsys, monkeypatch):
    out = tmp_path / "my picks.jsonl"
    opened = []

    def answer_two(server, poll_interval=0.5):
        server.answers.answer(0, 1)
        server.answers.answer(1, None)
        raise KeyboardInterrupt
    monkeypatch.setattr(pick_page.PickServer, "serve_forever", answer_two)
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    go = ["ask", *pair, "--serve", "--k", "3", "--posts", "4", "--out", str(out)]
    assert evaluate.main(go) == 0
    said = capsys.readouterr().out
    assert "holds 2 answers (picks: 1, none: 1); posts left: 2 (go on by the same" in said
    assert f"next: python evaluate.py picks '{out}'" in said and "rewards.py train --model" in said
    [address] = opened
    assert address.startswith("http://127.0.0.1:") and address in said
    assert len(lines_of(out)) == 2
    monkeypatch.setattr(pick_page.PickServer, "serve_forever", lambda server: 1 / 0)
    with pytest.raises(ZeroDivisionError):                         # no browser was asked
        evaluate.main([*go, "--no-browser"])
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(pick_page.sys, "platform", "linux")
    with pytest.raises(ZeroDivisionError):
        evaluate.main(go)
    assert len(opened) == 1


def test_flags_that_do_not_fit_are_named(pair, tmp_path, capsys):
    def said(*flags):
        return refusal(capsys, evaluate.main, "ask", *pair, "--k", "3", *flags)
    assert "--out" in said() and "--serve" in said()
    assert ".jsonl" in said("--serve", "--out", tmp_path / "p.csv")
    assert "--port 70000" in said("--serve", "--out", tmp_path / "p.jsonl", "--port", "70000")
    assert "--k 4" in said("--serve", "--out", tmp_path / "p.jsonl", "--k", "4")
    inside = tmp_path / "run-lora" / "config.json" / "p.jsonl"
    assert "cannot be written" in said("--serve", "--out", inside)
    with serving(asked(pair, tmp_path / "p.jsonl")) as client:
        assert f"--port {client.port} cannot be used" in said(
            "--serve", "--out", tmp_path / "q.jsonl", "--port", client.port)
    other = run_of(tmp_path / "other", "other", numbered("C"), posts=8, domain="stories")
    assert "domains replies, stories" in refusal(capsys, evaluate.main, "ask", pair[0], other,
                                                 "--serve", "--k", "3", "--out",
                                                 tmp_path / "q.jsonl")


def test_the_page_is_packaged():
    found = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = found["tool"]["setuptools"]["package-data"]["report"]
    assert any((ROOT / "report" / "pick.html") in (ROOT / "report").glob(p) for p in patterns)


# ---- Counting, and learning from the picks -------------------------------------------------------

def test_picks_of_the_page_are_counted(pair, tmp_path, capsys):
    """By hand: of 4 posts Anna's rater takes lora, lora, poly, none, Ben's lora, poly, poly, none.
    """
    wanted = {"anna": ["lora", "lora", "poly", None], "ben": ["lora", "poly", "poly", None]}
    files = []
    for name, runs in wanted.items():
        files.append(str(tmp_path / f"{name}.jsonl"))
        with serving(asked(pair, files[-1], "--posts", "4")) as client:
            for number, run in enumerate(runs):
                names = client.server.answers.items[number].line["runs"]
                assert client.pick(number, run and names.index([run]))[0] == 200
    assert evaluate.main(["picks", *files, "--out", str(tmp_path / "r")]) == 0
    result = read_json(tmp_path / "r.json")
    assert result["runs"]["lora"]["rate"] == pytest.approx((1 + 0.5) / 4)
    assert result["runs"]["poly"]["rate"] == pytest.approx((0.5 + 1) / 4)
    assert result["none_rate"]["rate"] == pytest.approx(1 / 4)
    assert result["chance"] == pytest.approx(3 / 8)
    assert (result["picks"], result["none"], result["raters"], result["k"]) == (6, 2, 2, 3)
    # agreed on 3 of 4 posts; of 8 answers 3 lora, 3 poly, 2 none
    chance = (9 + 9 + 4) / 64
    assert result["fleiss_kappa"] == pytest.approx((3 / 4 - chance) / (1 - chance))
    said = capsys.readouterr().out
    assert said == (tmp_path / "r.txt").read_text()
    assert "none of them" in said and "8 answers (picks: 6, none: 2) by 2 raters on 4 posts" in said


def test_a_draft_that_two_runs_wrote_counts_half_for_each(tmp_path):
    runs = [run_of(tmp_path / arm, arm, lambda i, arm=arm: ["Both", f"Only {arm}", "Both"])
            for arm in ("a", "b")]
    with serving(asked(runs, tmp_path / "p.jsonl")) as client:
        for number, text in enumerate(["Both", "Only a", "Both"]):
            drafts = client.state()["item"]["drafts"]
            client.pick(number, [draft["text"] for draft in drafts].index(text))
    assert evaluate.main(["picks", str(tmp_path / "p.jsonl")]) == 0
    result = read_json(tmp_path / "p.result.json")
    assert result["runs"]["a"]["rate"] == pytest.approx(2 / 3)
    assert result["runs"]["b"]["rate"] == pytest.approx(1 / 3)


def test_files_that_cannot_be_counted_are_named(pair, tmp_path, capsys):
    place = {}
    for k in (2, 3):
        place[k] = tmp_path / f"{k}.jsonl"
        with serving(asked(pair, place[k], "--k", str(k))) as client:
            client.pick(0, 1)
            client.pick(1, 0)
    line = place[3].read_text(encoding="utf-8").splitlines(keepends=True)[0]
    sheet = tmp_path / "s.csv"
    assert evaluate.main(["ask", *pair, "--k", "3", "--out", str(sheet)]) == 0

    def said(*files):
        return refusal(capsys, evaluate.main, "picks", *files)
    assert "3 drafts" in said(place[2], place[3]) and "count them apart" in said(place[3], sheet)
    for content, wanted in ((line + line, "earlier line"), (line, "fewer than 2 posts"),
                            ('{"post": "a", "drafts": ["b"], "pick": 0}\n', "rewards.py train"),
                            (line.replace('"pick": 1', '"pick": 6'), "no answer that"),
                            (line.replace('["lora"]', '[3]', 1), "no answer that"),
                            (line.replace('["lora"]', '[]', 1), "no answer that"),
                            (line + "{", "line 2 is not readable")):
        place[3].write_text(content, encoding="utf-8")
        assert wanted in said(place[3]), content


def test_answers_of_none_are_left_out_by_sft_and_reward_models(tmp_path, capsys):
    place = tmp_path / "p.jsonl"
    none = {"post": "One", "drafts": ["a", "b"], "pick": None}
    kept = {"post": "Two", "reply": "b", "drafts": ["a", "b"], "pick": 1}
    place.write_text("".join(json.dumps(line) + "\n" for line in (none, kept, none)))
    posts = data.load_posts(place)
    assert [post.post for post in posts] == ["Two"] and posts.unpicked == 2
    assert data.main(["check", str(place)]) == 0
    assert "2 lines left out: none of their drafts was picked" in capsys.readouterr().out
    from methods.reward_model import load_preferences
    assert [p.post.post for p in load_preferences(place)] == ["Two"]
    place.write_text(json.dumps(none) + "\n")
    with pytest.raises(InputError, match="none of its drafts was picked"):
        data.load_posts(place)


@pytest.mark.slow
def test_from_the_page_to_a_reward_model_and_to_sft(world, tmp_path):
    """The whole way: a run is measured, a person picks, reward model and SFT learn from the file.
    """
    few = ["--n", "10", "--max-new-tokens", "5", "--temperature", "1.5"]
    assert evaluate.main(["measure", world["lora"], "--data", world["eval"], *few]) == 0
    out = tmp_path / "picks.jsonl"
    with serving(asked([world["lora"]], out)) as client:
        for number in range(client.state()["total"]):
            drafts = client.state()["item"]["drafts"]
            texts = [n for n, draft in enumerate(drafts) if not draft["empty"]]
            pick = texts[-1] if texts and number != 1 else None
            assert client.pick(number, pick)[0] == 200
    learn = f"--model {world['model']} --data {out}"
    assert pick_page.next_commands(out, world["lora"]).count(learn) == 2
    picked = [line for line in lines_of(out) if line["pick"] is not None]
    assert len(picked) >= 3 and len(lines_of(out)) > len(picked)
    assert evaluate.main(["picks", str(out)]) == 0
    short = ["--data", str(out), "--steps", "2", "--batch", "2", "--rank", "2"]
    assert rewards.main(["train", "--model", world["model"], *short,
                         "--out", str(tmp_path / "reward")]) == 0
    assert polylora.main(["sft", "--model", world["model"], *short,
                          "--out", str(tmp_path / "sft")]) == 0
    # and further from the run that was picked from
    assert polylora.main(["sft", "--start", world["lora"], "--data", str(out), "--steps", "2",
                          "--batch", "2", "--out", str(tmp_path / "more")]) == 0
    for name, number in (("reward", "loss"), ("sft", "ce"), ("more", "ce")):
        steps = [line[number] for line in lines_of(tmp_path / name / "metrics.jsonl")
                 if number in line and "event" not in line]
        assert len(steps) == 2 and all(map(math.isfinite, steps))
