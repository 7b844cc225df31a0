"""gpt2 report: one HTML file, whole and safe, opened in Chromium."""

import json
import os
import re

import pytest
from browser import CHROMIUM, Browser
from made_runs import make, row, rows
from runs import run

from engine.comparison import page, records, references

EVIL = "</script><script>document.documentElement.dataset.error='ran'</script><b id=bold>"


def built(*paths, curves=()) -> str:
    found = records.read_all(tuple(map(str, paths)), "report")
    return page.page(found, [references.load(name, "report") for name in curves])


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture(autouse=True)
def facts(monkeypatch):
    """What gpt2 doctor prints takes seconds, and is tested elsewhere."""
    if "with_doctor" not in os.environ.get("PYTEST_CURRENT_TEST", ""):
        monkeypatch.setattr(page, "doctor_facts", lambda record: "torch <2>")


def test_the_command_writes_one_file_that_names_no_other(tmp_path, capfd):
    out = tmp_path / "out.html"
    assert run("report", str(make(tmp_path / "run", rows(20))), "--out", str(out)) == 0
    assert capfd.readouterr().out == f"{out}\n"
    text = out.read_text()
    assert not re.search(r"""(src|href|action)=["'](?!data:)|@import|url\(""", text.replace("https://github.com", ""))
    assert "Leon Sorokin" in (page.ASSETS / "uPlot.LICENSE").read_text()
    assert "{{" not in text.replace(page.ASSETS.joinpath("uPlot.iife.min.js").read_text(), "")
    assert run("report", str(tmp_path / "run"), "--out", str(tmp_path)) == 2
    assert "report: --out must be a file that can be written" in capfd.readouterr().err


def test_our_part_of_the_page_stays_small():
    lines = sum(len((page.ASSETS / f"report.{kind}").read_text().splitlines()) for kind in ("html", "css", "js"))
    assert lines <= 250


def test_facts_with_doctor_are_those_of_this_machine(tmp_path):
    assert "ops at head_dim 16, fp32" in built(make(tmp_path / "run", rows(2)))


def test_rows_are_thinned_by_means_and_what_is_no_number_is_null(tmp_path):
    lines = [row(step, loss=float(step % 2), lr=1e-3) for step in range(5000)]
    lines[1]["loss"] = None
    lines += [b"{broken\n", row(5000, val_loss=1.0)]
    (record,) = records.read_all((str(make(tmp_path / "run", lines)),), "report")
    often, seldom = page.tables(record)
    assert len(often["loss"]) == len(often["tokens"]) == 1667
    assert often["loss"][0] == 0  # of steps 0 and 2: step 1 diverged
    assert often["loss"][1] == pytest.approx(2 / 3, abs=1e-6)
    assert often["tokens"][0] == 1000
    assert often["hours"] == [None] * 1667
    assert seldom["val_loss"] == [1]
    text = built(tmp_path / "run")
    assert "1 damaged line of metrics.jsonl is left out" in text
    assert "a point is the mean of up to 3 rows" in text


def test_samples_are_read_by_their_headings(tmp_path):
    path = make(tmp_path / "run", rows(2))
    assert page.read_samples(str(path)) == ([], None)
    text = "".join(f"=== step {step} ===\nof {step}\n=== step x ===\n\n" for step in range(500))
    (path / "samples.txt").write_bytes(text.encode() + b"=== step 500 ===\n\xff" + 9000 * b"a")
    found, note = page.read_samples(str(path))
    assert note is None
    assert len(found) == page.MOST_SAMPLES
    assert found[0] == (0, "of 0\n=== step x ===")
    assert found[-1] == (500, "\ufffd" + 7999 * "a")
    (path / "samples.txt").unlink()
    (path / "samples.txt").mkdir()
    assert "samples.txt cannot be read: it is a directory" in page.read_samples(str(path))[1]


# ---- In Chromium --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed here, which opens the page")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """A function that writes the page of runs and opens it; nothing may go wrong in it until the test ends."""

    def opened(*paths, **options) -> Browser:
        path = tmp_path / "report.html"
        path.write_bytes(built(*paths, curves=options.pop("curves", ())).encode(errors="replace"))
        browser.open(path, **options)
        return browser

    browser.problems.clear()
    yield opened
    assert not browser.problems
    assert browser.value("document.documentElement.dataset.error") is None


def points(browser: Browser) -> tuple[int, int]:
    """Points and charts that were drawn."""
    return tuple(browser.value("['points', 'charts'].map(name => +document.documentElement.dataset[name])"))


