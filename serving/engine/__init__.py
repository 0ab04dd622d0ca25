"""Continuous batching over a paged KV cache. Imports no Ray; knows token ids, not text."""
