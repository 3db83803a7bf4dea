"""What is told to those who try something else first."""

import pytest

from mixture_of_tokens import MixtureOfTokensConfig, MixtureOfTokensForCausalLM, prepare_text
from mixture_of_tokens.settings.names import SIZES, parse_name
from mixture_of_tokens.settings.routings import TABLE
from processes import mot


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit, match="2"):
        mot(*words)
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", [MixtureOfTokensForCausalLM, MixtureOfTokensConfig])
def test_a_run_directory_is_told_from_its_model(tiny_runs, tmp_path, kind):
    run = tiny_runs["MoT-Nano/4E/2"]
    with pytest.raises(ValueError, match=f"{run} is a run, whose model is in {run / 'model'}"):
        kind.from_pretrained(run)
    with pytest.raises(ValueError, match=f"{tmp_path} has no config.json"):
        kind.from_pretrained(tmp_path)
    for loaded in (kind.from_pretrained(run / "model"), kind.from_pretrained(run, subfolder="model")):
        assert getattr(loaded, "config", loaded).group_size == 4


def test_a_text_in_place_of_a_file_is_told_to_be_none():
    with pytest.raises(ValueError, match="is too long for the name of a file: write text to a file"):
        prepare_text(["Once upon a time there was a word. " * 20])
    with pytest.raises(ValueError, match="there is no such file or folder; it looks like text"):
        prepare_text(["Once upon\na time"])


def test_a_run_or_a_text_in_place_of_a_name_says_where_it_belongs(tiny_runs, tmp_path):
    run = tiny_runs["TC-Nano/4E"]
    with pytest.raises(ValueError, match=f"is a run, whose settings are taken with --config {run}/config.yaml"):
        parse_name(str(run))
    for text in ("own.jsonl", str(tmp_path)):
        with pytest.raises(ValueError, match=f"{text} is no model: text is given with --data"):
            parse_name(text)
    with pytest.raises(ValueError, match="did you mean MoT"):
        parse_name("mot-Nano/4E")


def test_help_of_train_lists_every_system_and_size_with_an_example(capsys):
    mot("train", "--help")
    shown = " ".join(capsys.readouterr().out.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    systems, sizes = shown.partition("Systems: ")[2].partition("Sizes: ")[::2]
    for prefix in (row.prefix for row in TABLE):
        assert prefix in systems
    for size in SIZES:
        assert size in sizes.partition(". ")[0]
    assert "mot train MoT-Nano/32E/8 --steps 300 --data my-texts" in shown


def test_help_names_the_keys_of_a_file_of_flags(tmp_path, tiny_runs, capsys):
    mot("report", "--help")
    assert "runs: [A, B]" in " ".join(capsys.readouterr().out.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    file = tmp_path / "flags.yaml"
    file.write_text(f"runs: [{tiny_runs['TC-Nano/4E']}]\nout: {tmp_path / 'page.html'}\n")
    mot("report", "--config", file)
    assert "TC-Nano/4E" in capsys.readouterr().out


def test_a_gpu_is_cuda_and_one_model_is_compared_with_nothing(capsys):
    assert 'A GPU is "cuda"' in refused(capsys, "train", "MoT-Nano/4E", "--device", "gpu")
    mot("compare", "MoT-Nano/4E", "--dry-run")
    assert "MoT-Nano/4E is compared with nothing: name two models or more" in capsys.readouterr().err


def test_prepared_text_is_shown_in_a_few_words(small_corpus):
    shown = repr(prepare_text([str(small_corpus)], context=16))
    assert len(shown) < 800
    assert "train=Blocks(" in shown
    assert " of 16 tokens; " in shown


def test_sizes_that_are_not_the_names_are_told(capsys):
    mot("train", "MoT-Nano/8E/4", "--model.num_experts", 16, "--model.hidden_size", 64, "--dry-run")
    said = "MoT-Nano/8E/4 keeps its name, but hidden_size is 64, not 32, num_experts is 16, not 32; a report shows that"
    assert said in capsys.readouterr().err
    mot("train", "MoT-Nano/4E/5", "--model.intermediate_size", 100, "--dry-run")  # 5 does not divide the name's 96
    mot("train", "Transformer-Nano", "--model.group_size", 8, "--dry-run")  # of the data alone
    assert "keeps its name" not in capsys.readouterr().err
