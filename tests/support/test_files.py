"""Tests of support/files.py."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import data
from helpers import ROOT, write
from support import files
from support.files import InputError, seed_of


# ---- Readers and writers, fixed at the split -----------------------------------------------------

def test_style_names_cannot_inject_terminal_codes(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl",
                 {"post": "a", "replies": {"x\x1b[2J": "y\u202e", "z\nerror: gone": "w"}})
    assert data.main(["check", str(path)]) == 0
    said = capsys.readouterr().out
    assert not {"\x1b", "\u202e"} & set(said) and "\nerror" not in said


def test_printable_text_cannot_inject_control_codes():
    assert files.printable("a\x1b[31mb\u202ec\r\nd\u2066") == "a\ufffd[31mb\ufffdc  d\ufffd"
    assert files.printable("Grüße, 世界 👋") == "Grüße, 世界 👋"


# ---- Writing in one piece ------------------------------------------------------------------------

def test_two_hosts_sharing_a_folder_do_not_collide(tmp_path, monkeypatch):
    """Two containers had equal process ids, and so one `.{pid}.partial` on the folder that they
    share."""
    monkeypatch.setattr(files.os, "getpid", lambda: 7)
    monkeypatch.setattr(files.time, "monotonic_ns", lambda: 5)
    hosts = iter(("one", "two"))
    monkeypatch.setattr(files.socket, "gethostname", lambda: next(hosts))
    with files.atomic_write(tmp_path / "a") as one, files.atomic_write(tmp_path / "a") as two:
        one.write_text("1")
        two.write_text("2")
        assert one != two and one.read_text() == "1"


def test_writes_are_atomic(tmp_path, monkeypatch):
    """Five writers had each their own way of it, with names that equal process ids make clash."""
    path = tmp_path / "a.json"
    files.write_json(path, [1])
    with pytest.raises(KeyError), files.atomic_write(path) as new:
        new.write_text("half")
        raise KeyError
    assert files.read_json(path) == [1] and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with files.atomic_write(path) as one, files.atomic_write(path) as two:
        assert one != two and one.parent == two.parent == tmp_path
        one.write_text("[2]")
        two.write_text("[3]")
    assert files.read_json(path) == [2]
    with pytest.raises(InputError, match="cannot be written"):
        files.write_text(path / "b", "x")  # a file is no folder
    for text in ("[" * 100_000, "{", "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(InputError, match="not valid JSON|cannot be read"):
            files.read_json(path)
    for place, word in (("/dev/zero", "no file"), (tmp_path / "none", "missing")):
        path.unlink()
        path.symlink_to(place)
        with pytest.raises(InputError, match=word):  # without end, in a checkpoint from an archive
            files.read_json(path)
    monkeypatch.setattr(files, "LARGEST_TEXT", 10)
    path.unlink()
    path.write_text("[1, 2, 3, 4]")
    with pytest.raises(InputError, match="no such file does"):
        files.read_json(path)


# ---- What both phases share ----------------------------------------------------------------------

def test_a_seed_is_the_same_number_on_every_machine():
    """hash() differs from process to process: the ranks would disagree about everything."""
    assert seed_of(1, "sft", 0, "post-7") == 2399848287674112590
    assert len({seed_of(*x) for x in ((1,), (2,), ("1",), (1, 1), (11,), ("a", "b"), ("ab",))}) == 7


# ---- What a run survives -------------------------------------------------------------------------

def test_a_full_disk_under_safetensors_is_a_sentence(tmp_path):
    """Its error is no OSError."""
    out = tmp_path / "x"
    with pytest.raises(InputError, match="free some disk space"), files.atomic_write(out):
        raise SafetensorError("No space left on device")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk],
                      capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        (disk / "x").write_text("whole")
        with pytest.raises(InputError,
                           match="free some disk space"), files.atomic_write(disk / "x") as new:
            save_file({"a": torch.zeros(100_000)}, new)
        assert [p.name for p in disk.iterdir()] == ["x"] and (disk / "x").read_text() == "whole"
    finally:
        subprocess.run(["umount", disk])


def test_error_messages_cannot_inject_control_codes(capsys):
    """Parts of a message come from the file that it is about."""
    def wrong(args):
        raise InputError("unknown variant `\x1b[31m\u202e`")
    assert files.command(SimpleNamespace(parse_args=lambda argv: SimpleNamespace(run=wrong))) == 2
    assert capsys.readouterr().err == "error: unknown variant `\ufffd[31m\ufffd`\n"


def test_system_errors_become_one_sentence(capsys):
    """A full disk under a log of evaluate.py, a folder that may not be read: tracebacks."""
    def wrong(args):
        raise OSError(28, "No space left on device", "runs/a/metrics.jsonl")
    assert files.command(SimpleNamespace(parse_args=lambda argv: SimpleNamespace(run=wrong))) == 2
    said = capsys.readouterr().err
    assert (said.startswith("error: [Errno 28] No space left on device: 'runs/a/metrics.jsonl': "
                            "free some disk space") and said.count("\n") == 1)


def test_ctrl_c_before_the_first_step_exits_with_130(capsys):
    def interrupted(args):
        raise KeyboardInterrupt
    parser = SimpleNamespace(parse_args=lambda argv: SimpleNamespace(run=interrupted))
    assert files.command(parser) == 130 and capsys.readouterr().err == "stopped\n"


def posts(folder, count=2, post="Caf\u00e9 \U0001f600 closed {}"):
    path = folder / "posts.jsonl"
    rows = ({"post": post.format(i), "reply": f"oh no \U0001f622 {i}"} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*arguments, **more):
    return subprocess.run([sys.executable, str(ROOT / "data.py"), *map(str, arguments)],
                          capture_output=True, **more)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8", "latin-1"])
def test_what_an_encoding_lacks_is_replaced_when_it_is_printed(tmp_path, encoding):
    """UnicodeEncodeError at the first emoji of a redirected output on Windows."""
    ran = run("check", posts(tmp_path), env=os.environ | {"PYTHONIOENCODING": encoding})
    assert ran.returncode == 0 and b"Traceback" not in ran.stderr
    said = ran.stdout.decode(encoding)
    assert "closed 0" in said and ("\U0001f600" in said) == (encoding == "utf-8")


@pytest.mark.slow
def test_the_c_locale_is_no_reason_to_stop(tmp_path):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ran = run("check", posts(tmp_path), env=os.environ | plain)
    assert ran.returncode == 0 and b"closed 0" in ran.stdout and ran.stderr == b""


@pytest.mark.slow
def test_an_error_that_names_an_emoji_is_one_sentence_in_any_encoding(tmp_path):
    ran = run("check", tmp_path / "caf\u00e9-\U0001f600.jsonl",
              env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (ran.returncode == 2 and ran.stderr.startswith(b"error: there is no file")
            and ran.stderr.count(b"\n") == 1)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 5000])
def test_a_closed_pipe_ends_the_command_silently(tmp_path, count):
    """"error: Broken pipe: free some disk space there" of `check .. | head -1`; a short output
    fails only when Python ends."""
    path = posts(tmp_path, count)
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run([sys.executable, str(ROOT / "data.py"), "check", str(path),
                          "--show", "5000"], stdout=writing,
                         stderr=subprocess.PIPE)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (141, b"")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_the_output_is_a_sentence(tmp_path):
    with open("/dev/full", "w") as full:
        ran = subprocess.run([sys.executable, str(ROOT / "data.py"), "check", str(posts(tmp_path))],
                             stdout=full, stderr=subprocess.PIPE)
    assert (ran.returncode == 2 and b"free some disk space there" in ran.stderr
            and ran.stderr.count(b"\n") == 1)


@pytest.mark.parametrize("number, hint", [
    (errno.ENOSPC, "free some disk space there"), (errno.EACCES, "change its permissions"),
    (errno.ENOENT, "check the path"),
    (errno.EMFILE, "ulimit -n"), (errno.EPIPE, "")])
def test_an_error_of_the_system_comes_with_what_to_do_about_that_one(capsys, number, hint):
    """For each of them the message asked for more disk space."""
    def wrong(args):
        raise OSError(number, os.strerror(number), "runs/a")
    assert files.command(SimpleNamespace(parse_args=lambda argv: SimpleNamespace(run=wrong))) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: [Errno {number}]") and hint in said
    assert ("free some disk space" in said) == (number == errno.ENOSPC)


@pytest.mark.multirank
@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(),
                    reason="no git, or no clone")
def test_a_clone_with_windows_line_ends_has_scripts_that_bash_reads(tmp_path):
    """"set: pipefail: invalid option name": every line of train.sh ended in \\r."""
    git = ["git", "-c", "core.autocrlf=true"]
    subprocess.run([*git, "init", "-q", str(tmp_path / "a")], check=True)
    for name in (".gitattributes", "train.sh", "data.py"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / "a")
    inside = [*git, "-C", str(tmp_path / "a"), "-c", "user.name=x", "-c",
              "user.email=x@example.org"]
    subprocess.run([*inside, "add", "-A"], check=True, capture_output=True)
    subprocess.run([*inside, "commit", "-qm", "x"], check=True)
    subprocess.run([*git, "clone", "-q", str(tmp_path / "a"), str(tmp_path / "b")], check=True)
    assert b"\r" not in (tmp_path / "b" / "train.sh").read_bytes()
    ran = subprocess.run(["bash", str(tmp_path / "b" / "train.sh"), "--help"], capture_output=True)
    assert ran.returncode == 0 and b"torchrun train.sh" in ran.stdout
