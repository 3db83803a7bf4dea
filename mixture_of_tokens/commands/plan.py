"""The command `mot plan`."""

from typing import TYPE_CHECKING, Any, Literal

from mixture_of_tokens.commands.calling import calls
from mixture_of_tokens.settings.fields import check_single
from mixture_of_tokens.settings.model import model_fields
from mixture_of_tokens.settings.names import parse_name

if TYPE_CHECKING:
    from mixture_of_tokens.planning.estimates import Plan


@calls("training.plan")
def plan(
    name: str,
    *,
    micro_batch: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    gated: bool = True,
    batch_size: int | None = None,
    devices: int | None = None,
    shard: int | None = None,
    replicate: int | None = None,
    expert_parallel: int | None = None,
    steps: int | None = None,
    tflops: float | None = None,
    measure: bool = False,
    model: dict[str, Any] | None = None,
) -> "Plan":  # pyright: ignore[reportReturnType]
    """Print what a model costs: parameters, FLOPs per token, memory, legal micro-batches, matched models.

    No model is built but by --measure. FLOPs are those of matrix products in training; a multiply-add is two. Memory is
    an estimate. With --devices also what each device holds and sends in a step with --training.bf16 true, activations
    counted as in fp32: for the placement that the other flags describe, for others, and for Token Choice.

    Args:
        name: The model, such as MoT-Medium/32E/8.
        micro_batch: Sequences per device at once; by default a device's whole share of the batch, as in mot train.
        dtype: The type of weights, gradients, optimizer state and activations.
        gated: SwiGLU feed-forwards. Otherwise the paper's plain ones with ReLU.
        batch_size: Sequences a step; by default the size's own number, in whole groups.
        devices: Devices that train together.
        shard: Devices that hold one copy of the model together, as in mot train.
        replicate: Copies of a sharded model.
        expert_parallel: Devices of a copy that divide the experts.
        steps: Steps of a training, whose tokens, FLOPs and time are then printed too.
        tflops: What a device gives, in 10^12 FLOPs a second: its peak times the share of it that is reached; by default
            300 where there is a GPU, and with --devices. Some 30 % of an H100's peak in bf16.
        measure: Build the model, time a few steps on this machine, and say how long a training takes: of --steps, or of
            the size's own number. Evaluations come on top.
        model: Fields of the model's configuration, as in --model.num_hidden_layers 8.

    Raises ValueError for an unknown name or field, and for a micro-batch or a placement that is not legal.
    """
    parse_name(name)  # before anything large is imported
    check_single("model", model_fields(model or {}))
