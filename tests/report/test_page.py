"""The page itself, read back with a parser and looked at in headless Chromium."""

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from posttrain.core.errors import CheckpointError
from posttrain.report import build_report, summary_table

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed")
VOID = {"meta", "link", "img", "br", "input", "hr", "path"}


class Page(HTMLParser):
    """Elements as (tag, attributes), and the text of each element that has data-metric."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.metrics: dict[str, str] = {}
        self.values: dict[str, str] = {}
        self.text = ""
        self._open: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.elements.append((tag, a))
        name = a.get("data-metric")
        if name:
            self.metrics[name], self.values[name] = "", a.get("data-value", "")
        if tag not in VOID:
            self._open.append((tag, name))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if not any(tag in ("script", "style") for tag, _ in self._open):
            self.text += data
        for _, name in self._open:
            if name:
                self.metrics[name] += data

    def count(self, tag, **wanted):
        return sum(t == tag and all(v in (a.get(k.rstrip("_")) or "").split() for k, v in wanted.items())
                   for t, a in self.elements)  # fmt: skip


def browse(page: Path, profile: Path, *flags: str, size="1280,1400") -> tuple[str, list[str]]:
    """The DOM after scripts ran, and the lines of the console."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={profile}", f"--window-size={size}", *flags, "--dump-dom", page.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "</html>" in done.stdout, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Uncaught" in line]


def check_numbers(page: Page, folder: Path):
    """Every number of the before/after table is the run's own."""
    for entry in json.loads((folder / "evaluations" / "comparison.json").read_text()):
        task, digits = entry["task"], 3 if entry["test"] == "McNemar exact" else 2
        expected = {
            f"{side}.{key}": entry[side][key] for side in ("before", "after") for key in ("value", "low", "high")
        }
        expected |= {
            "difference": entry["difference"],
            "difference.low": entry["low"],
            "difference.high": entry["high"],
        }
        for name, number in expected.items():
            shown = page.metrics[f"{task}.{name}"].replace("−", "-").replace(",", "")
            assert float(shown) == pytest.approx(number, abs=0.5001 * 10**-digits), (task, name)
            assert float(page.values[f"{task}.{name}"]) == number
        assert int(page.metrics[f"{task}.n"]) == entry["n"]
        assert float(page.values[f"{task}.p_value"]) == entry["p_value"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert page.metrics["run.status"] == manifest["status"]
    for stage in manifest["stages"]:
        for key in ("steps", "tokens", "skipped_steps", "seconds", "peak_memory_mb"):
            assert float(page.values[f"stage.{stage['name']}.{key}"]) == stage[key]
    for data in manifest["data"]:
        for key in ("rows", "used", "truncated", "loss_tokens"):
            assert page.metrics[f"data.{data['stage']}.{key}"].replace(",", "") == str(data[key])
        for reason, count in data["dropped"].items():
            assert page.metrics[f"data.{data['stage']}.dropped.{reason}"] == str(count)
        for kind in ("unused", "ignored"):
            for name, count in data[kind].items():
                assert page.metrics[f"data.{data['stage']}.{kind}.{name}"] == f"{count:,}"


def check_offline(page: Page, evil: str):
    """Nothing is loaded or linked from anywhere; what looks like it in the data is text."""
    for tag, a in page.elements:
        assert tag not in ("img", "link", "iframe", "object", "embed", "audio", "video", "use", "image", "base"), a
        for key in ("src", "href", "srcset", "action", "data", "xlink:href"):
            assert (a.get(key) or "#").startswith("#"), (tag, a)
        assert not [k for k in a if k.startswith("on")], a
        assert "url(" not in (a.get("style") or "")
    assert page.count("script") == 1 and page.count("style") == 1
    assert evil in page.text


def test_complete_run(make_run, evil):
    folder = make_run()
    path = build_report(folder)
    assert path == folder / "report.html" and not list(folder.glob("*.tmp"))
    text = path.read_text(encoding="utf-8")
    assert "url(" not in re.search(r"<style>(.*?)</style>", text, re.S)[1] and "@import" not in text
    page = Page(text)
    check_numbers(page, folder)
    check_offline(page, evil)
    said = page.text
    for words in ("Supervised fine-tuning on 2,000 rows for 125 steps", "wrong → right", "too long: 3,012 tokens",
                  "posttrain chat runs/quickstart/model", "posttrain run runs/quickstart/recipe.yaml", "Example CPU",
                  "cd" * 32, "lr: 5.0e-04   # peak", "2 steps skipped"):  # fmt: skip
        assert words in said, words
    assert page.metrics["sentiment.items.gained"] == "64" and page.metrics["sentiment.items.lost"] == "10"
    changes = [a["class"].split()[1] for t, a in page.elements if t == "article"]
    assert changes[:6] == ["gained"] * 3 + ["lost"] * 3
    # Loss tokens are marked, context is not: 2 pieces of the first example, 1 of the second, and the legend.
    assert page.count("mark") == 4
    # Accessible: one h1, a caption in every table, a language, labels on the curves.
    assert page.count("h1") == 1 and page.count("table") == page.count("caption")
    assert ("html", {"lang": "en"}) in page.elements
    plots = [a for t, a in page.elements if a.get("class") == "plot"]
    assert len(plots) == 5 and all(a["role"] == "img" and "over 12" in a["aria-label"] for a in plots)
    # Two skipped steps, marked on the three curves of what a step computes.
    assert [json.loads(a["data-plot"]).get("marks") for a in plots] == [[40, 41]] * 3 + [None] * 2
    # What never changes is one line, with its value.
    assert page.values["stage.sft.tokens.last"] == "1800.0" and "Constant: Time 1.6, Tokens 1,800, " in said
    # The charting library comes with the page, its licence too.
    assert "uPlot 1.6.32" in text and "Permission is hereby granted, free of charge" in text


def test_curve_points_are_the_metrics(make_run):
    folder = make_run()
    page = Page(build_report(folder).read_text(encoding="utf-8"))
    lines = map(json.loads, (folder / "stages" / "1-sft" / "metrics.jsonl").read_text().splitlines())
    expected = [(r["step"], r["loss"]) for r in lines if not r["skipped"]]
    plot = next(a for t, a in page.elements if a.get("class") == "plot")
    (series,) = json.loads(plot["data-plot"])["series"]
    drawn = list(zip(series["x"], series["y"], strict=True))
    assert series["smooth"]
    assert [s for s, _ in drawn] == [s for s, _ in expected] and len(drawn) == 123
    assert [y for _, y in drawn] == pytest.approx([y for _, y in expected], rel=1e-4)


def test_long_run_is_thinned_and_says_so(make_run):
    folder = make_run(steps=20_000)
    path = build_report(folder)
    assert path.stat().st_size < 600_000
    text = Page(path.read_text(encoding="utf-8")).text
    assert "Each point is the mean of 40 steps; the band spans their lowest and highest value." in text


def test_a_finished_run_without_evaluations_says_how_to_get_them(make_run):
    folder = make_run()
    shutil.rmtree(folder / "evaluations")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text[: text.index("evaluate:")])
    page = Page(build_report(folder).read_text(encoding="utf-8"))
    for words in ("This run's recipe has no evaluations", "add tasks under evaluate: to the recipe",
                  "posttrain evaluate runs/quickstart -r RECIPE"):  # fmt: skip
        assert words in page.text, words
    assert "yet" not in page.text[page.text.index("Before and after") : page.text.index("Curves", 300)]


