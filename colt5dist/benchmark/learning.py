"""Does routing learn: held-out loss of learned, static, random and no routing and of the dense encoder, over seeds.

Every curve is a run of `launch/pretrain.py`. Runs of one seed see the same samples in the same order, all runs are
measured on the same held-out samples, and variants are compared by their differences seed by seed, with 95 % t
intervals: at equal steps, and at equal GPU time. GPU time is steps times the seconds of a step, which a short run of
each variant measures on the first GPU while nothing else runs there; so runs may train side by side, on all GPUs
(--parallel), and be stopped (--minutes). The same command continues where it was stopped. Intervals are of single
comparisons, not corrected for their number.
"""

import argparse
import json
import math
import re
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import yaml

from colt5dist.benchmark import Interval, Points, compare, device_line, interval
from colt5dist.benchmark.package_text import default_text, make_shards
from colt5dist.benchmark.side_by_side import STOPPED, Job, check_unchanged, train, visible_gpus
from colt5dist.data import DataConfig, open_shards, required_sentinels
from colt5dist.errors import ConfigError
from colt5dist.files import write_whole
from colt5dist.train.report.monitor import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIANTS = {
    "learned": (),
    "static": ("model.routing=static",),
    "random": ("model.routing=random",),
    "light": ("model.encoder=light",),
    "dense": ("model.encoder=dense",),
}
"""What is compared, and the settings of each; light has no heavy branch."""
SIZES = (
    "model.d_model=512",
    "model.num_encoder_layers=6",
    "model.num_decoder_layers=4",
    "model.num_heads=8",
    "model.num_light_heads=2",
    "model.num_heavy_heads=6",
    "model.light_ff_dim=512",
    "model.heavy_ff_dim=4096",
    "model.ff_dim=1024",
    "optimizer.lr=1e-3",
    "schedule.name=inverse_sqrt",
    "schedule.warmup_steps=200",
)
"""The model and its learning rate, which does not depend on the number of steps."""
QUICK = (
    "checkpoint.every_steps=0",
    "checkpoint.every_minutes=5",
    "checkpoint.keep_last=1",
    "monitor.held_out_sample=false",
)
"""Few checkpoints, and no pictures and texts beside the numbers; this changes no result."""
MICRO_BATCH_TOKENS = 1 << 17
SCHEDULE = "data.length_schedule"
LOSS, WITH_ANOTHER_INPUT = "eval/loss", "eval/loss_shuffled_inputs"
"""Keys of the records: the held-out loss, and the same with another sample's input."""
TIMED_STEPS, SKIPPED_STEPS = 30, 15
"""Steps of the run that measures the time of a step, and how many of them come before those that count."""
OWN_KEYS = {"run_dir", "seed", "train.steps", "train.eval_every", "train.eval_samples", "train.global_batch_size"}
OWN_KEYS |= {"data.shards", "data.sources", "data.input_length", "data.target_length"}
"""Keys that the options give."""
Losses = dict[str, dict[str, dict[int, Points]]]
"""Losses by key of the records, variant and seed."""


def common_settings(options: argparse.Namespace, shards: Path, length: int) -> tuple[str, ...]:
    """Settings of every run with inputs of a length, beside those of its variant and --set."""
    data = DataConfig(input_length=length, target_length=options.target_length)
    ids = open_shards(str(shards)).manifest.tokenizer.vocab_size + required_sentinels(data)
    return (
        f"data.shards={shards}",
        f"data.input_length={length}",
        f"data.target_length={options.target_length}",
        f"model.vocab_size={math.ceil(ids / 128) * 128}",
        *SIZES,
        f"train.global_batch_size={options.batch}",
        f"train.micro_batch_size={min(options.batch, max(1, MICRO_BATCH_TOKENS // length))}",
        *QUICK,
    )


