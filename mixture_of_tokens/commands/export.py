"""The command `mot export`."""

from pathlib import Path
from typing import TYPE_CHECKING

from mixture_of_tokens.commands.calling import calls
from mixture_of_tokens.settings.choices import Device, Format, Quantize, Scores

if TYPE_CHECKING:
    from mixture_of_tokens.conversion.export import Exported


@calls("conversion.export")
def export(
    run: str | Path,
    out: Path,
    *,
    format: Format | None = None,
    quantize: Quantize | None = None,
    top_k: int | None = None,
    scores: Scores | None = None,
    distil_steps: int | None = None,
    license: str | None = None,
    force: bool = False,
    device: Device | None = None,
) -> "Exported":
    """Write a model for other software: plain transformers, llama.cpp (GGUF), or the Hub with code of its own.

    As plain transformers a model becomes a Qwen3-MoE, with sigmoid gates a Dots1, a dense one a Qwen3. Where queries
    and keys are not normed, as in models that began as a Llama, it becomes a Llama, a Mixtral or a Qwen2-MoE. For all
    of these, and for llama.cpp, a Mixture of Tokens is switched to Token Choice first: each sparse layer is distilled,
    on text that the run was trained on, into one of which a token needs only a few experts. No training follows. At
    Nano it takes two to three minutes of two idle cores. For the Hub it stays as it is, and each text is served alone.

    What is written is checked before it has its name. Of a folder every weight is compared with the model's, and
    another process, which cannot import this library, loads it and computes logits. A GGUF file is read back, and
    where xllamacpp is installed llama.cpp computes log probabilities, text and tokens from it. If they differ by more
    than rounding, nothing is left.

    Args:
        run: A run directory or a checkpoint; for GGUF also what mot export wrote for transformers.
        out: The directory to write, of GGUF the file.
        format: transformers, gguf or hub; by default gguf for a name that ends in .gguf, else transformers.
        quantize: Of GGUF, the type of its matrices: f32 (the default), f16, q8_0 or q4_0. Routers stay f32.
        top_k: Of a Mixture of Tokens, experts that a token goes to. By default the granularity, half of it and a
            quarter are tried, and the fewest with a loss at most 0.01 above the lowest of the three are written; for
            the Hub, the granularity.
        scores: Of a Mixture of Tokens, gates of the exported model: softmax over the experts, the default (Qwen3-MoE),
            or a sigmoid each (Dots1), the default for a model with shared experts.
        distil_steps: Of a Mixture of Tokens, steps of distillation for each layer, by default 2,000; a model that was
            trained longer may need more.
        license: The licence that the model card names, as the Hub abbreviates it, such as apache-2.0.
        force: Replace an earlier export.
        device: cpu or cuda; by default cuda where there is one.

    Raises ValueError for layers without a counterpart in plain transformers, and for a checkpoint of another model.
    """
    ...
