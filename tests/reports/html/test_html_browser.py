"""The page in a real browser: it opens clean, and tables, filters, samples and the 3D view answer mouse and keys."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CANVAS = "document.querySelector('#cloud').toDataURL()"
PAINTED = (
    "document.querySelector('#cloud').dataset.painted > 100"
    " && document.querySelectorAll('#sample-tiles figure').length === 5"
)
CONTRAST = (Path(__file__).with_name("contrast.js")).read_text()


@pytest.fixture(scope="module")
def files(tmp_path_factory, rendered, rendered_nasty):
    folder = tmp_path_factory.mktemp("pages")
    for name, text in (("plain", rendered), ("nasty", rendered_nasty)):
        (folder / f"{name} täglich.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name} täglich.html" for name in ("plain", "nasty")}


@pytest.fixture
def page(browser, files):
    browser.open(files["plain"])
    yield browser
    assert browser.errors == []
    assert all(url.startswith(("file:", "data:")) for url in browser.requests)


def column(page, table, number):
    return page.evaluate(
        f"[...document.querySelectorAll('{table} tbody tr')].map(row => row.cells[{number}].textContent.trim())"
    )


def settled(page, expression):
    """The value once it has stopped changing: drawing waits for the next frame."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 30))))")
    return page.evaluate(expression)


def test_opening_shows_tables_curves_scores_and_samples(page):
    count = page.evaluate("['.chart', '#histogram rect', '.card'].map(s => document.querySelectorAll(s).length)")
    assert count[0] == 5 + 2 and count[1] > 5 and count[2] == 12
    assert page.evaluate("document.querySelectorAll('#curve-charts svg .mark').length") == 4
    assert page.evaluate("document.querySelector('#training').hidden") is False
    assert int(page.evaluate("document.documentElement.dataset.ready")) < 10_000


def test_sorting_by_a_column_and_back(page):
    before = column(page, ".run-table", 0)
    page.click(".run-table thead th:nth-child(2) button")
    falling = [float(text.split("\n")[0][:5]) for text in column(page, ".run-table", 1) if text[0].isdigit()]
    assert falling == sorted(falling, reverse=True)
    assert page.evaluate("document.querySelector('.run-table thead th:nth-child(2)').ariaSort") == "descending"
    page.click(".run-table thead th:nth-child(2) button")
    assert [float(t[:5]) for t in column(page, ".run-table", 1) if t[0].isdigit()] == falling[::-1]
    page.click(".run-table thead th:nth-child(2) button")
    assert column(page, ".run-table", 0) == before
    assert page.evaluate("document.querySelector('.run-table tfoot th').textContent") == "mean"


def test_another_published_row_gives_other_deviations(page):
    deltas = "[...document.querySelectorAll('.run-table .delta')].map(one => one.textContent).join(' ')"
    first = page.evaluate(deltas)
    page.choose("#reference-0", "1")
    second = page.evaluate(deltas)
    page.choose("#reference-0", "-1")
    assert first.strip() and first != second and page.evaluate(deltas).strip() == ""


def test_filters_threshold_and_order_of_the_gallery(page):
    names = "[...document.querySelectorAll('.card .name')].map(one => one.textContent)"
    scores = (
        "[...document.querySelectorAll('.card')]"
        ".map(one => Number(one.querySelectorAll('.card-text span')[1].textContent))"
    )
    assert page.evaluate(scores) == sorted(page.evaluate(scores), reverse=True)
    page.choose("#filter-defect", "hole")
    assert len(page.evaluate(names)) == 4 and all(name.startswith("hole/") for name in page.evaluate(names))
    page.choose("#filter-defect", "")
    page.choose("#sort", "name")
    assert page.evaluate(names) == sorted(page.evaluate(names))
    page.choose("#threshold", "0.45")
    for kind, good in (("FP", True), ("FN", False)):
        page.choose("#filter-verdict", kind)
        shown = page.evaluate(names)
        assert shown and all(name.startswith("good/") == good for name in shown)
        assert page.evaluate(f"document.querySelectorAll('.badge.{kind}').length") == len(shown)
        assert f"{len(shown)} of 12" in page.evaluate("document.querySelector('#gallery-count').textContent")
    # at the lowest threshold everything is called anomalous
    page.evaluate(
        "(() => { const s = document.querySelector('#threshold');"
        " s.value = s.min; s.dispatchEvent(new Event('input')); })()"
    )
    assert page.evaluate(names) == []
    page.choose("#filter-verdict", "FP")
    assert len(page.evaluate(names)) == 4
    page.click("#threshold-best")
    assert len(page.evaluate(names)) < 4


