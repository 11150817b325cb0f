import json
import math

import numpy as np
import pandas as pd
import pytest

from engine.transfer import record, results
from engine.transfer.results import Result
from engine.whole import whole
from loaders.errors import UserError

HEAD = "metric_value,metric,path,seed,shot,pretrained_model,dataset,last_step"
ROW = "0.5,test/acc,runs/a,1,10_shot,chexpert_bit50x1,cifar10,500"


def line(value, **changes):
    fields = {"metric_value": value, "metric": "top1", "seed": 0, "shot": "5", "pretrained_model": "a",
              "dataset": "digits", "network": "R50x1"}  # fmt: skip
    return json.dumps(fields | changes) + "\n"


def one(**changes):
    fields = {"dataset": "digits", "metric": "top1", "source": "random", "network": "R50x1", "shots": "10",
              "seed": 3, "value": 100 * 2 / 3, "last_step": 200, "path": "runs/a b,c"}  # fmt: skip
    return Result(**fields | changes)


def published(shared):
    return sorted((shared / "reference" / "results").glob("*.csv"))


def test_the_published_files_are_read_as_pandas_reads_them(shared):
    for path in published(shared):
        rows = pd.read_csv(path)
        rows = rows.drop_duplicates(["dataset", "metric", "pretrained_model", "shot", "seed"], keep="last")
        found = {(r.source, f"{r.shots}_shot", r.seed): r for r in results.read([path])}
        assert len(found) == len(rows) < len(pd.read_csv(path))
        for row in rows.itertuples():
            result = found[row.pretrained_model, row.shot, row.seed]
            assert result.value == pytest.approx(100 * row.metric_value, rel=1e-12)
            assert {"top1": "test/acc"}.get(result.metric, f"test/{result.metric}") == row.metric
            assert (result.last_step, result.path) == (row.last_step, row.path)
            assert result.network == ("R50x1" if row.pretrained_model.endswith("50x1") else "R152x4")


def test_of_repeated_rows_and_lines_the_last_counts(tmp_path):
    (tmp_path / "a.csv").write_text("\n".join([HEAD, ROW, ROW.replace("0.5", "0.75"), ROW.replace(",1,", ",2,")]))
    (tmp_path / "b.jsonl").write_text(line(10.0) + line(20.0, seed=1) + line(30.0) + line(40.0, network="R101x1"))
    found = results.read([tmp_path / "a.csv", tmp_path / "b.jsonl"])
    assert [(r.seed, r.value) for r in found] == [(1, 75.0), (2, 50.0), (1, 20.0), (0, 30.0), (0, 40.0)]


@pytest.mark.parametrize(
    ("source", "network"),
    [("chexpert_bit50x1", "R50x1"), ("imagenet21k_r152x4", "R152x4"), ("my_r20x0.25-32px", "R20x0.25-32px"),
     ("random", None), ("BiT-M-R50x1.npz", None), ("cifar10_small", None)],
)  # fmt: skip
def test_a_source_names_its_network_at_its_end(source, network):
    assert results.network_of(source) == network


def test_padchest_in_the_published_format_is_padchest_cl(tmp_path):
    (tmp_path / "a.csv").write_text(f"{HEAD}\n{ROW.replace('cifar10', 'padchest')}\n")
    (tmp_path / "b.jsonl").write_text(line(10.0, dataset="padchest"))
    assert [r.dataset for r in results.read([tmp_path / "a.csv", tmp_path / "b.jsonl"])] == ["padchest_cl", "padchest"]


def test_written_as_csv_and_read_back_all_is_the_same(tmp_path, shared):
    found = results.read(published(shared))
    results.write_csv(found, tmp_path / "new" / "all.csv")
    assert results.read([tmp_path / "new" / "all.csv"]) == found
    written = pd.read_csv(tmp_path / "new" / "all.csv")
    original = pd.concat(map(pd.read_csv, published(shared)))
    original = original.drop_duplicates(["dataset", "metric", "pretrained_model", "shot", "seed"], keep="last")
    assert list(written.columns) == HEAD.split(",")
    columns = ["metric", "pretrained_model", "shot", "seed", "dataset", "path", "last_step", "metric_value"]
    old, new = (table[columns].sort_values(columns).reset_index(drop=True) for table in (original, written))
    pd.testing.assert_frame_equal(old, new, rtol=1e-14)


def test_ours_survive_the_csv_bit_for_bit(tmp_path):
    values = np.random.RandomState(0).uniform(0, 100, 200)
    ours = [one(seed=seed, value=float(value)) for seed, value in enumerate(values)]
    ours += [one(dataset=name, metric="mean_auc") for name in ("padchest", "padchest_cl", "cifar10-train")]
    ours += [one(source="chexpert_r50x1"), one(network=None), one(shots="full", path="", last_step=None)]
    results.write_csv(ours, tmp_path / "a.csv")
    assert results.read([tmp_path / "a.csv"]) == ours
    text = (tmp_path / "a.csv").read_text()
    assert text.startswith(HEAD + ",network\n")
    assert ",full_shot," in text


