"""What is wrong with data: each fault is made, met by `validate` and `dump`, named in one line, and nothing is lost.

The cases are numbered as in docs/reliability.md. 9, 10 and 19 are met when training reads: test_load_faults.py and
test_train_faults.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scenes
import soundfile
import tiny
from scenes import BAD, IDS, Corpus, assert_refused, speechllm

from speechllm.config import load as configs
from speechllm.data import pipes
from speechllm.data.dataset import FeatureSet
from speechllm.errors import EXIT_USER
from speechllm.runtime import hash_texts

if TYPE_CHECKING:
    from collections.abc import Callable

    from faulty import Ended

LOCAL = Path(__file__).resolve().parents[2] / "egs/jsut/asr1/local"
READ_AGAIN = "replace the file or take it out of wav.scp"
DROP = "raise --max-dropped, or mend the sounds and remove this folder"


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a configuration of tiny models."""
    folder = tmp_path_factory.mktemp("models")
    configs.dump(tiny.config(tiny.wavlm(folder / "encoder"), folder / "lm"), folder / "conf.yaml")
    return folder / "conf.yaml"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speechllm.dump.worker_pool", tiny.AtOnce)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return scenes.corpus(tmp_path / "corpus")


def dump(conf: Path, data: Path, out: Path, *options: object) -> Ended:
    return speechllm("dump", "--conf", conf, "--data", data, "--out", out, *options)


def assert_sound_refused(conf: Path, corpus: Corpus, where: str, what: str) -> None:
    """Check that both commands name the sound, and that the dump keeps the others and makes no features of it."""
    line = re.escape(f"{where} (utterance {BAD}): ") + what
    validated = speechllm("validate", corpus.data, "--audio")
    assert_refused(validated, f"error: {line}")
    assert validated.output.splitlines()[0] == f"{corpus.data}: 4 utterances, 1 speakers, 0.000 h, 1 faults"
    out = corpus.data.parent / "out"
    told = rf"error: {re.escape(str(out))}: 1 of 4 sounds cannot be read \(dropped.tsv lists them\), first {line}"
    assert_refused(dump(conf, corpus.data, out), f"{told}; {DROP}")
    assert re.fullmatch(rf"utt_id\treason\n{BAD}\t.+\n", (out / "dropped.tsv").read_text(encoding="utf-8"))
    assert not (out / "feats.scp").exists()
    done = dump(conf, corpus.data, out, "--max-dropped", 0.3)  # as the line told
    assert done.status == 0, done.output
    assert list(FeatureSet(out).examples) == [utt_id for utt_id in IDS if utt_id != BAD]


def assert_table_refused(conf: Path, corpus: Corpus, line: str) -> None:
    """Check that both commands name the table, and that nothing is made."""
    validated = speechllm("validate", corpus.data)
    assert (validated.status, validated.errors) == (EXIT_USER, [f"error: {corpus.data}/{line}"]), validated.output
    dumped = dump(conf, corpus.data, corpus.data.parent / "out")
    assert (dumped.status, dumped.errors) == (EXIT_USER, [f"error: {corpus.data}/{line}"]), dumped.output
    assert not (corpus.data.parent / "out").exists()


# Sounds


@pytest.mark.parametrize("lost", [0.5, 0.01])
def test_01_a_truncated_wav_is_refused_though_libsndfile_reads_its_beginning(
    conf: Path, corpus: Corpus, lost: float
) -> None:
    content = corpus.wav.read_bytes()
    corpus.wav.write_bytes(content[: round((1 - lost) * len(content))])
    assert 0 < soundfile.info(corpus.wav).frames < 8_000
    there = corpus.wav.stat().st_size - 44
    assert_sound_refused(conf, corpus, str(corpus.wav), f"is cut short: {there} of 16000 bytes are there; {READ_AGAIN}")


def header_alone(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:44])


def no_byte(path: Path) -> None:
    path.write_bytes(b"")


