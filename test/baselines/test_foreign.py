"""The process boundary of the foreign baselines, with real processes that stand for the other environment's Python."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny

from speechllm.baselines.foreign import LOG, PARTIAL, SOUNDS, Patience
from speechllm.baselines.foreign_worker import longest_pause
from speechllm.baselines.reazonspeech import transcribe_dir
from speechllm.data import audio, kaldi
from speechllm.errors import ConfigError, DataError, ModelError
from speechllm.runtime import read_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Install = Callable[..., None]

NAME = "reazonspeech-espnet"
SAMPLES = {"u1": 1_600, "u2": 3_200, "u3": 2_000, "u4": 4_800, "u5": 1_700, "u6": 2_222}
# answers with the sound's number of samples and its last one; `{here}` sees `ask`, `number` and `text` before
WORKER = """
import json, os, struct, sys, time

def say(entry):
    print(json.dumps(entry), flush=True)

{first}
say({{"ready": True, "device": "cpu", "versions": {{"espnet": "{version}"}}}})
for number, line in enumerate(sys.stdin):
    ask = json.loads(line)
    raw = open(ask["sound"], "rb").read()
    wave = raw[10 + struct.unpack("<H", raw[8:10])[0]:]
    text = "%d個 %.9g" % (len(wave) // 4, struct.unpack("<f", wave[-4:])[0])
    {here}
    say({{"utt_id": ask["utt_id"], "text": text}})
{last}
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return what makes the environment: its python runs a worker of ours, whatever script it is given."""
    python = tmp_path / "env" / "bin" / "python"
    monkeypatch.setenv("SPEECHLLM_ESPNET", str(tmp_path / "env"))

    def write(here: str = "pass", first: str = "", last: str = "", version: str = "202511") -> None:
        script = tmp_path / "worker.py"
        script.write_text(WORKER.format(here=here, first=first, last=last, version=version), encoding="utf-8")
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
        python.chmod(0o755)

    return write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "recipe" / "exp" / "asr"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("token_type: char\n", encoding="utf-8")
    (folder / "valid.acc.ave.pth").write_bytes(b"weights")
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tiny.data_folder(tmp_path / "in", SAMPLES)


def expected(data_dir: Path) -> dict[str, str]:
    """Return what the worker above makes of what our own reader reads."""
    waves = {key: utt.read() for key, utt in kaldi.load(data_dir, need_text=False).utterances.items()}
    return {key: f"{len(wave)}個 {wave[-1]:.9g}" for key, wave in waves.items()}


def run(data_dir: Path, out: Path, model: Path, base_s: float = 60.0) -> int:
    return transcribe_dir(NAME, data_dir, out, str(model), 8, Patience(base_s, per_second=0.0))


def refused(data_dir: Path, out: Path, model: Path, base_s: float = 60.0) -> str:
    """Return the error of a run; whatever it was, no text and no sound may be left."""
    with pytest.raises(ModelError) as caught:
        run(data_dir, out, model, base_s)
    assert not (out / "text").exists()
    assert not (out / SOUNDS).exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_sound_arrives_as_our_reader_reads_it(
    install: Install, data_dir: Path, model: Path, tmp_path: Path
) -> None:
    install()
    out = tmp_path / "out"
    assert run(data_dir, out, model) == len(SAMPLES)
    assert kaldi.read_table(out / "text") == expected(data_dir)
    assert not (out / PARTIAL).exists()
    assert not (out / SOUNDS).exists()
    rtf = read_json(out / "rtf.json")
    assert rtf["audio_s"] == pytest.approx(sum(SAMPLES.values()) / 16_000)
    assert rtf["rtf"] == pytest.approx(float(str(rtf["wall_s"])) / float(str(rtf["audio_s"])))
    note = read_json(out / "provenance.json")
    assert note["worker"] == {"exit_status": 0, "versions": {"espnet": "202511"}}
    assert note["device"] == "cpu"
    assert note["data"] == kaldi.audio_hash(kaldi.load(data_dir))


def test_segments_and_other_rates_are_our_readers_business(install: Install, model: Path, tmp_path: Path) -> None:
    install()
    audio.write_wav(tmp_path / "long.wav", tiny.wave(48_000), 48_000)
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / "wav.scp").write_text(f"r {tmp_path}/long.wav\n", encoding="utf-8")
    (data_dir / "segments").write_text("r-1 r 0.0 0.25\nr-2 r 0.5 1.0\n", encoding="utf-8")
    run(data_dir, tmp_path / "out", model)
    texts = kaldi.read_table(tmp_path / "out" / "text")
    assert texts == expected(data_dir)
    assert [text.split("個")[0] for text in texts.values()] == ["4000", "8000"]


def test_a_finished_run_starts_no_worker_and_another_model_is_refused(
    install: Install, data_dir: Path, model: Path, tmp_path: Path
) -> None:
    install()
    run(data_dir, tmp_path / "out", model)
    install(first="sys.exit('it was started')")
    assert run(data_dir, tmp_path / "out", model) == 0
    (model / "valid.acc.ave.pth").write_bytes(b"other weights")
    with pytest.raises(DataError, match=r"holds output made with fingerprint = \w+, now it is"):
        run(data_dir, tmp_path / "out", model)


def test_a_killed_run_goes_on_with_the_utterances_that_are_left(
    install: Install, data_dir: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    install(here="if number == 2: os.kill(os.getpid(), 9)")
    assert "its worker was killed by signal 9; see" in refused(data_dir, out, model)
    with (out / PARTIAL).open("a", encoding="utf-8") as stream:
        stream.write('{"utt_id": "u3", "te')  # as a kill of our own process leaves it
    install(here=f"open({str(tmp_path / 'asked')!r}, 'a').write(ask['utt_id'] + ' ')")
    assert run(data_dir, out, model) == len(SAMPLES) - 2
    assert (tmp_path / "asked").read_text() == "u3 u4 u5 u6 "
    assert kaldi.read_table(out / "text") == expected(data_dir)


def test_texts_of_two_versions_are_not_mixed(install: Install, data_dir: Path, model: Path, tmp_path: Path) -> None:
    install(here="if number == 2: sys.exit(1)")
    refused(data_dir, tmp_path / "out", model)
    install(version="202609")
    with pytest.raises(DataError, match="holds texts made with espnet 202511, now it is 202609; remove the folder"):
        run(data_dir, tmp_path / "out", model)


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ({"here": "sys.exit('no memory left')"}, "its worker ended with status 1 (it last said: no memory left); see"),
        ({"first": "import no_such_package"}, "(it last said: ModuleNotFoundError: No module named 'no_such_package')"),
        ({"here": "print('10%|## ')"}, "wrote a line that is no JSON object: 10%|##"),
        ({"here": "say([1])"}, "wrote a line that is no JSON object: [1]"),
        ({"here": "sys.stdout.write('x' * (1 << 21)); time.sleep(60)"}, "wrote a line of more than 1048576 bytes"),
        ({"here": "say({'utt_id': 'u9', 'text': ''})"}, "answered for 'u9', which it was not asked for"),
        ({"here": "say({'utt_id': ask['utt_id'], 'text': text})"}, "answered for 'u1', which it was not asked for"),
        ({"here": "say({'utt_id': ask['utt_id'], 'error': 'too short'})"}, "failed on utterance u1: too short"),
        ({"here": "say({'utt_id': ask['utt_id'], 'text': 3})"}, "answered utterance u1 with no text"),
        ({"here": r"say({'utt_id': ask['utt_id'], 'text': '\ud800'})"}, "answered utterance u1 with no text"),
        ({"first": "say({'ready': True})"}, "did not begin with its versions"),
    ],
)
def test_a_worker_at_fault_is_one_line(
    install: Install, data_dir: Path, model: Path, tmp_path: Path, fault: dict[str, str], what: str
) -> None:
    install(**fault)
    message = refused(data_dir, tmp_path / "out", model)
    assert what in message
    assert message.startswith("reazonspeech-espnet: ")
    assert message.endswith(f"see {tmp_path / 'out' / LOG} and run again, finished texts are kept")


@pytest.mark.parametrize("fault", [{"first": "time.sleep(60)"}, {"here": "time.sleep(60)"}])
def test_a_worker_that_hangs_is_killed(
    install: Install, data_dir: Path, model: Path, tmp_path: Path, fault: dict[str, str]
) -> None:
    install(**fault)
    assert "its worker said nothing for 1 s" in refused(data_dir, tmp_path / "out", model, base_s=0.8)


def test_a_failure_after_the_last_text_is_noted(
    install: Install, data_dir: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(last="sys.exit(3)")
    run(data_dir, tmp_path / "out", model)
    assert kaldi.read_table(tmp_path / "out" / "text") == expected(data_dir)
    assert "worker ended badly after its last text name=reazonspeech-espnet status=3" in caplog.text
    worker = read_json(tmp_path / "out" / "provenance.json")["worker"]
    assert isinstance(worker, dict)
    assert worker["exit_status"] == 3


def test_line_breaks_in_a_text_become_blanks(install: Install, data_dir: Path, model: Path, tmp_path: Path) -> None:
    install(here=r"text = 'は\nい\u3000 u9 にせ'")
    run(data_dir, tmp_path / "out", model)
    assert set(kaldi.read_table(tmp_path / "out" / "text").values()) == {"は い u9 にせ"}


def test_neither_our_packages_nor_the_users_reach_the_worker(
    install: Install, data_dir: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    seen = tmp_path / "seen.json"
    install(first=f"json.dump([dict(os.environ), sys.argv[1:], os.getcwd()], open({str(seen)!r}, 'w'))")
    run(data_dir, tmp_path / "out", model)
    environment, arguments, folder = json.loads(seen.read_text())
    assert environment["PYTHONNOUSERSITE"] == "1"
    assert not {"PYTHONPATH", "VIRTUAL_ENV"} & environment.keys()
    assert arguments[:3] == ["-I", "-X", "utf8"]
    assert arguments[3].endswith("foreign_worker.py")
    order = json.loads(arguments[4])
    assert order["engine"] == "espnet"
    assert order["files"] == {"config": f"{model}/config.yaml", "model": f"{model}/valid.acc.ave.pth"}
    assert (order["settings"]["beam_size"], order["settings"]["pad_samples"]) == (20, [16_000, 8_000])
    assert folder == str(tmp_path / "recipe")  # the paths in an experiment's config.yaml start there


def test_a_sound_at_fault_is_named_and_what_was_done_is_kept(
    install: Install, data_dir: Path, model: Path, tmp_path: Path
) -> None:
    install()
    sound = tmp_path / "in" / "wav" / "u6.wav"
    whole = sound.read_bytes()
    sound.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"u6.wav \(utterance u6\): is cut short"):
        run(data_dir, tmp_path / "out", model)
    assert (tmp_path / "out" / PARTIAL).exists()
    assert not (tmp_path / "out" / "text").exists()


def test_a_missing_environment_names_its_installer(
    data_dir: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, variable, installer in (
        ("reazonspeech-espnet", "SPEECHLLM_ESPNET", "tools/install_espnet.sh"),
        ("reazonspeech-nemo", "SPEECHLLM_NEMO", "tools/install_nemo.sh"),
    ):
        monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
        with pytest.raises(ConfigError, match=f"there is no environment for {name}; run {installer}"):
            transcribe_dir(name, data_dir, tmp_path / "out", str(model), 8)
    assert not (tmp_path / "out").exists()


def test_an_environment_whose_python_cannot_run_is_an_error(
    install: Install, data_dir: Path, model: Path, tmp_path: Path
) -> None:
    install()
    (tmp_path / "env" / "bin" / "python").chmod(0o644)
    assert "cannot be run" in refused(data_dir, tmp_path / "out", model)


META = "yaml_files: {{asr_train_config: {config}}}\nfiles: {{asr_model_file: {model}}}\n"


def test_an_unpacked_package_names_its_files(install: Install, data_dir: Path, model: Path, tmp_path: Path) -> None:
    install(first=f"json.dump([sys.argv[-1], os.getcwd()], open({str(tmp_path / 'seen.json')!r}, 'w'))")
    package = model.parents[1]
    places = {"config": "exp/asr/config.yaml", "model": "exp/asr/valid.acc.ave.pth"}
    (package / "meta.yaml").write_text(META.format(**places), encoding="utf-8")
    run(data_dir, tmp_path / "out", package)
    order, folder = json.loads((tmp_path / "seen.json").read_text())
    assert json.loads(order)["files"] == {role: f"{package}/{place}" for role, place in places.items()}
    assert folder == str(package)


@pytest.mark.parametrize(
    ("meta", "what"),
    [
        (META.format(config="/etc/passwd", model="m"), "asr_train_config /etc/passwd leads out of its folder"),
        (META.format(config="exp/asr/config.yaml", model="../m.pth"), "asr_model_file ../m.pth leads out of"),
        (META.format(config="exp/asr/config.yaml", model="m.pth"), "asr_model_file m.pth is not there"),
        ("files: {tts_model_file: a}\n", "names no asr_train_config under yaml_files"),
        ("- a\n", "names no asr_train_config"),
        ("a: [\n", "is no YAML that can be read"),
        ("!!python/object/apply:os.system ['true']\n", "is no YAML that can be read"),
    ],
)
def test_a_package_at_fault_is_named(
    install: Install, data_dir: Path, model: Path, tmp_path: Path, meta: str, what: str
) -> None:
    install()
    (model.parents[1] / "meta.yaml").write_text(meta, encoding="utf-8")
    message = refused(data_dir, tmp_path / "out", model.parents[1])
    assert message.startswith(f"{model.parents[1]}/meta.yaml: ")
    assert what in message


def test_a_folder_that_is_no_model_is_named(install: Install, data_dir: Path, model: Path, tmp_path: Path) -> None:
    install()
    (model / "valid.acc.ave.pth").rename(model / "3epoch.pth")
    assert "has no checkpoint: none of model.pth, valid.acc.ave.pth" in refused(data_dir, tmp_path / "out", model)
    (model / "config.yaml").unlink()
    assert "it has neither meta.yaml nor config.yaml" in refused(data_dir, tmp_path / "out", model)
    assert "no/such: no such model folder or hub model" in refused(data_dir, tmp_path / "out", tmp_path / "no/such")


def test_the_longest_pause_inside_is_cut_in_its_middle() -> None:
    speech, pause = 0.1, 0.99
    blank_q = np.array([pause] * 5 + [speech] * 2 + [pause] * 2 + [speech] + [pause] * 3 + [speech] + [pause] * 5)
    # 19 frames in 2,000 samples: a frame is 100 of them; frames 10 to 12 are the longest run that touches neither end
    assert longest_pause(blank_q, 2_000, 0.98) == 1_150
    assert longest_pause(blank_q, 2_000, 0.995) == 2_000
    assert longest_pause(np.full(19, pause), 2_000, 0.98) == 2_000
