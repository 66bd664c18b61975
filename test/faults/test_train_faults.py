"""What befalls a training from outside: damaged states, a full disk, changed inputs, numbers that are none.

Each fault is real and met through the command line. What is asserted: the exit status, the line that a user reads,
what is left on disk, and that the same command then ends in the bits of a run that nothing disturbed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faulty
import numpy as np
import pytest
import tiny
from faulty import Setting, Trap
from safetensors.torch import load_file, save_file
from scenes import Disk, Limit, assert_refused, flip, mounted, snapshot

from speechllm.config import load as configs
from speechllm.data import kaldi
from speechllm.errors import EXIT_STOPPED, EXIT_USER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

LENGTHS = {f"u{number}": 8_000 + 1_500 * number for number in range(7)}
CALM = {"peak_lr": 1e-2, "lora_lr": 1e-2}
TRAIN = {
    **CALM,
    "epochs": 4,
    "batch_tokens": 55,
    "packing": True,
    "warmup": 0.4,
    "validate_every": 3,
    "valid_utts": 2,
    "save_every": 2,
}
FIELDS = {
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.2},
    "projector": {"kind": "conv_mlp", "hidden": 256},
    "train": TRAIN,
    "decode": {"tokens_per_s": 1, "extra_tokens": 4},
}
HEAD = {"kind": "ctc", "hidden": 8, "epochs": 2, "batch_frames": 80}
FINGERPRINTS = r"\([0-9a-f]{16}, now [0-9a-f]{16}\)"
ANOTHER_EXP = "choose another --exp, or remove this folder to start over"
STATE_FILES = ("trainable.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed."""

    setting: Setting
    exp: Path

    def goes_on_to_the_same(self, exp: Path, setting: Setting | None = None) -> None:
        done = (setting or self.setting).run(exp)
        assert done.status == 0, done.output
        faulty.assert_same(exp, self.exp, exp.name)


def run_whole(setting: Setting) -> Whole:
    done = setting.run(setting.folder / "whole")
    assert done.status == 0, done.output
    return Whole(setting, setting.folder / "whole")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return a run of projector and adapter."""
    return run_whole(faulty.make(tmp_path_factory.mktemp("plain"), LENGTHS, **FIELDS))


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return a run that trains a CTC head before."""
    return run_whole(faulty.make(tmp_path_factory.mktemp("headed"), LENGTHS, **{**FIELDS, "projector": HEAD}))


@pytest.fixture(scope="module")
def broken(plain: Whole) -> Path:
    """Return an experiment that was killed in step 6, with the states of steps 2 and 4."""
    exp = plain.setting.folder / "broken"
    ended = plain.setting.run(exp, trap=Trap(signal.SIGKILL, file=r"/checkpoints/\.step_0000006"))
    assert ended.status == -signal.SIGKILL, ended.output
    for begun in exp.glob("checkpoints/.step_*"):
        shutil.rmtree(begun)
    assert [path.name for path in faulty.states(exp)] == ["step_0000002", "step_0000004"]
    return exp


@pytest.fixture
def exp(broken: Path, tmp_path: Path) -> Path:
    """Return a copy of `broken` that a test may change."""
    shutil.copytree(broken, tmp_path / "exp")
    return tmp_path / "exp"


# Damaged states


def tell_another_step(path: Path) -> None:
    """Change one bit of the step that a state is of."""
    path.write_bytes(path.read_bytes().replace(b'"step": 4', b'"step": 5'))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


DAMAGES = [
    *((name, flip) for name in STATE_FILES[:2]),
    ("state.json", tell_another_step),
    ("trainable.safetensors", cut),
    ("optimizer.safetensors", empty),
    ("state.json", empty),
    ("trainable.safetensors", remove),
    ("state.json", remove),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=lambda part: getattr(part, "__name__", part))
