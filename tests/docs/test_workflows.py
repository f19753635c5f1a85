"""The workflow to paste works step by step, and so does what the project's own workflow calls.

The steps of docs/ci.md run in turn in a shell, on a tiny dataset instead of the synthetic one; those that fetch and
install something are left out. As on a runner, a step that fails ends the job but for those marked `if: always()`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OWN = ROOT / ".github" / "workflows" / "ci.yml"
NOT_HERE = {"System libraries of Open3D", "Install"}


class Job(NamedTuple):
    """Exit codes by the name of the step, and the summary that the job wrote."""

    codes: dict[str, int]
    summary: str


def documented() -> dict[str, Any]:
    text = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"```yaml\n(name: .*?)```", text, flags=re.DOTALL)
    return yaml.safe_load(found)


def run_job(folder: Path, environment: dict[str, str]) -> Job:
    summary = folder / "step-summary.md"
    summary.write_text("")
    codes: dict[str, int] = {}
    for step in documented()["jobs"]["numbers"]["steps"]:
        if "run" not in step or step["name"] in NOT_HERE or (any(codes.values()) and step.get("if") != "always()"):
            continue
        ended = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", step["run"]],
            cwd=folder,
            env={**environment, "GITHUB_STEP_SUMMARY": str(summary)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in ended.stderr, ended.stderr
        codes[step["name"]] = ended.returncode
    return Job(codes, summary.read_text())


@pytest.fixture
def environment(_tiny: Path, tmp_path: Path) -> dict[str, str]:
    """With `mmad` on the path, and the tiny dataset as the default one."""
    program = tmp_path / "bin" / "mmad"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mmad_cli "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    here = {"PYTHONPATH": str(ROOT), "MMAD_STORE": str(tmp_path / "store"), "MMAD_DATA": str(_tiny)}
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **here}


@pytest.fixture
def repository(environment: dict[str, str], tmp_path: Path) -> Path:
    """A folder with the reference that the page says how to make."""
    folder = tmp_path / "repository"
    folder.mkdir()
    text = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    start = text.index("mmad evaluate")
    made = text[start : text.index("```\n", start)]
    subprocess.run(["bash", "-e", "-c", made], cwd=folder, env=environment, check=True, capture_output=True)
    shutil.rmtree(folder / "runs")
    return folder


@pytest.mark.slow
def test_the_documented_job_passes_and_then_fails_with_the_row_that_moved(
    repository: Path, environment: dict[str, str]
) -> None:
    job = run_job(repository, environment)
    assert set(job.codes.values()) == {0} and len(job.codes) >= 6
    upload = documented()["jobs"]["numbers"]["steps"][-1]["with"]["path"].split()
    assert all((repository / name).exists() for name in upload)
    assert "| ok |" in job.summary and "out of tolerance" not in job.summary.replace("0 out of tolerance", "")
    assert (repository / "report.html").read_text().count('id="map-') == 8, "a map of every test sample"

    reference = repository / "reference" / "btf-fpfh.json"
    numbers = json.loads(reference.read_text())
    numbers["categories"]["cube"]["p_auroc"] -= 0.02
    reference.write_text(json.dumps(numbers))
    job = run_job(repository, environment)
    assert job.codes["Compare"] == 1
    assert {name for name, code in job.codes.items() if code} == {"Compare", "Test results"}
    (row,) = [line for line in job.summary.splitlines() if re.search(r"\|[ *]*out[ *]*\|", line)]
    assert "cube" in row and "P-AUROC" in row and "+0.0200" in row
    suite = ElementTree.parse(repository / "junit.xml").getroot()
    moved = [case for case in suite.iter("testcase") if case.find("failure") is not None]
    assert [(case.get("classname", "").rsplit(".", 1)[-1], case.get("name")) for case in moved] == [("cube", "p_auroc")]


def test_the_workflow_of_the_project_calls_what_there_is() -> None:
    steps = [step for job in yaml.safe_load(OWN.read_text())["jobs"].values() for step in job["steps"]]
    commands = " ".join(step.get("run", "") for step in steps)
    targets = re.findall(r"\bmake (\w+)", commands)
    makefile = (ROOT / "Makefile").read_text()
    assert {"install", "gate"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
    assert os.access(ROOT / ".ci" / "run", os.X_OK) and ".ci/run" in commands
    script = (ROOT / "ci" / "gate.sh").read_text()
    left = {name for step in steps for name in step.get("with", {}).get("path", "").split() if "build/gate" in name}
    assert left and all(name.replace("build/gate", "$folder") in script for name in left)
    assert "GATE_STORE" in script
