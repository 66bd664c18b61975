"""Edit counts and alignments: known values of jiwer and sclite, and the properties of a distance."""

from __future__ import annotations

import jiwer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechllm.score.errors import Counts, Pair, align, count_edits, counts_of, sclite_counts, sum_counts

WORDS = st.text("ab川", max_size=9)


def full_table(ref: str, hyp: str) -> tuple[int, int]:
    """Fewest edits and, among those, fewest substitutions: the textbook table, as an independent answer."""
    table = {(0, 0): (0, 0)}
    for i in range(len(ref) + 1):
        for j in range(len(hyp) + 1):
            ways = []
            if i:
                ways.append((table[i - 1, j][0] + 1, table[i - 1, j][1]))
            if j:
                ways.append((table[i, j - 1][0] + 1, table[i, j - 1][1]))
            if i and j:
                edits, subs = table[i - 1, j - 1]
                differ = int(ref[i - 1] != hyp[j - 1])
                ways.append((edits + differ, subs + differ))
            if ways:
                table[i, j] = min(ways)
    return table[len(ref), len(hyp)]


@pytest.mark.parametrize(
    ("ref", "hyp", "edits"),
    [
        ("This is a test", "This is a test", 0),
        ("This is a test", "", 14),
        ("This is a test", "This test", 5),
        ("X", "X X Y Y", 6),
        ("X Y X", "X Z", 3),
        ("X", "Y", 1),
        ("X", "Y Z", 3),
    ],
)
def test_known_character_values_of_jiwer(ref: str, hyp: str, edits: int) -> None:
    """From jiwer's tests/test_cer.py (Morris, Maier and Green 2004 for the last five)."""
    assert count_edits(ref, hyp).edits == edits


def test_known_counts_of_jiwer() -> None:
    """From jiwer's tests/test_cer.py, test_return_dict; and tests/test_measures.py for words."""
    total = sum_counts([count_edits("i", "i am"), count_edits("am i good", "y good")])
    assert total == Counts(sub=1, dele=3, ins=3, ref=10)
    short, long = "i am a short ground truth", "i am a considerably longer and very much incorrect hypothesis"
    assert count_edits(short.split(), long.split()).edits == 7


SCLITE_TEST1 = """
for a two trillion dollar business built on public confidence this trend is
    disheartening at best and downright dangerous at worst
freed to trying to lure business built on public confidence this trend is
    this tightening and best and downright dangerous at worst
14 7 0 1

and in the latest blow to public confidence in the funds someone at industry titan fidelity investments
    decided last friday to send newspapers thursday's prices for most fidelity funds
    because the friday data wasn't ready
and in the latest florida public confidence in the funds' some on the industry tighten fidelity investments
    decided last friday to send mystery praised thursday's prices for most fidelity funds
    because the friday data wasn't ready
28 6 1 2

but that doesn't change the fact that most fidelity's shareholders were lied to
    in varying degrees if they looked at their fund prices in newspapers last weekend
but that doesn't change the fact that most fidelity's shareholders relied too
    in varying degrees at the little different prices in newspapers last weekend
19 4 4 1

that would be standard fidelity procedure said jane jamieson
    senior vice president at the boston based company
that would be stunned if fidelity procedure said jean genius and
    senior vice president at the boston based company
14 3 0 2
"""


@pytest.mark.parametrize("case", SCLITE_TEST1.replace("\n    ", " ").strip().split("\n\n"))
def test_known_scores_of_sclite(case: str) -> None:
    """Sentences 4t0c0202, 0204, 0207 and 0209 of SCTK's own test1 (src/sclite/testdata/base/test1.pra)."""
    ref, hyp, scores = (line.split() for line in case.split("\n"))
    for counts in (count_edits(ref, hyp), sclite_counts(ref, hyp)):
        found = (counts.ref - counts.sub - counts.dele, counts.sub, counts.dele, counts.ins)
        assert found == tuple(map(int, scores))


