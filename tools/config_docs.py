"""Prints docs/configuration.md from the schema: every field, its default, its range, what it means."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel

from speechllm.config import schema

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

SECTIONS: dict[str, type[BaseModel]] = {
    "": schema.Config,
    "encoder": schema.EncoderConfig,
    "lm": schema.LmConfig,
    "projector (kind: conv_mlp)": schema.ConvMlpProjector,
    "projector (kind: linear)": schema.LinearProjector,
    "projector (kind: nue)": schema.NueProjector,
    "projector (kind: ctc)": schema.CtcProjector,
    "lora": schema.LoraConfig,
    "train": schema.TrainConfig,
    "train.augment": schema.AugmentConfig,
    "decode": schema.DecodeConfig,
}
BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


def page() -> str:
    """Return the page."""
    lines = [
        "# Configuration",
        "",
        "Made by `python tools/config_docs.py`. A configuration is YAML; an unknown or repeated key, a tag or an alias",
        "is an error. `extends: NAME.yaml` takes over the file of that name beside it; only what differs is then said.",
        "`speechllm train --set key.key=value` changes a field. The resolved configuration is kept in the experiment.",
    ]
    for name, section in SECTIONS.items():
        lines += ["", f"## {name or 'top level'}", "", "| field | default | range | meaning |", "|---|---|---|---|"]
        lines += [_row(key, field) for key, field in section.model_fields.items()]
    return "\n".join(lines) + "\n"


def _row(key: str, field: FieldInfo) -> str:
    if field.is_required():
        default = "required"
    elif isinstance(field.default, BaseModel):
        default = "see below"
    else:
        default = "`" + str(field.default).replace("\n", "\\n") + "`"
    bounds = [
        f"{sign} {getattr(item, attribute):g}"
        for item in field.metadata
        for kind, (attribute, sign) in BOUNDS.items()
        if isinstance(item, kind)
    ]
    return f"| `{key}` | {default} | {', '.join(bounds)} | {' '.join((field.description or '').split())} |"


if __name__ == "__main__":
    sys.stdout.write(page())
