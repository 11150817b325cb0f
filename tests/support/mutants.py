"""Do the tests notice small faults? A sample of them, each in a copy of the tree, judged by its module's own tests.

    python -m tests.support.mutants --n 200 --json docs/results/mutants.json     (make mutants)

What came of each fault is kept in build/mutants.jsonl, so that a run that was stopped goes on, and one after a change
judges only what the change may have altered: a fault whose module or tests have another text. Survivors that no test
could notice stand in tests/support/mutants.yaml, with the reason.
"""

import argparse
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

import yaml

from tests.support.mutations import Mutation, sample
from tests.support.own_tests import ROOT, modules, tests_of

BAR = 0.9  # of the faults that a test could notice, this share must be
EQUIVALENT = Path(__file__).with_name("mutants.yaml")
WARM = ("torch", "torchvision", "torchxrayvision", "timm", "torch.utils.tensorboard", "torch.utils.flop_counter",
        "scipy.stats", "sklearn.datasets", "pandas", "matplotlib.pyplot", "h5py", "omegaconf")  # fmt: skip


def equivalent() -> dict[tuple[str, str, str], str]:
    """(module, lines before, lines after) → why no test could notice."""
    entries = yaml.safe_load(EQUIVALENT.read_text()) or []
    return {(entry["module"], entry["before"], entry["after"]): entry["why"] for entry in entries}


