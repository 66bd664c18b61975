"""tools/new_recipe.sh: what it makes refuses to run until it is filled in, then runs all five stages."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from copied import TOP, copy_tree, run

from speechllm.config import load as configs
from speechllm.data import audio, kaldi
from speechllm.data.kaldi import Utterance
from speechllm.errors import UserError
from speechllm.score.table import write_table

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterable

    Found = tuple[str | None, Utterance]

DATA_PREP = "egs/mycorpus/asr1/local/data_prep.py"
CUT, WHOLE = 3, 9  # utterances that are parts of one recording, and those with a file of their own
SENTENCES = (
    "窓を開けてください。",
    "次の駅で降ります。",
    "荷物は玄関にあります。",
    "会議は三時からです。",
    "明日は雪でしょう。",
    "お茶を二つください。",
    "切符を買いました。",
    "犬が庭を走る。",
    "本を返しに行きます。",
    "電話を待っています。",
    "海の音が聞こえる。",
    "赤い傘を忘れました。",
)
BODY = """\
    for line in (CORPUS / "list.tsv").read_text(encoding="utf-8").splitlines():
        utt_id, wav, start, end, speaker, text = line.split("\\t")
        yield None, Utterance(utt_id, CORPUS / wav, float(start), float(end) if end else None, text, speaker)
