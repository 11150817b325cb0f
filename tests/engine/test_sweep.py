import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine import sweep
from engine.comm.communicator import SharedError
from engine.config import typed
from engine.config.loading import recipes
from engine.config.schema import FinetuneConfig
from engine.transfer import record, results, sweep_file
from loaders.errors import UserError
from loaders.packs.writer import Record, ShardWriter, new_attributes
from tests.conftest import ROOT
from tests.support.pictures import encoded, photo
from tests.support.refusals import small_files

IDENTITY = ("dataset", "pretrained_model", "shot", "seed")


@pytest.fixture
def file(digits, tmp_path):
    """Writes a sweep over two targets; keyword arguments take the place of its keys."""

    def write(**changes):
        pack = {"recipe": "demo", "train": str(digits / "high-train.h5"), "test": str(digits / "high-test.h5")}
        content = {
            "name": "study",
            "folder": str(tmp_path / "study"),
            "checkpoints": {"first": "random", "second": "random"},
            "shots": [1, "full"],
            "seeds": [0, 1],
            "set": {"model": "R8x0.25-8px", "rule": {"steps": 2}, "data": {"backend": "host"}},
            "targets": {"high": pack, "short": {**pack, "shots": 2, "seeds": [5], "checkpoints": ["second"],
                                                "set": {"lr": 0.01}}},
        }  # fmt: skip
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(content | changes))
        return tmp_path / "study.yaml"

    return write


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        sweep.main([str(word) for word in words])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_combinations_with_a_targets_own_in_place_of_the_sweeps(file):
    runs = sweep_file.read(file()).runs
    expected = [("high", c, s, n) for c in ("first", "second") for s in ("1", "full") for n in (0, 1)]
    assert [run.key for run in runs] == [*expected, ("short", "second", "2", 5)]
    assert [run.config.lr for run in runs] == [1.0] * 8 + [0.01]
    assert {run.config.rule.steps for run in runs} == {2}


@pytest.mark.parametrize("name", ["007", "on", "null", "a #b", "[x"])
def test_names_are_taken_as_they_are(file, tmp_path, name):
    """A run whose line of results has another name than its target would be done again for ever."""
    target = yaml.safe_load(file().read_text())["targets"]["high"]
    place = str(tmp_path / "a #b")
    runs = sweep_file.read(file(targets={name: target}, checkpoints={5: "random"}, folder=place)).runs
    assert {(run.target, run.config.data.name, run.config.source) for run in runs} == {(name, name, "5")}
    assert {run.config.results for run in runs} == {f"{place}/results.jsonl"}


def test_what_is_named_twice_runs_once(file):
    runs = sweep_file.read(file(shots=[1, "1", 1], seeds=[0, 0])).runs
    assert len(runs) == len({run.key for run in runs})


def test_a_sweep_runs_and_goes_on_where_it_stopped(file, tmp_path, capsys):
    path = file(seeds=[0])
    found = tmp_path / "study" / "results.jsonl"
    code, said, _ = run(capsys, path)
    assert code == 0
    assert "5 runs, 5 to do" in said
    keys = [(line["dataset"], line["pretrained_model"], line["shot"], line["seed"]) for line in lines(found)]
    assert keys == [each.key for each in sweep_file.read(path).runs]
    first = found.read_text().splitlines()
    found.write_text("\n".join(first[:3]) + "\n" + first[3][:40])  # as a kill leaves it
    code, said, _ = run(capsys, path, "--list")
    assert code == 0
    assert said.count("to do ") == 2
    # A cut-off last line must not swallow the next result.
    code, said, _ = run(capsys, path)
    assert "5 runs, 2 to do" in said
    code, said, _ = run(capsys, path)
    assert code == 0
    assert "5 runs, 0 to do" in said
    again = {json.loads(text)["shot"]: json.loads(text) for text in first}
    for line in lines(found)[3:]:
        assert line["metric_value"] == again[line["shot"]]["metric_value"]
    assert len(results.read([found.with_suffix(".csv")])) == 5


