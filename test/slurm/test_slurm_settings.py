"""The YAML of a cluster: strict, and described field by field."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from stand_in import write

from speechllm.errors import ConfigError
from speechllm.slurm.settings import PartsSettings, SlurmSettings, TrainSettings, load

if TYPE_CHECKING:
    from pydantic import BaseModel

TOP = Path(__file__).resolve().parents[2]
TEMPLATE = TOP / "egs/TEMPLATE/asr1/slurm.yaml"


def test_the_template_is_read_and_the_page_describes_every_field() -> None:
    read = load(TEMPLATE)
    assert (read.dump.parts, read.train.processes_per_node, read.decode.gpus) == (4, 8, 1)
    page = (TOP / "docs/cluster.md").read_text(encoding="utf-8")
    sections: list[type[BaseModel]] = [SlurmSettings, PartsSettings, TrainSettings]
    fields = {name: field for section in sections for name, field in section.model_fields.items()}
    assert [name for name in fields if f"`{name}`" not in page] == []
    assert [name for name, field in fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  node: 2\n", "slurm.yaml:2: unknown key train.node; did you mean nodes?"),
        ("dump: {nodes: 2}\n", "slurm.yaml:1: unknown key dump.nodes; did you mean nodes?"),
        ("# first\nfrobnicate: 1\n", "slurm.yaml:2: unknown key frobnicate; delete it"),
        ("dump: {parts: 0}\n", "slurm.yaml:1: dump.parts: Input should be greater than or equal to 1, got 0; see docs"),
        ("partition: a\npartition: b\n", "slurm.yaml:2: partition stands here twice; delete one of the two"),
        ("partition: 'a; reboot'\n", "slurm.yaml:1: partition: String should match pattern "),
        ("setup:\n- |\n  a\n  b\n", "slurm.yaml:1: setup.0: String should match pattern "),
        ("options: {array: 1-3}\n", "slurm.yaml: options may not hold array, which is set from the other fields; see"),
        ("train: {options: {signal: USR1}}\n", "slurm.yaml: options may not hold signal, which is set from the other"),
        ("warn_s: 600\ndump: {time_min: 10}\n", "slurm.yaml: warn_s (600) must be less than the time limit of dump; "),
        ("- a\n", "slurm.yaml: Input should be a valid dictionary or instance of SlurmSettings; see docs/cluster.md"),
    ],
)
def test_wrong_settings_are_refused_with_line_and_fix(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "slurm.yaml", text)
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert str(refused.value).startswith(f"{tmp_path}/{message}")


def test_settings_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: no such file; copy egs/TEMPLATE/asr1/slurm.yaml there"):
        load(tmp_path / "none.yaml")
