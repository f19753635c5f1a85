"""`mmad pretrain` and `--backbones builtin` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SMALL = {
    "rgb": {"canvas": 64, "fresh": 1, "pool": 2, "crop": 48, "crops": 4, "anchors": 8, "altered": 16},
    "points": {"patches": 2, "groups": 32, "group_size": 16, "altered": 16},
}


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Path]:
    """Configurations of two steps."""
    paths = {}
    for network, fields in SMALL.items():
        paths[network] = tmp_path / f"{network}.json"
        paths[network].write_text(json.dumps({"steps": 2, "horizon": 2, "warmup": 1, **fields}))
    return paths


@pytest.mark.parametrize("network", SMALL)
def test_own_weights_take_the_place_of_the_shipped_ones(network: str, mmad: Any, small: dict[str, Path]) -> None:
    ended = mmad("pretrain", network, "--config", small[network], "--state", "state", "--output", "own.safetensors")
    assert ended.code == 0, ended.err
    assert ended.out == ""
    assert len(Path("state/log.csv").read_text().splitlines()) == 3
    name = f"builtin_{network}"
    before = json.loads(mmad("weights", "list", "--json").out)
    assert {row["name"]: row["state"] for row in before}[name] == "ready"
    assert mmad("weights", "import", name, "own.safetensors").code == 0
    after = {row["name"]: row for row in json.loads(mmad("weights", "list", "--json").out)}
    assert after[name] != {row["name"]: row for row in before}[name]


def test_a_second_call_goes_on_from_the_state(mmad: Any, small: dict[str, Path]) -> None:
    arguments = ("pretrain", "points", "--config", small["points"], "--state", "state", "--json")
    first = json.loads(mmad(*arguments, "--steps", "1").out)
    second = json.loads(mmad(*arguments).out)
    assert (first["steps"], second["steps"]) == (1, 2)
    assert mmad("pretrain", "points", "--config", small["points"], "--seed", "5", "--state", "state").code == 2


def test_check_compares_with_the_shipped_log(mmad: Any) -> None:
    ended = mmad("pretrain", "points", "--steps", "2", "--check", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["steps"] == 2
    assert found["outside"] == 0
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pretrain", "rbg"), "rgb"),
        (("pretrain", "rgb", "--check", "--seed", "1"), "--check"),
        (("pretrain", "rgb", "--config", "none.json"), "none.json"),
        (("pretrain", "rgb", "--steps", "0", "--output", "/proc/none/file"), "--output"),
    ],
)
def test_wrong_input(arguments: tuple[str, ...], words: str, mmad: Any) -> None:
    ended = mmad(*arguments)
    assert ended.code == 2
    assert words in ended.err
    assert "Traceback" not in ended.err


# every method that reads a network, with settings that keep the test short
FAST = ("--set", "grid=32", "--set", "epochs=1", "--set", "groups=64", "--set", "group_size=32")
PSEUDO = ("--set", "epochs=1", "--set", "pseudo_samples=4", "--set", "groups=64", "--set", "group_size=32")
METHODS = {
    "m3dm": ("--set", "groups=64", "--set", "group_size=32"),
    "cfm": FAST,
    "mafr": FAST,
    "cmdr_iad": FAST,
    "patchcore": (),
    "btf": ("--variant", "rgb+fpfh"),
    "g2sf": PSEUDO,
    "iaenet": (*PSEUDO, "--set", "experts=image,points"),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_run_on_the_built_in_networks(method: str, mmad: Any, tiny_dataset: Path) -> None:
    ended = mmad(
        *("evaluate", tiny_dataset, "--method", method, "--backbones", "builtin", *METHODS[method]),
        *("--category", "block", "--device", "cpu", "--workers", "1", "--json"),
    )
    assert ended.code == 0, ended.err
    run = json.loads(ended.out)
    run = run[0] if isinstance(run, list) else run
    assert run["categories"]["block"]["metrics"]["p_auroc"] is not None
    assert {weights["name"] for weights in run["weights"]} <= {"builtin_rgb", "builtin_points"}
    assert run["weights"]
    assert run["comparable"] is False
    assert any("builtin" in reason for reason in run["not_comparable"])


def test_missing_weights_name_the_option(mmad: Any, tiny_dataset: Path) -> None:
    ended = mmad("evaluate", tiny_dataset, "--method", "m3dm")
    assert ended.code == 2
    assert "--backbones builtin" in ended.err


@pytest.mark.parametrize("command", ["evaluate", "extract"])
def test_the_option_is_refused_where_it_would_do_nothing(command: str, mmad: Any, tiny_dataset: Path) -> None:
    ended = mmad(command, tiny_dataset, "--method", "btf", "--variant", "fpfh", "--backbones", "builtin")
    assert ended.code == 2
    assert "--backbones builtin: btf fpfh" in ended.err
    assert mmad(command, tiny_dataset, "--method", "btf", "--backbones", "own").code == 2