def test_pictures_are_drawn_when_they_come_into_view(page):
    page.evaluate("document.querySelector('#samples').scrollIntoView({behavior: 'instant'})")
    page.wait("document.querySelectorAll('.card canvas').length >= 2")
    assert page.evaluate("document.querySelector('.card img').complete")
    page.evaluate("window.scrollTo({top: 0, behavior: 'instant'})")
    page.resize(1400, 300)
    page.wait("document.querySelectorAll('.card canvas').length === 0")
    page.resize(1400, 900)


def test_a_sample_opens_turns_zooms_and_closes(page):
    page.click(".card")
    page.wait(PAINTED)
    title = page.evaluate("document.querySelector('#sample-title').textContent")
    views = [settled(page, CANVAS)]
    page.drag("#cloud", 80, 30)
    views.append(settled(page, CANVAS))
    for name in ("left", "up", "in", "out", "reset"):
        page.click(f"[data-view={name}]")
        views.append(settled(page, CANVAS))
    assert len(set(views)) == len(views) - 2  # zooming out undoes zooming in, reset undoes everything
    assert views[-1] == views[0] and views[5] == views[3]
    page.call("Input.dispatchMouseEvent", type="mouseWheel", x=1000, y=400, deltaX=0, deltaY=-240)
    page.wait(f"{CANVAS} !== {views[0]!r}")
    colours = set()
    for kind in ("map", "rgb", "mask", "plain"):
        page.choose("#cloud-colour", kind)
        colours.add(settled(page, CANVAS))
    assert len(colours) == 4
    page.click("#sample-next")
    page.wait(f"document.querySelector('#sample-title').textContent !== {title!r}")
    page.click("#sample-close")
    assert page.evaluate("document.querySelector('#sample').open") is False


def test_everything_works_from_the_keyboard(page):
    page.evaluate("document.querySelector('.card').focus()")
    page.press("ArrowRight")
    second = "document.activeElement === document.querySelectorAll('.card')[1]"
    assert page.evaluate(second)
    page.press("Enter")
    page.wait(PAINTED)
    title = page.evaluate("document.querySelector('#sample-title').textContent")
    page.press("ArrowLeft")
    page.wait(f"document.querySelector('#sample-title').textContent !== {title!r}")
    page.evaluate("document.querySelector('#cloud').focus()")
    before = settled(page, CANVAS)
    for key in ("ArrowLeft", "ArrowUp", "+"):
        page.press(key)
        after = settled(page, CANVAS)
        assert after != before
        before = after
    page.press("Escape")
    page.wait("!document.querySelector('#sample').open")
    assert page.evaluate(second)
    page.evaluate("document.querySelector('.chart svg').focus()")
    page.press("ArrowRight")
    assert "at 0.01" in page.evaluate("document.querySelector('.chart .readout').textContent")


def test_every_control_has_a_name(page):
    page.click(".card")
    page.wait(PAINTED)
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, input, canvas[tabindex], svg[role=img]')].filter(one =>"
        " !one.textContent.trim() && !one.getAttribute('aria-label') && !(one.labels && one.labels.length))"
        ".map(one => one.outerHTML.slice(0, 80))"
    )
    assert unnamed == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_texts_have_contrast_and_nothing_overflows(page, files, theme, width):
    page.open(files["plain"], width, 800, theme)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate(f"({CONTRAST.rstrip()})(4.5)") == []
    assert len(page.evaluate(f"({CONTRAST.rstrip()})(25)")) > 10  # no colours reach this: it does look at texts


def test_the_theme_can_be_chosen(page):
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.choose("#theme", "dark")
    dark = page.evaluate(colour)
    page.choose("#theme", "")
    assert light != dark and page.evaluate(colour) == light


def test_hostile_names_are_inert(browser, files, nasty_texts):
    browser.open(files["nasty"])
    assert browser.evaluate("document.querySelectorAll('main img[src=x], main script').length") == 0
    shown = browser.evaluate("[...document.querySelectorAll('#category option')].map(one => one.value)")
    assert shown == [*nasty_texts, "failed"]
    for name in shown:
        browser.choose("#category", name)
        assert browser.evaluate("document.querySelector('#category').value") == name
        if name != "failed":
            browser.click(".card")
            browser.wait(PAINTED)
            assert name in browser.evaluate("document.querySelector('#sample-title').textContent")
            browser.click("#sample-close")
    assert browser.errors == []
    # whatever got in by another way: the policy refuses what is not the page's own
    browser.evaluate(
        "(() => { const s = document.createElement('script');"
        " s.textContent = 'window.ran = 1'; document.body.append(s); })()"
    )
    for _ in range(100):
        settled(browser, "0")  # the complaint comes with the next messages
        if browser.errors:
            break
    assert browser.evaluate("window.ran") is None
    assert browser.errors and all("Content Security Policy" in error for error in browser.errors)
    assert all(url.startswith(("file:", "data:")) for url in browser.requests)
