"""The map of the system: one short function for each stage of the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from speechllm.config import load as configs
from speechllm.errors import ConfigError
from speechllm.folders import check_own

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from speechllm.model.speechllm import SpeechLlm
    from speechllm.train.tasks import Features


@dataclass(frozen=True)
class DumpOptions:
    """What stage 2 is asked for."""

    workers: int = 1
    part: tuple[int, int] | None = None
    """Number, from 1, and count of the part of the shards that is made."""
    max_dropped: float = 0.0
    """Part of the utterances that may be left out because their sounds cannot be read."""
    allow_pipes: bool = False


def dump(conf: Path, data_dir: Path, out: Path, options: DumpOptions) -> int:
    """Stage 2: write frozen-encoder features, or a part of their shards; return the number of utterances."""
    from speechllm.dump import MARK, Leeway
    from speechllm.dump import dump as run

    config = configs.load(conf)
    is_dump = (out / MARK).is_file() and out.resolve() != data_dir.resolve()
    check_own(out, ("wav.scp", "feats.scp") if is_dump else ())
    part = None if options.part is None else (options.part[0] - 1, options.part[1])
    leeway = Leeway(options.max_dropped, options.allow_pipes)
    return run(config.encoder, config.device, data_dir, out, options.workers, part, leeway=leeway)


def train(conf: Path, train_dir: Path, valid_dir: Path, exp: Path, overrides: tuple[str, ...] = ()) -> None:
    """Stage 3: train projector and adapter, the dev CER measured as stages 4 and 5 would."""
    from speechllm.train.run import train as run

    check_own(exp)
    run(configs.load(conf, overrides), train_dir, valid_dir, exp, _decode_valid, error_rate)


def error_rate(refs: Mapping[str, str], hyps: Mapping[str, str]) -> float:
    """Return the micro CER of the default profile, as a fraction."""
    from speechllm.score.errors import count_edits, sum_counts
    from speechllm.text.normalize import normalize

    total = sum_counts(count_edits(normalize(refs[key]), normalize(hyps[key])) for key in refs)
    return total.edits / max(1, total.ref)


def _decode_valid(model: SpeechLlm, features: Features, utt_ids: Sequence[str]) -> dict[str, str]:
    """Return greedy texts of validation utterances."""
    from speechllm.decode.batched import decode

    config = features.config.decode.model_copy(update={"beam": 1})
    examples = features.valid.examples
    durations = {utt_id: examples[utt_id].duration_s for utt_id in utt_ids}
    return {key: nbest[0].text for key, nbest in decode(model, durations, features.validation, config).items()}


def decode(
    exp: Path,
    data_dir: Path,
    out: Path,
    changes: Mapping[str, object],
    part: tuple[int, int] | None = None,
    *,
    hotwords: Path | None = None,
) -> int:
    """Stage 4: write the texts of `data_dir`, or of a part of it; return the number of utterances decoded now."""
    from speechllm.decode.run import decode_dir

    check_own(out)
    return decode_dir(exp / "model", data_dir, out, changes, part, hotwords=hotwords)


@dataclass(frozen=True)
class BaselineOptions:
    """What the baselines are asked for."""

    model: str | None = None
    """Checkpoint; each baseline has its own default."""
    hyp: Path | None = None
    source: str | None = None
    """Where a ready hypothesis file came from."""
    batch_size: int = 8


BASELINES = {
    "whisper": "openai/whisper-base",
    "nue-asr": "rinna/nue-asr",
    "reazonspeech-espnet": "reazon-research/reazonspeech-espnet-v2",
    "reazonspeech-nemo": "reazon-research/reazonspeech-nemo-v2",
    "hyp": "",
}
"""The checkpoint that each baseline runs where none is named."""


def baseline(name: str, data_dir: Path, out: Path, options: BaselineOptions) -> int:
    """Stage 4 for other systems: write their texts of the same data directory.

    Raises:
        ConfigError: no such baseline.
    """
    if name not in BASELINES:
        raise ConfigError(name, "no such baseline", f"choose one of {', '.join(BASELINES)}")
    check_own(out)
    model = options.model or BASELINES[name]
    if name == "whisper":
        from speechllm.baselines import whisper

        return whisper.transcribe_dir(data_dir, out, model, options.batch_size)
    if name == "nue-asr":
        from speechllm.baselines import nue_asr

        return nue_asr.transcribe_dir(data_dir, out, model, options.batch_size)
    if name == "hyp":
        from speechllm.baselines.hyp import take_over

        return take_over(data_dir, out, options.hyp, options.source)
    from speechllm.baselines import reazonspeech

    return reazonspeech.transcribe_dir(name, data_dir, out, model, options.batch_size)