def jobs_of(options: argparse.Namespace, shards: Path, length: int) -> tuple[list[Job], list[Job]]:
    """Return the runs that are timed alone, one per variant, and those that give the curves, seed after seed."""
    common, runs = common_settings(options, shards, length), options.output.absolute() / "runs"

    def job(name: str, variant: str, steps: int, *own: str, alone: bool = False) -> Job:
        name = f"{length}/{name}"
        settings = (*common, *own, *options.set, *options.variants[variant])
        return Job(name=name, folder=runs / name, settings=settings, steps=steps, alone=alone)

    timing = ("train.log_every=1", "train.eval_every=0", "train.eval_samples=1", "train.routing_every=0")
    curve = (
        f"train.log_every={min(50, options.eval_every)}",
        f"train.eval_every={options.eval_every}",
        f"train.eval_samples={options.eval_samples}",
        "train.eval_shuffled_inputs=true",
        "train.routing_every=0",
    )
    return [job(f"{name}-time", name, TIMED_STEPS, *timing, alone=True) for name in options.timed], [
        job(f"{name}-{seed}", name, options.steps_of[name], f"seed={seed}", *curve)
        for seed in options.seeds
        for name in options.variants
    ]


def read_results(
    options: argparse.Namespace, length: int, timed: Sequence[Job], curves: Sequence[Job], added: Sequence[Losses] = ()
) -> dict[str, Any]:
    """Read the records of all runs with inputs of a length, take in the losses of other seeds, and compare."""
    seconds: dict[str, float | None] = dict.fromkeys(options.variants)
    for name, job in zip(options.timed, timed, strict=True):
        records = read_metrics(job.folder) if job.is_done() else []
        times = [record["step_seconds"] for record in records if record["step"] > SKIPPED_STEPS]
        seconds[name] = statistics.median(times) if times else None
    losses: Losses = {}
    for number, job in enumerate(curves):
        seed, place = options.seeds[number // len(options.variants)], number % len(options.variants)
        for record in read_metrics(job.folder):
            for key, loss in record.items():
                if key.startswith("eval/loss") and loss is not None and record["step"] <= job.steps:
                    of_variants = losses.setdefault(key, {name: {} for name in options.variants})
                    of_variants[list(options.variants)[place]].setdefault(seed, {})[record["step"]] = loss
    for found in added:
        for key, of_runs in found.items():
            for name, seeds in of_runs.items():
                losses.setdefault(key, {name: {} for name in options.variants})[name] |= seeds
    nothing: dict[str, dict[int, Points]] = {name: {} for name in options.variants}
    objectives = {key.removeprefix("eval/loss/"): found for key, found in losses.items() if "eval/loss/" in key}

    def comparisons(of_variants: dict[str, dict[int, Points]]) -> list[dict[str, Any]]:
        pairs = [(a, b, (seconds[a], seconds[b])) for a, b in combinations(options.variants, 2)]
        found = [(a, b, compare(of_variants[a], of_variants[b], own)) for a, b, own in pairs]
        return [{"first": a, "second": b, **result} for a, b, result in found if result is not None]

    held_out = losses.setdefault(LOSS, nothing)
    losses.setdefault(WITH_ANOTHER_INPUT, nothing)
    return {
        "input_length": length,
        "later_lengths": {name: later_lengths([*options.set, *own]) for name, own in options.variants.items()},
        "step_seconds": seconds,
        "losses": losses,
        "comparisons": comparisons(held_out),
        "comparisons_by_objective": {name: comparisons(of_variants) for name, of_variants in objectives.items()},
        "comparisons_at": {step: comparisons(only_at(held_out, step)) for step in options.at},
    }


def description(options: argparse.Namespace) -> dict[str, Any]:
    """What runs must have in common, beside their text, so that curves of other seeds may be taken in."""

    def in_one_line(settings: Sequence[str]) -> list[str]:
        return [" ".join(setting.split()) for setting in settings]

    return {
        "variants": {name: in_one_line(settings) for name, settings in options.variants.items()},
        "set": in_one_line(options.set),
        **{name: getattr(options, name) for name in ("batch", "target_length", "eval_samples")},
    }


def read_added(path: Path, options: argparse.Namespace, taken: set[int]) -> tuple[str, dict[int, Losses]]:
    """The fingerprint of the text, and the losses of other seeds by input length; their seeds join those taken.

    Raises:
        ConfigError: the file is no such file, of other runs, or of seeds that are taken.
    """

    def with_numbers(of_seeds: dict[str, dict[str, float]]) -> dict[int, Points]:
        return {int(seed): {int(step): loss for step, loss in of.items()} for seed, of in of_seeds.items()}

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name, value in description(options).items() if content[name] != value]
        fingerprint: str = content["fingerprint"]
        found = {
            result["input_length"]: {
                key: {name: with_numbers(of_seeds) for name, of_seeds in of_variants.items()}
                for key, of_variants in result["losses"].items()
            }
            for result in content["lengths"]
        }
    except OSError as error:
        raise ConfigError(f"--add: {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--add: {path}: is no curves.json of this command") from error
    if other:
        raise ConfigError(f"--add: {path}: was made with other {', '.join(other)}; give the same options")
    known = {seed for losses in found.values() for runs in losses.values() for seeds in runs.values() for seed in seeds}
    if twice := sorted(known & taken):
        raise ConfigError(f"--add: {path}: has seed {twice[0]}, which is there already; give other --seeds")
    taken |= known
    return fingerprint, found


