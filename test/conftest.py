"""Fixtures that several test folders share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis
import pytest

# models this small gain nothing from threads, which on a busy machine wait for each other; read when torch is loaded
os.environ["OMP_NUM_THREADS"] = "1"
# no test may reach the network, not even a proxy, nor depend on a user's own models
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"
os.environ.pop("SPEECHLLM_MODELS", None)
# nor take itself for a process of another training or job
for _name in [name for name in os.environ if name.startswith(("WANDB_", "SLURM_")) and name != "SLURM_CONF"]:
    del os.environ[_name]
for _name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)

# the same examples in every run, however slow the machine is
hypothesis.settings.register_profile(
    "gate",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("gate")

for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    # nohup, or a shell that runs the tests in the background, has them ignored; commands under test would inherit that
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

SLOW_FOLDERS = {"recipe", "faults", "bench"}  # whole commands, struck, killed, measured


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what the plain unit run leaves out."""
    for item in items:
        if SLOW_FOLDERS & set(item.path.relative_to(Path(__file__).parent).parts):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep converted models of the tests out of the user's cache."""
    monkeypatch.setenv("SPEECHLLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
