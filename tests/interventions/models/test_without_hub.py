"""Where the Hugging Face Hub cannot be reached, that is said soon, and what was fetched before is opened."""

import os
import socket
import subprocess
import sys
import threading

import pytest

CACHED = """
import sys, time, headwise as hw
hw.load, hw.Model  # imports transformers
for name in sys.argv[1:]:
    began = time.monotonic()
    try:
        print(hw.load(name.removeprefix("remote:"), remote=name.startswith("remote:")))
    except hw.errors.ModelError as error:
        print(error)
    print(f"{time.monotonic() - began:.0f}")
"""


@pytest.fixture(params=[*(pytest.param(one, marks=pytest.mark.heavy) for one in ("refuses", "fails")), "never answers"])
def no_hub(request, tmp_path):
    """Runs `CACHED` where the Hub is not: lines and seconds, and how often the Hub was asked."""
    listening = socket.create_server(("127.0.0.1", 0))
    port, asked, held = listening.getsockname()[1], [], []

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            asked.append(connection)
            held.append(connection)
            if request.param == "fails":
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                connection.close()

    if request.param == "refuses":
        listening.close()
    else:
        threading.Thread(target=serve, daemon=True).start()

    def run(*arguments):
        asked.clear()
        here = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hf")}
        here = {name: value for name, value in here.items() if name != "HF_HUB_OFFLINE" and "proxy" not in name.lower()}
        done = subprocess.run(
            [sys.executable, "-c", CACHED, *arguments],
            env=here,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        said = done.stdout.splitlines()
        return said[::2], [int(one) for one in said[1::2]], len(asked)

    yield run
    listening.close()
    for connection in held:
        connection.close()


def test_without_the_hub_that_is_said_soon_and_what_was_fetched_before_is_opened(no_hub, folder, tmp_path):
    commit = "0123456789" * 4
    cached = tmp_path / "hf" / "hub" / "models--some--id"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / commit)
    (fetched, *never), seconds, asked = no_hub("some/id", "nobody/nothing", "remote:nobody/nothing")
    assert fetched == "<Model some/id (main): gpt2, 2 layers of 2 heads, float32 on cpu, runs here>"
    for line in never:
        assert line.startswith("cannot get nobody/nothing from the Hugging Face Hub: it cannot be reached (")
        assert "and this model was not fetched before; without the Hub use a local folder or a shipped model" in line
    assert asked <= 4, "once for each, and huggingface_hub may ask for itself"
    assert max(seconds) < 20, "trying each file again and again takes 29 s"
