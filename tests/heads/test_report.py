"""The report is one closed, well-formed page that holds every finding and escapes every word."""

import base64
import csv
import hashlib
import html
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest

from ctfm.heads.branches import branches_state, build_branches
from ctfm.heads.config import FitConfig
from ctfm.heads.evaluate import Evaluation, evaluate_predictions
from ctfm.heads.report import LEFT_OUT, LIMITS, report_run, roc_curves, write_report
from ctfm.heads.runs import Run, RunWriter, StoreRecord
from ctfm.store.errors import RunError
from ctfm.store.findings import load_findings

EVIL = "<script>alert('x')</script>&\""
VOID = {"meta", "input", "br"}


def predictions(findings: tuple[str, ...], *, n: int = 160, prevalence: float = 0.3) -> pa.Table:
    rng = np.random.default_rng(2)
    columns: dict[str, object] = {
        "scan_id": [f"c{i}" for i in range(n)],
        "study_id": [f"s{i}" for i in range(n)],
        "patient_id": [f"p{i // 2}" for i in range(n)],
        "split": [("train", "validation", "test", "test")[i // 2 % 4] for i in range(n)],
    }
    for name in findings:
        label = (rng.random(n) < prevalence).astype(np.int8)
        logit = rng.standard_normal(n) + label
        columns[f"logit_{name}"] = pa.array(logit, pa.float32())
        columns[f"label_{name}"] = pa.array(label)
    return pa.table(columns)


def evaluation(
    findings: tuple[str, ...] = ("lipoma", "midline_shift"), **options: float
) -> Evaluation:
    return evaluate_predictions(predictions(findings, **options), findings=findings)  # type: ignore[arg-type]


def history(epochs: int = 4) -> list[dict[str, float | None]]:
    return [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "validation_loss": 1.1 / epoch,
            "validation_macro_auc": 0.9 - 0.3 / epoch,
            "validation_macro_ap": None,
        }
        for epoch in range(1, epochs + 1)
    ]


def written(path: Path, of: Evaluation, **options: object) -> str:
    settings: dict[str, object] = {"run_summary": {}, "history": history(), **options}
    write_report(path / "report.html", evaluation=of, **settings)  # type: ignore[arg-type]
    return (path / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Checks that tags nest, and gathers what the page would load and run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.count: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] += 1
        values = dict(attrs)
        if tag == "tr" and "data-finding" in values:
            self.rows.append(str(values["data-finding"]))
        self.ids += [str(values["id"])] if "id" in values else []
        self.handlers += [name for name in values if name.startswith("on") or name == "style"]
        loaded = [values.get(name) for name in ("src", "srcset", "action")]
        (self.links if tag == "a" else loaded).append(values.get("href") or "")
        self.loads += [one for one in loaded if one]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def test_tags_nest_and_nothing_is_loaded(tmp_path: Path) -> None:
    page = written(tmp_path, evaluation())
    reader = read(page)
    assert not reader.loads
    assert all(link.startswith(("#", "data:text/csv")) for link in reader.links)
    assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z]", page)
    assert {link[1:] for link in reader.links if link[0] == "#"} <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))


