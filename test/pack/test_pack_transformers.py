"""A packed folder in transformers: the Auto classes and the pipeline write what SpeechLLM writes."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import packing_model
import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    dynamic_module_utils,
    pipeline,
)

from speechllm import SpeechLLM
from speechllm.data import audio
from speechllm.pack.folder import PackOptions, pack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

TASK = "automatic-speech-recognition"


@pytest.fixture(scope="module", autouse=True)
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the code that transformers copies out of a packed folder out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        yield


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    pack(packing_model.experiment(folder), folder / "tiny", PackOptions())
    return folder / "tiny"


@pytest.fixture(scope="module")
def waves() -> list[NDArray[np.float32]]:
    return [packing_model.speech(sentence) for sentence in packing_model.SENTENCES]


@pytest.fixture(scope="module")
def wanted(packed: Path, waves: list[NDArray[np.float32]]) -> list[str]:
    texts = [one.text for one in SpeechLLM.from_pretrained(packed, "cpu").recognize(waves)]
    assert all(texts)
    return texts


@pytest.fixture(scope="module")
def recognize(packed: Path) -> Any:
    return pipeline(TASK, model=str(packed), trust_remote_code=True, device="cpu")


def test_the_pipeline_writes_the_texts_of_waves(
    recognize: Any, waves: list[NDArray[np.float32]], wanted: list[str]
) -> None:
    assert [recognize(wave)["text"] for wave in waves] == wanted
    assert [one["text"] for one in recognize(list(waves), batch_size=3)] == wanted


def test_the_pipeline_reads_files_and_bytes_of_another_rate(
    packed: Path, recognize: Any, waves: list[NDArray[np.float32]], tmp_path: Path
) -> None:
    sound = tmp_path / "hello.wav"
    audio.write_wav(sound, audio.resample(waves[0], 16_000, 44_100), 44_100)
    text = SpeechLLM.from_pretrained(packed, "cpu").recognize([audio.read(sound)])[0].text
    assert recognize(str(sound))["text"] == text
    assert recognize(sound.read_bytes())["text"] == text


def test_the_auto_classes_find_model_and_processor(
    packed: Path, waves: list[NDArray[np.float32]], wanted: list[str]
) -> None:
    config = AutoConfig.from_pretrained(packed, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(packed, trust_remote_code=True)
    assert config.vocab_size == len(processor.tokenizer)
    inputs = processor(list(waves), sampling_rate=16_000, padding=True, return_tensors="pt")
    for kind in (AutoModel, AutoModelForSpeechSeq2Seq):
        model = kind.from_pretrained(packed, trust_remote_code=True)
        tokens = model.generate(**inputs)
        assert processor.batch_decode(tokens, skip_special_tokens=True) == wanted
        assert [row[row != config.pad_token_id][-1] for row in tokens] == [config.eos_token_id] * 3


def test_a_saved_copy_is_the_same_folder(
    packed: Path, recognize: Any, waves: list[NDArray[np.float32]], wanted: list[str], tmp_path: Path
) -> None:
    recognize.model.save_pretrained(tmp_path / "copy")
    for path in packed.iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
    assert SpeechLLM.from_pretrained(tmp_path / "copy", "cpu").recognize(waves[:1])[0].text == wanted[0]


def test_a_beam_and_a_limit_can_be_asked_for(packed: Path, recognize: Any, waves: list[NDArray[np.float32]]) -> None:
    beam = SpeechLLM.from_pretrained(packed, "cpu").recognize(waves[:1], beam=3)[0].text
    assert recognize(waves[0], generate_kwargs={"num_beams": 3})["text"] == beam
    whole = recognize.model.generate(recognize.feature_extractor(waves[0], return_tensors="pt").input_values)
    part = recognize.model.generate(
        recognize.feature_extractor(waves[0], return_tensors="pt").input_values, max_new_tokens=2
    )
    assert part.tolist() == whole[:, :2].tolist()


def test_what_it_cannot_do_is_said(packed: Path, recognize: Any, waves: list[NDArray[np.float32]]) -> None:
    with pytest.raises(ValueError, match=r"decode\.dtype in its config\.yaml"):
        AutoModel.from_pretrained(packed, trust_remote_code=True, dtype="float16")
    with pytest.raises(NotImplementedError, match="speechllm train"):
        recognize.model(waves[0])
    with pytest.raises(ValueError, match="needs input_values"):
        recognize.model.generate()
    with pytest.raises(ValueError, match=r"lasts 31\.0 s"):
        recognize(np.zeros(31 * 16_000, np.float32))


def test_without_the_package_the_error_says_what_to_do(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(packed, tmp_path / "other")
    with (other / "modeling_speechllm.py").open("a", encoding="utf-8") as code:
        code.write("# changed, so that it is imported again\n")
    monkeypatch.setitem(sys.modules, "speechllm", None)  # as if it were not installed
    with pytest.raises(ImportError, match="needs the Python package speechllm, which is not installed"):
        AutoModel.from_pretrained(other, trust_remote_code=True)
