"""The settings of the data room."""

from dataclasses import dataclass

from colt5dist.data.objectives import MIXTURES, lengths_of_mixture


@dataclass
class DataConfig:
    """Which text is read and how it is cut into samples."""

    shards: str = "python-stdlib"
    """Folder written by launch/prepare.py, or "python-stdlib": built from the running Python's own standard library."""
    input_length: int = 4096
    """Tokens of an encoder input, end token included (16 or more; 0 with mixture causal, which has none)."""
    target_length: int = 910
    """Largest number of tokens of a decoder target, end token included (4 or more)."""
    num_workers: int = 1
    """Reader processes of a rank (0: the training process reads itself)."""
    mixture: str = "colt5"
    """The objectives: "colt5" is prefix-LM and noise spans of mean length 3, 8 and 64, a quarter of samples each;
    "causal" is next-token prediction of target_length tokens of text, for decoder-only models."""
    num_sentinels: int | None = None
    """Sentinel ids reserved above the tokenizer's vocabulary (null: as many as the mixture needs)."""
    min_document_tokens: int = 0
    """Documents of fewer tokens are left out (0: none)."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one line each, the key first."""
        problems = []
        causal = self.mixture == "causal"
        if causal and self.input_length:
            problems.append(f"data.input_length: {self.input_length} has no use with data.mixture=causal; set 0")
        for key, smallest in (
            ("input_length", 0 if causal else 16),
            ("target_length", 4),
            ("num_workers", 0),
            ("min_document_tokens", 0),
        ):
            if getattr(self, key) < smallest:
                problems.append(f"data.{key}: {getattr(self, key)} is too small; give {smallest} or more")
        if not self.shards:
            problems.append("data.shards: is empty; give a folder written by launch/prepare.py, or python-stdlib")
        if self.mixture not in MIXTURES:
            problems.append(f"data.mixture: {self.mixture!r} is unknown; choose one of {', '.join(MIXTURES)}")
        if problems or self.num_sentinels is None:
            return problems
        lengths = lengths_of_mixture(self.mixture, self.input_length, self.target_length)
        needed = max(length.num_spans for length in lengths)
        if self.num_sentinels < needed:
            problems.append(
                f"data.num_sentinels: {self.num_sentinels} are too few, the mixture {self.mixture} needs {needed} at "
                f"data.input_length={self.input_length}; raise it to {needed} or set null"
            )
        return problems
