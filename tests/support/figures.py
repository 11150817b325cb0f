"""Which numbers of a page look measured, and which comment answers for each: the reading half of the claim gate.

A page is read as text with offsets. What no reader sees as a statement (comments, targets of links) is blanked, so that
a place in the text is a place in the file.
"""

import re
from dataclasses import dataclass
from functools import cached_property

KINDS = {
    "claim": "measured by us: `<!-- claim TOPIC: RECORD EXPRESSION; EXPRESSION -->`",
    "modelled": "computed by a model, and the section says so: `<!-- modelled: by what -->`",
    "published": "measured or stated by others: `<!-- published: where -->`",
    "counted": "counted or derived, the same wherever it is repeated: `<!-- counted: how -->`",
    "tested": "a bound that a test asserts, with this number in it: `<!-- tested: tests/FILE.py -->`",
    "setting": "chosen by somebody: `<!-- setting: what -->`",
}
NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-−]?\d{1,2}(?!\d))?"
WORDS = {"half": 0.5, "twice": 2, "double": 2, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
         "eight": 8, "nine": 9, "ten": 10, "twenty": 20, "hundred": 100}  # fmt: skip
SPEED = (r"images?/s\b|images (?:a|per) second|img/s|samples/s|[GM]i?B/s|[TG]FLOPS?\b|[TG]FLOP/s|ms\b|µs|μs|ns\b"
         r"|milliseconds|microseconds|times (?:as|faster|slower|longer|shorter|fewer|the|its|that|torch|timm)"
         r"|times\b|×(?!\s*\d)|x\b|-fold\b")  # fmt: skip
UNIT = (rf"{SPEED}|s\b|seconds?\b|min\b|minutes?\b|h\b|hours?\b|[KMGT]i?B\b|kB\b|%|percent\b|points?\b|MWh\b|W\b"
        r"|passed\b|top-1\b|tests\b")  # fmt: skip
HEADING = r"images/s\b|\bms\b|GB/s|%|seconds|median|top-1|accuracy|\bAUC|speedup|\btimes\b|milliseconds|\bshots?\b|MWh"
"""In the head of a table, or in the first cell of a row: numbers below or beside it are figures."""
_BOUNDS = r"(?<![A-Za-z0-9_.,/])(?<![.\w]-)"
TOKEN = re.compile(rf"{_BOUNDS}({NUMBER})(?![A-Za-z0-9_])(?!\.\d)(?!,\d)|{_BOUNDS}({NUMBER})(?=(?:{UNIT}))|"
                   rf"\b({'|'.join(WORDS)})\b(?=[\s-]+(?:as\s+(?:fast|slow|long)|"
                   rf"times\s+(?:as|faster|slower|the|its|that|torch|timm)\b|"
                   rf"faster|slower|the\s+(?:time|speed|rate|throughput)))", re.IGNORECASE)  # fmt: skip
RANGE = rf"(?:\s*(?:–|-|—|to|or|and|±|…)\s*[-−+]?{NUMBER})"
_MEASURED = [
    re.compile(pattern)
    for pattern in (
        rf"(?<![\w.])({NUMBER}){RANGE}?(?:\s+\({NUMBER}{RANGE}*[^)\n]*\))?[\s-]*(?:{UNIT})(?:\s*\({NUMBER}{RANGE}\))?",
        rf"{NUMBER}\s+of\s+(?:the\s+(?:time|speed|rate)|torch|timm|what)",
        rf"\bn\s*=\s*({NUMBER})",
        r"\d(?:\.\d+)?e[-−]\d+",
        rf"({NUMBER})\s*±\s*{NUMBER}",
        rf"({NUMBER})\s*\({NUMBER}\s*(?:–|to|…)\s*{NUMBER}",
        rf"(?i:\b(?:{'|'.join(WORDS)})\b)",
    )
]


@dataclass(frozen=True)
class Figure:
    """A number on a page."""

    start: int
    text: str
    value: float
    decimals: int
    scientific: bool = False

    def prints(self, value: float) -> bool:
        """Whether it is `value`, rounded to the digits that are printed."""
        form = f".{self.decimals}{'e' if self.scientific else 'f'}"
        return float(format(value, form)) == float(format(self.value, form))  # as numbers, for -0.0 is 0.0


