"""Settings of all tests: Triton's interpreter without a GPU, skipped tests that need one, shared fixtures."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

if "PYTEST_XDIST_WORKER" in os.environ:  # the other workers have the other cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell ignores Ctrl-C in what it starts in the background; the commands that tests start would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

if not torch.cuda.is_available():
    # read when a kernel is decorated, so it must be set before the package is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest

# a slow machine is no error; and a failure in one run must occur in the next run too
hypothesis.settings.register_profile("colt5dist", deadline=None, derandomize=True)
hypothesis.settings.load_profile("colt5dist")

ROOT = Path(__file__).resolve().parent.parent
TRAINER_VARIABLES = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""Environment variables of processes that train in tests: one thread each, no GPU."""
sys.path.insert(0, str(ROOT / "tests"))

from forks import ForkServer  # noqa: E402

MICRO_SETTINGS = (
    "model.vocab_size=384",
    "model.d_model=32",
    "model.num_encoder_layers=2",
    "model.num_decoder_layers=1",
    "model.head_dim=8",
    "model.num_heads=4",
    "model.num_light_heads=1",
    "model.num_heavy_heads=3",
    "model.light_ff_dim=32",
    "model.heavy_ff_dim=128",
    "model.ff_dim=64",
    "model.light_radius=15",
    "model.router_n_iters=20",
    "data.input_length=256",
    "data.target_length=64",
    "data.num_workers=0",
    "train.steps=4",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.log_every=1",
    "train.eval_every=0",
    "train.eval_samples=8",
    "train.routing_every=2",
    "schedule.warmup_steps=4",
    "zero.persistence_threshold=0",
    "train.compile=off",
    "monitor.held_out_sample=false",
)
"""A complete CoLT5 of some ten thousand parameters, as settings of a run; the threshold makes stage 3 shard even its
smallest ones."""

TINY_MODEL = {
    "vocab_size": 384,
    "d_model": 32,
    "num_decoder_layers": 1,
    "head_dim": 8,
    "num_heads": 4,
    "num_light_heads": 1,
    "num_heavy_heads": 3,
    "light_ff_dim": 24,
    "heavy_ff_dim": 64,
    "ff_dim": 48,
    "light_radius": 15,
    "router_n_iters": 20,
}
"""Fields of a `CoLT5Config` of about that size, for models that are not trained."""


