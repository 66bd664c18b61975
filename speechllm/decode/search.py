"""Batched beam search on the model's own forward; greedy search is a beam of one.

Shapes: b utterances, k hypotheses each, r = b * k rows, l positions, d LM width, v vocabulary.
Rows are padded on the left and masked, so an utterance's text does not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from speechllm.model.lm import positions_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from speechllm.config.schema import DecodeConfig
    from speechllm.model.lm import LanguageModel
    from speechllm.model.speechllm import Spliced


@dataclass(frozen=True)
class Hypothesis:
    """A finished text: its tokens without the end, and the log probability of each (the end's is last)."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    ended: bool
    """Whether the model ended it; False where the length bound cut it."""

    @property
    def log_prob(self) -> float:
        """Return the log probability of the whole, in nats."""
        return sum(self.log_probs)

    def rank(self, length_penalty: float) -> float:
        """Return what hypotheses are sorted by: log probability / tokens ** penalty."""
        return self.log_prob / float(max(1, len(self.log_probs)) ** length_penalty)


@dataclass
class _Utterance:
    """The search of one utterance: live rows are tokens and log probabilities so far."""

    max_tokens: int
    live: list[Hypothesis]
    finished: list[Hypothesis] = field(default_factory=list)

    def done(self, config: DecodeConfig) -> bool:
        """Return whether no live hypothesis can enter the best `beam` finished ones."""
        if not self.live:
            return True
        if len(self.finished) < config.beam:
            return False
        worst = sorted(h.rank(config.length_penalty) for h in self.finished)[-config.beam]
        # a longer text has a lower log probability, so this is the best that the live ones can reach
        longest = max(1.0, self.max_tokens ** max(0.0, config.length_penalty))
        return max(h.log_prob for h in self.live) / longest <= worst or config.beam == 1

    def best(self, config: DecodeConfig) -> list[Hypothesis]:
        """Return the finished hypotheses, the best first; those cut by the length bound come last."""
        return sorted(self.finished, key=lambda h: (not h.ended, -h.rank(config.length_penalty)))[: config.beam]


@torch.inference_mode()
def search(
    lm: LanguageModel, start: Spliced, max_tokens: Sequence[int], config: DecodeConfig
) -> list[list[Hypothesis]]:
    """Return the n-best of each utterance, the best first.

    `start` holds prompt and sound of each utterance, padded on the left; `max_tokens` bounds each text.
    """
    empty = Hypothesis((), (), ended=False)
    utterances = [_Utterance(limit, [empty]) for limit in max_tokens]
    cache = DynamicCache()
    mask_rl = start.mask_bl
    logits_rv = _forward(lm, {"inputs_embeds": start.embeds_bld}, mask_rl, cache)
    active = list(range(len(utterances)))
    while active:
        chosen = _advance(lm, [utterances[i] for i in active], logits_rv, config)
        rows, tokens, still = [], [], []
        for index, picks in zip(active, chosen, strict=True):
            if utterances[index].done(config):
                continue
            still.append(index)
            rows += [row for row, _ in picks]
            tokens += [token for _, token in picks]
        active = still
        if active:
            select = torch.tensor(rows, device=mask_rl.device)
            cache.batch_select_indices(select)
            mask_rl = torch.nn.functional.pad(mask_rl[select], (0, 1), value=True)
            fed = torch.tensor(tokens, device=mask_rl.device)[:, None]
            logits_rv = _forward(lm, {"input_ids": fed}, mask_rl, cache)
    return [utterance.best(config) for utterance in utterances]


def _forward(lm: LanguageModel, inputs: dict[str, Tensor], mask_rl: Tensor, cache: DynamicCache) -> Tensor:
    """Feed what is new and return the log probabilities [r v] of the next token."""
    body: Any = lm.model.base_model
    new = next(iter(inputs.values())).shape[1]
    output = body(
        **inputs,
        attention_mask=mask_rl.long(),
        position_ids=positions_of(mask_rl)[:, -new:],
        past_key_values=cache,
        use_cache=True,
    )
    return lm.logits(output.last_hidden_state[:, -1]).log_softmax(dim=-1)


def _advance(
    lm: LanguageModel, utterances: Sequence[_Utterance], log_probs_rv: Tensor, config: DecodeConfig
) -> list[list[tuple[int, int]]]:
    """Extend every live hypothesis; return for each utterance the (row, token) of its new live ones."""
    end: int = lm.tokenizer.eos_token_id
    length = len(utterances[0].live[0].tokens)  # the same for all that live
    if length < config.min_tokens:
        log_probs_rv[:, end] = -torch.inf
    width = min(2 * config.beam, log_probs_rv.shape[1])
    top_rv = log_probs_rv.topk(width, dim=-1)
    values, ids = top_rv.values.tolist(), top_rv.indices.tolist()
    chosen = []
    first_row = 0
    for utterance in utterances:
        rows = range(first_row, first_row + len(utterance.live))
        first_row += len(utterance.live)
        candidates = [
            (hypothesis.log_prob + value, row, token, value, hypothesis)
            for row, hypothesis in zip(rows, utterance.live, strict=True)
            for value, token in zip(values[row], ids[row], strict=True)
        ]
        # ties go to the earlier row and the smaller token, whatever the batch
        candidates.sort(key=lambda c: (-c[0], c[1], c[2]))
        chosen.append(_pick(utterance, candidates, config.beam, end))
    return chosen


def _pick(
    utterance: _Utterance,
    candidates: list[tuple[float, int, int, float, Hypothesis]],
    beam: int,
    end: int,
) -> list[tuple[int, int]]:
    """Move ended candidates to `finished` and the best others to `live`; return their (row, token)."""
    live: list[Hypothesis] = []
    picks: list[tuple[int, int]] = []
    for rank, (_, row, token, value, hypothesis) in enumerate(candidates):
        log_probs = (*hypothesis.log_probs, value)
        if token == end:
            if rank < beam:
                utterance.finished.append(Hypothesis(hypothesis.tokens, log_probs, ended=True))
        elif len(live) < beam:
            live.append(Hypothesis((*hypothesis.tokens, token), log_probs, ended=False))
            picks.append((row, token))
    if live and len(live[0].tokens) >= utterance.max_tokens:
        utterance.finished += live
        live = []
    utterance.live = live
    return picks
