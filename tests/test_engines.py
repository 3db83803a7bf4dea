"""Every exportable form in the engines that people serve with: `make test-engines` (not part of the other tests).

It prints the table of docs/guide/serve.md. llama.cpp and vLLM are in environments of their own, in .engines.
"""

import contextlib
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixture_of_tokens import MixtureOfTokensForCausalLM, config_from_name, export
from mixture_of_tokens.conversion.to_gguf import write_gguf
from mixture_of_tokens.conversion.verify_gguf import TOLERANCE, answers_of, ids_of_lines, plain_greedy, questions_of
from mixture_of_tokens.models.config import MixtureOfTokensConfig

ROOT = Path(__file__).resolve().parents[1]
ENGINES, MIXED = ROOT / ".engines", "MoT-Nano/4E/2"
RESULTS = ROOT / "benchmarks" / "engines.csv"

pytestmark = pytest.mark.engines

SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 16}
SIZES |= {"max_position_embeddings": 128}


def form(kind: str, **fields: Any) -> Callable[[int], MixtureOfTokensConfig]:
    own = {"mlp_layer_types": ["dense", kind, kind], "num_experts_per_tok": 1, "capacity_factor": None}
    return lambda vocab_size: MixtureOfTokensConfig(**SIZES | own | fields | {"vocab_size": vocab_size})


FORMS = {
    "dense": form("dense"),
    "dense, grouped queries, tied embeddings": form("dense", num_key_value_heads=1, tie_word_embeddings=True),
    "Token Choice, 1 of 16": form("token_choice"),
    "Token Choice, 8 of 16": form("token_choice", num_experts_per_tok=8),
    "Token Choice, 4 of 16, gates normalised": form("token_choice", num_experts_per_tok=4, norm_topk_prob=True),
    "Token Choice, grouped queries": form("token_choice", num_experts_per_tok=2, num_key_value_heads=1),
    "Token Choice, tied embeddings": form("token_choice", num_experts_per_tok=2, tie_word_embeddings=True),
    "Token Choice, a Micro's shape": lambda size: config_from_name("TC-Micro/32E/8", vocab_size=size),
    "sigmoid Token Choice, 8 of 16": form("sigmoid_choice", num_experts_per_tok=8),
    "sigmoid Token Choice, gates normalised": form("sigmoid_choice", num_experts_per_tok=4, norm_topk_prob=True),
    "sigmoid Token Choice, 2 shared experts": form("sigmoid_choice", num_experts_per_tok=2, shared_experts=2),
    "sigmoid Token Choice, grouped queries, tied": form(
        "sigmoid_choice", num_experts_per_tok=4, num_key_value_heads=1, tie_word_embeddings=True
    ),
}
UNNORMED: dict[str, Any] = {
    "qk_norm": False,
    "norm_topk_prob": True,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 1,
}
FORMS |= {  # without norms of queries and keys
    "Llama, grouped queries, tied": form("dense", qk_norm=False, num_key_value_heads=1, tie_word_embeddings=True),
    "Llama, heads of another width": form("dense", qk_norm=False, head_dim=64),
    "Mixtral, 4 of 16, grouped queries": form("token_choice", mlp_layer_types=["token_choice"] * 3, **UNNORMED),
    "Mixtral, heads of another width, tied": form(
        "token_choice", head_dim=64, tie_word_embeddings=True, mlp_layer_types=["token_choice"] * 3, **UNNORMED
    ),
    "Qwen2-MoE, 4 of 16, grouped queries": form("token_choice", **UNNORMED),
    "Qwen2-MoE, gates not normalised": form("token_choice", num_experts_per_tok=4, qk_norm=False),
}
SWITCHED = "Mixture of Tokens, switched"
ALL = [*FORMS, SWITCHED]
AS_GGUF = [name for name in ALL if not name.startswith("Qwen2-MoE")]


def model_of(make: Callable[[int], MixtureOfTokensConfig], vocab_size: int) -> MixtureOfTokensForCausalLM:
    """With weights so large that choices are clear, and predictions far from even."""
    torch.manual_seed(0)
    model = MixtureOfTokensForCausalLM(make(vocab_size)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1 + 0.3 * torch.randn_like(value)) if value.dim() == 1 else value.mul_(3)
        for name, value in model.named_buffers():
            if "selection_bias" in name:
                value.uniform_(-0.3, 0.3)
    return model


@pytest.fixture(scope="module")
def exported(tiny_runs, tmp_path_factory) -> dict[str, Path]:
    """Folders of transformers, by form."""
    out, folders = tmp_path_factory.mktemp("exported"), {}
    tokenizer = AutoTokenizer.from_pretrained(tiny_runs[MIXED] / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tiny_runs[MIXED].parent / "cache"))
        for number, (name, make) in enumerate(FORMS.items()):
            model_of(make, len(tokenizer)).save_pretrained(out / f"run-{number}")
            tokenizer.save_pretrained(out / f"run-{number}")
            export(out / f"run-{number}", out / str(number), device="cpu")
            folders[name] = out / str(number)
        export(tiny_runs[MIXED], out / "switched", distil_steps=20, device="cpu")
        folders[SWITCHED] = out / "switched"
    return folders


