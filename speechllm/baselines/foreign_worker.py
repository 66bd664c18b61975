"""The other side of the process boundary: turns sounds into texts with ESPnet or NeMo.

Run by path, by the Python of the environment that holds the library, as
``python -I foreign_worker.py '{"engine": "espnet", "files": {...}, "settings": {...}}'``. It imports nothing of
speechllm; ``foreign.py`` beside it tells the protocol, ``reazonspeech.py`` the settings and where they were published.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import traceback
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

SAMPLE_RATE_HZ = 16_000
MAX_ERROR_CHARS = 500


class Espnet:
    """ESPnet's attention and CTC beam search, one utterance at a time.

    A sound longer than the window is cut at its longest pauses, and every piece is padded with silence, as
    ReazonSpeech's own package does (pkg/espnet-asr in github.com/reazon-research/ReazonSpeech).
    """

    packages = ("espnet", "torch", "torchaudio", "numpy")

    def __init__(self, files: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """Load the model; its checkpoint is a pickle, which ESPnet opens."""
        import nltk  # type: ignore[import-not-found] # of the other environment, as is ESPnet

        # ESPnet imports a reader of English, which would go to the network for its data now, and nothing here needs it
        nltk.download = lambda *_: False
        from espnet2.bin.asr_inference import Speech2Text  # type: ignore[import-not-found]

        search = ("beam_size", "ctc_weight", "penalty", "maxlenratio", "minlenratio")
        self.device = _device()
        self.settings = settings
        # no language model is loaded: the published weight of it is zero
        self.speech2text = Speech2Text(
            asr_train_config=files["config"],
            asr_model_file=files["model"],
            device=self.device,
            lm_weight=0.0,
            **{name: settings[name] for name in search},
        )

    def __call__(self, wave_s: NDArray[np.float32]) -> str:
        """Return the text of a sound."""
        window = int(self.settings["window_s"] * SAMPLE_RATE_HZ)
        texts = []
        while len(wave_s) > window:
            cut = longest_pause(self._blank(wave_s[:window]), window, self.settings["pause_probability"])
            texts.append(self._piece(wave_s[:cut]))
            wave_s = wave_s[cut:]
        texts.append(self._piece(wave_s))
        return "".join(texts)

    def _piece(self, wave_s: NDArray[np.float32]) -> str:
        padded_s = np.pad(wave_s, tuple(self.settings["pad_samples"]))
        text: str = self.speech2text(padded_s)[0][0]
        return text

    def _blank(self, wave_s: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the CTC head's probability of a blank in each of its frames [q]."""
        import torch

        model = self.speech2text.asr_model
        speech = torch.from_numpy(wave_s)[None].to(self.device)
        with torch.no_grad():
            encoded = model.encode(speech, torch.tensor([len(wave_s)], device=self.device))[0]
            encoded = encoded[0] if isinstance(encoded, tuple) else encoded
            blank: NDArray[np.float32] = model.ctc.softmax(encoded)[0, :, model.blank_id].cpu().numpy()
        return blank


def longest_pause(blank_q: NDArray[np.float32], num_samples: int, threshold: float) -> int:
    """Return the sample at the middle of the longest run of blanks; `num_samples` where there is none.

    A run counts where it neither begins with the first frame nor lasts to the end. Frame i of n begins at sample
    i / (n + 1) of all.
    """
    is_blank = np.concatenate([[False], blank_q > threshold, [False]])
    edges = np.flatnonzero(np.diff(is_blank.astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    inside = (starts > 0) & (ends < len(blank_q))
    starts, ends = ((frames[inside] / (len(blank_q) + 1) * num_samples).astype(np.int64) for frames in (starts, ends))
    if not len(starts):
        return num_samples
    longest = int(np.argmax(ends - starts))
    return int(starts[longest] + ends[longest]) // 2


class Nemo:
    """A NeMo model with the search that it was saved with, one utterance at a time.

    Padded with silence as ReazonSpeech's own package does (pkg/nemo-asr in github.com/reazon-research/ReazonSpeech).
    """

    packages = ("nemo_toolkit", "torch", "torchaudio", "numpy")

    def __init__(self, files: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """Load the model; the archive names the classes that NeMo makes from it."""
        from nemo.collections.asr.models import ASRModel  # type: ignore[import-not-found] # of the other environment

        self.device = _device()
        self.model = ASRModel.restore_from(files["model"], map_location=self.device).eval()
        self.pad_samples = int(settings["pad_s"] * SAMPLE_RATE_HZ)

    def __call__(self, wave_s: NDArray[np.float32]) -> str:
        """Return the text of a sound."""
        import torch

        sound = torch.from_numpy(np.pad(wave_s, self.pad_samples))
        best = self.model.transcribe([sound], batch_size=1, return_hypotheses=True, verbose=False)[0]
        while isinstance(best, list | tuple):  # searches that return several give them best first
            best = best[0]
        text: str = best.text
        return text


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


ENGINES: dict[str, type[Espnet | Nemo]] = {"espnet": Espnet, "nemo": Nemo}


def main() -> int:
    """Load the model, then answer until stdin ends."""
    order = json.loads(sys.argv[1])
    # the libraries may print and read as they like: they get stderr and nothing
    answers, requests = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(0), "rb")
    os.dup2(2, 1)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    engine = ENGINES[order["engine"]](order["files"], order["settings"])
    _say(answers, {"ready": True, "device": _device_name(engine.device), "versions": _versions(engine.packages)})
    for line in requests:
        _answer(answers, engine, json.loads(line))
    return 0


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def _answer(answers: BinaryIO, engine: Callable[[NDArray[np.float32]], str], request: Mapping[str, str]) -> None:
    utt_id = request["utt_id"]
    try:
        text = engine(np.load(request["sound"], allow_pickle=False))
    except Exception as error:  # noqa: BLE001 - whatever a library raises is told, by utterance
        traceback.print_exc()
        _say(answers, {"utt_id": utt_id, "error": f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]})
    else:
        _say(answers, {"utt_id": utt_id, "text": text})


def _say(answers: BinaryIO, entry: Mapping[str, object]) -> None:
    answers.write(json.dumps(entry).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
