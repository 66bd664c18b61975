"""The line of segments: turns, batches, dropping, faults of the model, places and rates."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from running import FakeModel, numbered, wait_until

from speechllm.decode.hotwords import parse_hotwords
from speechllm.serve.limits import MAX_ADDRESSES, ApiError, Limits, Places, Rates
from speechllm.serve.queue import Batches, Dropped, Ticket

if TYPE_CHECKING:
    from collections.abc import Iterator

    from speechllm.decode.hotwords import Hotwords


class Asking(threading.Thread):
    """A request in a thread of its own."""

    def __init__(self, ticket: Ticket, numbers: list[int], hotwords: Hotwords | None = None) -> None:
        super().__init__()
        self.ticket, self.numbers, self.hotwords = ticket, numbers, hotwords
        self.texts: list[str] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            waves = [numbered(number) for number in self.numbers]
            self.texts = [one.text for one in self.ticket.recognize(waves, hotwords=self.hotwords)]
        except (Dropped, RuntimeError) as error:
            self.error = error


@pytest.fixture
def held() -> Iterator[tuple[FakeModel, Batches]]:
    """A model that is at work on number 99 until its gate opens."""
    model = FakeModel(fails_at=13)
    model.gate.clear()
    batches = Batches(model, max_batch=4)
    first = Asking(Ticket(batches), [99])
    assert model.began.wait(10)
    yield model, batches
    model.gate.set()
    first.join(10)
    batches.close()
    batches.join(10)


def ask(batches: Batches, *requests: list[int], hotwords: Hotwords | None = None) -> list[Asking]:
    """Put requests into the line one after another."""
    threads = []
    for numbers in requests:
        before = batches.waiting
        threads.append(Asking(Ticket(batches), numbers, hotwords))
        wait_until(lambda before=before, numbers=numbers: batches.waiting == before + len(numbers))  # type: ignore[misc]
    return threads


def finish(model: FakeModel, threads: list[Asking]) -> None:
    model.gate.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_requests_take_turns_and_fill_batches(held: tuple[FakeModel, Batches]) -> None:
    model, batches = held
    threads = ask(batches, [1, 2, 3, 4, 5, 6], [21], [31, 32])
    finish(model, threads)
    assert model.batches == [[99], [1, 21, 31, 2], [32, 3, 4, 5], [6]]
    assert [thread.texts for thread in threads[1:]] == [["21番。"], ["31番。", "32番。"]]
    assert threads[0].texts == [f"{number}番。" for number in range(1, 7)]


def test_a_batch_has_one_list_of_hotwords(held: tuple[FakeModel, Batches]) -> None:
    model, batches = held
    tokyo, again, osaka = parse_hotwords(["東京"]), parse_hotwords(["東京"]), parse_hotwords(["大阪"])
    threads = [
        *ask(batches, [1, 2], hotwords=tokyo),
        *ask(batches, [3], hotwords=osaka),
        *ask(batches, [4], hotwords=again),
        *ask(batches, [5]),
    ]
    finish(model, threads)
    assert model.batches[1:] == [[1, 4, 2], [3], [5]]
    assert model.hotwords[1:] == [tokyo, osaka, None]


def test_a_dropped_request_leaves_the_line_at_once(held: tuple[FakeModel, Batches]) -> None:
    model, batches = held
    left, stays = ask(batches, [1, 2, 3], [4])
    left.ticket.drop()
    left.join(10)
    assert isinstance(left.error, Dropped)
    assert batches.waiting == 1
    finish(model, [stays])
    assert model.seen == [99, 4]
    with pytest.raises(Dropped):
        left.ticket.recognize([numbered(5)])


def test_a_request_can_be_dropped_while_the_model_is_at_work_on_it(held: tuple[FakeModel, Batches]) -> None:
    model, batches = held
    (waiting,) = ask(batches, [1])
    model.began.clear()
    model.gate.set()
    assert model.began.wait(10)
    finish(model, [waiting])
    model.gate.clear()
    model.began.clear()
    working = Asking(Ticket(batches), [2])
    assert model.began.wait(10)
    working.ticket.drop()
    working.join(10)
    assert isinstance(working.error, Dropped)
    (after,) = ask(batches, [3])
    finish(model, [after])
    assert after.texts == ["3番。"]


def test_a_segment_that_breaks_the_model_spoils_no_other(held: tuple[FakeModel, Batches]) -> None:
    model, batches = held
    bad, good = ask(batches, [13], [14, 15])
    finish(model, [bad, good])
    assert isinstance(bad.error, RuntimeError)
    assert good.texts == ["14番。", "15番。"]
    assert model.batches[1:] == [[13, 14, 15], [13], [14], [15]]


def test_closing_ends_those_who_wait(held: tuple[FakeModel, Batches]) -> None:
    model, batches = held
    (waiting,) = ask(batches, [1, 2])
    batches.close()
    waiting.join(10)
    assert isinstance(waiting.error, Dropped)
    with pytest.raises(Dropped):
        Ticket(batches).recognize([numbered(1)])
    finish(model, [])
    assert model.seen == [99]


def refused(rates: Rates, address: str) -> int | None:
    """Return the seconds to wait, or None if the request was taken."""
    try:
        rates.check(address)
    except ApiError as error:
        return error.retry_s if (error.status, error.code) == (429, "rate_limit_exceeded") else -1
    return None


def test_rates_fill_up_evenly_and_apart_for_each_address() -> None:
    now = [0.0]
    rates = Rates(6, clock=lambda: now[0])
    assert [refused(rates, "10.0.0.1") for _ in range(7)] == [None] * 6 + [10]
    assert refused(rates, "10.0.0.2") is None
    now[0] = 4.0
    assert refused(rates, "10.0.0.1") == 6
    now[0] = 10.0
    assert [refused(rates, "10.0.0.1") for _ in range(2)] == [None, 10]
    now[0] = 1000.0
    assert [refused(rates, "10.0.0.1") for _ in range(7)] == [None] * 6 + [10]


def test_a_network_of_one_host_is_one_client() -> None:
    rates = Rates(1)
    assert refused(rates, "2001:db8::1") is None
    assert refused(rates, "2001:db8::ffff:1") is not None
    assert refused(rates, "2001:db8:0:1::1") is None


def test_no_rate_is_no_bound_and_the_memory_is_bounded() -> None:
    assert all(refused(Rates(0), "10.0.0.1") is None for _ in range(1000))
    rates = Rates(1)
    for number in range(MAX_ADDRESSES + 10):
        rates.check(f"address {number}")
    assert len(rates._buckets) == MAX_ADDRESSES


def test_one_address_cannot_hold_all_places() -> None:
    places = Places(Limits(max_queue=4))
    first, second, third, fourth = (places.take(address) for address in ("a", "a", "a", "b"))
    with first, second, third:
        with pytest.raises(ApiError, match="has 3 requests at work"), places.take("a"):
            pass
        with fourth:
            with pytest.raises(ApiError, match="All 4 places"), places.take("c"):
                pass
            assert places.taken == 4
    assert places.taken == 0
