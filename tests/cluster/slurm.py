"""A Slurm cluster of two nodes on this host: munge, one slurmctld, two slurmd, all in one folder."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
NODES = ("n0", "n1")
PORTS = range(17000, 27000)  # outside of what the system hands out; another test run may have taken some

CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
TmpFS={tmp}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=pmix
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
DebugFlags=NO_CONF_HASH
JobRequeue=1
KillWait=5
MinJobAge=300
OverTimeLimit=0
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=FORCE:4
"""


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    absent = [name for name in PROGRAMS if find(name) is None]
    if absent:
        return f"Slurm is not installed: no {', '.join(absent)}"
    return "" if os.geteuid() == 0 else "starting slurmd and munged needs root"


def find(name: str) -> str | None:
    """A program of Slurm or munge; daemons lie in sbin, which is not on everyone's path."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on; begins at random, for runs at the same moment."""
    for first in random.sample(PORTS[:-count], 100):
        taken = []
        try:
            for port in range(first, first + count):
                taken.append(socket.create_server(("127.0.0.1", port)))
            return first
        except OSError:
            continue
        finally:
            for server in taken:
                server.close()
    raise RuntimeError(f"no {count} free ports in a row among {PORTS}")


class Cluster:
    """Starts on `with`, and stops all its daemons on leaving, whatever happened inside."""

    def __init__(self, folder: Path, cpus: int) -> None:
        self.folder = folder
        self._cpus = cpus
        self._port = free_ports(1 + len(NODES))  # slurmctld's, then each node's
        self._daemons: list[subprocess.Popen] = []
        self.env = os.environ | {
            "SLURM_CONF": str(folder / "n0.conf"),
            # Both nodes have this host's name: shared memory between ranks would mix them up, TCP does not.
            "OMPI_MCA_btl": "tcp,self",
            "OMPI_MCA_pml": "ob1",
            "OMPI_MCA_btl_tcp_if_include": "lo",
            "OMPI_MCA_mpi_yield_when_idle": "1",  # ranks may outnumber cores
            "OMP_NUM_THREADS": "1",
            "HOROVOD_CYCLE_TIME": "1",
        }

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / f"tmp-{node}").mkdir()
            # Each node's own TmpFS, or two slurmd on one host would meet in one PMIx directory.
            (self.folder / f"{node}.conf").write_text(self._config(f"{self.folder}/tmp-{node}"))
        key = self.folder / "munge.key"
        subprocess.run([find("mungekey"), "--create", "--keyfile", key], check=True)
        # --force: munge refuses folders that others can write to above it, such as /tmp.
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", f"--key-file={key}",
                     f"--pid-file={self.folder}/munge.pid", f"--seed-file={self.folder}/munge.seed",
                     f"--log-file={self.folder}/munge.log")  # fmt: skip
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-i", "-f", f"{self.folder}/n0.conf")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node, "-f", f"{self.folder}/{node}.conf")
        self._until(self._idle, "the nodes")

    def _config(self, tmp: str) -> str:
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={self._port + 1 + index} "
            f"CPUs={self._cpus} RealMemory=4000"
            for index, node in enumerate(NODES)
        )
        return CONFIG.format(folder=self.folder, tmp=tmp, port=self._port, nodes=nodes)

    def _daemon(self, name: str, *words: str) -> None:
        with open(self.folder / f"{name}-{len(self._daemons)}.out", "w") as log:
            process = subprocess.Popen(
                [find(name), *words], env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._daemons.append(process)

    def _idle(self) -> bool:
        seen = self.command("sinfo", "-h", "-o", "%T %D", check=False).stdout.split()
        return seen == ["idle", str(len(NODES))]

    def _until(self, condition, what: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end or any(process.poll() is not None for process in self._daemons):
                raise RuntimeError(f"{what} did not start:\n{self.logs()}")
            time.sleep(0.1)

    def command(self, *words: object, check: bool = True, timeout: float = 300, **more) -> subprocess.CompletedProcess:
        """Run a Slurm command (or any other) as a user of this cluster."""
        done = subprocess.run(
            [str(word) for word in words], env=self.env | more.pop("env", {}), text=True,
            capture_output=True, timeout=timeout, **more,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}")
        return done

    def show(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        shown = self.command("scontrol", "show", "job", job, "-o").stdout
        return dict(pair.partition("=")[::2] for pair in shown.split())

    def state(self, job: str) -> str:
        """State of a job, such as RUNNING."""
        return self.show(job)["JobState"]

    def hasten(self, job: str, timeout: float = 300) -> None:
        """Wait until a job has gone back into the queue, where Slurm keeps it for two minutes, and let it start."""
        end = time.monotonic() + timeout
        while (found := self.show(job))["Restarts"] == "0" or found["JobState"] != "PENDING":
            if time.monotonic() > end or found["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT"):
                raise AssertionError(f"job {job} did not requeue: {found['JobState']}")
            time.sleep(0.2)
        self.command("scontrol", "update", f"jobid={job}", "StartTime=now")

    def wait(self, job: str, timeout: float = 300, hastened: bool = False) -> str:
        """The state in which a job ended; `hastened`: it does not stay in the queue where it goes back there."""
        end = time.monotonic() + timeout
        while (state := self.state(job)) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED"):
            if time.monotonic() > end:
                raise AssertionError(f"job {job} is still {state} after {timeout} s\n{self.logs()}")
            if hastened and state == "PENDING":
                self.command("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)
            time.sleep(0.2)
        return state

    def logs(self) -> str:
        """The ends of all logs: what a failure shows."""
        ends = []
        for path in sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out")):
            ends.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]))
        return "\n".join(ends)

    def stop(self) -> None:
        """End jobs and daemons, the last started first."""
        if len(self._daemons) > 1:
            subprocess.run([find("scancel"), "--user=root"], env=self.env, capture_output=True, timeout=20)
            time.sleep(0.5)
        for process in reversed(self._daemons):
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._daemons.clear()
