from __future__ import annotations

import argparse
import functools
import hashlib
import http.server
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmad_cli.types import Sample

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(autouse=True)
def weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a registry of its own."""
    folder = tmp_path / "weights"
    monkeypatch.setenv("MMAD_WEIGHTS", str(folder))
    return folder


@functools.cache
def _inputs() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "inputs.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture
def golden_sample() -> Callable[[int], Sample]:
    """Sample i of the golden inputs, 224 x 224."""

    def make(index: int) -> Sample:
        inputs = _inputs()
        return Sample(
            category="golden",
            split=str(inputs["split"][index]),  # type: ignore[arg-type]
            defect=str(inputs["kind"][index]),
            stem=str(inputs["name"][index]),
            rgb=inputs["rgb"][index],
            xyz=inputs["xyz"][index],
            mask=inputs["gt"][index] > 0,
        )

    return make


@functools.cache
def _random_state(model: str) -> dict[str, Any]:
    import torch

    from mmad_cli.backbones._timm import import_timm

    with torch.device("meta"):
        shapes = import_timm().create_model(model, pretrained=False).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {key: _random_tensor(key, tensor, generator) for key, tensor in shapes.items()}


def _random_tensor(key: str, like: Any, generator: Any) -> Any:
    """Values that keep activations of order one, so that comparisons mean something."""
    import torch

    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    values = torch.randn(like.shape, generator=generator)
    if "running_var" in key:
        return values.abs() + 0.5
    if like.ndim <= 1:
        return 0.1 * values + (1 if key.endswith(("weight", "gamma")) and "running" not in key else 0)
    return values / max(1, like[0].numel()) ** 0.5


@pytest.fixture
def random_state() -> Callable[[str], dict[str, Any]]:
    """Complete random weights of a timm model, the same in every run."""
    return lambda model: dict(_random_state(model))


class _Handler(http.server.BaseHTTPRequestHandler):
    server: WeightsServer
    # chunks came with 1.1; the connection is closed after each answer all the same
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        body = server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        etag = f'"{hashlib.md5(body).hexdigest()}"'
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = 0
        if wanted and server.ranges and self.headers.get("If-Range") in (None, etag):
            start = int(wanted.group(1))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("ETag", etag)
        if not server.chunked:
            self.send_header("Content-Length", str(len(body) - start))
        else:
            self.send_header("Transfer-Encoding", "chunked")
        for name, value in server.extra_headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        sent = body[start:]
        if server.chunked:
            sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(sent), sent)
        if server.cut_after is not None and server.cuts_left > 0:
            server.cuts_left -= 1
            sent = sent[: server.cut_after]
        self.wfile.write(sent)

    def log_message(self, *arguments: object) -> None:
        pass


class WeightsServer(http.server.ThreadingHTTPServer):
    """Serves bytes from memory; can break connections off and refuse ranges."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.extra_headers: dict[str, str] = {}
        self.ranges = True
        self.chunked = False
        self.cut_after: int | None = None
        self.cuts_left = 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightsServer]:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with WeightsServer() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@functools.cache
def _point_vit() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "point_vit.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Golden arrays of the point networks and the ViT whose names begin with a folder, by the rest of the name."""
    return lambda folder: {k.removeprefix(f"{folder}/"): v for k, v in _point_vit().items() if k.startswith(folder)}


# layers whose stand-in values are scaled, since the point networks see raw metres
_GAINS = {
    "encoder.first_conv.0.weight": 1000.0,
    "encoder.second_conv.3.weight": 3.0,
    "pos_embed.0.weight": 20.0,
    "pos_embed.2.weight": 0.05,
}


def _stand_in(key: str, shape: tuple[int, ...]) -> Any:
    """The golden stand-in for a tensor: normal values seeded by the CRC-32 of its name, scaled by what it is."""
    import torch

    leaf = key.rsplit(".", 1)[-1]
    if leaf in ("num_batches_tracked", "queue_ptr"):
        return torch.full(shape, int(leaf == "num_batches_tracked"), dtype=torch.int64)
    values = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)
    if leaf == "running_var":
        values = 1 + 0.1 * np.abs(values)
    elif leaf == "weight" and len(shape) == 1:
        values = 1 + 0.02 * values
    elif leaf == "weight":
        gain = next((gain for end, gain in _GAINS.items() if key.endswith(end)), 1.0)
        values = gain * values / np.sqrt(float(np.prod(shape[1:])))
    else:
        values = 0.02 * values
    return torch.from_numpy(values.astype(np.float32))


@functools.cache
def _stand_ins(name: str) -> dict[str, Any]:
    keys, shapes = (_point_vit()[f"checkpoint/{name}/{part}"] for part in ("keys", "shapes"))
    sizes = [tuple(int(n) for n in str(shape).split(",") if n) for shape in shapes]
    return {str(key): _stand_in(str(key), size) for key, size in zip(keys, sizes, strict=True)}


@pytest.fixture
def stand_ins() -> Callable[[str], dict[str, Any]]:
    """Tensors of a golden checkpoint under the published names."""
    return lambda name: dict(_stand_ins(name))


def _write_checkpoint(path: Path, name: str, tensors: dict[str, Any]) -> Path:
    import torch

    content: dict[str, Any] = tensors
    if name.startswith("point"):
        content = {"base_model": tensors, "optimizer": {}, "epoch": 300, "metrics": {}, "best_metrics": {}}
    elif name == "m3dm_uff":
        content = {"model": tensors, "epoch": 0, "args": argparse.Namespace(lr=0.003)}
    torch.save(content, path)
    return path


@pytest.fixture
def checkpoint_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes tensors in the layout of the published files of `name`."""
    return lambda name, tensors: _write_checkpoint(tmp_path / f"{name}.pth", name, tensors)


@pytest.fixture(scope="module")
def _registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Path]]:
    """(name in the registry, golden name) -> a weights folder that holds the stand-in, imported once per module."""
    roots: list[Path] = []

    @functools.cache
    def installed(name: str, golden_name: str) -> Path:
        from mmad_cli.backbones.weights import import_file

        root = tmp_path_factory.mktemp("registry")
        roots.append(root)
        checkpoint = _write_checkpoint(root / "published.pth", name, _stand_ins(golden_name))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MMAD_WEIGHTS", str(root / "weights"))
            import_file(name, checkpoint)
        checkpoint.unlink()
        return root / "weights"

    yield installed
    for root in roots:
        shutil.rmtree(root)


@pytest.fixture
def imported(weights_folder: Path, _registry: Callable[[str, str], Path]) -> Callable[..., None]:
    """`imported(name, golden_name)`: the test's registry holds the stand-in of that name; its files are links."""

    def install(name: str, golden_name: str | None = None) -> None:
        shutil.copytree(_registry(name, golden_name or name), weights_folder, copy_function=os.link)

    return install
