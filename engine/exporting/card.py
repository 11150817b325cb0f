"""The model card: what a network is, what it was made of, how well it did, and what it is not for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.exporting.facts import Facts
from engine.predicting.tuned import Tuned

FILE = "README.md"
_HEAD = """---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
---
"""
_USES = {
    "onnx": """```python
session = onnxruntime.InferenceSession("model.onnx")
probabilities, logits = session.run(None, {"images": images})
names = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
```""",
    "torch": """```python
network = torch.export.load("model.pt2").module()
probabilities, logits = network(images)
```""",
    "timm": """```python
network = timm.create_model("local-dir:timm", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))  # with the normalization
logits = network(transform(image)[None])
```""",
}
_NOT_FOR = (
    "**Decisions about patients or other people.** It is a research model, not a medical device: nobody has tested it "
    "for that, and no authority has approved it.",
    "**Other images than those it was trained and scored on**: other scanners, hospitals, countries, ages, views, file "
    "formats. The scores say nothing about them; score it there first.",
    "**Classes that are not listed.** It knows no others, and gives each image to the listed ones.",
)


def text(tuned: Tuned, facts: Facts, forms: Sequence[str], distances: Mapping[str, str]) -> str:
    """The card as Markdown, with a header for those hubs that read one. `distances`: how far each form was found to be
    from the network, in words."""
    result = tuned.result
    about = [
        f"# {_plain(result.get('pretrained_model', facts.run))} → {_plain(result.get('dataset', 'its data'))}"
        if result
        else f"# {_plain(facts.run or facts.network)}",
        "",
        f"{facts.network} for {len(facts.classes):,} {'labels' if facts.several_labels else 'classes'}, trained with "
        f"BoosterBiT.",
        "",
        f"* Input: {facts.input}",
        f"* Before that: {facts.preprocessing}",
        f"* Output: {facts.output}",
        f"* {'Labels' if facts.several_labels else 'Classes'}, in order: {', '.join(map(_plain, facts.classes))}",
    ]
    if "timm" in forms:
        about += [
            "* In `timm/` the network takes normalized images and gives logits; kernels there are 10 times as large, "
            "for timm adds more to their variance: the function is the same" + _gray(facts)
        ]
    sections = [
        about,
        ["## Use", *(f"\n{_USES[form]}" for form in forms)],
        ["## Data", "", *_rows(_data(tuned))],
        ["## Protocol", "", *_rows(_protocol(tuned, facts))],
        ["## Scores", "", *_scores(result)],
        ["## What it must not be used for", "", *(f"* {each}" for each in _not_for(tuned, facts))],
        ["## Where it comes from", "", *_rows(_origin(tuned, facts, distances))],
    ]
    return _HEAD + "\n" + "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _gray(facts: Facts) -> str:
    if facts.transform.kind != "xray":
        return ""
    return ". timm's transform does not turn images to gray: give it gray ones, `image.convert('L').convert('RGB')`"


def _data(tuned: Tuned) -> dict[str, object]:
    data, result = tuned.config.get("data", {}), tuned.result
    return {
        "weights that it starts from": tuned.config.get("from") or tuned.config.get("model", {}).get("weights"),
        "their SHA-256, first digits": result.get("weights"),
        "trained on": data.get("train"),
        "images trained on": result.get("train_images"),
        "validated on": data.get("val"),
        "scored on": data.get("test"),
        "share held out to be scored on": data.get("holdout") or None,
        "images scored on": result.get("test_images"),
    }


def _protocol(tuned: Tuned, facts: Facts) -> dict[str, object]:
    config, result = tuned.config, tuned.result
    return {
        "recipe": config.get("name"),
        "shots": result.get("shot"),
        "seed": config.get("seed", config.get("train", {}).get("seed")),
        "steps": tuned.about.get("step"),
        "batch": tuned.about.get("global_batch"),
        "learning rate": config.get("lr", config.get("optim", {}).get("base_lr")),
        "MixUp, alpha": result.get("mixup"),
        "classes with too few images": ", ".join(map(str, result.get("short_classes") or ())) or None,
        "image side, pixels": facts.transform.size,
        "precision": f"{facts.trained_in} in training; float32 here",
        "ranks": result.get("ranks"),
        "settings": result.get("settings") or tuned.about.get("settings"),
    }


def _scores(result: Mapping[str, Any]) -> list[str]:
    if not result:
        return ["None was recorded with the run."]
    named = {"top1": "top-1", "mean_auc": "mean ROC AUC over classes"}
    name = named.get(result["metric"], str(result["metric"]))
    low, high = result.get("interval") or (None, None)
    interval = "" if low is None or high is None else f", 95% interval {low:.2f} to {high:.2f}"
    images = result["test_images"]
    lines = [f"{name} {_percent(result['metric_value'])}{interval}, over {images:,} images."]
    if (share := result.get("majority")) is not None:
        lines += ["", f"Who always says the most frequent class has a top-1 of {_percent(share)}."]
    if classes := result.get("classes"):
        each = "ROC AUC" if result["metric"] == "mean_auc" else "share of its images that are found"
        lines += ["", f"| class | {each} |", "|---|---|"]
        lines += [f"| {_plain(name)} | {_percent(value)} |" for name, value in classes.items()]
        lines += ["", "Intervals for each class: `engine.evaluate`."]
    return lines


def _not_for(tuned: Tuned, facts: Facts) -> list[str]:
    found = list(_NOT_FOR)
    if facts.temperature is None:
        found.append(
            "**Probabilities at face value.** They are not calibrated: of answers of 0.9 not 9 in 10 need be right."
        )
    if not tuned.result:
        found.append("**Anything, before it is scored**: no score was recorded with it.")
    return found


def _origin(tuned: Tuned, facts: Facts, distances: Mapping[str, str]) -> dict[str, object]:
    return {
        "run": facts.run,
        "checkpoint": tuned.path.name,
        "SHA-256 of its weights": facts.weights,
        "commit of the code that trained": tuned.result.get("commit"),
        "trained at": tuned.result.get("time"),
        **{f"{form}, compared with the network": said for form, said in distances.items()},
        "licence": "not stated: it follows from the data and from the weights that it starts from",
    }


def _rows(values: Mapping[str, object]) -> list[str]:
    known = [(name, value) for name, value in values.items() if value is not None and value != ""]
    return ["| | |", "|---|---|", *(f"| {name} | {_plain(value)} |" for name, value in known)]


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}%"


def _plain(value: object) -> str:
    """A value within a line of a table of Markdown."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return (
        " ".join(str(value).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    )
