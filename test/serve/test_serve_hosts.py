"""A server for its own machine is not to be had under another name (DNS rebinding)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from running import PATH, FakeModel, Running, numbered, serving, wav

from speechllm.serve import server
from speechllm.serve.hosts import is_loopback, names_this_machine
from speechllm.serve.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator

OWN = ["localhost", "LOCALHOST:8000", "localhost:", "127.0.0.1", "127.0.0.1:80", "127.8.9.1:65535", "[::1]", "[::1]:9"]
OTHER = [
    "",
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example:8000",
    "evil.example@localhost",
    "192.168.1.2:8000",
    "0.0.0.0",  # noqa: S104
    "[::2]",
    "::1",
    "localhost:8000:8000",
    "localhost:x",
]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(FakeModel(), is_local=True) as running:
        yield running


@pytest.mark.parametrize("host", OWN)
def test_names_of_this_machine(host: str) -> None:
    assert names_this_machine(host)


@pytest.mark.parametrize("host", OTHER)
def test_names_of_others(host: str) -> None:
    assert not names_this_machine(host)


def test_a_name_that_is_allowed_is_answered_and_no_other() -> None:
    with serving(FakeModel(), Limits(hosts=("Speech.example",)), is_local=True) as running:
        for host, status in (("speech.example", 200), ("SPEECH.example:443", 200), ("evil.example", 403)):
            assert running.client.get("/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("path", ["/", "/page.js", "/health", "/v1/models", "/nix"])
def test_other_names_are_refused_for_every_path(running: Running, path: str) -> None:
    answer = running.client.get(path, headers={"Host": f"evil.example:{running.port}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "other_host")
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert running.client.get(path, headers={"Host": "localhost:1"}).status_code in {200, 404}


@pytest.mark.parametrize("path", [PATH, "/formats/txt"])
def test_a_page_that_was_rebound_cannot_post(running: Running, path: str) -> None:
    """Its origin is the name that it is addressed by."""
    name = f"evil.example:{running.port}"
    headers = {"Host": name, "Origin": f"http://{name}"}
    answer = running.client.post(path, files={"file": ("a.wav", wav(numbered(3)))}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "other_host")
    assert running.alive()


def test_a_server_for_others_answers_to_any_name() -> None:
    with serving(FakeModel()) as running:
        assert running.client.get("/health", headers={"Host": "speech.example"}).status_code == 200


@pytest.mark.parametrize(("host", "is_local"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])  # noqa: S104
def test_who_is_answered_follows_from_where_it_listens(host: str, *, is_local: bool) -> None:
    with server.listen(host, 0) as sock:
        assert is_loopback(sock.getsockname()[0]) == is_local
