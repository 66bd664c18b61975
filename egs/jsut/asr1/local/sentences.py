"""Sentences of the mini corpus: drawn from the templates of a bounded domain, or read from a file.

A domain file (``corpus/domain.yaml``, whose head documents the format) holds templates such as
``{date}の{name}さんの予約です。`` and, for each slot, its values. Templates take turns, and a slot
prefers the values it has used least: a training set of the usual size holds every word of the
domain several times, in spite of the sentences that are thrown away.

Held-out sentences are drawn first. A training sentence that is a near copy of one of them
(`far_from`) is thrown away and its template filled anew: the test set measures more than memory.
"""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import yaml
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from speechllm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

TRAIN: Final = "train"
"""The one set that is drawn last, away from all others."""

_REFERENCE = re.compile(r"\{([^{}]*)\}")
_NUMBER_KEYS = frozenset({"min", "max", "step", "suffix"})
_FILLINGS_PER_TURN = 60
"""So often a template is filled before its turn passes without a new sentence."""

_CANDIDATES = 3
"""Of so many values drawn at random, the one used least is taken."""


@dataclass(frozen=True)
class Domain:
    """A bounded domain: templates, and the values that may stand for each slot.

    Attributes:
        path: the file it came from, for messages.
        slots: slot name to its values; a value may refer to other slots, ``{month}{day}``.
        templates: sentences that refer to slots.
    """

    path: Path
    slots: Mapping[str, tuple[str, ...]]
    templates: tuple[str, ...]


def load_domain(path: Path) -> Domain:
    """The domain of a YAML file, checked: every slot that is referred to exists and can be filled.

    Raises:
        DataError: the file is missing, is not YAML, or holds something that cannot be used.
    """
    content = _read_yaml(path)
    slots = _mapping(content.get("slots"), f"{path}: slots")
    domain = Domain(
        path=path,
        slots={name: _slot_values(f"{path}: slot {name}", slot) for name, slot in slots.items()},
        templates=_texts(f"{path}: templates", content.get("templates")),
    )
    for name in domain.slots:
        _check_no_cycle(domain, name, ())
    for template in domain.templates:
        _check_references(domain, f"{path}: template {template}", template)
    return domain


def sample(domain: Domain, count: int, seed: int, avoid: Collection[str], min_distance: float) -> list[str]:
    """`count` different sentences, none of them in `avoid` or nearer to it than `min_distance`.

    The same arguments give the same sentences. `min_distance` is that of `far_from`.

    Raises:
        DataError: no template gives another sentence that is new and far enough.
    """
    rng = random.Random(seed)  # noqa: S311 - a corpus, not a secret
    templates = _turns(domain.templates, rng)
    filler = _Filler(domain, rng)
    held_out = list(avoid)
    taken = set(held_out)
    sentences: list[str] = []
    idle_turns = 0
    while len(sentences) < count:
        template = next(templates)
        for _ in range(_FILLINGS_PER_TURN):
            sentence = filler.fill(template)
            if sentence and sentence not in taken and far_from(sentence, held_out, min_distance):
                filler.keep()
                sentences.append(sentence)
                taken.add(sentence)
                idle_turns = 0
                break
        else:
            idle_turns += 1
            if idle_turns >= 2 * len(domain.templates):  # two rounds: each template had a turn
                raise _used_up(domain, len(sentences), count, min_distance)
    return sentences


def split_domain(domain: Domain, sizes: Mapping[str, int], seed: int, min_distance: float) -> dict[str, list[str]]:
    """Sentences for each set of `sizes`; no two sets share a sentence or a near copy of one.

    The held-out sets are drawn first, in the order of `sizes`, and ``train`` last, away from all
    of them. Each set has its own seed, so the size of ``train`` never changes a held-out set.

    Raises:
        DataError: the domain has too few sentences for these sizes and this distance.
    """
    drawn: dict[str, list[str]] = {}
    for name in sorted(sizes, key=lambda name: name == TRAIN):  # a stable sort: train goes last
        others = [sentence for sentences in drawn.values() for sentence in sentences]
        set_seed = zlib.crc32(f"{seed}/{name}".encode())
        drawn[name] = sample(domain, sizes[name], set_seed, others, min_distance)
    return {name: drawn[name] for name in sizes}


def nearest_distance(sentence: str, others: Collection[str]) -> float:
    """The smallest distance from `sentence` to one of `others`: 0 a copy, 1 nothing in common.

    Distance is the Levenshtein distance in characters over the length of the longer sentence.
    Without `others` it is 1.
    """
    nearest = process.extractOne(sentence, others, scorer=Levenshtein.normalized_distance)
    return nearest[1] if nearest else 1.0


def far_from(sentence: str, others: Collection[str], min_distance: float) -> bool:
    """Whether `sentence` is no near copy: `min_distance` or more away from each of `others`."""
    return nearest_distance(sentence, others) >= min_distance


def unseen_values(domain: Domain, train: Collection[str], held_out: Collection[str]) -> list[str]:
    """The values of the domain that occur in `held_out` and nowhere in `train`, sorted.

    Only whole words: a value with a reference or a digit is made of parts that others share.
    """
    words = {text for values in domain.slots.values() for text in values}
    words = {text for text in words if not re.search(r"[{0-9]", text)}
    train_text, held_out_text = "\n".join(train), "\n".join(held_out)
    return sorted(word for word in words if word in held_out_text and word not in train_text)