def no_sample(path: Path) -> None:
    soundfile.write(path, np.zeros(0, np.float32), 16_000)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (header_alone, "is cut short: 0 of 16000 bytes are there"),
        (no_byte, r"is not audio that libsndfile reads \(.+\)"),
        (no_sample, "holds no samples"),
    ],
    ids=["header-alone", "no-byte", "no-sample"],
)
def test_02_a_file_without_sound_is_refused(
    conf: Path, corpus: Corpus, spoil: Callable[[Path], None], what: str
) -> None:
    spoil(corpus.wav)
    assert_sound_refused(conf, corpus, str(corpus.wav), f"{what}; {READ_AGAIN}")


def test_03_a_truncated_flac_is_refused(conf: Path, corpus: Corpus) -> None:
    flac = corpus.name_instead(corpus.wav.with_suffix(".flac"))
    soundfile.write(flac, scenes.sound(1, 16_000), 16_000)
    flac.write_bytes(flac.read_bytes()[: flac.stat().st_size // 2])
    assert soundfile.info(flac).frames == 16_000  # its header still says so
    what = rf"(cannot be decoded \(.+\)|is cut short: \d+ of 16000 samples are there); {READ_AGAIN}"
    assert_sound_refused(conf, corpus, str(flac), what)


def test_03_a_web_page_named_wav_is_refused(conf: Path, corpus: Corpus) -> None:
    corpus.wav.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>", encoding="utf-8")
    assert_sound_refused(conf, corpus, str(corpus.wav), rf"is not audio that libsndfile reads \(.+\); {READ_AGAIN}")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_04_samples_that_are_not_finite_are_refused(conf: Path, corpus: Corpus, value: float) -> None:
    wave = scenes.sound(1)
    wave[1_234] = value
    soundfile.write(corpus.wav, wave, 16_000, subtype="FLOAT")
    assert_sound_refused(conf, corpus, str(corpus.wav), f"holds samples that are NaN or infinite; {READ_AGAIN}")


@pytest.mark.parametrize(
    ("rate_hz", "channels", "what"),
    [(655_350, 1, "has a sample rate of 655350 Hz"), (16_000, 1024, "has 1024 channels")],
)
def test_05_a_header_out_of_all_bounds_is_refused(
    conf: Path, corpus: Corpus, rate_hz: int, channels: int, what: str
) -> None:
    soundfile.write(corpus.wav, np.zeros((800, channels), np.float32), rate_hz, subtype="PCM_16")
    assert_sound_refused(conf, corpus, str(corpus.wav), f"{what}; {READ_AGAIN}")


@pytest.mark.parametrize(("rate_hz", "channels"), [(4_000, 1), (192_000, 1), (16_000, 16)])
def test_05_what_lies_at_the_bounds_is_taken(conf: Path, corpus: Corpus, rate_hz: int, channels: int) -> None:
    wave = np.repeat(scenes.sound(1, rate_hz)[:, None], channels, axis=1)
    soundfile.write(corpus.wav, wave, rate_hz, subtype="PCM_16")
    out = corpus.data.parent / "out"
    assert dump(conf, corpus.data, out).status == 0
    assert list(scenes.read_table(out / "feats.scp")) == list(IDS)


def test_06_channels_that_cancel_each_other_are_warned_of(conf: Path, corpus: Corpus) -> None:
    wave = scenes.sound(1)
    soundfile.write(corpus.wav, np.stack([wave, -wave], axis=1), 16_000, subtype="PCM_16")
    warned = f"channels cancel each other in {corpus.wav}: their mean is silent; keep one of them"
    ended = scenes.process("validate", corpus.data, "--audio")
    assert ended.status == 0, ended.output
    assert [line.partition("speechllm.data.audio ")[2] for line in ended.output.splitlines()[:-1]] == [warned]
    assert dump(conf, corpus.data, corpus.data.parent / "out").status == 0
    soundfile.write(corpus.wav, np.stack([wave, 0.9 * wave], axis=1), 16_000, subtype="PCM_16")
    assert len(scenes.process("validate", corpus.data, "--audio").output.splitlines()) == 1


# Commands in wav.scp


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return what puts a program of our own in the place of sox."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)

    def write(lines: str) -> None:
        (tmp_path / "bin/sox").write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
        (tmp_path / "bin/sox").chmod(0o700)

    return write


def pipe(corpus: Corpus, command: str) -> str:
    """Let wav.scp name a command for `BAD`; return how a fault of it begins."""
    corpus.change("wav.scp", str(corpus.wav), command)
    return f"error: {corpus.data}/wav.scp: {BAD}: "


def test_07_a_command_is_refused_and_never_run(conf: Path, corpus: Corpus, tmp_path: Path) -> None:
    fault = pipe(corpus, f"touch {tmp_path}/ran; cat {corpus.wav} |")
    said = f"{fault}is a command, which is not run; write its output to a file and name that, or see --allow-pipes"
    for ended in (speechllm("validate", corpus.data, "--audio"), dump(conf, corpus.data, tmp_path / "out")):
        assert_refused(ended, re.escape(said))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("touch RAN |", "is a command of 'touch', which is not among the programs that are run ("),
        ("/bin/cat WAV |", "is a command of '/bin/cat', which is not among"),
        ("cat WAV; touch RAN |", "is a command with ;, and no shell is run"),
        ("cat WAV;touch RAN |", "is a command with ;, and no shell is run"),
        ("cat WAV && touch RAN |", "is a command with &&, and no shell is run"),
        ("cat $(touch RAN) |", "is a command with $, and no shell is run"),
        ("cat `touch RAN` |", "is a command with `touch, and no shell is run"),
        ("cat WAV > RAN |", "is a command with >, and no shell is run"),
        ("cat WAV | touch RAN |", "is a command of 'touch', which is not among"),
        ("cat 'WAV |", "is a command that cannot be read (No closing quotation)"),
        ("| cat WAV |", "is a command of '', which is not among"),
    ],
)
def test_07_where_pipes_are_allowed_only_known_programs_run_and_no_shell(
    conf: Path, corpus: Corpus, tmp_path: Path, command: str, what: str
) -> None:
    fault = pipe(corpus, command.replace("WAV", str(corpus.wav)).replace("RAN", f"{tmp_path}/ran"))
    for ended in (
        speechllm("validate", corpus.data, "--audio", "--allow-pipes"),
        dump(conf, corpus.data, tmp_path / "out", "--allow-pipes"),
    ):
        assert_refused(ended, re.escape(fault + what) + rf".*; {pipes.WRITE_A_FILE}")
    assert not (tmp_path / "ran").exists()


