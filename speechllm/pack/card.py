"""The model card: README.md of a packed folder, with the head that model hubs read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from speechllm.model.packed import ADAPTER, MERGED
from speechllm.pack.scores import SHOWN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from speechllm.config.schema import Config
    from speechllm.model.hub import Resolved
    from speechllm.pack.scores import Score

CARD_FILE = "README.md"
REPO_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
LICENCE_TAGS = {"MIT": "mit", "Apache-2.0": "apache-2.0", "Gemma": "gemma"}
"""What a licence begins with, and its short name on model hubs."""
LOCAL = "local folder"  # what the module hub calls a folder of this machine: its name is nobody else's
UNKNOWN = "unknown to the program that wrote this card"


@dataclass(frozen=True)
class Facts:
    """What a card tells."""

    name: str
    form: str
    licence: str | None
    config: Config
    bases: Mapping[str, Resolved]
    """Encoder and language model that it was trained on, by those two words."""
    profiles: Sequence[str]
    provenance: Mapping[str, Any]
    scores: Sequence[Score]
    notes: str
    trained_bytes: int


def write_card(facts: Facts) -> str:
    """Return the card as Markdown."""
    head = yaml.safe_dump(_head(facts), allow_unicode=True, sort_keys=False)
    sections = [_what(facts), _use(facts), _training(facts), _scores(facts), _limits(facts), _licences(facts)]
    return f"---\n{head}---\n\n# {facts.name}\n\n" + "\n".join(sections)


def read_head(card: str) -> dict[str, Any] | None:
    """Return the head of a card; None where there is none, or it is not YAML."""
    found = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    if found is None:
        return None
    try:
        head = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return None
    return head if isinstance(head, dict) else None


def _head(facts: Facts) -> dict[str, Any]:
    """Return what hubs index: see "Model Cards" in the documentation of the Hugging Face hub."""
    head: dict[str, Any] = {
        "language": ["ja"],
        "library_name": "speechllm",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["speech-recognition", "speechllm", "custom_code"],
        "license": facts.licence or _licence_tag(facts),
    }
    named = [one.name for one in facts.bases.values() if REPO_NAME.fullmatch(one.name) and one.source != LOCAL]
    if named:
        head["base_model"] = named
    if facts.scores:
        head["metrics"] = ["cer"]
        results = [_indexed(score) for score in facts.scores]
        head["model-index"] = [{"name": facts.name, "results": results}]
    return head


def _licence_tag(facts: Facts) -> str:
    """Return the licence of the language model's weights, of which every form holds something; else ``other``."""
    licence = facts.bases["language model"].licence
    return next((tag for start, tag in LICENCE_TAGS.items() if licence.startswith(start)), "other")


def _indexed(score: Score) -> dict[str, Any]:
    """Return one entry of the head's ``model-index``."""
    return {
        "task": {"type": "automatic-speech-recognition"},
        "dataset": {"name": score.data, "type": score.data},
        "metrics": [
            {"type": name, "name": SHOWN[name], "value": round(100 * rate.value, 2)}
            for name, rate in score.rates.items()
        ],
    }


def _what(facts: Facts) -> str:
    config, encoder, language = facts.config, facts.bases["encoder"], facts.bases["language model"]
    share = "its whole weights" if config.lm.train else "a LoRA adapter" if config.lora else "nothing"
    holds = {
        ADAPTER: f"What training made, {facts.trained_bytes / 1e6:.1f} MB: the projector, and of the language model "
        f"{share}. The two base models are not in this folder: they are found by name when it is loaded, and must be "
        "those of the fingerprints below.",
        MERGED: "The projector, and in `lm/` the whole language model with what was trained of it merged in: an "
        "ordinary Hugging Face folder. The encoder is not in this folder: it is found by name when it is loaded.",
    }[facts.form]
    return (
        f"Speech recognition with a language model: `{encoder.name}` hears, a projector (`{config.projector.kind}`) "
        f"turns its frames into vectors, and `{language.name}` writes the text. Made with speechllm.\n\n"
        f"{holds}\n\n"
        f"* prompt: {config.prompt}\n"
        f"* encoder: `{encoder.name}`, fingerprint {encoder.fingerprint} ({encoder.source})\n"
        f"* language model: `{language.name}`, fingerprint {language.fingerprint} ({language.source})"
        + (", vocabulary cut to the tokens of Japanese text\n" if config.lm.cut_vocabulary else "\n")
        + f"* text profiles: {', '.join(facts.profiles)}\n"
    )


