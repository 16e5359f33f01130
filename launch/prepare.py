"""Make shards from text: `python launch/prepare.py --input 'docs/**/*.jsonl.gz' --output shards`.

It can be stopped at any moment; the same command resumes.

`prepare.py verify SHARDS` reads everything and reports damage; `prepare.py info SHARDS` prints what the shards hold;
`prepare.py show SHARDS --config FILE --sample N` shows a sample as the model sees it. Each has its own `--help`.
"""

import io
import sys

from colt5dist.console import as_command, status_of_report
from colt5dist.data.prepare import settings
from colt5dist.data.prepare.prepare import prepare
from colt5dist.data.prepare.progress import progress
from colt5dist.data.prepare.report import check_plot, info_lines, plot_lengths, summary_lines, warning_lines
from colt5dist.data.read import shards
from colt5dist.data.verify import verify
from colt5dist.errors import ConfigError
from colt5dist.wording import count


def run_prepare(arguments: list[str]) -> int:
    """Make the shards and print what they hold."""
    config, histogram = settings.parse_prepare(arguments, __doc__)
    check_plot(histogram)
    try:
        with progress() as report:
            prepared = prepare(config, report)
    except KeyboardInterrupt:
        print(f"stopped; the same command resumes {config.output}", file=sys.stderr)
        return 130
    print("\n".join(summary_lines(prepared.manifest, prepared.validation, prepared.problems)))
    print("".join(f"{line}\n" for line in prepared.inputs.lines()), end="")
    print("".join(f"note: {note}\n" for note in prepared.notes), end="")
    if histogram:
        plot_lengths(prepared.manifest.source["document_lengths"], histogram)
    print(f"{'was already there' if prepared.was_there else 'written'}: {config.output}", flush=True)
    for line in warning_lines(prepared.manifest, prepared.validation, prepared.problems, prepared.inputs):
        print(line, file=sys.stderr)
    return 0


def run_verify(arguments: list[str]) -> int:
    """Report damage: status 1 if there is any."""
    options = settings.parse_verify(arguments)
    verified = verify(options.shards, workers=options.workers)
    for line in verified.damage:
        print(f"damaged: {line}")
    for line in verified.notes:
        print(f"note: {line}")
    state = "damaged" if verified.damage else "undamaged"
    print(f"{count(verified.num_files, 'file')}, {count(verified.num_bytes, 'byte')}: {state}")
    return 1 if verified.damage else status_of_report()


def run_info(arguments: list[str]) -> int:
    """Print what the shards hold."""
    options = settings.parse_info(arguments)
    check_plot(options.histogram)
    opened = shards.open_shards(options.shards)
    print("\n".join(info_lines(opened)))
    if options.histogram:
        plot_lengths(opened.manifest.source.get("document_lengths"), options.histogram)
    return status_of_report()


def run_show(arguments: list[str]) -> int:
    """Show one sample."""
    from colt5dist.train.report.show_sample import show_sample  # imported here: it needs the trainer's configuration

    options = settings.parse_show(arguments)
    colour = sys.stdout.isatty() if options.colour == "auto" else options.colour == "always"
    changes = [*options.settings, *([f"data.shards={options.shards}", "data.sources=[]"] if options.shards else [])]
    lines = show_sample(options.config, changes, options.sample, world_size=options.world_size, colour=colour)
    print("\n".join(lines))
    return status_of_report()


VERBS = {"verify": run_verify, "info": run_info, "show": run_show}


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names, or prepare; return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder name may not be valid UTF-8
    try:
        if arguments and arguments[0] in VERBS:
            return VERBS[arguments[0]](arguments[1:])
        return run_prepare(arguments)
    except ConfigError as error:
        print("".join(f"error: {line}\n" for line in str(error).splitlines()), end="", file=sys.stderr)
        return 2


command = as_command(main)

if __name__ == "__main__":
    sys.exit(command())
