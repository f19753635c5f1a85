"""Reading weights files without executing anything in them, and fitting them to an architecture strictly."""

from __future__ import annotations

import argparse
import functools
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmad_cli.backbones._timm import import_timm
from mmad_cli.errors import UsageError, WeightsError, unknown_name

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

# what training wraps around names; never part of an architecture
_WRAPPERS = ("module.", "_orig_mod.")
# entries under which training checkpoints keep the network
_NETWORK_ENTRIES = ("state_dict", "model", "base_model")
# counters that evaluation never reads and that files older than torch 0.4 do not have
_COUNTER = "num_batches_tracked"
# parameters of self-supervised training that no feature depends on
_TRAINING_ONLY = ("mask_token",)
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, as it is in the file."""

    content: Any
    format: Literal["safetensors", "torch"]


@dataclass(frozen=True)
class FittedTensors:
    """Tensors that fit an architecture; `outputs` is the last feature output they reach, None = all of it."""

    tensors: Tensors
    outputs: int | None


def read_checkpoint(path: Path) -> Checkpoint:
    """Content of a safetensors file (a flat dictionary) or of a PyTorch checkpoint read with weights only.

    Raises WeightsError for a file that is truncated, damaged, of another kind, or holds code.
    """
    start = _first_bytes(path)
    if start[8:9] == b"{":
        return Checkpoint(_read_safetensors(path), "safetensors")
    if path.suffix == ".npz":
        raise WeightsError(f"{path}: NumPy archives are not read; take the safetensors file of this model")
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return Checkpoint(_read_torch(path), "torch")
    kind = "a web page, not weights" if start.lstrip()[:1] == b"<" else f"begins with {start[:8]!r}"
    raise WeightsError(
        f"{path}: neither a safetensors file nor a PyTorch checkpoint ({kind}); download it again"
        if start
        else f"{path}: the file is empty; download it again"
    )


def network_tensors(checkpoint: Checkpoint, path: Path) -> Tensors:
    """The tensors of the network in a checkpoint, freed of training's wrappers.

    Raises WeightsError when there is no dictionary of tensors in it, or when one holds NaN or infinity.
    """
    import torch

    content = checkpoint.content
    for _ in range(2):
        entry = next(
            (name for name in _NETWORK_ENTRIES if _is_mapping(content) and _is_mapping(content.get(name))), None
        )
        content = content if entry is None else content[entry]
    found = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)} if _is_mapping(content) else {}
    if not found:
        raise WeightsError(f"{path}: holds no dictionary of tensors under {', '.join(_NETWORK_ENTRIES)} or at its top")
    broken = [k for k, v in found.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if broken:
        raise WeightsError(f"{path}: NaN or infinite values in {_listing(broken)}; the file is damaged")
    return {_unwrapped(str(k)): v.detach().contiguous() for k, v in found.items()}


def fit_timm(name: str, tensors: Tensors, path: Path) -> FittedTensors:
    """Check tensors against timm's architecture `name`.

    Accepted: every tensor of the network (a classifier may be there or not), or exactly what the first feature
    outputs need. Anything else raises WeightsError that names the missing, unexpected and mis-shaped tensors.
    """
    expected = module_shapes(_meta_model(name))
    extras = _leftovers(name, tensors.keys() - expected.keys())
    problems = differences(expected, {k: v for k, v in tensors.items() if k not in extras})
    if not any(problems.values()):
        return FittedTensors(tensors, None)
    outputs = _outputs_held(name, tensors)
    if outputs is not None:
        return FittedTensors(tensors, outputs)
    raise WeightsError(f"{path}: does not fit {name}: " + describe(problems))


def build_with(make: Callable[[], torch.nn.Module], tensors: Mapping[str, torch.Tensor], where: str) -> torch.nn.Module:
    """The network that `make` builds, with these tensors as its parameters and buffers.

    Each tensor of the network must be there with its shape, or WeightsError. Random initial values, which take
    seconds for a large network, are not made where the architecture allows it.
    """
    import torch

    with torch.device("meta"):
        network = make()
    state = _matched(network, tensors, where)
    if _has_values_outside_state(network):
        network = make()
        network.load_state_dict(state, strict=True)
    else:
        network.load_state_dict(state, strict=True, assign=True)
    return network


def _matched(network: torch.nn.Module, tensors: Mapping[str, torch.Tensor], where: str) -> Tensors:
    """The network's own names with the file's tensors, in the network's types; counters may be absent."""
    import torch

    state = network.state_dict()
    by_name = {alias: tensor for key, tensor in tensors.items() for alias in _aliases(key)}
    found = {key: by_name[key] for key in state if key in by_name}
    problems = differences(module_shapes(network), found)
    if any(problems.values()):
        raise WeightsError(f"{where}: " + describe(problems))
    counters = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in state.items() if k not in found}
    return {**counters, **{key: value.to(state[key].dtype) for key, value in found.items()}}


