"""Stage 4: decodes a data or dump directory with a trained model; a killed run goes on by utterance."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from speechllm.config.schema import DecodeConfig
from speechllm.data import kaldi
from speechllm.data.archive import sha256
from speechllm.data.dataset import FeatureSet
from speechllm.decode.batched import Text, decode
from speechllm.errors import DataError, ModelError
from speechllm.model import hub
from speechllm.model.assemble import TRAINED_FILE, load_model, read_model
from speechllm.model.encoder import load_encoder
from speechllm.model.speechllm import pad_frames
from speechllm.runtime import pick_device, provenance, read_json, write_json, write_text
from speechllm.text.normalize import normalize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from speechllm.config.schema import Config
    from speechllm.decode.batched import Fetch
    from speechllm.model.assemble import Origin
    from speechllm.model.encoder import SpeechEncoder
    from speechllm.model.speechllm import SpeechLlm

log = logging.getLogger(__name__)

PARTIAL = ".partial.jsonl"
RECORD = "decode.json"


@dataclass(frozen=True)
class Source:
    """Where frames come from: a store, or the encoder on the spot."""

    durations_s: Mapping[str, float]
    fetch: Fetch
    identity: str


def decode_dir(model_dir: Path, data_dir: Path, out: Path, changes: Mapping[str, object]) -> int:
    """Write ``text``, ``nbest.jsonl`` and ``rtf.json`` to `out`; return the number of utterances decoded now.

    `changes` stand in for fields of the configured decoding, such as ``beam``. `data_dir` may hold features (a dump) or
    sounds alone.

    Raises:
        UserError: the model or the data are at fault, or `out` holds the output of something else.
    """
    config, origin = read_model(model_dir)
    settings = DecodeConfig.model_validate({**config.decode.model_dump(), **changes})
    source = _source(data_dir, config, origin)
    record = {
        "model": sha256(model_dir / TRAINED_FILE),
        "data": source.identity,
        "decode": settings.model_dump(mode="json"),
    }
    if _finished(out, record):
        log.info("decode done already out=%s", out)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    mark = {"record": record, "data_dir": str(data_dir)}
    write_json(out / RECORD, {**mark, "complete": False})
    found = _read_partial(out / PARTIAL, source)
    waiting = {key: value for key, value in source.durations_s.items() if key not in found}
    began, cpu_began = time.perf_counter(), time.process_time()
    found |= _decode_waiting(load_model(model_dir), source, waiting, settings, out / PARTIAL)
    times = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu_began}
    _write(out, found, settings, sum(waiting.values()), times)
    write_json(out / RECORD, {**mark, "complete": True})
    (out / PARTIAL).unlink()
    return len(waiting)


def _decode_waiting(
    model: SpeechLlm, source: Source, waiting: Mapping[str, float], settings: DecodeConfig, partial: Path
) -> dict[str, list[Text]]:
    """Return the texts of `waiting`; each batch goes to `partial` as soon as it is done."""
    found: dict[str, list[Text]] = {}
    with (
        partial.open("a", encoding="utf-8") as stream,
        tqdm(total=len(waiting), desc="decode", unit="utt", disable=None) as bar,
    ):
        for batch in decode(model, waiting, source.fetch, settings):
            for utt_id, nbest in batch.items():
                line = {"utt_id": utt_id, "nbest": [asdict(text) for text in nbest]}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            stream.flush()
            found |= batch
            bar.update(len(batch))
    return found


def _finished(out: Path, record: Mapping[str, object]) -> bool:
    """Return whether `out` holds this very result; other content is refused with the difference."""
    if not (out / RECORD).is_file():
        return False
    content = read_json(out / RECORD)
    old = content["record"]
    assert isinstance(old, dict)
    for key, value in record.items():
        if old.get(key) != value:
            what = f"holds texts of another {key} ({old.get(key)}, now {value})"
            raise DataError(out, what, "remove the folder or choose another --out")
    return bool(content["complete"])


def _read_partial(path: Path, source: Source) -> dict[str, list[Text]]:
    """Return what a killed run had decoded; a last line that was cut short is dropped from the file."""
    found: dict[str, list[Text]] = {}
    whole: list[str] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if entry["utt_id"] in source.durations_s:
                found[entry["utt_id"]] = [Text(**text) for text in entry["nbest"]]
                whole.append(line)
        write_text(path, "".join(f"{line}\n" for line in whole))
    return found


def _write(
    out: Path,
    found: Mapping[str, list[Text]],
    settings: DecodeConfig,
    audio_s: float,
    times: Mapping[str, float],
) -> None:
    ordered = kaldi.byte_order(found)
    texts = {key: normalize(found[key][0].text, settings.normalize) for key in ordered}
    lines = [{"utt_id": key, "nbest": [asdict(text) for text in found[key]]} for key in ordered]
    write_text(out / "nbest.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    rtf = {"audio_s": audio_s, **times, "rtf": times["wall_s"] / audio_s if audio_s else None}
    write_json(out / "rtf.json", {**rtf, "cut": sum(not found[key][0].ended for key in ordered)})
    write_json(out / "provenance.json", provenance())
    kaldi.write_table(out / "text", texts)


def _source(data_dir: Path, config: Config, origin: Origin) -> Source:
    if (data_dir / "feats.scp").is_file():
        return _from_store(data_dir, config, origin)
    return _from_audio(data_dir, config, origin)


def _from_store(folder: Path, config: Config, origin: Origin) -> Source:
    features = FeatureSet(folder)
    record = read_json(folder / "dump.json")["record"]
    assert isinstance(record, dict)
    if record["encoder_fingerprint"] != origin.encoder_fingerprint:
        what = f"was dumped with another encoder ({record['encoder']}) than the model's"
        raise DataError(folder, what, f"dump it with {config.encoder.name}")
    device = pick_device(config.device)

    def fetch(utt_ids: Sequence[str]) -> tuple[Tensor, list[int]]:
        return pad_frames([torch.from_numpy(features.frames(utt_id)) for utt_id in utt_ids], device)

    durations = {key: example.duration_s for key, example in features.examples.items()}
    return Source(durations, fetch, f"{record['data']} {record['audio']}")


def _from_audio(folder: Path, config: Config, origin: Origin) -> Source:
    data = kaldi.load(folder, need_text=False)
    found = hub.resolve(config.encoder.name)
    if found.fingerprint != origin.encoder_fingerprint:
        what = f"is another model (fingerprint {found.fingerprint}) than the one trained with"
        raise ModelError(found.folder, what, "use the encoder that it was trained with")
    device = pick_device(config.device)
    loaded: list[SpeechEncoder] = []

    def fetch(utt_ids: Sequence[str]) -> tuple[Tensor, list[int]]:
        if not loaded:
            loaded.append(load_encoder(config.encoder, found, device))
        waves = [data.utterances[utt_id].read() for utt_id in utt_ids]
        # the store rounds to float16, and so does this: the texts are the same either way
        return pad_frames([frames.half().float() for frames in loaded[0].encode(waves)], device)

    durations = {key: utt.duration_s() for key, utt in data.utterances.items()}
    return Source(durations, fetch, kaldi.data_hash(data))