def test_answers_of_pairs_are_labelled(make_run):
    """What a preference method compares is no text that the model learns to write."""
    folder = make_run()
    manifest = json.loads((folder / "manifest.json").read_text())
    (data,) = manifest["data"]
    for labels, legend in (
        (("chosen", "rejected"), "training makes the chosen one more likely"),
        (("undesirable", "desirable"), "training makes desirable ones more likely"),
    ):
        for example, label in zip(data["examples"], labels, strict=True):
            example["label"] = label
        (folder / "manifest.json").write_text(json.dumps(manifest))
        page = Page(build_report(folder).read_text(encoding="utf-8"))
        assert legend in page.text and "trained to produce them" not in page.text
        for label in labels:
            assert f"{label.capitalize()} answer" in page.text and page.count("p", class_=label) == 1


def test_run_that_is_not_finished(make_run, tmp_path):
    folder = make_run(status="running")
    shutil.rmtree(folder / "evaluations" / "after")
    (folder / "evaluations" / "comparison.json").unlink()
    shutil.rmtree(folder / "model")
    with (folder / "stages" / "1-sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 126, "lo')  # killed while writing
    page = Page(build_report(folder).read_text(encoding="utf-8"))
    assert page.metrics["sentiment.before.value"] == "0.770" and "sentiment.after.value" not in page.metrics
    for words in ("still running, or was killed", "has not been measured", "1 line(s) can't be read", "not there yet"):
        assert words in page.text, words
    empty = tmp_path / "empty"
    empty.mkdir()
    page = Page(build_report(empty).read_text(encoding="utf-8"))
    assert page.metrics["run.status"] == "unknown"
    for words in (
        "no manifest.json",
        "no recipe.yaml",
        "There are no evaluations in this folder",
        "no stage has started",
    ):
        assert words in page.text, words
    with pytest.raises(CheckpointError, match="expected a run folder"):
        build_report(tmp_path / "nowhere")


@pytest.mark.parametrize("status", ["running", "done"])
def test_a_stage_that_makes_data_has_no_curves_and_one_that_trains_waits_for_its_first_step(make_run, status):
    folder = make_run()
    manifest = json.loads((folder / "manifest.json").read_text())
    verdicts = {"name": "verdicts", "method": "feedback", "makes": "data", "status": status}
    trained = {"name": "again", "method": "sft", "makes": "model", "status": "running"}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"stages": [*manifest["stages"], verdicts, trained]}))
    for name in ("2-verdicts", "3-again"):
        (folder / "stages" / name).mkdir()
    page = build_report(folder).read_text(encoding="utf-8")
    curves = page[page.index('id="curves"') :]
    curves = curves[: curves.index("</section>")]
    assert re.findall("<h3>(.*)</h3>", curves) == ["Stage 1: sft", "Stage 3: again"]
    assert curves.count("No step has been written yet.") == 1 and "verdicts" not in curves
    # A run that makes data alone has no such section, nor a link to it.
    (folder / "manifest.json").write_text(json.dumps(manifest | {"stages": [verdicts]}))
    for name in ("1-sft", "3-again"):
        shutil.rmtree(folder / "stages" / name)
    page = build_report(folder).read_text(encoding="utf-8")
    assert "Curves" not in page and "#curves" not in page and "No step" not in page


