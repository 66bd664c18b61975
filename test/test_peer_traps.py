"""Mistakes that other toolkits made and nobody saw, each with the tests that would see it here.

`TRAPS` says which tests those are. What no other file tests has its test below: transcripts that are cut, and half of
a saved head.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tiny
import torch

from speechllm import cli
from speechllm.config import load as configs
from speechllm.config.schema import ConvMlpProjector
from speechllm.data import kaldi
from speechllm.errors import EXIT_USER
from speechllm.model.speechllm import SpeechLlm, pad_frames
from speechllm.model.state import load_tensors, save_tensors
from speechllm.text.prompt import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
TRAPS = {
    "hypotheses are paired with ids by line number": (
        "score/test_texts.py::test_lines_are_joined_by_id_in_the_order_of_bytes",
        "score/test_run.py::test_the_order_of_lines_never_matters_and_a_missing_one_is_deleted",
        "decode/test_decode_dir.py::test_every_utterance_has_its_text_in_the_order_of_bytes",
    ),
    "audio lengths are computed in two places and a clamp hides that they differ": (
        "test_lengths.py::test_conv_frames_are_those_of_the_familys_own_convolutions",
        "model/test_encoder.py::test_frames_are_as_many_and_as_wide_as_the_encoder_says",
        "model/test_projector.py::test_as_many_vectors_come_out_as_were_expected",
        "train/test_tasks.py::test_sizes_are_the_positions_that_the_language_model_reads",
        "data/test_archive.py::test_frame_counts_that_disagree_are_named",
    ),
    "training and decoding have a prompt each": (
        "text/test_prompt.py::test_a_prompt_with_a_target_is_the_one_without_and_the_answer",
        "model/test_speechllm.py::test_without_targets_the_splice_is_the_one_with_them_less_the_answer",
    ),
    "transcripts are cut at 128 tokens and lose their end": (
        "test_peer_traps.py::test_a_long_transcript_is_learnt_to_its_end",
        "faults/test_train_faults.py::test_19_a_transcript_longer_than_the_context_is_told_and_never_cut",
        "model/test_speechllm.py::test_the_last_positions_of_a_row_predict_its_answer",
    ),
    "no attention mask reaches the search, so that a text depends on its neighbours": (
        "decode/test_search.py::test_a_batch_of_mixed_lengths_gives_each_utterance_the_texts_it_has_alone",
        "decode/test_search.py::test_other_neighbours_on_either_side_change_no_text",
        "decode/test_decode_dir.py::test_the_size_of_a_batch_changes_no_text",
        "model/test_packing.py::test_an_utterance_does_not_see_its_neighbours",
    ),
    "a reference without a hypothesis leaves the error rate": (
        "score/test_run.py::test_a_missing_hypothesis_costs_its_reference",
        "score/test_texts.py::test_a_missing_hypothesis_can_count_as_deleted",
    ),
    "half a checkpoint is loaded in silence": (
        "model/test_assemble.py::test_a_state_that_does_not_fit_exactly_is_refused_by_name",
        "model/test_lm.py::test_a_model_that_lacks_a_weight_is_refused",
        "train/test_trainer.py::test_a_state_of_another_model_is_refused_by_name",
        "train/test_trainer.py::test_a_best_state_of_another_model_is_refused_by_name",
        "train/test_optim.py::test_a_state_that_lacks_a_part_of_a_parameter_is_refused",
        "test_peer_traps.py::test_half_a_trained_head_is_refused_by_name",
    ),
}
CUT_AT = 128
LONG = "。".join(tiny.TEXTS[:4] * 6)
LENGTHS = {"u0": 16_000, "u1": 24_000}


@pytest.mark.parametrize("test", [test for tests in TRAPS.values() for test in tests])
def test_the_tests_that_would_see_a_trap_are_there(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    assert name in {part.name for part in tree.body if isinstance(part, ast.FunctionDef)}


# Transcripts that are cut


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("lm"))


@pytest.fixture
def model(lm_folder: Path) -> SpeechLlm:
    """Return a model whose tokenizer was saved with a bound on its texts, as many published ones were."""
    made = tiny.speech_llm(lm_folder, "llama", ConvMlpProjector(hidden=8)).eval()
    bounded: PreTrainedTokenizerFast = made.lm.tokenizer
    bounded.model_max_length = CUT_AT
    bounded.backend_tokenizer.enable_truncation(CUT_AT)
    return made


def test_a_long_transcript_is_learnt_to_its_end(model: SpeechLlm) -> None:
    assert len(tiny.tokenizer()(LONG)["input_ids"]) > CUT_AT
    torch.manual_seed(1)
    frames = pad_frames([torch.randn(20, tiny.WIDTH_H) for _ in range(2)], tiny.CPU)
    ids = encode(model.lm.tokenizer, LONG)
    assert model.lm.tokenizer.decode(ids) == LONG
    with torch.no_grad():
        for loss in (model.loss, model.packed_loss):
            _, tokens = loss(*frames, [LONG, ""])
            assert tokens == (len(ids) + 1) + 1  # each text has its end


def data_of(folder: Path, texts: dict[str, str]) -> Path:
    data = tiny.data_folder(folder, LENGTHS)
    kaldi.write_table(data / "text", texts)
    return data


def train(folder: Path, lm_folder: Path, data: Path, **fields: object) -> int:
    """Train in `folder` by the command line and return the exit status."""
    encoder = folder / "encoder"
    config = tiny.config(encoder if encoder.is_dir() else tiny.wavlm(encoder), lm_folder, **fields)
    configs.dump(config, folder / "conf.yaml")
    paths = {"--conf": folder / "conf.yaml", "--train": data, "--valid": data, "--exp": folder / "exp"}
    return cli.run(["train", *(str(part) for pair in paths.items() for part in pair)])


# Half of a saved head


HEAD = {"kind": "ctc", "hidden": 8, "epochs": 1}
SHORT = {"epochs": 1, "valid_utts": 1}
CURT = {"tokens_per_s": 1, "extra_tokens": 2}


def test_half_a_trained_head_is_refused_by_name(
    lm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head is read from its file where its training is over and that of the rest is not."""
    data = data_of(tmp_path / "data", {"u0": tiny.TEXTS[0], "u1": tiny.TEXTS[1]})
    assert train(tmp_path, lm_folder, data, projector=HEAD, train=SHORT, decode=CURT) == 0
    (tmp_path / "exp/model/model.json").unlink()
    best = tmp_path / "exp/ctc/best.safetensors"
    half = {name: value for name, value in load_tensors(best).items() if name != "out.bias"}
    save_tensors(best, half)
    capsys.readouterr()
    assert train(tmp_path, lm_folder, data, projector=HEAD, train=SHORT, decode=CURT) == EXIT_USER
    line = f"error: {best}: has no tensor out.bias; use the configuration that it was trained with"
    assert capsys.readouterr().err.splitlines()[-1] == line
