"""Makes torchaudio importable beside the torch that is there.

Its wheel holds an extension that is linked against one build of CUDA. Where that fails to load, transformers and peft
fail too, since they test for the installed package. Without the extension torchaudio says that it is unavailable, and
resampling, which is all we use, works.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path


def imports() -> bool:
    """Return whether torchaudio can be imported, tried in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", "import torchaudio"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> int:
    """Remove the extension where it cannot be loaded."""
    if imports():
        return 0
    spec = importlib.util.find_spec("torchaudio")
    if spec is None or spec.origin is None:
        print(
            "error: torchaudio: is not installed; run tools/setup.sh again",
            file=sys.stderr,
        )
        return 2
    for extension in (Path(spec.origin).parent / "lib").glob("_torchaudio*.so"):
        print(f"setup: removing {extension.name} of torchaudio, which does not load here")
        extension.unlink()
    if not imports():
        print(
            "error: torchaudio: still cannot be imported; install a release that fits torch",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
