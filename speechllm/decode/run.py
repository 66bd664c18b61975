"""Stage 4: decodes a data or dump directory with a trained model; a killed run goes on by utterance.

Several processes may share it out: each takes a part of the utterances to a folder of its own below the output, and a
run of the whole takes over what they made.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from speechllm.config.schema import DecodeConfig
from speechllm.data import kaldi
from speechllm.data.archive import as_stored
from speechllm.data.dataset import FeatureSet
from speechllm.decode.batched import Decoder, Text, text_of
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
PARTS = ".parts"
TIMES = "rtf.json"


@dataclass(frozen=True)
class Source:
    """Where frames come from: a store, or the encoder on the spot."""

    durations_s: Mapping[str, float]
    fetch_for: Callable[[SpeechLlm], Fetch]
    """The model to what hands it the frames of utterances."""
    identity: str
    encodes: bool
    """Whether the encoder's time is part of fetching."""


@dataclass(frozen=True)
class _Run:
    """What is decoded, with what, and how."""

    model_dir: Path
    source: Source
    settings: DecodeConfig
    record: Mapping[str, object]
    """What decides the texts."""

    def decode_into(self, partial: Path, waiting: Mapping[str, float]) -> tuple[dict[str, list[Text]], dict[str, Any]]:
        """Return the texts of `waiting`, and the times and the devices that they took; they also go to `partial`."""
        if not waiting:  # then not even the model is loaded
            return {}, {"wall_s": 0.0, "cpu_s": 0.0, "audio_s": 0.0, "devices": []}
        model = load_model(self.model_dir)
        began, cpu_began = time.perf_counter(), time.process_time()
        found = _decode_waiting(model, self.source, waiting, self.settings, partial)
        times = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu_began}
        return found, {**times, "audio_s": sum(waiting.values()), "devices": [device_name(model.lm.model.device)]}


def decode_dir(
    model_dir: Path, data_dir: Path, out: Path, changes: Mapping[str, object], part: tuple[int, int] | None = None
) -> int:
    """Write ``text``, ``nbest.jsonl`` and ``rtf.json`` to `out`; return the number of utterances decoded now.

    `changes` stand in for fields of the configured decoding, such as ``beam``. `data_dir` may hold features (a dump) or
    sounds alone. With `part` (number from 1, count), only that part of the utterances is decoded, below `out`; a later
    call without it takes it over.

    Raises:
        UserError: the model or the data are at fault, or `out` holds the output of something else.
    """
    run = _prepare(model_dir, data_dir, changes)
    if is_made(out / DECODE_RECORD, run.record):
        log.info("decode done already out=%s", out)
        return 0
    return _decode_whole(run, data_dir, out) if part is None else _decode_part(run, out, *part)


def _prepare(model_dir: Path, data_dir: Path, changes: Mapping[str, object]) -> _Run:
    config, origin = read_model(model_dir)
    settings = DecodeConfig.model_validate({**config.decode.model_dump(), **changes})
    get_profile(settings.normalize)  # an unknown one is refused now, not after hours
    source = _source(data_dir, config, origin)
    # the batch never changes a text, so a decode may go on with another
    decided = {key: value for key, value in settings.model_dump(mode="json").items() if key != "batch_size"}
    weights = {"encoder": origin.encoder_fingerprint, "language model": origin.lm_fingerprint}
    trained = sha256(model_dir / TRAINED_FILE)
    record = {"model": trained, "weights": weights, "data": source.identity, "decode": decided}
    return _Run(model_dir, source, settings, record)


def _decode_whole(run: _Run, data_dir: Path, out: Path) -> int:
    """Decode what neither an earlier run nor a part has made, and write the texts of all."""
    with contextlib.ExitStack() as held:
        held.enter_context(only_writer(out))
        parts = _parts(out, run.record)
        for folder in parts:
            held.enter_context(only_writer(folder))
        begin(out / DECODE_RECORD, run.record, data_dir=str(data_dir))
        found = _read_partials([*parts, out], run.source)
        waiting = {key: value for key, value in run.source.durations_s.items() if key not in found}
        made, times = run.decode_into(out / PARTIAL, waiting)
        for folder in parts:
            times = _added(times, folder / TIMES)
        devices = ", ".join(sorted(set(times.pop("devices"))))
        _write(out, found | made, run.settings, {**times, "encoder_included": run.source.encodes})
        notes = {"device": devices, "training": _training(run.model_dir), "data": run.source.identity}
        shared = {"parts": len(parts)} if parts else {}
        write_json(out / PROVENANCE_FILE, provenance({**notes, "weights": run.record["weights"], **shared}))
        finish(out / DECODE_RECORD)
        (out / PARTIAL).unlink(missing_ok=True)
    shutil.rmtree(out / PARTS, ignore_errors=True)
    return len(waiting)


