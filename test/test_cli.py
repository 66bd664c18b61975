"""The command line: every fault of the user's is status 2 and one line that says where, what, and the fix."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from speechllm import cli
from speechllm.data import audio
from speechllm.errors import EXIT_OURS, EXIT_STOPPED, EXIT_USER, Stopped

if TYPE_CHECKING:
    from pathlib import Path

THREE_PARTS = re.compile(r"error: [^\n]+?: [^\n]+; [^\n]+\n")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a sound data directory of two utterances."""
    audio.write_wav(tmp_path / "one.wav", np.full(8_000, 0.1, np.float32), 16_000)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "wav.scp").write_text(f"u1 {tmp_path}/one.wav\nu2 {tmp_path}/one.wav\n", encoding="utf-8")
    (folder / "text").write_text("u1 切符を二枚ください。\nu2 次は終点です。\n", encoding="utf-8")
    (folder / "utt2spk").write_text("u1 s1\nu2 s1\n", encoding="utf-8")
    return folder


def _fault(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line of stderr of a command line that is at fault."""
    status = cli.run([str(argument) for argument in arguments])
    stderr = capsys.readouterr().err
    assert status == EXIT_USER
    assert THREE_PARTS.fullmatch(stderr), stderr
    return stderr.removeprefix("error: ").removesuffix("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate", "data", "--adio"], "speechllm validate: No such option: --adio"),
        (["--quiet", "validate", "data"], "speechllm: No such option: --quiet"),
        (["decod"], "speechllm decod: No such command 'decod'"),
        (["validate"], "speechllm validate: Missing argument 'data_dir'"),
        (["dump", "--conf", "c"], "speechllm dump: Missing option '--data'"),
        (["validate", "a", "b"], "speechllm validate: Got unexpected extra argument"),
        (["dump", "--conf", "c", "--data", "d", "--out", "o", "--nj", "0"], "speechllm dump: Invalid value for '--nj'"),
        (["dump", "--conf", "c", "--data", "d", "--out", "o", "--nj", "zwei"], "speechllm dump: Invalid value for"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    line = _fault(capsys, *arguments)
    assert line.startswith(message)
    assert line.endswith("; see --help")


def test_a_sound_directory_is_counted_on_stdout(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    assert cli.run(["validate", str(data), "--audio"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{data}: 2 utterances, 1 speakers, 0.000 h, 0 faults\n"
    assert err == ""


def test_help_is_no_fault_and_no_arguments_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert cli.run([]) == EXIT_USER
    assert capsys.readouterr().out == shown
    for command in ("validate", "dump", "train", "decode", "baseline", "score", "table", "trace"):
        assert f"\n  {command} " in shown
        assert cli.run([command, "--help"]) == 0


def test_missing_files_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path) -> None:
    assert _fault(capsys, "validate", tmp_path / "none").startswith(f"{tmp_path}/none: no such data directory; run")
    line = _fault(capsys, "dump", "--conf", tmp_path / "none.yaml", "--data", data, "--out", tmp_path / "out")
    assert line.startswith(f"{tmp_path}/none.yaml: no such configuration file; see conf/")
    line = _fault(capsys, "score", "--ref", tmp_path / "none", "--hyp", data / "text", "--out", tmp_path / "out")
    assert line.startswith(f"{tmp_path}/none: no such file; ")
    (data / "utt2spk").unlink()
    (data / "wav.scp").unlink()
    assert _fault(capsys, "validate", data).startswith(f"{data}/wav.scp: no such file; make")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text", b"u1 a\nu2 \x8e\x9f\n", "text:2: is not UTF-8 (byte 4); save it as UTF-8 without byte order mark"),
        ("text", b"\xef\xbb\xbfu1 a\nu2 b\n", "text:1: begins with a byte order mark; save it as UTF-8"),
        ("text", b"u1 a\nu2 b\x00c\n", "text:2: holds a NUL character; delete it"),
        ("text", b"u1 a\nu2 b\nu1 c\n", "text:3: u1 stands here twice; delete one of its lines"),
        ("text", b"u1 a\n", "text: u2 has audio but no transcript; add its line or take it out of wav.scp"),
        ("text", b"u1 a\nu2\n", "text: u2 has an empty transcript; write it or delete the utterance"),
        ("text", b"u2 a\nu1 b\n", "text: is not sorted by bytes; sort it with LC_ALL=C sort"),
        ("wav.scp", b"u1 sox a.wav -t wav - |\nu2 b.wav\n", "wav.scp: u1: is a command, which is not run; write"),
        ("wav.scp", b"../u1 a.wav\n", "wav.scp:1: the id '../u1' cannot be part of a file name; rename the utterance"),
        ("wav.scp", b"u1 a.wav\n.. b.wav\n", "wav.scp:2: the id '..' cannot be part of a file name; rename"),
        ("wav.scp", b"u1 a.wav\na/u2 b.wav\n", "wav.scp:2: the id 'a/u2' cannot be part of a file name; rename"),
        ("utt2spk", b"u1 s\n", "utt2spk: u2 has audio but no speaker; add its line"),
    ],
)
def test_a_faulty_table_is_named_with_file_and_line(
    capsys: pytest.CaptureFixture[str], data: Path, name: str, content: bytes, message: str
) -> None:
    (data / name).write_bytes(content)
    assert _fault(capsys, "validate", data).startswith(f"{data}/{message}")


def test_a_wav_that_is_no_audio_is_found_with_audio(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    (tmp_path / "one.wav").write_text("これは音ではない", encoding="utf-8")
    assert cli.run(["validate", str(data)]) == 0
    capsys.readouterr()
    line = _fault(capsys, "validate", data, "--audio")
    assert line.startswith(f"{tmp_path}/one.wav (utterance u1): is not audio that libsndfile reads (")


def test_all_other_faults_and_the_counts_stand_on_stdout(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    (data / "text").write_text("u2 \nu1 \n", encoding="utf-8")
    assert cli.run(["validate", str(data)]) == EXIT_USER
    out, err = capsys.readouterr()
    assert err == f"error: {data}/text: u1 has an empty transcript; write it or delete the utterance\n"
    assert out.splitlines() == [
        f"{data}/text: u2 has an empty transcript; write it or delete the utterance",
        f"{data}/text: is not sorted by bytes; sort it with LC_ALL=C sort",
        f"{data}: 2 utterances, 1 speakers, 3 faults",
    ]


def test_a_fault_stays_one_line_whatever_the_path_holds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert _fault(capsys, "validate", tmp_path / "a\nerror: b") == (
        f"{tmp_path}/a error: b: no such data directory; run stage 1, or mend the path"
    )


def test_a_name_that_is_too_long_to_be_one_is_the_users_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert _fault(capsys, "tag", "--conf", "x" * 300) == f"{'x' * 300}: File name too long; mend it and run again"


def test_a_part_of_many_digits_is_none(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    part = f"1/{'9' * 5000}"  # more than Python makes a number of
    said = _fault(capsys, "dump", "--conf", data, "--data", data, "--out", data / "out", "--part", part)
    assert said == f"--part: '{part}' is not I/N; write it as 1/4"


def test_a_path_that_is_not_utf_8_is_shown(data: Path) -> None:
    folder = os.fsdecode(os.fsencode(data.parent) + b"/\xff")
    shutil.copytree(data, folder)
    command = [sys.executable, "-m", "speechllm", "validate", folder]
    done = subprocess.run(
        command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    )
    assert done.returncode == 0, done.stderr
    assert b"\\udcff: 2 utterances" in done.stdout, done.stdout


def test_an_unknown_key_names_the_nearest(capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path) -> None:
    conf = tmp_path / "c.yaml"
    conf.write_text("encoder: {name: e}\nlm: {name: l}\ntrain:\n  batch_token: 100\n", encoding="utf-8")
    line = _fault(capsys, "dump", "--conf", conf, "--data", data, "--out", tmp_path / "out")
    assert line == f"{conf}:4: unknown key train.batch_token; did you mean batch_tokens?"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nobody/no-such-encoder", "no such encoder", "../../no/such"])
def test_an_encoder_that_does_not_exist_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path, name: str
) -> None:
    conf = tmp_path / "c.yaml"
    conf.write_text(f"encoder: {{name: {name}}}\nlm: {{name: l}}\n", encoding="utf-8")
    line = _fault(capsys, "dump", "--conf", conf, "--data", data, "--out", tmp_path / "out")
    assert line.startswith(f"{name}: no such model folder, hub model or package; give a folder")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_encoder_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    conf = tmp_path / "c.yaml"
    conf.write_text(f"encoder: {{name: {data}}}\nlm: {{name: l}}\n", encoding="utf-8")
    line = _fault(capsys, "dump", "--conf", conf, "--data", data, "--out", tmp_path / "out")
    assert line.startswith(f"{data}: is no model folder: it has no config.json; name another model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (Stopped("state saved at step 40"), EXIT_STOPPED, "stopped: state saved at step 40\n"),
        (KeyboardInterrupt(), EXIT_STOPPED, "stopped: by the keyboard\n"),
        (OSError(28, "No space left on device", "/o\na"), EXIT_USER, "error: /o a: No space left on device; make room"),
        (OSError(5, "Input/output error", "/o"), EXIT_USER, "error: /o: Input/output error; look after the disk"),
        (OSError(104, "Connection reset by peer", "/o"), EXIT_OURS, "error: /o: Connection reset by peer; mend"),
    ],
)
def test_a_stop_and_a_broken_machine_have_their_own_status(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    raised: BaseException,
    status: int,
    message: str,
) -> None:
    def end(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("speechllm.data.kaldi.validate", end)
    assert cli.run(["validate", "data"]) == status
    assert capsys.readouterr().err.startswith(message)


def test_our_own_faults_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: object, **__: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("speechllm.data.kaldi.validate", end)
    with pytest.raises(AssertionError, match="ours"):
        cli.run(["validate", "data"])


def test_the_module_is_the_command_and_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from speechllm import cli; status = cli.run(sys.argv[1:]); "
        "print('torch' in sys.modules or 'transformers' in sys.modules); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "validate", str(tmp_path / "none")], check=False, capture_output=True, text=True
    )
    assert done.returncode == EXIT_USER
    assert done.stdout.endswith("1 faults\nFalse\n")
    assert THREE_PARTS.fullmatch(done.stderr)
