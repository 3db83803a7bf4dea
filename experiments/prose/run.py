"""Three systems on English prose, which nothing was tuned on, one seed (docs/results/systems.md).

    python experiments/prose/run.py FOLDER     # 17 minutes of one core, as measured beside other work
    python experiments/prose/run.py --table    # who reaches whose loss, and when, of nano, prose and long: Markdown

FOLDER is Documentation in the files of Debian's package linux-doc-6.12 (6.12.118-1): 27 MB of reStructuredText. 1,200
steps, at the settings of the code. The picture is the same as there: MoT-Nano/32E/8 is 0.188 nats below the dense
model and level with Token Choice. It goes on where it was stopped.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import NANO, Experiment, compared, reached_table

NAMES = ("Transformer-Nano", "MoT-Nano/32E/8", "TC-Nano/32E")
SEEDS = [1]
OPTIONS = NANO
TEXT = "**/*.rst.gz"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="Documentation of linux-doc-6.12")
    parser.add_argument("--table", action="store_true", help="print the table, and stop")
    given = parser.parse_args()
    if not given.table:
        if given.folder is None or not given.folder.is_dir():
            parser.error("name the folder of the text")
        folder = given.folder.resolve()
        options = replace(OPTIONS, data=[str(folder / TEXT)])
        compared(Experiment.named("prose"), NAMES, SEEDS, options, without=[f"{folder.parent}/"])
    print(reached_table())


if __name__ == "__main__":
    main()
