"""Features of timm networks with weights from the registry; nothing is ever downloaded here."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from mmad_cli.alignment.pooling import patches_from_points
from mmad_cli.backbones._checkpoints import build_with, read_checkpoint
from mmad_cli.backbones._timm import import_timm
from mmad_cli.backbones.base import Features
from mmad_cli.backbones.builtin import RGB, is_builtin
from mmad_cli.backbones.cloud_images import normal_image, relief_image, sample_bilinear, shaded_views
from mmad_cli.backbones.weights import WeightsRecord, resolve
from mmad_cli.devices import Batches, sent
from mmad_cli.errors import DataError, UsageError, WeightsError

if TYPE_CHECKING:
    import torch

    from mmad_cli.backbones.specs import FeatureSpec, TimmParams
    from mmad_cli.types import FloatArray, Sample

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RENDER_GRID = 56

_BATCH_CPU = 8
_BATCH_GPU = 32
# passes through the network per batch on a GPU: while it computes, the next images are resized and sent
_STEPS_GPU = 4

# waits for features that are being computed
_Running = Callable[[], list[Features]]


class TimmBackbone:
    """Feature maps of a CNN, or the final patch tokens of a ViT, in evaluation mode."""

    def __init__(self, spec: FeatureSpec, device: str = "cpu") -> None:
        import torch

        self.spec = spec
        self._settings = cast("TimmParams", spec.settings)
        self._device = torch.device(device)
        kind = type(self)
        on_cpu = None if self._device.type == "cpu" else lambda: kind(spec).extract
        self._batches: Batches[Sample, Features] = Batches(self.batch_size, "image features", on_cpu)
        record = resolve(self._settings.model)
        self._network = _load(self._settings, record).to(self._device, self._dtype).eval().requires_grad_(False)
        self._mean, self._std = (values.to(self._device) for values in _constants(self._settings))

    @property
    def batch_size(self) -> int:
        """A hint for the caller."""
        return _BATCH_CPU if self._device.type == "cpu" else _BATCH_GPU

    def extract(self, samples: Sequence[Sample]) -> list[Features]:
        """`out{i}` float32 (C, h, w) per chosen output, or `tokens` float32 (P, C) and `grid` int32 (2,)."""
        return self._batches.run(samples, self._batch)

    def _batch(self, samples: Sequence[Sample]) -> list[Features]:
        step = self._step(len(samples))
        if self.spec.input == "render":
            return [self._rendered(sample, step) for sample in samples]
        if self._device.type == "cpu":
            return self._features(map(self._image, samples), step)
        import torch

        # one GPU takes images faster than one core resizes them
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            return self._features(pool.map(self._image, samples), step)

    def _step(self, batch: int) -> int:
        """Images in one pass through the network."""
        # one by one on a CPU: as fast there, and a value never depends on which samples share a batch
        return 1 if self._device.type == "cpu" else max(1, batch // _STEPS_GPU)

    def _features(self, images: Iterable[FloatArray], step: int) -> list[Features]:
        """Features of each image, one step behind what the device computes."""
        waiting, found = iter(images), list[Features]()
        running: _Running = list
        while some := list(islice(waiting, step)):
            started = self._start(np.stack(some))
            found += running()
            running = started
        return found + running()

    @property
    def _dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self._settings.precision == "bfloat16" else torch.float32

    def _image(self, sample: Sample) -> FloatArray:
        """Network input (3, size, size) before normalisation."""
        from mmad_cli.preprocessing.resize import centre_crop_view, to_network_size

        settings = self._settings
        if self.spec.view == "crop":
            return _scaled(centre_crop_view(sample.rgb, sample.mask)[0])
        resized = to_network_size(sample, size=settings.size, xyz_resize=settings.xyz_resize)
        if self.spec.input == "rgb":
            return _scaled(resized.rgb)
        if self.spec.input == "normals":
            return normal_image(resized.xyz)
        if self.spec.input == "relief":
            return relief_image(resized.xyz)
        return np.repeat(resized.xyz[None, ..., 2], 3, axis=0)

    def _rendered(self, sample: Sample, step: int) -> Features:
        """Cells of a 56 x 56 grid: features of the points under them, averaged over all views and scaled to length 1.

        A feature map is read bilinearly where a point lies in its view. Source: CPMF (arXiv 2303.13194), section 3.3.
        """
        from mmad_cli.preprocessing.resize import resize_xyz, valid_pixels

        settings = self._settings
        xyz = resize_xyz(sample.xyz, settings.size, settings.xyz_resize)
        pixel = np.flatnonzero(valid_pixels(xyz))
        if not len(pixel):
            raise DataError(f"{sample.id}: no valid 3D points, so there is nothing to render; check its xyz file")
        views = shaded_views(xyz)
        total: Any = 0
        for view, features in zip(views, self._features((view.image for view in views), step), strict=True):
            maps = [_as_map(features, name) for name in features if name != "grid"]
            total = total + np.concatenate([sample_bilinear(one, view.at, settings.size) for one in maps], axis=1)
        points = total / len(views)
        points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
        tokens = patches_from_points(points, pixel, settings.size, RENDER_GRID)
        return {"tokens": tokens, "grid": np.array([RENDER_GRID, RENDER_GRID], dtype=np.int32)}

    def _start(self, images: FloatArray) -> _Running:
        """Let the device compute features of images (B, 3, size, size); what comes back waits for them."""
        import torch

        with torch.inference_mode(), _full_precision(self._device):
            batch = ((sent(images, self._device) - self._mean) / self._std).to(self._dtype)
            if self._settings.outputs is None:
                return self._tokens(batch)
            return self._maps(batch, self._settings.outputs)

    def _maps(self, batch: torch.Tensor, outputs: Sequence[int]) -> _Running:
        arriving, count = _arriving([output.float() for output in self._network(batch)]), len(batch)

        def features() -> list[Features]:
            maps = arriving()
            return [
                {f"out{i}": np.ascontiguousarray(of_output[sample]) for i, of_output in zip(outputs, maps, strict=True)}
                for sample in range(count)
            ]

        return features

    def _tokens(self, batch: torch.Tensor) -> _Running:
        network = cast("Any", self._network)
        # class and register tokens come first and belong to no patch
        arriving = _arriving([network.forward_features(batch)[:, network.num_prefix_tokens :].float()])
        grid = np.array(_grid(network, self._settings), dtype=np.int32)
        return lambda: [{"tokens": np.ascontiguousarray(of_sample), "grid": grid.copy()} for of_sample in arriving()[0]]


def _arriving(tensors: Sequence[torch.Tensor]) -> Callable[[], list[NDArray[Any]]]:
    """Start to copy tensors to the host; what comes back waits for the copies."""
    import torch

    if tensors[0].device.type != "cuda":
        return lambda: [tensor.cpu().numpy() for tensor in tensors]
    copies = [tensor.contiguous().to("cpu", non_blocking=True) for tensor in tensors]
    # only what is queued so far: the next step may be behind it already
    copied = torch.cuda.current_stream().record_event()

    def arrays() -> list[NDArray[Any]]:
        copied.synchronize()
        return [copy.numpy() for copy in copies]

    return arrays


def _as_map(features: Features, name: str) -> FloatArray:
    """A feature map (C, h, w), from tokens too."""
    if name != "tokens":
        return features[name]
    height, width = (int(side) for side in features["grid"])
    return np.ascontiguousarray(features[name].T).reshape(-1, height, width)


@functools.lru_cache(maxsize=64)
def output_shapes(settings: TimmParams) -> Mapping[str, tuple[int, ...]]:
    """Shapes of the arrays per sample, from the architecture alone (no weights needed)."""
    import torch

    with torch.device("meta"):
        network = cast("Any", _architecture(settings))
        image = torch.empty(1, 3, settings.size, settings.size)
        if settings.outputs is None:
            tokens = network.forward_features(image)[:, network.num_prefix_tokens :]
            return {"tokens": tuple(tokens.shape[1:]), "grid": (2,)}
        return {f"out{i}": tuple(o.shape[1:]) for i, o in zip(settings.outputs, network(image), strict=True)}


def _load(settings: TimmParams, record: WeightsRecord) -> torch.nn.Module:
    last = settings.outputs[-1] if settings.outputs else None
    if record.outputs is not None and (last is None or last > record.outputs):
        wanted = "tokens" if last is None else f"output {last}"
        raise WeightsError(
            f"{record.name}: the imported file reaches output {record.outputs} only, {wanted} asked for; "
            f"choose outputs up to {record.outputs}, or import the complete file"
        )
    network = build_with(lambda: _architecture(settings), read_checkpoint(record.path).content, str(record.path))
    return _pruned(network, settings)


def _pruned(network: torch.nn.Module, settings: TimmParams) -> torch.nn.Module:
    """The network with its first blocks only; the final normalisation stays."""
    if settings.blocks is None:
        return network
    blocks = cast("Any", network).blocks
    if settings.blocks > len(blocks):
        raise UsageError(f"blocks: {settings.model} has {len(blocks)}, got {settings.blocks}")
    cast("Any", network).blocks = blocks[: settings.blocks]
    return network


def _architecture(settings: TimmParams) -> torch.nn.Module:
    if is_builtin(settings.model):
        return _builtin(settings)
    timm = import_timm()
    if settings.outputs is not None:
        return cast("torch.nn.Module", _with_outputs(timm, settings))
    network = timm.create_model(settings.model, pretrained=False, num_classes=0)
    if not (hasattr(network, "patch_embed") and hasattr(network, "num_prefix_tokens")):
        raise UsageError(f"{settings.model}: has no patch tokens; choose feature outputs, for example outputs=[2, 3]")
    if network.patch_embed.img_size not in (None, (settings.size, settings.size)):
        network = _of_free_size(timm, settings)
        _grid(network, settings)
    return cast("torch.nn.Module", network)


def _builtin(settings: TimmParams) -> torch.nn.Module:
    from mmad_cli.backbones.builtin.rgb import WIDTHS, RgbNetwork

    if settings.model != RGB:
        raise UsageError(f"{settings.model}: is a network for points, images take {RGB}")
    if settings.blocks is not None:
        raise UsageError(f"blocks: {settings.model} has no transformer blocks, got {settings.blocks}")
    if settings.outputs is not None and settings.outputs[-1] >= len(WIDTHS):
        raise UsageError(f"{settings.model}: has outputs 0 to {len(WIDTHS) - 1}, got {list(settings.outputs)}")
    network = RgbNetwork(settings.outputs or ())
    _grid(network, settings)
    return network


def _of_free_size(timm: Any, settings: TimmParams) -> Any:
    """The network for other images than it was trained on; its position embeddings are interpolated for each batch.

    Parameters keep their shapes, so weights still load strictly.
    """
    try:
        return timm.create_model(settings.model, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError as error:
        own = timm.get_pretrained_cfg(settings.model).input_size[-1]
        raise UsageError(f"{settings.model}: size must be {own}, its own, got {settings.size}") from error


def _with_outputs(timm: Any, settings: TimmParams) -> Any:
    outputs = settings.outputs or ()
    try:
        return timm.create_model(settings.model, pretrained=False, features_only=True, out_indices=outputs)
    except (RuntimeError, AttributeError, TypeError, AssertionError, IndexError) as error:
        raise UsageError(f"{settings.model}: has no feature outputs {list(outputs)} ({error})") from error


def _grid(network: Any, settings: TimmParams) -> tuple[int, int]:
    height, width = network.patch_embed.patch_size
    if settings.size % height or settings.size % width:
        raise UsageError(
            f"{settings.model}: size must be a multiple of its {height} x {width} patches, got {settings.size}"
        )
    return settings.size // height, settings.size // width


def _constants(settings: TimmParams) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    if settings.norm == "none":
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    elif settings.norm == "imagenet" or is_builtin(settings.model):
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    else:
        config = import_timm().get_pretrained_cfg(settings.model)
        mean, std = config.mean, config.std
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)


def _scaled(rgb: Any) -> FloatArray:
    """uint8 (H, W, 3) to float32 (3, H, W) in [0, 1]."""
    return np.ascontiguousarray(np.moveaxis(rgb, -1, 0), dtype=np.float32) / np.float32(255)


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Plain float32 on a GPU: TF32 would put CPU and GPU features 1e-3 apart.

    PyTorch allows it for convolutions by default, but for matrix products only where a user asks for it.
    """
    import torch

    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield
