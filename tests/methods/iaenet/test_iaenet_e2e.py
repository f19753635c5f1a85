"""The ensemble from scans to metrics, with a network on normals and FPFH."""

import numpy as np
import pytest

from mmad_cli.stages import api

SETTINGS = {
    "experts": ["image", "fpfh"],
    "rgb_backbone": "resnet18.tv_in1k",
    "rgb_outputs": [2, 3],
    "coreset_fraction": 0.02,
    "pseudo_per_sample": 1,
    "epochs": 2,
    "g2sf_epochs": 1,
    "g2sf_consistency_share": 0.05,
}


@pytest.mark.slow
@pytest.mark.usefixtures("random_resnet18")
def test_learned_fusions_from_scans_to_metrics(tiny_dataset, tmp_path):
    def evaluate(variant, name, **options):
        result, folder = api.evaluate(
            tiny_dataset, method="iaenet", variant=variant, categories=["block"], device="cpu", settings=SETTINGS,
            store=tmp_path / name, out=tmp_path / f"{name}-{variant}", workers=1, **options,
        )  # fmt: skip
        assert result.categories["block"].status == "ok", result.categories["block"].error
        return result, (folder / "block" / "scores.csv").read_text()

    first = {variant: evaluate(variant, "one") for variant in ("iaf_s", "iaf_f", "g2sf")}
    # another store and another order: everything is computed again, with the same numbers
    for variant in ("g2sf", "iaf_f", "iaf_s"):
        result, scores = evaluate(variant, "two")
        assert scores == first[variant][1]
        assert result.categories["block"].metrics == first[variant][0].categories["block"].metrics
        assert set(result.categories["block"].bank) == {"image", "fpfh"}
        assert all(np.isfinite(v) for v in result.categories["block"].metrics.values() if v is not None)
    assert len({scores for _, scores in first.values()}) == 3
    _, scores = evaluate("iaf_s", "one", seed=1)
    assert scores != first["iaf_s"][1]
