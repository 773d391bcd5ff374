"""Models: loading them, their decoder blocks, their chats as token ids, and their fingerprint."""

from elsteer.models.blocks import (
    accepts,
    blocks_path,
    cache_argument,
    cache_given,
    cache_made,
    decoder_blocks,
    decoder_of,
    hidden_size,
    num_layers,
)
from elsteer.models.cache import elsteer_cache
from elsteer.models.chat import context_length, effective_thinking, encode_chat, left_pad, render_chat, template_hash
from elsteer.models.fingerprint import Fingerprint, differences, fingerprint
from elsteer.models.load import load, source_of
from elsteer.models.mirror import MIRRORS, Mirror, available, fetch, where

__all__ = [
    "MIRRORS",
    "Fingerprint",
    "Mirror",
    "accepts",
    "available",
    "blocks_path",
    "cache_argument",
    "cache_given",
    "cache_made",
    "context_length",
    "decoder_blocks",
    "decoder_of",
    "differences",
    "effective_thinking",
    "elsteer_cache",
    "encode_chat",
    "fetch",
    "fingerprint",
    "hidden_size",
    "left_pad",
    "load",
    "num_layers",
    "render_chat",
    "source_of",
    "template_hash",
    "where",
]
