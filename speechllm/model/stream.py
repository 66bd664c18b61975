"""Frames of many utterances in a stream: sounds are read ahead, and the encoder never waits for what becomes of them.

Shapes: s samples, e encoder frames, h encoder width.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from speechllm.model.encoder import read_for

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from speechllm.data.kaldi import Utterance
    from speechllm.model.encoder import SpeechEncoder

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCH_SECONDS = {"cpu": 12.0, "cuda": 400.0}
PADDED_S = 30.0  # of each utterance where `encoder.pad_to_30s` is set
READERS = {"cpu": 1, "cuda": 4}  # threads, each of which reads the sounds of a batch


def like_lengths(utterances: Sequence[Utterance], seconds: float, least_s: float = 0.0) -> Iterator[list[Utterance]]:
    """Yield utterances of like length together, the shortest first, up to so many seconds of sound with padding.

    Each takes `least_s` seconds at least: where the encoder itself pads what is shorter.
    """
    batch: list[Utterance] = []
    timed = [(utt.duration_s(), utt.utt_id, utt) for utt in utterances]
    for duration_s, _, utt in sorted(timed, key=lambda entry: entry[:2]):
        if batch and max(duration_s, least_s) * (len(batch) + 1) > seconds:
            yield batch
            batch = []
        batch.append(utt)
    if batch:
        yield batch


def stream(
    encoder: SpeechEncoder, batches: Iterable[list[Utterance]], device: torch.device, dtype: torch.dtype
) -> Generator[tuple[str, NDArray[Any]], None, None]:
    """Yield id and frames [e h] of each utterance, of `dtype`, which NumPy must have.

    Raises:
        DataError: a sound cannot be read, or is too short or too long; the utterance is named.
    """

    def read(batch: list[Utterance]) -> list[NDArray[np.float32]]:
        return [read_for(encoder, utt) for utt in batch]

    def encode(read_batch: tuple[list[Utterance], list[NDArray[np.float32]]]) -> Callable[[], list[NDArray[Any]]]:
        return _encode(encoder, read_batch[1], dtype)

    readers = READERS[device.type]
    with ThreadPoolExecutor(readers) as reading, ThreadPoolExecutor(1) as encoding:
        for (batch, waves_s), frames in _ahead(encoding, encode, _ahead(reading, read, batches, readers), 1):
            for utt, wave, frames_eh in zip(batch, waves_s, frames(), strict=True):
                assert len(frames_eh) == encoder.num_frames(len(wave)), utt.utt_id
                yield utt.utt_id, frames_eh


@torch.inference_mode()
def _encode(
    encoder: SpeechEncoder, waves_s: Sequence[NDArray[np.float32]], dtype: torch.dtype
) -> Callable[[], list[NDArray[Any]]]:
    """Return what waits for the frames [e h] of sounds: a GPU may be at them still, and be given the next batch."""
    frames = [one.to(dtype) for one in encoder.frames(waves_s)]
    if frames[0].device.type != "cuda":
        return lambda: [one.numpy() for one in frames]
    host = [torch.empty_like(one, device="cpu", pin_memory=True).copy_(one, non_blocking=True) for one in frames]
    copied = torch.cuda.current_stream(frames[0].device).record_event()

    def wait() -> list[NDArray[Any]]:
        copied.synchronize()
        return [one.numpy() for one in host]

    return wait


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with what `work` makes of it, in order; the `depth` next ones are worked on meanwhile."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > depth:
            first, made = waiting.popleft()
            yield first, made.result()
    for item, made in waiting:
        yield item, made.result()
