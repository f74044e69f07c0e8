"""Jobs on an NDIF server: sent without waiting, asked for, and found again.

A *job* is something for the server to do, in one session; jobs that ask the same have one key. A queue sends the
jobs on one model to one server and asks how they are. A *ledger* is where it writes down what it sends: memory, or the
folder beside a result.

A job's number is made here and written down before it is sent, so that an answer that is lost, a process that is killed
or a connection that drops leaves a job that can be asked for: nothing is sent twice that the server may still have.

A job that a later process could not find again, as no result is being kept, is answered on a websocket where there is
one. The others are asked for again and again. There a late status may take the place of a final one, which the server
then has no way to tell: a job is taken for lost where its status stands still and a job that was sent after it has run.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from nnsight.schema.response import Status

from ...errors import ServerError
from ..traced.passes import server_jobs
from . import patience
from .asking import ALLOW, goes_in_clear
from .job import Failed, JobState, RemoteJob
from .ledger import InMemoryLedger, Ledger
from .patience import Patience
from .protocol import Envelope, NdifRequest, address, code_of, never_sent, serialize_session
from .reaching import reach
from .refusals import explain_clear, explain_failure, explain_key, is_key, may_be_taken, without_key
from .status_line import telling

LOG = logging.getLogger("headwise.remote")
AT_ONCE = 4
"""Jobs that a server has at a time."""
MARKER = -1
"""The place of a marker among jobs."""


class JobQueue:
    """Sends jobs on one model to one server.

    Parameters
    ----------
    root : nnsight model
        Without weights.
    name : str
        Of the model.

    Raises
    ------
    ServerError
        The address or the key that nnsight is set to cannot be one, or the key would go there in clear.
    """

    def __init__(self, root: Any, name: str) -> None:
        self.root, self.name, self.host = root, name, address()
        self.model_key = root.to_model_key()
        self._request("")

    def _request(self, number: str, tick: Callable[[], object] | None = None) -> NdifRequest:
        request = NdifRequest(self.host, number, self.root._remoteable_get_env(), tick)
        if not is_key(request.api_key):
            raise ServerError(explain_key(self.host))
        if request.api_key and goes_in_clear(self.host):
            raise ServerError(explain_clear(self.host, ALLOW))
        return request

    def run(
        self,
        jobs: Sequence[RemoteJob],
        say: Callable[[str], None] | None = None,
        ledger: Ledger | None = None,
        quiet: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """Send jobs, as many as the server should have at a time, and wait for them.

        Parameters
        ----------
        jobs : sequence of RemoteJob
        say : callable, optional
            Gets a line on how they are doing, again and again. Without it a terminal shows the line.
        ledger : Ledger, optional
            Where they are written down, so that a later process finds them.
        quiet : bool
            Show no line.

        Yields
        ------
        tuple of int and object
            Place in `jobs` and what came back, `Failed` where nothing did; in the order in which they are finished.

        Raises
        ------
        ServerError
            The server refuses, or cannot be reached for a long time. Jobs that it has stay written down.
        DeclarationError
            A function in a job cannot be sent.
        """
        call = Patience(self.host, self.name, ledger or InMemoryLedger())
        with telling(self.host, say, quiet) as tell:
            try:
                if len(jobs):
                    reach(self.host, self._request("").api_key, tell)
                yield from self._run(jobs, call, tell)
            finally:
                call.close()

    def _run(self, jobs: Sequence[RemoteJob], call: Patience, say: Callable[[str], None]) -> Iterator[tuple[int, Any]]:
        where = list(range(len(jobs)))
        active: dict[int, JobState] = {}
        told, fresh = "", set[str]()
        while where or active.keys() - {MARKER}:
            while where and len(active) < AT_ONCE:
                active[where[0]] = self._found(jobs[where[0]], call.ledger)
                del where[0]
            for at, state in list(active.items()):
                if time.monotonic() < state.again and state.number not in fresh:
                    continue
                done = self._step(state, call)
                if done is not None:
                    del active[at]
                    call.forget(state)
                    if not isinstance(done[0], Failed):
                        call.has_run(state)
                    if not where and not active.keys() - {MARKER}:
                        call.close()  # whoever takes the last may never come back
                    if at != MARKER:
                        yield at, done[0]
                told = self._tell(active, len(where), told, say)
                call.tick = partial(say, told) if told else call.tick
            if call.wants_marker(active.values()):
                active[MARKER] = self._marker()
            fresh = set()
            if active.keys() - {MARKER}:  # a job that does nothing is not waited for
                fresh = call.wait(min(state.again for state in active.values()))

    def knows(self, job: RemoteJob, ledger: Ledger) -> bool:
        """Whether a job was sent before, by this process or another."""
        return self._found(job, ledger).phase != "new"

    def failure(self, failed: Failed) -> ServerError:
        """What a server said of a job, as an error."""
        return ServerError(explain_failure(self.host, self.name, failed.reason))

    def _marker(self) -> JobState:
        """A job that does nothing: what was sent before it, and is not said to have run when it has, is lost."""
        number = uuid.uuid4().hex
        job = RemoteJob(number, server_jobs.do_nothing, {"key": number, "what": "marker"})
        LOG.info("no news of a job at %s: one that does nothing is sent, to see whether it runs before", self.host)
        return JobState(job, number, "new", patience.PAUSES[0], InMemoryLedger(), marker=True)

    def _found(self, job: RemoteJob, ledger: Ledger) -> JobState:
        record = ledger.job(job.key)
        if record is None or record.get("host") != self.host or record.get("model") != self.model_key:
            return JobState(job, uuid.uuid4().hex, "new", patience.PAUSES[0], ledger)
        return JobState(
            job, record["id"], "sent" if record["state"] == "sent" else "unsure", patience.PAUSES[0], ledger
        )

    def _note(self, state: JobState, phase: str) -> None:
        state.phase = phase
        record = {"id": state.number, "host": self.host, "model": self.model_key, "state": phase}
        state.ledger.note_job(state.job.key, record | {"sent": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})

    def _forget(self, state: JobState) -> None:
        state.ledger.drop_job(state.job.key)
        state.forget()

    def _step(self, state: JobState, call: Patience) -> tuple[Any] | None:
        """Send it or ask once; what came back, in a tuple, where the job has ended."""
        request = self._request(state.number, call.tick)
        if state.phase == "new":
            self._send(state, call, request)
            return None
        heard = call.heard(state)
        if heard is None and call.listens(state):
            call.unknown(state) if state.phase == "unsure" else call.no_news(state)
            return None
        try:
            results = request.ask(state.job.most, heard)
            results = state.job.taken(results) if results is not None else None
        except Exception as error:  # an answer that is cut off fails in many ways
            call.not_told(state, request, error)
            return None
        if request.last is None:
            call.unknown(state)
            return None
        state.silent = state.unknown = None
        if state.phase == "unsure":
            self._note(state, "sent")
        if request.last.status == Status.ERROR:
            state.ledger.drop_job(state.job.key)
            return (Failed(without_key(request.last.description, request.api_key)),)
        if request.last.status == Status.COMPLETED:
            return (results,)
        state.hear((request.last.status, request.last.description), time.monotonic())
        state.status = request.last.status.value.lower()
        call.no_news(state)
        return None

    def _send(self, state: JobState, call: Patience, request: NdifRequest) -> None:
        blob = serialize_session(self.root, state.job.function, state.job.program)
        state.session, state.begun = call.session(state, request.api_key), time.monotonic()
        envelope = Envelope(
            model_key=self.model_key, compress=True, env=request.env, id=state.number, session_id=state.session
        )
        self._note(state, "unsure")
        try:
            answer = request.post(envelope, blob)
        except Exception as error:  # so does an answer to this
            code = code_of(error)
            if never_sent(error) or (code is not None and not may_be_taken(code)):
                self._forget(state)
            call.no_answer(state, request, error)
            return
        state.number, state.status, state.silent = answer.id, answer.status.value.lower(), None
        call.expect(state)
        state.hear((answer.status, answer.description), time.monotonic())
        self._note(state, "sent")
        LOG.info("sent job %s to %s", state.number, self.host)

    def _tell(self, active: dict[int, JobState], later: int, told: str, say: Callable[[str], None]) -> str:
        counts = Counter(state.status for state in active.values() if not state.marker)
        counts.update({"to send": later} if later else {})
        text = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        if text and text != told:
            LOG.info("jobs at %s: %s", self.host, text)
        if text:
            say(text)  # each time, so that a wish to stop is heard
        return text
