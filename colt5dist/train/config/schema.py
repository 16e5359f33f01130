"""The configuration of a run: one dataclass per section with its defaults; YAML and the command line set the values.

Each section checks its own fields in `problems`; `RunConfig.problems` checks what concerns several sections. A message
begins with the key, says what is wrong, and ends with how to fix it.

`keeps_result` and `of_a_host` mark the fields that do not change the result of a run (colt5dist/marks.py).
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from colt5dist.data.config import DataConfig
from colt5dist.data.order.mixture import parse_mixture
from colt5dist.marks import keeps_result, of_a_host
from colt5dist.model.config import CoLT5Config
from colt5dist.train.config.deepspeed_sections import deepspeed_problems
from colt5dist.train.config.evaluation_keys import evaluation_problems


@dataclass(kw_only=True)
class TrainConfig:
    """Number of steps, batch sizes and execution of the run."""

    steps: int = keeps_result(1000)
    """Optimizer steps after which the run is finished. Schedules do not read it, so a longer run is the same run."""
    global_batch_size: int = 256
    """Samples per optimizer step, over all devices."""
    micro_batch_size: int = keeps_result(8)
    """Samples that a device processes at once, at most its share of a step; gradient accumulation follows from it."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the forward and backward pass; auto: bf16 on GPUs, fp32 on CPUs. The optimizer works in fp32."""
    activation_checkpointing: Literal["none", "full", "full_keep_routing"] = keeps_result("none")
    """What is recomputed in the backward pass: nothing, every layer, or every layer except the routers' decisions."""
    compile: Literal["auto", "layers", "off"] = keeps_result("auto")
    """On GPUs: auto compiles the layers and, at ZeRO stages 1 to 3, records forward and backward of a micro-batch in
    one CUDA graph; layers only compiles the layers; off does neither. Nothing is compiled on CPUs."""
    z_loss: float = 1e-4
    """Weight of the squared log-normaliser of the output softmax, added to the training loss."""
    log_every: int = keeps_result(10)
    """Steps between two records in metrics.jsonl and TensorBoard."""
    eval_every: int = keeps_result(500)
    """Steps between two evaluations on the held-out split; 0: only before the first and after the last step."""
    eval_samples: int = keeps_result(64)
    """Held-out samples per evaluation, the same ones each time."""
    eval_shuffled_inputs: bool = keeps_result(False)
    """Also evaluate with each sample given its neighbour's input; shows how much the decoder uses the encoder."""
    eval_generate_samples: int = keeps_result(0)
    """With data.mixture=pairs: held-out pairs, the first ones, for whose inputs each evaluation but the one before the
    first step also generates texts and scores them; 0: none."""
    early_stopping_patience: int | None = keeps_result(None)
    """Evaluations in a row, none of them better than the best one before, after which the run is finished, by the key
    of checkpoint.keep_best, or eval/loss; null: no early stop."""
    routing_every: int = keeps_result(100)
    """Steps between two records of the routers' statistics; 0: none."""
    max_minutes: float | None = keeps_result(None)
    """Minutes after the start of the process at which the run writes a checkpoint and stops with status 75; null: no
    limit."""
    timeout_minutes: float = keeps_result(30.0)
    """Minutes without progress after which the run is ended with an error, before the first step (also the first with
    new lengths) is done, and while checkpoints are written or read or the data is opened."""
    timeout_seconds: float = keeps_result(600.0)
    """Seconds without progress (a step, a batch of an evaluation) after which the run is ended with an error at all
    other times. A rank that is silent for a third of them is named as lost."""
    heartbeat_port: int = keeps_result(0)
    """Port of rank 0's host on which the ranks tell each other that they are alive; 0: any free one. Set it where a
    firewall lets only some ports through between the hosts."""
    ema: float | None = keeps_result(None)
    """Decay rate of an exponential moving average of the weights, in (0, 1), for instance 0.999; null: none. It changes
    no loss of the run; checkpoints hold it, evaluations measure it, and `--ema` takes it."""
    preflight: bool = keeps_result(False)
    """Before the first step of a start, check for a few seconds that each device multiplies matrices and sums over the
    ranks rightly, which ends the start otherwise, and name devices and links that are slower than the others."""
    deterministic: bool = False
    """Use deterministic algorithms only: slower, but equal runs on one kind of device are equal to the bit."""

    def problems(self) -> list[str]:
        """Check these fields; returns what is wrong, one line per problem."""
        found = []
        for name in ("steps", "global_batch_size", "micro_batch_size", "log_every", "eval_samples"):
            if getattr(self, name) < 1:
                found.append(f"train.{name}: {getattr(self, name)} is not positive; use 1 or more")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            found.append(
                f"train.early_stopping_patience: {self.early_stopping_patience} is not positive; use 1 or more, or null"
            )
        for name in ("eval_every", "eval_generate_samples", "routing_every", "z_loss"):
            if getattr(self, name) < 0:
                found.append(f"train.{name}: {getattr(self, name)} is negative; use 0 or more")
        for name in ("max_minutes", "timeout_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 525_600:
                found.append(f"train.{name}: {value} is not within a year; use a number of minutes above 0")
        if 0 < self.timeout_minutes < 0.1:
            found.append(f"train.timeout_minutes: {self.timeout_minutes} is too short for a start; use for instance 30")
        if not 2 <= self.timeout_seconds <= 86_400:
            found.append(f"train.timeout_seconds: {self.timeout_seconds} is outside [2, 86400]; use for instance 600")
        if not 0 <= self.heartbeat_port <= 65_535:
            found.append(f"train.heartbeat_port: {self.heartbeat_port} is not a port; use 0 to 65535 (0: any free one)")
        if self.ema is not None and not 0 < self.ema < 1:
            found.append(f"train.ema: {self.ema} is outside (0, 1); use for instance 0.999, or null for no average")
        if (
            self.global_batch_size >= 1
            and self.micro_batch_size >= 1
            and self.global_batch_size % self.micro_batch_size
        ):
            found.append(
                f"train.micro_batch_size: {self.micro_batch_size} does not divide train.global_batch_size "
                f"{self.global_batch_size}; use one of {_divisors(self.global_batch_size)}"
            )
        return found


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer. Weight decay is never applied to norms, routing vectors, biases (of positions) and embeddings."""

    name: Literal["adamw", "muon", "adafactor"] = "adamw"
    """adamw: any ZeRO stage. muon: Muon for the matrices of attention and feed-forward layers, AdamW with the same rate
    for all else; any ZeRO stage, without zero.offload. adafactor: only zero.stage 0 in fp32 (ZeRO's flat shards change
    what it computes); it is PyTorch's, which uses the smaller of lr and 1 / sqrt(step), and no betas and eps."""
    lr: float = 1e-3
    """Largest learning rate, reached at the end of the warm-up."""
    router_lr_factor: float = 1.0
    """Factor of the learning rate for the routing vectors, above 0."""
    beta1: float = 0.9
    """Decay rate of AdamW's first moment, in [0, 1)."""
    beta2: float = 0.95
    """Decay rate of AdamW's second moment, in [0, 1)."""
    eps: float = 1e-8
    """AdamW's epsilon, above 0."""
    momentum: float = 0.95
    """Decay rate of Muon's momentum, in [0, 1)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices; 0: none."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0: no clipping."""

    def problems(self) -> list[str]:
        """Check these fields; returns what is wrong, one line per problem."""
        found = []
        for name in ("lr", "router_lr_factor", "eps"):
            if getattr(self, name) <= 0:
                found.append(f"optimizer.{name}: {getattr(self, name)} is not positive; use a number above 0")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"optimizer.{name}: {getattr(self, name)} is outside [0, 1); use for instance 0.9")
        for name in ("weight_decay", "gradient_clipping"):
            if getattr(self, name) < 0:
                found.append(f"optimizer.{name}: {getattr(self, name)} is negative; use 0 or more")
        return found


