"""The program `boosterbit`, which an installed copy has; `tests/test_wheel.py` installs one."""

import re
import subprocess
import sys

import pytest

from engine import cli
from tests.conftest import ROOT
from tests.test_layout import PRODUCT

RUN = "from engine.cli import boosterbit; boosterbit()"


def boosterbit(*words):
    return subprocess.run([sys.executable, "-c", RUN, *words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_it_lists_its_commands_with_a_line_each(words):
    done = boosterbit(*words)
    assert done.returncode == 0 and not done.stderr
    listed = re.findall(r"^  (\w+)  +(.+)$", done.stdout, re.MULTILINE)
    assert [name for name, _ in listed] == list(cli.COMMANDS)
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_is_the_module_of_that_name_and_says_how_it_was_called(name):
    module, _ = cli.COMMANDS[name]
    assert module in PRODUCT
    done = boosterbit(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: boosterbit {name} ")


def test_all_commands_of_people_are_listed():
    """Programs of bench need a checkout, and jobs.supervise is for job scripts."""
    programs = {name for name, path in PRODUCT.items() if '__name__ == "__main__"' in path.read_text()}
    assert {module for module, _ in cli.COMMANDS.values()} == {
        name for name in programs if not name.startswith(("bench.", "setup", "jobs.supervise"))
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [(["finetun"], "there is no command 'finetun'; did you mean 'finetune'?"),
     (["--version"], "there is no command '--version'"), (["pack", "nowhere", "out.h5"], "nowhere")],
)  # fmt: skip
def test_what_is_no_command_or_fails_ends_with_2(words, said):
    done = boosterbit(*words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