def _decode_part(run: _Run, out: Path, number: int, count: int) -> int:
    """Decode every utterance of a part that no run has made yet, into a folder of the part."""
    folder = out / PARTS / f"{number}-of-{count}"
    if is_made(folder / DECODE_RECORD, run.record):
        log.info("decode done already part=%s", folder.name)
        return 0
    with only_writer(folder):
        begin(folder / DECODE_RECORD, run.record)
        mine = kaldi.byte_order(run.source.durations_s)[number - 1 :: count]
        made = set(_read_partials([folder], run.source))
        # what others are writing is theirs to mend
        made.update(_read_partials([*_parts(out, run.record), out], run.source, mend=False))
        waiting = {key: run.source.durations_s[key] for key in mine if key not in made}
        _, times = run.decode_into(folder / PARTIAL, waiting)
        write_json(folder / TIMES, times)
        finish(folder / DECODE_RECORD)
    return len(waiting)


def _parts(out: Path, record: Mapping[str, object]) -> list[Path]:
    """Return the folders that parts have begun; one of another model, other data or other settings is refused."""
    folders = sorted(mark.parent for mark in (out / PARTS).glob(f"*/{DECODE_RECORD}"))
    for folder in folders:
        is_made(folder / DECODE_RECORD, record)
    return folders


def _added(times: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return `times` and those of a part together; a part that was killed has none."""
    other = read_json(path) if path.is_file() else {}
    return {key: value + other[key] if key in other else value for key, value in times.items()}


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
        for utt_id, nbest in Decoder(model, settings).texts(waiting, source.fetch_for(model)):
            stream.write(_nbest_line(utt_id, nbest))
            stream.flush()
            found[utt_id] = nbest
            bar.update()
    return found


def _nbest_line(utt_id: str, nbest: Sequence[Text]) -> str:
    return json.dumps({"utt_id": utt_id, "nbest": [asdict(text) for text in nbest]}, ensure_ascii=False) + "\n"


def _read_partials(folders: Sequence[Path], source: Source, *, mend: bool = True) -> dict[str, list[Text]]:
    """Return what killed runs and parts had decoded; with `mend`, a last line cut short is dropped from its file."""
    found: dict[str, list[Text]] = {}
    for path in [folder / PARTIAL for folder in folders]:
        entries = [entry for entry in read_whole_lines(path) if entry["utt_id"] in source.durations_s]
        here = {entry["utt_id"]: [text_of(text) for text in entry["nbest"]] for entry in entries}
        if mend and path.is_file():
            write_text(path, "".join(_nbest_line(utt_id, nbest) for utt_id, nbest in here.items()))
        found |= here
    return found


def _write(out: Path, found: Mapping[str, list[Text]], settings: DecodeConfig, rtf: Mapping[str, Any]) -> None:
    ordered = kaldi.byte_order(found)
    texts = {key: normalize(found[key][0].text, settings.normalize) for key in ordered}
    write_text(out / "nbest.jsonl", "".join(_nbest_line(key, found[key]) for key in ordered))
    factor = rtf["wall_s"] / rtf["audio_s"] if rtf["audio_s"] else None
    cut = sum(not found[key][0].ended for key in ordered)
    write_json(out / TIMES, {**rtf, "rtf": factor, "cut": cut})
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
    record = check_dump(folder, config.encoder, origin.encoder_fingerprint, any_store=True)

    def fetch_for(_: SpeechLlm) -> Fetch:
        device = pick_device(config.device)  # not before: parts are put together where there is no GPU, too

        def fetch(utt_ids: Sequence[str]) -> tuple[Tensor, list[int]]:
            return pad_frames([torch.from_numpy(matrix) for matrix in features.frames_of(utt_ids)], device)

        return fetch

    durations = {key: example.duration_s for key, example in features.examples.items()}
    return Source(durations, fetch_for, str(record["data"]), encodes=False)


def _from_audio(folder: Path, config: Config, origin: Origin) -> Source:
    data = kaldi.load(folder, need_text=False)
    find_encoder(config, origin)  # another one is refused now, not after the model is loaded

    def fetch_for(model: SpeechLlm) -> Fetch:
        device = pick_device(config.device)
        trained = model.encoder is not None
        encoder = model.encoder or encoder_of(config, origin)

        def fetch(utt_ids: Sequence[str]) -> tuple[Tensor, list[int]]:
            frames = encoder.encode([read_for(encoder, data.utterances[utt_id]) for utt_id in utt_ids])
            if not trained:  # the store rounds, and so does this: the texts are the same either way
                frames = [torch.from_numpy(as_stored(one.numpy(), config.encoder.stored)) for one in frames]
            return pad_frames(frames, device)

        return fetch

    durations = {key: utt.duration_s() for key, utt in data.utterances.items()}
    return Source(durations, fetch_for, kaldi.audio_hash(data), encodes=True)
