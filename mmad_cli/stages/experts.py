"""Experts that several configurations of a method share: fitted once per category, and what they say is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from mmad_cli.methods.base import Experts, HasExperts
from mmad_cli.stages.clean import recomputed
from mmad_cli.stages.features import FeatureJob, StoredFeatures, StoredSample
from mmad_cli.stages.timing import Stopwatch, method_name
from mmad_cli.store import Artefact, CorruptArtefactError, library_versions, make_key

if TYPE_CHECKING:
    from mmad_cli.methods.base import Method
    from mmad_cli.stages.plan import MethodRun
    from mmad_cli.stages.session import Session
    from mmad_cli.types import SampleRef

STAGE = "fit-experts"
LOOK = "look"


@dataclass(frozen=True)
class ExpertsPlan:
    """Place of the fitted experts, and of each look by its name and sample id."""

    artefact: Artefact
    looks: Mapping[str, Mapping[str, Artefact]]

    @property
    def keys(self) -> set[str]:
        """Every artefact key, that of the experts included."""
        return {self.artefact.key, *(look.key for by_id in self.looks.values() for look in by_id.values())}


def plan_experts(
    category: str, train: Sequence[SampleRef], features: Mapping[str, Mapping[str, FeatureJob]], run: MethodRun
) -> ExpertsPlan | None:
    """Places of the experts of a category; None for a method without."""
    method = run.build("cpu")
    if not isinstance(method, HasExperts):
        return None
    settings, looks = method.experts.settings(), method.experts.looks()
    plain = next(iter(looks.values()))
    key = make_key(
        STAGE,
        run.definition.version,
        method=run.definition.name,
        settings=settings,
        seed=run.seed,
        libraries=library_versions(run.definition.libraries),
        train=[{name: features[name][ref.id].key for name in plain} for ref in train],
    )

    def place(name: str, id_: str) -> Artefact:
        # under the plain names: the same features give the same look
        keys = [[own, features[read][id_].key] for own, read in zip(plain, looks[name], strict=True)]
        return Artefact(LOOK, category, make_key(LOOK, run.definition.version, experts=key, features=keys))

    return ExpertsPlan(
        Artefact(STAGE, category, key),
        {
            name: {
                id_: place(name, id_)
                for id_, job in features[read[0]].items()
                if job.wanted and all(id_ in features[other] for other in read)
            }
            for name, read in looks.items()
        },
    )


def ready_experts(
    session: Session, plan: ExpertsPlan, train: StoredFeatures, run: MethodRun, method: Method, category: str
) -> None:
    """Give a method its experts: from the store, or fitted and then stored."""
    experts = experts_of(method)
    store = session.store
    with store.lock(plan.artefact):
        try:
            folder, _ = store.read_folder(plan.artefact)
            experts.load(folder)
            return
        except FileNotFoundError:
            pass
        except CorruptArtefactError as error:
            session.reporter.notice(recomputed(error))
        watch = Stopwatch()
        with session.reporter.task(f"{category}: fitting experts", 0) as advance:
            experts.fit(train, seed=run.seed, progress=advance)
        watch.lap(len(train))
        watch.record(session, method_name(STAGE, run, session.resolve_device(), len(train)))
        with store.write_folder(plan.artefact, {}) as folder:
            experts.save(folder)


def forget_experts(session: Session, plan: ExpertsPlan) -> None:
    """Drop what the store has, so that it is computed again."""
    session.store.remove(plan.artefact)
    for by_id in plan.looks.values():
        for look in by_id.values():
            session.store.remove(look)


def experts_of(method: Method) -> Experts:
    """The experts of a method that has some."""
    if not isinstance(method, HasExperts):
        raise TypeError(f"{type(method).__name__} has no experts")
    return method.experts


@dataclass(frozen=True)
class LookedSample(StoredSample):
    """A sample with what fitted experts say of it, from the store or computed and then stored."""

    looks: Mapping[str, Artefact]
    experts: Experts
    session: Session

    def look(self, name: str) -> Mapping[str, NDArray[Any]]:
        """What the experts say of it; arrays are read-only."""

        def on_corrupt(error: CorruptArtefactError) -> None:
            self.notice(recomputed(error))

        def compute() -> tuple[Mapping[str, NDArray[Any]], Mapping[str, Any]]:
            return self.experts.look(self, name), {"sample": self.id}

        arrays, _ = self.session.store.tensors_or_compute(self.looks[name], compute, on_corrupt)
        for array in arrays.values():
            array.setflags(write=False)
        return arrays
