"""One utterance on its way from wav.scp to CER: every value, its shape, and the function that made it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from speechllm.data import audio, kaldi
from speechllm.data.archive import as_stored
from speechllm.decode.batched import max_tokens, to_text
from speechllm.decode.engine import search
from speechllm.errors import DataError
from speechllm.model.assemble import encoder_of, load_model, read_model
from speechllm.model.ctc import best_kana
from speechllm.model.projector import CtcBridge
from speechllm.model.speechllm import pad_frames
from speechllm.runtime import read_json
from speechllm.score.errors import count_edits
from speechllm.text import prompt as prompts
from speechllm.text.normalize import normalize

if TYPE_CHECKING:
    from torch import Tensor

    from speechllm.config.schema import Config
    from speechllm.model.speechllm import SpeechLlm


def trace(utt_id: str, exp: Path, data_dir: Path | None) -> str:
    """Return the page of one utterance, decoded again on the spot.

    Raises:
        UserError: no such utterance or model.
    """
    config, origin = read_model(exp / "model")
    model = load_model(exp / "model", device="cpu")
    utt = _find(utt_id, exp, data_dir)
    page = _Page(utt_id)
    info = audio.inspect(utt.wav)
    page.add("wav.scp", utt.wav, "data.kaldi.load")
    page.add(
        "header",
        f"{info.duration_s:.3f} s, {info.sample_rate_hz} Hz, {info.num_channels} channel(s)",
        "data.audio.inspect",
    )
    wave_s = utt.read()
    duration_s = len(wave_s) / audio.SAMPLE_RATE_HZ
    page.add(
        "samples [s]",
        f"({len(wave_s)},) at {audio.SAMPLE_RATE_HZ} Hz, peak {abs(wave_s).max():.3f}",
        "data.audio.read",
    )
    encoder = model.encoder or encoder_of(config.model_copy(update={"device": "cpu"}), origin)
    frames_eh = encoder.encode([wave_s])[0]
    if model.encoder is None:
        frames_eh = torch.from_numpy(as_stored(frames_eh.numpy(), config.encoder.stored))
    page.add("frames [e h]", _shape(frames_eh), "model.encoder.SpeechEncoder.encode")
    hyp = _trace_model(page, model, config, frames_eh, duration_s)
    _trace_score(page, utt.text, hyp)
    return page.text()


class _Page:
    """Lines of `what value <- function`."""

    def __init__(self, title: str) -> None:
        self.lines = [title]

    def add(self, what: str, value: object, made_by: str) -> None:
        self.lines.append(f"  {what:<20} {value}   <- {made_by}")

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}, mean {tensor.float().mean():+.3f}, std {tensor.float().std():.3f}"


def _find(utt_id: str, exp: Path, data_dir: Path | None) -> kaldi.Utterance:
    """Return the utterance from `data_dir`, or from the data that a decode of `exp` was made from."""
    folders = (
        [data_dir]
        if data_dir is not None
        else [Path(str(read_json(path)["data_dir"])) for path in sorted(exp.glob("decode_*/*/decode.json"))]
    )
    for folder in folders:
        data = kaldi.load(folder, need_text=False)
        if utt_id in data.utterances:
            return data.utterances[utt_id]
    searched = ", ".join(map(str, folders)) or "no decoded data directory"
    raise DataError(utt_id, f"is in none of: {searched}", "name its data directory with --data")


@torch.inference_mode()
def _trace_model(page: _Page, model: SpeechLlm, config: Config, frames_eh: Tensor, duration_s: float) -> str:
    """Add projector, prompt, splice and search; return the text."""
    frames_beh, frames_b = pad_frames([frames_eh], torch.device("cpu"))
    projector = model.projector
    if isinstance(projector, CtcBridge):
        logits_bqk, _, tokens_b = projector.head(frames_beh, frames_b)
        page.add(
            "CTC head [q k]",
            f"{tuple(logits_bqk.shape[1:])}, hears {best_kana(logits_bqk[0, : tokens_b[0]])}",
            "model.ctc.CtcHead",
        )
    audio_pd = projector(frames_beh, frames_b)[0]
    page.add("audio tokens [p d]", _shape(audio_pd), f"model.projector.{type(projector).__name__}")
    parts = prompts.build(model.lm.tokenizer, model.form, None)
    shown = " ".join(map(repr, model.lm.tokenizer.convert_ids_to_tokens([*parts.before, *parts.after])))
    page.add(
        "prompt tokens",
        f"{len(parts.before)} before, {len(parts.after)} after the sound: {shown}",
        "text.prompt.build",
    )
    spliced = model.splice(frames_beh, frames_b, None, pad_left=True)
    page.add("LM input [l d]", _shape(spliced.embeds_bld[0]), "model.speechllm.SpeechLlm.splice")
    limit = max_tokens(config.decode, duration_s)
    (nbest,) = search(model.lm, model.question_start(), model.questions(frames_beh, frames_b), [limit], config.decode)
    best = nbest[0]
    pieces = model.lm.tokenizer.convert_ids_to_tokens(list(best.tokens))
    page.add(
        "tokens",
        f"{len(best.tokens)} of at most {limit}: {' '.join(map(str, pieces))}",
        "decode.engine.search",
    )
    page.add(
        "log probability",
        f"{best.log_prob:.3f} nats, {'ended' if best.ended else 'cut'}",
        "decode.engine.search",
    )
    text = to_text(model, best)
    page.add("text", text.text, "decode.batched.to_text")
    return text.text


def _trace_score(page: _Page, ref: str | None, hyp: str) -> None:
    """Add the comparison with the reference, where there is one."""
    if ref is None:
        return
    ref_norm, hyp_norm = normalize(ref), normalize(hyp)
    counts = count_edits(ref_norm, hyp_norm)
    page.add("reference", ref, "data.kaldi.load")
    page.add("reference, scored", ref_norm, "text.normalize.normalize")
    page.add("text, scored", hyp_norm, "text.normalize.normalize")
    page.add(
        "edits",
        f"{counts.sub} sub, {counts.dele} del, {counts.ins} ins of {counts.ref}",
        "score.errors.count_edits",
    )
    page.add("CER", f"{counts.edits / max(1, counts.ref):.4f}", "score.errors.count_edits")
