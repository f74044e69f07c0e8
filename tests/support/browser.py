"""A small driver of headless Chromium over the DevTools protocol, for tests that click through a page.

Everything waits for a condition with a deadline; nothing sleeps for a fixed time. Every request that a page makes is
kept in `Tab.requests`, so that a test can say that none left the machine.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from pathlib import Path

from headwise.errors import ResultError
from headwise.studies.plots.export.browser import find_browser, running

DEADLINE = 60.0
"""Seconds until a wait gives up; on an idle machine waits take a fraction of a second."""


def found():
    """Path of the browser that pictures are drawn with, or None."""
    try:
        return find_browser()
    except ResultError:
        return None


class Browser:
    """A Chromium of its own, with a profile of its own; its tabs share one DevTools connection."""

    def __init__(self):
        self.ends = contextlib.ExitStack()
        run = running(found(), "about:blank", "--remote-debugging-port=0")
        self.process, self.profile = self.ends.enter_context(run)
        self.loop = asyncio.new_event_loop()
        self.tabs, self.number = {}, 0
        self.socket = self.loop.run_until_complete(self._connect())

    async def _connect(self):
        from tornado.websocket import websocket_connect

        told, until = self.profile / "DevToolsActivePort", time.monotonic() + DEADLINE
        while not (told.is_file() and len(told.read_text().split()) == 2):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"Chromium did not start (status {self.process.returncode})")
            await asyncio.sleep(0.02)
        port, path = told.read_text().split()
        return await websocket_connect(f"ws://127.0.0.1:{port}{path}", max_message_size=1 << 28)

    def call(self, method, session=None, **params):
        """Send a command and return its result; events that come meanwhile are handed to their tabs."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        return self.loop.run_until_complete(asyncio.wait_for(self._answer(message), DEADLINE))

    async def _leave(self):
        self.socket.close()
        while await self.socket.read_message() is not None:
            pass

    async def _answer(self, message):
        await self.socket.write_message(json.dumps(message))
        while True:
            text = await self.socket.read_message()
            if text is None:
                raise RuntimeError("Chromium closed the connection")
            told = json.loads(text)
            if told.get("id") == message["id"]:
                if "error" in told:
                    raise RuntimeError(f"{message['method']}: {told['error']['message']}")
                return told["result"]
            if told.get("sessionId") in self.tabs:
                self.tabs[told["sessionId"]].heard(told["method"], told["params"])

    def tab(self, **look):
        """A new tab, see `Tab`."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Tab(self, target, session, **look)

    def close(self):
        """End the process and remove its profile."""
        self.ends.close()
        self.loop.run_until_complete(self._leave())
        self.loop.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class Tab:
    """A page: open, evaluate, wait, click, type, picture.

    Attributes
    ----------
    requests : list of str
        The address of everything that the page asked for, websockets too.
    errors : list of str
        What the page logged as an error, and exceptions that nothing caught.
    """

    def __init__(self, browser, target, session, *, width=1280, height=900, dark=False, touch=False):
        self.browser, self.target, self.session = browser, target, session
        self.requests, self.errors = [], []
        browser.tabs[session] = self
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.size(width, height, touch)
        self.scheme(dark)

    def call(self, method, **params):
        """A DevTools command to this tab."""
        return self.browser.call(method, self.session, **params)

    def heard(self, method, params):
        """Keep what a test may ask for later."""
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.requests.append(params["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(" ".join(str(one.get("value", one.get("description"))) for one in params["args"]))

    def size(self, width, height, touch=False):
        """The size of the window, in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)

    def scheme(self, dark):
        """Whether the reader prefers a dark page."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def open(self, url):
        """Go to `url`; returns at once, so wait for what must be there."""
        self.call("Page.navigate", url=url)

    def evaluate(self, script):
        """The value of a JavaScript expression."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(told["exceptionDetails"].get("exception", {}).get("description", told))
        return told["result"].get("value")

    def wait(self, script, what=None, deadline=DEADLINE):
        """Wait until an expression is true, and return its value; one that throws is not true yet."""
        until, last = time.monotonic() + deadline, None
        while True:
            try:
                value = self.evaluate(script)
            except RuntimeError as error:
                value, last = None, error
            if value:
                return value
            if time.monotonic() > until:
                raise AssertionError(f"waited {deadline:.0f} s for {what or script} ({last}); errors: {self.errors}")
            self.browser.loop.run_until_complete(asyncio.sleep(0.03))

    def click(self, x, y):
        """Press and release the left button at a place of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key, code=None):
        """Press a key, such as ``Tab`` or ``Enter``."""
        numbers = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowDown": 40, "ArrowUp": 38, "Backspace": 8}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=code or key,
                windowsVirtualKeyCode=numbers.get(key, 0),
                **(text if kind == "keyDown" else {}),
            )

    def type(self, text):
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def picture(self, path):
        """Save a picture of the window as PNG; make the window as high as the page first to have all of it."""
        data = self.call("Page.captureScreenshot", format="png")["data"]  # beyond the window, canvases come out torn
        Path(path).write_bytes(base64.b64decode(data))

    def close(self):
        """Close the tab."""
        self.browser.call("Target.closeTarget", targetId=self.target)
        self.browser.tabs.pop(self.session, None)
