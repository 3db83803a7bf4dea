"""The trained model that comes with the library, `mot generate nano`: of a run, in bfloat16.

    mot train MoT-Nano/32E/8 --steps 6000 --seed 1 --out runs/nano    # half an hour of two cores
    python examples/nano.py runs/nano                                 # writes mixture_of_tokens/nano, 1.4 MB

The text is the source of Python 3.11.7's standard library, which it reads four times. Weights are stored in bfloat16
and computed with in float32, as its config.json says. Over 32,768 tokens of validation text (`mot evaluate RUN
--max-tokens 33000`) that changed the loss by 0.0001: 2.3880 and 2.3881 in full groups, 2.3398 and 2.3399 alone by 8 of
its 256 experts.
"""

import json
import sys
from pathlib import Path

import torch

from mixture_of_tokens import read_run
from mixture_of_tokens.runs.loading import SHIPPED, load_model, load_tokenizer_of

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
---

# A trained {name}

Comes with the Python package mixture-of-tokens: `mot generate nano --prompt "def "`. Trained for {steps:,} steps, seed
{seed}, on {source}.

- {millions:.2f} million parameters; the weights are stored in bfloat16 and computed with in float32.
- Loss before rounding to bfloat16: {loss:.3f} nats a token of validation text in full groups; alone, by 8 of its 256
  experts, it is lower by 0.05.
- What it writes looks like code, and is none.

`examples/nano.py` of the repository says how it was made.
"""


def ship(run: str, to: Path) -> None:
    facts = read_run(run).facts
    load_model(run, device="cpu").to(torch.bfloat16).save_pretrained(to)
    config = json.loads((to / "config.json").read_text()) | {"dtype": "float32"}
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    load_tokenizer_of(run).save_pretrained(to)
    told = {"source": facts.corpus["source"][0], "loss": facts.final_loss, "millions": facts.parameters / 1e6}
    (to / "README.md").write_text(CARD.format(name=facts.name, steps=facts.steps, seed=facts.seed, **told))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    ship(sys.argv[1], SHIPPED)
