"""Elements of HTML and SVG as text. What is not an element is escaped, so no name can become one.

Elements are made in Python and not in a template, since Flower's packer takes no files of HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

WORD = 18  # letters of a word in the head of a table that are not broken on paper
_EMPTY = {"meta", "path", "line", "rect", "circle"}  # elements without content
_INLINE = {"a", "b", "code", "span", "text", "td", "th", "li", "h1", "h2", "h3", "title", "summary", "dt", "dd"}


class Html(str):
    """A text that is HTML; every other text is escaped where it becomes a part of it."""

    __slots__ = ()


def tag(element: str, *children: str | None, **attributes: str | float | None) -> Html:
    """An element. Attributes have underscores for hyphens, and ``class_`` for ``class``.

    Children and attributes that are None are left out.
    """
    named = ((key.removesuffix("_").replace("_", "-"), value) for key, value in attributes.items())
    start = element + "".join(f' {key}="{escape(_text(value))}"' for key, value in named if value is not None)
    if element in _EMPTY:
        return Html(f"<{start}>" if element == "meta" else f"<{start}/>")
    return Html(f"<{start}>{joined(children)}</{element}>" + ("" if element in _INLINE else "\n"))


def joined(children: Iterable[str | None]) -> Html:
    """Elements and texts, one after the other."""
    return Html("".join(each if isinstance(each, Html) else escape(each) for each in children if each))


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def table(
    caption: str, titles: Sequence[str], rows: Iterable[Sequence[str]], note: str = "", texts: bool = False
) -> Html:
    """A table that scrolls inside itself. The first column names the rows; the others are numbers, or ``texts``.

    A caption is short, since it is read first; a ``note`` below explains the columns.
    """
    head = tag("tr", *(tag("th", title, scope="col", class_=_long(title)) for title in titles))
    body = (tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows)
    whole = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", head),
        tag("tbody", *body),
        class_="texts" if texts else None,
    )
    scrolled = tag("div", whole, class_="scroll", role="group", aria_label=caption, tabindex="0")
    return joined([scrolled, tag("p", note.replace("\n", " "), class_="note") if note else None])


def _long(title: str) -> str | None:
    """The class of a title with a word that would make a table wider than a sheet of paper."""
    return "long" if max(map(len, title.split()), default=0) > WORD else None


def details(summary: str, *content: str | None) -> Html:
    """Content that is shown on request."""
    return tag("details", tag("summary", summary), *content)


def section(title: str, *content: str | None) -> tuple[str, Html] | None:
    """A section with its title; None if it has no content."""
    whole = joined(content)
    return (title, tag("section", tag("h2", title), whole, id=anchor(title))) if whole else None


def anchor(title: str) -> str:
    """The id of a section."""
    return title.lower().replace(" ", "-")
