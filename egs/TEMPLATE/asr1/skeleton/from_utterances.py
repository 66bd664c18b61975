"""Stage 1 of the recipes that tools/new_recipe.sh made: what their `utterances` yields becomes Kaldi directories.

A recipe's own local/data.py calls `main`, in the recipe's folder. ``--corpus whole`` writes a directory for each set,
``--corpus debug`` only the first short utterances, and the tiny random models of conf/debug beside them.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from speechllm.data import audio
from speechllm.data.kaldi import Utterance, key_fault, wav_path, write_dir
from speechllm.errors import ConfigError, DataError, exit_status
from speechllm.folders import only_writer
from speechllm.runtime import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Found = tuple[str | None, Utterance]
    """The set of an utterance, None where it is to be drawn, and the utterance."""

EGS = Path(__file__).resolve().parents[3]
SET_NAME = re.compile(r"train|dev|eval[A-Za-z0-9_-]*")
HELD_OUT = 20  # each of dev and eval is one part in so many
DEBUG_MODELS = Path("downloads/debug")
DEBUG_UTTS = 8
DEBUG_LONGEST_S = 12.0  # the tiny language model holds 512 positions
TOKENS_BESIDE_CHARS = 280  # of the tiny tokenizer: bytes, special tokens, characters of the prompt
WHERE_FROM = "mend utterances(), or the file"

inspect = functools.lru_cache(maxsize=64)(audio.inspect)  # one recording holds many utterances


def main(utterances: Callable[[], Iterable[Found]], source: Path) -> int:
    """Return the exit status; `source` is the file that `utterances` stands in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nj", type=int, help="taken as every stage 1 takes it; there is too little to do for many")
    options = parser.parse_args()
    where = str(source.resolve().relative_to(EGS.parent))
    return exit_status(lambda: prepare(utterances, where, options.corpus, options.out))


def prepare(utterances: Callable[[], Iterable[Found]], where: str, corpus: str, out: Path) -> None:
    """Write the data directories of `corpus`, ``whole`` or ``debug``, to `out`.

    Raises:
        UserError: no such corpus; or an utterance is at fault, and `where` is the file to mend.
    """
    found = _checked(utterances, where)
    if corpus == "whole":
        sets = _by_set(list(tqdm(found, desc="data", unit="utt", disable=None)), where)
    elif corpus == "debug":
        sets = {"debug": _first_short(found, where)}
    else:
        raise ConfigError("--corpus", f"there is no {corpus}", "choose whole or debug in local/corpus.sh")
    with only_writer(out):
        for name, members in sets.items():
            _write(out / name, members)
        if corpus == "debug":
            _make_models([utt.text or "" for utt in sets["debug"]])


def _checked(utterances: Callable[[], Iterable[Found]], where: str) -> Iterator[Found]:
    """Yield what `utterances` yields, paths absolute and texts stripped; the first fault is raised."""
    seen: set[str] = set()
    try:
        for name, utt in utterances() or ():  # a function without `yield` returns None
            if utt.utt_id in seen:
                raise DataError(f"{where}: {utt.utt_id}", "comes twice", "give each utterance an id of its own")
            seen.add(utt.utt_id)
            whole = replace(utt, wav=Path(utt.wav).absolute(), text=(utt.text or "").strip())
            if fault := _fault(name, whole) or _sound_fault(whole):
                raise DataError(f"{where}: {utt.utt_id}", *fault)
            yield name, whole
    except NotImplementedError as error:
        raise DataError(where, "does not say yet what the corpus holds", "fill in utterances()") from error
    if not seen:
        raise DataError(where, "yields no utterance", "fill in utterances()")


def _fault(name: str | None, utt: Utterance) -> tuple[str, str] | None:
    """Return what is wrong with names and text of an utterance, and what mends it; None where nothing is."""
    if name is not None and not SET_NAME.fullmatch(name):
        return f"its set is {name!r}", "choose train, dev, eval or a name that begins with eval"
    for key in (utt.utt_id, utt.speaker or utt.utt_id):
        if fault := key_fault(key) or (f"the id {key!r} holds a blank" if " " in key else None):
            return fault, "rename the utterance or its speaker"
    if len((utt.text or "").splitlines()) != 1:
        return "its transcript is empty or has a line break", "write it on one line or leave the utterance out"
    return None


