"""Digests of settings: equal exactly when the settings mean the same."""

import getpass
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctfm.store.errors import ConfigError
from ctfm.store.provenance import canonical_json, digest, file_sha256, machine, versions
from ctfm.store.reasons import Reason

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON_VALUES)
def test_says_what_was_said(values: Any) -> None:
    assert json.loads(canonical_json(values)) == values


@given(JSON_VALUES)
def test_is_the_same_after_a_trip_through_json(values: Any) -> None:
    assert digest(json.loads(json.dumps(values))) == digest(values)


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ([1, 2], (1, 2)),
        ([1, 0], [1.0, -0.0]),
        ([1, 0.5], np.array([1, 0.5]).tolist()),
        (3, np.int64(3)),
        (0.25, np.float32(0.25)),
        ("ok", Reason.OK),
    ],
)
def test_spelling_does_not_matter(one: Any, same: Any) -> None:
    assert digest(one) == digest(same)


@pytest.mark.parametrize(
    ("one", "other"), [(1, True), (1, "1"), (None, "null"), ([], {}), (0, False), ([1, 2], [2, 1])]
)
def test_meaning_does_matter(one: Any, other: Any) -> None:
    assert digest(one) != digest(other)


def test_is_the_sha256_of_the_canonical_text() -> None:
    values = {"b": [1.0, 0.5, None], "a": "µ"}
    assert canonical_json(values) == '{"a":"\\u00b5","b":[1,0.5,null]}'
    assert digest(values) == hashlib.sha256(canonical_json(values).encode()).hexdigest()


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"window": [0.0, float("nan")]}, r"settings\.window\[1\] is nan"),
        (float("inf"), "settings is inf"),
        ({"path": Path("x")}, r"settings\.path is a \w*Path"),
        ({3: "x"}, "key 3"),
        ({"x": {1, 2}}, r"settings\.x is a set"),
    ],
)
def test_refuses_what_json_cannot_hold_and_says_where(value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        digest(value)


def test_digests_a_file(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"123")
    assert file_sha256(tmp_path / "weights") == hashlib.sha256(b"123").hexdigest()


@pytest.mark.parametrize("about", [versions, machine])
def test_imports_nothing_and_names_nobody(about: Callable[[], dict[str, Any]]) -> None:
    program = f"import sys; from ctfm.store import provenance; provenance.{about.__name__}()"
    program += "; assert not {'torch', 'zarr', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
    words = json.dumps(about()).split('"')
    assert platform.node() not in words
    assert getpass.getuser() not in words


def test_knows_its_own_version_and_those_that_change_numbers() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert {"ctfm", "numpy", "zarr", "torch"} <= found.keys()


def test_says_what_the_machine_has() -> None:
    about = machine()
    assert about["cores"] >= 1
    assert about["cpu"]
    assert about["memory_bytes"] > 2**20