def test_31_a_damaged_newest_state_is_named_and_the_older_one_used(
    plain: Whole, exp: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(exp / "checkpoints/step_0000004" / name)
    done = plain.setting.run(exp)
    assert done.status == 0, done.output
    skipped = [line for line in done.output.splitlines() if "checkpoint skipped" in line]
    assert len(skipped) == 1, done.output
    assert f"{exp}/checkpoints/step_0000004/{name}: " in skipped[0]
    assert "speech resumed step=2 of=" in done.output
    faulty.assert_same(exp, plain.exp, name)


def test_31_where_all_states_are_damaged_nothing_is_begun_anew(plain: Whole, exp: Path) -> None:
    for state, damage in zip(faulty.states(exp), (flip, empty), strict=True):
        damage(state / "optimizer.safetensors")
    before = snapshot(exp)
    line = f"error: {exp}/checkpoints: holds saved states, none of them whole; remove the folder to start over"
    ended = plain.setting.run(exp)
    assert_refused(ended, re.escape(line))
    assert ended.output.count("checkpoint skipped") == 2
    assert snapshot(exp) == before


# A full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk | Limit]:
    folder = tmp_path / "disk"
    with mounted(folder, "size=4m") as done:
        yield Disk(folder) if done else Limit(folder)


FULL = {
    "state": (
        Trap(0, file=r"/checkpoints/\.step_0000006"),
        r"checkpoints/\.step_0000006\.\d+\.tmp/trainable\.safetensors",
    ),
    "best": (Trap(0, call=r"speechllm/model/state\.py:save_tensors"), r"\.best\.safetensors\.tmp"),
    "model": (Trap(0, file=r"/model$"), r"model/\.\S+\.tmp"),
}


@pytest.mark.parametrize(("trap", "file"), FULL.values(), ids=FULL)
def test_30_a_full_disk_is_told_and_costs_nothing(
    plain: Whole, tmp_path: Path, disk: Disk | Limit, trap: Trap, file: str
) -> None:
    exp = disk.folder / "exp"
    options = ("--set", "train.save_every=100") if "best" in file else ()
    running = plain.setting.start(exp, *options, log=tmp_path / "log", trap=replace(trap, number=signal.SIGSTOP))
    running.wait_until_held()
    before = {state.name: snapshot(state) for state in faulty.states(exp)}
    told = disk.fill(running)
    running.strike(signal.SIGCONT)
    line = rf"error: {re.escape(str(exp))}/{file}: {told}; make room and run again: what was there before still stands"
    assert_refused(running.wait(), line)
    assert {state.name: snapshot(state) for state in faulty.states(exp)} == before
    assert not faulty.leftovers(exp / "checkpoints")
    disk.make_room()
    done = plain.setting.run(exp, *options, log=tmp_path / "log")
    assert done.status == 0, done.output
    faulty.assert_same(exp, plain.exp, file, faulty.RESULTS)


# Another configuration, other models, other data


def test_32_another_configuration_is_refused_with_the_difference(plain: Whole, exp: Path) -> None:
    before = snapshot(exp)
    ended = plain.setting.run(exp, "--set", "train.peak_lr=0.5", "--set", "lora.rank=8")
    changes = "lora.rank: 4 -> 8, train.peak_lr: 0.01 -> 0.5"
    line = f"error: {exp}: was started with another configuration ({changes}); {ANOTHER_EXP}"
    assert_refused(ended, re.escape(line))
    assert snapshot(exp) == before


def last_byte_changed(path: Path) -> bytes:
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    return bytes(blob)


def another_word(path: Path) -> bytes:
    return path.read_text(encoding="utf-8").replace("天気", "元気").encode()


CHANGES: Mapping[str, tuple[str, Callable[[Path], bytes], str]] = {
    "language-model": ("lm/model.safetensors", last_byte_changed, "language model"),
    "encoder": ("encoder/model.safetensors", last_byte_changed, "encoder"),
    "transcript": ("train/data/text", another_word, "training data"),
    "sound": ("train/wav/u3.wav", last_byte_changed, "training data"),
    "validation-transcript": ("valid/data/text", another_word, "validation data"),
    "validation-sound": ("valid/wav/u1.wav", last_byte_changed, "validation data"),
}


@pytest.mark.parametrize(("name", "change", "what"), CHANGES.values(), ids=CHANGES)
def test_32_other_models_or_data_are_refused_and_nothing_is_touched(
    plain: Whole, exp: Path, name: str, change: Callable[[Path], bytes], what: str
) -> None:
    before = snapshot(exp)
    path = plain.setting.folder / name
    with faulty.changed(path, change(path)):
        ended = plain.setting.run(exp)
    said = rf"was started with another {what} {FINGERPRINTS}; {ANOTHER_EXP}"
    assert_refused(ended, rf"error: {re.escape(str(exp))}: {said}")
    assert snapshot(exp) == before


def test_32_what_was_refused_goes_on_once_all_is_as_it_was(plain: Whole, exp: Path) -> None:
    assert plain.setting.run(exp, "--set", "seed=9").status == EXIT_USER
    plain.goes_on_to_the_same(exp)


def test_a_second_training_in_one_folder_is_refused_and_the_first_goes_on(plain: Whole, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    first = plain.setting.start(exp, trap=Trap(signal.SIGSTOP, file=r"/checkpoints/\.step_0000002"))
    first.wait_until_held()
    second = plain.setting.run(exp, log=tmp_path / "second.log")
    assert_refused(second, re.escape(f"error: {exp}: another process is writing here; wait for it to end"))
    first.strike(signal.SIGCONT)
    assert first.wait().status == 0
    faulty.assert_same(exp, plain.exp, "first")


# A folder that cannot be written


def test_a_folder_below_a_file_is_refused(plain: Whole, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    exp = tmp_path / "file" / "exp"
    ended = plain.setting.run(exp, log=tmp_path / "log")
    assert_refused(ended, re.escape(f"error: {exp}: Not a directory; mend it and run again"))


def test_a_folder_that_may_not_be_written_is_refused(plain: Whole, tmp_path: Path) -> None:
    with mounted(tmp_path / "locked", "ro") as done:
        exp, told = tmp_path / "locked/exp", "Read-only file system"
        if not done and os.geteuid():
            exp.parent.chmod(0o555)
            told = "Permission denied"
        elif not done:  # root may write everywhere else
            exp, told = Path("/proc/exp"), "No such file or directory"
        ended = plain.setting.run(exp, log=tmp_path / "log")
    assert_refused(ended, re.escape(f"error: {exp}: {told}; mend it and run again"))


# Numbers that are none


@pytest.fixture(scope="module")
def stored(plain: Whole) -> Setting:
    """Return the same setting with its features stored."""
    setting = plain.setting
    dumps = {name: setting.folder / f"stored-{name}" for name in ("train", "valid")}
    for name, out in dumps.items():
        data = getattr(setting, name)
        arguments = ["dump", "--conf", str(setting.conf), "--data", str(data), "--out", str(out)]
        done = faulty.start(arguments, setting.folder / "dump.log").wait()
        assert done.status == 0, done.output
    stored = replace(setting, train=dumps["train"], valid=dumps["valid"])
    assert stored.run(setting.folder / "whole-stored").status == 0
    return stored


def place_of(stored: Setting, utt_id: str) -> tuple[Path, int]:
    """Return the archive of an utterance's features and where in it they stand."""
    ark, _, offset = kaldi.read_table(stored.train / "feats.scp")[utt_id].partition(":")
    return stored.train / ark, int(offset)


def test_33_a_stored_feature_that_is_no_number_is_refused_by_name(stored: Setting, tmp_path: Path) -> None:
    """Its checksum would tell first; dumps of before there were any have none."""
    path, offset = place_of(stored, "u3")
    blob = bytearray(path.read_bytes())
    begin = blob.index(b"\n", offset) + 1
    blob[begin + 40 : begin + 42] = np.float16(np.nan).tobytes()
    sums, aside = stored.train / "utt2crc", tmp_path / "utt2crc"
    sums.rename(aside)
    with faulty.changed(path, bytes(blob)):
        ended = stored.run(tmp_path / "exp")
    aside.rename(sums)
    what = "u3 holds values that are NaN or infinite"
    assert_refused(ended, rf"error: {re.escape(str(path))}:{offset}: {what}; run stage 2 again")
    assert not (tmp_path / "exp/model").exists()
    Whole(stored, stored.folder / "whole-stored").goes_on_to_the_same(tmp_path / "exp")


def poisoned(folder: Path, texts: Mapping[str, str], **train: Any) -> Setting:
    """Return a setting whose language model has no numbers for what stands in `TEXTS[3]` alone, in batches of one."""
    setting = faulty.make(folder, LENGTHS, **{**FIELDS, "train": {**TRAIN, "batch_tokens": 1, **train}})
    kaldi.write_table(setting.train / "text", texts)
    weights = load_file(setting.folder / "lm/model.safetensors")
    weights["model.embed_tokens.weight"][sorted(ids([tiny.TEXTS[3]]) - ids([*tiny.TEXTS[:3], tiny.PROMPT]))] = math.nan
    save_file(weights, setting.folder / "lm/model.safetensors", metadata={"format": "pt"})
    return setting


def ids(texts: Sequence[str]) -> set[int]:
    return {one for text in texts for one in tiny.tokenizer()(text)["input_ids"]}


def test_33_a_step_that_is_no_number_is_skipped_and_its_batch_named(tmp_path: Path) -> None:
    texts = {key: tiny.TEXTS[3 if key == "u4" else number % 3] for number, key in enumerate(LENGTHS)}
    setting = poisoned(tmp_path, texts)
    done = setting.run(tmp_path / "exp")
    assert done.status == 0, done.output
    skipped = [line for line in done.output.splitlines() if " skipped: loss nan, gradient nan" in line]
    assert len(skipped) == TRAIN["epochs"]
    assert all(line.endswith("batches beginning u4") for line in skipped), skipped
    lines = (tmp_path / "exp/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]
    assert losses.count(None) == len(skipped)
    assert len(losses) == len(LENGTHS) * 4
    trained = load_file(tmp_path / "exp/model/trained.safetensors")
    assert all(value.isfinite().all() for value in trained.values())


def test_33_a_signal_within_skipped_steps_changes_nothing(tmp_path: Path) -> None:
    """The count of bad steps in a row is part of the state."""
    setting = poisoned(tmp_path, dict.fromkeys(LENGTHS, tiny.TEXTS[3]))
    whole = setting.run(tmp_path / "whole")
    trap = Trap(signal.SIGTERM, call=r"torch/_tensor\.py:backward", nth=3)
    assert setting.run(tmp_path / "exp", trap=trap).status == EXIT_STOPPED
    again = setting.run(tmp_path / "exp")
    line = r": 5 steps in a row were not finite, the last at (.+); lower the learning rate or look at these utterances"
    for ended, exp in ((whole, "whole"), (again, "exp")):
        assert_refused(ended, re.escape(f"error: {tmp_path}/{exp}") + line)
    assert whole.errors[0].partition("whole")[2] == again.errors[0].partition("exp")[2]
    assert not (tmp_path / "exp/model").exists()


def test_33_a_learning_rate_without_measure_ends_in_one_line(plain: Whole, tmp_path: Path) -> None:
    ended = plain.setting.run(tmp_path / "exp", "--set", "train.peak_lr=1e+30", "--set", "train.warmup=0")
    line = r": 5 steps in a row were not finite, the last at .+; lower the learning rate or look at these utterances"
    assert_refused(ended, re.escape(f"error: {tmp_path}/exp") + line)


# What a batch holds


def losses(exp: Path) -> list[float]:
    lines = (exp / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines)]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_36_batches_summed_into_a_step_are_one_large_batch(tmp_path: Path, *, packing: bool) -> None:
    """A step is an epoch here, so that what is summed is the same whatever the batches are."""
    train = {**TRAIN, "epochs": 6, "accumulate": 100, "packing": packing}
    lora = {"rank": 4, "alpha": 8}
    setting = faulty.make(tmp_path, LENGTHS, **{**FIELDS, "train": train, "lora": lora})
    summed, large = tmp_path / "summed", tmp_path / "large"
    assert setting.run(summed).status == 0
    assert setting.run(large, "--set", "train.batch_tokens=100000").status == 0
    assert len(losses(summed)) == 6 + 2
    assert losses(summed) == pytest.approx(losses(large), rel=1e-5)
    assert losses(summed)[0] > losses(summed)[-1]


AUGMENTED = ("augment.speeds=[0.9, 1.0, 1.1]", "augment.time_masks=2", "augment.noise=0.2")


def test_37_sounds_changed_while_training_are_the_same_after_a_kill(plain: Whole, tmp_path: Path) -> None:
    """A change is a function of seed, epoch and utterance, so what a run that goes on hears is what it would have."""
    options = [part for one in AUGMENTED for part in ("--set", f"train.{one}")]
    whole, exp = tmp_path / "whole", tmp_path / "exp"
    assert plain.setting.run(whole, *options).status == 0
    trap = Trap(signal.SIGKILL, file=r"/checkpoints/\.step_0000006")
    assert plain.setting.run(exp, *options, trap=trap).status == -signal.SIGKILL
    done = plain.setting.run(exp, *options)
    assert done.status == 0, done.output
    assert "speech resumed step=4 of=" in done.output
    faulty.assert_same(exp, whole, "augmented")
    assert losses(whole)[0] != losses(plain.exp)[0]  # they were changed


def rewritten(setting: Setting, folder: Path, texts: Mapping[str, str], *, valid: bool = False) -> Setting:
    """Return a setting with other transcripts of the same sounds."""
    side = "valid" if valid else "train"
    copy = folder / f"{side}-rewritten"
    shutil.copytree(getattr(setting, side), copy)
    kaldi.write_table(copy / "text", {**kaldi.read_table(copy / "text"), **texts})
    return replace(setting, valid=copy) if valid else replace(setting, train=copy)


def test_19_an_empty_transcript_is_refused_unless_it_may_be_dropped(plain: Whole, tmp_path: Path) -> None:
    setting = rewritten(plain.setting, tmp_path, {"u3": ""})
    what = "1 of 7 training utterances do not fit, first u3 empty transcript"
    line = f"error: {setting.train}: {what}; cut them with segments, or raise train.max_dropped"
    assert_refused(setting.run(tmp_path / "exp"), re.escape(line))
    done = setting.run(tmp_path / "exp", "--set", "train.max_dropped=0.2")  # as the line told
    assert done.status == 0, done.output
    assert (tmp_path / "exp/dropped.tsv").read_text(encoding="utf-8") == "utt_id\treason\nu3\tempty transcript\n"


def test_19_a_transcript_longer_than_the_context_is_told_and_never_cut(plain: Whole, tmp_path: Path) -> None:
    setting = rewritten(plain.setting, tmp_path, {"u3": "。".join(tiny.TEXTS[:4] * 12)})
    what = r"1 of 7 training utterances do not fit, first u3 \d+ tokens, the context holds 256"
    line = rf"error: {re.escape(str(setting.train))}: {what}; cut them with segments, or raise train\.max_dropped"
    assert_refused(setting.run(tmp_path / "exp"), line)
    dropped = (tmp_path / "exp/dropped.tsv").read_text(encoding="utf-8").splitlines()
    assert [one.partition("\t")[0] for one in dropped] == ["utt_id", "u3"]
    assert not (tmp_path / "exp/model").exists()


def test_a_dropped_utterance_is_as_if_it_had_never_been(plain: Whole, tmp_path: Path) -> None:
    setting = rewritten(plain.setting, tmp_path, {"u3": ""})
    without = replace(setting, train=tmp_path / "without")
    kept = {key: utt for key, utt in kaldi.load(plain.setting.train).utterances.items() if key != "u3"}
    kaldi.write_dir(without.train, kept.values())
    for one, exp in ((setting, "exp-dropped"), (without, "exp-without")):
        done = one.run(tmp_path / exp, "--set", "train.max_dropped=0.2")
        assert done.status == 0, done.output
    trained = [(tmp_path / exp / "model/trained.safetensors").read_bytes() for exp in ("exp-dropped", "exp-without")]
    assert trained[0] == trained[1]


def test_35_a_batch_without_a_label_is_no_fault(headed: Whole, tmp_path: Path) -> None:
    """A full stop has no reading, so that the head's batch of it alone has nothing to learn."""
    config = configs.load(headed.setting.conf, ("projector.batch_frames=1",))
    configs.dump(config, tmp_path / "conf.yaml")
    setting = replace(rewritten(headed.setting, tmp_path, {"u3": "。"}), conf=tmp_path / "conf.yaml")
    done = setting.run(tmp_path / "exp")
    assert done.status == 0, done.output
    assert " skipped" not in done.output
    assert len(losses(tmp_path / "exp/ctc")) == 2 * (len(LENGTHS) + 1)
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "exp/ctc"))


@pytest.mark.parametrize("text", ["", "。"], ids=["empty", "full-stop"])
def test_35_a_validation_set_without_a_label_is_no_fault(headed: Whole, tmp_path: Path, text: str) -> None:
    setting = rewritten(headed.setting, tmp_path, dict.fromkeys(list(LENGTHS)[:3], text), valid=True)
    done = setting.run(tmp_path / "exp")
    assert done.status == 0, done.output
