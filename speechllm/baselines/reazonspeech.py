"""The ReazonSpeech baselines: ESPnet and NeMo models, decoded by their own toolkits in environments of their own.

Settings are those of ReazonSpeech's packages pkg/espnet-asr and pkg/nemo-asr, which its evaluation calls too
(github.com/reazon-research/ReazonSpeech); docs/baselines.md lists them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from speechllm.baselines.foreign import PARTIAL, Patience, Program, transcribe
from speechllm.data import kaldi
from speechllm.errors import ConfigError, ModelError
from speechllm.folders import DECODE_RECORD, begin, finish, is_made, leads_out, only_writer
from speechllm.model.hub import digest_edges, find_local, unreachable
from speechllm.runtime import provenance, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TOP = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).resolve().with_name("foreign_worker.py")
PATIENCE = Patience()
MAX_META_BYTES = 1 << 20
ESPNET_CHECKPOINTS = ("model.pth", "valid.acc.ave.pth", "valid.acc.best.pth")  # as its training and averaging name them


@dataclass(frozen=True)
class Model:
    """The files of a model, by what they are to the worker, and the folder that paths inside them start from."""

    folder: Path
    files: Mapping[str, Path]

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits over the sizes and both ends of the files. None of them is unpickled here."""
        digest = hashlib.sha256()
        for role, path in sorted(self.files.items()):
            digest_edges(digest, role, path)
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Baseline:
    """A toolkit in its environment, and what it is asked to do."""

    engine: str
    environment: str
    """Folder at the top of the repository."""
    variable: str
    """Environment variable that names another folder."""
    installer: str
    patterns: tuple[str, ...]
    """The files of its repository on the model hub."""
    find: Callable[[Path], Model]
    settings: Mapping[str, object]


def transcribe_dir(
    name: str, data_dir: Path, out: Path, model: str, batch_size: int, patience: Patience = PATIENCE
) -> int:
    """Write the texts that baseline `name` makes of a data directory to ``out/text``; return how many were made now.

    `model` is a name on the model hub or a local folder (NeMo: or a file). Utterances are decoded one at a time, as
    ReazonSpeech does; `batch_size` is how many sounds are read ahead, four at most.

    Raises:
        UserError: data, model or environment are at fault.
    """
    baseline = BASELINES.get(name)
    if baseline is None:
        raise ConfigError(name, "no such baseline", f"choose {' or '.join(BASELINES)}")
    if not (out / DECODE_RECORD).is_file():
        environment(name)  # before a model is downloaded for nothing
    data = kaldi.load(data_dir, need_text=False)
    found = locate(baseline, model)
    record = {
        "baseline": name,
        "model": model,
        "fingerprint": found.fingerprint(),
        "settings": dict(baseline.settings),
        "data": kaldi.audio_hash(data),
    }
    if is_made(out / DECODE_RECORD, record):
        return 0
    program = _program(name, baseline, found, patience)
    with only_writer(out):
        begin(out / DECODE_RECORD, record, data_dir=str(data_dir))
        made = transcribe(program, data, out, batch_size)
        write_json(out / "rtf.json", made.rtf)
        origin = {"name": model, "fingerprint": record["fingerprint"]}
        worker = {key: value for key, value in made.ready.items() if key != "device"}
        notes = {"model": origin, "device": made.ready.get("device"), "data": record["data"], "worker": worker}
        write_json(out / "provenance.json", provenance(notes))
        kaldi.write_table(out / "text", made.texts)
        finish(out / DECODE_RECORD)
        (out / PARTIAL).unlink()
    return made.decoded


def environment(name: str) -> Path:
    """Return the Python of the environment of baseline `name`.

    Raises:
        ConfigError: it is not installed.
    """
    baseline = BASELINES[name]
    folder = Path(os.environ.get(baseline.variable) or TOP / baseline.environment).absolute()
    python = folder / "bin" / "python"  # not resolved: its place tells Python which packages are its own
    if not python.is_file():
        raise ConfigError(folder, f"there is no environment for {name}", f"run {baseline.installer}")
    return python


def _program(name: str, baseline: Baseline, model: Model, patience: Patience) -> Program:
    files = {role: str(path.absolute()) for role, path in model.files.items()}
    order = json.dumps({"engine": baseline.engine, "files": files, "settings": dict(baseline.settings)})
    # -I: none of our packages nor the user's; its text files are UTF-8 whatever the locale
    command = (str(environment(name)), "-I", "-X", "utf8", str(WORKER), order)
    return Program(name, command, model.folder.absolute(), patience)


