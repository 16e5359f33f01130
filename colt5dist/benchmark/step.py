"""The training step: tokens per second, MFU, GPU busy share and memory of the real trainer, beside dense T5 and LongT5.

Every row starts `launch/pretrain.py` on shards of the standard library, waits for its records, and ends it: what is
measured is what trains, with everything that belongs to a step. Tokens are valid input and target tokens. MFU is
6 x the forward pass's multiply-adds as executed (`colt5dist/train/report/accounting.py`; nothing that checkpointing
computes again) over the device's dense bf16 peak. Busy share, kernels and host waits are those of one profiled step.
LongT5 of Hugging Face (transient-global attention) is trained on random tokens, where `transformers` is installed: with
and without activation checkpointing, or with two batches; the fastest is the row, the others are notes below it.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from colt5dist.benchmark import device_line
from colt5dist.errors import ConfigError
from colt5dist.packaged import CONFIGS, SCRIPTS
from colt5dist.train.report.monitor import read_metrics

WARM_UP_STEPS = 5
"""Steps before the first that counts; the first one compiles, the second may capture another form."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Calls in which the host waits for the GPU."""
POLL_SECONDS = 0.5
MOST_LINES = 15
"""Last lines of output that are shown of a run that failed."""
MOST_KERNELS = 40
"""Kernels whose time is kept."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    name: str
    """What trains."""
    config: str
    """Configuration file in `configs/`."""
    settings: tuple[str, ...]
    """Settings that replace those of the file."""


@dataclass(kw_only=True)
class Result:
    """What was measured of a case."""

    name: str
    settings: tuple[str, ...]
    gpus: int
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    mfu: float | None = None
    peak_gib: float | None = None
    first_step_seconds: float | None = None
    busy_share: float | None = None
    kernels: int | None = None
    host_waits: int | None = None
    kernel_seconds: dict[str, float] = field(default_factory=dict)
    """GPU time of the profiled step by kernel, the longest first."""
    problem: str | None = None
    step_times: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the trainer said of its compilation."""


def base_case(length: int, *, stage: int = 1, dense: bool = False, micro_batch: int | None = None) -> Case:
    """CoLT5-Base, or dense T5 of its size, at an input length; the global batch is that of the published table."""
    global_batch = {4096: 32, 16_384: 8, 65_536: 4}.get(length, 8)
    fastest = {4096: 32, 16_384: 8, 65_536: 2} if not dense else {4096: 16, 16_384: 4, 65_536: 1}
    settings = [f"data.input_length={length}", f"zero.stage={stage}", f"train.global_batch_size={global_batch}"]
    settings.append(f"train.micro_batch_size={micro_batch or fastest.get(length, 1)}")
    if dense:
        settings.append("model.encoder=dense")
        settings += ["train.activation_checkpointing=full"] if length >= 65_536 else []
    name = f"{'dense T5' if dense else 'CoLT5'}-Base, {length:,} tokens, stage {stage}"
    return Case(name=name, config="base.yaml", settings=tuple(settings))


def large_case(stage: int = 1) -> Case:
    """CoLT5-Large at its own configuration, with a small global batch."""
    settings = (f"zero.stage={stage}", "train.global_batch_size=16")
    return Case(name=f"CoLT5-Large, 4,096 tokens, stage {stage}", config="large.yaml", settings=settings)


def xl_case() -> Case:
    """CoLT5-XL at its own configuration (stage 3), with a small global batch."""
    return Case(name="CoLT5-XL, 4,096 tokens, stage 3", config="xl.yaml", settings=("train.global_batch_size=16",))


CASES: dict[str, tuple[Case, ...]] = {
    "base": tuple(base_case(length) for length in (4096, 16_384, 65_536)),
    "stages": tuple(base_case(4096, stage=stage) for stage in (1, 2, 3)),
    "dense": tuple(base_case(length, dense=True) for length in (4096, 16_384, 65_536)),
    "large": (large_case(),),
    "xl": (xl_case(),),
}
"""Groups of rows, by the name on the command line."""
GROUPS = (*CASES, "long_t5")
LONG_T5_SETTINGS = {4096: ((6, False), (12, False)), 16_384: ((2, False), (2, True))}
"""Samples at once, and whether with activation checkpointing, by input length."""


