"""Double quotes in specs: what stands between them is not split. A quote inside them is written twice, as in CSV."""

from __future__ import annotations

import re

from fedkd.core.errors import UsageError


def split(text: str, separators: str | None = None, maxsplit: int = -1) -> list[str]:
    """As `str.split`, outside of double quotes; each character of ``separators`` is one. The parts keep their quotes.

    Raises:
        UsageError: a quote is not closed.

    """
    parts, is_quoted = [""], False
    for letter in text:
        is_quoted ^= letter == '"'
        is_separator = letter.isspace() if separators is None else letter in separators
        if is_separator and not is_quoted and len(parts) != maxsplit + 1:
            parts.append("")
        else:
            parts[-1] += letter
    if is_quoted:
        raise UsageError(f'{text} has a double quote that is not closed; inside quotes, write one as two: "a""b".')
    return parts if separators is not None else list(filter(None, parts))


def unquoted(text: str) -> str:
    """The text between quotes; a text that is not in quotes as a whole is returned as it is."""
    quoted = re.fullmatch(r'\s*"((?:[^"]|"")*)"\s*', text)
    return quoted[1].replace('""', '"') if quoted else text


def quoted(text: str) -> str:
    """The text as the value of an option in a spec: in quotes if it needs them."""
    if text and not re.search(r'[\s",:=]', text):
        return text
    return '"{}"'.format(text.replace('"', '""'))


def hyphened(name: str) -> str:
    """The name of an option as lists and messages show it; underscores are read, too."""
    return name.replace("_", "-")
