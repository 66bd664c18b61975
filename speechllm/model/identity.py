"""What of an encoder decides its frames: features of another identity are other features."""

from __future__ import annotations

from typing import TYPE_CHECKING

from speechllm.errors import ConfigError
from speechllm.runtime import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from speechllm.config.schema import EncoderConfig


def identity(encoder: EncoderConfig, fingerprint: str) -> dict[str, object]:
    """Return the encoder's weights, layer, padding and precision, and how its frames are stored."""
    return {
        "encoder_fingerprint": fingerprint,
        "encoder_revision": encoder.revision,
        "layer": encoder.layer,
        "pad_to_30s": encoder.pad_to_30s,
        "dtype": encoder.dtype,
        "stored": encoder.stored,
    }


def dump_record(folder: Path) -> dict[str, object]:
    """Return what the features in a dump directory were made from."""
    record = read_json(folder / "dump.json").get("record")
    if not isinstance(record, dict):
        raise ConfigError(folder / "dump.json", "does not say what was dumped", "run stage 2 again")
    return record


def check_dump(
    folder: Path, encoder: EncoderConfig, fingerprint: str | None = None, *, any_store: bool = False
) -> dict[str, object]:
    """Return the record of a dump that fits `encoder`; `fingerprint` names the weights where they are known.

    `any_store` takes frames of the same encoder however they are stored: a model may read what it was not trained on.

    Raises:
        ConfigError: it was made with another encoder, layer, padding or precision, or is stored otherwise.
    """
    record = dump_record(folder)
    if not all(isinstance(record.get(key), str) for key in ("encoder_fingerprint", "data")):
        raise ConfigError(folder / "dump.json", "does not say what was dumped", "run stage 2 again")
    wanted = identity(encoder, fingerprint or str(record["encoder_fingerprint"])) | {"encoder": encoder.name}
    if any_store:
        del wanted["stored"]
    for key, value in wanted.items():
        if record.get(key) != value:
            what = f"was dumped with {key} = {record.get(key)}, the model wants {value}"
            raise ConfigError(folder, what, "run stage 2 with this configuration, into another folder")
    return record
