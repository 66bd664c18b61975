"""Which of several processes a run ends with."""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from speechllm.train import launch

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def ranks() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Return an empty list; the processes in it are gone afterwards."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def start(ranks: list[subprocess.Popen[bytes]], *scripts: str) -> list[subprocess.Popen[bytes]]:
    ranks += [subprocess.Popen(["sh", "-c", script]) for script in scripts]
    return ranks


@pytest.mark.parametrize(
    ("scripts", "failed"),
    [
        (("exit 0", "exit 0"), (0, 0)),
        (("exit 1", "exit 2"), (1, 2)),
        (("exit 1", "sleep 1; exit 2"), (1, 2)),  # it had more memory to give back
        (("exit 1", "sleep 1; kill -9 $$"), (1, -9)),
        (("exit 75", "sleep 1; exit 1"), (0, 75)),
    ],
)
def test_the_one_whose_status_says_most_is_told_also_where_it_ends_last(
    ranks: list[subprocess.Popen[bytes]], scripts: tuple[str, ...], failed: tuple[int, int]
) -> None:
    assert launch._wait(start(ranks, *scripts)) == failed


@pytest.mark.parametrize("scripts", [("exec sleep 100", "exit 3"), ("exit 3", "exec sleep 100")])
def test_one_that_goes_on_after_another_has_failed_is_ended(
    ranks: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, scripts: tuple[str, ...]
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.1)
    failed = scripts.index("exit 3")
    assert launch._wait(start(ranks, *scripts)) == (failed, 3)
    assert ranks[1 - failed].returncode == -signal.SIGKILL


def test_the_port_is_none_that_outgoing_connections_take() -> None:
    assert all(10_000 <= launch._free_port() < 30_000 for _ in range(20))
