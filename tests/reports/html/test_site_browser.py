"""The documentation site in a real browser, opened from the disk: no errors, nothing from the network, search works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FIND = """(() => {
  const field = document.querySelector("[data-md-component=search-query]");
  field.focus();
  field.value = "tolerance";
  field.dispatchEvent(new Event("keyup", {bubbles: true}));
})()"""
FOUND = "[...document.querySelectorAll('.md-search-result__link')].map(one => one.href)"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    return folder


def open_page(browser, file, width=1300, theme="light"):
    browser.errors.clear()
    browser.requests.clear()
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    browser.resize(width, 900)
    browser.call("Page.navigate", url=file.as_uri())
    browser.wait("document.readyState === 'complete' && document.querySelector('.md-content h1') !== null")


def test_every_page_opens_clean_at_any_width(browser, site):
    pages = [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]
    assert len(pages) > 15
    for page in pages:
        open_page(browser, page, width=390)
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), page.name
        assert browser.errors == [], page.name
        assert all(url.startswith(("file:", "data:", "blob:", "about:")) for url in browser.requests), page.name


@pytest.mark.parametrize("page", ["index.html", "methods/btf.html"])
def test_search_works_from_the_disk(browser, site, page):
    open_page(browser, site / page)
    browser.evaluate(FIND)
    browser.wait(f"{FOUND}.length > 2")
    assert any(address.endswith("ci.html?h=tolerance#tolerances") for address in browser.evaluate(FOUND))
    assert browser.errors == []


def test_colours_follow_the_system_until_chosen(browser, site):
    colour = "getComputedStyle(document.body).backgroundColor"
    seen = []
    for theme in ("light", "dark", "light"):
        open_page(browser, site / "index.html", theme=theme)
        seen.append(browser.evaluate(colour))
    assert seen[0] == seen[2] != seen[1]
