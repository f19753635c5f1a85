"""Memory of a GPU: tiles that fit into what is free, and what happens when it runs out.

Everything here takes a device by its PyTorch name and leaves the CPU as it is.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_Item = TypeVar("_Item")

# of the free memory, for one temporary array: a step needs a few of them beside its data
_SHARE = 1 / 8
_LEAST_ELEMENTS = 1 << 16


def free_memory(device: str | torch.device) -> int | None:
    """Bytes that PyTorch can still have on a GPU, its own cache included; None for other devices."""
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def elements_that_fit(device: str | torch.device, most: int, bytes_each: int) -> int:
    """Elements of a temporary array of so many bytes each: `most`, halved until they take an eighth of what is free.

    Halved, so that cards with room for `most` all compute the same tiles, whatever else is on them.
    """
    free = free_memory(device)
    while free is not None and most > _LEAST_ELEMENTS and most * bytes_each > _SHARE * free:
        most //= 2
    return most


def shared_tensor(array: NDArray[Any]) -> torch.Tensor:
    """A tensor of the same memory, which may be read-only (a memory map): the tensor is only read."""
    import torch

    array = np.ascontiguousarray(array)
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(array)


def sent(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor on a device, on its way there without the host waiting for it."""
    import torch

    tensor = torch.from_numpy(array)
    # from memory that the system does not move, a GPU fetches by itself
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left: PyTorch has a type for that, FAISS says so in words."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def or_on_cpu(compute: Callable[[str], _Result], device: str, what: str) -> _Result:
    """compute(device), or compute("cpu") with a notice naming `what` where the device has no memory for it."""
    if device == "cpu":
        return compute(device)
    try:
        return compute(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # outside of the handler, whose traceback holds the arrays that are in the way
    _release()
    _log.warning("%s: no memory left on %s, going on on the CPU", what, device)
    return compute("cpu")


class Batches(Generic[_Item, _Result]):
    """Items go to a device `size` at a time, from now on fewer where its memory ends, to the CPU where one is too many.

    Each change is a notice that names `what` is computed, and holds for later calls too. `on_cpu` makes what computes
    without the device; None where the device is the CPU.
    """

    def __init__(
        self, size: int, what: str, on_cpu: Callable[[], Callable[[Sequence[_Item]], list[_Result]]] | None
    ) -> None:
        self._size, self._what, self._make = size, what, on_cpu
        self._on_cpu: Callable[[Sequence[_Item]], list[_Result]] | None = None

    def run(self, items: Sequence[_Item], compute: Callable[[Sequence[_Item]], list[_Result]]) -> list[_Result]:
        """Results of all items in order.

        Raises what compute raises when there is no memory for a single item and no other way to compute it.
        """
        results: list[_Result] = []
        while len(results) < len(items):
            some = items[len(results) : len(results) + self._size]
            try:
                results += (self._on_cpu or compute)(some)
                continue
            except RuntimeError as error:
                if self._on_cpu or not is_out_of_memory(error) or (len(some) == 1 and self._make is None):
                    raise
            # outside of the handler, whose traceback holds the arrays that are in the way
            self._shrink(len(some))
        return results

    def _shrink(self, tried: int) -> None:
        _release()
        if tried == 1 and self._make is not None:
            _log.warning("%s: too little memory on the device, going on on the CPU", self._what)
            self._on_cpu = self._make()
            return
        self._size = max(1, tried // 2)
        _log.warning("%s: no memory left on the device, going on with batches of %d", self._what, self._size)


def _release() -> None:
    """Give back what PyTorch holds for later: FAISS cannot use it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
