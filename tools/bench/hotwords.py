"""Measures hotwords: recall of rare names and CER with and without the list, and CER of speech that holds none of them.

    python tools/bench/hotwords.py --model exp/mini/model --data /tmp/names --out hotwords.json

The names of the set ``dev`` are for choosing settings, those of ``eval`` for reporting; the list holds the names of all
sets, so most of it is never spoken. The rest is ``mini_eval`` (``mini_dev`` for dev) with the same list.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import hotwords_corpus as corpus

from speechllm.data.kaldi import load
from speechllm.decode import align
from speechllm.decode.batched import Aids, Decoder
from speechllm.decode.bias import Bias, BiasSettings
from speechllm.decode.hotwords import parse_hotwords
from speechllm.errors import exit_status
from speechllm.model.assemble import encoder_of, load_model, read_model
from speechllm.model.speechllm import pad_frames
from speechllm.runtime import write_json
from speechllm.score.errors import count_edits
from speechllm.score.stats import paired_difference
from speechllm.text.normalize import normalize

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from speechllm.config.schema import DecodeConfig
    from speechllm.data.kaldi import DataDir
    from speechllm.decode.batched import Kana
    from speechllm.model.encoder import SpeechEncoder
    from speechllm.model.speechllm import SpeechLlm

    Floats = NDArray[np.float64]

SAMPLES = 2000  # of the bootstrap
BATCH = 16  # sounds encoded together


@dataclass(frozen=True)
class Spoken:
    """Utterances of a set: what was said, their frames [e h], and the rare name in each, if any."""

    texts: Mapping[str, str]
    durations_s: Mapping[str, float]
    frames: Mapping[str, Tensor]
    names: Mapping[str, str]


def main() -> int:
    """Run the measurement of one set and write what it gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="trained model folder")
    parser.add_argument("--data", type=Path, required=True, help="where the speech with rare names is, or will be")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--part", choices=("dev", "eval"), default="eval")
    parser.add_argument("--nj", type=int, default=2, help="processes that synthesise")
    parser.add_argument("--settings", nargs="*", default=[""], help="fields of BiasSettings, such as limit=2,most=20")
    parser.add_argument("--deaf", action="store_true", help="as if the model had no kana recogniser")
    parser.add_argument("--beam", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print texts that differ")
    parser.add_argument("--quick", type=int, metavar="N", help="only N sentences of each set, to see that it runs")
    return exit_status(lambda: measure(parser.parse_args()))


def measure(options: argparse.Namespace) -> None:
    """Decode names and rest without hotwords and with each of the settings; print and write the comparison."""
    named = corpus.prepare(options.part, options.data, options.nj)
    options.model, options.data = options.model.resolve(), options.data.resolve()
    os.chdir(corpus.RECIPE)  # the sounds of the recipe are named from there
    rest = load(Path(f"data/mini_{options.part}"))
    model = load_model(options.model)
    config, origin = read_model(options.model)
    encoder = encoder_of(config, origin)
    surface_of = corpus.spoken_names(options.part)
    sets = {
        "names": _spoken(encoder, named, surface_of, options.quick),
        "rest": _spoken(encoder, rest, {}, options.quick),
    }
    lines = [f"{name.surface}\t{name.reading}" for name in corpus.names()]
    decode = config.decode.model_copy(update={"beam": options.beam})
    plain = {name: _texts(model, one, decode, Aids()) for name, one in sets.items()}
    results = []
    for text in options.settings:
        settings = BiasSettings(**{name: float(value) for name, value in _pairs(text)})
        bias = Bias(parse_hotwords(lines), model.lm.tokenizer, settings)
        found = {name: _texts(model, one, decode, _aids(model, bias, deaf=options.deaf)) for name, one in sets.items()}
        results.append({"settings": asdict(settings), **_compared(sets, plain, found, show=options.show)})
        _print(results[-1])
    if options.out:
        write_json(
            options.out, {"part": options.part, "beam": options.beam, "hotwords": len(lines), "results": results}
        )


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for change in filter(None, text.split(",")):
        name, _, value = change.partition("=")
        yield name, value


def _spoken(encoder: SpeechEncoder, data: DataDir, surface_of: Mapping[str, str], count: int | None = None) -> Spoken:
    """Return the utterances of a data directory, or the first `count` of them, encoded."""
    texts = dict(itertools.islice(data.texts().items(), count))
    ids = list(texts)
    frames: dict[str, Tensor] = {}
    for start in range(0, len(ids), BATCH):
        some = ids[start : start + BATCH]
        waves = [data.utterances[key].read() for key in some]
        frames |= zip(some, encoder.encode(waves), strict=True)
    durations = {key: data.utterances[key].duration_s() for key in ids}
    return Spoken(
        texts, durations, frames, {key: surface_of[text] for key, text in texts.items() if text in surface_of}
    )


def _aids(model: SpeechLlm, bias: Bias, *, deaf: bool) -> Aids:
    """Return what hotwords need of a model; a deaf one hears no kana."""

    def hear(frames_beh: Tensor, frames_b: Sequence[int]) -> list[Kana] | None:
        return None if deaf else align.kana_log_probs(model, frames_beh, frames_b, None)

    return Aids(hear=hear, bias=bias.for_utterance)


def _texts(model: SpeechLlm, spoken: Spoken, decode: DecodeConfig, aids: Aids) -> dict[str, str]:
    """Return id -> greedy text, or the best of a beam."""

    def fetch(keys: Sequence[str]) -> tuple[Tensor, list[int]]:
        return pad_frames([spoken.frames[key] for key in keys], model.lm.model.device)

    began = time.perf_counter()
    decoder = Decoder(model, decode, aids)
    found = {one.key: one.nbest[0].text for one in decoder.texts(spoken.durations_s, fetch)}
    print(f"decoded {len(found)} in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    return found


def _compared(
    sets: Mapping[str, Spoken],
    plain: Mapping[str, Mapping[str, str]],
    found: Mapping[str, Mapping[str, str]],
    *,
    show: bool,
) -> dict[str, object]:
    result: dict[str, object] = {}
    for name, spoken in sets.items():
        ids = sorted(spoken.texts)
        before, after = (_errors(spoken, texts[name], ids) for texts in (plain, found))
        difference = paired_difference(after, before, SAMPLES, 0)
        result[name] = {
            "utterances": len(ids),
            "cer_without": before[0].sum() / before[1].sum(),
            "cer_with": after[0].sum() / after[1].sum(),
            "difference_ci95": [difference.interval.low, difference.interval.high],
            "texts_changed": sum(plain[name][key] != found[name][key] for key in ids),
            "recall_without": _recall(spoken, plain[name]),
            "recall_with": _recall(spoken, found[name]),
            "inserted_without": _inserted(spoken, plain[name]),
            "inserted_with": _inserted(spoken, found[name]),
        }
        for key in ids if show else []:
            if plain[name][key] != found[name][key] or spoken.names.get(key, "") not in found[name][key]:
                print(f"{name} {spoken.texts[key]}\n  - {plain[name][key]}\n  + {found[name][key]}")
    return result


def _errors(spoken: Spoken, texts: Mapping[str, str], ids: Sequence[str]) -> tuple[Floats, Floats]:
    counts = [count_edits(normalize(spoken.texts[key]), normalize(texts[key])) for key in ids]
    return np.array([float(one.edits) for one in counts]), np.array([float(one.ref) for one in counts])


def _recall(spoken: Spoken, texts: Mapping[str, str]) -> float | None:
    """Return the part of the spoken names that the texts hold."""
    if not spoken.names:
        return None
    return sum(name in texts[key] for key, name in spoken.names.items()) / len(spoken.names)


def _inserted(spoken: Spoken, texts: Mapping[str, str]) -> int:
    """Return how many names of the list stand in texts of utterances in which they were not said."""
    surfaces = [name.surface for name in corpus.names()]
    return sum(one in text and one not in spoken.texts[key] for key, text in texts.items() for one in surfaces)


def _print(result: Mapping[str, object]) -> None:
    print(result["settings"])
    for name in ("names", "rest"):
        values = result[name]
        assert isinstance(values, dict)
        print(f"  {name}: " + " ".join(f"{key}={_shown(value)}" for key, value in values.items()), flush=True)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_shown(one) for one in value) + "]"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
