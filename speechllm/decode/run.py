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
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from speechllm.config.schema import DecodeConfig
from speechllm.data import kaldi
from speechllm.data.archive import as_stored
from speechllm.data.dataset import FeatureSet
from speechllm.decode import align, guard
from speechllm.decode.aids import aids_of
from speechllm.decode.batched import Decoder, Text, character_confidences, text_of
from speechllm.decode.engine import Spent
from speechllm.decode.hotwords import read_hotwords
from speechllm.decode.result import CUT, DOUBTFUL, LOOP, NO_SPEECH, Word
from speechllm.errors import ConfigError
from speechllm.folders import DECODE_RECORD, begin, finish, is_made, only_writer
from speechllm.model.assemble import PROVENANCE_FILE, TRAINED_FILE, encoder_of, find_encoder, load_model, read_model
from speechllm.model.encoder import read_for
from speechllm.model.heads import load_heads
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
    from speechllm.decode.batched import Decoded, Fetch, Kana
    from speechllm.decode.hotwords import Hotwords
    from speechllm.model.assemble import Origin
    from speechllm.model.speechllm import SpeechLlm

log = logging.getLogger(__name__)

PARTIAL = ".partial.jsonl"
PARTS = ".parts"
TIMES = "rtf.json"
WORD_TIMES = "ctm"
MADE = ("text", "nbest.jsonl", WORD_TIMES, TIMES)
SPENT = ("wall_s", "cpu_s", "audio_s", "row_steps", "tokens", "memory_halved")
GUARDS = (NO_SPEECH, LOOP, CUT, DOUBTFUL)


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
    hotwords: Hotwords | None = None

    def decode_into(self, partial: Path, waiting: Mapping[str, float]) -> tuple[dict[str, Entry], dict[str, Any]]:
        """Return the texts of `waiting`, and the times and the devices that they took; they also go to `partial`."""
        if not waiting:  # then not even the model is loaded
            return {}, {**dict.fromkeys(SPENT, 0), "devices": []}
        model = load_model(self.model_dir)
        began, cpu_began = time.perf_counter(), time.process_time()
        spent = Spent()
        found = self._decode(model, waiting, partial, spent)
        times = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu_began}
        return found, {
            **times,
            "audio_s": sum(waiting.values()),
            "row_steps": spent.rows,
            "tokens": spent.needed,
            "memory_halved": spent.halved,
            "devices": [device_name(model.lm.model.device)],
        }

    def _decode(self, model: SpeechLlm, waiting: Mapping[str, float], partial: Path, spent: Spent) -> dict[str, Entry]:
        """Return the results of `waiting`; each goes to `partial` as soon as it is there."""
        found: dict[str, Entry] = {}

        def is_silent(key: str, kana: Kana) -> bool:
            return guard.no_speech(1.0, guard.kana_per_s(kana, waiting[key])) >= guard.SILENT

        aids = replace(aids_of(model, load_heads(self.model_dir, model), self.hotwords), is_silent=is_silent)
        decoder = Decoder(model, self.settings, aids, spent)
        with (
            partial.open("a", encoding="utf-8") as stream,
            tqdm(total=len(waiting), desc="decode", unit="utt", disable=None) as bar,
        ):
            for one in decoder.texts(waiting, self.source.fetch_for(model)):
                found[one.key] = _entry(one, waiting[one.key])
                stream.write(_line(one.key, found[one.key]))
                stream.flush()
                bar.update()
        return found


def decode_dir(
    model_dir: Path,
    data_dir: Path,
    out: Path,
    changes: Mapping[str, object],
    part: tuple[int, int] | None = None,
    *,
    hotwords: Path | None = None,
) -> int:
    """Write ``text``, ``nbest.jsonl``, ``ctm`` and ``rtf.json`` to `out`; return the number of utterances decoded now.

    `changes` stand in for fields of the configured decoding, such as ``beam``. `data_dir` may hold features (a dump) or
    sounds alone; `hotwords` is a list of words to listen for. With `part` (number from 1, count), only that part of the
    utterances is decoded, below `out`; a later call without it takes it over.

    Raises:
        UserError: the model or the data are at fault, or `out` holds the output of something else.
    """
    run = _prepare(model_dir, data_dir, changes, hotwords)
    if is_made(out / DECODE_RECORD, run.record) and all((out / name).is_file() for name in MADE):
        log.info("decode done already out=%s", out)
        return 0
    return _decode_whole(run, data_dir, out) if part is None else _decode_part(run, out, *part)


