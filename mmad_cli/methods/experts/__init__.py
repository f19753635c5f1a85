"""Experts: one memory bank each, on one view of a scan, read on one common grid of 56 x 56 cells.

Methods that learn how to join scores (G2SF, IAENet) share them. An expert gives a score map, the prototypes behind it
and the features that were scored; it knows nothing of how its scores are used.
"""

from mmad_cli.methods.experts.expert import Expert, Lookup, bank_selection
from mmad_cli.methods.experts.normalisers import NORMALISERS, Normaliser, fit_normaliser
from mmad_cli.methods.experts.panel import LOOK, RANKS, Look, Panel, Scan, cell_labels, foreground
from mmad_cli.methods.experts.pseudo import PseudoSample, pseudo_samples, with_pseudo
from mmad_cli.methods.experts.sources import CELLS, GRID, Cells, Source

__all__ = [
    "CELLS",
    "GRID",
    "LOOK",
    "NORMALISERS",
    "RANKS",
    "Cells",
    "Expert",
    "Look",
    "Lookup",
    "Normaliser",
    "Panel",
    "PseudoSample",
    "Scan",
    "Source",
    "bank_selection",
    "cell_labels",
    "fit_normaliser",
    "foreground",
    "pseudo_samples",
    "with_pseudo",
]
