"""A trained model at work: sounds in, texts with times and confidences out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from speechllm.config.schema import DecodeConfig
from speechllm.data.audio import SAMPLE_RATE_HZ
from speechllm.decode import align, guard, vad
from speechllm.decode.batched import Aids, Decoder, character_confidences
from speechllm.decode.bias import Bias
from speechllm.decode.draft import draft
from speechllm.decode.result import DOUBTFUL, NO_SPEECH, Recognized
from speechllm.model.assemble import encoder_of, load_model, read_model
from speechllm.model.heads import load_heads
from speechllm.model.speechllm import pad_frames

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from speechllm.config.schema import Config
    from speechllm.decode.batched import Text
    from speechllm.decode.bias import UtteranceBias
    from speechllm.decode.hotwords import Hotwords
    from speechllm.decode.result import Transcript
    from speechllm.model.encoder import SpeechEncoder
    from speechllm.model.heads import Heads
    from speechllm.model.speechllm import SpeechLlm

LONGEST_S = 30.0  # what it was trained on; longer recordings are cut at pauses
EMPTY = 0.5  # likelihood of no speech from which on a text is left out


@dataclass
class _Sounds:
    """Waves, and what was found out about them on the way to their texts."""

    waves_s: Sequence[NDArray[np.float32]]
    activities: list[vad.Activity]
    kana: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Log posteriors [q k] of the kana head."""

    def spoken(self) -> dict[str, float]:
        """Return the seconds of each wave in which the detector finds speech."""
        return {
            str(number): len(self.waves_s[number]) / SAMPLE_RATE_HZ
            for number, activity in enumerate(self.activities)
            if activity.spans
        }


class SpeechLLM:
    """Encoder, projector and language model of a trained folder."""

    def __init__(self, model: SpeechLlm, encoder: SpeechEncoder, config: Config, heads: Heads | None = None) -> None:
        """Join the parts; see `from_pretrained`."""
        self.model, self.encoder, self.config, self.heads = model, encoder, config, heads
        self.longest_s = min(LONGEST_S, encoder.longest_s)

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

        A wave without speech has the empty text and the flag ``no_speech``. With `words` each word has its time, where
        the model holds a kana recogniser.

        Raises:
            DataError: a wave is too short for a frame, or longer than `longest_s`.
        """
        changed = {} if beam is None else {"beam": beam}
        settings = DecodeConfig.model_validate({**self.config.decode.model_dump(), **changed})
        sounds = _Sounds(waves_s, [vad.detect(wave_s) for wave_s in waves_s])

        def fetch(keys: Sequence[str]) -> tuple[Tensor, list[int]]:
            frames = self.encoder.encode([waves_s[int(key)] for key in keys])
            frames_beh, frames_b = pad_frames(frames, self.model.lm.model.device)
            heard = align.kana_log_probs(self.model, frames_beh, frames_b, self.heads)
            sounds.kana |= {} if heard is None else dict(zip(keys, heard, strict=True))
            return frames_beh, frames_b

        decoder = Decoder(self.model, settings, aids_of(self.model, self.heads, hotwords))
        best = {key: nbest[0] for key, nbest in decoder.texts(sounds.spoken(), fetch)}
        return [self._finished(sounds, number, best.get(str(number)), words=words) for number in range(len(waves_s))]

    def transcribe(self, path: str | Path, *, hotwords: Hotwords | None = None) -> Transcript:
        """Return the text of a recording of any length, rate and format that can be read."""
        from speechllm.decode.longform import transcribe_file

        return transcribe_file(self, Path(path), hotwords=hotwords)

    def _finished(self, sounds: _Sounds, number: int, best: Text | None, *, words: bool) -> Recognized:
        """Return the result of a wave; `best` is its text, None where no speech was found."""
        activity, wave_s = sounds.activities[number], sounds.waves_s[number]
        if best is None:
            return Recognized("", 0.0, flags=(NO_SPEECH,), no_speech=1.0 - activity.probability)
        kana = sounds.kana.get(str(number))
        heard = [] if kana is None else align.hear(best.text, kana, len(wave_s) / SAMPLE_RATE_HZ, align.spoken(wave_s))
        silent = guard.no_speech(_sureness(activity.spans), heard)
        if silent >= EMPTY:
            return Recognized("", 0.0, flags=(NO_SPEECH,), no_speech=silent)
        flags = (*best.flags, *((DOUBTFUL,) if align.is_doubtful(heard) else ()))
        timed = align.to_words(heard, character_confidences(best)) if words else ()
        return Recognized(best.text, best.confidence, timed, flags, silent)


def aids_of(model: SpeechLlm, heads: Heads | None, hotwords: Hotwords | None) -> Aids:
    """Return what helps the search of a model: drafts where it has a head for them, and hotwords where given."""
    drafts = None
    if heads is not None and heads.tokens is not None and hotwords is None:
        token_head = heads

        def drafts(frames_beh: Tensor, frames_b: Sequence[int]) -> list[tuple[int, ...]]:
            return draft(token_head, frames_beh, frames_b)

    if hotwords is None:
        return Aids(draft=drafts)
    bias = Bias(hotwords, model.lm.tokenizer)

    def biases(frames_beh: Tensor, frames_b: Sequence[int]) -> list[UtteranceBias]:
        heard = align.kana_log_probs(model, frames_beh, frames_b, heads)
        return [bias.for_utterance(None if heard is None else heard[number]) for number in range(len(frames_b))]

    return Aids(bias=biases)


def _sureness(spans: Iterable[vad.Span]) -> float:
    """Return the mean probability of speech over the spans, by their lengths."""
    lengths = [(span.end_s - span.start_s, span.probability) for span in spans]
    total_s = sum(length_s for length_s, _ in lengths)
    return sum(length_s * probability for length_s, probability in lengths) / total_s if total_s else 0.0
