"""How the memory banks are made: what they read, how they are normalised, and how many rows they keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np

from mmad_cli.methods.base import MAP_SIZE, ProgressCallback
from mmad_cli.methods.m3dm.config import BankName, M3DMConfig
from mmad_cli.methods.m3dm.patches import POINT_PATCHES
from mmad_cli.types import FloatArray

if TYPE_CHECKING:
    from mmad_cli.memory import BankConfig, MemoryBank

Blocks = Callable[[], Iterator[FloatArray]]

# of the RGB networks the finest
_PATCH_SIDE = 8
# per pixel of a sample: weight, sign and order, which the one-class machine makes
_WEIGHED_BYTES = 24


@dataclass(frozen=True)
class Survey:
    """Rows that a bank selects from; mean and deviation over all their entries where they are needed."""

    blocks: Blocks
    rows: int
    channels: int
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class BankPlan:
    """One bank before its selection: rows, how many stay, and the normalisation (x - mean) / std."""

    name: BankName
    survey: Survey
    selection: BankConfig
    mean: float
    std: float

    @property
    def kept(self) -> int:
        """Rows that the selection keeps."""
        return self.selection.rows_to_keep(self.survey.rows) if self.survey.rows else 0


def plan_banks(config: M3DMConfig, streams: Mapping[BankName, tuple[Blocks, int]]) -> list[BankPlan]:
    """Plans of all banks of the variant, from the row blocks of each and the number of samples that give them.

    Goes through the blocks once where sizes or moments are not known without.
    """
    surveys = {name: _survey(*streams[name], *_survey_needs(config, name)) for name in config.parts}
    plans: list[BankPlan] = []
    for name, survey in surveys.items():
        bank = selection(config, survey.rows, plans[0].kept if plans else 0)
        plans.append(BankPlan(name, survey, bank, *_scale(config, name, surveys)))
    return plans


def require_room(config: M3DMConfig, channels: Mapping[BankName, int], weighed: int = 0) -> None:
    """Make sure that a memory limit has room for scoring with banks of so many channels, and libraries for it.

    weighed: samples that decision fusion learns from. Raises UsageError naming the smallest limit that does.
    """
    from mmad_cli.memory.limit import is_memory_limited, require_memory
    from mmad_cli.memory.search import import_faiss

    if not is_memory_limited():
        return
    # what is loaded later counts, too
    import_faiss()
    for name in ("torch", "PIL.Image", *(["sklearn.linear_model"] if weighed else [])):
        import_module(name)
    patches = {"points": POINT_PATCHES, "fused": POINT_PATCHES, "rgb": (config.rgb_size // _PATCH_SIDE) ** 2}
    rows = [4 * patches[name] * width for name, width in channels.items()]
    # those of one bank also normalised, without their repetitions, and centred
    require_memory(sum(rows) + 3 * max(rows) + weighed * _WEIGHED_BYTES * MAP_SIZE**2)


def selection(config: M3DMConfig, rows: int, first_kept: int) -> BankConfig:
    """Selection among `rows` rows; `first_kept` rows stay in the first bank, 0 for the first bank itself."""
    from mmad_cli.memory import BankConfig

    count = None
    if first_kept and config.coreset_count == "chained" and config.coreset_fraction < 1:
        count = min(max(1, int(config.coreset_fraction * first_kept)), rows)
    return BankConfig(
        fraction=config.coreset_fraction,
        count=count,
        eps=config.coreset_eps,
        projection="sparse",
        coreset="greedy" if config.coreset_fraction < 1 else "all",
        coreset_dtype=config.coreset_dtype,
    )


def filters_zeros(config: M3DMConfig, name: BankName) -> bool:
    """Whether rows with a zero are left out of a bank before its selection."""
    if name != "points":
        return False
    return config.zero_row == "filtered" if _has_three_banks(config) else config.rm_zero_for_project


def fit_bank(
    plan: BankPlan, config: M3DMConfig, stream: np.random.RandomState, device: str, progress: ProgressCallback
) -> MemoryBank:
    """Select a bank, with its row of zeros where the variant has one; `stream` is shared by all banks."""
    from mmad_cli.memory import MemoryBank

    survey = plan.survey
    if survey.rows:
        bank = MemoryBank(plan.selection)
        own = config.random_state
        bank.fit(
            survey.blocks,
            survey.rows,
            survey.channels,
            random_state=stream if own is None else np.random.RandomState(own),
            device=device,
            progress=progress,
            mean=plan.mean,
            std=plan.std,
        )
    else:
        # every row was left out: the row of zeros is all there is
        bank = _empty_bank(plan, device)
    return _with_zero_row(bank, plan.name, config)


def _has_three_banks(config: M3DMConfig) -> bool:
    return len(config.parts) == 3


def _survey_needs(config: M3DMConfig, name: BankName) -> tuple[bool, bool]:
    """Whether rows have to be counted, and whether mean and deviation are needed."""
    if config.norm == "per_bank" or config.variant == "dino":
        return True, True
    return filters_zeros(config, name), len(config.parts) > 1 and name != "fused"


def _survey(blocks: Blocks, samples: int, count: bool, moments: bool) -> Survey:
    """Sizes of a stream of blocks, and its moments; reads all of it only when asked for either."""
    from mmad_cli.memory import scalar_moments

    if not (count or moments):
        block = next(blocks())
        return Survey(blocks, len(block) * samples, block.shape[1])
    rows, channels = 0, 0

    def counted() -> Iterator[FloatArray]:
        nonlocal rows, channels
        for block in blocks():
            rows, channels = rows + len(block), block.shape[1]
            yield block

    if not moments:
        for _ in counted():
            pass
        return Survey(blocks, rows, channels)
    try:
        mean, std = scalar_moments(counted)
    except ValueError:
        # nothing is left to normalise
        return Survey(blocks, rows, channels)
    return Survey(blocks, rows, channels, mean, std if std > 0 else 1.0)


def _scale(config: M3DMConfig, name: BankName, surveys: Mapping[BankName, Survey]) -> tuple[float, float]:
    """Mean and deviation that a bank is normalised with."""
    if config.norm == "per_bank" or config.variant == "dino":
        return surveys[name].mean, surveys[name].std
    if len(surveys) == 1:
        return 0.0, 1.0
    return surveys["points"].mean, surveys["rgb"].std


def _empty_bank(plan: BankPlan, device: str) -> MemoryBank:
    from mmad_cli.memory import MemoryBank

    bank = MemoryBank(plan.selection)
    bank.mean_, bank.std_, bank.device = plan.mean, plan.std, device
    bank.rows_ = np.empty((0, plan.survey.channels), dtype=np.float32)
    bank.picks_ = np.empty(0, dtype=np.int64)
    return bank


def _with_zero_row(bank: MemoryBank, name: BankName, config: M3DMConfig) -> MemoryBank:
    """The point bank without rows that hold a zero and with one background row, where the variant has that."""
    if name != "points" or not (_has_three_banks(config) or config.rm_zero_for_project):
        return bank
    background = np.zeros((1, bank.rows_.shape[1]), dtype=np.float32)
    if filters_zeros(config, name):
        bank.add_row(bank.normalise(background))
    else:
        bank.add_row(background, where=lambda rows: (rows != 0).all(axis=1))
    return bank
