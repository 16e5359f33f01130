"""Tasks of Slurm without a launcher are the ranks of one run, or are refused in one line; never as many runs."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MICRO_SETTINGS

from colt5dist.errors import ConfigError
from colt5dist.train.ranks import Ranks, _complete_environment, ranks_from_environment, threads_of_rank
from colt5dist.train.slurm import first_host, tasks_per_node

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
TWO_TASKS = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7001", "SLURM_NNODES": "1"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher and no scheduler; what a test's start sets is undone."""
    for name in os.environ:
        if name in LAUNCHERS or name.startswith(("SLURM_", "OMPI_", "PMI")):
            monkeypatch.delenv(name)
    for name in LAUNCHERS:  # so that they are removed again
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def place(environment: pytest.MonkeyPatch, **variables: str) -> Ranks:
    """The place that these variables give."""
    for name, value in variables.items():
        environment.setenv(name, value)
    return ranks_from_environment()


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node7", "node7"),
        ("node[01-03,07],login", "node01"),
        ("rack[2-3]node[11,15]", "rack2node11"),
        ("a,b[1-2]", "a"),
        ("n[5].cluster", "n5.cluster"),
    ],
)
def test_first_host_of_a_short_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def test_tasks_of_each_node() -> None:
    assert tasks_per_node("4") == [4]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("") == tasks_per_node("many") == []


def test_tasks_on_several_hosts(environment: pytest.MonkeyPatch) -> None:
    """The address is the first host's, the port is the job's."""
    several = {"SLURM_NTASKS": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NNODES": "3"}
    several |= {"SLURM_STEP_NODELIST": "gpu[08-10]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_JOB_ID": "12345678"}
    assert place(environment, **several) == Ranks(rank=3, local_rank=1, world_size=5, local_world_size=2)
    assert os.environ["MASTER_ADDR"] == "gpu08"
    port = int(os.environ["MASTER_PORT"])
    assert 12_000 <= port < 30_000
    for name in LAUNCHERS:
        environment.delenv(name, raising=False)
    assert place(environment, **several, SLURM_STEP_ID="1") and int(os.environ["MASTER_PORT"]) == port + 1


def test_tasks_that_a_container_has_numbered(environment: pytest.MonkeyPatch) -> None:
    """NVIDIA's enroot sets the variables of a launcher but LOCAL_WORLD_SIZE; a host has only its own tasks."""
    tasks = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NNODES": "2"}
    tasks |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "gpu[1-2]"}
    numbered = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu1", "MASTER_PORT": "50000"}
    assert place(environment, **tasks, **numbered) == Ranks(rank=3, local_rank=1, world_size=4, local_world_size=2)


def test_what_is_set_stays(environment: pytest.MonkeyPatch) -> None:
    place(environment, **TWO_TASKS, SLURM_PROCID="1", MASTER_ADDR="head", MASTER_PORT="5")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], os.environ["RANK"]) == ("head", "5", "1")


def test_a_launcher_inside_a_task_decides(environment: pytest.MonkeyPatch) -> None:
    alone = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1)
    assert place(environment, **TWO_TASKS, SLURM_PROCID="0", RANK="0", WORLD_SIZE="1") == alone


def test_one_task_is_one_process(environment: pytest.MonkeyPatch) -> None:
    """Also in the shell of a job with several tasks, which is a step of one."""
    alone = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1)
    assert place(environment, SLURM_PROCID="0", SLURM_NTASKS="1") == alone
    assert place(environment, SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="1") == alone


def test_threads_are_the_cores_of_a_rank_or_its_share_of_them() -> None:
    """Two tasks that Slurm gave two cores each, two ranks that may use all four of a host, and three that share two."""
    own = [("a", [0, 1]), ("a", [2, 3])]
    shared = [("b", [0, 1, 2, 3])] * 2 + [("c", [0, 1])] * 3
    places = own + shared
    assert [threads_of_rank(places, rank) for rank in range(7)] == [2, 2, 2, 2, 1, 1, 1]


REFUSED = {
    "not by srun": ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM_NTASKS=2: .* all tasks with srun python"),
    "another size": ({**TWO_TASKS, "SLURM_PROCID": "1", "WORLD_SIZE": "4"}, "WORLD_SIZE=4: Slurm has 2 tasks"),
    "no hosts": (
        {**TWO_TASKS, "SLURM_PROCID": "1", "SLURM_NNODES": "2"},
        "SLURM_NTASKS=2: Slurm does not say which of the tasks are on one host",
    ),
    "MPI": ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE=2: MPI has started 2"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.replace(" ", "-"))
def test_refused_in_one_line(case: str, environment: pytest.MonkeyPatch) -> None:
    variables, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as raised:
        place(environment, **variables)
    assert "\n" not in str(raised.value)


def test_two_tasks_train_one_run(tmp_path: Path, run_ranks: Callable[..., str]) -> None:
    script = Path(__file__).with_name("slurm_tasks.py")
    printed = run_ranks(
        script, "4242", f"run_dir={tmp_path}", *MICRO_SETTINGS, "train.steps=1", "train.preflight=true", processes=2
    )
    assert "preflight: 2 ranks, products" in printed
    assert "2 x cpu" in printed and printed.count("finished at step 1") == 1


def test_runs_of_deepspeed_on_one_host_do_not_meet(environment: pytest.MonkeyPatch) -> None:
    """Its default port is replaced: by a free one, or by one that follows from its process; others are kept."""
    environment.setenv("MASTER_PORT", "29500")
    _complete_environment(1)
    assert os.environ["MASTER_PORT"] == "0"
    two = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "LOCAL_SIZE": "2", "MASTER_PORT": "29500"}
    for name, value in two.items():
        environment.setenv(name, value)
    _complete_environment(2)
    port = int(os.environ["MASTER_PORT"])
    assert port == 12_000 + os.getppid() % 18_000
    _complete_environment(2)
    assert os.environ["MASTER_PORT"] == str(port)
    environment.setenv("MASTER_PORT", "29500")
    _complete_environment(4)  # two hosts
    assert os.environ["MASTER_PORT"] == "29500"
