"""What methods with one memory bank share: streaming fit, saved state, and how features are read."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmad_cli.errors import DataError
from mmad_cli.methods.base import BankSize, FeatureSet, Prediction, ProgressCallback, SampleFeatures
from mmad_cli.types import FloatArray

if TYPE_CHECKING:
    from mmad_cli.backbones.specs import FeatureSpec
    from mmad_cli.memory import BankConfig, MemoryBank

BANK = "patches"
_STATE_FILE = "state.json"
_BANK_FILE = "bank.safetensors"
_FLOAT32_BYTES = 4


class SingleBankMethod(ABC):
    """A method that keeps patch rows of good samples and scores by the distance to them.

    Fitting goes through the features twice: once to project and select, once to fetch the selected rows. So
    memory is bounded by the projected rows, never by the features.
    """

    bank_: MemoryBank

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    @abstractmethod
    def features(self) -> dict[str, FeatureSpec]:
        """Features needed, by the name under which they are read."""

    @abstractmethod
    def patches(self, sample: SampleFeatures) -> FloatArray:
        """Patch rows of one sample, float32 (P, C); raises DataError when a feature is missing."""

    @abstractmethod
    def score(self, patches: FloatArray) -> Prediction:
        """Anomaly map and image score from the patch rows of one sample."""

    @abstractmethod
    def bank_config(self) -> BankConfig:
        """How rows of the memory bank are selected."""

    def fit(
        self,
        train: FeatureSet,
        validation: FeatureSet,
        *,
        seed: int,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Select the memory bank from the patches of all training samples; `validation` is not read.

        `seed` starts the one random stream of the fit. Raises DataError without training samples.
        """
        from mmad_cli.memory import MemoryBank

        if len(train) == 0:
            raise DataError("there are no training samples; a memory bank needs at least one good sample")
        rows, channels = self.patches(train[0]).shape

        def blocks() -> Iterator[FloatArray]:
            for sample in train:
                yield self._checked_patches(sample, (rows, channels))

        bank = MemoryBank(self.bank_config())
        bank.fit(
            blocks,
            rows * len(train),
            channels,
            random_state=np.random.RandomState(seed),
            device=self.device,
            progress=progress,
        )
        self.bank_ = bank

    def predict(self, sample: SampleFeatures) -> Prediction:
        """Score one sample. Raises RuntimeError before `fit` or `load`."""
        bank = self._fitted_bank()
        patches = self.patches(sample)
        if patches.shape[1] != bank.rows_.shape[1]:
            raise DataError(
                f"{sample.id}: patches have {patches.shape[1]} channels, the bank {bank.rows_.shape[1]}; "
                "fit again with the same features"
            )
        return self.score(patches)

    def banks(self) -> dict[str, BankSize]:
        """Size of the fitted memory bank."""
        rows, dim = self._fitted_bank().rows_.shape
        return {BANK: BankSize(rows=int(rows), dim=int(dim))}

    def save(self, folder: Path) -> None:
        """Write the memory bank and a description of it into an existing empty folder."""
        size = self.banks()[BANK]
        self._fitted_bank().save(folder / _BANK_FILE)
        (folder / _STATE_FILE).write_text(json.dumps({"rows": size.rows, "dim": size.dim}) + "\n")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises DataError when the two files do not belong together."""
        from mmad_cli.memory import MemoryBank

        state = json.loads((folder / _STATE_FILE).read_text())
        bank = MemoryBank.load(folder / _BANK_FILE, self.device)
        if tuple(bank.rows_.shape) != (state["rows"], state["dim"]):
            raise DataError(f"{folder}: the memory bank is not the one described in {_STATE_FILE}; fit again")
        self.bank_ = bank

    def _fitted_bank(self) -> MemoryBank:
        if not hasattr(self, "bank_"):
            raise RuntimeError("the method is not fitted; call fit or load first")
        return self.bank_

    def _checked_patches(self, sample: SampleFeatures, shape: tuple[int, int]) -> FloatArray:
        patches = self.patches(sample)
        if patches.shape != shape:
            raise DataError(f"{sample.id}: patches have shape {patches.shape}, the first sample's {shape}")
        return patches


def read_array(sample: SampleFeatures, feature: str, name: str) -> NDArray[Any]:
    """One array of a feature of a sample; DataError naming the sample when missing or not finite."""
    try:
        array = sample[feature][name]
    except KeyError as error:
        raise DataError(f"{sample.id}: no {feature!r} feature ({name!r}); this method cannot do without") from error
    if not np.isfinite(array).all():
        raise DataError(f"{sample.id}: feature {feature!r} ({name!r}) holds values that are not finite")
    return array


def coreset_bytes(rows: int, channels: int, selection_channels: int, kept: int) -> int:
    """Peak bytes of streaming selection: projected rows with 30 % working space, and kept rows twice."""
    return int(_FLOAT32_BYTES * (1.3 * rows * selection_channels + 2 * kept * channels))
