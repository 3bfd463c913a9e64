"""The report in a real browser: it loads in silence, the keyboard moves it, and it can be read in light and in dark."""

from __future__ import annotations

import importlib.util
import io
import shutil

import pytest
from report_runs import made_up, trained, watched

from newton_summary.report import reading, render, write
from newton_summary.report.page import render_log

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HERE = importlib.util.find_spec("selenium") is not None and CHROMIUM is not None and DRIVER is not None
pytestmark = pytest.mark.skipif(not HERE, reason="needs selenium, chromium and chromedriver: make browser")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a comparison of two optimizers."""
    folder = trained(tmp_path_factory.mktemp("runs") / "compare-small")
    return write(folder), reading.read(folder)


def show(browser, path, *, scheme="light", width=1280):
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    browser.get(path.as_uri())


def test_it_loads_without_a_word_and_without_a_request(browser, page):
    browser.get_log("browser")
    show(browser, page[0])
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert browser.title == "small: 2 optimizers side by side"


def test_the_script_is_the_only_one_that_may_run(browser, tmp_path):
    """The policy of the page stops what might have slipped through the escaping."""
    path = tmp_path / "page.html"
    path.write_text(render([made_up(3, 2)]).replace("<main", "<script>document.title = 'harm'</script><main"))
    browser.get_log("browser")
    show(browser, path)
    assert browser.title == "small: adam"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_the_keyboard_moves_the_slider_and_the_pictures_follow(browser, page):
    from selenium.webdriver.common.keys import Keys

    path, runs = page
    show(browser, path)
    for number, run in enumerate(runs):
        slider = browser.find_element("id", f"run{number}")
        output = browser.find_element("css selector", f"output[for=run{number}]")
        shown = f"#run{number}-moments > :not([hidden])"

        def cells(selector=shown):
            script = "return [...document.querySelectorAll(arguments[0])].map(cell => cell.innerText).filter(Boolean)"
            return browser.execute_script(script, f"{selector} .heatmap td")

        browser.execute_script("arguments[0].previousElementSibling.focus()", slider)
        slider.send_keys(Keys.HOME)
        assert browser.switch_to.active_element == slider
        seen = []
        for snapshot in run.snapshots:
            assert len(browser.find_elements("css selector", shown)) == 1
            assert output.text.startswith(f"{snapshot.epoch} of 6" if snapshot.step else "0: the first step")
            assert slider.get_attribute("aria-valuetext") == f"epoch {output.text}"
            seen.append(cells())
            slider.send_keys(Keys.ARROW_RIGHT)
        assert [len(numbers) for numbers in seen] == [16] * 5
        assert len({tuple(numbers) for numbers in seen}) == 5
        slider.send_keys(Keys.ARROW_LEFT)
        assert cells() == seen[-2]


def test_tab_reaches_everything_that_can_be_used(browser, page):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    show(browser, page[0])
    reached = []
    focused = "const e = document.activeElement; return [e.tagName, e.id, e.innerText || e.getAttribute('aria-label')]"
    for _ in range(36):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.append(browser.execute_script(focused))
    assert reached[0][2] == "Skip to the content"
    assert {"run0", "run1"} <= {key for _, key, _ in reached}
    assert {name for tag, _, name in reached if tag == "SUMMARY"} == {"Groups of parameters", "Figures of every epoch"}
    assert sum(tag == "A" for tag, _, _ in reached[:6]) == 6


def test_pictures_are_there(browser, page):
    show(browser, page[0])
    lines = browser.execute_script(
        "return [...document.querySelectorAll('.chart .line')].map(line => {"
        " const box = line.getBBox(), all = line.ownerSVGElement.viewBox.baseVal;"
        " return [box.width, box.height, box.x >= 0 && box.y >= 0 && box.x + box.width <= all.width"
        " && box.y + box.height <= all.height]; })"
    )
    assert len(lines) == 3 * 2 + 4  # curves of two runs, and the rates of four tensors of one of them
    assert all(inside for _, _, inside in lines)
    assert all(width > 250 and height > 50 for width, height, _ in lines[:4])  # against epochs
    colours = browser.execute_script(
        "return [...document.querySelectorAll('#run0-moments > :not([hidden]) .heatmap tbody td')]"
        ".map(cell => getComputedStyle(cell).backgroundColor)"
    )
    assert len(colours) == 16
    assert len(set(colours)) >= 5


READABLE = """
const pen = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
  .getContext("2d", {willReadFrequently: true});
