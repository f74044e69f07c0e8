"""A sweep on a server that has faults."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

import headwise as hw
from headwise.studies import RepeatedTokens
from tests.support import remote_client
from tests.support.loopback import KEY

TASK = RepeatedTokens(n=2, length=6)
JOBS = 4


def swept(out=None):
    return remote_client.sweep(hw.load("words-2l", remote=True), out)


def wait_for(reached, seconds=60):
    """Until something is so; a failure where it does not come."""
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, "it was not reached in time"
        time.sleep(0.02)


def same(found, wanted):
    for name in (name for name in wanted.data_vars if wanted[name].dtype.kind in "fiu"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, atol=1e-6)


def listening():
    return [one.name for one in threading.enumerate() if one.name == "headwise listener"]


def lines_said(capfd):
    return capfd.readouterr().err.splitlines()


def environment(server):
    return os.environ | {"NDIF_HOST": server.host, "NDIF_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}


def client(server, out, kind="sweep"):
    return subprocess.Popen(
        [sys.executable, str(Path(remote_client.__file__)), str(out), kind],
        env=environment(server),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