def test_a_run_that_failed_says_why(make_run):
    folder = make_run(status="failed")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"error": "the disk is full <b>"}))
    assert Page(build_report(folder).read_text(encoding="utf-8")).metrics["run.error"] == "the disk is full <b>"


@pytest.mark.parametrize(
    "gone", ["manifest.json", "recipe.yaml", "stages", "evaluations", "evaluations/before",
             "evaluations/comparison.json", "stages/1-sft/timings.jsonl", "stages/1-sft/metrics.jsonl"],
)  # fmt: skip
def test_any_part_may_be_missing(make_run, gone):
    folder = make_run()
    (shutil.rmtree if (folder / gone).is_dir() else Path.unlink)(folder / gone)
    assert "</html>" in build_report(folder).read_text(encoding="utf-8")
    assert summary_table(folder).columns


@pytest.mark.parametrize(
    "name", ["manifest.json", "recipe.yaml", "evaluations/comparison.json", "evaluations/after/language.json"]
)
def test_any_file_may_be_damaged(make_run, name):
    folder = make_run()
    (folder / name).write_text("{]")
    assert f"{Path(name).name} can't be read" in Page(build_report(folder).read_text(encoding="utf-8")).text


def test_terminal_table(make_run):
    from rich.console import Console

    folder = make_run()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(folder))
    shown = console.export_text()
    sentiment, language = json.loads((folder / "evaluations" / "comparison.json").read_text())
    for number in (sentiment["before"]["value"], sentiment["after"]["high"], sentiment["low"]):
        assert f"{number:.3f}" in shown
    assert "< 0.0001" in shown.replace("\N{NO-BREAK SPACE}", " ")
    value, low = language["before"]["value"], language["before"]["low"]
    assert f"{value:.2f} " in shown and f"[{low:.2f}, " in shown and "400 items" in shown


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
               for w, c in zip((0.2126, 0.7152, 0.0722), channels, strict=True))  # fmt: skip


@pytest.mark.parametrize("palette", [0, 1], ids=["light", "dark"])
def test_contrast(palette):
    """Text reaches 4.5 to 1 on each ground it is set on (WCAG 2.2, 1.4.3)."""
    style = (resources.files("posttrain.report") / "page" / "style.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", style, re.S)[palette]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
    pairs = [
        (t, g)
        for t in ("ink", "muted", "accent", "good", "bad", "key", "string", "literal")
        for g in ("paper", "raised")
    ]
    for text, ground in [*pairs, ("ink", "mark")]:
        light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


@needs_browser
def test_in_chromium(make_run, evil, tmp_path):
    folder = make_run()
    shot = tmp_path / "report.png"
    dom, console = browse(build_report(folder), tmp_path / "profile", f"--screenshot={shot}")
    assert console == []
    page = Page(dom)
    check_numbers(page, folder)
    check_offline(page, evil)
    # Five curves, drawn. The copy buttons show that the script ran.
    assert page.count("canvas") == 5
    buttons = [a for t, a in page.elements if t == "button" and a["class"] == "copy"]
    assert len(buttons) == 4 and not any("hidden" in a for a in buttons)
    assert shot.stat().st_size > 10_000


