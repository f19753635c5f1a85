"""A CUDA device that is not there: lines that only a GPU runs are run, and its rules hold, on a machine without one.

Tensors "on the device" are wrappers around CPU tensors. They say `cuda:0`, and what PyTorch refuses for a GPU is
refused here too: operands on two devices, NumPy without a copy to the host, a generator of the other device, matrix
products of integers. Copies to the host that nobody waits for hold NaN until an event or a waiting operation of the
same stream comes, so that a reader who does not wait is found out. `bytes_free` is the memory of the device: a tensor
that does not fit raises `torch.OutOfMemoryError`.

What this cannot show: speed, the rounding of real kernels, FAISS on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_aten = torch.ops.aten

# operations for which PyTorch takes operands of two devices
_COPIES = (_aten.copy_.default, _aten._to_copy.default)
_INDEXED = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default)
_PRODUCTS = (_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default, _aten.mv.default)
# where a number in a CPU tensor is no operand of an element-wise kernel
_STRICT = (*_PRODUCTS, _aten.cat.default, _aten.stack.default, _aten.gather.default)


class OnDevice(torch.Tensor):
    """A tensor that says it is on the GPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        layout: dict[str, Any] = {"layout": held.layout}
        if held.layout is torch.strided:
            layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        # a CPU tensor for the C++ side, since autograd asks the driver about any other kind
        self = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=_CPU, **layout)
        self.held = held
        return self  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """Sees operations without a tensor of the device among their operands: creation, and copies to the device."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled here, and to say so to the compiler means to import it, which takes five seconds
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What PyTorch decides before an operation is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor):
            name, here = getattr(func, "__name__", ""), isinstance(args[0], OnDevice)
            if name == "pin_memory":
                if here:
                    raise RuntimeError("cannot pin a tensor of the device, only dense CPU tensors can be pinned")
                return args[0].clone()
            if name == "cuda":
                return args[0].to(DEVICE)
            if here and name == "cpu":
                return _run(_aten._to_copy.default, args[:1], {"device": _CPU})
            if here and name == "to":
                return _moved(args, kwargs)
            if here and name == "tolist":
                _the_stream.wait()
                return args[0].held.tolist()
            if here and name == "numpy":
                raise TypeError("can't convert cuda:0 device type tensor to numpy: copy it to host memory first")
        if func is torch.device:
            return func(*args, **kwargs)
        return func(*(_named(one) for one in args), **{key: _named(value) for key, value in kwargs.items()})


def _named(value: Any) -> Any:
    """`cuda` without an index is the first device."""
    if (isinstance(value, str) and value == "cuda") or (
        isinstance(value, torch.device) and value.type == "cuda" and value.index is None
    ):
        return DEVICE
    return value


def _moved(args: Any, kwargs: dict[str, Any]) -> Any:
    """`to` of a tensor of the device."""
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(
        *(_named(one) for one in args[1:] if not isinstance(one, torch.Tensor)),
        **{key: _named(value) for key, value in kwargs.items() if key not in ("copy", "other")},
    )
    others = [one for one in (*args[1:], kwargs.get("other")) if isinstance(one, torch.Tensor)]
    if others:
        device, dtype = others[0].device, others[0].dtype
    if device is not None and device.type == "cpu":
        return _aten._to_copy.default(
            args[0], dtype=dtype or args[0].dtype, device=_CPU, non_blocking=bool(non_blocking)
        )
    return args[0] if dtype in (None, args[0].dtype) else _aten._to_copy.default(args[0], dtype=dtype)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on what the wrappers hold; its result is on the device that PyTorch would put it on."""
    if not _state.active:
        return func(*args, **kwargs)
    named = kwargs.get("device")
    target = None if named is None else torch.device(named).type
    operands = list(_tensors((args, kwargs)))
    on_device = any(isinstance(one, OnDevice) for one in operands)
    if not on_device and target != "cuda":
        return func(*args, **kwargs)
    if on_device and func is not _aten._to_copy.default:
        # what asked the C++ side of an operand for its device was told CPU
        target = "cuda"
    _check(func, args, operands)
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    held = {key: value for key, value in kwargs.items() if key != "device"}
    if named is not None:
        held["device"] = _CPU
    _state.operations += 1
    result = func(*_mapped(_held, args), **_mapped(_held, held))
    if func is _aten.copy_.default and not isinstance(args[0], OnDevice):
        _the_stream.wait()
        return args[0]
    if target == "cpu":
        return _the_stream.late(result) if kwargs.get("non_blocking") else _waited(result)
    if func is _aten._local_scalar_dense.default:
        return _waited(result)
    written = _written(func, args, kwargs)
    if written is not None:
        return written
    return _mapped(_wrapped, result)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))


