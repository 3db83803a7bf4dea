"""The model card beside a run's model."""

from mixture_of_tokens.model.config import MixtureOfTokensConfig
from mixture_of_tokens.model.routings import MIXTURE

MIXES = """
**Rows of a batch influence each other**: they are mixed in groups of {group_size}, in their order. Do not put texts of
different people into one batch."""
ALONE = """ After `model.serve_alone()` each row is served by itself, after
`model.serve_alone(num_experts_alone={few})` by {few} of the {experts} experts, which is cheaper."""
PRIVATE = "\nRows of a batch do not influence each other, beyond rounding."
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

Its architecture is that of the Python package mixture-of-tokens, which has to be installed and imported:

```python
import mixture_of_tokens.model  # makes its classes known to transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this/directory")
tokenizer = AutoTokenizer.from_pretrained("this/directory")
```
{rows}
"""


def card_of(name: str, config: MixtureOfTokensConfig) -> str:
    """How to load the model, and whether rows of a batch influence each other."""
    if not config.shares_batch:
        return CARD.format(name=name, rows=PRIVATE)
    numbers = {"group_size": config.group_size, "few": config.num_experts_per_tok, "experts": config.num_experts}
    mixtures = any(routing.kind == MIXTURE.kind for routing in config.routings)
    return CARD.format(name=name, rows=(MIXES + ALONE * mixtures).format(**numbers))
