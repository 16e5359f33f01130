"""Trains a byte-level BPE tokenizer on the inputs. Every text has ids, since every byte is in the vocabulary."""

from collections.abc import Iterable, Iterator

from colt5dist.data.prepare.documents import read_items
from colt5dist.data.prepare.inputs import InputFile
from colt5dist.data.prepare.tokenize_texts import hash_text

SPECIAL_TOKENS = ["<pad>", "</s>"]
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS) + 1
TRAINING_BYTES = 1 << 30  # of text: more text changes few pieces of the vocabulary and costs memory


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
    """Every text; of a corpus larger than TRAINING_BYTES, the beginning of every file."""
    share = TRAINING_BYTES / max(1, sum(file.bytes for file in files))
    for file in files:
        left = file.bytes * share if share < 1 else float("inf")
        for item in read_items(file, text_key=text_key):
            if item.text is None:
                continue
            content = item.text.encode()
            if hash_text(content) >= held_out_below:
                yield item.text if len(content) <= left else content[: int(left)].decode(errors="ignore")
                left -= len(content)
            if left <= 0:
                break