def test_the_policy_lets_its_own_style_and_script_run_and_nothing_else(tmp_path: Path) -> None:
    page = written(tmp_path, evaluation())
    policy = html.unescape(re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0])
    assert policy.startswith("default-src 'none'; ")
    for kind in ("style", "script"):
        contents = re.findall(rf"<{kind}>(.*?)</{kind}>", page, flags=re.DOTALL)
        assert len(contents) == 1
        digest = base64.b64encode(hashlib.sha256(contents[0].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not read(page).handlers


def test_every_finding_has_a_row_estimable_or_not(tmp_path: Path) -> None:
    page = written(tmp_path, evaluation(("lipoma", "midline_shift"), prevalence=0.02))
    assert read(page).rows == ["lipoma", "midline_shift"]
    assert "not estimable: " in page
    assert "0 of 2" in page
    assert "no finding is estimable" in page
    assert not re.search(r"[>,\"]nan[<,\"]", unquote(page))


@pytest.mark.parametrize("count", [0, 1, 75])
def test_holds_none_one_and_all_findings_in_300_kb(tmp_path: Path, count: int) -> None:
    names = load_findings().names[:count]
    rows = predictions(names, n=8000)
    of = evaluate_predictions(rows, findings=names)
    page = written(tmp_path, of, curves=roc_curves(rows, of))
    assert len(page.encode()) < 300_000
    reader = read(page)
    assert reader.rows == list(names)
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)


def test_words_from_files_are_escaped(tmp_path: Path) -> None:
    plain = read(written(tmp_path, evaluation())).count
    page = written(
        tmp_path,
        evaluation((EVIL, "midline_shift")),
        title=EVIL,
        run_summary={"command": ["ctfm", EVIL], EVIL: {EVIL: EVIL}, "plain": EVIL},
        settings={EVIL: {EVIL: [EVIL]}},
    )
    count = read(page).count
    assert count["script"] == plain["script"] == 1
    assert html.escape(EVIL) in page
    assert EVIL not in page


def test_states_the_limits_and_the_headline(tmp_path: Path) -> None:
    of = evaluation()
    page = written(tmp_path, of)
    assert html.escape(LIMITS) in page
    assert f'<dd class="value">{of.macro_auc:.3f}</dd>' in page
    assert f"95% CI {of.macro_ci[0]:.3f}–{of.macro_ci[1]:.3f}" in page
    assert f'<dd class="value">{of.sd_across_findings:.3f}</dd>' in page


def test_shows_where_the_run_came_from(tmp_path: Path) -> None:
    page = written(
        tmp_path,
        evaluation(),
        run_summary={
            "command": ["ctfm", "fit-head", "--out", "my run"],
            "store": {"fingerprint": "f00d"},
            "versions": {"torch": "2.6"},
            "seconds": 1.25,
        },
        settings={"fit": {"experts": 6, "windows_hu": [[0, 80]]}},
    )
    for text in ("ctfm fit-head --out &#x27;my run&#x27;", "f00d", "2.6", "1.25", "[[0, 80]]"):
        assert text in page


def members_history() -> list[dict[str, object]]:
    """Two members that stop after two and after five epochs."""
    stops = {"fold=0": 2, "fold=1": 5}
    return [
        {"member": name, **record, "best": record["epoch"] != 2}
        for name, epochs in stops.items()
        for record in history(epochs)
    ]


def test_each_member_has_its_curve_and_its_own_best_epoch(tmp_path: Path) -> None:
    about = {"scans": {"train": 6, "validation": 2, "test": 2}, "macro_auc": {"test": 0.8125}}
    summary = {"members": [{"name": "fold=0", **about}], "best_epoch": 5}
    page = written(tmp_path, evaluation(), history=members_history(), run_summary=summary)
    read(page)
    lines = re.findall(r'<tr><td class="text">fold.*?</tr>', page)
    cells = [re.findall(r">([^<>]+)<", line) for line in lines]
    assert cells == [
        ["fold=0", "6 / 2 / 2", "1 of 2", "–", "0.812"],
        ["fold=1", "– / – / –", "5 of 5", "–", "–"],
    ]
    assert page.count("<title>fold=0</title>") == page.count("<title>fold=1</title>") == 4


def test_names_of_members_are_escaped(tmp_path: Path) -> None:
    told = [{"member": EVIL, **record} for record in history()]
    assert EVIL not in written(tmp_path, evaluation(), history=told)


def test_folders_that_are_left_out_of_the_command_are_explained(tmp_path: Path) -> None:
    command = ["ctfm", "fit-head", "--labels"]
    for typed, said in (("…/labels.csv", True), ("tables/labels.csv", False)):
        page = written(tmp_path, evaluation(), run_summary={"command": [*command, typed]})
        assert (html.escape(LEFT_OUT) in page) is said


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    assert written(tmp_path, evaluation()) == written(tmp_path, evaluation())


def test_a_section_without_content_is_left_out(tmp_path: Path) -> None:
    page = written(tmp_path, evaluation(), history=[])
    for name in ("roc", "training", "attention"):
        assert f'id="{name}"' not in page
        assert f'href="#{name}"' not in page


def test_the_csv_holds_the_numbers(tmp_path: Path) -> None:
    of = evaluation()
    link = next(one for one in read(written(tmp_path, of)).links if one.startswith("data:"))
    header, *lines = unquote(link.partition(",")[2]).splitlines()
    assert header.startswith("name,Finding,Category,n,n+,AUC")
    for line, finding in zip(lines, of.findings, strict=True):
        assert line.startswith(f"{finding.name},{finding.display},")
        assert f"{finding.auc:.6f}" in line


@pytest.mark.parametrize("name", ["=1+2", "+x", "-x", "@x"])
def test_no_name_is_a_formula_in_the_csv(tmp_path: Path, name: str) -> None:
    page = read(written(tmp_path, evaluation((name, "lipoma"))))
    link = next(one for one in page.links if one.startswith("data:"))
    lines = list(csv.reader(unquote(link.partition(",")[2]).splitlines()))
    assert lines[1][0] == f"'{name}"
    assert not [cell for line in lines for cell in line if cell.startswith(("=", "+", "-", "@"))]


def make_run(path: Path) -> Run:
    config, findings = FitConfig(experts=0), ("lipoma", "midline_shift")
    rows = predictions(findings)
    rng = np.random.default_rng(0)
    position = [-(np.arange(3 + i % 4) + 0.5) * 4 for i in range(rows.num_rows)]
    writer = RunWriter(path)
    writer.start()
    record = StoreRecord(fingerprint="0" * 64, settings={"token": "cls"})
    writer.write_config(config, dims=[3], findings=findings, stores=[record])
    writer.write_epochs(history(), checkpoint=b"")
    writer.finish(
        branches_state(build_branches(config, dims=[3], findings=2)),
        predictions=rows,
        attention=pa.table(
            {
                "scan_id": rows["scan_id"],
                "split": rows["split"],
                "position_mm": [z.astype(np.float32) for z in position],
                "attention": [rng.dirichlet(np.ones(z.size)) for z in position],
            }
        ),
        summary={"command": ["ctfm"], "best_epoch": 4},
    )
    return Run.open(path)


def test_reports_a_run_with_its_attention(tmp_path: Path) -> None:
    run = make_run(tmp_path / "my-run")
    rows = run.predictions()
    lesions = pa.table(
        {
            "study_id": rows["study_id"],
            "finding": ["lipoma"] * rows.num_rows,
            "focal": [True] * rows.num_rows,
            "z_min_mm": [-9.0] * rows.num_rows,
            "z_max_mm": [-5.0] * rows.num_rows,
        }
    )
    found = report_run(run, tmp_path / "report.html", lesions=lesions)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert found.to_json() == evaluate_predictions(rows, findings=run.findings).to_json()
    reader = read(page)
    assert reader.rows == ["lipoma", "midline_shift", "lipoma"]
    for name in ("findings", "table", "roc", "training", "attention", "provenance"):
        assert name in reader.ids
    assert "<title>my-run · ctfm report</title>" in page
    assert "best: 4" in page
    assert json.dumps(run.summary["sha256"]["config.toml"]).strip('"') in page


def test_an_unfinished_run_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run"):
        report_run(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
