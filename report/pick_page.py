"""The page on which a person picks drafts, served on this machine alone.

    python evaluate.py ask runs/lora-1 runs/poly-1 --serve --out anna.jsonl
    python evaluate.py picks anna.jsonl ben.jsonl

The page is report/pick.html; what is asked and how answers are kept is in report/picking.py."""

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import shlex
import socketserver
import sys
import threading
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from report.picking import Answers, Refused, make_items
from support.files import InputError, printable, read_object


# ---- The server ----------------------------------------------------------------------------------

LARGEST_BODY = 1000              # bytes: an answer takes some thirty


class PickServer(ThreadingHTTPServer):
    """Serves the page and its few requests on 127.0.0.1, below a secret path.

    A page of another site can make a browser send requests here, even to a name of its own that it
    lets point to 127.0.0.1. So every request must name this machine as its host and know the
    secret, and a POST must come from this page by its Origin."""
    daemon_threads = True

    def __init__(self, port, answers):
        self.answers = answers
        self.lock = threading.Lock()
        self.secret = secrets.token_urlsafe(16)
        self.page = Path(__file__).with_name("pick.html").read_bytes()
        self.policy = policy_of(self.page.decode("utf-8"))
        super().__init__(("127.0.0.1", port), Handler)

    def server_bind(self):
        """Bind, without the question for the machine's name that HTTPServer asks the network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/{self.secret}/"

    def handle_error(self, request, client_address):
        """Nothing: a browser that goes away in the middle is no error."""


def policy_of(page):
    """The Content-Security-Policy: the page's own style and script by their hashes, requests to
    this server, and nothing else."""
    hashes = {}
    for name in ("style", "script"):
        [text] = re.findall(f"<{name}>(.*?)</{name}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[name] = f"'sha256-{digest}'"
    return (f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'")


class Handler(BaseHTTPRequestHandler):
    """GET page and state; POST pick {"item", "pick"} and undo {}; each answered by the state."""
    protocol_version = "HTTP/1.1"
    timeout = 60                             # seconds that a silent connection is kept

    def do_GET(self):
        self.reply_to({"": self.get_page, "state": self.get_state})

    def do_POST(self):
        self.reply_to({"pick": self.post_pick, "undo": self.post_undo})

    def reply_to(self, requests):
        """Check the request and do it; a refusal is a sentence, with the state where the page was
        right to ask."""
        try:
            name = self.checked_name()
            if name not in requests:
                raise Refused(404, "There is nothing here.")
            requests[name]()
        except Refused as refusal:
            self.close_connection = True     # a body may be unread
            told = {"error": str(refusal)}
            if refusal.status == 409:
                with self.server.lock:
                    told |= self.server.answers.state()
            self.send(refusal.status, told)
        except OSError as error:
            if isinstance(error, (ConnectionError, TimeoutError)):
                raise
            path = self.server.answers.path
            self.close_connection = True
            self.send(500, {"error": f"{path} cannot be written ({error.strerror}): the last "
                                     "answer is not saved. Fix that, and pick again."})

    def checked_name(self):
        """What is asked for, below the secret path; Refused for a wrong host or secret."""
        hosts = self.headers.get_all("Host") or [""]
        name = hosts[0].rpartition(":")[0] or hosts[0]
        if len(hosts) > 1 or name not in ("127.0.0.1", "localhost"):
            raise Refused(403, "This page is for this machine only: open the printed address.")
        parts = self.path.split("/", 2)
        secret = parts[1] if len(parts) == 3 else ""
        if not hmac.compare_digest(secret.encode(), self.server.secret.encode()):
            raise Refused(404, "Open the address that the program printed: it is another each "
                               "time.")
        return parts[2]

    def body(self):
        """The JSON object of a POST by this page; Refused for any other."""
        if self.headers.get("Origin") != f"http://{self.headers['Host']}":
            raise Refused(403, "Only the page itself may send picks.")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "A pick is sent as application/json.")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length) or "Transfer-Encoding" in self.headers:
            raise Refused(411, "A pick is sent with its length.")
        if int(length) > LARGEST_BODY:
            raise Refused(413, f"A pick takes at most {LARGEST_BODY} bytes.")
        try:
            found = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused(400, "A pick is sent as JSON.") from None
        if not isinstance(found, dict):
            raise Refused(400, "A pick is sent as a JSON object.")
        return found

    def get_page(self):
        self.send(200, self.server.page, "text/html; charset=utf-8")

    def get_state(self):
        with self.server.lock:
            state = self.server.answers.state()
        self.send(200, state)

    def post_pick(self):
        found = self.body()
        if found.keys() != {"item", "pick"}:
            raise Refused(400, "A pick has an item and a pick.")
        with self.server.lock:
            self.server.answers.answer(found["item"], found["pick"])
            state = self.server.answers.state()
        self.send(200, state)

    def post_undo(self):
        self.body()
        with self.server.lock:
            self.server.answers.undo()
            state = self.server.answers.state()
        self.send(200, state)

    def send(self, status, body, kind="application/json"):
        """Send a response: bytes, or a value as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": len(data),
                   "Content-Security-Policy": self.server.policy, "Cache-Control": "no-store",
                   "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
                   "X-Frame-Options": "DENY", "Cross-Origin-Resource-Policy": "same-origin",
                   "Cross-Origin-Opener-Policy": "same-origin"}
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def version_string(self):
        return "picks"

    def log_message(self, form, *values):
        """Nothing: the terminal is for the person."""


# ---- The command ---------------------------------------------------------------------------------

def make_server(args):
    """The server of `ask --serve`, listening, with the answers that --out holds taken up."""
    path = args.out or "picks.jsonl"
    if Path(path).suffix != ".jsonl":
        raise InputError(f"--out {path}: --serve writes JSON lines: give a name that ends in "
                         ".jsonl")
    if not 0 <= args.port <= 65535:
        raise InputError(f"--port {args.port}: give 1 to 65535, or 0 for any that is free")
    answers = Answers(path, *make_items(args))
    try:
        return PickServer(args.port, answers)
    except OSError as error:
        raise InputError(f"--port {args.port} cannot be used ({error.strerror}): give another, or "
                         "leave --port out") from None


def serve(args):
    """Serve the page until Ctrl-C."""
    server = make_server(args)
    answers = server.answers
    print(f"{answers.asked} posts, {len(args.runs)} runs, {args.k} drafts each; "
          f"{len(answers.picks)} answers so far in {answers.path}")
    print(f"open {server.address} (Ctrl-C ends and keeps all answers)", flush=True)
    if has_screen() and not args.no_browser:
        webbrowser.open(server.address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    server.server_close()
    with server.lock:                        # an answer that is being written is finished
        answers.ended = True                 # of connections that are still open
        print(f"\n{printable(answers.summary())}")
        if answers.picks:
            print(printable(next_commands(answers.path, args.runs[0])))


def next_commands(path, run):
    """What to do with a file of answers; `run`: one of the runs that were asked about."""
    model = read_object(Path(run) / "config.json").get("model") or "MODEL"
    file = shlex.quote(str(path))
    train = f"--model {shlex.quote(str(model))} --data {file}"
    return (f"next: python evaluate.py picks {file}, to compare the runs; python rewards.py train "
            f"{train} --out runs/reward, or python polylora.py sft {train} --out runs/picked, to "
            "learn from the picks")


def has_screen():
    """Whether a browser can have a window here: without one, Linux would open one in the
    terminal."""
    if not sys.platform.startswith("linux"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


