"""Write text with a trained model: `python launch/generate.py runs/tiny --fill --text 'def add(a, b): return ___'`.

PATH is a run folder (its newest whole checkpoint is taken), a checkpoint inside one, or an exported folder. An
encoder-decoder writes the target of a text, or with --fill fills its blanks `<0>`, `<1>`, ... or `___`. A decoder-only
model continues the text. --input has a JSON object a line, and --output gets them with what was written.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from colt5dist.console import as_command, status_of_report
from colt5dist.errors import OneLineParser, step_or_best

TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the options."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("path", help="run folder, checkpoint, or exported folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="the text; what is written is printed")
    source.add_argument("--input", type=Path, metavar="JSONL", help="file with an object a line")
    add("--output", type=Path, metavar="JSONL", help="with --input: file for the objects with what was written")
    add("--input-key", default="input", help="key of the text (default: %(default)s)")
    add("--output-key", default="output", help="key of what was written (default: %(default)s)")
    add("--fill", action="store_true", help="fill the blanks of the text")
    add("--max-new-tokens", type=int, help="most tokens (default: 256), with --fill of each blank (default: 64)")
    add("--temperature", type=float, default=0.0, help="0: the likeliest tokens; above 0: drawn (default: %(default)s)")
    add("--top-k", type=int, help="draw from the k likeliest tokens only")
    add("--top-p", type=float, help="draw from the likeliest tokens with this sum of probabilities only")
    add("--num-beams", type=int, default=1, help="beams of a beam search (default: %(default)s, none)")
    add("--length-penalty", type=float, default=1.0, help="exponent of a beam's length (default: %(default)s)")
    add("--num-return-sequences", type=int, default=1, help="texts for each input (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="texts at a time (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--dtype", choices=TYPES, help="type of the weights (default: bf16 on a GPU, else fp32)")
    add("--step", type=step_or_best, help="step of the checkpoint, or best (default: the newest)")
    add("--ema", action="store_true", help="take the moving average of the weights (train.ema)")
    options = parser.parse_args(arguments)
    if (options.input is None) != (options.output is None):
        parser.error("--input and --output go together")
    if options.batch_size < 1:
        parser.error(f"--batch-size: {options.batch_size}; use 1 or more")
    return options


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    # imported late, so that --help and a wrong argument are answered at once
    from colt5dist.pretrained.generate import generate_file, generate_text

    names = "temperature top_k top_p num_beams length_penalty num_return_sequences seed".split()
    settings: dict[str, Any] = {name: getattr(options, name) for name in names}
    name, usual = ("max_answer_tokens", 64) if options.fill else ("max_new_tokens", 256)
    settings[name] = usual if options.max_new_tokens is None else options.max_new_tokens
    place = {"device": options.device, "dtype": TYPES.get(options.dtype), "step": options.step, "ema": options.ema}
    try:
        if options.text is not None:
            print("\n".join(generate_text(options.path, options.text, fills=options.fill, place=place, **settings)))
        else:
            keys = (options.input_key, options.output_key)
            files = (options.input, options.output)
            size = options.batch_size
            print(generate_file(options.path, *files, *keys, size, fills=options.fill, place=place, **settings))
    except ValueError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    return status_of_report()


command = as_command(main)

if __name__ == "__main__":
    sys.exit(command())
