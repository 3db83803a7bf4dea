"""What vLLM makes of folders of transformers: python engine_vllm.py QUESTIONS.json OUT, in vLLM's own environment.

The questions are, by a name, {"folder": ..., "questions": what `conversion/llama_cpp.py` takes}; answers are files
NAME.npz in OUT, as that module writes them.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def answers(folder: str, questions: dict[str, Any]) -> dict[str, np.ndarray]:
    from vllm import LLM, SamplingParams

    rows, size = questions["rows"], questions["vocab_size"]
    llm: Any = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=max(len(rows[0]), questions["prompt"] + questions["new"]) + 1,
        max_logprobs=size,
        max_num_seqs=8,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 28,
    )
    every = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=size, logprobs=size)
    found = np.full((len(rows), len(rows[0]), size), np.nan)
    for i, output in enumerate(llm.generate([{"prompt_token_ids": row} for row in rows], every)):
        for t, given in enumerate([*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]):
            for token, entry in given.items():
                found[i, t, token] = entry.logprob
    further = SamplingParams(temperature=0, max_tokens=questions["new"], ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": row[: questions["prompt"]]} for row in rows], further)
    tokenizer = llm.get_tokenizer()
    return {
        "log_probabilities": found,
        "greedy": np.array([list(output.outputs[0].token_ids) for output in outputs]),
        "lines": np.array(json.dumps([tokenizer.encode(line) for line in questions["lines"]])),
    }


if __name__ == "__main__":
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    asked, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, one in asked.items():
        np.savez(out / f"{name}.npz", **answers(one["folder"], one["questions"]))  # pyright: ignore
        gc.collect()
        cleanup_dist_env_and_memory()