def _sound_fault(utt: Utterance) -> tuple[str, str] | None:
    """Return what is wrong with file and times of an utterance, and what mends it; None where nothing is."""
    try:
        info = inspect(wav_path("its sound", str(utt.wav)))
    except DataError as error:
        return f"{error.where} {error.what}", WHERE_FROM
    if len(str(utt.wav).splitlines()) != 1:
        return "the path of its sound has a line break", "rename the file"
    end_s = info.duration_s if utt.end_s is None else utt.end_s
    if not 0 <= utt.start_s < end_s or round(end_s * info.sample_rate_hz) > info.num_samples:
        return f"goes from {utt.start_s} to {end_s} s of {utt.wav}, which lasts {info.duration_s:.3f} s", WHERE_FROM
    return None


def _first_short(found: Iterable[Found], where: str) -> list[Utterance]:
    """Return the first utterances that the tiny language model has room for, whatever their set."""
    short = (utt for _, utt in found if _end_s(utt) - utt.start_s <= DEBUG_LONGEST_S)
    if chosen := list(islice(short, DEBUG_UTTS)):
        return chosen
    raise DataError(where, f"yields nothing of {DEBUG_LONGEST_S:g} s or less", "cut it with start_s and end_s")


def _by_set(found: Sequence[Found], where: str) -> dict[str, list[Utterance]]:
    """Return the utterances of each set, as given or drawn.

    Raises:
        DataError: some have a set and some have none; or train, dev or eval would be empty.
    """
    names = {name for name, _ in found}
    if names == {None}:
        return _drawn([utt for _, utt in found], where)
    if None in names:
        raise DataError(where, "some utterances have a set and some have None", "give all of them a set, or none")
    sets: dict[str, list[Utterance]] = {}
    for name, utt in found:
        sets.setdefault(str(name), []).append(utt)
    if missing := {"train", "dev", "eval"} - {"eval" if name.startswith("eval") else name for name in sets}:
        raise DataError(where, f"yields nothing for {' and '.join(sorted(missing))}", "give some utterances that set")
    return sets


def _drawn(utterances: Sequence[Utterance], where: str) -> dict[str, list[Utterance]]:
    """Return train, dev and eval, none of which shares a speaker (a file, where speakers are not known) with another.

    Which are held out is a function of the speakers' names, or of the last two parts of the files' paths.
    """
    units: dict[str, list[Utterance]] = {}
    for utt in utterances:
        units.setdefault(utt.speaker or "/".join(utt.wav.parts[-2:]), []).append(utt)
    waiting = sorted(units, key=lambda unit: derive_seed("held out", unit))
    if len(waiting) < len(("eval", "dev", "train")):
        what = "yields fewer than three speakers (or files), so none can be held out"
        raise DataError(where, what, "yield the set of each utterance")
    sets: dict[str, list[Utterance]] = {"eval": [], "dev": []}
    for name, for_the_rest in (("eval", 2), ("dev", 1)):
        while len(sets[name]) < max(1, len(utterances) // HELD_OUT) and len(waiting) > for_the_rest:
            sets[name] += units[waiting.pop()]
    return {**sets, "train": [utt for unit in waiting for utt in units[unit]]}


def _end_s(utt: Utterance) -> float:
    return inspect(utt.wav).duration_s if utt.end_s is None else utt.end_s


def _write(path: Path, utterances: Sequence[Utterance]) -> None:
    """Write one data directory, with ``segments`` where an utterance is a part of its file."""
    if any(utt.start_s > 0 or utt.end_s is not None for utt in utterances):
        spans = {utt.utt_id: f"{utt.utt_id} {utt.start_s:.6f} {_end_s(utt):.6f}" for utt in utterances}
        write_dir(path, utterances, {"segments": spans})
        return
    if (path / "segments").exists():  # of an earlier run; without wav.scp no directory counts as whole
        (path / "wav.scp").unlink(missing_ok=True)
        (path / "segments").unlink()
    write_dir(path, utterances)


def _make_models(texts: Sequence[str]) -> None:
    """Make the tiny random models of the JSUT recipe; characters that their tokenizer has no room for become bytes."""
    sys.path.append(str(EGS / "jsut/asr1/local"))
    import debug_models

    room = debug_models.VOCABULARY - TOKENS_BESIDE_CHARS
    known = {char for char, _ in Counter("".join(texts)).most_common(room)}
    debug_models.make(DEBUG_MODELS, ["".join(char for char in text if char in known) for text in texts])
