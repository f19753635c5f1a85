"""`mmad weights` as a user runs it: what is printed where, the exit code, and what is on disk afterwards."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmad_cli.backbones import weights
from mmad_cli.cli.app import run

MODEL = "resnet18.tv_in1k"
Captured = pytest.CaptureFixture[str]


class _SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which a server of our own offers its files."""
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(_SilentHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@functools.cache
def _tensors() -> dict[str, Any]:
    import torch

    from mmad_cli.backbones._timm import import_timm

    with torch.device("meta"):
        shapes = import_timm().create_model(MODEL, pretrained=False).state_dict()
    return {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in shapes.items()}


def _save(path: Path, tensors: dict[str, Any] | None = None) -> Path:
    from safetensors.torch import save_file

    save_file(_tensors() if tensors is None else tensors, path)
    return path


def _publish_at(monkeypatch: pytest.MonkeyPatch, url: str, sha256: str | None) -> None:
    """Move the registry's entry to another address."""
    known = weights._KNOWN[MODEL]
    file = weights.WeightsFile(url, url.rsplit("/", 1)[-1], sha256)
    monkeypatch.setitem(weights._KNOWN, MODEL, dataclasses.replace(known, files=(file,)))


def _folder() -> Path:
    return weights.weights_root() / MODEL


def _row(capsys: Captured, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the row of the model that `mmad weights ... --json` prints on standard output."""
    capsys.readouterr()
    code = run(["weights", *arguments, "--json"])
    rows = json.loads(capsys.readouterr().out)
    return code, next(row for row in rows if row["name"] == MODEL)


def test_list(capsys: Captured) -> None:
    code, row = _row(capsys, "list")
    assert code == 0
    assert (row["state"], row["licence"], row["folder"]) == ("missing", "bsd-3-clause", str(_folder()))
    assert run(["weights", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("point_mae", "point_bert", "m3dm_uff"))


@pytest.mark.parametrize("digits", [8, 64])
def test_fetch(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: Captured, digits: int) -> None:
    folder, address = served
    digest = hashlib.sha256(_save(folder / "m.safetensors").read_bytes()).hexdigest()
    _publish_at(monkeypatch, f"{address}/m.safetensors", digest[:digits])
    assert run(["weights", "fetch", MODEL]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    stored = weights.resolve(MODEL).path
    assert str(stored) in captured.err.replace("\n", "")
    assert stored.read_bytes() == (folder / "m.safetensors").read_bytes()
    code, row = _row(capsys, "list")
    assert (code, row["state"], row["official"]) == (0, "ready", True)
    assert (row["sha256"], row["source"]) == (digest, f"{address}/m.safetensors")
    # what is here is not asked for again
    (folder / "m.safetensors").unlink()
    assert run(["weights", "fetch", MODEL]) == 0


def _assert_says_what_to_do(err: str, url: str) -> None:
    for part in (
        f"file:    {url.rsplit('/', 1)[-1]}",
        f"address: {url}",
        f"mmad weights fetch {MODEL}",
        f"mmad weights import {MODEL} FILE",
        f"put the file in: {_folder()}",
    ):
        assert part in err


def test_fetch_of_the_wrong_file(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    folder, address = served
    url = f"{address}/{_save(folder / 'm-00000000.safetensors').name}"
    _publish_at(monkeypatch, url, "00000000")
    assert run(["weights", "fetch", MODEL]) == 2
    err = capsys.readouterr().err
    assert f"{url}: wrong SHA-256, expected 00000000, got " in err
    _assert_says_what_to_do(err, url)
    assert [path.name for path in _folder().iterdir()] == [".lock"]


@pytest.mark.parametrize("gone", [True, False])
def test_fetch_without_an_answer(
    served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: Captured, gone: bool
) -> None:
    url = f"{served[1]}/gone.safetensors" if gone else "http://127.0.0.1:9/refused.safetensors"
    _publish_at(monkeypatch, url, None)
    assert run(["weights", "fetch", MODEL]) == 2
    captured = capsys.readouterr()
    assert f"{url}: {'the server answered 404' if gone else 'no connection'}" in captured.err
    assert captured.out == ""
    _assert_says_what_to_do(captured.err, url)


def test_unknown_name(capsys: Captured) -> None:
    assert run(["weights", "fetch", "resnet18.tv_in1"]) == 2
    assert "did you mean 'resnet18.tv_in1k'" in capsys.readouterr().err


def test_import_then_verify(tmp_path: Path, capsys: Captured) -> None:
    assert run(["weights", "import", MODEL, str(_save(tmp_path / "mine.safetensors"))]) == 0
    assert "not the published file" in capsys.readouterr().err
    code, row = _row(capsys, "verify")
    assert (code, row["state"], row["official"], row["source"]) == (0, "ready", False, "file:mine.safetensors")
    stored = weights.resolve(MODEL).path
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    code, row = _row(capsys, "verify", MODEL)
    assert (code, row["state"]) == (3, "damaged")
    assert str(stored) in row["what"]
    assert f"mmad weights fetch {MODEL}" in row["what"]


def test_verify_of_what_is_not_here(capsys: Captured) -> None:
    code, row = _row(capsys, "verify", MODEL)
    assert (code, row["state"]) == (3, "missing")
    assert run(["weights", "verify"]) == 0


class _Harmful:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_import_never_executes_a_pickle(tmp_path: Path, capsys: Captured) -> None:
    import torch

    harm = tmp_path / "harm"
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(_Harmful(harm)))
    hidden = tmp_path / "hidden.pth"
    torch.save({"state_dict": _tensors(), "optimizer": _Harmful(harm)}, hidden)
    for path in (plain, hidden):
        assert run(["weights", "import", MODEL, str(path)]) == 2
        assert f"error: {path}: refused" in capsys.readouterr().err
    assert not harm.exists()
    pickle.loads(plain.read_bytes())
    assert harm.exists(), "the pickle is harmless, so the test shows nothing"


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ("missing", ["1 missing: layer1.0.conv1.weight"]),
        ("renamed", ["1 missing: layer1.0.conv1.weight", "1 unexpected: layer1.0.convolution.weight"]),
        ("shape", ["layer1.0.conv1.weight [64, 64, 1, 1]", "needs [64, 64, 3, 3]"]),
    ],
)
def test_import_of_another_network(tmp_path: Path, capsys: Captured, change: str, messages: list[str]) -> None:
    tensors = dict(_tensors())
    weight = tensors.pop("layer1.0.conv1.weight")
    if change == "renamed":
        tensors["layer1.0.convolution.weight"] = weight
    if change == "shape":
        tensors["layer1.0.conv1.weight"] = weight[:, :, :1, :1].contiguous()
    path = _save(tmp_path / "other.safetensors", tensors)
    assert run(["weights", "import", MODEL, str(path)]) == 2
    err = capsys.readouterr().err
    assert f"{path}: does not fit {MODEL}" in err
    assert all(message in err for message in messages)
    assert _row(capsys, "list")[1]["state"] == "missing"


def test_import_of_no_file(tmp_path: Path, capsys: Captured) -> None:
    assert run(["weights", "import", MODEL, str(tmp_path / "none.pth")]) == 2
    assert "none.pth: no such file" in capsys.readouterr().err
