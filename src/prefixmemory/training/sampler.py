"""The order of the rows: rows of like length together, the same in every process and after a resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


class EpochSampler(LengthGroupedSampler):
    """Rows of like length together, in an order that depends on seed and epoch alone.

    transformers' own draws from each process's global generator: once dropout has drawn from it too, processes disagree
    on the order, and rows are met twice or never.
    """

    def __init__(self, batch_size: int, dataset: Dataset, seed: int) -> None:
        super().__init__(batch_size, dataset=dataset)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class LengthGroupedTrainer(Trainer):
    """A Trainer that orders its rows with :class:`EpochSampler`."""

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        args = self.args
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return EpochSampler(args.train_batch_size * args.gradient_accumulation_steps, dataset, args.seed)
