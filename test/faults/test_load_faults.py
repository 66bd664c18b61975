"""What is wrong with what is loaded: archives, models, configurations, hypotheses. Cases as in docs/reliability.md.

Pickles and YAML tags here are live: each would make a folder, and the test sees to it that another reader does.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import stat
import tarfile
import tracemalloc
import unicodedata
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import faulty
import kaldiio
import pytest
import scenes
import tiny
import torch
import yaml
from faulty import Setting, Trap
from safetensors.torch import load_file, save_file
from scenes import assert_refused, speechllm

if TYPE_CHECKING:
    from collections.abc import Callable

    from faulty import Ended

LOCAL = Path(__file__).resolve().parents[2] / "egs/jsut/asr1/local"
LENGTHS = {f"u{number}": 8_000 + 1_500 * number for number in range(5)}
FIELDS = {
    "lora": {"rank": 4, "alpha": 8},
    "train": {"epochs": 1, "valid_utts": 1},
    "decode": {"batch_size": 2, "tokens_per_s": 2, "extra_tokens": 6},
}
TRAINED = "trained.safetensors"


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@dataclass(frozen=True)
class Made:
    """A setting, its features, and a model that was trained on them."""

    setting: Setting
    store: Path
    model: Path

    def decode(self, out: Path, exp: Path | None = None) -> Ended:
        given = {"--exp": exp or self.model.parent, "--data": self.store, "--out": out}
        return speechllm("decode", *(part for pair in given.items() for part in pair))

    def train(self, store: Path, exp: Path) -> Ended:
        return replace(self.setting, train=store, valid=self.store).run(exp)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    setting = faulty.make(tmp_path_factory.mktemp("load"), LENGTHS, **FIELDS)
    store, exp = setting.folder / "store", setting.folder / "exp"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("speechllm.dump.worker_pool", tiny.AtOnce)
        dumped = speechllm("dump", "--conf", setting.conf, "--data", setting.train, "--out", store)
    assert dumped.status == 0, dumped.output
    done = setting.run(exp)
    assert done.status == 0, done.output
    return Made(setting, store, exp / "model")


@pytest.fixture
def store(made: Made, tmp_path: Path) -> Path:
    """Return a copy of the features."""
    return shutil.copytree(made.store, tmp_path / "store")


@pytest.fixture
def exp(made: Made, tmp_path: Path) -> Path:
    """Return a copy of the trained model's experiment, without its saved states."""
    shutil.copytree(made.model, tmp_path / "exp/model")
    return tmp_path / "exp"


def replace_value(store: Path, utt_id: str, value: bytes) -> str:
    """Let the archive hold other bytes for an utterance, the last of it; return where they stand."""
    name, _, offset = scenes.read_table(store / "feats.scp")[utt_id].partition(":")
    blob = (store / name).read_bytes()
    (store / name).write_bytes(blob[: int(offset)] + value)
    return f"{store / name}:{offset}"


def last_of(store: Path) -> str:
    places = scenes.read_table(store / "feats.scp")
    return max(places, key=lambda utt_id: int(places[utt_id].partition(":")[2]))


# Archives of features


def test_09_an_archive_value_that_is_a_pickle_is_never_opened(made: Made, store: Path, tmp_path: Path) -> None:
    where = replace_value(store, last_of(store), b"PKL" + pickle.dumps(Bomb(tmp_path / "went_off")))
    line = f"error: {where}: is no float16 or int8 matrix of ours; run stage 2 again"
    assert_refused(made.train(store, tmp_path / "exp"), re.escape(line))
    assert not (tmp_path / "exp/model").exists()
    assert not (tmp_path / "went_off").exists()
    kaldiio.load_mat(where)
    assert (tmp_path / "went_off").exists()


