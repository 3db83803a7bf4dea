"""Trained as it is served: a Mixture of Tokens whose batch is replaced by companions from the first step on.

    python experiments/alone/run.py             # trains what is missing, one run after the other, and prints the tables
    python experiments/alone/run.py --long      # the same of the ten minutes' runs
    python experiments/alone/run.py --micro     # the same of the Micros
    python experiments/alone/run.py --time      # the time of a step, as a multiple of Token Choice's
    python experiments/alone/run.py --table     # prints the tables alone

Served alone by K experts, a Mixture of Tokens is a sparse mixture of experts: private, causal, at about the FLOPs of a
dense feed-forward. `Alone` below is that form with a gradient through all of it:

    b[e]   = companion_logit[e] + log(G - 1)
    w[t,e] = sigmoid(logit[t,e] - b[e])                          a softmax of the token against G - 1 companions
    out[t] = sum over t's top K of w[t,e] FFN_e(w[t,e] x_t + (1 - w[t,e]) c_e)  +  sum of all other w[t,e] FFN_e(c_e)

Every variant changes one part of it. Beside it are the library's routings, Default MoE among them. All systems share
one loop, one schedule, the text and its order. Losses are of `EVALUATED` batches of the tuning split, each text by
itself, with as many experts as in training. A run takes about two minutes of one core of an AMD EPYC; each is one row
of runs.csv, written when it ends.

The long runs have the text, the rows and the time of `experiments/verdict/fresh.py`: as many steps as fit into ten
minutes of two cores, and their loss is that of the whole validation split too. Micros have the text, the context and
the steps of the paper's figures (12.3 million tokens); one takes half an hour of a core. The hash of
their text is 5997ee7a77f45bb2; other packages give another text.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_tokens import (
    GroupedBatches,
    MixtureOfTokens,
    MixtureOfTokensForCausalLM,
    calibrate_companions,
    config_from_name,
    prepare_text,
)
from mixture_of_tokens.data.prepare import Prepared
from mixture_of_tokens.evaluation.losses import evaluate_blocks
from mixture_of_tokens.layers.dispatch import dropless
from mixture_of_tokens.layers.experts import highest, softmax
from mixture_of_tokens.runs import provenance
from mixture_of_tokens.utils.cpu import keep_large_blocks
from mixture_of_tokens.utils.formatting import markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "verdict"))

import systems
from common import add_rows, read_csv, step_times

HERE = Path(__file__).resolve().parent
GROUP, EVALUATED, MEASURED = 32, 16, 8  # rows; batches of losses, and of companions
WARM_UP = {"Nano": 100, "Micro": 150}  # steps
DECAY = 0.99  # of companions that follow, a step
ROUNDS, TURNS, TIMED, TIMES = 7, 6, 3, "timings.csv"  # as of experiments/verdict/fresh.py


@dataclass(frozen=True)
class Run:
    """One training.

    system: "alone", "groups" (a Mixture of Tokens throughout), "default" (Default MoE), or the prefix of a routing.
    name: size, groups and granularity, as in Nano/32E/8; k: experts a token, by default the granularity.
    rate: the peak rate; rows: of a step.
    gate: "sigmoid" as above, or "softmax" over the experts; of Token Choices "normalised", to a sum of one a token.
    reads: what a chosen expert reads, "blend" as above, or "token".
    constant: what experts that were not chosen give: "gradient" as above, "detached", or "none".
    companion: "start", measured before the first step (of `alone`) and then fixed; "zero"; "average", which follows;
        "renewed", measured anew a few times; "learned".
    balance: of a bias as sigmoid Token Choice has; 0 for none.
    groups_first: the share of the steps in groups, before the form begins.
    companions: G - 1 tokens stand beside each, with the G of the name where 0.
    text: "library", Python's standard library, or "packages", those of experiments/packages.txt.
    """

    system: str
    seed: int = 1
    rate: float = 2e-2
    name: str = "Nano/32E/8"
    k: int = 0
    steps: int = 800
    rows: int = 64
    temperature: float = 0.0
    gate: str = "sigmoid"
    reads: str = "blend"
    constant: str = "gradient"
    companion: str = "start"
    balance: float = 0.0
    groups_first: float = 0.0
    companions: int = 0
    text: str = "library"

    @property
    def label(self) -> str:
        """What is not the default, without the seed."""
        default = Run(self.system)
        own = {name: value for name, value in asdict(self).items() if value != getattr(default, name)}
        own = {name: value for name, value in own.items() if name not in ("seed", "steps", "rows", "text")}
        return " ".join([self.system, *(f"{name}={value}" for name, value in own.items())])

    @property
    def size(self) -> str:
        return self.name.partition("/")[0]

    @property
    def experts(self) -> int:
        parts = self.name.split("/")
        return self.k or (int(parts[2]) if len(parts) > 2 else 1)


# What is trained for ten minutes, Token Choice first.
LONG = [
    Run("TC", name="Nano/32E/4", gate="normalised", rows=128, text="packages"),
    Run("alone", name="Nano/32E/4", rows=128, text="packages"),
    Run("alone", name="Nano/32E/4", rows=128, text="packages", reads="token"),
    Run("default", name="Nano/32E/4", rows=128, text="packages"),
]


# 128 wide, at the rate of experiments/paper/early.py.
MICRO = [
    Run(system, name="Micro/32E/4", rate=8e-3, steps=1500, text="packages", gate=gate, reads=reads)
    for system, gate, reads in (("alone", "sigmoid", "token"), ("TC", "normalised", "blend"))
]


class Alone(MixtureOfTokens):
    """A Mixture of Tokens that is trained alone once `few` is set. Letters as in `mixture.py`."""

    how: Run
    few = 0
    loads: Tensor | None = None
    bias_E: Tensor | None = None

    def forward(self, x_BTD: Tensor, token_mask: Tensor | None = None) -> Tensor:
        if not self.few:
            return super().forward(x_BTD, token_mask)
        how, x_SD, S, K = self.how, x_BTD.flatten(0, 1), x_BTD.shape[0] * x_BTD.shape[1], self.few
        c_ED = self.companion
        logits_SE = self.gate(x_SD)
        if how.gate == "sigmoid":
            w_SE = (logits_SE - (self.companion_logit + math.log(self.group_size - 1))).sigmoid()
        else:
            w_SE = softmax(logits_SE, dim=-1)
        if how.balance:
            if self.bias_E is None:
                self.bias_E = torch.zeros(self.num_experts)
            _, e_SK = highest(w_SE.detach() + self.bias_E, K)
            w_SK = w_SE.gather(1, e_SK)
        else:
            w_SK, e_SK = highest(w_SE, K)
        if how.reads == "blend":
            rows_AD = (w_SK[..., None] * x_SD[:, None] + (1 - w_SK[..., None]) * c_ED[e_SK]).flatten(0, 1)
            y_SD = dropless(self, rows_AD, e_SK.view(-1, 1), w_SK.view(-1, 1)).view(S, K, -1).sum(1)
        else:
            y_SD = dropless(self, x_SD, e_SK, w_SK)
        if how.constant != "none":
            y_ED = self.experts(c_ED[:, None])[:, 0]
            y_ED = y_ED.detach() if how.constant == "detached" else y_ED
            y_SD = y_SD + w_SE.scatter(1, e_SK, 0) @ y_ED
        if self.training and torch.is_grad_enabled():
            self.follow(x_SD.detach(), logits_SE.detach(), e_SK)
        elif self.loads is not None:
            self.loads += torch.bincount(e_SK.flatten(), minlength=self.num_experts)
        return y_SD.view_as(x_BTD)

    @torch.no_grad()
    def follow(self, x_SD: Tensor, logits_SE: Tensor, e_SK: Tensor) -> None:
        """What is learned without a gradient."""
        if self.how.companion == "average":
            p_SE = logits_SE.softmax(0)  # the mean mixture, of all tokens of the step as one group
            self.companion.lerp_(p_SE.T @ x_SD, 1 - DECAY)
            log_mean_E = logits_SE.logsumexp(0) - math.log(len(x_SD))
            self.companion_logit.lerp_(log_mean_E, 1 - DECAY)
        if self.how.balance:
            load_E = torch.bincount(e_SK.flatten(), minlength=self.num_experts).float()
            self.bias_E += self.how.balance * (load_E.mean() - load_E).sign()

    def begin(self) -> None:
        """Companions are measured by now."""
        self.few = self.how.experts
        if self.how.companion == "zero":
            self.companion.zero_()
            self.companion_logit.zero_()
        if self.how.companion == "learned":
            for name in ("companion", "companion_logit"):
                value = self._buffers.pop(name)
                self.register_parameter(name, nn.Parameter(value.clone()))


def build(run: Run) -> MixtureOfTokensForCausalLM:
    prefix = {"alone": "MoT", "groups": "MoT", "default": "DMoE"}.get(run.system, run.system)
    fields: dict[str, Any] = {"router_temperature": run.temperature} if run.temperature else {}
    if prefix == "TC":
        fields["capacity_factor"] = None
    if run.gate == "normalised":
        fields["norm_topk_prob"] = True
    if run.k and prefix != "MoT":
        fields["num_experts_per_tok"] = run.k
    torch.manual_seed(run.seed)
    model = MixtureOfTokensForCausalLM(
        config_from_name(prefix + "-" + (run.name if prefix != "Transformer" else run.size), **fields)
    )
    for layer in model.modules():
        if run.system == "alone" and isinstance(layer, MixtureOfTokens):
            layer.__class__ = Alone
            layer.how = run
            layer.group_size = run.companions + 1 if run.companions else layer.group_size
    return model


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.AdamW:
    decayed = [p for name, p in model.named_parameters() if p.dim() > 1 and "companion" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() <= 1 or "companion" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), fused=True)


def rate_at(run: Run, step: int) -> float:
    """As `mot train`: a warm-up, then a cosine down to a tenth."""
    warm_up = WARM_UP[run.size]
    if step < warm_up:
        return run.rate * (step + 1) / warm_up
    return run.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / (run.steps - warm_up))))


def prepared(run: Run) -> Prepared:
    of_size = {"context": 128, "vocab_size": 1024} if run.size == "Micro" else {}
    return prepare_text(["packages"] if run.text == "packages" else None, **of_size)


def loader(blocks: Any, rows: int, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
    batches = GroupedBatches(blocks, group_size=GROUP, batch_size=rows, steps=steps, seed=seed)
    return iter(torch.utils.data.DataLoader(batches, batch_size=rows, collate_fn=dict))


@torch.no_grad()
def loss_of(model: MixtureOfTokensForCausalLM, batches: list[dict[str, Tensor]]) -> float:
    model.eval()
    found = [float(model(**batch).loss) for batch in batches]
    model.train()
    return sum(found) / len(found)


def trained(run: Run, text: Prepared) -> dict[str, Any]:
    """What is measured of a run. Losses are infinite where it diverged."""
    started, seconds = time.perf_counter(), 0.0
    tuning, measured = list(loader(text.tuning, 128, EVALUATED, 5)), list(loader(text.train, 64, MEASURED, 77))
    model = build(run)
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, Alone)]
    optimizer, begins = optimizer_of(model, run.rate), round(run.groups_first * run.steps)
    at_begin: dict[str, Any] = {"before": "", "after": ""}
    model.train()
    for step, batch in enumerate(loader(text.train, run.rows, run.steps, run.seed)):
        if layers and step == begins:
            if begins:
                at_begin["before"] = round(loss_of(model, tuning), 4)
            calibrate_companions(model, measured)
            for layer in layers:
                layer.begin()
            if begins:
                at_begin["after"] = round(loss_of(model, tuning), 4)
            if run.companion == "learned":
                fresh = optimizer_of(model, run.rate)
                fresh.state.update(optimizer.state)
                optimizer = fresh
        if layers and run.companion == "renewed" and step in (50, 100, 200, 400):
            for layer in layers:
                layer.few = 0
            calibrate_companions(model, measured)
            for layer in layers:
                layer.few = run.experts
        now = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(run, step)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        model.balance()
        seconds += time.perf_counter() - now
        if step % 100 == 99:
            print(f"{run} step {step + 1}, {loss.item():.3f}, {time.perf_counter() - started:.0f} s", file=sys.stderr)
        if not math.isfinite(loss.item()):
            return {"loss": math.inf}
    if run.system == "groups":
        in_groups = loss_of(model, tuning)
        calibrate_companions(model, measured)
        model.serve_alone(num_experts_alone=run.experts)
        return {"loss": loss_of(model, tuning), "in_groups": round(in_groups, 4), "seconds": round(seconds)}
    for layer in layers:
        layer.loads = torch.zeros(layer.num_experts)
    result: dict[str, Any] = {"loss": loss_of(model, tuning), "seconds": round(seconds)} | at_begin
    if run.text == "packages":
        whole = evaluate_blocks(model, text.validation, group_size=GROUP, batch_size=128)
        result["validation"] = round(whole["loss"], 4)
    if layers:
        shares = [layer.loads / layer.loads.mean() for layer in layers]
        result["dead"] = round(statistics.mean(float((s < 0.01).float().mean()) for s in shares), 3)
        result["greatest_load"] = round(max(float(s.max()) for s in shares), 1)
    return result


COLUMNS = tuple(field.name for field in fields(Run))
FOUND = ("loss", "validation", "in_groups", "before", "after", "dead", "greatest_load", "seconds", "commit", "hardware")


def key_of(run: Run) -> dict[str, str]:
    return {name: str(value) for name, value in asdict(run).items()}


def is_made(run: Run) -> Mapping[str, str] | None:
    wanted = key_of(run)
    return next((row for row in read_csv(HERE / "runs.csv") if wanted.items() <= row.items()), None)


def make(run: Run, text: Any) -> None:
    found = trained(run, text)
    where = {"commit": provenance.commit(), "hardware": provenance.hardware("cpu")["hardware"]}
    found["loss"] = f"{found['loss']:.4f}"
    row = key_of(run) | {column: (found | where).get(column, "") for column in FOUND}
    add_rows(HERE / "runs.csv", [row], COLUMNS)


def timed() -> None:
    """Time steps of the long systems that were not timed yet, each beside Token Choice's, and write these shares."""
    text, known = prepared(LONG[0]), {row["system"] for row in read_csv(HERE / TIMES)}
    measured, models = list(loader(text.train, 64, MEASURED, 77)), {}
    for run in [LONG[0], *(run for run in LONG if run.label not in known)]:
        models[run.label] = model = build(run)
        layers = [layer for layer in model.modules() if isinstance(layer, Alone)]
        if layers:
            calibrate_companions(model, measured)
        for layer in layers:
            layer.begin()
    rows = step_times(models, text.train, rows=LONG[0].rows, group=GROUP, rounds=ROUNDS, turns=TURNS, steps=TIMED)
    add_rows(HERE / TIMES, rows, ["system"])


