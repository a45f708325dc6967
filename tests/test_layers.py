"""The four packages import only downwards, and importing a light one stays light."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "store": set(),
    "extract": {"store"},
    "heads": {"store"},
    "cli": {"store", "extract", "heads"},
}
HEAVY_FOR_HEADS = ("transformers", "timm", "dask", "pydicom", "nibabel", "SimpleITK", "peft")


def ctfm_imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "ctfm":
                names = [f"ctfm.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("ctfm.")}
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_only_what_lies_below_it(package: str) -> None:
    for file in sorted((ROOT / package).glob("*.py")):
        above = ctfm_imports(file) - {package} - MAY_IMPORT[package]
        assert not above, f"{package}/{file.name} imports {above}"


def test_the_import_check_sees_every_form_of_import(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(
        "import ctfm.heads.fit\nfrom ctfm.extract import dicom\nfrom ctfm import cli\n"
    )
    assert ctfm_imports(planted) == {"heads", "extract", "cli"}


def test_every_package_folder_is_declared_and_flat() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    folders = {f"ctfm.{file.parent.name}" for file in ROOT.glob("*/__init__.py")}
    assert set(declared) == folders
    for package in MAY_IMPORT:
        assert not list((ROOT / package).glob("*/*.py")), (
            "packages are flat: a wheel misses subfolders"
        )


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_heads_load_without_readers_and_model_libraries() -> None:
    names = [f"ctfm.heads.{file.stem}" for file in sorted((ROOT / "heads").glob("*.py"))]
    loaded = modules_after("import " + ", ".join(names).replace(".__init__", ""))
    assert not loaded & set(HEAVY_FOR_HEADS)


def test_the_command_line_starts_without_torch() -> None:
    loaded = modules_after("import ctfm.cli.app")
    assert not loaded & {"torch", "numpy", "pyarrow", "pydicom", "zarr", *HEAVY_FOR_HEADS}
