"""The whole model: projector and language model joined by the splice.

Shapes: b batch, e encoder frames, h encoder width, p projected audio tokens, l LM sequence, d LM width, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from speechllm.model import splice as splicing
from speechllm.model.ctc import KANA
from speechllm.model.packing import Segments
from speechllm.text import prompt as prompts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from speechllm.model.encoder import SpeechEncoder
    from speechllm.model.lm import LanguageModel
    from speechllm.model.projector import AnyProjector


@dataclass(frozen=True)
class Spliced:
    """What the language model reads, a row for each utterance: prompt, sound, and in training the answer."""

    embeds_bld: Tensor
    mask_bl: Tensor
    """True on true positions."""
    layout: splicing.Layout


@dataclass(frozen=True)
class Cost:
    """The loss of a batch and what it took."""

    nll: Tensor
    """Summed negative log likelihood of the answers, in nats."""
    tokens: int
    """Tokens of the answers."""
    positions: int
    """Positions of the language model that were computed."""
    padded: int
    """How many of them were padding."""


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
        audio_pd, source = self._source(frames_beh, frames_b, targets)
        layout = splicing.padded(source, pad_left=pad_left)
        mask_bl = splicing.on((layout.order_bl != splicing.NOTHING).astype("int64"), frames_beh.device).bool()
        return Spliced(self._gather(layout, audio_pd), mask_bl, layout)

    def question_start(self) -> Tensor:
        """Return what decoding reads before every sound [l d], the same for all utterances."""
        return self.lm.embed(prompts.build(self.lm.tokenizer, self.form, None).before)

    def questions(self, frames_beh: Tensor, frames_b: Sequence[int]) -> list[Tensor]:
        """Return what decoding reads of each utterance [l d] behind `question_start`: its sound, and what follows."""
        audio_pd, source = self._source(frames_beh, frames_b, None)
        layout = splicing.packed(source, share_prompt=True)
        _, *own_ld = torch.split(self._gather(layout, audio_pd)[0], [layout.shared, *layout.lengths])
        return list(own_ld)

    def _source(
        self, frames_beh: Tensor, frames_b: Sequence[int], targets: Sequence[str] | None
    ) -> tuple[list[Tensor], splicing.Source]:
        audio_pd = self.projector(frames_beh, frames_b)
        answers = [None] * len(audio_pd) if targets is None else list(targets)
        parts = [prompts.build(self.lm.tokenizer, self.form, answer) for answer in answers]
        return audio_pd, splicing.source_of(parts, [len(audio) for audio in audio_pd])

    def _gather(self, layout: splicing.Layout, audio_pd: Sequence[Tensor]) -> Tensor:
        return splicing.gather(layout, self.lm.embed(layout.source.token_ids), audio_pd)

    def shared_positions(self) -> int:
        """Return how many positions stand before the sound, the same for every utterance."""
        return len(prompts.build(self.lm.tokenizer, self.form, None).before)

    def expected_positions(self, num_frames: int, answer: str) -> int:
        """Return about how many positions of the language model an utterance takes."""
        parts = prompts.build(self.lm.tokenizer, self.form, answer)
        around = len(parts.before) + len(parts.after) + len(parts.answer[:-1])
        return around + self.projector.expected_tokens(num_frames)

    def loss(self, frames_beh: Tensor, frames_b: Sequence[int], targets: Sequence[str]) -> tuple[Tensor, int]:
        """Return the summed negative log likelihood of the answers, in nats, and their number of tokens."""
        cost = self.padded_cost(frames_beh, frames_b, targets)
        return cost.nll, cost.tokens

    def packed_loss(
        self, frames_beh: Tensor, frames_b: Sequence[int], targets: Sequence[str], *, share_prompt: bool = True
    ) -> tuple[Tensor, int]:
        """Return what `loss` does, worked out in one row."""
        cost = self.packed_cost(frames_beh, frames_b, targets, share_prompt=share_prompt)
        return cost.nll, cost.tokens

    def padded_cost(self, frames_beh: Tensor, frames_b: Sequence[int], targets: Sequence[str]) -> Cost:
        """Return the loss of the answers, the utterances in rows as long as the longest."""
        spliced = self.splice(frames_beh, frames_b, targets)
        return self._cost(self.lm.hidden(spliced.embeds_bld, spliced.mask_bl), spliced.layout)

    def packed_cost(
        self, frames_beh: Tensor, frames_b: Sequence[int], targets: Sequence[str], *, share_prompt: bool = True
    ) -> Cost:
        """Return the loss of the answers, the utterances one after another in one row: no position is padding.

        With `share_prompt`, what stands before the sounds is computed once, and every utterance sees it.
        """
        audio_pd, source = self._source(frames_beh, frames_b, targets)
        layout = splicing.packed(source, share_prompt=share_prompt)
        segments = Segments(layout.lengths, frames_beh.device, layout.shared)
        return self._cost(self.lm.hidden_packed(self._gather(layout, audio_pd), segments), layout)

    def _cost(self, hidden_bld: Tensor, layout: splicing.Layout) -> Cost:
        """Return the summed loss; logits are computed where an answer is predicted, and not kept."""
        labels = layout.labels
        device = hidden_bld.device
        hidden_xd = hidden_bld.flatten(0, 1).index_select(0, splicing.on(layout.answer_at, device))
        nll = self.lm.nll(hidden_xd, splicing.on(labels, device))
        return Cost(nll, len(labels), layout.order_bl.size, int((layout.order_bl == splicing.NOTHING).sum()))

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
