"""Files from outside: fetched, checked, unpacked. Nothing of them leaves its folder or grows without bound."""

from __future__ import annotations

import http.client
import re
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from tqdm import tqdm

from speechllm.errors import ConfigError, DataError
from speechllm.runtime import sha256, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from http.client import HTTPResponse
    from pathlib import Path

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60.0
TRIES = 5
"""So often a download may bring nothing new before it is given up."""
PAUSE_S = 2.0
"""Wait after the first try that brought nothing; twice as long after each further one."""
ALLOWED_SCHEMES = ("http://", "https://")
OTHER_FILE = "check the address, and that nothing stands between you and the server"
FETCH_AGAIN = "delete it and run again to fetch it anew"
_PART_SENT = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")


@dataclass(frozen=True)
class Limits:
    """How much may come out of an archive."""

    files: int
    file_bytes: int
    total_bytes: int


def fetch(url: str, path: Path, max_bytes: int) -> None:
    """Write what `url` holds to `path`. A download that was broken off goes on where it stopped (RFC 9110, sec. 14).

    Until all is there it lies beside as ``.NAME.part``, with the server's mark of that version in ``.NAME.part.tag``:
    where the server's file has changed since, or the server cannot send a part, it begins anew.

    Raises:
        ConfigError: `url` is no address of the web.
        DataError: the server refuses, the file is larger than `max_bytes`, or nothing more comes.
    """
    if not url.startswith(ALLOWED_SCHEMES):
        raise ConfigError(url, "is no address of the web", f"let it begin with {' or '.join(ALLOWED_SCHEMES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    idle_tries = 0
    while reason := _receive(url, part, before := _size(part), max_bytes):
        idle_tries = 0 if _size(part) > before else idle_tries + 1
        if idle_tries == TRIES:
            what = f"broke off after {_size(part)} bytes ({reason})"
            raise DataError(url, what, "check network and disk, then run again: it goes on")
        time.sleep(PAUSE_S * 2**idle_tries)
    part.replace(path)
    _tag(part).unlink(missing_ok=True)


def _receive(url: str, part: Path, have: int, max_bytes: int) -> str:
    """Add the rest of `url` to `part`; return why it did not come whole, or an empty string."""
    request = urllib.request.Request(url, headers=_headers(part, have))  # noqa: S310 - the scheme is checked above
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310 - the same
            return _write(response, url, part, have, max_bytes)
    except urllib.error.HTTPError as error:
        with error:
            return _refusal(error, url, part, have)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__


def _headers(part: Path, have: int) -> dict[str, str]:
    headers = {"User-Agent": "speechllm", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if _tag(part).is_file():
            headers["If-Range"] = _tag(part).read_text(encoding="utf-8")
    return headers


def _refusal(error: urllib.error.HTTPError, url: str, part: Path, have: int) -> str:
    """Return why to try again, or an empty string where nothing was left to send."""
    if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return ""
        part.unlink(missing_ok=True)
        return "the server's file is another now"
    passing = {http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS}
    if error.code < http.HTTPStatus.INTERNAL_SERVER_ERROR and error.code not in passing:
        raise DataError(url, f"answers {error.code} {error.reason}", "check the address, or fetch the file by hand")
    return f"{error.code} {error.reason}"


def _write(response: HTTPResponse, url: str, part: Path, have: int, max_bytes: int) -> str:
    at = _first_byte(response, url, have)
    total = None if response.length is None else at + response.length
    if total is not None and total > max_bytes:
        raise DataError(url, f"holds {total} bytes, more than the {max_bytes} that are expected", OTHER_FILE)
    version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    if version and not version.startswith("W/"):  # a weak mark may not be used for parts (RFC 9110, sec. 13.1.5)
        write_text(_tag(part), version)
    else:
        _tag(part).unlink(missing_ok=True)
    name = part.name.removeprefix(".").removesuffix(".part")
    with (
        part.open("r+b" if at else "wb") as stream,
        tqdm(total=total, initial=at, desc=name, unit="B", unit_scale=True, disable=None) as progress,
    ):
        stream.seek(at)
        while chunk := response.read(CHUNK_BYTES):
            stream.write(chunk)
            progress.update(len(chunk))
            if stream.tell() > max_bytes:
                raise DataError(url, f"sends more than the {max_bytes} bytes that are expected", OTHER_FILE)
        stream.truncate()
    return "" if total in (None, _size(part)) else "the connection was closed"


def _first_byte(response: HTTPResponse, url: str, have: int) -> int:
    """Return where in the file the answer begins."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0
    sent = _PART_SENT.fullmatch(response.headers.get("Content-Range", ""))
    if sent is None or int(sent[1]) != have:
        raise DataError(url, "sends another part than was asked for", "fetch the file by hand")
    return have


def _tag(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def require_recorded(path: Path) -> None:
    """Check `path` against ``NAME.sha256`` beside it, where that is there.

    Raises:
        DataError: it is another file than the one that was recorded.
    """
    record = _record(path)
    if not record.is_file():
        return
    was = record.read_text(encoding="utf-8").split(maxsplit=1)[:1]
    if was != [now := sha256(path)]:
        what = f"has the SHA-256 {now}, {record.name} says {''.join(was) or 'nothing'}"
        raise DataError(path, what, f"fetch it again, or delete {record.name} where the authors published a new file")


def record(path: Path) -> None:
    """Write ``NAME.sha256`` beside `path`, as ``sha256sum -c`` reads it."""
    if not _record(path).is_file():
        write_text(_record(path), f"{sha256(path)}  {path.name}\n")


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def unpack(archive: Path, folder: Path, limits: Limits) -> None:
    """Write what a zip file holds to `folder`; every member is checked against its CRC-32.

    Raises:
        DataError: it is no whole zip file, holds more than `limits`, or a member would leave `folder`.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            members = source.infolist()
            _check_members(archive, members, limits)
            for member in tqdm(members, desc=f"unpacking {archive.name}", unit="file", disable=None):
                if not member.is_dir():
                    target = folder / member.filename
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with source.open(member) as stream, target.open("xb") as written:
                        shutil.copyfileobj(stream, written, CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise DataError(archive, f"is no whole zip file ({error})", FETCH_AGAIN) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(archive, f"holds two members for one place ({error.filename})", FETCH_AGAIN) from error


def _check_members(archive: Path, members: Sequence[zipfile.ZipInfo], limits: Limits) -> None:
    if len(members) > limits.files:
        raise DataError(archive, f"holds {len(members)} files, more than {limits.files}", FETCH_AGAIN)
    if (total := sum(member.file_size for member in members)) > limits.total_bytes:
        raise DataError(archive, f"unpacks to {total} bytes, more than {limits.total_bytes}", FETCH_AGAIN)
    for member in members:
        if fault := _member_fault(member, limits):
            raise DataError(archive, f"holds {member.filename!r}, which {fault}", "do not use this file")


def _member_fault(member: zipfile.ZipInfo, limits: Limits) -> str | None:
    """Return what is wrong with a member of a zip file, or None."""
    path = PurePosixPath(member.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename or not member.filename.isprintable():
        return "would leave its folder"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "is a link"
    if member.flag_bits & 1:
        return "is encrypted"
    if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        return f"is packed by method {member.compress_type}"
    if member.file_size > limits.file_bytes:
        return f"unpacks to {member.file_size} bytes"
    return None
