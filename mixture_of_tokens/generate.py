"""Text from a model."""

import torch
from transformers import PreTrainedTokenizerBase, set_seed


@torch.no_grad()
def continue_prompts(
    model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    seed: int = 0,
) -> list[str]:
    """What the model writes after each prompt. The prompts are one batch, so a Mixture of Tokens mixes them.

    It writes as far as its context reaches. Raises ValueError for a prompt that is empty or as long as the context.
    """
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    if not inputs["attention_mask"].any(dim=1).all():
        raise ValueError("a prompt is empty; give at least one character")
    room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    if room < 1:
        raise ValueError(f"a prompt is longer than the context of {model.config.max_position_embeddings} tokens")
    set_seed(seed)
    model.eval()
    written = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=min(max_new_tokens, room),
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    new = written[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)
