"""Stage 6: one folder that holds a trained model and everything that tells what it is.

It is built under another name beside its own and renamed last, so that it is whole or not there.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from speechllm.errors import ConfigError, DataError, ModelError
from speechllm.model import hub
from speechllm.model.assemble import (
    CONFIG_FILE,
    MODEL_FILE,
    PROVENANCE_FILE,
    TRAINED_FILE,
    find_encoder,
    find_lm,
    read_model,
    tokenizer_of,
)
from speechllm.model.heads import HEADS_FILE, HEADS_RECORD
from speechllm.model.packed import FORMS, LM_FOLDER, MERGED, SUMS_FILE, check_sums, read_sums
from speechllm.model.state import load_tensors, save_tensors
from speechllm.pack import card, merged, remote_files, scores, vllm
from speechllm.runtime import (
    DTYPE_NAMES,
    naming,
    portable,
    provenance,
    read_json,
    sha256,
    sync_folder,
    torch_dtype,
    write_json,
    write_text,
)
from speechllm.score.signature import tool
from speechllm.text.normalize import get_profile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from speechllm.config.schema import Config
    from speechllm.model.assemble import Origin
    from speechllm.model.speechllm import SpeechLlm

log = logging.getLogger(__name__)

PACK_FILE = "pack.json"
LM_KEYS = "lm."
MAX_NOTES_BYTES = 1 << 20
EXPORTS = ("vllm",)
BASES = {"encoder": "encoder", "lm": "language model"}
"""What the record and what the card call a base model."""


@dataclass(frozen=True)
class PackOptions:
    """What a packed folder is to be."""

    form: str = "adapter"
    dtype: str = "float32"
    scores: tuple[Path, ...] = ()
    name: str | None = None
    """Title of the card; the experiment's where none is given."""
    licence: str | None = None
    """Short name of the licence on model hubs; the language model's where none is given."""
    notes: Path | None = None
    """Markdown for the card: where the training data come from, and their licence."""
    export: str | None = None

    def check(self) -> None:
        """Check what was asked for.

        Raises:
            ConfigError: there is no such form, precision or export.
        """
        known = {"--form": (self.form, FORMS), "--dtype": (self.dtype, DTYPE_NAMES)}
        if self.export is not None:
            known["--export"] = (self.export, EXPORTS)
        for option, (value, choices) in known.items():
            if value not in choices:
                raise ConfigError(option, f"there is no {value}", f"choose one of {', '.join(choices)}")


@dataclass(frozen=True)
class _Source:
    """The trained model that is packed."""

    folder: Path
    name: str
    config: Config
    origin: Origin
    training: Mapping[str, Any]


def pack(exp: Path, out: Path, options: PackOptions) -> bool:
    """Write the packed folder; return False where it is there already, made from the same.

    Raises:
        UserError: the model, the scores or the options are at fault, or `out` holds something else.
    """
    options.check()
    if options.export is not None:
        options = replace(options, form=MERGED)
    source = _source(exp)
    record = _record(source, options)
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.parent / f".{out.name}.lock", timeout=0)
    try:
        with lock:
            made = _pack_alone(source, out, options, record)
            Path(lock.lock_file).unlink(missing_ok=True)  # a folder to be shown stands beside nothing odd
            return made
    except Timeout as error:
        raise DataError(out, "another process is packing here", "wait for it to end") from error


