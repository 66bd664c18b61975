"""Downloads go on where they were broken off, and nothing that an archive holds leaves its folder."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from typing import TYPE_CHECKING

import pytest
from local_scripts import load
from local_server import Site, serve

from speechllm.errors import ConfigError, DataError
from speechllm.runtime import sha256

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

download = load("download")

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SMALL = download.Limits(files=10, file_bytes=1000, total_bytes=3000)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    with serve({"/a.bin": CONTENT}) as served:
        yield served


def test_a_file_is_fetched_and_nothing_else_is_left(site: Site, tmp_path: Path) -> None:
    download.fetch(f"{site.address}/a.bin", tmp_path / "new" / "a.bin", len(CONTENT))
    assert (tmp_path / "new" / "a.bin").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.bin"]
    assert site.asked == [("/a.bin", "")]


def test_a_broken_off_download_goes_on_by_itself(site: Site, tmp_path: Path) -> None:
    site.cut_after = [300_000, 500_000]
    download.fetch(f"{site.address}/a.bin", tmp_path / "a.bin", len(CONTENT))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [asked for _, asked in site.asked] == ["", "bytes=300000-", "bytes=800000-"]


def test_a_run_that_gave_up_goes_on_in_the_next(site: Site, tmp_path: Path) -> None:
    site.cut_after = [300_000, *[0] * download.TRIES]
    with pytest.raises(DataError) as caught:
        download.fetch(f"{site.address}/a.bin", tmp_path / "a.bin", len(CONTENT))
    assert str(caught.value) == (
        f"{site.address}/a.bin: broke off after 300000 bytes (the connection was closed); "
        "check network and disk, then run again: it goes on"
    )
    assert not (tmp_path / "a.bin").exists()
    site.asked.clear()
    download.fetch(f"{site.address}/a.bin", tmp_path / "a.bin", len(CONTENT))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert site.asked == [("/a.bin", "bytes=300000-")]


def test_a_download_killed_after_its_last_byte_is_whole(site: Site, tmp_path: Path) -> None:
    (tmp_path / ".a.bin.part").write_bytes(CONTENT)
    download.fetch(f"{site.address}/a.bin", tmp_path / "a.bin", len(CONTENT))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert site.asked == [("/a.bin", f"bytes={len(CONTENT)}-")]


def test_a_file_that_changed_meanwhile_is_fetched_from_its_beginning(site: Site, tmp_path: Path) -> None:
    site.cut_after = [300_000, *[0] * download.TRIES]
    with pytest.raises(DataError, match="broke off"):
        download.fetch(f"{site.address}/a.bin", tmp_path / "a.bin", len(CONTENT))
    site.files["/a.bin"] = CONTENT[::-1][:400_000]
    download.fetch(f"{site.address}/a.bin", tmp_path / "a.bin", len(CONTENT))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT[::-1][:400_000]


def test_a_part_longer_than_the_file_is_given_up(site: Site, tmp_path: Path) -> None:
    (tmp_path / ".a.bin.part").write_bytes(CONTENT + b"more")
    download.fetch(f"{site.address}/a.bin", tmp_path / "a.bin", len(CONTENT))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_server_that_sends_no_parts_sends_the_whole_again(site: Site, tmp_path: Path) -> None:
    site.sends_parts = False
    site.cut_after = [300_000]
    download.fetch(f"{site.address}/a.bin", tmp_path / "a.bin", len(CONTENT))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_what_cannot_be_fetched_is_named(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/b\.bin: answers 404 Not Found; check the address"):
        download.fetch(f"{site.address}/b.bin", tmp_path / "b.bin", 10)
    with pytest.raises(DataError, match=rf"/a\.bin: holds {len(CONTENT)} bytes, more than the 10 that are expected"):
        download.fetch(f"{site.address}/a.bin", tmp_path / "a.bin", 10)
    with pytest.raises(ConfigError, match="is no address of the web; let it begin with http:// or https://"):
        download.fetch((tmp_path / "a").as_uri(), tmp_path / "a.bin", 10)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    with serve({}) as gone:
        address = gone.address
    with pytest.raises(DataError, match=r"broke off after 0 bytes \(.*refused.*\); check network and disk"):
        download.fetch(f"{address}/a.bin", tmp_path / "a.bin", 10)


def test_another_file_under_a_recorded_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"one")
    download.require_recorded(path)  # nothing is recorded yet
    download.record(path)
    assert (tmp_path / "a.zip.sha256").read_text(encoding="utf-8") == f"{sha256(path)}  a.zip\n"
    download.require_recorded(path)
    path.write_bytes(b"two")
    with pytest.raises(DataError, match=r"a\.zip: has the SHA-256 3fc4.*, a\.zip\.sha256 says 7692.*; fetch it again"):
        download.require_recorded(path)


def _zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_zip_file_is_unpacked(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "a.zip", {"top/": b"", "top/a/b.txt": b"one", "top/c.txt": b""})
    download.unpack(archive, tmp_path / "out", SMALL)
    assert (tmp_path / "out/top/a/b.txt").read_bytes() == b"one"
    assert (tmp_path / "out/top/c.txt").read_bytes() == b""


@pytest.mark.parametrize("name", ["../evil.txt", "top/../../evil.txt", "/tmp/evil.txt", "top\\..\\evil.txt", "a\nb"])  # noqa: S108 - a name in a hostile archive
def test_a_member_that_would_leave_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    archive = _zip(tmp_path / "a.zip", {"top/good.txt": b"good", name: b"evil"})
    with pytest.raises(DataError) as caught:
        download.unpack(archive, tmp_path / "out", SMALL)
    assert str(caught.value) == f"{archive}: holds {name!r}, which would leave its folder; do not use this file"
    assert [path.name for path in tmp_path.rglob("*")] == ["a.zip"]


def test_a_link_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("top/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="holds 'top/link', which is a link; do not use this file"):
        download.unpack(tmp_path / "a.zip", tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({f"{n}": b"" for n in range(11)}, "holds 11 files, more than 10"),
        ({f"{n}": b"x" * 900 for n in range(4)}, "unpacks to 3600 bytes, more than 3000"),
        ({"a": b"x" * 1001}, "holds 'a', which unpacks to 1001 bytes"),
        ({"a": b"1", "a/b": b"2"}, "holds two members for one place"),
    ],
)
def test_more_than_is_bounded_is_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    archive = _zip(tmp_path / "a.zip", members)
    with pytest.raises(DataError) as caught:
        download.unpack(archive, tmp_path / "out", SMALL)
    assert message in str(caught.value)


def test_a_damaged_zip_file_is_refused(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "a.zip", {"a.txt": b"content"})
    whole = archive.read_bytes()
    archive.write_bytes(whole.replace(b"content", b"c0ntent", 1))
    with pytest.raises(DataError, match=r"is no whole zip file \(Bad CRC-32 for file 'a\.txt'\); delete it and run"):
        download.unpack(archive, tmp_path / "out", SMALL)
    archive.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"a\.zip: is no whole zip file"):
        download.unpack(archive, tmp_path / "out2", SMALL)


def test_a_zip_file_that_lies_about_its_sizes_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", b"\x00" * 100_000)
    lying = buffer.getvalue().replace(struct.pack("<I", 100_000), struct.pack("<I", 500))
    (tmp_path / "a.zip").write_bytes(lying)
    with pytest.raises(DataError, match="is no whole zip file"):
        download.unpack(tmp_path / "a.zip", tmp_path / "out", SMALL)
    assert (tmp_path / "out" / "bomb").stat().st_size <= 500