def locate(baseline: Baseline, name: str) -> Model:
    """Return the files of a model: a local path, ``$SPEECHLLM_MODELS/<name>``, the hub's cache, or the hub.

    Raises:
        ModelError: there is no such model, or its files are not those of one.
    """
    local = Path(name) if Path(name).is_file() else find_local(name)
    if local is not None:
        return baseline.find(local)
    cached = _from_hub(name, baseline.patterns, local_only=True)
    if cached is not None:
        with contextlib.suppress(ModelError):  # an interrupted download is finished below
            return baseline.find(cached)
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    downloaded = None if offline else _from_hub(name, baseline.patterns, local_only=False)
    if downloaded is None:
        fix = "give a folder, set SPEECHLLM_MODELS, or check the name and the network"
        raise ModelError(name, "no such model folder or hub model", fix)
    return baseline.find(downloaded)


def _from_hub(name: str, patterns: tuple[str, ...], *, local_only: bool) -> Path | None:
    """Return the snapshot folder, or None where the hub has no such model or is out of reach."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                local_files_only=local_only,
                allow_patterns=list(patterns),
                ignore_patterns=["exp/lm_*"],  # ESPnet's language model, which the published settings switch off
                etag_timeout=5,
            )
        )
    except unreachable():
        return None


def find_espnet(folder: Path) -> Model:
    """Return the model in an unpacked ESPnet package (meta.yaml) or in an experiment folder (config.yaml, checkpoint).

    Relative paths in ESPnet's configurations start from the top of the package, or from the recipe that holds ``exp``.

    Raises:
        ModelError: it is neither.
    """
    if (folder / "meta.yaml").is_file():
        return Model(folder, _read_meta(folder / "meta.yaml"))
    if not (folder / "config.yaml").is_file():
        what = "is no ESPnet model: it has neither meta.yaml nor config.yaml"
        raise ModelError(folder, what, "give an unpacked package or an experiment folder")
    there = [folder / name for name in ESPNET_CHECKPOINTS if (folder / name).is_file()]
    if not there:
        what = f"has no checkpoint: none of {', '.join(ESPNET_CHECKPOINTS)}"
        raise ModelError(folder, what, "link the one to use to model.pth")
    recipe = folder.absolute().parent
    root = recipe.parent if recipe.name == "exp" else folder
    return Model(root, {"config": folder / "config.yaml", "model": there[0]})


def _read_meta(path: Path) -> dict[str, Path]:
    """Return configuration and checkpoint that an ESPnet package names.

    Format: espnet2/main_funcs/pack_funcs.py in github.com/espnet/espnet.
    """
    fix = "give an ESPnet package for speech recognition"
    if path.stat().st_size > MAX_META_BYTES:
        raise ModelError(path, f"is larger than {MAX_META_BYTES} bytes", fix)
    try:
        meta = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ModelError(path, f"is no YAML that can be read ({error})", fix) from error
    files = {}
    for role, section, key in (("config", "yaml_files", "asr_train_config"), ("model", "files", "asr_model_file")):
        table = meta.get(section) if isinstance(meta, dict) else None
        given = table.get(key) if isinstance(table, dict) else None
        if not isinstance(given, str):
            raise ModelError(path, f"names no {key} under {section}", fix)
        if leads_out(given):
            raise ModelError(path, f"{key} {given} leads out of its folder", fix)
        files[role] = path.parent / given
        if not files[role].is_file():
            raise ModelError(path, f"{key} {given} is not there", "unpack or download it again")
    return files


def find_nemo(place: Path) -> Model:
    """Return the .nemo archive that is given, or that is alone in its folder.

    Raises:
        ModelError: there is none, or there are several.
    """
    archives = [place] if place.is_file() else sorted(place.glob("*.nemo"))
    if len(archives) != 1:
        raise ModelError(place, f"holds {len(archives)} .nemo files, one is needed", "give the file itself")
    return Model(archives[0].parent, {"model": archives[0]})


BASELINES: dict[str, Baseline] = {
    "reazonspeech-espnet": Baseline(
        engine="espnet",
        environment=".venv-espnet",
        variable="SPEECHLLM_ESPNET",
        installer="tools/install_espnet.sh",
        patterns=("*.yaml", "*.pth", "*.npz", "*.model", "*.txt"),
        find=find_espnet,
        settings={
            # what Speech2Text takes where nothing is said, which is what ReazonSpeech does
            "beam_size": 20,
            "ctc_weight": 0.5,
            "penalty": 0.0,
            "maxlenratio": 0.0,
            "minlenratio": 0.0,
            # ReazonSpeech's own
            "pad_samples": [16_000, 8_000],
            "window_s": 20,
            "pause_probability": 0.98,
        },
    ),
    "reazonspeech-nemo": Baseline(
        engine="nemo",
        environment=".venv-nemo",
        variable="SPEECHLLM_NEMO",
        installer="tools/install_nemo.sh",
        patterns=("*.nemo",),
        find=find_nemo,
        settings={"pad_s": 0.5},
    ),
}
