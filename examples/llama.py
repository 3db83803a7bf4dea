"""Mixture of Tokens inside a Llama of transformers: the later half of its feed-forwards, trained for a few steps.

    python examples/llama.py    # on a CPU, offline: under a minute, most of it for the text, once

The layer mixes the rows of a batch, so two things are up to the model around it. Rows of a group must come from
different documents, or they would hold each other's future: `GroupedBatches` deals out such rows. And padding must
stay out of the mixtures: what is masked for attention is masked for the layer too. The mask travels as an argument,
because a Llama hands keyword arguments that it does not know down to its blocks.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mixture_of_tokens import Experts, GroupedBatches, MixtureOfTokens, Router, prepare_text
from mixture_of_tokens.data.blocks import Blocks

GROUP = 16  # texts that are mixed; a batch is a multiple of it


class MixedBlock(LlamaDecoderLayer):
    """Llama's block with 32 experts, each half as wide as its feed-forward: the FLOPs of one, the parameters of 16."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mlp = MixtureOfTokens.matched(
            config.hidden_size, config.intermediate_size, GROUP, granularity=2, temperature=0.25
        )

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None, **attention) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **attention)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), token_mask)


class MixedModel(LlamaModel):
    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        for layer_idx in range(config.num_hidden_layers // 2, config.num_hidden_layers):
            self.layers[layer_idx] = MixedBlock(config, layer_idx)
        self.post_init()  # draws the weights of the new blocks

    def _init_weights(self, module: torch.nn.Module):
        """Also of what a checkpoint lacks, such as a plain Llama's, whose memory would be left as it is."""
        super()._init_weights(module)
        if isinstance(module, Experts | Router):
            module.reset_parameters()
        elif isinstance(module, MixtureOfTokens):
            module.reset_state()


class MixedLlama(LlamaForCausalLM):
    """Trains and scores whole texts. `generate` is right for rows that are served alone (docs/reference/serving.md).

    `save_pretrained` saves it as any model, and `MixedLlama.from_pretrained` loads it. `LlamaForCausalLM` or
    `AutoModelForCausalLM` would not: they know nothing of the layers, and give these blocks fresh feed-forwards.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model = MixedModel(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more):
        newest = slice(-input_ids.shape[1], None)  # those before are in the cache
        token_mask = None if attention_mask is None else attention_mask[:, newest].bool()
        return super().forward(input_ids, attention_mask=attention_mask, token_mask=token_mask, **more)


def build(vocab_size: int) -> MixedLlama:
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2}
    return MixedLlama(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=64, use_cache=False, **sizes))


def train(model: MixedLlama, text: Blocks, steps: int) -> list[float]:
    """The loss of every step, in nats a token.

    Transformers' Trainer does it too: `GroupedTrainer(model, TrainingArguments("my-run"), train_dataset=rows).train()`.
    """
    rows = GroupedBatches(text, group_size=GROUP, batch_size=4 * GROUP, steps=steps, seed=0)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step, batch in enumerate(rows):
        loss = model(**batch).loss  # whole blocks: nothing is padding
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4}  loss {losses[-1]:.3f}", flush=True)
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the matrices are so small that threads would wait for each other
    corpus = prepare_text()  # the source text of Python's standard library; kept in a cache, which `mot train` shares
    train(build(len(corpus.tokenizer)), corpus.train, steps=100)