def measure(case: Case, *, gpus: int, steps: int, settings: Sequence[str], seconds: float) -> Result:
    """Train a case for some steps and read what its records and its profile say."""
    result = Result(name=case.name, settings=(*case.settings, *settings), gpus=gpus)
    with tempfile.TemporaryDirectory(prefix="benchmark-step-") as folder:
        run_dir = Path(folder) / "run"
        last = WARM_UP_STEPS + steps
        own = [
            f"run_dir={run_dir}",
            "data.shards=python-stdlib",
            "train.steps=1000000",
            "train.log_every=1",
            "train.eval_samples=8",
            "train.eval_every=0",
            "train.routing_every=0",
            "monitor.held_out_sample=false",
            "checkpoint.every_steps=0",
            "schedule.warmup_steps=100",
            f"profile.steps=[{last + 1},{last + 1}]",
        ]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
        command = [*launcher, str(SCRIPTS / "pretrain.py"), "--config", str(CONFIGS / case.config)]
        log = Path(folder) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, *own, *case.settings, *settings],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            trace = run_dir / "profile" / "trace.json"
            try:
                wait_for(process, trace, seconds)
            finally:
                with_children_ended(process)
        lines = [text for text in log.read_text(errors="replace").splitlines() if text.strip()]
        result.notes = [text for text in lines if "compile:" in text]
        records = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
        counted = [record for record in records if WARM_UP_STEPS < record["step"] <= last]
        if len(counted) < steps:
            errors = [text for text in lines if "Error" in text and "ChildFailedError" not in text]
            problems = [text for text in lines if not text.startswith(("W", "E", "["))] if process.returncode else []
            result.problem = (errors or problems or lines or ["nothing was printed"])[-1][:300]
            result.notes += lines[-MOST_LINES:]
            return result
        result.step_times = [record["step_seconds"] for record in counted]
        result.step_seconds = statistics.median(result.step_times)
        result.tokens_per_second = statistics.median(record["tokens_per_second"] for record in counted)
        result.mfu = statistics.median(record["mfu"] for record in counted) if counted[0]["mfu"] else None
        result.peak_gib = max(record["peak_memory_bytes"] for record in counted) / 2**30
        result.first_step_seconds = records[0]["step_seconds"]
        if trace.exists():
            read_trace(trace, result)
    return result


def wait_for(process: subprocess.Popen[bytes], trace: Path, seconds: float) -> None:
    """Wait until the profile is complete, the trainer ends, or the time is up."""
    deadline = time.monotonic() + seconds
    size = -1
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        if trace.exists():
            if 0 < trace.stat().st_size == size:
                return
            size = trace.stat().st_size


def with_children_ended(process: subprocess.Popen[bytes]) -> None:
    """End a trainer and its launcher at once; nothing that it writes is kept."""
    with suppress(psutil.NoSuchProcess):  # torchrun starts its workers in sessions of their own
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def read_trace(trace: Path, result: Result) -> None:
    """Busy share of the GPU, kernels and host waits of a profiled step."""
    events: list[dict[str, Any]] = json.loads(trace.read_text())["traceEvents"]
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not work:
        return
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in work)
    busy, end = 0.0, spans[0][0]
    for first, last in spans:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    result.busy_share = busy / (end - spans[0][0])
    seconds: Counter[str] = Counter()
    for e in work:
        seconds[e["name"][:80]] += e["dur"] / 1e6
    result.kernel_seconds = dict(seconds.most_common(MOST_KERNELS))
    result.kernels = len(work)
    result.host_waits = sum(e.get("name") in WAITS and e.get("dur", 0) > 20 for e in events)


def measure_long_t5(length: int, *, steps: int, seconds: float) -> Result:
    """Hugging Face's LongT5-Base, each setting in a process of its own; the fastest is returned."""
    deadline = time.monotonic() + seconds
    found = [
        measure_long_t5_setting(length, *setting, steps=steps, seconds=deadline - time.monotonic())
        for setting in LONG_T5_SETTINGS.get(length, ((1, False), (1, True)))
    ]
    fastest = max(found, key=lambda result: result.tokens_per_second or 0.0)
    for other in found:
        if other is not fastest:
            what = other.problem or f"{other.tokens_per_second:,.0f} tokens/s"
            fastest.notes.append(f"{', '.join(other.settings)}: {what}")
    return fastest


def measure_long_t5_setting(
    length: int, micro_batch: int, checkpointing: bool, *, steps: int, seconds: float
) -> Result:
    """LongT5-Base with so many samples at once, with or without activation checkpointing."""
    settings = (f"batch {micro_batch}", f"{'with' if checkpointing else 'no'} activation checkpointing")
    name = f"LongT5-Base (Hugging Face), {length:,} tokens"
    result = Result(name=name, settings=settings, gpus=1, notes=[", ".join(settings)])
    arguments = [str(length), str(micro_batch), str(int(checkpointing)), str(steps)]
    command = [sys.executable, "-m", "colt5dist.benchmark.step", "--long-t5", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 0.0), check=False)
        answer = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        lines = done.stderr.splitlines() if not isinstance(error, subprocess.TimeoutExpired) else ["too slow"]
        result.problem = (lines or ["nothing was printed"])[-1][:300]
        return result
    result.step_seconds, result.tokens_per_second, result.peak_gib = answer
    return result


