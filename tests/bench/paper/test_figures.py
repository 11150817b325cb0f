from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from bench.paper import figures as report_figures
from bench.paper import panels
from tests.support.published import files, line, runs, scored, write


def lines_of(axes):
    """Label → (x, y, half lengths of the error bars), of the curves in a panel."""
    found = {}
    for bar in axes.containers:
        heights = bar[2][0].get_segments()
        found[bar.get_label()] = (*bar[0].get_data(), [(top[1] - bottom[1]) / 2 for bottom, top in heights])
    return found


@pytest.fixture(scope="module")
def drawn(shared):
    return report_figures.figures(*scored(files(shared)))


@pytest.fixture(scope="module")
def rows(shared):
    return runs(shared)


def test_the_published_runs_fill_the_panels_that_they_are_for(drawn):
    shape = {name: [len(axes.containers) for axes in figure.axes] for name, figure in drawn.items()}
    assert shape == {
        "figure1": [4, 8],  # 2 networks from 2 natural sources; and from 2 medical ones
        "figure2": [4, 6, 4, 4],  # no PadChest-cl from the superset with PadChest
        "figure4": [4, 4, 4, 4],
        "figure5": [8, 2 * 14],
        "figure6": [8, 2 * 15],  # a bar is a container, and so are its error bars
        "figure7": [4, 11],  # 4 supersets of both networks, 3 more sets of R152x4
        "figure8": [2, 2, 2, 2, 4, 4, 4],
        "target_cifar10_average_precision_class_0": [4, 8],
        "target_cifar10_mean_auc": [4, 8],
        "target_covidx": [14, 28],
        "target_covidx_f1_0": [14, 28],
        "target_padchest_cl_top1": [10, 20],
    }
    titles = [axes.get_title() for axes in drawn["figure8"].axes]
    assert [title.split(") ")[1].split(",")[0] for title in titles] == [
        "CIFAR-10", "CIFAR-100", "Flowers-102", "Pets", "COVIDx", "Tuberculosis", "PadChest-cl"]  # fmt: skip


def test_curves_are_pandas_means_and_deviations_over_shots(drawn, rows):
    axes = drawn["figure1"].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "5", "10", "100", "500", "full"]
    stats = rows[rows.dataset == "cifar100"].groupby(["source", "network", "shot"]).percent.agg(["mean", "std"])
    found = lines_of(axes)
    assert len(found) == 4
    for label, (x, mean, deviation) in found.items():
        source, network = label.split(", ")
        one = stats.loc[source.lower().replace("-", ""), network]
        one = one.loc[[f"{shots}_shot" for shots in (1, 5, 10, 100, 500, "full")]]
        assert list(mean) == pytest.approx(list(one["mean"]))
        assert deviation == pytest.approx(list(one["std"]))
        assert np.abs(x - np.arange(6)).max() < 0.5  # beside its own tick


def test_colour_tells_the_source_and_line_and_marker_the_network(drawn):
    looks = {}
    for axes in (axes for name in ("figure2", "figure7") for axes in drawn[name].axes):
        for bar in axes.containers:
            source, network = bar.get_label().split(", ")
            line = bar[0]
            looks.setdefault(network, set()).add((line.get_marker(), line.get_linestyle()))
            looks.setdefault((axes.figure, source), set()).add(line.get_color())
    assert all(len(found) == 1 for found in looks.values())
    for figure in {key[0] for key in looks if isinstance(key, tuple)}:
        colours = [found for key, found in looks.items() if key[0] is figure]
        assert len(set.union(*colours)) == len(colours)
    assert looks["R50x1"].isdisjoint(looks["R152x4"])


def test_bars_end_at_the_full_shot_means(drawn, rows):
    axes = drawn["figure6"].axes[1]
    full = rows[(rows.dataset == "tuberculosis_full") & (rows.shot == "full_shot")]
    means = sorted(full.groupby("pretrained_model").percent.mean())
    assert sorted(patch.get_width() for patch in axes.patches) == pytest.approx(means)
    assert all(patch.get_x() == 0 for patch in axes.patches)
    assert axes.get_xlim()[0] == 0


