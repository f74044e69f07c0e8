"""The app in tests: served in a process or a thread, asked over sockets, and looked at in a tab."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from headwise.interventions import Head
from headwise.studies.app import firing, variables
from headwise.studies.app.folder import Folder
from tests.support import browser

STUDY, SWEEP = "a-study.nc", "sweeps/zero.nc"
needs_panel = pytest.mark.skipif(importlib.util.find_spec("panel") is None, reason="Panel is not installed")
needs_browser = pytest.mark.skipif(
    importlib.util.find_spec("panel") is None or browser.found() is None,
    reason="the app in a browser needs Panel and Chromium",
)


def named(tree, key):
    return next(one for one in variables.variables(tree) if one.key == key)


def serving(folder, elsewhere, *more):
    call = ", ".join(["sys.argv[1]", "port=0", "show=False", *more])
    code = f"import sys; from headwise.studies.app import serve; serve({call})"
    with (elsewhere / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", code, folder], cwd=elsewhere, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            line = process.stdout.readline()
            assert "http://" in line, (elsewhere / "errors").read_text()
            yield line[line.index("http://") :].split()[0]
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()
        assert "Traceback" not in (elsewhere / "errors").read_text()


async def closed(wire):
    """Close a connection, at this end too."""
    wire.close()
    await asyncio.sleep(0.05)
    wire.stream.close()


def websocket(served, origin):
    """Status of opening a session from a page of `origin`."""
    from tornado.httpclient import HTTPClientError, HTTPRequest
    from tornado.websocket import websocket_connect

    async def tried():
        request = HTTPRequest(served.replace("http", "ws") + "ws", headers={"Origin": origin})
        try:
            await closed(await websocket_connect(request, subprotocols=["bokeh", "no-token"]))
        except HTTPClientError as error:
            return error.code
        return 101

    return asyncio.run(tried())


def answer(served, head, path="/", method="GET"):
    """Status, head and text of the answer to a request with just these lines in its head."""
    port = int(served.rsplit(":", 1)[1].strip("/"))
    with socket.create_connection(("127.0.0.1", port), timeout=60) as wire:
        closing = [] if path == "/ws" else ["Connection: close"]
        wire.sendall("\r\n".join([f"{method} {path} HTTP/1.1", *head, *closing, "", ""]).encode("latin-1"))
        whole = b""
        while piece := wire.recv(65536):
            whole += piece
            if path == "/ws" and b"\r\n\r\n" in whole:
                break
    head, _, body = whole.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode("latin-1"), body.decode(errors="replace")


def said_first(served, token, *messages):
    """What a session answers first, and after these messages; None where the connection is closed."""
    from tornado.httpclient import HTTPRequest
    from tornado.websocket import websocket_connect

    async def tried():
        request = HTTPRequest(served.replace("http", "ws") + "ws", headers={"Origin": served.strip("/")})
        wire = await websocket_connect(request, subprotocols=["bokeh", token])
        said = await wire.read_message()
        for message in messages:
            with contextlib.suppress(Exception):  # closed meanwhile
                await wire.write_message(message)
        while messages and said is not None:
            said = await wire.read_message()
        await closed(wire)
        return said

    return asyncio.run(asyncio.wait_for(tried(), 60))


@contextlib.contextmanager
def in_this_process(folder, **options):
    """The app in a thread; gives the server and its address."""
    from headwise.studies.app import server

    ready, stop = threading.Event(), {}

    async def run():
        stop["loop"], stop["event"] = asyncio.get_running_loop(), asyncio.Event()
        stop["server"], stop["url"] = server._server(Folder(folder), firing.Models(), "127.0.0.1", 0, **options)
        stop["server"].start()
        ready.set()
        await stop["event"].wait()
        stop["server"].stop()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert ready.wait(60)
        yield stop["server"], stop["url"]
    finally:
        stop["loop"].call_soon_threadsafe(stop["event"].set)
        thread.join(60)


def at_once(served, count):
    """The answers to so many requests of a page at the same moment."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: answer(served, [f"Host: {served.split('/')[2]}"]), range(count)))