const rgb = colour => {
  pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
  return [...pen.getImageData(0, 0, 1, 1).data];
};
const light = colour => {
  const [r, g, b] = rgb(colour).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = node => {
  const colour = getComputedStyle(node).backgroundColor;
  return rgb(colour)[3] === 255 || !node.parentElement ? colour : behind(node.parentElement);
};
const contrast = (a, b) => {
  const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
};
const found = [];
for (const details of document.querySelectorAll("details")) details.open = true;
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
  if (!text || ["SCRIPT", "STYLE", "title"].includes(node.tagName) || !node.getClientRects().length) continue;
  const style = getComputedStyle(node), colour = node instanceof SVGElement ? style.fill : style.color;
  found.push([text, contrast(colour, behind(node))]);
}
const drawn = [...document.querySelectorAll(".line, .swatch path")].map(
  line => ["line", contrast(getComputedStyle(line).stroke, behind(line))]);
return [found, drawn, light(behind(document.body))];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_in_dark(scheme, browser, page, tmp_path):
    """Contrasts of WCAG 2.1 level AA, also of the numbers in every shade of the heatmap."""
    made, log = tmp_path / "page.html", tmp_path / "log.html"
    made.write_text(render([made_up(12, 2)]))
    log.write_text(render_log(watched(12, 9)))
    levels = set()
    for path in (page[0], made, log):
        show(browser, path, scheme=scheme)
        texts, lines, brightness = browser.execute_script(READABLE)
        assert (brightness > 0.9) if scheme == "light" else (brightness < 0.02)
        assert len(texts) > 150
        assert min(texts, key=lambda pair: pair[1])[1] >= 4.5, min(texts, key=lambda pair: pair[1])
        assert min(contrast for _, contrast in lines) >= 3
        levels |= {round(contrast) for _, contrast in texts}
    assert len(levels) > 5  # it does look at different shades
    from PIL import Image

    picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("L")
    pixels = sorted(picture.resize((64, 45)).tobytes())
    assert (pixels[len(pixels) // 2] > 200) == (scheme == "light")


def test_a_narrow_screen_scrolls_tables_not_the_page(browser, page, tmp_path):
    made, log = tmp_path / "page.html", tmp_path / "log.html"
    made.write_text(render([made_up(60, 2)]))
    log.write_text(render_log(watched(60, 3)))
    for path in (page[0], made, log):
        show(browser, path, width=380)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 380
    letters = "return document.querySelector('.factors text').getBoundingClientRect().height"
    assert browser.execute_script(letters) > 9  # of the last page


def test_a_monitors_page_shows_its_last_measurement_and_the_others_by_the_slider(browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    path = tmp_path / "log.html"
    path.write_text(render_log(watched(5, 3)))
    browser.get_log("browser")
    show(browser, path)
    assert browser.get_log("browser") == []
    slider = browser.find_element("id", "measured")
    output = browser.find_element("css selector", "output[for=measured]")
    assert (output.text, slider.get_attribute("aria-valuetext")) == ("21", "step 21")
    slider.send_keys(Keys.HOME)
    assert output.text == "1"
    assert len(browser.find_elements("css selector", "#measured-moments > :not([hidden])")) == 1
    fills = {
        kind: browser.find_element("css selector", f"#advice .{kind} circle").value_of_css_property("fill")
        for kind in ("telling", "quiet")
    }
    red, green, blue = map(int, fills["quiet"].removeprefix("rgb(").rstrip(")").split(", "))
    assert max(red, green, blue) - min(red, green, blue) < 20  # grey
    assert fills["telling"] != fills["quiet"]
