"""The configuration: what YAML may say, and what is said of YAML that may not."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from speechllm.config import load as configs
from speechllm.config.schema import Config, ConvMlpProjector, CtcProjector, Section
from speechllm.errors import ConfigError

CONF = Path(__file__).parents[2] / "egs" / "jsut" / "asr1" / "conf"
BASE = "encoder: {name: wavlm}\nlm: {name: youri}\n"


def _load(tmp_path: Path, text: str | bytes, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return configs.load(path, overrides)


def _fault(tmp_path: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("1.e-4", 1e-4),
        (".5e-3", 5e-4),
        ("5.0e-4", 5e-4),
        ("+2e+0", 2.0),
        ("0.001", 1e-3),
        ("1", 1.0),
    ],
)
def test_a_number_in_any_usual_form_is_a_float(tmp_path: Path, text: str, value: float) -> None:
    assert _load(tmp_path, f"{BASE}train: {{peak_lr: {text}}}").train.peak_lr == value
    assert configs.read_yaml(tmp_path / "c.yaml")["train"]["peak_lr"] == value


@pytest.mark.parametrize(("text", "value"), [("7", 7), ("010", 10), ("1_000", 1000), ("1e3", 1000)])
def test_an_integer_is_read_as_a_person_reads_it(tmp_path: Path, text: str, value: int) -> None:
    assert _load(tmp_path, f"{BASE}seed: {text}").seed == value


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "y", "N"])
def test_only_true_and_false_are_truth_values(tmp_path: Path, text: str) -> None:
    assert _load(tmp_path, f"encoder: {{name: {text}}}\nlm: {{name: l}}").encoder.name == text
    assert _fault(tmp_path, f"{BASE}seed: {text}").startswith("c.yaml:3: seed: Input should be a valid integer")


def test_true_is_true(tmp_path: Path) -> None:
    assert _load(tmp_path, f"{BASE}seed: 2", "encoder.pad_to_30s=true").encoder.pad_to_30s is True
    assert _fault(tmp_path, "encoder: {name: true}\nlm: {name: l}").startswith("c.yaml:1: encoder.name: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{BASE}seed: 1\nseed: 2\n", "c.yaml:4: seed stands here twice; delete one of the two"),
        (f"{BASE}train:\n  epochs: 2\n  epochs: 2\n", "c.yaml:5: epochs stands here twice"),
        (f"{BASE}1: 2\n", "c.yaml:3: the key 1 is not text; put it in quotes"),
        (f"{BASE}[a]: 2\n", "c.yaml:3: the key ['a'] is not text"),
        (f"{BASE}prompt: &a x\nseed: *a\n", "c.yaml:4: aliases are not read; write the value out"),
        (f"{BASE}<<: {{seed: 1}}\n", "c.yaml:3: is not YAML (could not determine"),
        (f"{BASE}seed: !!int 3\n", "c.yaml:3: tags are not read; write the value out"),
        (f"{BASE}seed: !!python/object/apply:os.getpid []\n", "c.yaml:3: tags are not read"),
        (f"{BASE}seed: 1:30\n", "c.yaml: is not YAML (invalid literal"),
        (f"{BASE}seed: [1\n", "c.yaml:4: is not YAML ("),
        (f"{BASE}\tseed: 1\n", "c.yaml:3: is not YAML (found character '\\t'"),
        (f"{BASE}---\nseed: 1\n", "c.yaml:3: is not YAML (but found another document)"),
        (f"{BASE}prompt: \x00\n", "c.yaml: is not YAML (unacceptable character #x0000"),
        (f'{BASE}prompt: "a\\ud800"\n', 'c.yaml:3: "a\\ud800" holds NUL or half a character; write whole characters'),
        (f'{BASE}"a\\0": 1\n', 'c.yaml:3: "a\\u0000" holds NUL or half a character'),
        ("[" * 500, "c.yaml:1: is nested more than 50 deep; give a configuration"),
        ("", "c.yaml: holds no mapping; see conf/ for examples"),
        ("- a\n", "c.yaml: holds no mapping"),
        (f"{BASE}prompt: 音声\n".encode("shift_jis"), "c.yaml: is not UTF-8 (byte 50); save it as UTF-8"),
        (b"a" * (1 << 20) + b"b", "c.yaml: is larger than 1 MiB; give a configuration"),
    ],
)
def test_a_file_that_is_no_plain_yaml_is_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    fault = _fault(tmp_path, text)
    assert fault.startswith(message)
    assert "\n" not in fault


def test_a_missing_file_and_a_folder_are_no_configuration(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(ConfigError) as caught:
            configs.load(path)
        assert str(caught.value) == f"{path}: no such configuration file; see conf/ for the ones there are"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{BASE}sed: 1\n", "c.yaml:3: unknown key sed; did you mean seed?"),
        ("encoder:\n  name: e\n  layr: 6\nlm: {name: l}\n", "c.yaml:3: unknown key encoder.layr; did you mean layer?"),
        (f"{BASE}train:\n  peek_lr: 1e-4\n", "c.yaml:4: unknown key train.peek_lr; did you mean peak_lr?"),
        (
            f"{BASE}projector:\n  kind: ctc\n  strid: 2\n",
            "c.yaml:5: unknown key projector.ctc.strid; did you mean stride?",
        ),
        (f"{BASE}zzzzzz: 1\n", "c.yaml:3: unknown key zzzzzz; delete it"),
        (f"{BASE}train:\n  epochs: 0\n", "c.yaml:4: train.epochs: Input should be greater than 0, got 0; see docs/"),
        (f"{BASE}train:\n  warmup: 1.5\n", "c.yaml:4: train.warmup: Input should be less than or equal to 1, got 1.5"),
        (f"{BASE}train:\n  peak_lr: 1e999\n", "c.yaml:4: train.peak_lr: Input should be a finite number"),
        (f"{BASE}train:\n  peak_lr: nan\n", "c.yaml:4: train.peak_lr: Input should be a finite number"),
        (f"{BASE}train:\n  peak_lr: viel\n", "c.yaml:4: train.peak_lr: Input should be a valid number"),
        (f"{BASE}device: gpu\n", "c.yaml:3: device: "),
        (f"{BASE}projector: {{kind: mlp}}\n", "c.yaml:3: projector: Input tag 'mlp'"),
        ("lm: {name: l}\n", "c.yaml:1: encoder: Field required"),
        ("encoder: {}\nlm: {name: l}\n", "c.yaml:1: encoder.name: Field required"),
    ],
)
def test_a_wrong_key_or_value_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    assert _fault(tmp_path, text).startswith(message)


def test_overrides_change_one_field_each(tmp_path: Path) -> None:
    config = _load(
        tmp_path, BASE, "train.peak_lr=1e-2", "lora.targets=[q_proj]", "projector.kind=ctc", "encoder.layer=6"
    )
    assert config.train.peak_lr == 0.01
    assert config.lora is not None
    assert config.lora.targets == ("q_proj",)
    assert isinstance(config.projector, CtcProjector)
    assert (config.encoder.name, config.encoder.layer) == ("wavlm", 6)
    assert _load(tmp_path, BASE, "lora=null").lora is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "seed: is no override; write it as key.key=value"),
        ("encoder.name.x=1", "encoder.name.x=1: name has no fields; write it as key.key=value"),
        ("train.bean=3", "c.yaml:1: unknown key train.bean; did you mean beam?"),
        ("seed=[", "seed=[:1: is not YAML ("),
        ('prompt="\\udfff"', 'prompt="\\udfff":1: "\\udfff" holds NUL or half a character'),
        ("seed=*a", "seed=*a:1: aliases are not read"),
        ("seed=!!python/name:os.system x", "seed=!!python/name:os.system x:1: tags are not read"),
        ("train={epochs: 1, epochs: 2}", "train={epochs: 1, epochs: 2}:1: epochs stands here twice"),
    ],
)
def test_a_faulty_override_is_one_line(tmp_path: Path, override: str, message: str) -> None:
    fault = _fault(tmp_path, BASE, override)
    assert fault.startswith(message)
    assert "\n" not in fault


def test_the_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = _load(
        tmp_path, BASE, "prompt=聞こえた通りに書いてください。", "train.augment.noise=0.1", "encoder.name='no'"
    )
    configs.dump(config, tmp_path / "out" / "resolved.yaml")
    text = (tmp_path / "out" / "resolved.yaml").read_text(encoding="utf-8")
    assert "聞こえた通りに" in text
    assert "clip_norm: 1.0" in text  # defaults are written too
    assert configs.load(tmp_path / "out" / "resolved.yaml") == config


def test_differences_name_the_fields(tmp_path: Path) -> None:
    old = _load(tmp_path, BASE)
    new = _load(tmp_path, BASE, "train.peak_lr=1e-2", "lora=null")
    assert configs.differences(old, old) == []
    found = configs.differences(old, new)
    assert found[0].startswith("lora: {'rank': 8")
    assert found[0].endswith(" -> None")
    assert found[1:] == ["train.peak_lr: 0.0001 -> 0.01"]


def test_a_configuration_is_frozen(tmp_path: Path) -> None:
    config = _load(tmp_path, BASE)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.epochs = 7  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_configuration_loads(path: Path) -> None:
    assert configs.load(path).encoder.name


def test_the_published_configuration_is_the_published_one() -> None:
    config = configs.load(CONF / "jsut.yaml")
    assert (config.encoder.name, config.lm.name) == ("microsoft/wavlm-large", "rinna/youri-7b")
    assert config.projector == ConvMlpProjector(stride=5, hidden=2048)
    assert config.lora is not None
    assert config.lora.rank == 8
    assert config.train.epochs == 3


def test_every_field_is_described() -> None:
    def sections(part: type[BaseModel]) -> list[type[BaseModel]]:
        return [one for child in part.__subclasses__() for one in (child, *sections(child))]

    fields = {
        f"{part.__name__}.{name}": field for part in sections(Section) for name, field in part.model_fields.items()
    }
    assert len(fields) > 40
    assert [name for name, field in fields.items() if not field.description] == []


def test_a_file_may_say_only_what_differs_from_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE + "train: {epochs: 7, peak_lr: 1e-3}\n", encoding="utf-8")
    found = _load(tmp_path, "extends: base.yaml\ntrain: {epochs: 9}\nlora: null\n", "seed=5")
    assert (found.encoder.name, found.train.epochs, found.train.peak_lr) == ("wavlm", 9, 1e-3)
    assert found.lora is None
    assert found.seed == 5


def test_a_section_of_another_kind_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE + "projector: {kind: conv_mlp, hidden: 9}\n", encoding="utf-8")
    assert _load(tmp_path, "extends: base.yaml\nprojector: {kind: linear, stride: 4}\n").projector.kind == "linear"
    same = _load(tmp_path, "extends: base.yaml\nprojector: {stride: 4}\n").projector
    assert isinstance(same, ConvMlpProjector)
    assert (same.hidden, same.stride) == (9, 4)


@pytest.mark.parametrize("name", ["../base.yaml", "/base.yaml", "base", "[a]"])
def test_what_is_extended_lies_beside_the_file(tmp_path: Path, name: str) -> None:
    assert "which names no file beside it; write extends: NAME.yaml" in _fault(tmp_path, f"extends: {name}\n{BASE}")


def test_a_file_that_extends_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("extends: c.yaml\n", encoding="utf-8")
    assert _fault(tmp_path, f"extends: d.yaml\n{BASE}") == "c.yaml: extends itself; take out one extends"


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    assert _fault(tmp_path, f"extends: gone.yaml\n{BASE}").startswith("gone.yaml: no such configuration file")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("template: no sound", "template must hold {audio} once"),
        ('template: "{audio}{audio}"', "template must hold {audio} once"),
        ("lm: {name: l, train: true}", "lm.train goes with lora: null"),
        ("lora: null\ntrain: {adapter_from: 0.5}", "train.adapter_from needs an adapter"),
        ("encoder: {name: e, train: true}\ntrain: {augment: {noise: 1}}", "train.augment masks features"),
        ("encoder: {name: e, train: true, dtype: bfloat16}", "encoder.train goes with encoder.dtype float32"),
        ("encoder: {name: e, train: true}\nprojector: {kind: ctc}", "projector ctc is trained on a frozen encoder"),
        ("lm: {name: l, train: true, dtype: float16}\nlora: null", "lm.train goes with lm.dtype auto"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "base.yaml").write_text(BASE, encoding="utf-8")
    assert what in _fault(tmp_path, f"extends: base.yaml\n{text}\n")


def test_a_fault_in_a_file_that_is_extended_is_named_there(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE + "train:\n  epochs: 3\n  peak_lr: -1\n", encoding="utf-8")
    assert _fault(tmp_path, "extends: base.yaml\ntrain:\n  epochs: 4\n").startswith("base.yaml:5: train.peak_lr: ")
    assert _fault(tmp_path, "extends: base.yaml\ntrain:\n  peak_lr: -2\n").startswith("c.yaml:3: train.peak_lr: ")


@pytest.mark.parametrize(
    ("encoder", "tag"),
    [
        ("{name: microsoft/wavlm-large}", "wavlm-large"),
        ("{name: /models/wavlm-large, dtype: bfloat16, layer: 18}", "wavlm-large-layer18-bfloat16"),
        ("{name: openai/whisper-base, pad_to_30s: true, revision: refs/pr/1}", "whisper-base-refs-pr-1-30s"),
        ("{name: rinna/japanese-hubert-base, train: true}", ""),
    ],
)
def test_features_have_a_folder_named_after_what_decides_them(tmp_path: Path, encoder: str, tag: str) -> None:
    assert _load(tmp_path, f"encoder: {encoder}\nlm: {{name: l}}\n").feature_tag == tag