def test_07_a_chain_of_allowed_programs_gives_what_the_file_gives(conf: Path, corpus: Corpus, tmp_path: Path) -> None:
    assert dump(conf, corpus.data, tmp_path / "plain").status == 0
    pipe(corpus, f"cat {corpus.wav} | gzip -c | gzip -dc |")
    assert speechllm("validate", corpus.data, "--audio", "--allow-pipes").status == 0
    done = dump(conf, corpus.data, tmp_path / "piped", "--allow-pipes")
    assert done.status == 0, done.output
    [ark] = (tmp_path / "plain").glob("*.ark")
    assert (tmp_path / "piped" / ark.name).read_bytes() == ark.read_bytes()


def test_07_a_command_that_does_not_end_is_killed_with_all_that_it_started(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Callable[[str], None]
) -> None:
    assert pipes.LIMIT_S == 300
    monkeypatch.setattr(pipes, "LIMIT_S", 3)
    program(f"sleep 100 &\necho $! > {tmp_path}/pid\nwait")
    fault = pipe(corpus, "sox in.sph -t wav - |")
    what = f"its command ran for more than 3 s; {pipes.WRITE_A_FILE}"
    assert_refused(speechllm("validate", corpus.data, "--audio", "--allow-pipes"), re.escape(fault + what))
    started = int((tmp_path / "pid").read_text(encoding="utf-8"))
    deadline = time.monotonic() + 60
    while is_alive(started):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_07_a_command_that_writes_without_end_is_stopped(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, program: Callable[[str], None]
) -> None:
    assert pipes.MAX_BYTES == 4 << 30
    monkeypatch.setattr(pipes, "MAX_BYTES", 1 << 20)
    program("sleep 0.3; exec cat /dev/zero")  # the bound is set once it runs
    fault = pipe(corpus, "sox in.sph -t wav - |")
    what = f"its command wrote more than 1 MiB; {pipes.WRITE_A_FILE}"
    assert_refused(speechllm("validate", corpus.data, "--audio", "--allow-pipes"), re.escape(fault + what))