def read_sentences(path: Path) -> list[str]:
    """The sentences of a text file, one a line.

    Raises:
        DataError: the file is missing, is not UTF-8, or has an empty or a repeated line.
    """
    lines = _read_text(path).splitlines()
    first_at: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise DataError(f"{path}:{number}", "an empty line", "write one sentence a line")
        if line in first_at:
            what = f"the same sentence as in line {first_at[line]}"
            raise DataError(f"{path}:{number}", what, "delete one of the two")
        first_at[line] = number
    return lines


def _turns(templates: tuple[str, ...], rng: random.Random) -> Iterator[str]:
    """The templates without end: all of them in random order, then all in another, and so on."""
    while True:
        yield from rng.sample(templates, len(templates))


class _Filler:
    """Fills templates so that the values of a slot are kept about equally often."""

    def __init__(self, domain: Domain, rng: random.Random) -> None:
        """Start with no value used."""
        self._slots = domain.slots
        self._rng = rng
        self._uses: Counter[tuple[str, str]] = Counter()
        self._last: list[tuple[str, str]] = []

    def fill(self, template: str) -> str | None:
        """The template with its slots filled; None where a slot came up twice with one value."""
        self._last = []
        sentence = _REFERENCE.sub(self._value, template)
        return sentence if len(set(self._last)) == len(self._last) else None

    def keep(self) -> None:
        """Count the values of the sentence that was filled last as used."""
        self._uses.update(self._last)

    def _value(self, reference: re.Match[str]) -> str:
        """A value for a slot: of a few drawn at random, the one used least (never always one)."""
        name = reference[1]
        drawn = self._rng.choices(self._slots[name], k=_CANDIDATES)
        value = min(drawn, key=lambda text: self._uses[name, text])
        value = _REFERENCE.sub(self._value, value)
        self._last.append((name, value))
        return value


def _used_up(domain: Domain, drawn: int, count: int, min_distance: float) -> DataError:
    """The error for a domain that has no more sentences to give."""
    what = f"only {drawn} of {count} sentences found that are {min_distance} from the held-out ones"
    return DataError(domain.path, what, "ask for fewer, lower the distance, or add templates")


def _read_text(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(path, "no such file", "check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(path, f"not UTF-8 ({error.reason})", "save it as UTF-8") from error


def _read_yaml(path: Path) -> Mapping[str, object]:
    """What the file says: a mapping with just the keys ``slots`` and ``templates``."""
    try:
        content = _mapping(yaml.safe_load(_read_text(path)), str(path))
    except yaml.YAMLError as error:
        raise DataError(path, f"not YAML ({error})", "mend the syntax") from error
    if set(content) != {"slots", "templates"}:
        what = f"has the keys {', '.join(sorted(content)) or '(none)'}"
        raise DataError(path, what, "give it just slots and templates")
    return content


def _mapping(value: object, where: str) -> Mapping[str, object]:
    """`value`, which is a mapping with strings for keys."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise DataError(where, "is not a mapping from names", "see the head of domain.yaml")
    return value


def _texts(where: str, value: object) -> tuple[str, ...]:
    """`value`, which is a list with at least one string, and strings only."""
    if not isinstance(value, list) or not value:
        raise DataError(where, "is not a list of strings", "see the head of domain.yaml")
    for text in value:
        if not isinstance(text, str):
            raise DataError(where, f"{text!r} is not a string", "put it in quotes")
    return tuple(value)


def _slot_values(where: str, slot: object) -> tuple[str, ...]:
    """The values of one slot: its list, or its range of numbers written out."""
    if not isinstance(slot, dict):
        return _texts(where, slot)
    first, last, step = slot.get("min"), slot.get("max"), slot.get("step", 1)
    suffix = slot.get("suffix", "")
    if (
        not _NUMBER_KEYS.issuperset(slot)
        or not (isinstance(first, int) and isinstance(last, int) and isinstance(step, int))
        or not (first <= last and step > 0 and isinstance(suffix, str))
    ):
        fix = 'write it like {min: 1, max: 28, step: 1, suffix: "日"}'
        raise DataError(where, "is not a range of numbers", fix)
    return tuple(f"{number}{suffix}" for number in range(first, last + 1, step))


def _check_references(domain: Domain, where: str, text: str) -> None:
    """Nothing; raises if `text` refers to a slot that is not there or has a stray brace."""
    for name in _REFERENCE.findall(text):
        if name not in domain.slots:
            fix = f"add it to slots, or name one of {', '.join(sorted(domain.slots))}"
            raise DataError(where, f"there is no slot {{{name}}}", fix)
    if set("{}") & set(_REFERENCE.sub("", text)):
        raise DataError(where, "a brace without its partner", "write {slot}")


def _check_no_cycle(domain: Domain, name: str, outer: tuple[str, ...]) -> None:
    """Nothing; raises if filling the slot `name`, within `outer`, would lead back to itself."""
    where = f"{domain.path}: slot {name}"
    if name in outer:
        what = f"refers to itself: {' -> '.join((*outer, name))}"
        raise DataError(where, what, "take out one of these references")
    for text in domain.slots[name]:
        _check_references(domain, where, text)
        for inner in _REFERENCE.findall(text):
            _check_no_cycle(domain, inner, (*outer, name))
