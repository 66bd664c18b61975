"""Adds CTC heads to a trained model's folder: kana where its bridge has none, and the language model's tokens.

Both learn from stored features alone; the model itself is not even loaded.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from speechllm.config import load as configs
from speechllm.config.schema import AugmentConfig
from speechllm.errors import ConfigError, ModelError, Stopped
from speechllm.folders import begin, finish, is_made, only_writer
from speechllm.model.assemble import CONFIG_FILE, TRAINED_FILE, find_lm, read_model, tokenizer_of
from speechllm.model.ctc import KANA, best_path, targets_of
from speechllm.model.heads import HEADS_RECORD, frames_record, new_heads, save_heads
from speechllm.runtime import derive_seed, pick_device, sha256
from speechllm.score.errors import count_edits, sum_counts
from speechllm.text import prompt as prompts
from speechllm.text.reading import katakana_reading
from speechllm.train.sets import open_sets
from speechllm.train.task import Sample, Validation
from speechllm.train.tasks import AnyHeadTask, Features
from speechllm.train.trainer import Loop, LoopOptions, stopped_by_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from speechllm.config.schema import Config, HeadsConfig
    from speechllm.model.assemble import Origin
    from speechllm.model.ctc import CtcHead
    from speechllm.train.sets import Opened

log = logging.getLogger(__name__)

FOLDER = "heads"
"""Below the experiment: the states of the heads' training."""
RECORD = "made.json"
DECAY, CLIP, WARMUP = 0.01, 5.0, 0.1


class HeadTask(AnyHeadTask):
    """Trains one head to read the symbols of the transcripts."""

    def __init__(self, name: str, head: CtcHead, features: Features, spell: Spelling, settings: HeadsConfig) -> None:
        """Spell every transcript once."""
        self.name, self.spelling = f"{name}_head", spell
        symbols = {key: spell.symbols(text) for key, text in features.texts().items()}
        super().__init__(features, head, settings, symbols)

    def validate(self) -> Validation:
        """Return loss a symbol and the error rate of the best path over the whole validation set."""
        loss, heard = self.listen(best_path)
        counts = sum_counts(count_edits(self.targets[key], path) for key, path in heard.items())
        error = counts.edits / max(1, counts.ref)
        spell = self.spelling.text
        samples = [Sample(key, spell(self.targets[key]), spell(path)) for key, path in heard.items()]
        return Validation({"loss": loss, "error": error, "score": error}, samples)


class Spelling:
    """The two directions between a text and the symbols of a head."""

    def __init__(self, symbols: Callable[[str], list[int]], text: Callable[[Sequence[int]], str]) -> None:
        """Keep both."""
        self.symbols, self.text = symbols, text


KANA_SPELLING = Spelling(
    lambda text: targets_of(katakana_reading(text)), lambda path: "".join(KANA[symbol - 1] for symbol in path)
)