@pytest.mark.parametrize("status", ["exit 3", "kill -9 $$"], ids=["exit", "killed"])
def test_08_a_command_that_fails_after_some_output_gives_no_sound(
    conf: Path, corpus: Corpus, tmp_path: Path, program: Callable[[str], None], status: str
) -> None:
    """What it wrote is a sound file as it should be, but for its end."""
    program(f"cat {corpus.wav}\necho out of tape >&2\n{status}")
    fault = pipe(corpus, "sox in.sph -t wav - |")
    number = {"exit 3": "3", "kill -9 $$": str(-signal.SIGKILL)}[status]
    what = f"its program sox ended with {number} (out of tape); mend the command; nothing of its output is used"
    for ended in (
        speechllm("validate", corpus.data, "--audio", "--allow-pipes"),
        dump(conf, corpus.data, tmp_path / "out", "--allow-pipes"),
    ):
        assert_refused(ended, re.escape(fault + what))
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    program(f"cat {corpus.wav}")
    assert dump(conf, corpus.data, tmp_path / "out", "--allow-pipes").status == 0
    kept = f".piped/{hash_texts(['sox in.sph -t wav - |'])}.wav"
    assert (tmp_path / "out" / kept).read_bytes() == corpus.wav.read_bytes()


def test_08_a_chain_whose_first_program_fails_gives_no_sound(corpus: Corpus, program: Callable[[str], None]) -> None:
    """A shell would tell of the last one alone."""
    program(f"cat {corpus.wav}\nexit 1")
    fault = pipe(corpus, "sox in.sph -t wav - | cat - |")
    what = "its program sox ended with 1; mend the command; nothing of its output is used"
    assert_refused(speechllm("validate", corpus.data, "--audio", "--allow-pipes"), re.escape(fault + what))


# Tables


@pytest.mark.parametrize("name", ["wav.scp", "text", "utt2spk"])
def test_11_an_id_that_stands_twice_is_refused(conf: Path, corpus: Corpus, name: str) -> None:
    with corpus.table(name).open("a", encoding="utf-8") as stream:
        stream.write(f"{BAD} {corpus.wav}\n")
    assert_table_refused(conf, corpus, f"{name}:5: {BAD} stands here twice; delete one of its lines")


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("blank", ["\u3000", "\u2028", "\x85", "\x0c", "\x0b"], ids=ascii)
def test_12_only_a_line_feed_ends_a_line_and_other_blanks_stay_in_the_text(
    tmp_path: Path, blank: str, ending: str
) -> None:
    texts = {"u1": f" 朝{blank}です", "u2": " 次の駅", "u3": ""}  # behind the last id nothing stands but the line's end
    for name, end in (("ref", ending), ("hyp", "\n")):
        (tmp_path / name).write_bytes("".join(f"{key}{text}{end}" for key, text in texts.items()).encode())
    ended = speechllm("score", "--ref", tmp_path / "ref", "--hyp", tmp_path / "hyp", "--out", tmp_path / "out")
    assert ended.status == 0, ended.output
    assert re.search(r"^cer +0\.00 %", ended.output, re.MULTILINE), ended.output
    lines = (tmp_path / "out/alignment.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == len(texts)  # U+2028 and the like are no ends of lines
    assert [json.loads(line)["ref"] for line in lines] == [f"朝{blank}です", "次の駅", ""]
    assert "\r" not in (tmp_path / "out/ref.trn").read_bytes().decode()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\xef\xbb\xbfu0 a\nu1 a\nu2 a\nu3 a\n", "1: begins with a byte order mark"),
        (b"u0 a\nu1 a\n\xef\xbb\xbfu2 a\nu3 a\n", "3: begins with a byte order mark"),
    ],
)
def test_12_a_byte_order_mark_is_refused_with_its_line(conf: Path, corpus: Corpus, content: bytes, what: str) -> None:
    corpus.table("text").write_bytes(content)
    ended = dump(conf, corpus.data, corpus.data.parent / "out")
    assert_refused(ended, f"error: {corpus.data}/text:{what}; save it as UTF-8 without byte order mark")
    assert ended.errors[0] == speechllm("validate", corpus.data).errors[0]


