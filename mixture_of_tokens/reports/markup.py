"""HTML as a tree of elements: whatever comes from files is text in it, never markup."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Union
from xml.etree.ElementTree import Element, tostring

from mixture_of_tokens.formatting import Summary, span
from mixture_of_tokens.reports.figures import swatch

NOTHING = "\N{EN DASH}"
ILLEGAL = r"[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff]"  # in HTML
START = "<!doctype html>\n"  # of a page
Child = Union[Element, str, Sequence["Child"], None]  # noqa: UP007, a name in quotes has no |
Column = tuple[str, Callable[[Any], Child]]  # head, and cell of a row


def html(tag: str, *children: Child, **attributes: Any) -> Element:
    """An element with children, strings being text; class_ stands for class, aria_label for aria-label."""
    element = Element(tag, {key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items()})
    _append(element, children)
    return element


def _append(element: Element, child: Child) -> None:
    if isinstance(child, Element):
        element.append(child)
    elif isinstance(child, str):
        text = child.replace("\r\n", "\n").replace("\r", "\n")
        text = re.sub(ILLEGAL, "\N{REPLACEMENT CHARACTER}", text)
        if len(element):
            element[-1].tail = (element[-1].tail or "") + text
        else:
            element.text = (element.text or "") + text
    else:
        for each in child or ():
            _append(element, each)


def own_ids(svg: Element, number: int) -> None:
    """Figures that hold the same shape give it the same id; in a page each needs its own."""
    for element in svg.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"f{number}-{value}")
            elif value.startswith(("#", "url(#")):
                element.set(key, value.replace("#", f"#f{number}-"))


def document(title: str, body: Element) -> str:
    """A page with the style of all pages, as a file that needs no other."""
    for number, svg in enumerate(body.iter("svg")):
        own_ids(svg, number)
    head = html(
        "head",
        html("meta", charset="utf-8"),
        html("meta", name="viewport", content="width=device-width, initial-scale=1"),
        html("title", title),
        html("style", Path(__file__).with_name("page.css").read_text()),
    )
    return START + tostring(html("html", head, body, lang="en"), encoding="unicode", method="html")


def with_swatch(series: int, label: str) -> Child:
    return [html("span", swatch(series), class_="swatch"), label]


def cell_of(value: Summary | None, shown: Callable[[float], str], none: str = NOTHING) -> Child:
    if value is None:
        return [none]
    between = span(value, shown)
    return [shown(value.mean), html("span", between, class_="range") if between else None]


def table(
    title: str,
    note: str,
    groups: Sequence[tuple[str, Sequence[Column]]],
    rows: Sequence[tuple[Child, Any]],
    *,
    corner: str = "Model",
) -> Element:
    """A table in a box that scrolls.

    Args:
        groups: Columns under a common head, '' for none; a column is its head and what makes a cell of a row.
        rows: Each with its head.
    """

    def kind(group: str, i: int) -> dict[str, str]:
        return {"class_": "first"} if group and i == 0 else {}

    over = [
        html("th", name, scope="colgroup", colspan=len(of)) if name else html("td", colspan=len(of))
        for name, of in groups
    ]
    grouped = any(name for name, _ in groups)
    heads = [html("th", head, scope="col", **kind(name, i)) for name, of in groups for i, (head, _) in enumerate(of)]
    body = []
    for label, row in rows:
        cells = [html("td", cell(row), **kind(name, i)) for name, of in groups for i, (_, cell) in enumerate(of)]
        body.append(html("tr", html("th", label, scope="row"), cells))
    first = html("th", corner, scope="col", rowspan=1 + grouped)
    top = [html("tr", first, over), html("tr", heads)] if grouped else [html("tr", first, heads)]
    full = html("table", html("caption", title), html("thead", top), html("tbody", body))
    box = html("div", full, class_="scroll", tabindex="0", role="region", aria_label=title)
    return html("div", box, html("p", note, class_="quiet"), class_="table")