def _pack_alone(source: _Source, out: Path, options: PackOptions, record: Mapping[str, object]) -> bool:
    if _is_packed(out, record):
        log.info("pack done already out=%s", out)
        return False
    for left_over in out.parent.glob(f".{out.name}.*.tmp"):  # by a kill
        shutil.rmtree(left_over)
    building = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        with naming(building):
            building.mkdir()
            _fill(building, source, options, record)
            _sync(building)
        _put_in_place(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return True


def _source(exp: Path) -> _Source:
    """Return the model of an experiment folder, or of a model folder itself."""
    folder = exp if (exp / MODEL_FILE).is_file() else exp / "model"
    config, origin = read_model(folder)
    if (folder / PACK_FILE).is_file():
        raise ModelError(folder, "is a packed folder itself", "pack the experiment that it was made from")
    notes = folder / PROVENANCE_FILE
    name = exp.resolve().name if folder != exp else exp.resolve().parent.name
    return _Source(folder, name, config, origin, read_json(notes) if notes.is_file() else {})


def _record(source: _Source, options: PackOptions) -> dict[str, object]:
    """Return what decides the content of the folder."""
    heads = source.folder / HEADS_FILE
    return {
        "model": sha256(source.folder / TRAINED_FILE),
        "heads": sha256(heads) if heads.is_file() else None,
        "form": options.form,
        "dtype": options.dtype,
        "scores": [sha256(path) if path.is_file() else None for path in options.scores],
        "name": options.name or source.name,
        "licence": options.licence,
        "notes": None if options.notes is None else sha256(_readable(options.notes)),
        "export": options.export,
        "tool": tool(),
    }


def _is_packed(out: Path, record: Mapping[str, object]) -> bool:
    """Return whether `out` is whole and made from `record`.

    Raises:
        DataError: it holds another model, or something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / PACK_FILE).is_file():
        raise DataError(out, "is there and is no packed folder", "choose another, or remove it")
    old = read_json(out / PACK_FILE).get("record")
    if not isinstance(old, dict) or old.get("model") != record["model"]:
        raise DataError(out, "holds another model", "remove the folder or choose another")
    if old != record:
        return False
    check_sums(out, read_sums(out))
    return True


def _put_in_place(building: Path, out: Path) -> None:
    """Rename the new folder to its own name; an older one of the same model stands until then."""
    old = out.parent / f".{out.name}.old.tmp"
    if out.exists():
        out.rename(old)
    building.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fill(folder: Path, source: _Source, options: PackOptions, record: Mapping[str, object]) -> None:
    shutil.copyfile(source.folder / CONFIG_FILE, folder / CONFIG_FILE)
    profiles = sorted({get_profile(name).tag for name in ("train", source.config.decode.normalize)})
    content = {**read_json(source.folder / MODEL_FILE), "text_profiles": profiles}
    encoder, language = find_encoder(source.config, source.origin), find_lm(source.config, source.origin)
    bases = {"encoder": encoder, "language model": language}
    content |= {f"{key}_weights": hub.weights_fingerprint(bases[part].folder) for key, part in BASES.items()}
    state = load_tensors(source.folder / TRAINED_FILE)
    if options.form == MERGED:
        model = merged.load_to_merge(source.folder, source.config)
        content |= _merge(folder, model, options)
        state = {name: value for name, value in state.items() if not name.startswith(LM_KEYS)}
    save_tensors(folder / TRAINED_FILE, _cast(source.folder / TRAINED_FILE, state, options.dtype))
    write_json(folder / MODEL_FILE, content)
    _take_heads_along(source.folder, folder, options.dtype)
    remote_files.write(folder, tokenizer_of(language, source.origin), source.config)
    write_json(folder / PROVENANCE_FILE, {**portable(source.training), "packed": portable(provenance())})
    facts = card.Facts(
        name=str(record["name"]),
        form=options.form,
        licence=options.licence,
        config=source.config,
        bases=bases,
        profiles=profiles,
        provenance=source.training,
        scores=[scores.read_score(path, source.training) for path in options.scores],
        notes="" if options.notes is None else options.notes.read_text(encoding="utf-8"),
        trained_bytes=(folder / TRAINED_FILE).stat().st_size,
    )
    write_text(folder / card.CARD_FILE, card.write_card(facts))
    write_json(folder / PACK_FILE, {"record": dict(record), "format": 1})
    _write_sums(folder)


def _merge(folder: Path, model: SpeechLlm, options: PackOptions) -> dict[str, object]:
    """Write the merged language model, and what an export needs; return what the record says of it."""
    if options.export == "vllm":
        vllm.write_export(folder, model)
    fingerprint = merged.save_lm(folder / LM_FOLDER, model.lm, options.dtype)
    return {"form": MERGED, "lm_fingerprint": fingerprint, "lm_weights": None, "kept_ids": None}


def _cast(where: Path, state: Mapping[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Return the tensors in the precision `dtype`.

    Raises:
        ConfigError: a number is too large for it.
    """
    wanted = torch_dtype(dtype)
    made = {}
    for name, value in state.items():
        made[name] = value.to(wanted) if value.is_floating_point() else value
        if not torch.isfinite(made[name]).all():
            raise ConfigError(where, f"{name} holds a number that {dtype} cannot", "pack with --dtype bfloat16")
    return made


def _take_heads_along(source: Path, folder: Path, dtype: str) -> None:
    """Copy the recognisers that were trained beside the model, where there are any."""
    if (source / HEADS_FILE).is_file() and (source / HEADS_RECORD).is_file():
        state = load_tensors(source / HEADS_FILE)
        save_tensors(folder / HEADS_FILE, _cast(source / HEADS_FILE, state, dtype))
        shutil.copyfile(source / HEADS_RECORD, folder / HEADS_RECORD)


def _readable(path: Path) -> Path:
    """Return the path of the notes.

    Raises:
        DataError: they are missing, too large or not UTF-8.
    """
    if not path.is_file():
        raise DataError(path, "no such file of notes", "write it, or leave --notes out")
    if path.stat().st_size > MAX_NOTES_BYTES:
        raise DataError(path, "is larger than 1 MiB", "give a short text")
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(path, f"is not UTF-8 ({error})", "save it as UTF-8") from error
    return path


def _write_sums(folder: Path) -> None:
    """Write the list of SHA-256 that ``sha256sum --check`` reads."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256(folder / name)}  {name}\n" for name in names]
    write_text(folder / SUMS_FILE, "".join(lines))


def _sync(folder: Path) -> None:
    """Make sure that every file is on the disk before the folder gets its name."""
    for path in folder.rglob("*"):
        # safetensors makes its files the owner's alone
        path.chmod(0o755 if path.is_dir() or path.suffix == ".sh" else 0o644)
        with suppress(IsADirectoryError), path.open("rb") as stream:
            os.fsync(stream.fileno())