def copy_tree(target: Path) -> None:
    """What git tracks or would track, and the extension that was built."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / line for line in listed.stdout.splitlines()] + list((ROOT / "engine").glob("_C*.so"))
    for file in files:
        if file.is_file():
            place = target / file.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)


class Unsound(RuntimeError):
    """Tests that fail without any fault: they can judge none."""


class Worker:
    """A copy of the tree and a warm process in it. `close` removes both."""

    def __init__(self, warm=WARM, copy=copy_tree):
        self._folder = tempfile.TemporaryDirectory(prefix="mutants-")
        self.root = Path(self._folder.name, "tree")
        copy(self.root)
        shared = os.environ.get("BOOSTERBIT_SHARED", str(ROOT.parent / "shared"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm", *warm],
            cwd=self.root,
            env={"OMP_NUM_THREADS": "1"} | os.environ | {"BOOSTERBIT_SHARED": shared, "TMPDIR": self._folder.name},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, tests: list[str], **more) -> dict:
        """Run tests in a fork of the warm process: tests.support.warm says what it takes and answers."""
        self._process.stdin.write(json.dumps({"tests": tests, **more}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that runs tests ended with {self._process.wait()}")
        return json.loads(answer)

    def log(self) -> str:
        return Path(self._folder.name, "tests.log").read_text()

    def sound(self, tests: list[str], seconds: dict[str, float], patience: float | None) -> dict[str, float]:
        """Seconds of each test without a fault; `seconds`: what was known of that.

        Twice where nothing was: in the order of the files, then the fastest first, as they will be run.
        """
        for _ in range(1 if seconds else 2):
            found = self.run(tests, seconds=seconds, patience=patience, timeout=3600, sound=True)
            if found["outcome"] != "passed":
                raise Unsound(f"{found['outcome']} without any fault: {found['by']}\n{self.log()[-3000:]}")
            seconds = found["each"]
        return seconds

    def judge(
        self,
        mutation: Mutation,
        tests: list[str],
        seconds: dict[str, float],
        patience: float | None = None,
        least: float = 30,
    ) -> dict:
        """Plant the fault in the copy, run the tests, take it out again.

        They get three times what they took without it, and `least` seconds more.
        """
        path = self.root / mutation.module
        for cached in path.parent.glob(f"__pycache__/{path.stem}.*"):
            cached.unlink()  # Python knows a changed file by its second and its size only
        path.write_text(mutation.text)
        timeout = 3 * sum(s for s in seconds.values() if patience is None or s <= patience) + least
        try:
            found = self.run(tests, seconds=seconds, patience=patience, timeout=timeout, sound=False)
        finally:
            path.write_text(mutation.source)
        names = {"passed": "survived", "failed": "killed", "timeout": "timeout"}
        return {"outcome": names[found["outcome"]], "by": found["by"], "seconds": found["seconds"]}

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()


def digest(paths: list[Path]) -> str:
    """Of the text of files, and of all files in folders."""
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


class Campaign:
    """Judges faults with several workers, keeps each outcome in a file as it comes, and says how far it is.

    With `patience`, tests that take more seconds than that are left out.
    """

    def __init__(self, outcomes: Path, workers: int, patience: float | None = None):
        self._file, self._workers, self._patience, self._lock = outcomes, workers, patience, threading.Lock()
        outcomes.parent.mkdir(parents=True, exist_ok=True)
        lines = outcomes.read_text().splitlines() if outcomes.exists() else []
        self._known = {tuple(entry["key"]): entry for entry in map(json.loads, lines)}
        self._seconds = {test: s for entry in self._known.values() for test, s in entry.get("each", {}).items()}

    def _keep(self, key: tuple, entry: dict) -> None:
        with self._lock:
            self._known[key] = {"key": key, **entry, "patience": self._patience}
            self._seconds |= entry.get("each", {})
            with self._file.open("a") as file:
                file.write(json.dumps(self._known[key]) + "\n")

    def _settled(self, key: tuple) -> bool:
        """Whether an outcome is known, and more patience could not change it."""
        known = self._known.get(key)
        if known is None:
            return False
        limit = known["patience"]
        return known.get("outcome") in ("killed", "timeout") or limit is None or limit == self._patience

    def judge(self, mutations: list[Mutation]) -> list[dict]:
        """What came of each, in their order. Tests that change meanwhile are not seen before the next call."""
        own = [tuple(tests_of(mutation.module)) for mutation in mutations]
        sound = {tests: ("sound", digest([ROOT / test for test in tests])) for tests in own}
        keys = [_key(mutation, sound[tests][1]) for mutation, tests in zip(mutations, own, strict=True)]
        work: queue.Queue = queue.Queue()
        for tests, index in sorted((tests, index) for index, tests in enumerate(own)):
            if not self._settled(keys[index]):
                work.put((mutations[index], keys[index], list(tests), sound[tests]))
        total, start, errors, unsound = work.qsize(), time.monotonic(), [], []
        print(f"{len(mutations) - total} of {len(mutations)} known from {self._file}, {total} to judge", flush=True)

        def labour():
            worker = Worker()
            try:
                while not errors:
                    try:
                        self._one(worker, *work.get_nowait())
                    except Unsound as error:  # the others can be judged meanwhile
                        print(error, flush=True)
                        unsound.append(error)
                    done = total - work.qsize()
                    rest = (time.monotonic() - start) / done * (total - done)
                    print(f"  {done}/{total}, {rest / 60:.0f} min to go", flush=True)
            except queue.Empty:
                return
            except Exception as error:  # the others stop, and the caller sees it
                errors.append(error)
            finally:
                worker.close()

        threads = [threading.Thread(target=labour) for _ in range(min(self._workers, total))]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            errors.append(KeyboardInterrupt("the others stop after the fault at hand"))
            for thread in threads:
                thread.join()
        if errors or unsound:
            raise (errors + unsound)[0]
        return [self._known[key] for key in keys]

    def _one(self, worker: Worker, mutation: Mutation, key: tuple, tests: list[str], sound: tuple) -> None:
        if not self._settled(sound):
            known = {test: s for test, s in self._seconds.items() if test.partition("::")[0] in tests}
            self._keep(sound, {"tests": tests, "each": worker.sound(tests, known, self._patience)})
        self._keep(key, worker.judge(mutation, tests, self._known[sound]["each"], self._patience))
        before, after = mutation.change
        found = self._known[key]
        print(f"{found['outcome']} in {found['seconds']} s: {mutation.module}:{mutation.line}\n- {before}\n+ {after}")


def _key(mutation: Mutation, tests: str) -> tuple:
    """By which an outcome is known again: the fault, the text of its module, and of the tests."""
    source = hashlib.sha256(mutation.source.encode()).hexdigest()[:16]
    return (mutation.module, source, mutation.operator, mutation.occurrence, tests)


def judged(mutations: list[Mutation], file: Path, workers: int, patience: float) -> list[dict]:
    """What came of each: first by the tests that take no longer than `patience`; what survived these, by all."""
    reasons = equivalent()
    found = Campaign(file, workers, patience).judge(mutations)
    doubtful = [
        index
        for index, mutation in enumerate(mutations)
        if found[index]["outcome"] == "survived" and (mutation.module, *mutation.change) not in reasons
    ]
    again = Campaign(file, workers).judge([mutations[index] for index in doubtful])
    for index, entry in zip(doubtful, again, strict=True):
        found[index] = entry
    return found


def report(mutations: list[Mutation], outcomes: list[dict]) -> dict:
    """Counts, and a line for each fault."""
    reasons, faults = equivalent(), []
    for mutation, found in zip(mutations, outcomes, strict=True):
        before, after = mutation.change
        fault = {"module": mutation.module, "line": mutation.line, "before": before, "after": after}
        fault |= {"operator": mutation.operator, "outcome": found["outcome"]}
        if found["outcome"] == "survived":
            why = reasons.get((mutation.module, before, after))
            fault |= {"outcome": "equivalent", "why": why} if why else {}
        else:
            fault["by"] = found["by"]
        faults.append(fault)
    counts = Counter(fault["outcome"] for fault in faults)
    killed = counts["killed"] + counts["timeout"]
    return {
        "n": len(faults),
        "killed": killed,
        "survived": counts["survived"],
        "equivalent": counts["equivalent"],
        "share": round(killed / max(killed + counts["survived"], 1), 4),
        "faults": faults,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="paths of modules; default: all")
    parser.add_argument("--n", type=int, default=200, help="faults in the sample (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides which (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="faults judged at a time (%(default)s)")
    parser.add_argument(
        "--patience", type=float, default=5, help="leave out tests that take longer, until the end (%(default)s s)"
    )
    parser.add_argument("--outcomes", type=Path, default=ROOT / "build" / "mutants.jsonl", help="(%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the sample and judge nothing")
    parser.add_argument("--json", type=Path, help="write the record")
    arguments = parser.parse_args()
    chosen = sample(ROOT, arguments.modules or modules(), arguments.n, arguments.seed)
    if arguments.list:
        for mutation in chosen:
            print(f"{mutation.module}:{mutation.line}", *mutation.change, sep="\n    ")
        return
    from bench.measured.timing import commit, hardware, versions

    machine = hardware()  # before this run is itself the load
    outcomes = judged(chosen, arguments.outcomes, arguments.workers, arguments.patience)
    found = report(chosen, outcomes)
    for fault in found["faults"]:
        if fault["outcome"] == "survived":
            print(f"\nsurvived: {fault['module']}:{fault['line']}\n- {fault['before']}\n+ {fault['after']}")
    said = "{killed} noticed, {survived} not: {share:.1%}; {equivalent} equivalent"
    print(f"\n{said.format_map(found)}")
    if arguments.json:
        facts = {
            "command": "make mutants",
            "tool": f"cosmic-ray {metadata.version('cosmic-ray')}",
            "seed": arguments.seed,
            "commit": commit(),
            "hardware": machine,
            "versions": versions(),
            "spread": f"counts of one sample, seed {arguments.seed}",
            "supports": ["tests"],
        }
        arguments.json.write_text(json.dumps(facts | found, indent=1, ensure_ascii=False) + "\n")
    sys.exit(found["share"] < BAR)


if __name__ == "__main__":
    main()