@pytest.mark.parametrize("keep", ["none", "best", "all"])
def test_networks_are_kept_as_the_file_says(file, tmp_path, capsys, keep):
    path = file(
        keep=keep, shots=[2], checkpoints={"second": "random"}, set={"model": "R8x0.25-8px", "rule": {"steps": 8}}
    )
    code, said, _ = run(capsys, path)
    assert code == 0
    found = lines(tmp_path / "study" / "results.jsonl")
    kept = sorted(each.parents[2] for each in (tmp_path / "study").glob("networks/**/weights.safetensors"))
    if keep == "none":
        assert kept == [] and {line["path"] for line in found} == {""}
        return
    assert f"networks are in {tmp_path / 'study' / 'networks'}" in said
    values = {line["path"]: line["metric_value"] for line in found}
    high = [line["path"] for line in found if line["dataset"] == "high"]
    (short,) = [line["path"] for line in found if line["dataset"] == "short"]
    expected = sorted([*high, short] if keep == "all" else [max(high, key=values.get), short])
    assert len(high) == 2 and list(map(str, kept)) == expected


def test_runs_of_a_sweep_that_keeps_networks_may_choose_by_validation(file):
    choice = {"keep_best": True, "data": {"val": 0.1}, "model": "R8x0.25-8px"}
    runs = sweep_file.read(file(keep="best", set=choice)).runs
    assert len({run.config.folder for run in runs}) == len(runs) == 9
    with pytest.raises(UserError, match="keep_best=true needs"):
        sweep_file.read(file(set=choice))
    with pytest.raises(UserError, match="keep: some; expected none, best, all"):
        sweep_file.read(file(keep="some"))


def test_of_scores_that_are_none_the_other_is_kept(file, tmp_path):
    """And networks of runs without a result are nobody's business."""
    sweep = sweep_file.read(file(keep="best", shots=[2], seeds=[0, 1, 2], checkpoints={"second": "random"}))
    runs = [each for each in sweep.runs if each.target == "high"]
    for each in runs:
        Path(each.config.folder).mkdir(parents=True)
    sweep.prune()
    assert len(set(map(os.path.isdir, [each.config.folder for each in runs]))) == 1
    sweep.results.write_text("".join(
        json.dumps(dict(zip(IDENTITY, each.key, strict=True)) | {"metric": "mean_auc", "metric_value": value}) + "\n"
        for each, value in zip(runs, (float("nan"), 50.0), strict=False)
    ))  # fmt: skip
    sweep.prune()
    assert [os.path.isdir(each.config.folder) for each in runs] == [False, True, True]


def test_classes_with_fewer_images_than_shots_are_named(file, capsys):
    _, said, _ = run(capsys, file(seeds=[0], shots=1000, checkpoints={"second": "random"}))
    first = next(line for line in said.splitlines() if "1000 shots" in line)
    assert "fewer than 1000 images, all taken: 5 (" in first
    assert "fewer" not in said.splitlines()[-1]  # the target with two shots


def test_workers_share_the_runs(file, tmp_path):
    path = file(seeds=[0], targets={"high": yaml.safe_load(file().read_text())["targets"]["high"]})
    done = subprocess.run([sys.executable, "-m", "engine.sweep", path, "--workers", "2"], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(line["shot"] for line in lines(tmp_path / "study" / "results.jsonl")) == ["1", "1", "full", "full"]
    assert (tmp_path / "study" / "results.csv").exists()


@pytest.mark.parametrize("array", [1, 2])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("ranks", [1, 4])
def test_shares_are_disjoint_and_complete(array, workers, ranks):
    """Of array tasks, of their workers, and of a launcher's ranks, all at once."""
    runs, pieces = list(range(53)), []
    for task in range(array):
        slurm = {"ID": 3 + 2 * task, "MIN": 3, "STEP": 2, "COUNT": array}  # --array=3-5:2
        env = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in slurm.items()} if array > 1 else {}
        for worker in range(workers):
            part = sweep.asked(None, env).part(worker, workers)
            again = sweep.asked(f"{part.index}/{part.count}", env)  # as a worker is told
            pieces += [run for rank in range(ranks) for run in again.part(rank, ranks).of(runs)]
    assert sorted(pieces) == runs


def test_runs_that_another_process_is_at_are_left_to_it(file, tmp_path, capsys, monkeypatch):
    """First the others are done; what the other has finished by then is not done again."""
    path = file(seeds=[0], shots=1)
    read = sweep_file.read(path)
    first, second, last = read.runs
    theirs = [sweep._lock(read, each) for each in (first, second)]
    for lock in theirs:
        lock.take()
    whole, said = sweep.finetune, []

    def meanwhile(config, comm, **how):
        said.append(whole(config, comm, **how))
        if len(said) == 1:
            settings = {"settings": record.fingerprint(second.config)}
            record.append(read.results, said[0] | dict(zip(IDENTITY, second.key, strict=True)) | settings)
            theirs[1].release()
        return said[-1]

    monkeypatch.setattr(sweep, "finetune", meanwhile)
    code, out, error = run(capsys, path)
    assert code == 75
    assert [line["pretrained_model"] for line in said] == [last.checkpoint]
    assert re.search(rf"{first.title}.* is in use since .* by process {os.getpid()} on", out)
    assert "1 runs are left to other processes" in error
    theirs[0].release()
    assert run(capsys, path)[0] == 0
    assert len(said) == 2
    assert not list((tmp_path / "study").glob(".*"))


