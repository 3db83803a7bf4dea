"""Balancing without a balancing loss, in any Trainer of transformers."""

from torch import nn
from transformers import TrainerCallback

from mixture_of_tokens.layers.experts import Routed
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.utils.checks import shown


class BalanceCallback(TrainerCallback):
    """Balances routings without a balancing loss after each step, in any Trainer.

    Raises ValueError for what is no such model, nor wraps one, and when a training begins in which one process has
    several GPUs: torch.nn.DataParallel throws away what its copies of a model count.
    """

    def __init__(self, model: MixtureOfTokensForCausalLM):
        if not isinstance(model, nn.Module) or not hasattr(model, "balance"):
            raise ValueError(f"model takes a MixtureOfTokensForCausalLM, not {shown(model)}")
        self.model = model

    def on_train_begin(self, args, state, control, **kwargs):
        if args.n_gpu > 1:
            raise ValueError(f"one process with {args.n_gpu} GPUs cannot balance experts: start it with torchrun")

    def on_substep_end(self, args, state, control, **kwargs):
        for module in self.model.modules():
            if isinstance(module, Routed) and module.noted is not None:
                module.noted = module.noted.clone()  # a graph of CUDA writes the next micro-batch's over it

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.model.balance()