def test_lines_over_source_data_go_from_the_smaller_to_the_larger_source(drawn, rows):
    axes = drawn["figure8"].axes[5]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "S-MED\n224K", "L-MED\n873K", "1K-NAT\n1.4M", "21K-NAT\n14M"]  # fmt: skip
    full = rows[(rows.dataset == "tuberculosis_full") & (rows.shot == "full_shot")]
    means = full.groupby("pretrained_model").percent.mean()
    _, mean, _ = lines_of(axes)["R152x4, medical sources"]
    assert list(mean) == pytest.approx(list(means[["chexpert_bit152x4", "chexpert_mimic_nih_padchest_bit152x4"]]))


@pytest.mark.parametrize(
    "name",
    [
        "figure1",
        "figure2",
        "figure4",
        "figure5",
        "figure6",
        "figure7",
        "figure8",
        "target_padchest_cl_top1",
        "target_covidx_f1_0",
    ],
)
def test_nothing_lies_over_the_legend_or_outside_the_figure(drawn, name):
    figure = drawn[name]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    whole = figure.bbox
    legends = [legend.get_window_extent(renderer) for legend in figure.legends]
    parts = [axes.get_tightbbox(renderer) for axes in figure.axes] + [figure._suptitle.get_window_extent(renderer)]
    assert legends
    for box in legends + parts:
        assert box.x0 >= whole.x0 - 1 and box.x1 <= whole.x1 + 1 and box.y0 >= whole.y0 - 1 and box.y1 <= whole.y1 + 1
    assert not any(legend.overlaps(part) for legend in legends for part in parts)


def test_own_studies_get_curves_and_bars(tmp_path):
    lines = [line(50.0 + seed, seed=seed, shot=shot, dataset="mine", pretrained_model=source, network="R20x0.25-32px")
             for seed in range(3) for shot in ("1", "10", "full") for source in ("a", "random")]  # fmt: skip
    lines += [line(70.0, dataset="only-full", pretrained_model="a"), line(70.0, dataset="few", shot="5")]
    figures = report_figures.figures(*scored([write(tmp_path / "r.jsonl", lines)]))
    assert {name: [len(axes.containers) for axes in one.axes] for name, one in figures.items()} == {
        "target_mine": [2, 4], "target_only-full": [0], "target_few": [0]}  # fmt: skip
    assert "over 3 seeds" in figures["target_mine"]._suptitle.get_text()
    assert "one seed" in figures["target_few"]._suptitle.get_text()
    names = [text.get_text() for text in figures["target_mine"].legends[0].get_texts()]
    assert {"a", "random weights", "R20x0.25-32px"} < set(names)


def test_figure_8_takes_the_papers_recipe_of_imagenet_1k_where_there_is_one(tmp_path):
    lines = [line(90.0), line(91.0, pretrained_model="imagenet1k_cosine_r50x1"),
             line(92.0, pretrained_model="imagenet1k_r152x4", network="R152x4"),
             line(95.0, pretrained_model="imagenet21k_r50x1")]  # fmt: skip
    axes = report_figures.figures(*scored([write(tmp_path / "r.jsonl", lines)]))["figure8"].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1K-NAT\n1.4M", "21K-NAT\n14M"]
    found = lines_of(axes)
    assert list(found["R50x1, natural sources"][1]) == [91.0, 95.0]
    assert list(found["R152x4, natural sources"][1]) == [92.0]


def test_a_score_that_is_no_number_is_not_drawn(tmp_path):
    lines = [line(float("nan"), dataset="mine", shot="5"), line(2.0, dataset="mine", shot="5", pretrained_model="b")]
    figures = report_figures.figures(*scored([write(tmp_path / "r.jsonl", lines)]))
    (said,) = figures["target_mine"].axes[0].texts
    assert "2.0" in said.get_text() and "nan" not in said.get_text()


