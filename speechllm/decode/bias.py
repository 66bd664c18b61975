"""Hotwords in the search: tokens that begin or continue a word get more weight where the word was heard.

A word is worth some nats: the more, the longer it is and the better it was heard, and the less, the further the text is
from the place where it was heard (the reading of what is written so far is held against the kana heard before the
word). Short words weigh less and must be heard better: two or three kana sound like a part of many other words. A text
has the nats as soon as it begins the word, keeps them if it writes the whole word, and loses them if it turns away. So

    bonus of a text = worth of the words it holds whole + worth of the best word that it has begun

whatever tokens it is written in, and the sum of what is added step by step is always this bonus: a beam compares texts
fairly, and greedy search, which must decide at the first token, sees the whole worth there.

Words are matched by the bytes of their UTF-8 form in a trie with failure links (Aho and Corasick 1975), so a token may
begin before a word, end after it, or be a single byte.
"""

from __future__ import annotations

import bisect
import functools
import json
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from speechllm.decode.hearing import Listener, kana_by_run
from speechllm.score.errors import count_edits
from speechllm.text.reading import katakana_reading, sound_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from transformers import PreTrainedTokenizerFast

    from speechllm.decode.hearing import Floats, Heard
    from speechllm.decode.hotwords import Hotwords

ROOT = 0
LONG = 4
"""Words of so many kana have all of their weight."""


@dataclass(frozen=True, slots=True)
class BiasSettings:
    """How much hotwords weigh."""

    per_kana: float = 9.0
    """Nats of a word that was heard perfectly, for each of its kana."""
    most: float = 45.0
    """Nats that a word is worth at most."""
    limit: float = 1.5
    """Nats a kana (`Heard.cost`) at which a word counts as not heard."""
    short: float = 0.15
    """The part of `per_kana` and of `limit` that a word loses for each kana that it has less than `LONG`."""
    misplaced: float = 0.7
    """The part of its worth that a word loses for each kana between the text and the place where it was heard."""
    rival: float = 0.85
    """A word goes whose place a better one has, unless it explains this part of what the better one does."""
    unheard: float = 3.0
    """Nats of every word where the model has no kana recogniser."""

    def worth(self, kana: int, cost: float) -> float:
        """Return the nats of a word of so many kana that was heard at this cost, `most` not regarded; 0 is unheard."""
        share = max(0.0, 1.0 - self.short * max(0, LONG - kana))
        limit = self.limit * share
        return self.per_kana * kana * share * (1.0 - cost / limit) if cost < limit else 0.0


@dataclass(frozen=True, slots=True)
class State:
    """Where a text stands: its bytes and its node in the trie."""

    text: bytes
    node: int
    spent: tuple[int, ...]
    """Words that it holds whole, or began where they were heard and did not go on with."""
    settled: float
    """Nats for the words that it holds whole."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a word is worth where it was heard."""

    worth: float
    """Nats."""
    after: int | None
    """How many kana were heard before it; None where that is not known."""


