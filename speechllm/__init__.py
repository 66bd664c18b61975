"""Speech recognition with large language models: ``from speechllm import SpeechLLM``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from speechllm.recognizer import SpeechLLM

__all__ = ["SpeechLLM"]


def __getattr__(name: str) -> object:
    """Return `SpeechLLM`, which imports torch, only when it is asked for."""
    if name == "SpeechLLM":
        from speechllm.recognizer import SpeechLLM

        return SpeechLLM
    raise AttributeError(f"module 'speechllm' has no attribute '{name}'")