@pytest.mark.parametrize("claimed", ["utt2num_frames", "header alone"])
def test_10_a_header_that_claims_two_to_the_31_rows_allocates_nothing(
    made: Made, store: Path, tmp_path: Path, claimed: str
) -> None:
    utt_id = last_of(store)
    name, _, offset = scenes.read_table(store / "feats.scp")[utt_id].partition(":")
    value = (store / name).read_bytes()[int(offset) :]
    rows = scenes.read_table(store / "utt2num_frames")[utt_id]
    claim = str(2**31)
    old = f"({rows}, ".encode()
    wide = value.replace(old, f"({claim}, ".encode(), 1).replace(b" " * (len(claim) - len(rows)) + b"\n", b"\n", 1)
    assert len(wide) == len(value)
    where = replace_value(store, utt_id, wide)
    what = f"{utt_id} has {claim} frames, utt2num_frames says {rows}"
    if claimed == "utt2num_frames":
        scenes.write_table(store / "utt2num_frames", {**scenes.read_table(store / "utt2num_frames"), utt_id: claim})
        what = f"{utt_id} runs past the end of the file"
    tracemalloc.start()  # sees what numpy asks for
    try:
        ended = decode_features(made, store, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_refused(ended, re.escape(f"error: {where}: {what}; run stage 2 again"))
    assert peak < 100 << 20
    assert not (tmp_path / "out/text").exists()


def decode_features(made: Made, store: Path, tmp_path: Path) -> Ended:
    return speechllm("decode", "--exp", made.model.parent, "--data", store, "--out", tmp_path / "out")


# Models


def pickled(path: Path, went_off: Path) -> None:
    with path.open("wb") as stream:
        pickle.dump(Bomb(went_off), stream)


def as_torch_saves(path: Path, went_off: Path) -> None:
    torch.save({"projector.weight": Bomb(went_off)}, path)


def unpickle(path: Path) -> None:
    pickle.loads(path.read_bytes())  # noqa: S301 - to see it go off


SAFE = "model.safetensors"
UNREADABLE = {
    "lm": "is no causal language model {}; name another in lm.name",
    "encoder": "cannot be read as a speech encoder {}; download it again",
}


def as_torch_loads(path: Path) -> None:
    torch.load(path, weights_only=False)


@pytest.mark.parametrize(
    ("write", "open_it"), [(pickled, unpickle), (as_torch_saves, as_torch_loads)], ids=["pickle", "torch"]
)
def test_38_a_pickle_where_our_safetensors_belong_is_never_opened(
    made: Made, exp: Path, tmp_path: Path, write: Callable[[Path, Path], None], open_it: Callable[[Path], None]
) -> None:
    went_off = tmp_path / "went_off"
    trained = exp / "model" / TRAINED
    write(trained, went_off)
    ended = made.decode(tmp_path / "out", exp)
    fix = "copy it again, or remove the folder and train again"
    line = rf"error: {re.escape(str(trained))}: is no readable safetensors file \(.+\); {fix}"
    assert_refused(ended, line)
    assert not (tmp_path / "out/text").exists()
    assert not went_off.exists()
    write(tmp_path / "live", went_off)
    open_it(tmp_path / "live")  # the bomb is a live one
    assert went_off.exists()


@pytest.mark.parametrize(
    ("write", "open_it"), [(pickled, unpickle), (as_torch_saves, as_torch_loads)], ids=["pickle", "torch"]
)
@pytest.mark.parametrize("file", [SAFE, "pytorch_model.bin"])
@pytest.mark.parametrize("of", ["lm", "encoder"])
def test_38_a_pickle_in_the_place_of_a_base_models_weights_is_never_run(
    made: Made,
    tmp_path: Path,
    write: Callable[[Path, Path], None],
    open_it: Callable[[Path], None],
    of: str,
    file: str,
) -> None:
    """A file of torch's is read as tensors alone where a model comes in no other form."""
    went_off = tmp_path / "went_off"
    folder = made.setting.folder / of
    weights = folder / SAFE
    with faulty.changed(weights, weights.read_bytes()):
        weights.unlink()
        write(folder / file, went_off)
        ended = made.setting.run(tmp_path / "exp")
        (folder / file).unlink()
    pickle_of_more, no_header = "its weights are a pickle of more than tensors", "Error while deserializing header: .+"
    why = rf"\({no_header if file == SAFE else pickle_of_more}\)"
    assert_refused(ended, rf"error: {re.escape(str(folder))}: {UNREADABLE[of].format(why)}")
    assert not (tmp_path / "exp/model").exists()
    assert not went_off.exists()
    write(tmp_path / "live", went_off)
    open_it(tmp_path / "live")  # the bomb is a live one
    assert went_off.exists()


def rename_one(state: dict[str, torch.Tensor]) -> str:
    name = min(state)
    state["projector.unknown"] = state.pop(name)
    return rf"has no tensor {re.escape(name)}|has the unknown tensor projector\.unknown"


def lose_adapter(state: dict[str, torch.Tensor]) -> str:
    lost = sorted(name for name in state if "lora" in name)
    for name in lost:
        del state[name]
    return rf"has no tensor {re.escape(lost[0])}"


def lose_projector(state: dict[str, torch.Tensor]) -> str:
    lost = sorted(name for name in state if "lora" not in name)
    for name in lost:
        del state[name]
    return rf"has no tensor {re.escape(lost[0])}"


def add_one(state: dict[str, torch.Tensor]) -> str:
    state["zusatz"] = torch.zeros(2)
    return "has the unknown tensor zusatz"


def reshape_one(state: dict[str, torch.Tensor]) -> str:
    name = min(state)
    state[name] = state[name].reshape(1, *state[name].shape)
    return rf"{re.escape(name)} is \(1, .+\), not \(.+\)"


@pytest.mark.parametrize("change", [rename_one, lose_adapter, lose_projector, add_one, reshape_one])
def test_41_tensors_that_are_missing_extra_or_of_another_shape_are_refused(
    made: Made, exp: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], str]
) -> None:
    """No part of it is used: half a model would decode, and badly."""
    state = load_file(exp / "model" / TRAINED)
    what = change(state)
    save_file(state, exp / "model" / TRAINED)
    ended = made.decode(tmp_path / "out", exp)
    fix = "use the configuration that it was trained with"
    assert_refused(ended, rf"error: {re.escape(str(exp / 'model' / TRAINED))}: ({what}); {fix}")
    assert not (tmp_path / "out/text").exists()


