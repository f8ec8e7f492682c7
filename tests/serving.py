"""For tests of the page for picks: measured runs, the server in a thread, the page's requests."""

import http.client
import json
import threading
from contextlib import contextmanager
from pathlib import Path

import evaluate
from helpers import record, write_run
from report import pick_page
from support.files import read_json


def run_of(folder, arm, drafts, posts=6, domain="replies", seed=1):
    """A measured run; drafts(post number) -> its completions, all as many."""
    path = Path(write_run(folder, seed, arm, lambda i: 1, posts=2))
    records = []
    for i in range(posts):
        texts = drafts(i)
        records.append(record([[]] * len(texts), name=f"p{i}", n=len(texts), drafts=texts,
                              intent=f"about {i // 2}"))
    whole = read_json(path / "evaluation.json") | {"records": records, "domain": domain}
    (path / "evaluation.json").write_text(json.dumps(whole))
    return str(path)


def numbered(arm):
    """drafts(post number): three that are different for each run and post."""
    return lambda i: [f"{arm} says {word} on {i}" for word in ("one", "two", "three")]


def asked(runs, out, *more):
    """The arguments of `ask --serve`."""
    return evaluate.parser().parse_args(["ask", *runs, "--serve", "--no-browser", "--k", "3",
                                         "--out", str(out), *more])


class Client:
    """The page's requests, and others."""

    def __init__(self, server):
        self.server = server
        self.port = server.server_port
        self.host = f"127.0.0.1:{self.port}"

    def ask(self, method, path, body=None, headers=None, secret=None):
        """(status, headers, body) of a request below the secret path."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        place = f"/{secret or self.server.secret}/{path}"
        link.putrequest(method, place, skip_host=True, skip_accept_encoding=True)
        for name, value in ({"Host": self.host} | (headers or {})).items():
            if value is not None:
                link.putheader(name, value)
        link.endheaders(body)
        answer = link.getresponse()
        found = answer.status, answer.headers, answer.read()
        link.close()
        return found

    def post(self, path, value, **changes):
        """(status, JSON) of a POST as the page sends it, with changed headers."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        headers = {"Origin": f"http://{self.host}", "Content-Type": "application/json",
                   "Content-Length": str(len(body))}
        headers |= {name.replace("_", "-"): v for name, v in changes.items()}
        status, _, found = self.ask("POST", path, body, headers)
        return status, json.loads(found)

    def pick(self, item, pick):
        return self.post("pick", {"item": item, "pick": pick})

    def state(self):
        status, _, found = self.ask("GET", "state")
        assert status == 200
        return json.loads(found)


@contextmanager
def serving(args):
    server = pick_page.make_server(args)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield Client(server)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def lines_of(path):
    text = Path(path).read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]
