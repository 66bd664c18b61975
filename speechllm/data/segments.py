"""Lines of Kaldi's ``segments``: ``utterance recording start end``, in seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from speechllm.data import audio
from speechllm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from speechllm.data.kaldi import Utterance

MAX_OVERLAP_S = 0.01  # times are rounded


def span(where: str, value: str, wavs: Mapping[str, Path]) -> tuple[Path, float, float]:
    """Return the audio, start and end of ``recording start end``.

    Raises:
        DataError: it says something else, no such recording is there, or its times cannot be meant.
    """
    try:
        recording, start, end = value.split()
        start_s, end_s = float(start), float(end)
    except ValueError as error:
        raise DataError(where, "is not `recording start end`", "write seconds as numbers") from error
    if recording not in wavs:
        raise DataError(where, f"{recording} is not in wav.scp", "add it or delete the line")
    if not 0 <= start_s < end_s <= audio.MAX_DURATION_S:
        raise DataError(where, f"goes from {start_s} to {end_s} s", "mend its times")
    return wavs[recording], start_s, end_s


def check_overlaps(utterances: Iterable[Utterance], file: Path, on_fault: Callable[[DataError], None]) -> None:
    """Tell of segments that share sound with one before: two speakers may talk at once, one cannot."""
    spoken: dict[tuple[Path, str | None], list[tuple[float, float, str]]] = {}
    for utt in utterances:
        if utt.end_s is not None:
            spoken.setdefault((utt.wav, utt.speaker), []).append((utt.start_s, utt.end_s, utt.utt_id))
    for spans in spoken.values():
        last_end_s, last_id = 0.0, ""
        for start_s, end_s, utt_id in sorted(spans):
            if last_end_s - start_s > MAX_OVERLAP_S:
                what = f"{utt_id} begins {last_end_s - start_s:.3f} s before {last_id} of the same speaker ends"
                on_fault(DataError(file, what, "mend its times"))
            last_end_s, last_id = max((last_end_s, last_id), (end_s, utt_id))