def test_sclite_takes_one_more_edit_where_it_saves_many_substitutions() -> None:
    """Five substitutions cost it 20; three deletions and three insertions, with two tokens right, cost 18."""
    assert count_edits("pqrab", "abxyz") == Counts(sub=5, ref=5)
    assert sclite_counts("pqrab", "abxyz") == Counts(dele=3, ins=3, ref=5)


@given(ref=WORDS, hyp=WORDS)
def test_counts_are_the_textbook_ones(ref: str, hyp: str) -> None:
    counts = count_edits(ref, hyp)
    assert (counts.edits, counts.sub) == full_table(ref, hyp)
    assert counts.ref - counts.dele + counts.ins == len(hyp)
    assert counts.ref == len(ref)


@given(ref=st.text("ab川", min_size=1, max_size=9), hyp=WORDS)
def test_edits_equal_jiwers(ref: str, hyp: str) -> None:
    if ref.strip():
        result = jiwer.process_characters(ref, hyp)
        assert count_edits(ref, hyp).edits == result.substitutions + result.deletions + result.insertions


@given(text=WORDS)
def test_a_text_against_itself_has_no_edits(text: str) -> None:
    assert count_edits(text, text) == Counts(ref=len(text))
    assert count_edits("", text).ins == count_edits(text, "").dele == len(text)


@given(one=WORDS, two=WORDS, three=WORDS)
def test_edits_obey_the_triangle_inequality(one: str, two: str, three: str) -> None:
    assert count_edits(one, three).edits <= count_edits(one, two).edits + count_edits(two, three).edits


@given(ref=WORDS, hyp=WORDS)
def test_an_alignment_covers_both_texts_and_has_the_best_counts(ref: str, hyp: str) -> None:
    steps = align(ref, hyp)
    assert counts_of(steps) == count_edits(ref, hyp)
    at = (0, 0)
    for step in steps:
        assert (step.ref_start, step.hyp_start) == at
        at = (step.ref_end, step.hyp_end)
        if step.kind == "equal":
            assert ref[step.ref_start : step.ref_end] == hyp[step.hyp_start : step.hyp_end]
    assert at == (len(ref), len(hyp))


@given(ref=WORDS, hyp=WORDS, data=st.data())
def test_pairs_never_make_an_alignment_worse(ref: str, hyp: str, data: st.DataObject) -> None:
    def span(text: str) -> tuple[int, int]:
        start = data.draw(st.integers(0, len(text) - 1))
        return start, data.draw(st.integers(start + 1, len(text)))

    pairs = []
    if ref and hyp:
        pairs = [Pair(*span(ref), *span(hyp)) for _ in range(data.draw(st.integers(0, 3)))]
    steps = align(ref, hyp, pairs)
    assert counts_of(steps).edits <= count_edits(ref, hyp).edits
    taken = {(s.ref_start, s.ref_end, s.hyp_start, s.hyp_end) for s in steps if s.kind == "alike"}
    assert taken <= {(p.ref_start, p.ref_end, p.hyp_start, p.hyp_end) for p in pairs}


def test_a_pair_is_taken_where_it_saves_edits_and_only_there() -> None:
    ref, hyp = "水を買う", "みずを買う"
    assert counts_of(align(ref, hyp, [Pair(0, 1, 0, 2)])).edits == 0
    assert [step.kind for step in align("水を", "水を", [Pair(0, 1, 0, 1)])] == ["equal"]
    assert [step.kind for step in align(ref, hyp, [Pair(0, 1, 0, 2), Pair(0, 2, 0, 3)])] == ["alike", "equal"]


def test_long_texts_are_aligned_in_time() -> None:
    ref, hyp = "あいうえお" * 300, "かきくけこ" * 290
    assert counts_of(align(ref, hyp, [Pair(0, 1, 0, 1)])).edits == 1499
