"""Generation: tokens and samples per second, the encoder's time, and a decoding step beside its floor and LongT5.

Greedy, bf16, random weights and inputs, no end token: every row writes all tokens. The floor of a step is the time in
which the device copies as many bytes as a step has to read: the decoder's weights, the keys and values of the inputs,
and of the tokens decoded so far (half of all, in the mean). LongT5-Base of Hugging Face (transient-global attention)
writes as many tokens of inputs of the same shape in a process of its own, where `transformers` is installed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from colt5dist.benchmark import device_line
from colt5dist.benchmark.step import build_long_t5
from colt5dist.errors import ConfigError
from colt5dist.model import CoLT5, CoLT5Config
from colt5dist.model.generation import DecoderState, GenerationSettings, encode_inputs, for_inference, search_for
from colt5dist.model.generation.graph import PLAIN_STEPS, RepeatedStep
from colt5dist.model.generation.write import decode_step
from colt5dist.packaged import CONFIGS
from colt5dist.train.config.load import load_config

LONG_T5_SECONDS = 300
"""Most time for LongT5."""


@dataclass(kw_only=True)
class Speed:
    """What was measured of one model; seconds are medians."""

    name: str
    seconds: float | None = None
    """For all tokens of the batch, encoder included."""
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    encoder_seconds: float | None = None
    step_seconds: float | None = None
    """Of one decoded token of every row, without the encoder."""
    floor_seconds: float | None = None
    """In which the device copies what a step has to read."""
    peak_gib: float | None = None
    has_graph: bool | None = None
    """Whether a step was one CUDA graph."""
    problem: str | None = None


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, the device's work included; one call before it does not count."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_rate(device: torch.device) -> float:
    """Bytes per second that the device reads and writes when it copies a large tensor."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**26, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), device, repeats=10)


def step_bytes(model: CoLT5, state: DecoderState) -> float:
    """Bytes that a step has to read: weights, keys and values of the inputs, and half the slots of the new tokens."""
    weights = [*model.decoder.parameters(), model.loss.weight]
    unread = [layer.get_submodule("cross_attention.to_kv").get_parameter("weight") for layer in model.decoder.layers]
    num_weights = sum(p.numel() * p.element_size() for p in weights) - sum(p.numel() * p.element_size() for p in unread)
    return num_weights + state.context_bytes() + state.past_bytes() / 2


def measure(
    config: CoLT5Config, *, batch: int, length: int, new_tokens: int, device: torch.device, repeats: int
) -> Speed:
    """Measure CoLT5 with random weights."""
    torch.manual_seed(0)
    with device:
        model = CoLT5(config).to(torch.bfloat16).eval()
        input_ids = torch.randint(3, config.vocab_size, (batch, length))
    model.eos_id = -1  # no id is the end token
    settings = GenerationSettings(max_new_tokens=new_tokens, eos_id=None)
    speed = Speed(name="CoLT5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    speed.seconds = seconds_of(lambda: model.generate(input_ids, max_new_tokens=new_tokens), device, repeats)
    speed.tokens_per_second = batch * new_tokens / speed.seconds
    speed.samples_per_second = batch / speed.seconds
    if device.type == "cuda":
        speed.peak_gib = torch.cuda.max_memory_allocated(device) / 2**30
    with for_inference(model, device):
        speed.encoder_seconds = seconds_of(lambda: encode_inputs(model, input_ids, None, None), device, repeats)
        encoded = encode_inputs(model, input_ids, None, None)
        state = DecoderState(
            model.embedding, model.decoder, model.loss, encoded, rows_per_sample=1, num_slots=new_tokens
        )
        search = search_for(settings, torch.arange(batch, device=device), torch.float32)
        step = RepeatedStep(lambda: decode_step(state, search), device)
        for _ in range(PLAIN_STEPS + 1):
            step()
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(new_tokens - PLAIN_STEPS - 1):
            step()
        synchronize(device)
        speed.step_seconds = (time.perf_counter() - begin) / (new_tokens - PLAIN_STEPS - 1)
        speed.has_graph = step.is_captured
    speed.floor_seconds = step_bytes(model, state) / copy_rate(device)
    return speed


def measure_long_t5(*, batch: int, length: int, new_tokens: int, device: torch.device, repeats: int) -> Speed:
    """Measure Hugging Face's LongT5-Base in a process of its own."""
    speed = Speed(name="LongT5-Base (Hugging Face)")
    arguments = [str(number) for number in (batch, length, new_tokens, repeats)]
    command = [sys.executable, "-m", "colt5dist.benchmark.generate", "--long-t5", device.type, *arguments]
    done = None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_T5_SECONDS, check=False)
        speed.seconds, speed.encoder_seconds, speed.peak_gib = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        lines = done.stderr.splitlines() if done else [f"took more than {LONG_T5_SECONDS} s"]
        speed.problem = (lines or ["nothing was printed"])[-1][:200]
        return speed
    assert speed.seconds is not None and speed.encoder_seconds is not None
    speed.tokens_per_second = batch * new_tokens / speed.seconds
    speed.samples_per_second = batch / speed.seconds
    speed.step_seconds = (speed.seconds - speed.encoder_seconds) / new_tokens
    return speed


