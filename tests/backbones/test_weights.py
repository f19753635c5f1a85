from __future__ import annotations

import argparse
import json
import logging.handlers
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save, save_file

from mmad_cli.backbones import _download, weights
from mmad_cli.backbones._point_checkpoints import uff_shapes
from mmad_cli.backbones.builtin import NAMES
from mmad_cli.backbones.weights import WeightsError, fetch, import_file, list_weights, resolve, verify
from mmad_cli.errors import UsageError

RandomState = Callable[[str], dict[str, Any]]
MODEL = "resnet18.tv_in1k"


@pytest.fixture
def state(random_state: RandomState) -> dict[str, Any]:
    return random_state(MODEL)


@pytest.fixture
def body(state: dict[str, Any]) -> bytes:
    return save(state)


def _features(state: dict[str, Any], *absent: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.startswith(absent)}


def _write(path: Path, tensors: dict[str, Any]) -> Path:
    save_file(tensors, path)
    return path


# what is known


def test_published_files_carry_their_hash() -> None:
    racm = weights.entry("wide_resnet50_2.racm_in1k")
    assert racm.files[0].filename == "wide_resnet50_racm-8234f177.pth"
    assert racm.files[0].sha256 == "8234f177"
    dino = weights.entry("vit_base_patch8_224.dino")
    assert dino.files[0].url == "https://huggingface.co/timm/vit_base_patch8_224.dino/resolve/main/model.safetensors"
    assert len(weights.entry("point_mae").files[0].sha256 or "") == 64


@pytest.mark.parametrize("name", [name for name in weights.known_names() if "." in name])
def test_table_agrees_with_timm(name: str) -> None:
    known = weights._KNOWN[name]
    derived = weights._timm_entry.__wrapped__(name)
    assert {file.url for file in known.files} == {file.url for file in derived.files}
    assert known.licence == derived.licence


