"""Chromium without a window, told what to do through a pipe (the DevTools protocol). Needs no network."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Puts the two ends of the pipes where Chromium looks for them.
START = (
    "import os, sys; [os.dup2(int(fd), n) for fd, n in zip(sys.argv[1:3], (3, 4))]; os.execv(sys.argv[3], sys.argv[3:])"
)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")


class Browser:
    """One page. problems: what its console and its exceptions said."""

    def __init__(self, profile: Path):
        theirs, self._to = os.pipe()
        self._from, their_end = os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs, their_end)]
        command = [sys.executable, "-c", START, *map(str, ends), CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(command, pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in (theirs, their_end, *ends):
            os.close(fd)
        self._count, self._rest, self._session, self.problems = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **fields):
        """Sends a command and waits for its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": fields}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answer = self._next(lambda one: one.get("id") == self._count)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self, is_wanted, seconds: float = 30.0) -> dict:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while b"\0" in self._rest:
                text, self._rest = self._rest.split(b"\0", 1)
                found = json.loads(text)
                self._listen(found)
                if is_wanted(found):
                    return found
            piece = os.read(self._from, 1 << 20)
            assert piece, "Chromium has ended"
            self._rest += piece
        raise AssertionError("Chromium did not answer in time")

    def _listen(self, event: dict) -> None:
        method, fields = event.get("method"), event.get("params", {})
        is_said = method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        url = fields["request"]["url"] if method == "Network.requestWillBeSent" else "file:"
        if is_said or not url.startswith(("file:", "data:")):
            self.problems.append(fields)

    def open(self, path: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Opens a file in a window of this size and waits until it is loaded."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **sizes)
        self.scheme(scheme)
        self.call("Page.navigate", url=path.absolute().as_uri())
        self._next(lambda one: one.get("method") == "Page.loadEventFired")

    def scheme(self, name: str) -> None:
        """Prefers light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def value(self, script: str):
        """What an expression comes to."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def mouse(self, kind: str, x: float, y: float) -> None:
        """One event of the mouse: mouseMoved, mousePressed or mouseReleased."""
        button = "none" if kind == "mouseMoved" else "left"
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def picture(self, path: Path, **options) -> None:
        """Writes a PNG of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, **options)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """Ends Chromium."""
        self._process.terminate()
        self._process.wait(20)
        os.close(self._to)
        os.close(self._from)
