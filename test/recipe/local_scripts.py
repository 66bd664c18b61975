"""Loads the recipe's scripts, which are run by path and belong to no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

LOCAL = Path(__file__).resolve().parents[2] / "egs/jsut/asr1/local"


def load(name: str) -> ModuleType:
    """Return a script of the recipe; those it imports must have been loaded before it."""
    spec = importlib.util.spec_from_file_location(name, LOCAL / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
