"""The command line: ``speechllm COMMAND``. Exit status 0 done, 2 the input's fault, 1 ours, 75 stopped on request."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Never, cast

import typer

from speechllm import cli_model
from speechllm.cli_model import ExpOption, OutOption, SetOption
from speechllm.errors import EXIT_OURS, EXIT_USER, ConfigError, Faults, Stopped, exit_status, fail, told
from speechllm.runtime import on_signals, setup_logging, write_json

if TYPE_CHECKING:
    from types import FrameType

app = typer.Typer(
    name="speechllm",
    help="Speech recognition with large language models: train, decode, score.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# typer keeps its base class of wrong arguments private, and its public BadParameter is one of them
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
MAX_PARTS = 1000
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PART = re.compile(r"(\d{1,9})/(\d{1,9})", re.ASCII)
TYPER_INTERRUPTED = 130  # what typer makes of KeyboardInterrupt before we can see it

ConfOption = Annotated[Path, typer.Option("--conf", help="Configuration file (YAML).")]
DataOption = Annotated[Path, typer.Option("--data", help="Kaldi data directory, or a dump of one.")]
PipesOption = Annotated[
    bool,
    typer.Option("--allow-pipes", help="Run the commands of wav.scp: no shell, known programs, five minutes each."),
]
JobsOption = Annotated[int, typer.Option("--nj", min=1, max=256, help="Processes.")]
ProfileOption = Annotated[str, typer.Option(help="Text profile: default, espnet, reazon, kotoba or raw.")]
PartOption = Annotated[
    str | None, typer.Option("--part", metavar="I/N", help="Only the I-th of N parts; a later call puts them together.")
]


@app.callback()
def _common(*, verbose: Annotated[bool, typer.Option("--verbose", help="Log more.")] = False) -> None:
    setup_logging(verbose=verbose)


@app.command()
def validate(
    data_dir: Annotated[Path, typer.Argument(help="Kaldi data directory.")],
    *,
    audio: Annotated[bool, typer.Option("--audio", help="Read every sound too.")] = False,
    allow_pipes: PipesOption = False,
) -> None:
    """Check a Kaldi data directory; print every fault, counts and hours."""
    import tempfile

    from speechllm.data import kaldi

    with tempfile.TemporaryDirectory() as piped:
        report = kaldi.validate(data_dir, with_audio=audio, piped=Path(piped) if allow_pipes else None)
    for fault in report.faults[1:]:
        print(fault)
    print(f"{data_dir}: {report.as_text()}")
    if report.faults:
        raise Faults(report.faults[:1])


@app.command()
def dump(
    conf: ConfOption,
    data: DataOption,
    out: OutOption,
    nj: JobsOption = 1,
    *,
    part: PartOption = None,
    max_dropped: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Part of the utterances that may be left out as unreadable.")
    ] = 0.01,
    allow_pipes: PipesOption = False,
) -> None:
    """Write frozen-encoder features of a data directory (stage 2)."""
    from speechllm import stages

    options = stages.DumpOptions(nj, _part(part), max_dropped, allow_pipes)
    count = stages.dump(conf, data, out, options)
    print(f"{out}: {count} utterances" + ("" if part is None else f" in part {part}"))


@app.command()
def train(
    conf: ConfOption,
    train: Annotated[Path, typer.Option("--train", help="Dump to train on.")],
    valid: Annotated[Path, typer.Option("--valid", help="Dump to validate on.")],
    exp: ExpOption,
    changes: SetOption = None,
    ngpu: Annotated[int, typer.Option(min=1, max=64, help="Processes, one a GPU; without GPUs on the CPU.")] = 1,
) -> None:
    """Train projector and adapter; goes on by itself where it was stopped (stage 3)."""
    from speechllm import stages
    from speechllm.train import launch

    if ngpu > 1 and not launch.is_launched():
        raise typer.Exit(launch.launch(sys.argv[1:], ngpu, exp))
    stages.train(conf, train, valid, exp, tuple(changes or ()))
    print(f"{exp}/model")


app.command()(cli_model.heads)


@app.command()
def decode(
    exp: ExpOption,
    data: DataOption,
    out: OutOption,
    *,
    beam: Annotated[int | None, typer.Option(min=1, max=64, help="Hypotheses kept; 1 is greedy.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, max=4096, help="Utterances at a time.")] = None,
    hotwords: Annotated[Path | None, typer.Option(help="Words to listen for: surface, tab, reading.")] = None,
    part: PartOption = None,
) -> None:
    """Write the texts of a data directory or a dump with a trained model (stage 4)."""
    from speechllm import stages

    given = {"beam": beam, "batch_size": batch_size}
    chosen = _part(part)
    stages.decode(
        exp, data, out, {key: value for key, value in given.items() if value is not None}, chosen, hotwords=hotwords
    )
    print(f"{out}/text" if chosen is None else f"{out}: part {part}")


@app.command()
def baseline(
    name: Annotated[str, typer.Argument(help="whisper, nue-asr, reazonspeech-espnet, reazonspeech-nemo or hyp.")],
    data: DataOption,
    out: OutOption,
    *,
    model: Annotated[str | None, typer.Option(help="Checkpoint; each baseline has its own default.")] = None,
    hyp: Annotated[Path | None, typer.Option(help="Ready hypothesis file, for hyp.")] = None,
    source: Annotated[str | None, typer.Option(help="Where that file came from, for hyp.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Utterances at a time.")] = 8,
) -> None:
    """Write another system's texts of the same data directory (stage 4)."""
    from speechllm import stages

    stages.baseline(name, data, out, stages.BaselineOptions(model, hyp, source, batch_size))
    print(f"{out}/text")


