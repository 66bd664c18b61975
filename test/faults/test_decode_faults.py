"""What may not come out of a decode: inventions, loops, other texts in other company. Cases as in docs/reliability.md.

The models are tiny. Weights that loop are made so that each token calls for the next of a circle, whatever was said.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from scenes import speechllm
from transformers import LlamaForCausalLM
from untrained import DECODE, LENGTHS, RATE_HZ, make

from speechllm.config.schema import HeadsConfig
from speechllm.data.audio import write_wav
from speechllm.model.ctc import BLANK
from speechllm.model.heads import frames_record, new_heads, save_heads

sys.path += [str(Path(__file__).resolve().parents[2] / "tools/bench"), str(Path(__file__).parents[1] / "decode")]
import no_speech
import spoken

if TYPE_CHECKING:
    from untrained import Made

LOOP, WAY_OUT = "今日は", "本"
ROUNDS = 4  # people say a thing four times
LOOP_LIMIT = 40


def guards(out: Path) -> dict[str, int]:
    """Return how many utterances each guard struck."""
    counts = json.loads((out / "rtf.json").read_text(encoding="utf-8"))["guards"]
    return {name: count["utterances"] for name, count in counts.items() if count["utterances"]}


def nbest(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the n-best of each utterance."""
    records = [json.loads(line) for line in (out / "nbest.jsonl").read_text(encoding="utf-8").splitlines()]
    return {record["utt_id"]: record["nbest"] for record in records}


def best(out: Path) -> dict[str, dict[str, Any]]:
    """Return the first of the n-best of each utterance."""
    return {utt_id: found[0] for utt_id, found in nbest(out).items()}


# 42: nothing was said


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model that has a text for everything that it is asked."""
    folder = tmp_path_factory.mktemp("talkative")
    return make(folder, tiny.llama(folder / "lm"), LENGTHS)


def test_42_fifty_sounds_without_speech_have_an_empty_text(talkative: Made, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    made = dict(no_speech.sounds())
    for name, wave in made.items():
        write_wav(tmp_path / "in" / f"{name}.wav", wave, RATE_HZ)
    write_wav(tmp_path / "in/speech.wav", spoken.recording([0.3])[0], RATE_HZ)
    given = ["--model", talkative.exp / "model", "--format", "json", "--out", tmp_path / "out"]
    ended = speechllm("transcribe", *given, tmp_path / "in")
    assert ended.status == 0, ended.output
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "out").iterdir()}
    assert found.pop("speech")["text"]  # the model is not just silent
    assert len(found) == len(made) == 50
    assert {name: one["text"] for name, one in found.items() if one["text"]} == {}
    assert [part for one in found.values() for part in one["segments"] if part["flags"] != ["no_speech"]] == []


@pytest.mark.parametrize("hears", [False, True])
def test_42_where_no_kana_is_heard_a_decode_writes_nothing_and_flags_it(
    talkative: Made, tmp_path: Path, *, hears: bool
) -> None:
    """The recogniser beside the model hears nothing anywhere, or something else in every frame."""
    own = talkative.with_config(tmp_path / "exp")
    settings = HeadsConfig(tokens=False, hidden=8)
    heads = new_heads(settings, own.origin.width_h, [], kana=True)
    assert heads.kana is not None
    if not hears:
        with torch.no_grad():
            heads.kana.out.bias[BLANK] = 1e3
    else:
        torch.nn.init.normal_(heads.kana.out.weight, std=30.0)
    save_heads(own.exp / "model", heads, settings, frames_record(own.config, own.origin), [])
    texts = own.decode(tmp_path / "out")
    if hears:
        assert all(texts.values())
        assert "no_speech" not in guards(tmp_path / "out")
    else:
        assert set(texts.values()) == {""}
        assert guards(tmp_path / "out") == {"no_speech": len(LENGTHS)}
        assert {tuple(one["flags"]) for one in best(tmp_path / "out").values()} == {("no_speech",)}


# 43: a model that loops


def let_it_loop(folder: Path) -> Path:
    """Change a language model's weights: no block does anything, and each token of `LOOP` calls for the next.

    Whatever else stands last calls for the first of them; next to each is `WAY_OUT`, behind which the text ends.
    """
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = tiny.tokenizer()
    circle = tokenizer.convert_tokens_to_ids(list(LOOP))
    out, end = tokenizer.convert_tokens_to_ids(WAY_OUT), tokenizer.eos_token_id
    assert len({*circle, out, end, tokenizer.unk_token_id}) == len(circle) + 3
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        vectors, head = model.model.embed_tokens.weight, model.lm_head.weight
        vectors.zero_()
        head.zero_()
        vectors[:, 0] = 1.0
        for place, token in enumerate(circle, start=1):
            vectors[token] = torch.nn.functional.one_hot(torch.tensor(place), vectors.shape[1])
            head[circle[place % len(circle)], place] = 9.0
            head[out, place] = 5.0
        vectors[out] = torch.nn.functional.one_hot(torch.tensor(9), vectors.shape[1])
        head[circle[0], 0], head[end, 9] = 9.0, 9.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def looping(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("looping")
    decode = {**DECODE, "extra_tokens": LOOP_LIMIT}
    return make(folder, let_it_loop(tiny.llama(folder / "lm")), LENGTHS, random=False, decode=decode)


@pytest.mark.parametrize("beam", [1, 3])
def test_43_a_model_that_loops_is_stopped_mended_and_flagged(looping: Made, tmp_path: Path, beam: int) -> None:
    texts = looping.decode(tmp_path / "out", "--beam", beam)
    assert guards(tmp_path / "out")["loop"] == len(LENGTHS)
    assert all("loop" in one["flags"] for one in best(tmp_path / "out").values())
    assert not any(LOOP * (ROUNDS + 1) in text for text in texts.values())
    if beam == 1:
        assert set(texts.values()) == {LOOP * ROUNDS + LOOP[:-1] + WAY_OUT}


def test_43_without_the_mending_its_texts_are_bounded_and_flagged_as_cut(looping: Made, tmp_path: Path) -> None:
    texts = looping.with_config(tmp_path / "exp", mend_loops=False).decode(tmp_path / "out")
    for utt_id, text in texts.items():
        assert len(text) == LOOP_LIMIT + int(DECODE["tokens_per_s"] * LENGTHS[utt_id] / RATE_HZ + 0.5)
        assert text in LOOP * LOOP_LIMIT
    assert guards(tmp_path / "out") == {"cut": len(LENGTHS)}


# 44: batch against single


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def varied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    return make(folder, tiny.LMS[request.param](folder / "lm"), LENGTHS)


@pytest.mark.parametrize("beam", [1, 2])
def test_44_the_texts_of_a_batch_are_those_of_single_utterances(varied: Made, tmp_path: Path, beam: int) -> None:
    alone = varied.decode(tmp_path / "1", "--batch-size", 1, "--beam", beam)
    wanted = nbest(tmp_path / "1")
    assert len({found[0]["log_prob"] for found in wanted.values()}) == len(LENGTHS)
    assert len(set(alone.values())) > 2
    for size in (3, 32):
        out = tmp_path / str(size)
        assert varied.decode(out, "--batch-size", size, "--beam", beam) == alone
        for utt_id, found in nbest(out).items():
            assert len(found) == len(wanted[utt_id]) == beam
            for one, due in zip(found, wanted[utt_id], strict=True):
                assert one["pieces"] == due["pieces"]
                assert one["log_prob"] == pytest.approx(due["log_prob"], abs=1e-4)
                assert one["probs"] == pytest.approx(due["probs"], abs=1e-4)
