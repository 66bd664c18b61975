"""The training loop: steps, validation, saved states, and a record of all of it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from tqdm import tqdm

from speechllm.errors import ModelError, Stopped
from speechllm.model.state import check_keys, load_tensors, save_tensors
from speechllm.runtime import derive_seed, write_text
from speechllm.train import checkpoint as ckpt
from speechllm.train.distributed import ALONE
from speechllm.train.optim import Group, Optimizer, schedule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from types import FrameType

    from torch import Tensor

    from speechllm.train.distributed import World

log = logging.getLogger(__name__)

KEPT_STATES = 2
MAX_BAD_STEPS = 5

METRICS = "metrics.jsonl"


class Task(Protocol):
    """What is trained; the loop knows nothing else of it."""

    name: str
    seed: int

    def groups(self) -> Sequence[Group]:
        """Return the trainable parameters and their learning rates."""
        ...

    def batches(self, epoch: int) -> list[list[str]]:
        """Return the utterance ids of each batch of an epoch, a pure function of it."""
        ...

    def loss(self, utt_ids: Sequence[str], epoch: int) -> tuple[Tensor, int]:
        """Return the summed loss of a batch and the number of tokens in it."""
        ...

    def validate(self) -> dict[str, float]:
        """Return results on the validation set; ``score`` is the one to make small."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what training changes, by name."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill what training changes."""
        ...


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


@dataclass
class Progress:
    """Where a run is; what a saved state holds beside tensors."""

    step: int = 0
    best: float = math.inf
    best_step: int = 0
    seconds: float = 0.0
    bad_steps: int = field(default=0)


class Loop:
    """One training run of a task in a folder, resumed where it was left."""

    def __init__(self, task: Task, options: LoopOptions, folder: Path, world: World = ALONE) -> None:
        """Prepare the run and load the newest state that `folder` holds."""
        self.task, self.options, self.folder, self.world = task, options, folder, world
        self.optimizer = Optimizer(task.groups(), options.weight_decay, options.clip_norm)
        # batches are drawn anew for every epoch, so epochs differ a little in their number of steps
        whole = math.ceil(options.epochs)
        self.epoch_steps = [math.ceil(len(task.batches(epoch)) / options.accumulate) for epoch in range(whole)]
        cut = (whole - options.epochs) * self.epoch_steps[-1] if whole else 0
        self.total = max(min(whole, 1), round(sum(self.epoch_steps) - cut))
        self.progress = Progress()
        self.stop_requested = False
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def _resume(self) -> None:
        found = ckpt.load_newest(self.folder / "checkpoints")
        if found is None:
            self._truncate(0)  # of a run that was killed before it saved anything
            return
        check_keys(self.folder / "checkpoints", found.trainable, self.task.state())
        self.task.load_state(found.trainable)
        self.optimizer.load_state(found.optimizer)
        self.progress = Progress(**found.progress)  # type: ignore[arg-type] # our own JSON, checked by its sum
        self._truncate(self.progress.step)
        log.info("%s resumed step=%d of=%d", self.task.name, self.progress.step, self.total)

    def _truncate(self, step: int) -> None:
        if self.world.is_main:
            _truncate_metrics(self.folder / METRICS, step)

    def run(self) -> Progress:
        """Train to the end, load the best state into the task, and return where that was.

        Raises:
            Stopped: SIGTERM or SIGUSR1 came; the state is saved.
            ModelError: the loss stayed not finite.
        """
        previous = {
            number: signal.signal(number, self._request_stop)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }
        try:
            with (
                self._writer() as writer,
                self._bar() as bar,
            ):
                for epoch, utt_ids in self._remaining():
                    self._one_step(epoch, utt_ids, writer, bar)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if (self.folder / ckpt.BEST).is_file():
            best = load_tensors(self.folder / ckpt.BEST)
            check_keys(self.folder / ckpt.BEST, best, self.task.state())
            self.task.load_state(best)
        return self.progress

    def _writer(self) -> Any:
        """Return the curves' writer; the other processes have none."""
        from torch.utils.tensorboard import SummaryWriter

        if not self.world.is_main:
            return contextlib.nullcontext()
        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.progress.step + 1)

    def _bar(self) -> tqdm[Any]:
        silent = None if self.world.is_main else True
        return tqdm(total=self.total, initial=self.progress.step, desc=self.task.name, unit="step", disable=silent)

    def _request_stop(self, number: int, _frame: FrameType | None) -> None:
        log.info("%s stop requested signal=%d; saving at the next step", self.task.name, number)
        self.stop_requested = True

    def _remaining(self) -> Iterator[tuple[int, list[list[str]]]]:
        """Yield (epoch, the batches of one step) from where the run is: a function of the step alone."""
        first = 0
        size = self.options.accumulate
        for epoch, steps in enumerate(self.epoch_steps):
            if self.progress.step < first + steps:
                batches = self.task.batches(epoch)
                for position in range(self.progress.step - first, min(steps, self.total - first)):
                    yield epoch, batches[position * size : (position + 1) * size]
            first += steps

    def _one_step(self, epoch: int, batches: Sequence[Sequence[str]], writer: object, bar: tqdm[Any]) -> None:
        began = time.monotonic()
        progress = self.progress
        nll, tokens = self._gradients(epoch, batches)
        factor = schedule(progress.step, self.total, self.options.warmup)
        # a loss can be infinite and its gradient finite
        done = progress.step / self.total
        norm = self.optimizer.step(factor, tokens, done) if math.isfinite(nll) else self.optimizer.skip()
        progress.step += 1
        self._guard(nll, norm, batches)
        progress.seconds += time.monotonic() - began
        result = {
            "loss": nll / tokens,
            "grad_norm": norm,
            "lr_factor": factor,
            "tokens": float(tokens),
        }
        self._record("train", result, writer)
        bar.set_postfix(loss=f"{result['loss']:.3f}", refresh=False)
        bar.update()
        last = progress.step == self.total
        if last or progress.step % self.options.validate_every == 0:
            self._validate(writer)
        if last or self.stop_requested or progress.step % self.options.save_every == 0:
            self._save()
        if self.stop_requested and not last:
            raise Stopped(f"{self.task.name} saved at step {progress.step} of {self.total}; run again to go on")

    def _gradients(self, epoch: int, batches: Sequence[Sequence[str]]) -> tuple[float, int]:
        """Leave the gradients of a step's batches in the parameters; return their summed loss and their tokens."""
        nll, tokens = 0.0, 0
        for index, utt_ids in self.world.share(list(enumerate(batches))):
            # dropout is a function of seed, step and batch, so a resumed run draws the same, as do other processes
            torch.manual_seed(derive_seed(self.task.name, self.task.seed, self.progress.step, index))
            loss, count = self.task.loss(utt_ids, epoch)
            loss.backward()  # type: ignore[no-untyped-call]
            nll += float(loss.detach())
            tokens += count
        nll, all_tokens, stops = self.world.total([nll, float(tokens), float(self.stop_requested)])
        self.stop_requested = stops > 0
        if math.isfinite(nll):
            self.world.add_gradients(list(self.optimizer.named.values()))
        return nll, max(1, round(all_tokens))  # a batch of silence has no tokens

    def _guard(self, nll: float, norm: float, batches: Sequence[Sequence[str]]) -> None:
        if math.isfinite(nll) and math.isfinite(norm):
            self.progress.bad_steps = 0
            return
        self.progress.bad_steps += 1
        names = " ".join(batch[0] for batch in batches)
        log.warning(
            "%s step skipped: loss %s, gradient %s, batches beginning %s",
            self.task.name,
            nll,
            norm,
            names,
        )
        if self.progress.bad_steps >= MAX_BAD_STEPS:
            what = f"{MAX_BAD_STEPS} steps in a row were not finite, the last at {names}"
            raise ModelError(self.folder, what, "lower the learning rate or look at these utterances")

    def _validate(self, writer: object) -> None:
        began = time.monotonic()
        result = self.world.from_main(self.task.validate() if self.world.is_main else {})
        self._record("valid", {**result, "minutes": self.progress.seconds / 60}, writer)
        log.info(
            "%s step=%d %s",
            self.task.name,
            self.progress.step,
            " ".join(f"{k}={v:.4f}" for k, v in result.items()),
        )
        if result["score"] < self.progress.best:
            self.progress.best, self.progress.best_step = result["score"], self.progress.step
            self._keep_best()
        log.debug("validation took %.1f s", time.monotonic() - began)

    def _keep_best(self) -> None:
        if self.world.is_main:
            temporary = self.folder / f".{ckpt.BEST}.tmp"
            save_tensors(temporary, self.task.state())
            temporary.replace(self.folder / ckpt.BEST)
        self.world.wait()

    def _record(self, kind: str, values: Mapping[str, float], writer: object) -> None:
        if not self.world.is_main:
            return
        # JSON has no NaN: the loss of a skipped step is null
        plain = {key: value if math.isfinite(value) else None for key, value in values.items()}
        line = json.dumps({"kind": kind, "task": self.task.name, "step": self.progress.step, **plain})
        with (self.folder / METRICS).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        for key, value in values.items():
            writer.add_scalar(f"{self.task.name}/{kind}/{key}", value, self.progress.step)  # type: ignore[attr-defined]

    def _save(self) -> None:
        if not self.world.is_main:
            return
        state = ckpt.Checkpoint(self.task.state(), self.optimizer.state(), dict(vars(self.progress)))
        ckpt.save(self.folder / "checkpoints", self.progress.step, state, KEPT_STATES)

    def clean(self) -> None:
        """Delete all saved states of a finished run but the last; the best parameters have a file of their own."""
        if self.world.is_main:
            ckpt.prune(self.folder / "checkpoints", keep=1)


def _truncate_metrics(path: Path, step: int) -> None:
    """Drop records of steps after `step`: the resumed run makes them again."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))
