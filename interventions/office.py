"""Jobs on an NDIF server: sent without waiting, asked for, and found again.

A job's number is made here and written down before it is sent, so that an answer that is lost, a process that is killed
or a connection that drops leaves a job that can be asked for: nothing is sent twice that the server may still have.
"""

from __future__ import annotations

import logging
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from nnsight.intervention.backends.remote import RemoteError as Refused
from nnsight.schema.response import Status

from ..errors import ServerError, ServerWarning
from . import book
from .refusals import explain_failure, explain_refusal, first_line, is_passing, may_be_taken, without_key
from .wire import Envelope, Line, detail, packed

LOG = logging.getLogger("headwise.remote")
AT_ONCE = 4
"""Jobs that a server has at a time."""
PAUSES = (0.05, 2.0)
"""Seconds between two questions, at first and at most."""
LOST = 60.0
"""Seconds after which a job that the server does not know is taken for lost."""
GIVE_UP = 600.0
"""Seconds without any answer after which waiting ends; what was sent is written down."""

UNREAD = 3
"""Results that cannot be read before that is taken for more than a broken connection."""


@dataclass
class Job:
    """Something for a server to do: ``served(root, program)``.

    Attributes
    ----------
    key : str
        A hash of what it asks; jobs with one key give the same.
    served : callable
    program : dict
    """

    key: str
    served: Callable[[Any, dict[str, Any]], Any]
    program: dict[str, Any]


@dataclass
class Failed:
    """What a server said of a job that it could not run."""

    reason: str


@dataclass
class _Sent:
    """Where a job is."""

    job: Job
    number: str
    state: str  # "new", "unsure" whether the server has it, "sent"
    since: float = field(default_factory=time.monotonic)
    silent: float | None = None
    unread: int = 0
    again: float = 0.0
    wait: float = PAUSES[0]
    status: str = "sending"