def test_any_other_timm_name_with_a_tag_is_resolved() -> None:
    assert weights.entry("vit_tiny_patch16_224.augreg_in21k").files[0].url.startswith("https://huggingface.co/timm/")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "give the tag: .*resnet18.tv_in1k"),
        ("resnet18.tv_in1", "did you mean 'resnet18.tv_in1k'"),
        ("resnet10", "did you mean"),
        ("point-mae", "unknown weights"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(name)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden"])
def test_a_name_cannot_leave_the_folder(name: str) -> None:
    with pytest.raises(WeightsError, match="not a name"):
        resolve(name)


def test_the_registry_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mmad_cli.backbones import weights; weights.list_weights(); weights.verify();"
        "print({'torch', 'timm', 'pooch', 'requests', 'safetensors'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# missing


def test_missing_weights_say_what_to_do(weights_folder: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        resolve("wide_resnet50_2.racm_in1k")
    text = str(caught.value)
    assert caught.value.exit_code == 2
    for part in (
        "wide_resnet50_racm-8234f177.pth",
        "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/",
        "mmad weights fetch wide_resnet50_2.racm_in1k",
        "mmad weights import wide_resnet50_2.racm_in1k FILE",
        str(weights_folder / "wide_resnet50_2.racm_in1k"),
    ):
        assert part in text


def test_weights_without_an_address_are_import_only() -> None:
    with pytest.raises(WeightsError, match=r"github.com/nomewang/M3DM(.|\n)*mmad weights import m3dm_uff FILE"):
        fetch("m3dm_uff", progress=False)


def test_list_says_missing() -> None:
    states = {status.name: status.state for status in list_weights()}
    assert set(states) == set(weights.known_names())
    assert {name for name, state in states.items() if state == "ready"} == set(NAMES)
    assert {state for name, state in states.items() if name not in NAMES} == {"missing"}
    assert {status.name for status in verify()} == set(NAMES)


# import


def test_import_keeps_a_safetensors_file_byte_for_byte(tmp_path: Path, state: dict[str, Any], body: bytes) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(body)
    record = import_file(MODEL, path)
    assert record.path.read_bytes() == body
    assert record.sha256 == record.stored_sha256
    assert (record.official, record.imported_from, record.outputs) == (False, "mine.safetensors", None)
    assert record.tensors == len(state)
    assert resolve(MODEL) == record
    written = json.loads((record.folder / "record.json").read_text())
    assert written["sha256"] == record.sha256
    assert "folder" not in written


def test_import_of_a_torch_checkpoint_with_wrappers(tmp_path: Path, state: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import load_file

    path = tmp_path / "mine.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    record = import_file(MODEL, path)
    stored = load_file(record.path)
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[key], state[key]) for key in state)
    assert record.sha256 != record.stored_sha256


def test_import_of_a_part_reaches_the_outputs_it_holds(tmp_path: Path, state: dict[str, Any]) -> None:
    for absent, last in ((("layer4", "fc"), 3), (("layer3", "layer4", "fc"), 2)):
        record = import_file(MODEL, _write(tmp_path / "part.safetensors", _features(state, *absent)))
        assert record.outputs == last
    assert len(list(record.folder.glob("*.safetensors"))) == 1


def test_import_without_classifier_is_complete(tmp_path: Path, state: dict[str, Any]) -> None:
    assert import_file(MODEL, _write(tmp_path / "a.safetensors", _features(state, "fc"))).outputs is None


def test_import_without_batch_norm_counters(tmp_path: Path, state: dict[str, Any]) -> None:
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert import_file(MODEL, _write(tmp_path / "a.safetensors", old)).outputs is None


def test_official_by_hash_only(tmp_path: Path, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "a.safetensors", state)
    assert not import_file(MODEL, path).official
    known = weights._KNOWN[MODEL]
    published = weights.WeightsFile("https://example.org/x-1.pth", "x.pth", weights._sha256(path)[:8])
    changed = weights.WeightsEntry(known.name, known.kind, (published,), known.licence, known.description)
    monkeypatch.setitem(weights._KNOWN, MODEL, changed)
    assert import_file(MODEL, path).official


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: _features(s, "layer2.0.conv1"), r"1 missing: layer2.0.conv1.weight"),
        (lambda s: {**s, "extra.weight": s["conv1.weight"].clone()}, r"1 unexpected: extra.weight"),
        (lambda s: {**s, "conv1.weight": s["conv1.weight"][:32].contiguous()}, r"conv1.weight \[32, .*needs \[64, 3"),
        (lambda s: _features(s, "layer3.1", "layer4", "fc"), r"missing: layer3.1.conv1.weight.*\(\d+ more\)"),
        (lambda s: {**s, "conv1.weight": s["conv1.weight"] * float("nan")}, r"NaN or infinite.*conv1.weight"),
    ],
)
def test_import_is_strict(
    tmp_path: Path, state: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        import_file(MODEL, _write(tmp_path / "a.safetensors", change(state)))
    with pytest.raises(WeightsError, match="missing"):
        resolve(MODEL)


def test_other_architecture_is_refused(tmp_path: Path, random_state: RandomState) -> None:
    path = _write(tmp_path / "a.safetensors", random_state("vit_tiny_patch16_224"))
    with pytest.raises(WeightsError, match="does not fit"):
        import_file(MODEL, path)


class _Harmful:
    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("from pathlib import Path; Path('harm').touch()",))


def test_code_in_a_checkpoint_never_runs(
    tmp_path: Path, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state, "x": _Harmful()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(_Harmful()))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(WeightsError, match=rf"{name}: refused"):
            import_file(MODEL, tmp_path / name)
    assert not (tmp_path / "harm").exists()


