"""The ledger: every claim of the paper, the command that tests it, what was measured, and the verdict.

    python experiments/paper/ledger.py --table    # docs/results.md's table, of what is committed

Verdicts are computed from the committed runs: "confirmed" where the claim holds as the figure's script states it; "not
at this scale" where only its direction does; "contradicted"; "open" as long as runs are missing. The paper's values are
those of its captions, of its authors' blog post and configuration files, and of others' descriptions of its figures.
"""

import fig4
import fig5
import fig6
import fig7
from micro import asked, markdown

STUDIES = (fig4.STUDY, fig5.STUDY, fig6.STUDY, fig7.STUDY)


def table() -> str:
    return markdown(
        [["claim", "command", "paper", "measured", "verdict"], *(study.cells() for study in STUDIES)], left=5
    )


if __name__ == "__main__":
    asked(__doc__, table="print the table, which is all that it does")
    print(table())
