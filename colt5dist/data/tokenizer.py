"""Text to ids and back: bytes, or any Hugging Face tokenizer.json.

A tokenizer has `vocab_size` ids, which include the pad and the end token. The ids of mode tokens and sentinels are
above them, so no piece of text can be mistaken for a sentinel.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colt5dist.errors import ConfigError

PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<PAD>")
EOS_NAMES = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|eos|>", "[EOS]", "<EOS>", "[SEP]")
OTHER_SPECIAL_NAMES = re.compile(
    r"<extra_id_\d+>|<sentinel_\d+>|\[(NLU|NLG|S2S)\]|\[(MASK|CLS|BOS|UNK)\]|<(s|bos|unk|mask)>"
)
"""Sentinels, mode tokens and their like, in files that add them without marking them as special."""
BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer(ABC):
    """A vocabulary and its ids. No method adds or expects special tokens around a text."""

    kind: str
    """Name of the kind in the manifest."""
    vocab_size: int
    """Ids are 0..vocab_size-1; mode tokens and sentinels follow."""
    pad_id: int
    """Fills rows, and is the first token of the decoder's input."""
    eos_id: int
    """Ends inputs and targets, and separates documents that share a row."""
    unk_id: int | None = None
    """Stands for a part of a text that the vocabulary lacks; None: there is no such id."""
    fingerprint: str
    """sha256 of everything that decides the ids."""
    notes: tuple[str, ...] = ()
    """What of the tokenizer's file is not used, one sentence each."""

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.integer]:
        """Return the ids of a text, (tokens,).

        There are no special tokens among them: the name of a special token in the text is ordinary text.

        Raises:
            ConfigError: the tokenizer has no ids for a part of the text.
        """

    def unknown_parts(self, text: str) -> list[str]:
        """Return the parts of a text for which the tokenizer gives `unk_id`, in order."""
        return []

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens, mode tokens and sentinels have none."""

    @property
    @abstractmethod
    def byte_lengths(self) -> NDArray[np.int64]:
        """(vocab_size,) number of UTF-8 bytes of text that each id represents; 0 for special tokens."""

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """How the tokens of the vocabulary are written; empty where no text is the name of a token."""

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
        return np.add(np.frombuffer(text.encode(), dtype=np.uint8), np.uint16(self.first_byte), dtype=np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        known = range(self.first_byte, self.vocab_size)
        return bytes(int(token) - self.first_byte for token in ids if int(token) in known).decode(errors="replace")

    @property
    def byte_lengths(self) -> NDArray[np.int64]:
        lengths = np.ones(self.vocab_size, dtype=np.int64)
        lengths[: self.first_byte] = 0
        return lengths

    @property
    def names(self) -> frozenset[str]:
        return frozenset()


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of the Hugging Face `tokenizers` library.

    Pad and end token are found by their usual names (PAD_NAMES, EOS_NAMES). A missing one gets a new id above the
    vocabulary of the file. Length limit, padding and dropout of the file are switched off, so a text always has the
    same ids.

    Args:
        path: path of the file.

    Attributes:
        file_vocab_size: ids of the file are below it.

    Raises:
        ConfigError: the file is missing, or is not a tokenizer.
    """

    kind = "tokenizer.json"

    def __init__(self, path: str | Path) -> None:
        from tokenizers import Tokenizer as Backend  # imported here: the byte tokenizer must not need the library

        self._path = path
        try:
            self.content = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}); give a Hugging Face tokenizer.json"
            ) from None
        try:
            backend = Backend.from_str(self.content.decode())
            backend.no_truncation()
            backend.no_padding()
            self._pieces = {token: piece for piece, token in backend.get_vocab(with_added_tokens=True).items()}
            self._description = json.loads(backend.to_str())
        except Exception as error:  # the library raises plain Exception
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{path}: is not a Hugging Face tokenizer.json ({reason})") from None
        if not self._pieces:
            raise ConfigError(f"{path}: has an empty vocabulary; train it first")
        self.file_vocab_size = self.vocab_size = max(self._pieces) + 1
        self._added = {token: added.content for token, added in backend.get_added_tokens_decoder().items()}
        self._specials = {
            token
            for token, added in backend.get_added_tokens_decoder().items()
            if added.special or OTHER_SPECIAL_NAMES.fullmatch(added.content)
        }
        self.eos_id = self._find(EOS_NAMES)
        self.pad_id = self._find(PAD_NAMES)
        self.fingerprint = hashlib.sha256(self.content).hexdigest()
        model = self._description["model"]
        unknown = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token")
        self.unk_id = backend.token_to_id(unknown) if unknown is not None else None
        if self.unk_id is not None and model["type"] != "WordLevel":  # there, a known word may stand for unknown ones
            self._specials.add(self.unk_id)
        if model.get("dropout"):
            self.notes = (f"{path}: its dropout of {model['dropout']} is not used: a text always has the same ids",)
            model["dropout"] = None
        if model.get("byte_fallback"):  # <0x0A> stands for a byte of text, even where a file calls it special
            self._specials -= {token for token in self._specials if BYTE_NAME.fullmatch(self._pieces.get(token, ""))}
        secret = self.fingerprint[:16]
        hidden = {
            self._pieces[token]: f"\U0010ffff{secret}{token}" for token in self._specials if token in self._pieces
        }
        self._backend = Backend.from_str(json.dumps(_rename_pieces(self._description, hidden)))
        self._backend.encode_special_tokens = True

    def _find(self, names: tuple[str, ...]) -> int:
        """Return the id of the first of `names` that is in the vocabulary, or else a new id above the vocabulary."""
        ids = {piece: token for token, piece in self._pieces.items() if piece in names}
        for name in names:
            if name in ids:
                self._specials.add(ids[name])
                return ids[name]
        self.vocab_size += 1
        return self.vocab_size - 1

    def encode(self, text: str) -> NDArray[np.integer]:
        return np.array(self._encode(text).ids, dtype=self.dtype)

    def encode_with_places(self, text: str) -> tuple[NDArray[np.integer], NDArray[np.int64], NDArray[np.int64]]:
        """Return the ids of a text, and where each begins and ends in the text, in characters: each (tokens,)."""
        encoding = self._encode(text)
        places = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.array(encoding.ids, dtype=self.dtype), places[:, 0], places[:, 1]

    def _encode(self, text: str) -> Any:
        try:
            return self._backend.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises no narrower kind
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{self._path}: cannot encode every text ({reason}); add an unknown token to its vocabulary, or use "
                "another tokenizer"
            ) from None

    def unknown_parts(self, text: str) -> list[str]:
        encoding = self._encode(text)
        places = zip(encoding.ids, encoding.offsets, strict=True)
        return [text[begin:end] for token, (begin, end) in places if token == self.unk_id]

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(token) for token in ids if int(token) in self._pieces and int(token) not in self._specials]
        return self._backend.decode(known, skip_special_tokens=False)

    @property
    def byte_lengths(self) -> NDArray[np.int64]:
        decoders = _steps(self._description.get("decoder"), "decoders")
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, piece in self._pieces.items():
            if token not in self._specials:
                lengths[token] = len(piece.encode()) if token in self._added else _piece_bytes(piece, decoders)
        return lengths

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._pieces.values())

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids of the file's tokens that mark the end of a document."""
        return frozenset(token for token, piece in self._pieces.items() if piece in EOS_NAMES)

    @property
    def special_names(self) -> dict[int, str]:
        """Names of the file's special tokens by id; pad and end token only where the file has them."""
        return {token: self._pieces[token] for token in self._specials if token in self._pieces}


