"""Serving many memories at once: in vLLM, each request with a memory of its own, in one batch."""
