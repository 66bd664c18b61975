"""Every row of the published table runs the whole recipe, its configuration as it is, on tiny models of its classes."""

from __future__ import annotations

import io
import json
import os
import tarfile
from typing import TYPE_CHECKING, Any

import copied
import numpy as np
import pytest
import soundfile
import tiny
import torch
from local_scripts import load
from transformers import (
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
)

from speechllm.config import load as configs
from speechllm.data import audio
from speechllm.score.table import read_table

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.recipe

_, jsut, _, reazonspeech = [load(name) for name in ("download", "jsut", "shards", "reazonspeech")]
ROWS = (
    "jsut",
    "jsut_linear",
    "jsut_no_lora",
    "jsut_youko",
    "jsut_hubert",
    "jsut_two_phase",
    "jsut_qlora",
    "jsut_nue",
)
NUM_BASIC = 503  # 250 of them are eval1, 250 dev
NUM_TRAIN = 40
SPECIALS = ("<|endoftext|>", "<|startoftranscript|>", "<|ja|>", "<|transcribe|>", "<|notimestamps|>")


def _lm(folder: Path, model_class: type, config_class: type, *specials: str, **sizes: object) -> None:
    """Write a language model of a published row's class: a context that any utterance fits, a tokenizer of its own."""
    torch.manual_seed(5)
    made = tiny.tokenizer()
    if specials:
        made.add_special_tokens({"sep_token": specials[0]})
    shape = {**tiny.LM_SIZES, **sizes}
    model_class(config_class(vocab_size=len(made), max_position_embeddings=512, **shape, **tiny.ENDS)).save_pretrained(
        folder
    )
    made.save_pretrained(folder)


def _whisper(folder: Path) -> None:
    """Write a Whisper that knows Japanese by name, as the multilingual ones do."""
    made = tiny.byte_level_tokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, eos_token=SPECIALS[0])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS[1:])})
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIALS}
    first, begin = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    model: Any = tiny.whisper_model(len(tokenizer), begin, first)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=begin,
        pad_token_id=first,
        eos_token_id=first,
        is_multilingual=True,
        lang_to_id={"<|ja|>": ids["<|ja|>"]},
        task_to_id={"transcribe": ids["<|transcribe|>"]},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        max_length=32,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)


def _models(folder: Path) -> None:
    """Write tiny random models under the names of the published ones."""
    tiny.wavlm(folder / "microsoft/wavlm-large")
    tiny.hubert_large(folder / "rinna/japanese-hubert-large")
    tiny.hubert(folder / "rinna/japanese-hubert-base")
    # four-bit layers on the CPU come in blocks of 64 rows
    _lm(folder / "rinna/youri-7b", LlamaForCausalLM, LlamaConfig, hidden_size=64, intermediate_size=64)
    _lm(folder / "rinna/llama-3-youko-8b", LlamaForCausalLM, LlamaConfig, num_key_value_heads=1)
    _lm(folder / "rinna/japanese-gpt-neox-3.6b", GPTNeoXForCausalLM, GPTNeoXConfig, "[SEP]")
    _whisper(folder / "openai/whisper-large-v3")


def _jsut(folder: Path) -> None:
    """Write a folder of JSUT's layout, every sound the same 0.3 s."""
    tone = folder.parent / "tone.wav"
    audio.write_wav(tone, (0.1 * np.sin(np.arange(14_400) / 17)).astype(np.float32), 48_000)
    for subset in jsut.SUBSETS:
        ids = [f"{subset.upper()}_{number:04d}" for number in range(1, NUM_BASIC + 1 if subset == "basic5000" else 2)]
        (folder / subset / "wav").mkdir(parents=True)
        for utt_id in ids:
            os.link(tone, folder / subset / "wav" / f"{utt_id}.wav")
        lines = [f"{utt_id}:{utt_id[-4:]}番の札を持って窓口へどうぞ。\n" for utt_id in ids]
        (folder / subset / "transcript_utf8.txt").write_text("".join(lines), encoding="utf-8")


