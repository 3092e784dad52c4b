"""Checkpoints and folders are whole or not taken for one."""

import os

import pytest

from attnopt.checkpoints import MARKER, mark_complete, newest_complete, write_folder
from attnopt.errors import UserError
from attnopt.runs import load_model


@pytest.fixture
def checkpoints(tmp_path):
    """Two whole checkpoints, 9 and 10, as far as the file names go."""
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "inner").mkdir(parents=True)
        (folder / "weights").write_bytes(b"w" * 100)
        (folder / "inner" / "state").write_bytes(b"s" * 10)
        mark_complete(folder)
    return tmp_path


def test_the_newest_whole_checkpoint_is_found_by_number(checkpoints):
    (checkpoints / "checkpoint-notes").mkdir()
    assert newest_complete(checkpoints).name == "checkpoint-10"
    assert newest_complete(checkpoints / "nothing") is None


@pytest.mark.parametrize("harm", ["truncate", "extend", "remove", "unmarked", "half a marker"])
def test_torn_checkpoints_are_passed_over_with_a_warning(checkpoints, harm, monkeypatch):
    said = []
    monkeypatch.setattr("attnopt.checkpoints.logger.warning", said.append)
    newest = checkpoints / "checkpoint-10"
    if harm == "truncate":
        os.truncate(newest / "weights", 50)
    elif harm == "extend":
        os.truncate(newest / "inner" / "state", 11)
    elif harm == "remove":
        (newest / "inner" / "state").unlink()
    elif harm == "unmarked":
        (newest / MARKER).unlink()
    else:
        os.truncate(newest / MARKER, 9)
    assert newest_complete(checkpoints).name == "checkpoint-9"
    assert said == [f"skipping {newest}: it is incomplete or was truncated"]
    with pytest.raises(UserError, match="checkpoint-10 is incomplete or was truncated"):
        load_model(newest)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "student"
    write_folder(target, lambda folder: (folder / "old").touch())

    def fail(folder):
        (folder / "new").touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot write .*student: No space left on device"):
        write_folder(target, fail)
    assert [p.name for p in tmp_path.rglob("*")] == ["student", "old"]
    write_folder(target, lambda folder: (folder / "new").touch())
    assert [p.name for p in tmp_path.rglob("*")] == ["student", "new"]
