"""Results for tests: lines as engine.finetune writes them, and the paper's published runs by pandas."""

import json

import pandas as pd

from bench.paper import names as report_names
from engine.transfer import results


def line(value, **changes):
    fields = {"metric_value": value, "metric": "top1", "seed": 0, "shot": "full", "dataset": "cifar10",
              "pretrained_model": "imagenet1k_r50x1", "network": "R50x1"}  # fmt: skip
    return fields | changes


def write(path, lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def scored(paths):
    layout = report_names.read_layout()
    return report_names.cells(results.read(paths), layout), layout


def files(shared):
    return sorted((shared / "reference" / "results").glob("*.csv"))


def runs(shared):
    """The published runs by pandas: percent, each run once."""
    table = pd.concat(map(pd.read_csv, files(shared)))
    table = table.drop_duplicates(["dataset", "metric", "pretrained_model", "shot", "seed"], keep="last")
    table[["source", "network"]] = table.pretrained_model.str.rsplit("_bit", n=1, expand=True)
    return table.assign(network="R" + table.network, percent=100 * table.metric_value)