@dataclass(kw_only=True)
class ScheduleConfig:
    """The learning rate as a function of the step. It never reads train.steps."""

    name: Literal["inverse_sqrt", "cosine", "warmup_stable_decay", "constant"] = "inverse_sqrt"
    """Shape after the linear warm-up."""
    warmup_steps: int = 10_000
    """Steps of linear warm-up from 0 to optimizer.lr; inverse_sqrt decays as sqrt(warmup_steps / step) from there."""
    total_steps: int | None = None
    """Last step of the decay of cosine and warmup_stable_decay; the rate stays at its minimum afterwards, which must be
    above 0 if there are such steps. A minimum of 0 would be reached one step after it."""
    decay_steps: int | None = None
    """Number of steps of the final linear decay of warmup_stable_decay."""
    min_lr_ratio: float = 0.0
    """Smallest rate of cosine and warmup_stable_decay, as a share of optimizer.lr (0 to 1)."""

    def problems(self) -> list[str]:
        """Check these fields; returns what is wrong, one line per problem."""
        found = []
        if self.warmup_steps < 1:
            found.append(f"schedule.warmup_steps: {self.warmup_steps} is not positive; use 1 or more")
        if not 0 <= self.min_lr_ratio <= 1:
            found.append(f"schedule.min_lr_ratio: {self.min_lr_ratio} is outside [0, 1]; use a share of optimizer.lr")
        if self.name in ("cosine", "warmup_stable_decay"):
            if self.total_steps is None:
                found.append(f"schedule.total_steps: {self.name} needs a horizon; set it, for instance to train.steps")
            elif self.total_steps <= self.warmup_steps:
                found.append(
                    f"schedule.total_steps: {self.total_steps} is not beyond the warm-up; use more than "
                    f"schedule.warmup_steps {self.warmup_steps}"
                )
        if self.name == "warmup_stable_decay":
            if self.decay_steps is None or self.decay_steps < 1:
                found.append("schedule.decay_steps: warmup_stable_decay needs it; set the steps of the final decay")
            elif self.total_steps is not None and self.decay_steps > self.total_steps - self.warmup_steps:
                found.append(
                    f"schedule.decay_steps: {self.decay_steps} does not fit between the warm-up and "
                    f"schedule.total_steps; use {max(self.total_steps - self.warmup_steps, 1)} or fewer"
                )
        return found


