"""The dataset that is used when none is named: a small synthetic one, generated once into the store."""

from __future__ import annotations

from pathlib import Path

from mmad_cli.stages.executor import resolve_workers
from mmad_cli.stages.session import Session
from mmad_cli.store import Artefact, make_key


def default_dataset(session: Session) -> Path:
    """Folder of the default synthetic dataset, generated first where it is missing."""
    from mmad_cli.datasets.synthetic import SYNTH_VERSION, default_spec, generate

    spec = default_spec()
    key = make_key("synthetic", SYNTH_VERSION, spec=spec)
    folder = session.store.root / "datasets" / f"synthetic-{key[:12]}"
    session.reporter.notice(f"no DATA given: using the small synthetic dataset in {folder}")
    with session.store.lock(Artefact("datasets", "synthetic", key)):
        if not folder.is_dir():
            with session.reporter.task("rendering the synthetic dataset", 0) as advance:
                generate(folder, **spec, workers=resolve_workers(session.workers), progress=advance)
    return folder
