"""What long calls say, and how a program silences it."""

import logging
import time

import pytest

from mixture_of_tokens import generate
from mixture_of_tokens.utils.progress import progress_bar, say, warn, warned_if_slow


@pytest.mark.parametrize(("takes", "told"), [(0.0, ""), (0.2, "mot: it is a name on the Hub\n")])
def test_what_takes_long_is_told_and_what_fails_at_once_is_not(takes, told, capsys):
    with warned_if_slow("it is a name on the Hub", seconds=0.1):
        time.sleep(takes)
    time.sleep(0.2)
    assert capsys.readouterr().err == told


@pytest.fixture
def level():
    logger = logging.getLogger("mixture_of_tokens.progress")
    before = logger.level
    yield logger.setLevel
    logger.setLevel(before)


@pytest.mark.parametrize(
    ("name", "told"), [("INFO", "a line\nmot: a warning\n"), ("WARNING", "mot: a warning\n"), ("ERROR", "")]
)
def test_a_program_chooses_what_it_is_told(name, told, level, capsys):
    level(name)
    say("a line")
    warn("a warning")
    assert capsys.readouterr() == ("", told)
    list(progress_bar("a bar", range(3)))
    assert ("a bar" in capsys.readouterr().err) == (name == "INFO")


def test_a_call_whose_progress_is_silenced_writes_nothing(tiny_runs, tmp_path, level, capfd):
    level("ERROR")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def\nclass\nif\n")
    made = generate(tiny_runs["MoT-Nano/4E/2"], prompts_file=prompts, max_new_tokens=2)
    assert made is not None
    assert len(made.continuations) == 3
    assert capfd.readouterr() == ("", "")
