"use strict";
// Actions of the pages: buttons of a run, reading data, starting a recipe.
const problem = document.querySelector("#problem");
const complain = text => {
  if (!problem) { alert(text); return; }
  problem.textContent = text;
  problem.hidden = !text;
  if (text) problem.scrollIntoView({ block: "nearest" });
};

// Ask for an action; its answer, or an Error that says what is wrong.
const act = async (path, body, signal) => {
  const headers = { "Content-Type": "application/json" };
  const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Error(told.error || `the server answered ${answer.status}`);
};

document.addEventListener("click", async event => {
  const button = event.target.closest("button[data-action]");
  if (!button) return;
  button.disabled = true;
  try {
    await act(button.dataset.action, { run: button.dataset.run });
    await refresh();
  } catch (error) {
    complain(error.message);
    button.disabled = false;
  }
});

// Put text with brackets around what carries loss into an element, with marks in their place.
const showMarked = (element, text) => {
  element.replaceChildren();
  for (const part of text.split(/(\u27E6[^\u27E7]*\u27E7)/)) {
    const marked = part.startsWith("\u27E6"), node = document.createElement(marked ? "mark" : "span");
    node.textContent = marked ? part.slice(1, -1) : part;
    element.append(node);
  }
};
const inspect = document.querySelector("#inspect");
inspect?.addEventListener("submit", async event => {
  event.preventDefault();
  const button = inspect.querySelector("button"), shown = document.querySelector("#inspected");
  complain("");
  button.disabled = true;
  button.textContent = "Reading …";
  try {
    const body = { run: inspect.dataset.run, stage: inspect.stage.value, rows: Number(inspect.rows.value) };
    showMarked(shown.querySelector("pre"), (await (await act("/inspect", body)).json()).text);
    shown.hidden = false;
    shown.querySelector("pre").focus();
  } catch (error) {
    complain(error.message);
  }
  button.disabled = false;
  button.textContent = "Read the data";
});

const start = document.querySelector("#start"), find = document.querySelector("#find");
const given = new Map(start ? [...start.querySelectorAll("[name]")].map(field => [field, field.value]) : []);
start?.addEventListener("submit", async event => {
  event.preventDefault();
  const settings = {}, button = start.querySelector("button[type=submit]");
  for (const [field, value] of given) if (field.value !== value) settings[field.name] = field.value;
  complain("");
  button.disabled = true;
  try {
    const { run } = await (await act("/start", { recipe: start.dataset.recipe, settings })).json();
    location.href = `/run?run=${encodeURIComponent(run)}`;
  } catch (error) {
    complain(error.message);
    button.disabled = false;
  }
});
find?.addEventListener("input", () => {
  const word = find.value.toLowerCase();
  for (const block of start.querySelectorAll("details")) {
    let any = false;
    for (const field of block.querySelectorAll(".field")) {
      const input = field.querySelector("[name]");
      field.hidden = Boolean(word) && !`${input.name} ${field.textContent}`.toLowerCase().includes(word);
      any ||= !field.hidden;
    }
    block.hidden = !any;
    if (word) block.open = any;
  }
});
find?.addEventListener("keydown", event => event.key === "Enter" && event.preventDefault());
