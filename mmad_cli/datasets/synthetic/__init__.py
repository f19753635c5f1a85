"""Synthetic scans of parts with exact defect masks: the default dataset, and `mmad synth`.

The parts are signed distance functions (`parts`), defects change them (`defects`), a simulated structured-light
scanner looks at them (`scanner`), `render` makes one sample and `generate` a dataset in the MVTec 3D-AD layout.
"""

from mmad_cli.datasets.synthetic.defects import DEFECTS, DefectKind
from mmad_cli.datasets.synthetic.generate import (
    SYNTH_VERSION,
    SynthReport,
    class_ids,
    default_spec,
    generate,
)
from mmad_cli.datasets.synthetic.parts import CATEGORIES, Category

__all__ = [
    "CATEGORIES",
    "DEFECTS",
    "SYNTH_VERSION",
    "Category",
    "DefectKind",
    "SynthReport",
    "class_ids",
    "default_spec",
    "generate",
]
