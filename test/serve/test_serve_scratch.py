"""The folder of a server's files: made again where it was removed, and removed where its server was killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from running import FakeModel, numbered, serving, wav

from speechllm.serve.scratch import Scratch, remove

SOUND = wav(numbered(3))
HOLD = """
import sys, tempfile, time
from pathlib import Path
from speechllm.serve.scratch import Scratch
scratch = Scratch()
(scratch.path / "upload").write_bytes(b"a user's words")
print(scratch.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_folder_that_was_removed_is_made_again(temporary: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(FakeModel()) as running:
        assert running.post(SOUND).status_code == 200
        shutil.rmtree(running.service._scratch.path)
        assert [running.post(SOUND).status_code for _ in range(2)] == [200, 200]
        (folder,) = temporary.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert caplog.text.count("event=folder_made_again") == 1
    assert list(temporary.iterdir()) == []


def test_a_folder_that_cannot_be_made_again_is_no_room(temporary: Path) -> None:
    with serving(FakeModel()) as running:
        shutil.rmtree(temporary)
        answer = running.post(SOUND)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_room")
        assert answer.headers["retry-after"] == "5"
        temporary.mkdir()
        assert running.post(SOUND).status_code == 200


def test_what_a_killed_server_left_is_removed_by_the_next(temporary: Path) -> None:
    """That of a server that lives stays, and so does what is none of a server's."""
    environment = {**os.environ, "TMPDIR": str(temporary)}
    servers = [
        subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    try:
        killed, living = (Path(server.stdout.readline().strip()) for server in servers if server.stdout)
        servers[0].send_signal(signal.SIGKILL)
        servers[0].wait(30)
        assert (killed / "upload").exists()
        other = temporary / "other"
        other.mkdir()
        (temporary / "speechllm-serve-link").symlink_to(other)
        scratch = Scratch()
        left = {living, other, temporary / "speechllm-serve-link", scratch.path}
        assert set(temporary.iterdir()) == left
        assert (living / "upload").exists()
        scratch.close()
        assert set(temporary.iterdir()) == left - {scratch.path}
    finally:
        for server in servers:
            server.kill()
            server.communicate()


def test_a_folder_that_another_server_takes_for_left_behind_is_not_used(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts between the making of the folder and its locking."""
    make = tempfile.mkdtemp
    taken: list[str] = []

    def mkdtemp(**options: str) -> str:
        path = make(**options)
        if not taken:
            taken.append(path)
            Path(path).rmdir()
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    scratch = Scratch()
    assert taken != [str(scratch.path)]
    assert list(temporary.iterdir()) == [scratch.path]
    scratch.close()


def test_a_file_that_is_made_while_its_folder_is_removed_does_not_keep_it(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that is being killed may still open its output."""
    rmdir = os.rmdir
    made: list[Path] = []

    def late(path: str, **options: int) -> None:
        if not made:
            made.append(folder / "plain.wav")
            made[0].touch()
        rmdir(path, **options)

    with contextlib.closing(Scratch()) as scratch:
        folder = scratch.new_folder()
        (folder / "upload").touch()
        monkeypatch.setattr(os, "rmdir", late)
        remove(folder)
        assert made
        assert list(scratch.path.iterdir()) == []
    assert list(temporary.iterdir()) == []
