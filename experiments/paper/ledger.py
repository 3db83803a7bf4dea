"""The ledger: every claim of the paper, the script that tests it, what was measured, and the verdict.

    python experiments/paper/ledger.py            # writes a page with the figures and the tables behind them
    python experiments/paper/ledger.py --table    # docs/results/paper.md's table

Both are of what is committed; seconds. Verdicts are computed from the committed runs: "confirmed" where the claim holds
as the claim's script states it; "in part" where only something weaker does; "contradicted"; "open" as long
as runs are missing, or seeds differ by more than what is asked. The paper's values are those of its captions, of its
authors' blog post and configuration files, and of others' descriptions of its figures.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree

import design
import fig4
import fig5
import fig6
import fig7
import fig8
import length
import table1
import table3
import temperature
from studies import EXPERIMENT, Study

from mixture_of_tokens.utils.formatting import markdown
from mixture_of_tokens.utils.rendering import TEMPLATES, page_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import script

STUDIES = tuple(module.STUDY for module in (fig4, fig5, fig6, fig7, length, fig8, table1, table3, temperature, design))
PAGE = EXPERIMENT.trained / "ledger.html"
HEADS = ("claim", "script", "paper", "measured", "verdict")
INTRODUCTION = (
    "Losses are in nats a token over the whole validation text. Micros are 128 wide and were trained on the source of "
    "installed packages, Nanos are 32 wide and were trained on the source of Python's standard library, all on two CPU "
    "cores. Steps, FLOPs and time are what a model needs to reach the dense model's final loss, as a share of what "
    "that needs. In brackets are the least and the greatest of the seeds. Where the paper has only curves, its values "
    "are not known."
)

TEMPLATE = """{% extends "base.html.j2" %}
{% from "parts.html.j2" import table %}
{% macro found(study) %}{{ study.found[1] }}{% if study.found[0] %}: {{ study.found[0] }}{% endif %}{% endmacro %}
{% block body %}
<header><h1>{{ title }}</h1>
<ul class="lead">
{% for it in studies %}
<li><strong><a href="#{{ it.id }}">{{ it.claim }}</a></strong>{{ found(it) }}</li>
{% endfor %}
</ul>
<p class="quiet">{{ introduction }}</p></header>
<main>
{% for it in studies %}
<section aria-labelledby="{{ it.id }}"><h2 id="{{ it.id }}">{{ it.claim }}</h2>
<p>{{ found(it) }}</p><p class="quiet">The paper: {{ it.paper }}.</p>
{% if picture(it) %}<figure>{{ picture(it) | safe }}</figure>{% endif %}
{% set heads, rows = table_of(it) %}
{% call(cells) table("Runs", heads, rows, "Made by " ~ it.command, corner="") %}
{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}
{% endcall %}
</section>
{% endfor %}
</main>
{% endblock %}
"""


def table() -> str:
    rows = [
        [study.claim, f"[{study.id}](../../experiments/paper/{study.id}.py)", study.paper, *study.found]
        for study in STUDIES
    ]
    return markdown([list(HEADS), *rows], left=5)


def page() -> str:
    shown = {"introduction": INTRODUCTION, "studies": STUDIES, "picture": _picture, "table_of": _table}
    return page_of(TEMPLATES.from_string(TEMPLATE), title="Mixture of Tokens: the paper's claims, tested", **shown)


def _picture(study: Study) -> str:
    picture = EXPERIMENT.kept / f"{study.id}.svg"
    if study.draw is None or not picture.is_file():
        return ""
    svg = ElementTree.parse(picture).getroot()
    for metadata in svg.findall("{*}metadata"):
        svg.remove(metadata)
    for element in svg.iter():  # in a page SVG needs no namespaces
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    return ElementTree.tostring(svg, encoding="unicode", method="html")


def _table(study: Study) -> tuple[dict[str, list[str]], list[tuple[None, str, list[str]]]]:
    """Heads and rows of the study's own."""
    lines = [line.strip("|").split("|") for line in study.table(study.rows).splitlines()]
    heads, _, *rows = ([cell.strip() for cell in line] for line in lines)
    return {"": heads[1:]}, [(None, first, cells) for first, *cells in rows]


def make() -> None:
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page())
    print(f"The page: {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    script(__doc__, make, table)
