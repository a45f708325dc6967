"""Figures are well-formed, say what they show, and mark values where they belong."""

import re
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest

from ctfm.heads import figures
from ctfm.heads.evaluate import Evaluation, FindingResult

SVG = "{http://www.w3.org/2000/svg}"
NAN = float("nan")


def finding(
    name: str, auc: float = 0.8, *, positives: int = 30, category: str = "other"
) -> FindingResult:
    estimable = auc == auc
    return FindingResult(
        name=name,
        display=name.replace("_", " "),
        category=category,
        n=100,
        n_positive=positives,
        auc=auc,
        ci_low=max(auc - 0.1, 0),
        ci_high=min(auc + 0.05, 1),
        average_precision=0.4,
        prevalence=positives / 100,
        status="ok" if estimable else f"not estimable: {positives} positives",
    )


def evaluation(*findings: FindingResult) -> Evaluation:
    aucs = [one.auc for one in findings if one.estimable]
    mean = float(np.mean(aucs)) if aucs else NAN
    categories = {one.category: one.category.title() for one in findings}
    return Evaluation(
        split="test",
        min_positives=5,
        n_scans=100,
        n_patients=80,
        findings=findings,
        categories=categories,
        macro_auc=mean,
        macro_ci=(mean - 0.02, mean + 0.02),
        sd_across_findings=0.05,
        macro_average_precision=0.4,
    )


def curve(name: str, points: int = 3) -> figures.RocCurve:
    rate = np.linspace(0, 1, points)
    return figures.RocCurve(
        name=name, display=name, note="AUC 0.5", false_positive_rate=rate, true_positive_rate=rate
    )


FIGURES: dict[str, Callable[[str], str]] = {
    "auc": lambda text: figures.auc_plot(evaluation(finding(text), finding("b", NAN))),
    "training": lambda text: figures.training_plot(
        [1, 2, 3], loss={text: [3.0, 2, NAN]}, score={"AUC": [0.5, 0.6, 0.7]}, best_epoch=3
    ),
    "roc": lambda text: figures.roc_plot([curve(text), curve("b")]),
    "position": lambda text: figures.position_plot(
        [-2.0, -6, -10], {text: [1.0, 2, 0], "b": [1.0, 1, 1]}, title=text, band_mm=(-7, -5)
    ),
}


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES.keys())
def test_is_well_formed_titled_and_the_same_each_time(figure: Callable[[str], str]) -> None:
    text = 'a < b & "c" > d'
    svg = figure(text)
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root[0].tag == f"{SVG}title"
    assert root.get("aria-label") == root[0].text
    assert svg == figure(text)
    assert "nan" not in svg
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", svg)
    assert "style=" not in svg


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES.keys())
def test_every_class_is_in_the_style_sheet(figure: Callable[[str], str]) -> None:
    used = {name for names in re.findall(r'class="([^"]*)"', figure("a")) for name in names.split()}
    assert all(re.search(rf"\.{name}\b", figures.CSS) for name in used)


@pytest.mark.parametrize(
    "svg",
    [
        figures.auc_plot(evaluation()),
        figures.auc_plot(evaluation(finding("a", NAN, positives=2))),
        figures.auc_plot(evaluation(finding("a", 1.0))),
        figures.auc_plot(evaluation(*(finding(f"f{i}", 0.3 + i / 110) for i in range(75)))),
        figures.training_plot([], loss={}, score={}),
        figures.training_plot([1], loss={"a": [0.5]}, score={"b": [NAN]}, best_epoch=1),
        figures.roc_plot([]),
        figures.roc_plot([curve("a", points=0)]),
        figures.position_plot([], {"a": []}, title="none"),
        figures.position_plot([-2.0], {"a": [1.0]}, title="one", band_mm=(-90, -80)),
    ],
)
def test_draws_nothing_one_and_many(svg: str) -> None:
    assert ElementTree.fromstring(svg).tag == f"{SVG}svg"
    assert "nan" not in svg
    assert "-" not in " ".join(re.findall(r'(?:width|height)="([^"]*)"', svg))


def rows_of(svg: str) -> dict[str, ElementTree.Element]:
    root = ElementTree.fromstring(svg)
    return {one.attrib["data-finding"]: one for one in root.iter() if "data-finding" in one.attrib}


def dot(row: ElementTree.Element) -> float:
    circle = row.find(f"{SVG}circle")
    assert circle is not None
    return float(circle.attrib["cx"])


def test_a_better_auc_lies_further_right_and_comes_first() -> None:
    rows = rows_of(figures.auc_plot(evaluation(finding("worse", 0.7), finding("better", 0.9))))
    assert list(rows) == ["better", "worse"]
    assert dot(rows["worse"]) < dot(rows["better"])


