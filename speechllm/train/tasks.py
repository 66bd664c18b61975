"""The two things that are trained: a CTC head alone, and projector with adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from speechllm.data.augment import SoundAugmenter, augment_frames
from speechllm.data.batch import budget_batches, packed_batches
from speechllm.data.dataset import FeatureSet
from speechllm.model.ctc import best_kana, ctc_loss, targets_of
from speechllm.model.lm import LORA_KEY
from speechllm.model.projector import CtcBridge
from speechllm.model.speechllm import pad_frames
from speechllm.runtime import computes_bfloat16, pick_device
from speechllm.text.reading import katakana_reading
from speechllm.train.optim import Group
from speechllm.train.sets import WaveSet
from speechllm.train.task import Outcome, Sample, Validation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from speechllm.config.schema import Config, CtcProjector, HeadsConfig
    from speechllm.model.ctc import CtcHead
    from speechllm.model.encoder import SpeechEncoder
    from speechllm.model.speechllm import SpeechLlm
    from speechllm.train.sets import AnySet

    Measure = Callable[[Mapping[str, str], Mapping[str, str]], float]
    """Error rate of id -> hypothesis (second) against id -> reference (first), as a fraction."""

Heard = TypeVar("Heard")
"""What a head heard: kana, or symbols."""
VALID_BATCH = 32


@dataclass(frozen=True)
class Ready:
    """A batch read and augmented, ahead of its turn."""

    utt_ids: Sequence[str]
    epoch: int
    frames_beh: Tensor | None
    """Encoder frames, zeros behind each row's end; None where the encoder makes them in the step itself."""
    frames_b: list[int]
    waves_s: list[NDArray[np.float32]]
    """Sounds for an encoder that is trained, or that has no GPU to work on beside the language model."""


