"""The real run.sh on conf/debug, in a copy of the tree."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import copied
import pytest
from copied import TIME_LIMIT_S, TOP

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.recipe


def run(tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the copy's run.sh."""
    return copied.run(tree / "run.sh", *options)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which conf/debug was run once."""
    copy = copied.copy_tree(tmp_path_factory.mktemp("clone"))
    done = run(copy, "--conf", "debug")
    assert done.returncode == 0, done.stderr
    return copy


@pytest.fixture
def recipe(tree: Path) -> Path:
    """The recipe's folder in the copy."""
    return tree / "egs/jsut/asr1"


def test_the_recipe_overfits_its_few_utterances_to_cer_0(recipe: Path) -> None:
    score = json.loads((recipe / "exp/debug/decode_greedy/debug_train/score.json").read_text(encoding="utf-8"))
    assert score["num_utts"] == 8
    assert score["metrics"]["cer"]["value"] == 0
    assert score["metrics"]["cer"]["ref"] > 100
    assert (recipe / "exp/debug/decode_greedy/debug_train/report.html").stat().st_size > 10_000
    assert "| 0.00 [0.00, 0.00] |" in (recipe / "exp/debug/RESULTS.md").read_text(encoding="utf-8")


def test_the_packed_model_tells_its_score_and_its_sums_hold(recipe: Path) -> None:
    card = (recipe / "exp/debug/packed/README.md").read_text(encoding="utf-8")
    assert "| debug_train | 8 | CER | 0.00 | 0.00 to 0.00 |" in card
    checked = subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=recipe / "exp/debug/packed", check=False, timeout=60
    )
    assert checked.returncode == 0


def test_a_second_run_changes_nothing(tree: Path, recipe: Path) -> None:
    made = ["exp/debug/model/trained.safetensors", "exp/debug/decode_greedy/debug_train/nbest.jsonl"]
    made += ["dump/encoder/debug_train/feats.scp", "exp/debug/metrics.jsonl", "exp/debug/packed/trained.safetensors"]
    before = [(recipe / name).stat().st_mtime_ns for name in made]
    again = run(tree, "--conf", "debug")
    assert again.returncode == 0, again.stderr
    assert [(recipe / name).stat().st_mtime_ns for name in made] == before


def test_the_same_seed_gives_the_same_bits(tree: Path, recipe: Path) -> None:
    twin = run(tree, "--conf", "debug", "--stage", "3", "--stop_stage", "4", "--exp", "twin")
    assert twin.returncode == 0, twin.stderr
    assert "stage 3" in twin.stdout
    assert "stage 5" not in twin.stdout
    for name in ("model/trained.safetensors", "decode_greedy/debug_train/text"):
        assert (recipe / "exp/twin" / name).read_bytes() == (recipe / "exp/debug" / name).read_bytes()
    assert _losses(recipe / "exp/twin") == _losses(recipe / "exp/debug")


def test_a_stopped_run_ends_with_75_and_goes_on_to_the_same_bits(tree: Path, recipe: Path) -> None:
    options = ["--conf", "debug", "--stage", "3", "--stop-stage", "3", "--exp", "stopped"]
    metrics = recipe / "exp/stopped/metrics.jsonl"
    with subprocess.Popen([str(tree / "run.sh"), *options], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + TIME_LIMIT_S
        while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=TIME_LIMIT_S)
    assert process.returncode == 75, stderr
    assert "run again to go on" in stderr
    assert not (recipe / "exp/stopped/model").exists()
    assert run(tree, *options).returncode == 0
    trained = "model/trained.safetensors"
    assert (recipe / "exp/stopped" / trained).read_bytes() == (recipe / "exp/debug" / trained).read_bytes()
    assert _losses(recipe / "exp/stopped") == _losses(recipe / "exp/debug")


def _losses(exp: Path) -> list[float]:
    lines = (exp / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_trace_prints_the_way_of_an_utterance(recipe: Path) -> None:
    utt_id = (recipe / "data/debug_train/text").read_text(encoding="utf-8").split()[0]
    command = [str(TOP / ".venv/bin/speechllm"), "trace", utt_id, "--exp", "exp/debug"]
    done = subprocess.run(command, cwd=recipe, capture_output=True, text=True, check=False, timeout=TIME_LIMIT_S)
    assert done.returncode == 0, done.stderr
    for step in ("wav.scp", "frames [e h]", "audio tokens [p d]", "prompt tokens", "LM input [l d]", "CER"):
        assert step in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].split()[1] == "0.0000"


def test_a_changed_configuration_is_refused_with_the_difference(tree: Path, recipe: Path) -> None:
    conf = recipe / "conf/debug.yaml"
    original = conf.read_text(encoding="utf-8")
    conf.write_text(original.replace("hidden: 64", "hidden: 32"), encoding="utf-8")
    try:
        refused = run(tree, "--conf", "debug", "--stage", "3", "--stop-stage", "3")
    finally:
        conf.write_text(original, encoding="utf-8")
    assert refused.returncode == 2
    assert "projector.hidden: 64 -> 32" in _only_error(refused)


def test_a_missing_transcript_stops_the_recipe_and_leaves_no_dump(tree: Path, recipe: Path) -> None:
    shutil.copytree(recipe / "data/debug_train", recipe / "data/broken")
    lines = (recipe / "data/broken/text").read_text(encoding="utf-8").splitlines(keepends=True)
    (recipe / "data/broken/text").write_text("".join(lines[1:]), encoding="utf-8")
    done = run(tree, "--conf", "debug", "--stage", "2", "--sets", "broken,broken,broken", "--exp", "broken")
    assert done.returncode == 2
    assert f"{lines[0].split()[0]} has audio but no transcript" in _only_error(done)
    assert not (recipe / "dump/encoder/broken").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--frobnicate", "1"), "unknown option --frobnicate"),
        (("--stage", "three"), "--stage needs a number, got 'three'"),
        (("--stage", "9"), "stages go from 1 to 6"),
        (("--stage", "4", "--stop-stage", "3"), "--stage 4 comes after --stop-stage 3"),
        (("--conf", "nope"), "no configuration nope"),
        (("--exp", "../out"), "--exp '../out' is no plain name"),
        (("--conf",), "--conf is unknown or needs a value"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_2(tree: Path, options: tuple[str, ...], message: str) -> None:
    done = run(tree, *options)
    assert done.returncode == 2
    assert message in _only_error(done)


def _only_error(done: subprocess.CompletedProcess[str]) -> str:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return errors[0]


def test_list_and_help_explain(tree: Path) -> None:
    assert [line.split() for line in run(tree, "--list").stdout.splitlines()] == [
        ["1", "data"],
        ["2", "dump"],
        ["3", "train"],
        ["4", "decode"],
        ["5", "score"],
        ["6", "pack"],
    ]
    for option in ("--stage", "--stop-stage", "--stop_stage", "--conf", "--nj", "--ngpu", "--launcher", "--sets"):
        assert option in run(tree, "--help").stdout
