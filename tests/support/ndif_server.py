"""A server that speaks nnsight 0.8's wire protocol on loopback, and misbehaves when it is told to.

Run as ``python -I ndif_server.py``, once for many servers: it forks one for each line that it reads, so that torch is
imported once. A line names a configuration, a JSON file: ``folder`` (where the server keeps what it did), ``models``
(repo id to folder), and, where they are wanted, ``port``, ``key``, ``minimum`` (version of nnsight) and ``apart`` (jobs
see modules without weights). Each server is a process of its own, with its own copies of the models, that can import
torch, numpy, transformers and nnsight but not headwise. It prints its number and its port.

Every execution is a line of ``FOLDER/executed``; every answer that carries results, of ``FOLDER/sent``.
"""

import asyncio
import contextlib
import importlib.abc
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path
from queue import Queue


class Blocked(importlib.abc.MetaPathFinder):
    """Refuses to find headwise, wherever it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "headwise":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


sys.meta_path = [Blocked(), *(one for one in sys.meta_path if "editable" not in repr(one))]

import torch  # noqa: E402
import zstandard  # noqa: E402
from nnsight.intervention.envoy import Envoy  # noqa: E402
from nnsight.intervention.tracer import InterleavingTracer  # noqa: E402
from nnsight.modeling.transformers import TransformersModel  # noqa: E402
from nnsight.schema.request import RequestModel  # noqa: E402
from nnsight.schema.response import ResponseModel, Status  # noqa: E402
from nnsight.tracing.globals import BLOCKS, SOURCES  # noqa: E402
from nnsight.tracing.tracer import _saves, dec, inc  # noqa: E402
from tornado import web, websocket  # noqa: E402

LARGEST_INLINE = 200_000


class Envelope(RequestModel):
    """What a client says beside the payload; an id of its own is taken."""

    id: str = ""


class Server:
    """Models, jobs, and what is to go wrong next."""

    def __init__(self, config):
        self.config = config
        if config.get("apart"):
            InterleavingTracer.stop = no_stop
        self.folder = Path(config["folder"])
        (self.folder / "responses").mkdir(parents=True, exist_ok=True)
        self.jobs, self.sockets, self.models = Queue(), {}, {}  # sockets by session
        self.faults = []  # of {"at", "how", ...}, each taken once
        self.loop = None
        self.base = ""
        for path in (self.folder / "responses").glob("*.json"):  # what had not ended is lost with the process
            if json.loads(path.read_text())["status"] not in ("COMPLETED", "ERROR"):
                self.note("interrupted", id=path.stem)
                path.unlink()

    def fault(self, at):
        """The next thing that is to go wrong there, if any; one may first be skipped so many times."""
        for number, fault in enumerate(self.faults):
            if fault["at"] == at and fault.get("skip", 0):
                fault["skip"] -= 1
                return None
            if fault["at"] == at:
                return self.faults.pop(number)
        return None

    def note(self, name, **facts):
        """Write down what was done; survives the process."""
        with (self.folder / name).open("a") as log:
            log.write(json.dumps(facts) + "\n")

    def model(self, key):
        """Our copy of a model."""
        where = json.loads(key.partition(":")[2])
        if where["repo_id"] not in self.config["models"]:
            raise LookupError(f"Could not deploy this model. Repository Not Found for {where['repo_id']}")
        if key not in self.models:
            folder, dtype = self.config["models"][where["repo_id"]], self.config.get("dtype", "float32")
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.models[key] = TransformersModel(
                folder, task=where["task"], dispatch=True, dtype=getattr(torch, dtype), device=device
            )
            self.models[key]._module.eval()
        return self.models[key]

    def respond(self, envelope, status, description="", data=None):
        """To the socket of a job that was sent under its session, and nowhere else; to the store for the others."""
        said = [ResponseModel(id=envelope.id, status=status, description=description, data=data)]
        if status in (Status.COMPLETED, Status.ERROR) and (late := self.fault("late")):  # another process has its say
            self.note("late", id=envelope.id)
            said.append(ResponseModel(id=envelope.id, status=Status[late["how"]], description="Moved to position 1."))
        if not envelope.session_id:
            path = self.folder / "responses" / f"{envelope.id}.json"
            beside = path.with_suffix(f".{threading.get_ident()}")  # a job may be sent again while it runs
            beside.write_text(said[-1].model_dump_json())  # the last one wins
            os.replace(beside, path)
            return
        for one in said:
            frame = one.pickle() if isinstance(one.data, bytes) else one.model_dump_json()
            self.loop.call_soon_threadsafe(self.say, envelope.session_id, frame)

    def say(self, session, frame):
        """A frame on a socket; nobody keeps what nobody listens to."""
        socket = self.sockets.get(session)
        if socket is not None and socket.ws_connection is not None:
            socket.write_message(frame, binary=isinstance(frame, bytes))

    def work(self):
        """Run jobs, one after the other; a fault of ours ends the process, or clients would wait for what is dead."""
        try:
            self.work_on()
        except BaseException:
            traceback.print_exc()
            os._exit(70)

    def work_on(self):
        torch.set_num_threads(1)
        while True:
            envelope, blob = self.jobs.get()
            fault = self.fault("execute") or {}
            if fault.get("how") == "lose":
                self.note("lost", id=envelope.id)
                (self.folder / "responses" / f"{envelope.id}.json").unlink(missing_ok=True)
                continue
            self.respond(envelope, Status.DISPATCHED, "Your job has been sent to the model deployment.")
            self.respond(envelope, Status.RUNNING, "Your job has started running.")
            if fault.get("how") == "cut":
                self.loop.call_soon_threadsafe(cut, list(self.sockets.values()))
            time.sleep(fault.get("seconds", 0))
            if fault.get("how") == "error":
                self.respond(envelope, Status.ERROR, fault.get("detail", "told to fail"))
                continue
            try:
                content = self.execute(envelope, blob)
            except Exception as error:
                if isinstance(error, LookupError) and "Could not deploy" in str(error):
                    self.respond(envelope, Status.ERROR, str(error.args[0]))
                else:
                    self.respond(envelope, Status.ERROR, "".join(traceback.format_exception(error)))
                continue
            self.deliver(envelope, content)

    def execute(self, envelope, blob):
        """Run the shipped block on our model, as nnsight's own server does; what it saved, as bytes."""
        model = self.model(envelope.model_key)
        model._remoteable_set_env(envelope.env)
        objects = self.shell(envelope.model_key, model) if self.config.get("apart") else None
        try:
            objects = objects or model._remoteable_persistent_objects()
            tracer = RequestModel.deserialize(blob, objects, envelope.compress)
            if self.config.get("apart"):
                root = tracer.info.frame.f_locals["root"]
                root.__dict__["interleave"] = lambda fn, *given, **more: model.interleave(
                    getattr(model, fn.__name__), *given, **more
                )
            program = tracer.info.frame.f_locals.get("program", {})
            if change := self.fault("model"):  # somebody works on the model while it is served
                part = model._module.get_submodule(change["part"])
                part.weight.data.mul_(change["factor"]) if change["how"] == "weight" else setattr(part, "eps", 0.5)
            self.note("executed", id=envelope.id, key=program.get("key", ""), what=program.get("what", ""))
            inc()
            try:
                tracer.execute(tracer.info.code)
                marked = _saves()
                saved = {name: one for name, one in tracer.info.frame.f_locals.items() if id(one) in marked}
            finally:
                dec()
        finally:
            SOURCES.clear()
            BLOCKS.clear()
        if any(name.partition(".")[0] == "headwise" for name in sys.modules):
            raise RuntimeError("headwise was imported")
        if change := self.fault("tamper"):
            tampered(saved["results"], change["how"])
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        content = buffer.getvalue()
        return zstandard.ZstdCompressor(level=3).compress(content) if envelope.compress else content

    def shell(self, key, model):
        """Modules without weights, calls of which reach ours: what a server gives to jobs that it does not trust."""
        where = json.loads(key.partition(":")[2])
        empty = TransformersModel(
            self.config["models"][where["repo_id"]], task=where["task"], tokenizer=model.tokenizer
        )
        ours = {one.path: one for one in model.modules()}
        real = Envoy.__call__ if not hasattr(Envoy, "_real") else Envoy._real

        def call(self, *given, **more):
            there = ours.get(self.path, self)
            return real(there, *given, **more)

        Envoy._real, Envoy.__call__ = real, call
        return empty._remoteable_persistent_objects() | {"Interleaver": model.interleaver}

    def deliver(self, envelope, content):
        """Send a result: on the socket where there is one, else by its address."""
        self.note("sent", id=envelope.id, bytes=len(content))
        fault = self.fault("deliver") or {}
        if fault.get("how") == "empty":
            self.respond(envelope, Status.COMPLETED, "Your job has been completed.")
            return
        if envelope.session_id and len(content) <= LARGEST_INLINE and not fault:
            self.respond(envelope, Status.COMPLETED, "Your job has been completed.", content)
            return
        (self.folder / f"{envelope.id}.pt").write_bytes(content)
        self.respond(
            envelope, Status.COMPLETED, "Your job has been completed.", f"{self.base}/results/{envelope.id}.pt"
        )