class Features:
    """Augmented training features and plain validation features, as padded batches."""

    def __init__(
        self,
        config: Config,
        train: AnySet,
        valid: AnySet,
        device: torch.device,
        encoder: SpeechEncoder | None = None,
    ) -> None:
        """Keep the two sets; `encoder` is one that is trained, so that gradients go through the frames."""
        self.config, self.train, self.valid, self.device, self.encoder = config, train, valid, device, encoder
        self.augmenter = SoundAugmenter(config.train.augment, config.seed)
        # a frozen encoder works beside the language model, not in its turn
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def prepare(self, utt_ids: Sequence[str], epoch: int) -> Ready:
        """Return a training batch: a pure function of seed, epoch and ids, whichever thread makes it."""
        if isinstance(self.train, FeatureSet):
            return self._padded(utt_ids, epoch, self.train.frames_of(utt_ids))
        pairs = zip(utt_ids, self.train.waves(utt_ids), strict=True)
        waves_s = [self.augmenter(wave_s, utt_id, epoch) for utt_id, wave_s in pairs]
        if self.encoder is not None or self.stream is None:
            return Ready(utt_ids, epoch, None, [], waves_s)
        with torch.cuda.stream(self.stream):
            return self._padded(utt_ids, epoch, self.train.encoded(waves_s))

    def _padded(self, utt_ids: Sequence[str], epoch: int, matrices: Sequence[NDArray[np.float32]]) -> Ready:
        settings, seed = self.config.train.augment, self.config.seed
        changed = [augment_frames(m, settings, seed, epoch, key) for key, m in zip(utt_ids, matrices, strict=True)]
        frames_b = [len(matrix) for matrix in changed]
        # in NumPy: a thread that computes with torch wakes an OpenMP team of its own, and on a CPU libgomp then puts
        # the team of the model to sleep after every operation (seen: 2.2 instead of 1.6 s a step)
        padded_beh = np.zeros((len(changed), max(frames_b), changed[0].shape[1]), dtype=np.float32)
        for row_eh, matrix in zip(padded_beh, changed, strict=True):
            row_eh[: len(matrix)] = matrix
        return Ready(utt_ids, epoch, self._pinned(torch.from_numpy(padded_beh)), frames_b, [])

    def _pinned(self, frames_beh: Tensor) -> Tensor:
        """Return a tensor that is copied to the device without waiting."""
        return frames_beh.pin_memory() if self.device.type == "cuda" else frames_beh

    def training(self, ready: Ready) -> tuple[Tensor, list[int]]:
        """Return the frames [b e h] of a training batch, on the device, and their true lengths."""
        if self.encoder is not None:
            return pad_frames(self.encoder.frames(ready.waves_s), self.device)
        if ready.frames_beh is None:
            assert isinstance(self.train, WaveSet)
            ready = self._padded(ready.utt_ids, ready.epoch, self.train.encoded(ready.waves_s))
        assert ready.frames_beh is not None
        return ready.frames_beh.to(self.device, non_blocking=True), ready.frames_b

    def validation(self, utt_ids: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Return frames [b e h] of the validation set and their true lengths."""
        if self.encoder is not None:
            assert isinstance(self.valid, WaveSet)
            return pad_frames(self.encoder.frames(self.valid.waves(utt_ids)), self.device)
        return pad_frames([torch.from_numpy(matrix) for matrix in self.valid.frames_of(utt_ids)], self.device)

    def validation_batches(self, size: int) -> list[list[str]]:
        """Return all validation ids, of like length together."""
        ids = sorted(self.valid.examples, key=lambda utt_id: (self.valid.examples[utt_id].num_frames, utt_id))
        return [ids[start : start + size] for start in range(0, len(ids), size)]

    def texts(self) -> dict[str, str]:
        """Return the transcript of every utterance of both sets."""
        return {one.utt_id: one.text for side in (self.train, self.valid) for one in side.examples.values()}

    def seconds(self, utt_ids: Sequence[str]) -> float:
        """Return how long the sounds of training utterances are together."""
        return sum(self.train.examples[utt_id].duration_s for utt_id in utt_ids)


class AnyHeadTask:
    """Trains a CTC head to read the symbols of the transcripts; what it is measured by is its kind's own."""

    def __init__(
        self, features: Features, head: CtcHead, settings: CtcProjector | HeadsConfig, symbols: Mapping[str, list[int]]
    ) -> None:
        """Keep what the head is to hear: the `symbols` of every utterance of both sets."""
        self.seed = features.config.seed
        self.features, self.head, self.settings, self.targets = features, head, settings, symbols

    def groups(self) -> list[Group]:
        """Return the head's parameters."""
        return [Group(dict(self.head.named_parameters()), self.settings.peak_lr)]

    def batches(self, epoch: int) -> list[list[str]]:
        """Return batches within the budget of frames."""
        sizes = {key: example.num_frames for key, example in self.features.train.examples.items()}
        return budget_batches(sizes, self.settings.batch_frames, self.seed, epoch)

    def prepare(self, utt_ids: Sequence[str], epoch: int) -> Ready:
        """Return a batch of frames."""
        return self.features.prepare(utt_ids, epoch)

    def loss(self, ready: Ready) -> Outcome:
        """Return the summed CTC loss and the number of symbols."""
        self.head.train()
        frames_beh, frames_b = self.features.training(ready)
        logits_bqk, _, tokens_b = self.head(frames_beh, frames_b)
        targets = [self.targets[utt_id] for utt_id in ready.utt_ids]
        positions = frames_beh.shape[0] * frames_beh.shape[1]
        seconds = self.features.seconds(ready.utt_ids)
        nll = ctc_loss(logits_bqk, tokens_b, targets)
        return Outcome(nll, sum(map(len, targets)), seconds, positions, positions - sum(frames_b))

    @torch.no_grad()
    def listen(self, read: Callable[[Tensor], Heard]) -> tuple[float, dict[str, Heard]]:
        """Return the loss a symbol of the validation set, and what `read` makes of the logits [q k] of each."""
        self.head.eval()
        total = 0.0
        heard: dict[str, Heard] = {}
        for utt_ids in self.features.validation_batches(VALID_BATCH):
            logits_bqk, _, tokens_b = self.head(*self.features.validation(utt_ids))
            total += float(ctc_loss(logits_bqk, tokens_b, [self.targets[utt_id] for utt_id in utt_ids]))
            rows = zip(utt_ids, logits_bqk, tokens_b, strict=True)
            heard |= {utt_id: read(row_qk[:count]) for utt_id, row_qk, count in rows}
        return total / max(1, sum(len(self.targets[utt_id]) for utt_id in heard)), heard

    def state(self) -> dict[str, Tensor]:
        """Return the head's tensors."""
        return dict(self.head.state_dict())

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the head."""
        self.head.load_state_dict(dict(tensors))


class CtcTask(AnyHeadTask):
    """Trains the head of a `CtcBridge` to read kana; the readings come from the transcripts."""

    name = "ctc"

    def __init__(self, features: Features, projector: CtcBridge, config: CtcProjector, measure: Measure) -> None:
        """Read every transcript once; `measure` compares kana."""
        self.measure = measure
        self.readings = {key: katakana_reading(text) for key, text in features.texts().items()}
        symbols = {key: targets_of(reading) for key, reading in self.readings.items()}
        super().__init__(features, projector.head, config, symbols)

    def validate(self) -> Validation:
        """Return loss a kana and the kana error rate of the whole validation set."""
        loss, heard = self.listen(best_kana)
        kana_error = self.measure({key: self.readings[key] for key in heard}, heard)
        samples = [Sample(key, self.readings[key], text) for key, text in heard.items()]
        return Validation({"loss": loss, "kana_error": kana_error, "score": kana_error}, samples)


def uses_autocast(config: Config) -> bool:
    """Return whether training multiplies in bfloat16 over float32 weights: where the language model itself is trained.

    A frozen one is held in bfloat16, which autocast would only slow.
    """
    wanted = config.lm.train and config.lm.dtype in {"auto", "bfloat16"}
    return wanted and computes_bfloat16(pick_device(config.device))


class SpeechTask:
    """Trains projector and adapter to write the transcript."""

    name = "speech"

    def __init__(
        self,
        features: Features,
        model: SpeechLlm,
        decode: Callable[[Sequence[str]], Mapping[str, str]],
        measure: Measure,
    ) -> None:
        """`decode` returns the text of validation utterances, as stage 4 would; `measure` is the CER."""
        self.measure = measure
        self.config = features.config
        self.seed = self.config.seed
        self.features, self.model, self.decode = features, model, decode
        self.bfloat16_products = uses_autocast(self.config)
        if isinstance(model.projector, CtcBridge):
            model.projector.head.requires_grad_(requires_grad=False)
        train = self.config.train
        self.shared = model.shared_positions() if train.packing and train.share_prompt else 0
        self.sizes = {
            key: model.expected_positions(example.num_frames, example.text) - self.shared
            for key, example in features.train.examples.items()
        }

    def groups(self) -> list[Group]:
        """Return projector, adapter, and base models where they are trained, each with its own learning rate."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        projector = {name: p for name, p in trained.items() if name.startswith("projector.")}
        adapter = {name: p for name, p in trained.items() if LORA_KEY in name and name not in projector}
        base = {name: p for name, p in trained.items() if name not in projector and name not in adapter}
        train = self.config.train
        groups = [
            Group(projector, train.peak_lr),
            Group(adapter, train.lora_lr, begins=train.adapter_from),
            Group(base, train.base_lr),
        ]
        return [group for group in groups if group.named]

    def batches(self, epoch: int) -> list[list[str]]:
        """Return batches within the budget of language-model positions."""
        train = self.config.train
        if not train.packing:
            return budget_batches(self.sizes, train.batch_tokens, self.seed, epoch)
        return packed_batches(self.sizes, train.batch_tokens - self.shared, self.seed, epoch)

    def positions(self, utt_ids: Sequence[str]) -> int:
        """Return about how many positions of the language model a batch takes, padding included."""
        sizes = [self.sizes[utt_id] for utt_id in utt_ids]
        return self.shared + sum(sizes) if self.config.train.packing else max(sizes) * len(sizes)

    def prepare(self, utt_ids: Sequence[str], epoch: int) -> Ready:
        """Return a batch of frames."""
        return self.features.prepare(utt_ids, epoch)

    def loss(self, ready: Ready) -> Outcome:
        """Return the summed loss of the answers and their tokens."""
        self.model.train()
        frames_beh, frames_b = self.features.training(ready)
        texts = [self.features.train.examples[utt_id].text for utt_id in ready.utt_ids]
        with self._autocast():
            if self.config.train.packing:
                cost = self.model.packed_cost(frames_beh, frames_b, texts, share_prompt=bool(self.shared))
            else:
                cost = self.model.padded_cost(frames_beh, frames_b, texts)
        return Outcome(cost.nll, cost.tokens, self.features.seconds(ready.utt_ids), cost.positions, cost.padded)

    def _autocast(self) -> torch.autocast:
        """Return the precision of the products; see `uses_autocast`."""
        return torch.autocast(self.features.device.type, dtype=torch.bfloat16, enabled=self.bfloat16_products)

    @torch.no_grad()
    def validate(self) -> Validation:
        """Return loss a token over the whole validation set and the CER of some of its utterances."""
        self.model.eval()
        examples = self.features.valid.examples
        total, count = 0.0, 0
        for utt_ids in self.features.validation_batches(16):
            loss, tokens = self.model.loss(*self.features.validation(utt_ids), [examples[key].text for key in utt_ids])
            total, count = total + float(loss), count + tokens
        wanted = self.config.train.valid_utts
        chosen = list(examples)[:: max(1, len(examples) // wanted)][:wanted]
        texts = self.decode(chosen)
        cer = self.measure({key: examples[key].text for key in chosen}, texts)
        samples = [Sample(key, examples[key].text, texts[key]) for key in chosen]
        return Validation({"loss": total / max(1, count), "cer": cer, "score": cer}, samples)

    def state(self) -> dict[str, Tensor]:
        """Return what training changes."""
        return self.model.trainable_state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill what training changes."""
        self.model.load_trainable(tensors)
