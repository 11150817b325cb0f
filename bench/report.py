"""Results in, the paper's tables and figures out.

  python bench/report.py tables runs/*.jsonl --out report
  python bench/report.py tables runs/*.jsonl published/*.csv --out report
  python bench/report.py figures runs/finetune.jsonl --out report --format png

RESULTS are what engine.finetune appended to, the published CSV files, or folders of such files. docs/results.md says
what the marks mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.paper import tables as report_tables
from bench.paper.names import cells, read_layout, read_published
from engine.transfer import results
from engine.whole import whole
from loaders.arguments import as_path, as_place
from loaders.errors import UserError, in_words
from loaders.output import as_command

USAGE_ERROR = 2
FORMATS = {"tables": ("md", "csv"), "figures": ("png", "svg")}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python bench/report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = result.add_subparsers(dest="command", required=True)
    tables = commands.add_parser("tables", help="Tables 1 and 4 to 9, and one for each target")
    tables.add_argument("--published", action="store_true", help="also rows that have only the paper's values")
    tables.add_argument("--out", type=as_path, metavar="FOLDER", help="write a file for each table as well")
    figures = commands.add_parser("figures", help="Figures 1, 2, 4 to 8, and one for each other target")
    figures.add_argument("--out", type=as_path, metavar="FOLDER", default=Path("figures"), help="(%(default)s)")
    for name, command in (("tables", tables), ("figures", figures)):
        command.add_argument(
            "results", nargs="+", type=as_place, metavar="RESULTS", help="JSONL, published CSV, or a folder of them"
        )
        formats = ",".join(FORMATS[name])
        command.add_argument("--format", default=formats, help="of the files, separated by commas (%(default)s)")
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    arguments = parser().parse_args(argv)
    try:
        formats = _formats(arguments.format, FORMATS[arguments.command])
        if arguments.out and arguments.out.exists() and not arguments.out.is_dir():
            raise UserError(f"--out {arguments.out} is a file; name a folder")
        found = results.read(files(arguments.results))
        if arguments.command == "tables":
            tables(found, arguments.out, formats, arguments.published)
        else:
            figures(found, arguments.out, formats)
    except BrokenPipeError:  # `… | head`
        raise
    except (UserError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


def files(places: Sequence[str | Path]) -> list[Path]:
    """The files in `places`: themselves, or the JSONL and CSV files right in a folder."""
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = sorted(path for path in place.iterdir() if path.suffix in (".jsonl", ".csv"))
            if not inside:
                raise UserError(f"no results in {place}: expected .jsonl or .csv files right there")
            found += inside
        else:
            found.append(place)
    return found


def tables(found: Sequence[results.Result], out: Path | None, formats: Sequence[str], published: bool) -> None:
    """Print all tables as Markdown; write each to `out`."""
    layout = read_layout()
    scores = cells(found, layout)
    made = report_tables.paper_tables(scores, read_published(), layout, published)
    made += report_tables.target_tables(scores, layout)
    print("\n".join(table.markdown() for table in made), end="")
    if out is None:
        return
    for table in made:
        for name in formats:
            with whole(out / f"{table.name}.{name}") as temporary:
                temporary.write_text(table.markdown() if name == "md" else table.csv(), encoding="utf-8")
    print(f"{len(made)} tables ({', '.join(formats)}) → {out}", file=sys.stderr)


def figures(found: Sequence[results.Result], out: Path, formats: Sequence[str]) -> None:
    """Write all figures that have data to `out`, and say which have none."""
    from bench.paper import figures as report_figures  # brings matplotlib

    layout = read_layout()
    drawn = report_figures.figures(cells(found, layout), layout)
    for name, figure in drawn.items():
        for suffix in formats:
            with whole(out / f"{name}.{suffix}") as temporary:
                report_figures.save(figure, temporary, suffix)
            print(out / f"{name}.{suffix}")
    if missing := [spec.name for spec in layout.figures if spec.name not in drawn]:
        print(f"no results for {', '.join(missing)}: not written")


def _formats(text: str, known: Sequence[str]) -> list[str]:
    chosen = [name for name in text.replace(" ", "").split(",") if name]
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(f"--format {', '.join(unknown)} is not known; expected {' or '.join(known)}")
    if not chosen:
        raise UserError(f"--format names nothing; expected {' or '.join(known)}")
    return chosen


if __name__ == "__main__":
    as_command(main)
