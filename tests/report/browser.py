"""A headless Chromium that tests talk to through pipes, by the DevTools protocol."""

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--remote-debugging-pipe", "--window-size=1300,1600",
)  # fmt: skip


class Page:
    """One tab. `requests` lists the address of everything that the page asked for."""

    def __init__(self, read: int, write: int):
        self._read, self._write, self._buffer = read, write, b""
        self._last, self._session = 0, None
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self, seconds: float = 30.0) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], seconds)
            assert ready, "the browser does not answer"
            self._buffer += os.read(self._read, 2**16)
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(message["params"]))
        return message

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.until("document.body && document.body.dataset.ready === 'yes'")

    def evaluate(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not self.evaluate(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def point(self, selector: str, *, at: tuple[float, float] = (0.5, 0.5), click: bool = False) -> None:
        """Move the mouse to the middle of an element, as a person does, and perhaps press its button.

        `at` are other shares of its width and height. That place comes into sight first.
        """
        script = (
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "const r = e.getBoundingClientRect(); "
            f"const [x, y] = [r.x + {at[0]} * r.width, r.y + {at[1]} * r.height]; "
            "scrollBy({left: x - innerWidth / 2, top: y - innerHeight / 2, behavior: 'instant'}); "
            f"const s = e.getBoundingClientRect(); return [s.x + {at[0]} * s.width, s.y + {at[1]} * s.height]; }})()"
        )
        x, y = self.evaluate(script)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


@contextmanager
def browsing(folder: Path) -> Iterator[Page]:
    """Start a browser whose own files lie in `folder`, and end it."""
    assert CHROMIUM is not None
    to_browser, from_us = os.pipe()
    from_browser, to_us = os.pipe()

    def place_pipes() -> None:
        # The browser reads from descriptor 3 and writes to 4.
        read, written = os.dup(to_browser), os.dup(to_us)
        os.dup2(read, 3)
        os.dup2(written, 4)

    process = subprocess.Popen(
        [CHROMIUM, *SWITCHES, f"--user-data-dir={folder}", "about:blank"],
        preexec_fn=place_pipes,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(to_us)
    try:
        yield Page(from_browser, from_us)
    finally:
        process.terminate()
        process.wait(20)
        os.close(from_us)
        os.close(from_browser)
