"""The models. Importing this package registers them, so that AutoModelForCausalLM loads their checkpoints."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM, MixtureOfTokensModel

AutoConfig.register(MixtureOfTokensConfig.model_type, MixtureOfTokensConfig, exist_ok=True)
AutoModel.register(MixtureOfTokensConfig, MixtureOfTokensModel, exist_ok=True)
AutoModelForCausalLM.register(MixtureOfTokensConfig, MixtureOfTokensForCausalLM, exist_ok=True)
# `register` leaves this table out, by which a Trainer with label smoothing knows whose labels it is to shift.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MixtureOfTokensConfig.model_type] = MixtureOfTokensForCausalLM.__name__
