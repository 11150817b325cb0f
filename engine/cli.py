"""Around every command line: connect, run, and end together with one message and the right exit code."""

from __future__ import annotations

import argparse
import faulthandler
import runpy
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import NoReturn, TypeVar

import yaml

from engine.comm.choose import connect
from engine.comm.communicator import Communicator, SharedError, Stopped
from engine.comm.launch import detect_launch
from engine.config.loading import explain, load, named_variants, recipes, to_yaml, variants
from engine.config.schema import AUTO, CommConfig, FinetuneConfig, PretrainConfig
from engine.saving import watchdog
from loaders import arguments as words
from loaders.errors import UserError, in_words, unknown
from loaders.output import UNREAD, as_command, in_utf_8, unspeakable

USAGE_ERROR, INTERRUPTED = 2, 130
COMMANDS = {
    "demo": ("engine.demo", "the main job in small, on images that come with scikit-learn"),
    "pack": ("loaders.pack", "images in, one packed file out; also verify and info"),
    "view": ("loaders.view", "a contact sheet of augmented samples"),
    "pretrain": ("engine.pretrain", "train a network of the BiT family from a pack"),
    "finetune": ("engine.finetune", "tune a pre-trained network to a target, and score it"),
    "sweep": ("engine.sweep", "fine-tuning over targets, checkpoints, shots and seeds, resumable"),
    "predict": ("engine.predict", "a tuned network's probabilities for any images, as a table"),
    "evaluate": ("engine.evaluate", "scores of predictions with intervals, subgroups, figures"),
    "report": ("engine.report", "tables and a figure of results; runs side by side as a page"),
    "doctor": ("engine.doctor", "what bounds a run, and which setting to change"),
    "export": ("engine.export", "a tuned network as ONNX, as a program of torch.export, as a folder for timm"),
    "weights": ("engine.weights", "convert weights between the formats that people use"),
    "submit": ("jobs.submit", "write and submit the batch script of a Slurm job"),
}
"""What `boosterbit NAME` runs → its module, and a line about it."""
Settings = TypeVar("Settings", PretrainConfig, FinetuneConfig)


def boosterbit() -> None:
    """The program `boosterbit`, which an installed copy has: `boosterbit NAME …` is `python -m MODULE …`."""
    as_command(_dispatch)


