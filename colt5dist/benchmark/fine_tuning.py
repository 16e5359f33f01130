"""Does fine-tuning pay: a model pretrained for some minutes, asked before and after tuning, beside answers without one.

The text and its held-out packages are those of the benchmark `learning`. The model is pretrained on it by
`launch/pretrain.py` for --minutes, and then tuned on questions about the same packages: the name of a function or
class, and a part of its module; the answer is the first sentence of its docstring. Asked are questions on held-out
packages, whose answers no training question has. Beside the model stand the commonest answer, and the first docstring
of each input. The same command continues where it was stopped; of an interrupted pretraining two minutes may be lost.
"""

import argparse
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colt5dist.benchmark import device_line
from colt5dist.benchmark.learning import SIZES
from colt5dist.benchmark.package_text import (
    default_text,
    first_docstring,
    held_out_packages,
    make_shards,
    write_questions,
)
from colt5dist.benchmark.side_by_side import STOPPED, check_unchanged
from colt5dist.benchmark.step import with_children_ended
from colt5dist.errors import ConfigError
from colt5dist.files import write_whole
from colt5dist.packaged import CONFIGS, SCRIPTS
from colt5dist.pretrained.metrics import mean_scores, score_text
from colt5dist.train.report.monitor import read_metrics

VOCABULARY, MODEL_VOCABULARY = 8000, 8192
"""Ids of the tokenizer, and of the model, which has sentinels as well."""
MODEL = (*(setting for setting in SIZES if setting.startswith("model.")), f"model.vocab_size={MODEL_VOCABULARY}")
PRETRAINING = (
    "data.input_length=2048",
    "data.target_length=456",
    "data.num_workers=4",
    "train.log_every=100",
    "train.eval_every=1000",
    "train.eval_samples=64",
    "train.routing_every=0",
    "optimizer.lr=1e-3",
    "schedule.name=inverse_sqrt",
    "schedule.warmup_steps=1000",
    "checkpoint.every_steps=0",
    "checkpoint.every_minutes=2",
    "checkpoint.keep_last=1",
    "monitor.held_out_sample=false",
)
TUNING = (
    "data.input_length=1024",
    "data.target_length=64",
    "data.num_workers=2",
    "train.log_every=50",
    "train.eval_every=250",
    "train.eval_samples=256",
    "train.eval_generate_samples=0",
    "train.early_stopping_patience=null",
    "train.routing_every=0",
    "optimizer.lr=5e-4",
    "checkpoint.every_steps=1000",
    "checkpoint.keep_best=eval/loss",
)
"""Inputs of at most 2047 bytes are about 660 tokens."""
ANSWER_TOKENS = 64
NUMBERS = ("minutes", "steps", "tuning_steps", "batch", "questions")
"""Options that are numbers above 0; another value needs another --output."""
SCORES = ("f1", "exact_match", "rougeL")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the options.

    Raises:
        ConfigError: an option has a wrong value.
    """
    parser = argparse.ArgumentParser(
        prog="benchmark.py fine_tuning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=10, metavar="M", help="minutes of pretraining (default: %(default)s)")
    add("--steps", type=int, default=1_000_000, metavar="N", help="most steps of pretraining (no limit)")
    add("--tuning-steps", type=int, default=1500, metavar="N", help="steps of tuning (default: %(default)s)")
    add("--batch", type=int, default=64, metavar="N", help="samples of a step (default: %(default)s)")
    add("--questions", type=int, default=512, metavar="N", help="held-out questions (default: %(default)s)")
    add("--text", nargs="+", metavar="GLOB", help="files of text (default: *.py of the installed packages)")
    add("--set", nargs="+", default=[], metavar="key=value", help="settings of both runs")
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder of shards, runs, and results")
    options = parser.parse_args(arguments)
    for name in NUMBERS:
        if not getattr(options, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')}: {getattr(options, name)}; use a number above 0")
    return options


def command(script: str, *arguments: Any) -> list[str]:
    """Return the command that runs a script of launch/."""
    return [sys.executable, str(SCRIPTS / f"{script}.py"), *map(str, arguments)]


def wait_for(process: subprocess.Popen[bytes], what: str, log: Path, *, may_stop: bool = False) -> None:
    """Wait for a trainer, which `may_stop` with a checkpoint before its last step.

    Raises:
        ConfigError: it failed, or stopped.
    """
    try:
        status = process.wait()
    finally:
        with_children_ended(process)
    if status != 0 and not (may_stop and status == STOPPED):
        lines = log.read_text(errors="replace").splitlines()
        raise ConfigError(f"{what} ended with status {status}; {log} says why, at last: {(lines or ['nothing'])[-1]}")


def train(options: argparse.Namespace, name: str, config: str, settings: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start or continue a run of the trainer; its log is beside its folder."""
    batch = (f"train.global_batch_size={options.batch}", f"train.micro_batch_size={options.batch}")
    own = (f"run_dir={options.output / name}", *MODEL, *batch, *settings, *options.set)
    with open(options.output / f"{name}.log", "ab") as log:
        return subprocess.Popen(
            command("pretrain", "--config", CONFIGS / config, *own), stdout=log, stderr=log, start_new_session=True
        )


