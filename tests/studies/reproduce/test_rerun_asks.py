"""rerun asks before it opens a folder, a Hub id that is a folder here, or a server."""

import io
import sys

import pytest

from headwise.errors import ModelError, ResultError
from headwise.studies.cli.main import main
from headwise.studies.reproduce.rerun import rerun
from tests.support.changed_files import changed, own


@pytest.mark.parametrize(
    "name",
    [
        "/etc",
        "~/models",
        "../../etc",
        "..",
        ".",
        "\\\\server\\share\\model",
        "C:\\model",
        "a/b/c",
        "a/../b",
        "",
        "\x1b[2J",
    ],
)
def test_a_path_in_a_file_is_never_followed(files, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "in").mkdir()
    path = changed(files["baseline"], tmp_path / "in" / "a.nc", own({"model": name, "model_revision": "main"}))
    with pytest.raises(ResultError, match=r"names the model .*, which is no shipped one and no Hub id"):
        rerun(path, yes=True)
    local = changed(files["baseline"], tmp_path / "in" / "b.nc", own({"model": name, "model_revision": "local"}))
    with pytest.raises(ResultError, match="files do not keep where folders are"):
        rerun(local, yes=True)


def test_a_revision_that_is_a_path_is_refused(files, tmp_path):
    path = changed(
        files["baseline"], tmp_path / "a.nc", own({"model": "owner/name", "model_revision": "../../../etc/passwd"})
    )
    with pytest.raises(ResultError, match=r"names the revision '\.\./\.\./\.\./etc/passwd', which no model has"):
        rerun(path, yes=True)


def test_a_hub_id_that_is_a_folder_here_is_asked_for(files, tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    path = changed(files["baseline"], tmp_path / "a.nc", own({"model": "owner/name", "model_revision": "main"}))
    with pytest.raises(ResultError, match=rf"asks to open the model in the folder {tmp_path}/owner/name: .*--yes"):
        rerun(path)
    with pytest.raises(ModelError, match="owner/name"):  # agreed to, it is opened, and is no model
        rerun(path, yes=True)


def test_a_run_on_a_server_is_asked_for(files, tmp_path, monkeypatch, capsys):
    from headwise.interventions import load

    opened = []

    def opening(name, **options):
        opened.append((name, options))
        raise ModelError("stopped here")

    monkeypatch.setattr(load, "load", opening)
    path = changed(files["baseline"], tmp_path / "a.nc", own({"executed": "https://evil.example"}))
    with pytest.raises(ResultError, match=r"asks to run on the server that is set here, with your key, .* 'https"):
        rerun(path)
    with pytest.raises(ResultError, match="that is done only where you agree"):
        rerun(path, model="words-2l", yes=lambda text: False)
    assert main(["rerun", str(path)]) == 1
    assert "asks to run on the server that is set here" in capsys.readouterr().err
    assert opened == []
    with pytest.raises(ModelError, match="stopped here"):
        rerun(path, yes=True)
    assert main(["rerun", str(path), "--yes"]) == 1
    assert [options["remote"] for _, options in opened] == [True, True]


def test_at_a_terminal_it_is_asked(files, tmp_path, monkeypatch, capsys):
    from headwise.interventions import load

    def opening(name, **options):
        raise ModelError("stopped here")

    monkeypatch.setattr(load, "load", opening)
    path = changed(files["baseline"], tmp_path / "a.nc", own({"executed": "ndif"}))
    for answer, said in (("y\n", "stopped here"), ("\n", "nothing was run"), ("", "nothing was run")):
        keys, screen = io.StringIO(answer), io.StringIO()
        keys.isatty = screen.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", keys)
        monkeypatch.setattr(sys, "stderr", screen)
        assert main(["rerun", str(path)]) == 1
        assert "with your key, as it ran on 'ndif'.\nDo it? [y/N]" in screen.getvalue()
        assert said in screen.getvalue()
