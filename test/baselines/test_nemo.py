"""The NeMo baseline with NeMo itself: a tiny random transducer that NeMo saved, through the real worker."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest
import tiny

from speechllm.baselines.reazonspeech import environment, transcribe_dir
from speechllm.data import kaldi
from speechllm.errors import ConfigError, ModelError
from speechllm.runtime import read_json

if TYPE_CHECKING:
    from pathlib import Path

NAME = "reazonspeech-nemo"
SAMPLES = {"u1": 16_000, "u2": 24_000, "u3": 9_000, "u4": 31_000}
TIMEOUT_S = 300


def installed() -> bool:
    try:
        environment(NAME)
    except ConfigError:
        return False
    return True


pytestmark = pytest.mark.skipif(not installed(), reason="needs NeMo: run tools/install_nemo.sh")

# a FastConformer transducer with ALSD, of the published model's classes; arguments: the folder to make it in, texts
MAKE = r"""
import sys, sentencepiece, torch
from omegaconf import OmegaConf
from nemo.collections.asr.models import EncDecRNNTBPEModel
folder, *texts = sys.argv[1:]
open(folder + "/texts", "w").write("\n".join(texts))
sentencepiece.SentencePieceTrainer.train(
    input=folder + "/texts", model_prefix=folder + "/tokenizer", model_type="char", hard_vocab_limit=False)
open(folder + "/vocab.txt", "w").write("")
width, asr = 8, "nemo.collections.asr.modules."
sizes = {"hidden_size": width, "encoder_hidden": width, "pred_hidden": width, "joint_hidden": width}
config = {
    "sample_rate": 16000, "labels": [], "tokenizer": {"dir": folder, "type": "bpe"},
    "model_defaults": {"enc_hidden": width, "pred_hidden": width},
    "preprocessor": {"_target_": asr + "AudioToMelSpectrogramPreprocessor", "features": 80, "dither": 0.0},
    "encoder": {"_target_": asr + "ConformerEncoder", "feat_in": 80, "n_layers": 1, "d_model": width, "n_heads": 2,
                "subsampling": "dw_striding", "subsampling_factor": 8, "subsampling_conv_channels": 8,
                "causal_downsampling": False, "ff_expansion_factor": 2, "conv_kernel_size": 5},
    "decoder": {"_target_": asr + "RNNTDecoder", "normalization_mode": None, "random_state_sampling": False,
                "blank_as_pad": True, "prednet": {"pred_hidden": width, "pred_rnn_layers": 1, "t_max": None}},
    "joint": {"_target_": asr + "RNNTJoint", "log_softmax": None, "preserve_memory": False, "fuse_loss_wer": False,
              "jointnet": {"joint_hidden": width, "activation": "relu", "dropout": 0.0}},
    "decoding": {"strategy": "alsd", "greedy": {"max_symbols": 10},
                 "beam": {"beam_size": 4, "return_best_hypothesis": True, "score_norm": True}},
    "loss": {"loss_name": "default"},
}
torch.manual_seed(2)
model = EncDecRNNTBPEModel(OmegaConf.create(config))
with torch.no_grad():
    for value in model.parameters():
        value.add_(torch.randn_like(value))
model.save_to(folder + "/tiny.nemo")
"""
# a plain call, with the text put together from all tokens but blanks
DIRECT = r"""
import json, sys, numpy, soundfile, torch
from nemo.collections.asr.models import EncDecRNNTBPEModel
archive, *sounds = sys.argv[1:]
model = EncDecRNNTBPEModel.restore_from(archive, map_location="cpu")
texts = {}
for utt_id, path in zip(sounds[::2], sounds[1::2]):
    wave, rate = soundfile.read(path, dtype="float32")
    assert rate == 16000
    best = model.transcribe([torch.from_numpy(numpy.pad(wave, 8000))], batch_size=1, return_hypotheses=True)[0]
    tokens = [int(token) for token in best.y_sequence if token != model.decoding.blank_id]
    texts[utt_id] = model.tokenizer.ids_to_text(tokens)
print("\n" + json.dumps(texts))
"""


def in_nemo(script: str, *arguments: str) -> str:
    command = [str(environment(NAME)), "-I", "-X", "utf8", "-W", "ignore", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1] if done.stdout else ""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nemo")
    in_nemo(MAKE, str(folder), *tiny.TEXTS)
    return folder / "tiny.nemo"


def test_the_worker_says_what_a_plain_call_of_nemo_says(archive: Path, tmp_path: Path) -> None:
    data_dir = tiny.data_folder(tmp_path / "in", SAMPLES)
    out = tmp_path / "out"
    assert transcribe_dir(NAME, data_dir, out, str(archive.parent), 8) == len(SAMPLES)
    utterances = kaldi.load(data_dir).utterances.values()
    sounds = [part for utt in utterances for part in (utt.utt_id, str(utt.wav))]
    texts = json.loads(in_nemo(DIRECT, str(archive), *sounds))
    assert kaldi.read_table(out / "text") == {key: " ".join(text.split()) for key, text in texts.items()}
    assert len(set(texts.values())) > 2
    worker = read_json(out / "provenance.json")["worker"]
    assert isinstance(worker, dict)
    assert worker["versions"]["nemo_toolkit"] == "3.0.0"
    assert worker["exit_status"] == 0
    assert transcribe_dir(NAME, data_dir, out, str(archive.parent), 8) == 0


def test_a_folder_without_an_archive_is_named(tmp_path: Path) -> None:
    data_dir = tiny.data_folder(tmp_path / "in", {"u1": 16_000})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty: holds 0 \.nemo files, one is needed; give the file itself"):
        transcribe_dir(NAME, data_dir, tmp_path / "out", str(tmp_path / "empty"), 8)
