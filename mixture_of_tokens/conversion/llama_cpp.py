"""What llama.cpp makes of a GGUF file, in a process of its own: python llama_cpp.py MODEL.gguf QUESTIONS.json OUT.npz

It needs numpy and xllamacpp, not this library, so it runs in any environment that has these. The questions are

    rows: token ids (rows, T); lines: texts; prompt, new: ids of each row that are continued, and by how many greedily
    forced: the id of a token of one ASCII character; vocab_size; threads

and the answers, as arrays of the file OUT.npz:

    log_probabilities: (rows, T, V) of the whole vocabulary, after every token of the rows
    greedy: (rows, new) ids; lines: ids of every line, as JSON
"""

import importlib
import json
import sys
import urllib.request
from typing import Any

import numpy as np


class Engine:
    """llama.cpp's server with a file loaded and everything in fp32, which answers until this process ends."""

    def __init__(self, file: str, context: int, threads: int):
        xllamacpp: Any = importlib.import_module("xllamacpp")  # which has no types, and may not be installed
        params = xllamacpp.CommonParams()
        params.model.path = file
        params.n_ctx, params.n_parallel, params.warmup, params.fit_params = context, 1, False, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)
        address = self.server.listening_address
        self.address = address if address.startswith("http") else f"http://{address}"
        self.direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(self.address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with self.direct.open(request, timeout=300) as answer:
            return json.loads(answer.read())

    def after(self, tokens: list[int], token: int, probabilities: int) -> list[dict[str, Any]]:
        """Have a token written after others. Its log probability, and so many of the highest, are from before that.

        Empty for a token that ends a text, or is a part of a character: these come without.
        """
        how = {"n_predict": 1, "n_probs": probabilities, "temperature": 0.0, "cache_prompt": True}
        return self.ask("/completion", prompt=tokens, logit_bias=[[token, 1e3]], **how).get(
            "completion_probabilities", []
        )

    def log_probabilities(self, tokens: list[int], vocab_size: int, forced: int) -> np.ndarray:
        """(V,): of the whole vocabulary after these tokens."""
        found = np.full(vocab_size, np.nan)
        for entry in self.after(tokens, forced, vocab_size)[0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found


def answers(file: str, questions: dict[str, Any]) -> dict[str, np.ndarray]:
    rows, size = questions["rows"], questions["vocab_size"]
    engine = Engine(file, max(len(rows[0]), questions["prompt"] + questions["new"]) + 1, questions["threads"])
    found = [
        [engine.log_probabilities(row[: t + 1], size, questions["forced"]) for t in range(len(row))] for row in rows
    ]
    further = {"n_predict": questions["new"], "temperature": 0.0, "return_tokens": True, "ignore_eos": True}
    greedy = [engine.ask("/completion", prompt=row[: questions["prompt"]], **further)["tokens"] for row in rows]
    lines = [engine.ask("/tokenize", content=line)["tokens"] for line in questions["lines"]]
    return {
        "log_probabilities": np.array(found),
        "greedy": np.array([[*tokens, *[-1] * questions["new"]][: questions["new"]] for tokens in greedy]),
        "lines": np.array(json.dumps(lines)),
    }


if __name__ == "__main__":
    model, given, out = sys.argv[1:]
    with open(given) as opened:
        asked = json.load(opened)
    np.savez(out, **answers(model, asked))  # pyright: ignore[reportArgumentType]