@dataclass(frozen=True)
class Comment:
    """A comment that answers for figures, and the text it covers."""

    kind: str
    body: str
    at: int
    start: int
    stop: int


@dataclass(frozen=True)
class Block:
    """Lines that belong together: a paragraph, a list item, a row of a table, a fenced block."""

    start: int
    stop: int
    row_of: int | None = None  # where the head of its table begins
    fenced: bool = False


class Page:
    """One page of Markdown."""

    def __init__(self, name: str, raw: str) -> None:
        self.name, self.raw = name, raw

    def line(self, at: int) -> int:
        return self.raw.count("\n", 0, at) + 1

    @cached_property
    def fences(self) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"^ *```.*?^ *```[^\n]*$", self.raw, re.DOTALL | re.MULTILINE)]

    def _in_fence(self, at: int) -> bool:
        return any(start <= at < stop for start, stop in self.fences)

    @cached_property
    def _quoted(self) -> list[tuple[int, int]]:
        spans = (match.span() for match in re.finditer(r"(`+)(?!`)[^\n]*?(?<!`)\1(?!`)", self.raw))
        return [span for span in spans if not self._in_fence(span[0])]

    def quoted(self, at: int) -> bool:
        """Whether a place is within `code` in a line."""
        return any(start <= at < stop for start, stop in self._quoted)

    @cached_property
    def html_comments(self) -> list[re.Match]:
        found = re.finditer(r"<!--(.*?)-->", self.raw, re.DOTALL)
        return [match for match in found if not self._in_fence(match.start()) and not self.quoted(match.start())]

    @cached_property
    def text(self) -> str:
        """The page without what is no statement, each place where it was."""
        text = list(self.raw)
        spans = [match.span() for match in self.html_comments]
        spans += [match.span(1) for match in re.finditer(r"\](\([^)\s]*\))", self.raw)]
        spans += [match.span() for match in re.finditer(r"https?://\S+|^\[[^\]]+\]:.*$", self.raw, re.MULTILINE)]
        for start, stop in spans:
            text[start:stop] = [sign if sign == "\n" else " " for sign in text[start:stop]]
        return "".join(text)

    @cached_property
    def blocks(self) -> list[Block]:
        blocks: list[Block] = []
        at, open_at, head = 0, None, None

        def close(stop: int) -> None:
            nonlocal open_at
            if open_at is not None and self.text[open_at:stop].strip():
                blocks.append(Block(open_at, stop))
            open_at = None

        for line in self.text.splitlines(keepends=True):
            stop = at + len(line)
            fence = next((span for span in self.fences if span[0] <= at < span[1]), None)
            if fence is not None:
                if at <= fence[0] + 3:
                    close(at)
                    blocks.append(Block(at, fence[1], fenced=True))
            elif line.startswith("|"):
                close(at)
                head = at if head is None else head
                blocks.append(Block(at, stop, row_of=head))
            elif not self.raw[at:stop].strip() or line.startswith("#"):
                close(at)
                if line.strip():
                    blocks.append(Block(at, stop))
            else:
                if re.match(r"\s*(?:[*+-]|\d+\.) ", line):
                    close(at)
                open_at = at if open_at is None else open_at
            if not line.startswith("|") and self.raw[at:stop].strip():
                head = None
            if not self.raw[at:stop].strip():
                head = None
            at = stop
        close(len(self.text))
        return blocks

    @cached_property
    def comments(self) -> list[Comment]:
        """Comments of the gate, each with what it covers.

        Alone on its lines: the block below it (a whole table, list or paragraph, up to an empty line). Behind text:
        what stands before it in its paragraph, list item or row, back to the comment before.
        """
        found: list[Comment] = []
        previous = 0
        for match in self.html_comments:
            kind, _, body = match[1].strip().partition(" " if match[1].strip().startswith("claim ") else ":")
            if kind.strip() not in KINDS and kind.strip() != "page":
                continue
            if self._behind_text(match.start()):
                block = next(block for block in reversed(self.blocks) if block.start <= match.start())
                scope = max(block.start, previous), match.start()
                previous = match.end()
            else:
                scope = match.end(), self._end_of_block(match.end())
            found.append(Comment(kind.strip(), body.strip(), match.start(), *scope))
        return found

    def _behind_text(self, at: int) -> bool:
        """Whether text of the same paragraph stands before a comment, on its line or on the lines above."""
        for line in reversed(self.text[:at].split("\n")):
            raw = self.raw[at - len(line) : at]
            if line.strip():
                return not line.startswith("#") and not line.strip().startswith("```")
            if not raw.strip() and at < len(self.raw) and self.raw[at] == "\n":
                return False
            at -= len(line) + 1
        return False

    def _end_of_block(self, at: int) -> int:
        fence = next((span for span in self.fences if span[0] >= at), None)
        if fence is not None and not self.text[at : fence[0]].strip():
            return fence[1]
        while (empty := re.compile(r"\n[ \t]*\n").search(self.raw, at)) is not None:
            if self.text[at : empty.start()].strip():
                return empty.start()
            at = empty.start() + 1
        return len(self.raw)

    @cached_property
    def numbers(self) -> list[Figure]:
        return [_figure(match, self.text) for match in TOKEN.finditer(self.text)]

    @cached_property
    def figures(self) -> list[Figure]:
        """Numbers that look measured, wherever they stand."""
        marked: set[int] = set()
        for pattern in _MEASURED:
            for match in pattern.finditer(self.text):
                marked |= {figure.start for figure in self.numbers if match.start() <= figure.start < match.end()}
        for block in self.blocks:
            head = self.text[block.start : self.text.find("\n", block.start)]
            if block.row_of is not None:
                marked |= self._of_row(block)
                if block.start == block.row_of:  # titles of columns, such as “10%”, are names
                    marked -= {figure.start for figure in self.numbers if block.start <= figure.start < block.stop}
            elif block.fenced and not re.search(r"```\w", head):  # what a program printed
                text = self.text[block.start : block.stop]
                if re.search(HEADING, text):
                    inside = (figure for figure in self.numbers if block.start <= figure.start < block.stop)
                    marked |= {figure.start for figure in inside if figure.decimals}
        return [figure for figure in self.numbers
                if figure.start in marked and not (figure.scientific and self.quoted(figure.start))]  # fmt: skip

    def _of_row(self, row: Block) -> set[int]:
        head = self.text[row.row_of : self.text.find("\n", row.row_of)]
        titles = [title for _, _, title in cells(head, 0)]
        mine = cells(self.text[row.start : row.stop], row.start)
        whole = row.start != row.row_of and bool(mine) and re.search(HEADING, mine[0][2]) is not None
        marked = set()
        for place, (start, stop, _) in enumerate(mine):
            of_title = row.start != row.row_of and place < len(titles) and re.search(HEADING, titles[place])
            if place and (whole or of_title):
                marked |= {figure.start for figure in self.numbers if start <= figure.start < stop}
        return marked

    def section(self, at: int) -> str:
        """The visible text from the heading above a place to the next heading."""
        above = [match.start() for match in re.finditer(r"^#+ ", self.text, re.MULTILINE) if match.start() <= at]
        below = re.compile(r"^#+ ", re.MULTILINE).search(self.text, at)
        return self.text[above[-1] if above else 0 : below.start() if below else len(self.text)]


def cells(row: str, at: int) -> list[tuple[int, int, str]]:
    """Begin, end and text of each cell of a row of a table that begins at `at`."""
    found, start = [], row.find("|") + 1
    while (stop := row.find("|", start)) >= 0:
        found.append((at + start, at + stop, row[start:stop].strip()))
        start = stop + 1
    return found


def _figure(match: re.Match, text: str) -> Figure:
    word = match[0].lower()
    if word in WORDS:
        value = float(WORDS[word])
        return Figure(match.start(), match[0], value, 1 if value < 1 else 0)
    digits = match[0].replace(",", "").replace("−", "-")
    mantissa, exponent, _ = digits.partition("e")
    before = text[max(0, match.start() - 2) : match.start()]
    minus = before.endswith("−") or re.fullmatch(r"[\s|(]-", before) is not None
    value, decimals = float(digits), len(mantissa.partition(".")[2])
    return Figure(match.start(), match[0], -value if minus else value, decimals, bool(exponent))
