"""Where a result comes from: what a run record says of itself, of this machine, and of its comparability."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mmad_cli._version import __version__
from mmad_cli.results.schema import (
    CategoryCounts,
    DatasetInfo,
    Environment,
    MethodInfo,
    Preprocessing,
    RunResult,
    WeightsInfo,
)
from mmad_cli.stages.plan import CategorySamples
from mmad_cli.stages.request import Prepared
from mmad_cli.stages.session import Session
from mmad_cli.store import library_version
from mmad_cli.store.keys import canonical_json, digest_bytes


def start_run(prepared: Prepared, samples: Mapping[str, CategorySamples]) -> RunResult:
    """A run record before its first category: identity, method, data, weights, machine, comparability."""
    request, run = prepared.request, prepared.run
    digest = digest_bytes(canonical_json({name: s.digest for name, s in sorted(samples.items())}).encode())
    preprocessing = prepared.preprocessing.model_dump(mode="json")
    identity = {
        "config": run.config_hash,
        "recipe": request.recipe,
        "weights": run.weights,
        "dataset": digest,
        "preprocessing": preprocessing,
        "selection": [request.selection.shots, request.selection.limit, request.selection.seed],
        "categories": prepared.categories,
        "full_resolution": request.full_resolution,
        # other runs keep the name that they have
        **({"score_validation": True} if request.score_validation else {}),
        **({} if request.selection.shot_choice == "random" else {"shot_choice": request.selection.shot_choice}),
    }
    suffix = digest_bytes(canonical_json(identity).encode())[:8]
    result = RunResult(
        run_id=f"{run.definition.name}-{run.config.variant}-{prepared.dataset.name}-{suffix}",
        argv=list(request.argv),
        method=MethodInfo(
            name=run.definition.name,
            label=run.definition.label if run.definition.qualifier else "",
            variant=run.config.variant,
            recipe=request.recipe,
            config=run.config_dump,
            config_hash=run.config_hash,
            method_version=str(run.definition.version),
        ),
        dataset=DatasetInfo(
            name=prepared.dataset.name,
            digest=digest,
            categories={name: CategoryCounts(**s.counts) for name, s in samples.items()},
        ),
        preprocessing=Preprocessing(
            protocol=prepared.preprocessing.protocol,
            parameters=preprocessing,
            key=digest_bytes(canonical_json(preprocessing).encode()),
        ),
        weights=[
            WeightsInfo(name=r.name, sha256=r.sha256, source=r.source, stand_in=not r.official)
            for r in prepared.records
        ],
        environment=environment(),
        seed=request.selection.seed,
        shots=request.selection.shots,
        shot_choice=request.selection.shot_choice,
        limit=request.selection.limit,
        full_resolution=request.full_resolution,
    )
    for reason in not_comparable_reasons(prepared, samples):
        result.mark_not_comparable(reason)
    return result


def not_comparable_reasons(prepared: Prepared, samples: Mapping[str, CategorySamples]) -> list[str]:
    """Why the numbers of a run must not be put beside published ones."""
    from mmad_cli.datasets import published_train_counts
    from mmad_cli.methods import build_config

    request, run = prepared.request, prepared.run
    reasons = []
    if request.selection.limit is not None:
        reasons.append(f"limit: at most {request.selection.limit} samples per split and defect")
    if request.selection.shots is not None:
        which = "" if request.selection.shot_choice == "random" else f", the {request.selection.shot_choice} ones"
        reasons.append(f"shots: {request.selection.shots} training samples per category{which}")
    left_out = [name for name in prepared.dataset.categories() if name not in prepared.categories]
    if left_out:
        reasons.append(f"missing categories: {', '.join(left_out)} not evaluated")
    published = published_train_counts(prepared.dataset.name)
    absent = [name for name in published if name not in prepared.dataset.categories()]
    if absent:
        reasons.append(f"missing categories: {', '.join(absent)} not in the dataset folder")
    for name, chosen in samples.items():
        if name in published and chosen.counts["train"] != published[name]:
            reasons.append(
                f"incomplete category: {name} has {chosen.counts['train']} training samples, "
                f"the published dataset {published[name]}"
            )
    reasons += [
        f"stand-in weights: {record.name} is not the published file"
        for record in prepared.records
        if not record.official
    ]
    default = build_config(run.definition, run.config.variant, request.recipe, {}).model_dump(mode="json")
    changed = [name for name, value in run.config_dump.items() if value != default[name]]
    if changed:
        reasons.append(f"settings: {', '.join(changed)} differ from the recipe")
    if prepared.preprocessing.protocol not in (run.definition.protocol, *run.definition.other_protocols):
        reasons.append(f"protocol: {prepared.preprocessing.protocol} instead of the method's {run.definition.protocol}")
    # both debris algorithms keep the same points
    by_hand = [name for name in request.preprocessing if name not in ("protocol", "debris")]
    if by_hand:
        reasons.append(f"preprocessing: {', '.join(by_hand)} set by hand")
    reasons += prepared.dataset.departures()
    if request.checkpoints is not None:
        reasons.append("checkpoints: fitted states were imported, what they were fitted on is not known here")
    if request.full_resolution:
        reasons.append("full resolution: published metrics are at 224 x 224")
    if request.recipe != "official":
        reasons.append(f"recipe: {request.recipe} departs from the published code")
    return reasons


def environment() -> Environment:
    """Versions without importing anything heavy; the device is filled in by what computes."""
    return Environment(
        mmad=__version__,
        git=_git_revision(),
        python=platform.python_version(),
        platform=platform.platform(),
        device="cpu",
        torch=library_version("torch"),
        timm=library_version("timm"),
        faiss=library_version("faiss"),
        open3d=library_version("open3d"),
        numpy=library_version("numpy"),
        **{"scikit-learn": library_version("scikit-learn")},
    )


def _git_revision() -> str | None:
    """Commit of a source checkout of mmad; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def device_name(session: Session) -> str:
    """The device that computes, with the name of the GPU."""
    if session.resolve_device() == "cpu":
        return "cpu"
    import torch

    return f"cuda ({torch.cuda.get_device_name()})"


def peak_vram() -> int | None:
    """Largest GPU memory taken so far, in bytes; None without torch or without a GPU."""
    if "torch" not in sys.modules:
        return None
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None
