"""A run that gets the file STOP in the middle of the evaluation of a step; started by test_fine_tuning.py.

python tests/train/stopped_evaluation.py STEP run_dir=DIR SETTING...
"""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from colt5dist.train import text_evaluation
from colt5dist.train.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))
from pretrain import main


def stopping_at(step: int) -> Any:
    """`evaluate_texts` which asks for a stop once the first answers of a step are generated."""
    evaluate, answer = text_evaluation.evaluate_texts, text_evaluation.answer

    def evaluated(run: Run, *arguments: Any) -> Any:
        def answered(*inputs: Any, **options: Any) -> Any:
            if run.state.step == step:
                (run.run_dir / "STOP").touch()
            return answer(*inputs, **options)

        with patch.object(text_evaluation, "answer", answered):
            return evaluate(run, *arguments)

    return evaluated


if __name__ == "__main__":
    with patch("colt5dist.train.loop.evaluate_texts", stopping_at(int(sys.argv[1]))):
        sys.exit(main(sys.argv[2:]))
