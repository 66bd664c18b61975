"""What every run needs: whole files or none, seeds that are functions, devices that are not swapped in silence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from speechllm import runtime
from speechllm.errors import ConfigError, ModelError, UserError

if TYPE_CHECKING:
    from pathlib import Path


class _Killed(BaseException):
    """Stands for whatever ends a run in the middle of a file."""


def _break_off(path: Path) -> None:
    with runtime.atomic_path(path) as temporary:
        temporary.write_text("half of", encoding="utf-8")
        raise _Killed


def test_a_write_that_breaks_off_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(_Killed):
        _break_off(path)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_breaks_off_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(_Killed):
        _break_off(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    runtime.write_text(path, "old")
    with runtime.atomic_path(path) as temporary:
        assert temporary.parent == path.parent  # a rename between file systems would be a copy
        temporary.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
    assert path.read_text(encoding="utf-8") == "new"
    assert [one.name for one in path.parent.iterdir()] == ["a"]


def test_text_is_written_as_utf8_with_bare_line_feeds(tmp_path: Path) -> None:
    runtime.write_text(tmp_path / "a", "桜\nさく\u2028ら\r\n")
    assert (tmp_path / "a").read_bytes() == "桜\nさく\u2028ら\r\n".encode()


def test_json_is_the_same_bytes_for_the_same_value(tmp_path: Path) -> None:
    runtime.write_json(tmp_path / "a", {"b": "桜", "a": [1.5, None]})
    runtime.write_json(tmp_path / "b", {"a": [1.5, None], "b": "桜"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "桜" in (tmp_path / "a").read_text(encoding="utf-8")
    assert runtime.read_json(tmp_path / "a") == {"a": [1.5, None], "b": "桜"}


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b'"\xff"'])
def test_json_that_is_not_ours_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        runtime.read_json(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path}/a.json: ")
    assert str(caught.value).endswith("; make the folder again")


def test_a_seed_is_a_function_of_its_parts() -> None:
    assert (
        runtime.derive_seed("augment", 1, 0, "u1") == 3_382_507_983_369_202_535
    )  # golden: another would change every result
    seeds = {runtime.derive_seed(*parts) for parts in (("a", 1), ("a", 2), ("b", 1), ("a1",), ("a", 1, ""), (1, "a"))}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_does_not_depend_on_the_process() -> None:
    code = "from speechllm.runtime import derive_seed; print(derive_seed('batch', 3, '発話'))"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment).stdout
    assert int(printed) == runtime.derive_seed("batch", 3, "発話")


def test_a_digest_depends_on_where_one_text_ends() -> None:
    assert runtime.hash_texts(["ab", "c"]) != runtime.hash_texts(["a", "bc"])
    assert runtime.hash_texts(["ab", "c"]) == runtime.hash_texts(iter(["ab", "c"]))
    assert len(runtime.hash_texts(["\udc80"])) == 16  # a file name that is not UTF-8


def _fake_torch(monkeypatch: pytest.MonkeyPatch, *, has_cuda: bool) -> None:
    cuda = SimpleNamespace(is_available=lambda: has_cuda, device_count=lambda: 2)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, device=lambda name: f"<{name}>"))


@pytest.mark.parametrize(
    ("name", "has_cuda", "device"),
    [("auto", False, "<cpu>"), ("auto", True, "<cuda>"), ("cpu", True, "<cpu>"), ("cuda:1", True, "<cuda:1>")],
)
def test_auto_takes_the_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, name: str, device: str, *, has_cuda: bool
) -> None:
    _fake_torch(monkeypatch, has_cuda=has_cuda)
    assert str(runtime.pick_device(name)) == device


def test_a_gpu_that_is_not_there_is_an_error_and_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_torch(monkeypatch, has_cuda=False)
    with pytest.raises(ConfigError) as caught:
        runtime.pick_device("cuda")
    assert str(caught.value) == "device: cuda was asked for, torch sees no CUDA; set device: auto"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("cpuu", "cpuu is none that we know; take auto, cpu, cuda or cuda:N"),
        ("cpu:3", "cpu:3 is none that we know; take auto, cpu, cuda or cuda:N"),
        ("meta", "meta is none that we know; take auto, cpu, cuda or cuda:N"),
        ("cuda:2", "cuda:2 was asked for, torch sees 2, from cuda:0; take another"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, what: str) -> None:
    _fake_torch(monkeypatch, has_cuda=True)
    with pytest.raises(ConfigError) as caught:
        runtime.pick_device(name)
    assert str(caught.value) == f"device: {what}"


def test_provenance_says_versions_and_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["speechllm", "score", "--ref", "a"])
    record = runtime.provenance({"encoder": "e"})
    assert record["argv"] == ["score", "--ref", "a"]
    assert record["encoder"] == "e"
    versions = record["versions"]
    assert isinstance(versions, dict)
    assert set(versions) == set(runtime.RECORDED_PACKAGES)
    json.dumps(record)


@pytest.mark.parametrize("torn", ["", "{", '{"text": "'])
def test_lines_of_a_killed_run_are_read_up_to_the_one_cut_short(tmp_path: Path, torn: str) -> None:
    entries = [{"text": "朝\u2028です\x85"}, {"text": "夜"}]  # neither ends a line
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    (tmp_path / "a.jsonl").write_text("".join(lines) + torn, encoding="utf-8")
    assert runtime.read_whole_lines(tmp_path / "a.jsonl") == entries
    assert runtime.read_whole_lines(tmp_path / "none") == []


def test_an_error_is_one_line_of_three_parts(tmp_path: Path) -> None:
    error = UserError(tmp_path / "a", "two\nlines", " and\tblanks ")
    assert str(error) == f"{tmp_path}/a: two lines; and blanks"


def test_a_portable_record_has_no_command_line_at_any_depth() -> None:
    record = {"argv": ["--exp", "/a"], "commit": "c", "training": {"argv": ["--exp", "/b"], "minutes": 2.0}}
    assert runtime.portable(record) == {"commit": "c", "training": {"minutes": 2.0}}