def _use(facts: Facts) -> str:
    lines = [
        "## How to use it\n",
        "All of these need the Python package `speechllm` installed; FOLDER is this folder.\n",
        "```bash\nspeechllm transcribe --model FOLDER hello.wav\n```\n",
        "```python",
        "from speechllm import SpeechLLM\n",
        'model = SpeechLLM.from_pretrained("FOLDER")',
        'print(model.transcribe("hello.wav").text)',
        "```\n",
        "```python",
        "from transformers import pipeline\n",
        'recognize = pipeline("automatic-speech-recognition", model="FOLDER", trust_remote_code=True)',
        'print(recognize("hello.wav")["text"])',
        "```\n",
    ]
    if facts.form == MERGED:
        load = 'AutoModelForCausalLM.from_pretrained("FOLDER/lm")'
        lines.append(f"The language model alone, for texts: `{load}`.\n")
    return "\n".join(lines)


def _training(facts: Facts) -> str:
    trained = facts.provenance.get("trained_on")
    trained = trained if isinstance(trained, dict) else {}
    rows = {
        "set": trained.get("training set", UNKNOWN),
        "hours": trained.get("training hours", UNKNOWN),
        "utterances": trained.get("training utterances", UNKNOWN),
        "identity of the data": trained.get("training data", UNKNOWN),
        "trained parameters": facts.provenance.get("trainable", UNKNOWN),
        "minutes": _minutes(facts.provenance.get("minutes")),
        "device": facts.provenance.get("device", UNKNOWN),
        "commit": facts.provenance.get("commit", UNKNOWN),
    }
    listed = "\n".join(f"* {name}: {value}" for name, value in rows.items())
    notes = facts.notes.strip() or f"Where the recordings come from and their licence: {UNKNOWN}."
    return f"## Training\n\n{listed}\n\n{notes}\n"


def _minutes(value: object) -> object:
    return round(value, 1) if isinstance(value, float) else value or UNKNOWN


def _scores(facts: Facts) -> str:
    if not facts.scores:
        return "## Scores\n\nNone were given to the program that wrote this card.\n"
    lines = ["## Scores\n", "| set | utterances | metric | % | 95 % interval |", "| --- | --- | --- | --- | --- |"]
    for score in facts.scores:
        for name, rate in score.rates.items():
            value, low, high = (f"{100 * one:.2f}" for one in (rate.value, *rate.ci95))
            lines.append(f"| {score.data} | {score.num_utts} | {SHOWN[name]} | {value} | {low} to {high} |")
    lines.append("\nHow each figure came about (figures of equal signatures can be compared):\n")
    lines += sorted({f"* `{rate.signature}`" for score in facts.scores for rate in score.rates.values()})
    return "\n".join(lines) + "\n"


def _limits(facts: Facts) -> str:
    hours = facts.provenance.get("trained_on", {}).get("training hours", UNKNOWN)
    return (
        "## Limits\n\n"
        f"* It writes Japanese, and was trained on {hours} hours of sound: expect the scores above on speech like its "
        "training data, and more errors on any other.\n"
        "* A language model can write fluent words that were not said. Names and numbers deserve a second look.\n"
        "* Sounds longer than 30 s are cut at pauses by `transcribe`; `recognize` and the transformers classes refuse "
        "them.\n"
        f"* The texts are exact in {facts.config.decode.dtype}, the precision in which it was scored.\n"
    )


def _licences(facts: Facts) -> str:
    rows = "\n".join(f"* {part}, `{found.name}`: {found.licence}" for part, found in facts.bases.items())
    return f"## Licences of the models it was made from\n\n{rows}\n"
