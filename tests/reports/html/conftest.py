"""Runs with pictures, and a headless Chromium driven through its debugging pipe: needs the browser and nothing else."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from mmad_cli.reports.html import RunInput, Scene, ScoredMap, render_html
from mmad_cli.results.compare import Tolerances, compare
from mmad_cli.results.reference import ReferenceTable
from mmad_cli.results.runs import SampleScore
from mmad_cli.results.schema import CategoryResult, RunResult

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)


class Browser:
    """One tab. `errors` collects console errors, exceptions and refused loads, `requests` every address asked for."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        def connect() -> None:
            # the browser reads commands from descriptor 3 and answers on 4
            low, high = os.dup(to_browser), os.dup(from_browser)
            os.dup2(low, 3)
            os.dup2(high, 4)

        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=connect,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session = b"", 0, None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _read(self, seconds: float = 60.0):
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], seconds)[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message)
        return message

    def _note(self, message) -> None:
        name, values = message.get("method"), message.get("params", {})
        if name == "Runtime.exceptionThrown":
            details = values["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif name == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(one.get("value", one.get("description"))) for one in values["args"]))
        elif name == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.errors.append(values["entry"]["text"])
        elif name == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])

    def evaluate(self, expression: str):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", str(answer)))
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {expression}; errors: {self.errors}")
            time.sleep(0.03)

    def open(self, file: Path, width: int = 1400, height: int = 900, theme: str = "light") -> None:
        self.errors.clear()
        self.requests.clear()
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.resize(width, height)
        self.call("Page.navigate", url=file.as_uri())
        self.wait("document.readyState === 'complete' && document.documentElement.dataset.ready !== undefined")

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def click(self, selector: str) -> None:
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def choose(self, selector: str, value: str) -> None:
        self.evaluate(
            f"(() => {{ const s = document.querySelector({json.dumps(selector)}); s.value = {json.dumps(value)};"
            " s.dispatchEvent(new Event('input', {bubbles: true}));"
            " s.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    def press(self, key: str) -> None:
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27, "Tab": 9}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else None)
        common = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0]))}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def drag(self, selector: str, dx: int, dy: int) -> None:
        x, y = self.evaluate(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )
        mouse = {"button": "left", "buttons": 1, "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **mouse)
        for step in (0.5, 1.0):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + dx * step, y=y + dy * step, **mouse)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x + dx, y=y + dy, **mouse)

    def screenshot(self, file: Path, full: bool = False) -> None:
        options = {"captureBeyondViewport": True} if full else {}
        if full:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            options["clip"] = {**size, "scale": 1}
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"]))

    def close(self) -> None:
        try:
            self._session = None
            self.call("Browser.close")
            self._process.wait(timeout=10)
        except (RuntimeError, TimeoutError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        finally:
            os.close(self._out)
            os.close(self._in)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


# -- runs with pictures ------------------------------------------------------------------------------------------

NASTY_TEXTS = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "\"quoted\" 'name' & more",
    "line\u2028separator\u2029",
    "Прокладка 垫片 🔩",
    "javascript:alert(1)",
    "${title} $summary",
    "__proto__",
)


@pytest.fixture(scope="session")
def nasty_texts() -> tuple[str, ...]:
    return NASTY_TEXTS


@pytest.fixture
def compared(run):
    """The run held against a made-up row."""
    return compare(run, ReferenceTable("made up", "a test", rows={"bagel": {"i_auroc": 0.5}}), Tolerances())


class FakePictures:
    """Scans of a rounded block, and maps that are high on the defect."""

    scene_key = "fake"

    def scene(self, category: str, sample: str) -> Scene | None:
        rng = np.random.default_rng(zlib.crc32(sample.encode("utf-8", "replace")))
        rows, columns = np.mgrid[:64, :64] / 64 - 0.5
        z = 0.6 - 0.02 * np.clip(1 - (np.hypot(rows, columns) / 0.4) ** 4, 0, None)
        xyz = np.stack([columns * 0.1 + 1e-5, rows * 0.1 + 1e-5, z], axis=-1).astype(np.float32)
        xyz[np.hypot(rows, columns) > 0.42] = 0
        rgb = rng.integers(90, 160, (64, 64, 3), dtype=np.uint8)
        return Scene(rgb, xyz, self.mask(sample))

    def mask(self, sample: str) -> np.ndarray:
        mask = np.zeros((32, 32), dtype=bool)
        if "good" not in sample:
            mask[12:18, 10:20] = True
        return mask

    def anomaly_map(self, category: str, sample: str) -> ScoredMap | None:
        rng = np.random.default_rng(zlib.crc32(sample.encode("utf-8", "replace")) + 1)
        noise = rng.normal(0, 1, (32, 32))
        return ScoredMap((noise + 3 * self.mask(sample)).astype(np.float32))


def scores_of(defects=("hole", "cut"), count=4) -> list[SampleScore]:
    """Good samples around 0.3, defective ones around 0.5, with some of each on the wrong side."""
    rng = np.random.default_rng(4)
    return [
        SampleScore(f"test/{defect}/{number:03d}", defect, int(defect != "good"), float(rng.normal(centre, 0.12)))
        for defect, centre in (("good", 0.3), *((name, 0.5) for name in defects))
        for number in range(count)
    ]


RUN = Path(__file__).parents[2] / "results" / "data" / "summary_v1.json"


def make_inputs() -> list[RunInput]:
    """One run: bagel and cable_gland with scores and pictures, tire failed."""
    run = RunResult.from_disk(RUN)
    run.categories["bagel"].seconds = {"extract": 3.0, "fit": 1.5}
    run.categories["bagel"].training = {"2d to 3d": [1.0, 0.2, 0.05], "3d to 2d": [0.5, 0.4, 0.3]}
    scores = {"bagel": scores_of(), "cable_gland": scores_of(("thread",), 1)}
    return [RunInput(run, scores, FakePictures(), ("a note on pictures",))]


@pytest.fixture
def inputs() -> list[RunInput]:
    """One run that a test may change."""
    return make_inputs()


@pytest.fixture(scope="session")
def rendered() -> str:
    """Its page."""
    return render_html(make_inputs())


@pytest.fixture(scope="session")
def rendered_nasty() -> str:
    """The page of a run in which every text that a file name, a category or an error can hold is hostile."""
    run = RunResult.from_disk(RUN)
    run.categories = {}
    run.argv = list(NASTY_TEXTS)
    run.run_id = NASTY_TEXTS[0]
    run.method.variant = NASTY_TEXTS[1]
    run.not_comparable = list(NASTY_TEXTS)
    run.method.config = dict.fromkeys(NASTY_TEXTS, NASTY_TEXTS[0])
    scores = {}
    for name in NASTY_TEXTS:
        run.set_category(name, CategoryResult(status="ok", metrics={"i_auroc": 0.5, "p_auroc": None}))
        run.categories[name].metrics_null_reasons["p_auroc"] = name
        run.categories[name].training = {name: [1.0, 0.5]}
        scores[name] = [
            SampleScore("test/good/0", "good", 0, 0.1),
            SampleScore(f"test/{name}/{name}\udcff.png", name, 1, 0.9),
        ]
    run.set_category("failed", CategoryResult(status="failed", error=NASTY_TEXTS[1]))
    return render_html([RunInput(run, scores, FakePictures(), NASTY_TEXTS)])
