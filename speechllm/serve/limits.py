"""What a server takes on, and the answer to what is more: bounds, rates, places, errors in OpenAI's shape."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_ADDRESSES = 10_000  # whose rate is remembered
BUSY_RETRY_S = 5
STOP_S = 10  # for what is at work when the server is stopped


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one request and of all together."""

    max_bytes: int = 100_000_000
    """Most bytes of a request's body."""
    max_seconds: float = 3600.0
    """Longest recording."""
    max_decoded_bytes: int = 2_000_000_000
    """Most bytes that a file may unpack to, as 32-bit samples of all its channels."""
    max_queue: int = 160
    """Most requests at a time, being received, waiting or at work."""
    timeout_s: float = 900.0
    """Longest time from the whole upload to the answer."""
    upload_s: float = 60.0
    """Longest time for a body to arrive."""
    headers_s: float = 10.0
    """Longest time for the next request of a connection to begin."""
    decode_s: float = 60.0
    """Longest time for the process that unpacks a file."""
    decode_memory_bytes: int = 512 << 20
    """Memory that this process may take."""
    decoders: int = 2
    """Most such processes at a time."""
    hosts: tuple[str, ...] = ()
    """Names besides localhost and its addresses that a server at a loopback address answers to."""
    rate_per_min: int = 240
    """Requests a minute from one address; as many may come at once. 0: no bound."""
    max_batch: int = 16
    """Most segments that the model works on at a time."""

    @property
    def max_client_places(self) -> int:
        """Return how many of the `max_queue` places one address can hold: three quarters."""
        return max(1, self.max_queue * 3 // 4)


class ApiError(Exception):
    """A request that is refused, in the shape that OpenAI's clients read."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        """Keep the HTTP status and the four fields; the type follows from the status."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_s: int | None = None

    def body(self) -> dict[str, object]:
        """Return the JSON body."""
        by_status = {429: "rate_limit_error", 408: "timeout_error"}
        kind = by_status.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")  # noqa: PLR2004
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it."""
        return {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}


def busy(status: int, message: str, code: str, retry_s: int = BUSY_RETRY_S) -> ApiError:
    """Return the error that asks the client to come again."""
    error = ApiError(status, message, code=code)
    error.retry_s = retry_s
    return error


@dataclass
class Rates:
    """How many requests each address may still make: a bucket that fills up evenly (a token bucket)."""

    per_min: int
    clock: Callable[[], float] = time.monotonic
    _buckets: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def check(self, address: str) -> None:
        """Count a request.

        Raises:
            ApiError: 429, with the time after which the next one is taken.
        """
        if self.per_min <= 0:
            return
        client, now = network(address), self.clock()
        left, then = self._buckets.pop(client, (float(self.per_min), now))
        left = min(float(self.per_min), left + (now - then) * self.per_min / 60)
        self._buckets[client] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        if left < 1:
            wait_s = math.ceil((1 - left) * 60 / self.per_min)
            message = f"More than {self.per_min} requests a minute came from this address."
            raise busy(429, message, "rate_limit_exceeded", wait_s)


def network(address: str) -> str:
    """Return what stands for a client: the address, or the /64 network of an IPv6 address, which one host owns."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))  # noqa: PLR2004


class Places:
    """The places for requests: bounded for all together, and for one address."""

    def __init__(self, limits: Limits) -> None:
        """Begin with all places free."""
        self._limits = limits
        self._held: Counter[str] = Counter()

    @property
    def taken(self) -> int:
        """Return the number of requests that hold a place."""
        return self._held.total()

    @contextlib.contextmanager
    def take(self, address: str) -> Iterator[None]:
        """Hold a place inside the block.

        Raises:
            ApiError: 429, all are taken, or this address has its share.
        """
        client = network(address)
        if self.taken >= self._limits.max_queue:
            raise busy(429, f"All {self._limits.max_queue} places for requests are taken.", "queue_full")
        if self._held[client] >= self._limits.max_client_places:
            message = f"This address has {self._limits.max_client_places} requests at work already."
            raise busy(429, message, "too_many_requests")
        self._held[client] += 1
        try:
            yield
        finally:
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]