def test_12_a_nul_is_refused_with_its_line(conf: Path, corpus: Corpus) -> None:
    corpus.table("text").write_bytes(corpus.table("text").read_bytes().replace("本".encode(), b"\x00"))
    ended = dump(conf, corpus.data, corpus.data.parent / "out")
    assert_refused(ended, f"error: {corpus.data}/text:3: holds a NUL character; delete it")
    assert ended.errors[0] == speechllm("validate", corpus.data).errors[0]


def test_13_what_is_not_utf_8_is_refused_with_file_line_and_byte(conf: Path, corpus: Corpus) -> None:
    lines = corpus.table("text").read_bytes().split(b"\n")
    lines[2] = lines[2].decode().encode("shift_jis")
    corpus.table("text").write_bytes(b"\n".join(lines))
    ended = dump(conf, corpus.data, corpus.data.parent / "out")
    what = r"text:3: is not UTF-8 \(byte 4\); save it as UTF-8 without byte order mark"
    assert_refused(ended, f"error: {corpus.data}/{what}")
    assert ended.errors[0] == speechllm("validate", corpus.data).errors[0]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("text", "text: u2 has audio but no transcript; add its line or take it out of wav.scp"),
        ("wav.scp", "text: u2 has a transcript but no audio in wav.scp; rerun stage 1 or delete the line"),
        ("utt2spk", "utt2spk: u2 has audio but no speaker; add its line or take it out of wav.scp"),
    ],
)
def test_14_tables_that_disagree_are_refused(conf: Path, corpus: Corpus, name: str, line: str) -> None:
    table = scenes.read_table(corpus.table(name))
    del table[BAD]
    scenes.write_table(corpus.table(name), table)
    if name == "wav.scp":  # of utt2spk it is told next
        corpus.table("utt2spk").unlink()
    assert_table_refused(conf, corpus, line)


def segments(corpus: Corpus, **times: str) -> None:
    """Let each recording be one segment, but for those of `times`."""
    spans = {utt_id: times.get(utt_id, f"{utt_id} 0 0.5") for utt_id in IDS}
    scenes.write_table(corpus.table("segments"), spans)


def test_15_a_segment_past_the_end_is_refused(conf: Path, corpus: Corpus) -> None:
    segments(corpus, u2="u2 0.25 0.75")
    assert_sound_refused(conf, corpus, str(corpus.wav), r"has no 0\.250 to 0\.750 s: it lasts 0\.500 s; mend segments")


@pytest.mark.parametrize(
    ("times", "what"),
    [("-0.1 0.4", "-0.1 to 0.4"), ("0.4 0.1", "0.4 to 0.1"), ("0.2 0.2", "0.2 to 0.2"), ("0 nan", "0.0 to nan")],
)
def test_15_times_that_cannot_be_are_refused(conf: Path, corpus: Corpus, times: str, what: str) -> None:
    segments(corpus, u2=f"u2 {times}")
    ended = dump(conf, corpus.data, corpus.data.parent / "out")
    assert_refused(ended, re.escape(f"error: {corpus.data}/segments: u2: goes from {what} s; mend its times"))
    assert ended.errors[0] == speechllm("validate", corpus.data).errors[0]


