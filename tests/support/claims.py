"""The claim gate: which record answers for a figure, and whether it says the same. What to write: docs/contributing.md.

`faults(page, root)` is the whole gate for one page; each fault is a message that says what to do.
"""

import ast
import json
import re
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType

from tests.support.figures import KINDS, SPEED, Comment, Figure, Page

TOPICS = {
    "optimizer": "a step of the optimizer alone",
    "normalization": "group norm, activation or weight standardization alone",
    "reliability": "what damage does, and what is kept",
    "loader": "images from a pack to tensors",
    "startup": "what ranks need until their first step",
    "packing": "making, opening and listing packs",
    "training": "the whole training step, or a run of it: its speed",
    "scaling": "several ranks beside one",
    "accuracy": "what a run learned, scored on images it had not seen",
    "transfer": "scores after fine-tuning",
    "evaluating": "scores of predictions with their intervals: how long they take",
    "exporting": "how far what is exported is from the network",
    "monitoring": "what a run says of itself: who is late, what watching costs, which micro-batch is fastest",
    "tests": "which planted faults the tests notice",
    "modelled": "what a model computed: the section says so",
}
TELLING = {
    # what the words around a figure claim, whatever topic its comment names
    "training": r"\btraining step|\btraining (?:is|becomes|runs) |\btrains? (?:\w+ )?(?:at|faster|slower|[\d.,]+ )"
                r"|(?:faster|slower) (?:training|pre-training)|end[- ]to[- ]end|whole step|a training run",
}  # fmt: skip
NEEDED = ("commit", "hardware", "versions", "n", "spread", "supports")
HOW = "docs/contributing.md, “Figures”, has the rules in short."
LOG = "docs/log.md"


class View(dict):
    """A JSON object whose entries are attributes too, so that an expression reads `loaders.FFCV.low`."""

    def __getattr__(self, name: str):
        if name in self:
            return self[name]
        raise LookupError(f"there is no {name!r} among {', '.join(map(repr, self))}")

    def __missing__(self, name: str):
        return self.__getattr__(name)


class Rows(list):
    """Lines of a JSONL record, to be chosen from by the values they have."""

    def where(self, **wanted) -> "Rows":
        found = Rows(row for row in self if all(row.get(key) == value for key, value in wanted.items()))
        if not found:
            raise LookupError(f"no line has {wanted}")
        return found

    def column(self, name: str, **wanted) -> list:
        return [row[name] for row in self.where(**wanted) if name in row]

    def score(self, *, value: str = "metric_value", **wanted) -> tuple[float, float]:
        """Mean and sample standard deviation."""
        values = self.column(value, **wanted)
        return statistics.fmean(values), statistics.stdev(values)

    def gain(self, *, over: str, **wanted) -> tuple[float, float]:
        """Difference of mean scores to the source `over`; mean and deviation of the differences, seed by seed."""
        mine, theirs = ({row["seed"]: row["metric_value"] for row in self.where(**wanted | more)}
                        for more in ({}, {"pretrained_model": over}))  # fmt: skip
        differences = [mine[seed] - theirs[seed] for seed in sorted(mine)]
        return statistics.fmean(differences), statistics.stdev(differences)

    def paired(self, *, over: str, **wanted) -> tuple[float, float, float]:
        """Mean difference to the source `over`, seed by seed, and the 95% interval of the paired t-test."""
        from scipy.stats import ttest_rel

        both = (self.where(**wanted | more) for more in ({}, {"pretrained_model": over}))
        mine, theirs = ([row["metric_value"] for row in sorted(rows, key=lambda row: row["seed"])] for rows in both)
        interval = ttest_rel(mine, theirs).confidence_interval(0.95)
        return self.gain(over=over, **wanted)[0], interval.low, interval.high


@dataclass(frozen=True)
class Record:
    """A committed measurement: what it holds, and what it says of itself."""

    facts: dict  # NEEDED, and what else it says
    names: dict  # what expressions may name

    @property
    def supports(self) -> list:
        return self.facts["supports"]


def faults(page: Page, root: Path) -> list[str]:
    """What is wrong with the figures of a page; empty where all is well. `root`: of the project."""
    if page.name == LOG:
        return log_faults(page)
    found, covered = [], set()
    reached: dict[int, int] = {}  # several claims above one block: each goes on where the one before ended
    for comment in page.comments:
        where = f"{page.name}:{page.line(comment.at)}"
        if comment.kind == "page":
            kind, _, body = comment.body.partition(":")
            if kind.strip() != "published" or len(body.strip()) < 10:
                found.append(f"{where}: a whole page can only be `page: published: WHERE`. {HOW}")
            else:
                return found
        elif comment.kind == "claim":
            problems, figures = check_claim(page, comment, root, reached.get(comment.stop, -1))
            reached[comment.stop] = max(figures, default=-1)
            found += [f"{where}: {problem}" for problem in problems]
            covered |= figures
        else:
            problem = check_declared(page, comment, root)
            found += [f"{where}: {problem}"] if problem else []
            covered |= {figure.start for figure in page.numbers if comment.start <= figure.start < comment.stop}
    bare: dict[int, list[str]] = {}
    for figure in page.figures:
        if figure.start not in covered:
            bare.setdefault(page.line(figure.start), []).append(figure.text)
    return found + [f"{page.name}:{line}: {' and '.join(texts)}: {ADVICE}" for line, texts in bare.items()]


