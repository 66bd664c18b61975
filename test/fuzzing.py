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
MOST_KEPT_BYTES = 1 << 20  # of all examples together: caches of a fixed size
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


def _check(fault: UserError) -> UserError:
    """Return what stands for a fault that is one line: what it cites would count as memory that was kept."""
    assert fault.where
    assert fault.what
    assert len(str(fault).splitlines()) == 1
    return REFUSED


class Watch:
    """Watches over the calls of a reader, and counts the memory that they do not give back."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.kept: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def outcome(self, name: str, size: int, read: Callable[[], Any]) -> Any:
        """Return what `read` makes of input of `size` bytes, or `REFUSED`; a fault must be one of ours, in one line.

        Memory is counted where the result is a number or nothing.
        """
        before = signal.signal(signal.SIGPROF, _alarm)
        gc.collect(0)
        gc.disable()  # so that all garbage of the call is of the youngest generation, which is soon looked through
        tracemalloc.start()
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S + size * LIMIT_S_PER_BYTE)
        try:
            found = read()
        except UserError as fault:
            found = _check(fault)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
            gc.collect(0)
            kept, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            gc.enable()
        assert peak < MOST_BYTES + MOST_BYTES_PER_BYTE * size, f"took {peak} bytes for {size}"
        self.calls[name] += 1
        self.kept[name] += kept if isinstance(found, UserError | int | None) else 0
        assert self.kept[name] < MOST_KEPT_BYTES, f"{self.kept[name]} bytes are left after {self.calls[name]} calls"
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