@dataclass(kw_only=True)
class ZeroConfig:
    """How DeepSpeed's ZeRO shards the model states over the devices."""

    stage: Literal[0, 1, 2, 3] = keeps_result(1)
    """What is sharded. 0: nothing, 1: optimizer states, 2: also gradients, 3: also parameters. Stage 0 in bf16 runs as
    stage 1."""
    offload: Literal["none", "optimizer", "parameters"] = keeps_result("none")
    """Model states kept in host memory: optimizer (stages 1-3) or also the parameters (stage 3)."""
    reduce_dtype: Literal["fp32", "bf16"] = keeps_result("fp32")
    """Precision in which gradients are summed over devices."""
    bucket_size: int = keeps_result(500_000_000)
    """Number of elements of a communication bucket."""
    persistence_threshold: int = keeps_result(100_000)
    """Stage 3: parameters with fewer elements are kept whole on every device."""

    def problems(self) -> list[str]:
        """Check these fields; returns what is wrong, one line per problem."""
        found = []
        if self.offload == "parameters" and self.stage != 3:
            found.append(
                f"zero.offload: parameters needs zero.stage=3, not {self.stage}; set it, or zero.offload=optimizer"
            )
        if self.offload == "optimizer" and self.stage == 0:
            found.append("zero.offload: optimizer needs zero.stage 1, 2 or 3; set zero.stage=1")
        if not 1_000 <= self.bucket_size < 2**40:
            found.append(f"zero.bucket_size: {self.bucket_size} is outside [1000, 2**40); use for instance 500000000")
        if self.persistence_threshold < 0:
            found.append(f"zero.persistence_threshold: {self.persistence_threshold} is negative; use 0 or more")
        return found


