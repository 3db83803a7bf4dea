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

from mixture_of_tokens.formatting import markdown
from mixture_of_tokens.reports.markup import Child, document, html
from mixture_of_tokens.reports.markup import table as html_table

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


def table() -> str:
    rows = [
        [study.claim, f"[{study.id}](../../experiments/paper/{study.id}.py)", study.paper, *study.found]
        for study in STUDIES
    ]
    return markdown([list(HEADS), *rows], left=5)


def page() -> str:
    title = "Mixture of Tokens: the paper's claims, tested"
    claims = [
        html("li", html("strong", html("a", study.claim, href=f"#{study.id}")), _found(study)) for study in STUDIES
    ]
    header = html(
        "header", html("h1", title), html("ul", claims, class_="lead"), html("p", INTRODUCTION, class_="quiet")
    )
    return document(title, html("body", header, html("main", [_section(study) for study in STUDIES])))


def _found(study: Study) -> str:
    measured, verdict = study.found
    return f"{verdict}: {measured}" if measured else verdict


def _section(study: Study) -> Child:
    parts = [html("h2", study.claim, id=study.id), html("p", _found(study))]
    parts.append(html("p", f"The paper: {study.paper}.", class_="quiet"))
    picture = EXPERIMENT.kept / f"{study.id}.svg"
    if study.draw is not None and picture.is_file():
        svg = ElementTree.parse(picture).getroot()
        for metadata in svg.findall("{*}metadata"):
            svg.remove(metadata)
        for element in svg.iter():  # in a page SVG needs no namespaces
            element.tag = element.tag.rpartition("}")[2]
            element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        parts.append(html("figure", svg))
    heads, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in study.table(study.rows).splitlines()
    ]
    columns = [(head, lambda row, i=i: row[i]) for i, head in enumerate(heads[1:], 1)]
    parts.append(
        html_table("Runs", f"Made by {study.command}", [("", columns)], [(line[0], line) for line in lines], corner="")
    )
    return html("section", parts, aria_labelledby=study.id)


def make() -> None:
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page())
    print(f"The page: {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    script(__doc__, make, table)