def _prepare(model_dir: Path, data_dir: Path, changes: Mapping[str, object], hotwords: Path | None) -> _Run:
    config, origin = read_model(model_dir)
    settings = DecodeConfig.model_validate({**config.decode.model_dump(), **changes})
    get_profile(settings.normalize)  # an unknown one is refused now, not after hours
    source = _source(data_dir, config, origin)
    # the batch never changes a text, so a decode may go on with another
    decided = {key: value for key, value in settings.model_dump(mode="json").items() if key != "batch_size"}
    weights = {"encoder": origin.encoder_fingerprint, "language model": origin.lm_fingerprint}
    trained = sha256(model_dir / TRAINED_FILE)
    record = {"model": trained, "weights": weights, "data": source.identity, "decode": decided}
    if hotwords is None:
        return _Run(model_dir, source, settings, record)
    words = read_hotwords(hotwords)  # before its sum: it may not be there
    return _Run(model_dir, source, settings, {**record, "hotwords": sha256(hotwords)}, words)


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


@dataclass(frozen=True)
class Entry:
    """What decoding made of an utterance."""

    nbest: list[Text]
    words: tuple[Word, ...] = ()
    """Of the best text, with their times; none without a kana recogniser."""


def _entry(one: Decoded, duration_s: float) -> Entry:
    """Return the n-best with the times of the words of the best, which is flagged where a word was not heard."""
    best = one.nbest[0]
    if one.kana is None or not best.text:
        return Entry(one.nbest)
    heard = align.hear(best.text, one.kana, duration_s)
    if align.is_doubtful(heard):
        best = replace(best, flags=(*best.flags, DOUBTFUL))
    return Entry([best, *one.nbest[1:]], align.to_words(heard, character_confidences(best)))


def _nbest_line(utt_id: str, nbest: Sequence[Text]) -> str:
    shown = [{**asdict(text), "confidence": round(text.confidence, 4)} for text in nbest]
    return json.dumps({"utt_id": utt_id, "nbest": shown}, ensure_ascii=False) + "\n"


def _line(utt_id: str, entry: Entry) -> str:
    kept = {"utt_id": utt_id, "nbest": list(map(asdict, entry.nbest)), "words": list(map(asdict, entry.words))}
    return json.dumps(kept, ensure_ascii=False) + "\n"


def _read_entry(kept: Mapping[str, Any]) -> Entry:
    return Entry([text_of(text) for text in kept["nbest"]], tuple(Word(**word) for word in kept["words"]))


def _read_partials(folders: Sequence[Path], source: Source, *, mend: bool = True) -> dict[str, Entry]:
    """Return what killed runs and parts had decoded; with `mend`, a last line cut short is dropped from its file."""
    found: dict[str, Entry] = {}
    for path in [folder / PARTIAL for folder in folders]:
        here = {}
        for entry in read_whole_lines(path):
            with contextlib.suppress(KeyError, TypeError, ValueError):  # a line that is not ours is decoded again
                if entry["utt_id"] in source.durations_s:
                    here[entry["utt_id"]] = _read_entry(entry)
        if mend and path.is_file():
            write_text(path, "".join(_line(utt_id, entry) for utt_id, entry in here.items()))
        found |= here
    return found


def _write(out: Path, found: Mapping[str, Entry], settings: DecodeConfig, times: Mapping[str, Any]) -> None:
    ordered = kaldi.byte_order(found)
    best = {key: found[key].nbest[0] for key in ordered}
    write_text(out / "nbest.jsonl", "".join(_nbest_line(key, found[key].nbest) for key in ordered))
    write_text(out / WORD_TIMES, "".join(_ctm_line(key, word) for key in ordered for word in found[key].words))
    factor = times["wall_s"] / times["audio_s"] if times["audio_s"] else None
    flagged = {flag: sum(flag in text.flags for text in best.values()) for flag in GUARDS}
    guards = {flag: {"utterances": count, "rate": round(count / len(best), 5)} for flag, count in flagged.items()}
    write_json(out / TIMES, {**times, "rtf": factor, "guards": guards})
    kaldi.write_table(out / "text", {key: normalize(text.text, settings.normalize) for key, text in best.items()})


def _ctm_line(key: str, word: Word) -> str:
    """Return a line of NIST's CTM format: utterance, channel, begin, duration, word, confidence."""
    length_s = word.end_s - word.start_s
    return f"{key} 1 {word.start_s:.2f} {length_s:.2f} {word.text.replace(' ', '_')} {word.confidence:.3f}\n"


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
    if features.store.width_h != origin.width_h:
        what = f"holds features of {features.store.width_h} channels, the model reads {origin.width_h}"
        raise ConfigError(folder, what, "run stage 2 again")

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
