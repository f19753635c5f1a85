from __future__ import annotations

import functools
import hashlib
import http.server
import re
import threading
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
        self.send_header("Content-Length", str(len(body) - start))
        for name, value in server.extra_headers.items():
            self.send_header(name, value)
        self.end_headers()
        sent = body[start:]
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
