"""What llama.cpp makes of a GGUF file, in a process of its own: python llama_cpp.py MODEL.gguf QUESTIONS.json OUT.npz

It needs numpy and xllamacpp, not this library, so it runs in any environment that has these. The questions are

    rows: token ids (rows, T); lines: texts; prompt, new: ids of each row that are continued, and by how many greedily
    forced: the id of a token of one ASCII character; vocab_size; threads

and the answers, as arrays of the file OUT.npz:

    log_probabilities: (rows, T, V) of the whole vocabulary, after every token of the rows
    greedy: (rows, new) ids; lines: ids of every line, as JSON
"""

import json
import sys
import urllib.request
from typing import Any

import numpy as np


def serve(file: str, context: int, threads: int) -> Any:
    """llama.cpp's server with everything in fp32, listening on this machine."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = context, 1, False, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


def answers(file: str, questions: dict[str, Any]) -> dict[str, np.ndarray]:
    rows, size = questions["rows"], questions["vocab_size"]
    length = max(len(rows[0]), questions["prompt"] + questions["new"]) + 1
    server = serve(file, length, questions["threads"])  # which ends with this process
    address = server.listening_address
    address = address if address.startswith("http") else f"http://{address}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with direct.open(request, timeout=300) as answer:
            return json.loads(answer.read())

    found = np.full((len(rows), len(rows[0]), size), np.nan)
    # A token that ends the text, or is a part of a character, comes without probabilities. So another one is forced;
    # what is told is from before that.
    one = {"n_predict": 1, "n_probs": size, "temperature": 0.0, "logit_bias": [[questions["forced"], 1e3]]}
    for i, row in enumerate(rows):
        for t in range(len(row)):
            answer = ask("/completion", prompt=row[: t + 1], cache_prompt=True, **one)
            for entry in answer["completion_probabilities"][0]["top_logprobs"]:
                found[i, t, entry["id"]] = entry["logprob"]
    further = {"n_predict": questions["new"], "temperature": 0.0, "return_tokens": True, "ignore_eos": True}
    greedy = [ask("/completion", prompt=row[: questions["prompt"]], **further)["tokens"] for row in rows]
    lines = [ask("/tokenize", content=line)["tokens"] for line in questions["lines"]]
    return {
        "log_probabilities": found,
        "greedy": np.array([[*tokens, *[-1] * questions["new"]][: questions["new"]] for tokens in greedy]),
        "lines": np.array(json.dumps(lines)),
    }


if __name__ == "__main__":
    model, given, out = sys.argv[1:]
    with open(given) as opened:
        asked = json.load(opened)
    np.savez(out, **answers(model, asked))  # pyright: ignore[reportArgumentType]
