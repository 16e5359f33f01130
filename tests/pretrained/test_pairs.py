"""Pairs from files: keys, references of one input, compression, and one line for what is wrong."""

import gzip
import json
import re

import pytest
import zstandard

from colt5dist.pretrained.pairs import PairSample, read_pairs

SCROLLS = [
    {"id": "q1", "pid": "q1_0", "input": "Who?\n\nA text.", "output": "he"},
    {"id": "q2", "pid": "q2_0", "input": "When?\n\nA text.", "output": "now"},
    {"id": "q1", "pid": "q1_1", "input": "Who?\n\nA text.", "output": "him"},
]
SAMPLES = [
    PairSample(line=1, id="q1", text="Who?\n\nA text.", references=("he", "him")),
    PairSample(line=2, id="q2", text="When?\n\nA text.", references=("now",)),
]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize("suffix", COMPRESS, ids=["plain", "gzip", "zstandard"])
def test_lines_of_one_id_are_one_sample(tmp_path, suffix):
    path = tmp_path / f"pairs.jsonl{suffix}"
    content = COMPRESS[suffix](jsonl(SCROLLS))
    path.write_bytes(content)
    assert read_pairs(path) == SAMPLES
    if suffix:
        path.write_bytes(content[:-7])
        with pytest.raises(ValueError, match=re.escape(f"{path}: cannot be read (EOFError: ")):
            read_pairs(path)


def test_other_keys_and_lines_without_an_id(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl([{"q": "x", "a": "1", "doc": 7}, {"q": "x", "a": "2"}]) + b" \n")
    apart = [
        PairSample(line=1, id=None, text="x", references=("1",)),
        PairSample(line=2, id=None, text="x", references=("2",)),
    ]
    assert read_pairs(path, input_key="q", target_key="a") == apart
    path.write_bytes(jsonl([{"q": "x", "a": "1", "doc": 7}, {"q": "x", "a": "2", "doc": 7}]))
    together = [PairSample(line=1, id=7, text="x", references=("1", "2"))]
    assert read_pairs(path, input_key="q", target_key="a", id_key="doc") == together


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no line; give a pair a line"),
        (jsonl([*SCROLLS, {"input": "x"}]), "line 4 has no text with the key 'output'; --target-key names another"),
        (jsonl([{"input": "x", "output": None}]), "line 1 has no text with the key 'output'"),
        (jsonl([{"input": "x", "output": " \n"}]), "line 1 has no text with the key 'output'"),
        (jsonl([{"text": "x", "output": "y"}]), "line 1 has no text with the key 'input'; --input-key names another"),
        (jsonl([{"input": "x", "output": "y", "id": True}]), "line 1 has no text or number as 'id'"),
        (jsonl([SCROLLS[0], SCROLLS[1] | {"id": "q1"}]), "lines 1 and 2 have the same 'id' and different inputs"),
        (b'{"input": "x", "output": "y"}\n[]\n', "line 2 is not a JSON object"),
        (b'{"input": "\xff"}', "line 1 is not UTF-8"),
    ],
    ids=["empty", "no-target", "null", "blank", "no-input", "id", "inputs", "array", "bytes"],
)
def test_what_is_wrong_is_one_line(tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")) as error:
        read_pairs(path)
    assert "\n" not in str(error.value)