def long_plan() -> list[Run]:
    """Ten minutes each, in the order in which they are made."""
    verdict = {row["system"]: row["share_of_dense"] for row in read_csv(HERE.parent / "verdict" / systems.TIMES)}
    budget = systems.BUDGET / float(verdict["TC-Nano/32E/4, capacity_factor null"])
    steps = {row["system"]: int(budget / float(row["share_of_dense"])) for row in read_csv(HERE / TIMES)}
    choice, alone, token, default = (replace(run, steps=steps[run.label]) for run in LONG)
    balanced = replace(alone, balance=1e-3)
    firsts = [replace(run, rate=rate) for run, rate in ((alone, 1e-2), (alone, 5e-3), (token, 1e-2))]
    more = [(choice, 5e-3), (token, 2e-2), (balanced, 1e-2)]
    averages = [replace(default, rate=rate) for rate in (1e-2, 5e-3)]
    return [
        *firsts,
        *seeded(firsts[-1], seeds=[2, 3]),
        *averages,
        *seeded(averages[0], seeds=[2, 3]),
        *(replace(run, rate=rate) for run, rate in more),
    ]


def micro_plan() -> list[Run]:
    """Figures of Micros begin with seed 2."""
    served = replace(MICRO[0], reads="blend", seed=2)
    return [*seeded(*MICRO, seeds=[2, 3]), *(replace(run, rate=4e-3, seed=2) for run in MICRO), served]


