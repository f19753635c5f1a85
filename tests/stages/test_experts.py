"""Experts that configurations of a method share: fitted once, their looks kept, and everything as without a store."""

import json

import numpy as np
import pytest

from mmad_cli.methods import get_method
from mmad_cli.methods.base import HasExperts, LookedAt
from mmad_cli.methods.experts import Panel
from mmad_cli.stages import api
from mmad_cli.stages.experts import LOOK, STAGE
from mmad_cli.store import Store

# FPFH alone: no weights
SETTINGS = {"experts": ["fpfh"], "coreset_fraction": 0.02, "pseudo_per_sample": 1, "epochs": 1}


def evaluate(data, folder, variant, **options):
    settings = {**SETTINGS, **options.pop("settings", {})}
    return api.evaluate(
        data, method="iaenet", variant=variant, categories=["block"], device="cpu", settings=settings,
        store=folder / "store", out=folder / "runs" / variant, workers=1, **options,
    )  # fmt: skip


def stored(folder, stage):
    return sorted(path for path in (folder / "store").rglob("*") if f"/{stage}/" in path.as_posix() and path.is_file())


@pytest.fixture
def counted(monkeypatch):
    """How often experts were fitted and asked."""
    counts = {"fit": 0, "look": 0}

    def counting(name):
        inner = getattr(Panel, name)

        def call(self, *args, **options):
            counts[name] += 1
            return inner(self, *args, **options)

        return call

    for name in counts:
        monkeypatch.setattr(Panel, name, counting(name))
    return counts


def test_fusions_share_experts_and_looks(tiny_dataset, tmp_path, counted):
    first, folder = evaluate(tiny_dataset, tmp_path, "iaf_s")
    result = first.categories["block"]
    assert result.status == "ok", result.error
    assert counted["fit"] == 1
    looks = counted["look"]
    assert looks > 0
    assert first.method.label == "iaenet (re-design after the abstract)"
    assert json.loads((folder / "summary.json").read_text())["method"]["label"] == first.method.label
    assert set(result.training) >= {"fusion/total", "fusion/kept_epoch"}
    # another fusion: no bank is selected and no scan looked at again
    second, _ = evaluate(tiny_dataset, tmp_path, "mean")
    assert second.categories["block"].status == "ok"
    assert counted == {"fit": 1, "look": looks}
    # an expert alone reads the same looks
    alone, _ = evaluate(tiny_dataset, tmp_path, "fpfh", settings={"single_score": "max"})
    assert counted == {"fit": 1, "look": looks}
    assert alone.categories["block"].bank == second.categories["block"].bank
    # one expert only, so its mean orders scans as it does itself
    assert alone.categories["block"].metrics["i_auroc"] == second.categories["block"].metrics["i_auroc"]
    # another seed has experts of its own
    evaluate(tiny_dataset, tmp_path, "mean", seed=1)
    assert counted["fit"] == 2


def test_the_fusion_is_the_same_without_the_stage(tiny_dataset, tmp_path):
    """What the store keeps apart, a method on its own does in one go."""
    from mmad_cli.stages.evaluate import EvaluateRequest, prepare, select_samples
    from mmad_cli.stages.plan import Selection, plan_category
    from mmad_cli.stages.predict import predictions, stored_features
    from mmad_cli.stages.session import Session

    with Session(store=Store(tmp_path / "store"), workers=1, device="cpu") as session:
        request = EvaluateRequest(
            data=tiny_dataset, method="iaenet", settings=SETTINGS, selection=Selection(("block",))
        )
        prepared = prepare(session, request)
        samples = select_samples(session, prepared.dataset, "block", request.selection)
        plan = plan_category(session, prepared.dataset, samples, prepared.preprocessing, prepared.run)
        with_stage = predictions(session, plan, prepared.run, None)
        method = prepared.run.build("cpu")
        assert isinstance(method, HasExperts)
        sets = [stored_features(session, plan, refs, method) for refs in (plan.samples.train, plan.samples.validation)]
        assert isinstance(sets[0][0], LookedAt)
        bare = [Plain(one) for one in sets]
        method.fit(*bare, seed=0)
        alone = [method.predict(Bare(one)) for one in stored_features(session, plan, plan.samples.test, method)]
    for one, other in zip(with_stage, alone, strict=True):
        assert one.image_score == other.image_score
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)


