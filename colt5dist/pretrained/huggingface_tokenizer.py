"""The tokenizer of a trained model as transformers opens it: tokenizer.json with all ids, and tokenizer_config.json."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from colt5dist.data.manifest import TOKENIZER_NAME
from colt5dist.data.model_tokenizer import ModelTokenizer
from colt5dist.data.tokenizer import EOS_NAMES, PAD_NAMES, ByteTokenizer, JsonTokenizer
from colt5dist.errors import ConfigError
from colt5dist.files import write_whole

CONFIG_NAME = "tokenizer_config.json"


def write_huggingface_tokenizer(tokenizer: ModelTokenizer, folder: Path, *, causal: bool) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(folder)` opens.

    Args:
        tokenizer: the tokenizer of the model.
        folder: an existing folder.
        causal: whether the model is decoder-only: texts then begin with the start token. Otherwise they end with the
            end token, as encoder inputs do.

    Raises:
        ConfigError: the vocabulary has no such form.
        OSError: the files cannot be written.
    """
    content = huggingface_json(tokenizer, causal=causal)
    write_whole(folder / TOKENIZER_NAME, content.encode())
    names = _special_names(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": names[tokenizer.pad_id],
        "eos_token": names[tokenizer.eos_id],
        "extra_special_tokens": [tokenizer.names[token] for token in sorted(tokenizer.names)],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left" if causal else "right",
    }
    if causal:
        config["bos_token"] = names[tokenizer.start_id]
    write_whole(folder / CONFIG_NAME, f"{json.dumps(config, indent=2, sort_keys=True)}\n".encode())


def huggingface_json(tokenizer: ModelTokenizer, *, causal: bool) -> str:
    """Content of a tokenizer.json with the text's tokens and all special ones.

    Args:
        tokenizer: the tokenizer of the model.
        causal: whether texts begin with the start token instead of ending with the end token.

    Raises:
        ConfigError: a special token would get another id than the model has for it.
    """
    text = tokenizer.tokenizer
    description: dict[str, Any] = json.loads(text.content if isinstance(text, JsonTokenizer) else _byte_level())
    names = _special_names(tokenizer)
    there = {added["id"]: added for added in description["added_tokens"]}
    for token, name in names.items():
        there[token] = {
            "id": token,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    description["added_tokens"] = [there[token] for token in sorted(there)]
    description["truncation"] = description["padding"] = None
    word = {"Sequence": {"id": "A", "type_id": 0}}
    special = names[tokenizer.start_id if causal else tokenizer.eos_id]
    end = {"SpecialToken": {"id": special, "type_id": 0}}
    token = tokenizer.start_id if causal else tokenizer.eos_id
    second = {"Sequence": {"id": "B", "type_id": 0}}
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [end, word] if causal else [word, end],
        "pair": [end, word, second] if causal else [word, second, end],
        "special_tokens": {special: {"id": special, "ids": [token], "tokens": [special]}},
    }
    content = json.dumps(description, ensure_ascii=False)
    backend = Backend.from_str(content)
    for token, name in names.items():
        if backend.token_to_id(name) != token:
            raise ConfigError(
                f"tokenizer.json: {name} would get id {backend.token_to_id(name)}, the model has it at {token}, as "
                "the ids of its vocabulary have gaps; the folder cannot be opened by AutoTokenizer"
            )
    return str(backend.to_str(pretty=True))


def _special_names(tokenizer: ModelTokenizer) -> dict[int, str]:
    """Names of pad and end token, mode tokens and sentinels by id."""
    text = tokenizer.tokenizer
    known = text.special_names if isinstance(text, JsonTokenizer) else {ByteTokenizer.unk_id: "<unk>"}
    named = {tokenizer.eos_id: EOS_NAMES[0], tokenizer.pad_id: PAD_NAMES[0]}
    return dict(sorted({**named, **known, **tokenizer.names}.items()))


def _byte_level() -> str:
    """A tokenizer.json whose ids are those of `ByteTokenizer`: one token for each byte, without merges."""
    characters = _byte_characters()
    vocabulary = {"<pad>": ByteTokenizer.pad_id, "</s>": ByteTokenizer.eos_id, "<unk>": ByteTokenizer.unk_id}
    vocabulary.update((character, ByteTokenizer.first_byte + byte) for byte, character in enumerate(characters))
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend.to_str()


def _byte_characters() -> list[str]:
    """The character by which the byte-level steps of `tokenizers` write each of the 256 bytes.

    Bytes that are printable characters of Latin-1 stand for themselves, the others for the characters from 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
