"""What a person does, in headless Chromium: look, watch, compare, search."""

from __future__ import annotations

import fcntl
import json
from types import SimpleNamespace

from tests.ui.browser import Browser

LOSS = "document.querySelector('[data-chart=\"sft.loss\"]')"


def append_step(site: SimpleNamespace, step: int, loss: float) -> None:
    with (site.root / "watched" / "stages" / "1-sft" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": loss, "lr": 1e-4}) + "\n")


def test_a_run_is_found_and_watched(browser: Browser, site: SimpleNamespace) -> None:
    browser.go(site.base)
    assert browser.run("document.title") == "Runs: posttrain" and "token" not in browser.run("location.href")
    with (site.root / "watched" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (site.root / "watched" / "manifest.json").touch()  # a run that is resumed writes it
        browser.press("/", 191, "/")
        browser.run("document.activeElement.id === 'filter' || (() => { throw 'no focus'; })()")
        browser.fill("#filter", "sft watched")
        browser.wait_for("[...document.querySelectorAll('#runs tr')].filter(r => !r.hidden).length === 1")
        browser.run("document.querySelector('#runs tr:not([hidden]) a').click()")
        browser.wait_for(f"{LOSS} && {LOSS}.querySelector('canvas')")
        browser.wait_for("document.querySelector('h1 .status').textContent === 'running'")
        browser.run(f"{LOSS}.querySelector('.plot').chart.kept = true")
        append_step(site, 41, 0.125)
        browser.wait_for(f"{LOSS}.querySelector('output').textContent === '0.125'")
        points = browser.run(f"{LOSS}.querySelector('.plot').chart.spec.series[0].x.at(-1)")
        assert points == 41 and browser.run(f"{LOSS}.querySelector('.plot').chart.kept")  # drawn on, not made anew
    manifest = site.root / "watched" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"status": "stopped"}))
    browser.wait_for("document.querySelector('h1 .status').textContent === 'interrupted'")
    assert "interrupted" in browser.run("document.querySelector('#news').textContent")


def test_runs_are_compared_and_rollouts_searched(browser: Browser, site: SimpleNamespace) -> None:
    browser.go(site.base)
    for name in ("first", "broken"):
        browser.run(f"document.querySelector('input[aria-label=\"Compare {name}\"]').focus()")
        browser.press(" ", 32, " ")  # by keyboard
    browser.wait_for("document.querySelector('#chosen').textContent === '2 runs selected.'")
    browser.run("document.querySelector('form button').click()")
    browser.wait_for(f"document.title.startsWith('2 runs compared') && {LOSS}?.querySelector('canvas')")
    assert "stages.sft.optimizer.lr" in browser.run("document.querySelector('#settings').innerText")
    assert browser.run(f"{LOSS}.querySelector('.plot').chart.spec.series.map(s => s.name).sort().join()") == (
        "first,group/broken"
    )
    browser.go(f"{site.base}rows?run={site.root}/first")
    browser.fill("input[name=text]", "walrus")
    browser.press("Enter", 13, "\r")
    browser.wait_for("document.querySelectorAll('article').length && location.search.includes('walrus')")
    texts = browser.run("[...document.querySelectorAll('.completion')].map(e => e.textContent)")
    assert texts and all("WALRUS" in t for t in texts)


def test_pages_fit_and_are_labelled(browser: Browser, site: SimpleNamespace) -> None:
    """At three widths nothing scrolls sideways; every field has a label; every script and request is our own."""
    first, going = f"run={site.root}/first", f"run={site.root}/going"
    pages = ["", f"run?{first}", f"compare?{first}&{going}", f"rows?{first}"]
    pages.append(f"rows?{first}&rows=stages/1-sft/data/rows.jsonl")
    for page in pages:
        browser.go(site.base + page)
        for width in (1280, 800, 400):
            browser.look(width, dark=width == 800)
            assert browser.run("document.documentElement.scrollWidth - innerWidth") <= 0, (page, width)
        unlabelled = (
            "[...document.querySelectorAll('input:not([type=hidden]), select, textarea, button')]"
            ".filter(e => !e.labels?.length && !e.ariaLabel && !e.textContent.trim()).map(e => e.outerHTML)"
        )
        assert browser.run(unlabelled) == [] and browser.run("document.querySelectorAll('h1').length") == 1, page
        assert browser.run("document.querySelectorAll('table:not(:has(caption))').length") == 0, page
    assert browser.console == []
    assert all(address.startswith((site.base, "data:")) for address in browser.requests)
