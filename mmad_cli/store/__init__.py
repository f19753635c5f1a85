"""Artefacts on disk: keys, atomic writes, locks, verification."""

from mmad_cli.store.keys import library_version, library_versions, make_key
from mmad_cli.store.objects import ObjectStore, open_store
from mmad_cli.store.raw import RawIndex, check_unchanged
from mmad_cli.store.store import Artefact, CorruptArtefactError, Problem, Store, Usage, default_root
from mmad_cli.store.timings import Timings

__all__ = [
    "Artefact",
    "CorruptArtefactError",
    "ObjectStore",
    "Problem",
    "RawIndex",
    "Store",
    "Timings",
    "Usage",
    "check_unchanged",
    "default_root",
    "library_version",
    "library_versions",
    "make_key",
    "open_store",
]