def generate_with_long_t5(device: str, batch: int, length: int, new_tokens: int, repeats: int) -> None:
    """Print the seconds of LongT5-Base's `generate`, those of its encoder, and its peak memory in GiB."""
    model = build_long_t5(device).eval()
    ids = torch.randint(3, 32000, (batch, length), device=device)
    mask = torch.ones_like(ids)
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "min_new_tokens": new_tokens}
    place = torch.device(device)
    with torch.no_grad():

        def write() -> None:
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, **options)
            assert out.shape == (batch, new_tokens + 1)

        seconds = seconds_of(write, place, repeats)
        encoder = seconds_of(lambda: model.encoder(input_ids=ids, attention_mask=mask), place, repeats)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    print(json.dumps([seconds, encoder, peak]))


def line(speed: Speed) -> str:
    """One row of the table."""
    if speed.problem:
        return f"{speed.name:<27} failed: {speed.problem}"

    def cell(value: float | None, form: str, width: int, factor: float = 1.0) -> str:
        return format("-" if value is None else format(value * factor, form), f">{width}")

    return " ".join(
        [
            f"{speed.name:<27}",
            cell(speed.tokens_per_second, ",.0f", 10),
            cell(speed.samples_per_second, ".2f", 9),
            cell(speed.seconds, ".3f", 8),
            cell(speed.encoder_seconds, ".4f", 9),
            cell(speed.step_seconds, ".3f", 8, 1e3),
            cell(speed.floor_seconds, ".3f", 9, 1e3),
            cell(speed.peak_gib, ".1f", 6),
        ]
    )


HEADER = (
    f"{'':<27} {'tokens/s':>10} {'samples/s':>9} {'s in all':>8} {'encoder s':>9} {'step ms':>8} {'floor ms':>9} "
    f"{'GiB':>6}"
)


def main(arguments: list[str]) -> int:
    """Print a table and, with `--output`, write the figures as JSON; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--config", type=Path, default=CONFIGS / "base.yaml", help="default: CoLT5-Base")
    parser.add_argument("--length", type=int, default=16_384, metavar="N", help="input tokens (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="samples (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--without-long-t5", action="store_true", help="leave LongT5 out")
    parser.add_argument("--output", type=Path, metavar="JSON", help="file for the figures")
    options = parser.parse_args(arguments)
    for name in ("length", "batch", "repeats"):
        if getattr(options, name) < 1:
            raise ConfigError(f"benchmark generate: --{name}: {getattr(options, name)}; use 1 or more")
    if options.new_tokens < PLAIN_STEPS + 2:
        raise ConfigError(f"benchmark generate: --new-tokens: {options.new_tokens}; use {PLAIN_STEPS + 2} or more")
    if options.device not in ("cpu", "cuda") or (options.device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"benchmark generate: --device: {options.device} is not there; use cpu, or cuda with a GPU")
    config = load_config(options.config, []).model
    if config.architecture != "encoder_decoder":
        raise ConfigError(f"benchmark generate: --config: {options.config} has no encoder; name an encoder-decoder's")
    shape = {"batch": options.batch, "length": options.length, "new_tokens": options.new_tokens}
    common: dict[str, Any] = {**shape, "device": torch.device(options.device), "repeats": options.repeats}
    print(f"{options.batch} x {options.length:,} tokens in, {options.new_tokens} out, greedy, bf16; {device_line()}")
    print(HEADER, flush=True)
    speeds = [measure(config, **common)]
    print(line(speeds[0]), flush=True)
    if options.device == "cuda":
        torch.cuda.empty_cache()
    if not options.without_long_t5:
        speeds.append(measure_long_t5(**common))
        print(line(speeds[1]), flush=True)
        ours, theirs = speeds[0].tokens_per_second, speeds[1].tokens_per_second
        if ours and theirs:
            print(f"CoLT5 writes {ours / theirs:.1f} times as many tokens per second")
    if options.output:
        content = {
            "device": device_line(),
            "config": str(options.config),
            **shape,
            "results": list(map(asdict, speeds)),
        }
        options.output.write_text(json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--long-t5"]:
        generate_with_long_t5(sys.argv[2], *map(int, sys.argv[3:7]))
    else:
        sys.exit(main(sys.argv[1:]))
