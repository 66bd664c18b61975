"""Turns a model's name into a local folder in Hugging Face format, and says where it came from.

Order: a folder of that path; ``$SPEECHLLM_MODELS/<name>``; the local cache of the model hub; a pinned
package that carries the same weights (converted once); the hub itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import pickle
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from speechllm.errors import ModelError
from speechllm.model import packaged
from speechllm.runtime import read_json

log = logging.getLogger(__name__)

EDGE_BYTES = 1 << 20  # of each weight file, hashed at both ends for the fingerprint
UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError),
    pickle.UnpicklingError,  # by torch, which makes nothing but tensors of a pickle
)
"""What transformers raises of a folder that it cannot read: a missing file, a wrong type, weights of another size."""
WEIGHT_SUFFIXES = (".safetensors", ".bin")
MAX_REASON_CHARS = 200


def reason_of(error: Exception) -> str:
    """Return in one line why a folder cannot be read."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own words tell the user how to run what is in the pickle
        return "its weights are a pickle of more than tensors"
    return " ".join(str(error).split())[:MAX_REASON_CHARS]


@dataclass(frozen=True)
class Resolved:
    """A model folder and its origin."""

    name: str
    folder: Path
    source: str
    licence: str
    fingerprint: str

    def record(self) -> dict[str, str]:
        """Return what provenance files keep: everything but the path of this machine."""
        return {key: str(value) for key, value in asdict(self).items() if key != "folder"}


def cache_dir() -> Path:
    """Return the folder of converted models: ``$SPEECHLLM_CACHE`` or ``~/.cache/speechllm``."""
    return Path(os.environ.get("SPEECHLLM_CACHE") or Path.home() / ".cache" / "speechllm")


def resolve(name: str, revision: str | None = None) -> Resolved:
    """Return the folder that holds model `name`, at `revision` where it comes from the hub.

    Raises:
        ModelError: no folder, cached hub model, package or reachable hub model has that name.
    """
    folder, source = _find(name, revision)
    if not (folder / "config.json").is_file():
        raise ModelError(folder, "is no model folder: it has no config.json", "name another model")
    licence = packaged.LICENCES.get(name, "see the model's own card")
    found = Resolved(name, folder, source, licence, fingerprint(folder))
    _announce(name, source, licence)
    return found


def resolve_trained_on(name: str, revision: str | None, wanted: str, weights: str | None = None) -> Resolved:
    """Return model `name` of the fingerprint `wanted`; where none has it, what `resolve` finds.

    A folder or the model hub comes first, and may hold other weights than the package that a model was trained on.
    `weights` is the fingerprint of the weights alone: a package's conversion that has it is the same model, though
    another release of transformers wrote its config.json.
    """
    found = resolve(name, revision)
    if found.fingerprint == wanted or revision is not None:
        return found
    if name not in packaged.PACKAGED or not packaged.is_installed(name):
        return found
    folder = _convert(name)
    if fingerprint(folder) != wanted and (weights is None or weights_fingerprint(folder) != weights):
        return found
    source = packaged.PACKAGED[name].source
    _announce(name, source, found.licence)
    return replace(found, folder=folder, source=source, fingerprint=wanted)


@functools.cache
def _announce(name: str, source: str, licence: str) -> None:
    """Say once which weights are used and under what licence."""
    log.info("model name=%s source=%s licence=%s", name, source, licence)


def find_local(name: str) -> Path | None:
    """Return the folder that the name means on this machine, packages and caches left out."""
    local = [Path(name)]
    if os.environ.get("SPEECHLLM_MODELS"):
        local.append(Path(os.environ["SPEECHLLM_MODELS"]) / name)
    return next((folder for folder in local if folder.is_dir()), None)


