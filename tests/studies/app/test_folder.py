"""The folder that the app serves: what is listed, what is opened, and what is refused."""

from __future__ import annotations

import os

import pytest
import xarray as xr

from headwise.errors import ResultError, UnknownNameError
from headwise.studies.app.folder import Folder, Listed
from tests.support.app import (
    STUDY,
    SWEEP,
)


def test_results_are_listed_and_every_other_file_says_why_it_is_none(folder):
    listed = {one.name: one.reason for one in Folder(folder).files()}
    assert {name for name, reason in listed.items() if not reason} == {STUDY, SWEEP}
    assert set(listed) == {STUDY, SWEEP, "torn.nc", "<b>noise.nc", "link.nc"}
    assert "outside" in listed["link.nc"]


@pytest.mark.parametrize(
    "name",
    [
        "../secret.nc",
        "./a-study.nc",
        "sweeps/../a-study.nc",
        "sweeps/../../secret.nc",
        "/etc/passwd",
        "a-study",
        "a-study.nc\0",
        "\0",
        "",
        ".",
        "..",
        "notes.txt",
        "A-STUDY.NC",
        "%2e%2e/secret.nc",
    ],
)
def test_only_names_of_the_listing_are_opened(folder, name):
    with pytest.raises(UnknownNameError, match="is called"):
        Folder(folder).open(name)


def test_absolute_paths_are_refused_even_of_files_in_the_folder(folder):
    with pytest.raises(UnknownNameError, match="is called"):
        Folder(folder).open(str(folder / STUDY))


@pytest.mark.parametrize("name", ["link.nc", "torn.nc", "<b>noise.nc"])
def test_files_that_are_no_results_are_refused_with_their_reason(folder, name):
    with pytest.raises(ResultError, match="cannot be shown"):
        Folder(folder).open(name)


def test_a_file_replaced_by_a_link_is_refused(folder, tmp_path, monkeypatch):
    place = tmp_path / "results"
    place.mkdir()
    (place / "x.nc").symlink_to(folder / STUDY)
    opened = Folder(place)
    monkeypatch.setattr(Folder, "files", lambda self: [Listed("x.nc")])  # as it was when the folder was listed
    with pytest.raises(ResultError, match="leads out of the folder"):
        opened.open("x.nc")


def test_pipes_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.nc")
    with pytest.raises(ResultError, match="cannot be shown"):
        Folder(tmp_path).open("pipe.nc")


def test_a_file_is_read_once_and_again_when_it_changes(folder, tmp_path):
    path = tmp_path / "one.nc"
    path.write_bytes((folder / STUDY).read_bytes())
    opened = Folder(tmp_path)
    assert opened.open("one.nc") is opened.open("one.nc")
    before = opened.open("one.nc")
    path.write_bytes((folder / SWEEP).read_bytes())
    assert "loss" in opened.open("one.nc").to_dataset()
    assert before is not opened.open("one.nc")


def test_a_result_is_whole_in_memory_and_the_same(tree, folder):
    variables = [(node.path, name, one) for node in tree.subtree for name, one in node.to_dataset().variables.items()]
    assert [(path, name) for path, name, one in variables if not one._in_memory] == []
    with xr.open_datatree(folder / STUDY) as stored:
        xr.testing.assert_identical(tree, stored)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ResultError, match="does not exist"):
        Folder(tmp_path / "nowhere")
