"""An hour of utterances with pauses, noise and music between them: what `speechllm transcribe` makes of it.

    python tools/bench/long_recording.py --data egs/jsut/asr1/data/mini_eval --model exp/mini/model --work /tmp/hour

The recording is made from a seed; the synthesisers tell when each word begins (word_times.py). Reported are the CER of
the whole beside that of the utterances one by one, text where nobody speaks, the share of word starts within 0.2 s of
the truth, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import no_speech
import numpy as np
import soundfile
import word_times
from rapidfuzz.distance import Levenshtein

from speechllm.data import audio, kaldi
from speechllm.runtime import derive_seed, read_json, write_json
from speechllm.text.normalize import normalize

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    Wave = NDArray[np.float32]
    Record = dict[str, Any]

RATE_HZ = 16_000
PAUSE_S = (0.7, 4.0)
FILLED_S = (2.0, 8.0)
FILLED_SHARE = 0.3  # of the gaps hold noise or music
KINDS = ("white", "pink", "brown", "hum", "beeps", "chords", "music")
EDGE_S = 0.3  # silence around what fills a gap
TOLERANCE_S = 0.2
CER_TOLERANCE = 0.01
WORDS_WANTED = 0.95
MEMORY_WANTED_GB = 3.0


@dataclasses.dataclass(frozen=True)
class Placed:
    """An utterance of the recording, when it is said, and when its words begin (place in the text, time)."""

    utt_id: str
    text: str
    start_s: float
    end_s: float
    starts_s: dict[int, float]


def main() -> int:
    """Make the recording, transcribe it, report; return 0 where all aims are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Kaldi directory of a mini corpus")
    parser.add_argument("--root", type=Path, help="what its wav.scp is relative to; default: the folder above data/")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the recording and all results")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=6)
    options = parser.parse_args()
    root = options.root or options.data.parent.parent
    options.work.mkdir(parents=True, exist_ok=True)
    known = kaldi.load(options.data).utterances
    waves = {key: root / utt.wav for key, utt in known.items()}
    placed = make(known, waves, options.work, 60 * options.minutes, options.seed)
    transcript, cost = transcribe(options.model, options.work)
    alone = one_by_one(options.model, {one.utt_id: waves[one.utt_id] for one in placed})
    report = {"minutes": options.minutes, "seed": options.seed, **cost, **compare(placed, transcript, alone)}
    report["met"] = _aims(report)
    write_json(options.work / "report.json", report)
    print(json.dumps(report, ensure_ascii=False, indent=1))
    return 0 if all(report["met"].values()) else 1


def make(
    known: Mapping[str, kaldi.Utterance], waves: Mapping[str, Path], work: Path, wanted_s: float, seed: int
) -> list[Placed]:
    """Write ``recording.wav`` of at least `wanted_s` seconds; return what is said in it."""
    rng = np.random.default_rng(derive_seed("long recording", seed))
    times = _Times(work / "word_times.json")
    placed: list[Placed] = []
    with soundfile.SoundFile(str(work / "recording.wav"), "w", RATE_HZ, 1, "PCM_16") as out:
        while out.tell() < wanted_s * RATE_HZ:
            for utt_id in rng.permutation(sorted(known)).tolist():
                out.write(_gap(rng))
                start_s = out.tell() / RATE_HZ
                wave = audio.read(waves[utt_id])
                out.write(wave)
                starts_s = times.of(known[utt_id])
                moved = {place: start_s + at_s for place, at_s in starts_s.items()}
                text = known[utt_id].text or ""
                placed.append(Placed(utt_id, text, start_s, start_s + len(wave) / RATE_HZ, moved))
                if out.tell() >= wanted_s * RATE_HZ:
                    break
        out.write(_gap(rng))
    times.save()
    write_json(work / "truth.json", [dataclasses.asdict(one) for one in placed])
    return placed


def _gap(rng: np.random.Generator) -> Wave:
    """Return a pause, or noise or music with a little silence on both sides."""
    if rng.random() >= FILLED_SHARE:
        return np.zeros(round(rng.uniform(*PAUSE_S) * RATE_HZ), np.float32)
    kind = str(rng.choice(KINDS))
    sound = no_speech.KINDS[kind](round(rng.uniform(*FILLED_S) * RATE_HZ), rng)
    return np.pad(sound, round(EDGE_S * RATE_HZ))


