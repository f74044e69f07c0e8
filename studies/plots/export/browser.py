"""Pictures drawn by a browser without a window: Bokeh figures as PNG or SVG. Nothing is loaded, nothing left behind.

The page is served on this machine's loopback address under a name that cannot be guessed, the browser draws it and
sends the picture back the same way. It is told to find no host but that one, runs with a profile of its own that is
deleted, and is ended when the picture is there.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ....errors import ResultError
from .browser_page import drawing

BROWSER = "HEADWISE_BROWSER"
"""Environment variable with the browser to use."""
NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "msedge",
    "brave-browser",
)
APPS = ("Google Chrome", "Chromium", "Microsoft Edge", "Brave Browser")
FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-domain-reliability",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--metrics-recording-only",
    "--mute-audio",
    "--no-default-browser-check",
    "--no-first-run",
    "--no-pings",
    "--no-proxy-server",
    "--password-store=basic",
    "--use-mock-keychain",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
GRACE = 5
"""Seconds that a browser has to end by itself."""
SHARPNESS = {"png": 2, "svg": 1}
"""Pixels of the picture for each pixel of a screen."""
SAID = "said.txt"
"""What a browser prints, in its profile."""


def find_browser() -> str:
    """The browser to draw with: what ``HEADWISE_BROWSER`` names, or Chromium, Chrome, Edge or Brave.

    Raises
    ------
    ResultError
        Where there is none; the text says how to get one.
    """
    wanted = os.environ.get(BROWSER)
    if wanted:
        found = shutil.which(os.path.expanduser(wanted))
        if found is None:
            raise ResultError(f"{BROWSER}={wanted}: no such program")
        return found
    for name in NAMES:
        if found := shutil.which(name):
            return found
    homes = [Path("/Applications"), Path.home() / "Applications"]
    installed = [home / f"{app}.app" / "Contents" / "MacOS" / app for home in homes for app in APPS]
    roots = [Path(root) for name in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA") if (root := os.getenv(name))]
    windows = ("Google/Chrome/Application/chrome.exe", "Microsoft/Edge/Application/msedge.exe")
    installed += [root / path for root in roots for path in windows]
    for program in installed:
        if program.is_file():
            return str(program)
    raise ResultError(
        "PNG and SVG are drawn by a browser, and no Chromium, Chrome, Edge or Brave was found: install one (such as "
        f"apt install chromium), or name its program in the environment variable {BROWSER}; .html needs none"
    )


def drawn(models: Mapping[str, Any], columns: int, kind: str, timeout: float) -> bytes:
    """Bokeh figures as one picture.

    Parameters
    ----------
    models : mapping of str to Bokeh model
    columns : int
        How many panels a row holds.
    kind : {"png", "svg"}
    timeout : float
        Seconds, after which the browser is ended.

    Raises
    ------
    ResultError
        Where there is no browser, it fails, or it takes too long.

    Returns
    -------
    bytes
        The file.
    """
    program = find_browser()
    sharp = f"--force-device-scale-factor={SHARPNESS[kind]}"
    with _served(drawing(models, columns, kind)) as (address, arrived, answer), running(program, address, sharp) as run:
        process, profile = run
        end = time.monotonic() + timeout
        while not arrived.wait(0.05):
            if process.poll() is not None:
                raise ResultError(f"{program} ended before it drew the picture: {_last_line(profile / SAID)}")
            if time.monotonic() > end:
                raise ResultError(f"{program} did not draw the picture within {timeout:g} s")
    if answer["type"] == "text/plain":
        raise ResultError(f"{program} could not draw the picture: {answer['body'].decode(errors='replace')[:500]}")
    return bytes(answer["body"])


@contextmanager
def _served(page: bytes) -> Iterator[tuple[str, threading.Event, dict[str, Any]]]:
    """Serve one page on loopback: its address, whether its answer has arrived, and the answer."""
    place, arrived, answer = f"/{secrets.token_urlsafe(24)}", threading.Event(), dict[str, Any]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Send the page to whoever knows its address."""
            known = self.path == place
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page) if known else 0))
            self.end_headers()
            if known:
                self.wfile.write(page)

        def do_POST(self) -> None:
            """Take the first answer of the page."""
            known = self.path == place and not arrived.is_set()
            if known:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer.update(type=self.headers.get_content_type(), body=body)
            self.send_response(204 if known else 404)
            self.end_headers()
            if known:
                arrived.set()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}{place}", arrived, answer
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def running(program: str, address: str, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A browser without a window at `address`, and its profile; at the end it is ended, and its profile deleted."""
    folder = Path(tempfile.mkdtemp(prefix="headwise-picture-"))
    root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium refuses to run as root with its sandbox
    own = [f"--user-data-dir={folder}", *(["--no-sandbox"] if root else [])]
    try:
        with (folder / SAID).open("wb") as said:
            try:
                process = subprocess.Popen(
                    [program, *FLAGS, *own, *flags, address],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise ResultError(f"cannot run {program}: {error.strerror or error}") from error
        try:
            yield process, folder
        finally:
            _end(process)
    finally:
        _delete(folder)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a browser and whatever it started."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # its session is its own: nothing else is in it
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()


def _delete(folder: Path) -> None:
    """Delete a profile; a process that is just ending may still write in it."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _last_line(said: Path) -> str:
    lines = [line for line in said.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
