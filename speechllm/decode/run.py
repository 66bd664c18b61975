"""Stage 4: decodes a data or dump directory with a trained model; a killed run goes on by utterance."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from speechllm.config.schema import DecodeConfig
from speechllm.data import kaldi
from speechllm.data.dataset import FeatureSet
from speechllm.decode.batched import Text, decode
from speechllm.errors import ConfigError
from speechllm.folders import DECODE_RECORD, begin, finish, is_made, only_writer
from speechllm.model.assemble import PROVENANCE_FILE, TRAINED_FILE, encoder_of, find_encoder, load_model, read_model
from speechllm.model.encoder import read_for
from speechllm.model.identity import check_dump
from speechllm.model.speechllm import pad_frames
from speechllm.runtime import (
    device_name,
    pick_device,
    provenance,
    read_json,
    read_whole_lines,
    sha256,
    write_json,
    write_text,
)
from speechllm.text.normalize import get_profile, normalize

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from speechllm.config.schema import Config
    from speechllm.decode.batched import Fetch
    from speechllm.model.assemble import Origin
    from speechllm.model.speechllm import SpeechLlm

log = logging.getLogger(__name__)

PARTIAL = ".partial.jsonl"


@dataclass(frozen=True)
class Source:
    """Where frames come from: a store, or the encoder on the spot."""

    durations_s: Mapping[str, float]
    fetch_for: Callable[[SpeechLlm], Fetch]
    """The model to what hands it the frames of utterances."""
    identity: str
    encodes: bool
    """Whether the encoder's time is part of fetching."""


def decode_dir(model_dir: Path, data_dir: Path, out: Path, changes: Mapping[str, object]) -> int:
    """Write ``text``, ``nbest.jsonl`` and ``rtf.json`` to `out`; return the number of utterances decoded now.

    `changes` stand in for fields of the configured decoding, such as ``beam``. `data_dir` may hold features (a dump) or
    sounds alone.

    Raises:
        UserError: the model or the data are at fault, or `out` holds the output of something else.
    """
    config, origin = read_model(model_dir)
    settings = DecodeConfig.model_validate({**config.decode.model_dump(), **changes})
    get_profile(settings.normalize)  # an unknown one is refused now, not after hours
    source = _source(data_dir, config, origin)
    # the batch never changes a text, so a decode may go on with another
    decided = {key: value for key, value in settings.model_dump(mode="json").items() if key != "batch_size"}
    weights = {"encoder": origin.encoder_fingerprint, "language model": origin.lm_fingerprint}
    trained = sha256(model_dir / TRAINED_FILE)
    record = {"model": trained, "weights": weights, "data": source.identity, "decode": decided}
    if is_made(out / DECODE_RECORD, record):
        log.info("decode done already out=%s", out)
        return 0
    model = load_model(model_dir)
    with only_writer(out):
        begin(out / DECODE_RECORD, record, data_dir=str(data_dir))
        found = _read_partial(out / PARTIAL, source)
        waiting = {key: value for key, value in source.durations_s.items() if key not in found}
        began, cpu_began = time.perf_counter(), time.process_time()
        found |= _decode_waiting(model, source, waiting, settings, out / PARTIAL)
        times = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu_began}
        rtf = {**times, "audio_s": sum(waiting.values()), "encoder_included": source.encodes}
        _write(out, found, settings, rtf)
        notes = {"device": device_name(model.lm.model.device), "training": _training(model_dir)}
        write_json(out / PROVENANCE_FILE, provenance(notes | {"data": source.identity, "weights": weights}))
        finish(out / DECODE_RECORD)
        (out / PARTIAL).unlink()
    return len(waiting)


def _training(model_dir: Path) -> dict[str, object]:
    """Return what training the model took, where its folder says so."""
    notes = model_dir / PROVENANCE_FILE
    return read_json(notes) if notes.is_file() else {}