@app.command()
def score(
    ref: Annotated[Path, typer.Option("--ref", help="Reference, Kaldi text.")],
    hyp: Annotated[Path, typer.Option("--hyp", help="Hypotheses, Kaldi text.")],
    out: OutOption,
    *,
    profile: ProfileOption = "default",
    groups: Annotated[Path | None, typer.Option(help="Table of utterance and group, each scored apart too.")] = None,
    audio: Annotated[Path | None, typer.Option(help="wav.scp: the report gets a player.")] = None,
    ref_kana: Annotated[Path | None, typer.Option(help="Given readings of the references, Kaldi text.")] = None,
    kana_best: Annotated[bool, typer.Option(help="Given or automatic reading, whichever fits better.")] = False,
    missing_as_deletions: Annotated[bool, typer.Option(help="Score a decode that is not complete.")] = False,
) -> None:
    """Write score.json, the alignment and the report of a hypothesis file (stage 5)."""
    from speechllm.score.run import ScoreOptions, score_files

    options = ScoreOptions(
        profile=profile,
        groups=groups,
        audio=audio,
        ref_kana=ref_kana,
        kana_best=kana_best,
        missing_as_deletions=missing_as_deletions,
    )
    result = score_files(ref, hyp, out, options)
    for name, metric in result["metrics"].items():
        low, high = metric["ci95"]
        print(f"{name:12s} {100 * metric['value']:7.2f} %  [{100 * low:.2f}, {100 * high:.2f}]")
    print(f"{out}/score.json")


@app.command()
def compare(
    ref: Annotated[Path, typer.Option("--ref", help="Reference, Kaldi text.")],
    hyp: Annotated[list[Path], typer.Option("--hyp", help="Hypotheses of one system; give two or more.")],
    *,
    profile: ProfileOption = "default",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for compare.json and a report of all.")] = None,
) -> None:
    """Say which differences between systems are real."""
    from speechllm.score.run import ScoreOptions, compare_files, report_files

    options = ScoreOptions(profile=profile)
    print(compare_files(ref, hyp, options, out=out)["text"])
    if out is not None:
        print(report_files(ref, hyp, out, options))


app.command()(cli_model.pack)


@app.command()
def table(
    paths: Annotated[list[Path], typer.Argument(help="Table descriptions (YAML).")],
    out: Annotated[Path, typer.Option("--out", help="Markdown to write; LaTeX goes beside it.")] = Path("RESULTS.md"),
) -> None:
    """Write RESULTS.md and RESULTS.tex from score files alone."""
    from speechllm.score.table import write_table

    print(write_table(paths, out), end="")


@app.command()
def params(
    *,
    conf: Annotated[Path | None, typer.Option("--conf", help="Configuration file (YAML).")] = None,
    table: Annotated[Path | None, typer.Option("--table", help="Table description (YAML).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the counts.")] = None,
) -> None:
    """Count the parameters of a configuration, or of every row of a table, without weights."""
    from speechllm import count

    if (conf is None) == (table is None):
        raise ConfigError("params", "needs one of --conf and --table", "give one")
    records = count.count_conf(conf) if conf is not None else count.count_table(cast("Path", table))
    if json_file is not None:
        write_json(json_file, records)
    print(count.as_text(records), end="")


@app.command()
def tag(conf: ConfOption) -> None:
    """Print the name of the features that a configuration reads; nothing where its encoder is trained."""
    from speechllm.config import load as configs

    print(configs.load(conf).feature_tag)


