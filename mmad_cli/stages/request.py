"""What was asked for, and everything looked up before anything is computed: bad input is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmad_cli.errors import UsageError, unknown_name
from mmad_cli.stages.plan import MethodRun, Selection, choose_categories
from mmad_cli.stages.session import Session

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import FeatureSpec
    from mmad_cli.backbones.weights import WeightsRecord
    from mmad_cli.datasets.base import Dataset
    from mmad_cli.methods.base import Method, MethodConfig, MethodDefinition
    from mmad_cli.preprocessing.config import PreprocessConfig

BACKBONES = ("paper", "builtin")


@dataclass(frozen=True)
class EvaluateRequest:
    """What `mmad evaluate` was asked for."""

    data: Path
    method: str
    variant: str | None = None
    recipe: str = "official"
    backbones: str = "paper"
    settings: Mapping[str, Any] = field(default_factory=dict)
    protocol: str | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    selection: Selection = field(default_factory=Selection)
    save_maps: bool = False
    full_resolution: bool = False
    score_validation: bool = False
    force: bool = False
    out: Path | None = None
    checkpoints: Path | None = None
    export: Path | None = None
    argv: Sequence[str] = ()


@dataclass(frozen=True)
class Prepared:
    """A request with everything looked up: nothing is computed yet, and bad input has been refused."""

    request: EvaluateRequest
    dataset: Dataset
    categories: list[str]
    run: MethodRun
    records: list[WeightsRecord]
    preprocessing: PreprocessConfig


class Configured(NamedTuple):
    """The method of a request with its configuration and preprocessing; needs no dataset."""

    definition: MethodDefinition
    config: MethodConfig
    method: Method
    preprocessing: PreprocessConfig


def configure(request: EvaluateRequest) -> Configured:
    """Check method, variant, recipe, fields and protocol. Raises UsageError."""
    from mmad_cli.methods import build, build_config, get_method

    definition = get_method(request.method)
    settings = {**backbone_settings(definition, request.backbones), **request.settings}
    config = build_config(definition, request.variant, request.recipe, settings)
    method = build(definition, config)
    if request.full_resolution and method.view != "resize":
        raise UsageError(
            f"--full-resolution: {definition.name} scores a crop of the image here; "
            "add --set view=resize or leave --full-resolution out"
        )
    preprocessing = preprocess_config(request.protocol or definition.protocol, request.preprocessing)
    return Configured(definition, config, method, preprocessing)


def check_without_data(request: EvaluateRequest) -> None:
    """Refuse all bad input that can be told without the dataset, weights included, while nothing is rendered yet."""
    method = configure(request).method
    _weights(method.features(), _own_weights(method))


def prepare(session: Session, request: EvaluateRequest) -> Prepared:
    """Check method, variant, fields, weights, dataset and categories. Raises errors with exit code 2."""
    from mmad_cli.datasets import open_dataset
    from mmad_cli.datasets.base import require_modalities
    from mmad_cli.methods.base import ReadsValidation

    definition, config, method, preprocessing = configure(request)
    dataset = open_dataset(request.data)
    categories = choose_categories(dataset, request.selection.categories)
    specs = method.features()
    if request.backbones == "builtin":
        require_builtin(f"{definition.name} {config.variant}", specs)
    require_modalities(dataset, (spec.input for spec in specs.values()), f"{definition.name} {config.variant}")
    dataset = as_read_by(method, dataset)
    own_weights = _own_weights(method)
    records = _weights(specs, own_weights)
    run = MethodRun(
        definition,
        config,
        request.selection.seed,
        specs,
        {record.name: record.sha256 for record in records},
        own_weights,
        reads_validation=isinstance(method, ReadsValidation) and method.needs_validation,
        scores_validation=request.score_validation,
        checkpoints=_checkpoint_folder(request.checkpoints),
    )
    return Prepared(request, dataset, categories, run, records, preprocessing)


def _own_weights(method: Method) -> tuple[str, ...]:
    from mmad_cli.methods.base import OwnWeights

    return tuple(method.weights_names()) if isinstance(method, OwnWeights) else ()


def as_read_by(method: Method, dataset: Dataset) -> Dataset:
    """The dataset, with test samples that lack a modality where the method makes do without it."""
    from mmad_cli.datasets.base import TakesIncomplete
    from mmad_cli.methods.base import DropsModality

    if isinstance(method, DropsModality) and method.drops_missing and isinstance(dataset, TakesIncomplete):
        return dataset.with_incomplete()
    return dataset


def backbone_settings(definition: MethodDefinition, backbones: str) -> dict[str, Any]:
    """Fields of a method's configuration that `--backbones` sets: none for `paper`, the built-in ones for `builtin`.

    Raises UsageError for another word, and for a method that reads no network's features.
    """
    from mmad_cli.backbones.builtin import POINTS, RGB

    if backbones not in BACKBONES:
        raise unknown_name("choice of backbones", backbones, BACKBONES, "--backbones")
    if backbones == "paper":
        return {}
    fields = definition.config.model_fields
    networks = {name: value for name, value in (("rgb_backbone", RGB), ("point_backbone", POINTS)) if name in fields}
    if not networks:
        raise UsageError(f"--backbones builtin: {definition.name} has no backbone to choose; leave the option out")
    return {**networks, **definition.builtin}


def require_builtin(what: str, specs: Mapping[str, FeatureSpec]) -> None:
    """Raises UsageError where `--backbones builtin` would change nothing: no feature is a built-in network's."""
    from mmad_cli.backbones.builtin import is_builtin

    if not any(is_builtin(name) for spec in specs.values() for name in spec.weights_names()):
        raise UsageError(f"--backbones builtin: {what} reads no network that it could replace; leave the option out")


def preprocess_config(protocol: str, settings: Mapping[str, Any]) -> PreprocessConfig:
    """Parameters of a protocol with single fields set by the user."""
    from pydantic import ValidationError

    from mmad_cli.preprocessing.config import PreprocessConfig

    try:
        return PreprocessConfig.model_validate({"protocol": protocol, **settings})
    except ValidationError as error:
        first = error.errors()[0]
        option = str((first["loc"] or ("protocol",))[0]).replace("_", "-")
        raise UsageError(f"--{option} {first.get('input')}: {first['msg']}") from error


def _checkpoint_folder(folder: Path | None) -> Path | None:
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--checkpoints {folder}: is not a folder; `mmad fit --export DIR` writes one")
    return None if folder is None else folder.absolute()


def _weights(specs: Mapping[str, Any], own: Sequence[str]) -> list[WeightsRecord]:
    from mmad_cli.backbones.weights import resolve

    names = {name for spec in specs.values() for name in spec.weights_names()} | set(own)
    return [resolve(name) for name in sorted(names)]
