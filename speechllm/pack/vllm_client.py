"""Sends sounds to a vLLM server that was started with the folder's serve.sh, and prints their texts."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from speechllm.data import audio
from speechllm.errors import ConfigError, DataError, exit_status
from speechllm.pack.vllm import PromptMaker, text_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_ANSWER_BYTES = 1 << 20
TIMEOUT_S = 300.0


def main(folder: Path, arguments: Sequence[str]) -> int:
    """Return the exit status of the client of an exported folder."""
    parser = argparse.ArgumentParser(description="Print the texts of sounds, written by a vLLM server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server")
    parser.add_argument("files", nargs="+", type=Path, help="sounds of 30 s at most")
    given = parser.parse_args(arguments)

    def work() -> None:
        maker = PromptMaker.from_pretrained(folder)
        for path in given.files:
            body = maker.request(audio.read(path))
            sys.stdout.write(f"{path}\t{ask(given.url, body)}\n")

    return exit_status(work)


def ask(url: str, body: Mapping[str, object]) -> str:
    """Return the text that the server at `url` answers.

    Raises:
        ConfigError: `url` is no address of a web server.
        DataError: the server cannot be reached, refuses, or answers something else.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError("--url", f"'{url}' is no http address", "give http://HOST:PORT")
    where = f"{url.rstrip('/')}/v1/completions"
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(where, json.dumps(body).encode(), headers)  # noqa: S310 - checked above
    try:
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:  # noqa: S310 - checked above
            content = json.loads(answer.read(MAX_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode(errors="replace")
        raise DataError(where, f"refuses ({error.code}: {said})", "see the server's own lines") from error
    except (OSError, ValueError) as error:
        raise DataError(where, f"gives no answer ({error})", "start vllm/serve.sh, or give --url") from error
    text = text_of(content) if isinstance(content, dict) else None
    if text is None:
        raise DataError(where, "answers something else than a completion", "give the address of vllm/serve.sh")
    return text
