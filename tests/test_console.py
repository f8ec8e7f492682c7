"""Commands in other surroundings: terminals that are not UTF-8, pipes that close, clones with other line ends."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import data

ROOT = Path(__file__).resolve().parent.parent


def posts(folder, count=2, post="Caf\u00e9 \U0001f600 closed {}"):
    path = folder / "posts.jsonl"
    rows = ({"post": post.format(i), "reply": f"oh no \U0001f622 {i}"} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*arguments, **more):
    return subprocess.run([sys.executable, str(ROOT / "data.py"), *map(str, arguments)], capture_output=True, **more)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8", "latin-1"])
def test_what_an_encoding_lacks_is_replaced_when_it_is_printed(tmp_path, encoding):
    """UnicodeEncodeError at the first emoji of a redirected output on Windows."""
    ran = run("check", posts(tmp_path), env=os.environ | {"PYTHONIOENCODING": encoding})
    assert ran.returncode == 0 and b"Traceback" not in ran.stderr
    said = ran.stdout.decode(encoding)
    assert "closed 0" in said and ("\U0001f600" in said) == (encoding == "utf-8")


def test_the_c_locale_is_no_reason_to_stop(tmp_path):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ran = run("check", posts(tmp_path), env=os.environ | plain)
    assert ran.returncode == 0 and b"closed 0" in ran.stdout and ran.stderr == b""


def test_an_error_that_names_an_emoji_is_one_sentence_in_any_encoding(tmp_path):
    ran = run("check", tmp_path / "caf\u00e9-\U0001f600.jsonl", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert ran.returncode == 2 and ran.stderr.startswith(b"error: there is no file") and ran.stderr.count(b"\n") == 1


@pytest.mark.parametrize("count", [1, 5000])
def test_a_reader_that_leaves_ends_the_command_without_a_word(tmp_path, count):
    """"error: Broken pipe: make room there" of `check .. | head -1`; a short output fails only when Python ends."""
    path = posts(tmp_path, count)
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run([sys.executable, str(ROOT / "data.py"), "check", str(path), "--show", "5000"], stdout=writing,
                         stderr=subprocess.PIPE)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_the_output_is_a_sentence(tmp_path):
    with open("/dev/full", "w") as full:
        ran = subprocess.run([sys.executable, str(ROOT / "data.py"), "check", str(posts(tmp_path))], stdout=full, stderr=subprocess.PIPE)
    assert ran.returncode == 2 and b"make room there" in ran.stderr and ran.stderr.count(b"\n") == 1


@pytest.mark.parametrize("number, hint", [
    (errno.ENOSPC, "make room there"), (errno.EACCES, "change its permissions"), (errno.ENOENT, "check the path"),
    (errno.EMFILE, "ulimit -n"), (errno.EPIPE, "")])
def test_an_error_of_the_system_comes_with_what_to_do_about_that_one(capsys, number, hint):
    """Each of them was to be mended by more room."""
    def wrong(args):
        raise OSError(number, os.strerror(number), "runs/a")
    assert data.command(SimpleNamespace(parse_args=lambda argv: SimpleNamespace(run=wrong))) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: [Errno {number}]") and hint in said
    assert ("make room" in said) == (number == errno.ENOSPC)


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="no git, or no clone")
def test_a_clone_with_windows_line_ends_has_scripts_that_bash_reads(tmp_path):
    """"set: pipefail: invalid option name": every line of train.sh ended in \\r."""
    git = ["git", "-c", "core.autocrlf=true"]
    subprocess.run([*git, "init", "-q", str(tmp_path / "a")], check=True)
    for name in (".gitattributes", "train.sh", "data.py"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / "a")
    inside = [*git, "-C", str(tmp_path / "a"), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*inside, "add", "-A"], check=True, capture_output=True)
    subprocess.run([*inside, "commit", "-qm", "x"], check=True)
    subprocess.run([*git, "clone", "-q", str(tmp_path / "a"), str(tmp_path / "b")], check=True)
    assert b"\r" not in (tmp_path / "b" / "train.sh").read_bytes()
    ran = subprocess.run(["bash", str(tmp_path / "b" / "train.sh"), "--help"], capture_output=True)
    assert ran.returncode == 0 and b"torchrun train.sh" in ran.stdout


def test_commands_that_train_sh_prints_can_be_typed_again():
    """Paths with blanks were printed bare."""
    script = (ROOT / "train.sh").read_text()
    start = script.index("quoted() {")
    function = script[start:script.index("\n}\n", start) + 3]
    words = ["--data", "sp ace/it's \u00fc.jsonl", "--sizes", "sft=2,grpo=3", "a*b", "$HOME", ""]
    said = subprocess.run(["bash", "-c", function + 'quoted "$@"', "-", *words], capture_output=True, text=True, check=True).stdout
    assert said.startswith("--data ") and "--sizes sft=2,grpo=3 " in said
    again = subprocess.run(["bash", "-c", f'printf "%s\\n" {said}'], capture_output=True, text=True, check=True).stdout
    assert again.split("\n")[:-1] == words