"""

sys.path.append(str(TOP / "egs/TEMPLATE/asr1/skeleton"))
from_utterances = importlib.import_module("from_utterances")


def _tones(path: Path, duration_s: float, *pitches_hz: int) -> None:
    """Write tones of the same duration, one after the other."""
    seconds = np.arange(round(duration_s * audio.SAMPLE_RATE_HZ)) / audio.SAMPLE_RATE_HZ
    wave = np.concatenate([0.3 * np.sin(2 * np.pi * pitch_hz * seconds) for pitch_hz in pitches_hz])
    audio.write_wav(path, wave.astype(np.float32), audio.SAMPLE_RATE_HZ)


def _one_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tool needs of the repository, with a new recipe that is not filled in."""
    copy = copy_tree(tmp_path_factory.mktemp("clone"))
    done = run(copy / "tools/new_recipe.sh", "mycorpus")
    assert done.returncode == 0, done.stderr
    assert f"fill in utterances() in {DATA_PREP}" in done.stdout
    return copy


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve utterances of four speakers: three parts of a recording and nine files, listed in list.tsv."""
    folder = tmp_path_factory.mktemp("corpus")
    _tones(folder / "recording.wav", 1.0, 1200, 2000, 3100)
    lines = [f"r_{number}\trecording.wav\t{number}\t{number + 0.9}\tr\t{SENTENCES[number]}\n" for number in range(CUT)]
    for number in range(WHOLE):
        speaker = "abc"[number % 3]
        _tones(folder / f"{number}.wav", 0.5 + 0.1 * number, 150 + 90 * number)
        lines.append(f"{speaker}_{number}\t{number}.wav\t0\t\t{speaker}\t{SENTENCES[CUT + number]}\n")
    (folder / "list.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def filled(tree: Path, corpus: Path) -> Path:
    """The folder of a recipe that is filled in."""
    assert run(tree / "tools/new_recipe.sh", "filled").returncode == 0
    recipe = tree / "egs/filled/asr1"
    script = recipe / "local/data_prep.py"
    text = script.read_text(encoding="utf-8")
    for old, new in (("/path/to/the/corpus", str(corpus)), ("    raise NotImplementedError\n", BODY)):
        assert text.count(old) == 1
        text = text.replace(old, new)
    script.write_text(text, encoding="utf-8")
    return recipe


@pytest.mark.recipe
@pytest.mark.parametrize("conf", ["debug", "mini"])
def test_a_recipe_that_is_not_filled_in_says_so(tree: Path, conf: str) -> None:
    refused = run(tree / "egs/mycorpus/asr1/run.sh", "--conf", conf)
    fix = "does not say yet what the corpus holds; fill in utterances()"
    assert _one_error(refused) == f"error: {DATA_PREP}: {fix}"
    assert not (tree / "egs/mycorpus/asr1/data").exists()


@pytest.mark.recipe
def test_a_filled_in_recipe_runs_to_its_table(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for models so small more threads only wait for each other
    done = run(filled / "run.sh", "--conf", "debug")
    assert done.returncode == 0, done.stderr
    data = kaldi.load(filled / "data/debug")
    assert len(data) == from_utterances.DEBUG_UTTS
    assert data.utterances["r_1"].duration_s() == pytest.approx(0.9)
    score = json.loads((filled / "exp/debug/decode_greedy/debug/score.json").read_text(encoding="utf-8"))
    assert score["num_utts"] == from_utterances.DEBUG_UTTS
    assert score["metrics"]["cer"]["value"] < 0.1
    table = (filled / "exp/debug/RESULTS.md").read_text(encoding="utf-8")
    assert table.startswith("# Results of the debug run on filled\n")
    assert "not run" not in table
    assert table in done.stdout


@pytest.mark.recipe
def test_the_whole_corpus_becomes_three_sets_that_share_no_speaker(filled: Path) -> None:
    done = run(filled / "run.sh", "--stop-stage", "1")
    assert done.returncode == 0, done.stderr
    sets = {name: kaldi.load(filled / "data" / name) for name in ("train", "dev", "eval")}
    assert sorted(len(data) for data in sets.values()) == [3, 3, 6]
    assert len(sets["train"]) == 6
    speakers = [{utt.speaker for utt in data.utterances.values()} for data in sets.values()]
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 4
    told = re.findall(r"data/(\w+): (\d+) utterances, \d+ speakers, [\d.]+ h, 0 faults", done.stdout)
    assert told == [(name, str(len(sets[name]))) for name in sorted(sets)]


def test_a_new_recipe_has_configurations_tables_and_links_that_hold(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tree / "egs/mycorpus/asr1"
    models = {}
    for path in recipe.glob("conf/*.yaml"):
        config = configs.load(path)
        models[path.stem] = (config.encoder.name, config.lm.name)
        assert path.read_text(encoding="utf-8").startswith(f"# ./run.sh --conf {path.stem} : ")
    assert models == {
        "debug": ("downloads/debug/encoder", "downloads/debug/lm"),
        "mini": ("openai/whisper-base", "google/gemma-3-270m"),
        "published": ("microsoft/wavlm-large", "rinna/youri-7b"),
    }
    monkeypatch.chdir(recipe)
    table = write_table([Path("tables/results.yaml")], tmp_path / "RESULTS.md")
    assert table.startswith("# Results on mycorpus\n")
    assert table.count("not run: `./run.sh --conf ") == 4
    files = [path for path in recipe.rglob("*") if path.is_file()]
    assert [path for path in files if "@NAME@" in path.read_text(encoding="utf-8")] == []
    links = re.findall(r"\]\(([^)#:]+)\)", (recipe / "README.md").read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (TOP / "egs/jsut/asr1" / link).exists()] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "needs one name, got 0; see --help"),
        (("a", "b"), "needs one name, got 2; see --help"),
        (("--force",), "unknown option '--force'; see --help"),
        (("../up",), "'../up' is no plain name; begin with a letter, go on with letters, digits, '_', '-'"),
        (("a/b",), "'a/b' is no plain name; "),
        ((".hidden",), "'.hidden' is no plain name; "),
        (("日本語",), "is no plain name; "),
        (("two\nlines",), "$'two\\nlines' is no plain name; "),
        (("x" * 65,), "is no plain name; "),
        (("",), "'' is no plain name; "),
        (("TEMPLATE",), "egs/TEMPLATE is there already; choose another name"),
        (("jsut",), "egs/jsut is there already; choose another name"),
        (("mycorpus",), "egs/mycorpus is there already; choose another name"),
    ],
)
def test_a_bad_or_taken_name_is_refused(tree: Path, arguments: tuple[str, ...], said: str) -> None:
    before = sorted((tree / "egs").rglob("*"))
    error = _one_error(run(tree / "tools/new_recipe.sh", *arguments))
    assert error.startswith("error: tools/new_recipe.sh: ")
    assert said in error
    assert sorted((tree / "egs").rglob("*")) == before


def test_help_says_what_is_made(tree: Path) -> None:
    done = run(tree / "tools/new_recipe.sh", "--help")
    assert done.returncode == 0
    assert "egs/NAME/asr1" in done.stdout


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copy_tree(tmp_path / "clone")
    before = sorted((copy / "egs").iterdir())
    killer = tmp_path / "bin/mv"  # the last step: all is made, and not yet in its place
    killer.parent.mkdir()
    killer.write_text("#!/bin/sh\nkill -TERM $PPID\n", encoding="utf-8")
    killer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{killer.parent}:{os.environ['PATH']}")
    stopped = run(copy / "tools/new_recipe.sh", "mycorpus")
    assert stopped.returncode != 0
    assert sorted((copy / "egs").iterdir()) == before
    (copy / "egs/jsut/asr1/conf/mini.yaml").unlink()
    error = _one_error(run(copy / "tools/new_recipe.sh", "mycorpus"))
    assert error == "error: tools/new_recipe.sh: no egs/jsut/asr1/conf/mini.yaml; get the whole repository again"
    assert sorted((copy / "egs").iterdir()) == before


def _prepare(found: Iterable[Found], out: Path, corpus: str = "whole") -> None:
    from_utterances.prepare(lambda: found, "data_prep.py", corpus, out)


def _fault(found: Iterable[Found], out: Path, corpus: str = "whole") -> str:
    with pytest.raises(UserError) as caught:
        _prepare(found, out, corpus)
    assert not list(out.glob("*/wav.scp"))
    return str(caught.value)


def _many(wav: Path, count: int) -> list[Found]:
    return [(None, Utterance(f"u{number:03d}", wav, 0.0, 0.5, "はい。", f"s{number}")) for number in range(count)]


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second of sound."""
    path = tmp_path_factory.mktemp("sound") / "one.wav"
    _tones(path, 1.0, 300)
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda utt: ("trian", utt), "u: its set is 'trian'; choose train, dev, eval or a name that begins with eval"),
        (lambda utt: (None, replace(utt, utt_id="u 1")), "u 1: the id 'u 1' holds a blank; rename the utterance"),
        (lambda utt: (None, replace(utt, utt_id="a/b")), "a/b: the id 'a/b' cannot be part of a file name; rename"),
        (lambda utt: (None, replace(utt, speaker="s 1")), "u: the id 's 1' holds a blank; rename the utterance or its"),
        (lambda utt: (None, replace(utt, text=" ")), "u: its transcript is empty or has a line break; write it on one"),
        (lambda utt: (None, replace(utt, text="は\nい")), "u: its transcript is empty or has a line break; write it"),
        (
            lambda utt: (None, replace(utt, wav=utt.wav.with_name("no.wav"))),
            "no.wav no such audio file; mend utterances",
        ),
        (lambda utt: (None, replace(utt, wav=Path("ls |"))), "u: its sound is a command, which is not run; mend"),
        (lambda utt: (None, replace(utt, end_s=1.5)), "u: goes from 0.0 to 1.5 s of "),
        (lambda utt: (None, replace(utt, start_s=0.7, end_s=0.2)), "u: goes from 0.7 to 0.2 s of "),
        (lambda utt: (None, replace(utt, start_s=float("nan"))), "u: goes from nan to 1.0 s of "),
    ],
)
def test_a_faulty_utterance_is_named(
    wav: Path, tmp_path: Path, change: Callable[[Utterance], Found], said: str
) -> None:
    fault = _fault([change(Utterance("u", wav, text="はい。"))], tmp_path / "data")
    assert fault.startswith("data_prep.py: ")
    assert said in fault


