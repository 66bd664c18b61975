"""What transformers knows of a packed SpeechLLM folder; the folder's config.yaml and model.json say the rest."""

from transformers import PretrainedConfig


class SpeechLLMConfig(PretrainedConfig):  # type: ignore[misc] # transformers has no types
    """Names the folder's classes; nothing in it decides a text."""

    model_type = "speechllm"

    def __init__(self, sampling_rate: int = 16_000, vocab_size: int = 1, **rest: object) -> None:
        """Keep the rate of the sounds and the number of tokens; `rest` is what every configuration has."""
        self.sampling_rate = sampling_rate
        self.vocab_size = vocab_size
        super().__init__(**rest)
