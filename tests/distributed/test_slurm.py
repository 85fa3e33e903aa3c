"""The shipped batch script on a real Slurm of two nodes: warned, requeued and with a node lost, a job trains to its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import slurm
from tests.helpers.launch_environment import launch_environment
from tests.helpers.runs import CONFIG, Run, Workplace, losses

SCRIPT = "launch/slurm/pretrain.sbatch"
LONGER = ("training.steps=400", "training.save_interval=25", "training.eval_interval=100")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    why = slurm.missing()
    if why:
        pytest.skip(f"there is no Slurm: {why}")
    with slurm.Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def reference(workplace: Workplace) -> Run:
    """Two ranks that nobody interrupts."""
    return workplace.start("alone", *LONGER, ranks=2).finish()


class Job:
    """A submitted job and its output folder."""

    def __init__(self, cluster: slurm.Cluster, workplace: Workplace, name: str) -> None:
        self.cluster, self.out, self.log = cluster, workplace.folder / name, workplace.folder / f"{name}.out"
        environment = launch_environment(workplace.folder / f"venv-{name}")
        environment |= {"CONFIG": str(CONFIG), "NPROC": "1", "GLOO_SOCKET_IFNAME": "lo"}
        given = [*workplace.overrides, *LONGER, f"training.output_dir={self.out}"]
        self.id = cluster.submit("--nodes=2", f"--output={self.log}", SCRIPT, *given, environment=environment)

    def wait_for_step(self, step: int, restarts: int) -> None:
        """Until the job's start after `restarts` requeues has done `step` steps."""
        self.cluster.wait(
            f"step {step} was not reached",
            lambda: (
                self.cluster.restarts(self.id) == restarts
                and self.cluster.state(self.id) == "RUNNING"
                and self.text().count("training tokens") > restarts
                and self.steps() >= step
            ),
            150,
        )

    def finish(self) -> None:
        self.cluster.wait(
            "the job did not end", lambda: self.cluster.state(self.id) in ("COMPLETED", "FAILED"), 150
        )
        assert self.cluster.state(self.id) == "COMPLETED", f"{self.text()[-6000:]}\n{self.cluster.logs()}"

    def steps(self) -> int:
        path = self.out / "losses.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def test_through_warning_requeue_and_a_lost_node(
    cluster: slurm.Cluster, workplace: Workplace, reference: Run
) -> None:
    """Every bit of every step is an uninterrupted run's."""
    job = Job(cluster, workplace, "job")
    job.wait_for_step(10, restarts=0)
    cluster.signal(job.id, "USR1")
    job.wait_for_step(110, restarts=1)
    cluster.scontrol("requeue", job.id)
    job.wait_for_step(210, restarts=2)
    cluster.kill_node("n2", job.id)
    cluster.wait("the job was not requeued", lambda: cluster.restarts(job.id) == 3, 90)
    cluster.start_node("n2")
    job.finish()
    assert losses(job.out) == reference.losses()


def test_what_to_train_is_asked_for(cluster: slurm.Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = launch_environment(tmp_path / "venv") | {"MODEL": "qwen9", "CONTEXT": "1m"}
    job = cluster.submit(f"--output={log}", SCRIPT, environment=environment)
    cluster.wait("the job did not end", lambda: cluster.state(job) == "FAILED", 60)
    assert "MODEL is 'qwen9' and CONTEXT is '1m', which name no recipe; configs/run has " in log.read_text()
