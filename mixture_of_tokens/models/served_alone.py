"""The model that `mot export --format hub` writes: a Mixture of Tokens that serves each row alone once it is loaded."""

from typing import Any

from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM


class ServedAloneForCausalLM(MixtureOfTokensForCausalLM):
    """A Mixture of Tokens that `from_pretrained` has serve each row alone, by `config.num_experts_per_tok` experts.

    No row of a batch influences another. `serve_alone(False)` serves it in groups, as it was trained.
    """

    config_class = MixtureOfTokensConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded: Any = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model.serve_alone(num_experts_alone=model.config.num_experts_per_tok)
        return loaded
