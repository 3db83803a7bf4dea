"""Balancing without a balancing loss, in any Trainer of transformers."""

from transformers import TrainerCallback

from mixture_of_tokens.model.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.sparse import SigmoidChoice


class BalanceCallback(TrainerCallback):
    """Balances routings without a balancing loss after each step, in any Trainer."""

    def __init__(self, model: MixtureOfTokensForCausalLM):
        self.model = model

    def on_substep_end(self, args, state, control, **kwargs):
        for module in self.model.modules():
            if isinstance(module, SigmoidChoice) and module.load_E is not None:
                module.load_E = module.load_E.clone()  # a graph of CUDA writes the next micro-batch's over it

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.model.balance()
