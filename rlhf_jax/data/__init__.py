"""Rows from files or from the embedded world, tokenised and batched; imports nothing by itself."""
