"""The benchmarks by name."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from speechllm.errors import ConfigError

if TYPE_CHECKING:
    from speechllm.bench.common import Options, Outcome

NAMES = ("train", "decode", "dump")
NUMBERS = re.compile(r"[1-9]\d{0,6}(,[1-9]\d{0,6}){0,15}", re.ASCII)


def run(name: str, options: Options) -> Outcome:
    """Return what a benchmark found.

    Raises:
        ConfigError: there is no such benchmark, or it has no such size.
        Unequal: the things that it compares gave different results.
    """
    # so that threads which wait for each other do not count as work; read when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if name == "train":
        from speechllm.bench import train

        return train.run(options)
    if name == "decode":
        from speechllm.bench import decode

        return decode.run(options)
    if name == "dump":
        from speechllm.bench import dump

        return dump.run(options)
    raise ConfigError("bench", f"there is no benchmark {name}", f"choose one of {', '.join(NAMES)}")


def budgets(value: str | None) -> tuple[int, ...]:
    """Return the numbers of a list such as ``4096,8192``.

    Raises:
        ConfigError: it is no such list.
    """
    if value is None:
        return ()
    if not NUMBERS.fullmatch(value):
        raise ConfigError("bench", f"--tokens {value} is no list of numbers", "write it as 4096,8192")
    return tuple(int(part) for part in value.split(","))
