"""Trained adapters in use."""