def test_results_of_other_settings_are_not_taken_for_these(file, tmp_path, capsys):
    path = file(seeds=[0], shots=1)
    assert run(capsys, path)[0] == 0
    before = (tmp_path / "study" / "results.jsonl").read_text()
    file(seeds=[0], shots=1, set={"model": "R8x0.25-8px", "rule": {"steps": 3}})
    code, _, said = run(capsys, path)
    assert code == 2
    assert "first → high, 1 shot, seed 0 with other settings" in said
    assert (tmp_path / "study" / "results.jsonl").read_text() == before


def test_results_of_another_program_are_told_before_anything_runs(file, tmp_path, capsys):
    path = file(seeds=[0], shots=1)
    (tmp_path / "study").mkdir()
    for text in ('{"loss": 1}\n', "hello\n", '{"dataset": [], "pretrained_model": 1, "shot": 1, "seed": 0}\n'):
        (tmp_path / "study" / "results.jsonl").write_text(text)
        code, _, said = run(capsys, path)
        assert code == 2
        assert "line 1 is no result of engine.finetune" in said
        assert (tmp_path / "study" / "results.jsonl").read_text() == text


def test_processes_that_end_at_the_same_moment_write_one_table(file, tmp_path, capsys):
    path = file(seeds=[0], shots=1)
    assert run(capsys, path)[0] == 0
    text = "from pathlib import Path; from engine import sweep; from engine.transfer import sweep_file\n"
    text += f"s = sweep_file.read(Path({str(path)!r}))\n"
    text += "for _ in range(300): sweep.collect(s)"
    both = [subprocess.Popen([sys.executable, "-c", text], cwd=ROOT) for _ in range(2)]
    assert [each.wait(timeout=300) for each in both] == [0, 0]
    assert len(results.read([tmp_path / "study" / "results.csv"])) == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_the_workers_of_a_sweep_end_with_it(file, tmp_path, number, code):
    """Its own output ends only when the last process that holds it does."""
    path = file(set={"model": "R8x0.25-8px", "rule": {"steps": 100_000}})
    command = [sys.executable, "-m", "engine.sweep", str(path), "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    begun = ""
    while begun.count("to do of which") < 2:
        begun += process.stdout.readline()
    process.send_signal(number)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == code
    assert said.count("the same command does the runs that are missing") == 2
    assert not (tmp_path / "study" / "results.jsonl").read_text()


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(file, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    code, said, error = run(capsys, file(seeds=[0], shots=1, folder=str(tmp_path / "taken")))
    assert code == 2
    assert "results.jsonl cannot be written" in error and "[1/" not in said


def test_results_that_find_no_room_are_not_lost(file, capsys, monkeypatch, tmp_path):
    def full(config, comm, **how):
        line = {
            "metric_value": 50.0,
            "metric": "top1",
            "seed": config.seed,
            "shot": config.shots,
            "short_classes": 0,
            "pretrained_model": config.source,
            "dataset": config.data.name,
            "settings": record.fingerprint(config),
        }
        with small_files(1500):  # room for some of the lines
            record.append(Path(config.results), line | {"pad": "x" * 200})
        return line

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sweep, "finetune", full)
    path = file(seeds=[0, 1, 2], shots=1)
    code, said, error = run(capsys, path)
    found = lines(sweep_file.read(path).results)
    assert code == 0 and {tuple(line[name] for name in IDENTITY) for line in found} == {
        run.key for run in sweep_file.read(path).runs
    }
    assert error.count("cannot be written: File too large") == error.count('"pad"') > 0 and len(found) == 7
    code, said, error = run(capsys, path)
    assert code == 0 and " 0 to do" in said and not error


@pytest.mark.parametrize(("share", "does"), [("0/2", 3), ("1/2", 2), ("0/1", None), (None, None)])
def test_a_share_says_how_many_of_the_runs_it_does(file, capsys, monkeypatch, share, does):
    def fails(config, comm, **how):
        raise UserError("not now")

    monkeypatch.setattr(sweep, "finetune", fails)
    code, said, error = run(capsys, file(seeds=[0]), *(["--share", share] if share else []))
    assert code == 1
    assert f"5 runs, 5 to do{f' of which this process does {does}' if does else ''}; results in" in said
    assert error.count("failed: ") == (does or 5)


@pytest.mark.parametrize("kind", [SharedError, UserError])
def test_a_run_that_diverges_does_not_end_the_others(file, capsys, monkeypatch, kind):
    whole = sweep.finetune

    def one_fails(config, comm, **how):
        if config.source == "first":
            raise kind("the loss is nan")
        return whole(config, comm, **how)

    monkeypatch.setattr(sweep, "finetune", one_fails)
    code, said, error = run(capsys, file(seeds=[0], shots=1))
    assert code == 1
    assert "failed: the loss is nan" in said
    assert error == "failed: first → high, 1 shot, seed 0\n"
    assert "[3/3] second → short" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"sots": 1}, "nearest known key is shots"), ({"checkpoints": {}}, "has no checkpoints"),
     ({"checkpoints": {"a": "runs/absent"}}, "there is no checkpoint runs/absent"),
     ({"targets": {"a": {"train": "x.h5"}}}, "test: … is missing"),
     ({"targets": {"a": {"recipe": "demo", "train": "x.h5", "test": "y.h5"}}}, "no pack at x.h5"),
     ({"targets": {"a": "x.h5"}}, "expected keys such as train"), ({"targets": ["a"]}, "expected a name and a value"),
     ({"shots": [0]}, "shots=0"), ({"shots": ["few"]}, "shots=few"), ({"seeds": ["x"]}, "seed"),
     ({"set": {"lr": 0, "model": "R8x0.25-8px"}}, "lr=0"), ({"set": {"rule": {"step": 1}}}, "rule.steps"),
     ({"set": {"rule": {"steps": 0}}}, "rule.steps=0"), ({"set": {"data": {"size": -1}}}, "data.size=-1"),
     ({"shots": ["²"]}, "shots=²"), ({"seeds": [-1]}, "seed=-1"), ({"seeds": [True]}, "true is not a whole number"),
     ({"seeds": []}, "nothing would run"), ({"set": ["lr=3"]}, "expected settings"),
     ({"set": {"shots": 7}}, "say it with shots: …"), ({"set": {"data": {"name": "x"}}}, "say it with targets: …"),
     ({"targets": {"a": {"train": [["x.h5"]], "test": 5}}}, "expected the file of a pack"),
     ({"set": {}}, "of which network"),
     ({"set": {"model": "R50x5"}}, "no network is called 'R50x5'")],
)  # fmt: skip
def test_a_sweep_that_cannot_run_does_not_start(file, tmp_path, capsys, changes, said):
    code, _, error = run(capsys, file(**changes))
    assert code == 2
    assert error.startswith("error: ")
    assert said in error
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(("text", "said"), [("- a", "no mapping"), ("a: [", "YAML"), (None, "cannot be read")])
def test_what_is_no_sweep(tmp_path, capsys, text, said):
    path = tmp_path / "x.yaml"
    if text:
        path.write_text(text)
    code, _, error = run(capsys, path)
    assert code == 2
    assert said in error


