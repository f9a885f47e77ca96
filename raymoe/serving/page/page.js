"use strict";
// The page asks the server's own API, with the reader's key. Nothing a server says is put in as HTML.

const POLL_MS = 1000;
const KEPT_POINTS = 120;
const find = (id) => document.getElementById(id);
const make = (tag, text, className) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
};

let model = null;
let running = null;

function headers() {
  const key = find("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, body, signal) {
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const answer = await fetch(path, { ...options, headers: headers(), signal });
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new Error(told?.error?.message ?? `${answer.status} ${answer.statusText}`);
  }
  return answer;
}

// The playground

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

function showRoute(button, route) {
  for (const other of find("said").querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
  const rows = route.layers.map((layer, number) => {
    const row = make("div");
    row.append(make("b", `layer ${number}`), ...layer.map(([expert, outcome]) => {
      const cell = make("span", expert, `cell ${outcome}`);
      cell.title = `expert ${expert}: ${outcome.replace("_", " ")}`;
      return cell;
    }));
    return row;
  });
  find("route").replaceChildren(...rows);
}

function addToken(route) {
  const used = route.layers.flat();
  const waited = used.filter(([, outcome]) => outcome !== "hit").length;
  const button = make("button", route.text);
  button.type = "button";
  button.style.setProperty("--waited", used.length ? waited / used.length : 0);
  button.title = `${waited} of ${used.length} experts waited or stood in for`;
  button.addEventListener("click", () => showRoute(button, route));
  find("said").append(button);
}

async function send(event) {
  event.preventDefault();
  const isChat = find("chat").checked;
  const prompt = find("prompt").value;
  const body = {
    model, stream: true, stream_options: { include_usage: true }, routes: true,
    temperature: Number(find("temperature").value),
    ...(isChat ? { messages: [{ role: "user", content: prompt }], max_completion_tokens: Number(find("max-tokens").value) }
      : { prompt, max_tokens: Number(find("max-tokens").value) }),
    ...(find("seed").value ? { seed: Number(find("seed").value) } : {}),
  };
  running = new AbortController();
  find("send").disabled = true;
  find("stop").disabled = false;
  find("said").replaceChildren();
  find("route").replaceChildren();
  find("usage").textContent = "";
  const began = performance.now();
  let first = null;
  try {
    const answer = await ask(isChat ? "/v1/chat/completions" : "/v1/completions", body, running.signal);
    for await (const part of events(answer)) {
      if (part.error) throw new Error(part.error.message);
      for (const choice of part.choices) {
        for (const route of choice.routes ?? []) {
          first ??= performance.now();
          addToken(route);
        }
      }
      if (part.usage) {
        const rest = (performance.now() - first) / 1000;
        const rate = part.usage.completion_tokens > 1 ? (part.usage.completion_tokens - 1) / rest : 0;
        find("usage").textContent = `${part.usage.prompt_tokens} tokens read, ${part.usage.completion_tokens} written; `
          + `first after ${Math.round(first - began)} ms, then ${rate.toFixed(1)} a second`;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") find("said").append(make("span", ` ${error.message}`, "error"));
  } finally {
    running = null;
    find("send").disabled = false;
    find("stop").disabled = true;
  }
}

// What the engines do

const throughput = [];
const hitRates = [];
let lastLoad = null;
let lastTokens = null;
let budgetsShown = false;

function curve(id, values, most) {
  const points = values.map((value, at) => `${(at / Math.max(1, values.length - 1)) * 300},${78 - (value / (most || 1)) * 76}`);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points.join(" "));
  find(id).replaceChildren(line);
}

function showEngines(engines) {
  const table = make("table");
  const columns = ["requests", "tokens/s", "resident experts", "hit rate", "KV pages held"];
  const head = make("tr");
  head.append(...columns.map((name) => make("th", name)));
  table.append(head);
  for (const engine of engines) {
    const row = make("tr");
    row.append(...[
      engine.requests_running, engine.tokens_per_s, `${engine.resident_experts} of ${engine.num_experts}`,
      `${(engine.hit_rate * 100).toFixed(1)} %`, engine.kv_pages_held,
    ].map((value) => make("td", value)));
    table.append(row);
  }
  find("engines").replaceChildren(table);
}

function showLoad(engines) {
  const load = engines[0].load.map((layer, at) => layer.map((_, expert) => engines.reduce((sum, one) => sum + one.load[at][expert], 0)));
  const recent = load.map((layer, at) => layer.map((rows, expert) => rows - (lastLoad?.[at]?.[expert] ?? 0)));
  // an engine that was replaced counts from 0 again; while nothing runs the last picture stays
  const isNews = recent.flat().some((rows) => rows > 0) && recent.flat().every((rows) => rows >= 0);
  lastLoad = load;
  if (!isNews) return;
  const canvas = find("load");
  canvas.width = Math.max(...recent.map((layer) => layer.length));
  canvas.height = recent.length;
  canvas.style.height = `${Math.max(2, Math.min(24, recent.length)) * 0.9}rem`;
  const pen = canvas.getContext("2d");
  recent.forEach((layer, at) => {
    const most = Math.max(1, ...layer);
    layer.forEach((rows, expert) => {
      pen.fillStyle = `hsl(158 50% ${92 - 70 * (rows / most)}%)`;
      pen.fillRect(expert, at, 1, 1);
    });
  });
}

function showBudgets(engine) {
  if (budgetsShown) return;
  budgetsShown = true;
  find("experts").value = Math.round((engine.budget_bytes / (engine.num_experts * engine.expert_bytes)) * 100);
  find("kv").value = engine.kv_tokens;
  find("experts-now").textContent = `${find("experts").value} %`;
}

function keep(points, value) {
  points.push(value);
  if (points.length > KEPT_POINTS) points.shift();
}

async function poll() {
  try {
    const status = await (await ask("/v1/raymoe/status?history=true")).json();
    model = status.model;
    find("model").textContent = model;
    find("state").textContent = status.engines.length ? "" : "no engine is ready";
    if (status.engines.length) {
      const tokens = { count: status.engines.reduce((sum, engine) => sum + engine.generated_tokens, 0), at: performance.now() };
      // an engine that was replaced counts from 0 again
      if (lastTokens) keep(throughput, Math.max(0, tokens.count - lastTokens.count) / ((tokens.at - lastTokens.at) / 1000));
      lastTokens = tokens;
      const recent = status.engines.map((engine) => engine.history.at(-1)).filter(Boolean);
      const asked = recent.reduce((sum, one) => sum + one.hits + one.late + one.misses, 0);
      if (asked) keep(hitRates, recent.reduce((sum, one) => sum + one.hits, 0) / asked);
      curve("throughput", throughput, Math.max(1, ...throughput));
      curve("hits", hitRates, 1);
      find("throughput-now").textContent = throughput.length ? `${throughput.at(-1).toFixed(1)} now, ${Math.max(...throughput).toFixed(1)} at most` : "";
      find("hits-now").textContent = hitRates.length ? `${(hitRates.at(-1) * 100).toFixed(1)} % in the last second of work` : "";
      showEngines(status.engines);
      showLoad(status.engines);
      showBudgets(status.engines[0]);
    }
  } catch (error) {
    find("state").textContent = error.message;
  }
  setTimeout(poll, POLL_MS);
}

async function setBudgets(event) {
  event.preventDefault();
  find("budgets-said").textContent = "...";
  try {
    await ask("/v1/raymoe/budgets", { expert_memory: `${find("experts").value}%`, kv_tokens: Number(find("kv").value) });
    find("budgets-said").textContent = "set";
  } catch (error) {
    find("budgets-said").textContent = error.message;
  }
}

find("who").addEventListener("submit", (event) => event.preventDefault());
find("ask").addEventListener("submit", send);
find("stop").addEventListener("click", () => running?.abort());
find("budgets").addEventListener("submit", setBudgets);
find("experts").addEventListener("input", () => { find("experts-now").textContent = `${find("experts").value} %`; });
poll();
