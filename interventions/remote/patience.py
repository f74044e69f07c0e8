"""What is made of silence: a server that does not answer, does not know a job, or says nothing new of it.

It is asked again; a job is taken for lost, and sent again aloud; waiting comes to an end.
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Callable, Iterable

import httpx
from nnsight.schema.response import ResponseModel

from ...errors import ServerError, ServerWarning
from .job import JobState
from .ledger import InMemoryLedger, Ledger
from .listener import Listener
from .protocol import NdifRequest, Unfit, code_of, detail
from .refusals import explain_refusal, first_line, is_passing, one_line

PAUSES = (0.05, 2.0)
"""Seconds between two questions on a job, at first and at most."""
LOST = 60.0
"""Seconds for which a server does not know a job, or its result cannot be read, before it is taken for lost."""
LOSSES = 2
"""Times that a server may lose a job; then something is wrong with the server."""
GIVE_UP = 600.0
"""Seconds without an answer of use after which waiting ends; what was sent is written down."""
STILL = 30.0
"""Seconds without news of a job after which a marker is sent."""
STANDS = 3600.0
"""Seconds without a new status of a job, where a marker has not run either, after which waiting ends."""
KEPT = "what was sent to it is written down where the result is, and the same call goes on from there"
NOT_KEPT = "with out= the same call could go on from there"


class Patience:
    """What one call of `JobQueue.run` knows beside its jobs, and makes of a server that does not say how one ended.

    Parameters
    ----------
    host : str
        Address of the server.
    name : str
        Of the model.
    ledger : Ledger
        Where jobs are written down.

    Attributes
    ----------
    lasting : bool
        Whether a later process finds there what was sent.
    ran : float
        When the latest of the jobs that have run was sent: servers run them in the order in which they were sent.
    patience, still : float
        Seconds without news of a job after which a marker is sent, at first and by now.
    tick : callable
        Called while a question is being asked, so that a wish to stop is heard.
    """

    def __init__(self, host: str, name: str, ledger: Ledger) -> None:
        self.host, self.name, self.ledger = host, name, ledger
        self.lasting = not isinstance(self.ledger, InMemoryLedger)
        self.ran, self.still, self.patience = 0.0, STILL, STILL
        self.listener: Listener | None = None
        self.tick: Callable[[], object] | None = None

    @property
    def goes_on(self) -> str:
        """What the same call would do after an error."""
        return KEPT if self.lasting else NOT_KEPT

    def session(self, state: JobState, key: str) -> str:
        """What a job is sent under, where no later process could find it anyway or its end was hidden before."""
        if self.lasting and not state.marker and not state.hidden:
            return ""
        self.listener = self.listener or Listener(self.host, key)
        self.expect(state)
        return self.listener.session if self.listener.open else ""

    def expect(self, state: JobState) -> None:
        """A job's answer is to be heard, where there is a websocket."""
        if self.listener:
            self.listener.expect(state.number, state.job.most)

    def heard(self, state: JobState) -> ResponseModel | None:
        """What the websocket has said of a job."""
        return self.listener.heard(state.number) if self.listener and state.session else None

    def listens(self, state: JobState) -> bool:
        """Whether what becomes of a job will be heard, and need not be asked."""
        return bool(self.listener and state.session and self.listener.open)

    def wait(self, until: float) -> set[str]:
        """Wait; the numbers of jobs of which something was heard meanwhile."""
        seconds = max(0.0, until - time.monotonic())
        if self.listener and self.listener.open:
            return self.listener.wait(seconds)
        time.sleep(seconds)
        return set()

    def has_run(self, state: JobState) -> None:
        """A job has run."""
        self.ran = max(self.ran, state.begun)
        if state.marker:
            self.still = self.patience

    def forget(self, state: JobState) -> None:
        """A job has ended."""
        if self.listener:
            self.listener.forget(state.number)

    def close(self) -> None:
        """Nothing is listened to any more."""
        if self.listener:
            self.listener.close()

    def wants_marker(self, active: Iterable[JobState]) -> bool:
        """Whether there is no news of a job, so that one that does nothing is to be sent after it."""
        active, now = list(active), time.monotonic()
        stood = [one.stood for one in active if one.waits and one.stood and one.stood >= self.ran]
        young = any(one.marker and now - one.begun < self.still for one in active)
        if young or not stood or now - min(stood) < self.still:
            return False
        self.still *= 2
        return True

    def no_news(self, state: JobState) -> None:
        """A status that is not final: a late one may have taken the place of a final one, or the job is forgotten."""
        now = time.monotonic()
        stood = state.stood or now
        if self.ran > stood and state.waits:
            state.passed = state.passed or now
        if state.passed and now - state.passed > LOST:
            said, state.hidden = state.said[0].value.lower(), True
            self.lost(state, f"it is said to be {said}, and a job that was sent after it has run")
            return
        if now - stood > STANDS:
            raise ServerError(
                f"{self.host} has said nothing new of a job on {self.name} for {STANDS / 60:.0f} minutes: it is "
                f"{state.status}; {self.goes_on}"
            )
        if now - stood > self.patience and state.waits and "without news" not in state.status:
            state.status += " without news"
        self.pause(state)

    def not_told(self, state: JobState, request: NdifRequest, error: Exception) -> None:
        """A question without an answer of use: of the server itself, or of where it keeps results."""
        if isinstance(error, Unfit):
            self.unfit(state, first_line(error, request.api_key))
        elif request.last is not None and code_of(error) in (403, 404, 410):  # results are kept for a while only
            self.lost(state, "its result is no longer kept")
        elif request.last is None or isinstance(error, httpx.HTTPError):
            self.no_answer(state, request, error)
        else:
            self.not_read(state, first_line(error, request.api_key))

    def no_answer(self, state: JobState, request: NdifRequest, error: Exception) -> None:
        """Ask again, for a while, where that may do."""
        why = first_line(error, request.api_key)
        if isinstance(error, httpx.HTTPStatusError):
            code, said = error.response.status_code, detail(error)
            if not is_passing(code):
                raise ServerError(explain_refusal(self.host, self.name, code, said, request.api_key)) from None
            why = f"it answers {code}: {one_line(said, request.api_key)}"
        elif not isinstance(error, httpx.HTTPError):
            why = f"what answers does not speak as NDIF does ({why})"
        now = time.monotonic()
        state.silent, state.unknown = state.silent or now, None
        if now - state.silent > GIVE_UP:
            raise ServerError(f"{self.host} gives no answer: {why}; {self.goes_on}") from None
        state.status = "waiting for the server"
        self.pause(state)

    def not_read(self, state: JobState, why: str) -> None:
        """A finished job whose result makes no sense: a connection that was cut off, or something worse."""
        now = time.monotonic()
        state.unread = state.unread or now
        if now - state.unread > LOST:
            self.unfit(state, why)
        self.pause(state)

    def unfit(self, state: JobState, why: str) -> None:
        """A result that makes no sense, however often it is asked for."""
        state.ledger.drop_job(state.job.key)
        raise ServerError(f"a result of {self.host} cannot be read: {why}; the same call asks for it anew") from None

    def unknown(self, state: JobState) -> None:
        """A job that the server does not know, or whose answers cannot be heard any more."""
        now = time.monotonic()
        state.unknown = state.unknown or now
        if now - state.unknown > LOST:
            cut = state.session and not self.listens(state)
            self.lost(
                state, "the connection that it was to answer on was cut" if cut else "the server does not know it"
            )
        else:
            self.pause(state)

    def lost(self, state: JobState, why: str) -> None:
        """Mark a job to be sent again, with a warning if the server had it; the second time, end with an error."""
        if state.marker:
            state.again = time.monotonic() + STANDS  # another takes its place
            return
        if state.phase == "sent":
            state.losses += 1
            if state.losses >= LOSSES:
                raise ServerError(
                    f"{self.host} has lost a job on {self.name} {LOSSES} times ({why}): it takes jobs, and does not "
                    f"give what they find; {self.goes_on}"
                ) from None
            warnings.warn(f"job {state.number} is lost ({why}): it is sent again", ServerWarning, stacklevel=2)
            state.number = uuid.uuid4().hex
        state.ledger.drop_job(state.job.key)
        state.forget()
        state.again = 0.0

    def pause(self, state: JobState) -> None:
        """Ask again later."""
        state.again = time.monotonic() + state.wait
        state.wait = min(PAUSES[1], state.wait * 1.5)
