"""Learning across categories: once per dataset, cached, resumed, over categories that were not asked for too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from mmad_cli.methods.btf import BTF, DEFINITION
from mmad_cli.results.schema import RunResult
from mmad_cli.stages import api
from mmad_cli.stages.grid import CategoryTask, SharedTask
from mmad_cli.stages.pipeline import fit
from mmad_cli.stages.request import EvaluateRequest
from mmad_cli.stages.session import Session
from mmad_cli.store import Store


class Sharing(BTF):
    """BTF with an offset on its image scores, learned over all categories."""

    calls: ClassVar[list[list[str]]] = []
    interrupt_at = 0

    def needs_shared(self) -> bool:
        return True

    def fit_shared(self, train: Mapping[str, Any], *, seed: int, folder: Path, progress: Any = None) -> None:
        type(self).calls.append(sorted(train))
        mark = folder / "step"
        if self.interrupt_at and not mark.exists():
            mark.write_text("1")
            raise KeyboardInterrupt
        self.offset = float(sum(np.abs(s["z"]["z"]).mean() for samples in train.values() for s in samples)) + seed

    def save_shared(self, folder: Path) -> None:
        (folder / "offset").write_text(repr(self.offset))

    def load_shared(self, folder: Path) -> None:
        self.offset = float((folder / "offset").read_text())

    def predict(self, sample: Any) -> Any:
        plain = super().predict(sample)
        return replace(plain, image_score=plain.image_score + self.offset)


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> type[Sharing]:
    definition = replace(DEFINITION, name="sharing", build=lambda config, device: Sharing(config, device))
    monkeypatch.setattr("mmad_cli.methods.get_method", lambda name: definition)
    monkeypatch.setattr(Sharing, "calls", [])
    monkeypatch.setattr(Sharing, "interrupt_at", 0)
    return Sharing


def evaluate(data: Path, tmp_path: Path, **options: Any) -> RunResult:
    options = {"variant": "raw", "device": "cpu", "out": tmp_path / "run", **options}
    return api.evaluate(data, method="sharing", store=tmp_path / "store", **options)[0]


def scores(folder: Path) -> list[str]:
    return sorted(path.read_text() for path in folder.rglob("scores.csv"))


def test_it_runs_once_and_over_all_categories(tiny_dataset: Path, tmp_path: Path, sharing: type[Sharing]) -> None:
    result = evaluate(tiny_dataset, tmp_path, categories=["cube"])
    assert result.categories["cube"].status == "ok"
    assert "fit-shared" in result.categories["cube"].seconds
    assert sharing.calls == [["block", "cube"]]
    evaluate(tiny_dataset, tmp_path, out=tmp_path / "both")
    assert len(sharing.calls) == 1
    assert scores(tmp_path / "run")[0] in scores(tmp_path / "both")
    evaluate(tiny_dataset, tmp_path, seed=1, out=tmp_path / "seed")
    assert len(sharing.calls) == 2
    assert scores(tmp_path / "seed") != scores(tmp_path / "both")
    evaluate(tiny_dataset, tmp_path, out=tmp_path / "both", force=True)
    assert len(sharing.calls) == 3


@pytest.mark.parametrize("dask", [None, "tcp://inside"])
def test_fitting_trains_first(
    tiny_dataset: Path, tmp_path: Path, sharing: type[Sharing], inside: Any, dask: str | None
) -> None:
    inside(lambda *_: False)
    with Session(Store(tmp_path / "store"), None, "cpu", dask=dask) as session:
        found = fit(session, EvaluateRequest(tiny_dataset, "sharing", "raw"))
    assert [(one.category, one.error) for one in found] == [("block", None), ("cube", None)]
    assert sharing.calls == [["block", "cube"]]
    assert evaluate(tiny_dataset, tmp_path).categories["cube"].status == "ok"
    assert len(sharing.calls) == 1


def test_on_a_cluster_a_training_that_kills_workers_is_said_in_every_category(
    tiny_dataset: Path, tmp_path: Path, sharing: type[Sharing], inside: Any
) -> None:
    used = inside(lambda _, job: isinstance(job, SharedTask))
    with Session(Store(tmp_path / "store"), None, "cpu", dask="tcp://inside") as session:
        found = fit(session, EvaluateRequest(tiny_dataset, "sharing", "raw"))
    assert all("training over all categories: every worker" in str(one.error) for one in found)
    assert not any(isinstance(job, CategoryTask) for job in used.tried)


def test_an_interrupted_training_goes_on(tiny_dataset: Path, tmp_path: Path, sharing: type[Sharing]) -> None:
    sharing.interrupt_at = 1
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_dataset, tmp_path)
    assert list((tmp_path / "store" / "work").rglob("step"))
    evaluate(tiny_dataset, tmp_path)
    assert not list((tmp_path / "store" / "work").rglob("step"))
    assert len(sharing.calls) == 2


def test_damage_is_trained_again(tiny_dataset: Path, tmp_path: Path, sharing: type[Sharing]) -> None:
    evaluate(tiny_dataset, tmp_path)
    before = scores(tmp_path / "run")
    (stored,) = (tmp_path / "store" / "fit-shared").rglob("offset")
    stored.write_text("0.0")
    assert Store(tmp_path / "store").verify()
    for stage in ("fit", "predict", "evaluate"):
        for path in sorted((tmp_path / "store" / stage).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    evaluate(tiny_dataset, tmp_path)
    assert len(sharing.calls) == 2
    assert scores(tmp_path / "run") == before


def test_a_broken_category_takes_no_part(tiny_dataset: Path, tmp_path: Path, sharing: type[Sharing]) -> None:
    next((tiny_dataset / "block" / "train" / "good" / "rgb").glob("*.png")).unlink()
    result = evaluate(tiny_dataset, tmp_path)
    assert result.categories["block"].status == "failed"
    assert result.categories["cube"].status == "ok"
    assert sharing.calls == [["cube"]]


def test_weights_that_the_method_reads_itself_enter_the_key(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    digest = {"value": "a" * 64}

    class Weighted(BTF):
        def weights_names(self) -> list[str]:
            return ["fusion"]

    definition = replace(DEFINITION, name="weighted", build=lambda config, device: Weighted(config, device))
    monkeypatch.setattr("mmad_cli.methods.get_method", lambda name: definition)
    monkeypatch.setattr(
        "mmad_cli.backbones.weights.resolve",
        lambda name: SimpleNamespace(name=name, sha256=digest["value"], source="here", official=False),
    )
    options = {"method": "weighted", "variant": "raw", "device": "cpu", "store": tmp_path / "store"}
    first, _ = api.evaluate(tiny_dataset, out=tmp_path / "a", categories=["block"], **options)
    assert [w.name for w in first.weights] == ["fusion"]
    assert any("fusion is not the published file" in reason for reason in first.not_comparable)
    fits = {p.name for p in (tmp_path / "store" / "fit" / "block").iterdir()}
    digest["value"] = "b" * 64
    second, _ = api.evaluate(tiny_dataset, out=tmp_path / "b", categories=["block"], **options)
    assert second.run_id != first.run_id
    assert len({p.name for p in (tmp_path / "store" / "fit" / "block").iterdir()} - fits) == 1