def test_faults_of_the_whole_are_one_line(wav: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    first, second = _many(wav, 2)
    assert _fault([], out) == "data_prep.py: yields no utterance; fill in utterances()"
    assert _fault([first, first], out).startswith("data_prep.py: u000: comes twice; ")
    assert _fault([first, second], out) == (
        "data_prep.py: yields fewer than three speakers (or files), so none can be held out; "
        "yield the set of each utterance"
    )
    assert _fault([first, ("train", second[1])], out).endswith("some have None; give all of them a set, or none")
    assert "yields nothing for dev and eval; " in _fault([("train", first[1])], out)
    assert _fault([first], out, "all") == "--corpus: there is no all; choose whole or debug in local/corpus.sh"


def test_nothing_short_enough_for_the_debug_run_is_one_line(tmp_path: Path) -> None:
    _tones(tmp_path / "long.wav", 13.0, 200)
    fault = _fault([(None, Utterance("u", tmp_path / "long.wav", text="はい。"))], tmp_path / "data", "debug")
    assert fault == "data_prep.py: yields nothing of 12 s or less; cut it with start_s and end_s"


def test_the_tiny_tokenizer_spells_texts_of_more_characters_than_it_has_room_for(
    wav: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.chdir(tmp_path)
    text = "".join(chr(ord("一") + number) for number in range(500))
    _prepare([(None, Utterance("u", wav, text=text))], tmp_path / "data", "debug")
    tokenizer = AutoTokenizer.from_pretrained("downloads/debug/lm")
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_twentieth_of_the_utterances_is_held_out_the_same_each_time(wav: Path, tmp_path: Path) -> None:
    found = _many(wav, 60)
    _prepare(found, tmp_path / "first")
    _prepare(reversed(found), tmp_path / "second")
    for name, count in (("train", 54), ("dev", 3), ("eval", 3)):
        assert len(kaldi.load(tmp_path / "first" / name)) == count
        for table in ("text", "wav.scp", "segments", "utt2spk"):
            assert (tmp_path / "first" / name / table).read_bytes() == (tmp_path / "second" / name / table).read_bytes()


def test_given_sets_are_kept_and_may_be_more_than_three(wav: Path, tmp_path: Path) -> None:
    names = ("train", "dev", "eval1", "eval2")
    _prepare([(name, utt) for name, (_, utt) in zip(names, _many(wav, 4), strict=True)], tmp_path)
    for number, name in enumerate(names):
        assert list(kaldi.load(tmp_path / name).utterances) == [f"u{number:03d}"]


def test_segments_go_when_the_utterances_are_whole_files_again(wav: Path, tmp_path: Path) -> None:
    found = _many(wav, 3)
    _prepare(found, tmp_path)
    assert (tmp_path / "train/segments").is_file()
    _prepare([(None, Utterance(utt.utt_id, wav, text=utt.text, speaker=utt.speaker)) for _, utt in found], tmp_path)
    for name in ("train", "dev", "eval"):
        (utt,) = kaldi.load(tmp_path / name).utterances.values()
        assert (utt.start_s, utt.end_s) == (0.0, None)
        assert utt.duration_s() == 1.0