class Trie:
    """The surfaces of words, byte by byte; node 0 is the root."""

    def __init__(self, surfaces: Sequence[Sequence[bytes]], whole: AbstractSet[bytes]) -> None:
        """Join words, each its characters, and find where to go on when a word breaks off.

        Characters of `whole` are tokens, so a text that is in the midst of one spells what it need not.
        """
        self.surfaces = tuple(b"".join(chars) for chars in surfaces)
        self.children: list[dict[int, int]] = [{}]
        self.ends: list[tuple[int, ...]] = [()]
        self.begun: list[tuple[tuple[int, int], ...]] = [()]
        """Of each node: (word, bytes of it that stand there) for the words that are begun and not ended."""
        self.spelled: set[tuple[int, int]] = set()
        """Those of them that are in the midst of a character of `whole`."""
        self.first = tuple(len(chars[0]) for chars in surfaces)
        """Bytes of the first character of each word."""
        for word, chars in enumerate(surfaces):
            self._add(word, chars, whole)
        self._fail = [ROOT] * len(self.children)
        self._link()

    def _add(self, word: int, chars: Sequence[bytes], whole: AbstractSet[bytes]) -> None:
        node, count = ROOT, 0
        for char in chars:
            for place, byte in enumerate(char, start=1):
                count += 1
                node = self._child(node, byte)
                if count < len(self.surfaces[word]):
                    self.begun[node] += ((word, count),)
                if place < len(char) and char in whole:
                    self.spelled.add((word, count))
        self.ends[node] += (word,)

    def _child(self, node: int, byte: int) -> int:
        """Return the node that `byte` leads to, made where there is none."""
        if byte not in self.children[node]:
            self.children[node][byte] = len(self.children)
            self.children.append({})
            self.ends.append(())
            self.begun.append(())
        return self.children[node][byte]

    def _link(self) -> None:
        """Point every node at the longest other one that ends the same way; what stands there stands here, too."""
        level = list(self.children[ROOT].values())
        while level:
            for node in level:
                for byte, child in self.children[node].items():
                    self._fail[child] = self.step(self._fail[node], byte)
                self.ends[node] += self.ends[self._fail[node]]
                self.begun[node] += self.begun[self._fail[node]]
            level = [child for node in level for child in self.children[node].values()]

    def step(self, node: int, byte: int) -> int:
        """Return the node after one more byte."""
        while node != ROOT and byte not in self.children[node]:
            node = self._fail[node]
        return self.children[node].get(byte, ROOT)

    def walk(self, node: int, text: bytes) -> Iterator[int]:
        """Yield the node after each byte of `text`."""
        for byte in text:
            node = self.step(node, byte)
            yield node


class Bias:
    """A list of hotwords, made ready for a tokenizer; what an utterance makes of it is `for_utterance`."""

    def __init__(
        self, hotwords: Hotwords, tokenizer: PreTrainedTokenizerFast, settings: BiasSettings | None = None
    ) -> None:
        """Build the trie, and find the tokens of the vocabulary that could begin a word."""
        self.settings = settings or BiasSettings()
        surfaces = list(dict.fromkeys(word.surface for word in hotwords.words))
        number = {surface: index for index, surface in enumerate(surfaces)}
        self._word_of_reading = [number[word.surface] for word in hotwords.words]
        self._lengths = [len(word.reading) for word in hotwords.words]
        self._listener = Listener([word.reading for word in hotwords.words])
        vocabulary = _vocabulary(tokenizer)
        self.bytes_of, self._by_bytes = vocabulary.bytes_of, vocabulary.by_bytes
        self.trie = Trie([[char.encode() for char in surface] for surface in surfaces], vocabulary.whole)
        self._openings = self._find_openings()
        self.continuations = functools.lru_cache(maxsize=1 << 14)(self._continuations)

    def for_utterance(self, kana: Floats | None) -> UtteranceBias:
        """Return the bias of an utterance: what each word is worth there.

        `kana` are log posteriors [q k] of the CTC head, column 0 the blank; None where the model has no such head, and
        then every word is worth a little at every place.
        """
        if kana is None:
            anywhere = (Place(self.settings.unheard, None),)
            return UtteranceBias(self, dict.fromkeys(range(len(self.trie.surfaces)), anywhere), "")
        written = kana_by_run(kana)
        places: dict[int, tuple[Place, ...]] = {}
        for word, worth, heard in self._worths(kana):
            place = Place(worth, len(sound_key("".join(written[: heard.first_run]))))
            places[word] = (*places.get(word, ()), place)
        return UtteranceBias(self, places, sound_key("".join(written)))

    def if_heard(self, kana: Floats | None) -> UtteranceBias | None:
        """Return the bias of an utterance, None where no word was heard: the search is then that without a list."""
        utterance = self.for_utterance(kana)
        return utterance if utterance.places else None

    def _worths(self, kana: Floats) -> list[tuple[int, float, Heard]]:
        """Return (word, its worth, where it was heard), without words whose place a clearly better one has."""
        settings = self.settings
        found = [
            (word, worth, heard)
            for word, length, places in zip(
                self._word_of_reading, self._lengths, self._listener.listen(kana, settings.limit), strict=True
            )
            for heard in places
            if (worth := settings.worth(length, heard.cost)) > 0
        ]
        return [
            (word, min(settings.most, worth), heard)
            for word, worth, heard in found
            if not any(worth < settings.rival * more and heard.overlaps(other) for _, more, other in found)
        ]

    def _find_openings(self) -> dict[int, tuple[int, ...]]:
        """Return word -> the tokens after which, from nowhere, the word is begun or whole."""
        openings: dict[int, list[int]] = {}
        for text, token in self._by_bytes:
            nodes = list(self.trie.walk(ROOT, text))
            words = {word for word, _ in self.trie.begun[nodes[-1]]}
            words.update(word for node in nodes for word in self.trie.ends[node])
            for word in words:
                openings.setdefault(word, []).append(token)
        return {word: tuple(tokens) for word, tokens in openings.items()}

    def openings(self, word: int) -> tuple[int, ...]:
        """Return the tokens that begin a word, or hold it."""
        return self._openings.get(word, ())

    def _continuations(self, word: int, count: int) -> tuple[int, ...]:
        """Return the tokens that go on with a word of which `count` bytes stand there, or complete it and go on."""
        rest = self.trie.surfaces[word][count:]
        found = []
        for end in range(1, len(rest) + 1):
            at = bisect.bisect_left(self._by_bytes, (rest[:end], -1))
            while at < len(self._by_bytes) and self._by_bytes[at][0].startswith(rest[:end]):
                text, token = self._by_bytes[at]
                if end < len(rest) and text != rest[:end]:
                    break
                found.append(token)
                at += 1
        return tuple(found)


