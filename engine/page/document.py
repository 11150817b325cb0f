"""The page as one HTML file: its data, its style and its script inside, and nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from engine.page.charts import Chart
from engine.whole import json_text, whole

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Table:
    """Rows of text. The first column names the rows; with `looks`, row k shows the look of line k beside its name."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    looks: bool = False
    folded: bool = False  # shown when asked for
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """What wholes are made of: a bar for each row, of one part for each name, all of the same scale."""

    title: str
    parts: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float]]]
    unit: str
    note: str = ""

    @property
    def longest(self) -> float:
        """The whole that fills the width."""
        return max((sum(values) for _, values in self.rows), default=0.0) or 1.0


@dataclass(frozen=True)
class Sheet:
    """A picture, with what it shows in words."""

    title: str
    image: Image

    @property
    def source(self) -> str:
        """As a data URL."""
        content = io.BytesIO()
        self.image.convert("RGB").save(content, "JPEG", quality=80, optimize=True)
        return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


@dataclass(frozen=True)
class Section:
    """A part of the page. `looks`: names of its lines, where they are not those of the page's runs."""

    title: str
    about: str
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    bars: Sequence[Bars] = ()
    sheets: Sequence[Sheet] = ()
    looks: Sequence[str] = field(default=())


def html(title: str, sections: Sequence[Section], lines: Sequence[str] = ()) -> str:
    """The page. lines: names of the lines that charts share, by look."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    charts = [chart.as_json() for section in sections for chart in section.charts]
    return environment.get_template("page.html").render(
        title=title, sections=sections, lines=lines, style=_file("page.css"), script=_file("page.js"),
        # In a script, only "</" and "<!--" could end it.
        data=json_text(charts).replace("<", "\\u003c"), made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip


def write(place: Path, title: str, sections: Sequence[Section], lines: Sequence[str] = ()) -> int:
    """Write the page to `place`; returns its bytes."""
    content = html(title, sections, lines).encode()
    with whole(place) as temporary:
        temporary.write_bytes(content)
    return len(content)


def _file(name: str) -> str:
    return (resources.files("engine.page") / name).read_text(encoding="utf-8")
