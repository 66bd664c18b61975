"""The training loop: steps, validation, saved states, and a record of all of it.

The host is one step ahead of the device: what a step came to is read when the next one is under way.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic

import torch
from tqdm import tqdm

from speechllm.errors import ModelError, Stopped
from speechllm.model.state import check_keys, load_tensors, save_tensors
from speechllm.runtime import derive_seed, on_signals, sync_folder
from speechllm.train import average
from speechllm.train import checkpoint as ckpt
from speechllm.train.ahead import Step, making_ready
from speechllm.train.curves import Curves, forget_after, peak_memory_gib
from speechllm.train.distributed import ALONE, Gradients
from speechllm.train.optim import Optimizer, Sums, schedule
from speechllm.train.task import P, Validation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from types import FrameType

    from torch import Tensor

    from speechllm.train.distributed import World
    from speechllm.train.task import Outcome, Task

log = logging.getLogger(__name__)

KEPT_STATES = 2
MAX_BAD_STEPS = 5
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class LoopOptions:
    """How long and how the loop runs."""

    epochs: float
    accumulate: int
    warmup: float
    weight_decay: float
    clip_norm: float
    validate_every: int
    save_every: int
    patience: int | None = None
    average: int = 1
    average_of: str = "best"


@dataclass
class Progress:
    """Where a run is; what a saved state holds beside tensors. All randomness is a function of seed and step."""

    step: int = 0
    best: float = math.inf
    best_step: int = 0
    seconds: float = 0.0
    bad_steps: int = 0
    stale: int = 0
    """Validations since the best one."""
    unvalidated: bool = False
    """Whether this step is still to be validated: a signal came first."""
    kept: list[tuple[float, int]] = field(default_factory=list)
    """Score and step of the states that are to be averaged."""


@dataclass(frozen=True)
class Late:
    """A step whose results the device may still be working out."""

    step: int
    factor: float
    batches: Sequence[Sequence[str]]
    values: Tensor
    """Loss, tokens, requests to stop, seconds of sound, positions, padded positions, norm of the gradient."""
    ready: Any
    """The CUDA event of `values`; None on the CPU."""

    def read(self) -> list[float]:
        """Return the values, once the device has them."""
        if self.ready is not None:
            self.ready.synchronize()
        found: list[float] = self.values.tolist()
        return found


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """End with `Stopped` on a signal where there is no step to save; the loops have handlers of their own."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Stopped("not in a training step; run again to go on")

    with on_signals((signal.SIGTERM, signal.SIGUSR1), stop):
        yield


class _BrokenOff(BaseException):
    """A signal came while the model was being validated."""


