"""A Slurm cluster of two nodes on this machine, in a folder of its own, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil

from tests.helpers.launch import ROOT, free_port

PACKAGES = ("slurmctld", "slurmd", "slurm-client")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
NODES = ("n1", "n2")

# auth/none instead of munge: one user, one machine. A requeue waits cred_expire + 1 seconds.
_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=2
SlurmdTimeout=10
KillWait=60
JobRequeue=1
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1} CPUs=2
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n2} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here, "" where there can: what is not installed is, where that may be done."""
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if not all(shutil.which(name, path=search) for name in PROGRAMS):
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            return "Slurm is not installed, and only root on Debian or Ubuntu could install it"
        _install()
    absent = [name for name in PROGRAMS if not shutil.which(name, path=search)]
    return f"apt-get could not install {', '.join(absent)}" if absent else ""


def _install() -> None:
    """As far as it goes; what came of it is looked at afterwards."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    quick = ["apt-get", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=30"]
    for command in ([*quick, "update"], [*quick, "install", "-y", "--no-install-recommends", *PACKAGES]):
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=environment,
                timeout=180,
                check=False,
            )


class Cluster:
    """Two nodes, started on entry and gone on exit; `submit` and `scontrol` speak to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }  # fmt: skip
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        ports = {"controller": free_port(), **{node: free_port() for node in NODES}}
        conf = _CONF.format(folder=self.folder, user=getpass.getuser(), **ports)
        (self.folder / "slurm.conf").write_text(conf)
        # without it slurmd ends where /sys/fs/cgroup is not mounted, used or not
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self._start("controller", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait(
            "the nodes are not idle",
            lambda: self._run("sinfo", "-h", "-o", "%T", check=False).split() == ["idle"],
            60,
        )
        return self

    def __exit__(self, *_: object) -> None:
        # daemons, those of steps, and what these run
        for process in psutil.process_iter():
            if _environment(process).get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                process.kill()
        for daemon in self._daemons.values():
            daemon.wait()

    def start_node(self, node: str) -> None:
        """Its slurmd."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str, job: str) -> None:
        """As if its power were gone: slurmd, the job's step there and everything it started."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        of_job = []
        for process in psutil.process_iter():
            environment = _environment(process)
            if (environment.get("SLURMD_NODENAME"), environment.get("SLURM_JOB_ID")) == (node, job):
                of_job.append(process)
        # their daemon first: it would report how they ended
        daemons = {
            parent for process in of_job if (parent := process.parent()) and parent.name() == "slurmstepd"
        }
        for process in [*daemons, *of_job]:
            process.kill()

    def submit(self, *arguments: str, environment: dict[str, str]) -> str:
        """sbatch from the repository's folder; the job's id."""
        return self._run("sbatch", "--parsable", *arguments, environment=environment).strip()

    def scontrol(self, *arguments: str) -> str:
        """What it prints."""
        return self._run("scontrol", *arguments)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED ...; "" once it is forgotten."""
        return self._job(job).get("JobState", "")

    def restarts(self, job: str) -> int:
        """How often it was requeued."""
        return int(self._job(job).get("Restarts", -1))

    def signal(self, job: str, name: str) -> None:
        """To the batch script, as Slurm does with --signal=B:NAME."""
        self._run("scancel", "--batch", f"--signal={name}", job)

    def wait(self, otherwise: str, condition, timeout: float) -> None:  # type: ignore[no-untyped-def]
        """Until `condition()`; AssertionError with the controller's log after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{otherwise}:\n{self.logs()}")
            time.sleep(0.1)

    def _job(self, job: str) -> dict[str, str]:
        told = self._run(
            "scontrol", "--oneliner", "show", "job", job, check=False
        )  # the controller may be busy
        return dict(part.split("=", 1) for part in told.split() if "=" in part)

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )

    def _run(self, *command: str, environment: dict[str, str] | None = None, check: bool = True) -> str:
        done = subprocess.run(
            command,
            env=self.environment | (environment or {}),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{at.name}:\n{at.read_text()[-2000:]}" for at in sorted(self.folder.glob("*.log")))


def _environment(process: psutil.Process) -> dict[str, str]:
    """Nothing where it may not be read, or the process has gone."""
    try:
        return process.environ()
    except psutil.Error:
        return {}
