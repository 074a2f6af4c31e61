"""The model matrix. ``python -m experiments.models --help``."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything asks: no model is fetched here
