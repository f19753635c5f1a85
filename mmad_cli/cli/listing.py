"""`mmad list`: what there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmad_cli.cli.console import print_err, print_json, print_rich
from mmad_cli.cli.options import Json

if TYPE_CHECKING:
    from mmad_cli.results.reference import Reference

app = typer.Typer(
    no_args_is_help=True,
    help="List methods, variants, backbones, datasets, references or runs.\n\nExample: mmad list methods",
)


def show(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Rows as a table, or as JSON."""
    from rich.markup import escape
    from rich.table import Table

    if as_json:
        print_json(list(rows))
        return
    if not rows:
        print_err("none")
        return
    table = Table()
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(escape(", ".join(v) if isinstance(v, list | tuple) else str(v)) for v in row.values()))
    print_rich(table)


@app.command("methods")
def methods(json: Json = False) -> None:
    """Methods, with their variants and sources.

    Example: mmad list methods --json
    """
    from mmad_cli.methods import get_method, method_names

    definitions = [get_method(name) for name in method_names()]
    show(
        [
            {
                # the table has one column for both
                **({"name": d.name, "label": d.label} if json else {"name": d.label}),
                "title": d.title,
                "variants": list(d.variants),
                "default": d.default_variant,
                "recipes": list(d.recipes),
                "protocol": d.protocol,
                "source": d.source,
            }
            for d in definitions
        ],
        json,
    )


@app.command("variants")
def variants(
    method: Annotated[str | None, typer.Option("--method", help="Of this method only.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Variants of methods: the published ablations.

    Example: mmad list variants --method btf
    """
    from mmad_cli.methods import get_method, method_names

    definitions = [get_method(name) for name in ([method] if method else method_names())]
    show(
        [
            {"method": d.label, "variant": variant, "modality": d.modalities[variant], "what": text}
            for d in definitions
            for variant, text in d.variants.items()
        ],
        json,
    )


@app.command("backbones")
def backbones(json: Json = False) -> None:
    """Backbones, and whether their weights are here.

    Example: mmad list backbones
    """
    from mmad_cli.backbones.specs import PARAMS
    from mmad_cli.backbones.weights import list_weights

    hand_made = [
        {"name": name, "kind": "hand-made", "weights": "none needed", "what": _first_line(params)}
        for name, params in PARAMS.items()
        if "torch" not in params.libraries
    ]
    networks = [
        {"name": status.name, "kind": status.kind, "weights": status.state, "what": status.description}
        for status in list_weights()
    ]
    show([*hand_made, *networks], json)


@app.command("datasets")
def datasets(json: Json = False) -> None:
    """Dataset layouts that are read, with the categories that are known.

    Example: mmad list datasets
    """
    from mmad_cli.datasets import describe_datasets

    show(describe_datasets(), json)


@app.command("references")
def references(json: Json = False) -> None:
    """Published numbers to compare with.

    Example: mmad list references --json
    """
    from mmad_cli.results.reference import list_references

    show(
        [reference.model_dump(mode="json") if json else _reference_row(reference) for reference in list_references()],
        json,
    )


def _first_line(documented: type) -> str:
    return (documented.__doc__ or "").strip().partition("\n")[0]


def _reference_row(reference: Reference) -> dict[str, Any]:
    return {
        "name": reference.name,
        "published as": reference.published_as,
        "for": " ".join([reference.method, *reference.variants]),
        "dataset": reference.dataset,
        "protocol": reference.protocol or "not told",
        "metrics": list(reference.metrics),
    }


@app.command("runs")
def runs(folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("runs"), json: Json = False) -> None:
    """Runs below a folder.

    Example: mmad list runs runs
    """
    from mmad_cli.results.runs import find_runs, load_runs

    found = find_runs(folder)
    show(
        [
            {
                "run": str(path),
                "method": result.method.shown,
                "variant": result.method.variant,
                "recipe": result.method.recipe,
                "dataset": result.dataset.name,
                "seed": result.seed,
                "categories": len(result.categories),
                "comparable": result.comparable,
                "created": result.created.isoformat(),
            }
            for path, result in zip(found, load_runs(found), strict=True)
        ],
        json,
    )
