"""A checkpoint's chat template, rendered in a child process with limits on time and memory.

Run as a script it is that child: it imports the standard library and Jinja alone."""

import json
import os
import subprocess
import sys

try:
    import resource
except ImportError:                        # Windows has none, and no namespaces either
    resource = None

LONGEST = 2 ** 20                # characters that a template may write
SHOWN = 2000                     # of a reason that is handed on


def render_template(template, chats, seconds=3, memory=512, tokens=None):
    """The text that a checkpoint's chat template, in Jinja, makes of each chat; ValueError where it
    makes none. tokens: special tokens that it may name, such as eos_token.

    A template is a program, too: Jinja keeps it from files and from Python's objects, and bounds
    neither its loops nor its products. So a child process does the work, which is ended after
    `seconds` of processor time and has `memory` MiB."""
    job = json.dumps({"template": template, "chats": chats, "seconds": seconds, "memory": memory,
                      "tokens": {"bos_token": "", "eos_token": ""} | (tokens or {})})
    try:
        ran = subprocess.run([sys.executable, os.path.abspath(__file__)],
                             input=job.encode(), capture_output=True, timeout=20 * seconds)
        result = json.loads(ran.stdout)      # the texts, or a reason
    except (ValueError, subprocess.TimeoutExpired):
        raise ValueError("it takes too much time or memory") from None
    if isinstance(result, str):
        raise ValueError(result)
    return result


def template_environment():
    """Jinja as transformers sets it up for chat templates: {% generation %} marks, which write
    nothing, {% break %} and {% continue %}, JSON without HTML escapes, raise_exception. The date
    (strftime_now) is refused: a run could not be repeated on another day."""
    from jinja2 import TemplateError, nodes  # comes with torch
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationMarks(Extension):
        """Marks of the assistant's text; names that are set inside are not seen outside."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise TemplateError(message)

    def strftime_now(form):
        raise TemplateError("it writes the date into every chat, so that no run could be repeated")

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[GenerationMarks, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def render(job):
    """Writes the texts of a job, or one text with the reason why there are none: what the child of
    render_template does."""
    limit("RLIMIT_CPU", job["seconds"])
    limit("RLIMIT_AS", job["memory"] << 20)
    try:
        environment = template_environment()
        template = environment.from_string(job["template"])
        result = []
        for chat in job["chats"]:
            result.append(template.render(job["tokens"], messages=chat, add_generation_prompt=True,
                                          enable_thinking=False))
        if max(map(len, result)) >= LONGEST:
            result = "it writes a megabyte"
    except Exception as e:                   # somebody's program: it may fail in any way
        result = f"{type(e).__name__}: {str(e)[:SHOWN]}"
    print(json.dumps(result))


def limit(name, value):
    """Sets a limit of this process, where the system has it: Windows has none, macOS not all."""
    try:
        resource.setrlimit(getattr(resource, name), (value, value))
    except (AttributeError, OSError, ValueError):
        pass


if __name__ == "__main__":
    render(json.loads(sys.stdin.buffer.read()))
