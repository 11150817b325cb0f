"""The page of runs and results, as the command writes it."""

import html
import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from engine import page, report
from engine.doctor import diagnosed
from engine.monitoring.diagnosis import COLUMNS
from engine.page import document
from engine.page.charts import Chart, Series
from loaders.errors import UserError
from loaders.packs.shard import Pack
from tests.support.packing import run as pack
from tests.support.pictures import folder

CONFIG = {"name": "a", "model": {"name": "R8x0.25-8px"}, "data": {"train": "t.h5"}, "optim": {"base_lr": 0.1}}
ENVIRONMENT = {"command": ["pretrain.py", "demo", "name=a b"], "commit": "abc", "ranks": 2, "communicator": "torch",
               "processor": "P", "versions": {"torch": "2.14", "horovod": None}, "time": "2026-01-01"}  # fmt: skip


def run_folder(place, steps=20, config=CONFIG, environment=ENVIRONMENT):
    place.mkdir(parents=True)
    events = [{"kind": "train", "step": s, "loss": 2 / s, "learning_rate": 0.1, "images_per_second": 100.0 + s,
               "data_wait": 0.25} for s in range(1, steps + 1)]  # fmt: skip
    events += [{"kind": "val", "step": s, "loss": 1.0, "top1": 40.0 + s} for s in range(5, steps + 1, 5)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    (place / "environment.json").write_text(json.dumps(environment))
    return place


class Read(HTMLParser):
    """Rows of cells, charts' data, and what the page would load."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.links, self.inside, self.data, self.open = [], [], None, "", []
        self.feed(text)
        self.charts = json.loads(self.data)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[name] for name in ("src", "href") if name in found]
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        self.inside = "data" if found.get("id") == "data" else tag if tag in ("th", "td") else self.inside

    def handle_endtag(self, tag):
        if tag in ("th", "td", "script"):
            self.inside = None

    def handle_data(self, data):
        if self.inside == "data":
            self.data += data
        elif self.inside in ("th", "td"):
            self.rows[-1][-1] += data


def made(tmp_path, *words):
    report.main(["page", *map(str, words), "--out", str(tmp_path / "page.html"), "--no-inputs"])
    text = (tmp_path / "page.html").read_text()
    return text, Read(text)


def test_runs_side_by_side(tmp_path, capsys):
    other = CONFIG | {"optim": {"base_lr": 0.2}}
    text, found = made(tmp_path, run_folder(tmp_path / "x" / "run"), run_folder(tmp_path / "y" / "run", 10, other))
    assert f"({len(text.encode()) / 1e3:,.0f} kB)" in capsys.readouterr().out
    assert ["x/run", "R8x0.25-8px", "20", "0.1", "60", "1", "110", "25.0"] in found.rows
    assert ["y/run", "R8x0.25-8px", "10", "0.2", "50", "1", "106", "25.0"] in found.rows
    assert ["optim.base_lr", "0.1", "0.2"] in found.rows
    assert ["data.train", "t.h5"] in found.rows  # the same for both
    assert ["command", *["python -m engine.pretrain demo 'name=a b'"] * 2] in found.rows
    assert ["hardware", *["2 ranks (torch), P"] * 2] in found.rows
    assert ["versions", "torch 2.14", "torch 2.14"] in found.rows
    charts = {chart["title"]: chart for chart in found.charts}
    assert {"Training loss", "Evaluation loss", "Evaluation: top-1", "Learning rate", "Throughput"} == charts.keys()
    assert charts["Evaluation: top-1"]["series"][1] == {
        "name": "y/run", "look": 1, "marked": True, "points": [[5, 45], [10, 50]],
    }  # fmt: skip


def test_nothing_is_loaded_from_elsewhere_and_names_are_only_text(tmp_path):
    nasty = "</script><script>alert(1)</script><img src=http://x/>"
    place = run_folder(tmp_path / "<b>&amp;", config=CONFIG | {"name": nasty, "optim": nasty})
    text, found = made(tmp_path, place, "--title", nasty)
    assert all(link.startswith(("data:", "#")) for link in found.links)
    assert "http:" not in re.sub(r"&lt;.*?&gt;|http://www.w3.org/2000/svg", "", text)
    assert nasty not in text
    assert any(nasty in cell for row in found.rows for cell in row)
    assert text.count("<script") == 2
    assert "default-src 'none'" in text


def test_ten_long_runs_stay_below_a_megabyte(tmp_path):
    pictures = tmp_path / "images"
    folder(pictures, per_class=8)
    assert pack(pictures, tmp_path / "p.h5", "--workers", "0") == 0
    long = {"name": "a", "model": {"name": "R8x0.25-8px"}, "data": {"train": str(tmp_path / "p.h5"), "size": 224},
            "schedule": {"steps": 10}, "train": {"global_batch": 8}}  # fmt: skip
    runs = [run_folder(tmp_path / f"run{k}", 3000, long) for k in range(10)]
    report.main(["page", *map(str, runs), "--out", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    assert "Not shown" not in text
    assert text.count("data:image/jpeg") == 10
    assert len(text.encode()) < 1_000_000
    assert len(Pack.open(tmp_path / "p.h5")) == 24


def test_results_are_tables_as_the_report_prints_them(tmp_path):
    lines = [
        {"dataset": "d", "metric": "top1", "pretrained_model": source, "network": "R50x1", "shot": shot, "seed": seed,
         "metric_value": value + seed, "majority": 30.0}
        for source, value in (("a", 50.0), ("random", 40.0)) for shot in ("1", "10", "full") for seed in (0, 2)
    ]  # fmt: skip
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, found = made(tmp_path, results)
    assert ["source", "1 shot", "10 shots", "full"] in found.rows
    assert ["pre-trained: a", *["51.0 ± 1.4"] * 3] in found.rows
    assert ["random weights", *["41.0 ± 1.4"] * 3] in found.rows
    assert ["majority class", *["30.0"] * 3] in found.rows
    assert [line["points"] for line in found.charts[0]["series"]] == [[[1, 51], [10, 51]], [[1, 41], [10, 41]]]
    assert found.charts[0]["log"] is True


@pytest.mark.parametrize("what,said", [
    ("empty", "has no metrics.jsonl"), ("missing", "is no folder of a run"), ("text.txt", "is no folder of a run"),
    ("config", "config.yaml"), ("environment", "environment.json"), ("command", "list of words"),
    ("twice", "named twice"),
])  # fmt: skip
def test_what_is_no_run_is_named_and_no_page_is_left(tmp_path, capsys, what, said):
    place = run_folder(tmp_path / "run")
    words = [place]
    if what == "empty":
        (tmp_path / "empty").mkdir()
        words = [tmp_path / "empty"]
    elif what == "twice":
        words = [place, place]
    elif what == "config":
        (place / "config.yaml").write_text("[1, 2")
    elif what in ("environment", "command"):
        (place / "environment.json").write_text("{" if what == "environment" else '{"command": 3}')
    else:
        words = [tmp_path / what]
        if "." in what:
            words[0].write_text("x")
    with pytest.raises(SystemExit) as ended:
        made(tmp_path, *words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_chart_says_in_words_what_it_shows():
    text = document.html(
        "t", [document.Section("S", "", charts=[Chart("L", "step", "loss", [Series("a", 0, [(1, 0.5)])])])]
    )
    assert "L: loss over step. a ends at 0.5." in text


def test_a_run_alone_needs_no_more_than_metrics(tmp_path):
    place = run_folder(tmp_path / "run")
    for name in ("config.yaml", "environment.json"):
        (place / name).unlink()
    (one,) = page.read([place])
    assert (one.config, one.environment, one.command, one.last_step) == ({}, {}, "", 20)
    with pytest.raises(UserError, match="no metrics"):
        page.read([tmp_path])


def test_where_the_time_went_is_shown_rank_by_rank(tmp_path):
    """The ranks' own seconds, and what the doctor says of them."""
    place = run_folder(tmp_path / "run")
    ranks = 20
    known = {"kind": "run", "step": 0, "hosts": [f"n{rank // 4}" for rank in range(ranks)], "device": "cpu",
             "threads": 2, "cores": 4.0, "copied_bytes_per_s": 1e10, "keys": "train.", "images": 8, "size": 8,
             "network": "R8x0.25-8px", "dtype": "float32", "recompute": "none"}  # fmt: skip
    columns = dict.fromkeys(COLUMNS) | {
        "input": 0.001,
        "compute": 0.1,
        "wait": 0.03,
        "optimizer": 0.004,
        "other": 0.002,
    }
    columns = {name: [value] * ranks for name, value in columns.items()}
    columns["compute"][7], columns["wait"][7] = 0.125, 0.001
    line = {"kind": "ranks", "step": 20, "steps": 20, **columns}
    (place / "timing.jsonl").write_text(json.dumps(known) + "\n" + json.dumps(line) + "\n")
    text, found = made(tmp_path, place)
    bars = [row for row in found.rows if row[0].startswith("rank ")]
    assert len(bars) == 16
    assert ["rank 7, n1", "", "1", "125", "1", "4", "2"] in bars
    assert "16 of 20 ranks" in text
    timing, _, said = diagnosed(place)
    assert html.escape(said, quote=False) in text
    assert len(timing.known.hosts) == ranks


def test_a_run_that_came_to_nothing_has_no_lines(tmp_path):
    place = run_folder(tmp_path / "run", 2)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line | {"loss": None}) + "\n" for line in lines))
    _, found = made(tmp_path, place)
    assert [chart["title"] for chart in found.charts] == ["Learning rate", "Throughput"]
    assert next(row for row in found.rows if row[0] == "run" and row[1] != "network")[3] == "nan"
    (place / "metrics.jsonl").write_text("")
    _, found = made(tmp_path, place)
    assert found.charts == []
