"""Ranks as forks of one process that has imported everything: a start takes one or two seconds instead of ten.

python tests/forks.py      # a line of JSON on stdin starts some ranks, a line on stdout has their exit statuses
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 300


class ForkServer:
    """Controls the process that is forked.

    Args:
        environment: environment of the ranks; PyTorch and Triton read parts of it when they are imported.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, str(Path(__file__).resolve())]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def run(self, script: Path, arguments: Sequence[str], processes: int, port: int, output: Path) -> list[int]:
        """Run a script on several ranks; a single rank gets no variables of a launcher.

        Args:
            script: what each rank runs.
            arguments: arguments of the script.
            processes: number of ranks.
            port: port on which they connect.
            output: folder for `stdout` and `stderr`.

        Returns:
            The exit status of each rank.
        """
        request = {"script": str(script), "arguments": arguments, "processes": processes, "port": port}
        request["output"] = str(output)
        assert self._process.stdin is not None and self._process.stdout is not None
        answer = ""
        with suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that is forked ended with status {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def become_rank(place: dict[str, object], script: Path, arguments: Sequence[str], stdout: Path, stderr: Path) -> None:
    """Run a script in a new fork, and exit.

    Args:
        place: variables that a launcher sets.
        script: the script.
        arguments: its arguments.
        stdout: file for its standard output.
        stderr: file for its standard error.
    """
    import runpy
    import threading
    import traceback

    import torch

    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), descriptor)
    os.environ.update({key: str(value) for key, value in place.items()})
    if "OMP_NUM_THREADS" in os.environ:  # torch may have read another number; it affects the last bits
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    status = 1
    try:
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        for thread in threading.enumerate():  # as Python does when it exits
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
        sys.stdout.flush()
        os._exit(status)


def rank_places(processes: int, port: int) -> list[dict[str, object]]:
    """Return the variables that a launcher sets for each rank."""
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": rank, "LOCAL_RANK": rank, **shared} for rank in range(processes)]


def import_everything() -> None:
    """Import what a start needs, also what DeepSpeed imports only for an engine, which includes PyTorch's compilers.

    The garbage collector forgets it: each collection of a fork would look at a million objects, and copy their memory.
    """
    import atexit
    import gc

    import deepspeed.ops
    import deepspeed.runtime.zero.muon.muon_optimizer

    import colt5dist.train.pretrain  # noqa: F401

    assert deepspeed.ops.__compatible_ops__  # it looks on first access what can be compiled here
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries would say of frozen objects that they were left; forks do not come here


def serve() -> None:
    """Answer requests until stdin ends."""
    import signal

    import_everything()
    for line in sys.stdin:
        request = json.loads(line)
        output = Path(request["output"])
        places = rank_places(request["processes"], request["port"]) if request["processes"] > 1 else [{}]
        ranks = []
        for place in places:
            pid = os.fork()
            if pid == 0:
                signal.alarm(TIMEOUT_SECONDS)
                script = Path(request["script"])
                become_rank(place, script, request["arguments"], output / "stdout", output / "stderr")
            ranks.append(pid)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]), flush=True)


if __name__ == "__main__":
    serve()