def _mapped(change: Callable[[Any], Any], values: Any) -> Any:
    """The same lists, tuples and dictionaries, each member changed."""
    if isinstance(values, (tuple, list)):
        return type(values)(_mapped(change, value) for value in values)
    if isinstance(values, dict):
        return {key: _mapped(change, value) for key, value in values.items()}
    return change(values)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def _wrapped(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or isinstance(value, OnDevice):
        return value
    _state.take(value)
    return OnDevice(value)


def _waited(value: Any) -> Any:
    _the_stream.wait()
    return value


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operands that an operation writes into and returns; None for one that makes something new."""
    schema = func._schema
    if not any(one.alias_info is not None and one.alias_info.is_write for one in schema.returns):
        return None
    given = {one.name: value for one, value in zip(schema.arguments, args, strict=False)} | kwargs
    names = [one.name for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    found = tuple(given[name] for name in names)
    return found[0] if len(found) == 1 else found


def _check(func: Any, args: Any, operands: list[torch.Tensor]) -> None:
    """Raise what PyTorch raises for operands that cannot meet."""
    if func in _COPIES:
        return
    there = [one for one in operands if isinstance(one, OnDevice)]
    here = [one for one in operands if not isinstance(one, OnDevice)]
    if func in _INDEXED:
        # positions may be on the host for a tensor of the device, not the other way round
        values = [one for one in (args[0], *args[2:3]) if isinstance(one, torch.Tensor)]
        if there and not isinstance(args[0], OnDevice):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        here = [one for one in values if not isinstance(one, OnDevice)]
    if func in _PRODUCTS and not operands[0].dtype.is_floating_point:
        raise RuntimeError(f'"{func}" not implemented for {operands[0].dtype} on a GPU')
    if there and any(one.dim() > 0 or func in _STRICT for one in here):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
        )


class _Stream:
    """The order of work on the device: copies to the host are there once somebody waits for what is behind them."""

    def __init__(self) -> None:
        self._on_the_way: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._lock = threading.Lock()

    def late(self, value: torch.Tensor) -> torch.Tensor:
        """A host tensor that holds nonsense until the copy is waited for."""
        empty = torch.full_like(value, float("nan") if value.dtype.is_floating_point else 77)
        with self._lock:
            self._on_the_way.append((empty, value))
        return empty

    def wait(self, count: int | None = None) -> None:
        """Bring everything that is on the way, or the first `count` copies."""
        with self._lock:
            done, self._on_the_way = self._on_the_way[:count], self._on_the_way[len(self._on_the_way[:count]) :]
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            for empty, value in done:
                empty.copy_(value)

    def record_event(self) -> _Event:
        return _Event(self, [one for one, _ in self._on_the_way])

    def synchronize(self) -> None:
        self.wait()


class _Event:
    """A place in the stream."""

    def __init__(self, stream: _Stream, before: list[torch.Tensor]) -> None:
        self._stream, self._before = stream, before

    def synchronize(self) -> None:
        waiting = [one for one, _ in self._stream._on_the_way]
        self._stream.wait(sum(any(one is other for other in self._before) for one in waiting))


class _State:
    """What the pretended device is asked about."""

    def __init__(self) -> None:
        self.active = False
        self.free = 1 << 40
        self.used = self.peak = self.operations = 0
        # tensors by the address of their memory, which views share; collected ones may give it back at any moment
        self._users: dict[int, int] = {}
        self._lock = threading.RLock()

    def take(self, value: torch.Tensor) -> None:
        """Count a tensor whose memory is not counted yet."""
        if value.layout is not torch.strided:
            return
        storage = value.untyped_storage()
        at, size = storage.data_ptr(), storage.nbytes()
        if at not in self._users and self.used + size > self.free:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")
        with self._lock:
            if at not in self._users:
                self.used += size
                self.peak = max(self.peak, self.used)
            self._users[at] = self._users.get(at, 0) + 1
        weakref.finalize(value, self._give, at, size)

    def _give(self, at: int, size: int) -> None:
        with self._lock:
            self._users[at] -= 1
            if not self._users[at]:
                del self._users[at]
                self.used -= size

    def forget_peak(self, device: Any = None) -> None:
        self.peak = self.used

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.free - self.used, self.free


_state = _State()
_the_stream = _Stream()


class _Autocast(torch.autocast):
    """Lower precision on the device is that of the CPU tensors that stand in."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


@contextlib.contextmanager
def _modes() -> Iterator[None]:
    with _Functions(), _Dispatch():
        yield


def _guard_of_the_device() -> Callable[[], None]:
    """Let the C++ side take `cuda:0` in a PyTorch built without CUDA; what comes back undoes that."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[1]
    guards[1] = before or guards[0]

    def undo() -> None:
        guards[1] = before

    return undo


@contextlib.contextmanager
def pretended_cuda(bytes_free: int = 1 << 40) -> Iterator[_State]:
    """While this is open, PyTorch has a GPU."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(_guard_of_the_device())
        seed = torch.random.get_rng_state()
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "is_bf16_supported": lambda *_: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_name": lambda *_: "Pretended GPU",
            "get_device_properties": lambda *_: (_ for _ in ()).throw(RuntimeError("no properties")),
            "mem_get_info": _state.mem_get_info,
            "memory_reserved": lambda *_: _state.used,
            "memory_allocated": lambda *_: _state.used,
            "max_memory_allocated": lambda *_: _state.peak,
            "reset_peak_memory_stats": _state.forget_peak,
            "empty_cache": lambda: None,
            "synchronize": lambda *_: _the_stream.wait(),
            "current_stream": lambda *_: _the_stream,
            "manual_seed": lambda *_: None,
            "manual_seed_all": lambda *_: None,
            "get_rng_state": lambda *_: seed,
            "set_rng_state": lambda *_: None,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "autocast", _Autocast)
        # wrappers made in inference mode cannot be sliced
        patch.setattr(torch, "inference_mode", torch.no_grad)
        patch.setattr(threading.Thread, "run", _in_modes(threading.Thread.run))
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        _state.active, _state.free, _state.peak, _state.operations = True, bytes_free, _state.used, 0
        stack.callback(setattr, _state, "active", False)
        stack.enter_context(_modes())
        yield _state


def _in_modes(run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """Modes hold for one thread only."""

    def within(self: threading.Thread) -> None:
        with _modes():
            run(self)

    return within
