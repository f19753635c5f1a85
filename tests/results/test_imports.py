from __future__ import annotations

import subprocess
import sys

HEAVY = {"torch", "open3d", "sklearn", "timm", "faiss", "skimage", "kornia", "pandas", "scipy"}


def test_results_and_reports_stay_light():
    code = (
        "import sys, mmad_cli.results.runs, mmad_cli.results.compare, mmad_cli.reports;"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not HEAVY & set(output.split())