FIGURES = """
window.figures = () => {
  const found = [], seen = new Set();
  const walk = view => {
    if (seen.has(view)) return;
    seen.add(view);
    if (view.model.type == "Figure") found.push(view);
    for (const child of view.child_views ?? []) walk(child);
    for (const child of Object.values(view._child_views ?? {})) if (child && child.model) walk(child);
    if (view._child_views instanceof Map) for (const child of view._child_views.values()) walk(child);
  };
  for (const view of Bokeh.index.roots) walk(view);
  return found;
};
window.sourceOf = (view, column) => view.model.renderers.map(one => one.data_source).find(one => column in one.data);
window.rootOf = view => { let one = view; while (one.parent) one = one.parent; return one.model.name; };
window.inside = name => figures().find(view => rootOf(view) == name);
window.grid = name => {
  const view = inside(name), data = sourceOf(view, "name").data;
  return Array.from(data.name, (one, at) => [one, data.value[at]]);
};
window.marked = name => {
  const one = inside(name).model.renderers.map(one => one.data_source).find(one => one.name == "picked head");
  return [one.data.layer[0], one.data.head[0]];
};
window.pattern = name => {
  const data = sourceOf(inside(name), "weight").data;
  return Object.fromEntries(Array.from(data.weight, (weight, at) => [`${data.query[at]} ${data.key[at]}`, weight]));
};
window.near = (found, wanted) => Object.entries(wanted).every(([at, number]) => at in found && (number === null
  ? !(found[at] === found[at] && found[at] !== null) : Math.abs(found[at] - number) <= 1e-6 + 5e-5 * Math.abs(number)));
window.axisOf = name => {
  const axis = inside(name).model.below.find(one => one.major_label_overrides);
  return Array.from(axis.major_label_overrides instanceof Map ? axis.major_label_overrides.values()
    : Object.values(axis.major_label_overrides));
};
window.titleOf = name => { const one = inside(name).model.title; return one ? one.text : ""; };
window.likely = () => figures().filter(view => rootOf(view) == "next" && sourceOf(view, "rank")).map(view => {
  const data = sourceOf(view, "rank").data, title = view.model.title;
  return [title ? title.text : "", Object.fromEntries(Array.from(data.token, (one, at) => [one, data.value[at]]))];
});
window.cellAt = (name, layer, head) => {
  const view = inside(name), now = view.canvas_view.el.getBoundingClientRect();
  return [now.left + view.frame.x_scale.compute(head), now.top + view.frame.y_scale.compute(layer)];
};
window.restingAt = async (...cell) => {
  const pause = () => new Promise(done => setTimeout(done, 60));
  inside(cell[0]).el.scrollIntoView({block: "center"});
  await pause();
  const [x, y] = cellAt(...cell);
  await pause();
  const [left, top] = cellAt(...cell);
  return idle() && x == left && y == top ? [x, y] : null;
};
window.deep = selector => {
  const found = [];
  const walk = root => {
    found.push(...root.querySelectorAll(selector));
    for (const one of root.querySelectorAll("*")) if (one.shadowRoot) walk(one.shadowRoot);
  };
  walk(document);
  return found;
};
window.box = label => deep("label").filter(one => one.textContent.trim() == label)
  .map(one => one.getRootNode().querySelector("select, input")).find(one => one && one.checkVisibility());
window.choose = (label, text) => {
  const one = box(label), option = Array.from(one.options).find(each => each.textContent.trim() == text);
  one.value = option.value;
  one.dispatchEvent(new Event("change"));
};
window.words = () => deep("p, h1, h2, h3, li, summary").map(one => one.textContent).join("\\n");
window.idle = () => Bokeh.documents.length > 0 && Bokeh.documents[0].is_idle && Bokeh.index.roots.length > 0;
true
"""


class Page:
    """The app in a tab."""

    def __init__(self, tab, address):
        self.tab, self.address = tab, address

    def open(self, query=""):
        self.tab.open(self.address + query)
        self.tab.wait("document.readyState == 'complete' && Bokeh.documents.length && Bokeh.documents[0].is_idle")
        self.tab.evaluate(FIGURES)
        return self

    def head(self, name):
        """Wait until a head is shown."""
        self.tab.wait(f"deep('h2').some(one => one.textContent.startsWith({json.dumps(name)}))", f"the heading {name}")

    def click(self, part, layer, head):
        """Click on a cell of a head grid, once it has come to rest: what is drawn later may move it."""
        self.tab.click(*self.tab.wait(f"restingAt({json.dumps(part)}, {layer}, {head})"))

    def shows(self, part, wanted):
        """Wait until a head grid shows these numbers, ``(layer, head)``; pictures keep five digits."""
        wanted = np.asarray(wanted, dtype=float)
        cells = np.ndenumerate(wanted)
        numbers = {str(Head(*at)): None if np.isnan(value) else float(value) for at, value in cells}
        script = f"near(Object.fromEntries(grid({json.dumps(part)})), {json.dumps(numbers)})"
        self.tab.wait(script, f"the numbers {numbers} in {part}")

    def attends(self, part, name, wanted):
        """Wait until a picture shows this pattern, ``(query, key)``, of this head."""
        wanted = np.asarray(wanted, dtype=float)
        numbers = {
            f"{query} {key}": float(wanted[query, key])
            for query, key in zip(*np.tril_indices_from(wanted), strict=True)
        }
        script = f"near(pattern({json.dumps(part)}), {json.dumps(numbers)})"
        self.tab.wait(f"titleOf({json.dumps(part)}).startsWith({json.dumps(name)}) && {script}", f"{name} in {part}")

    def choose(self, label, text):
        self.tab.wait(f"box({json.dumps(label)})")
        self.tab.evaluate(f"choose({json.dumps(label)}, {json.dumps(text)})")

    def prompt(self, text):
        """Type a prompt in place of the one that is there, and press Enter."""
        self.fill("Prompt", text)

    def fill(self, label, text):
        """Type into a field in place of what is there, and press Enter."""
        self.tab.wait(f"!!box({json.dumps(label)})")
        self.tab.evaluate(f"box({json.dumps(label)}).focus(); box({json.dumps(label)}).select()")
        if text:
            self.tab.type(text)
        else:
            self.tab.press("Backspace")
        self.tab.press("Enter")

    def says(self, text):
        self.tab.wait(f"words().includes({json.dumps(text)})", f"the words {text!r}")
