"""Puts a packed folder on a model hub; all that can be wrong with it is said before the network is touched."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from speechllm.errors import ConfigError, ModelError
from speechllm.model import hub
from speechllm.model.packed import SUMS_FILE, check_sums, read_sums
from speechllm.pack.card import CARD_FILE, REPO_NAME, read_head

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

NEEDED = ("license", "pipeline_tag", "library_name", "language")
"""What the head of a card must say."""


@dataclass(frozen=True)
class Upload:
    """What is to be sent."""

    folder: Path
    name: str
    files: dict[str, int]
    """Bytes of each file."""

    def as_text(self) -> str:
        """Return a table for a reader."""
        lines = [f"{size:>12,} {name}" for name, size in self.files.items()]
        return "\n".join([*lines, f"{sum(self.files.values()):>12,} bytes in {len(self.files)} files -> {self.name}"])


def prepare(folder: Path, name: str) -> Upload:
    """Return what would be sent to the repository `name`.

    Raises:
        ConfigError: `name` is not OWNER/NAME.
        ModelError: the folder is not packed, is damaged, or its card lacks something.
    """
    if not REPO_NAME.fullmatch(name) or ".." in name or "--" in name:
        raise ConfigError("--push-to", f"'{name}' is no name of a model on a hub", "write it as OWNER/NAME")
    sums = read_sums(folder)
    if not sums:
        raise ModelError(folder, f"is no packed folder ({SUMS_FILE} is missing)", "pack it first")
    check_sums(folder, sums)
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if strangers := found.keys() - sums.keys() - {SUMS_FILE}:
        raise ModelError(folder, f"holds {min(strangers)}, which was not packed", "take it out or pack again")
    _check_card(folder / CARD_FILE)
    return Upload(folder, name, {one: path.stat().st_size for one, path in found.items()})


def _check_card(path: Path) -> None:
    head = read_head(path.read_text(encoding="utf-8")) if path.is_file() else None
    if head is None:
        raise ModelError(path, "has no head of YAML between two lines of ---", "pack again")
    for key in NEEDED:
        if not head.get(key):
            raise ModelError(path, f"its head says no {key}", "pack again")


def send(upload: Upload, *, private: bool) -> str:
    """Send everything in one commit; return the address of the model.

    Raises:
        ModelError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    unreachable: tuple[type[BaseException], ...] = (OfflineModeIsEnabled, *hub.unreachable())
    api = HfApi()
    added = [CommitOperationAdd(name, upload.folder / name) for name in upload.files]
    try:
        address = api.create_repo(upload.name, private=private, exist_ok=True)
        api.create_commit(upload.name, added, commit_message="speechllm pack")
    except LocalTokenNotFoundError as error:
        raise ModelError(upload.name, "the hub does not know who you are", "set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = None if error.response is None else error.response.status_code
        fix = "set HF_TOKEN to a token that may write" if status in {401, 403} else "see its own pages, or try later"
        raise ModelError(upload.name, f"the hub refuses ({_short(error)})", fix) from error
    except unreachable as error:
        fix = "the folder is packed: try again with a network, or with HF_HUB_OFFLINE unset"
        raise ModelError(upload.name, f"the hub cannot be reached ({_short(error)})", fix) from error
    log.info("pack sent name=%s files=%d", upload.name, len(upload.files))
    return str(address)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