def schedule_of(settings: Sequence[str]) -> list[Any]:
    """The entries of the last data.length_schedule among settings; [] where that is wrong: the trainer refuses it."""
    found = [setting.partition("=")[2] for setting in settings if setting.startswith(f"{SCHEDULE}=")]
    try:
        entries = yaml.safe_load(found[-1]) if found else []
    except yaml.YAMLError:
        return []
    return entries if isinstance(entries, list) else []


def later_lengths(settings: Sequence[str]) -> list[tuple[int, int]]:
    """The steps at which data.length_schedule changes the input length, and the lengths."""
    entries = [entry for entry in schedule_of(settings) if isinstance(entry, dict)]
    pairs = [(entry.get("step"), entry.get("input_length")) for entry in entries]
    return [(step, length) for step, length in pairs if isinstance(step, int) and isinstance(length, int)]


def only_at(of_variants: Mapping[str, Mapping[int, Points]], step: int) -> dict[str, dict[int, Points]]:
    """The losses of one step only."""
    return {
        name: {seed: {step: points[step]} for seed, points in seeds.items() if step in points}
        for name, seeds in of_variants.items()
    }


def at_last_step(seeds: Mapping[int, Points], shuffled: Mapping[int, Points]) -> tuple[int, list[float], float | None]:
    """The last step of a variant, its losses by seed, and how much higher they are with another sample's input."""
    step = max((step for points in seeds.values() for step in points), default=0)
    last = {seed: points[step] for seed, points in seeds.items() if step in points}
    more = [shuffled[seed][step] / last[seed] - 1 for seed in last if step in shuffled.get(seed, {})]
    return step, list(last.values()), statistics.fmean(more) if more else None


