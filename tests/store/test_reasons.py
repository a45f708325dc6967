"""The page on inputs explains every reason, in the words of the code."""

import ast
from itertools import pairwise
from pathlib import Path

from ctfm.store import reasons
from ctfm.store.reasons import Reason

PAGE = Path(__file__).parents[2] / "docs" / "inputs.md"


def test_the_page_has_every_reason_with_its_meaning() -> None:
    assert reasons.__file__ is not None
    (body,) = (
        node.body
        for node in ast.parse(Path(reasons.__file__).read_text()).body
        if isinstance(node, ast.ClassDef)
    )
    meaning: dict[str, str] = {}
    for statement, after in pairwise(body):
        if isinstance(statement, ast.Assign) and isinstance(after, ast.Expr):
            assert isinstance(after.value, ast.Constant)
            meaning[ast.literal_eval(statement.value)] = str(after.value.value)
    assert set(meaning) == {reason.value for reason in Reason} - {"ok"}
    page = PAGE.read_text()
    for code, text in meaning.items():
        assert f"| `{code}` | {text} |" in page
