"""Stage 4 shared out: parts decode what nobody has decoded, and a run of the whole puts them together."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch

from speechllm import cli
from speechllm.decode.batched import Decoder
from speechllm.decode.run import PARTIAL, PARTS, decode_dir
from speechllm.dump import dump
from speechllm.errors import DataError
from speechllm.folders import only_writer
from speechllm.model.assemble import assemble, origin_of, save_model
from speechllm.runtime import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from speechllm.decode.batched import Decoded

SAMPLES = {"a": 9_000, "b": 4_000, "c": 12_345, "d": 5_500, "e": 7_000}


@dataclass(frozen=True)
class Setting:
    """A model, features, and the output of a run that was not shared out."""

    model: Path
    store: Path
    whole: Path

    def decode(self, out: Path, part: tuple[int, int] | None = None, **changes: object) -> int:
        return decode_dir(self.model, self.store, out, changes, part)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    base = tmp_path_factory.mktemp("parts")
    encoder, lm = tiny.wavlm(base / "wavlm"), tiny.llama(base / "llama")
    fields = {"batch_size": 2, "extra_tokens": 6, "tokens_per_s": 4.0}
    config = tiny.config(encoder, lm, decode=fields, lora={"rank": 4, "alpha": 16})
    made = Setting(base / "model", base / "store", base / "whole")
    origin = origin_of(config, 16, tiny.found(encoder).fingerprint, tiny.TEXTS)
    model = assemble(config, origin, "float32")
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for value in model.trainable_state().values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.5)
    save_model(made.model, model, config, origin)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("speechllm.dump.worker_pool", tiny.HerePool)
        dump(config.encoder, "cpu", tiny.data_folder(base / "in", SAMPLES), made.store, workers=1)
    assert made.decode(made.whole) == len(SAMPLES)
    return made


def nbest_texts(out: Path) -> list[list[object]]:
    """Return id and texts, line by line; log probabilities depend on the batch in their last digits."""
    entries = [json.loads(line) for line in (out / "nbest.jsonl").read_text(encoding="utf-8").splitlines()]
    return [[entry["utt_id"], *(text["text"] for text in entry["nbest"])] for entry in entries]


def assert_same(out: Path, setting: Setting) -> None:
    assert (out / "text").read_bytes() == (setting.whole / "text").read_bytes()
    assert nbest_texts(out) == nbest_texts(setting.whole)
    assert not (out / PARTS).exists()
    assert not (out / PARTIAL).exists()


class Killed(Exception):  # noqa: N818 - it stands for what no code can catch
    """The process ended here."""


def kill_after_two(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Decoder.texts

    def cut_short(*given: Any) -> Iterator[Decoded]:
        yield from itertools.islice(whole(*given), 2)
        raise Killed

    monkeypatch.setattr(Decoder, "texts", cut_short)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_parts_together_are_the_whole_and_no_model_is_loaded_to_put_them_together(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    made = [setting.decode(tmp_path, (number, count)) for number in range(1, count + 1)]
    assert sum(made) == len(SAMPLES)
    assert max(made) - min(made) <= 1
    assert not (tmp_path / "text").exists()
    monkeypatch.setattr("speechllm.decode.run.load_model", None)
    assert setting.decode(tmp_path) == 0
    assert_same(tmp_path, setting)
    rtf = read_json(tmp_path / "rtf.json")
    assert rtf["audio_s"] == pytest.approx(sum(SAMPLES.values()) / tiny.SAMPLE_RATE_HZ, abs=1e-3)
    assert float(str(rtf["wall_s"])) > 0
    assert rtf.keys() == read_json(setting.whole / "rtf.json").keys()
    notes = read_json(tmp_path / "provenance.json")
    assert (notes["parts"], notes["device"]) == (count, "cpu")


def test_a_part_that_is_missing_is_decoded_with_the_whole(setting: Setting, tmp_path: Path) -> None:
    done = setting.decode(tmp_path, (2, 3))
    assert setting.decode(tmp_path) == len(SAMPLES) - done
    assert_same(tmp_path, setting)


def test_a_killed_part_goes_on_where_it_was(setting: Setting, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_after_two(patch)
        with pytest.raises(Killed):
            setting.decode(tmp_path, (1, 2))
    with (tmp_path / PARTS / "1-of-2" / PARTIAL).open("a", encoding="utf-8") as stream:
        stream.write('{"utt_id": "c", "nb')
    assert setting.decode(tmp_path, (1, 2)) == 1
    assert setting.decode(tmp_path, (1, 2)) == 0
    assert setting.decode(tmp_path, (2, 2)) == 2
    assert setting.decode(tmp_path) == 0
    assert_same(tmp_path, setting)


def test_another_number_of_parts_decodes_nothing_twice(setting: Setting, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_after_two(patch)
        with pytest.raises(Killed):
            setting.decode(tmp_path)
    before = [json.loads(line)["utt_id"] for line in (tmp_path / PARTIAL).read_text(encoding="utf-8").splitlines()]
    made = setting.decode(tmp_path, (1, 2))
    made += sum(setting.decode(tmp_path, (number, 3)) for number in (1, 2, 3))
    assert made == len(SAMPLES) - len(before)
    assert setting.decode(tmp_path) == 0
    assert_same(tmp_path, setting)


def test_nothing_is_left_to_parts_of_a_finished_whole(setting: Setting) -> None:
    assert setting.decode(setting.whole, (1, 2)) == 0
    assert not (setting.whole / PARTS).exists()


def test_other_settings_are_refused_with_the_difference(setting: Setting, tmp_path: Path) -> None:
    setting.decode(tmp_path, (1, 2))
    for part in ((1, 2), (2, 2), None):
        with pytest.raises(
            DataError, match=r"1-of-2: holds output made with decode\.beam = 1, now it is 3; remove the"
        ):
            setting.decode(tmp_path, part, beam=3)
    assert not (tmp_path / "decode.json").exists()


def test_the_whole_is_not_put_together_while_a_part_is_at_work(setting: Setting, tmp_path: Path) -> None:
    setting.decode(tmp_path, (1, 2))
    with (
        only_writer(tmp_path / PARTS / "1-of-2"),
        pytest.raises(DataError, match="1-of-2: another process is writing here; wait for it to end"),
    ):
        setting.decode(tmp_path)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("3", "--part: '3' is not I/N; write it as 1/4"),
        ("a/b", "--part: 'a/b' is not I/N; write it as 1/4"),
        ("-1/4", "--part: '-1/4' is not I/N; write it as 1/4"),
        ("5/4", "--part: there is no part 5/4; take I from 1 to N, and N at most 1000"),
        ("0/4", "--part: there is no part 0/4; take I from 1 to N, and N at most 1000"),
        ("1/1001", "--part: there is no part 1/1001; take I from 1 to N, and N at most 1000"),
    ],
)
def test_what_is_no_part_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, part: str, message: str
) -> None:
    where = ["--exp", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "out"), f"--part={part}"]
    assert cli.run(["decode", *where]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
