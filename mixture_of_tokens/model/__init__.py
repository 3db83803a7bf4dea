"""The models. Importing this package registers them, so that AutoModelForCausalLM loads their checkpoints."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mixture_of_tokens.model.config import MixtureOfTokensConfig
from mixture_of_tokens.model.modeling import MixtureOfTokensForCausalLM, MixtureOfTokensModel

AutoConfig.register(MixtureOfTokensConfig.model_type, MixtureOfTokensConfig, exist_ok=True)
AutoModel.register(MixtureOfTokensConfig, MixtureOfTokensModel, exist_ok=True)
AutoModelForCausalLM.register(MixtureOfTokensConfig, MixtureOfTokensForCausalLM, exist_ok=True)
