import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from bench import report
from bench.paper import names as report_names
from bench.paper.names import Cell
from loaders.errors import UserError
from tests.support.published import files, line, runs, scored, write

ROOT = Path(__file__).parents[3]
NUMBER = re.compile(r"(\d+\.\d\d) (?:±|\\pm) (\d+\.\d\d)")
NETWORKS = ("R50x1", "R152x4")
FROM_SETS = {"chexpert": "CheXpert", "mimic": "MIMIC", "nih": "NIH", "padchest": "PadChest"}


def plain(text):
    return re.sub(r"[⁽⁾¹²()]|\s", "", text).lower().replace("padchest-ci", "padchest-cl")


@pytest.fixture(scope="session")
def paper(shared):
    """Table number → (row, network, column) → ("mean", "deviation"), and → columns, as printed in the paper."""
    values, columns, number, inside = {}, {}, 1, False
    for text in (shared / "reference" / "paper.txt").read_text().splitlines():
        fields = text.split("\t")
        if found := re.match(r"Table (\d+):", text):
            number = int(found[1])
        if len(fields) == 1:
            inside = False
        elif "ResNet-50x1" in text:
            inside, head = True, None
        elif inside and head is None:
            head = [plain(field) for field in fields if field.strip()]
            columns[number] = head[: len(head) // 2]
        elif inside:
            cells = fields[-len(head) :]
            row = plain(fields[-len(head) - 1])
            for index, cell in enumerate(cells):
                key = (row, NETWORKS[2 * index // len(head)], head[index])
                values.setdefault(number, {})[key] = (m := NUMBER.search(cell)) and m.groups()
    return values, columns


@pytest.fixture(scope="session")
def published(shared):
    return files(shared)


@pytest.fixture(scope="module")
def rows(shared):
    return runs(shared)


def markdown(text):
    """Title → (head, rows), of Markdown tables."""
    found = {}
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        title, *lines = part.splitlines()
        head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|")
        found[title] = (head, body)
    return found


def tables(capsys, *words):
    report.main(["tables", *map(str, words)])
    return markdown(capsys.readouterr().out)


def numbered(found):
    return {int(m[1]): table for title, table in found.items() if (m := re.match(r"Table (\d+)", title))}


def columns_of(head):
    """(network, column) of each column but the first, of a table of the paper."""
    pairs = [name.split(": ") for name in head[1:]]
    return [(network.replace("ResNet-", "R"), plain(column)) for network, column in pairs]


def test_the_published_runs_give_the_papers_tables_to_the_printed_digit(capsys, published, paper):
    values, columns = paper
    compared = Counter()
    for number, (head, body) in numbered(tables(capsys, *published)).items():
        places = columns_of(head)
        assert places == [(network, column) for network in NETWORKS for column in columns[number]]
        for label, *cells in body:
            for (network, column), cell in zip(places, cells, strict=True):
                printed = values[number][plain(label), network, column]
                ours = NUMBER.match(cell.lstrip("*"))
                assert (ours and ours.groups()) == printed, (number, label, network, column, cell)
                assert cell.endswith("[{} ± {}]".format(*printed) if printed else "—")
                compared[plain(label)] += ours is not None
    # Of Tables 1, 4 and 5, all places of the targets whose runs are published: 45 for each network.
    of_theirs = {row for number in (1, 4, 5) for (row, _, _) in values[number]} & set(compared)
    assert of_theirs == {"cifar-10", "cifar-100", "flowers-102", "pets", "covidx", "tuberculosis", "padchest-cl"}
    printed = [key for number in (1, 4, 5) for key, text in values[number].items() if text and key[0] in of_theirs]
    assert compared.total() == len(printed) == 90


def test_with_published_every_row_of_the_paper_is_there_in_its_order(capsys, tmp_path, paper):
    values, _ = paper
    mine = write(tmp_path / "r.jsonl", [line(90.0 + seed, seed=seed) for seed in range(5)])
    assert {number: len(body) for number, (_, body) in numbered(tables(capsys, mine)).items()} == {1: 1, 4: 1}
    found = numbered(tables(capsys, mine, "--published"))
    assert list(found) == list(values) == [1, 4, 5, 6, 7, 8, 9]
    for number, (head, body) in found.items():
        assert [plain(row[0]) for row in body] == list(dict.fromkeys(row for row, _, _ in values[number]))
        for label, *cells in body:
            for place, cell in zip(columns_of(head), cells, strict=True):
                printed = values[number][plain(label), *place]
                assert cell.endswith("[{} ± {}]".format(*printed)) if printed else cell == "—"


def test_the_data_file_holds_the_papers_numbers_and_no_others(paper):
    values, columns = paper
    layout = report_names.read_layout()
    expected = {}
    for spec in layout.tables:
        number = int(spec.name.removeprefix("table"))
        assert [plain(column) for column in spec.columns] == columns[number]
        for (row, network, column), printed in values[number].items():
            name = next(name for name, target in layout.targets.items() if plain(target.label) == row)
            source = spec.rows[name][columns[number].index(column)]
            assert (source is None) == (printed is None)
            if printed:
                cell = Cell(name, layout.targets[name].metric, source, network, "full")
                expected[spec.name, cell] = tuple(map(float, printed))
    found = {key: (score.mean, score.deviation) for key, score in report_names.read_published().items()}
    assert found == expected
    assert len(found) == 162


def test_supersets_are_what_the_headings_say_and_table_1_repeats_their_ends(paper):
    """A `+` adds to the column before it; S-MED is the first of such a ladder, L-MED the last with a value."""
    values, columns = paper
    layout = report_names.read_layout()
    ladders = {}
    for spec in layout.tables[2:]:
        number = int(spec.name.removeprefix("table"))
        for name, sources in spec.rows.items():
            sets, ladder = set(), []
            for column, source in zip(columns[number], sources, strict=True):
                sets.add(column.removeprefix("+"))
                assert source is None or set(source.split("_")) == sets
                ladder += [(column, source)] if source else []
            ladders[name] = number, ladder
    assert layout.tables[0].name == "table1"
    for name, (number, ladder) in ladders.items():
        row = plain(layout.targets[name].label)
        for column, (their_column, source) in (("s-med", ladder[0]), ("l-med", ladder[-1])):
            assert layout.tables[0].rows[name][columns[1].index(column)] == source
            for network in NETWORKS:
                assert values[1][row, network, column] == values[number][row, network, their_column]


def test_marks_of_metrics_are_the_papers(shared):
    marks = dict(re.findall(r"^(?:Medical\t|Natural\t)?([\w\- ]+) ⁽([¹²])⁾\t", (shared / "reference" / "paper.txt")
                            .read_text(), re.M))  # fmt: skip
    targets = report_names.read_layout().targets.values()
    assert {plain(label): mark for label, mark in marks.items()} == {
        plain(target.label): {"top1": "¹", "mean_auc": "²"}[target.metric] for target in targets
    }


def test_the_table_of_each_target_holds_pandas_means_and_deviations(capsys, published, rows):
    found = {title: table for title, table in tables(capsys, *published).items() if not title.startswith("Table")}
    kinds = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "Tuberculosis": "tuberculosis_full",
             "PadChest-cl": "padchest", "COVIDx": "covidx_cxr2", "Flowers-102": "flowers_oversampling",
             "Pets": "pets"}  # fmt: skip
    stats = rows.groupby(["dataset", "metric", "source", "network", "shot"]).percent.agg(["mean", "std", "count"])
    seen = 0
    for title, (head, body) in found.items():
        label, metric = title.split(", ", 1)
        metric = {"top-1 accuracy, %": "test/acc", "mean ROC AUC, %": "test/mean_auc",
                  "average precision of class 0, %": "test/average_precision_class_0",
                  "F1 of class 0, %": "test/f1_0"}[metric]  # fmt: skip
        assert head[:2] == ["Source", "Network"]
        shots = [word.split()[0] for word in head[2:]]
        assert shots == [number for number in ("1", "5", "10", "100", "500", "full") if number in shots]
        names = {"ImageNet-1k": "imagenet1k", "ImageNet-21k": "imagenet21k"}
        for source, network, *cells in body:
            name = names.get(source) or "_".join(
                key for part in source.split("+") for key, shown in FROM_SETS.items() if shown == part
            )
            for number, cell in zip(shots, cells, strict=True):
                one = stats.loc[kinds[label], metric, name, network, f"{number}_shot"]
                best = stats.loc[kinds[label], metric].xs(f"{number}_shot", level="shot")["mean"].max()
                text = f"{one['mean']:.2f} ± {one['std']:.2f}" + (
                    "" if one["count"] == 5 else f" (n={one['count']:.0f})"
                )
                assert cell == (f"**{text}**" if f"{one['mean']:.2f}" == f"{best:.2f}" else text)
                seen += 1
    assert seen == len(stats)


def test_own_targets_and_sources_get_a_table_too(capsys, tmp_path):
    lines = [line(50.0 + seed, seed=seed, shot=shot, dataset="my-set-train", pretrained_model=source, network=network)
             for seed in range(3) for shot in ("100", "2", "full")
             for source, network in (("random", "R20x0.25-32px"), ("a_r50x1", "R50x1"))]  # fmt: skip
    lines.append(line(99.0, dataset="my-set-train", pretrained_model="a_r50x1", shot="2", seed=7))
    lines.append(line(12.5, dataset="my-set-train", pretrained_model="b", network=None, shot="2"))
    found = tables(capsys, write(tmp_path / "r.jsonl", lines))
    assert list(found) == ["my-set, top-1 accuracy, %"]
    head, body = found["my-set, top-1 accuracy, %"]
    assert head == ["Source", "Network", "2 shots", "100 shots", "full"]
    mean, deviation = np.mean([50, 51, 52, 99]), np.std([50, 51, 52, 99], ddof=1)
    assert body == [
        ["a", "R50x1", f"**{mean:.2f} ± {deviation:.2f} (n=4)**", "**51.00 ± 1.00 (n=3)**", "**51.00 ± 1.00 (n=3)**"],
        ["b", "—", "12.50 (n=1)", "—", "—"],
        ["random weights", "R20x0.25-32px", "51.00 ± 1.00 (n=3)", "**51.00 ± 1.00 (n=3)**", "**51.00 ± 1.00 (n=3)**"],
    ]


def test_bold_is_the_best_of_a_network_and_the_star_the_best_of_a_row(capsys, tmp_path):
    lines = [line(90.0), line(95.0, pretrained_model="imagenet21k_r50x1"),
             line(94.996, pretrained_model="imagenet1k_r152x4", network="R152x4")]  # fmt: skip
    _, body = numbered(tables(capsys, write(tmp_path / "r.jsonl", lines)))[4]
    shown = [cell.split(" [")[0] for cell in body[0][1:]]
    assert shown == ["90.00 (n=1)", "**95.00 (n=1)** ★", "95.00 (n=1) ★", "—"]


def test_names_of_the_same_thing_are_the_same(tmp_path):
    lines = [
        line(1.0, dataset="tuberculosis_full-train", pretrained_model="nih_padchest_mimic_chexpert_bit50x1"),
        line(2.0, dataset="padchest-cl_train", pretrained_model="chexpert_mimic_nih_r152x4", network=None),
    ]
    found, _ = scored([write(tmp_path / "r.jsonl", lines)])
    assert list(found) == [
        Cell("tuberculosis", "top1", "chexpert_mimic_nih_padchest", "R50x1", "full"),
        Cell("padchest_cl", "top1", "chexpert_mimic_nih", "R152x4", "full"),
    ]


def test_runs_of_two_origins_do_not_make_one_mean(tmp_path):
    lines = [line(90.0, pretrained_model="imagenet1k_bit50x1"), line(91.0, seed=1)]
    with pytest.raises(UserError, match=r"imagenet1k_bit50x1 .*imagenet1k_r50x1 .*ImageNet-1k, R50x1, CIFAR-10"):
        scored([write(tmp_path / "r.jsonl", lines)])


def test_tables_take_the_papers_recipe_of_imagenet_1k_where_there_is_one(capsys, tmp_path):
    lines = [line(90.0), line(91.0, pretrained_model="imagenet1k_cosine_r50x1")]
    found = tables(capsys, write(tmp_path / "r.jsonl", lines))
    assert numbered(found)[4][1][0][1] == "91.00 (n=1) [94.26 ± 0.05]"
    assert [row[0] for row in found["CIFAR-10, top-1 accuracy, %"][1]] == ["ImageNet-1k", "ImageNet-1k, cosine"]


def test_a_target_of_the_paper_is_scored_by_its_metric_there(capsys, tmp_path):
    lines = [line(40.0, dataset="padchest_cl"), line(80.0, dataset="padchest_cl", metric="mean_auc")]
    found = tables(capsys, write(tmp_path / "r.jsonl", lines))
    assert numbered(found)[1][1][0][3].startswith("80.00")
    assert {"PadChest-cl, top-1 accuracy, %", "PadChest-cl, mean ROC AUC, %"} < set(found)


def test_files_of_tables_say_the_same_as_the_screen(capsys, tmp_path, published, rows):
    report.main(["tables", *map(str, published), "--out", str(tmp_path)])
    screen = capsys.readouterr().out
    written = {path.stem: path.read_text() for path in tmp_path.glob("*.md")}
    assert set(written) == {path.stem for path in tmp_path.glob("*.csv")}
    assert markdown(screen) == {title: one for text in written.values() for title, one in markdown(text).items()}
    table = pd.read_csv(tmp_path / "target_tuberculosis.csv")
    stats = rows[rows.dataset == "tuberculosis_full"].groupby(["source", "network", "shot"]).percent
    assert len(table) == len(stats)
    for row in table.itertuples():
        values = stats.get_group((row.source, row.network, f"{row.shots}_shot"))
        assert (row.mean, row.deviation, row.seeds) == pytest.approx((values.mean(), values.std(), len(values)))
    first = pd.read_csv(tmp_path / "table1.csv")
    assert list(first["mean"].round(2)) == list(first.paper_mean)


def test_a_score_that_is_no_number_is_said_and_never_the_best(capsys, tmp_path):
    lines = [
        line(value, shot="5", pretrained_model=name) for name, value in zip("abc", (np.nan, 2.0, 3.0), strict=True)
    ]
    found = tables(capsys, write(tmp_path / "r.jsonl", lines))
    assert [row[2] for row in found["CIFAR-10, top-1 accuracy, %"][1]] == ["nan (n=1)", "2.00 (n=1)", "**3.00 (n=1)**"]


def test_figures_are_written_and_those_without_results_named(capsys, tmp_path):
    mine = write(tmp_path / "r.jsonl", [line(90.0 + seed, seed=seed, shot=shot) for seed in (0, 1) for shot in "15"])
    report.main(["figures", str(mine), "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"figure4.png", "figure4.svg"}
    height, width, _ = matplotlib.image.imread(tmp_path / "out" / "figure4.png").shape
    assert width > height > 300
    assert "training images of each class" in (tmp_path / "out" / "figure4.svg").read_text()
    said = capsys.readouterr().out
    assert "no results for figure1, figure2, figure5, figure6, figure7, figure8" in said


def test_a_folder_is_its_files_and_the_program_runs_as_a_file(tmp_path):
    write(tmp_path / "a.jsonl", [line(90.0)])
    write(tmp_path / "b.jsonl", [line(92.0, seed=1)])
    (tmp_path / "notes.txt").write_text("not results")
    done = subprocess.run([sys.executable, ROOT / "bench" / "report.py", "tables", tmp_path], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert f"91.00 ± {np.std([90, 92], ddof=1):.2f} (n=2) [94.26 ± 0.05]" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tables", "nowhere.jsonl"], "no results at nowhere.jsonl"),
        (["tables", "other.csv"], "lacks the column metric_value"),
        (["tables", "empty"], "no results in empty"),
        (["figures", "good.jsonl", "--format", "png,gif"], "gif is not known; expected png or svg"),
        (["tables", "good.jsonl", "--format", ","], "names nothing"),
        (["tables", "good.jsonl", "--out", "other.csv"], "--out other.csv is a file; name a folder"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.jsonl", [line(1.0)])
    (tmp_path / "other.csv").write_text("gpus,images_per_second\n1,129\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        report.main(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert said in error