class Loop(Generic[P]):
    """One training run of a task in a folder, resumed where it was left."""

    def __init__(self, task: Task[P], options: LoopOptions, folder: Path, world: World = ALONE) -> None:
        """Prepare the run and load the newest state that `folder` holds."""
        self.task, self.options, self.folder, self.world = task, options, folder, world
        self.optimizer = Optimizer(task.groups(), options.weight_decay, options.clip_norm)
        self.gradients = Gradients(world, list(self.optimizer.named.values()))
        # batches are drawn anew for every epoch, so epochs differ a little in their number of steps
        whole = math.ceil(options.epochs)
        self.epoch_steps = [math.ceil(len(task.batches(epoch)) / options.accumulate) for epoch in range(whole)]
        cut = (whole - options.epochs) * self.epoch_steps[-1] if whole else 0
        self.total = max(min(whole, 1), round(sum(self.epoch_steps) - cut))
        self.progress = Progress()
        self.late: Late | None = None
        self.stop_requested = self.stop_agreed = self.validating = False
        self.clock = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def _resume(self) -> None:
        found = ckpt.load_newest(self.folder / "checkpoints")
        if found is None:
            self._forget()  # of a run that was killed before it saved anything
            return
        check_keys(self.folder / "checkpoints", found.trainable, self.task.state())
        self.task.load_state(found.trainable)
        self.optimizer.load_state(found.optimizer)
        self.progress = Progress(**found.progress)  # type: ignore[arg-type] # our own JSON, checked by its sum
        self._forget()
        log.info("%s resumed step=%d of=%d", self.task.name, self.progress.step, self.total)

    def _forget(self) -> None:
        if self.world.is_main:
            forget_after(self.folder, self.progress.step, validated=not self.progress.unvalidated)

    def run(self) -> Progress:
        """Train to the end, load the best state into the task, and return where that was.

        Raises:
            Stopped: SIGTERM or SIGUSR1 came; the state is saved.
            ModelError: the loss stayed not finite.
        """
        first_step = self.progress.step + 1
        with (
            on_signals(SIGNALS, self._request_stop),
            Curves(self.folder, self.task.name, first_step, writes=self.world.is_main) as curves,
            self._bar() as bar,
            making_ready(self.task, self._remaining(), self.world) as steps,
        ):
            self.clock = time.monotonic()
            if self.progress.unvalidated:
                self._validate(curves)
            while not self._is_over() and self._one_step(next(steps), curves, bar):
                pass
            self._load_best(curves)
        return self.progress

    def _bar(self) -> tqdm[Any]:
        silent = None if self.world.is_main else True
        return tqdm(total=self.total, initial=self.progress.step, desc=self.task.name, unit="step", disable=silent)

    def _request_stop(self, number: int, _frame: FrameType | None) -> None:
        log.info("%s stop requested signal=%d; saving at the next step", self.task.name, number)
        self.stop_requested = True
        if self.validating:
            self.validating = False
            raise _BrokenOff

    def _stopping(self) -> bool:
        """Return whether to stop after this step; several processes agree on it a step later."""
        return self.stop_requested if self.world.size == 1 else self.stop_agreed

    def _is_over(self) -> bool:
        patience = self.options.patience
        return self.progress.step >= self.total or (patience is not None and self.progress.stale >= patience)

    def _remaining(self) -> Iterator[tuple[int, list[list[str]]]]:
        """Yield (epoch, the batches of one step) from where the run is: a function of the step alone."""
        first, start = 0, self.progress.step
        size = self.options.accumulate
        for epoch, steps in enumerate(self.epoch_steps):
            if start < first + steps:
                batches = self.task.batches(epoch)
                for position in range(max(0, start - first), min(steps, self.total - first)):
                    yield epoch, batches[position * size : (position + 1) * size]
            first += steps

    def _one_step(self, step: Step[P], curves: Curves, bar: tqdm[Any]) -> bool:
        """Return whether to go on."""
        progress = self.progress
        sums = self._gradients(step)
        factor = schedule(progress.step, self.total, self.options.warmup)
        # a batch of silence has no tokens
        norm = self.optimizer.step(factor, Sums(sums[0], sums[1].clamp(min=1)), progress.step / self.total)
        progress.step += 1
        self._settle(curves, bar)
        self.late = _on_its_way(progress.step, factor, step.batches, torch.cat([sums, norm.reshape(1).double()]))
        due = progress.step == self.total or progress.step % self.options.validate_every == 0
        save = progress.step % self.options.save_every == 0
        stopping = False
        if due or save or self._stopping():
            self._settle(curves, bar)
            stopping = self._stopping()
        if due and stopping and progress.step < self.total:
            progress.unvalidated = True
        elif due:
            self._validate(curves)
        if save or stopping or self._is_over():
            self._save()
        if stopping and not self._is_over():
            raise self._stopped()
        return not self._is_over()

    def _stopped(self) -> Stopped:
        return Stopped(f"{self.task.name} saved at step {self.progress.step} of {self.total}; run again to go on")

    def _gradients(self, step: Step[P]) -> Tensor:
        """Leave the gradients of a step's batches in the parameters; return what `Late` describes, less the norm."""
        outcomes = []
        for index, ready, weight in step.mine:
            # dropout is a function of seed, step and batch, so a resumed run draws the same, as do other processes
            torch.manual_seed(derive_seed(self.task.name, self.task.seed, self.progress.step, index))
            outcome = self.task.loss(ready.result())
            (outcome.nll * weight).backward()  # type: ignore[no-untyped-call]
            outcomes += [outcome] if weight else []
        device = next(iter(self.optimizer.named.values())).device
        sums = self.world.add_up(_sums(outcomes, float(self.stop_requested), device))
        self.gradients.add_up()
        return sums

    def _settle(self, curves: Curves, bar: tqdm[Any]) -> None:
        """Read and record what the last step came to."""
        late, self.late = self.late, None
        if late is None:
            return
        nll, tokens, stops, audio_s, positions, padded, norm = late.read()
        self.stop_agreed = self.stop_agreed or stops > 0
        self._guard(nll, norm, late)
        seconds = self._lap()
        self.progress.seconds += seconds
        values = {"loss": nll / max(1, tokens), "grad_norm": norm, "lr_factor": late.factor, "tokens": tokens}
        if positions:
            values |= {"audio_s": audio_s, "positions": positions, "padding": padded / positions}
        curves.record("train", late.step, values)
        speed = {"audio_hours_per_hour": audio_s / seconds, "tokens_per_s": positions / seconds}
        curves.curve("speed", late.step, {**speed, "memory_gib": peak_memory_gib()})
        shown = {"audio-h/h": f"{speed['audio_hours_per_hour']:.0f}", "tok/s": f"{speed['tokens_per_s']:.0f}"}
        bar.set_postfix({"loss": f"{values['loss']:.3f}", **(shown if positions else {})}, refresh=False)
        bar.update()

    def _lap(self) -> float:
        """Return the seconds since the last call, or since something else than steps was done."""
        began, self.clock = self.clock, time.monotonic()
        return self.clock - began

    def _guard(self, nll: float, norm: float, late: Late) -> None:
        if math.isfinite(nll) and math.isfinite(norm):
            self.progress.bad_steps = 0
            return
        self.progress.bad_steps += 1
        names = " ".join(batch[0] for batch in late.batches)
        log.warning(
            "%s step %d skipped: loss %s, gradient %s, batches beginning %s",
            self.task.name,
            late.step,
            nll,
            norm,
            names,
        )
        if self.progress.bad_steps >= MAX_BAD_STEPS:
            what = f"{MAX_BAD_STEPS} steps in a row were not finite, the last at {names}"
            raise ModelError(self.folder, what, "lower the learning rate or look at these utterances")

    def _validate(self, curves: Curves) -> None:
        """Measure this step, or save it and stop if a signal comes first."""
        found = self._validation()
        self.progress.unvalidated = found is None
        if found is None:
            self._save()
            raise self._stopped()
        result, step = found.scores, self.progress.step
        timed = {"minutes": self.progress.seconds / 60, "memory_gib": peak_memory_gib()}
        curves.record("valid", step, {**result, **timed})
        curves.samples(step, found.samples)
        log.info("%s step=%d %s", self.task.name, step, _shown(result))
        if result["score"] < self.progress.best:
            self.progress.best, self.progress.best_step, self.progress.stale = result["score"], step, 0
            self._keep_best()
        else:
            self.progress.stale += 1
        if self.options.average > 1:
            kind, count = self.options.average_of, self.options.average
            self.progress.kept = average.chosen(self.progress.kept, result["score"], step, count, kind)
            if self.world.is_main:
                average.keep(self.folder, self.progress.kept, step, self.task.state())
        self._lap()

    def _validation(self) -> Validation | None:
        """Return the results of the first process, on all of them; None where a signal came first."""
        found: Validation | None = None
        if self.world.is_main or self.world.lockstep:
            with contextlib.suppress(_BrokenOff):
                try:
                    self.validating = not self.world.lockstep  # the others would wait for it
                    found = self.task.validate()
                finally:
                    self.validating = False
        return self.world.from_main(found)

    def _keep_best(self) -> None:
        if self.world.is_main:
            temporary = self.folder / f".{ckpt.BEST}.tmp"
            save_tensors(temporary, self.task.state())
            temporary.replace(self.folder / ckpt.BEST)
            sync_folder(self.folder)
        self.world.wait()

    def _load_best(self, curves: Curves) -> None:
        """Load the best state, or the mean of several where that is no worse."""
        if not self.progress.best_step:
            return
        if len(self.progress.kept) > 1:
            self._load(self.folder / average.FOLDER, average.mean(self.folder, self.progress.kept))
            taking_part = self.world.is_main or self.world.lockstep
            found = self.world.from_main(self.task.validate() if taking_part else Validation({}))
            steps = " ".join(str(step) for _, step in self.progress.kept)
            log.info("%s average of steps %s: %s", self.task.name, steps, _shown(found.scores))
            curves.curve("average", self.progress.step, found.scores)
            if found.scores["score"] <= self.progress.best:
                return
        self._load(self.folder / ckpt.BEST, load_tensors(self.folder / ckpt.BEST))

    def _load(self, where: Path, state: Mapping[str, Tensor]) -> None:
        check_keys(where, state, self.task.state())
        self.task.load_state(state)

    def _save(self) -> None:
        if self.world.is_main:
            state = ckpt.Checkpoint(self.task.state(), self.optimizer.state(), dict(vars(self.progress)))
            ckpt.save(self.folder / "checkpoints", self.progress.step, state, KEPT_STATES)
        self._lap()

    def clean(self) -> None:
        """Delete all saved states of a finished run but the last; the best parameters have a file of their own."""
        if self.world.is_main:
            ckpt.prune(self.folder / "checkpoints", keep=1)


def _sums(outcomes: Sequence[Outcome], stops: float, device: torch.device) -> Tensor:
    """Return what the batches of a step add up to [6], float64."""
    counted = [
        sum(float(one.tokens) for one in outcomes),
        stops,
        sum(one.audio_s for one in outcomes),
        sum(float(one.positions) for one in outcomes),
        sum(float(one.padded) for one in outcomes),
    ]
    host = torch.tensor(counted, dtype=torch.float64)
    known = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
    nll = torch.zeros((), dtype=torch.float64, device=device)
    for one in outcomes:
        nll = nll + one.nll.detach().double()
    return torch.cat([nll.reshape(1), known])


def _on_its_way(step: int, factor: float, batches: Sequence[Sequence[str]], values: Tensor) -> Late:
    """Begin to copy the values of a step to the host."""
    if values.device.type != "cuda":
        return Late(step, factor, batches, values, None)
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return Late(step, factor, batches, host, event)


def _shown(scores: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.4f}" for name, value in scores.items())