def seeded(*runs: Run, seeds: Iterable[int] = (1, 2)) -> list[Run]:
    return [replace(run, seed=seed) for seed in seeds for run in runs]


def plan() -> list[Run]:
    """In the order in which they are made."""
    alone = Run("alone")
    rates = [Run(system, rate=rate) for rate in (1e-2, 2e-2, 4e-2) for system in ("alone", "TC", "STC", "default")]
    others = [Run("groups"), Run("Transformer"), Run("ReMoE"), Run("ET", rate=1e-2), Run("ET")]
    best = [Run(system) for system in ("alone", "STC", "TC", "default")]  # at 0.02, the best rate of each by seed 1
    parts = [
        replace(alone, constant="none"),
        replace(alone, reads="token"),
        replace(alone, balance=1e-3),
        replace(alone, gate="softmax"),
        replace(alone, companion="zero"),
        replace(alone, groups_first=0.25),
        replace(alone, reads="token", constant="none"),
        replace(alone, constant="detached"),
        *(replace(alone, companion=kind) for kind in ("average", "learned", "renewed")),
        replace(alone, gate="softmax", reads="token"),
        *(replace(alone, groups_first=share) for share in (0.1, 0.5)),
        *(replace(alone, companions=number) for number in (1, 7, 63)),
        *(replace(alone, temperature=value) for value in (0.125, 0.5, 1.0)),
        *(replace(alone, k=number) for number in (4, 16)),
        *(replace(alone, name=f"Nano/32E{granularity}") for granularity in ("", "/4", "/16")),
        *(Run("TC", name=f"Nano/32E{granularity}") for granularity in ("", "/4", "/16")),
        *(Run("TC", k=number) for number in (4, 16)),
        *(Run("STC", temperature=value) for value in (0.25, 0.5)),
        *(Run("TC", temperature=value) for value in (0.25, 0.5)),
    ]
    plain = replace(alone, reads="token", constant="none")  # sigmoid gates with a bias, and nothing of a mixture
    decides = [plain, Run("STC", temperature=0.25), Run("STC", temperature=0.5), replace(plain, balance=1e-3)]
    fourth = [replace(run, rows=64, text="library") for run in LONG]  # at granularity 4
    normalised = [Run("STC", gate="normalised"), Run("TC", gate="normalised")]
    first = [
        *seeded(plain, seeds=[2, 3]),
        *decides[:3],
        *normalised,
        *seeded(*normalised, seeds=[2, 3]),
        decides[3],
        *fourth,
        replace(alone, balance=1e-3, name="Nano/32E/4"),
        *seeded(*fourth, seeds=[2, 3]),
    ]
    first += seeded(*decides[1:], seeds=[2, 3])
    return [*rates, *others[:2], *seeded(*best, seeds=[2, 3]), *first, *parts, *others, *seeded(*parts, seeds=[2])]