@dataclass(kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every_steps: int = keeps_result(1000)
    """Steps between two checkpoints; 0: none. The last step and a requested stop are always saved."""
    every_minutes: float | None = keeps_result(None)
    """Minutes between two checkpoints by the clock of rank 0, counted from the start or the last save; null: only
    every_steps counts."""
    keep_last: int = keeps_result(2)
    """Number of newest whole checkpoints to keep; older ones are deleted once a newer one is whole."""
    keep_every: int = keeps_result(0)
    """Checkpoints of steps that are a multiple of it are never deleted; 0: none."""
    keep_best: str | None = keeps_result(None)
    """A key of evaluations, for instance eval/loss: an evaluation that is the best so far by it saves a checkpoint, and
    the best one is kept besides the others; null: none is."""
    on_error: Literal["continue", "stop"] = keeps_result("continue")
    """What happens if a checkpoint cannot be written. The last one of a run, or before a stop, always ends the run with
    status 74. Older checkpoints are not changed in any case."""
    asynchronous: bool = keeps_result(False)
    """Copy to host memory and write while training continues; needs host memory of the size of a checkpoint,
    over all ranks."""

    def problems(self) -> list[str]:
        """Check these fields; returns what is wrong, one line per problem."""
        found = []
        if self.keep_last < 1:
            found.append(f"checkpoint.keep_last: {self.keep_last} is not positive; use 1 or more")
        for name in ("every_steps", "keep_every"):
            if getattr(self, name) < 0:
                found.append(f"checkpoint.{name}: {getattr(self, name)} is negative; use 0 or more")
        if self.every_minutes is not None and not 0 < self.every_minutes <= 525_600:
            found.append(
                f"checkpoint.every_minutes: {self.every_minutes} is not within a year; use a number of minutes above 0"
            )
        return found


@dataclass(kw_only=True)
class HealthConfig:
    """What happens when losses or gradients are not finite, and at loss spikes."""

    max_skipped: int = keeps_result(10)
    """Steps in a row, skipped because a loss or gradient was not finite, after which the run ends with status 1."""
    spike_window: int = keeps_result(100)
    """Number of applied steps that a loss is compared with; before there are as many, no loss counts as a spike."""
    spike_threshold: float = keeps_result(10.0)
    """A loss this many robust standard deviations above the window's median is a spike."""
    on_spike: Literal["warn", "rollback"] = keeps_result("warn")
    """warn: log and count it; rollback: also go back to the last checkpoint and pass over the samples around it."""
    skip_steps: int = keeps_result(20)
    """Number of steps up to and including the spike whose samples are passed over after a rollback."""
    max_rollbacks: int = keeps_result(3)
    """Largest number of rollbacks of a run; further spikes are only logged."""

    def problems(self) -> list[str]:
        """Check these fields; returns what is wrong, one line per problem."""
        found = [
            f"health.{name}: {getattr(self, name)} is too small; use {smallest} or more"
            for name, smallest in (("max_skipped", 1), ("spike_window", 4), ("skip_steps", 1), ("max_rollbacks", 0))
            if getattr(self, name) < smallest
        ]
        if self.spike_threshold <= 0:
            found.append(f"health.spike_threshold: {self.spike_threshold} is not positive; use for instance 10")
        return found


@dataclass(kw_only=True)
class ProfileConfig:
    """A window of steps that is recorded with torch.profiler."""

    steps: list[int] = keeps_result(factory=list)
    """First and last step of the window, for instance [20, 23]; the trace goes to `profile/` in the run directory."""

    def problems(self) -> list[str]:
        """Check these fields; returns what is wrong, one line per problem."""
        if self.steps and (len(self.steps) != 2 or not 1 <= self.steps[0] <= self.steps[1]):
            return [f"profile.steps: {self.steps} is not a window; use for instance [20,23]"]
        return []


@dataclass(kw_only=True)
class MonitorConfig:
    """What is shown of a run beside the numbers in metrics.jsonl and TensorBoard."""

    held_out_sample: bool = keeps_result(True)
    """At each evaluation also show one held-out sample in TensorBoard: what the model writes beside the truth, and two
    pictures of what is routed, which are kept in `routing/` of the run directory too."""
    wandb: bool = keeps_result(False)
    """Also write the numbers to Weights & Biases; needs the package wandb."""

    def problems(self) -> list[str]:
        """Check these fields; returns what is wrong, one line per problem."""
        return []


SECTIONS = ("model", "data", "train", "optimizer", "schedule", "zero", "checkpoint", "health", "profile", "monitor")
"""Fields of `RunConfig` that are sections of their own."""


@dataclass(kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    run_dir: str | None = of_a_host(None)
    """Folder of the run; null: runs/<name of the config file>."""
    seed: int = 0
    """Seed of the initial weights, the data order, the masks and random routing."""
    resume: Literal["never", "auto", "must"] = keeps_result("auto")
    """auto: resume from the newest whole checkpoint, if any; must: fail without one; never: fail if there is a run."""
    resume_allow: list[str] = keeps_result(factory=list)
    """Keys that may differ from the run that is resumed, for instance [optimizer.lr]; from_zero: start at step 0 if
    there are checkpoints but none is whole."""
    init_from: str | None = keeps_result(None)
    """Run directory, checkpoint or exported folder whose weights, and nothing else, this run starts from."""
    model: CoLT5Config = field(default_factory=CoLT5Config)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Merged last into DeepSpeed's own configuration, for settings without a key here."""

    def problems(self) -> list[str]:
        """Check the configuration; needs no device, no shards and no other process.

        Returns:
            What is wrong, one line per problem.
        """
        found = [
            f"{title}.{name}: {value} is too large; give a number below 2**53"
            for title in SECTIONS
            for name, value in vars(getattr(self, title)).items()
            if isinstance(value, int) and abs(value) >= 2**53
        ]
        if found:
            return found
        for title in SECTIONS:
            section = getattr(self, title)
            found.extend(section.problems())
            for name, value in vars(section).items():
                if isinstance(value, float) and not math.isfinite(value):
                    found.append(f"{title}.{name}: {value} is not a finite number; give one")
        if self.run_dir == "":
            found.append("run_dir: is empty; give a folder, or null for runs/<name of the config file>")
        if not 0 <= self.seed < 2**32:
            found.append(f"seed: {self.seed} is outside [0, 2**32); use for instance 0")
        if not any(line.startswith(("model.", "data.", "train.")) for line in found):
            found += self._architecture_problems() + self._input_multiple_problems() + evaluation_problems(self)
            for number, stage in enumerate(self.stages[1:]):
                later = stage.model.problems() + stage.train.problems() + stage._input_multiple_problems()
                found += [f"data.length_schedule[{number}]: {line}" for line in later]
        found.extend(deepspeed_problems(self.deepspeed))
        schedule = self.schedule
        decays_to_zero = schedule.name in ("cosine", "warmup_stable_decay") and schedule.min_lr_ratio == 0
        if decays_to_zero and schedule.total_steps and schedule.total_steps < self.train.steps:
            found.append(
                f"schedule.total_steps: {schedule.total_steps} is before the last step, and train.steps "
                f"{self.train.steps} would go on at rate 0; set schedule.total_steps={self.train.steps}, or "
                "schedule.min_lr_ratio above 0"
            )
        if self.optimizer.name == "adafactor" and self.zero.stage != 0:
            found.append(
                f"optimizer.name: adafactor cannot work on the flat shards of zero.stage {self.zero.stage}; "
                "set zero.stage=0 or optimizer.name=adamw"
            )
        if self.optimizer.name == "muon" and self.zero.offload != "none":
            found.append(
                f"optimizer.name: muon cannot work on what zero.offload {self.zero.offload} keeps in host memory; "
                "set zero.offload=none or optimizer.name=adamw"
            )
        return found

    def _architecture_problems(self) -> list[str]:
        found = []
        causal = self.model.architecture == "causal"
        if causal != parse_mixture(self.data.mixture).is_causal:
            found.append(
                f"data.mixture: {self.data.mixture} does not fit model.architecture {self.model.architecture}; "
                f"set data.mixture={'causal' if causal else 'colt5'}"
            )
        if causal and self.train.eval_shuffled_inputs:
            found.append("train.eval_shuffled_inputs: model.architecture causal has no inputs to shuffle; set false")
        if causal and any(entry.num_heavy_tokens for entry in self.data.length_schedule):
            found.append(
                "data.length_schedule: num_heavy_tokens is a share of a window with model.architecture causal, which "
                "no length changes; leave it out"
            )
        return found

    def _input_multiple_problems(self) -> list[str]:
        multiple = self.model.input_multiple
        if self.data.input_length % multiple == 0:
            return []
        lower = self.data.input_length // multiple * multiple
        choices = " or ".join(str(n) for n in (lower, lower + multiple) if n)
        return [
            f"data.input_length: {self.data.input_length} is not a multiple of {multiple}, which "
            f"model.num_heavy_tokens {self.model.num_heavy_tokens} needs; use {choices}"
        ]

    @cached_property
    def stages(self) -> list["RunConfig"]:
        """Configuration of each stage: before the first entry of data.length_schedule, and from each entry on."""
        entries = self.data.length_schedule
        return [
            replace(
                self,
                data=data,
                train=replace(self.train, micro_batch_size=size or self.train.micro_batch_size),
                model=replace(self.model, num_heavy_tokens=share or self.model.num_heavy_tokens),
            )
            for data, size, share in zip(
                self.data.stages(),
                [None, *(entry.micro_batch_size for entry in entries)],
                [None, *(entry.num_heavy_tokens for entry in entries)],
                strict=True,
            )
        ]

    @property
    def stage_starts(self) -> list[int]:
        """First optimizer step of each stage."""
        return [1, *(entry.step for entry in self.data.length_schedule)]

    def stage_number(self, step: int) -> int:
        """Index in `stages` of the stage that an optimizer step belongs to."""
        return sum(entry.step <= step for entry in self.data.length_schedule)

    def stage_at(self, step: int) -> "RunConfig":
        """Configuration of the stage that an optimizer step belongs to."""
        return self.stages[self.stage_number(step)]

    def batch_problems(self, world_size: int) -> list[str]:
        """Check the batch sizes on `world_size` devices at every stage; returns what is wrong, one line per problem."""
        problems = [problem for stage in self.stages for problem in stage._batch_problems(world_size)]
        return list(dict.fromkeys(problems))

    def _batch_problems(self, world_size: int) -> list[str]:
        train = self.train
        if train.global_batch_size % world_size:
            fix = f"use a multiple of {world_size}, or another number of devices"
            return [
                f"train.global_batch_size: {train.global_batch_size} does not divide among {world_size} devices; {fix}"
            ]
        share = train.global_batch_size // world_size
        if share % self.micro_batch_size(world_size) == 0:
            return []
        return [
            f"train.micro_batch_size: {train.micro_batch_size} does not divide the {share} samples that each of "
            f"{world_size} devices gets of train.global_batch_size {train.global_batch_size}; use one of "
            f"{_divisors(share)}"
        ]

    def micro_batch_size(self, world_size: int) -> int:
        """Samples that a device processes at once: train.micro_batch_size, or its share of a step if it is smaller."""
        return min(self.train.micro_batch_size, self.train.global_batch_size // world_size)

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per device and optimizer step."""
        return self.train.global_batch_size // (self.micro_batch_size(world_size) * world_size)


def _divisors(number: int) -> str:
    small = [n for n in range(1, min(math.isqrt(number), 10_000) + 1) if number % n == 0]
    return ", ".join(str(n) for n in sorted({*small, *(number // n for n in small)}))