def test_option_namespace_is_allowed(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "uff.pth"
    tensors = {name: torch.ones(shape) for name, shape in uff_shapes().items()}
    torch.save({"model": tensors, "args": argparse.Namespace(lr=0.1)}, path)
    record = import_file("m3dm_uff", path)
    assert (record.tensors, record.kind) == (16, "m3dm_uff")


def test_damaged_files_are_named(tmp_path: Path, state: dict[str, Any], body: bytes) -> None:
    import torch

    torch.save(state, tmp_path / "whole.pth")
    content = {
        "cut.safetensors": body[: len(body) // 2],
        "cut.pth": (tmp_path / "whole.pth").read_bytes()[:100_000],
        "empty.pth": b"",
        "page.pth": b"<!DOCTYPE html><html>not found</html>",
        "noise.pth": b"\x80\x02" + bytes(range(200)),
        "other.bin": b"hello world, hello world",
    }
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WeightsError, match=name):
            import_file(MODEL, tmp_path / name)
    with pytest.raises(WeightsError, match="no such file"):
        import_file(MODEL, tmp_path / "absent.pth")


def test_file_put_into_the_folder_is_taken(weights_folder: Path, body: bytes) -> None:
    folder = weights_folder / MODEL
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(body)
    assert resolve(MODEL).imported_from == "model.safetensors"


# verify


def test_verify_finds_changed_bytes(tmp_path: Path, state: dict[str, Any]) -> None:
    record = import_file(MODEL, _write(tmp_path / "a.safetensors", state))
    assert {status.name: status.state for status in verify()} == dict.fromkeys((MODEL, *NAMES), "ready")
    data = bytearray(record.path.read_bytes())
    data[-1] ^= 1
    record.path.write_bytes(data)
    assert verify(MODEL)[0].state == "damaged"
    record.path.write_bytes(data[:-1])
    with pytest.raises(WeightsError, match=r"bytes instead of .*mmad weights fetch"):
        resolve(MODEL)
    record.path.unlink()
    assert next(s for s in list_weights() if s.name == MODEL).state == "damaged"
    (record.folder / "record.json").write_text("{}")
    with pytest.raises(WeightsError, match="cannot be read"):
        resolve(MODEL)


# fetch


def test_fetch_reports_progress_and_does_not_repeat(server: Any, body: bytes) -> None:
    server.files["/m.safetensors"] = body
    seen: list[tuple[int, int | None]] = []
    url = server.url("/m.safetensors")
    record = fetch(MODEL, progress=lambda done, total: seen.append((done, total)), urls=[url])
    assert seen[-1] == (len(body), len(body))
    assert (record.source, record.official, record.imported_from) == (url, False, None)
    assert record.path.read_bytes() == body
    assert sorted(p.name for p in record.folder.iterdir() if p.name != ".lock") == [record.file, "record.json"]
    assert fetch(MODEL, progress=False, urls=[url]) == record
    assert len(server.requests) == 1
    fetch(MODEL, progress=False, urls=[url], force=True)
    assert len(server.requests) == 2


def test_pooch_says_nothing_and_keeps_its_level(server: Any, tmp_path: Path) -> None:
    import pooch

    said = logging.handlers.BufferingHandler(1000)
    logger = pooch.get_logger()
    level = logger.level
    logger.addHandler(said)
    try:
        server.files["/m"] = b"content"
        _download.download(server.url("/m"), tmp_path / "m", tmp_path / "m.part")
    finally:
        logger.removeHandler(said)
    assert said.buffer == []
    assert logger.level == level


def test_fetch_from_the_registry_is_official(
    server: Any, body: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files["/m.safetensors"] = body
    known = weights._KNOWN[MODEL]
    gone = weights.WeightsFile(server.url("/gone.pth"), "gone.pth")
    good = weights.WeightsFile(server.url("/m.safetensors"), "m.safetensors", weights.hashlib.sha256(body).hexdigest())
    changed = weights.WeightsEntry(known.name, known.kind, (gone, good), known.licence, known.description)
    monkeypatch.setitem(weights._KNOWN, MODEL, changed)
    record = fetch(MODEL)
    assert record.official
    assert record.source == good.url
    captured = capsys.readouterr()
    assert captured.out == ""


def test_wrong_hash_is_refused_and_deleted(server: Any, body: bytes, weights_folder: Path) -> None:
    server.files["/resnet18-f37072fd.pth"] = body
    with pytest.raises(
        WeightsError, match=r"resnet18-f37072fd.pth: wrong SHA-256, expected f37072fd, got [0-9a-f]{64}"
    ):
        fetch(MODEL, progress=False, urls=[server.url("/resnet18-f37072fd.pth")])
    assert [p.name for p in (weights_folder / MODEL).iterdir()] == [".lock"]


def test_whole_hash_is_checked(server: Any, weights_folder: Path) -> None:
    # a published name makes it the published file, whose whole digest is known
    server.files["/pretrain.pth"] = b"other bytes"
    url = server.url("/pretrain.pth")
    with pytest.raises(WeightsError, match=rf"{url}: .*expected 27ded932bb0a.* got {'[0-9a-f]' * 64}"):
        fetch("point_mae", progress=False, urls=[url])
    assert len(server.requests) == 1
    assert [p.name for p in (weights_folder / "point_mae").iterdir()] == [".lock"]


def test_hash_that_the_server_states_is_checked(server: Any, body: bytes) -> None:
    server.files["/m.safetensors"] = body
    server.extra_headers["X-Linked-Etag"] = '"' + "0" * 64 + '"'
    with pytest.raises(WeightsError, match="wrong SHA-256, expected 0000"):
        fetch(MODEL, progress=False, urls=[server.url("/m.safetensors")])


def test_failed_fetch_keeps_what_was_there(server: Any, tmp_path: Path, state: dict[str, Any]) -> None:
    record = import_file(MODEL, _write(tmp_path / "a.safetensors", state))
    server.files["/page"] = b"<html>login</html>"
    with pytest.raises(WeightsError, match=r"\d/page: neither .*a web page"):
        fetch(MODEL, progress=False, urls=[server.url("/page")], force=True)
    assert resolve(MODEL) == record
    assert sorted(p.name for p in record.folder.iterdir()) == [".lock", record.file, "record.json"]


def test_all_failures_are_listed_with_the_way_out(server: Any) -> None:
    refused = "http://127.0.0.1:9/x.safetensors"
    with pytest.raises(WeightsError) as caught:
        fetch(MODEL, progress=False, urls=[server.url("/none.safetensors"), refused])
    text = str(caught.value)
    assert "/none.safetensors: the server answered 404" in text
    assert f"{refused}: no connection" in text
    assert f"mmad weights import {MODEL} FILE" in text


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_connection_is_taken_up_again(server: Any, body: bytes, ranges: bool) -> None:
    server.files["/m.safetensors"] = body
    server.ranges, server.cut_after, server.cuts_left = ranges, 2_000_000, 1
    record = fetch(MODEL, progress=False, urls=[server.url("/m.safetensors")])
    assert record.path.read_bytes() == body
    first, second = (wanted for _, wanted in server.requests)
    assert first is None
    # less than a block of what has arrived may be lost
    assert 2_000_000 - 65_536 <= int(second.removeprefix("bytes=").removesuffix("-")) <= 2_000_000


def test_next_run_resumes(server: Any, body: bytes, weights_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_download.time, "sleep", lambda seconds: None)
    server.files["/m.safetensors"] = body
    server.cut_after, server.cuts_left = 1_000_000, 3
    with pytest.raises(WeightsError, match="the connection ended early"):
        fetch(MODEL, progress=False, urls=[server.url("/m.safetensors")])
    arrived = (weights_folder / MODEL / "m.safetensors.part").stat().st_size
    assert arrived > 2_500_000
    assert fetch(MODEL, progress=False, urls=[server.url("/m.safetensors")]).path.read_bytes() == body
    assert server.requests[-1][1] == f"bytes={arrived}-"


def test_interrupt_leaves_only_the_part(server: Any, body: bytes, weights_folder: Path) -> None:
    server.files["/m.safetensors"] = body

    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(MODEL, progress=interrupt, urls=[server.url("/m.safetensors")])
    left = sorted(p.name for p in (weights_folder / MODEL).iterdir())
    assert left == [".lock", "m.safetensors.part", "m.safetensors.part.json"]
    with pytest.raises(WeightsError, match="missing"):
        resolve(MODEL)


def test_leftovers_of_a_killed_process_go(server: Any, body: bytes, weights_folder: Path) -> None:
    left = weights_folder / MODEL / ".new-abc"
    left.mkdir(parents=True)
    (left / "tmp").write_bytes(body)
    server.files["/m.safetensors"] = body
    fetch(MODEL, progress=False, urls=[server.url("/m.safetensors")])
    assert not left.exists()


def test_file_of_unstated_length_that_breaks_off_is_not_taken(
    server: Any, body: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_download.time, "sleep", lambda seconds: None)
    server.files["/m.safetensors"] = body
    server.chunked, server.cut_after, server.cuts_left = True, 1_000_000, 3
    url = server.url("/m.safetensors")
    with pytest.raises(_download.DownloadError, match=rf"{url}: the connection ended early"):
        _download.download(url, tmp_path / "m", tmp_path / "m.part")
    assert not (tmp_path / "m").exists()
    digest = _download.download(url, tmp_path / "m", tmp_path / "m.part")
    assert (tmp_path / "m").read_bytes() == body
    assert digest == weights.hashlib.sha256(body).hexdigest()


def test_changed_file_is_not_glued_to_an_old_part(server: Any, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_download.time, "sleep", lambda seconds: None)
    server.files["/m.safetensors"] = b"\0" * 2_000_000
    server.cut_after, server.cuts_left = 500_000, 3
    with pytest.raises(WeightsError):
        fetch(MODEL, progress=False, urls=[server.url("/m.safetensors")])
    server.files["/m.safetensors"] = body
    assert fetch(MODEL, progress=False, urls=[server.url("/m.safetensors")]).path.read_bytes() == body


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMAD_WEIGHTS", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match="MMAD_WEIGHTS"):
        fetch(MODEL, progress=False, urls=["http://127.0.0.1:9/x"])
