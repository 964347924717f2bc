"""Byte-level BPE training and encoding, exact and fast. See the README beside the crate."""

from rustbpe._rustbpe import Encoder, Tokenizer, __version__

__all__ = ["Encoder", "Tokenizer", "__version__"]
