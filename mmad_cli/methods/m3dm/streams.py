"""Parts of a feature set, and one progress count over several parts of a fit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmad_cli.methods.base import FeatureSet, ProgressCallback, SampleFeatures

_PROGRESS_SECONDS = 0.3


@dataclass(frozen=True)
class Samples:
    """Some samples of a feature set."""

    samples: Sequence[SampleFeatures]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> SampleFeatures:
        return self.samples[index]

    def __iter__(self) -> Iterator[SampleFeatures]:
        return iter(self.samples)


def first(features: FeatureSet, count: int) -> FeatureSet:
    """The first `count` samples of a set, or all of them."""
    if len(features) <= count:
        return features
    return Samples([features[i] for i in range(count)])


class SharedProgress:
    """One count over several parts of known sizes, passed on a few times a second at most."""

    def __init__(self, callback: ProgressCallback | None, total: int) -> None:
        self.callback, self.total = callback, total
        self._begin, self._told = 0, 0.0

    def part(self, size: int) -> ProgressCallback:
        """Callback of the next part, of `size` steps."""
        begin = self._begin
        self._begin += size

        def tell(done: int, _: int) -> None:
            now, reached = time.monotonic(), min(begin + done, self.total)
            if self.callback is not None and (reached == self.total or now - self._told > _PROGRESS_SECONDS):
                self._told = now
                self.callback(reached, self.total)

        return tell

    def share(self, size: int) -> ProgressCallback:
        """Callback of the next part, which takes `size` steps of the whole, whatever number it counts itself."""
        inner = self.part(size)
        return lambda done, total: inner(size * done // max(total, 1), size)
