"""A packed SpeechLLM folder as a model of transformers: thin, for the package speechllm does the work.

Shapes: b batch, s samples, t text tokens.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.models.auto import modeling_auto

from .configuration_speechllm import SpeechLLMConfig

try:
    from speechllm import SpeechLLM
    from speechllm.errors import UserError
except ImportError as error:
    raise ImportError(
        "this model needs the Python package speechllm, which is not installed: README.md in the model's folder says "
        "where it comes from and how to install it"
    ) from error

# transformers' pipeline asks this table by the class's name whether a model writes its text token by token
modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES["speechllm"] = "SpeechLLMForConditionalGeneration"


class SpeechLLMForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc] # they have no types
    """Sounds in, tokens of the text out; `from_pretrained` is the way to make one."""

    config_class = SpeechLLMConfig
    main_input_name = "input_values"

    def __init__(self, config: SpeechLLMConfig) -> None:
        """Make it without weights; `from_pretrained` reads them."""
        super().__init__(config)
        # says where the model is to be, and is what `to` moves
        self.place = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        self.folder: Path | None = None
        self.recognizers: dict[str, SpeechLLM] = {}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *_: object, config: Any = None, **settings: Any
    ) -> "SpeechLLMForConditionalGeneration":
        """Return the model of a packed folder, or of the hub's repository of that name.

        Raises:
            ValueError: a precision was asked for; config.yaml (decode.dtype) decides it, since the texts depend on it.
        """
        dtype = settings.get("dtype") or settings.get("torch_dtype")
        if dtype not in {None, "auto", "float32", torch.float32}:
            raise ValueError("the precision of a SpeechLLM is decode.dtype in its config.yaml; leave dtype out")
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            names = ("revision", "token", "cache_dir", "local_files_only", "force_download")
            given = {name: settings[name] for name in names if settings.get(name) is not None}
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), **given))
        model = cls(config or SpeechLLMConfig.from_pretrained(folder))
        model.folder = folder
        model.generation_config = GenerationConfig.from_pretrained(folder)
        model.eval()
        first = SpeechLLM.from_pretrained(folder)
        device = first.model.lm.model.device
        model.recognizers[str(device)] = first
        model.to(device)
        return model

    @property
    def recognizer(self) -> SpeechLLM:
        """Return what does the work, where the model is."""
        device = str(self.place.device)
        if device not in self.recognizers:
            if self.folder is None:
                raise ValueError("this SpeechLLM has no weights; make it with from_pretrained")
            self.recognizers = {device: SpeechLLM.from_pretrained(self.folder, device)}
        return self.recognizers[device]

    @torch.no_grad()
    def generate(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens [b t] of each text, padded behind its end.

        `input_values` [b s] are sounds at 16 kHz; `attention_mask` is 1 on a row's own samples. The search is that of
        the folder's package, which bounds a text by the length of its sound.
        """
        waves_bs = input_values if input_values is not None else inputs
        if waves_bs is None:
            raise ValueError("generate needs input_values: sounds [b s] at 16 kHz")
        chosen = generation_config or self.generation_config
        if attention_mask is None:
            attention_mask = torch.ones(waves_bs.shape, dtype=torch.long)
        lengths = attention_mask.sum(dim=1).tolist()
        waves = [row[:length].float().cpu().numpy() for row, length in zip(waves_bs, lengths, strict=True)]
        try:
            found = self.recognizer.recognize(waves, beam=num_beams or chosen.num_beams, words=False)
        except UserError as error:
            raise ValueError(str(error)) from error
        limit = max_new_tokens or chosen.max_new_tokens
        rows = [self._tokens(one.text)[:limit] for one in found]
        return _padded(rows, self.config.pad_token_id).to(self.place.device)

    def _tokens(self, text: str) -> list[int]:
        tokenizer = self.recognizer.model.lm.tokenizer
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return [*ids, tokenizer.eos_token_id]

    def forward(self, *_: object, **__: object) -> None:
        """Refuse: training has a program of its own.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("use generate(); a SpeechLLM is trained with: speechllm train")

    def save_pretrained(self, save_directory: str | Path, **_: object) -> None:
        """Copy the packed folder, every file of it.

        Raises:
            ValueError: the model was not read from a folder.
        """
        if self.folder is None:
            raise ValueError("this SpeechLLM has no weights; make it with from_pretrained")
        shutil.copytree(self.folder, save_directory, dirs_exist_ok=True)


def _padded(rows: list[list[int]], pad: int | None) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad or 0)
