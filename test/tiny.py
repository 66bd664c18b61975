"""Random models of a few thousand parameters, in Hugging Face format, of every class that the package knows."""

from __future__ import annotations

import json
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    HubertConfig,
    HubertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SeamlessM4TFeatureExtractor,
    UniSpeechSatConfig,
    UniSpeechSatModel,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from speechllm.config.schema import DEFAULT_TEMPLATE, Config, LoraConfig
from speechllm.data import archive, audio, kaldi
from speechllm.model.hub import Resolved, resolve
from speechllm.model.lm import LORA_KEY, LanguageModel, add_lora, load_lm
from speechllm.model.projector import build_projector
from speechllm.model.speechllm import SpeechLlm, kana_embeddings
from speechllm.text.prompt import Form

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from speechllm.config.schema import Projector

CPU = torch.device("cpu")
SAMPLE_RATE_HZ = audio.SAMPLE_RATE_HZ
TEXTS = (
    "今日はいい天気です。",
    "明日は雨が降ります。",
    "東京から大阪まで電車で行きます。",
    "これは3冊の本です。",
    "a b c",
)
PROMPT = "書き起こして"
FORM = Form(PROMPT, DEFAULT_TEMPLATE)
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
LM_WIDTH = 16
WIDTH_H = 6  # of made-up encoder frames
ENCODER_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
# what every tiny encoder of the wav2vec 2.0 kind shares; kernels and strides are the published ones
WAV2VEC2_SIZES = {
    **ENCODER_SIZES,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
LM_SIZES = {"hidden_size": LM_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TIED = {"tie_word_embeddings": True}
# with the usual 0.02 all logits are alike, and a test of what depends on what could not fail
SPREAD = {"initializer_range": 0.3}
ENCODER_SPREAD = {"initializer_range": 0.1}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def wave(num_samples: int, seed: int = 0) -> NDArray[np.float32]:
    """Return noise [s] below a swell, so that no two stretches are alike."""
    noise = np.random.default_rng(seed).standard_normal(num_samples)
    swell = 0.2 + 0.1 * np.sin(np.arange(num_samples) / 500)
    made: NDArray[np.float32] = (noise * swell).clip(-1, 1).astype(np.float32)
    return made


def _save_encoder(model: torch.nn.Module, folder: Path) -> Path:
    _shake(model)
    model.save_pretrained(folder)  # type: ignore[operator] # transformers' own
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    return folder


def _shake(model: torch.nn.Module) -> None:
    """Move every bias off zero, so that what padding becomes after a layer is not zero by luck."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.add_(0.1 * torch.randn_like(value))


def wavlm(folder: Path) -> Path:
    """Write WavLM with a layer-norm feature extractor, as WavLM-Large has it."""
    torch.manual_seed(1)
    return _save_encoder(WavLMModel(WavLMConfig(**WAV2VEC2_SIZES, **LARGE, **ENCODER_SPREAD)), folder)


def hubert(folder: Path) -> Path:
    """Write HuBERT with a group-norm feature extractor, as HuBERT-base has it."""
    torch.manual_seed(2)
    return _save_encoder(HubertModel(HubertConfig(**WAV2VEC2_SIZES, **ENCODER_SPREAD)), folder)


def hubert_large(folder: Path) -> Path:
    """Write HuBERT with a layer-norm feature extractor, as HuBERT-large has it."""
    torch.manual_seed(9)
    return _save_encoder(HubertModel(HubertConfig(**WAV2VEC2_SIZES, **LARGE, **ENCODER_SPREAD)), folder)


def wav2vec2(folder: Path, **fields: object) -> Path:
    """Write wav2vec 2.0 as its large models are; `fields` go to its configuration."""
    torch.manual_seed(3)
    return _save_encoder(Wav2Vec2Model(Wav2Vec2Config(**WAV2VEC2_SIZES, **LARGE, **ENCODER_SPREAD, **fields)), folder)


def unispeech_sat(folder: Path) -> Path:
    """Write UniSpeech-SAT as its large models are."""
    torch.manual_seed(4)
    return _save_encoder(UniSpeechSatModel(UniSpeechSatConfig(**WAV2VEC2_SIZES, **LARGE, **ENCODER_SPREAD)), folder)


def data2vec(folder: Path) -> Path:
    """Write data2vec-audio, whose convolutions all have a layer norm."""
    from transformers import Data2VecAudioConfig, Data2VecAudioModel

    torch.manual_seed(5)
    sizes = {**WAV2VEC2_SIZES, "num_conv_pos_embeddings": 2}
    return _save_encoder(
        Data2VecAudioModel(Data2VecAudioConfig(**sizes, conv_pos_kernel_size=5, **ENCODER_SPREAD)), folder
    )


def w2v_bert(folder: Path, **fields: object) -> Path:
    """Write w2v-BERT 2.0: Conformer blocks over stacked mel frames; `fields` go to its configuration."""
    torch.manual_seed(10)
    clipped = {"left_max_position_embeddings": 8, "right_max_position_embeddings": 2}
    model = Wav2Vec2BertModel(Wav2Vec2BertConfig(**{**ENCODER_SIZES, **clipped, **ENCODER_SPREAD, **fields}))
    _shake(model)
    model.save_pretrained(folder)
    SeamlessM4TFeatureExtractor(padding_value=1.0).save_pretrained(folder)  # the published one pads with ones
    return folder


def whisper_model(vocab_size: int = 60, start: int = 1, end: int = 2) -> torch.nn.Module:
    """Return a random Whisper of two layers a side; `start` and `end` are the tokens of a text's ends."""
    torch.manual_seed(6)
    config = WhisperConfig(
        vocab_size=vocab_size,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_target_positions=32,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=start,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model: torch.nn.Module = WhisperForConditionalGeneration(config).eval()
    _shake(model)
    return model


def whisper(folder: Path) -> Path:
    """Write `whisper_model` and its feature extractor."""
    whisper_model().save_pretrained(folder)  # type: ignore[operator] # transformers' own
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


ENCODERS: dict[str, Callable[[Path], Path]] = {
    "wavlm": wavlm,
    "hubert": hubert,
    "hubert-large": hubert_large,
    "wav2vec2": wav2vec2,
    "unispeech-sat": unispeech_sat,
    "data2vec-audio": data2vec,
    "whisper": whisper,
    "w2v-bert": w2v_bert,
}
WAV2VEC2_KIND = tuple(name for name in ENCODERS if name not in {"whisper", "w2v-bert"})  # convolutions over samples


def tokenizer(texts: Sequence[str] = (*TEXTS, PROMPT)) -> PreTrainedTokenizerFast:
    """Return a byte-pair tokenizer with byte fallback that learned up to 20 merges of `texts`."""
    learning = Tokenizer(models.BPE())
    learning.normalizer = normalizers.Replace(" ", "▁")
    alphabet = {char for text in texts for char in text.replace(" ", "▁")}
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 20, initial_alphabet=sorted(alphabet), show_progress=False, min_frequency=1
    )
    learning.train_from_iterator(texts, trainer)
    learned = json.loads(learning.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    return byte_pair_tokenizer([*pieces, *(("\n",) if "\n" not in pieces else ())], learned["merges"])


def byte_pair_tokenizer(pieces: Sequence[str], merges: Sequence[Sequence[str]]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of Gemma's kind with these pieces and merges, behind the special tokens and the bytes."""
    vocab = {token: index for index, token in enumerate((*SPECIALS, *BYTES, *pieces))}
    pairs = [(left, right) for left, right in merges]
    fast = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # noqa: S106
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=fast, **names)


def byte_level_tokenizer(texts: Sequence[str] = (*TEXTS, PROMPT)) -> PreTrainedTokenizerFast:
    """Return a tokenizer of Qwen's kind: pieces made of bytes, no beginning of a sequence; up to 20 merges."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(specials) + len(alphabet) + 20
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    fast.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=specials[2], pad_token=specials[0])


def llama(folder: Path) -> Path:
    """Write Llama with grouped-query attention and an untied head."""
    return _save_lm(LlamaForCausalLM, LlamaConfig, {**LM_SIZES, "num_key_value_heads": 1}, folder)


def gemma3(folder: Path) -> Path:
    """Write Gemma 3: scaled embeddings, tied head, one layer of two with a sliding window of 8."""
    kinds = ["sliding_attention", "full_attention"]
    sizes = {**LM_SIZES, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8, "layer_types": kinds}
    return _save_lm(Gemma3ForCausalLM, Gemma3TextConfig, sizes, folder)


def gpt_neox(folder: Path) -> Path:
    """Write GPT-NeoX: biases everywhere, query, key and value in one layer."""
    return _save_lm(GPTNeoXForCausalLM, GPTNeoXConfig, LM_SIZES, folder)


def qwen2(folder: Path) -> Path:
    """Write Qwen 2: biases on query, key and value, a tied head, a tokenizer of its own kind."""
    return _save_lm(Qwen2ForCausalLM, Qwen2Config, {**LM_SIZES, "num_key_value_heads": 1, **TIED}, folder)


def qwen3(folder: Path) -> Path:
    """Write Qwen 3: norms on query and key, heads of a width of their own, a tokenizer of Qwen's kind."""
    return _save_lm(Qwen3ForCausalLM, Qwen3Config, {**LM_SIZES, "num_key_value_heads": 1, "head_dim": 12}, folder)


def mistral(folder: Path) -> Path:
    """Write Mistral: a sliding window of 8 in every layer."""
    sizes = {**LM_SIZES, "num_key_value_heads": 1, "sliding_window": 8}
    return _save_lm(MistralForCausalLM, MistralConfig, sizes, folder)


LMS: dict[str, Callable[[Path], Path]] = {
    "llama": llama,
    "gemma3": gemma3,
    "gpt_neox": gpt_neox,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
}
BYTE_FALLBACK = ("llama", "gemma3", "gpt_neox", "mistral")  # those whose vocabulary can be cut
LORA_TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "gemma3": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("k_proj", "o_proj"),
    "mistral": ("gate_proj", "down_proj"),
}


def _save_lm(kind: type, config_kind: type, sizes: Mapping[str, object], folder: Path) -> Path:
    torch.manual_seed(7)
    made = byte_level_tokenizer() if kind in {Qwen2ForCausalLM, Qwen3ForCausalLM} else tokenizer()
    rows = {"vocab_size": len(tokenizer())}  # more than Qwen's tokens, as in its published models
    model = kind(config_kind(**rows, max_position_embeddings=256, **sizes, **SPREAD, **ENDS))
    if kind is Qwen2ForCausalLM:
        _shake(model)  # elsewhere there are no biases, or zeros are what they begin as
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def found(folder: Path) -> Resolved:
    """Return a model folder as the hub module hands it on."""
    return resolve(str(folder))


def load(folder: Path, kept_ids: Sequence[int] | None = None) -> LanguageModel:
    """Return the language model in `folder`, in float32 on the CPU."""
    return load_lm(found(folder), "float32", CPU, kept_ids)


def config(encoder_folder: Path, lm_folder: Path, **fields: object) -> Config:
    """Return a configuration in float32 on the CPU; `fields` stand in for its defaults."""
    chosen: dict[str, object] = {
        "device": "cpu",
        "prompt": PROMPT,
        "encoder": {"name": str(encoder_folder)},
        "lm": {"name": str(lm_folder), "dtype": "float32"},
        "projector": {"kind": "conv_mlp", "hidden": 8},
        "lora": {"rank": 4, "alpha": 8},
    }
    return Config.model_validate(chosen | fields)


def lora_state(lm: LanguageModel) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors by name."""
    return {name: value for name, value in lm.model.named_parameters() if LORA_KEY in name}


def speech_llm(folder: Path, name: str, projector: Projector, width_h: int = WIDTH_H) -> SpeechLlm:
    """Return an untrained model in float32; its adapter and its bridge are random, so that both say something."""
    lm = load(folder)
    torch.manual_seed(8)
    add_lora(lm, LoraConfig(rank=4, targets=LORA_TARGETS[name]))
    made = build_projector(projector, width_h, lm.width, kana_embeddings(lm))
    for key, value in (*lora_state(lm).items(), *made.named_parameters()):
        if "lora_B" in key or key.startswith("residual"):
            torch.nn.init.normal_(value, std=0.3)
    return SpeechLlm(made, lm, FORM)


def feature_folder(folder: Path, texts: Mapping[str, str], num_frames: Mapping[str, int]) -> Path:
    """Write made-up features of `WIDTH_H` channels as stage 2 leaves them; a function of ids and lengths alone."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(11)
    matrices = {key: rng.standard_normal((num_frames[key], WIDTH_H)).astype(np.float16) for key in texts}
    archive.write_archive(folder / "feats.0000.ark", iter(matrices.items()))
    places = (folder / "feats.0000.scp").read_text(encoding="utf-8").replace(f"{folder}/", "")
    (folder / "feats.scp").write_text(places, encoding="utf-8")
    kaldi.write_table(folder / "text", texts)
    kaldi.write_table(folder / "utt2num_frames", {key: str(count) for key, count in num_frames.items()})
    kaldi.write_table(folder / "utt2dur", {key: f"{count / 50:.2f}" for key, count in num_frames.items()})
    return folder


def data_folder(folder: Path, num_samples: Mapping[str, int]) -> Path:
    """Write a data directory of noise, one utterance for each length; the texts are `TEXTS` in turn."""
    sounds = folder / "wav"
    sounds.mkdir(parents=True)
    utterances = []
    for seed, (key, count) in enumerate(num_samples.items()):
        audio.write_wav(sounds / f"{key}.wav", wave(count, seed), SAMPLE_RATE_HZ)
        utterances.append(kaldi.Utterance(key, sounds / f"{key}.wav", text=TEXTS[seed % len(TEXTS)], speaker="s"))
    kaldi.write_dir(folder / "data", utterances)
    return folder / "data"


class AtOnce(Executor):
    """Stands in for a pool: each job is done where it is submitted, so that it is known what comes first."""

    def __init__(self, _workers: int) -> None:
        """Do without workers, each of which takes seconds to import torch."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        """Return the future of a job that is done."""
        done: Future[Any] = Future()
        try:
            done.set_result(work(*arguments, **options))
        except Exception as error:  # noqa: BLE001 - as a pool does
            done.set_exception(error)
        return done


class HerePool(AtOnce):
    """Stands in for a pool of processes, and keeps how many there were to be."""

    sizes: ClassVar[list[int]] = []

    def __init__(self, workers: int) -> None:
        self.sizes.append(workers)
        self.threads = torch.get_num_threads()

    def __exit__(self, *_error: object) -> None:
        torch.set_num_threads(self.threads)  # a worker sets its own process's