def table(runs: Iterable[Run], loss: str = "loss") -> str:
    """By their settings, with a column for each seed.

    Args:
        loss: "loss", of the tuning split, or "validation".
    """
    made = [(run, row) for run in dict.fromkeys(runs) if (row := is_made(run)) is not None]
    seeds = sorted({run.seed for run, _ in made})
    rows = [["", *(f"seed {seed}" for seed in seeds), "dead", "greatest load"]]
    for label in dict.fromkeys(run.label for run, _ in made):
        own = {run.seed: row for run, row in made if run.label == label}
        first = own[min(own)]
        losses = [f"{float(own[seed][loss]):.4f}" if seed in own else "" for seed in seeds]
        rows.append([label, *losses, first["dead"], first["greatest_load"]])
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="train the runs of ten minutes")
    parser.add_argument("--micro", action="store_true", help="train the Micros")
    parser.add_argument("--time", action="store_true", help="time steps of these, and stop")
    parser.add_argument("--table", action="store_true", help="print the tables, and stop")
    given = parser.parse_args()
    if given.time:
        timed()
        return
    if not given.table:
        keep_large_blocks()
        runs = long_plan() if given.long else micro_plan() if given.micro else plan()
        text = prepared(runs[0])
        for run in runs:
            if is_made(run) is None:
                make(run, text)
    print(f"800 steps of 64 rows\n\n{table(plan())}\n\nTen minutes\n\n{table(long_plan(), 'validation')}\n")
    print(f"Micros\n\n{table(micro_plan(), 'validation')}\n")


if __name__ == "__main__":
    main()
