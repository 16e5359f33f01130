"""Text to ids and back: bytes, or any Hugging Face tokenizer.json.

A tokenizer has `vocab_size` ids, pad and end token among them. Sentinel k has the id vocab_size + k, so no piece of
text can be taken for a sentinel.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colt5dist.errors import ConfigError

PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<PAD>")
EOS_NAMES = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|eos|>", "[EOS]", "<EOS>", "[SEP]")


class Tokenizer(ABC):
    """Ids of a vocabulary; nothing here adds or expects special tokens around a text."""

    kind: str
    """Name of the kind in the manifest."""
    vocab_size: int
    """Ids are 0..vocab_size-1; sentinels follow."""
    pad_id: int
    """Fills rows, and starts the decoder."""
    eos_id: int
    """Ends inputs and targets, and stands between documents that share a row."""
    fingerprint: str
    """sha256 of what decides the ids."""

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.integer]:
        """Ids of a text, (tokens,), without special tokens: a special token's name in the text is ordinary text.

        Raises:
            ConfigError: the tokenizer has no ids for something in the text.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens and sentinels give none."""

    @property
    @abstractmethod
    def byte_lengths(self) -> NDArray[np.int64]:
        """(vocab_size,) UTF-8 bytes of text that each id stands for; 0 for special tokens."""

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type, of 16 or 32 bits, that holds all ids."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: id = byte + 3, after pad 0, end token 1 and unknown 2."""

    kind = "bytes"
    vocab_size = 259
    pad_id = 0
    eos_id = 1
    unk_id = 2
    first_byte = 3
    fingerprint = hashlib.sha256(b"utf-8 bytes + 3; pad 0, eos 1, unk 2").hexdigest()

    def encode(self, text: str) -> NDArray[np.integer]:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16) + np.uint16(self.first_byte)

    def decode(self, ids: Iterable[int]) -> str:
        known = range(self.first_byte, self.vocab_size)
        return bytes(int(token) - self.first_byte for token in ids if int(token) in known).decode(errors="replace")

    @property
    def byte_lengths(self) -> NDArray[np.int64]:
        lengths = np.ones(self.vocab_size, dtype=np.int64)
        lengths[: self.first_byte] = 0
        return lengths


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of the Hugging Face `tokenizers` library.

    Pad and end token are found by their usual names; where the file has none (or one token for both), an id above its
    vocabulary is reserved.
    """

    kind = "tokenizer.json"

    def __init__(self, path: str | Path) -> None:
        """Read the file; ConfigError if it is missing or is not a tokenizer."""
        from tokenizers import Tokenizer as Backend  # late: the byte tokenizer must not need the library

        self._path = path
        try:
            self.content = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}); give a Hugging Face tokenizer.json"
            ) from None
        try:
            self._backend = Backend.from_str(self.content.decode())
            self._description = json.loads(self.content)
        except Exception as error:  # the library raises plain Exception
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{path}: is not a Hugging Face tokenizer.json ({reason})") from None
        # a file may carry a length limit and may take "</s>" in a text for the end token; neither is wanted here
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._specials = {
            token: added.content for token, added in self._backend.get_added_tokens_decoder().items() if added.special
        }
        self._pieces = {token: piece for piece, token in self._backend.get_vocab(with_added_tokens=True).items()}
        if not self._pieces:
            raise ConfigError(f"{path}: has an empty vocabulary; train it first")
        self.vocab_size = max(self._pieces) + 1
        self.eos_id = self._find(EOS_NAMES)
        self.pad_id = self._find(PAD_NAMES)
        self.fingerprint = hashlib.sha256(self.content).hexdigest()

    def _find(self, names: tuple[str, ...]) -> int:
        """Id of the first of `names` in the vocabulary, or a new id above it."""
        for name in names:
            token = self._backend.token_to_id(name)
            if token is not None:
                self._specials[token] = name
                return token
        self.vocab_size += 1
        return self.vocab_size - 1

    def encode(self, text: str) -> NDArray[np.integer]:
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises no narrower kind
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{self._path}: cannot encode every text ({reason}); give its vocabulary an unknown token, or take "
                "another tokenizer"
            ) from None
        return np.array(ids, dtype=self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(token) for token in ids if int(token) in self._pieces and int(token) not in self._specials]
        return self._backend.decode(known, skip_special_tokens=True)

    @property
    def byte_lengths(self) -> NDArray[np.int64]:
        decoders = _steps(self._description.get("decoder"), "decoders")
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        added = self._backend.get_added_tokens_decoder()
        for token, piece in self._pieces.items():
            if token not in self._specials:
                lengths[token] = len(piece.encode()) if token in added else _piece_bytes(piece, decoders)
        return lengths


def _steps(description: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """The steps of a decoder's description, a Sequence unfolded."""
    if description is None:
        return []
    if description.get("type") == "Sequence":
        return [step for part in description[parts] for step in _steps(part, parts)]
    return [description]


def _piece_bytes(piece: str, decoders: list[dict[str, Any]]) -> int:
    """UTF-8 bytes of the text that a piece of the vocabulary stands for, by the file's own decoder steps."""
    kinds = {step["type"]: step for step in decoders}
    if "ByteLevel" in kinds:
        return len(piece)  # one character a byte
    if "ByteFallback" in kinds and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    if "WordPiece" in kinds:
        prefix = kinds["WordPiece"]["prefix"]
        # a piece that begins a word stands for the space before it, too
        return len(piece.removeprefix(prefix).encode()) + (not piece.startswith(prefix))
    if "BPEDecoder" in kinds:
        suffix = kinds["BPEDecoder"]["suffix"]
        return len(piece.removesuffix(suffix).encode()) + piece.endswith(suffix)
    for step in decoders:
        if step["type"] == "Metaspace":
            piece = piece.replace(step["replacement"], " ")
        elif step["type"] == "Replace" and "String" in step["pattern"]:
            piece = piece.replace(step["pattern"]["String"], step["content"])
    return len(piece.encode())