class Office:
    """Sends jobs on one model to one server.

    Parameters
    ----------
    root : nnsight model
        Without weights.
    name : str
        Of the model.
    """

    def __init__(self, root: Any, name: str) -> None:
        self.root, self.name = root, name
        self.model_key = root.to_model_key()
        line = self._line("")
        self.host = str(line.host)

    def _line(self, number: str) -> Line:
        line = Line(self.model_key, blocking=False, job_id=number, env=self.root._remoteable_get_env())
        line.display.enabled, line.compress = False, True
        return line

    def run(self, jobs: Sequence[Job], say: Callable[[str], None] | None = None) -> Iterator[tuple[int, Any]]:
        """Place in `jobs` and what came back, in the order in which they are finished; `Failed` where nothing did.

        Raises
        ------
        ServerError
            The server refuses, or cannot be reached for a long time. Jobs that it has stay written down.
        """
        where, kept = list(range(len(jobs))), book.current()
        active: dict[int, _Sent] = {}
        told = ""
        while where or active:
            while where and len(active) < AT_ONCE:
                active[where[0]] = self._found(jobs[where[0]], kept)
                del where[0]
            for at, sent in list(active.items()):
                if time.monotonic() < sent.again:
                    continue
                done = self._step(sent, kept)
                if done is not None:
                    del active[at]
                    yield at, done[0]
            told = self._tell(active, len(where), told, say)
            if active:
                time.sleep(max(0.0, min(sent.again for sent in active.values()) - time.monotonic()))

    def close(self, job: Job) -> None:
        """Forget a job, whose values are safe."""
        book.current().drop_job(job.key)

    def _found(self, job: Job, kept: book.Book) -> _Sent:
        record = kept.job(job.key)
        if record is None or record.get("host") != self.host or record.get("model") != self.model_key:
            return _Sent(job, uuid.uuid4().hex, "new")
        return _Sent(job, record["id"], "sent" if record["state"] == "sent" else "unsure")

    def knows(self, job: Job) -> bool:
        """Whether a job was sent before, by this process or another."""
        return self._found(job, book.current()).state != "new"

    def _note(self, sent: _Sent, kept: book.Book, state: str) -> None:
        sent.state, sent.since = state, time.monotonic()
        record = {"id": sent.number, "host": self.host, "model": self.model_key, "state": state}
        kept.note_job(sent.job.key, record | {"sent": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})

    def _step(self, sent: _Sent, kept: book.Book) -> tuple[Any] | None:
        """Ask once; what came back, in a tuple, where the job has ended."""
        if sent.state == "new":
            self._send(sent, kept)
            return None
        line = self._line(sent.number)
        try:
            result = line.poll()
        except httpx.HTTPStatusError as error:
            self._not_told(sent, kept, line, error)
            return None
        except httpx.HTTPError as error:
            self._wait(sent, first_line(error))
            return None
        except Exception as error:  # a result that is cut off fails in many ways
            sent.unread += 1
            if sent.unread > UNREAD:
                kept.drop_job(sent.job.key)
                raise ServerError(f"a result of {self.host} cannot be read: {first_line(error)}") from error
            self._pause(sent)
            return None
        sent.silent = None
        if line.last is None:
            if time.monotonic() - sent.since > LOST:
                self._lost(sent, kept)
            else:
                self._pause(sent)
            return None
        if sent.state == "unsure":
            self._note(sent, kept, "sent")
        if line.last.status == Status.ERROR:
            kept.drop_job(sent.job.key)
            return (Failed(without_key(line.last.description, line.api_key)),)
        if line.last.status == Status.COMPLETED:
            return (result["results"],)
        sent.status = line.last.status.value.lower()
        self._pause(sent)
        return None

    def _not_told(self, sent: _Sent, kept: book.Book, line: Line, error: httpx.HTTPStatusError) -> None:
        """An answer that is no status: of the server itself, or of where it keeps results."""
        code = error.response.status_code
        if line.last is not None and code in (403, 404, 410):  # results are kept for a while only
            self._lost(sent, kept, "its result is no longer kept")
        elif is_passing(code):
            self._wait(sent, f"it answers {code}")
        else:
            raise ServerError(explain_refusal(self.host, self.name, code, detail(error), line.api_key)) from None

    def _send(self, sent: _Sent, kept: book.Book) -> None:
        line = self._line(sent.number)
        blob = packed(self.root, sent.job.served, sent.job.program)
        self._note(sent, kept, "unsure")
        envelope = Envelope(model_key=self.model_key, compress=True, env=line.env, id=sent.number)
        try:
            answer = line._post(envelope, blob)
        except Refused as error:
            self._not_sent(sent, kept, line, error.__cause__)
            return
        sent.number, sent.status, sent.silent = answer.id, answer.status.value.lower(), None
        self._note(sent, kept, "sent")
        LOG.info("sent job %s to %s", sent.number, self.host)

    def _not_sent(self, sent: _Sent, kept: book.Book, line: Line, cause: BaseException | None) -> None:
        """A job that was not taken, or of which it is not known."""
        if isinstance(cause, httpx.HTTPStatusError):
            code = cause.response.status_code
            if not is_passing(code):
                kept.drop_job(sent.job.key)
                reason = explain_refusal(self.host, self.name, code, detail(cause), line.api_key)
                raise ServerError(reason) from None
            if may_be_taken(code):
                self._note(sent, kept, "unsure")
            else:
                kept.drop_job(sent.job.key)
                sent.state = "new"
            self._wait(sent, f"it answers {code}: {without_key(detail(cause), line.api_key)}")
        elif isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout):
            kept.drop_job(sent.job.key)
            sent.state = "new"
            self._wait(sent, first_line(cause))
        else:
            self._pause(sent)

    def _lost(self, sent: _Sent, kept: book.Book, why: str = "the server does not know it") -> None:
        if sent.state == "sent":
            warnings.warn(f"job {sent.number} is lost ({why}): it is sent again", ServerWarning, stacklevel=2)
            sent.number = uuid.uuid4().hex
        kept.drop_job(sent.job.key)
        sent.state, sent.again, sent.status = "new", 0.0, "sending"

    def _pause(self, sent: _Sent) -> None:
        sent.again = time.monotonic() + sent.wait
        sent.wait = min(PAUSES[1], sent.wait * 1.5)

    def _wait(self, sent: _Sent, why: str) -> None:
        """No answer of use: ask again, for a while."""
        now = time.monotonic()
        sent.silent = sent.silent or now
        sent.status = "waiting for the server"
        if now - sent.silent > GIVE_UP:
            raise ServerError(
                f"{self.host} gives no answer: {why}; what was sent to it is written down where the result is, and the "
                "same call goes on from there"
            )
        self._pause(sent)

    def _tell(self, active: dict[int, _Sent], later: int, told: str, say: Callable[[str], None] | None) -> str:
        counts = Counter(sent.status for sent in active.values())
        counts.update({"to send": later} if later else {})
        text = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        if text and text != told:
            LOG.info("jobs at %s: %s", self.host, text)
        if text and say is not None:
            say(text)  # each time, so that a wish to stop is heard
        return text

    def failure(self, failed: Failed) -> ServerError:
        """What a server said of a job, as an error."""
        return ServerError(explain_failure(self.host, self.name, failed.reason))
