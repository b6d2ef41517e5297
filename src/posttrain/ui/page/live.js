"use strict";
// Keep a page up to date: ask for it again while somebody looks, and put in what has changed. Charts keep their zoom.
const live = document.querySelector("#live"), news = document.querySelector("#news");

const outputOf = figure => figure.querySelector("output")?.textContent ?? "";

// Replace a part of the page; charts that are in both get the new data and stay where they are.
const replacePart = (old, fresh) => {
  const charts = new Map([...old.querySelectorAll("figure[data-chart]")].map(f => [f.dataset.chart, f]));
  const same = [...fresh.querySelectorAll("figure[data-chart]")];
  const keys = same.map(f => f.dataset.chart).join("\n");
  for (const figure of same) {
    const kept = charts.get(figure.dataset.chart), plot = kept?.querySelector(".plot"), now = figure.querySelector(".plot");
    if (!plot?.chart || !now) continue;
    plot.chart.update(now.dataset.plot, outputOf(figure));
    plot.setAttribute("aria-label", now.getAttribute("aria-label"));
  }
  if (same.length && keys === [...charts.keys()].join("\n")) return;
  if (!same.length && old.innerHTML === fresh.innerHTML) return;
  const checked = new Set([...old.querySelectorAll("input:checked")].map(i => i.value));
  const focused = old.contains(document.activeElement) ? document.activeElement : null;
  const row = focused?.closest("[data-key]")?.dataset.key, tag = focused?.tagName;
  const smoothed = old.querySelector("#smoothing")?.value;
  for (const figure of same) charts.get(figure.dataset.chart) && figure.replaceWith(charts.get(figure.dataset.chart));
  const bottom = old.scrollHeight - old.scrollTop - old.clientHeight < 8;
  old.replaceChildren(...fresh.childNodes);
  if (bottom) old.scrollTop = old.scrollHeight;  // a log follows its end
  for (const input of old.querySelectorAll("input[type=checkbox]")) input.checked = checked.has(input.value);
  if (row) [...old.querySelectorAll("[data-key]")].find(e => e.dataset.key === row)?.querySelector(tag)?.focus();
  const slider = old.querySelector("#smoothing");
  if (slider && smoothed !== undefined) { slider.value = smoothed; slider.dispatchEvent(new Event("input", { bubbles: true })); }
  drawCharts(old);
};

const refresh = async () => {
  const address = new URL(location.href);
  address.searchParams.set("seen", live.dataset.stamp);
  const answer = await fetch(address);
  if (answer.status === 204) return;
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("#live");
  const status = () => live.querySelector("h1 .status")?.textContent, before = status();
  const parts = root => [...root.querySelectorAll("[data-part]")];
  const names = root => parts(root).map(p => p.dataset.part).join();
  if (names(live) === names(fresh)) parts(live).forEach((part, i) => replacePart(part, parts(fresh)[i]));
  else replacePart(live, fresh);
  live.dataset.stamp = fresh.dataset.stamp;
  if (before && status() !== before) news.textContent = `The run is ${status()}.`;
  showFiltered();
};

// Look every 2 seconds, and seldom if the answer takes long or nobody looks.
const watch = async () => {
  const began = performance.now();
  try {
    if (!document.hidden) await refresh();
    document.body.classList.remove("lost");
  } catch {
    document.body.classList.add("lost");
    news.textContent = "No connection to posttrain ui.";
  }
  setTimeout(watch, Math.min(30000, Math.max(2000, 5 * (performance.now() - began))));
};

const filter = document.querySelector("#filter"), chosen = document.querySelector("#chosen");
const showFiltered = () => {
  if (!filter) return;
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of document.querySelectorAll("#runs tr")) {
    const text = `${row.dataset.key} ${row.textContent}`.toLowerCase();
    row.hidden = !words.every(w => text.includes(w));
  }
};
if (filter) {
  filter.addEventListener("input", showFiltered);
  filter.addEventListener("keydown", e => e.key === "Enter" && e.preventDefault());
  document.addEventListener("change", event => {
    if (event.target.name !== "run") return;
    const count = document.querySelectorAll("#runs input:checked").length;
    chosen.textContent = `${count} run${count === 1 ? "" : "s"} selected.`;
  });
  document.addEventListener("keydown", event => {
    if (event.key !== "/" || event.target.closest("input, textarea, select")) return;
    event.preventDefault();
    filter.focus();
  });
  showFiltered();
}
document.querySelector(".search select[name=rows]")?.addEventListener("change", event => event.target.form.requestSubmit());
if (live) setTimeout(watch, 2000);
