"""Stage 3: trains a configuration on a dump directory and leaves a model folder."""

from __future__ import annotations

import contextlib
import errno
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from speechllm.config import load as configs
from speechllm.config.schema import CtcProjector
from speechllm.errors import ConfigError, DataError, Stopped, is_out_of_memory, shown
from speechllm.folders import only_writer
from speechllm.model import hub
from speechllm.model.assemble import (
    CONFIG_FILE,
    MODEL_FILE,
    PROVENANCE_FILE,
    TRAINED_FILE,
    assemble,
    origin_of,
    save_model,
)
from speechllm.model.lm import context_length
from speechllm.model.projector import CtcBridge
from speechllm.model.state import check_keys, load_tensors
from speechllm.runtime import (
    computes_bfloat16,
    derive_seed,
    device_name,
    pick_device,
    provenance,
    read_json,
    write_json,
    write_text,
)
from speechllm.train import distributed
from speechllm.train.checkpoint import BEST
from speechllm.train.probe import check_memory
from speechllm.train.sets import open_sets
from speechllm.train.sharded import blocks_of, shard_blocks
from speechllm.train.tasks import CtcTask, Features, SpeechTask, uses_autocast
from speechllm.train.trainer import Loop, LoopOptions, Progress, stopped_by_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from speechllm.config.schema import Config
    from speechllm.model.assemble import Origin
    from speechllm.model.speechllm import SpeechLlm
    from speechllm.train.distributed import World
    from speechllm.train.sets import AnySet, Opened
    from speechllm.train.tasks import Measure

    Decode = Callable[[SpeechLlm, Features, Sequence[str]], Mapping[str, str]]

log = logging.getLogger(__name__)

CTC_DECAY = 0.01
CTC_CLIP = 5.0
HEAD = "ctc"  # folder of the head's own training
RECORD = "train.json"
FREE = ("decode.", "heads.", "device", "train.checkpointing")  # settings that may change meanwhile: the bits stay
MINUTES = "minutes"  # of the CTC head's training; written when it is done


def train(config: Config, train_dir: Path, valid_dir: Path, exp: Path, decode: Decode, measure: Measure) -> None:
    """Train `config` and leave the best model in ``exp/model``; goes on where an earlier run stopped.

    Raises:
        UserError: configuration, data or base models are at fault, or `exp` belongs to another run.
        Stopped: SIGTERM or SIGUSR1 came; the state is saved.
        ConnectionAbortedError: another process of the run is gone.
    """
    with stopped_by_signals():
        _run(config, (train_dir, valid_dir), exp, (decode, measure))


def _run(config: Config, data: tuple[Path, Path], exp: Path, tools: tuple[Decode, Measure]) -> None:
    world = distributed.join()
    if world.size > config.train.accumulate:
        what = f"is {config.train.accumulate}, too few batches a step for {world.size} processes"
        raise ConfigError("train.accumulate", what, "raise it, or use fewer processes")
    try:
        with only_writer(exp) if world.is_main else contextlib.nullcontext():
            opened = open_sets(config, *data)
            if not world.from_main(_claim(config, opened, exp) if world.is_main else False):
                log.info("train done already exp=%s", exp)
                return
            _train(config, opened, exp, tools, world)
    except RuntimeError as error:
        if world.size == 1 or not distributed.is_bereft(error):
            raise
        what = "another process of this run has ended"
        raise ConnectionAbortedError(errno.ECONNABORTED, what, str(exp)) from error
    finally:
        distributed.leave()


def _train(config: Config, opened: Opened, exp: Path, tools: tuple[Decode, Measure], world: World) -> None:
    decode, measure = tools
    texts = [example.text for example in opened.train.examples.values()]
    origin = origin_of(config, opened.width_h, opened.encoder_fingerprint, texts)
    model = _model(config, origin, opened, world)
    world = replace(world, lockstep=config.train.shard and world.size > 1)
    features = Features(config, opened.train, opened.valid, model.lm.model.device, model.encoder)
    _drop_long(config, opened.train, model, exp if world.is_main else None)
    if isinstance(model.projector, CtcBridge):
        _train_head(features, model.projector, exp / HEAD, measure, world)
    task = SpeechTask(features, model, lambda ids: decode(model, features, ids), measure)
    log.info("train utts=%d batches=%d", len(opened.train.examples), len(task.batches(0)))
    loop = Loop(task, _loop_options(config), exp, world)
    check_memory(task, world)
    progress = _run_in_memory(loop, "" if config.train.checkpointing else " or set train.checkpointing to true")
    if world.is_main:
        (exp / "model").mkdir(exist_ok=True)
        _write_provenance(model, exp, progress, opened, world)
        save_model(exp / "model", model, config, origin)
    loop.clean()


