"""Runs the server: one process, one model, until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Never

from speechllm.errors import ConfigError, Stopped
from speechllm.runtime import on_signals
from speechllm.serve.connections import Connections, most_connections, raise_open_files
from speechllm.serve.limits import STOP_S

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

    import uvicorn
    from fastapi import FastAPI

    from speechllm.serve.limits import Limits
    from speechllm.serve.service import Service

LOG = logging.getLogger(__name__)


def check_packages() -> None:
    """Refuse to start where the packages of the server are missing, before a model is loaded.

    Raises:
        ConfigError: with the line that installs them.
    """
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError("serve", f"the package {error.name} is not installed", "pip install -e '.[serve]'") from error


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one.

    Raises:
        ConfigError: the address is taken, or not of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError, UnicodeError) as error:  # the last: a name that can be none
        raise ConfigError(f"{host}:{port}", f"cannot listen ({error})", "take another --host or --port") from error


def make_server(app: FastAPI, service: Service) -> uvicorn.Server:
    """Return a server for `app` that bounds connections, the time in which a request must begin, and its own end."""
    import uvicorn

    from speechllm.serve.protocol import guarded
    from speechllm.serve.stopping import Server

    most = most_connections(service.limits)
    config = uvicorn.Config(
        app,
        http=guarded(service.limits.headers_s, Connections(most)),
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=most,  # as many are taken in at once, before the first of them can be refused
    )
    return Server(config, service, STOP_S)


def serve(model: Path | None, host: str, port: int, limits: Limits, language: str) -> None:
    """Load the model in a folder and answer requests until the process is stopped.

    Raises:
        ConfigError: packages are missing, the address cannot be listened at, or there is no model by default.
        ModelError: the folder holds no model.
        Stopped: SIGTERM came, which a manager of services sends.
    """
    check_packages()
    with (
        # a shell starts what is in its background without one
        on_signals([signal.SIGINT], signal.default_int_handler),
        on_signals([signal.SIGTERM], _stop),  # uvicorn ends what is at work, and then raises it again
        listen(host, port) as sock,
    ):
        from speechllm.recognizer import SpeechLLM
        from speechllm.serve.app import create_app
        from speechllm.serve.hosts import is_loopback
        from speechllm.serve.service import Service
        from speechllm.transcribe import model_folder

        folder = model_folder(model)
        recognizer = SpeechLLM.from_pretrained(folder)
        raise_open_files()
        with closing(Service(recognizer, limits, name=model_name(folder), language=language)) as service:
            service.start()
            shown = f"[{host}]" if ":" in host else host
            LOG.info("event=listening url=http://%s:%d model=%s", shown, sock.getsockname()[1], service.name)
            app = create_app(service, is_local=is_loopback(sock.getsockname()[0]))
            asyncio.run(make_server(app, service).serve(sockets=[sock]))


def _stop(number: int, _frame: FrameType | None) -> Never:
    raise Stopped(f"by {signal.Signals(number).name}")


def model_name(folder: Path) -> str:
    """Return the name under which a model is served: that of its experiment, or of its folder."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name