@app.command()
def plan(
    conf: ConfOption,
    hours: Annotated[float, typer.Option("--hours", min=0.001, max=1e7, help="Hours of training sound.")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, max=100_000, help="Number of GPUs.")] = 1,
    gpu: Annotated[str, typer.Option("--gpu", help="h100, h200, a100, a100-40g, l40s or rtx4090.")] = "h100",
) -> None:
    """Say what training would take: memory, batch, hours, disk."""
    from speechllm import plan as plans
    from speechllm.config import load as configs

    config = configs.load(conf)
    print(plans.as_text(plans.plan(config, hours, gpus, gpu), config, hours, gpus, gpu), end="")


app.command()(cli_model.transcribe)


@app.command()
def trace(
    utt_id: Annotated[str, typer.Argument(help="Utterance of the decoded data directory.")],
    exp: ExpOption,
    data: Annotated[Path | None, typer.Option("--data", help="Data directory; default: the one decoded last.")] = None,
) -> None:
    """Print one utterance's way from wav.scp to CER."""
    from speechllm.trace import trace as run

    print(run(utt_id, exp, data), end="")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="train, decode or dump.")],
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Less data and one round: under a minute.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
    size: Annotated[str | None, typer.Option(help="Size of the models: docs/benchmarks.md lists them.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Budgets to look closer at: 4096,8192 (train).")] = None,
) -> None:
    """Time ours against what others do, in one run, after checking that all give the same results."""
    from speechllm.bench import common
    from speechllm.bench import run as benches

    try:
        found = benches.run(name, common.Options(quick, size, benches.budgets(tokens)))
    except common.Unequal as unequal:
        raise typer.Exit(fail(f"bench: {unequal}", EXIT_OURS)) from unequal
    if json_file is not None:
        write_json(json_file, found.record())
    print(found.as_text(), end="")


@app.command()
def slurm(
    ctx: typer.Context,
    command: Annotated[list[str], typer.Argument(help="dump, train, decode or baseline with its options, after --.")],
    *,
    conf: Annotated[Path, typer.Option("--conf", help="What the cluster is asked for (YAML).")] = Path("slurm.yaml"),
) -> None:
    """Run a command of stages 2 to 4 as Slurm jobs, and wait for them (docs/cluster.md)."""
    from speechllm.slurm import run as jobs

    jobs.check_kind(command[0])
    wanted = typer.main.get_command(app).get_command(ctx, command[0])  # type: ignore[attr-defined] # it is a group
    order = jobs.order(command, wanted.make_context(command[0], command[1:]).params)  # a wrong option is seen now
    status = jobs.run(order, conf)
    if status:
        raise typer.Exit(status)
    print(order.out)


app.command()(cli_model.serve)


def _part(text: str | None) -> tuple[int, int] | None:
    """Return number and count of ``I/N``; None where no part was asked for."""
    if text is None:
        return None
    if (match := PART.fullmatch(text)) is None:
        raise ConfigError("--part", f"'{text}' is not I/N", "write it as 1/4")
    number, count = int(match[1]), int(match[2])
    if not 1 <= number <= count <= MAX_PARTS:
        raise ConfigError("--part", f"there is no part {text}", f"take I from 1 to N, and N at most {MAX_PARTS}")
    return number, count


def main() -> None:
    """Run the command line and exit with the status that other programs rely on."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed; else the next file opened would take its place
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123 - it stays open
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # a path need not be UTF-8
    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads any more
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # it ends already
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Return the exit status of a command line; every fault is one line on stderr, and so is a stop."""

    def work() -> int:
        if threading.current_thread() is not threading.main_thread():
            return _run(arguments)
        with on_signals(STOPS[1:], _stop):
            return _run(arguments)

    return exit_status(work)


def _stop(number: int, _frame: FrameType | None) -> Never:
    raise Stopped(f"by {signal.Signals(number).name}; run the same command again")


def _run(arguments: list[str]) -> int:
    try:
        status = app(args=arguments or ["--help"], prog_name="speechllm", standalone_mode=False)
    except UsageError as error:
        command = arguments[0] if arguments and not arguments[0].startswith("-") else ""
        what = error.format_message() if isinstance(error, typer.BadParameter) else str(error)  # str lacks the option
        return fail(f"{f'speechllm {command}'.strip()}: {what.rstrip('.')}; see --help", EXIT_USER)
    except typer.Abort:
        return told(KeyboardInterrupt())
    except SystemExit:
        return 0  # typer's way to end where nobody reads what is printed any more, as in `| head -1`
    if status == TYPER_INTERRUPTED:
        return told(KeyboardInterrupt())
    started = status if isinstance(status, int) else 0  # of processes that a command started
    return started if arguments else EXIT_USER
