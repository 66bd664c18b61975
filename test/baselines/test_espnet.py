"""The ESPnet baseline with ESPnet itself: a tiny random conformer that its own task made, through the real worker."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import tiny

from speechllm.baselines.reazonspeech import BASELINES, environment, transcribe_dir
from speechllm.data import kaldi
from speechllm.errors import ConfigError, ModelError
from speechllm.runtime import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NAME = "reazonspeech-espnet"
SAMPLES = {"u1": 16_000, "u2": 24_000, "u3": 9_000, "u4": 31_000}
TIMEOUT_S = 300


def installed() -> bool:
    try:
        environment(NAME)
    except ConfigError:
        return False
    return True


pytestmark = pytest.mark.skipif(not installed(), reason="needs ESPnet: run tools/install_espnet.sh")

# with ESPnet's own task, as its stage 11 does; argument: the experiment folder to make; prints Speech2Text's defaults
MAKE = r"""
import inspect, json, sys, torch
from espnet2.bin.asr_inference import Speech2Text
from espnet2.tasks.asr import ASRTask
folder = sys.argv[1]
tokens = ["<blank>", "<unk>", *"あいうえおかきくけこさしすせそ、。", "<sos/eos>"]
open(folder + "/tokens.txt", "w").write("".join(token + "\n" for token in tokens))
ASRTask.main(cmd=[
    "--dry_run", "true", "--output_dir", folder, "--token_list", folder + "/tokens.txt", "--token_type", "char",
    "--encoder", "conformer", "--encoder_conf", "output_size=8", "--encoder_conf", "attention_heads=2",
    "--encoder_conf", "linear_units=16", "--encoder_conf", "num_blocks=1", "--encoder_conf", "cnn_module_kernel=3",
    "--decoder", "transformer", "--decoder_conf", "attention_heads=2", "--decoder_conf", "linear_units=16",
    "--decoder_conf", "num_blocks=1", "--normalize", "utterance_mvn", "--model_conf", "ctc_weight=0.3",
])
torch.manual_seed(int(sys.argv[2]))
model, _ = ASRTask.build_model_from_file(folder + "/config.yaml", None, "cpu")
with torch.no_grad():
    for value in model.parameters():
        value.add_(torch.randn_like(value))
torch.save(model.state_dict(), folder + "/model.pth")
given = inspect.signature(Speech2Text.__init__).parameters.items()
print("\n" + json.dumps({key: one.default for key, one in given if isinstance(one.default, (int, float))}))
"""
SEED = "9"  # with it the texts differ from sound to sound
PAUSE = 0.0002  # what its random CTC head gives a third of the frames
# a plain call, the numbers of all but window and pause written out; arguments: those two, the experiment folder, then
# id and path of each sound; prints the texts and where sounds were cut
DIRECT = r"""
import itertools, json, sys, numpy, soundfile, torch
from espnet2.bin.asr_inference import Speech2Text
window, pause, folder, *sounds = sys.argv[1:]
recognise = Speech2Text(folder + "/config.yaml", folder + "/model.pth", beam_size=20, ctc_weight=0.5, lm_weight=0.0)

def cut_of(wave):
    with torch.no_grad():
        encoded, lengths = recognise.asr_model.encode(torch.tensor(wave)[None], torch.tensor([len(wave)]))
        blank = recognise.asr_model.ctc.softmax(encoded)[0, :, 0].tolist()
    best, at = (0, len(wave)), 0
    for is_pause, run in itertools.groupby(blank, lambda value: value > float(pause)):
        end = at + len(list(run))
        if is_pause and at and end < len(blank):
            first, last = (int(frame / (len(blank) + 1) * len(wave)) for frame in (at, end))
            best = max(best, (last - first, (first + last) // 2), key=lambda pair: pair[0])
        at = end
    return best[1]

texts, cuts = {}, []
for utt_id, path in zip(sounds[::2], sounds[1::2]):
    wave, rate = soundfile.read(path, dtype="float32")
    assert rate == 16000
    texts[utt_id] = ""
    while len(wave):
        cut = cut_of(wave[:int(window)]) if len(wave) > int(window) else len(wave)
        cuts += [cut] if len(wave) > int(window) else []
        texts[utt_id] += recognise(numpy.pad(wave[:cut], (16000, 8000)))[0][0]
        wave = wave[cut:]
print("\n" + json.dumps([texts, cuts]))
"""


def in_espnet(script: str, *arguments: str) -> str:
    command = [str(environment(NAME)), "-I", "-X", "utf8", "-W", "ignore", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1] if done.stdout else ""


@dataclass(frozen=True)
class Made:
    """An experiment folder, and what ESPnet decodes with where nothing is said."""

    folder: Path
    defaults: Mapping[str, float]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("recipe") / "exp" / "asr_tiny"
    folder.mkdir(parents=True)
    return Made(folder, json.loads(in_espnet(MAKE, str(folder), SEED)))


def direct(model: Path, data_dir: Path, window: int, pause: float) -> tuple[dict[str, str], list[int]]:
    utterances = kaldi.load(data_dir).utterances.values()
    sounds = [part for utt in utterances for part in (utt.utt_id, str(utt.wav))]
    texts, cuts = json.loads(in_espnet(DIRECT, str(window), str(pause), str(model), *sounds))
    return texts, cuts


def test_the_worker_says_what_a_plain_call_of_espnet_says(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a window of a second and what this model takes for a pause, so that sounds of a second or two are cut
    settings = {**BASELINES[NAME].settings, "window_s": 1, "pause_probability": PAUSE}
    monkeypatch.setitem(BASELINES, NAME, dataclasses.replace(BASELINES[NAME], settings=settings))
    data_dir = tiny.data_folder(tmp_path / "in", SAMPLES)
    out = tmp_path / "out"
    assert transcribe_dir(NAME, data_dir, out, str(made.folder), 8) == len(SAMPLES)
    texts, cuts = direct(made.folder, data_dir, 16_000, PAUSE)
    assert kaldi.read_table(out / "text") == texts
    assert len(set(texts.values())) > 2
    assert [cut for cut in cuts if cut != 16_000] != []
    worker = read_json(out / "provenance.json")["worker"]
    assert isinstance(worker, dict)
    assert worker["versions"]["espnet"] == "202511"
    assert worker["exit_status"] == 0
    assert "nltk_data" not in (out / "worker.log").read_text(encoding="utf-8")  # nothing was asked of the network
    assert transcribe_dir(NAME, data_dir, out, str(made.folder), 8) == 0


def test_the_published_settings_are_espnets_own_where_reazonspeech_says_nothing(made: Made) -> None:
    settings = BASELINES[NAME].settings
    for name in ("beam_size", "ctc_weight", "penalty", "maxlenratio", "minlenratio"):
        assert settings[name] == made.defaults[name], name


def test_a_checkpoint_at_fault_is_one_line(made: Made, tmp_path: Path) -> None:
    data_dir = tiny.data_folder(tmp_path / "in", {"u1": 16_000})
    broken = shutil.copytree(made.folder, tmp_path / "exp" / "broken")
    (broken / "model.pth").write_bytes(b"no pickle")
    what = r"^reazonspeech-espnet: its worker ended with status 1 \(it last said: \w+.*\); see"
    with pytest.raises(ModelError, match=what):
        transcribe_dir(NAME, data_dir, tmp_path / "out", str(broken), 8)