def _rename_pieces(description: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A tokenizer's description in which pieces have other names, which no text contains.

    The model of a file may find the name of a special token in a text, even where special tokens are not searched
    for: as a word, as the likeliest piece, or as the result of a merge. Under another name it is not found, and its id
    stays.

    Args:
        description: the content of a tokenizer.json, as the library writes it.
        names: name of a piece -> its other name.
    """
    model = dict(description["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): token for piece, token in model["vocab"].items()}
    else:
        model["vocab"] = [(names.get(piece, piece), score) for piece, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        begun = len(model["continuing_subword_prefix"] or "")
        model["merges"] = [
            (left, right) for left, right in model["merges"] if not {left, right, left + right[begun:]} & names.keys()
        ]
    added = [
        {**token, "content": names[token["content"]], "special": True} if token["content"] in names else token
        for token in description["added_tokens"]
    ]
    return {**description, "model": model, "added_tokens": added, "post_processor": None}


def _steps(description: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """The steps of a decoder's description, with those of a Sequence in its place."""
    if description is None:
        return []
    if description.get("type") == "Sequence":
        return [step for part in description[parts] for step in _steps(part, parts)]
    return [description]


def _piece_bytes(piece: str, decoders: list[dict[str, Any]]) -> int:
    """Number of UTF-8 bytes of text that a piece of the vocabulary represents, by the file's own decoder steps."""
    kinds = {step["type"]: step for step in decoders}
    if "ByteLevel" in kinds:
        return len(piece)  # one character per byte
    if "ByteFallback" in kinds and BYTE_NAME.fullmatch(piece):
        return 1
    if "WordPiece" in kinds:
        prefix = kinds["WordPiece"]["prefix"]
        # a piece that begins a word includes the space before it
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
