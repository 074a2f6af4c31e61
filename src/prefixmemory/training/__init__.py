"""Thin recipes over transformers' Trainer: rows in, adapter out."""
