"""Time estimates: what is learned from work, what a plan makes of it, and that neither can cost a run anything."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from mmad_cli.backbones.specs import FeatureSpec
from mmad_cli.cli.evaluate import _duration, _total_time
from mmad_cli.preprocessing.config import PreprocessConfig
from mmad_cli.stages import api, timing
from mmad_cli.stages.pipeline import PlanLine, plan
from mmad_cli.stages.plan import Selection
from mmad_cli.stages.request import EvaluateRequest
from mmad_cli.stages.session import Session
from mmad_cli.store import Store, Timings
from mmad_cli.store import timings as stored


def evaluate(data: Path, tmp_path: Path, **options: Any) -> None:
    options = {"method": "btf", "variant": "raw", "device": "cpu", "out": tmp_path / "run", **options}
    api.evaluate(data, store=tmp_path / "store", **options)


def planned(data: Path, tmp_path: Path, **options: Any) -> list[PlanLine]:
    with Session(store=Store(tmp_path / "store"), device="cpu", workers=1) as session:
        return plan(session, EvaluateRequest(**{"data": data, "method": "btf", "variant": "raw", **options}))


def learn(root: Path, *work: tuple[str, float, float], machine: str | None = None) -> None:
    timings = Timings(root, machine)
    for name, items, seconds in work:
        timings.record(name, items, seconds)
    timings.save()


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)


def test_earlier_work_counts_by_its_items_and_fades(tmp_path: Path) -> None:
    learn(tmp_path, ("a", 10, 20.0))
    timings = Timings(tmp_path)
    assert timings.known() == {"a": 2.0}
    learn(tmp_path, ("a", 30, 20.0), ("b", 2, 1.0))
    assert timings.known() == pytest.approx({"a": 1.0, "b": 0.5})
    # 10 000 slow items are worth 200 of the new speed, not 10 000
    learn(tmp_path, ("c", 10_000, 10_000.0), ("c", 200, 2_000.0))
    assert timings.known()["c"] == pytest.approx(5.5)


def test_what_another_process_learned_meanwhile_stays(tmp_path: Path) -> None:
    first, second = Timings(tmp_path), Timings(tmp_path)
    first.record("a", 2, 1.0)
    second.record("b", 2, 1.0)
    first.save()
    second.save()
    assert set(first.known()) == {"a", "b"}


def test_another_machine_is_not_this_one(tmp_path: Path) -> None:
    learn(tmp_path, ("a", 2, 100.0), machine="slow")
    learn(tmp_path, ("a", 2, 1.0), machine="fast")
    assert Timings(tmp_path, "slow").known() == {"a": 50.0}
    assert Timings(tmp_path, "fast").known() == {"a": 0.5}
    assert Timings(tmp_path).known() == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("0.5", "0.6"),
        lambda _: "",
        lambda _: "[]",
        lambda _: '{"digest": "x", "machines": []}',
        lambda _: '{"digest": "x", "machines": {"m": {"a": [NaN, 1]}}}',
        lambda _: "\x00\xff",
    ],
)
def test_a_damaged_file_is_not_trusted_and_is_replaced(tmp_path: Path, damage: Any) -> None:
    timings = Timings(tmp_path)
    learn(tmp_path, ("a", 2, 1.0))
    file = tmp_path / stored.TIMINGS
    file.write_text(damage(file.read_text()))
    assert timings.known() == {}
    learn(tmp_path, ("b", 2, 1.0))
    assert timings.known() == {"b": 0.5}


@pytest.mark.parametrize("values", [(0, 1.0), (2, 0.0), (2, -1.0), (2, float("nan")), (float("inf"), 1.0)])
def test_what_is_no_measurement_is_not_recorded(tmp_path: Path, values: tuple[float, float]) -> None:
    learn(tmp_path, ("a", *values))
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn(tmp_path / "absent", ("a", 2, 1.0))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read only")

    monkeypatch.setattr(Path, "replace", refuse)
    learn(tmp_path, ("a", 2, 1.0))
    assert list(tmp_path.iterdir()) == []


def test_recording_takes_less_than_a_millisecond(tmp_path: Path) -> None:
    timings = Timings(tmp_path)
    best = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        timings.record("work 0", 2, 1.0)
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3
    timings.save()
    assert timings.known() == {"work 0": 0.5}


def test_long_work_is_saved_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(stored.time, "monotonic", lambda: now)
    timings = Timings(tmp_path)
    timings.record("a", 2, 1.0)
    assert timings.known() == {}
    now = 60.0
    timings.record("b", 2, 1.0)
    assert set(timings.known()) == {"a", "b"}


def test_the_stopwatch_leaves_the_first_items_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watch = timing.Stopwatch()
    for done, now in ((1, 110.0), (2, 111.0), (3, 112.0)):
        clock.now = now
        watch.lap(done)
    assert watch.measured() == (2, 2.0)


def test_the_stopwatch_leaves_out_what_all_workers_start_with(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watch = timing.Stopwatch(at_once=2)
    for done, now in ((1, 110.0), (2, 110.0), (3, 111.0), (4, 111.0)):
        clock.now = now
        watch.lap(done)
    # two workers, a second per item: two items a second
    assert watch.measured() == (2, 1.0)


def test_work_that_is_done_at_once_counts_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watch = timing.Stopwatch()
    assert watch.measured() is None
    clock.now = 108.0
    watch.lap(1)
    assert watch.measured() is None
    watch = timing.Stopwatch()
    clock.now = 116.0
    watch.lap(4)
    assert watch.measured() == (4, 8.0)


def test_names_say_what_changes_the_time() -> None:
    assert timing.preprocess_name(PreprocessConfig(), 1) == "preprocess m3dm"
    assert timing.preprocess_name(PreprocessConfig(protocol="cfm"), 4) == "preprocess cfm, 4 workers"
    assert timing.preprocess_name(PreprocessConfig(debris="dbscan"), 1) == "preprocess m3dm debris=dbscan"
    assert timing.extract_name(FeatureSpec.fpfh(), "cpu", 2) == "extract fpfh cpu, 2 workers"
    assert timing.extract_name(FeatureSpec.fpfh(size=112), "cpu", 1) == "extract fpfh size=112 cpu"
    named = timing.extract_name(FeatureSpec.timm("resnet18.tv_in1k"), "cuda", 1)
    assert named == "extract timm:resnet18.tv_in1k cuda"


def test_estimates_scale_with_items_and_workers() -> None:
    known = {"preprocess m3dm": 4.0, "preprocess m3dm, 8 workers": 1.0, "extract fpfh cpu, 4 workers": 1.0}
    assert timing.seconds_for(known, "preprocess m3dm", 10) == 40.0
    assert timing.seconds_for(known, "preprocess m3dm, 8 workers", 10, workers=8) == 10.0
    # the nearest count that was measured: 8 workers, so 12 take two thirds of the time
    assert timing.seconds_for(known, "preprocess m3dm, 12 workers", 9, workers=12) == 6.0
    assert timing.seconds_for(known, "preprocess m3dm, 2 workers", 10, workers=2) == 20.0
    assert timing.seconds_for(known, "extract fpfh cpu", 10) == 40.0
    assert timing.seconds_for(known, "extract depth cpu", 10) is None
    assert timing.seconds_for(known, "extract depth cpu", 0) == 0.0


def test_a_plan_knows_no_times_before_any_work_and_writes_nothing(tiny_dataset: Path, tmp_path: Path) -> None:
    lines = planned(tiny_dataset, tmp_path)
    assert all(line.missing and line.seconds is None for line in lines)
    assert not (tmp_path / "store" / stored.TIMINGS).exists()


def test_work_teaches_the_plan(tiny_dataset: Path, tmp_path: Path) -> None:
    evaluate(tiny_dataset, tmp_path, categories=["block"], workers=1)
    known = Timings(tmp_path / "store").known()
    fitted = "btf raw cpu, 4 to 7 training samples"
    assert set(known) == {"preprocess m3dm", "extract depth cpu", f"fit {fitted}", f"predict {fitted}", "evaluate"}
    by_place = {(line.category, line.stage): line for line in planned(tiny_dataset, tmp_path)}
    assert len(by_place) == 10
    for (category, _), line in by_place.items():
        assert (line.seconds == 0.0) == (category == "block") == (line.missing == 0)
    assert by_place["cube", "fit"].seconds == pytest.approx(4 * known[f"fit {fitted}"])
    assert by_place["cube", "predict"].seconds == pytest.approx(4 * known[f"predict {fitted}"])
    assert by_place["cube", "evaluate"].seconds == pytest.approx(4 * known["evaluate"])
    assert by_place["cube", "extract z"].seconds == pytest.approx(8 * known["extract depth cpu"])
    cleaned = by_place["cube", "preprocess"]
    assert cleaned.seconds == pytest.approx(cleaned.disk_bytes / 1e6 * known["preprocess m3dm"])


def test_other_work_stays_unknown(tiny_dataset: Path, tmp_path: Path) -> None:
    evaluate(tiny_dataset, tmp_path, categories=["block"], workers=1)
    # fewer training samples make another bank, another variant another feature
    few = {line.stage: line for line in planned(tiny_dataset, tmp_path, selection=Selection(("cube",), shots=2))}
    assert few["fit"].seconds is None
    assert few["predict"].seconds is None
    assert few["extract z"].seconds is not None
    other = {line.stage: line for line in planned(tiny_dataset, tmp_path, variant="fpfh")}
    assert other["extract fpfh"].seconds is None
    assert other["evaluate"].seconds is not None


def test_a_single_item_teaches_nothing(tiny_dataset: Path, tmp_path: Path) -> None:
    with Session(store=Store(tmp_path / "store"), device="cpu", workers=1) as session:
        watch = timing.Stopwatch()
        watch.lap(1)
        watch.record(session, "work")
    assert Timings(tmp_path / "store").known() == {}


def test_a_failing_scan_teaches_nothing_about_cleaning(tiny_dataset: Path, tmp_path: Path) -> None:
    (tiny_dataset / "block" / "train" / "good" / "xyz" / "001.tiff").write_bytes(b"broken")
    evaluate(tiny_dataset, tmp_path, categories=["block"], workers=1)
    assert Timings(tmp_path / "store").known() == {}


def test_timings_are_no_artefact(tiny_dataset: Path, tmp_path: Path) -> None:
    evaluate(tiny_dataset, tmp_path, categories=["block"], workers=1)
    store = Store(tmp_path / "store")
    file = store.root / stored.TIMINGS
    before = store.usage()
    assert stored.TIMINGS not in {part for usage in before for part in (usage.stage, usage.category)}
    file.write_text("damaged")
    assert store.verify() == []
    removed, _ = store.prune()
    assert file not in removed
    assert file.read_text() == "damaged"
    assert store.usage() == before
    # and a run does not mind
    evaluate(tiny_dataset, tmp_path, categories=["cube"], workers=1)
    assert Timings(store.root).known()


def test_the_commands_table_and_json(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmad_cli.cli.app import run

    monkeypatch.setenv("COLUMNS", "200")
    command = ["evaluate", str(tiny_dataset), "--method", "btf", "--variant", "raw", "--dry-run", "--device", "cpu"]
    command += ["--store", str(tmp_path / "store"), "--workers", "1"]
    outputs = []
    for arguments in (command, [*command, "--json"]):
        assert run(arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].splitlines()[-1] == "time: ? = nothing like it has been measured on this machine yet"
    assert {line["seconds"] for line in json.loads(outputs[1])} == {None}
    evaluate(tiny_dataset, tmp_path, categories=["block"], workers=1)
    capsys.readouterr()
    outputs = []
    for arguments in (command, [*command, "--json"]):
        assert run(arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert "?" not in outputs[0]
    assert outputs[0].splitlines()[-1].startswith("time: about ")
    seconds = [line["seconds"] for line in json.loads(outputs[1])]
    assert seconds[:5] == [0.0] * 5
    assert all(value > 0 for value in seconds[5:])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, ""),
        (0.2, "< 1 s"),
        (42.4, "42 s"),
        (99.4, "99 s"),
        (99.5, "2 min"),
        (5900, "98 min"),
        (6000, "1.7 h"),
        (360_000, "100.0 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


def test_total_time() -> None:
    assert _total_time([60.0, 60.0]) == "time: about 2 min"
    assert _total_time([0.0, 0.0]) == "time: about 0 s"
    assert _total_time([60.0, None]).startswith("time: at least 60 s; ? = ")
    assert _total_time([0.0, None]).startswith("time: ? = ")
