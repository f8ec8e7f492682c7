"""A headless Chromium for tests, where one is installed, driven over two pipes by its DevTools
protocol: nothing but the standard library, and no port."""

import base64
import json
import os
import select
import shutil
import signal
import time


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-default-apps", "--disable-extensions", "--disable-dev-shm-usage",
         "--hide-scrollbars", "--remote-debugging-pipe")


def chromium():
    """The path of a Chromium: that of $CHROMIUM, or the first that is found; None without one, and
    on Windows, where pipes have no numbers."""
    if not hasattr(os, "posix_spawn"):
        return None
    for name in (os.environ.get("CHROMIUM"), *NAMES):
        if name and shutil.which(name):
            return shutil.which(name)
    return None


def high(number):
    """The same open file under a number from 10 up, closed by exec."""
    import fcntl                             # not on Windows
    copy = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(number)
    return copy


class Browser:
    """A Chromium with one page. `requests` and `errors` collect what the page asks for, and its
    exceptions and messages of the console."""

    def __init__(self, folder, seconds=60):
        self.seconds = seconds               # to wait for any answer
        self.number = 0
        self.rest = b""
        self.session = None
        self.requests = []
        self.errors = []
        hears, self.to = map(high, os.pipe())
        self.of, says = map(high, os.pipe())
        program = chromium()
        actions = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                   (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                   (os.POSIX_SPAWN_DUP2, hears, 3), (os.POSIX_SPAWN_DUP2, says, 4)]
        self.process = os.posix_spawn(program, [program, *FLAGS, f"--user-data-dir={folder}",
                                                "about:blank"], os.environ, file_actions=actions)
        os.close(hears)
        os.close(says)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        found = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        """Send a command and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def receive(self):
        """The next message; events are noted."""
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.of], [], [], self.seconds)
            part = os.read(self.of, 2 ** 16) if ready else b""
            assert part, "the browser does not answer"
            self.rest += part
        text, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(text)
        event = message.get("method")
        if event == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(message["params"]["exceptionDetails"])
        elif event == "Log.entryAdded":
            self.errors.append(message["params"]["entry"])
        return message

    def look(self, width, height, dark, phone):
        """The size of the window, the colour scheme, and whether there is a finger or a mouse."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=phone)
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address):
        self.send("Page.navigate", url=address)

    def run(self, script):
        """The value of a JavaScript expression, awaited."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True,
                          awaitPromise=True)
        assert "exceptionDetails" not in found, (script, found)
        return found["result"].get("value")

    def wait(self, script):
        """Wait until an expression is true; while it fails, it is not."""
        end = time.monotonic() + self.seconds
        while not self.run(f"(() => {{try {{return {script}}} catch {{return false}}}})()"):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)

    def press(self, key, **more):
        """Press a key and let it go."""
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def point(self, selector, finger):
        """Tap, or click, the middle of an element."""
        x, y = self.run(f"""(() => {{const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();
            return [b.x + b.width / 2, b.y + b.height / 2]}})()""")
        if finger:
            self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
            self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            return
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path, whole=False):
        """Write what is seen, or the whole page, as a PNG."""
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        with open(path, "wb") as file:
            file.write(base64.b64decode(found["data"]))

    def close(self):
        """End the browser."""
        self.session = None
        try:
            self.send("Browser.close")
        except (AssertionError, OSError):
            os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.to)
        os.close(self.of)
