"""Networks that come as published state dictionaries, without anything of ours beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmad_cli.errors import DataError
from mmad_cli.methods.mapping.method import NETWORKS_FILE, MappingMethod
from mmad_cli.methods.registry import build_config, get_method

# method -> published network -> where its tensors belong
PLACES = {
    "cfm": {"CFM_2Dto3D": "mapping/2Dto3D.", "CFM_3Dto2D": "mapping/3Dto2D."},
    "mafr": {name: f"restoration/{name}." for name in ("fusion_encoder", "decoder_2D", "decoder_3D")},
    "cmdr_iad": {
        "map2Dto3D": "rgb_to_points/",
        "map3Dto2D": "points_to_rgb/",
        "Dec2D": "rgb_decoder/",
        "Dec3D": "point_decoder/",
    },
}
SHAPES = {"cfm": "cfm", "mafr": "mafr", "cmdr_iad": "cmdr_56"}


def unfitted(name: str) -> MappingMethod:
    definition = get_method(name)
    method = definition.build(build_config(definition, None, "official", {"grid": 56}), "cpu")
    assert isinstance(method, MappingMethod)
    return method


@pytest.mark.parametrize("name", list(PLACES))
def test_they_take_the_place_of_a_fit(name: str, golden_shapes: Any, golden_state: Any, tmp_path: Path) -> None:
    tensors = {
        f"{place}{key}": torch.from_numpy(value)
        for network, place in PLACES[name].items()
        for key, value in golden_state(network, golden_shapes[SHAPES[name]][network]).items()
    }
    save_file(tensors, tmp_path / NETWORKS_FILE)
    method = unfitted(name)
    method.load(tmp_path)
    (tmp_path / "again").mkdir()
    method.save(tmp_path / "again")
    again = unfitted(name)
    again.load(tmp_path / "again")
    for loaded in (method, again):
        state = {f"{g}/{k}": v for g, module in loaded.learner_.groups.items() for k, v in module.state_dict().items()}
        assert state.keys() == tensors.keys()
        assert all(torch.equal(state[key], value) for key, value in tensors.items())
        assert loaded.losses() == {}


def test_networks_of_another_method_are_refused(golden_shapes: Any, golden_state: Any, tmp_path: Path) -> None:
    state = golden_state("CFM_2Dto3D", golden_shapes["cfm"]["CFM_2Dto3D"])
    save_file({f"mapping/2Dto3D.{k}": torch.from_numpy(v) for k, v in state.items()}, tmp_path / NETWORKS_FILE)
    with pytest.raises(DataError, match=r"(?s)networks\.safetensors: not the networks of this configuration.*3Dto2D"):
        unfitted("cfm").load(tmp_path)
