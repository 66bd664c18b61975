"""What folders come to: output over input, files that are gone or damaged, names that are no states, links to nothing.

Each fault is met through the command line, on a training and a decode of tiny models.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import faulty
import pytest
from faulty import Setting, Trap
from scenes import assert_refused, flip, snapshot
from test_train_faults import FIELDS, LENGTHS

from speechllm.errors import EXIT_STOPPED, EXIT_USER

if TYPE_CHECKING:
    from faulty import Ended

OVER = "and would be written over; name another folder for the output"
START_OVER = "copy it again, or remove the folder and train again"


@dataclass(frozen=True)
class Made:
    """A training, its texts, and the dump of its data."""

    setting: Setting
    exp: Path
    texts: Path
    dump: Path

    @property
    def data(self) -> Path:
        return self.setting.train

    def run(self, command: str, *options: object) -> Ended:
        log = self.setting.folder / f"{command}.log"
        return faulty.start([command, *map(str, options)], log).wait()

    def decode(self, exp: Path, out: Path, data: Path | None = None) -> Ended:
        return self.run("decode", "--exp", exp, "--data", data or self.data, "--out", out)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("folders")
    done = Made(faulty.make(folder, LENGTHS, **FIELDS), folder / "exp", folder / "texts", folder / "dump")
    for ended in (
        done.setting.run(done.exp),
        done.decode(done.exp, done.texts),
        done.run("dump", "--conf", done.setting.conf, "--data", done.data, "--out", done.dump),
    ):
        assert ended.status == 0, ended.output
    return done


@pytest.fixture
def exp(made: Made, tmp_path: Path) -> Path:
    """Return a copy of the training that a test may change."""
    return shutil.copytree(made.exp, tmp_path / "exp")


# Output over input


def test_no_stage_writes_over_data_features_or_a_model(made: Made, tmp_path: Path) -> None:
    conf = made.setting.conf
    data = shutil.copytree(made.data, tmp_path / "data")
    model = shutil.copytree(made.exp / "model", tmp_path / "model")
    dump = shutil.copytree(made.dump, tmp_path / "dump")
    before = {folder: snapshot(folder) for folder in (data, model, dump)}
    refused = [
        (made.decode(made.exp, data, data), data, "a data directory (wav.scp)"),
        (made.decode(made.exp, dump, dump), dump, "a data directory (wav.scp)"),
        (made.decode(made.exp, model), model, "a trained model (model.json)"),
        (
            made.run("baseline", "hyp", "--hyp", made.texts / "text", "--data", data, "--out", data),
            data,
            "a data directory (wav.scp)",
        ),
        (made.run("dump", "--conf", conf, "--data", data, "--out", data), data, "a data directory (wav.scp)"),
        (made.run("dump", "--conf", conf, "--data", dump, "--out", dump), dump, "a data directory (wav.scp)"),
        (made.setting.run(dump, log=tmp_path / "log"), dump, "a data directory (wav.scp)"),
    ]
    for ended, folder, what in refused:
        assert_refused(ended, re.escape(f"error: {folder}: holds {what}, {OVER}"))
    assert {folder: snapshot(folder) for folder in before} == before


@pytest.mark.parametrize("name", ["ref.trn", "hyp.trn"])
def test_scoring_writes_over_nothing_that_it_reads(made: Made, tmp_path: Path, name: str) -> None:
    own = Path(shutil.copy(made.data / "text", tmp_path / name))
    sides = {"--ref": made.data / "text", "--hyp": made.texts / "text", f"--{name[:3]}": own}
    ended = made.run("score", *(part for pair in sides.items() for part in pair), "--out", tmp_path)
    assert_refused(ended, re.escape(f"error: {own}: would be written over by what is made of it; name another --out"))
    assert own.read_bytes() == (made.data / "text").read_bytes()


def test_a_table_is_not_written_over_its_description(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("title: a\n", encoding="utf-8")
    ended = made.run("table", path, "--out", path)
    what = "describes the table that would be written over it; name another --out"
    assert_refused(ended, re.escape(f"error: {path}: {what}"))
    assert path.read_text(encoding="utf-8") == "title: a\n"


# Gone or damaged


def without_model(exp: Path) -> None:
    """Leave a training as one that was killed before it wrote its model."""
    shutil.rmtree(exp / "model")


def test_best_parameters_that_are_gone_are_told_and_no_others_taken(made: Made, exp: Path) -> None:
    without_model(exp)
    (exp / "best.safetensors").unlink()
    ended = made.setting.run(exp)
    assert_refused(
        ended, rf"error: {re.escape(str(exp))}/best\.safetensors: is no readable safetensors file .+; {START_OVER}"
    )
    assert not (exp / "model/model.json").exists()


@pytest.mark.parametrize("name", ["best.safetensors", "model/trained.safetensors"])
def test_a_bit_that_flips_in_what_was_trained_is_found(made: Made, exp: Path, tmp_path: Path, name: str) -> None:
    flip(exp / name)
    if name.startswith("best"):
        without_model(exp)
        ended = made.setting.run(exp)
    else:
        ended = made.decode(exp, tmp_path / "texts")
    what = "holds other values than were written: a bit has flipped"
    assert_refused(ended, re.escape(f"error: {exp / name}: {what}; {START_OVER}"))


@pytest.mark.parametrize("name", ["text", "nbest.jsonl", "ctm", "rtf.json"])
def test_texts_that_are_gone_are_made_again(made: Made, tmp_path: Path, name: str) -> None:
    texts = shutil.copytree(made.texts, tmp_path / "texts")
    (texts / name).unlink()
    done = made.decode(made.exp, texts)
    assert done.status == 0, done.output
    for one in ("text", "nbest.jsonl", "ctm"):
        assert (texts / one).read_bytes() == (made.texts / one).read_bytes()
    assert (texts / "rtf.json").is_file()


def test_a_model_whose_weights_are_gone_is_made_again(made: Made, exp: Path) -> None:
    (exp / "model/trained.safetensors").unlink()
    done = made.setting.run(exp)
    assert done.status == 0, done.output
    faulty.assert_same(exp, made.exp, "gone", faulty.RESULTS)


def test_a_table_of_a_dump_that_lost_a_line_is_made_again(made: Made, tmp_path: Path) -> None:
    dump = shutil.copytree(made.dump, tmp_path / "dump")
    lines = (dump / "utt2dur").read_text(encoding="utf-8").splitlines(keepends=True)
    (dump / "utt2dur").write_text("".join(lines[:-1]), encoding="utf-8")
    done = made.run("dump", "--conf", made.setting.conf, "--data", made.data, "--out", dump)
    assert done.status == 0, done.output
    assert (dump / "utt2dur").read_text(encoding="utf-8").splitlines(keepends=True) == lines


@pytest.mark.parametrize("seconds", ["nan", "inf", "-5", "0", "1e9"])
def test_a_dump_with_impossible_durations_is_refused(made: Made, tmp_path: Path, seconds: str) -> None:
    dump = shutil.copytree(made.dump, tmp_path / "dump")
    text = (dump / "utt2dur").read_text(encoding="utf-8")
    (dump / "utt2dur").write_text(re.sub(r"(?m)^(u3) .*$", rf"\1 {seconds}", text), encoding="utf-8")
    ended = made.decode(made.exp, tmp_path / "texts", dump)
    assert_refused(ended, re.escape(f"error: {dump}/utt2dur: u3 has no number of seconds; run stage 2 again"))


def test_a_dump_without_utterances_is_refused(made: Made, tmp_path: Path) -> None:
    dump = shutil.copytree(made.dump, tmp_path / "dump")
    for name in ("feats.scp", "text", "utt2dur", "utt2num_frames", "utt2crc"):
        (dump / name).write_text("", encoding="utf-8")
    ended = made.decode(made.exp, tmp_path / "texts", dump)
    assert ended.status == EXIT_USER
    assert ended.errors == [f"error: {dump}/feats.scp: names no utterance; run stage 2 again"]


def test_what_a_power_cut_leaves_of_the_records_does_not_keep_a_run_from_going_on(made: Made, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    ended = made.setting.run(exp, trap=Trap(signal.SIGKILL, file=r"/checkpoints/\.step_0000006"))
    assert ended.status == -signal.SIGKILL
    with (exp / "metrics.jsonl").open("ab") as stream:
        stream.write(b'\0\0\0\0{"kind": "train"}\n')
    done = made.setting.run(exp)
    assert done.status == 0, done.output
    faulty.assert_same(exp, made.exp, "power cut", faulty.RESULTS)


def test_a_half_written_text_that_is_not_ours_is_decoded_again(made: Made, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    ended = faulty.start(
        ["decode", "--exp", str(made.exp), "--data", str(made.data), "--out", str(texts)],
        tmp_path / "log",
        Trap(signal.SIGKILL, file=r"/texts/\.nbest\.jsonl"),
    ).wait()
    assert ended.status == -signal.SIGKILL, ended.output
    with (texts / ".partial.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"a": 1}\n')
    done = made.decode(made.exp, texts)
    assert done.status == 0, done.output
    assert (texts / "text").read_bytes() == (made.texts / "text").read_bytes()


# Names


@pytest.mark.parametrize("name", ["step_old.txt", "step_0000099.bak"])
def test_what_is_no_state_is_left_alone_and_costs_none(made: Made, tmp_path: Path, name: str) -> None:
    exp = tmp_path / "exp"
    ended = made.setting.run(exp, trap=Trap(signal.SIGKILL, file=r"/checkpoints/\.step_0000006"))
    assert ended.status == -signal.SIGKILL
    if name.endswith("bak"):
        shutil.copytree(exp / "checkpoints/step_0000002", exp / "checkpoints" / name)
    else:
        (exp / "checkpoints" / name).write_text("mine", encoding="utf-8")
    done = made.setting.run(exp)
    assert done.status == 0, done.output
    assert "speech resumed step=4 of=" in done.output
    assert (exp / "checkpoints" / name).exists()
    faulty.assert_same(exp, made.exp, name, faulty.RESULTS)


@pytest.mark.parametrize("name", ["segments", "utt2spk", "spk2utt", "utt2dur"])
def test_a_link_to_nothing_is_no_missing_table(made: Made, tmp_path: Path, name: str) -> None:
    data = shutil.copytree(made.data, tmp_path / "data")
    if name == "spk2utt":
        ids = (data / "text").read_text(encoding="utf-8").splitlines()
        (data / "utt2spk").write_text("".join(f"{one.partition(' ')[0]} s\n" for one in ids), encoding="utf-8")
    (data / name).unlink(missing_ok=True)
    (data / name).symlink_to(tmp_path / "nowhere")
    ended = made.run("validate", data)
    assert ended.status == EXIT_USER, ended.output
    assert f"error: {data}/{name}: no such file; make the data directory again, or mend its path" in ended.errors


def test_a_pipe_in_place_of_a_table_is_told_as_one(made: Made, tmp_path: Path) -> None:
    data = shutil.copytree(made.data, tmp_path / "data")
    (data / "text").unlink()
    subprocess.run(["mkfifo", str(data / "text")], check=True)
    ended = made.run("validate", data)
    what = "is no ordinary file; give a file; a pipe cannot be read twice"
    assert_refused(ended, re.escape(f"error: {data}/text: {what}"))


# Streams and signals


def speechllm(*arguments: object, streams: str) -> subprocess.CompletedProcess[str]:
    """Run the command with its streams as a shell gives them."""
    command = [sys.executable, "-m", "speechllm", *map(str, arguments)]
    return subprocess.run(
        ["bash", "-c", f'"$@" {streams}', "bash", *command], capture_output=True, text=True, check=False, timeout=300
    )


def test_a_closed_stderr_changes_no_status(made: Made, tmp_path: Path) -> None:
    text = made.data / "text"
    assert speechllm("validate", tmp_path / "nope", streams="2>&-").returncode == EXIT_USER
    assert speechllm("score", "--ref", text, "--hyp", text, "--out", tmp_path / "s", streams="2>&-").returncode == 0
    assert (tmp_path / "s/score.json").is_file()


def test_a_reader_who_leaves_is_no_fault(made: Made) -> None:
    done = speechllm("validate", made.data, streams="| true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_path_that_is_not_utf_8_can_be_written_to(made: Made, tmp_path: Path) -> None:
    out = f"{tmp_path}/\udcff"
    done = speechllm("baseline", "hyp", "--hyp", made.texts / "text", "--data", made.data, "--out", out, streams="")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/\\udcff/text\n"
    assert (tmp_path / "\udcff/text").read_bytes() == (made.texts / "text").read_bytes()


def test_a_device_that_is_none_is_refused(made: Made) -> None:
    ended = made.run("transcribe", "--model", made.exp / "model", "--device", "cpuu", made.data.parent / "wav/u1.wav")
    assert_refused(ended, re.escape("error: device: cpuu is none that we know; take auto, cpu, cuda or cuda:N"))


def test_a_hangup_while_training_saves_the_step(made: Made, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    ended = made.setting.run(exp, trap=Trap(signal.SIGHUP, call=r"torch/_tensor\.py:backward", nth=3))
    assert ended.status == EXIT_STOPPED, ended.output
    assert faulty.states(exp)
    done = made.setting.run(exp)
    assert done.status == 0, done.output
    faulty.assert_same(exp, made.exp, "hangup", faulty.RESULTS)