def _find(name: str, revision: str | None) -> tuple[Path, str]:
    local = find_local(name)
    if local is not None:
        return local, "local folder"
    cached = _from_hub(name, revision, local_only=True)
    if cached is not None and _is_whole(cached):
        return cached, "model hub (cached)"
    if revision is None and name in packaged.PACKAGED and packaged.is_installed(name):
        return _convert(name), packaged.PACKAGED[name].source
    downloaded = None if os.environ.get("HF_HUB_OFFLINE") == "1" else _from_hub(name, revision, local_only=False)
    if downloaded is None:
        fix = "give a folder, set SPEECHLLM_MODELS, or check the name and the network"
        if name in packaged.PACKAGED:
            fix = f"run tools/setup.sh, which installs {packaged.PACKAGED[name].source}"
        raise ModelError(name, "no such model folder, hub model or package", fix)
    return downloaded, "model hub"


def config_file(name: str, revision: str | None) -> Path:
    """Return config.json of a model, without its weights.

    Raises:
        ModelError: neither this machine nor the hub has it.
    """
    from huggingface_hub import hf_hub_download

    local = find_local(name)
    if local is not None:
        return local / "config.json"
    if revision is None and name in packaged.PACKAGED and packaged.is_installed(name):
        return _convert(name) / "config.json"
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision, etag_timeout=5))
    except unreachable() as error:
        fix = "give a folder, set SPEECHLLM_MODELS, or check the name and the network"
        raise ModelError(name, "no such model folder, known shape or hub model", fix) from error


def unreachable() -> tuple[type[BaseException], ...]:
    """Return what the hub's client raises where it cannot be reached.

    The transport library differs between releases of huggingface_hub; its errors module knows which.
    """
    from huggingface_hub import errors

    transport = [kind for name, kind in vars(errors).items() if name == "HTTPError"]
    return (errors.HFValidationError, OSError, ValueError, *transport)


def _is_whole(folder: Path) -> bool:
    """Return whether a cached snapshot has weights: transformers caches a tokenizer alone, too."""
    return (folder / "config.json").is_file() and any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir())


def _from_hub(name: str, revision: str | None, *, local_only: bool) -> Path | None:
    """Return the snapshot folder, or None where the hub has no such model or is out of reach.

    Raises:
        ModelError: the model is there, but its terms must be accepted first.
    """
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import snapshot_download

    folder = None
    try:
        # pickled weights only where there are no others; transformers reads them as tensors alone
        for pattern in ("*.safetensors", "*.bin"):
            patterns = ["*.json", "*.model", "*.txt", pattern]
            folder = Path(
                snapshot_download(
                    name, revision=revision, local_files_only=local_only, allow_patterns=patterns, etag_timeout=5
                )
            )
            if _is_whole(folder):
                break
    except hub_errors.GatedRepoError as error:
        fix = "accept its terms on the model hub and set HF_TOKEN"
        raise ModelError(name, "its owner asks for its terms to be accepted", fix) from error
    except unreachable():
        return None
    return folder


def _convert(name: str) -> Path:
    """Convert a packaged model once; two runs at a time wait for each other."""
    recipe = packaged.PACKAGED[name]
    folder = cache_dir() / f"{name.replace('/', '--')}-{recipe.version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            log.info("model convert name=%s from=%s (once, about a minute)", name, recipe.source)
            recipe.convert(folder)
    return folder


def fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits over config.json and the sizes and edges of the weight files."""
    return _with_weights(hashlib.sha256(_canonical_config(folder)), folder)


def weights_fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits over the sizes and edges of the weight files alone."""
    return _with_weights(hashlib.sha256(), folder)


def _with_weights(digest: hashlib._Hash, folder: Path) -> str:
    for path in sorted(folder.iterdir()):
        if path.suffix in WEIGHT_SUFFIXES:
            digest_edges(digest, path.name, path)
    return digest.hexdigest()[:16]


def digest_edges(digest: hashlib._Hash, name: str, path: Path) -> None:
    """Add a weight file to a digest: what it is called, its size, and both ends."""
    size = path.stat().st_size
    digest.update(f"{name}:{size}".encode())
    with path.open("rb") as stream:
        digest.update(stream.read(EDGE_BYTES))
        stream.seek(max(0, size - EDGE_BYTES))
        digest.update(stream.read(EDGE_BYTES))


def _canonical_config(folder: Path) -> bytes:
    config = read_json(folder / "config.json")
    for volatile in ("transformers_version", "_name_or_path"):
        config.pop(volatile, None)
    return json.dumps(config, sort_keys=True).encode()