def test_findings_stay_in_their_category() -> None:
    found = evaluation(
        finding("a", 0.7, category="vascular"),
        finding("b", 0.9, category="trauma"),
        finding("c", 0.8, category="vascular"),
    )
    assert list(rows_of(figures.auc_plot(found))) == ["c", "a", "b"]


def test_a_finding_without_auc_is_there_and_says_why() -> None:
    rows = rows_of(figures.auc_plot(evaluation(finding("a"), finding("b", NAN, positives=3))))
    assert rows["b"].find(f"{SVG}circle") is None
    assert "not estimable: 3 positives" in "".join(rows["b"].itertext())


def test_few_positives_are_marked() -> None:
    rows = rows_of(
        figures.auc_plot(evaluation(finding("few", positives=19), finding("enough", positives=20)))
    )
    assert rows["few"].get("class") == "few"
    assert rows["enough"].get("class") is None


def test_a_value_that_is_missing_leaves_a_gap() -> None:
    svg = figures.training_plot(
        [1, 2, 3, 4], loss={"a": [1.0, 2, NAN, 3]}, score={"b": [1.0, 2, 3, 4]}
    )
    curves = re.findall(r'class="curve [^"]*" d="([^"]*)"', svg)
    assert [path.count("M") for path in curves] == [2, 1]


def test_each_curve_has_its_best_epoch_on_it_and_inside_the_plot() -> None:
    curves = {"a": [0.5, 0.7, 0.6, NAN], "b": [0.4, 0.5, 0.6, 0.8]}
    best = {"a": 2, "b": 4}
    svg = figures.training_plot([1, 2, 3, 4], loss={}, score=curves, best_epochs=best)
    paths = re.findall(r'class="curve (s\d)" d="([^"]*)"><title>(.)', svg)
    dots = re.findall(r'<circle class="(s\d)" cx="([^"]*)" cy="([^"]*)" r="4"><title>(.)', svg)
    assert [dot[3] for dot in dots] == ["a", "b"]
    for (colour, path, name), dot in zip(paths, dots, strict=True):
        points = [pair.split() for pair in re.split("[ML]", path)[1:]]
        assert (dot[0], dot[3]) == (colour, name)
        assert list(dot[1:3]) == points[best[name] - 1]


def test_names_that_do_not_fit_are_not_drawn_over_each_other() -> None:
    few, many = ({f"fold={i},seed=0": [0.5, 0.6] for i in range(n)} for n in (2, 12))
    assert "<text" in (svg := figures.training_plot([1, 2], loss={}, score=few))
    assert svg.count(">fold=1,seed=0</text>") == 1
    svg = figures.training_plot([1, 2], loss={}, score=many)
    assert ">fold=1,seed=0</text>" not in svg
    assert "<title>fold=11,seed=0</title>" in svg


def test_the_vertex_is_on_the_left() -> None:
    svg = figures.position_plot([-10.0, -2.0, -6.0], {"a": [3.0, 1.0, 2.0]}, title="t")
    path = re.findall(r'class="curve [^"]*" d="([^"]*)"', svg)[0]
    points = np.array([pair.split() for pair in re.split("[ML]", path)[1:]], float)
    assert (np.diff(points[:, 0]) > 0).all()
    assert (np.diff(points[:, 1]) < 0).all()  # values rise with depth, and up is less


def test_the_band_covers_the_lesion() -> None:
    svg = figures.position_plot([0.0, -100.0], {"a": [1.0, 2.0]}, title="t", band_mm=(-60, -40))
    band = ElementTree.fromstring(svg).find(f"{SVG}rect[@class='band']")
    assert band is not None
    left, width = float(band.attrib["x"]), float(band.attrib["width"])
    assert left + width / 2 == pytest.approx((34 + 910) / 2, abs=0.2)
    assert width == pytest.approx(0.2 * (910 - 34), abs=0.2)


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0.0, 1.0, 5, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.43, 0.97, 4, [0.6, 0.8]),
        (-3.0, 160.0, 4, [0.0, 50.0, 100.0, 150.0]),
    ],
)
def test_ticks_are_round_numbers_inside(
    low: float, high: float, most: int, expected: list[float]
) -> None:
    axis = figures._Axis(low, high, 0.0, 100.0)
    assert axis.ticks(most) == expected


def test_an_axis_maps_its_ends_to_its_ends() -> None:
    axis = figures._Axis(0.5, 1.0, 300.0, 700.0)
    assert [axis(0.5), axis(1.0)] == [300, 700]
