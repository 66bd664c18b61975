"""The splice of prompt, sound and answer, and what training may change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tiny
import torch

from speechllm.config.schema import ConvMlpProjector, CtcProjector, LinearProjector, Projector
from speechllm.model.ctc import KANA
from speechllm.model.lm import load_lm
from speechllm.model.projector import ConvMlp
from speechllm.model.speechllm import SpeechLlm, kana_embeddings, pad_frames
from speechllm.text import prompt as prompts
from speechllm.text.prompt import encode

if TYPE_CHECKING:
    from pathlib import Path

FRAMES = (23, 6, 14)
TARGETS = (tiny.TEXTS[0], tiny.TEXTS[2], "")
IGNORED = -100  # transformers' label of what costs nothing
CONFIGS: dict[str, Projector] = {
    "conv_mlp": ConvMlpProjector(stride=5, hidden=8),
    "linear": LinearProjector(stride=4),
    "ctc": CtcProjector(hidden=8, dropout=0.0),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("lms")
    return {name: make(base / name) for name, make in tiny.LMS.items()}


@pytest.fixture(scope="module", params=[(lm, kind) for lm in tiny.LMS for kind in CONFIGS], ids="-".join)
def model(folders: dict[str, Path], request: pytest.FixtureRequest) -> SpeechLlm:
    name, kind = request.param
    return tiny.speech_llm(folders[name], name, CONFIGS[kind]).eval()


@pytest.fixture
def llama(folders: dict[str, Path]) -> SpeechLlm:
    return tiny.speech_llm(folders["llama"], "llama", CONFIGS["conv_mlp"])


def frames() -> tuple[torch.Tensor, list[int]]:
    torch.manual_seed(9)
    return pad_frames([torch.randn(count, tiny.WIDTH_H) for count in FRAMES], tiny.CPU)


def concatenated(model: SpeechLlm, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return vectors [1 l d] and labels [1 l] of one utterance, joined by hand as transformers wants them."""
    frames_beh, frames_b = frames()
    (audio_pd,) = model.projector(frames_beh[row : row + 1, : frames_b[row]], [frames_b[row]])
    parts = prompts.build(model.lm.tokenizer, tiny.FORM, TARGETS[row])
    pieces = [model.lm.embed(parts.before), audio_pd, model.lm.embed(parts.after), model.lm.embed(parts.answer)]
    silent = sum(len(piece) for piece in pieces[:3])
    return torch.cat(pieces)[None], torch.tensor([[IGNORED] * silent + list(parts.answer)])


def test_the_loss_is_hugging_faces_own_on_the_joined_vectors(model: SpeechLlm) -> None:
    with torch.no_grad():
        total, tokens = model.loss(*frames(), TARGETS)
        wanted, counted = 0.0, 0
        for row in range(len(FRAMES)):
            embeds_bld, labels_bl = concatenated(model, row)
            answer = int((labels_bl != IGNORED).sum())
            wanted += answer * float(model.lm.model(inputs_embeds=embeds_bld, labels=labels_bl).loss)
            counted += answer
    assert tokens == counted
    assert float(total) == pytest.approx(wanted, rel=1e-5)


def test_left_and_right_padding_give_the_same_logits(model: SpeechLlm) -> None:
    logits = []
    with torch.no_grad():
        for pad_left in (True, False):
            spliced = model.splice(*frames(), TARGETS, pad_left=pad_left)
            hidden_bld = model.lm.hidden(spliced.embeds_bld, spliced.mask_bl)
            logits.append(model.lm.logits(hidden_bld[spliced.mask_bl]))
            assert bool(spliced.mask_bl[:, -1].all()) is pad_left
            assert bool(spliced.mask_bl[:, 0].all()) is not pad_left
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)


def test_an_utterance_costs_in_a_batch_what_it_costs_alone(model: SpeechLlm) -> None:
    frames_beh, frames_b = frames()
    with torch.no_grad():
        together, _ = model.loss(frames_beh, frames_b, TARGETS)
        alone = [
            model.loss(frames_beh[row : row + 1, :count], [count], TARGETS[row : row + 1])[0]
            for row, count in enumerate(frames_b)
        ]
    assert float(together) == pytest.approx(float(sum(alone)), rel=1e-5)


def test_without_targets_the_splice_is_the_one_with_them_less_the_answer(llama: SpeechLlm) -> None:
    asked = llama.splice(*frames(), None)
    answered = llama.splice(*frames(), TARGETS)
    assert not asked.layout.labels
    for row, target in enumerate(TARGETS):
        length = int(asked.mask_bl[row].sum())
        read = len(encode(llama.lm.tokenizer, target))  # the end of the text is predicted, never read
        assert int(answered.mask_bl[row].sum()) == length + read
        torch.testing.assert_close(asked.embeds_bld[row, :length], answered.embeds_bld[row, :length])


@pytest.mark.parametrize("pad_left", [False, True])
def test_the_last_positions_of_a_row_predict_its_answer(llama: SpeechLlm, *, pad_left: bool) -> None:
    spliced = llama.splice(*frames(), TARGETS, pad_left=pad_left)
    answers = [[*encode(llama.lm.tokenizer, target), llama.lm.tokenizer.eos_token_id] for target in TARGETS]
    assert spliced.layout.labels == [token for answer in answers for token in answer]
    longest = spliced.mask_bl.shape[1]
    wanted: list[int] = []
    for row, answer in enumerate(answers):
        end = row * longest + (longest if pad_left else int(spliced.mask_bl[row].sum()))
        wanted += range(end - len(answer), end)
    assert spliced.layout.answer_at.tolist() == wanted