class _Times:
    """Word starts of each utterance, kept in a file: Kokoro takes seconds for a sentence."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: Record = read_json(path) if path.exists() else {}

    def of(self, utt: kaldi.Utterance) -> dict[int, float]:
        key = f"{utt.speaker} {utt.text}"
        if key not in self._found:
            spoken = word_times.spoken(utt.speaker or "", utt.text or "")
            self._found[key] = {str(place): start_s for place, start_s in spoken.starts_s.items()}
        return {int(place): start_s for place, start_s in self._found[key].items()}

    def save(self) -> None:
        write_json(self._path, self._found)


def transcribe(model: Path, work: Path) -> tuple[Record, Record]:
    """Return the transcript of the recording, and what it took: seconds and peak memory."""
    command = [sys.executable, "-m", "speechllm", "transcribe", "--model", str(model), "--format", "json"]
    began = time.perf_counter()
    subprocess.run([*command, "--out", str(work), str(work / "recording.wav")], check=True)
    took_s = time.perf_counter() - began
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    found = read_json(work / "recording.json")
    return found, {"took_s": round(took_s, 1), "rtfx": round(found["duration_s"] / took_s, 2), "peak_gb": peak_gb}  # type: ignore[operator]


def one_by_one(model: Path, waves: Mapping[str, Path], batch: int = 8) -> dict[str, str]:
    """Return the text of each utterance alone."""
    from speechllm.recognizer import SpeechLLM

    recognizer = SpeechLLM.from_pretrained(model)
    ids = sorted(waves)
    texts: dict[str, str] = {}
    for first in range(0, len(ids), batch):
        some = ids[first : first + batch]
        found = recognizer.recognize([audio.read(waves[utt_id]) for utt_id in some], words=False)
        texts |= {utt_id: one.text for utt_id, one in zip(some, found, strict=True)}
    return texts


def compare(placed: Sequence[Placed], transcript: Record, alone: Mapping[str, str]) -> Record:
    """Return every figure that the transcript gives."""
    segments: list[Record] = [one for one in transcript["segments"] if one["text"]]
    whole = _cer([one.text for one in placed], [one["text"] for one in segments])
    pairs = [(normalize(one.text), normalize(alone[one.utt_id])) for one in placed]
    single = sum(Levenshtein.distance(*pair) for pair in pairs) / sum(len(ref) for ref, _ in pairs)
    stray = [one for one in segments if not any(_overlap_s(one, other) > 0 for other in placed)]
    errors_s = np.array(list(_start_errors_s(placed, segments)))
    within = float((np.abs(errors_s) <= TOLERANCE_S).mean()) if len(errors_s) else None
    return {
        "duration_s": transcript["duration_s"],
        "utterances": len(placed),
        "segments": len(segments),
        "cer_whole": whole,
        "cer_one_by_one": single,
        "text_in_gaps": [{key: one[key] for key in ("start_s", "end_s", "text")} for one in stray],
        "words_known": sum(len(one.starts_s) for one in placed),
        "words_compared": len(errors_s),
        "word_starts_within": within,
        "word_start_median_s": float(np.median(errors_s)) if len(errors_s) else None,
    }


def _cer(refs: Sequence[str], hyps: Sequence[str]) -> float:
    """Return the errors of one text against the other, each joined: what is lost or doubled at joints counts."""
    ref, hyp = "".join(map(normalize, refs)), "".join(map(normalize, hyps))
    return float(Levenshtein.distance(ref, hyp)) / len(ref)


def _overlap_s(segment: Record, utt: Placed) -> float:
    return min(float(segment["end_s"]), utt.end_s) - max(float(segment["start_s"]), utt.start_s)


def _start_errors_s(placed: Sequence[Placed], segments: Sequence[Record]) -> Iterator[float]:
    """Yield found minus true start of each word that was recognised and whose first character begins a true word."""
    for segment in segments:
        said = [utt for utt in placed if _overlap_s(segment, utt) > EDGE_S]
        ref = "".join(utt.text for utt in said)
        true_s: dict[int, float] = {}
        for number, utt in enumerate(said):
            before = sum(len(one.text) for one in said[:number])
            true_s |= {before + place: start_s for place, start_s in utt.starts_s.items()}
        words: list[Record] = segment["words"]
        hyp = "".join(word["text"] for word in words)
        same = {
            block.dest_start + step: block.src_start + step
            for block in Levenshtein.opcodes(ref, hyp)
            if block.tag == "equal"
            for step in range(block.src_end - block.src_start)
        }
        at = 0
        for word in words:
            if (place := same.get(at)) in true_s:
                yield float(word["start_s"]) - true_s[place]
            at += len(word["text"])


def _aims(report: Record) -> dict[str, bool]:
    """Return which aims are met."""
    return {
        "cer": report["cer_whole"] - report["cer_one_by_one"] <= CER_TOLERANCE,
        "no text in gaps": not report["text_in_gaps"],
        "word starts": report["word_starts_within"] is not None and report["word_starts_within"] >= WORDS_WANTED,
        "memory": report["peak_gb"] <= MEMORY_WANTED_GB,
    }


if __name__ == "__main__":
    sys.exit(main())
