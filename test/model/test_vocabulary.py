"""The cut vocabulary: kept texts keep their tokens, no text is lost, no logit changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from speechllm.errors import ModelError
from speechllm.model.lm import kept_ids_for
from speechllm.model.vocabulary import BYTE_TOKENS, cut_tokenizer, everyday_characters, kept_ids
from speechllm.text.prompt import encode

if TYPE_CHECKING:
    from pathlib import Path

WHOLE = tiny.tokenizer()
KEPT_TEXTS = tiny.TEXTS[:2]
KEPT = kept_ids(WHOLE, KEPT_TEXTS)
CUT = cut_tokenizer(WHOLE, KEPT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("lms")
    return {name: make(base / name) for name, make in tiny.LMS.items()}


def test_a_cut_leaves_something_out() -> None:
    assert len(KEPT) == len(CUT) < len(WHOLE)
    assert sorted(set(KEPT)) == KEPT


@pytest.mark.parametrize("text", KEPT_TEXTS)
def test_kept_texts_keep_their_tokens(text: str) -> None:
    assert [KEPT[index] for index in encode(CUT, text)] == encode(WHOLE, text)


def test_a_text_that_was_not_kept_is_spelled_in_smaller_pieces() -> None:
    text = tiny.TEXTS[2]
    assert len(encode(CUT, text)) > len(encode(WHOLE, text))
    assert CUT.decode(encode(CUT, text)) == text


def test_a_token_keeps_the_pieces_that_it_is_really_made_of() -> None:
    # abc can be made of ab, c and of a, bc; bc is joined first, so it must stay although ab comes first in the list
    pieces = ["a", "b", "c", "d", "bc", "cd", "ab", "abc"]
    merges = [("b", "c"), ("c", "d"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    whole = tiny.byte_pair_tokenizer(pieces, merges)
    texts = ["abcd", "cd"]
    kept = kept_ids(whole, texts)
    cut = cut_tokenizer(whole, kept)
    assert whole.convert_ids_to_tokens(encode(whole, "abcd")) == ["abc", "d"]
    for text in texts:
        assert [kept[index] for index in encode(cut, text)] == encode(whole, text)


@st.composite
def tokenizers(draw: st.DrawFn) -> PreTrainedTokenizerFast:
    """Draw a tokenizer as converted from sentencepiece: a token may be made in every way that its pieces allow."""
    longer = draw(st.lists(st.text("abc", min_size=2, max_size=4), unique=True, min_size=3, max_size=14))
    pieces = ["a", "b", "c", *longer]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in longer
        for cut in range(1, len(piece))
        if {piece[:cut], piece[cut:]} <= set(pieces)
    ]
    return tiny.byte_pair_tokenizer(pieces, merges)


@given(whole=tokenizers(), texts=st.lists(st.text("abc", max_size=9), max_size=4))
def test_kept_texts_keep_their_tokens_whatever_the_tokenizer(whole: PreTrainedTokenizerFast, texts: list[str]) -> None:
    kept = kept_ids(whole, texts)
    cut = cut_tokenizer(whole, kept)
    for text in texts:
        assert [kept[index] for index in encode(cut, text)] == encode(whole, text)


@given(st.text().filter(lambda text: not any(one in text for one in tiny.SPECIALS)))
def test_any_text_decodes_back_to_itself(text: str) -> None:
    text = text.replace("▁", "_")  # the tokenizer's own sign for a blank
    assert CUT.decode(encode(CUT, text), skip_special_tokens=True) == text


@pytest.mark.parametrize("text", [" a . b , c ! ", "😀", "𠮷野家", "か\u3099", "\u0000", "a\r\nb", "<0x41>"])
def test_odd_text_decodes_back_to_itself(text: str) -> None:
    assert CUT.decode(encode(CUT, text), skip_special_tokens=True) == text


def test_special_tokens_stay_special() -> None:
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert KEPT[getattr(CUT, name)] == getattr(WHOLE, name)
    end = CUT.eos_token_id
    assert CUT.decode([*encode(CUT, "天気"), end], skip_special_tokens=True) == "天気"


def test_every_byte_is_kept() -> None:
    assert set(WHOLE.convert_tokens_to_ids(BYTE_TOKENS)) <= set(KEPT)


def test_everyday_characters_are_ascii_kana_and_the_kanji_of_level_one() -> None:
    chars = everyday_characters()
    assert len(set(chars)) == len(chars)
    assert len([char for char in chars if "一" <= char <= "鿿" and char != "仝"]) == 2965  # which row 1 holds
    assert {*"azAZ09 ~\n", *"ぁんァヶー、。", *"亜腕"} <= set(chars)
    assert "弌" not in chars  # the first of level two


@pytest.mark.parametrize("name", tiny.BYTE_FALLBACK)
def test_logits_of_kept_tokens_are_unchanged(name: str, folders: dict[str, Path]) -> None:
    kept = kept_ids_for(tiny.found(folders[name]), KEPT_TEXTS)
    whole, cut = tiny.load(folders[name]), tiny.load(folders[name], kept)
    ids = encode(whole.tokenizer, KEPT_TEXTS[0])
    new_ids = encode(cut.tokenizer, KEPT_TEXTS[0])
    assert torch.equal(cut.embed(new_ids), whole.embed(ids))
    mask_bl = torch.ones(1, len(ids), dtype=torch.bool)
    with torch.inference_mode():
        wanted_bld = whole.logits(whole.hidden(whole.embed(ids)[None], mask_bl))
        got_bld = cut.logits(cut.hidden(cut.embed(new_ids)[None], mask_bl))
        own_bld = cut.model(torch.tensor([new_ids])).logits
    torch.testing.assert_close(got_bld, wanted_bld[..., kept], rtol=0, atol=1e-5)
    torch.testing.assert_close(own_bld, got_bld, rtol=0, atol=1e-5)


def test_a_cut_head_shares_its_rows_with_the_embedding_where_it_did_before(folders: dict[str, Path]) -> None:
    tied = {}
    for name in tiny.BYTE_FALLBACK:
        model = tiny.load(folders[name], KEPT).model
        tied[name] = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == {"llama": False, "gemma3": True, "gpt_neox": False, "mistral": False}


@pytest.mark.parametrize(
    "model", [models.BPE({"a": 0}, []), models.WordLevel({"a": 0}, "a")], ids=["no-fallback", "words"]
)
def test_a_tokenizer_that_could_lose_text_is_refused(model: models.Model) -> None:
    with pytest.raises(ModelError, match="has no byte-pair tokenizer with byte fallback"):
        kept_ids(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)), ["a"])