@pytest.mark.parametrize("base", ["lm", "encoder"])
def test_41_another_base_model_under_the_same_name_is_refused(made: Made, tmp_path: Path, base: str) -> None:
    """Its last byte is another, as of a newer release; an encoder counts where there are sounds to decode."""
    weights = made.setting.folder / base / "model.safetensors"
    blob = weights.read_bytes()
    with faulty.changed(weights, blob[:-1] + bytes([blob[-1] ^ 1])):
        given = ["--exp", made.model.parent, "--data", made.setting.train, "--out", tmp_path / "out"]
        ended = speechllm("decode", *given)
    what = r"is another model \(fingerprint [0-9a-f]{16}\) than the one trained with( \([0-9a-f]{16}\))?"
    fix = f"use the {'language model' if base == 'lm' else 'encoder'} that it was trained with"
    assert_refused(ended, rf"error: {re.escape(str(weights.parent))}: {what}; {fix}")
    assert not (tmp_path / "out/text").exists()


# Archives of corpora


def zip_of(path: Path, name: str, *, link: bool = False) -> None:
    member = zipfile.ZipInfo(name)
    if link:
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("jsut_ver1.1/basic5000/wav/BASIC5000_0001.wav", b"")
        archive.writestr(member, "/etc/passwd")


@pytest.mark.parametrize(
    ("name", "link", "what"),
    [
        ("jsut_ver1.1/../../evil.txt", False, "which would leave its folder"),
        ("/evil.txt", False, "which would leave its folder"),
        ("jsut_ver1.1/link", True, "which is a link"),
    ],
)
def test_39_a_zip_file_that_reaches_out_of_its_folder_is_refused(
    tmp_path: Path, name: str, what: str, *, link: bool
) -> None:
    (tmp_path / "work/downloads").mkdir(parents=True)
    zip_of(tmp_path / "work/downloads/jsut_ver1.1.zip", name, link=link)
    arguments = ["--corpus", "jsut", "--out", tmp_path / "data"]
    ended = scenes.script(LOCAL / "data.py", *arguments, cwd=tmp_path / "work", JSUT="")
    line = f"error: downloads/jsut_ver1.1.zip: holds {name!r}, {what}; do not use this file"
    assert_refused(ended, re.escape(line))
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {"jsut_ver1.1.zip", ".lock"}, left
    assert not Path("/evil.txt").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("000/../../evil.flac", tarfile.REGTYPE), ("/evil.flac", tarfile.REGTYPE), ("000/a.flac", tarfile.SYMTYPE)],
)
def test_39_a_tar_file_that_reaches_out_of_its_folder_is_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    source = tmp_path / "reazonspeech"
    tar = source / "data/000.tar"
    tar.parent.mkdir(parents=True)
    (source / "tsv").mkdir()
    (source / "tsv/tiny.tsv").write_text("000/0.flac\t朝です\n", encoding="utf-8")
    with tarfile.open(tar, "w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    arguments = ["--corpus", "reazonspeech-tiny", "--out", tmp_path / "data"]
    ended = scenes.script(LOCAL / "data.py", *arguments, cwd=tmp_path, REAZONSPEECH=str(source))
    line = rf"error: {re.escape(str(tar))}: holds {re.escape(repr(name))}, which is no sound of the corpus; take it out"
    assert_refused(ended, line)
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()}
    assert {name for name in made if not name.endswith((".lock", ".tsv"))} == {"reazonspeech/data/000.tar"}
    assert not Path("/evil.flac").exists()


