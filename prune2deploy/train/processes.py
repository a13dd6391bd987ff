"""One process or several: who has which part of a batch, and what is made equal between them."""

import atexit
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from prune2deploy.errors import P2DError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


class Processes:
    """The processes that train together, as ``torchrun`` started them; alone unless it did.

    Every process has the whole network and does the same steps. Each takes its part of every batch, and gradients are
    averaged between backward and step, so weights stay equal. The network is not wrapped for that: pruning methods add
    modules while they train, and use parameters in penalties alone, or not in every step.

    Args:
        device: ``cpu``, or an accelerator. Where there are several processes, each takes the accelerator of its number
            on its machine.
        bf16: whether `autocast` computes in bfloat16.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
        device: where this process computes.
    """

    def __init__(self, device: str | torch.device = "cpu", *, bf16: bool = False) -> None:
        place = torch.device(device)
        self._accelerator = _accelerator(place, bf16=bf16)
        self.rank: int = self._accelerator.process_index
        self.count: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device if self.count > 1 else place

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def part(self, batch: Tensor) -> slice:
        """Return where this process's part of a batch is: one behind the other, in the order of the processes."""
        ends = [len(batch) * number // self.count for number in (self.rank, self.rank + 1)]
        return slice(*ends)

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context that computes in bfloat16 if that was asked for."""
        context: AbstractContextManager[None] = self._accelerator.autocast()
        return context

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the parameters."""
        self._accelerator.backward(loss)

    def clip(self, parameters: Sequence[Tensor], largest: float) -> None:
        """Scale all gradients so that their common norm is no larger than ``largest``."""
        self._accelerator.clip_grad_norm_(parameters, largest)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the processes, in place."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
        mean = self._accelerator.reduce(flat, reduction="mean")
        sizes = [tensor.numel() for tensor in tensors]
        with torch.no_grad():
            for tensor, values in zip(tensors, torch.split(mean, sizes), strict=True):
                tensor.copy_(values.view(tensor.shape))

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sums of numbers over the processes, the same in each."""
        if self.count == 1:
            return list(values)
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        sums = self._accelerator.reduce(torch.tensor(values, dtype=kind, device=self.device), reduction="sum")
        return [float(each) for each in sums]

    def agreed(self, make: Callable[[], T]) -> T:
        """Return in every process what ``make`` gives in the first one, which alone calls it.

        Raises:
            P2DError: in every process, if it was raised there.
        """
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        found: list[object] = [None, None]
        if self.is_first:
            try:
                found[0] = make()
            except P2DError as error:
                found[1] = error
        value, error_ = broadcast_object_list(found)
        if error_ is not None:
            raise error_
        return value  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Wait for the others."""
        self._accelerator.wait_for_everyone()


def _accelerator(place: torch.device, *, bf16: bool) -> "Accelerator":
    """Return accelerate's view of this process. It keeps one for all, which is set up anew where it does not fit."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized

    precision = "bf16" if bf16 else "no"
    if is_initialized():
        state = AcceleratorState()
        if state.mixed_precision != precision or state.device.type != place.type:
            AcceleratorState._reset_state(reset_partial_state=state.num_processes == 1)
    accelerator = Accelerator(cpu=place.type == "cpu", mixed_precision=precision)
    if accelerator.num_processes > 1:
        atexit.unregister(_leave)
        atexit.register(_leave)
    return accelerator


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
