"""Memory of a GPU: tiles that fit into what is free, and what happens when it runs out.

Everything here takes a device by its PyTorch name and leaves the CPU as it is.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

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


def in_batches(
    items: Sequence[_Item], size: int, compute: Callable[[Sequence[_Item]], list[_Result]], what: str
) -> Iterator[_Result]:
    """Results of all items in order, computed `size` at a time; in smaller batches, with a notice, where memory ends.

    Raises what compute raises when there is no memory for a single item.
    """
    begin = 0
    while begin < len(items):
        try:
            results = compute(items[begin : begin + size])
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            results = None
        if results is None:
            _release()
            size = max(1, size // 2)
            _log.warning("%s: no memory left on the device, going on with batches of %d", what, size)
            continue
        begin += size
        yield from results


def _release() -> None:
    """Give back what PyTorch holds for later: FAISS cannot use it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
