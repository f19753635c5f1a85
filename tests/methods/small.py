"""Settings that keep a fit of generated features quick."""

from typing import Any

# settings that keep a check quick; they change sizes, not what is computed
SMALL: dict[str, dict[str, Any]] = {
    "cfm": {"epochs": 1, "grid": 32},
    "cmdr_iad": {"epochs": 1, "grid": 16},
    "g2sf": {
        "coreset_fraction": 0.02,
        "pseudo_per_sample": 1,
        "epochs": 1,
        "batch_share": 1.0,
        "consistency_share": 0.05,
    },
    "iaenet": {
        "coreset_fraction": 0.02,
        "pseudo_per_sample": 1,
        "epochs": 1,
        "g2sf_epochs": 1,
        "g2sf_batch_share": 1.0,
    },
    # without the published fusion block, which is made for wider features; the coreset is a third of the default's
    "m3dm": {"uff": "concat", "coreset_fraction": 0.03},
    "mafr": {"epochs": 1, "grid": 32},
    "patchcore": {"pretrain_dim": 16, "target_dim": 16, "projection_dim": 8},
}