def pretrain(options: argparse.Namespace, shards: Path, pairs: Path) -> dict[str, Any]:
    """Pretrain, write the questions beside it, and return steps, seconds of training and the last held-out loss."""
    done = options.output / "pretrained.json"
    if done.exists():
        return json.loads(done.read_text())
    minutes = options.minutes - seconds_of(read_metrics(options.output / "pretrained")) / 60
    limits = (f"train.steps={options.steps}", f"train.max_minutes={max(minutes, 0.1)}", f"data.shards={shards}")
    process = train(options, "pretrained", "base.yaml", (*PRETRAINING, *limits))
    try:
        make_questions(options, shards, pairs)
    except BaseException:
        with_children_ended(process)
        raise
    wait_for(process, "pretraining", options.output / "pretrained.log", may_stop=True)
    records = read_metrics(options.output / "pretrained")
    losses = [record["eval/loss"] for record in records if record.get("eval/loss") is not None]
    found = {
        "steps": records[-1]["step"] if records else 0,
        "seconds": round(seconds_of(records), 1),
        "held_out_loss": losses[-1] if losses else None,
    }
    write_whole(done, json.dumps(found).encode())
    return found


def seconds_of(records: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds that the steps of some records took, without start, evaluations and checkpoints."""
    before = (0, *(record["step"] for record in records))
    return sum(r["step_seconds"] * (r["step"] - first) for r, first in zip(records, before, strict=False))


def make_questions(options: argparse.Namespace, shards: Path, pairs: Path) -> None:
    """Write the questions and their shards, where they are not there."""
    if not pairs.exists():
        held_out = held_out_packages(shards)
        print(f"held-out packages: {', '.join(sorted(held_out))}", flush=True)
        write_questions(options.text or default_text(), held_out, pairs, options.questions)
    own = ("--pairs", "--input", pairs / "train.jsonl", "--tokenizer", shards / "tokenizer.json")
    place = ("--output", options.output / "pair-shards", "--validation-fraction", 0.01, "--workers", 1)
    if status := subprocess.run(command("prepare", *own, *place), stdout=subprocess.DEVNULL, check=False).returncode:
        raise ConfigError(f"--output: launch/prepare.py ended with status {status}; its lines above say why")


def ask(options: argparse.Namespace, run: str, held_out: Path) -> dict[str, float]:
    """Return the scores of a run's answers to the held-out questions."""
    own = ["--pairs", held_out, "--json", "--max-new-tokens", ANSWER_TOKENS, "--batch-size", options.batch]
    own += ["--predictions", options.output / f"{run}_answers.jsonl"]
    best = ["--step", "best"] if run == "tuned" else []
    done = subprocess.run(
        command("evaluate", options.output / run, *best, *own), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"{options.output / run}: launch/evaluate.py ended with status {done.returncode}")
    return json.loads(done.stdout)


def answers_without_a_model(pairs: Path) -> dict[str, dict[str, float]]:
    """Return the scores of the commonest answer of the training questions, and of the first docstring of each input."""
    with open(pairs / "train.jsonl") as file:
        commonest = Counter(json.loads(line)["output"] for line in file).most_common(1)[0][0]
    asked = [json.loads(line) for line in (pairs / "held_out.jsonl").read_text().splitlines()]
    ways = {
        "commonest answer": [commonest] * len(asked),
        "first docstring": [first_docstring(question["input"]) for question in asked],
    }
    return {
        name: mean_scores([score_text(text, [q["output"]]) for text, q in zip(texts, asked, strict=True)])
        for name, texts in ways.items()
    }


def main(arguments: list[str]) -> int:
    """Do what is left to do, and return the exit status: STOPPED if something is left."""
    options = parse(arguments)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a trainer is ended on the way out
    try:
        measure(options)
    except KeyboardInterrupt:
        print("stopped; the same command continues", flush=True)
        return STOPPED
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def measure(options: argparse.Namespace) -> None:
    """Train, ask, print the table and write it as JSON."""
    options.output = options.output.absolute()
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = [f"{name}={getattr(options, name)}" for name in NUMBERS]
    settings = [*numbers, *(f"text={place}" for place in options.text or ["default"]), *options.set]
    check_unchanged({"fine_tuning": settings}, options.output / "settings.json")
    shards = make_shards(options.text or default_text(), VOCABULARY, options.output, float("inf"))
    assert shards is not None  # without a deadline
    pairs = options.output / "pairs"
    pretrained = pretrain(options, shards, pairs)
    last = (f"train.steps={options.tuning_steps}", f"data.shards={options.output / 'pair-shards'}")
    process = train(
        options, "tuned", "finetune_base.yaml", (*TUNING, *last, f"init_from={options.output / 'pretrained'}")
    )
    wait_for(process, "tuning", options.output / "tuned.log")
    held_out = pairs / "held_out.jsonl"
    scores = {
        "tuned": ask(options, "tuned", held_out),
        "not tuned": ask(options, "pretrained", held_out),
        **answers_without_a_model(pairs),
    }
    content = {"device": device_line(), "settings": settings, "pretrained": pretrained, "scores": scores}
    write_whole(options.output / "fine_tuning.json", json.dumps(content, indent=1).encode())
    print(device_line())
    print(f"pretrained: {pretrained['steps']:,} steps in {pretrained['seconds']:.0f} s")
    print(f"{'answers':18}" + "".join(f"{name:>13}" for name in SCORES))
    for name, of in scores.items():
        print(f"{name:18}" + "".join(f"{of[score]:>13.1%}" for score in SCORES))