def _reazonspeech(folder: Path) -> None:
    """Write a copy of ReazonSpeech's layout: one tar; of two held-out sounds and enough to train on."""
    names: dict[bool, list[str]] = {True: [], False: []}
    for number in range(100_000):
        name = f"000/{number:013x}.flac"
        found = names[reazonspeech.is_held_out(name.removesuffix(".flac").replace("/", "-"))]
        if len(found) < NUM_TRAIN:
            found.append(name)
        if len(names[True]) >= 2:
            break
    chosen = [*names[False], *names[True][:2]]
    (folder / "data").mkdir(parents=True)
    (folder / "tsv").mkdir()
    with tarfile.open(folder / "data/000.tar", "w") as archive:
        for seed, name in enumerate(chosen):
            buffer = io.BytesIO()
            soundfile.write(buffer, tiny.wave(16_000 + 400 * (seed % 9), seed), 16_000, "PCM_16", format="FLAC")
            member = tarfile.TarInfo(name)
            member.size = len(buffer.getvalue())
            archive.addfile(member, io.BytesIO(buffer.getvalue()))
    lines = [f"{name}\t{tiny.TEXTS[n % 4]}\n" for n, name in enumerate(chosen)]
    (folder / "tsv/tiny.tsv").write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with corpora and models beside it."""
    base = tmp_path_factory.mktemp("rows")
    _models(base / "models")
    _jsut(base / "jsut")
    _reazonspeech(base / "reazonspeech")
    return copied.copy_tree(base / "tree")


def _run(tree: Path, *options: str) -> str:
    env = {
        **os.environ,
        "SPEECHLLM_MODELS": str(tree.parent / "models"),
        "JSUT": str(tree.parent / "jsut"),
        "REAZONSPEECH": str(tree.parent / "reazonspeech"),
        "REAZONSPEECH_SIZE": "tiny",
        "OMP_NUM_THREADS": "1",  # for models so small more threads only wait for each other
    }
    done = copied.run(tree / "run.sh", *options, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_table_names_these_rows_and_no_others() -> None:
    table = read_table(copied.TOP / "egs/jsut/asr1/tables/paper.yaml")
    named = {row.conf.stem for row in table.rows if row.conf}
    assert named == set(ROWS)


@pytest.mark.parametrize("conf", ROWS)
def test_a_row_runs_the_whole_recipe(tree: Path, conf: str) -> None:
    recipe = tree / "egs/jsut/asr1"
    prepared = (recipe / "data/jsut_basic5000/wav.scp").is_file()
    options = ["--conf", conf, *(["--stage", "2"] if prepared else [])]
    _run(tree, *options)
    exp = recipe / "exp" / conf
    trained = json.loads((exp / "model/provenance.json").read_text(encoding="utf-8"))
    assert trained["trainable"] > 0
    score = json.loads((exp / "decode_greedy/jsut_basic5000/score.json").read_text(encoding="utf-8"))
    assert score["num_utts"] == NUM_BASIC
    assert score["made_from"]["run"]["training"]["trainable"] == trained["trainable"]
    shown = (exp / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    rows = read_table(recipe / "tables/paper.yaml").rows
    name = next(row.name for row in rows if row.conf and row.conf.stem == conf)
    (line,) = [line for line in shown if line.startswith(f"| {name} |")]
    assert f"{100 * score['metrics']['cer']['value']:.2f} [" in line
    assert configs.load(exp / "config.yaml") == configs.load(recipe / f"conf/{conf}.yaml")


def test_a_baseline_is_one_command(tree: Path) -> None:
    shown = _run(tree, "--conf", "jsut", "--baseline", "whisper:openai/whisper-large-v3")
    score = tree / "egs/jsut/asr1/exp/whisper-large-v3/decode_greedy/jsut_basic5000/score.json"
    assert json.loads(score.read_text(encoding="utf-8"))["num_utts"] == NUM_BASIC
    assert "| openai/whisper-large-v3 |" in shown
    assert shown.count("nothing to do for a baseline") == 3  # features, training, packing
