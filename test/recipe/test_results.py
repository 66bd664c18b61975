"""The results page of the recipe is what its table descriptions and the kept score files say."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from copied import TOP

from speechllm.score.table import read_table, write_table

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = TOP / "egs/jsut/asr1"
TABLES = ("tables/mini.yaml", "tables/paper.yaml")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe as a clone has it: nothing was run in it."""
    for name in ("tables", "scores"):
        shutil.copytree(RECIPE / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_is_remade_from_the_kept_scores(recipe: Path) -> None:
    shown = write_table([recipe / name for name in TABLES], recipe / "RESULTS.md")
    assert shown == (RECIPE / "RESULTS.md").read_text(encoding="utf-8")
    assert (recipe / "RESULTS.tex").read_text(encoding="utf-8") == (RECIPE / "RESULTS.tex").read_text(encoding="utf-8")


def test_every_kept_score_is_shown(recipe: Path) -> None:
    named = {row.kept for table in TABLES for row in read_table(recipe / table).rows if row.kept}
    assert named == set(recipe.glob("scores/*/*.json"))


@pytest.mark.parametrize(
    ("name", "cer_percent"),
    [("whisper-large-v3", 7.1), ("reazonspeech-nemo-v2", 7.4), ("kotoba-whisper-v2.0", 8.4), ("whisper-base", 24.9)],
)
def test_public_output_scores_about_what_was_published_of_it(recipe: Path, name: str, cer_percent: float) -> None:
    """Within half a point: kotoba-whisper's own figures, whose profile leaves numbers as they are."""
    score = json.loads((recipe / f"scores/jsut_basic5000/{name}.json").read_text(encoding="utf-8"))
    assert score["num_utts"] == 5000
    assert 100 * score["metrics"]["cer"]["value"] == pytest.approx(cer_percent, abs=0.5)