def tampered(results, how):
    """Make of results what they are not."""
    results = results.get("planned", results)
    if how == "double":
        for name in {"numbers", "table"} & set(results):
            other = torch.float32 if results[name].dtype == torch.float64 else torch.float64
            results[name] = results[name].to(other)
        return
    numbers, shapes = results["numbers"], results["shapes"]
    if how == "broadcast":
        shapes[0][0][1], results["numbers"] = [1, 1], numbers[:1].clone()
    elif how == "rows":
        shapes[0][0][1] = shapes[0][0][1][::-1]
    elif how in ("fewer", "more"):
        results["numbers"] = numbers[:-1].clone() if how == "fewer" else torch.cat([numbers, numbers])
    elif how == "renamed":
        shapes[0][0][0] = "other"
    elif how == "negative":
        shapes[0][0][1] = [-1, -1]
    elif how == "shapes":
        results["shapes"] = {"0": shapes}
    elif how == "extra":
        shapes.append(shapes[0])


def no_stop(tracer):
    """After a stop, ndif 0.1.2 loses count of what it told a job that it does not trust."""
    raise RuntimeError("a trace cannot be stopped on this server")


def cut(sockets):
    """End connections as a network does: without a word."""
    for socket in sockets:
        socket.ws_connection.stream.close()


