"""Provenance: from settings and files, to digests; and what software and machine made a result.

Two settings have the same digest exactly when they mean the same: the order of keys, tuple or
list, and 1 or 1.0 make no difference. Nothing here names a person or a host.
"""

import hashlib
import importlib.metadata
import json
import math
import numbers
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctfm.store.errors import ConfigError
from ctfm.store.threads import waiting_of_threads

_PACKAGES = (
    "ctfm",
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "peft",
    "safetensors",
    "numpy",
    "scipy",
    "scikit-learn",
    "zarr",
    "numcodecs",
    "pyarrow",
    "pydicom",
    "nibabel",
    "SimpleITK",
)


def canonical_json(values: Any) -> str:
    """Write JSON-able values in the one form that is digested.

    Keys are sorted, nothing is indented, tuples are lists, a whole number has no decimal point
    (1.0 is 1, -0.0 is 0), other characters than ASCII are escaped.

    Raises:
        ConfigError: If a value is NaN or infinite, has no form in JSON, or a key is no string.
    """
    return json.dumps(
        _normalised(values, where="settings"),
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=False,
    )


def digest(values: Any) -> str:
    """SHA-256 of `canonical_json(values)`, in hexadecimal."""
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()


def file_sha256(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of each installed package that can change a number.

    They come from the packages' metadata: nothing is imported.
    """
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory; threads and GPUs where torch is in use.

    No host name and no user name: a record may leave the site.
    """
    about: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": _memory_bytes(),
    }
    torch = sys.modules.get("torch")
    if torch is None:
        return about
    about |= {"threads": torch.get_num_threads(), "threads_wait": waiting_of_threads()}
    if torch.cuda.is_available():
        about["gpus"] = [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ]
    return about


def _normalised(value: Any, *, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return _normalised_float(float(value), where=where)
    if isinstance(value, Mapping):
        return _normalised_mapping(value, where=where)
    if isinstance(value, list | tuple):
        return [_normalised(item, where=f"{where}[{i}]") for i, item in enumerate(value)]
    raise ConfigError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold: "
        "give text, a number, true, false, null, a list or a mapping"
    )


def _normalised_float(value: float, *, where: str) -> int | float:
    if not math.isfinite(value):
        raise ConfigError(f"{where} is {value}: a setting must be a finite number")
    return int(value) if value.is_integer() else value


def _normalised_mapping(values: Mapping[Any, Any], *, where: str) -> dict[str, Any]:
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"{where} has the key {key!r}: keys must be text")
    return {str(key): _normalised(value, where=f"{where}.{key}") for key, value in values.items()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or "unknown")


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