@pytest.mark.parametrize("words", [["--share", "3/3"], ["--share", "one"], ["--workers", "0"]])
def test_shares_that_cannot_be(file, capsys, words):
    code, _, error = run(capsys, file(), *words)
    assert code == 2
    assert words[0] in error


def test_few_shots_of_label_vectors_are_refused_before_anything_runs(file, tmp_path, capsys):
    for name in ("train", "test"):
        (attributes,) = new_attributes({"source": "made up", "kind": "test"}, 1)
        with ShardWriter(tmp_path / f"{name}.h5", ["a", "b"], attributes) as writer:
            for i in range(4):
                writer.add(Record(encoded(photo(i + 10 * len(name), 8, 8)), f"{i}", [float(i % 2), 1.0], 8, 8))
            writer.finish()
            writer.publish()
    target = {"recipe": "xray", "train": str(tmp_path / "train.h5"), "test": str(tmp_path / "test.h5")}
    code, _, error = run(capsys, file(targets={"vectors": target}))
    assert code == 2
    assert "several labels per image" in error
    assert "say shots: full" in error
    target |= {"shots": "full", "seeds": [0, 1], "set": {"data": {"size": 8}}}
    code, said, error = run(capsys, file(targets={"vectors": target}))
    assert code == 0, error
    assert said.count("vectors:\npositive of known  train (4)") == 1  # before the runs, once
    assert "1 of 2 labels have no AUC" in said and "test set knows only one value of them: b" in said
    assert said.count("mean auc") == said.count("over 1 labels") == 4