def _decode_waiting(
    model: SpeechLlm, source: Source, waiting: Mapping[str, float], settings: DecodeConfig, partial: Path
) -> dict[str, list[Text]]:
    """Return the texts of `waiting`; each batch goes to `partial` as soon as it is done."""
    found: dict[str, list[Text]] = {}
    with (
        partial.open("a", encoding="utf-8") as stream,
        tqdm(total=len(waiting), desc="decode", unit="utt", disable=None) as bar,
    ):
        for batch in decode(model, waiting, source.fetch_for(model), settings):
            for utt_id, nbest in batch.items():
                stream.write(_nbest_line(utt_id, nbest))
            stream.flush()
            found |= batch
            bar.update(len(batch))
    return found


def _nbest_line(utt_id: str, nbest: Sequence[Text]) -> str:
    return json.dumps({"utt_id": utt_id, "nbest": [asdict(text) for text in nbest]}, ensure_ascii=False) + "\n"


def _read_partial(path: Path, source: Source) -> dict[str, list[Text]]:
    """Return what a killed run had decoded; a last line that was cut short is dropped from the file."""
    entries = [entry for entry in read_whole_lines(path) if entry["utt_id"] in source.durations_s]
    found = {entry["utt_id"]: [Text(**text) for text in entry["nbest"]] for entry in entries}
    if path.is_file():
        write_text(path, "".join(_nbest_line(utt_id, nbest) for utt_id, nbest in found.items()))
    return found


def _write(out: Path, found: Mapping[str, list[Text]], settings: DecodeConfig, rtf: Mapping[str, Any]) -> None:
    ordered = kaldi.byte_order(found)
    texts = {key: normalize(found[key][0].text, settings.normalize) for key in ordered}
    write_text(out / "nbest.jsonl", "".join(_nbest_line(key, found[key]) for key in ordered))
    factor = rtf["wall_s"] / rtf["audio_s"] if rtf["audio_s"] else None
    cut = sum(not found[key][0].ended for key in ordered)
    write_json(out / "rtf.json", {**rtf, "rtf": factor, "cut": cut})
    kaldi.write_table(out / "text", texts)


def _source(data_dir: Path, config: Config, origin: Origin) -> Source:
    if (data_dir / "feats.scp").is_file():
        return _from_store(data_dir, config, origin)
    return _from_audio(data_dir, config, origin)


def _from_store(folder: Path, config: Config, origin: Origin) -> Source:
    if config.encoder.train:
        what = "holds features of the encoder as it was before training"
        raise ConfigError(folder, what, "decode the data directory itself")
    features = FeatureSet(folder)
    record = check_dump(folder, config.encoder, origin.encoder_fingerprint)
    device = pick_device(config.device)

    def fetch(utt_ids: Sequence[str]) -> tuple[Tensor, list[int]]:
        return pad_frames([torch.from_numpy(matrix) for matrix in features.frames_of(utt_ids)], device)

    durations = {key: example.duration_s for key, example in features.examples.items()}
    return Source(durations, lambda _: fetch, str(record["data"]), encodes=False)


def _from_audio(folder: Path, config: Config, origin: Origin) -> Source:
    data = kaldi.load(folder, need_text=False)
    find_encoder(config, origin)  # another one is refused now, not after the model is loaded
    device = pick_device(config.device)

    def fetch_for(model: SpeechLlm) -> Fetch:
        trained = model.encoder is not None
        encoder = model.encoder or encoder_of(config, origin)

        def fetch(utt_ids: Sequence[str]) -> tuple[Tensor, list[int]]:
            frames = encoder.encode([read_for(encoder, data.utterances[utt_id]) for utt_id in utt_ids])
            # the store rounds to float16, and so does this: the texts are the same either way
            return pad_frames(frames if trained else [one.half().float() for one in frames], device)

        return fetch

    durations = {key: utt.duration_s() for key, utt in data.utterances.items()}
    return Source(durations, fetch_for, kaldi.audio_hash(data), encodes=True)
