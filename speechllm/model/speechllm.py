"""The whole model: projector and language model joined by the splice.

Shapes: b batch, e encoder frames, h encoder width, p projected audio tokens, l LM sequence, d LM width, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from speechllm.model.ctc import KANA
from speechllm.model.packing import Segments
from speechllm.text import prompt as prompts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from speechllm.model.encoder import SpeechEncoder
    from speechllm.model.lm import LanguageModel
    from speechllm.model.projector import AnyProjector

IGNORED = -100  # a label that costs nothing


@dataclass(frozen=True)
class Spliced:
    """What the language model reads: prompt, sound, and in training the answer."""

    embeds_bld: Tensor
    mask_bl: Tensor
    """True on true positions."""
    labels_bl: Tensor
    """The token that each position is to predict, or `IGNORED`."""


class SpeechLlm(nn.Module):
    """A trainable projector before a language model, which is frozen below its adapter or trained whole."""

    def __init__(
        self, projector: AnyProjector, lm: LanguageModel, form: prompts.Form, encoder: SpeechEncoder | None = None
    ) -> None:
        """Join the parts; `form` is what the language model reads around the sound, `encoder` one that is trained."""
        super().__init__()
        self.projector = projector
        self.lm_model = lm.model  # registered, so that train(), to() and parameters() reach it
        self.lm = lm
        self.form = form
        self.encoder = encoder
        if encoder is not None:
            self.encoder_model = encoder.module

    def splice(
        self,
        frames_beh: Tensor,
        frames_b: Sequence[int],
        targets: Sequence[str] | None,
        *,
        pad_left: bool = False,
    ) -> Spliced:
        """Return prompt and projected sound of each utterance, and its answer where `targets` are given.

        `frames_b` are the true frames of each row. Padding goes right for training, left for decoding, where every row
        must end at the position that predicts.
        """
        audio_pd = self.projector(frames_beh, frames_b)
        answers = [None] * len(audio_pd) if targets is None else list(targets)
        rows = [self._row(audio, answer) for audio, answer in zip(audio_pd, answers, strict=True)]
        longest = max(len(labels) for _, labels in rows)
        embeds, masks, labels = [], [], []
        for row_ld, row_labels in rows:
            missing = longest - len(row_labels)
            left, right = (missing, 0) if pad_left else (0, missing)
            embeds.append(nn.functional.pad(row_ld, (0, 0, left, right)))
            masks.append(nn.functional.pad(torch.ones(len(row_labels), dtype=torch.bool), (left, right)))
            labels.append(nn.functional.pad(torch.tensor(row_labels), (left, right), value=IGNORED))
        device = frames_beh.device
        return Spliced(torch.stack(embeds), torch.stack(masks).to(device), torch.stack(labels).to(device))

    def _row(self, audio_pd: Tensor, answer: str | None) -> tuple[Tensor, list[int]]:
        """Return the vectors [l d] of one utterance and the labels of its positions."""
        parts = prompts.build(self.lm.tokenizer, self.form, answer)
        vectors = self.lm.embed([*parts.before, *parts.after, *parts.answer])
        start, stop = len(parts.before), len(parts.before) + len(parts.after)
        joined = torch.cat([vectors[:start], audio_pd.to(vectors.dtype), vectors[start:]])
        silent = start + len(audio_pd) + (stop - start) - 1
        # the position before each answer token predicts it; the last answer token predicts nothing
        labels = [IGNORED] * silent + list(parts.answer) + [IGNORED]
        return joined, labels

    def expected_positions(self, num_frames: int, answer: str) -> int:
        """Return about how many positions of the language model an utterance takes."""
        parts = prompts.build(self.lm.tokenizer, self.form, answer)
        around = len(parts.before) + len(parts.after) + len(parts.answer)
        return around + self.projector.expected_tokens(num_frames)

    def loss(self, frames_beh: Tensor, frames_b: Sequence[int], targets: Sequence[str]) -> tuple[Tensor, int]:
        """Return the summed negative log likelihood of the answers, in nats, and their number of tokens.

        Logits are computed at the answer's positions alone.
        """
        spliced = self.splice(frames_beh, frames_b, targets)
        return self._loss(self.lm.hidden(spliced.embeds_bld, spliced.mask_bl), spliced.labels_bl)

    def packed_loss(self, frames_beh: Tensor, frames_b: Sequence[int], targets: Sequence[str]) -> tuple[Tensor, int]:
        """Return what `loss` does, the utterances one after another in one row: no position is padding."""
        audio_pd = self.projector(frames_beh, frames_b)
        rows = [self._row(audio, answer) for audio, answer in zip(audio_pd, targets, strict=True)]
        segments = Segments.of([len(labels) for _, labels in rows], frames_beh.device)
        labels_1l = torch.tensor([[label for _, labels in rows for label in labels]], device=frames_beh.device)
        return self._loss(self.lm.hidden_packed(torch.cat([row for row, _ in rows])[None], segments), labels_1l)

    def _loss(self, hidden_bld: Tensor, labels_bl: Tensor) -> tuple[Tensor, int]:
        answer_bl = labels_bl != IGNORED
        wanted_x = labels_bl[answer_bl]
        logits_xv = self.lm.logits(hidden_bld[answer_bl])
        return nn.functional.cross_entropy(logits_xv, wanted_x, reduction="sum"), len(wanted_x)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return what training changes, by name: the projector (with its frozen head), and adapter or whole models."""
        state = {f"projector.{name}": value for name, value in self.projector.state_dict().items()}
        parts = {"lm": self.lm_model} if self.encoder is None else {"lm": self.lm_model, "encoder": self.encoder_model}
        for prefix, part in parts.items():
            trained = {name: value.detach() for name, value in part.named_parameters() if value.requires_grad}
            state |= {f"{prefix}.{name}": value for name, value in trained.items()}
        return state

    @torch.no_grad()
    def load_trainable(self, state: Mapping[str, Tensor]) -> None:
        """Fill what training changes; the caller has checked that the keys agree."""
        own = self.trainable_state()
        for name, value in state.items():
            own[name].copy_(value)


def kana_embeddings(lm: LanguageModel) -> Tensor:
    """Return [k d]: the language model's vector of each kana, the mean where it takes several tokens."""
    with torch.no_grad():
        rows = [lm.embed(prompts.encode(lm.tokenizer, char)).float().mean(dim=0) for char in KANA]
    return torch.stack(rows)


def pad_frames(matrices_eh: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[int]]:
    """Return [b e h], zeros after each row's end, and the true frames of each row."""
    padded = nn.utils.rnn.pad_sequence(list(matrices_eh), batch_first=True)
    return padded.to(device), [len(matrix) for matrix in matrices_eh]
