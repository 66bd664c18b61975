"""Sending a packed folder to a model hub: a hub of our own on this machine, and none at all."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, ClassVar

import packing_model
import pytest

from speechllm import cli
from speechllm.errors import ModelError
from speechllm.pack import upload
from speechllm.pack.folder import PackOptions, pack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

NAME = "someone/tiny-model"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    pack(packing_model.experiment(folder), folder / "packed", PackOptions())
    return folder


@pytest.fixture
def packed(made: Path, tmp_path: Path) -> Path:
    """Return a copy, to be spoiled."""
    return shutil.copytree(made / "packed", tmp_path / "packed")


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as an upload meets."""

    repos: ClassVar[list[dict[str, object]]] = []
    files: ClassVar[dict[str, bytes]] = {}
    refuse: ClassVar[bool] = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuse:
            self._answer({"error": "no right to write"}, 403)
        elif self.path == "/api/repos/create":
            self.repos.append(json.loads(body))
            self._answer({"url": f"http://{self.headers['Host']}/{NAME}", "name": NAME, "id": NAME})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer({"files": [{"path": one["path"], **plain} for one in asked]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"http://{self.headers['Host']}/{NAME}/commit/abc"
            self._answer({"success": True, "commitUrl": url, "commitOid": "abc"})
        else:
            self._answer({})

    def do_GET(self) -> None:
        self._answer({"id": NAME, "sha": "abc"})

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its own name
        """Say nothing."""

    def _answer(self, content: dict[str, object], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.repos.clear()
    Hub.files.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def push(made: Path, endpoint: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own: the hub's client reads its settings once."""
    command = [
        sys.executable,
        "-m",
        "speechllm",
        "pack",
        "--exp",
        str(made / "tiny_exp"),
        "--out",
        str(made / "packed"),
    ]
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_none", "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [*command, "--push-to", NAME, *options], capture_output=True, text=True, check=False, timeout=280, env=env
    )


def test_every_file_arrives_as_it_is(made: Path, hub: str) -> None:
    done = push(made, hub, "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub}/{NAME}"
    assert Hub.repos[0]["name"] == "tiny-model"
    assert Hub.repos[0]["organization"] == "someone"
    assert Hub.repos[0].get("private") is True or Hub.repos[0].get("visibility") == "private"
    here = {path.name: path.read_bytes() for path in (made / "packed").iterdir()}
    assert Hub.files == here


def test_a_hub_that_refuses_is_one_line(packed: Path, hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "refuse", True)
    _use(monkeypatch, hub)
    with pytest.raises(ModelError, match=r"someone/tiny-model: the hub refuses \(.*403.*\); set HF_TOKEN"):
        upload.send(upload.prepare(packed, NAME), private=False)


def test_without_a_network_it_is_one_line(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"the hub cannot be reached \(.*\); the folder is packed: try again"):
        upload.send(upload.prepare(packed, NAME), private=False)


def _use(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Let the hub's client, which reads its settings once, use another hub."""
    from huggingface_hub import constants

    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setenv("HF_TOKEN", "hf_none")
    import huggingface_hub

    patch.setattr(huggingface_hub, "HfApi", lambda: huggingface_hub.hf_api.HfApi(endpoint=endpoint))


def test_offline_everything_up_to_the_network_works(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pack", "--exp", str(made / "tiny_exp"), "--out", str(made / "packed"), "--push-to", NAME]
    assert cli.run([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    size = (made / "packed/trained.safetensors").stat().st_size
    assert f"{size:,} trained.safetensors\n" in said
    assert said.endswith(f" files -> {NAME}\n")
    assert cli.run(command) == 2
    assert "error: someone/tiny-model: the hub cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "../tiny", "some one/tiny", "a/b--c", "a/..b"])
def test_a_wrong_name_is_refused(name: str, packed: Path) -> None:
    with pytest.raises(Exception, match="is no name of a model on a hub; write it as OWNER/NAME"):
        upload.prepare(packed, name)


def test_a_folder_that_is_not_as_it_was_packed_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no packed folder"):
        upload.prepare(tmp_path, NAME)
    (packed / "secret.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ModelError, match=r"holds secret.txt, which was not packed"):
        upload.prepare(packed, NAME)
    (packed / "secret.txt").unlink()
    (packed / "README.md").write_text("changed", encoding="utf-8")
    with pytest.raises(ModelError, match=r"README.md: is damaged"):
        upload.prepare(packed, NAME)


@pytest.mark.parametrize(
    ("card", "message"),
    [("# no head\n", "has no head of YAML"), ("---\nlanguage: [ja]\n---\n", "its head says no license")],
)
def test_a_card_that_a_hub_would_not_take_is_refused(card: str, message: str, packed: Path) -> None:
    (packed / "README.md").write_text(card, encoding="utf-8")
    sums = packed / "SHA256SUMS"
    kept = [line for line in sums.read_text(encoding="utf-8").splitlines() if not line.endswith("  README.md")]
    digest = hashlib.sha256(card.encode()).hexdigest()
    sums.write_text("\n".join([*kept, f"{digest}  README.md"]) + "\n", encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        upload.prepare(packed, NAME)