def build_long_t5(device: str) -> Any:
    """Hugging Face's LongT5-Base with transient-global attention and random weights, in bf16."""
    from transformers import LongT5Config, LongT5ForConditionalGeneration

    config = LongT5Config(
        vocab_size=32128,
        d_model=768,
        d_kv=64,
        d_ff=2048,
        num_layers=12,
        num_decoder_layers=12,
        num_heads=12,
        feed_forward_proj="gated-gelu",
        encoder_attention_type="transient-global",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    return LongT5ForConditionalGeneration(config).to(device, torch.bfloat16)


def train_long_t5(length: int, micro_batch: int, checkpointing: bool, steps: int) -> None:
    """Train LongT5-Base on random tokens; prints seconds per step, tokens per second and peak memory in GiB."""
    model = build_long_t5("cuda")
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    targets = 910
    times = []
    for step in range(3 + steps):
        inputs = torch.randint(3, 32000, (micro_batch, length), device="cuda")
        labels = torch.randint(3, 32000, (micro_batch, targets), device="cuda")
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model(input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        if step >= 3:
            times.append(time.perf_counter() - begin)
    seconds = statistics.median(times)
    rate = micro_batch * (length + targets) / seconds
    print(json.dumps([seconds, rate, torch.cuda.max_memory_allocated() / 2**30]))


def line(result: Result) -> str:
    """One row of the table."""
    if result.problem:
        return f"{result.name:<44} {result.gpus:>4}  failed: {result.problem}"

    def cell(value: float | int | None, form: str, width: int) -> str:
        return format("-" if value is None else format(value, form), f">{width}")

    return " ".join(
        [
            f"{result.name:<44}",
            cell(result.gpus, "d", 4),
            cell(result.tokens_per_second, ",.0f", 11),
            cell(result.step_seconds, ".4f", 8),
            cell(result.mfu, ".1%", 7),
            cell(result.busy_share, ".1%", 7),
            cell(result.kernels, "d", 8),
            cell(result.host_waits, "d", 6),
            cell(result.peak_gib, ".1f", 6),
            cell(result.first_step_seconds, ".1f", 7),
        ]
    )


HEADER = (
    f"{'run':<44} {'GPUs':>4} {'tokens/s':>11} {'s/step':>8} {'MFU':>7} {'busy':>7} {'kernels':>8} {'waits':>6} "
    f"{'GiB':>6} {'first s':>7}"
)


def main(arguments: list[str]) -> int:
    """Print a table and, with `--output`, write the figures as JSON; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help=f"rows to measure: {', '.join(GROUPS)} (default: all)"
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1], metavar="N", help="GPUs of this host (default: 1)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="only rows of these input lengths")
    parser.add_argument("--stages", type=int, nargs="+", metavar="N", help="only rows of these ZeRO stages")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps that count (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=300, metavar="S", help="most for a row (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="settings for every row of ours")
    parser.add_argument("--output", type=Path, metavar="JSON", help="file for the figures")
    options = parser.parse_args(arguments)
    unknown = [group for group in options.groups if group not in GROUPS]
    if unknown:
        raise ConfigError(f"benchmark step: no group {unknown[0]!r}; use some of {', '.join(GROUPS)}")
    print(device_line())
    print(HEADER, flush=True)
    results: list[Result] = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a trainer is ended on the way out
    try:
        measure_groups(options, results)
    except KeyboardInterrupt:
        print("stopped", flush=True)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
        if options.output:
            content = {"device": device_line(), "results": [asdict(result) for result in results]}
            options.output.write_text(json.dumps(content, indent=1))
    return 1 if any(result.problem for result in results) else 0


def measure_groups(options: argparse.Namespace, results: list[Result]) -> None:
    """Measure the rows that are asked for, one after the other; each is printed and added to the results."""
    for group in options.groups or GROUPS:
        for gpus in options.gpus if group in CASES else [1]:
            for case in CASES.get(group, ()):
                length = next((int(s.partition("=")[2]) for s in case.settings if "input_length" in s), 4096)
                if options.lengths and length not in options.lengths:
                    continue
                if options.stages and not any(case.name.endswith(f"stage {stage}") for stage in options.stages):
                    continue
                result = measure(
                    scaled(case, gpus), gpus=gpus, steps=options.steps, settings=options.set, seconds=options.seconds
                )
                results.append(result)
                show(result)
        if group == "long_t5":
            for length in options.lengths or (4096, 16_384):
                result = measure_long_t5(length, steps=options.steps, seconds=options.seconds)
                results.append(result)
                show(result)


def show(result: Result) -> None:
    """Print its row, and below it its notes."""
    print("\n".join([line(result), *(f"    {note}" for note in result.notes)]), flush=True)


def scaled(case: Case, gpus: int) -> Case:
    """The same case with as many samples per GPU (weak scaling)."""
    settings = []
    for setting in case.settings:
        key, _, value = setting.partition("=")
        settings.append(f"{key}={int(value) * gpus}" if key == "train.global_batch_size" else setting)
    return Case(name=case.name, config=case.config, settings=tuple(settings))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--long-t5"]:
        train_long_t5(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1", int(sys.argv[5]))
    else:
        sys.exit(main(sys.argv[1:]))