# Configurations


def test_40_yaml_tags_make_nothing(made: Made, tmp_path: Path) -> None:
    conf = tmp_path / "conf.yaml"
    tag = f"!!python/object/apply:os.mkdir [{tmp_path}/went_off]"
    conf.write_text(f"encoder: {{name: e}}\nlm: {{name: l}}\nprompt: {tag}\n", encoding="utf-8")
    for command in (["tag"], ["dump", "--data", made.setting.train, "--out", tmp_path / "out"]):
        ended = speechllm(*command, "--conf", conf)
        assert_refused(ended, re.escape(f"error: {conf}:3: tags are not read; write the value out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conf.yaml"]
    yaml.unsafe_load(conf.read_text(encoding="utf-8"))  # the tag is a live one
    assert (tmp_path / "went_off").is_dir()


def test_40_a_billion_laughs_are_not_laughed(tmp_path: Path) -> None:
    conf = tmp_path / "conf.yaml"
    lines = ["l0: &l0 [lol, lol]", *(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12))]
    conf.write_text("\n".join(lines), encoding="utf-8")
    said = rf"error: {re.escape(str(conf))}:\d+: (aliases|anchors) are not read; write the value out"
    assert_refused(speechllm("tag", "--conf", conf), said)
    conf.write_text("[" * 500_000, encoding="utf-8")
    what = "is nested more than 50 deep; give a configuration"
    assert_refused(speechllm("tag", "--conf", conf), re.escape(f"error: {conf}:1: {what}"))


@pytest.mark.parametrize("value", ["!!python/object/apply:os.getcwd []", "*a"])
def test_40_an_override_is_read_as_strictly(made: Made, tmp_path: Path, value: str) -> None:
    ended = speechllm(*made.setting.arguments(tmp_path / "exp", "--set", f"prompt={value}"))
    what = "tags" if value.startswith("!") else "aliases"
    assert_refused(ended, re.escape(f"error: prompt={value}:1: {what} are not read; write the value out"))
    assert not (tmp_path / "exp").exists()


# Decoding and scoring


