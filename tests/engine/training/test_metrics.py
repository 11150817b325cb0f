from engine.training import metrics


def test_a_resumed_run_has_each_step_once_and_a_cut_line_does_no_harm(tmp_path):
    log = metrics.MetricLog(tmp_path)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 9.0)):
        log.write("train", step, {"loss": loss, "learning_rate": 0.1})
    log.write("val", 3, {"loss": 1.0, "top1": 50.0})
    log.close()
    log = metrics.MetricLog(tmp_path)  # resumed from step 2
    log.write("train", 3, {"loss": 1.5, "learning_rate": 0.1})
    log.close()
    with open(log.path, "a") as file:
        file.write('{"kind": "train", "st')
    events = metrics.read(log.path)
    assert [(e["kind"], e["step"], e["loss"]) for e in events] == [
        ("train", 1, 3.0),
        ("train", 2, 2.0),
        ("train", 3, 1.5),
        ("val", 3, 1.0),
    ]
    metrics.plot_curves(log.path, tmp_path / "curves.png", "a run")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
