"""What a stored result needs of a method is had without PyTorch, whose import takes longer than all the rest."""

from __future__ import annotations

import json
import subprocess
import sys

from mmad_cli.methods import method_names

LOOK = """
import json, sys
from mmad_cli.methods import get_method, method_names
from mmad_cli.methods.registry import build_config

seen = {}
for name in method_names():
    definition = get_method(name)
    for variant in definition.variants:
        method = definition.build(build_config(definition, variant, "official", {}), "cpu")
        method.features(), method.view
    seen[name] = sorted({"torch", "open3d", "sklearn", "faiss"} & set(sys.modules))
print(json.dumps(seen))
"""


def test_definitions_and_features_import_no_heavy_library() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {name: [] for name in method_names()}
