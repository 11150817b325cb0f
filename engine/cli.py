"""Around every command line: connect, run, and end together with one message and the right exit code."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NoReturn, TypeVar

import yaml

from engine.comm.choose import connect
from engine.comm.communicator import Communicator, SharedError, Stopped
from engine.comm.launch import detect_launch
from engine.config.loading import explain, load, named_variants, recipes, to_yaml, variants
from engine.config.schema import FinetuneConfig, PretrainConfig
from loaders.errors import UserError

USAGE_ERROR, INTERRUPTED, UNREAD = 2, 130, 141
Settings = TypeVar("Settings", PretrainConfig, FinetuneConfig)


def parser(program: str, schema: type, about: str) -> argparse.ArgumentParser:
    """The argument parser of `python -m engine.<program>`: a recipe, then key=value."""
    result = argparse.ArgumentParser(
        prog=f"python -m engine.{program}",
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
        list_recipes(kind)
        return True
    if arguments.recipe is None:
        parser.error("which recipe? --list shows those that come with the engine")
    if arguments.print_config:
        for chosen in variants(arguments.settings, several):
            guard(partial(print_config, schema, arguments.recipe, chosen, kind))
        return True
    return False


@contextmanager
def _to_its_reader() -> Iterator[None]:
    """Around what prints for people: `… | head` ends it without a word, as it ends other programs."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        sys.exit(UNREAD)


@_to_its_reader()
def list_recipes(kind: str) -> None:
    """Print name, purpose and variants of each recipe."""
    for name, path in recipes(kind).items():
        about = str(yaml.safe_load(path.read_text()).get("about", "")).strip()
        print(f"{name}\n{textwrap.indent(textwrap.fill(about, 100), '    ')}")
        if known := named_variants(path):
            print(f"    also {', '.join(f'{name}@{variant}' for variant in known)}")


def print_config(schema: type[Settings], recipe: str, overrides: list[str], kind: str) -> None:
    """Print the resolved configuration, as YAML that the same program reads."""
    print(to_yaml(load(schema, recipe, overrides, kind)))


def guard(body: Callable[[], None]) -> None:
    """Run something that needs no other rank; unusable input or places end it with one message and code 2."""
    try:
        with _to_its_reader():
            body()
    except (UserError, OSError) as error:
        _say(f"error: {error}")
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

    A UserError that all ranks share is printed by rank 0. Whatever happens to one rank alone ends the others too.
    """
    try:
        launch = detect_launch()
    except UserError as error:  # the environment is the same for all ranks, or nobody knows who they are
        _say(f"error: {error}")
        sys.exit(USAGE_ERROR)
    runs, unusable = [], None
    try:
        runs = [load(schema, recipe, chosen, kind) for chosen in variants(overrides, several)]
        _check_folders([run.folder for run in runs if run.folder])
    except UserError as error:
        unusable = error
    try:
        comm = connect(runs[0].comm.backend if runs else "auto", launch)
    except UserError as error:
        _say(f"error: {error}")
        sys.exit(USAGE_ERROR)
    try:
        with comm.together():
            if unusable:
                raise unusable
        for settings in runs:
            body(settings, comm)
    except SharedError as error:
        if comm.leads:
            _say(str(error) if isinstance(error, Stopped) else f"error: {error}")
        code = error.exit_code
    except (UserError, OSError) as error:
        _fail_alone(comm, f"error: {error}", USAGE_ERROR)
    except KeyboardInterrupt:
        again = "the same command goes on from the newest checkpoint in its folder, if there is one"
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
