"""The results table is made from score files alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from speechllm import cli
from speechllm.errors import ConfigError, DataError
from speechllm.score.signature import tool
from speechllm.score.table import write_table

if TYPE_CHECKING:
    from pathlib import Path

DESCRIPTION = """
title: Results
about: Two systems.
rows:
  - {{name: ours, score: {folder}/ours/score.json, command: ./run.sh, note: two cores}}
  - {{name: theirs, score: {folder}/theirs/score.json, command: ./run.sh --stage 4}}
"""


RUN = {
    "data": "d00d",
    "commit": "abc-dirty",
    "device": "cpu",
    "versions": {"torch": "9.9"},
    "training": {"trainable": 4200000, "minutes": 17.6},
}


@pytest.fixture
def description(tmp_path: Path) -> Path:
    path = tmp_path / "table.yaml"
    path.write_text(DESCRIPTION.format(folder=tmp_path), encoding="utf-8")
    return path


def write_score(folder: Path, cer: float, **changes: object) -> Path:
    metric = {"value": cer, "ci95": [cer - 0.01, cer + 0.01]}
    content: dict[str, object] = {
        "signature": f"metric:cer|profile:default_v1|tool:{tool()}",
        "num_utts": 7,
        "metrics": {"cer": metric, "wer": metric},
        "groups": {"unheard": {"metrics": {"cer": metric}}},
        "made_from": {"hyp_sha256": "0", "ref_sha256": "f" * 64, "run": RUN},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "score.json").write_text(json.dumps(content | changes), encoding="utf-8")
    return folder / "score.json"


def shown_of(description: Path) -> str:
    return write_table([description], description.with_name("RESULTS.md"))


def test_a_row_shows_rates_in_per_cent_with_intervals_and_what_training_took(tmp_path: Path, description: Path) -> None:
    write_score(tmp_path / "ours", 0.0512)
    shown = shown_of(description)
    cell = "5.12 [4.12, 6.12]"
    assert f"| ours | 4.2M, 18 min | {cell} | {cell} | {cell} | 7 |" in shown
    assert "* ours: two cores" in shown
    assert (tmp_path / "RESULTS.md").read_text(encoding="utf-8") == shown


def test_below_the_table_stands_what_was_run_on_what(tmp_path: Path, description: Path) -> None:
    write_score(tmp_path / "ours", 0.05)
    shown = shown_of(description)
    assert "* ours: run here, data d00d, commit abc-dirty, device cpu, torch 9.9, references ffffffffffff" in shown
    assert f"* signature: `metric:cer|profile:default_v1|tool:{tool()}`" in shown


def test_a_row_that_was_not_run_names_the_command_that_would_run_it(tmp_path: Path, description: Path) -> None:
    write_score(tmp_path / "ours", 0.05)
    assert "| theirs |  | not run: `./run.sh --stage 4` |" in shown_of(description)


def test_a_score_of_other_hypotheses_than_those_beside_it_is_refused_by_name(tmp_path: Path, description: Path) -> None:
    score = write_score(tmp_path / "ours", 0.05)
    (score.parent / "text").write_text("u1 あ\n", encoding="utf-8")
    with pytest.raises(DataError, match="is older than the hypotheses of row ours; score again"):
        shown_of(description)
    assert not (tmp_path / "RESULTS.md").exists()
    assert not (tmp_path / "RESULTS.tex").exists()


def test_a_score_of_another_version_of_the_scorer_is_refused_by_name(tmp_path: Path, description: Path) -> None:
    write_score(tmp_path / "theirs", 0.05, signature="metric:cer|profile:default_v1|tool:speechllm-0.0.1")
    with pytest.raises(DataError, match=r"of row theirs was made by speechllm-0\.0\.1, this is .*; score again"):
        shown_of(description)


def test_published_figures_stand_beside_the_measured_ones(tmp_path: Path, description: Path) -> None:
    published = "published: {cer: 0.066, wer: 0.068, trainable: 1541M, source: a poster}"
    text = description.read_text(encoding="utf-8").replace("command: ./run.sh --stage 4", "command: go, " + published)
    description.write_text(text, encoding="utf-8")
    write_score(tmp_path / "theirs", 0.07)
    shown = shown_of(description)
    assert "| system | trained | CER % published | CER % | WER % published | WER % |" in shown
    assert "| ours |  |  | not run: `./run.sh` |" in shown
    assert "| theirs | 4.2M, 18 min | 6.6 | 7.00 [6.00, 8.00] | 6.8 |" in shown
    assert "* published figures of theirs: a poster" in shown


def test_each_seed_is_a_line_of_its_own(tmp_path: Path, description: Path) -> None:
    text = description.read_text(encoding="utf-8").replace("ours/score.json,", "ours{seed}/score.json', seeds: [1, 2],")
    text = text.replace("name: ours, score: ", "name: ours, score: '").replace(
        "./run.sh, note", "'./run.sh --seed {seed}', note"
    )
    description.write_text(text, encoding="utf-8")
    write_score(tmp_path / "ours2", 0.05)
    shown = shown_of(description)
    assert "| ours, seed 1 |  | not run: `./run.sh --seed 1` |" in shown
    assert "| ours, seed 2 | 4.2M, 18 min | 5.00 [4.00, 6.00] |" in shown


def test_a_score_kept_in_the_repository_stands_in_until_the_row_is_run(tmp_path: Path, description: Path) -> None:
    text = description.read_text(encoding="utf-8").replace("note:", f"kept: {tmp_path}/kept/score.json, note:")
    description.write_text(text, encoding="utf-8")
    write_score(tmp_path / "kept", 0.05)
    assert "* ours: score in the repository, data d00d" in shown_of(description)
    write_score(tmp_path / "ours", 0.04)
    assert "* ours: run here, data d00d" in shown_of(description)


def test_the_same_table_is_set_in_latex(tmp_path: Path, description: Path) -> None:
    write_score(tmp_path / "ours", 0.0512)
    shown_of(description)
    latex = (tmp_path / "RESULTS.tex").read_text(encoding="utf-8")
    assert r"ours & 4.2M, 18 min & 5.12 [4.12, 6.12] & 5.12 [4.12, 6.12] & 5.12 [4.12, 6.12] & 7 \\" in latex
    assert r"system & trained & CER \% & WER \% & CER \%, unheard & utterances \\" in latex
    assert r"theirs &  & not run: ./run.sh --stage 4 &" in latex
    assert latex.count(r"\begin{tabular}{lrrrrr}") == latex.count(r"\end{tabular}") == 1


def test_several_tables_go_to_one_page(tmp_path: Path, description: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(description.read_text(encoding="utf-8").replace("Results", "More"), encoding="utf-8")
    shown = write_table([description, other], tmp_path / "RESULTS.md")
    assert shown.index("# Results") < shown.index("# More")


@pytest.mark.parametrize("content", ["{", "{}", '{"metrics": {"cer": {"value": 1}}}', "[]"])
def test_a_broken_score_file_is_refused(tmp_path: Path, description: Path, content: str) -> None:
    write_score(tmp_path / "ours", 0.05).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="is no score file of ours"):
        shown_of(description)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"metrics": {"cer": {"value": "low", "ci95": [0, 1]}}}, "metrics.cer.value: "),
        ({"metrics": {"cer": {"value": 0.5, "ci95": [0]}}}, "metrics.cer.ci95.1: "),
        ({"metrics": {"cer": {"value": float("nan"), "ci95": [0, 1]}}}, "metrics.cer.value: "),
        ({"metrics": {"wer": {"value": 0.5, "ci95": [0, 1]}}}, "metrics: cer is not there"),
        ({"groups": ["unheard"]}, "groups: "),
        ({"groups": {"unheard": None}}, "groups.unheard: "),
        ({"num_utts": None}, "num_utts: "),
        ({"made_from": {"hyp_sha256": "0", "ref_sha256": 7}}, "made_from.ref_sha256: "),
        ({"made_from": {"hyp_sha256": "0", "ref_sha256": "", "run": {"training": {"minutes": "5"}}}}, "minutes: "),
        ({"made_from": {"hyp_sha256": "0", "ref_sha256": "", "run": {"model": "m"}}}, "made_from.run.model: "),
        ({"signature": "tool:\ud800"}, "Invalid JSON"),
    ],
)
def test_a_field_of_a_score_file_that_is_none_of_ours_is_named(
    tmp_path: Path, description: Path, changes: dict[str, object], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_score(tmp_path / "ours", 0.05, **changes)
    assert cli.run(["table", str(description), "--out", str(tmp_path / "RESULTS.md")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/ours/score.json: is no score file of ours (")
    assert fault in error
    assert not (tmp_path / "RESULTS.md").exists()


def test_a_baseline_whose_origin_is_not_told_is_shown_by_its_weights(tmp_path: Path, description: Path) -> None:
    run = {"model": {"name": "reazon", "fingerprint": "f00d"}, "worker": {"torch": "9"}}
    write_score(tmp_path / "theirs", 0.05, made_from={"hyp_sha256": "0", "ref_sha256": "f" * 64, "run": run})
    assert "* theirs: run here, weights f00d, references ffffffffffff" in shown_of(description)


def test_an_unknown_key_of_the_description_is_refused(description: Path) -> None:
    description.write_text(description.read_text(encoding="utf-8").replace("note:", "remark:"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"rows\.0\.remark"):
        shown_of(description)