def _run_in_memory(loop: Loop[Any], less: str = "") -> Progress:
    """Run a loop to its end; `less` says what would take less memory.

    Raises:
        ConfigError: there is no more memory in a step or in validation.
    """
    try:
        return loop.run()
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        what = f"there is no more in step {loop.progress.step + 1} of {loop.task.name} ({shown(error)})"
        fix = f"free some{less}, and run again: it goes on from the last saved state"
        raise ConfigError("memory", what, fix) from error


def _model(config: Config, origin: Origin, opened: Opened, world: World) -> SpeechLlm:
    """Return the untrained model as it is trained."""
    if not config.train.shard:
        return _prepared(config, assemble(config, origin, _training_dtype(config), opened.encoder))
    # a model that no card holds is put together on the host
    on_host = config.model_copy(update={"device": "cpu"})
    model = assemble(on_host, origin, _training_dtype(config), opened.encoder)
    device = pick_device(config.device)
    shard_blocks(model.lm, device, world)
    model.projector.to(device)
    return _prepared(config, model)


def _prepared(config: Config, model: SpeechLlm) -> SpeechLlm:
    """Return the model with the blocks of its language model computed twice, or compiled, as configured."""
    blocks = blocks_of(model.lm.model.base_model) if config.train.checkpointing or config.train.compile else []
    for block in blocks:
        if config.train.checkpointing:
            _compute_twice(block)
        if config.train.compile:
            block.compile(dynamic=True)
    return model


def _compute_twice(block: nn.Module) -> None:
    """Let a block keep its input alone for the backward pass; transformers' switch for it changes its name in 5.x."""
    inner: Callable[..., Tensor] = block.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if not (block.training and torch.is_grad_enabled()):
            return inner(*args, **kwargs)
        states: Tensor = checkpoint(inner, *args, use_reentrant=False, **kwargs)
        return states

    block.forward = forward  # a wrapping module would change the names of the weights


def _training_dtype(config: Config) -> str:
    """Return the precision of the weights; where they are trained it is float32, else a step would round away."""
    if config.lm.train:
        return "float32"
    if config.lm.dtype != "auto":
        return config.lm.dtype
    return "bfloat16" if computes_bfloat16(pick_device(config.device)) else "float32"


def _write_provenance(model: SpeechLlm, exp: Path, progress: Progress, opened: Opened, world: World) -> None:
    """Write what the run took and made; the CTC head is trained too, though not by the last loop."""
    device = model.lm.model.device
    head = exp / HEAD / MINUTES
    head_minutes = float(head.read_text(encoding="utf-8")) if head.is_file() else 0.0
    content = {
        "minutes": progress.seconds / 60 + head_minutes,
        "best_step": progress.best_step,
        "trainable": sum(value.numel() for value in model.trainable_state().values()),
        "device": device_name(device),
        "processes": world.size,
        "trained_on": {
            "training set": opened.train.folder.name,
            "training utterances": len(opened.train.examples),
            "training hours": round(sum(one.duration_s for one in opened.train.examples.values()) / 3600, 2),
            "training data": opened.train_data,
        },
    }
    write_json(exp / "model" / PROVENANCE_FILE, provenance(content))