def test_what_the_csv_cannot_hold_is_refused_and_nothing_is_lost(tmp_path):
    (tmp_path / "a.csv").write_text("precious")
    with pytest.raises(UserError, match="loss"):
        results.write_csv([one(metric="loss")], tmp_path / "a.csv")
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "a.csv") as temporary:
        temporary.write_text("half of")
        _ = 1 / 0
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_mean_and_deviation_are_numpys():
    values = [90.25, 91.5, 87.125, 93.0]
    score = results.score(values)
    assert (score.mean, score.deviation) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert results.score([5.0]) == results.Score(5.0, None, 1)
    assert str(results.score([5.0, math.nan])) == "nan ± nan"
    assert str(results.score([math.nan])) == "nan"


def test_a_last_line_that_was_cut_off_is_left_out_and_said(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    path.write_text(line(10.0) + line(20.0, seed=1)[:-20])
    assert [result.value for result in results.read([path])] == [10.0]
    assert f"warning: {path}, line 2" in capsys.readouterr().err
    path.write_text(line(10.0) + line(20.0, seed=1).rstrip("\n"))  # whole but for its end: nothing is missing
    assert [result.value for result in results.read([path])] == [10.0, 20.0]
    path.write_text(line(10.0)[:-20] + "\n" + line(20.0, seed=1))
    with pytest.raises(UserError, match="line 1"):
        results.read([path])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", HEAD.replace("seed,", "") + "\n", "lacks the column seed"),
        ("a.csv", "", "lacks the column"),
        ("a.csv", HEAD + "\n", "no results"),
        ("a.csv", f"{HEAD}\n{ROW.replace('test/acc', 'loss')}\n", "no results"),
        ("a.csv", f"{HEAD}\n{ROW.replace('10_shot', 'many')}\n", "line 2: shot is 'many'"),
        ("a.csv", f"{HEAD}\n{ROW.replace('0.5', '94.2')}\n", "line 2.*94.2, not a fraction"),
        ("a.csv", f"{HEAD}\n{ROW.replace('0.5', 'high')}\n", "line 2: a number"),
        ("a.csv", f"{HEAD}\n{ROW}\n0.5,test/acc\n", "line 3: a result lacks seed"),
        ("a.jsonl", line("high"), "line 1: a number"),
        ("a.jsonl", line(1.0, seed="first"), "line 1: a number"),
        ("a.jsonl", line(1.0, dataset=None), "line 1: a result lacks dataset"),
        ("a.jsonl", json.dumps(f"a text with {HEAD}") + "\n", "line 1: not a line of results"),
        ("a.jsonl", "3\n", "line 1: not a line of results"),
        ("a.jsonl", b"\x89PNG\xff", "not text"),
    ],
)
def test_what_is_no_result_is_refused_with_its_place(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said):
        results.read([path])


def test_files_that_went_through_a_spreadsheet_or_windows_are_read(tmp_path):
    """A byte order mark, and lines that end in CR LF."""
    (tmp_path / "a.csv").write_bytes(f"\ufeff{HEAD}\r\n{ROW}\r\n".encode())
    (tmp_path / "b.jsonl").write_bytes(f"\ufeff{line(20.0)}".replace("\n", "\r\n").encode())
    found = results.read([tmp_path / "a.csv", tmp_path / "b.jsonl"])
    assert [(result.value, result.last_step) for result in found] == [(50.0, 500), (20.0, None)]


def test_metrics_that_are_not_known_are_left_out_and_counted(tmp_path, capsys):
    rows = [ROW, ROW.replace("test/acc", "test/f1_3"), *[ROW.replace("test/acc", "test/kappa")] * 2,
            ROW.replace("test/acc", "f1_0")]  # fmt: skip
    (tmp_path / "a.csv").write_text("\n".join([HEAD, *rows]))
    assert [r.metric for r in results.read([tmp_path / "a.csv"])] == ["top1", "f1_3"]
    said = capsys.readouterr().err
    assert "3 rows are left out" in said and "test/kappa (2), f1_0 (1)" in said


def test_a_score_that_is_null_is_nan(tmp_path):
    line = {"metric": "mean_auc", "seed": 0, "shot": "full", "pretrained_model": "a_r50x1", "dataset": "nih"}
    record.append(tmp_path / "r.jsonl", line | {"metric_value": float("nan")})
    assert '"metric_value": null' in (tmp_path / "r.jsonl").read_text()
    (result,) = results.read([tmp_path / "r.jsonl"])
    assert np.isnan(result.value)


def test_the_folder_of_a_results_file_is_made_with_those_above_it(tmp_path):
    for place in ("a/b/asked.jsonl", "c/d/appended.jsonl"):
        path = tmp_path / place
        if "asked" in place:
            record.check_writable(path)
            assert path.read_bytes() == b""
        record.append(path, {"a": 1})
        record.append(path, {"a": 2})
        assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
