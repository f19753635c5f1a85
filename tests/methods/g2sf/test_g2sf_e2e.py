"""G2SF from scans to metrics, with pseudo anomalies through the store."""

import json

import numpy as np
import pytest

from mmad_cli.results.schema import RunResult
from mmad_cli.stages import api


@pytest.mark.slow
@pytest.mark.usefixtures("random_resnet18")
def test_from_scans_to_metrics_and_again_from_the_store(tiny_dataset, tmp_path, monkeypatch):
    settings = {"epochs": 2, "consistency_share": 0.05, "pseudo_per_sample": 1, "coreset_fraction": 0.02}

    def evaluate(name, **options):
        return api.evaluate(
            tiny_dataset, method="g2sf", variant="cnn+fpfh", categories=["block"], device="cpu", settings=settings,
            store=tmp_path / name, out=tmp_path / f"run-{name}", workers=1, **options,
        )  # fmt: skip

    first, folder = evaluate("one")
    assert first.categories["block"].status == "ok", first.categories["block"].error
    assert set(first.categories["block"].bank) == {"rgb", "points"}
    assert all(np.isfinite(v) for v in first.categories["block"].metrics.values() if v is not None)
    # another store, everything again: the same numbers
    second, _ = evaluate("two")
    assert second.categories["block"].metrics == first.categories["block"].metrics
    assert (tmp_path / "run-two/block/scores.csv").read_text() == (folder / "block/scores.csv").read_text()
    # the first store again: nothing is computed
    monkeypatch.setattr("mmad_cli.stages.features.Batch.compute", None)
    monkeypatch.setattr("mmad_cli.methods.g2sf.method.G2SF.fit", None)
    third, _ = evaluate("one")
    assert third.categories == first.categories
    assert json.loads((folder / "summary.json").read_text())["method"]["name"] == "g2sf"
    assert RunResult.from_disk(folder).not_comparable
