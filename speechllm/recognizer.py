"""A trained model at work: sounds in, texts with times and confidences out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from speechllm.config.schema import DecodeConfig
from speechllm.data.audio import SAMPLE_RATE_HZ
from speechllm.decode import align, guard, vad
from speechllm.decode.aids import aids_of
from speechllm.decode.batched import Decoder, character_confidences
from speechllm.decode.result import DOUBTFUL, NO_SPEECH, Recognized
from speechllm.errors import DataError
from speechllm.model.assemble import encoder_of, load_model, read_model
from speechllm.model.encoder import length_fault
from speechllm.model.heads import load_heads
from speechllm.model.speechllm import pad_frames

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from speechllm.config.schema import Config
    from speechllm.decode.batched import Decoded, Kana
    from speechllm.decode.hotwords import Hotwords
    from speechllm.decode.result import Transcript
    from speechllm.model.encoder import SpeechEncoder
    from speechllm.model.heads import Heads
    from speechllm.model.speechllm import SpeechLlm

LONGEST_S = 30.0  # what it was trained on; longer recordings are cut at pauses


class SpeechLLM:
    """Encoder, projector and language model of a trained folder."""

    def __init__(self, model: SpeechLlm, encoder: SpeechEncoder, config: Config, heads: Heads | None = None) -> None:
        """Join the parts; see `from_pretrained`."""
        self.model, self.encoder, self.config, self.heads = model, encoder, config, heads
        self.longest_s = min(LONGEST_S, encoder.longest_s)
        self.joined_s = min(self.longest_s, config.decode.join_s)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | None = None) -> SpeechLLM:
        """Return the model in `folder`: ``exp/NAME/model``, or what ``speechllm pack`` made of it.

        Raises:
            ModelError: the folder is not whole, or a model that it was trained on is missing or another.
        """
        folder = Path(folder)
        config, origin = read_model(folder)
        if device is not None:
            config = config.model_copy(update={"device": device})
        model = load_model(folder, device)
        return cls(model, model.encoder or encoder_of(config, origin), config, load_heads(folder, model))

    def recognize(
        self,
        waves_s: Sequence[NDArray[np.float32]],
        *,
        hotwords: Hotwords | None = None,
        beam: int | None = None,
        words: bool = True,
    ) -> list[Recognized]:
        """Return the text of each wave [s] at 16 kHz, the same whatever the others are.

        Nothing is cut: a wave should be what the model heard in training, a single sentence for the mini model.
        `transcribe` cuts recordings.

        A wave without speech has the empty text and the flag ``no_speech``. With `words` each word has its time, where
        the model holds a kana recogniser.

        Raises:
            DataError: a wave is too short for a frame, or longer than `longest_s`.
        """
        changed = {} if beam is None else {"beam": beam}
        settings = DecodeConfig.model_validate({**self.config.decode.model_dump(), **changed})
        for wave_s in waves_s:
            if fault := length_fault(len(wave_s), self.longest_s, self.encoder.min_samples):
                raise DataError("a sound", fault, "cut it or take it out")
        activities = [vad.detect(wave_s) for wave_s in waves_s]
        spoken = {
            str(number): len(waves_s[number]) / SAMPLE_RATE_HZ
            for number, activity in enumerate(activities)
            if activity.spans
        }

        def fetch(keys: Sequence[str]) -> tuple[Tensor, list[int]]:
            return pad_frames(self.encoder.encode([waves_s[int(key)] for key in keys]), self.model.lm.model.device)

        def is_silent(key: str, kana: Kana) -> bool:
            return _no_speech(activities[int(key)], kana) >= guard.SILENT

        aids = replace(aids_of(self.model, self.heads, hotwords), is_silent=is_silent)
        decoder = Decoder(self.model, settings, aids)
        found = {one.key: one for one in decoder.texts(spoken, fetch)}
        return [
            _result(waves_s[number], activity, found.get(str(number)), words=words)
            for number, activity in enumerate(activities)
        ]

    def transcribe(self, path: str | Path, *, hotwords: Hotwords | None = None) -> Transcript:
        """Return the text of a recording of any length, rate and format that can be read."""
        from speechllm.decode.longform import transcribe_file

        return transcribe_file(self, Path(path), hotwords=hotwords)


def _result(wave_s: NDArray[np.float32], activity: vad.Activity, found: Decoded | None, *, words: bool) -> Recognized:
    """Return the result of a wave; `found` is None where no speech was detected."""
    if found is None:
        return Recognized("", 0.0, flags=(NO_SPEECH,), no_speech=1.0 - activity.probability)
    best, silent = found.nbest[0], _no_speech(activity, found.kana)
    if NO_SPEECH in best.flags:
        return Recognized("", 0.0, flags=best.flags, no_speech=silent)
    heard: list[align.Heard] = []
    if found.kana is not None:
        heard = align.hear(best.text, found.kana, len(wave_s) / SAMPLE_RATE_HZ, align.spoken(wave_s))
        written = sum(len(word.kana) for word in heard)
        if guard.is_invented(written, guard.num_kana(found.kana)):
            return Recognized("", 0.0, flags=(NO_SPEECH,), no_speech=1.0)
    flags = (*best.flags, *((DOUBTFUL,) if align.is_doubtful(heard) else ()))
    timed = align.to_words(heard, character_confidences(best)) if words else ()
    return Recognized(best.text, best.confidence, timed, flags, silent)


def _no_speech(activity: vad.Activity, kana: Kana | None) -> float:
    """Return how likely it is that nothing was said in a sound with spans that a detector takes for speech."""
    lengths = [(span.end_s - span.start_s, span.probability) for span in activity.spans]
    probability = sum(length_s * likely for length_s, likely in lengths) / activity.speech_s
    return guard.no_speech(probability, None if kana is None else guard.kana_per_s(kana, activity.speech_s))
