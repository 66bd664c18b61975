"""Nue-ASR: the published checkpoint's layout, its logits, its texts, and training of all its parameters."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, HubertConfig, HubertModel

from speechllm import stages
from speechllm.data import kaldi
from speechllm.errors import ConfigError, ModelError
from speechllm.model import rinna
from speechllm.model.assemble import encoder_of, load_model, read_model
from speechllm.model.speechllm import pad_frames

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.slow

WIDTH = 16
LENGTHS = {"u1": 16_000, "u2": 9_000, "u3": 12_345, "u4": 16_000}
OLD_NAMES = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


@dataclass(frozen=True)
class Published:
    """A checkpoint as its authors have it, and a plain computation of what it says, one utterance at a time."""

    folder: Path
    hubert: HubertModel
    llm: GPTNeoXForCausalLM
    convs: list[nn.Conv1d]
    proj: nn.Linear
    tokenizer: PreTrainedTokenizerFast

    def start(self, wave_s: NDArray[np.float32]) -> Tensor:
        """Return what the language model reads, [1 l d]."""
        hidden = self.hubert(torch.from_numpy(wave_s)[None]).last_hidden_state.transpose(1, 2)
        for conv in self.convs:
            hidden = nn.functional.gelu(conv(hidden))
        audio = self.proj(hidden.transpose(1, 2))
        first, last = (self.tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "[SEP]"))
        embed = self.llm.get_input_embeddings()
        return torch.cat([embed(torch.tensor([[first]])), audio, embed(torch.tensor([[last]]))], dim=1)

    @torch.no_grad()
    def text(self, wave_s: NDArray[np.float32]) -> str:
        """Return the greedy text under the published bounds."""
        limit = int(4 * len(wave_s) / 16_000 + 20.5)
        ids = self.llm.generate(
            inputs_embeds=self.start(wave_s), do_sample=False, min_new_tokens=2, max_new_tokens=limit, pad_token_id=0
        )
        return " ".join(str(self.tokenizer.decode(ids[0], skip_special_tokens=True)).split())


def write_checkpoint(folder: Path, *, old_names: bool = False) -> Published:
    torch.manual_seed(21)
    sizes = {**tiny.WAV2VEC2_SIZES, **tiny.ENCODER_SPREAD}
    hubert = HubertModel(HubertConfig(**sizes)).eval()
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"sep_token": "[SEP]"})
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, **tiny.LM_SIZES, **tiny.SPREAD, **tiny.ENDS
    )
    llm = GPTNeoXForCausalLM(config).eval()
    convs = [nn.Conv1d(WIDTH, WIDTH, kernel_size=4, stride=2) for _ in range(2)]
    proj = nn.Linear(WIDTH, tiny.LM_WIDTH)
    nn.init.normal_(proj.weight, std=0.5)
    tensors = {f"audio_encoder.{name}": value for name, value in hubert.state_dict().items()}
    tensors |= {f"llm.{name}": value for name, value in llm.state_dict().items()}
    for number, conv in enumerate(convs):
        tensors |= {f"bridge_convs.{number}.{name}": value for name, value in conv.state_dict().items()}
    tensors |= {f"bridge_proj.{name}": value for name, value in proj.state_dict().items()}
    for new, old in OLD_NAMES.items() if old_names else ():
        tensors = {name.replace(new, old): value for name, value in tensors.items()}
    folder.mkdir(parents=True)
    shape = config.to_dict()
    if old_names:  # as transformers of 2023 wrote it
        rope = shape.pop("rope_parameters")
        shape |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
    copies = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    save_file(copies, folder / "model.safetensors")
    content = {
        "model_type": "nue_asr",
        "audio_encoder_config": {**hubert.config.to_dict(), "transformers_version": "4.33.0"},
        "llm_config": shape,
        "bridge_conv_kernel_size": [4, 4],
        "bridge_conv_stride": [2, 2],
    }
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return Published(folder, hubert, llm, convs, proj, tokenizer)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEECHLLM_CACHE", str(cache))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return write_checkpoint(tmp_path_factory.mktemp("published") / "nue")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.data_folder(tmp_path_factory.mktemp("sounds"), LENGTHS)


def waves(data: Path) -> dict[str, NDArray[np.float32]]:
    return {key: utt.read() for key, utt in kaldi.load(data).utterances.items()}


@pytest.mark.parametrize("old_names", [False, True])
@torch.no_grad()
def test_logits_are_those_of_a_plain_computation(tmp_path: Path, data: Path, *, old_names: bool) -> None:
    plain = write_checkpoint(tmp_path / "nue", old_names=old_names)
    model = load_model(rinna.imported(str(plain.folder)) / rinna.MODEL)
    sounds = waves(data)
    assert model.encoder is None
    encoder = encoder_of(*read_model(rinna.imported(str(plain.folder)) / rinna.MODEL))
    spliced = model.splice(*pad_frames(encoder.encode(list(sounds.values())), tiny.CPU), None)
    ours = model.lm.logits(model.lm.hidden(spliced.embeds_bld, spliced.mask_bl))
    for row, mask, wave_s in zip(ours, spliced.mask_bl, sounds.values(), strict=True):
        wanted = plain.llm(inputs_embeds=plain.start(wave_s)).logits[0]
        assert int(mask.sum()) == len(wanted)
        torch.testing.assert_close(row[: len(wanted)], wanted, atol=1e-5, rtol=0)


def test_texts_are_those_of_a_plain_computation_whatever_the_batch(
    tmp_path: Path, published: Published, data: Path
) -> None:
    options = {size: stages.BaselineOptions(model=str(published.folder), batch_size=size) for size in (1, 4)}
    for size, chosen in options.items():
        assert stages.baseline("nue-asr", data, tmp_path / f"out{size}", chosen) == len(LENGTHS)
    together = kaldi.read_table(tmp_path / "out4/text")
    assert together == kaldi.read_table(tmp_path / "out1/text")
    assert together == {key: published.text(wave_s) for key, wave_s in waves(data).items()}
    assert len(set(together.values())) > 1


def test_a_checkpoint_is_cut_once(published: Published) -> None:
    folder = rinna.imported(str(published.folder))
    before = (folder / "model/model.json").stat().st_mtime_ns
    assert rinna.imported(str(published.folder)) == folder
    assert (folder / "model/model.json").stat().st_mtime_ns == before


@pytest.fixture
def copy(tmp_path: Path, published: Published) -> Path:
    """A copy of the checkpoint that may be changed."""
    shutil.copytree(published.folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_an_unknown_tensor_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "adapter.weight": torch.zeros(2)}, copy / "model.safetensors")
    with pytest.raises(ModelError, match=r"holds the unknown tensor adapter\.weight; use the published checkpoint"):
        rinna.imported(str(copy))


def test_a_checkpoint_without_a_bridge_is_refused_every_time(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if "bridge" not in name}, copy / "model.safetensors")
    for _ in range(2):
        with pytest.raises(ModelError, match="has no tensor of the model; use the published checkpoint"):
            rinna.imported(str(copy))


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("bridge_conv_kernel_size", [99, 99], r"has bridge_conv_kernel_size \[99, 99\], not \[4, 4\]"),
        ("bridge_conv_stride", [[2], 2], "has bridge_conv_stride"),
        ("llm_config", None, "is no Nue-ASR checkpoint"),
    ],
)
def test_another_shape_of_bridge_or_model_is_refused(copy: Path, key: str, value: object, what: str) -> None:
    content = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**content, key: value}), encoding="utf-8")
    with pytest.raises(ModelError, match=what):
        rinna.imported(str(copy))


def test_a_tokenizer_that_spells_the_separator_out_is_refused(copy: Path) -> None:
    tiny.tokenizer().save_pretrained(copy)
    content = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**content, "note": "another model"}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"its tokenizer does not know \[SEP\]"):
        rinna.imported(str(copy))


def test_a_size_that_is_no_number_is_one_line(copy: Path, data: Path, tmp_path: Path) -> None:
    content = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    content["llm_config"]["hidden_size"] = "wide"
    (copy / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match=r"has no readable tokenizer .*hidden_size"):
        stages.baseline("nue-asr", data, tmp_path / "out", stages.BaselineOptions(model=str(copy)))


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no Nue-ASR checkpoint"):
        rinna.imported(str(tiny.llama(tmp_path / "lm")))


class Parts:
    """Base models, data and a configuration that trains all of it."""

    def __init__(self, folder: Path, published: Published, data: Path) -> None:
        cut = rinna.imported(str(published.folder))
        self.folder, self.data = folder, data
        self.conf = folder / "nue.yaml"
        self.conf.write_text(
            f"""
