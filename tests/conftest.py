"""Fixtures that several rooms use: a tiny dataset in the MVTec 3D-AD layout, and a private store and weights folder."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

SIDE = 100

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a job in the background of a script ignores Ctrl-C and would hand that on to the commands that tests interrupt
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """Free space at the start: a full disk shows as thousands of errors that name no cause in a shortened log."""
    folder = tempfile.gettempdir()
    return f"temporary files: {folder}, {shutil.disk_usage(folder).free / 1e9:.1f} GB free (2 GB are enough)"


# Minutes each, or tests of many seconds: begun last, one of them would leave the other workers idle at the end. Those
# that share features and inputs stand side by side, so that one worker makes them.
_FIRST = (
    "methods/m3dm/test_m3dm_e2e.py",
    "methods/mapping/test_cmdr_inference.py",
    "methods/mapping/test_cfm_golden.py",
    "methods/mapping/test_mafr_golden.py",
    "methods/mapping/test_cmdr_training.py",
    "stages/test_cluster.py",
    "stages/test_interrupts.py",
    "cli/test_environment.py",
    "docs/test_workflows.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first; all others keep their order."""
    tests = Path(__file__).parent
    place = {tests / name: i for i, name in enumerate(_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


Scan = tuple[np.ndarray, np.ndarray, np.ndarray]


def make_scan(seed: int, dent: bool = False, side: int = SIDE) -> Scan:
    """Cloud, image and mask of a rounded block on a tilted table; `dent` presses a hole into it."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[:side, :side] / side - 0.5
    table = 0.62 + 0.05 * v
    height = 0.02 * np.clip(1 - (np.hypot(u + rng.normal(0, 0.01), v + rng.normal(0, 0.01)) / 0.3) ** 4, 0, None)
    mask = np.zeros((side, side), dtype=bool)
    if dent:
        centre = rng.uniform(-0.1, 0.1, 2)
        depth = 0.004 * np.exp(-((u - centre[0]) ** 2 + (v - centre[1]) ** 2) / 0.003)
        height = height - depth
        mask = depth > 0.0015
    z = table - height + rng.normal(0, 5e-5, (side, side))
    xyz = np.stack([u * 0.1 + 1e-4, v * 0.1 + 1e-4, z], axis=-1).astype(np.float32)
    xyz[(rng.random((side, side)) < 0.05) & (height <= 0)] = 0
    shade = 120 + 2000 * height + rng.normal(0, 2, (side, side))
    rgb = np.clip(np.stack([shade, shade * 0.8, shade * 0.6], axis=-1), 0, 255).astype(np.uint8)
    return xyz, rgb, mask


def write_scan(folder: Path, stem: str, scan: Scan, gt: bool) -> None:
    """Files of one scan as MVTec 3D-AD writes them."""
    for role in ("xyz", "rgb", *(("gt",) if gt else ())):
        (folder / role).mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(folder / "xyz" / f"{stem}.tiff", scan[0], photometric="rgb")
    Image.fromarray(scan[1]).save(folder / "rgb" / f"{stem}.png")
    if gt:
        Image.fromarray(scan[2].astype(np.uint8) * 255).save(folder / "gt" / f"{stem}.png")


def write_category(folder: Path, seed: int, train: int = 4, test: int = 2) -> None:
    """A category with train, validation, test/good and test/dent."""
    number = iter(range(seed, seed + 1000))
    for split, count in (("train", train), ("validation", 1), ("test", test)):
        for i in range(count):
            write_scan(folder / split / "good", f"{i:03d}", make_scan(next(number)), gt=split == "test")
    for i in range(test):
        write_scan(folder / "test" / "dent", f"{i:03d}", make_scan(next(number), dent=True), gt=True)


@pytest.fixture(scope="session")
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "tiny"
    write_category(root / "block", 0)
    write_category(root / "cube", 500)
    return root


@pytest.fixture
def tiny_dataset(_tiny: Path, tmp_path: Path) -> Path:
    """A private copy of a dataset of two categories, 9 scans each, that a test may damage."""
    return Path(shutil.copytree(_tiny, tmp_path / "tiny"))


@pytest.fixture
def scan_writer() -> Callable[[Path, str, Scan, bool], None]:
    """Writes further scans into a dataset."""
    return write_scan


@pytest.fixture
def scan_maker() -> Callable[..., Scan]:
    """Makes further scans."""
    return make_scan


@pytest.fixture(autouse=True)
def _private_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's store, weights or dataset."""
    monkeypatch.setenv("MMAD_STORE", str(tmp_path / "private-store"))
    monkeypatch.setenv("MMAD_WEIGHTS", str(tmp_path / "private-weights"))
    monkeypatch.delenv("MMAD_DATA", raising=False)


@pytest.fixture(params=["cpu", "pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
def torch_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Devices that PyTorch forms of a computation are tested on: the CPU, and a GPU, pretended where there is none."""
    import torch

    device, there = str(request.param), torch.cuda.is_available()
    if device == "cuda" and not there:
        pytest.skip("needs a CUDA device")
    if device != "pretended":
        yield device
    elif there:
        pytest.skip("there is a CUDA device")
    else:
        from tests.pretended_cuda import pretended_cuda

        with pretended_cuda():
            yield "cuda"


@pytest.fixture(scope="session")
def object_server() -> Iterator[dict[str, str]]:
    """A local S3 server, as the environment variables by which clients find it."""
    moto = pytest.importorskip("moto.server")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    running.stop()


@pytest.fixture
def bucket(object_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a new store on that server."""
    for name, value in object_server.items():
        monkeypatch.setenv(name, value)
    import boto3

    boto3.client("s3").create_bucket(Bucket="store")
    return f"s3://store/{uuid.uuid4().hex}"
