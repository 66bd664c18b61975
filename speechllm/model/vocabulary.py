"""Cuts a language model's vocabulary to the tokens that Japanese text uses.

Why: with 262k tokens the head is half of a small model's step. Byte-pair tokenizers with byte fallback lose nothing
by it: a text outside the kept tokens is spelled in smaller pieces, down to bytes, and decodes to itself.
"""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from speechllm.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
BLANK = "▁"  # how these tokenizers write a space
LEVEL_1_ROWS = range(0xB0, 0xD0)  # JIS X 0208: kanji of level 1, in EUC-JP
KANA_ROWS = (0xA1, 0xA3, 0xA4, 0xA5)  # punctuation, full-width letters, hiragana, katakana


def everyday_characters() -> list[str]:
    """Return ASCII, kana, punctuation and the 2,965 kanji of JIS X 0208 level 1."""
    chars = [chr(code) for code in range(0x20, 0x7F)] + ["\n"]
    for row in (*KANA_ROWS, *LEVEL_1_ROWS):
        for cell in range(0xA1, 0xFF):
            char = bytes((row, cell)).decode("euc_jp", errors="ignore")
            chars += [char] if char else []
    return chars


def kept_ids(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[int]:
    """Return the token ids to keep, ascending: special ones, bytes, everyday characters, and those of `texts`.

    Every piece that leads to a kept token by merging is kept too, so that each of `texts` keeps its tokens.

    Raises:
        ModelError: the tokenizer has no byte fallback, so a cut could lose text.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise ModelError(
            tokenizer.name_or_path,
            "has no byte-pair tokenizer with byte fallback",
            "set lm.cut_vocabulary: false",
        )
    vocab: dict[str, int] = model["vocab"]
    kept = {vocab[token] for token in BYTE_TOKENS} | set(tokenizer.all_special_ids)
    kept |= {vocab[char] for char in everyday_characters() if char in vocab}
    kept |= {vocab[BLANK]} if BLANK in vocab else set()
    for text in texts:
        kept.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    return sorted(_with_parts(kept, model["merges"], vocab))


def _with_parts(kept: set[int], merges: Sequence[Sequence[str]], vocab: dict[str, int]) -> set[int]:
    """Add every piece that the tokenizer passes through while it joins the characters of a kept token."""
    rank = {(left, right): order for order, (left, right) in enumerate(merges)}
    made = {vocab[left + right]: left + right for left, right in merges}
    pieces = {piece for index in kept if index in made for piece in _pieces(made[index], rank)}
    return kept | {vocab[piece] for piece in pieces if piece in vocab}


def _pieces(token: str, rank: Mapping[tuple[str, str], int]) -> set[str]:
    """Return the pieces of `token`: joined pair by pair, the earliest merge first, the leftmost of equals."""
    parts = list(token)
    pieces = set(parts)
    while joinable := [(rank[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in rank]:
        _, place = min(joinable)
        parts[place : place + 2] = ["".join(parts[place : place + 2])]
        pieces.add(parts[place])
    return pieces


def cut_tokenizer(tokenizer: PreTrainedTokenizerFast, kept: Sequence[int]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token i is the old token ``kept[i]``."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    new_of = {old: new for new, old in enumerate(kept)}
    vocab: dict[str, int] = state["model"]["vocab"]
    state["model"]["vocab"] = {token: new_of[old] for token, old in vocab.items() if old in new_of}
    small = state["model"]["vocab"]
    state["model"]["merges"] = [
        [left, right]
        for left, right in state["model"]["merges"]
        if left in small and right in small and left + right in small
    ]
    state["added_tokens"] = [
        {**token, "id": new_of[token["id"]]} for token in state["added_tokens"] if token["id"] in new_of
    ]
    state["post_processor"] = None  # special tokens are the prompt builder's business alone
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    from transformers import PreTrainedTokenizerFast as Fast

    return Fast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **special)


def cut_model(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Keep only rows `kept` of the embedding and of the head, in place."""
    index = torch.tensor(kept, device=model.device)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head.weight is embedding.weight
    embedding.weight = torch.nn.Parameter(embedding.weight.detach()[index].clone(), requires_grad=False)
    head_rows = (
        embedding.weight if tied else torch.nn.Parameter(head.weight.detach()[index].clone(), requires_grad=False)
    )
    head.weight = head_rows
    embedding.num_embeddings = head.out_features = len(kept)
    embedding.padding_idx = None
    model.config = copy.deepcopy(model.config)
    model.config.vocab_size = len(kept)
