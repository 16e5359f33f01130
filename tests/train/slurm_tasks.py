"""Runs launch/pretrain.py as a task of Slurm without a launcher, whose variables become those of srun."""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    size = os.environ["WORLD_SIZE"]
    srun = {"SLURM_PROCID": os.environ["RANK"], "SLURM_NTASKS": size, "SLURM_STEP_ID": "0", "SLURM_NNODES": "1"}
    os.environ.update(srun, SLURM_JOB_ID=sys.argv.pop(1))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    script = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
