"""Decoders, their heads and their checkpoints; may import types, masking and errors."""