class Handler(web.RequestHandler):
    """What all routes share: the server, and what goes wrong."""

    def initialize(self, server):
        self.server = server

    def refuse(self, status, detail):
        self.set_status(status)
        self.finish({"detail": detail})
        return True

    async def wrong(self, at):
        """Whether something went wrong, as it was told to."""
        fault = self.server.fault(at)
        if fault is None:
            return False
        if fault["how"] == "delay":
            await asyncio.sleep(fault["seconds"])
            return False
        if fault["how"] == "drop":
            self.detach().close()
            return True
        if fault["how"] == "page":
            self.finish("<html>Log in to the network.</html>")
            return True
        return self.refuse(int(fault["how"]), fault.get("detail", f"told to answer {fault['how']}"))

    def key_is_wrong(self):
        key, given = self.server.config.get("key"), self.request.headers.get("ndif-api-key")
        if key is None or given == key:
            return False
        if not given:
            return self.refuse(401, "Missing or invalid API key. Please visit https://login.ndif.us/ to create one.")
        if len(given) < 10:
            return self.refuse(400, f"Invalid API key format: '{given}'.")
        return self.refuse(403, "Invalid API key.")


class Request(Handler):
    async def post(self):
        if await self.wrong("request") or self.key_is_wrong():
            return
        minimum, version = self.server.config.get("minimum"), self.request.headers.get("nnsight-version", "0")
        if minimum and tuple(map(int, version.split(".")[:3])) < tuple(map(int, minimum.split("."))):
            self.refuse(400, f"Client nnsight version {version} is below the minimum supported {minimum}.")
            return
        envelope = Envelope.model_validate_json(self.get_body_argument("data"))
        envelope.id = envelope.id or uuid.uuid4().hex
        self.server.note("received", id=envelope.id, bytes=len(self.request.files["blob"][0]["body"]))
        received = ResponseModel(id=envelope.id, status=Status.RECEIVED, description="Your job has been received.")
        self.server.respond(envelope, Status.QUEUED, "Added to Queue at position 1.")
        self.server.jobs.put((envelope, self.request.files["blob"][0]["body"]))
        if await self.wrong("received"):
            return
        self.finish(received.model_dump_json())


class Response(Handler):
    async def get(self, number):
        if await self.wrong("response"):
            return
        path = self.server.folder / "responses" / f"{number}.json"
        if not path.is_file():
            self.refuse(404, f"No response for request {number}.")
            return
        self.finish(path.read_text())


class Result(Handler):
    async def get(self, name):
        if await self.wrong("result"):
            return
        self.finish((self.server.folder / name).read_bytes())


class Faults(Handler):
    def post(self):
        self.server.faults.append(json.loads(self.request.body))

    def delete(self):
        self.server.faults.clear()


class Subscribe(websocket.WebSocketHandler):
    def initialize(self, server):
        self.server = server

    async def get(self, *given):
        fault = self.server.fault("subscribe") or {}
        await asyncio.sleep(fault.get("seconds", 0))
        if fault.get("how", "delay") != "delay":
            self.set_status(int(fault["how"]))
            self.finish("no websocket here")
            return
        await super().get(*given)

    def open(self):
        self.number = uuid.uuid4().hex
        self.server.sockets[self.number] = self
        self.server.note("subscribed", id=self.number)
        self.write_message(json.dumps({"session_id": self.number}))

    def on_close(self):
        self.server.sockets.pop(self.number, None)


class Ping(Handler):
    async def get(self):
        if await self.wrong("ping"):
            return
        try:
            import headwise  # noqa: F401
        except ModuleNotFoundError:
            self.finish({"headwise": False, "isolated": sys.flags.isolated})
            return
        self.refuse(500, "headwise can be imported")


async def main(config):
    server = Server(config)
    server.loop = asyncio.get_running_loop()
    routes = [
        ("/request", Request),
        ("/response/(.*)", Response),
        ("/results/(.*)", Result),
        ("/faults", Faults),
        ("/subscribe", Subscribe),
        ("/ping", Ping),
    ]
    app = web.Application([(route, handler, {"server": server}) for route, handler in routes])
    http = app.listen(config.get("port", 0), "127.0.0.1", max_buffer_size=2**30)
    port = next(iter(http._sockets.values())).getsockname()[1]
    server.base = f"http://127.0.0.1:{port}"
    threading.Thread(target=server.work, daemon=True).start()
    print(os.getpid(), port, flush=True)
    await asyncio.Event().wait()


def fork_servers():
    """A server for each line; they end with this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that end
    children = []
    for line in sys.stdin:
        children.append(os.fork())
        if not children[-1]:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            path = Path(line.strip())
            with path.with_name("log").open("a") as log:
                os.dup2(log.fileno(), 2)
            asyncio.run(main(json.loads(path.read_text())))
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    fork_servers()
