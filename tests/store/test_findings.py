"""The taxonomy: the packaged one is whole, and a user's is checked."""

from collections import Counter
from pathlib import Path

import pytest

from ctfm.store.errors import ConfigError
from ctfm.store.findings import load_findings


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_packaged_taxonomy_has_the_counts_of_the_paper() -> None:
    findings = load_findings()
    assert len(findings) == 75
    assert Counter(finding.category for finding in findings) == {
        "hemorrhage": 12,
        "vascular": 8,
        "trauma": 6,
        "mass_lesion": 9,
        "structural": 11,
        "chronic_other": 29,
    }
    assert list(findings.categories.values())[3:] == ["Mass/Lesion", "Structural", "Chronic/Other"]


def test_a_finding_has_its_display_name_parent_and_synonyms() -> None:
    finding = load_findings().get("chronic_subdural_hematoma")
    assert finding is not None
    assert finding.display == "Chronic subdural hematoma"
    assert finding.parent == "subdural_hematoma"
    assert "subacute subdural hematoma" in finding.synonyms
    assert "midline_shift" in load_findings()
    assert load_findings().names[0] == "intraparenchymal_hemorrhage"


def test_a_finding_outside_the_taxonomy_is_shown_by_its_own_words() -> None:
    assert load_findings().display("scalp_air_bubble") == "Scalp air bubble"
    assert load_findings().display("lipoma") == "Lipoma"


def test_a_name_is_all_that_a_finding_needs(tmp_path: Path) -> None:
    findings = load_findings(write(tmp_path / "f.yaml", "findings: [{name: big_bleed}]"))
    (finding,) = findings
    assert (finding.display, finding.category, finding.parent) == ("Big bleed", "other", None)
    assert findings.categories == {"other": "Other"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("findings: [", "is no YAML"),
        ("a: 1", "needs a list `findings`"),
        ("findings: [big_bleed]", "needs a list `findings`"),
        ("findings: [{display: Big}]", "snake_case, such as midline_shift, got None"),
        ("findings: [{name: Big Bleed}]", "got 'Big Bleed'"),
        ("findings: [{name: a}, {name: b}, {name: a}]", "a is listed twice"),
        ("findings: [{name: a, parent: b}]", "parent 'b' of a is not a finding"),
        ("findings: [{name: a, parent: b}, {name: b, parent: a}]", "a is its own ancestor"),
        ("findings: [{name: a, parent: 3}]", "must be text"),
        ("findings: [{name: a, synonyms: words}]", "synonyms of a must be a list"),
        ("{findings: [{name: a, category: x}], categories: [{name: y}]}", "'x' of a is not one"),
        ("{findings: [{name: a}], categories: [{name: other, count: 2}]}", "says 2 .* has 1"),
        ("{findings: [{name: a}], categories: other}", "`categories` must be a list"),
        ("findings: !!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_refuses_a_taxonomy_that_is_wrong(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_findings(write(tmp_path / "f.yaml", text))


def test_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read findings"):
        load_findings(tmp_path / "none.yaml")
