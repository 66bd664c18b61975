"""Looks for input that breaks a reader, guided by the branches that input reaches (atheris, made by Google).

    pip install atheris                                 # no dependency of ours: it has no wheel for every Python
    python tools/fuzz.py yaml --seconds 600 --out exp/fuzz

It ends with the first input that makes a traceback, hangs, or takes more than 1 GiB, and leaves it in OUT as crash-*,
timeout-* or oom-*; without one it prints how many inputs it tried. What it found worth trying stays in OUT/READER and
is where the next run begins.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speechllm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

TOP = Path(__file__).resolve().parents[1]
INSTRUMENTED = ("speechllm.config", "speechllm.data", "speechllm.decode.hotwords", "yaml", "shlex")
LONGEST_S = 10  # of one input


@dataclass(frozen=True)
class Reader:
    """A reader, and good input for it."""

    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]


def readers(folder: Path) -> dict[str, Reader]:
    """Return the readers by name; each reads a file that it writes to `folder`."""
    from speechllm.config import load as configs
    from speechllm.data import archive, kaldi, pipes
    from speechllm.decode.hotwords import read_hotwords

    cut, store = folder / "cut", folder / "store"
    for made in (cut, store):
        made.mkdir()
    (cut / "wav.scp").write_text("r0 /a.wav\nr1 /b.wav\n", encoding="utf-8")
    ark = store / "feats.0000.ark"
    frames = archive.write_archive(ark, iter({"u0": np.arange(8, dtype=np.float32).reshape(2, 4)}.items()))
    (store / "feats.scp").write_bytes((store / "feats.0000.scp").read_bytes())
    kaldi.write_table(store / "utt2num_frames", {key: str(count) for key, count in frames.items()})

    def written(path: Path, data: bytes) -> Path:
        path.write_bytes(data)
        return path

    def segments(data: bytes) -> object:
        written(cut / "segments", data)
        return kaldi.load(cut, need_text=False)

    def header(data: bytes) -> object:
        written(ark, data)
        return archive.Store(store).read("u0")

    debug = (TOP / "egs/jsut/asr1/conf/debug.yaml").read_bytes()
    return {
        "text": Reader(
            lambda data: kaldi.read_table(written(folder / "text", data)),
            ("u0 今日は。\nu1\t東京 タワー\r\n".encode(),),
        ),
        "segments": Reader(segments, (b"u0 r0 0.0 0.2\nu1 r1 1e-1 3\n",)),
        "header": Reader(header, (ark.read_bytes(),)),
        "yaml": Reader(lambda data: configs.load(written(folder / "conf.yaml", data)), (debug,)),
        "command": Reader(
            lambda data: pipes.commands_of("here", data.decode("utf-8", "replace")),
            (b"sox a.wav -t wav - |", b"sph2pipe -f wav 'a b.sph' | sox -t wav - -r 16000 -t wav - |"),
        ),
        "hotwords": Reader(
            lambda data: read_hotwords(written(folder / "words", data)), ("難波\tナンバ\n東京\n".encode(),)
        ),
    }


def refuses_well(read: Callable[[bytes], object], data: bytes) -> None:
    """Read `data`; a fault must be one of ours, in one line.

    Raises:
        AssertionError: it is more than a line, or names no place.
    """
    try:
        read(data)
    except UserError as fault:
        if not fault.where or len(str(fault).splitlines()) != 1:
            message = f"is not one line that names a place: {fault}"
            raise AssertionError(message) from fault


def main() -> None:
    """Fuzz the reader that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=["text", "segments", "header", "yaml", "command", "hotwords"])
    parser.add_argument("--seconds", type=int, default=60, help="how long to look")
    parser.add_argument("--out", type=Path, default=Path("exp/fuzz"), help="folder of what is found")
    given = parser.parse_args()
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        sys.exit("error: atheris: is not installed; pip install atheris")
    corpus = given.out / given.reader
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        with atheris.instrument_imports(include=list(INSTRUMENTED)):
            reader = readers(Path(folder))[given.reader]
        for number, seed in enumerate(reader.seeds):
            (corpus / f"seed{number}").write_bytes(seed)
        limits = [f"-max_total_time={given.seconds}", f"-timeout={LONGEST_S}", "-rss_limit_mb=1024", "-max_len=4096"]
        findings = f"-artifact_prefix={given.out}/"
        atheris.Setup([sys.argv[0], *limits, findings, str(corpus)], lambda data: refuses_well(reader.read, data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
