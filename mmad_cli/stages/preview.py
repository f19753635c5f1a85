"""A contact sheet of the pseudo anomalies that the extraction stage would make."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmad_cli.errors import DataError, UsageError, unknown_name
from mmad_cli.files import atomic_write
from mmad_cli.stages.clean import load_clean
from mmad_cli.stages.donors import donor_pool, pseudo_jobs
from mmad_cli.stages.features import FeatureJob, pseudo_sample
from mmad_cli.stages.plan import Selection, choose_categories, clean_jobs, select_samples
from mmad_cli.stages.request import preprocess_config
from mmad_cli.stages.session import Session


def pseudo_preview(
    session: Session,
    data: Path,
    output: Path,
    *,
    categories: tuple[str, ...] = (),
    count: int = 4,
    protocol: str = "m3dm",
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> int:
    """Write the sheet as PNG; returns its number of rows. settings: fields of `Augmentation`.

    Scans are cleaned through the store, as for any method. Raises UsageError for wrong settings, DataError where a
    category has no training scan.
    """
    from PIL import Image

    from mmad_cli.backbones.specs import FeatureSpec
    from mmad_cli.datasets import open_dataset
    from mmad_cli.pseudo.sheet import contact_sheet

    dataset = open_dataset(data)
    preprocessing = preprocess_config(protocol, {})
    # any feature will do: the scans under it are what is shown
    specs = {"z": FeatureSpec.depth().augmented(_augmentation(settings or {}, seed))}
    pairs = []
    for category in choose_categories(dataset, categories):
        samples = select_samples(session, dataset, category, Selection(categories))
        clean = clean_jobs(session, dataset, samples, preprocessing)
        jobs = pseudo_jobs(clean, specs["z"], {}, donor_pool(session, dataset, clean, preprocessing, specs))
        wanted = [job for job in jobs.values() if job.wanted][:count]
        if not wanted:
            raise DataError(f"category {category}: no training sample in train/good")
        pairs += [_pair(session, job) for job in wanted]
    buffer = io.BytesIO()
    Image.fromarray(contact_sheet(pairs)).save(buffer, format="PNG", optimize=True)
    atomic_write(output.absolute(), buffer.getvalue())
    return len(pairs)


def _pair(session: Session, job: FeatureJob) -> tuple[Any, Any]:
    notice = session.reporter.notice
    return load_clean(job.clean, notice), pseudo_sample(job, notice)


def _augmentation(settings: Mapping[str, Any], seed: int) -> Any:
    from pydantic import ValidationError

    from mmad_cli.pseudo.config import Augmentation

    fields = set(Augmentation.model_fields) - {"limit"}
    for name in settings:
        if name not in fields:
            raise unknown_name("field of a pseudo anomaly", name, fields, "--set")
    try:
        return Augmentation.model_validate({"seed": seed, **settings})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--set {'.'.join(map(str, first['loc']))}={first.get('input')!r}: {first['msg']}") from error