device: cpu
prompt: ""
template: "{{audio}}[SEP]"
encoder: {{name: {cut}/encoder, train: true}}
lm: {{name: {cut}/lm, dtype: float32, train: true}}
projector: {{kind: nue}}
lora: null
train: {{epochs: 2, batch_tokens: 200, peak_lr: 1e-2, base_lr: 1e-2, validate_every: 2, save_every: 1, warmup: 0}}
decode: {{min_tokens: 2}}
""",
            encoding="utf-8",
        )

    def train(self, exp: str) -> Path:
        stages.train(self.conf, self.data, self.data, self.folder / exp)
        return self.folder / exp


@pytest.fixture
def parts(tmp_path: Path, published: Published, data: Path) -> Parts:
    return Parts(tmp_path, published, data)


def test_all_parameters_are_trained_from_sounds_and_come_back(parts: Parts, published: Published) -> None:
    exp = parts.train("exp")
    trained = load_file(exp / "model/trained.safetensors")
    llm = published.llm.state_dict()
    assert any(name.startswith("encoder.") for name in trained)
    moved = [name for name in llm if not torch.equal(trained[f"lm.{name}"], llm[name])]
    assert len(moved) > len(llm) / 2
    assert stages.decode(exp, parts.data, exp / "decoded", {}) == len(LENGTHS)
    model = load_model(exp / "model")
    assert model.encoder is not None
    for name, value in model.encoder.module.named_parameters():
        torch.testing.assert_close(value.detach(), trained[f"encoder.{name}"])


def test_two_trainings_of_one_seed_are_equal_to_the_bit(parts: Parts) -> None:
    first, second = (load_file(parts.train(exp) / "model/trained.safetensors") for exp in ("one", "two"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_stored_features_are_refused_where_the_encoder_is_trained(parts: Parts) -> None:
    stored = tiny.feature_folder(parts.folder / "dump", {"u1": "a"}, {"u1": 20})
    with pytest.raises(ConfigError, match=r"holds stored features, but encoder\.train is set; name the data"):
        stages.train(parts.conf, stored, stored, parts.folder / "exp")
    exp = parts.train("exp")
    with pytest.raises(ConfigError, match="features of the encoder as it was before training"):
        stages.decode(exp, stored, exp / "decoded", {})
