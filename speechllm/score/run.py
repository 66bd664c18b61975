"""Scoring from files to files: score one system, compare several, show several side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from speechllm.data.kaldi import byte_order, read_table
from speechllm.errors import ConfigError, DataError
from speechllm.runtime import portable, read_json, sha256, write_json, write_text
from speechllm.score import interchange, report
from speechllm.score.breakdown import breakdown, forgiven
from speechllm.score.compare import COMPARED_METRICS, compare_systems, comparison_text
from speechllm.score.metrics import MACRO_METRIC, MICRO_METRICS, Bootstrap, Metric, summarise
from speechllm.score.signature import signature
from speechllm.score.texts import read_joined, some_ids
from speechllm.score.utterance import UttScore, Wanted, score_utterance
from speechllm.text.normalize import DEFAULT_PROFILE, Profile, get_profile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreOptions:
    """What scoring is asked for."""

    profile: str = DEFAULT_PROFILE
    """Text profile, with or without its version: ``default``, ``kotoba_v1``."""
    metrics: tuple[str, ...] = MICRO_METRICS
    """Which to compute; ``cer``, ``macro_cer`` and ``ser`` always are, the others take their time."""
    missing_as_deletions: bool = False
    """Count a reference without hypothesis as deleted, instead of refusing."""
    ref_kana: Path | None = None
    """Kaldi file ``<utt-id> <kana>`` with given readings of references; ids without one are read automatically."""
    kana_best: bool = False
    """Per utterance, the smaller of the kana errors against the given and against the automatic reading."""
    groups: Path | None = None
    """Kaldi file ``<utt-id> <group>``; every group gets its own metrics."""
    audio: Path | None = None
    """wav.scp; its files get a player in the report."""
    report: bool = True
    """Whether to write report.html."""
    bootstrap: int = 1000
    """Samples for the intervals; 0 for none."""
    seed: int = 0
    """Seed of the bootstrap."""


MADE = frozenset({"ref.trn", "hyp.trn", "result.txt", "alignment.jsonl", "forgiven.tsv", "report.html", "score.json"})


@dataclass(frozen=True, slots=True)
class ScoredSystem:
    """One system's utterances and everything that score.json says of them."""

    name: str
    scores: list[UttScore] = field(repr=False)
    result: dict[str, Any]


def score_files(ref: Path, hyp: Path, out: Path, options: ScoreOptions) -> dict[str, Any]:
    """The content of ``out/score.json`` after scoring ``hyp`` against ``ref`` (Kaldi ``text`` files) into ``out``.

    Raises:
        UserError: no such profile or metric.
        DataError: a file is at fault, or ids do not match.
    """
    for path in (ref, hyp):
        if path.name in MADE and path.resolve().parent == out.resolve():
            raise DataError(path, "would be written over by what is made of it", "name another --out")
    system = _score_system(ref, hyp, _system_name(hyp), options)
    texts = [(one.text.utt_id, one.ref_norm, one.hyp_norm) for one in system.scores]
    write_text(out / "ref.trn", interchange.trn_lines([(utt_id, text) for utt_id, text, _ in texts]))
    write_text(out / "hyp.trn", interchange.trn_lines([(utt_id, text) for utt_id, _, text in texts]))
    write_text(out / "result.txt", interchange.sum_avg_block(system.scores, str(hyp)))
    write_text(out / "alignment.jsonl", "".join(map(interchange.alignment_line, system.scores)))
    _write_or_clear(
        out / "forgiven.tsv",
        interchange.forgiven_table(forgiven(system.scores)) if "cer_lenient" in options.metrics else None,
    )
    _write_or_clear(out / "report.html", _report_page([system], out, options) if options.report else None)
    result = {**system.result, "made_from": _made_from(ref, hyp)}
    write_json(out / "score.json", result)  # last: its presence means that the rest is there
    return result


def _made_from(ref: Path, hyp: Path) -> dict[str, object]:
    """What was scored, by its sums, and how the hypotheses came about, where the folder they lie in says so."""
    notes = hyp.parent / "provenance.json"
    run = portable(read_json(notes)) if notes.is_file() else {}
    return {"ref_sha256": sha256(ref), "hyp_sha256": sha256(hyp), "run": run}