@pytest.mark.parametrize("torn", [b"", b'{"utt_id": "u1", "nb'], ids=["whole-lines", "torn"])
def test_45_a_killed_decode_goes_on_to_the_same_texts(made: Made, tmp_path: Path, torn: bytes) -> None:
    """It is killed when it makes the fourth line of what it has decoded, in batches of two."""
    assert made.decode(tmp_path / "whole").status == 0
    arguments = ["decode", "--exp", str(made.model.parent), "--data", str(made.store), "--out", str(tmp_path / "out")]
    trap = Trap(signal.SIGKILL, after=r"/out/\.partial\.jsonl$", call=r"json/__init__\.py:dumps$", nth=4)
    ended = faulty.start(arguments, tmp_path / "log", trap).wait()
    assert ended.status == -signal.SIGKILL, ended.output
    assert not (tmp_path / "out/text").exists()
    partial = tmp_path / "out/.partial.jsonl"
    assert 0 < partial.read_bytes().count(b"\n") < len(LENGTHS)
    with partial.open("ab") as stream:
        stream.write(torn)
    done = made.decode(tmp_path / "out")
    assert done.status == 0, done.output
    assert (tmp_path / "out/text").read_bytes() == (tmp_path / "whole/text").read_bytes()
    assert (tmp_path / "out/nbest.jsonl").read_bytes().count(b"\n") == len(LENGTHS)
    assert not partial.exists()


def score(tmp_path: Path, ref: dict[str, str], hyp: dict[str, str], *options: str) -> Ended:
    scenes.write_table(tmp_path / "ref", ref)
    scenes.write_table(tmp_path / "hyp", hyp)
    given = ["--ref", tmp_path / "ref", "--hyp", tmp_path / "hyp", "--out", tmp_path / "score"]
    return speechllm("score", *given, *options)


def cer_of(ended: Ended) -> str:
    assert ended.status == 0, ended.output
    return ended.output.splitlines()[0].split()[1]


def test_45_a_missing_hypothesis_is_refused_or_costs_its_reference(tmp_path: Path) -> None:
    """Left out of the count, it would better the score."""
    ref = {"u1": "朝です", "u2": "駅で待つ", "u3": "夜です"}
    hyp = {"u1": "朝です", "u3": "夜です"}
    what = f"{tmp_path}/hyp: no hypothesis for 1 utterance (u2) of 3 references"
    fix = "finish decoding, or pass --missing-as-deletions to count them as deleted"
    assert_refused(score(tmp_path, ref, hyp), re.escape(f"error: {what}; {fix}"))
    assert not (tmp_path / "score").exists()
    assert cer_of(score(tmp_path, ref, hyp, "--missing-as-deletions")) == "40.00"  # 4 of 10
    unknown = score(tmp_path, hyp, ref)
    what = f"{tmp_path}/hyp: no reference for 1 utterance (u2); score against the reference of the same set"
    assert_refused(unknown, re.escape(f"error: {what}"))


def test_46_an_empty_reference_counts_its_insertions(tmp_path: Path) -> None:
    ref = {"u1": "朝です", "u2": ""}
    assert cer_of(score(tmp_path, ref, ref)) == "0.00"
    assert cer_of(score(tmp_path, ref, {**ref, "u2": "ご視聴"})) == "100.00"  # 3 inserted, 3 characters
    ended = score(tmp_path, {"u1": "", "u2": "。"}, {"u1": "朝", "u2": ""})
    assert_refused(ended, rf"error: {re.escape(str(tmp_path))}/ref: every reference is empty under profile .+; .+")


def test_46_one_text_in_several_forms_of_unicode_is_one_text(tmp_path: Path) -> None:
    text = {"u1": "バスで25分、ガードを越える。"}
    for other in (
        unicodedata.normalize("NFD", text["u1"]),
        text["u1"].replace("25", "２５"),
        text["u1"].replace("バス", "ﾊﾞｽ"),
    ):
        assert other != text["u1"]
        assert cer_of(score(tmp_path, text, {"u1": other})) == "0.00"
        assert cer_of(score(tmp_path, {"u1": other}, text)) == "0.00"
    assert cer_of(score(tmp_path, text, {"u1": "バスで26分、ガードを越える。"})) != "0.00"
