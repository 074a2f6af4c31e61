"""The rows of an epoch and their order: the same in every process and after a resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from prefixmemory.rows.encoding import Tokens

#: The rows of an epoch, by its number from 0 on: as many in each.
RowsOfEpoch = Callable[[int], Sequence[Tokens]]


class EpochRows(Dataset[dict[str, list[int]]]):
    """Rows that may be others in every epoch."""

    def __init__(self, rows_of: RowsOfEpoch) -> None:
        self.rows_of, self.epoch, self.rows = rows_of, 0, rows_of(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the sampler, or by accelerate's data loader."""
        if epoch != self.epoch:
            self.epoch, self.rows = epoch, self.rows_of(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index].feature


class EpochSampler(LengthGroupedSampler):
    """Rows of like length together, in an order that depends on seed and epoch alone.

    transformers' own draws from each process's global generator: once dropout has drawn from it too, processes disagree
    on the order, and rows are met twice or never.
    """

    def __init__(self, batch_size: int, dataset: EpochRows, seed: int) -> None:
        super().__init__(batch_size, lengths=[len(one) for one in dataset.rows])
        self.dataset, self.seed = dataset, seed

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader, which calls the data set instead where it goes on in mid-epoch."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        lengths = [len(one) for one in self.dataset.rows]
        generator = torch.Generator().manual_seed(self.seed + self.dataset.epoch)
        return iter(get_length_grouped_indices(lengths, self.batch_size, generator=generator))