def _write_or_clear(path: Path, text: str | None) -> None:
    """Write a file, or remove what an earlier scoring with other options left there."""
    if text is None:
        path.unlink(missing_ok=True)
    else:
        write_text(path, text)


def compare_files(
    ref: Path,
    hyps: Sequence[Path],
    options: ScoreOptions,
    names: Sequence[str] | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Every two of several systems compared; ``text`` in the result is for the terminal.

    With ``out``, also written there as compare.json and compare.txt.

    Raises:
        UserError: no such profile or metric, fewer than two systems, or two of one name.
        DataError: a file is at fault, or ids do not match.
    """
    if len(hyps) < 2:  # noqa: PLR2004 - a comparison takes two
        raise ConfigError("compare", "needs at least two hypothesis files", "give --hyp twice or more")
    systems = _score_systems(ref, hyps, names, options)
    metrics = [name for name in COMPARED_METRICS if name in {"cer", *options.metrics}]
    comparisons = compare_systems(
        {one.name: one.scores for one in systems},
        metrics,
        Bootstrap(options.bootstrap, options.seed),
    )
    result = {
        "systems": [{"name": one.name, **one.result} for one in systems],
        "comparisons": [one.as_dict() for one in comparisons],
        "text": comparison_text(comparisons, [one.name for one in systems]),
    }
    if out:
        write_text(out / "compare.txt", str(result["text"]))
        write_json(out / "compare.json", result)
    return result


def report_files(
    ref: Path,
    hyps: Sequence[Path],
    out: Path,
    options: ScoreOptions,
    names: Sequence[str] | None = None,
) -> Path:
    """Path of ``out/report.html``, which shows one or several systems side by side.

    Raises:
        UserError: no such profile or metric, or two systems of one name.
        DataError: a file is at fault, or ids do not match.
    """
    systems = _score_systems(ref, hyps, names, options)
    write_text(out / "report.html", _report_page(systems, out, options))
    return out / "report.html"


def _score_systems(
    ref: Path, hyps: Sequence[Path], names: Sequence[str] | None, options: ScoreOptions
) -> list[ScoredSystem]:
    """All systems, under the names given or those of their files.

    Raises:
        ConfigError: names are not as many as files, or two are the same.
    """
    names = names or _system_names(hyps)
    if len(names) != len(hyps) or len(set(names)) != len(names):
        raise ConfigError(
            "names",
            f"{', '.join(names)} for {len(hyps)} systems",
            "give each system a name of its own",
        )
    return [_score_system(ref, hyp, name, options) for hyp, name in zip(hyps, names, strict=True)]


def _system_names(hyps: Sequence[Path]) -> list[str]:
    """Names of several, with as many folders in front as tell them apart.

    Raises:
        ConfigError: a file is there twice.
    """
    folders = [hyp.resolve().parent.parts[: -1 if hyp.name == "text" else None] for hyp in hyps]
    for depth in range(1 + max(map(len, folders))):
        names = [
            "/".join([*parts[max(0, len(parts) - depth) :], _system_name(hyp)])
            for hyp, parts in zip(hyps, folders, strict=True)
        ]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("--hyp", "names one file twice", "give each system once")


def _system_name(hyp: Path) -> str:
    """What tells a hypothesis file from others: its folder if it is called ``text``, else its own name."""
    if hyp.name == "text":
        return hyp.resolve().parent.name
    return hyp.name.removesuffix(".text").removesuffix(".txt")


def _score_system(ref: Path, hyp: Path, name: str, options: ScoreOptions) -> ScoredSystem:
    """One system, scored and summarised.

    Raises:
        UserError: no such profile or metric.
        DataError: a file is at fault, or ids do not match.
    """
    profile = get_profile(options.profile)
    if unknown := set(options.metrics) - {*MICRO_METRICS, MACRO_METRIC}:
        raise ConfigError("metrics", f"no metric {min(unknown)!r}", f"choose from {', '.join(MICRO_METRICS)}")
    texts = read_joined(ref, hyp, missing_as_deletions=options.missing_as_deletions)
    kana = _given_kana(options.ref_kana, [one.utt_id for one in texts])
    wanted = Wanted(profile=profile, metrics=frozenset(options.metrics), kana_best=options.kana_best)
    progress = tqdm(texts, desc=f"score {name}", unit="utt", leave=False, disable=None)
    scored = [score_utterance(one, wanted, kana.get(one.utt_id)) for one in progress]
    kept = [one for one in scored if one.ref_norm or not profile.drops_empty_references]
    if not any(one.ref_norm for one in kept):
        raise DataError(ref, f"every reference is empty under profile {profile.tag}", "give transcripts")
    return ScoredSystem(name, kept, _result(kept, len(scored) - len(kept), profile, options))


def _given_kana(path: Path | None, utt_ids: Sequence[str]) -> dict[str, str]:
    """Given readings by id.

    Raises:
        DataError: the file is at fault, or names an utterance that is not scored.
    """
    if path is None:
        return {}
    kana = read_table(path)
    if unknown := byte_order(kana.keys() - set(utt_ids)):
        raise DataError(path, f"no reference for {some_ids(unknown)}", "give the readings of the same set")
    return kana


def _result(scores: Sequence[UttScore], num_excluded: int, profile: Profile, options: ScoreOptions) -> dict[str, Any]:
    """The content of score.json."""
    signatures = _signatures(profile, options)
    result: dict[str, Any] = {
        "signature": signatures["cer"],
        "profile": profile.tag,
        "num_utts": len(scores),
        "num_excluded": num_excluded,
        "num_missing": sum(one.text.is_missing for one in scores),
        "num_empty_hypotheses": sum(not one.hyp_norm for one in scores),
        "num_empty_references": sum(not one.ref_norm for one in scores),
        "metrics": _metrics(scores, signatures, options),
        "sclite": interchange.sclite_total(scores),
        "breakdown": breakdown(scores),
    }
    if options.groups:
        result["groups"] = {
            name: {"num_utts": len(members), "metrics": _metrics(members, signatures, options)}
            for name, members in _by_group(scores, options.groups).items()
        }
    return result


def _signatures(profile: Profile, options: ScoreOptions) -> dict[str, str]:
    """Signature of every metric."""
    settings = {"missing": "deletions" if options.missing_as_deletions else "error"}
    kana = ("given" if options.ref_kana else "automatic") + ("-or-best" if options.kana_best else "")
    interval = {"ci": f"bootstrap{options.bootstrap}.seed{options.seed}"}
    return {
        name: signature(
            name,
            profile.tag,
            {**settings, **({"reading": kana} if name == "kana_cer" else {}), **interval},
        )
        for name in (*MICRO_METRICS, MACRO_METRIC)
    }


def _metrics(scores: Sequence[UttScore], signatures: Mapping[str, str], options: ScoreOptions) -> dict[str, Metric]:
    """Metrics of some utterances."""
    counts = {name: [one.counts[name] for one in scores] for name in scores[0].counts}
    return summarise(counts, signatures, Bootstrap(options.bootstrap, options.seed))


def _by_group(scores: Sequence[UttScore], path: Path) -> dict[str, list[UttScore]]:
    """Utterances by their group, groups sorted by name.

    Raises:
        DataError: an utterance has no group.
    """
    group_of = read_table(path)
    if lost := [one.text.utt_id for one in scores if not group_of.get(one.text.utt_id)]:
        raise DataError(path, f"no group for {some_ids(lost)}", "add a line `<utt-id> <group>` for each")
    groups: dict[str, list[UttScore]] = {}
    for one in scores:
        groups.setdefault(group_of[one.text.utt_id], []).append(one)
    return {name: groups[name] for name in byte_order(groups)}


def _report_page(systems: Sequence[ScoredSystem], out: Path, options: ScoreOptions) -> str:
    """The HTML report of some systems, players relative to ``out``."""
    audio = report.audio_links(read_table(options.audio), out) if options.audio else {}
    return report.page([(one.name, one.result, one.scores) for one in systems], audio)
