"""A headless Chromium, driven by its DevTools protocol over a pipe."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60.0  # seconds for one answer


def find_browser() -> str | None:
    """A Chromium on the path."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser process with its own profile; `open` gives a fresh page."""

    def __init__(self, path: str, profile: Path):
        orders_in, self._orders = os.pipe()
        self._answers, answers_out = os.pipe()

        def at_three_and_four() -> None:  # where Chromium expects its pipes
            # Twice, as the pipes themselves may have these numbers.
            here, there = os.dup(orders_in), os.dup(answers_out)
            high_here, high_there = os.dup2(here, 200), os.dup2(there, 201)
            os.dup2(high_here, 3)
            os.dup2(high_there, 4)

        self._process = subprocess.Popen(
            [
                path,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-dev-shm-usage",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=at_three_and_four,
        )
        os.close(orders_in)
        os.close(answers_out)
        self._numbers = itertools.count(1)
        self._unread = b""
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._orders)
        os.close(self._answers)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Do one thing and return what it gives; events on the way are kept."""
        number = next(self._numbers)
        order = {"id": number, "method": method, "params": params}
        if session is not None:
            order["sessionId"] = session
        content = json.dumps(order).encode() + b"\0"
        while content:
            content = content[os.write(self._orders, content) :]
        while True:
            message = self._read()
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def wait_for(self, method: str, session: str) -> None:
        """Go on once an event came."""
        while not any(
            e.get("method") == method and e.get("sessionId") == session for e in self.events
        ):
            self.events.append(self._read())

    def open(self, file: Path | str, *, width: int = 1200, dark: bool = False) -> Page:
        """Open a file or an address as a reader would, and wait until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, target, attached["sessionId"])
        for domain in ("Runtime", "Log", "Network", "Page"):
            page.call(f"{domain}.enable")
        mobile = width < 600
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=2 if mobile else 1,
            mobile=mobile,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        page.url = file if isinstance(file, str) else file.resolve().as_uri()
        page.call("Page.navigate", url=page.url)
        self.wait_for("Page.loadEventFired", page.session)
        return page

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], deadline - time.monotonic())
            assert ready, f"the browser said nothing for {PATIENCE:.0f} s"
            more = os.read(self._answers, 1 << 20)
            assert more, "the browser is gone"
            self._unread += more
        message, _, self._unread = self._unread.partition(b"\0")
        read: dict[str, Any] = json.loads(message)
        return read


class Page:
    """A page that is open."""

    def __init__(self, browser: Browser, target: str, session: str):
        self.browser, self.target, self.session = browser, target, session
        self.url = ""

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def value(self, expression: str) -> Any:
        """What a script expression gives, as JSON."""
        made = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in made, made["exceptionDetails"]
        return made["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        """Text of every element."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)"
        texts: list[str] = self.value(found)
        return texts

    def click(self, selector: str) -> None:
        self.value(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str) -> None:
        """Type into an input and wait until the page has taken it in."""
        self.value(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)});"
            f"box.value = {json.dumps(text)};"
            "box.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
        self.value("new Promise(done => setTimeout(done, 250))")

    @property
    def complaints(self) -> list[Any]:
        """Script errors, and whatever the browser's console warns of."""
        found: list[Any] = []
        for event in self.browser.events:
            told = event.get("params", {})
            match event.get("method"):
                case "Runtime.exceptionThrown":
                    found.append(told["exceptionDetails"])
                case "Runtime.consoleAPICalled":
                    found.append(told["args"])
                case "Log.entryAdded":
                    found.append(told["entry"])
        return found

    @property
    def requests(self) -> list[str]:
        """Addresses asked for besides the page's own; what stands in the page is no request."""
        asked = [
            event["params"]["request"]["url"]
            for event in self.browser.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in asked if url != self.url and not url.startswith("data:")]

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
        self.browser.events.clear()