OTHERS = "; ".join(text for kind, text in KINDS.items() if kind != "claim")
ADVICE = (
    "a figure that looks measured, and no record answers for it. If you measured it, commit its record under "
    "docs/results/ and write, at the end of the sentence or row or above the block, "
    "`<!-- claim TOPIC: results/FILE.json EXPRESSION; EXPRESSION -->`, an expression for each figure in their order. "
    f"If it is something else, say what: {OTHERS}. An experiment of which only figures are left goes to {LOG}; "
    f"elsewhere a figure without a record cannot stay. {HOW}"
)


def check_declared(page: Page, comment: Comment, root: Path) -> str | None:
    """What is wrong with a comment that declares figures as something else than measured by us."""
    text = page.text[comment.start : comment.stop]
    if len(comment.body) < 5:
        return f"`{comment.kind}:` says too little; expected {KINDS[comment.kind]}"
    if comment.kind in ("setting", "counted", "tested") and (speed := re.search(rf"\d[\s-]*(?:{SPEED})", text)):
        return f"“{speed[0]}” is a speed: nobody sets or counts it. Measure it, and let a record answer. {HOW}"
    if comment.kind == "modelled" and not re.search(r"\bmodel", page.section(comment.at)):
        return f"what a model computed is called modelled where it stands; the section has no such word. {HOW}"
    if comment.kind == "tested":
        test = root / comment.body.split()[0]
        if not test.is_file() or test.suffix != ".py":
            return f"tested: {comment.body.split()[0]} is no test of this project"
        inside = [figure for figure in page.figures if comment.start <= figure.start < comment.stop]
        if lacking := [figure.text for figure in inside if figure.text.replace("−", "-") not in test.read_text()]:
            return f"{test.name} does not have {', '.join(lacking)}: quote the bound that it asserts. {HOW}"
    return None


def check_claim(page: Page, comment: Comment, root: Path, after: int) -> tuple[list[str], set[int]]:
    """What is wrong with a claim, and where the figures stand, behind `after`, that its record confirms."""
    words = re.fullmatch(r"(\w+):\s*(\S+)\s+(.*)", comment.body, re.DOTALL)
    if words is None:
        return [f"“{comment.body[:60]}…” is no claim; expected TOPIC: RECORD EXPRESSION; EXPRESSION. {HOW}"], set()
    topic, path, expressions = words.groups()
    if topic not in TOPICS:
        return [f"the topic {topic!r} is none of {', '.join(TOPICS)} (tests/support/claims.py)"], set()
    try:
        record = read_record(root / "docs" / path)
        values = [(text, value) for text in split(expressions) for value in evaluate(text, record)]
    except LookupError as error:
        return [f"{path}: {error.args[0]}"], set()
    text = page.text[comment.start : comment.stop]
    told = {name for name, words in TELLING.items() if re.search(words, text, re.IGNORECASE)}
    lacking = sorted({topic, *told} - set(record.supports))
    if topic == "scaling" and told == {"training"} and "scaling" in record.supports:
        lacking = []
    if lacking:
        return [f"{path} supports {', '.join(record.supports)}, and the text claims {', '.join(lacking)} "
                f"({TOPICS[lacking[0]]}): measure that, or claim less. {HOW}"], set()  # fmt: skip
    problems = []
    if "modelled" in record.supports and not re.search(r"\bmodelled\b", page.section(comment.at), re.IGNORECASE):
        problems.append(f"{path} was computed by a model: the section must say “modelled”")
    numbers = [figure for figure in page.numbers if max(comment.start, after + 1) <= figure.start < comment.stop]
    confirmed, at = set(), 0
    for expression, value in values:
        place = next((i for i in range(at, len(numbers)) if numbers[i].prints(value)), None)
        if place is None:
            seen = ", ".join(figure.text for figure in numbers[at : at + 4]) or "no number"
            problems.append(f"{path} has {value:.6g} for `{expression}`; the page goes on with {seen}. Correct the "
                            "page, or measure again and commit the record")  # fmt: skip
            break
        confirmed.add(numbers[place].start)
        at = place + 1
    if not problems:
        problems += [f"{figure.text} is not among what `claim` names; each figure needs an expression, in their order"
                     for figure in numbers if figure.start not in confirmed and looks_measured(page, figure)
                     and not answered_elsewhere(page, comment, figure)]  # fmt: skip
    return problems, confirmed


def looks_measured(page: Page, figure: Figure) -> bool:
    """Within a claim more numbers count than elsewhere: all with a fraction but versions and what is quoted."""
    version = re.search(r"(?:Python|torch|CUDA|Slurm|DALI|Horovod)\s$", page.text[: figure.start])
    return figure in page.figures or bool(figure.decimals and not page.quoted(figure.start) and not version)


