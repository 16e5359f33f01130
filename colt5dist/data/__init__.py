"""Text to batches: tokenizers, shards, the order of samples, denoising, and the loader. No nn.Module is used here.

`prepare/` writes text as shards. `read/shards.py` opens them. `order/plan.py` decides which tokens sample i is made
from. `read/token_reader.py` reads these tokens, `read/denoise.py` makes inputs and targets from them, and
`read/loader.py` delivers micro-batches.
"""

from colt5dist.data.compatibility import data_problems, pair_notes, validation_problems
from colt5dist.data.config import DataConfig
from colt5dist.data.model_tokenizer import TOKENIZER_FOLDER, ModelTokenizer, model_tokenizer
from colt5dist.data.open_shard_sets import open_sources, open_validation_sets
from colt5dist.data.order.mixture import parse_mixture
from colt5dist.data.order.skip import SkipList
from colt5dist.data.read.batch import Batch
from colt5dist.data.read.held_out import held_out_batches, unigram_entropy
from colt5dist.data.read.loader import training_batches
from colt5dist.data.read.shards import ShardSet, open_shards
from colt5dist.data.read.sources import Sources
from colt5dist.data.sample_lengths import length_notes, required_sentinels, text_tokens_of_sample
from colt5dist.data.standard_library import (
    STANDARD_LIBRARIES,
    STANDARD_LIBRARY,
    STANDARD_LIBRARY_PAIRS,
    ensure_standard_library_shards,
)

__all__ = [
    "STANDARD_LIBRARIES",
    "STANDARD_LIBRARY",
    "STANDARD_LIBRARY_PAIRS",
    "TOKENIZER_FOLDER",
    "Batch",
    "DataConfig",
    "ModelTokenizer",
    "ShardSet",
    "SkipList",
    "Sources",
    "data_problems",
    "ensure_standard_library_shards",
    "held_out_batches",
    "length_notes",
    "model_tokenizer",
    "open_shards",
    "open_sources",
    "open_validation_sets",
    "pair_notes",
    "parse_mixture",
    "required_sentinels",
    "text_tokens_of_sample",
    "training_batches",
    "unigram_entropy",
    "validation_problems",
]