class UtteranceBias:
    """What hotwords add in one utterance. It never changes; what is worked out is remembered."""

    def __init__(self, bias: Bias, places: Mapping[int, tuple[Place, ...]], heard: str) -> None:
        """Take where words were heard, a word as often as it was, and all kana that were."""
        self._bias = bias
        self._heard = heard
        self.places = places
        self.start = State(b"", ROOT, (), 0.0)
        self._boosts: dict[State, Mapping[int, float]] = {}
        self._away: dict[bytes, list[int]] = {}

    def boosts(self, state: State) -> Mapping[int, float]:
        """Return token -> nats that it is to be preferred by over all tokens that are not there.

        What is added to a text is this plus `taken_back`, for every token. Greedy search needs only this.
        """
        if not self.places:
            return {}
        if state not in self._boosts:
            gains = {token: self.given(self.next(state, token)) - state.settled for token in self._candidates(state)}
            self._boosts[state] = MappingProxyType({token: gain for token, gain in gains.items() if gain > 0})
        return self._boosts[state]

    def taken_back(self, state: State) -> float:
        """Return the nats, 0 or less, that are added whatever token follows, the end of the text included."""
        return state.settled - self.given(state)

    def next(self, state: State, token: int) -> State:
        """Return where a text stands after one more token."""
        piece = self._bias.bytes_of[token] if token < len(self._bias.bytes_of) else b""
        if not piece:
            left = tuple(word for word, _ in self._begun(state))
            return State(state.text, ROOT, (*state.spent, *left), state.settled)
        for byte in piece:
            state = self._next_byte(state, byte)
        return state

    def _next_byte(self, state: State, byte: int) -> State:
        # without kana no place is known: then all texts at one node are one state, and `boosts` is worked out once
        trie, text = self._bias.trie, state.text + bytes([byte]) if self._heard else b""
        moved = State(text, trie.step(state.node, byte), state.spent, state.settled)
        for word in trie.ends[moved.node]:
            if worth := self._worth(word, text[: -len(trie.surfaces[word])], moved.spent):
                moved = State(text, moved.node, (*moved.spent, word), moved.settled + worth)
        goes_on = {(word, count - 1) for word, count in trie.begun[moved.node]}
        goes_on |= {(word, len(trie.surfaces[word]) - 1) for word in trie.ends[moved.node]}
        left = tuple(word for word, count in self._begun(state) if (word, count) not in goes_on)
        # a word begun twice would be worth as much the second time
        return State(text, moved.node, (*moved.spent, *left), moved.settled) if left else moved

    def _begun(self, state: State) -> list[tuple[int, int]]:
        """Return (word, its bytes that stand there) of those that a text has begun and that are worth something."""
        begun, first = self._bias.trie.begun[state.node], self._bias.trie.first
        return [
            (word, count)
            for word, count in begun
            if count >= first[word] and self._worth(word, state.text[:-count], state.spent)
        ]

    def given(self, state: State) -> float:
        """Return the bonus of a text that stands there, in nats."""
        trie = self._bias.trie
        begun = [one for one in trie.begun[state.node] if one not in trie.spelled]
        worths = (self._worth(word, state.text[:-count], state.spent) for word, count in begun)
        return state.settled + max(worths, default=0.0)

    def _worth(self, word: int, before: bytes, spent: tuple[int, ...]) -> float:
        """Return what a word is worth after the text `before`; 0 once it was tried as often as heard."""
        places = self.places.get(word, ())
        if spent.count(word) >= len(places):
            return 0.0
        lost = self._bias.settings.misplaced
        return max(place.worth * max(0.0, 1.0 - lost * self._distance(before, place)) for place in places)

    def _distance(self, before: bytes, place: Place) -> int:
        """Return how many edits more it takes to end at a place of what was heard than where the text fits best."""
        if place.after is None:
            return 0
        if before not in self._away:
            reading = sound_key(katakana_reading(before.decode(errors="ignore")))
            edits = [count_edits(reading, self._heard[:end]).edits for end in range(len(self._heard) + 1)]
            self._away[before] = [one - min(edits) for one in edits]
        return self._away[before][place.after]

    def _candidates(self, state: State) -> set[int]:
        """Return all tokens after which a text may have more than is settled."""
        tokens = {token for word in self.places for token in self._bias.openings(word)}
        for word, count in self._bias.trie.begun[state.node]:
            if word in self.places:
                tokens.update(self._bias.continuations(word, count))
        return tokens


@dataclass(frozen=True)
class _Vocabulary:
    """What the tokens of a tokenizer write."""

    bytes_of: list[bytes]
    by_bytes: list[tuple[bytes, int]]
    """Sorted, without tokens that write nothing."""
    whole: set[bytes]


@functools.lru_cache(maxsize=2)
def _vocabulary(tokenizer: PreTrainedTokenizerFast) -> _Vocabulary:
    """Return it, which takes longer than all else of a list, and is the same for all lists."""
    bytes_of = token_bytes(tokenizer)
    return _Vocabulary(bytes_of, sorted((text, token) for token, text in enumerate(bytes_of) if text), set(bytes_of))


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """Return the bytes that each token writes; none for special tokens.

    Knows the two ways in which tokenizers spell bytes: ``<0xE3>`` beside plain text with ▁ for the blank, and the
    printable stand-ins of byte-level ones (Radford 2019).
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = "ByteLevel" in json.dumps([state.get("decoder"), state.get("pre_tokenizer")])
    special = set(tokenizer.all_special_ids)
    pieces: dict[str, int] = tokenizer.get_vocab()
    texts = [b""] * (max(pieces.values()) + 1)
    added = {token["content"] for token in state["added_tokens"]}
    for piece, token in pieces.items():
        if token not in special:
            texts[token] = _stand_ins(piece) if byte_level and piece not in added else _plain(piece)
    return texts


def _plain(piece: str) -> bytes:
    if len(piece) == len("<0x00>") and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()


def _stand_ins(piece: str) -> bytes:
    table = _byte_of_stand_in()
    return bytes(table[char] for char in piece) if all(char in table for char in piece) else piece.encode()


@functools.cache
def _byte_of_stand_in() -> dict[str, int]:
    """Return the character that stands for each byte: itself where it prints in Latin 1, else one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
