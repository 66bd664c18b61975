"""The commands that give a trained model work: `speechllm.cli` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from speechllm.errors import Faults

ExpOption = Annotated[Path, typer.Option("--exp", help="Experiment folder.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Change a field: key.key=value (repeatable).")]


def heads(
    exp: ExpOption,
    train: Annotated[Path, typer.Option("--train", help="Dump to train on.")],
    valid: Annotated[Path, typer.Option("--valid", help="Dump to validate on.")],
    changes: SetOption = None,
) -> None:
    """Add CTC heads to a trained model: times of words, doubt, drafts (docs/heads.md)."""
    from speechllm.train.heads import train_heads

    train_heads(exp, train, valid, tuple(changes or ()))
    print(f"{exp}/model/heads.json")


def pack(
    exp: ExpOption,
    out: OutOption,
    *,
    form: Annotated[str, typer.Option(help="adapter (small) or merged (with the whole language model).")] = "adapter",
    dtype: Annotated[str, typer.Option(help="Precision of what is stored: float32, float16 or bfloat16.")] = "float32",
    scores: Annotated[list[Path] | None, typer.Option("--scores", help="score.json for the card (repeatable).")] = None,
    name: Annotated[str | None, typer.Option(help="Title of the card; default: the experiment's name.")] = None,
    licence: Annotated[str | None, typer.Option("--licence", "--license", help="Its licence, as hubs call it.")] = None,
    notes: Annotated[Path | None, typer.Option(help="Markdown for the card: the data and their licence.")] = None,
    export: Annotated[str | None, typer.Option(help="vllm: merged, with what vLLM's prompt embeddings need.")] = None,
    push_to: Annotated[str | None, typer.Option("--push-to", help="OWNER/NAME on the model hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Only you can see it there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
) -> None:
    """Write a trained model as one folder that others load, and send it to a hub (stage 6)."""
    from speechllm.pack import folder, upload

    folder.pack(exp, out, folder.PackOptions(form, dtype, tuple(scores or ()), name, licence, notes, export))
    print(out)
    if push_to is not None:
        ready = upload.prepare(out, push_to)
        print(ready.as_text() if dry_run else upload.send(ready, private=private))


def transcribe(
    files: Annotated[
        list[Path], typer.Argument(help="Recordings, folders of them, Kaldi directories, or - for the standard input.")
    ],
    *,
    model: Annotated[
        Path | None, typer.Option("--model", help="Trained folder; default $SPEECHLLM_MODEL or the shipped one.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="txt, json, srt or vtt.")] = "txt",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for one file a recording; else printed.")] = None,
    hotwords: Annotated[Path | None, typer.Option(help="Words to expect, one a line: surface<TAB>reading.")] = None,
    beam: Annotated[int | None, typer.Option(min=1, max=64, help="Hypotheses kept; 1 is greedy.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
) -> None:
    """Write what is said in recordings of any length and format (docs/transcribe.md)."""
    from speechllm import transcribe as work

    output = work.Output(form, out)
    with work.found(files) as recordings:
        output.check(recordings)
        options = work.read_options(hotwords, beam)
        faults = work.transcribe(work.load(model, device), recordings, output, options)
    if faults:
        raise Faults(faults)


def serve(
    *,
    model: Annotated[Path | None, typer.Option("--model", help="Trained or packed model folder.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    language: Annotated[str, typer.Option(help="Language that the model writes, as requests name it.")] = "ja",
    max_bytes: Annotated[int, typer.Option(min=1000, max=10**10, help="Largest upload.")] = 100_000_000,
    max_seconds: Annotated[float, typer.Option(min=1, max=14_400, help="Longest recording.")] = 3600.0,
    max_queue: Annotated[int, typer.Option(min=1, max=10_000, help="Requests taken at a time.")] = 160,
    timeout: Annotated[float, typer.Option(min=1, max=86_400, help="Seconds from upload to answer.")] = 900.0,
    rate: Annotated[int, typer.Option(min=0, max=10**6, help="Requests a minute and address; 0: any.")] = 240,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="Name that a web server in front passes on (repeatable)."),
    ] = None,
) -> None:
    """Answer OpenAI's transcription requests, and show a page to record and correct (docs/serve.md)."""
    from speechllm.serve import server
    from speechllm.serve.limits import Limits

    limits = Limits(
        max_bytes=max_bytes,
        max_seconds=max_seconds,
        max_queue=max_queue,
        timeout_s=timeout,
        rate_per_min=rate,
        hosts=tuple(allow_host or ()),
    )
    server.serve(model, host, port, limits, language)
