"""A fault keeps its three parts, on one line, in whatever process it is raised."""

from __future__ import annotations

import pickle
from typing import NoReturn

import pytest

from speechllm.errors import ConfigError, DataError, ModelError, UserError
from speechllm.runtime import worker_pool


@pytest.mark.parametrize("kind", [UserError, ConfigError, DataError, ModelError])
def test_a_fault_survives_the_way_between_processes(kind: type[UserError]) -> None:
    sent = kind("a/b.wav:3", "is no audio", "take it out")
    received = pickle.loads(pickle.dumps(sent))  # noqa: S301 - made on the line itself
    assert type(received) is kind
    assert str(received) == "a/b.wav:3: is no audio; take it out"
    assert received.fix == "take it out"


def test_line_breaks_inside_a_fault_become_blanks() -> None:
    assert str(DataError("a", "b\nc", "d\r\n e")) == "a: b c; d e"


def fail(where: str) -> NoReturn:
    raise DataError(where, "holds no samples", "take it out")


def test_a_fault_in_a_worker_reaches_the_parent_and_does_not_hang() -> None:
    with worker_pool(1) as pool, pytest.raises(DataError, match=r"x\.wav: holds no samples; take it out"):
        pool.submit(fail, "x.wav").result(timeout=120)
