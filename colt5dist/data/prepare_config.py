"""The settings of prepare, as the command line gives them."""

from dataclasses import dataclass
from pathlib import Path

from colt5dist.data.train_tokenizer import SMALLEST_VOCABULARY


@dataclass(kw_only=True)
class PrepareConfig:
    """What `prepare` reads and writes."""

    input: list[str]
    """Glob patterns and folders of text, jsonl and parquet files."""
    output: Path
    """Folder to be made."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; None takes bytes."""
    train_tokenizer: int | None = None
    """Make a tokenizer of so many ids from the inputs first."""
    validation_fraction: float = 0.01
    """Share of the documents that is held out, above 0 and at most 0.5; at least one is."""
    text_key: str = "text"
    """Key of the text in a jsonl line, column of the text in a parquet file."""
    min_document_tokens: int = 0
    """Documents of fewer tokens are left out."""
    deduplicate: bool = False
    """Keep the first of several documents with the same text."""
    workers: int = 0
    """Processes that tokenize (0: the main process does)."""
    strict: bool = False
    """Stop at the first document that cannot be read, instead of leaving it out."""
    shard_bytes: int = 1 << 29
    """Largest size of a shard in bytes."""
    commit_seconds: float = 10.0
    """How often the state is saved."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one line each."""
        problems = []
        if not 0 < self.validation_fraction <= 0.5:
            problems.append(
                f"--validation-fraction: {self.validation_fraction} is out of range; give more than 0 and at most 0.5"
            )
        if self.train_tokenizer is not None:
            if self.train_tokenizer < SMALLEST_VOCABULARY:
                problems.append(
                    f"--train-tokenizer: {self.train_tokenizer} ids are too few; give {SMALLEST_VOCABULARY} or more"
                )
            if self.tokenizer:
                problems.append("--train-tokenizer: makes a tokenizer, --tokenizer gives one; leave one of them out")
        for name in ("workers", "min_document_tokens"):
            if getattr(self, name) < 0:
                problems.append(f"--{name.replace('_', '-')}: {getattr(self, name)} is negative; give 0 or more")
        if self.shard_bytes < 1 << 20:
            problems.append(f"--shard-bytes: {self.shard_bytes} is too small; give 1048576 or more")
        try:
            self.text_key.encode()
        except UnicodeEncodeError:  # from bytes on the command line that are none
            problems.append(f"--text-key: {self.text_key!r} is not UTF-8; give the key as it stands in the files")
        return problems