def table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the tables of an input length."""
    head = f"{'':10} {'s/step':>8} {'seeds':>5} {'step':>6}  {'held-out loss, mean':22} with another sample's input"
    lines = [_title(result), head]
    for name, seeds in result["losses"][LOSS].items():
        seconds = result["step_seconds"][name]
        start = f"{name:10} {'-' if seconds is None else f'{seconds:.4f}':>8}"
        step, last, more = at_last_step(seeds, result["losses"][WITH_ANOTHER_INPUT][name])
        loss = str(interval(last)) if last else "-"
        lines.append(f"{start} {len(last):>5} {step:>6}  {loss:22} {_share(more)}")
    lines.append(f"{'difference':20} {'seeds':>5}  {'at equal steps':42}  at equal GPU time")
    for part in result["comparisons"]:
        cells = []
        places = {"equal_steps": f"{part['step']} steps", "equal_time": f"{part['gpu_seconds'] or 0:.0f} s"}
        for key, place in places.items():
            found = part[key]
            cells.append(f"{Interval(found['mean'], found['half'])} {found['verdict']} ({place})" if found else "-")
        lines.append(f"{part['first'] + ' - ' + part['second']:20} {len(part['seeds']):>5}  {cells[0]:42}  {cells[1]}")
    if len(objectives := result["comparisons_by_objective"]) > 1:
        lines += _aligned([["at equal steps", *objectives], *_differences(objectives, result)])
    if at := result["comparisons_at"]:
        rows = [["", *(f"step {step}" for step in at)]]
        for name, seeds in result["losses"][LOSS].items():
            shuffled = result["losses"][WITH_ANOTHER_INPUT][name]
            found = (at_last_step(only_at({name: seeds}, step)[name], shuffled) for step in at)
            texts = ((f"{interval(losses)} {_share(more)}" if losses else "", len(losses)) for _, losses, more in found)
            rows.append([name, *(_of_seeds(text, count, result) for text, count in texts)])
        lines += _aligned([*rows, *_differences(at, result)])
    return lines


def _differences(columns: Mapping[Any, list[dict[str, Any]]], result: dict[str, Any]) -> list[list[str]]:
    """Rows of the differences of all pairs at equal steps, with the verdict if there is one."""
    rows = []
    for pair in result["comparisons"]:
        names = pair["first"], pair["second"]
        rows.append([" - ".join(names)])
        for found in columns.values():
            same = next((own for own in found if (own["first"], own["second"]) == names), None)
            rows[-1].append(_of_seeds(_difference(same), len(same["seeds"]), result) if same else "-")
    return rows


def _difference(found: dict[str, Any]) -> str:
    part = found["equal_steps"]
    verdict_if_any = f" {part['verdict']}" if part["verdict"] in ("below", "above") else ""
    return f"{Interval(part['mean'], part['half'])}{verdict_if_any}"


def _of_seeds(text: str, count: int, result: dict[str, Any]) -> str:
    """A cell of so many seeds; they are named where there are fewer than elsewhere."""
    most = max(len(seeds) for seeds in result["losses"][LOSS].values())
    return "-" if not count else text if count == most else f"{text} ({count} of {most} seeds)"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:+.1%}"


def plot(results: Sequence[dict[str, Any]]) -> "Figure":
    """Draw the mean held-out losses with 95 % bands over steps, and over GPU time where it was measured.

    Where it was measured, a third picture has how much higher they are with another sample's input.
    """
    from matplotlib.figure import Figure  # it takes most of a second

    has_time = any(value is not None for result in results for value in result["step_seconds"].values())
    has_other = any(seeds for result in results for seeds in result["losses"][WITH_ANOTHER_INPUT].values())
    columns = 1 + has_time + has_other
    figure = Figure(figsize=(6 * columns, 4.5 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), columns, squeeze=False)
    for row, (result, axes) in enumerate(zip(results, grid, strict=True)):
        for number, (name, seeds) in enumerate(result["losses"][LOSS].items()):
            color = f"C{number}"
            _draw(axes[0], seeds, 1.0, name, color)
            if has_time and (seconds := result["step_seconds"][name]) is not None:
                _draw(axes[1], seeds, seconds, name, color)
            if has_other:
                shuffled = result["losses"][WITH_ANOTHER_INPUT][name]
                rise = {
                    seed: {s: 100 * (shuffled[seed][s] / points[s] - 1) for s in points.keys() & shuffled[seed].keys()}
                    for seed, points in seeds.items()
                    if seed in shuffled
                }
                _draw(axes[-1], rise, 1.0, name, color)
        for axis in axes:
            axis.set(xlabel="steps", ylabel="held-out loss, nats per token")
            axis.set_title(fill(_title(result), 60), fontsize=9)
            axis.grid(alpha=0.3)
        if has_time:
            axes[1].set(xlabel="GPU seconds")
        if has_other:
            axes[-1].set(ylabel="rise of the loss with another sample's input, %")
        if row == 0 and axes[0].get_legend_handles_labels()[0]:
            axes[0].legend()
    figure.suptitle(f"mean over seeds with 95 % t intervals; {device_line()}", fontsize=9)
    return figure


def _title(result: dict[str, Any]) -> str:
    """The input lengths; those of single variants where they differ."""
    later = {
        name: "".join(f", {length:,} from step {step}" for step, length in lengths)
        for name, lengths in result["later_lengths"].items()
    }
    alike = len(set(later.values())) == 1
    ends = set(later.values()) if alike else {f"; {name}{text}" for name, text in later.items() if text}
    return "".join([f"inputs of {result['input_length']:,} tokens", *sorted(ends)])


def _draw(axis: Any, seeds: Mapping[int, Points], factor: float, name: str, color: str) -> None:
    """Draw a mean over seeds with its band; step times factor is the place."""
    steps = sorted({step for points in seeds.values() for step in points})
    if steps:
        means = [interval([points[step] for points in seeds.values() if step in points]) for step in steps]
        low, high = ([mean + sign * (half or 0.0) for mean, half in means] for sign in (-1, 1))
        places = [step * factor for step in steps]
        axis.plot(places, [mean for mean, _ in means], label=name, marker=".", color=color)
        axis.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the options; `variants` becomes a dictionary of the settings of each.

    Raises:
        ConfigError: an option has a wrong value.
    """
    parser = argparse.ArgumentParser(
        prog="benchmark.py learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    variants = f"some of {', '.join(VARIANTS)} (default: all), or your own as NAME:key=value,key=value"
    add("--variants", nargs="+", default=list(VARIANTS), metavar="NAME", help=variants)
    add("--seeds", default="4", metavar="N", help="seeds 0 to N - 1, or FIRST-LAST (default: %(default)s)")
    add("--lengths", type=int, nargs="+", default=[8192], metavar="N", help="input tokens, e.g. 8192 16384 (8192)")
    add("--target-length", type=int, default=910, metavar="N", help="target tokens (default: %(default)s)")
    add("--batch", type=int, default=16, metavar="N", help="samples of a step (default: %(default)s)")
    add("--steps", type=int, default=1500, metavar="N", help="steps of a run (default: %(default)s)")
    add("--eval-every", type=int, default=250, metavar="N", help="steps between evaluations (default: %(default)s)")
    add("--eval-samples", type=int, default=64, metavar="N", help="held-out samples (default: %(default)s)")
    add("--at", type=int, nargs="+", default=[], metavar="N", help="steps whose evaluations are compared, too")
    more = "curves.json of other seeds of the same runs, from other machines, whose curves are taken in"
    add("--add", type=Path, nargs="+", default=[], metavar="FILE", help=more)
    add("--steps-of", nargs="+", default=[], metavar="NAME=N", help="other numbers of steps of some variants")
    add("--timed", nargs="*", metavar="NAME", help="variants whose step is timed, for equal GPU time (default: all)")
    add("--parallel", type=int, default=1, metavar="N", help="runs side by side on each GPU (default: %(default)s)")
    add("--minutes", type=float, default=math.inf, metavar="M", help="stop with checkpoints after so long (no limit)")
    add("--text", nargs="+", metavar="GLOB", help="files of text (default: *.py of the installed packages)")
    add(
        "--vocabulary",
        type=int,
        default=8000,
        metavar="IDS",
        help="ids of the tokenizer for --text; 0: bytes (default: %(default)s)",
    )
    add("--shards", type=Path, metavar="DIR", help="shards that are used instead of making some from --text")
    add("--set", nargs="+", default=[], metavar="key=value", help="settings for every run")
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder of shards, runs, and results")
    options = parser.parse_args(arguments)
    named: dict[str, tuple[str, ...]] = {}
    for variant in options.variants:
        name, colon, settings = variant.partition(":")
        if not colon and name not in VARIANTS:
            raise ConfigError(f"--variants: {name} is unknown; use some of {', '.join(VARIANTS)}, or NAME:key=value")
        if name in named or not name.isidentifier() or (colon and name in VARIANTS):
            raise ConfigError(f"--variants: {variant}: give each variant a name of its own, of letters, digits and _")
        # a comma within a value is followed by no key: data.length_schedule=[{step: 9, input_length: 512}]
        named[name] = tuple(re.split(r",(?=[\w.]+=)", settings)) if colon else VARIANTS[name]
    options.variants = named
    changing = {name for name, settings in named.items() if schedule_of([*options.set, *settings])}
    options.timed = [name for name in named if name not in changing] if options.timed is None else options.timed
    if unknown := [name for name in options.timed if name not in named]:
        raise ConfigError(f"--timed: {', '.join(unknown)}; use some of {', '.join(named)}")
    steps_of = dict.fromkeys(named, options.steps)
    for entry in options.steps_of:
        name, _, number = entry.partition("=")
        if name not in named or not number.isascii() or not number.isdigit() or int(number) < 1:
            raise ConfigError(f"--steps-of: {entry}; use NAME=N, with one of {', '.join(named)} and 1 step or more")
        steps_of[name] = int(number)
    options.steps_of = steps_of
    for setting in [*options.set, *(setting for settings in named.values() for setting in settings)]:
        if setting.partition("=")[0] in OWN_KEYS or "=" not in setting:
            raise ConfigError(f"--set, --variants: {setting}: give key=value, of a key that no option sets")
    if without := [name for name in options.timed if name in changing]:
        raise ConfigError(f"--timed: {without[0]}: its steps take different times, as {SCHEDULE} says; leave it out")
    seeds = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", options.seeds, re.ASCII)
    first, last = (0, -1) if seeds is None else (int(seeds[1]), int(seeds[2] or -1))
    options.seeds, given = range(first, last + 1) if seeds and seeds[2] else range(first), options.seeds
    if not options.seeds:
        raise ConfigError(f"--seeds: {given}; use a number from 1 on, or FIRST-LAST")
    smallest = {"vocabulary": 0}
    smallest |= dict.fromkeys(("target_length", "batch", "steps", "eval_every", "eval_samples", "parallel"), 1)
    for name, least in smallest.items():
        if getattr(options, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')}: {getattr(options, name)}; use {least} or more")
    last_steps = set(steps_of.values())
    for step in options.at:
        if step not in last_steps and (step % options.eval_every or not 0 < step <= max(last_steps)):
            every = f"multiples of --eval-every {options.eval_every}, or the last step"
            raise ConfigError(f"--at: {step}: nothing is evaluated then; use {every}")
    if not options.minutes > 0:
        raise ConfigError(f"--minutes: {options.minutes}; use a number above 0")
    return options


def main(arguments: list[str]) -> int:
    """Train what is left to train, write the results, and return the exit status: STOPPED if something is left."""
    options = parse(arguments)
    taken = set(options.seeds)
    added = [read_added(path, options, taken) for path in options.add]
    deadline = time.monotonic() + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the trainers are stopped on the way out
    try:
        shards = options.shards or make_shards(
            options.text or default_text(), options.vocabulary or None, options.output, deadline
        )
        if shards is None:
            return STOPPED
        fingerprint = open_shards(str(shards)).fingerprint
        for path, (other, _) in zip(options.add, added, strict=True):
            if other != fingerprint:
                print(f"note: {path} is of other text: differences may be compared, losses not", flush=True)
        lengths = {length: jobs_of(options, shards.absolute(), length) for length in options.lengths}
        jobs = [job for timed, curves in lengths.values() for job in (*timed, *curves)]
        text = [str(shards)] if options.shards else [*(options.text or ["default"]), str(options.vocabulary)]
        settings = {job.name: [s for s in job.settings if not s.startswith("data.shards=")] for job in jobs}
        check_unchanged({"text": text, **settings}, options.output / "settings.json")
        problems: dict[str, str] = {}
        for timed, curves in lengths.values():
            problems |= train([*timed, *curves], options.parallel, deadline, visible_gpus())
    except KeyboardInterrupt:
        print("stopped; the same command continues", flush=True)
        return STOPPED
    finally:
        signal.signal(signal.SIGTERM, before)
    results = [
        read_results(options, length, *of_length, [found[length] for _, found in added if length in found])
        for length, of_length in lengths.items()
    ]
    content = {"device": device_line(), **description(options), "fingerprint": fingerprint, "lengths": results}
    write_whole(options.output / "curves.json", json.dumps(content, indent=1).encode())
    lines = [device_line(), *(line for result in results for line in ("", *table(result)))]
    write_whole(options.output / "table.txt", ("\n".join(lines) + "\n").encode())
    plot(results).savefig(options.output / "curves.png", dpi=150)
    print("\n".join([*lines, *(f"{name} failed: {problem}" for name, problem in problems.items())]), flush=True)
    if problems:
        return 1
    left = sum(not job.is_done() for job in jobs)
    if left:
        print(f"{left} of {len(jobs)} runs are not finished; the same command continues")
    return STOPPED if left else 0