PROBE = """<script>
const loss = document.querySelector("[data-chart='sft.loss'] .plot");
const out = loss.closest("figure").querySelector("output");
const over = () => loss.querySelector(".u-over"), values = () => loss.chart.u.data.map(c => Array.from(c));
const point = (type, step) => {
  const box = over().getBoundingClientRect(), at = { bubbles: true, cancelable: true, button: 0, movementX: 9 };
  const clientX = box.left + loss.chart.u.valToPos(step, "x"), clientY = box.top + box.height / 2;
  (type === "mouseup" ? document : over()).dispatchEvent(new MouseEvent(type, { ...at, clientX, clientY }));
};
const range = chart => [chart.u.scales.x.min, chart.u.scales.x.max], wait = ms => new Promise(r => setTimeout(r, ms));
(async () => {
  const seen = { rest: out.textContent };
  await wait(200);
  point("mouseenter", 60); point("mousemove", 60); await wait(50);
  seen.hover = out.textContent;
  seen.other = document.querySelector("[data-chart='sft.lr'] output").textContent;
  loss.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" })); await wait(50);
  seen.key = out.textContent;
  loss.dispatchEvent(new FocusEvent("blur")); await wait(50);
  seen.left = out.textContent;
  seen.smoothed = values()[2];
  const slider = document.querySelector("#smoothing");
  slider.value = 0; slider.dispatchEvent(new Event("input", { bubbles: true })); await wait(50);
  seen.columns = values().length;
  slider.value = 0.9; slider.dispatchEvent(new Event("input", { bubbles: true })); await wait(50);
  seen.strong = values()[2];
  const log = document.querySelector("[data-chart='sft.loss'] button.log");
  log.click(); await wait(50);
  seen.log = [loss.chart.u.scales.y.distr, log.getAttribute("aria-pressed")];
  log.click(); await wait(50);
  seen.linear = loss.chart.u.scales.y.distr;
  point("mouseenter", 20); point("mousemove", 20); point("mousedown", 20); point("mousemove", 60); point("mouseup", 60);
  await wait(100);
  const lr = document.querySelector("[data-chart='sft.lr'] .plot").chart;
  seen.zoom = [range(loss.chart), range(lr)];
  over().dispatchEvent(new MouseEvent("dblclick", { bubbles: true, button: 0 })); await wait(100);
  seen.reset = [range(loss.chart), range(lr)];
  document.body.dataset.seen = JSON.stringify(seen);
  document.body.dataset.spill = document.documentElement.scrollWidth - innerWidth;
  throw new Error("probe");
})();
</script></body>"""


def ema(values, weight):
    """The moving average without a bias towards its first value, by a slow sum over all values before."""
    out = []
    for i in range(len(values)):
        shares = [weight ** (i - j) for j in range(i + 1)]
        out.append(sum(s * v for s, v in zip(shares, values, strict=False)) / sum(shares))
    return out


@needs_browser
def test_charts_answer_narrow_screen_and_that_console_errors_are_seen(make_run, tmp_path):
    """A copy of the page with a script of our own: its policy forbids that script until it is taken out."""
    folder = make_run()
    text = build_report(folder).read_text(encoding="utf-8").replace("</body>", PROBE)
    copy = tmp_path / "copy.html"
    copy.write_text(text, encoding="utf-8")
    dom, console = browse(copy, tmp_path / "a")
    assert "data-seen" not in dom and any("Content Security Policy" in line for line in console)
    copy.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", text), encoding="utf-8")
    dom, console = browse(copy, tmp_path / "b", "--virtual-time-budget=5000", size="500,900")
    assert any("probe" in line for line in console)
    body = next(a for t, a in Page(dom).elements if t == "body")
    seen = json.loads(body["data-seen"])
    lines = [json.loads(x) for x in (folder / "stages" / "1-sft" / "metrics.jsonl").read_text().splitlines()]
    kept = [r["step"] for r in lines if not r["skipped"]]
    values = [r["loss"] for r in lines if not r["skipped"]]
    for said, step in ((seen["hover"], 60), (seen["key"], 61)):
        found = re.fullmatch(rf"step {step}: (\S+), smoothed (\S+)", said)
        assert found and float(found[1]) == pytest.approx(lines[step - 1]["loss"], rel=1e-3)
        assert float(found[2]) == pytest.approx(ema(values, 0.6)[kept.index(step)], rel=1e-3)
    assert seen["other"].startswith("step 60: ")  # all charts of a stage are read at one step
    assert seen["left"] == seen["rest"] and float(seen["rest"]) == pytest.approx(lines[-1]["loss"], rel=1e-3)
    assert seen["smoothed"] == pytest.approx(ema(values, 0.6), rel=1e-4)
    assert seen["columns"] == 2 and seen["strong"] == pytest.approx(ema(values, 0.9), rel=1e-4)
    assert seen["log"] == [3, "true"] and seen["linear"] != 3
    for low, high in seen["zoom"]:
        assert (low, high) == pytest.approx((20, 60), abs=1.5)
    assert seen["reset"] == [[1, 125], [1, 125]]
    assert int(body["data-spill"]) <= 0  # no sideways scrolling