def test_the_sound_stands_between_prompt_and_answer(llama: SpeechLlm) -> None:
    frames_beh, frames_b = frames()
    spliced = llama.splice(frames_beh, frames_b, None)
    audio = llama.projector(frames_beh, frames_b)
    start = len(prompts.build(llama.lm.tokenizer, tiny.FORM, None).before)
    for row, audio_pd in enumerate(audio):
        torch.testing.assert_close(spliced.embeds_bld[row, start : start + len(audio_pd)], audio_pd)


def test_what_stands_in_the_frames_padding_changes_no_loss_of_a_bridge(folders: dict[str, Path]) -> None:
    bridge = tiny.speech_llm(folders["llama"], "llama", CONFIGS["ctc"]).eval()
    frames_beh, frames_b = frames()
    inside = torch.arange(frames_beh.shape[1]) < torch.tensor(frames_b)[:, None]
    dirty_beh = frames_beh.masked_fill(~inside[..., None], 7.0)
    with torch.no_grad():
        clean, dirty = (bridge.loss(one, frames_b, TARGETS)[0] for one in (frames_beh, dirty_beh))
    torch.testing.assert_close(clean, dirty)


def test_only_projector_and_adapter_get_gradients(llama: SpeechLlm) -> None:
    loss, _ = llama.loss(*frames(), TARGETS)
    loss.backward()  # type: ignore[no-untyped-call]
    touched = {name for name, value in llama.named_parameters() if value.grad is not None}
    wanted = {name for name, _ in llama.named_parameters() if name.startswith("projector.") or "lora_" in name}
    assert touched == wanted
    for name, value in llama.named_parameters():
        if value.grad is not None:
            assert value.grad.abs().max() > 0, name


def test_a_step_leaves_every_frozen_weight_as_it_was(llama: SpeechLlm) -> None:
    before = {name: value.detach().clone() for name, value in llama.named_parameters()}
    optimizer = torch.optim.AdamW([value for value in llama.parameters() if value.requires_grad], lr=0.1)
    loss, _ = llama.loss(*frames(), TARGETS)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    for name, value in llama.named_parameters():
        frozen = not (name.startswith("projector.") or "lora_" in name)
        assert torch.equal(value, before[name]) is frozen, name


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_training_changes_can_be_carried_to_another_model(kind: str, folders: dict[str, Path]) -> None:
    first = tiny.speech_llm(folders["llama"], "llama", CONFIGS[kind]).eval()
    second = tiny.speech_llm(folders["llama"], "llama", CONFIGS[kind]).eval()
    with torch.no_grad():
        for value in first.trainable_state().values():
            value.add_(0.3)
        state = {name: value.clone() for name, value in first.trainable_state().items()}
        before = float(second.loss(*frames(), TARGETS)[0])
        second.load_trainable(state)
        assert float(second.loss(*frames(), TARGETS)[0]) == float(first.loss(*frames(), TARGETS)[0]) != before


def test_the_trained_state_holds_projector_and_adapter_and_nothing_of_the_base(llama: SpeechLlm) -> None:
    state = llama.trainable_state()
    assert {name.split(".")[0] for name in state} == {"projector", "lm"}
    assert all("lora_" in name for name in state if name.startswith("lm."))
    assert sum(value.numel() for value in state.values()) == sum(
        value.numel() for value in llama.parameters() if value.requires_grad
    )


def test_a_kana_of_one_token_has_its_vector_and_one_of_several_their_mean(folders: dict[str, Path]) -> None:
    lm = tiny.load(folders["llama"])
    rows_kd = kana_embeddings(lm)
    assert rows_kd.shape == (len(KANA), lm.width)
    assert len(encode(lm.tokenizer, "ア")) == 3  # bytes: the tiny tokenizer knows no katakana
    torch.testing.assert_close(rows_kd[KANA.index("ア")], lm.embed(encode(lm.tokenizer, "ア")).mean(dim=0))


def test_a_bfloat16_model_takes_float32_frames(folders: dict[str, Path]) -> None:
    model = tiny.speech_llm(folders["llama"], "llama", CONFIGS["conv_mlp"])
    half = load_lm(tiny.found(folders["llama"]), "bfloat16", tiny.CPU, None)
    assert isinstance(model.projector, ConvMlp)
    narrow = SpeechLlm(model.projector, half, tiny.FORM)
    loss, _ = narrow.loss(*frames(), TARGETS)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.dtype == torch.float32
    assert model.projector.out.weight.grad is not None
    assert narrow.splice(*frames(), None).embeds_bld.dtype == torch.bfloat16


def test_padded_frames_are_zero_behind_each_row() -> None:
    frames_beh, frames_b = frames()
    assert (tuple(frames_b), frames_beh.shape) == (FRAMES, (3, 23, tiny.WIDTH_H))
    for row, count in enumerate(frames_b):
        assert not frames_beh[row, count:].any()
        assert frames_beh[row, :count].any(dim=1).all()
