"""The mark of an archive of features: the file beside it, written last, that says that it is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from speechllm.errors import DataError, first_of
from speechllm.runtime import write_json

if TYPE_CHECKING:
    from pathlib import Path


class Mark(BaseModel):
    """What is known of an archive."""

    model_config = ConfigDict(frozen=True, strict=True)

    fingerprint: str
    """Of what the features were made from."""
    seen: dict[str, int] = {}
    """Size and time of the file when it was last looked at; nothing in old marks."""
    sha256: str
    crc32: dict[str, str] = {}
    """Of every matrix, by utterance; nothing in old marks."""
    frames: dict[str, PositiveInt]
    """Number of frames by utterance."""
    dropped: dict[str, str] = {}
    """Utterances that were left out, each with the reason."""

    def write(self, path: Path) -> None:
        """Write it to `path`."""
        write_json(path, self.model_dump(exclude_defaults=True))


def read_mark(path: Path) -> Mark:
    """Return what the mark in `path` says.

    Raises:
        DataError: it is none.
    """
    try:
        return Mark.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(path, f"is no mark of an archive ({first_of(error)})", "run stage 2 again") from error
