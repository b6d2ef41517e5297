"use strict";
// A conversation with one model, or with two whose answers are voted for: it continues with the better one.
const form = document.querySelector("#chat"), turns = document.querySelector("#turns");
const panes = [...document.querySelectorAll(".answers article")], answers = document.querySelector(".answers");
const ballot = document.querySelector("#vote"), halt = document.querySelector("#halt");
const names = ["A", "B"];
let messages = [], pair = null, running = null;

const addTurn = (role, text) => {
  const item = document.createElement("li"), who = document.createElement("h2"), what = document.createElement("p");
  item.className = `said ${role}`;
  who.textContent = role === "user" ? "You" : role;
  what.className = "text";
  what.textContent = text;
  item.append(who, what);
  turns.append(item);
  return what;
};

// Write an answer into an element as it comes, and return it.
const answer = async (model, asked, element, signal) => {
  const body = { model, messages: asked, temperature: Number(form.temperature.value), max_tokens: Number(form.max_tokens.value) };
  element.textContent = "";
  element.setAttribute("aria-busy", "true");
  element.classList.add("waiting");
  try {
    const reply = await act("/chat", body, signal);
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", part; !(part = await reader.read()).done;) {
      const events = (rest + part.value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const value = JSON.parse(event.slice("data: ".length));
        if (value.error) throw new Error(value.error.message);
        element.textContent += value.text;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  } finally {
    element.removeAttribute("aria-busy");
    element.classList.remove("waiting");
  }
  return element.textContent;
};

const ready = () => {
  running = null;
  halt.disabled = true;
  for (const button of form.querySelectorAll("button[type=submit]")) button.disabled = Boolean(pair);
};

const send = async text => {
  const models = [form.first.value.trim(), form.second.value.trim()].filter(Boolean);
  if (form.blind.checked && models.length > 1 && Math.random() < .5) models.reverse();
  const system = form.system.value.trim();
  const asked = [...(system ? [{ role: "system", content: system }] : []), ...messages, { role: "user", content: text }];
  running = new AbortController();
  halt.disabled = false;
  form.querySelector("button[type=submit]").disabled = true;
  const turn = addTurn("user", text).parentElement;
  try {
    if (models.length === 1) {
      const element = addTurn(models[0], ""), said = await answer(models[0], asked, element, running.signal);
      messages.push({ role: "user", content: text }, { role: "assistant", content: said });
    } else {
      answers.hidden = false;
      panes.forEach((pane, i) => { pane.querySelector("h2").textContent = form.blind.checked ? names[i] : `${names[i]}: ${models[i]}`; });
      const said = await Promise.all(panes.map((pane, i) => answer(models[i], asked, pane.querySelector("p"), running.signal)));
      pair = { asked, text, models, said, turn };
      ballot.hidden = false;
      ballot.querySelector("button").focus();
    }
  } catch (error) {
    running.abort();
    turn.nextElementSibling?.remove();
    turn.remove();
    answers.hidden = true;
    form.text.value = text;
    complain(error.message);
  }
  ready();
};

ballot.addEventListener("click", async event => {
  const button = event.target.closest("button");
  if (!button || !pair) return;
  complain("");
  const { asked, text, models, said, turn } = pair;
  if (button.value === "") turn.remove();
  else {
    const better = Number(button.value), worse = 1 - better;
    try {
      const vote = { messages: asked, chosen: said[better], rejected: said[worse], chosen_model: models[better], rejected_model: models[worse] };
      document.querySelector("#votes").textContent = (await (await act("/vote", vote)).json()).votes;
    } catch (error) {
      complain(error.message);
      return;
    }
    messages.push({ role: "user", content: text }, { role: "assistant", content: said[better] });
    addTurn(models[better], said[better]);
  }
  pair = null;
  answers.hidden = ballot.hidden = true;
  ready();
  form.text.focus();
});

form.addEventListener("submit", event => {
  event.preventDefault();
  if (running || pair) return;
  const text = form.text.value.trim();
  if (!text) return;
  complain("");
  form.text.value = "";
  send(text);
});
form.text.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
halt.addEventListener("click", () => running?.abort());
document.querySelector("#anew").addEventListener("click", event => {
  event.preventDefault();
  running?.abort();
  messages = [];
  pair = null;
  turns.replaceChildren();
  answers.hidden = ballot.hidden = true;
  complain("");
  ready();
  form.text.focus();
});
