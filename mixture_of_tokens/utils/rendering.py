"""The package's templates as text: pages in HTML, where whatever comes from files is text, and cards in Markdown."""

import itertools
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, select_autoescape

from mixture_of_tokens.utils import formatting

START = "<!doctype html>\n"  # of a page
NOTHING = "\N{EN DASH}"  # in a cell of a table
ILLEGAL = r"[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff]"  # in HTML
NAMED = r'( id="|="(?:url\()?#)'  # a shape of a figure, and what refers to it

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=select_autoescape(["html.j2"], default_for_string=True),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
NUMBERS = ("loss", "ratio", "difference", "duration", "short", "span", "with_span", "enumerated")
TEMPLATES.globals |= {name: getattr(formatting, name) for name in NUMBERS}
TEMPLATES.globals |= {"whole": "{:,}".format, "rounded": "{:,.0f}".format, "exact": "{:.4f}".format, "NOTHING": NOTHING}


def card_of(template: str, **values: Any) -> str:
    return TEMPLATES.get_template(template).render(values)


def page_of(template: str | Template, **values: Any) -> str:
    """A page. Figures that hold the same shape give it the same id; here each gets its own."""
    page = TEMPLATES.get_template(template).render(values).replace("\r\n", "\n").replace("\r", "\n")
    page, number = re.sub(ILLEGAL, "\N{REPLACEMENT CHARACTER}", page), itertools.count()
    return re.sub(r"(?s)<svg.*?</svg>", lambda svg: re.sub(NAMED, rf"\g<1>f{next(number)}-", svg[0]), page)
