"""Scoring from files to files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechllm.errors import ConfigError, DataError
from speechllm.score.metrics import Bootstrap, summarise
from speechllm.score.run import ScoreOptions, report_files, score_files
from speechllm.score.texts import join_texts
from speechllm.score.utterance import Wanted, score_utterance
from speechllm.text.normalize import get_profile, normalize

if TYPE_CHECKING:
    from pathlib import Path

REF = {"a1": "子供が、水を買う。", "a2": "記者は二十五人です。", "b1": "えっ？", "b2": "サーバーが落ちた。"}
HYP = {"a1": "子どもが水を買う", "a2": "汽車は25人です", "b1": "えっ", "b2": "サーバ落ちた"}
TEXTS = st.dictionaries(
    st.sampled_from(["u1", "u2", "u3", "u4"]), st.text(st.sampled_from("水みず記者25人。 "), max_size=8), min_size=1
)


def write_text_file(path: Path, texts: dict[str, str]) -> Path:
    path.write_text("".join(f"{utt_id} {text}\n" for utt_id, text in texts.items()), encoding="utf-8")
    return path


def score(tmp_path: Path, ref: dict[str, str], hyp: dict[str, str], **options: Any) -> dict[str, Any]:
    ref_path, hyp_path = write_text_file(tmp_path / "ref", ref), write_text_file(tmp_path / "hyp.text", hyp)
    return score_files(ref_path, hyp_path, tmp_path / "out", ScoreOptions(**{"bootstrap": 100, **options}))


def test_counts_are_integers_and_rates_are_fractions(tmp_path: Path) -> None:
    result = score(tmp_path, REF, HYP)
    metrics = result["metrics"]
    assert set(metrics) == {"cer", "wer", "cer_lenient", "kana_cer", "ser", "macro_cer"}
    cer = metrics["cer"]
    # 供 is ども (2 edits), 記者 is 汽車 (2), ー and が are left out (2); 26 characters in all
    assert (cer["sub"] + cer["del"] + cer["ins"], cer["ref"]) == (6, 26)
    assert cer["value"] == 6 / 26
    lenient = metrics["cer_lenient"]
    assert (lenient["sub"] + lenient["del"] + lenient["ins"], lenient["ref"]) == (1, 26)
    assert cer["ci95"][0] <= cer["value"] <= cer["ci95"][1]
    assert (metrics["ser"]["sub"], metrics["ser"]["ref"]) == (3, 4)
    assert metrics["macro_cer"]["value"] == pytest.approx((2 / 7 + 2 / 9 + 0 + 2 / 8) / 4)
    assert result["num_utts"] == 4


def test_signatures_name_everything_a_number_depends_on(tmp_path: Path) -> None:
    metrics = score(tmp_path, REF, HYP)["metrics"]
    assert re.fullmatch(
        r"metric:cer\|profile:default_v1\|unit:char\|missing:error\|ci:bootstrap100\.seed0\|unicode:[\d.]+\|"
        r"tool:speechllm-\S+",
        metrics["cer"]["signature"],
    )
    assert "|unit:unidic-short-unit|unidic-lite:" in metrics["wer"]["signature"]
    assert "|unidic-lite:" in metrics["cer_lenient"]["signature"]
    assert "|pyopenjtalk-plus:" in metrics["kana_cer"]["signature"]
    assert "|reading:automatic|" in metrics["kana_cer"]["signature"]


def test_files_are_all_there_and_agree(tmp_path: Path) -> None:
    result = score(tmp_path, REF, HYP)
    out = tmp_path / "out"
    assert json.loads((out / "score.json").read_text(encoding="utf-8")) == result
    records = [json.loads(line) for line in (out / "alignment.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [one["id"] for one in records] == ["a1", "a2", "b1", "b2"]
    for one in records:
        assert "".join(op[1] for op in one["ops"]) == one["ref_norm"] == normalize(REF[one["id"]])
        assert "".join(op[2] for op in one["ops"]) == one["hyp_norm"]
    assert sum(one["counts"]["cer"]["ref"] for one in records) == result["metrics"]["cer"]["ref"]
    assert records[0]["forgiven"] == [["子供", "子ども", "spelling"]]
    assert "1\thomophone\t記者\t汽車\n" in (out / "forgiven.tsv").read_text(encoding="utf-8")
    assert sorted(path.name for path in out.iterdir()) == [
        "alignment.jsonl",
        "forgiven.tsv",
        "hyp.trn",
        "ref.trn",
        "report.html",
        "result.txt",
        "score.json",
    ]


def test_trn_files_and_the_summary_are_sclites(tmp_path: Path) -> None:
    result = score(tmp_path, {"u1": "水 {を}", "u2": ""}, {"u1": "水 を", "u2": "か"}, profile="raw")
    out = tmp_path / "out"
    assert (out / "ref.trn").read_text(encoding="utf-8") == "水 <space> <U+007B> を <U+007D> (u1)\n (u2)\n"
    assert (out / "hyp.trn").read_text(encoding="utf-8") == "水 <space> を (u1)\nか (u2)\n"
    assert result["sclite"] == {"sub": 0, "del": 2, "ins": 1, "ref": 5}
    [row] = [line for line in (out / "result.txt").read_text(encoding="utf-8").splitlines() if "Avg" in line]
    # what ESPnet's show_asr_result.sh makes of it
    cells = row.replace("Sum/Avg", "").replace("|", " ").split()
    assert cells == ["2", "5", "60.0", "0.0", "40.0", "20.0", "60.0", "100.0"]


def test_a_missing_hypothesis_costs_its_reference(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no hypothesis for 1 utterance \(b2\)"):
        score(tmp_path, REF, {key: HYP[key] for key in ("a1", "a2", "b1")})
    whole = score(tmp_path, REF, {**HYP, "b2": REF["b2"]})
    part = score(tmp_path, REF, {key: HYP[key] for key in ("a1", "a2", "b1")}, missing_as_deletions=True)
    for metric in ("cer", "cer_lenient", "wer"):
        units = {"cer": 8, "cer_lenient": 8, "wer": 4}[metric]
        assert part["metrics"][metric]["del"] - whole["metrics"][metric]["del"] == units
        assert part["metrics"][metric]["ref"] == whole["metrics"][metric]["ref"]
    assert part["num_missing"] == 1
    assert "|missing:deletions|" in part["signature"]


def test_empty_references_count_insertions_unless_the_profile_leaves_them_out(tmp_path: Path) -> None:
    ref, hyp = {"u1": "水", "u2": "。", "u3": ""}, {"u1": "水", "u2": "か", "u3": ""}
    result = score(tmp_path, ref, hyp)
    assert (result["metrics"]["cer"]["ins"], result["num_utts"], result["num_empty_references"]) == (1, 3, 2)
    assert result["metrics"]["macro_cer"]["value"] == 0
    result = score(tmp_path, ref, hyp, profile="kotoba")
    assert (result["metrics"]["cer"]["ins"], result["num_utts"], result["num_excluded"]) == (0, 1, 2)
    with pytest.raises(DataError, match="every reference is empty under profile default_v1"):
        score(tmp_path, {"u2": "。"}, {"u2": "か"})


def test_groups_have_metrics_of_their_own(tmp_path: Path) -> None:
    groups = write_text_file(tmp_path / "groups", {key: f"speaker-{key[0]}" for key in REF})
    result = score(tmp_path, REF, HYP, groups=groups)
    assert {name: one["num_utts"] for name, one in result["groups"].items()} == {"speaker-a": 2, "speaker-b": 2}
    parts = [one["metrics"]["cer"]["ref"] for one in result["groups"].values()]
    assert sum(parts) == result["metrics"]["cer"]["ref"]
    write_text_file(groups, {"a1": "x"})
    with pytest.raises(DataError, match=r"no group for 3 utterances \(a2, b1, b2\)"):
        score(tmp_path, REF, HYP, groups=groups)


def test_given_readings_stand_for_the_automatic_ones(tmp_path: Path) -> None:
    ref, hyp = {"u1": "一日中", "u2": "水を買う"}, {"u1": "いちにちじゅう", "u2": "みずを買う"}
    kana = write_text_file(tmp_path / "kana", {"u1": "ついたち ちゅう"})
    given_only = score(tmp_path, ref, hyp, ref_kana=kana)["metrics"]["kana_cer"]
    assert given_only["sub"] + given_only["del"] + given_only["ins"] > 0
    best = score(tmp_path, ref, hyp, ref_kana=kana, kana_best=True)["metrics"]["kana_cer"]
    assert best["value"] == 0
    assert "|reading:given-or-best|" in best["signature"]
    write_text_file(kana, {"u9": "みず"})
    with pytest.raises(DataError, match=r"no reference for 1 utterance \(u9\)"):
        score(tmp_path, ref, hyp, ref_kana=kana)


def test_only_what_was_asked_for_is_computed(tmp_path: Path) -> None:
    result = score(tmp_path, REF, HYP, metrics=("cer",), report=False)
    assert set(result["metrics"]) == {"cer", "ser", "macro_cer"}
    assert not (tmp_path / "out/report.html").exists()
    with pytest.raises(ConfigError, match="no metric 'wil'; choose from cer"):
        score(tmp_path, REF, HYP, metrics=("wil",))


def test_the_breakdown_adds_up(tmp_path: Path) -> None:
    result = score(tmp_path, REF, HYP)
    causes = result["breakdown"]["causes"]
    assert {cause: one["edits"] for cause, one in causes.items()} == {
        "spelling": 2,
        "homophone": 2,
        "katakana": 1,
        "dropped": 1,
    }
    assert sum(one["share"] for one in causes.values()) == pytest.approx(1)
    assert sum(row["num_utts"] for row in result["breakdown"]["lengths"]) == 4
    assert {"ref": "が", "hyp": "", "count": 1} in result["breakdown"]["confusions"]


def test_the_order_of_lines_changes_nothing_but_the_sums_of_the_files(tmp_path: Path) -> None:
    first = score(tmp_path, REF, HYP)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "score.json"}
    again = score(tmp_path, dict(reversed(REF.items())), dict(reversed(HYP.items())))
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "score.json"}
    assert after == before
    sums, other_sums = first.pop("made_from"), again.pop("made_from")
    assert again == first
    assert sums["hyp_sha256"] != other_sums["hyp_sha256"]


def test_the_score_says_how_the_hypotheses_came_about(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text('{"device": "abacus"}', encoding="utf-8")
    assert score(tmp_path, REF, HYP)["made_from"]["run"] == {"device": "abacus"}


@settings(deadline=None)
@given(refs=TEXTS, hyps=TEXTS)
def test_the_order_of_lines_never_matters_and_a_missing_one_is_deleted(
    refs: dict[str, str], hyps: dict[str, str]
) -> None:
    hyps = {key: hyps[key] for key in hyps if key in refs}
    wanted = Wanted(profile=get_profile("default"), metrics=frozenset({"cer_lenient"}))

    def metrics(refs: dict[str, str], hyps: dict[str, str]) -> dict[str, Any]:
        scores = [score_utterance(one, wanted) for one in join_texts(refs, hyps, "hyp", missing_as_deletions=True)]
        counts = {name: [one.counts[name] for one in scores] for name in scores[0].counts}
        return dict(summarise(counts, dict.fromkeys((*counts, "macro_cer"), ""), Bootstrap(20, 0)))

    found = metrics(refs, hyps)
    assert found == metrics(dict(reversed(refs.items())), dict(reversed(hyps.items())))
    assert found == metrics(refs, {**dict.fromkeys(refs, ""), **hyps})
    assert found["cer_lenient"]["value"] <= found["cer"]["value"]


def test_scoring_never_loads_torch() -> None:
    code = "import sys, speechllm.score.run; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_report_holds_its_data_and_nothing_else(tmp_path: Path) -> None:
    ref = write_text_file(tmp_path / "ref", {**REF, "b1": "</script><!--<b>水"})
    hyps = [write_text_file(tmp_path / f"{name}.text", HYP) for name in ("one", "two")]
    audio = write_text_file(tmp_path / "wav.scp", {"a1": str(tmp_path / "some folder/a#1.wav")})
    path = report_files(ref, hyps, tmp_path / "out", ScoreOptions(bootstrap=50, audio=audio))
    page = path.read_text(encoding="utf-8")
    [data] = re.findall(r"^const DATA = (.*);$", page, flags=re.MULTILINE)
    content = json.loads(data)
    assert [one["name"] for one in content["systems"]] == ["one", "two"]
    assert content["utts"][0]["a"] == "../some%20folder/a%231.wav"
    assert content["utts"][2]["r"] == "</script><!--<b>水"
    assert page.count("</script>") == 1
    assert not re.findall(r"(?:src|href)=\"?https?:", page)
    assert "default-src 'none'" in page


def test_a_command_in_wav_scp_is_refused(tmp_path: Path) -> None:
    audio = write_text_file(tmp_path / "wav.scp", {"a1": "sph2pipe a.sph |"})
    with pytest.raises(DataError, match="is a command, which is not run"):
        score(tmp_path, REF, HYP, audio=audio)