class Bare:
    """A sample without looks."""

    def __init__(self, sample):
        self.id, self.sample = sample.id, sample

    def __getitem__(self, name):
        return self.sample[name]


class Plain:
    """A set of samples without looks."""

    def __init__(self, samples):
        self.samples = [Bare(sample) for sample in samples]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    def __iter__(self):
        return iter(self.samples)


def test_damaged_parts_are_made_again_and_force_makes_all(tiny_dataset, tmp_path, counted):
    first, _ = evaluate(tiny_dataset, tmp_path, "mean")
    banks = [path for path in stored(tmp_path, STAGE) if path.suffix == ".safetensors"]
    looks = stored(tmp_path, LOOK)
    assert len(banks) == 1
    assert looks
    for path in (*banks, *looks):
        path.write_bytes(path.read_bytes()[:-8] + b"damaged!")
    counted.update(fit=0, look=0)
    second, _ = evaluate(tiny_dataset, tmp_path, "max")
    assert counted["fit"] == 1
    assert counted["look"] == len(looks)
    assert second.categories["block"].status == "ok"
    counted.update(fit=0, look=0)
    again, _ = evaluate(tiny_dataset, tmp_path, "mean", force=True)
    assert counted["fit"] == 1
    assert again.categories["block"].metrics == first.categories["block"].metrics


def test_an_exported_state_is_whole(tiny_dataset, tmp_path, counted):
    first, _ = evaluate(tiny_dataset, tmp_path, "iaf_s")
    options = {"method": "iaenet", "categories": ["block"], "settings": SETTINGS, "device": "cpu", "workers": 1}
    api.fit(tiny_dataset, store=tmp_path / "store", export=tmp_path / "export", **options)
    names = {path.name for path in (tmp_path / "export" / "block").iterdir()}
    assert names >= {"bank_fpfh.safetensors", "fusion.safetensors", "fusion.json", "state.json"}
    counted.update(fit=0, look=0)
    second, _ = api.evaluate(
        tiny_dataset, store=tmp_path / "other", out=tmp_path / "again", checkpoints=tmp_path / "export", **options
    )
    assert counted["fit"] == 0
    assert second.categories["block"].metrics == first.categories["block"].metrics


def test_the_plan_names_the_stage_and_pruning_keeps_it(tiny_dataset, tmp_path, counted):
    from mmad_cli.stages.evaluate import EvaluateRequest
    from mmad_cli.stages.pipeline import plan
    from mmad_cli.stages.plan import Selection
    from mmad_cli.stages.session import Session

    def lines():
        with Session(store=Store(tmp_path / "store"), workers=1, device="cpu") as session:
            request = EvaluateRequest(
                data=tiny_dataset, method="iaenet", variant="mean", settings=SETTINGS, selection=Selection(("block",))
            )
            return {line.stage: line.missing for line in plan(session, request)}

    assert lines()[STAGE] == 1
    evaluate(tiny_dataset, tmp_path, "mean")
    assert lines()[STAGE] == 0
    before = (stored(tmp_path, STAGE), stored(tmp_path, LOOK))
    Store(tmp_path / "store").prune()

    assert (stored(tmp_path, STAGE), stored(tmp_path, LOOK)) == before
    assert get_method("iaenet").label.startswith("iaenet (")


def test_validation_scores_give_an_operating_point(tiny_dataset, tmp_path):
    """IAENet reads validation samples anyway; FPFH alone does so when asked."""
    metrics = evaluate(tiny_dataset, tmp_path, "mean")[0].categories["block"].metrics
    assert 0 <= metrics["i_fpr_val"] <= 1
    assert 0 <= metrics["i_tpr_val"] <= 1
    plain = evaluate(tiny_dataset, tmp_path, "fpfh")[0]
    assert "i_fpr_val" not in plain.categories["block"].metrics
    scored = evaluate(tiny_dataset, tmp_path, "fpfh", score_validation=True)[0]
    assert scored.run_id != plain.run_id
    assert scored.categories["block"].metrics["i_fpr_val"] is not None
    assert scored.categories["block"].metrics["i_auroc"] == plain.categories["block"].metrics["i_auroc"]