def token_spelling(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> Spelling:
    """Return how a text is spelled in those of the language model's tokens; others are left out."""
    symbol_of = {token: symbol for symbol, token in enumerate(token_ids, start=1)}
    return Spelling(
        lambda text: [symbol_of[token] for token in prompts.encode(tokenizer, text) if token in symbol_of],
        lambda path: str(tokenizer.decode([token_ids[symbol - 1] for symbol in path])),
    )


def train_heads(exp: Path, train_dir: Path, valid_dir: Path, changes: tuple[str, ...] = ()) -> bool:
    """Train the heads of the model in ``exp/model`` on two dumps; return whether there was anything to do.

    `changes` are ``heads.key=value``. A killed run goes on where it was.

    Raises:
        UserError: the folder holds no model, the dumps are not of its encoder, or other heads were begun here.
        Stopped: SIGTERM or SIGUSR1 came; the state is saved.
    """
    folder = exp / "model"
    config, origin = read_model(folder)
    settings = configs.load(folder / CONFIG_FILE, changes).heads
    _check_changes(changes)
    with stopped_by_signals(), only_writer(exp):
        opened = _open(config, origin, train_dir, valid_dir)
        tokenizer = tokenizer_of(find_lm(config, origin), origin)
        record = {
            "model": sha256(folder / TRAINED_FILE),
            "settings": settings.model_dump(mode="json"),
            "training data": opened.train_data,
            "validation data": opened.valid_data,
        }
        if is_made(exp / FOLDER / RECORD, record) and (folder / HEADS_RECORD).is_file():
            log.info("heads done already exp=%s", exp)
            return False
        begin(exp / FOLDER / RECORD, record)
        _train(config, settings, opened, tokenizer, exp)
        finish(exp / FOLDER / RECORD)
    return True


def _check_changes(changes: Sequence[str]) -> None:
    for change in changes:
        if not change.startswith("heads."):
            raise ConfigError("--set", f"{change} is of the model, which is trained", "change heads.* alone")


def _open(config: Config, origin: Origin, train_dir: Path, valid_dir: Path) -> Opened:
    """Return the two dumps, which must be of the model's encoder."""
    if config.encoder.train:
        what = "its encoder was trained, and reads sounds in every step"
        raise ConfigError("heads", what, "heads are for models on stored features")
    for folder in (train_dir, valid_dir):
        if not (folder / "feats.scp").is_file():
            raise ConfigError(folder, "holds no features (feats.scp is missing)", "name a dump (stage 2)")
    # what changes sounds has no part in stored features
    plain = AugmentConfig.model_validate(
        {**config.train.augment.model_dump(), "speeds": (), "noise_dir": None, "reverb_dir": None}
    )
    train = config.train.model_copy(update={"augment": plain})
    opened = open_sets(config.model_copy(update={"train": train}), train_dir, valid_dir)
    if opened.encoder_fingerprint != origin.encoder_fingerprint:
        what = f"was dumped with encoder {opened.encoder_fingerprint}, the model has {origin.encoder_fingerprint}"
        raise ModelError(train_dir, what, "run stage 2 with the model's encoder")
    if opened.width_h != origin.width_h:
        what = f"holds features of {opened.width_h} channels, the model reads {origin.width_h}"
        raise ModelError(train_dir, what, "run stage 2 with the model's encoder")
    return opened


def _train(
    config: Config, settings: HeadsConfig, opened: Opened, tokenizer: PreTrainedTokenizerBase, exp: Path
) -> None:
    device = pick_device(config.device)
    features = Features(config, opened.train, opened.valid, device)
    texts = [example.text for example in opened.train.examples.values()]
    used = sorted({token for text in texts for token in prompts.encode(tokenizer, text)}) if settings.tokens else []
    torch.manual_seed(derive_seed("heads", config.seed))
    heads = new_heads(settings, opened.width_h, used, kana=config.projector.kind != "ctc")
    spellings = {"kana": KANA_SPELLING, "tokens": token_spelling(tokenizer, used)}
    for name, head in heads.parts().items():
        task = HeadTask(name, head.to(device), features, spellings[name], settings)
        _run(task, exp / FOLDER / name)
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(used)]
    save_heads(exp / "model", heads, settings, frames_record(*read_model(exp / "model")), tokens)


def _run(task: HeadTask, folder: Path) -> None:
    per_epoch = len(task.batches(0))
    options = LoopOptions(
        epochs=task.settings.epochs,
        accumulate=1,
        warmup=WARMUP,
        weight_decay=DECAY,
        clip_norm=CLIP,
        validate_every=per_epoch,
        save_every=per_epoch,
    )
    loop = Loop(task, options, folder)
    progress = loop.run()
    loop.clean()
    log.info("%s minutes=%.2f error=%.4f", task.name, progress.seconds / 60, progress.best)
    if loop.stop_requested:  # in its last step, which ended it
        raise Stopped(f"the {task.name} is trained; run again to go on")
