"""What transformers reads of a packed folder: its configurations, its tokenizer, and a little code."""

from __future__ import annotations

import shutil
from importlib import resources
from typing import TYPE_CHECKING

from speechllm.data.audio import SAMPLE_RATE_HZ
from speechllm.decode.batched import max_tokens
from speechllm.recognizer import LONGEST_S
from speechllm.runtime import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from speechllm.config.schema import Config

TASK = "automatic-speech-recognition"
MODEL_CLASS = "SpeechLLMForConditionalGeneration"
CODE_FILES = ("configuration_speechllm.py", "modeling_speechllm.py", "pipeline_speechllm.py")


def write(folder: Path, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Write what the Auto classes and the pipeline for speech recognition look for."""
    code = resources.files("speechllm.pack") / "remote"
    for name in CODE_FILES:
        with resources.as_file(code / name) as path:
            shutil.copyfile(path, folder / name)
    tokenizer.save_pretrained(folder)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids["pad_token_id"] = ids["eos_token_id"] if ids["pad_token_id"] is None else ids["pad_token_id"]
    write_json(folder / "config.json", _configuration(len(tokenizer)) | ids)
    write_json(folder / "generation_config.json", _generation(config) | ids)
    write_json(folder / "preprocessor_config.json", _sounds())


def _configuration(vocab_size: int) -> dict[str, object]:
    return {
        "model_type": "speechllm",
        "architectures": [MODEL_CLASS],
        "auto_map": {
            "AutoConfig": "configuration_speechllm.SpeechLLMConfig",
            "AutoModel": f"modeling_speechllm.{MODEL_CLASS}",
            "AutoModelForSpeechSeq2Seq": f"modeling_speechllm.{MODEL_CLASS}",
        },
        "custom_pipelines": {
            TASK: {"impl": "pipeline_speechllm.SpeechLLMPipeline", "pt": ["AutoModelForSpeechSeq2Seq"]}
        },
        "sampling_rate": SAMPLE_RATE_HZ,
        "vocab_size": vocab_size,
    }


def _generation(config: Config) -> dict[str, object]:
    """Return what the pipeline would otherwise fill with settings of its own, such as five beams."""
    most = max_tokens(config.decode, LONGEST_S)
    return {"num_beams": config.decode.beam, "max_new_tokens": most + 1, "do_sample": False}


def _sounds() -> dict[str, object]:
    """Return the settings of a feature extractor that hands on the samples as they are."""
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "processor_class": "Wav2Vec2Processor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE_HZ,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": False,
        "return_attention_mask": True,
    }
