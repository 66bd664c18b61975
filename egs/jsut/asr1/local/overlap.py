"""How much of a test set's text occurs in the texts that a model was trained on.

Usage: overlap.py --train data/reazonspeech_medium_train --test data/jsut_basic5000 data/jsut_eval1

Both sides are normalised by the profile `default` (no punctuation, no blanks, numbers spelled out). Counted for each
test set:

* ``whole``: sentences that occur in one training text from end to end;
* ``near``: sentences of whose 8-grams of characters at least 70 % occur in one and the same training text (``whole``
  is part of it): copies with a word changed or with something before and after;
* ``mostly_seen``: sentences of whose 8-grams at least 70 % occur anywhere in training. This is the criterion of PaLM
  (Chowdhery et al. 2022, sec. 8), there in words: eight characters of Japanese are about four words, so chance
  finds more here, and the figure is an upper bound;
* ``grams_seen`` of ``grams``: how many different 8-grams of the set occur anywhere in training.

A sentence shorter than eight characters is one gram by itself. Only the test side is kept in memory; training texts
pass by one at a time.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from speechllm.data.kaldi import read_table, split_key
from speechllm.errors import DataError, exit_status
from speechllm.runtime import read_json, sha256, write_json
from speechllm.text.normalize import get_profile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

GRAM_CHARS = 8
NEAR_SHARE = 0.7
MAX_EXAMPLES = 20
VERSION = 1
REPORT = "overlap.json"
PROFILE = get_profile("default")


class Finder:
    """Finds sentences, and 8-grams of them, in the texts that are shown to it."""

    def __init__(self, sentences: Iterable[str]) -> None:
        """Index normalised sentences, each once."""
        self.sentences = sorted(set(sentences) - {""})
        self.num_grams = [len(grams_of(sentence)) for sentence in self.sentences]
        self.owners: dict[str, list[int]] = {}
        for index, sentence in enumerate(self.sentences):
            for gram in grams_of(sentence):
                self.owners.setdefault(gram, []).append(index)
        self.lengths = sorted({len(gram) for gram in self.owners})
        self.seen: set[str] = set()
        self.near: dict[str, str] = {}
        """Sentence -> the first text that holds most of it."""
        self.whole: dict[str, str] = {}
        """Sentence -> the first text that holds all of it."""

    def show(self, utt_id: str, text: str) -> None:
        """Look for the sentences in one normalised text."""
        windows = {text[at : at + length] for length in self.lengths for at in range(len(text) - length + 1)}
        found = windows & self.owners.keys()
        self.seen |= found
        hits = Counter(index for gram in found for index in self.owners[gram])
        for index, count in hits.items():
            sentence = self.sentences[index]
            if count >= NEAR_SHARE * self.num_grams[index]:
                self.near.setdefault(sentence, utt_id)
            if count == self.num_grams[index] and sentence in text:
                self.whole.setdefault(sentence, utt_id)

    def report(self, texts: Mapping[str, str]) -> dict[str, object]:
        """Return what was found of the normalised sentences of one test set."""
        there = {utt_id: text for utt_id, text in texts.items() if text}
        grams = {utt_id: grams_of(text) for utt_id, text in there.items()}
        different = {gram for found in grams.values() for gram in found}
        near = [utt_id for utt_id, text in there.items() if text in self.near]
        examples = [
            {"test": utt_id, "train": self.near[there[utt_id]], "whole": there[utt_id] in self.whole} for utt_id in near
        ]
        return {
            "sentences": len(there),
            "empty": len(texts) - len(there),
            "whole": sum(text in self.whole for text in there.values()),
            "near": len(near),
            "mostly_seen": sum(len(found & self.seen) >= NEAR_SHARE * len(found) for found in grams.values()),
            "grams": len(different),
            "grams_seen": len(different & self.seen),
            "examples": examples[:MAX_EXAMPLES],
        }


def grams_of(text: str) -> set[str]:
    """Return the 8-grams of a text, or the text itself where it is shorter.

    >>> sorted(grams_of("おはようございます"))
    ['おはようございま', 'はようございます']
    """
    return {text[at : at + GRAM_CHARS] for at in range(max(1, len(text) - GRAM_CHARS + 1))}


def measure(train: Path, tests: Sequence[Path]) -> str:
    """Write ``overlap.json`` to the training directory and return it in one line; a report of the same texts stays.

    Raises:
        DataError: a directory has no readable ``text``.
    """
    folders = [train, *tests]
    for folder in folders:
        if not (folder / "text").is_file():
            raise DataError(folder / "text", "no such file", "make the data directory first")
    made_from = {folder.name: sha256(folder / "text") for folder in folders}
    head: dict[str, object] = {
        "version": VERSION,
        "profile": PROFILE.tag,
        "gram_chars": GRAM_CHARS,
        "near_share": NEAR_SHARE,
        "texts": made_from,
    }
    path = train / REPORT
    found = read_json(path) if path.is_file() else {}
    if {key: found.get(key) for key in head} != head:
        found = {**head, "sets": _search(train, tests)}
        write_json(path, found)
    return as_line(train.name, found["sets"])


def _search(train: Path, tests: Sequence[Path]) -> dict[str, object]:
    texts = {
        folder.name: {key: PROFILE.apply(text) for key, text in read_table(folder / "text").items()} for folder in tests
    }
    finder = Finder(text for found in texts.values() for text in found.values())
    for utt_id, text in tqdm(_stream(train / "text"), desc=f"overlap {train.name}", unit="utt", disable=None):
        finder.show(utt_id, PROFILE.apply(text))
    return {name: finder.report(found) for name, found in texts.items()}


def _stream(path: Path) -> Iterator[tuple[str, str]]:
    """Yield id and text of each line of a Kaldi ``text`` file without holding the file."""
    try:
        with path.open(encoding="utf-8", newline="\n") as stream:
            for line in stream:
                yield split_key(line.rstrip("\n"))
    except UnicodeDecodeError as error:
        raise DataError(path, f"is not UTF-8 ({error.reason})", "make the data directory again") from error


def as_line(train: str, sets: object) -> str:
    """Return a report in one line."""
    assert isinstance(sets, dict)
    parts = [
        f"{name}: {one['whole']} of {one['sentences']} sentences whole, {one['near']} near copies, "
        f"{one['grams_seen'] / max(1, one['grams']):.1%} of the {GRAM_CHARS}-grams seen"
        for name, one in sets.items()
    ]
    return f"overlap of {train} with {'; '.join(parts)}"


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True, nargs="+")
    options = parser.parse_args()
    return exit_status(lambda: print(measure(options.train, options.test)))


if __name__ == "__main__":
    sys.exit(main())
