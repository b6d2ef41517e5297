"""What a person does, in headless Chromium: look, watch, compare, search, chat, vote, start and stop a run."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from types import SimpleNamespace

from posttrain.config import DataConfig
from posttrain.data.preference_rows import prepare_pairs
from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.recipe.parsing import load_recipe
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
    pages += [f"data?{first}", f"lineage?{first}", "chat", "start", "start?recipe=grpo"]
    pages.append(f"rows?{first}&rows=stages/1-sft/data/rows.jsonl")
    for page in pages:
        browser.go(site.base + page)
        for width in (1280, 800, 400):
            browser.look(width, dark=width == 800)
            browser.wait_for("document.documentElement.scrollWidth <= innerWidth", 5)  # charts follow a moment later
        unlabelled = (
            "[...document.querySelectorAll('input:not([type=hidden]), select, textarea, button')]"
            ".filter(e => !e.labels?.length && !e.ariaLabel && !e.textContent.trim()).map(e => e.outerHTML)"
        )
        assert browser.run(unlabelled) == [] and browser.run("document.querySelectorAll('h1').length") == 1, page
        assert browser.run("document.querySelectorAll('table:not(:has(caption))').length") == 0, page
    browser.go(f"{site.base}data?{first}")
    shown = "(e => { showMarked(e, 'a <b> ⟦c⟧ d'); return e.innerHTML; })(document.querySelector('#inspected pre'))"
    assert browser.run(shown) == "<span>a &lt;b&gt; </span><mark>c</mark><span> d</span>"
    assert browser.console == []
    assert all(address.startswith((site.base, "data:")) for address in browser.requests)


def test_two_models_answer_and_a_vote_is_a_row_to_train_on(browser: Browser, site: SimpleNamespace) -> None:
    browser.go(f"{site.base}chat?model=tiny:llama&model=tiny:qwen2")
    for name, text in (("max_tokens", "12"), ("temperature", "1")):
        browser.fill(f"#chat [name={name}]", text)
    before = ""
    for number, (question, button) in enumerate((("Name a colour.", "0"), ("Another?", "1")), 1):
        browser.fill("#chat textarea", question)
        browser.press("Enter", 13, "\r")
        browser.wait_for("!document.querySelector('#vote').hidden", seconds=60)
        said = browser.run("[...document.querySelectorAll('.answers .text')].map(e => e.textContent)")
        browser.click(f"#vote button[value='{button}']")
        browser.wait_for(f"document.querySelector('#votes').textContent === '{number}'")
        row = json.loads((site.root / "votes.jsonl").read_text().splitlines()[-1])
        better = int(button)
        assert (row["chosen"], row["rejected"]) == (said[better], said[1 - better])
        assert (row["chosen_model"], row["rejected_model"])[:: 1 - 2 * better] == ("tiny:llama", "tiny:qwen2")
        if number == 2:  # the conversation continues with the better answer
            assert row["prompt"][1]["content"] == before
        before = said[better]
        assert row["prompt"][-1] == {"role": "user", "content": question}
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user"]
    read = prepare_pairs(DataConfig(source=str(site.root / "votes.jsonl")), tiny_tokenizer())
    assert read.stats["used"] == 2 and not read.stats["dropped"]
    browser.fill("#chat [name=second]", "")
    browser.fill("#chat [name=first]", "no-such-model.gguf")
    browser.fill("#chat textarea", "Hello")
    browser.press("Enter", 13, "\r")
    browser.wait_for("!document.querySelector('#problem').hidden")
    assert "no-such-model.gguf" in browser.run("document.querySelector('#problem').textContent")
    assert browser.run("document.querySelector('#chat textarea').value") == "Hello"  # nothing that was typed is lost
    browser.console.clear()  # the status 400 of that request


def test_a_recipe_is_started_from_its_form_watched_and_stopped(
    browser: Browser, site: SimpleNamespace, tmp_path: Path
) -> None:
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: mine\nmodel: {source: 'tiny:llama'}\n"
        f"stages: [{{method: sft, data: {{source: {tmp_path}/rows.jsonl}}, epochs: 100000}}]\n"
    )
    browser.go(f"{site.base}start?recipe={recipe}")
    browser.fill("#find", "optimizer.lr")
    browser.wait_for("[...document.querySelectorAll('.field')].filter(f => !f.hidden).length < 4")
    browser.fill("[name='stages.sft.optimizer.lr']", "fast")
    browser.click("#start button[type=submit]")
    browser.wait_for("document.querySelector('#problem').textContent.includes('stages.sft.optimizer.lr')")
    browser.console.clear()
    browser.fill("[name='stages.sft.optimizer.lr']", "0.0025")
    browser.run("document.querySelector('[name=name]').value = 'from-a-form'")
    browser.click("#start button[type=submit]")
    browser.wait_for("document.title.startsWith('from-a-form') && document.querySelector('h1 .status.running')")
    browser.wait_for(f"{LOSS}?.querySelector('canvas')", seconds=90)
    folder = site.root / "from-a-form"
    assert load_recipe(str(folder / "recipe.yaml")).stages[0].optimizer.lr == 0.0025
    browser.click("button[data-action='/stop']")
    browser.wait_for("document.querySelector('h1 .status').textContent === 'interrupted'", seconds=60)
    browser.wait_for("document.querySelector('#log').textContent.includes('stopped; resume with')")
    assert browser.run("document.querySelector('button[data-action]').textContent") == "Resume"
