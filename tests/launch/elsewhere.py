"""Starts launch/pretrain.py in another folder on each rank, as on hosts without a shared file system."""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    folder = Path(sys.argv.pop(1)) / os.environ["RANK"]
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    script = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
