"""How a number came about, in the manner of sacreBLEU: numbers with equal signatures can be compared."""

from __future__ import annotations

import functools
import importlib.metadata
import unicodedata
from typing import TYPE_CHECKING

from speechllm.text.reading import dictionaries

if TYPE_CHECKING:
    from collections.abc import Mapping

UNITS = {"wer": "unidic-short-unit", "kana_cer": "kana", "ser": "utterance"}
"""Tokens of each metric; characters where nothing is said."""
_USES_UNIDIC = frozenset({"wer", "cer_lenient"})
_USES_OPEN_JTALK = frozenset({"kana_cer"})


def signature(metric: str, profile_tag: str, settings: Mapping[str, str]) -> str:
    """Metric, profile and version, tokens, dictionaries, settings and tool version in one line."""
    parts = {"metric": metric, "profile": profile_tag, "unit": UNITS.get(metric, "char")}
    versions = _dictionary_versions()
    if metric in _USES_UNIDIC:
        parts["unidic-lite"] = versions["unidic-lite"]
    if metric in _USES_OPEN_JTALK:
        parts["pyopenjtalk-plus"] = versions["pyopenjtalk-plus"]
    parts |= {
        **settings,
        "unicode": unicodedata.unidata_version,
        "tool": tool(),
    }
    return "|".join(f"{name}:{value}" for name, value in parts.items())


@functools.cache
def _dictionary_versions() -> dict[str, str]:
    """Versions of the analysers' dictionaries, read once."""
    return dictionaries()


@functools.cache
def tool() -> str:
    """Name and version of this package; ``dev`` where it is not installed."""
    try:
        return f"speechllm-{importlib.metadata.version('speechllm')}"
    except importlib.metadata.PackageNotFoundError:
        return "speechllm-dev"


def made_by(line: str) -> str:
    """Name and version of the package that made the signature `line`, empty where it does not say."""
    return dict(part.partition(":")[::2] for part in line.split("|")).get("tool", "")
