"""What a Slurm cluster is asked for: typed, frozen, strict YAML as the configuration of a run is."""

from __future__ import annotations

import difflib
import json
from typing import TYPE_CHECKING, Annotated

import yaml
from pydantic import Field, PositiveFloat, ValidationError, model_validator

from speechllm.config.load import read_yaml
from speechllm.config.schema import Section
from speechllm.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

# names go into lines of a batch script, so they hold nothing that a shell or Slurm could take for more
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_\[(][A-Za-z0-9_.,:/&|()\[\]*=+-]*$", max_length=200)]
OptionName = Annotated[str, Field(pattern=r"^[a-z][a-z-]*$", max_length=40)]
OptionValue = bool | int | Annotated[str, Field(pattern=r"^[ -~]+$", max_length=400)]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=100)]
Line = Annotated[str, Field(pattern=r"^[^\n\r\x00]+$", max_length=1000)]
OURS = (
    "array",
    "chdir",
    "cpus-per-task",
    "dependency",
    "error",
    "export",
    "gpus-per-node",
    "job-name",
    "mem",
    "no-requeue",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "requeue",
    "signal",
    "time",
    "wrap",
)
"""Options of sbatch that the fields below stand for, or that the way a stage runs depends on."""


class JobSettings(Section):
    """What the jobs of one stage ask for."""

    partition: Name | None = None
    """Partition of this stage; null takes the one of all stages."""
    time_min: Annotated[int, Field(ge=2, le=60 * 24 * 60)] = 240
    """Time limit; work that is not done by then saves, and its job goes into the queue again."""
    cpus: Annotated[int, Field(ge=1, le=1024)] = 4
    """Cores a process."""
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    """GPUs a node."""
    memory_gb: PositiveFloat | None = None
    """Memory a node, in units of 2**30 bytes; null takes what the cluster gives."""
    options: dict[OptionName, OptionValue] = Field(default_factory=dict)
    """Further options of sbatch, without dashes; they come on top of those of all stages."""


class PartsSettings(JobSettings):
    """A stage whose work is shared out among the jobs of an array."""

    parts: Annotated[int, Field(ge=1, le=1000)] = 1
    """Jobs of the array, one node each; 1 is a job without an array."""


class TrainSettings(JobSettings):
    """Training: one job of one or several nodes."""

    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Nodes of the job."""
    processes: Annotated[int, Field(ge=1, le=64)] | None = None
    """Processes a node; null is one a GPU, or one where no GPU is asked for."""

    @property
    def processes_per_node(self) -> int:
        """Return how many processes there are on each node."""
        return self.processes or max(1, self.gpus)


class SlurmSettings(Section):
    """A cluster, and what each stage asks of it."""

    partition: Name | None = None
    """Partition; null takes the cluster's default."""
    account: Name | None = None
    """Account that pays."""
    qos: Name | None = None
    """Quality of service."""
    constraint: Name | None = None
    """Features that the nodes must have."""
    options: dict[OptionName, OptionValue] = Field(default_factory=dict)
    """Further options of sbatch for every job, without dashes, such as `gres: "gpu:a100:4"`."""
    setup: tuple[Line, ...] = ()
    """Lines of shell, yours as they stand, that the batch script runs first, such as `module load cuda`."""
    environment: dict[VariableName, Line] = Field(default_factory=dict)
    """Environment variables of the work itself; no shell reads them."""
    warn_s: Annotated[int, Field(ge=10, le=3600)] = 120
    """Seconds before the time limit at which work is told to save; Slurm may do so up to 60 s earlier."""
    requeues: Annotated[int, Field(ge=0, le=10_000)] = 100
    """Most times that a job goes into the queue again."""
    poll_s: Annotated[float, Field(ge=0.2, le=600)] = 10.0
    """Seconds between two looks at the queue."""
    patience_s: Annotated[float, Field(ge=1, le=86_400)] = 600.0
    """Seconds for which the queue may fail to answer before the waiting command gives up; the jobs go on."""
    dump: PartsSettings = PartsSettings()
    """Stage 2."""
    train: TrainSettings = TrainSettings()
    """Stage 3."""
    decode: PartsSettings = PartsSettings()
    """Stage 4; baselines too, each as one job."""

    @model_validator(mode="after")
    def _can_be_run(self) -> SlurmSettings:
        """Refuse what would break the way a stage runs."""
        for name in ("dump", "train", "decode"):
            stage: JobSettings = getattr(self, name)
            taken = sorted({*self.options, *stage.options} & {*OURS})
            if taken:
                raise ValueError(f"options may not hold {taken[0]}, which is set from the other fields")
            if self.warn_s >= 60 * stage.time_min:
                raise ValueError(f"warn_s ({self.warn_s}) must be less than the time limit of {name}")
        return self


def load(path: Path) -> SlurmSettings:
    """Return the settings in a YAML file.

    Raises:
        ConfigError: no such file, an unknown key (the nearest right one is named), a wrong type or range.
    """
    if not path.is_file():
        raise ConfigError(path, "no such file", "copy egs/TEMPLATE/asr1/slurm.yaml there")
    content = read_yaml(path)
    try:
        return SlurmSettings.model_validate({} if content is None else content)
    except ValidationError as error:
        raise _explain(path, error) from error


def _explain(path: Path, error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    keys = [str(part) for part in first["loc"]]
    name = ".".join(keys)
    where = f"{path}:{_line_of(path, keys)}"
    if first["type"] == "extra_forbidden":
        sections = (SlurmSettings, PartsSettings, TrainSettings)
        near = difflib.get_close_matches(keys[-1], {key for one in sections for key in one.model_fields}, n=1)
        return ConfigError(where, f"unknown key {name}", f"did you mean {near[0]}?" if near else "delete it")
    message = first["msg"].removeprefix("Value error, ")
    if not keys:  # fields that contradict each other, or no mapping
        return ConfigError(path, message, "see docs/cluster.md")
    given = json.dumps(first.get("input"), ensure_ascii=False, default=str)[:80]
    return ConfigError(where, f"{name}: {message}, got {given}", "see docs/cluster.md")


def _line_of(path: Path, keys: list[str]) -> int:
    """Return the line where the last of `keys` stands that the file has, one inside the other."""
    node, line = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), 1
    for key in keys:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        for key_node, value_node in pairs:
            if key_node.value == key:
                line, node = key_node.start_mark.line + 1, value_node
                break
    return line
