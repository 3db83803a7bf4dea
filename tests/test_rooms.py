"""The rooms of the library: who may import whom, what is public, and how little of it the layers and `mot` need."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mixture_of_tokens
from mixture_of_tokens import __main__ as front_door

PACKAGE = Path(mixture_of_tokens.__file__).parent
TESTS = Path(__file__).parent
# Each level imports from those before it; rooms of one level do not import each other. "" is what stands on top.
LEVELS = [
    {"utils"},
    {"layers"},
    {"settings"},
    {"models", "data"},
    {"parallel"},
    {"planning"},
    {"runs"},
    {"evaluation", "generation"},
    {"reports"},
    {"training"},
    {"conversion"},
    {"commands"},
    {"front door"},
]
FRONT_DOOR = {"__init__", "__main__"}
# What `pip install mixture-of-tokens` does without, and what of the rest the layers do without.
EXTRA = ("accelerate", "cyclopts", "datasets", "matplotlib", "pandas", "pyarrow", "tensorboard")
MODELS_ALONE = ("transformers", "huggingface_hub", "numpy", "safetensors", "tokenizers", "tqdm", "yaml")


def module_of(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def modules(package: Path) -> dict[str, ast.Module]:
    """Every module by its name within the package."""
    return {module_of(path, package): ast.parse(path.read_text()) for path in package.rglob("*.py")}


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """The modules of the library that are imported anywhere below, in functions and for type checkers too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] != "mixture_of_tokens" or name == "mixture_of_tokens.__version__":
                continue
            parts = name.split(".")[1:]
            while parts and ".".join(parts) not in known:  # the last is a name within a module
                parts.pop()
            found.add(".".join(parts) or "__init__")
    return found


def arrows(package: Path) -> dict[str, set[str]]:
    trees = modules(package)
    return {name: imported(tree, set(trees)) for name, tree in trees.items()}


def room(module: str, package: Path) -> str:
    if module in FRONT_DOOR:
        return "front door"
    first = module.partition(".")[0]
    return first if (package / first).is_dir() else ""


def upward(package: Path) -> list[str]:
    """Imports from another room that is not of an earlier level."""
    levels = {name: number for number, names in enumerate(LEVELS) for name in names}
    found = []
    for module, others in arrows(package).items():
        for other in others:
            own, its = room(module, package), room(other, package)
            if own != its and levels[own] <= levels[its]:
                found.append(f"{module} imports {other}")
    return found


def when_imported(tree: ast.Module) -> ast.Module:
    """Without functions, and without what is for type checkers alone."""
    kept = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return ast.Module(body=kept, type_ignores=[])


def order(package: Path) -> list[str]:
    """The modules, each after those that it imports. Raises CycleError where there is none."""
    trees = modules(package)
    graph = {name: imported(when_imported(tree), set(trees)) - {name} for name, tree in trees.items()}
    return list(TopologicalSorter(graph).static_order())


def test_no_room_imports_a_later_one_and_modules_import_in_no_circle():
    assert {room(module, PACKAGE) for module in modules(PACKAGE)} == set.union(*LEVELS)
    assert upward(PACKAGE) == []
    assert len(order(PACKAGE)) == len(modules(PACKAGE))


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        (
            "data/tokens",
            "def late():\n    from mixture_of_tokens.reports import page",
            "data.tokens imports reports.page",
        ),
        ("data/tokens", "import mixture_of_tokens.models.names", "data.tokens imports models.names"),
        ("layers/mixture", "from mixture_of_tokens.models.config import X", "layers.mixture imports models.config"),
        ("runs/run", "from mixture_of_tokens import train", "runs.run imports __init__"),
    ],
)
def test_a_planted_upward_import_is_found(module, line, found, tmp_path):
    planted = tmp_path / "mixture_of_tokens"
    shutil.copytree(PACKAGE, planted)
    with (planted / f"{module}.py").open("a") as file:
        file.write(f"\n{line}\n")
    assert upward(planted) == [found]


def test_a_planted_circle_within_a_room_is_found(tmp_path):
    planted = tmp_path / "mixture_of_tokens"
    shutil.copytree(PACKAGE, planted)
    with (planted / "layers" / "grouping.py").open("a") as file:
        file.write("\nfrom mixture_of_tokens.layers.experts import softmax\n")
    assert upward(planted) == []
    with pytest.raises(CycleError):
        order(planted)


def test_tests_stand_in_the_rooms_of_what_they_test():
    files = list(TESTS.rglob("test_*.py"))
    assert {file.parent.name for file in files if file.parent != TESTS} <= set.union(*LEVELS)
    assert len({file.name for file in files}) == len(files)  # pytest imports them by their names alone


# What is public


def for_type_checkers() -> dict[str, str]:
    (block,) = (node for node in modules(PACKAGE)["__init__"].body if isinstance(node, ast.If))
    assert isinstance(block.test, ast.Name)
    assert block.test.id == "TYPE_CHECKING"
    nodes = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(nodes) == len(block.body)
    return {alias.name: str(node.module) for node in nodes for alias in node.names}


def test_public_names_are_the_same_for_importers_type_checkers_and_readers():
    places = {name: f"mixture_of_tokens.{module}" for name, module in mixture_of_tokens._PLACES.items()}
    assert for_type_checkers() == places
    assert set(mixture_of_tokens.__all__) == set(places)
    assert sorted(mixture_of_tokens.__all__) == list(mixture_of_tokens.__all__)


@pytest.mark.parametrize("name", mixture_of_tokens.__all__)
def test_every_public_name_is_there(name):
    found = getattr(mixture_of_tokens, name)
    assert callable(found)
    assert found is getattr(importlib.import_module(f"mixture_of_tokens.{mixture_of_tokens._PLACES[name]}"), name)
    assert name in dir(mixture_of_tokens)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'mixture'"):
        _ = mixture_of_tokens.mixture  # type: ignore[attr-defined]


