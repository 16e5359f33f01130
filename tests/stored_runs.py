"""Run folders written in tests without training: a model's weights as the checkpoint of two ranks."""

from pathlib import Path

import torch
from conftest import MICRO_SETTINGS, ROOT

from colt5dist.data import TOKENIZER_FOLDER, model_tokenizer
from colt5dist.data.tokenizer import ByteTokenizer, Tokenizer
from colt5dist.model.causal_colt5 import CausalCoLT5
from colt5dist.model.colt5 import CoLT5
from colt5dist.storage.checkpoints import CHECKPOINTS, WEIGHT
from colt5dist.storage.complete_file import rank_file_name
from colt5dist.storage.stored_model import CONFIG
from colt5dist.train.checkpoint.commit import commit_checkpoint
from colt5dist.train.checkpoint.folders import temporary_folder
from colt5dist.train.checkpoint.write import write_rank_file
from colt5dist.train.config.load import config_to_yaml, load_config
from colt5dist.train.engine.engine import build_model
from colt5dist.train.engine.fragments import Fragment


def write_checkpoint(run_dir: Path, model: torch.nn.Module, step: int, num_ranks: int = 2) -> Path:
    """Write a checkpoint as `num_ranks` ranks of ZeRO stage 1 do: a parameter is cut where a rank's part ends."""
    root = run_dir / CHECKPOINTS
    temporary_folder(root, step).mkdir(parents=True)
    flat = [(name, tuple(p.shape), p.detach().float().flatten()) for name, p in model.named_parameters()]
    total = sum(tensor.numel() for *_, tensor in flat)
    files = []
    for rank in range(num_ranks):
        first, last, start = total * rank // num_ranks, total * (rank + 1) // num_ranks, 0
        fragments = []
        for name, shape, tensor in flat:
            low, high = max(first - start, 0), min(last - start, tensor.numel())
            if low < high:
                fragments += [
                    Fragment(name, key, low, shape, part[low:high])
                    for key, part in ((WEIGHT, tensor), ("exp_avg", torch.full_like(tensor, 7.0)))
                ]
            start += tensor.numel()
        path = temporary_folder(root, step) / rank_file_name(rank)
        files.append(write_rank_file(path, fragments, num_threads=1))
    commit_checkpoint(root, step, {"step": step, "data_fingerprint": "0" * 64}, files, "0123456789abcdef")
    return root / f"step_{step:08d}"


def write_run(
    run_dir: Path,
    *settings: str,
    config: str = "tiny",
    steps: tuple[int, ...] = (4,),
    tokenizer: Tokenizer | None = None,
) -> CoLT5 | CausalCoLT5:
    """Write a run folder of the micro model, with random weights that differ from step to step.

    Returns:
        The model of the last step.
    """
    micro = MICRO_SETTINGS if config == "tiny" else ()
    run_config = load_config(ROOT / "configs" / f"{config}.yaml", [*micro, *settings])
    run_dir.mkdir(parents=True)
    (run_dir / CONFIG).write_text(config_to_yaml(run_config))
    model_tokenizer(tokenizer or ByteTokenizer(), run_config.data).save(run_dir / TOKENIZER_FOLDER)
    for step in steps:
        model = build_model(run_config.stage_at(step))
        assert isinstance(model, CoLT5 | CausalCoLT5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        write_checkpoint(run_dir, model, step)
    return model.eval()
