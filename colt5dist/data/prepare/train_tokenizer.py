"""Trains a byte-level BPE tokenizer on the inputs. Every text has ids, since every byte is in the vocabulary."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

from colt5dist.data.inputs.documents import read_items
from colt5dist.data.inputs.files import InputFile
from colt5dist.data.inputs.megatron import TokenIds
from colt5dist.data.inputs.pairs import Pair
from colt5dist.data.long_texts import WINDOW_BYTES, character_begin
from colt5dist.data.prepare.tokenize_texts import end_with_parent, hash_text
from colt5dist.errors import ConfigError

SPECIAL_TOKENS = ["<pad>", "</s>"]
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS) + 1
TRAINING_BYTES = 1 << 30  # of text: more text changes few pieces of the vocabulary and costs memory
LONG_WORD = 256  # characters; the time for a word grows with the square of its length
LONG_WORD_CHARACTERS = 1 << 24  # in long words, which are all different and need memory


@contextmanager
def training_process(
    files: Iterable[InputFile], *, vocab_size: int, text_key: str, held_out_below: int
) -> Iterator[Callable[[], bytes]]:
    """Provide a function that does `train_tokenizer` in another process, which ends with the `with` block.

    The training cannot be interrupted, but its process can be killed: Ctrl-C ends the command at once. The block should
    be entered before a lock is taken, since the process would inherit it.

    Raises:
        ConfigError: (from the function) the process was killed.
    """
    context = get_context("fork")
    here, there = context.Pipe()
    arguments = (there, list(files), vocab_size, text_key, held_out_below)
    process = context.Process(target=_train_when_asked, args=arguments, daemon=True)
    process.start()
    there.close()

    def train() -> bytes:
        here.send_bytes(b"begin")
        wait([here, process.sentinel])
        try:
            return here.recv_bytes()
        except EOFError:
            raise ConfigError(
                "--train-tokenizer: the process that trains was killed, perhaps because memory ran out; give fewer "
                "inputs, or train on a part of them and give the result as --tokenizer"
            ) from None

    try:
        yield train
    finally:
        process.kill()
        process.join()
        here.close()


def _train_when_asked(
    connection: Connection, files: list[InputFile], vocab_size: int, text_key: str, held_out_below: int
) -> None:
    end_with_parent()
    connection.recv_bytes()
    connection.send_bytes(
        train_tokenizer(files, vocab_size=vocab_size, text_key=text_key, held_out_below=held_out_below)
    )


def train_tokenizer(files: Iterable[InputFile], *, vocab_size: int, text_key: str, held_out_below: int) -> bytes:
    """Train a tokenizer on up to TRAINING_BYTES of the text, spread over all files; held-out texts are not used.

    Args:
        files: the inputs.
        vocab_size: ids of the vocabulary, SMALLEST_VOCABULARY or more; a small text may give fewer.
        text_key: key of the text in a jsonl line, column of the text in a parquet file.
        held_out_below: texts with a smaller hash are held out.

    Returns:
        The content of a tokenizer.json.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # imported here: few commands need it

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_training_texts(list(files), text_key, held_out_below), trainer)
    return backend.to_str(pretty=True).encode()


def _training_texts(files: list[InputFile], text_key: str, held_out_below: int) -> Iterator[str]:
    """Every text in pieces; of a corpus larger than TRAINING_BYTES, the beginning of every file."""
    share = TRAINING_BYTES / max(1, sum(file.bytes for file in files))
    long_words = 0
    for file in files:
        left = file.bytes * share if share < 1 else float("inf")
        for item in read_items(file, text_key=text_key):
            if item.text is None or isinstance(item.text, TokenIds | Pair):
                continue
            content = item.text if isinstance(item.text, bytes) else item.text.encode()
            if hash_text(content) >= held_out_below:
                for piece in _pieces(content if len(content) <= left else content[: int(left)]):
                    short, long = _cut_long_words(piece)
                    long_words += sum(map(len, long))
                    yield from short
                    if long_words <= LONG_WORD_CHARACTERS:
                        yield from long
                left -= len(content)
            if left <= 0:
                break


def _pieces(content: bytes) -> Iterator[str]:
    """A text in pieces of at most WINDOW_BYTES, each but the first with a blank at its beginning, if there is one."""
    begin = 0
    while len(content) - begin > WINDOW_BYTES:
        blank = max(content.rfind(sign, begin + 1, begin + WINDOW_BYTES) for sign in (b" ", b"\n"))
        end = blank if blank > 0 else character_begin(content, begin + WINDOW_BYTES)
        yield content[begin:end].decode(errors="ignore")
        begin = end
    yield content[begin:].decode(errors="ignore")


def _cut_long_words(text: str) -> tuple[list[str], list[str]]:
    """(the text around words of more than LONG_WORD characters, these words in parts of LONG_WORD characters)."""
    short, long, begin = [], [], 0
    for word in _LONG_WORDS.finditer(text):
        short.append(text[begin : word.start()])
        long += [text[at : min(at + LONG_WORD, word.end())] for at in range(word.start(), word.end(), LONG_WORD)]
        begin = word.end()
    return [*filter(None, short), *([text[begin:]] if begin < len(text) else [])], long


_LONG_WORDS = re.compile(
    "|".join(f"{kind}{{{LONG_WORD + 1},}}" for kind in (r"[^\W\d_]", r"\d", r"\s", r"(?:[^\w\s]|_)"))
)
