"""What is said of a hostile server, and facts that an honest one sends."""

import sys
import threading
import time
import traceback

import pytest
import torch

import headwise as hw
from tests.support.loopback import KEY

ALLOWED = 100
"""Megabytes that a client may take of what it did not ask for."""
FACTS = {
    "dtype": "float32",
    "device": "cpu",
    "weights": [],
    "buffers": [],
    "modules": {},
    "fingerprint": torch.ones(3, 8, 4, dtype=torch.float64),
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="the most memory that a process had is known on Linux only")


def refused():
    """What is said of a server whose answer cannot be used: an error of ours, in a line."""
    with pytest.raises(hw.errors.HeadwiseError) as caught:
        hw.load("words-2l", remote=True).identity  # noqa: B018
    told = str(caught.value)
    assert "\n" not in told
    assert len(told) < 1000
    assert KEY not in "".join(traceback.format_exception(caught.value))
    return told


def ends(server, seconds=20):
    """Wait until a server sees that its client has gone, or has done all that it wanted."""
    until = time.monotonic() + seconds
    while any(one.name.startswith("headwise") for one in threading.enumerate()):
        assert time.monotonic() < until, "a thread is left"
        time.sleep(0.02)
    return server