def test_a_run_is_drawn_zoomed_and_read_off(opened, tmp_path):
    browser = opened(make(tmp_path / "run", rows(100)))
    # Raw and smoothed loss, learning rate, gradient norm and speed of 100 steps; 11 validations.
    assert points(browser) == (5 * 100 + 11, 4)
    image = "c.getContext('2d').getImageData(0, 0, c.width, c.height)"
    inked = f"[...document.querySelectorAll('canvas')].map(c => {image}.data.some(v => v)).join()"
    assert browser.value(inked) == "true,true,true,true"
    place = (
        "(({x, y, width, height}) => [x, y, width, height])(document.querySelector('.u-over').getBoundingClientRect())"
    )
    left, top, width, height = browser.value(place)
    at = top + height / 2
    legend = "[...document.querySelectorAll('.tall .u-series:not(.raw) .u-value')].map(e => e.textContent).join()"
    browser.mouse("mouseMoved", left + 5, at)
    browser.mouse("mouseMoved", left + 0.5 * width, at)
    tokens, train, val = browser.value(legend).split(",")
    assert tokens == "50K"
    assert float(train) == pytest.approx(2.0, abs=0.1)
    assert float(val) == pytest.approx(2.1 + 1 / 51, abs=1e-4)
    browser.mouse("mousePressed", left + 0.5 * width, at)
    browser.mouse("mouseMoved", left + 0.6 * width, at)
    browser.mouse("mouseMoved", left + 0.75 * width, at)
    browser.mouse("mouseReleased", left + 0.75 * width, at)
    assert browser.value("document.querySelector('#reset').hidden") is False
    browser.mouse("mouseMoved", left + 0.4 * width, at)
    assert browser.value(legend).split(",")[0] == "60K"  # 50 + 0.4 * 25
    for axis, unit in (("steps", "step"), ("hours", "seconds")):
        browser.value(f"document.querySelector('[value={axis}]').click()")
        assert browser.value("document.querySelector('#reset').hidden") is True
        assert browser.value("document.querySelector('.u-legend .u-label').textContent") == unit
        assert points(browser) == (511, 4)
    browser.value("(() => { const e = document.querySelector('#smooth'); e.value = 1; e.oninput({target: e}) })()")
    assert points(browser) == (411, 4)


def test_nothing_of_a_run_breaks_the_page_and_it_fits_a_phone(opened, tmp_path):
    name = os.fsdecode(b"<b id=bold>\xff&amp;\"'" + b"x" * 100)
    evil = make(tmp_path / name, [*rows(30)[:20], row(20, loss=None, lr=1e-3, val_loss=None)], data=EVIL, prompt=EVIL)
    (evil / "samples.txt").write_text(f"=== step 0 ===\n{EVIL}\u2028\n\n=== step 10 ===\n\0later{EVIL}")
    other = make(tmp_path / "other", rows(100, every=50), digest="d2")
    browser = opened(evil, other, width=390, height=800, scheme="dark")
    assert browser.value("document.querySelector('#bold')") is None
    assert browser.value("document.documentElement.scrollWidth") == 390
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 25)"
    assert points(browser) == (5 * 20 + 1 + 2 + 5 * 100 + 3, 5)
    assert "have different data" in browser.value("document.body.innerText")
    assert EVIL in browser.value("document.querySelector('.cards pre').textContent")
    assert browser.value("document.querySelectorAll('#chips button').length") == 2
    browser.value("document.querySelector('#chips button').click()")
    assert points(browser) == (5 * 100 + 3, 5)
    browser.scheme("light")
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(250, 249, 246)"


def test_runs_with_few_rows_or_none_are_drawn_as_far_as_they_go(opened, tmp_path):
    browser = opened(make(tmp_path / "none", []))
    assert points(browser) == (0, 0)
    assert "has no rows yet" in browser.value("document.body.innerText")
    browser = opened(make(tmp_path / "one", [row(0, val_loss=5.5)]))
    assert points(browser) == (1, 1)
    browser.value("document.querySelector('[value=hours]').click()")
    assert points(browser) == (0, 0)
    scored = [row(0, loss=3.0, val_loss=3.0, hellaswag_acc_norm=0.25), row(9, val_loss=2.5, hellaswag_acc_norm=0.5)]
    browser = opened(make(tmp_path / "scored", scored, tokenizer="gpt2"), curves=("gpt2-124m", "llm.c"))
    assert points(browser) == (1 + 2 + 2 + 2 + 6, 2)
    assert "HellaSwag, by length" in browser.value("document.querySelector('#charts').innerText")
    assert "50.00%" in browser.value("document.querySelector('.tiles').innerText")