def test_15_segments_of_a_speaker_that_overlap_are_told(corpus: Corpus) -> None:
    segments(corpus, u1="u0 0.1 0.2", u2="u0 0.4 0.5", u3="u0 0.495 0.5")
    ended = speechllm("validate", corpus.data)
    assert ended.status == EXIT_USER
    overlaps = [
        f"{corpus.data}/segments: u1 begins 0.400 s before u0 of the same speaker ends; mend its times",
        f"{corpus.data}/segments: u2 begins 0.100 s before u0 of the same speaker ends; mend its times",
    ]
    assert ended.output.splitlines() == [
        overlaps[1],
        f"{corpus.data}: 4 utterances, 1 speakers, 2 faults",
        f"error: {overlaps[0]}",
    ]
    scenes.write_table(corpus.table("utt2spk"), {utt_id: f"s{utt_id}" for utt_id in IDS})  # they talk at once
    assert speechllm("validate", corpus.data).status == 0


def test_16_one_bad_sound_among_a_thousand_is_listed_and_the_rest_is_made(
    conf: Path, corpus: Corpus, tmp_path: Path
) -> None:
    ids = [f"v{number:04d}" for number in range(1_000)]
    soundfile.write(corpus.wav, scenes.sound(1, 500), 16_000)
    for utt_id in ids:
        os.link(corpus.wav, corpus.wav.with_stem(utt_id))
    corpus.wav.with_stem("v0500").unlink()
    corpus.wav.with_stem("v0500").write_bytes(b"no sound")
    scenes.write_table(corpus.table("wav.scp"), {one: str(corpus.wav.with_stem(one)) for one in ids})
    scenes.write_table(corpus.table("text"), dict.fromkeys(ids, "朝です"))
    scenes.write_table(corpus.table("utt2spk"), dict.fromkeys(ids, "s"))
    scenes.write_table(corpus.table("spk2utt"), {"s": " ".join(ids)})
    out = tmp_path / "out"
    refused = dump(conf, corpus.data, out, "--max-dropped", 0)
    what = "is not audio that libsndfile reads (Format not recognised)"
    fault = f"{corpus.wav.with_stem('v0500')} (utterance v0500): {what}; {READ_AGAIN}"
    told = f"1 of 1000 sounds cannot be read (dropped.tsv lists them), first {fault}"
    assert_refused(refused, re.escape(f"error: {out}: {told}; {DROP}"))
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.ark")}
    done = dump(conf, corpus.data, out)  # of a thousand, ten may be
    assert (done.status, done.output) == (0, f"{out}: 999 utterances\n")
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.ark")} == made  # nothing was done twice
    assert (out / "dropped.tsv").read_text(encoding="utf-8") == f"utt_id\treason\nv0500\t{fault}\n"
    kept = [one for one in ids if one != "v0500"]
    for name in ("text", "utt2spk", "wav.scp", "feats.scp", "utt2dur", "utt2num_frames", "utt2crc"):
        assert list(scenes.read_table(out / name)) == kept, name
    assert scenes.read_table(out / "spk2utt") == {"s": " ".join(kept)}
    # what is left out of a test set is found out when it is scored
    hyp = ["--hyp", out / "text", "--out", tmp_path / "score"]
    scored = speechllm("score", "--ref", corpus.table("text"), *hyp)
    what = "no hypothesis for 1 utterance (v0500) of 1000 references"
    assert_refused(
        scored, re.escape(f"error: {out}/text: {what}; finish decoding, or pass --missing-as-deletions to") + ".*"
    )


def test_17_the_order_of_lines_changes_nothing_and_validate_tells_of_it(
    conf: Path, corpus: Corpus, tmp_path: Path
) -> None:
    assert dump(conf, corpus.data, tmp_path / "sorted").status == 0
    for name in ("wav.scp", "text", "utt2spk"):
        lines = corpus.table(name).read_text(encoding="utf-8").splitlines(keepends=True)
        corpus.table(name).write_text("".join(reversed(lines)), encoding="utf-8")
    assert dump(conf, corpus.data, tmp_path / "reversed").status == 0
    for name in ("feats.0000.ark", "feats.scp", "utt2crc", "utt2dur"):
        assert (tmp_path / "sorted" / name).read_bytes() == (tmp_path / "reversed" / name).read_bytes()
    assert FeatureSet(tmp_path / "sorted").examples == FeatureSet(tmp_path / "reversed").examples
    ended = speechllm("validate", corpus.data)
    said = f"{corpus.data}/wav.scp: is not sorted by bytes; sort it with LC_ALL=C sort"
    assert (ended.status, ended.errors) == (EXIT_USER, [f"error: {said}"])


