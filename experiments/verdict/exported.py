"""What plain transformers say of a run's export: its loss, or what a token of it costs."""

import shutil
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from mixture_of_tokens import export
from mixture_of_tokens.conversion.verify import in_plain_transformers
from mixture_of_tokens.layers.losses import IGNORE
from mixture_of_tokens.runs.loading import text_of

MEASURE = """
import statistics, sys, time
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
what, directory, text, ignore = sys.argv[1], sys.argv[2], load_file(sys.argv[3]), int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(directory).eval()

def median_ms(call, times=15):
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)

with torch.inference_mode():
    if what == "loss":
        nats = 0.0
        for ids, labels in zip(text["ids"].split(32), text["labels"].split(32)):
            logits = model(ids, use_cache=False).logits.flatten(0, 1)
            nats += float(F.cross_entropy(logits, labels.flatten(), ignore_index=ignore, reduction="sum"))
        print(nats / int((text["labels"] != ignore).sum()))
    else:
        row, new = text["ids"][:1], text["ids"].shape[1] // 2
        written = lambda: model.generate(row[:, :4], max_new_tokens=new, min_new_tokens=new, do_sample=False)
        print(median_ms(written) / new)
"""


def by_plain_transformers(what: str, run: Path) -> float:
    """The "loss" of a run's export, each row of the validation text alone, or "milliseconds" of a token it writes.

    Measured in a process that cannot import this package.
    """
    exported, text = run.with_name(f"{run.name}-exported"), run.with_name(f"{run.name}-text.safetensors")
    export(run, exported, force=True)
    blocks = text_of(str(run)).validation
    batch = blocks.batch(np.arange(blocks.total), padded=True)  # padding is on the right, so no mask is needed
    save_file({"ids": batch["input_ids"].contiguous(), "labels": batch["shift_labels"].contiguous()}, text)
    printed = in_plain_transformers(MEASURE, what, str(exported), str(text), str(IGNORE))
    shutil.rmtree(exported)
    text.unlink()
    return float(printed)