def test_every_superset_has_a_colour_a_place_and_a_bar_of_its_own(tmp_path):
    """The 15 supersets of the four X-ray sets, from two networks: 30 lines, 30 bars."""
    sets = ("nih", "padchest", "chexpert", "mimic")
    sources = ["_".join(some) for size in range(1, 5) for some in combinations(sets, size)]
    lines = [line(50.0, dataset="tuberculosis", pretrained_model=f"{source}_{net.lower()}", network=net, shot=shot)
             for source in sources for net in ("R50x1", "R152x4") for shot in ("1", "5", "full")]  # fmt: skip
    figures = report_figures.figures(*scored([write(tmp_path / "r.jsonl", lines)]))
    curves, bars = figures["figure7"].axes[0], figures["figure6"].axes[1]
    found = [bar[0] for bar in curves.containers]
    assert len(found) == 30 and len({curve.get_color() for curve in found}) == 15
    for curve in found:
        assert np.abs(curve.get_xdata() - np.arange(3)).max() < 0.5  # beside its own tick, and within the panel
    canvas = FigureCanvasAgg(figures["figure6"])
    canvas.draw()
    boxes = [label.get_window_extent(canvas.get_renderer()) for label in bars.get_yticklabels()]
    assert len(boxes) == 30 and not any(one.overlaps(other) for one, other in pairwise(boxes))


def test_lines_of_one_panel_stand_side_by_side_about_their_tick(tmp_path):
    for count in (1, 2, 3, 4):
        lines = [line(50.0, shot=shot, dataset="mine", pretrained_model=f"s{k}") for k in range(count) for shot in "15"]
        (axes,) = report_figures.figures(*scored([write(tmp_path / "r.jsonl", lines)]))["target_mine"].axes
        at = np.array([x for x, _, _ in lines_of(axes).values()])
        assert at.mean(axis=0) == pytest.approx([0.0, 1.0])
        assert np.diff(at, axis=0) == pytest.approx(np.full((count - 1, 2), 0.05))


@pytest.mark.parametrize(
    ("panels", "grid"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (5, (2, 4)), (8, (2, 4)), (9, (3, 4))]
)
def test_panels_stand_in_rows_of_four_but_four_in_a_square(tmp_path, panels, grid):
    lines = [line(50.0, shot=shot, dataset="mine") for shot in "15"]
    scores, layout = scored([write(tmp_path / "r.jsonl", lines)])
    (content,) = report_figures.generic(scores, layout)
    figure = report_figures.draw("title", [content] * panels, layout)
    assert len(figure.axes) == panels
    assert figure.axes[0].get_gridspec().get_geometry() == grid


@pytest.mark.parametrize("shots", [("1", "5", "full"), ("full",)])
def test_the_majority_class_is_a_line_in_every_panel_of_accuracies(tmp_path, shots):
    lines = [line(50.0, dataset=target, pretrained_model=source, shot=shot, majority=44.5, metric=metric)
             for target, metric in (("tuberculosis", "top1"), ("cifar10", "top1"), ("mine", "mean_auc"))
             for source in ("chexpert_r50x1", "imagenet21k_r50x1", "imagenet1k_r50x1") for shot in shots]  # fmt: skip
    figures = report_figures.figures(*scored([write(tmp_path / "r.jsonl", lines)]))
    assert len(figures) > 2
    for name, figure in figures.items():
        for axes in figure.axes:
            if not axes.axison:  # one score, as a number
                assert "majority class: 44.5" in axes.texts[0].get_text()
                continue
            shares = [one for one in axes.lines if one.get_label() == "majority class"]
            assert len(shares) == (name != "target_mine")
            at = [set(one.get_xdata()) | set(one.get_ydata()) for one in shares]
            assert all(44.5 in values for values in at)
        said = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        bars_alone = not figure.legends
        assert bars_alone or ("majority class" in said) == (name != "target_mine")


def test_a_grey_is_a_network_and_a_hue_a_source(tmp_path):
    greys = {colour for *_, colour in panels.NETWORKS} | {panels.SHARE["color"]}
    hues = {*panels.COLOURS, *panels.NATURAL.values()}
    assert len(greys) == len(panels.NETWORKS) + 1 and len(hues) == len(panels.COLOURS) + len(panels.NATURAL)
    assert all(len({colour[1:3], colour[3:5], colour[5:]}) == 1 for colour in greys)
    assert all(len({colour[1:3], colour[3:5], colour[5:]}) > 1 for colour in hues)
