"""The models. Importing this room makes their saved checkpoints known to transformers' AutoModelForCausalLM."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mixture_of_tokens.model.config import MixtureOfTokensConfig
from mixture_of_tokens.model.modeling import MixtureOfTokensForCausalLM, MixtureOfTokensModel

AutoConfig.register(MixtureOfTokensConfig.model_type, MixtureOfTokensConfig, exist_ok=True)
AutoModel.register(MixtureOfTokensConfig, MixtureOfTokensModel, exist_ok=True)
AutoModelForCausalLM.register(MixtureOfTokensConfig, MixtureOfTokensForCausalLM, exist_ok=True)