@pytest.mark.parametrize("locale", ["C", "POSIX", "ja_JP.eucJP"])
def test_17_the_locale_changes_nothing(tmp_path: Path, locale: str) -> None:
    """Ids that a locale would sort otherwise, and a Python that would take files for ASCII."""
    texts = {"B": "朝です", "a": "駅で待つ", "a-2": "夜", "あ": "雨", "\uff5e": "本", "𠮷": "水"}
    hyps = {**texts, "a": "駅でまつ"}
    for name, table in (("ref", texts), ("hyp", hyps)):
        scenes.write_table(tmp_path / name, dict(reversed(table.items())))
    arguments = ["score", "--ref", tmp_path / "ref", "--hyp", tmp_path / "hyp", "--out"]
    assert speechllm(*arguments, tmp_path / "utf8").status == 0
    other = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = scenes.process(*arguments, tmp_path / "other", **other)
    assert ended.status == 0, ended.output
    for name in ("alignment.jsonl", "ref.trn", "score.json"):
        assert (tmp_path / "utf8" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("utt_id", ["../u2", "..", "a/u2", "/u2", "a\\u2"])
def test_18_an_id_that_would_leave_its_folder_is_refused(
    conf: Path, corpus: Corpus, tmp_path: Path, utt_id: str
) -> None:
    for name in ("wav.scp", "text", "utt2spk"):
        corpus.change(name, f"{BAD} ", f"{utt_id} ")
    before = sorted(tmp_path.rglob("*"))
    ended = dump(conf, corpus.data, tmp_path / "deep/out")
    what = f"wav.scp:3: the id {utt_id!r} cannot be part of a file name; rename the utterance"
    assert_refused(ended, re.escape(f"error: {corpus.data}/{what}"))
    assert ended.errors[0] == speechllm("validate", corpus.data).errors[0]
    assert sorted(tmp_path.rglob("*")) == before


# Data preparation


@pytest.fixture
def jsut(tmp_path: Path) -> Path:
    """Return a folder of JSUT's layout, every sound the same."""
    names = "basic5000 countersuffix26 loanword128 onomatopee300 precedent130 repeat500 travel1000 utparaphrase512"
    folder = tmp_path / "jsut_ver1.1"
    soundfile.write(tmp_path / "tone.wav", scenes.sound(1, 4_800), 48_000)
    for name in (*names.split(), "voiceactress100"):
        (folder / name / "wav").mkdir(parents=True)
        ids = [f"{name.upper()}_{number:04d}" for number in range(1, 502 if name == "basic5000" else 2)]
        for utt_id in ids:
            os.link(tmp_path / "tone.wav", folder / name / "wav" / f"{utt_id}.wav")
        lines = "".join(f"{utt_id}:{utt_id[-4:]}番の札です。\n" for utt_id in ids)
        (folder / name / "transcript_utf8.txt").write_text(lines, encoding="utf-8")
    return folder


def test_20_data_preparation_run_twice_leaves_the_same_bytes(jsut: Path, tmp_path: Path) -> None:
    """The second run mends what was cut short in the meantime."""
    arguments = ["--corpus", "jsut", "--out", tmp_path / "data"]
    for _ in range(2):
        ended = scenes.script(LOCAL / "data.py", *arguments, cwd=tmp_path, JSUT=str(jsut))
        assert ended.status == 0, ended.output
        made = scenes.snapshot(tmp_path / "data")
        assert sorted(Path(name).parent.name for name in made if name.endswith("wav.scp")) == [
            f"jsut_{name}" for name in ("basic5000", "dev", "eval1", "train")
        ]
        if not (tmp_path / "first").exists():
            shutil.copytree(tmp_path / "data", tmp_path / "first")
            text = tmp_path / "data/jsut_train/text"
            text.write_bytes(text.read_bytes()[:10])
    assert made == scenes.snapshot(tmp_path / "first")
    assert [name for name in made if "tmp" in name] == []
