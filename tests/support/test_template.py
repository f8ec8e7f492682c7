"""Tests of support/template.py."""

import functools
import json
import sys
import time

import pytest

import data
from data import chat_format
from support import chats
from support.files import InputError
from support import template


# ---- The checkpoint's own chat format ------------------------------------------------------------

LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3

BOMBS = {"a loop": LOOP, "a power": "{{ 7 ** (10 ** 9) }}", "a product": "{{ 'a' * 10 ** 10 }}",
         "a long text": "{{ 'a' * 10 ** 7 }}",
         "a macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
         "brackets": "{{ " + "[" * 100_000, "its objects":
         "{{ messages.append(1) }}", "lines": "{{ raise('a\nb') }}", "not UTF-8": b"\xff"}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_never_ends_or_grows_is_refused(tmp_path, monkeypatch, name):
    """Jinja's sandbox keeps a template from files; ten lines of it still held a launch for ever,
    or filled the memory."""
    monkeypatch.setattr(chats, "render_template",
                        functools.partial(template.render_template, seconds=1))
    bomb = BOMBS[name]
    (tmp_path / "chat_template.jinja").write_bytes(bomb if isinstance(bomb, bytes)
                                                   else bomb.encode())
    began = time.monotonic()
    with pytest.raises(InputError, match="chat.template") as e:
        chat_format(tmp_path)
    # elsewhere there may be no limits but that of the wall's clock
    if sys.platform == "linux":
        assert (time.monotonic() - began < 15
                and (name != "a product" or "MemoryError" in str(e.value)))
    assert name != "a long text" or "megabyte" in str(e.value)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_templates_of_a_wrong_type_are_refused(tmp_path):
    for value in (3, [[]], [{"name": [], "template": "x"}, {"template": 1}], [{"name": "default"}],
                  {"default": "x"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        with pytest.raises(InputError, match="neither a text nor a list"):
            chat_format(tmp_path)
