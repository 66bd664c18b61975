"""The results table is made from score files alone."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from speechllm.errors import ConfigError, DataError
from speechllm.score.table import write_table

if TYPE_CHECKING:
    from pathlib import Path

DESCRIPTION = """
title: Results
about: Two systems.
rows:
  - {{name: ours, score: {folder}/ours/score.json, exp: {folder}/exp, command: ./run.sh, note: two cores}}
  - {{name: theirs, score: {folder}/theirs/score.json, command: ./run.sh --stage 4}}
"""


@pytest.fixture
def description(tmp_path: Path) -> Path:
    path = tmp_path / "table.yaml"
    path.write_text(DESCRIPTION.format(folder=tmp_path), encoding="utf-8")
    return path


def write_score(folder: Path, cer: float) -> Path:
    metric = {"value": cer, "ci95": [cer - 0.01, cer + 0.01]}
    content = {
        "signature": "metric:cer|profile:default_v1",
        "num_utts": 7,
        "metrics": {"cer": metric, "wer": metric},
        "groups": {"unheard": {"metrics": {"cer": metric}}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "score.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "score.json"


def test_a_row_shows_rates_in_per_cent_with_intervals_and_what_training_took(tmp_path: Path, description: Path) -> None:
    write_score(tmp_path / "ours", 0.0512)
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp/provenance.json").write_text('{"trainable": 4200000, "minutes": 17.6}', encoding="utf-8")
    shown = write_table(description, tmp_path / "RESULTS.md")
    cell = "5.12 [4.12, 6.12]"
    assert f"| ours | 4.2M, 18 min | {cell} | {cell} | {cell} | 7 |" in shown
    assert "* ours: two cores" in shown
    assert (tmp_path / "RESULTS.md").read_text(encoding="utf-8") == shown


def test_a_row_that_was_not_run_names_the_command_that_would_run_it(tmp_path: Path, description: Path) -> None:
    write_score(tmp_path / "ours", 0.05)
    assert "| theirs |  | not run: `./run.sh --stage 4` |" in write_table(description, tmp_path / "RESULTS.md")


def test_a_score_older_than_its_hypotheses_is_refused_by_name(tmp_path: Path, description: Path) -> None:
    score = write_score(tmp_path / "ours", 0.05)
    (score.parent / "text").write_text("u1 あ\n", encoding="utf-8")
    os.utime(score, (1, 1))
    with pytest.raises(DataError, match="is older than the hypotheses of row ours; run stage 5 again"):
        write_table(description, tmp_path / "RESULTS.md")
    assert not (tmp_path / "RESULTS.md").exists()


@pytest.mark.parametrize("content", ["{", "{}", '{"metrics": {"cer": {"value": 1}}}', "[]"])
def test_a_broken_score_file_is_refused(tmp_path: Path, description: Path, content: str) -> None:
    write_score(tmp_path / "ours", 0.05).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="is no score file of ours"):
        write_table(description, tmp_path / "RESULTS.md")


def test_an_unknown_key_of_the_description_is_refused(tmp_path: Path, description: Path) -> None:
    description.write_text(description.read_text(encoding="utf-8").replace("note:", "remark:"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"rows\.0\.remark"):
        write_table(description, tmp_path / "RESULTS.md")