def _has_values_outside_state(network: torch.nn.Module) -> bool:
    """Whether the network computes tensors when built that no weights file holds (position tables and the like)."""
    import torch

    named = set(network.state_dict())
    buffers = any(name not in named for name, _ in network.named_buffers(remove_duplicate=False))
    return buffers or any(isinstance(v, torch.Tensor) for m in network.modules() for v in vars(m).values())


def check_timm_name(name: str) -> None:
    """UsageError unless `name` is a timm model with a tag of pretrained weights."""
    timm = import_timm()
    known = _pretrained_names()
    if name in known:
        return
    tagged = [other for other in known if other.split(".")[0] == name.split(".")[0]]
    if tagged and "." not in name:
        raise UsageError(f"weights: {name!r} names several files; give the tag: {', '.join(sorted(tagged))}")
    if timm.is_model(name) and not tagged:
        raise UsageError(f"weights: timm has no pretrained weights for {name!r}")
    raise unknown_name("weights", name, tagged or known, "weights")


@functools.cache
def _pretrained_names() -> frozenset[str]:
    return frozenset(import_timm().list_pretrained())


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: the safetensors file is truncated or damaged ({error})") from error


def _read_torch(path: Path) -> Any:
    import torch

    try:
        # training scripts keep their options in the file as a plain namespace, which runs no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        if "weights_only" in str(error) or "Weights only" in str(error):
            reason = "it holds Python objects, which could run code"
        raise WeightsError(f"{path}: refused, {reason}; save its tensors as safetensors instead") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise WeightsError(f"{path}: truncated, damaged or no PyTorch checkpoint ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS * 2:
        name = name.removeprefix(wrapper)
    return name


def _meta_model(name: str, **options: Any) -> torch.nn.Module:
    """timm's architecture without values and without its classifier."""
    import torch

    options = options or {"num_classes": 0}
    with torch.device("meta"):
        model: torch.nn.Module = import_timm().create_model(name, pretrained=False, **options)
    return model


def module_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _leftovers(name: str, keys: Iterable[str]) -> set[str]:
    """Keys that a complete file may have beyond the network without its head."""
    classifier = import_timm().get_pretrained_cfg(name).classifier or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    prefixes = tuple(f"{head}." for head in heads)
    return {key for key in keys if key in _TRAINING_ONLY or (prefixes and key.startswith(prefixes))}


def differences(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    return {
        "missing": [k for k in expected if k not in shapes and not k.endswith(_COUNTER)],
        "unexpected": [k for k in shapes if k not in expected],
        "of another shape": [
            f"{k} {list(shape)} (needs {list(expected[k])})"
            for k, shape in shapes.items()
            if k in expected and shape != expected[k]
        ],
    }


def describe(problems: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{len(names)} {kind}: {_listing(names)}" for kind, names in problems.items() if names)


def _listing(names: list[str]) -> str:
    more = f", ... ({len(names) - _NAMES_SHOWN} more)" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _aliases(key: str) -> tuple[str, ...]:
    """Names that timm's feature extractors give to one tensor of the plain network.

    They keep the name, join a sequence with its index (`stages.0.x` -> `stages_0.x`), or put `model.` before it.
    """
    return (key, key.replace(".", "_", 1), f"model.{key}")


def _outputs_held(name: str, tensors: Tensors) -> int | None:
    """Last feature output whose network these tensors make up exactly; None if there is none."""
    held = {alias: tuple(v.shape) for k, v in tensors.items() for alias in _aliases(k)}
    names = {key for key in tensors if not key.endswith(_COUNTER)}
    try:
        count = len(_meta_model(name, features_only=True).feature_info)  # type: ignore[arg-type]
        for last in range(count):
            shapes = module_shapes(_meta_model(name, features_only=True, out_indices=(last,)))
            needed = {k: s for k, s in shapes.items() if not k.endswith(_COUNTER)}
            if all(held.get(k) == s for k, s in needed.items()) and len(needed) == len(names):
                return last
    except (RuntimeError, AttributeError, TypeError):
        # an architecture without feature outputs: only the complete file is good
        return None
    return None