def _dispatch() -> int:
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        wide = max(map(len, COMMANDS))
        print("usage: boosterbit COMMAND …        boosterbit COMMAND --help says more\n")
        print("\n".join(f"  {each.ljust(wide)}  {about}" for each, (_, about) in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    module = COMMANDS[name][0]
    words.called = f"boosterbit {name}"
    sys.argv = [words.called, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def parser(program: str, schema: type, about: str) -> argparse.ArgumentParser:
    """The argument parser of `python -m engine.<program>`: a recipe, then key=value."""
    result = argparse.ArgumentParser(
        prog=words.program(f"engine.{program}"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=about,
        epilog="keys, with their defaults:\n" + explain(schema),
    )
    result.add_argument("recipe", nargs="?", help="a recipe's name (see --list), perhaps with @VARIANT, or a YAML file")
    result.add_argument("settings", nargs="*", metavar="key=value", help="changes to the recipe")
    result.add_argument("--list", action="store_true", help="list the recipes that come with the engine, and exit")
    result.add_argument("--print-config", action="store_true", help="print the resolved configuration, and exit")
    result.add_argument("--dry-run", action="store_true", help="build everything, train two steps, write nothing")
    return result


def answered(
    parser: argparse.ArgumentParser,
    schema: type,
    kind: str,
    arguments: argparse.Namespace,
    several: tuple[str, ...] = (),
) -> bool:
    """Whether the command line asked for something else than a run, which then is done."""
    if arguments.list:
        guard(partial(list_recipes, kind))
        return True
    if arguments.recipe is None:
        parser.error("which recipe? --list shows those that come with the engine")
    if arguments.print_config:
        for chosen in variants(arguments.settings, several):
            guard(partial(print_config, schema, arguments.recipe, chosen, kind))
        return True
    return False


def list_recipes(kind: str) -> None:
    """Print name, purpose and variants of each recipe."""
    for name, path in recipes(kind).items():
        about = str(yaml.safe_load(path.read_text(encoding="utf-8")).get("about", "")).strip()
        print(f"{name}\n{textwrap.indent(textwrap.fill(about, 100), '    ')}")
        if known := named_variants(path):
            print(f"    also {', '.join(f'{name}@{variant}' for variant in known)}")


def print_config(schema: type[Settings], recipe: str, overrides: list[str], kind: str) -> None:
    """Print the resolved configuration, as YAML that the same program reads."""
    text = to_yaml(load(schema, recipe, overrides, kind))
    if not in_utf_8():  # then as YAML spells it in ASCII, so that it is read back
        text = yaml.safe_dump(yaml.safe_load(text), sort_keys=False)
    print(text)


def guard(body: Callable[[], None]) -> None:
    """Run something that needs no other rank; unusable input or places end it with one message and code 2."""
    try:
        body()
    except BrokenPipeError:  # `… | head`
        raise
    except (UserError, OSError) as error:
        _say(f"error: {in_words(error)}")
        sys.exit(USAGE_ERROR)


def start(
    schema: type[Settings],
    kind: str,
    recipe: str,
    overrides: list[str],
    body: Callable[[Settings, Communicator], object],
    several: tuple[str, ...] = (),
) -> NoReturn:
    """Load the configuration, connect, run `body`, and exit: 0; 2 for unusable input; 1 for a defect; 75 if stopped.

    Keys named in `several` may have values separated by commas: `body` runs for each combination in turn.

    As `connected` has it.
    """
    runs, unusable = [], None
    try:
        runs = [load(schema, recipe, chosen, kind) for chosen in variants(overrides, several)]
        _check_folders([run.folder for run in runs if run.folder not in (None, AUTO)])
    except UserError as error:
        unusable = error

    def work(comm: Communicator) -> None:
        with comm.together():
            if unusable:
                raise unusable
        for settings in runs:
            body(settings, comm)

    again = "the same command goes on from the newest checkpoint in its folder, if there is one"
    connected(work, runs[0].comm if runs else CommConfig(), again)


def connected(body: Callable[[Communicator], object], told: CommConfig, again: str) -> NoReturn:
    """Connect as `told`, run `body`, and exit: 0; 2 for unusable input; 1 for a defect; 75 if stopped; 130 if
    interrupted. `again`: what the same command would do.

    A UserError that all ranks share is printed by rank 0. Whatever happens to one rank alone ends the others too.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable()  # what crashes says where: a file cut off under its memory map, a decoder
    try:
        launch = detect_launch()
    except UserError as error:  # the environment is the same for all ranks, or nobody knows who they are
        _say(f"error: {error}")
        sys.exit(USAGE_ERROR)
    try:
        # The watchdog speaks first: it knows which rank is behind, and that saving takes long.
        patience = 86400 if told.timeout_s is None else 60 + watchdog.PATIENCE * told.timeout_s
        comm = connect(told.backend, launch, patience)
    except UserError as error:
        _say(f"error: {error}")
        sys.exit(USAGE_ERROR)
    try:
        body(comm)
    except SharedError as error:
        if comm.leads:
            _say(str(error) if isinstance(error, Stopped) else f"error: {error}")
        code = error.exit_code
    except BrokenPipeError:
        _fail_alone(comm, f"whoever read the output has gone; {again}", UNREAD)
    except (UserError, OSError) as error:
        _fail_alone(comm, f"error: {in_words(error)}", USAGE_ERROR)
    except UnicodeEncodeError as error:
        _fail_alone(comm, f"error: {unspeakable(error)}", USAGE_ERROR)
    except KeyboardInterrupt:
        _fail_alone(comm, f"interrupted; {again}", INTERRUPTED)
    except Exception:
        _fail_alone(comm, traceback.format_exc(), 1)
    else:
        code = 0
    comm.close()
    sys.exit(code)


def _check_folders(folders: list[str]) -> None:
    if len(set(folders)) < len(folders):
        raise UserError(
            f"{len(folders)} runs would write into folder={folders[0]}, each over the one before; say, in quotes, "
            "'folder=runs/${shots}-${seed}' or the like"
        )


def _fail_alone(comm: Communicator, message: str, code: int) -> NoReturn:
    where = f"[rank {comm.rank}] " if comm.size > 1 else ""
    _say(where + message)
    if comm.size > 1:
        time.sleep(0.5)  # the launcher passes on what was said before it ends the job
        comm.abort(code)
    sys.exit(code)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
