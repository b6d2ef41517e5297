"use strict";
// Read-out of the curves: pointer or arrow keys pick the nearest drawn step.
for (const plot of document.querySelectorAll(".plot[data-points]")) {
  const points = JSON.parse(plot.dataset.points);
  const [x0, x1, y0, y1] = JSON.parse(plot.dataset.domain);
  const cursor = plot.querySelector(".cursor"), dot = plot.querySelector(".dot");
  const out = plot.closest("figure").querySelector("output"), rest = out.textContent;
  let at = points.length - 1;
  const nice = v => Math.abs(v) < 1e-3 && v !== 0 ? v.toExponential(2) : Number(v.toPrecision(4)).toLocaleString("en");
  const show = i => {
    at = Math.max(0, Math.min(points.length - 1, i));
    const [step, raw, even] = points[at];
    const left = 100 * (step - x0) / (x1 - x0) + "%";
    cursor.style.left = dot.style.left = left;
    dot.style.top = 100 * (1 - (raw - y0) / (y1 - y0)) + "%";
    plot.classList.add("read");
    out.textContent = `step ${step.toLocaleString("en")}: ${nice(raw)}` + (even === undefined ? "" : `, smoothed ${nice(even)}`);
  };
  const hide = () => { plot.classList.remove("read"); out.textContent = rest; };
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const step = x0 + (x1 - x0) * (event.clientX - box.left) / box.width;
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < step) low = middle; else high = middle;
    }
    show(step - points[low][0] < points[high][0] - step ? low : high);
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", event => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    show(plot.classList.contains("read") ? at + move : at);
  });
}
for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const source = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    } catch {  // no clipboard here: select it, so that a keystroke copies
      getSelection().selectAllChildren(source);
    }
  });
}
addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });
