"""Random input, the same in every run: what it is made of, and what no reader may do with it.

200 examples a reader; ``SPEECHLLM_FUZZ=10000`` sets another number.
"""

from __future__ import annotations

import gc
import os
import signal
import tracemalloc
from collections import Counter
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from speechllm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXAMPLES = int(os.environ.get("SPEECHLLM_FUZZ", "200"))
often = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
LIMIT_S, LIMIT_S_PER_BYTE = 5.0, 1e-4  # of processor time
MOST_BYTES, MOST_BYTES_PER_BYTE = 16 << 20, 200  # at a time
GROWTH_EVERY, ROUNDS, AT_A_TIME = 50, 300, 8
ODD = (
    *(
        "",
        " ",
        "\t",
        "\r",
        "\x00",
        "\x0b",
        "\x85",
        "\u2028",
        "\u3000",
        "\ufeff",
        "\ud800",
        "\U0001f600",
        "é",
        "e\u0301",
    ),
    *("/", "..", "|", "`", "$", "'", '"', "#", "|cat", "nan", "inf", "-1", "1e999", "0x10", "9" * 5000, "x" * 300),
)
BREAKS = ("\n", "\n", "\n", "\r\n", "\r", "\u2028", "")


REFUSED = UserError("the input", "was refused", "write another")


class Hangs(Exception):  # noqa: N818 - it ends a reader from outside
    """A reader took more processor time than its input can need."""


def _alarm(*_: object) -> None:
    raise Hangs


def _outcome(read: Callable[[], Any]) -> Any:
    """Return what `read` makes of its input, or `REFUSED`; a fault must be one of ours, in one line."""
    try:
        return read()
    except UserError as fault:
        assert _is_one_line(fault), fault  # noqa: PT017 - most input is refused, and rightly
        return REFUSED


def _is_one_line(fault: UserError) -> bool:
    return bool(fault.where and fault.what) and len(str(fault).splitlines()) == 1


def _growth(read: Callable[[], Any]) -> int:
    """Return the bytes that some calls keep, 0 once some keep none: Python's free lists are full after a while."""
    before = _taken()
    for _ in range(ROUNDS):
        for _ in range(AT_A_TIME):
            _outcome(read)
        now = _taken()
        grown, before = now - before, now
        if grown <= 0:
            return 0
    return grown


def _taken() -> int:
    """Return the bytes that are taken since tracing began."""
    gc.collect(0)
    return tracemalloc.get_traced_memory()[0]


class Watch:
    """Watches over the calls of a reader, how long they take, and the memory that they take and keep."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.calls: Counter[str] = Counter()

    def outcome(self, name: str, size: int, read: Callable[[], Any]) -> Any:
        """Return what `read` makes of input of `size` bytes, or `REFUSED`.

        Now and then it reads again and again, and must give back all that it took.
        """
        grown = 0
        before = signal.signal(signal.SIGPROF, _alarm)
        gc.collect(0)
        gc.disable()  # so that all garbage of the call is of the youngest generation, which is soon looked through
        tracemalloc.start()
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S + size * LIMIT_S_PER_BYTE)
        try:
            found = _outcome(read)
            signal.setitimer(signal.ITIMER_PROF, 0)
            if self.calls[name] % GROWTH_EVERY == 0:
                grown = _growth(read)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            gc.enable()
        assert peak < MOST_BYTES + MOST_BYTES_PER_BYTE * size, f"took {peak} bytes for {size}"
        assert grown == 0, f"{grown} bytes are left after {AT_A_TIME} calls"
        self.calls[name] += 1
        return found


@st.composite
def changed(draw: st.DrawFn, whole: bytes, first: int = 0, last: int | None = None) -> bytes:
    """Return the bytes with a few of them changed, taken out, doubled, or cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(first, min(last or len(data), len(data) - 1))) if data else 0
        piece = draw(st.binary(max_size=8))
        data[at : at + draw(st.integers(0, 8))] = piece
    if draw(st.booleans()) and draw(st.booleans()):
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


@st.composite
def lines(draw: st.DrawFn, good: Sequence[str]) -> bytes:
    """Return lines: good ones, those with something odd in them, any text; now and then not even UTF-8."""
    made = [draw(_line(good)) for _ in range(draw(st.integers(0, 6)))]
    text = "".join(part for line in made for part in (line, draw(st.sampled_from(BREAKS))))
    data = text.encode("utf-8", "surrogatepass")
    if data and draw(st.integers(0, 4)) == 0:
        return draw(changed(data))
    return draw(st.binary(max_size=60)) if draw(st.integers(0, 19)) == 0 else data


@st.composite
def _line(draw: st.DrawFn, good: Sequence[str]) -> str:
    line = draw(st.sampled_from(good))
    kind = draw(st.integers(0, 3))
    if kind == 0:
        at = draw(st.integers(0, len(line)))
        return line[:at] + draw(st.sampled_from(ODD)) + line[at + draw(st.integers(0, 3)) :]
    if kind == 1:
        return draw(st.text(max_size=30))
    if kind == 2:
        return " ".join(draw(st.lists(st.sampled_from((*ODD, *line.split())), max_size=5)))
    return line
