"""Folders of output: one writer at a time, and each knows what it was made from."""

from __future__ import annotations

import contextlib
import os
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from speechllm.errors import DataError
from speechllm.runtime import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path


DECODE_RECORD = "decode.json"
"""In a folder of texts: what they were made from, by our decoder or by another system."""


FOREIGN = {"wav.scp": "a data directory", "feats.scp": "features", "model.json": "a trained model"}
"""What no other stage may write over, by the file that tells."""


def check_own(out: Path, own: Collection[str] = ()) -> None:
    """Refuse a folder of output that holds what another stage made; `own` are the files that are this stage's.

    Raises:
        DataError: it does.
    """
    for mark, what in FOREIGN.items():
        if mark not in own and os.path.lexists(out / mark):
            raise DataError(
                out, f"holds {what} ({mark}), and would be written over", "name another folder for the output"
            )


def leads_out(name: str) -> bool:
    """Return whether the path of a file, as something from outside says it, is none below the folder it is said of."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which is made where it is not there.

    Raises:
        DataError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise DataError(folder, "another process is writing here", "wait for it to end") from error
    try:
        yield
    finally:
        lock.release()


def is_made(mark: Path, record: Mapping[str, object]) -> bool:
    """Return whether the folder of `mark` is whole and was made from `record`.

    Raises:
        DataError: it holds something made from another record; the first difference is named.
    """
    if not mark.is_file():
        return False
    content = read_json(mark)
    old = content.get("record")
    old = old if isinstance(old, dict) else {}
    for name, was, now in differences(old, record):
        what = f"holds output made with {name} = {was}, now it is {now}"
        raise DataError(mark.parent, what, "remove the folder or choose another")
    return content.get("complete") is True


def differences(
    old: Mapping[str, object], new: Mapping[str, object], prefix: str = ""
) -> list[tuple[str, object, object]]:
    """Return (name, old value, new value) of every field that differs, nested ones by dotted name."""
    found: list[tuple[str, object, object]] = []
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            found += differences(was, now, f"{prefix}{key}.")
        elif was != now:
            found.append((f"{prefix}{key}", was, now))
    return found


def begin(mark: Path, record: Mapping[str, object], **notes: object) -> None:
    """Note what the folder is being made from."""
    write_json(mark, {"record": dict(record), "complete": False, **notes})


def finish(mark: Path) -> None:
    """Note that the folder is whole."""
    write_json(mark, {**read_json(mark), "complete": True})
