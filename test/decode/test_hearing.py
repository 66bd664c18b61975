"""Readings held against kana posteriors: where they fit, and at what cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from speechllm.decode.hearing import WORST, WRITTEN_OUT, Heard, Listener, kana_by_run
from speechllm.model.ctc import BLANK, KANA

if TYPE_CHECKING:
    from speechllm.decode.hearing import Floats


def heard(kana: str, likely: float = 0.999) -> Floats:
    """Return log posteriors of a recogniser that hears `kana`, two frames each with a blank frame after it."""
    rows = []
    for char in kana:
        for symbol in (KANA.index(char) + 1, KANA.index(char) + 1, BLANK):
            row = np.full(len(KANA) + 1, (1 - likely) / len(KANA))
            row[symbol] = likely
            rows.append(np.log(row))
    return np.array(rows, dtype=np.float32)


def cost(reading: str, kana: str) -> float:
    return min(place.cost for place in Listener([reading]).listen(heard(kana), WORST)[0])


@pytest.mark.parametrize(
    ("reading", "kana"),
    [
        ("ニカイドー", "ヨヤクワニカイドーサンデス"),
        ("ママ", "ママ"),
        ("ア", "ア"),
    ],
)
def test_what_was_said_costs_nothing(reading: str, kana: str) -> None:
    assert cost(reading, kana) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("kana", ["サオリメデス", "サトメデス", "オトメデス", "サオトデス", "サオスストメデス"])
def test_a_wrong_missing_or_added_kana_costs_its_share(kana: str) -> None:
    edits = 2 if "スス" in kana else 1
    # a run of a kana too many costs once, however many frames it takes
    assert cost("サオトメ", kana) == pytest.approx(edits * WORST / 4, rel=0.01)


def test_a_long_vowel_that_is_written_out_costs_less_than_another_sound() -> None:
    assert cost("イノー", "イノウエ") == pytest.approx(WRITTEN_OUT / 3, rel=0.01)
    assert cost("イノー", "イノキ") == pytest.approx(WORST / 3, rel=0.01)


def test_what_the_recogniser_nearly_heard_costs_less_than_what_it_did_not() -> None:
    posterior = heard("キト")
    posterior[0:2, KANA.index("ギ") + 1] = posterior[0, KANA.index("キ") + 1] - 1.0
    near, far = (places[0].cost for places in Listener(["ギト", "ホト"]).listen(posterior, WORST))
    assert near == pytest.approx(0.5)  # 1 nat in one run, over 2 kana
    assert far == pytest.approx(WORST / 2)


def test_places_are_told_apart_and_do_not_overlap() -> None:
    places = Listener(["サキ", "ヌヌ"]).listen(heard("サキノミサキ"), 1.0)
    runs = kana_by_run(heard("サキノミサキ"))
    starts = [sum(map(bool, runs[: place.first_run])) for place in sorted(places[0], key=lambda one: one.first_run)]
    assert (starts, places[1]) == ([0, 4], [])


def test_half_of_the_shorter_place_makes_an_overlap() -> None:
    assert Heard(0, 0, 9).overlaps(Heard(0, 6, 9))
    assert not Heard(0, 0, 9).overlaps(Heard(0, 9, 12))


def test_many_readings_of_all_lengths_are_heard_as_each_alone() -> None:
    readings = ["ア", "サキ", "サキノ", "ミサキノアナ", "ノ"]
    posterior = heard("サキノミサキ", 0.9)
    alone = [Listener([reading]).listen(posterior, WORST)[0] for reading in readings]
    assert Listener(readings).listen(posterior, WORST) == alone
