"""The tokenizer of a trained model: the text's ids, and above them mode tokens and sentinels; its files.

A run folder and an exported folder hold it in the folder `tokenizer/`: `vocabulary.json` says which tokenizer it is
and where the ids above it begin, and `tokenizer.json` is a copy of the Hugging Face tokenizer, unless every byte is a
token.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.config import DataConfig
from colt5dist.data.manifest import TOKENIZER_NAME
from colt5dist.data.order.mixture import parse_mixture, reserving_mixture
from colt5dist.data.order.objectives import MODES
from colt5dist.data.sample_lengths import required_sentinels
from colt5dist.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from colt5dist.errors import ConfigError
from colt5dist.files import write_whole

TOKENIZER_FOLDER = "tokenizer"
"""Folder, in that of a run or of an exported model, that holds the files."""
VOCABULARY_NAME = "vocabulary.json"
FORMAT_VERSION = 1
PREFIXES = ("extra_id_", "sentinel_", "colt5_sentinel_")
"""Beginnings of the sentinels' names; the first one that no token of the text has is taken."""


class ModelTokenizer:
    """Text to the ids that a model was trained on, and back, sentinels included.

    The order of the ids: those of `tokenizer` (pad and end token among them), three mode tokens if the mixture has
    any, then the sentinels. In texts a sentinel is written by its name, `<extra_id_0>` for the first.

    Args:
        tokenizer: the tokenizer of the text.
        num_modes: number of mode tokens, 0 or 3.
        num_sentinels: number of sentinels.

    Attributes:
        tokenizer: the tokenizer of the text.
        num_modes: number of mode tokens.
        num_sentinels: number of sentinels.
    """

    def __init__(self, tokenizer: Tokenizer, *, num_modes: int, num_sentinels: int) -> None:
        self.tokenizer = tokenizer
        self.num_modes = num_modes
        self.num_sentinels = num_sentinels
        taken = set(tokenizer.names)
        self._prefix = next((p for p in PREFIXES if not any(name.startswith(f"<{p}") for name in taken)), PREFIXES[-1])
        self._ids = {self.mode_name(mode): self.mode_id(mode) for mode in MODES[:num_modes]}
        self._ids.update((self.sentinel_name(number), self.sentinel_id(number)) for number in range(num_sentinels))
        self._names = {token: name for name, token in self._ids.items()}
        self._any_name = re.compile(rf"(<{self._prefix}\d+>|{'|'.join(map(re.escape, map(self.mode_name, MODES)))})")

    @property
    def pad_id(self) -> int:
        """Fills rows."""
        return self.tokenizer.pad_id

    @property
    def start_id(self) -> int:
        """First token of the decoder's input: the pad token."""
        return self.tokenizer.pad_id

    @property
    def eos_id(self) -> int:
        """Ends inputs and targets."""
        return self.tokenizer.eos_id

    @property
    def first_sentinel(self) -> int:
        """Id of the first sentinel; the others follow it."""
        return self.tokenizer.vocab_size + self.num_modes

    @property
    def vocab_size(self) -> int:
        """Number of ids; the model's embedding may have more rows."""
        return self.first_sentinel + self.num_sentinels

    @property
    def names(self) -> dict[int, str]:
        """Name of every mode token and sentinel by its id."""
        return dict(self._names)

    def sentinel_id(self, number: int) -> int:
        """Id of a sentinel.

        Raises:
            ConfigError: the model has fewer.
        """
        if not 0 <= number < self.num_sentinels:
            raise ConfigError(
                f"{self.sentinel_name(number)}: the model has {self.num_sentinels} sentinels, numbered from 0; "
                "leave fewer blanks in one text"
            )
        return self.first_sentinel + number

    def sentinel_name(self, number: int) -> str:
        """How a sentinel is written in a text."""
        return f"<{self._prefix}{number}>"

    def mode_id(self, mode: str) -> int:
        """Id of a mode token, one of R, S, X.

        Raises:
            ConfigError: the model was trained without them.
        """
        if not self.num_modes or mode not in MODES:
            raise ConfigError(f"{self.mode_name(mode)}: the model knows no such mode token; leave it out")
        return self.tokenizer.vocab_size + MODES.index(mode)

    def mode_name(self, mode: str) -> str:
        """How a mode token is written in a text."""
        return f"<mode_{mode}>"

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids of a text, (tokens,): names of sentinels and mode tokens become theirs; no end token is added.

        Raises:
            ConfigError: the text names a sentinel or mode token that the model has not, or cannot be encoded.
        """
        parts: list[NDArray[np.integer]] = [np.zeros(0, dtype=np.int64)]
        for number, part in enumerate(self._any_name.split(text)):
            if number % 2:
                parts.append(np.array([self._id_of(part)]))
            elif part:
                parts.append(self.tokenizer.encode(part))
        return np.concatenate(parts).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, with the names of sentinels and mode tokens; pad and end tokens have none."""
        pieces: list[str] = []
        run: list[int] = []
        for token in [*map(int, ids), -1]:
            if token in self._names or token == -1:
                pieces.append(self.tokenizer.decode(run) if run else "")
                pieces.append(self._names.get(token, ""))
                run = []
            else:
                run.append(token)
        return "".join(pieces)

    def save(self, folder: Path) -> None:
        """Write the files into `folder`, which is made where it is missing.

        Raises:
            OSError: they cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.tokenizer, JsonTokenizer):
            write_whole(folder / TOKENIZER_NAME, self.tokenizer.content)
        content = {
            "format_version": FORMAT_VERSION,
            "kind": self.tokenizer.kind,
            "fingerprint": self.tokenizer.fingerprint,
            "text_ids": self.tokenizer.vocab_size,
            "pad_id": self.pad_id,
            "start_id": self.start_id,
            "eos_id": self.eos_id,
            "num_modes": self.num_modes,
            "first_sentinel": self.first_sentinel,
            "num_sentinels": self.num_sentinels,
        }
        write_whole(folder / VOCABULARY_NAME, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def open(cls, folder: Path) -> "ModelTokenizer":
        """Read the files that `save` wrote.

        Raises:
            ConfigError: they are missing or damaged, or do not belong to each other.
        """
        path = folder / VOCABULARY_NAME
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}); a run writes it when it starts: continue the run once, or "
                "name a folder that has it"
            ) from None
        except ValueError:
            raise ConfigError(f"{path}: is damaged (not JSON); copy it again") from None
        try:
            version, kind, fingerprint = content["format_version"], content["kind"], content["fingerprint"]
            num_modes, num_sentinels = int(content["num_modes"]), int(content["num_sentinels"])
            first_sentinel = int(content["first_sentinel"])
        except (KeyError, TypeError, ValueError):
            raise ConfigError(f"{path}: is damaged; copy it again") from None
        if version != FORMAT_VERSION or kind not in (ByteTokenizer.kind, JsonTokenizer.kind):
            raise ConfigError(f"{path}: has format {version} and kind {kind!r}, which this version does not read")
        tokenizer = ByteTokenizer() if kind == ByteTokenizer.kind else JsonTokenizer(folder / TOKENIZER_NAME)
        found = cls(tokenizer, num_modes=num_modes, num_sentinels=num_sentinels)
        if tokenizer.fingerprint != fingerprint or found.first_sentinel != first_sentinel:
            raise ConfigError(f"{folder}: its {TOKENIZER_NAME} is not the one that {path.name} names; copy both again")
        return found

    def _id_of(self, name: str) -> int:
        """Id of a sentinel or mode token by its name."""
        if name in self._ids:
            return self._ids[name]
        number = re.fullmatch(rf"<{self._prefix}(\d+)>", name)
        return self.sentinel_id(int(number[1])) if number else self.mode_id(name.removeprefix("<mode_").rstrip(">"))


def model_tokenizer(
    tokenizer: Tokenizer, config: DataConfig, *, vocab_size: int | None = None, starts_from: Path | None = None
) -> ModelTokenizer:
    """The tokenizer of a model that is trained on a text tokenizer's ids with these settings.

    A model that is trained on pairs keeps the mode tokens and sentinels of the one that it starts from. Without one it
    has those of the default mixture, as many as its embedding has rows for.

    Args:
        tokenizer: the tokenizer of the text.
        config: the data settings.
        vocab_size: rows of the model's embedding; None: as many as are needed.
        starts_from: with pairs, a folder in which the tokenizer of the model that it starts from may be.
    """
    num_modes = parse_mixture(reserving_mixture(config.mixture)).num_modes
    num_sentinels = required_sentinels(config) if config.num_sentinels is None else config.num_sentinels
    if config.is_pairs:
        if starts_from is not None and (starts_from / VOCABULARY_NAME).exists():
            before = ModelTokenizer.open(starts_from)
            if before.tokenizer.fingerprint == tokenizer.fingerprint:
                return before
        if vocab_size is not None:
            num_sentinels = min(num_sentinels, vocab_size - tokenizer.vocab_size)
    return ModelTokenizer(tokenizer, num_modes=num_modes, num_sentinels=num_sentinels)
