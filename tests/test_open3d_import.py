"""Open3D comes without its web server, which its functions for notebooks still find."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from mmad_cli.open3d_import import import_open3d

open3d = import_open3d()
assert import_open3d() is open3d is sys.modules["open3d"]
assert not {"dash", "IPython"} & set(sys.modules), "imported with Open3D"
cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]))
for _ in range(2):
    figure = open3d.visualization.get_plotly_fig([cloud])
    assert list(figure.data[0].z) == [0, 3]
assert callable(open3d.visualization.draw_plotly)
"""


def test_the_web_server_waits_until_it_is_called() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
