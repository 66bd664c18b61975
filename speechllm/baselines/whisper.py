"""The Whisper baseline: any Whisper checkpoint, batched, Japanese, greedy, no time stamps."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from speechllm.data import audio, kaldi
from speechllm.errors import DataError
from speechllm.folders import DECODE_RECORD, begin, finish, is_made, only_writer
from speechllm.lengths import WHISPER_HOP, WHISPER_MAX_MEL_FRAMES
from speechllm.model import hub
from speechllm.runtime import device_name, pick_device, provenance, write_json

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

LONGEST_SAMPLES = WHISPER_HOP * WHISPER_MAX_MEL_FRAMES


@torch.inference_mode()
def transcribe_dir(data_dir: Path, out: Path, model_name: str, batch_size: int) -> int:
    """Write Whisper's texts of a data directory to ``out/text``; return the number of utterances.

    Utterances are padded to 30 s, as Whisper was trained; a longer one is refused by name.

    Raises:
        UserError: data or model are at fault.
    """
    data = kaldi.load(data_dir, need_text=False)
    found = hub.resolve(model_name)
    record = {"model": found.name, "fingerprint": found.fingerprint, "data": kaldi.audio_hash(data)}
    if is_made(out / DECODE_RECORD, record):
        return 0
    transcriber = _Transcriber(found, pick_device("auto"))
    with only_writer(out):
        begin(out / DECODE_RECORD, record, data_dir=str(data_dir))
        texts, rtf = _transcribe(data, transcriber, model_name, batch_size)
        write_json(out / "rtf.json", rtf)
        notes = {"model": found.record(), "device": device_name(transcriber.device), "data": record["data"]}
        write_json(out / "provenance.json", provenance(notes))
        kaldi.write_table(out / "text", texts)
        finish(out / DECODE_RECORD)
    return len(texts)


def _transcribe(
    data: kaldi.DataDir, transcriber: _Transcriber, model_name: str, batch_size: int
) -> tuple[dict[str, str], dict[str, object]]:
    """Return id -> text, and the times that it took."""
    ids = list(data.utterances)
    texts: dict[str, str] = {}
    audio_s, began = 0.0, time.perf_counter()
    with tqdm(total=len(ids), desc=model_name, unit="utt", disable=None) as bar:
        for start in range(0, len(ids), batch_size):
            batch = ids[start : start + batch_size]
            waves = [_read(data.utterances[utt_id]) for utt_id in batch]
            audio_s += sum(len(wave) for wave in waves) / audio.SAMPLE_RATE_HZ
            texts |= dict(zip(batch, transcriber(waves), strict=True))
            bar.update(len(batch))
    wall_s = time.perf_counter() - began
    return texts, {"audio_s": audio_s, "wall_s": wall_s, "rtf": wall_s / audio_s, "encoder_included": True}


def _read(utt: kaldi.Utterance) -> NDArray[np.float32]:
    wave_s = utt.read()
    if len(wave_s) > LONGEST_SAMPLES:
        what = f"lasts {len(wave_s) / audio.SAMPLE_RATE_HZ:.1f} s, Whisper reads 30 s"
        raise DataError(f"{utt.wav} (utterance {utt.utt_id})", what, "cut it with segments")
    return wave_s


class _Transcriber:
    """Whisper with greedy search; a row's text does not depend on the batch, since all are 30 s."""

    def __init__(self, found: hub.Resolved, device: torch.device) -> None:
        from transformers import (
            AutoTokenizer,
            WhisperFeatureExtractor,
            WhisperForConditionalGeneration,
        )

        dtype = torch.float32 if device.type == "cpu" else torch.float16
        self.model = WhisperForConditionalGeneration.from_pretrained(found.folder, dtype=dtype).to(device).eval()
        self.features = WhisperFeatureExtractor.from_pretrained(found.folder)
        self.tokenizer = AutoTokenizer.from_pretrained(found.folder)
        self.device, self.dtype = device, dtype

    def __call__(self, waves: list[NDArray[np.float32]]) -> list[str]:
        features = self.features(waves, sampling_rate=16_000, return_tensors="pt").input_features
        ids = self.model.generate(
            features.to(self.device, self.dtype),
            language="ja",
            task="transcribe",
            do_sample=False,
            num_beams=1,
            # half of the context, 224 tokens; the rest is the prompt's (Radford 2022, sec. 2.3)
            max_new_tokens=self.model.config.max_target_positions // 2,
        )
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