def _claim(config: Config, opened: Opened, exp: Path) -> bool:
    """Note what this run is, and return whether there is anything to train.

    A folder of another configuration or of other data is refused.
    """
    record = {
        "training data": opened.train_data,
        "validation data": opened.valid_data,
        "encoder": opened.encoder_fingerprint,
        "language model": hub.resolve(config.lm.name, config.lm.revision).fingerprint,
        "precision": _training_dtype(config) + (" with bfloat16 products" if uses_autocast(config) else ""),
    }
    _refuse_other_run(config, record, exp)
    configs.dump(config, exp / CONFIG_FILE)
    write_json(exp / RECORD, record)
    if not all((exp / "model" / name).is_file() for name in (MODEL_FILE, TRAINED_FILE)):
        return True
    configs.dump(config, exp / "model" / CONFIG_FILE)  # how to decode may have changed since
    return False


def _refuse_other_run(config: Config, record: Mapping[str, object], exp: Path) -> None:
    if not _has_begun(exp):  # refused before its first step, say, and mended since
        return
    fix = "choose another --exp, or remove this folder to start over"
    if (exp / CONFIG_FILE).is_file():
        changed = configs.differences(configs.load(exp / CONFIG_FILE), config)
        changed = [line for line in changed if not line.startswith(FREE)]
        if changed:
            raise ConfigError(exp, f"was started with another configuration ({', '.join(changed)})", fix)
    if (exp / RECORD).is_file():
        old = read_json(exp / RECORD)
        for key, value in record.items():
            if old.get(key) != value:
                raise ConfigError(exp, f"was started with another {key} ({old.get(key)}, now {value})", fix)


def _has_begun(exp: Path) -> bool:
    """Return whether a folder holds anything that was trained."""
    states = any(list((folder / "checkpoints").glob("step_*")) for folder in (exp, exp / HEAD))
    return states or (exp / HEAD / MINUTES).is_file() or (exp / "model" / MODEL_FILE).is_file()


def _drop_long(config: Config, train_set: AnySet, model: SpeechLlm, exp: Path | None) -> None:
    """Take out training utterances that do not fit the context, list them, and refuse too many."""
    limit = context_length(model.lm)
    dropped = []
    for example in list(train_set.examples.values()):
        tokens = model.expected_positions(example.num_frames, example.text)
        if tokens > limit or not example.text:
            reason = f"{tokens} tokens, the context holds {limit}" if example.text else "empty transcript"
            dropped.append(f"{example.utt_id}\t{reason}\n")
            del train_set.examples[example.utt_id]
    if exp is not None:
        write_text(exp / "dropped.tsv", "utt_id\treason\n" + "".join(dropped))
    total = len(train_set.examples) + len(dropped)
    if len(dropped) > config.train.max_dropped * total:
        what = f"{len(dropped)} of {total} training utterances do not fit, first {dropped[0].rstrip()}"
        raise DataError(train_set.folder, what, "cut them with segments, or raise train.max_dropped")


def _train_head(features: Features, projector: CtcBridge, folder: Path, measure: Measure, world: World) -> None:
    config = features.config.projector
    assert isinstance(config, CtcProjector)
    if (folder / MINUTES).is_file():
        found = load_tensors(folder / BEST)
        check_keys(folder / BEST, found, projector.head.state_dict())
        projector.head.load_state_dict(found)
        return
    task = CtcTask(features, projector, config, measure)
    torch.manual_seed(derive_seed("ctc weights", features.config.seed))
    per_epoch = len(task.batches(0))
    options = LoopOptions(
        epochs=config.epochs,
        accumulate=1,
        warmup=0.1,
        weight_decay=CTC_DECAY,
        clip_norm=CTC_CLIP,
        validate_every=per_epoch,
        save_every=per_epoch,
    )
    loop = Loop(task, options, folder, world)
    progress = _run_in_memory(loop)
    if world.is_main:
        write_text(folder / MINUTES, f"{progress.seconds / 60:.2f}\n")
    loop.clean()
    if loop.stop_requested:  # in its last step, which ended it; the long part of the run is still to come
        raise Stopped("the CTC head is trained; run again to go on")


def _loop_options(config: Config) -> LoopOptions:
    train = config.train
    return LoopOptions(
        epochs=train.epochs,
        accumulate=train.accumulate,
        warmup=train.warmup,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        validate_every=train.validate_every,
        save_every=train.save_every,
        patience=train.patience,
        average=train.average,
        average_of=train.average_of,
    )
