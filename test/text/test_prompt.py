"""The prompt: one path for training and decoding."""

from __future__ import annotations

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from speechllm.config.schema import DEFAULT_TEMPLATE
from speechllm.text.prompt import Form, build, encode

TOKENIZER = tiny.tokenizer()


@given(target=st.text(max_size=20), prompt=st.text(max_size=10))
def test_a_prompt_with_a_target_is_the_one_without_and_the_answer(target: str, prompt: str) -> None:
    form = Form(prompt, DEFAULT_TEMPLATE)
    without, within = build(TOKENIZER, form, None), build(TOKENIZER, form, target)
    assert (within.before, within.after) == (without.before, without.after)
    assert without.answer == ()
    assert within.answer == (*encode(TOKENIZER, target), TOKENIZER.eos_token_id)


def test_the_prompt_begins_with_the_start_of_text_and_ends_with_a_line_feed() -> None:
    parts = build(TOKENIZER, tiny.FORM, None)
    assert parts.before[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.decode(parts.before[1:]) == tiny.PROMPT + "\n"
    assert TOKENIZER.decode(parts.after) == "\n"


def test_a_tokenizer_without_a_start_of_text_gets_none() -> None:
    bare = tiny.tokenizer()
    bare.bos_token = None
    assert build(bare, tiny.FORM, None).before == build(TOKENIZER, tiny.FORM, None).before[1:]


def test_a_template_may_put_the_sound_first_and_spell_out_a_special_token() -> None:
    parts = build(TOKENIZER, Form("", "{audio}</s>"), "a")
    assert parts.before == (TOKENIZER.bos_token_id,)
    assert parts.after == (TOKENIZER.eos_token_id,)


def test_the_prompt_may_stand_behind_the_sound_and_hold_braces() -> None:
    parts = build(TOKENIZER, Form("{b}", "a{audio}{prompt}c"), None)
    assert TOKENIZER.decode(parts.before[1:]) == "a"
    assert TOKENIZER.decode(parts.after) == "{b}c"


def test_an_empty_answer_is_the_end_alone() -> None:
    assert build(TOKENIZER, tiny.FORM, "").answer == (TOKENIZER.eos_token_id,)


@pytest.mark.parametrize("text", tiny.TEXTS)
def test_encoded_text_holds_no_special_token_and_decodes_to_itself(text: str) -> None:
    ids = encode(TOKENIZER, text)
    assert not set(ids) & set(TOKENIZER.all_special_ids)
    assert TOKENIZER.decode(ids) == text
