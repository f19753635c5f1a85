"""Memory of a stage: what was taken while it ran, and not what an earlier one took."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mmad_cli.stages import peak_memory
from mmad_cli.stages.peak_memory import PeakMemory

SIZE = 120 * 2**20

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")


# in a process of its own: of one that holds gigabytes the system may take idle pages back at the same moment
STAGES = """
import json, sys, time
import numpy as np
from mmad_cli.stages.peak_memory import PeakMemory, peak_rss

def take():
    block = np.ones(int(sys.argv[1]), dtype=np.uint8)
    time.sleep(0.12)  # two looks
    del block

def peak_of(work):
    with PeakMemory() as memory:
        work()
    return memory.bytes

nothing = lambda: None
print(json.dumps([peak_of(nothing), peak_of(take), peak_of(nothing), peak_rss()]))
"""


def peak_of(work) -> int | None:
    with PeakMemory() as memory:
        work()
    return memory.bytes


@needs_proc
def test_what_a_stage_takes_is_its_own():
    run = subprocess.run([sys.executable, "-c", STAGES, str(SIZE)], capture_output=True, text=True, check=True)
    before, during, after, highest = json.loads(run.stdout)
    assert during - before > 0.9 * SIZE
    assert during - after > 0.9 * SIZE
    assert during <= 1.05 * highest  # the present size is counted per processor and thus not exactly


def test_where_the_system_does_not_tell_only_a_new_maximum_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "_STATM", tmp_path / "missing")
    assert peak_of(lambda: None) is None
    highest = iter((10, 10, 10, 30))
    monkeypatch.setattr(peak_memory, "peak_rss", lambda: next(highest))
    assert peak_of(lambda: None) is None
    assert peak_of(lambda: None) == 30


@needs_proc
def test_the_watch_ends_with_the_work():
    memory = PeakMemory()
    with pytest.raises(ValueError, match="of the work"), memory:
        raise ValueError("of the work")
    assert memory.bytes > 10**6 and not memory._thread.is_alive()