# In processes of their own


def fresh(code: str, *words: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Code run by a new Python in which some packages cannot be imported."""
    refuse = f"import sys\nsys.modules.update(dict.fromkeys({without!r}))\n"
    return subprocess.run([sys.executable, "-c", refuse + code, *words], capture_output=True, text=True, check=False)


OURS = (
    "\nprint(sorted(name for name, module in sys.modules.items() if module and name.startswith('mixture_of_tokens')))"
)
LAYERS = ("dispatch", "experts", "grouping", "losses", "mixture")
LAYER = """
import torch
from mixture_of_tokens import MixtureOfTokens
assert "torch._dynamo" not in sys.modules, "the compiler, which takes as long to import as torch itself"
x = torch.randn(8, 3, 16, requires_grad=True)
MixtureOfTokens(hidden_size=16, expert_size=8, num_experts=4, group_size=4)(x).sum().backward()
assert x.grad.isfinite().all()
"""


def test_the_layer_needs_torch_alone():
    done = fresh(LAYER + OURS, without=EXTRA + MODELS_ALONE)
    assert done.returncode == 0, done.stderr
    torch_alone = ("", ".layers", *(f".layers.{each}" for each in LAYERS), ".utils", ".utils.checks", ".utils.wording")
    loaded = [f"mixture_of_tokens{name}" for name in torch_alone]
    assert ast.literal_eval(done.stdout) == loaded


MODELS = """
import torch
from mixture_of_tokens import BalanceCallback, MixtureOfTokensForCausalLM, calibrate_companions, config_from_name, plan
from mixture_of_tokens import GroupedBatches, audit_model, prepare_text
text = prepare_text([sys.argv[2]], context=8, vocab_size=300, group_size=4)
GroupedBatches(text.train, group_size=4, batch_size=4, steps=1, seed=0)
from mixture_of_tokens.models.telemetry import measure
model = MixtureOfTokensForCausalLM(config_from_name("MoT-Nano/4E", vocab_size=50)).train()
batch = {"input_ids": torch.randint(50, (8, 5))}
model(**batch, labels=batch["input_ids"]).loss.backward()
calibrate_companions(model, [batch])
assert measure(model, batch)
BalanceCallback(model)
model.eval().serve_alone()
model.generate(batch["input_ids"], max_new_tokens=2)
model.save_pretrained(sys.argv[1])
assert audit_model(model, group_size=4, length=5, batches=1).causal
from transformers import AutoModelForCausalLM
assert torch.equal(AutoModelForCausalLM.from_pretrained(sys.argv[1]).lm_head.weight, model.lm_head.weight)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_cache")
def test_the_models_and_their_data_need_nothing_of_the_extra(small_corpus, tmp_path):
    done = fresh(MODELS, str(tmp_path), str(small_corpus), without=EXTRA)
    assert done.returncode == 0, done.stderr


MOT = """
import time
from mixture_of_tokens.__main__ import main
sys.argv = ["mot", *sys.argv[1:]]
try:
    main()
except SystemExit as stopped:
    assert not stopped.code, stopped.code
print(time.process_time(), "torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_import_no_torch_and_come_at_once(flag):
    seconds = []
    for _ in range(3):
        done = fresh(MOT, flag)
        assert done.returncode == 0, done.stderr
        cpu, torch = done.stderr.split()
        assert torch == "False"
        seconds.append(float(cpu))
    assert ("transition" if flag == "--help" else mixture_of_tokens.__version__) in done.stdout
    assert min(seconds) < 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "--help"), "--learning-rate"),
        (("train", "MoT-Nan/32E"), "did you mean Nano?"),
        (("train", "MoT-Nano/32E", "--stps", "3"), "--steps"),
        (("train", "MoT-Nano/32E", "--steps", "x"), "--steps takes a whole number"),
        (("train", "MoT-Nano/32E", "--model.router_temperature", "x"), "--model.router_temperature takes a number"),
        (("compare", "MoT-Nano/32E", "--training.weight_decay", "-1"), "--training.weight_decay must be 0 or more"),
        (("generate", "nano", "--device", "gpu"), '"cuda"'),
    ],
)
def test_help_and_what_is_wrong_come_before_torch_is_imported(words, said):
    done = fresh(MOT.replace("assert not stopped.code, stopped.code", "pass"), *words)
    *lines, last = done.stderr.splitlines()
    cpu, torch = last.split()
    assert said in done.stdout + "\n".join(lines)
    assert torch == "False"
    assert float(cpu) < 2


def test_without_the_extra_mot_says_in_a_line_what_to_install():
    done = fresh(MOT.replace("assert not stopped.code, stopped.code", "raise"), "plan", "MoT-Nano/4E", without=EXTRA)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        'mot: error: cyclopts is not installed; the command line comes with pip install "mixture-of-tokens[train]"\n'
    )


def test_without_the_extra_a_function_that_trains_says_what_to_install():
    done = fresh("from mixture_of_tokens import train", without=EXTRA)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    what = r'ModuleNotFoundError: \w+ is not installed; train comes with pip install "mixture-of-tokens\[train\]"'
    assert re.fullmatch(what, last)


@pytest.mark.parametrize("name", ["torch.not_there", "mixture_of_tokens.not_there", None])
def test_what_is_missing_within_an_installed_package_is_not_taken_for_the_extra(name, monkeypatch):
    def failing() -> None:
        raise ModuleNotFoundError("No module", name=name)

    monkeypatch.setattr("mixture_of_tokens.commands.cli.main", failing)
    with pytest.raises(ModuleNotFoundError):
        front_door.main()