@pytest.fixture(scope="module")
def references(exported) -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """Transformers' model, tokenizer and the questions about it, by form."""
    found = {}
    for name, folder in exported.items():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = "".join(path.read_text() for path in sorted((ROOT / "mixture_of_tokens" / "layers").glob("l*.py")))
        ids = torch.tensor(tokenizer(text)["input_ids"][: 8 * 60]).view(8, 60)
        found[name] = plain, tokenizer, questions_of(plain, tokenizer, ids)
    return found


@pytest.fixture(scope="module")
def by_vllm(exported, references, tmp_path_factory) -> Path:
    """A folder of vLLM's answers, of all forms, as its import takes longest."""
    out = tmp_path_factory.mktemp("vllm")
    numbers = enumerate(exported.items())
    asked = {str(i): {"folder": str(folder), "questions": references[name][2]} for i, (name, folder) in numbers}
    (out / "questions.json").write_text(json.dumps(asked))
    words = [ENGINES / "vllm" / "bin" / "python", Path(__file__).parent / "engine_vllm.py", out / "questions.json", out]
    with (out / "log").open("w") as log:
        subprocess.run(list(map(str, words)), stdout=log, stderr=subprocess.STDOUT, check=False)
    return out


def compared(name: str, references: Any, found: Any, *, writes_ends: bool = False) -> dict[str, Any]:
    """What an engine makes of a form, beside transformers.

    writes_ends: whether it writes the token that ends a text where it is to go on beyond it, as llama.cpp does not.
    """
    plain, tokenizer, questions = references[name]
    rows = torch.tensor(questions["rows"])
    with torch.no_grad():
        expected = plain(rows).logits.log_softmax(-1).numpy()
    values = found["log_probabilities"]
    never = None if writes_ends else tokenizer.eos_token_id
    greedy = plain_greedy(plain, rows[:, : questions["prompt"]], questions["new"], never).numpy()
    ours = ids_of_lines(tokenizer, questions["lines"])
    theirs = json.loads(str(found["lines"]))
    targets = np.array(questions["rows"])[:, 1:, None]
    # Of two tokens that are equally likely but for rounding, an engine may take either one for the likeliest.
    of_theirs = np.take_along_axis(expected, values.argmax(-1)[..., None], -1)[..., 0]
    losses = [-np.take_along_axis(of[:, :-1], targets, -1).mean() for of in (values, expected)]
    return {
        "difference": float(abs(values - expected).max()),
        "top": int((of_theirs >= expected.max(-1) - TOLERANCE).sum()),
        "greedy": int((found["greedy"] == greedy).sum()),
        "lines": sum(a == b for a, b in zip(ours, theirs, strict=True)),
        "positions": values.shape[0] * values.shape[1],
        "written": greedy.size,
        "loss_apart": float(losses[0] - losses[1]),
        "loss": float(losses[1]),
    }


@pytest.fixture(scope="module")
def noted() -> Iterator[Callable[[str, str, dict[str, Any]], None]]:
    """Takes a row of the results, which replace the earlier ones at the end, where all forms and engines were run."""
    rows: list[dict[str, object]] = []
    yield lambda engine, name, found: rows.append(
        {"engine": engine, "form": name} | {key: f"{value:.4g}" for key, value in found.items()}
    )
    if len(rows) == len(ALL) + 2 * len(AS_GGUF):
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def check_exact(found: dict[str, Any]) -> None:
    assert found["difference"] <= TOLERANCE
    assert (found["top"], found["greedy"]) == (found["positions"], found["written"])
    assert found["lines"] == 50


@pytest.mark.parametrize("name", ALL)
def test_vllm_computes_what_transformers_does(name, exported, references, by_vllm, noted):
    file = by_vllm / f"{list(exported).index(name)}.npz"
    assert file.is_file(), (by_vllm / "log").read_text()[-2000:]
    with np.load(file) as answered:
        found = compared(name, references, dict(answered), writes_ends=True)
    noted("vllm", name, found)
    check_exact(found)


@pytest.mark.parametrize("quantize", ["f32", "q8_0"])
@pytest.mark.parametrize("name", AS_GGUF)
def test_llama_cpp_computes_what_transformers_does(name, quantize, references, noted, tmp_path):
    plain, tokenizer, questions = references[name]
    write_gguf(plain, tokenizer, tmp_path / "model.gguf", quantize, "model")
    answered = answers_of(tmp_path / "model.gguf", questions, str(ENGINES / "llama" / "bin" / "python"))
    found = compared(name, references, answered)
    noted(f"llama.cpp {quantize}", name, found)
    if quantize == "f32":
        check_exact(found)
    else:
        assert found["lines"] == 50
        assert abs(found["loss_apart"]) < 0.02 * found["loss"]


