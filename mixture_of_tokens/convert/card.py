"""The model cards of exports."""

from pathlib import Path
from typing import Any

from mixture_of_tokens.convert.distilled import Distilled
from mixture_of_tokens.model.config import MixtureOfTokensConfig
from mixture_of_tokens.model.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.runs import provenance, records
from mixture_of_tokens.runs.loading import run_directory
from mixture_of_tokens.runs.records import RunFacts, Switch
from mixture_of_tokens.runs.run import read_run


def card(
    run: str,
    model: MixtureOfTokensForCausalLM,
    plain: Any,
    compared: str,
    difference: float,
    license: str | None,
    distilled: Distilled | None,
) -> str:
    """The model card."""
    config, kind = model.config, type(plain).__name__
    licensed = [] if license is None else [f"license: {license}"]
    facts, path = _facts_of(run), run_directory(run) or Path(run).absolute()
    lines = _head(run, facts, licensed)
    lines.append(f"A `{kind}` of {plain.num_parameters():,} parameters, context {config.max_position_embeddings}.")
    lines.append("`generate` does not stop at the end of the context by itself: set `max_new_tokens`.")
    if blocks := len(config.sparse_routings):
        lines.append(
            f"{blocks} of its {config.num_hidden_layers} feed-forwards are sparse: {config.num_experts} experts of "
            f"width {config.moe_intermediate_size}, {config.num_experts_per_tok} for a token, weighted by "
            f"{_gates(model.config)}. Nothing is dropped."
        )
        if kind == "Qwen3MoeForCausalLM":
            lines.append("In further training, `output_router_logits=True` adds a loss that balances the experts.")
    if facts is not None:
        lines += _training(facts)
        if (path / records.SWITCH).is_file():
            switch, end = Switch.read(path / records.SWITCH), read_run(path).stages.end_loss
            lines.append(
                "It was a Mixture of Tokens (arXiv 2310.15961) first, and was switched to Token Choice after "
                f"{switch.step:,} steps. Over a part of the {facts.evaluated_on} text the loss was "
                f"{switch.source_in_groups:.4f} before, with texts in groups, {switch.source_alone:.4f} with "
                f"each alone, {switch.at_the_switch:.4f} at the switch, and {end:.4f} at the end."
            )
        whose = "Loss" if distilled is None else "The Mixture of Tokens' loss"
        lines.append(
            f"{whose} on {facts.scored}: {facts.final_loss:.4f} nats a token, {facts.bits_per_byte:.4f} bits a byte."
        )
    if distilled is not None:
        lines.append(
            "It was trained as a Mixture of Tokens (arXiv 2310.15961) and distilled into a sparse model, without "
            f"training it further. Over a part of the {distilled.split} text the loss was {distilled.source.loss:.4f} "
            f"before, with texts in groups, and is {distilled.chosen.loss:.4f} now."
        )
    lines += ["", "## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("this/directory")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("this/directory")']
    lines += ['inputs = tokenizer("def ", return_tensors="pt")']
    lines += ["written = model.generate(**inputs, max_new_tokens=40, do_sample=True)"]
    lines += ["print(tokenizer.decode(written[0]))", "```", ""]
    lines.append("Rows of a batch do not influence each other beyond rounding.")
    whose = "the run's" if distilled is None else "those of the distilled model"
    lines.append(f"Logits in fp32 on {compared} are at most {difference:.1e} from {whose} in the training library.")
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions().items())
    return "\n".join([*lines, "", f"Written by mixture-of-tokens ({versions}).", ""])


def hub_card(run: str, model: MixtureOfTokensForCausalLM, losses: dict[str, float], license: str | None) -> str:
    """The model card of a folder with its own code. losses: by what they are of, as `serve_as_written` gives them."""
    config, facts = model.config, _facts_of(run)
    open_fields = ["# license: the Hub's abbreviation, such as apache-2.0", "# datasets: [the Hub's name of the text]"]
    lines = _head(run, facts, open_fields if license is None else [f"license: {license}", *open_fields[1:]])
    titles = " and ".join(dict.fromkeys(routing.title for routing in config.sparse_routings)) or "a dense Transformer"
    lines.append(
        f"A language model of {model.num_parameters():,} parameters, context {config.max_position_embeddings}:"
    )
    lines.append(f"{titles}, in blocks that are else Qwen3's. transformers has no such architecture, so this folder")
    lines.append("brings its own code, which `trust_remote_code=True` runs: read it first, and pin a revision.")
    if config.shares_batch:
        lines += ["", "## Do rows of a batch influence each other?", ""]
        if model.shares_batch:
            lines.append(f"**Yes**: they are mixed in groups of {config.group_size} (in order). Do not put texts of")
            lines.append("different people into one batch. Padding is kept out by the attention mask.")
        else:
            lines.append(
                "**Not as it is loaded.** It was trained as a Mixture of Tokens (arXiv 2310.15961), where the tokens "
                f"at one position of {config.group_size} texts are mixed. Here each text is served alone: the others "
                f"are replaced by averages of the training text, and a token goes to {config.num_experts_per_tok} of "
                f"{config.num_experts} experts. `model.serve_alone(False)` mixes the rows of a batch again."
            )
    if facts is not None:
        lines += _training(facts)
    if losses:
        told = [f"{value:.4f}{f' {what}' if what else ''}" for what, value in losses.items()]
        lines += ["", f"Loss in nats a token, on a part of the text that it was not trained on: {', '.join(told)}."]
    lines += ["", "## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ['name = "this/directory"']
    lines += ["model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)"]
    lines += ['inputs = tokenizer("def ", return_tensors="pt")']
    lines += ["written = model.generate(**inputs, max_new_tokens=40, do_sample=True)"]
    lines += ["print(tokenizer.decode(written[0]))", "```", ""]
    lines += ["`generate` does not stop at the end of the context by itself: set `max_new_tokens`. Scores, by"]
    lines += ["lm-evaluation-harness:", "", "```sh"]
    lines += [
        "lm_eval --model hf --model_args pretrained=this/directory,trust_remote_code=True --tasks piqa",
        "```",
        "",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions().items())
    return "\n".join([*lines, f"Written by mixture-of-tokens ({versions}).", ""])


def _head(run: str, facts: RunFacts | None, fields: list[str]) -> list[str]:
    """The card's metadata and its title."""
    path = run_directory(run) or Path(run).absolute()
    whole = path == Path(run).absolute() or facts is not None
    name = path.name if whole else f"{path.name}, {Path(run).name}"
    return ["---", *fields, "library_name: transformers", "pipeline_tag: text-generation", "---", "", f"# {name}", ""]


def _facts_of(run: str) -> RunFacts | None:
    """Of a finished run; of a checkpoint before the end they are another model's."""
    path = run_directory(run) or Path(run).absolute()
    of_the_end = (path / records.FACTS).is_file() and Path(run).absolute() in (path, path / "model")
    return RunFacts.read(path / records.FACTS) if of_the_end else None


def _training(facts: RunFacts) -> list[str]:
    source = ", ".join(facts.corpus.get("source") or ["text"])
    lines = ["", "## Training", "", f"{facts.name}, {facts.steps:,} steps, {facts.tokens:,} tokens of"]
    return [*lines, f"{source} (hash {facts.text[0]}), seed {facts.seed}."]


def _gates(config: MixtureOfTokensConfig) -> str:
    if config.sparse_routings[0].exports_as == "Dots1ForCausalLM":
        return "a sigmoid each" + (", divided by their sum" if config.norm_topk_prob else "")
    return f"a softmax over {'those' if config.norm_topk_prob else 'all'}"
