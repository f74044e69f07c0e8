"""Serves the app: on loopback unless told otherwise, to pages of its own."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import DeclarationError, HeadwiseError, printable

if TYPE_CHECKING:
    from .firing import Models
    from .folder import Folder

IDLE_SECONDS = 60
"""A connection on which nothing is asked is closed after so long."""
UNUSED_MILLISECONDS = 20_000
"""A session whose tab is gone is dropped after so long."""


def serve(
    folder: str | os.PathLike[str],
    *,
    address: str = "127.0.0.1",
    port: int = 5006,
    show: bool = True,
    model: str | None = None,
    revision: str | None = None,
    step: int | None = None,
    allow: Sequence[str] = (),
) -> None:
    """Serve the results in a folder as a page, until interrupted; prints the page's address.

    Parameters
    ----------
    folder : str or path
        Only result files in it, and in folders in it, are ever opened.
    address : str
        Where to listen: this machine alone (default), ``0.0.0.0`` for all that reach it, or one of its addresses.
        There is no password: who reaches it can look at the results and run prompts.
    port : int
        0 picks a free one.
    show : bool
        Open the page in the browser.
    model : str, optional
        Shipped name, Hub id or folder of the model on which prompts run, instead of the one that each file names.
    revision, step : optional
        Of that model, as for `headwise.load`.
    allow : sequence of str
        Further names of the server, as the address bar shows them, such as ``lab.example`` where a proxy stands before
        it. It answers to the names of the machine that it listens at, and to these: to any other, another site could
        lead a reader's browser.

    Raises
    ------
    ResultError
        There is no such folder.
    DeclarationError
        Panel is not installed, the port is in use, the address is not one of this machine, or an allowed name is none.
    """
    from .firing import Models
    from .folder import Folder

    server, url = _server(Folder(folder), Models(model, revision=revision, step=step), address, port, allow=allow)
    _clean_logs()
    print(printable(f"headwise shows {folder} at {url}  (Ctrl-C ends it)"), flush=True)
    from . import gate

    if address not in gate.LOOPBACK:
        print(printable("anyone who reaches this address can look at the results and run prompts"), flush=True)
    if show:
        server.io_loop.add_callback(server.show, "/")
    server.start()
    try:
        server.io_loop.start()
    finally:
        server.stop()


class _Printable(logging.Formatter):
    """Lines of a log as they may be shown, whatever a request or a file put into them."""

    def __init__(self, before: logging.Formatter | None) -> None:
        super().__init__()
        self._before = before or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as before; what would steer a terminal stands as an escape."""
        return printable(self._before.format(record), lines=True)


def _clean_logs() -> None:
    """Clean what the server's libraries log to the terminal."""
    names = (None, "bokeh", "panel", "tornado", "headwise")
    handlers = [one for name in names for one in logging.getLogger(name).handlers]
    for one in [*handlers, *([logging.lastResort] if logging.lastResort else [])]:
        one.setFormatter(_Printable(one.formatter))


def _unless_gone(loop: Any, context: dict[str, Any]) -> None:
    """Report what goes wrong in the background, but not that a tab was closed while it was being written to."""
    from tornado.websocket import WebSocketClosedError

    if not isinstance(context.get("exception"), WebSocketClosedError):
        loop.default_exception_handler(context)


def _server(
    folder: Folder,
    models: Models,
    address: str,
    port: int,
    unused: int = UNUSED_MILLISECONDS,
    allow: Sequence[str] = (),
) -> tuple[Any, str]:
    """A server that is bound but not started, and the address of its page."""
    panel = _panel()
    from . import gate
    from .session import page

    port = _checked_port(address, port)
    names = gate.names_of(address, port, allow)
    try:
        server = panel.io.server.get_server(
            {"/": lambda: page(folder, models)},
            port=port,
            address=address,
            websocket_origin=names,
            websocket_max_message_size=gate.MESSAGE,
            http_server_kwargs={"max_body_size": gate.MESSAGE, "idle_connection_timeout": IDLE_SECONDS},
            secret_key=secrets.token_hex(32),
            sign_sessions=True,  # a session is opened with what a page of this server was given, and nothing else
            include_headers=[],
            include_cookies=[],
            title="headwise",
            show=False,
            start=False,
            use_index=False,
            unused_session_lifetime_milliseconds=unused,
            check_unused_sessions_milliseconds=max(unused // 4, 1),
        )
    except OSError as error:
        raise _cannot_listen(address, port, error) from error
    gate.guard(server, names)
    server.io_loop.asyncio_loop.set_exception_handler(_unless_gone)
    shown = "127.0.0.1" if address in gate.EVERYWHERE else address
    return server, f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/"


def _panel() -> Any:
    """Panel, or an error that says how to get it."""
    try:
        import panel
    except ImportError as error:
        raise DeclarationError("the app needs Panel: pip install 'headwise[app]'") from error
    return panel


def _checked_port(address: str, port: int) -> int:
    """`port`, or a free one for 0; an error where it cannot be listened at."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            return int(probe.getsockname()[1])
    except (OSError, OverflowError, TypeError) as error:
        raise _cannot_listen(address, port, error) from error


def _cannot_listen(address: str, port: int, error: Exception) -> HeadwiseError:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return DeclarationError(f"port {port} is in use: give another one, or 0 for one that is free")
    if isinstance(error, OverflowError | TypeError):
        return DeclarationError(f"port {port!r}: give a number from 1 to 65535, or 0 for one that is free")
    return DeclarationError(f"cannot listen at {address} port {port}: {getattr(error, 'strerror', None) or error}")