def test_images_that_are_trained_and_scored_on_are_told(file, digits, tmp_path, capsys):
    train, test = (str(digits / f"high-{part}.h5") for part in ("train", "test"))
    target = {"recipe": "demo", "train": [train, test], "test": test}
    code, _, error = run(capsys, file(targets={"leaky": target}), "--list")
    assert code == 2
    assert "all 269 images of test are in train too" in error and "data.overlap=allow" in error
    target |= {"set": {"data": {"overlap": "allow"}}}
    code, said, _ = run(capsys, file(targets={"leaky": target}), "--list")
    assert code == 0
    assert said.startswith("leaky:\nwarning: 269 of 269 images of test are in train too")


def test_a_variable_that_is_not_set_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RUNS", raising=False)
    monkeypatch.delenv("PACKS", raising=False)
    code, _, error = run(capsys, ROOT / "jobs" / "tables.yaml")
    assert code == 2
    assert "RUNS" in error and "export" in error
    for name in ("RUNS", "PACKS"):
        monkeypatch.setenv(name, str(tmp_path))
    _, _, error = run(capsys, ROOT / "jobs" / "tables.yaml")
    assert "imagenet21k_r152x4" in error and "24 in all" in error


def test_the_sweep_of_the_papers_tables_has_every_cell():
    """As bench/paper/published/layout.yaml has the tables, which its own test holds against the paper."""
    content = yaml.safe_load((ROOT / "jobs" / "tables.yaml").read_text())
    layout = yaml.safe_load((ROOT / "bench" / "paper" / "published" / "layout.yaml").read_text())
    assert set(content["checkpoints"]) <= set(recipes("pretrain"))
    for target, settings in content["targets"].items():
        assert target in recipes("finetune")
        cells = {
            f"{'imagenet1k_cosine' if source == 'imagenet1k' else source}_{network.lower()}"
            for table in layout["tables"].values()
            for source in table["rows"].get(target, [])
            if source
            for network in layout["networks"]
        }
        assert cells == set(settings["checkpoints"])
    assert set(content["targets"]) == set(layout["targets"])


def test_the_sweep_of_the_papers_tables_is_one_for_the_program(tmp_path, digits, monkeypatch):
    for name in ("cifar10", "tuberculosis", "nih-published"):
        for part in ("train", "test"):
            shutil.copy(digits / f"high-{part}.h5", tmp_path / f"{name}-{part}.h5")
    content = yaml.safe_load((ROOT / "jobs" / "tables.yaml").read_text())
    content["targets"] = {name: content["targets"][name] for name in ("cifar10", "tuberculosis", "nih")}
    for name in content["checkpoints"]:
        (tmp_path / name / "best").mkdir(parents=True)
    (tmp_path / "tables.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.setenv("PACKS", str(tmp_path))
    monkeypatch.setenv("RUNS", str(tmp_path))
    runs = sweep_file.read(tmp_path / "tables.yaml").runs
    assert len(runs) == 5 * (4 * 6 + 12 * 5 + 10)
    assert runs[0].config.data.train == str(tmp_path / "cifar10-train.h5")


def test_text_in_a_sweep_stays_as_typed():
    """Through the words that a sweep makes of its settings, and in its file."""
    content = typed.read_as_typed("a: 010\nb: [1e5, no]\nc: null\nd:\n  e: 'run #3'\n  f: 0.5\n  g: ''\n")
    assert content == {"a": "010", "b": ["1e5", "no"], "c": None, "d": {"e": "run #3", "f": "0.5", "g": ""}}
    words = sweep_file.settings(content)
    assert words == ["a=010", "b=[1e5, 'no']", "c=null", "d.e=run #3", "d.f=0.5", "d.g=''"]
    for text in ["010", "null", "'quoted'", " spaced ", "[list]", "a: b #c", "no", ""]:
        word = typed.as_word("source", text)
        assert typed.from_word(FinetuneConfig, *word.split("=", 1)) == (True, text)


@pytest.mark.parametrize("text", ["", " ", None])
def test_empty_variables_of_an_array_are_absent(text):
    env = {} if text is None else dict.fromkeys(("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"), text)
    assert sweep.asked(None, env) == sweep.Share(0, 1)


def test_variables_of_an_array_that_are_no_numbers_are_named():
    with pytest.raises(UserError, match="SLURM_ARRAY_TASK_ID=x"):
        sweep.asked(None, {"SLURM_ARRAY_TASK_ID": "x"})
