"""Speech recognition with a packed SpeechLLM folder: files are read as the folder's own package reads them."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutomaticSpeechRecognitionPipeline


class SpeechLLMPipeline(AutomaticSpeechRecognitionPipeline):  # type: ignore[misc] # transformers has no types
    """The ordinary pipeline; a file or its bytes are read without ffmpeg."""

    def preprocess(self, inputs: Any, **settings: Any) -> Iterator[dict[str, Any]]:
        """Yield what the model reads of one sound."""
        if isinstance(inputs, bytes):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "sound"
                path.write_bytes(inputs)
                wave = _read(path)
        elif isinstance(inputs, str) and Path(inputs).is_file():
            wave = _read(Path(inputs))
        else:
            yield from super().preprocess(inputs, **settings)
            return
        yield from super().preprocess(wave, **settings)


def _read(path: Path) -> Any:
    from speechllm.data import audio

    return audio.read(path)
