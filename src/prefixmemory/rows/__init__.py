"""Rows of data: kinds, files, tokens."""
