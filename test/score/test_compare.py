"""Systems against each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from speechllm import cli
from speechllm.errors import ConfigError
from speechllm.score.compare import segment_errors
from speechllm.score.errors import Kind, Step, align
from speechllm.score.run import ScoreOptions, compare_files

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = ScoreOptions(bootstrap=200)


def steps_of(letters: str) -> list[Step]:
    """An alignment from sclite's letters: C S D I."""
    kinds: dict[str, Kind] = {"C": "equal", "S": "sub", "D": "del", "I": "ins"}
    steps, ref, hyp = [], 0, 0
    for letter in letters:
        next_ref, next_hyp = ref + (letter != "I"), hyp + (letter != "D")
        steps.append(Step(kinds[letter], ref, next_ref, hyp, next_hyp))
        ref, hyp = next_ref, next_hyp
    return steps


def test_segments_are_those_of_sclite() -> None:
    """SCTK's src/sclite/testdata/file1.sgml and file2.sgml: three segments, nine errors against seven."""
    first = segment_errors(steps_of("I"), steps_of(""))
    second = segment_errors(steps_of("CDSCSSSCCDCII"), steps_of("CDSCSSSCCSS"))
    assert first == [(1, 0)]
    assert second == [(5, 5), (3, 2)]


def test_one_right_token_does_not_end_a_segment() -> None:
    ref = "あいうえお"
    assert segment_errors(align(ref, "かいきえお"), align(ref, ref)) == [(2, 0)]
    assert segment_errors(align(ref, "かいうきお"), align(ref, ref)) == [(1, 0), (1, 0)]


@pytest.fixture
def systems(tmp_path: Path) -> tuple[Path, list[Path]]:
    sentences = [f"第{at}回の大会で記者が水を買う" for at in range(1, 41)]
    bad = [one.replace("水を買う", "杉が飛ぶ") if at % 2 else one for at, one in enumerate(sentences)]
    odd = [one.replace("記者", "汽車") if at == 3 else one for at, one in enumerate(sentences)]
    files = []
    for name, texts in (("ref", sentences), ("good", sentences), ("bad", bad), ("odd", odd)):
        files.append(tmp_path / f"{name}.text")
        files[-1].write_text("".join(f"u{at:02} {one}\n" for at, one in enumerate(texts)), encoding="utf-8")
    return files[0], files[1:]


def test_a_real_difference_names_the_better_system(systems: tuple[Path, list[Path]]) -> None:
    ref, (good, bad, _) = systems
    result = compare_files(ref, [bad, good], OPTIONS)
    assert {one["verdict"] for one in result["comparisons"]} == {"good is better"}
    cer = result["comparisons"][0]
    assert cer["difference"] == pytest.approx(cer["ci95"][0], abs=0.1)
    assert cer["ci95"][0] > 0
    assert cer["p"] < 0.05
    assert cer["mapsswe"]["p"] < 0.05
    assert "bad - good: +" in result["text"]


def test_a_difference_whose_interval_holds_zero_is_called_so(systems: tuple[Path, list[Path]]) -> None:
    ref, (good, _, odd) = systems
    result = compare_files(ref, [good, odd], OPTIONS)
    assert {one["verdict"] for one in result["comparisons"]} == {"not distinguishable"}
    assert result["text"].count("not distinguishable") == 3


def test_a_system_against_itself_differs_by_nothing(systems: tuple[Path, list[Path]]) -> None:
    ref, (_, bad, _) = systems
    for one in compare_files(ref, [bad, bad], OPTIONS, names=["one", "two"])["comparisons"]:
        assert (one["difference"], one["p"], one["mapsswe"]["p"]) == (0.0, 1.0, 1.0)


def test_many_systems_make_a_matrix_and_files(systems: tuple[Path, list[Path]], tmp_path: Path) -> None:
    ref, hyps = systems
    result = compare_files(ref, hyps, OPTIONS, out=tmp_path / "out")
    assert len(result["comparisons"]) == 9
    assert "(row minus column, ~ not distinguishable)" in result["text"]
    assert (tmp_path / "out/compare.txt").read_text(encoding="utf-8") == result["text"]
    assert (tmp_path / "out/compare.json").exists()


def test_the_order_of_lines_does_not_matter(systems: tuple[Path, list[Path]]) -> None:
    ref, (good, bad, _) = systems
    before = compare_files(ref, [good, bad], OPTIONS)
    for path in (ref, bad):
        path.write_text("".join(reversed(path.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8")
    assert compare_files(ref, [good, bad], OPTIONS) == before


def test_systems_need_names_of_their_own_and_company(systems: tuple[Path, list[Path]]) -> None:
    ref, (good, bad, _) = systems
    with pytest.raises(ConfigError, match="give each system a name of its own"):
        compare_files(ref, [good, bad], OPTIONS, names=["a", "a"])
    with pytest.raises(ConfigError, match="at least two hypothesis files"):
        compare_files(ref, [good], OPTIONS)


def test_files_of_one_name_are_told_apart_by_their_folders(
    systems: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref, (good, bad, _) = systems
    files = []
    for source, place in ((good, "a/test/text"), (bad, "b/test/text"), (bad, "c/hyp.text"), (bad, "d/hyp.txt")):
        files.append(tmp_path / place)
        files[-1].parent.mkdir(parents=True)
        files[-1].write_bytes(source.read_bytes())
    assert cli.run(["compare", "--ref", str(ref), "--hyp", str(files[0]), "--hyp", str(files[1])]) == 0
    assert "a/test - b/test: " in capsys.readouterr().out
    assert cli.run(["compare", "--ref", str(ref), "--hyp", str(files[2]), "--hyp", str(files[3])]) == 0
    assert "c/hyp - d/hyp: " in capsys.readouterr().out
    assert cli.run(["compare", "--ref", str(ref), "--hyp", str(good), "--hyp", str(good)]) == 2
    assert capsys.readouterr().err == "error: --hyp: names one file twice; give each system once\n"