def test_a_model_that_is_another_one_is_noticed(references, tmp_path):
    """The control: one expert of one block, negated."""
    name = "Token Choice, 8 of 16"
    plain, tokenizer, questions = references[name]
    weight = plain.model.layers[2].mlp.experts.down_proj
    with torch.no_grad():
        weight[3] *= -1
        write_gguf(plain, tokenizer, tmp_path / "model.gguf", "f32", "model")
        weight[3] *= -1
    answered = answers_of(tmp_path / "model.gguf", questions, str(ENGINES / "llama" / "bin" / "python"))
    assert compared(name, references, answered)["difference"] > 100 * TOLERANCE


# The commands of docs/guide/serve.md

PAGE = ROOT / "docs" / "guide" / "serve.md"


def blocks(engine: str) -> list[str]:
    """Code of the page that begins with `# ENGINE`."""
    found = re.findall(r"^```\w+\n# (\S+)\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == engine]


@pytest.fixture(scope="module")
def place(tiny_runs, tmp_path_factory) -> Path:
    """A directory with what the page's `mot export` lines write."""
    place = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tiny_runs[MIXED].parent / "cache"))
        export(tiny_runs[MIXED], place / "exported", distil_steps=5, device="cpu")
        export(tiny_runs[MIXED], place / "mine-hub", format="hub", device="cpu")
        export(place / "exported", place / "mine-q8.gguf", quantize="q8_0", device="cpu")
    return place


def python(engine: str, *words: object, place: Path) -> str:
    own = {"HF_MODULES_CACHE": str(place / "code"), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(ENGINES / engine / "bin" / "python"), *map(str, words)]
    done = subprocess.run(command, cwd=place, env=os.environ | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("name", "engine"), [("transformers", "scores"), ("llama.cpp", "llama"), ("vllm", "vllm")], ids=str
)
def test_the_python_of_the_page_writes_text(name, engine, place):
    code = blocks(name)[0]
    (place / "page.py").write_text(code)
    assert python(engine, "page.py", place=place).strip()


def test_vllm_serves_the_export(place):
    (line,) = (shlex.split(block) for block in blocks("vllm") if block.startswith("python -m"))
    address = f"http://127.0.0.1:{line[line.index('--port') + 1]}/v1/completions"
    asked = json.dumps({"model": "exported", "prompt": "def ", "max_tokens": 5}).encode()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    program = ENGINES / "vllm" / "bin" / "python"
    settings = os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            [str(program), *line[1:]], cwd=place, env=settings, stdout=log, stderr=log, start_new_session=True
        )
        try:
            answer = None
            for _ in range(300):
                assert process.poll() is None, (place / "log").read_text()[-3000:]
                with contextlib.suppress(OSError):
                    request = urllib.request.Request(address, asked, {"Content-Type": "application/json"})
                    answer = json.loads(direct.open(request, timeout=60).read())
                    break
                time.sleep(1)
            assert answer is not None
            assert answer["usage"]["completion_tokens"] == 5
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


@pytest.mark.parametrize("number", [0, 1], ids=["exported", "hub"])
def test_lm_eval_scores_as_the_model_does(number, place):
    """A task of this test's in place of the Hub's: which of two continuations is likelier."""
    line = shlex.split(blocks("lm_eval")[0].splitlines()[number])
    lines = [text for text in PAGE.read_text().splitlines() if 20 < len(text) < 40]
    pairs = [(lines[i][:8], [lines[i][8:], lines[-1 - i][8:]]) for i in range(len(lines) // 2)]
    places = [{"context": context, "choices": choices, "answer": 0} for context, choices in pairs]
    (place / "places.json").write_text("".join(json.dumps(one) + "\n" for one in places))
    task = {"task": "places", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "places.json"}}}
    task |= {"output_type": "multiple_choice", "test_split": "test", "target_delimiter": "", "doc_to_target": "answer"}
    task |= {"doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}"}
    task["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    (place / "places.yaml").write_text(json.dumps(task))
    line[line.index("--tasks") + 1] = "places"
    more = ["--include_path", ".", "--device", "cpu", "--batch_size", "3", "--output_path", f"scores-{number}"]
    python("scores", "-m", *line, *more, place=place)
    (scores,) = (place / f"scores-{number}").rglob("results*.json")
    found = json.loads(scores.read_text())["results"]["places"]["acc,none"]
    folder = ("exported", "mine-hub")[number]
    model = (
        AutoModelForCausalLM.from_pretrained(place / folder).eval()
        if folder == "exported"
        else MixtureOfTokensForCausalLM.from_pretrained(place / folder).eval()
    )
    if folder == "mine-hub":
        model.serve_alone(num_experts_alone=model.config.num_experts_per_tok)
    tokenizer = AutoTokenizer.from_pretrained(place / folder)
    likelier = [
        np.argmax([likelihood(model, tokenizer, context, each) for each in choices]) for context, choices in pairs
    ]
    right = sum(choice == 0 for choice in likelier)
    assert len(pairs) > 5
    assert found == pytest.approx(right / len(pairs))


@torch.no_grad()
def likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    before, whole = tokenizer(context)["input_ids"], tokenizer(context + continuation)["input_ids"]
    ids = torch.tensor([whole])
    found = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    return float(found[len(before) - 1 :].sum())
