"""Random tiny models of the classes that the published system is made of, in Hugging Face format, for conf/debug."""

from __future__ import annotations

import io
import json
import shutil
from typing import TYPE_CHECKING

import sentencepiece
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

VOCABULARY = 400
SEED = 7


def make(folder: Path, texts: Sequence[str]) -> None:
    """Write ``encoder`` (WavLM) and ``lm`` (Llama with a sentencepiece tokenizer trained on `texts`) to `folder`."""
    if (folder / "done").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(SEED)
    _wavlm(folder / "encoder")
    _llama(folder / "lm", texts)
    (folder / "done").write_text("", encoding="utf-8")


def _wavlm(folder: Path) -> None:
    """WavLM with a layer-norm feature extractor and pre-norm blocks, as WavLM-Large has them."""
    config = WavLMConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(32,) * 7,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    WavLMModel(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)


def _llama(folder: Path, texts: Sequence[str]) -> None:
    folder.mkdir(parents=True)
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, "音声を書き起こしてください。"]),
        model_writer=trained,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    size = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue()).get_piece_size()
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,  # with the usual 0.02 a frozen random head can say nothing with confidence
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # the fast form, as hubs have it
