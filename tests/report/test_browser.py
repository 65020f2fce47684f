"""The page as a browser shows it: drawn without errors and without the network, and it answers to hover and zoom."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from disttrain.report import build_page, read_runs, write_page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright comes with the extra [test]")
pytest.importorskip("plotly", reason="plotly comes with the extra [report]")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    "--no-first-run",
)
READY = "html[data-charts=ready]"
WIDTHS = (1280, 390)
AXIS = "(id) => document.getElementById(id)._fullLayout.xaxis"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")


@dataclass
class Opened:
    """A page, and what it did besides being shown."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(runs: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of one run and one of two."""
    folder = tmp_path_factory.mktemp("reports")
    found = {"one": (folder / "one.html", runs[:1]), "several": (folder / "several.html", runs[1:])}
    for file, shown in found.values():
        write_page(build_page(read_runs(shown)), file)
    return {name: file for name, (file, _) in found.items()}


def open_page(browser: Any, file: Path, width: int, **options: Any) -> Opened:
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    opened = Opened(page)
    page.on("console", lambda message: opened.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: opened.errors.append(str(error)))
    page.on("request", lambda request: opened.requests.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector(READY, timeout=60_000)
    return opened


@pytest.fixture(scope="module", params=WIDTHS)
def one(request: pytest.FixtureRequest, browser: Any, files: dict[str, Path]) -> Iterator[Opened]:
    opened = open_page(browser, files["one"], request.param)
    yield opened
    opened.page.close()


@pytest.fixture(scope="module")
def several(browser: Any, files: dict[str, Path]) -> Iterator[Opened]:
    opened = open_page(browser, files["several"], WIDTHS[0])
    yield opened
    opened.page.close()


def box_of(page: Any, chart: str) -> dict[str, float]:
    """Where the curves of a chart lie on the screen, scrolled into view."""
    area = page.locator(f"#{chart} .nsewdrag").first
    area.scroll_into_view_if_needed()
    return area.bounding_box()


def test_all_charts_are_drawn(one: Opened) -> None:
    sizes = one.page.eval_on_selector_all(
        ".plot", "(plots) => plots.map((plot) => plot.querySelector('svg.main-svg')?.getBoundingClientRect().toJSON())"
    )
    assert len(sizes) > 25
    assert all(size and size["width"] > 150 and size["height"] > 100 for size in sizes)
    empty = one.page.eval_on_selector_all(
        ".plot", "(plots) => plots.filter((p) => !p.querySelector('.trace, .hm image, .point')).map((p) => p.id)"
    )
    assert empty == []


def test_the_page_fits_its_window(one: Opened) -> None:
    inner, outer = one.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert inner <= outer


def test_hover_tells_the_values(one: Opened) -> None:
    box = box_of(one.page, "chart-0")
    one.page.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + 0.5 * box["height"])
    one.page.wait_for_selector("#chart-0 .hoverlayer .legend text", timeout=5000)
    text = " ".join(one.page.locator("#chart-0 .hoverlayer .legend").all_text_contents())
    assert "training" in text
    assert "validation" in text


def test_drag_zooms_and_the_switch_changes_the_axis(one: Opened) -> None:
    page = one.page
    whole = page.evaluate(AXIS, "chart-0")["range"]
    box = box_of(page, "chart-0")
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.8 * box["height"], steps=4)
    page.mouse.up()
    page.wait_for_function(f"(whole) => ({AXIS})('chart-0').range[0] > whole + 100", arg=whole[0], timeout=5000)
    low, high = page.evaluate(AXIS, "chart-0")["range"]
    assert whole[0] < low < high < whole[1]
    page.mouse.dblclick(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    page.wait_for_function(f"(whole) => ({AXIS})('chart-0').range[0] === whole", arg=whole[0], timeout=5000)
    ends = {"tokens": ("tokens", 1.8e9), "time": ("minutes since the start", 43.0), "step": ("step", 4000.0)}
    for axis, (title, largest) in ends.items():
        page.click(f"[data-axis={axis}]")
        for chart in ("chart-0", "chart-3"):
            seen = page.evaluate(AXIS, chart)
            assert seen["title"]["text"] == title
            assert seen["range"][0] < 0.01 * largest
            assert seen["range"][1] == pytest.approx(largest, rel=0.05)
        assert page.get_attribute(f"[data-axis={axis}]", "aria-pressed") == "true"


def test_a_click_hides_a_run_in_every_chart(several: Opened) -> None:
    hidden = """() => [...document.querySelectorAll('.plot')]
        .filter((plot) => plot.data.some((trace) => trace.visible === 'legendonly')).length"""
    several.page.click("[data-run='0']")
    assert several.page.evaluate(hidden) > 20
    several.page.click("[data-run='0']")
    assert several.page.evaluate(hidden) == 0


def test_the_scheme_changes_the_colours(several: Opened) -> None:
    shown = """(light) => {
        const layout = document.getElementById('chart-0')._fullLayout;
        const found = [getComputedStyle(document.body).backgroundColor, layout.font.color, layout.paper_bgcolor];
        return found.every((colour, index) => colour !== light?.[index]) && found;
    }"""
    several.page.emulate_media(color_scheme="light")
    light = several.page.evaluate(shown)
    several.page.emulate_media(color_scheme="dark")
    several.page.wait_for_function(shown, arg=light, timeout=10_000)


def test_no_errors_and_no_network(one: Opened) -> None:
    """After all that the tests above did."""
    assert_quiet(one)


def test_no_errors_and_no_network_with_several_runs(several: Opened) -> None:
    assert_quiet(several)


def assert_quiet(opened: Opened) -> None:
    assert opened.errors == []
    assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []
    assert opened.page.locator("[data-title*='loud']").count() == 0  # no button that sends charts to a cloud


def test_a_dark_phone_with_several_runs(browser: Any, files: dict[str, Path]) -> None:
    opened = open_page(browser, files["several"], WIDTHS[1], color_scheme="dark", has_touch=True, is_mobile=True)
    inner, outer = opened.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert inner <= outer
    assert opened.errors == []
    # A finger that moves over a chart must scroll the page.
    assert opened.page.evaluate("document.getElementById('chart-0')._fullLayout.dragmode") is False
    opened.page.close()
