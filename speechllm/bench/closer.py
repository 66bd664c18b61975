"""A closer look at our training at one budget of a batch: throughput, memory, and where the time goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from speechllm.bench.common import timed
from speechllm.bench.count import one_pass

if TYPE_CHECKING:
    from pathlib import Path

    from speechllm.bench.ours import Ours
    from speechllm.bench.train import Bench

TOP = 12  # operators or kernels that a profile lists
GIB = 2**30


def closer_look(system: Ours, bench: Bench, folder: Path) -> dict[str, object]:
    """Return the throughput of a pass with everything that training has, and the profile of one batch.

    Where a batch does not fit the memory, that is what is returned.
    """
    on_gpu = bench.device.type == "cuda"
    try:
        flops = one_pass(system).counts.flops
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(bench.device)
        took = timed(system.prepare(folder), bench.device)
        peak = torch.cuda.max_memory_allocated(bench.device) / GIB if on_gpu else None
        rows = _profile(system, bench.device)
    except torch.OutOfMemoryError:
        return {"system": system.name, "fits": False}
    return {
        "system": system.name,
        "fits": True,
        "batches": len(system.task.batches(0)),
        "audio_h_per_h": round(bench.hours * 3600 / took.wall, 2),
        "utterance_positions_per_s": round(bench.utterance_positions / took.wall, 1),
        "tflop_per_s": round(flops / took.wall / 1e12, 4),
        "peak_gib": peak if peak is None else round(peak, 2),
        "profile": rows,
    }


def _profile(system: Ours, device: torch.device) -> list[dict[str, object]]:
    """Return where the time of one batch goes, forward and backward, longest first."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    batch = next(system.batches())
    with profile(activities=activities) as found:
        system.loss(batch).backward()  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    for value in system.trained().values():
        value.grad = None
    spent = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events: list[Any] = sorted(found.key_averages(), key=lambda one: -float(getattr(one, spent)))
    total = sum(float(getattr(one, spent)) for one in events)
    return [
        {
            "operator": one.key[:80],
            "calls": one.count,
            "ms": round(float(getattr(one, spent)) / 1e3, 3),
            "share": round(float(getattr(one, spent)) / total, 3),
        }
        for one in events[:TOP]
    ]
