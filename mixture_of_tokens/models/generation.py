"""`generate` for models that mix rows: padding and finished rows stay out of the mixtures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CANNOT_WRITE = (
    "this model mixes all positions of a text, later ones included; a text that is being written has no later ones, so "
    "it cannot write. To write, train a causal routing, such as MoT-; mot evaluate and mot audit take this one"
)


def real_tokens(attention_mask: Any, current: Any, cache: Any = None) -> Any:
    """The token mask (B, T) of `current`, the newest T tokens, from an attention mask; None without one.

    Args:
        cache: of the tokens before, as upstream's; a mask may be of all that a static one has room for.

    Raises ValueError for an attention mask that is not two-dimensional, from which padding cannot be read.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise ValueError("padding cannot be read from an attention mask that is not (B, T): give token_mask too")
    width = current.shape[1]
    if cache is not None:
        attention_mask = attention_mask[:, : int(cache.get_seq_length()) + width]
    return attention_mask[:, -width:].bool().to(current.device)


def check_width(attention_mask: Any, current: Any) -> None:
    """Raises ValueError for a 2-D mask that is not of these tokens: attention would read other columns of it."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or current is None:
        return
    if attention_mask.shape != current.shape[:2]:
        expected, given = tuple(current.shape[:2]), tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must be {expected}, as the tokens are, not {given}")


def _ends_in_padding(prompt: Tensor, pad: int | None, stop_ids: list[int]) -> bool:
    """Whether upstream would infer a mask with padding on the right: only where the token is no end of text."""
    return pad is not None and pad not in stop_ids and bool((prompt[:, -1] == pad).any())


def _all_true(mask: Any) -> bool:
    """Whether nothing is masked, where that is known at once: on a device it would have to be waited for."""
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.dim() == 2 and mask.device.type == "cpu" and bool(mask.all())


class GroupedGeneration:
    """`generate` for a model whose rows may influence each other (`shares_batch`)."""

    config: Any
    shares_batch: Any
    generation_config: Any

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """Upstream's `generate`, but finished rows leave the mixture. A group is one column of the batch.

        The samples of num_return_sequences are rows like any others: samples of one prompt are mixed with each other.

        Raises ValueError where mixtures would be wrong: prompts padded on the right, beam search, stop strings,
        guidance, and an assistant of another library; for a token mask, which is made here; and for a model that is not
        causal.
        """
        if not self.config.causal:
            raise ValueError(CANNOT_WRITE)
        if kwargs.get("token_mask") is not None:
            raise ValueError("generate makes the token mask itself: give attention_mask, (B, T), for padding")

        def setting(name: str) -> Any:
            """Upstream's order: the argument, else the given configuration's value, else the model's."""
            own = getattr(generation_config, name, None)
            return kwargs.get(name, getattr(self.generation_config, name) if own is None else own)

        if self.shares_batch:
            if (setting("num_beams") or 1) > 1:
                raise ValueError(
                    "beam search would mix the beams of one prompt with each other; use num_beams=1, or serve_alone()"
                )
            mask = kwargs.get("attention_mask")
            if mask is not None and mask.dim() == 2 and not mask[:, -1].all():
                raise ValueError(
                    "prompts must be padded on the left, so that the new tokens of all rows share the last column"
                )
            if setting("stop_strings") or kwargs.get("stopping_criteria"):
                raise ValueError("rows that end by other criteria would stay in the mixture; use eos_token_id")
            if setting("guidance_scale") not in (None, 1):
                raise ValueError("rows that have ended would be in the mixtures of guidance; leave guidance_scale out")
            helper = kwargs.get("assistant_model")
            if helper is not None and not isinstance(helper, GroupedGeneration):
                what = f"a {type(helper).__name__} takes no token mask, so it cannot assist where rows are mixed"
                raise ValueError(f"{what}; take an assistant of this library, or serve_alone()")
            stop, prompt = setting("eos_token_id"), kwargs.get("input_ids") if inputs is None else inputs
            kwargs["stop_ids"] = stop_ids = [] if stop is None else torch.as_tensor(stop).flatten().tolist()
            if mask is None and getattr(generation_config, "is_assistant", False) and prompt is not None:
                mask = kwargs["attention_mask"] = torch.ones_like(prompt)  # it is given a text without padding
            if mask is None and prompt is not None and _ends_in_padding(prompt, setting("pad_token_id"), stop_ids):
                raise ValueError("prompts must be padded on the left, and one ends with the padding token")
            if prompt is not None:
                kwargs["prompt_length"] = prompt.shape[1]
            else:  # without ids it starts from one token, or from embeddings, which are not among the ids
                kwargs["prompt_length"] = 1 if kwargs.get("inputs_embeds") is None else 0
        return super().generate(inputs, generation_config=generation_config, **kwargs)  # pyright: ignore

    def generate_batch(self, *args, **kwargs):
        """Raises ValueError: continuous batching packs texts into one row, whose tokens layers cannot tell apart."""
        raise ValueError("continuous batching is not for this model: use generate, or serve what mot export writes")

    def prepare_inputs_for_generation(
        self,
        input_ids,
        attention_mask=None,
        inputs_embeds=None,
        cache=None,
        past_key_values=None,
        stop_ids: Sequence[int] = (),
        prompt_length: int = 0,
        **kwargs,
    ):
        """Upstream's inputs and the token mask: padding and what follows a row's stop token are not real.

        Args beyond upstream's:
            stop_ids: tokens that end a row; prompt_length: number of ids before the first new one.
        """
        # Named because `generate` refuses unnamed arguments; the cache's name depends on transformers' version.
        named = {"inputs_embeds": inputs_embeds, "cache": cache, "past_key_values": past_key_values}
        kwargs |= {name: value for name, value in named.items() if value is not None}
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore
            input_ids, attention_mask=attention_mask, **kwargs
        )
        # Upstream drops the mask if all prompts have one length; with a static cache the mask has another shape.
        if attention_mask is None and not stop_ids and inputs.get("attention_mask") is None:
            return inputs
        current = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        width = current.shape[1]
        new = input_ids[:, prompt_length:]
        stops = torch.zeros_like(new, dtype=torch.bool)
        for stop in stop_ids:  # not torch.isin, which would wait for the device, to give it their numbers
            stops |= new == stop
        finished = (stops.cumsum(-1) - stops.int()) > 0
        token_mask = ~F.pad(finished, (width, 0))[:, -width:]
        token_mask = token_mask.to(current.device)
        if attention_mask is not None and attention_mask.dim() == 2:
            token_mask &= real_tokens(attention_mask, current)
        if _all_true(token_mask) and _all_true(inputs.get("attention_mask")):
            inputs["attention_mask"] = None  # each layer would mask nothing, at some cost
        else:
            inputs["token_mask"] = token_mask
        return inputs