def pytest_configure(config: pytest.Config) -> None:
    """Begin files in their order: by number of tests, as pytest-xdist has it, the longest single test would be last."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run three files at a time if all tests are run, as some only wait; selected tests run in this process."""
    chosen = config.option.markexpr or config.option.keyword or config.args_source is config.ArgsSource.ARGS
    return 0 if chosen else min(3, len(os.sched_getaffinity(0)) + 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without a CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed PyTorch by the name of the test, so that it does not depend on the tests that ran before."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


@pytest.fixture(scope="session", autouse=True)
def shard_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for this test session: tests build the standard library's shards once, only for themselves.

    With `pytest -n` all processes share it; building is safe for that.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"
    folder.mkdir(exist_ok=True)
    os.environ["COLT5DIST_CACHE"] = str(folder)
    return folder


def random_text(rng: random.Random, num_bytes: int) -> str:
    """Make words of random letters, `num_bytes` long in all."""
    text = " ".join("".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(num_bytes // 2 + 1))
    return text[:num_bytes]


def write_short_texts(folder: Path, num_documents: int) -> Path:
    """Write shards of documents that give the micro model about one sample each; equal on every machine."""
    from colt5dist.data.prepare.held_out_split import CorpusWriter
    from colt5dist.data.tokenizer import ByteTokenizer

    rng = random.Random(1)
    writer = CorpusWriter(folder, ByteTokenizer(), validation_fraction=0.1)
    for _ in range(num_documents):
        writer.add(random_text(rng, 300))
    writer.close({})
    return folder


@pytest.fixture(scope="session")
def short_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the shards that `write_short_texts` writes."""
    return write_short_texts(tmp_path_factory.mktemp("short-texts") / "shards", 150)


@pytest.fixture(scope="session")
def make_text() -> Callable[[random.Random, int], str]:
    """The function random_text."""
    return random_text


@pytest.fixture(scope="session")
def micro_settings() -> tuple[str, ...]:
    """Settings of a run small enough to train within a test."""
    return MICRO_SETTINGS


def load_script(name: str) -> ModuleType:
    """Load a script of launch/ as a module."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pretrain_main(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], int]:
    """`main` of launch/pretrain.py, in a folder without runs: the checkout may have some, with other settings."""
    monkeypatch.chdir(tmp_path_factory.mktemp("without_runs"))
    return load_script("pretrain").main


Pretrain = Callable[..., subprocess.CompletedProcess[str]]


def trainer_environment() -> dict[str, str]:
    """Environment of processes that train in tests: `TRAINER_VARIABLES`, and no interpreter for Triton's kernels."""
    environment = {**os.environ, **TRAINER_VARIABLES}
    environment.pop("TRITON_INTERPRET", None)
    return environment


Fork = Callable[[Path, Sequence[str], int], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def fork(shard_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fork]:
    """Function that runs a script on several ranks, which are forks of one process."""
    server = ForkServer(trainer_environment())

    def run(script: Path, arguments: Sequence[str], processes: int) -> subprocess.CompletedProcess[str]:
        output = tmp_path_factory.mktemp("output")
        statuses = server.run(script, arguments, processes, free_port(), output)
        printed = [(output / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess([], next((status for status in statuses if status), 0), *printed)

    yield run
    server.close()


@pytest.fixture(scope="session")
def run_pretrain(fork: Fork) -> Pretrain:
    """Function that runs launch/pretrain.py on the micro model, as forks of one process or with a real launcher.

    Its `launcher` is forks, python, deepspeed or torchrun; forks are enough unless a test is about the start itself.
    """

    def launch(
        run_dir: Path, settings: Sequence[str], processes: int, launcher: str
    ) -> subprocess.CompletedProcess[str]:
        bin_dir = Path(sys.executable).parent
        deepspeed = [str(bin_dir / "deepspeed"), "-q", "--master_port", str(free_port()), "--num_accelerators"]
        commands = {
            "deepspeed": [*deepspeed, str(processes)],
            "torchrun": [str(bin_dir / "torchrun"), "--standalone", "--nproc-per-node", str(processes)],
            "python": [sys.executable],
        }
        command = [*commands[launcher], str(ROOT / "launch" / "pretrain.py"), f"run_dir={run_dir}", *settings]
        return subprocess.run(command, env=trainer_environment(), capture_output=True, text=True, timeout=300)

    def run(
        run_dir: Path, *settings: str, processes: int = 1, launcher: str = "forks", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        settings = (*MICRO_SETTINGS, *settings)
        if launcher == "forks":
            done = fork(ROOT / "launch" / "pretrain.py", (f"run_dir={run_dir}", *settings), processes)
        else:
            done = launch(run_dir, settings, processes, launcher)
        if check:
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def run_ranks(fork: Fork) -> Callable[..., str]:
    """Function that runs a script of the tests on several CPU processes; it must succeed; returns its output."""

    def run(script: Path, *arguments: str, processes: int) -> str:
        done = fork(script, arguments, processes)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def torchrun(script: Path, *arguments: str, processes: int, timeout: float = 300) -> None:
    """Run a script of the tests on that many GPUs by a real launcher; it must succeed, within `timeout` seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def free_port() -> int:
    """Find a free TCP port in a range of this test process, below the ports that the kernel assigns."""
    import socket

    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 10_000 + 5_000 * (worker % 4)
    for port in random.SystemRandom().sample(range(first, first + 5_000), 200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("", port))
                return port
    raise RuntimeError("no free port among 200")