def answered_elsewhere(page: Page, comment: Comment, figure: Figure) -> bool:
    """Whether another comment covers this place as well."""
    return any(other is not comment and other.start <= figure.start < other.stop for other in page.comments)


def split(expressions: str) -> list[str]:
    """At semicolons, and at ends of lines where no bracket is open."""
    found, open_at = [""], 0
    for sign in expressions:
        open_at += (sign in "([{") - (sign in ")]}")
        if sign in ";\n" and not open_at:
            found.append("")
        else:
            found[-1] += " " if sign == "\n" else sign
    return [text.strip() for text in found if text.strip()]


@cache
def read_record(path: Path) -> Record:
    """A record with its facts; LookupError for one that is not there, or that lacks what a record carries.

    The facts of FILE.json stand in it, those of FILE.jsonl in FILE.about.json beside it.
    """
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        raise LookupError("no such record; expected a JSON or JSONL file that is committed under docs/results/")
    if path.suffix == ".json":
        content = json.loads(path.read_text(), object_hook=View)
        facts, names = content, dict(content)
    else:
        rows = Rows(json.loads(line, object_hook=View) for line in path.read_text().splitlines())
        about = path.with_suffix(".about.json")
        facts = json.loads(about.read_text()) if about.is_file() else {}
        names = {"rows": rows, **{key: value for key, value in facts.items() if key.isidentifier()}}
    missing = [key for key in NEEDED if facts.get(key) in (None, "", [], {})]
    if missing:
        beside = " in the .about.json beside it" if path.suffix == ".jsonl" else ""
        raise LookupError(f"a record carries {', '.join(NEEDED)}; this one lacks {', '.join(missing)}{beside}")
    if unknown := sorted(set(facts["supports"]) - set(TOPICS)):
        raise LookupError(f"supports {', '.join(unknown)}; a record may support {', '.join(TOPICS)}")
    if "modelled" not in facts["supports"]:
        if not (facts["hardware"].get("cpu") or facts["hardware"].get("gpu")):
            raise LookupError("hardware names neither cpu nor gpu")
        if not re.match(r"[0-9a-f]{7,40}\b", facts["commit"]):
            raise LookupError(f"commit is {facts['commit']!r}; expected the hash of the code that was measured")
        if not (isinstance(facts["n"], int) and facts["n"] >= 1):
            raise LookupError(f"n is {facts['n']!r}; expected the number of repeats, 1 or more")
    return Record(facts, names)


def evaluate(expression: str, record: Record) -> list[float]:
    """The numbers that an expression names, one or several. LookupError where it names nothing."""
    helpers = {"pick": pick, "mean": statistics.fmean, "stdev": statistics.stdev, "median": statistics.median}
    helpers |= {one.__name__: one for one in (min, max, len, str, float, round, abs, sum)}
    try:
        code: CodeType = compile(expression, "claim", "eval")
        if not any(isinstance(node, ast.Name) and node.id in record.names for node in ast.walk(ast.parse(expression))):
            raise LookupError("names nothing of the record")
        # The expressions are this repository's own, as its tests are.
        return flat(eval(code, {"__builtins__": {}, **helpers, **record.names}))
    except LookupError as error:
        raise LookupError(f"`{expression}`: {error.args[0]}") from error
    except Exception as error:
        raise LookupError(f"`{expression}` cannot be computed: {error}") from error


def pick(entries: View, names: str) -> list:
    """Several entries of an object: pick(loaders.FFCV, "images_per_second low high")."""
    return [getattr(entries, name) for name in names.split()]


def flat(value) -> list[float]:
    """A number, or numbers however nested."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [float(value)]
    if isinstance(value, (list, tuple)):
        return [one for part in value for one in flat(part)]
    raise LookupError(f"is {str(value)[:60]!r}, no number")


def log_faults(page: Page) -> list[str]:
    """The log's own rule: entries are dated, and each says on what it was measured and what is left of it."""
    found, dates = [], []
    entries = re.split(r"^## ", page.text, flags=re.MULTILINE)
    for entry in entries[1:]:
        title, _, body = entry.partition("\n")
        date = re.match(r"(\d{4}-\d{2}-\d{2}): \S", title)
        if date is None:
            found.append(f"{page.name}: “{title}”: an entry begins `## YYYY-MM-DD: what was tried`")
            continue
        dates.append(date[1])
        for label, what in LOG_LABELS.items():
            if not re.search(rf"^{label}: .{{3,}}", body, re.MULTILINE):
                found.append(f"{page.name}: “{title}” lacks a line `{label}: …`: {what}")
    if dates != sorted(dates, reverse=True):
        found.append(f"{page.name}: entries stand newest first")
    if Page(page.name, entries[0]).figures:
        found.append(f"{page.name}: figures belong into a dated entry")
    return found


LOG_LABELS = {
    "On": "processor or GPU, cores, whether the machine was idle",
    "Record": "the file under docs/results/, or `none kept`, with the commit and n as far as they are known",
}
