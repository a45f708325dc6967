r"""Characters: from any text, to what the encoding of standard output can hold.

A cluster job often has a standard output in ASCII or Latin-1. What that lacks is printed in its
words: `>=` for the sign, `a` for `ä`, `\u4e2d` for what has none. So is a byte of a file name that
is no text (a surrogate, PEP 383), whatever the encoding.
"""

import codecs
import io
import sys
import unicodedata

ERRORS = "ctfm-plain"
"""Name of the error handler, for `str.encode` and for streams."""

_PLAIN = {
    **dict.fromkeys("–−‐‑—━╸╺─═", "-"),
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼", "+"),
    **dict.fromkeys("‘’‚", "'"),
    **dict.fromkeys("“”„", '"'),
    **dict.fromkeys("•·∙", "*"),
    "…": "...",
    "≥": ">=",
    "≤": "<=",
    "≈": "~",
    "±": "+/-",
    "×": "x",
    "÷": "/",
    "→": "->",
    "←": "<-",
    "∞": "inf",
    "°": " deg",
    "²": "^2",
    "³": "^3",
    "µ": "u",
    "½": "1/2",
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "σ": "sigma",
    "ß": "ss",
}


def plain(text: str, encoding: str) -> str:
    """Text as it will be printed in an encoding, so that columns can be as wide as that."""
    try:
        return text.encode(encoding, ERRORS).decode(encoding)
    except LookupError:  # an encoding that Python does not know
        return text


def print_in_any_encoding() -> None:
    """Let standard output and error print all text, unless the user chose what becomes of it.

    `PYTHONIOENCODING=ascii:replace` is such a choice.
    """
    for stream in (sys.stdout, sys.stderr):
        chosen = ("strict", "surrogateescape", "backslashreplace")
        if isinstance(stream, io.TextIOWrapper) and stream.errors in chosen:
            stream.reconfigure(errors=ERRORS)


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_in_words(one, error.encoding) for one in lacking), error.end


def _in_words(character: str, encoding: str) -> str:
    """A character in ASCII, or in what of it the encoding has."""
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    if character in _PLAIN:
        return _PLAIN[character]
    decomposed = unicodedata.normalize("NFKD", character)
    letters = "".join(one for one in decomposed if one.isascii())
    return letters or character.encode("ascii", "backslashreplace").decode()


codecs.register_error(ERRORS, _replace)
