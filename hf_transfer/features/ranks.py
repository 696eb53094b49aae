"""The processes that share a pass over the data; one process, where `torch.distributed` is not initialized."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among all processes, and among those of its machine.

    Attributes:
        rank: of this process.
        world: number of processes.
        local_rank: on this machine.
        local_world: number of processes on this machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """As launched by `torchrun` or `accelerate launch`."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        rank, world = dist.get_rank(), dist.get_world_size()
        local = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
        return cls(rank, world, *local)

    def share(self, batches: list[Any], on_disk: bool) -> list[Any]:
        """This process's part. A disk may belong to one machine: then the processes of each machine do everything."""
        if on_disk:
            return batches[self.local_rank :: self.local_world]
        return batches[self.rank :: self.world]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all ranks; each must call it."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_local_main(self, value: Any) -> Any:
        """The value of the first process of this machine; all ranks must call it."""
        return self.gather(value)[self.rank - self.local_rank]
