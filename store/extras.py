"""Optional packages: from a name, to the module, or to an error that says what to install."""

from importlib import import_module
from types import ModuleType

from ctfm.store.errors import ConfigError


def optional(package: str, *, extra: str, what: str) -> ModuleType:
    """Import a package that only one of ctfm's extras brings.

    Args:
        package: Name of the module.
        extra: Of `pip install 'ctfm[extra]'`.
        what: Needs it, as the subject of a sentence.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{what} needs {package.partition('.')[0]}: pip install 'ctfm[{extra}]'"
        ) from error
