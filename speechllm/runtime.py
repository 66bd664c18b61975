"""What every run needs: logging, device and precision, seeds, atomic files, provenance."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechllm.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import FrameType, TracebackType

    import torch

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
RECORDED_PACKAGES = ("torch", "transformers", "peft", "kaldiio", "jiwer", "speechllm")
FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below the ports that outgoing connections take
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?", re.ASCII)
DTYPE_NAMES = ("float32", "bfloat16", "float16")


def setup_logging(*, verbose: bool = False) -> None:
    """Send our log lines to stderr, and keep other libraries to warnings."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, stream=sys.stderr)
    # it warns of an optional kernel whenever it is imported, also where nothing is quantized
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("speechllm").setLevel(logging.DEBUG if verbose else logging.INFO)


def without_telemetry() -> None:
    """Keep onnxruntime, which pyopenjtalk and Kokoro import, from sending what it does and leaving files behind."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def pick_device(name: str) -> torch.device:
    """Return the torch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: it is none of these, or CUDA was asked for by name and is not there; nothing falls back in silence.
    """
    import torch

    if not DEVICE.fullmatch(name):
        raise ConfigError("device", f"{name} is none that we know", "take auto, cpu, cuda or cuda:N")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device", f"{name} was asked for, torch sees no CUDA", "set device: auto")
    if (number := int(name.partition(":")[2] or 0)) and number >= (count := torch.cuda.device_count()):
        raise ConfigError("device", f"{name} was asked for, torch sees {count}, from cuda:0", "take another")
    return torch.device(name)


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch type of one of `DTYPE_NAMES`."""
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return dtypes[name]


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether the machine has units for bfloat16; elsewhere it is slower than float32."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # AVX512-BF16 or AMX; torch has no public question for the first
    return bool(torch.cpu._is_avx512_bf16_supported())  # noqa: SLF001


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that is a function of `parts` alone (SHA-256, not `hash`)."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an error of the system that names no file: a write to a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(temporary):
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make sure that what was renamed in `folder` is so after a power cut too."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextlib.contextmanager
def on_signals(numbers: Iterable[int], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Let signals call `handler` inside the block, and do afterwards what they did before.

    SIGHUP stays ignored where it is: nohup asks for that.
    """
    heard = [number for number in numbers if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before or signal.SIG_DFL)  # None: one that Python did not set, nor can set again


class _Pool(ProcessPoolExecutor):
    """A pool whose processes are gone when an error or a stop leaves its block, whatever they were at."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Kill what is at work if there is an error, and return when all have ended."""
        started = list((self._processes or {}).values())
        if error is not None:
            self.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.kill()
        left = super().__exit__(kind, error, trace)
        for process in started:
            process.join()
        return left


def worker_pool(workers: int, initializer: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """Return a pool of fresh processes; one that is killed breaks the pool with an error instead of a hang."""
    context = multiprocessing.get_context("spawn")
    return _Pool(workers, context, initializer=_start_worker, initargs=(initializer, arguments))


def _start_worker(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """Leave Ctrl-C to the parent, end with it, then do what was asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    setup_logging()
    if initializer is not None:
        initializer(*arguments)


def _end_with_parent() -> None:
    """End this worker once its parent is gone; else it would go on, and then wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with bare line feeds, whole or not at all."""
    with atomic_path(path) as temporary:
        # a path need not be UTF-8; what of it is not is escaped, as JSON reads it
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file of ours.

    Raises:
        ModelError: the file is missing, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(path, f"cannot be read as JSON ({error})", "make the folder again") from error
    if not isinstance(value, dict):
        raise ModelError(path, "does not hold a JSON object", "make the folder again")
    return value


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines that was written line by line, up to one that a kill cut short."""
    entries: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # a text may hold U+2028
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
    return entries


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_texts(parts: Iterable[str]) -> str:
    """Return 16 hexadecimal digits that identify a sequence of strings."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\x00")
    return digest.hexdigest()[:16]


@functools.cache
def _commit() -> str | None:
    """Return the commit that this package is run from, marked where files differ; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: torch.device) -> str:
    """Return what the device is called: the GPU's name, or ``cpu``."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def portable(record: Mapping[str, object]) -> dict[str, object]:
    """Return a provenance without command lines, which hold paths of one machine; that of its training included."""
    return {
        key: portable(value) if isinstance(value, dict) else value for key, value in record.items() if key != "argv"
    }


def provenance(extra: Mapping[str, object] | None = None) -> dict[str, object]:
    """Return what is needed to know where a result came from: versions, machine, arguments."""
    versions = {}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "argv": sys.argv[1:],
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {os.cpu_count()} cores",
        "versions": versions,
        "commit": _commit(),
        **(extra or {}),
    }
