"""The kana recogniser: collapsing by hand, targets, and a loss that is torch's own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from speechllm.config.schema import CtcProjector
from speechllm.model.ctc import BLANK, KANA, CtcHead, best_kana, collapse, ctc_loss, targets_of

A, I, U = (KANA.index(char) + 1 for char in "アイウ")  # noqa: E741 - the kana's own names


def best_path(*symbols: int) -> torch.Tensor:
    """Return posteriors [q k] whose best path is `symbols`, by a little more than chance."""
    posterior_qk = torch.full((len(symbols), len(KANA) + 1), 0.01)
    posterior_qk[torch.arange(len(symbols)), torch.tensor(symbols)] = 0.2
    return posterior_qk / posterior_qk.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("symbols", "rows"),
    [
        ((A,), [[1]]),
        ((A, I), [[1, 0], [0, 1]]),
        ((A, A, I), [[0.5, 0.5, 0], [0, 0, 1]]),
        ((A, BLANK, A), [[1, 0, 0], [0, 0, 1]]),
        ((BLANK, A, A, BLANK, I, BLANK), [[0, 0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 1, 0]]),
        ((BLANK, BLANK, BLANK, BLANK), [[0.25] * 4]),
        ((A, A, A, BLANK), [[1 / 3, 1 / 3, 1 / 3, 0]]),
    ],
    ids=["one", "two", "repeated", "parted-by-blank", "between-blanks", "silence", "last-blank"],
)
def test_each_run_of_one_kana_is_one_row_of_averages(symbols: tuple[int, ...], rows: list[list[float]]) -> None:
    torch.testing.assert_close(collapse(best_path(*symbols)), torch.tensor(rows, dtype=torch.float32))


@pytest.mark.parametrize(
    ("symbols", "kana"),
    [
        ((A, I, U), "アイウ"),
        ((A, A, BLANK, A), "アア"),
        ((A, A, A), "ア"),
        ((BLANK, BLANK), ""),
        ((BLANK, A, BLANK, BLANK, I, I), "アイ"),
    ],
)
def test_the_best_path_merges_runs_and_leaves_blanks_out(symbols: tuple[int, ...], kana: str) -> None:
    posterior_qk = best_path(*symbols)
    assert best_kana(posterior_qk.log()) == kana
    assert len(collapse(posterior_qk)) == max(1, len(kana))


def test_targets_of_a_reading_spell_it_and_leave_other_characters_out() -> None:
    assert targets_of("アイウ") == [A, I, U]
    assert targets_of("ア、イ。x漢") == [A, I]
    assert targets_of("") == []


def test_every_kana_has_its_own_symbol_and_none_is_the_blank() -> None:
    assert sorted(targets_of(KANA)) == list(range(1, len(KANA) + 1))


def test_the_loss_is_minus_the_log_of_the_sum_over_all_paths() -> None:
    logits_bqk = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(1))
    probs_qk = logits_bqk[0].softmax(dim=-1)
    total = 0.0
    for path in itertools.product(range(3), repeat=3):
        merged = [symbol for symbol, _ in itertools.groupby(path) if symbol != BLANK]
        if merged == [1, 2]:
            total += math.prod(float(probs_qk[frame, symbol]) for frame, symbol in enumerate(path))
    assert float(ctc_loss(logits_bqk, [3], [[1, 2]])) == pytest.approx(-math.log(total), rel=1e-5)


def test_the_loss_of_a_batch_is_the_sum_of_each_alone() -> None:
    logits_bqk = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(2))
    together = float(ctc_loss(logits_bqk, [8, 5], [[1, 2, 3], [4]]))
    alone = float(ctc_loss(logits_bqk[:1], [8], [[1, 2, 3]])) + float(ctc_loss(logits_bqk[1:, :5], [5], [[4]]))
    assert together == pytest.approx(alone, rel=1e-5)


def test_a_target_that_is_longer_than_its_frames_costs_nothing() -> None:
    logits_bqk = torch.randn(1, 2, 5, requires_grad=True)
    loss = ctc_loss(logits_bqk, [2], [[1, 2, 3]])
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0.0
    assert logits_bqk.grad is not None
    assert logits_bqk.grad.isfinite().all()


def test_a_batch_without_any_kana_has_the_loss_of_saying_nothing() -> None:
    logits_bqk = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(3))
    wanted = -float(logits_bqk[0].log_softmax(dim=-1)[:, BLANK].sum())
    assert float(ctc_loss(logits_bqk, [4], [[]])) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_head_gives_each_utterance_the_logits_it_has_alone(stride: int) -> None:
    torch.manual_seed(6)
    head = CtcHead(CtcProjector(hidden=8, stride=stride), 6, num_symbols=len(KANA)).eval()
    rows = [torch.randn(count, 6) for count in (9, 14, 1)]
    frames_beh = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=5.0)
    logits_bqk, _, tokens_b = head(frames_beh, [9, 14, 1])
    assert logits_bqk.shape[1] == max(tokens_b)
    for row, logits_qk, count in zip(rows, logits_bqk, tokens_b, strict=True):
        alone_bqk, _, (alone_count,) = head(row[None], [len(row)])
        assert count == alone_count == -(-len(row) // stride)
        torch.testing.assert_close(logits_qk[:count], alone_bqk[0], rtol=0, atol=1e-5)
