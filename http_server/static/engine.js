// What the engine does: /watch, drawn. Nothing is asked while the page is hidden.

import { headers, problem, readEvents } from "./chat.js";

const $ = (id) => document.getElementById(id);
const POINTS = 150; // of a chart: half a minute
const rates = [];
const firsts = [];
let before = null;
const closed = new Set(); // tree nodes that were folded by hand, by their text

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// The canvas' pen, in CSS pixels, and its size.
function fit(canvas) {
  const scale = devicePixelRatio || 1;
  canvas.dataset.height ??= canvas.getAttribute("height");
  const [width, height] = [canvas.clientWidth, Number(canvas.dataset.height)];
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  return [pen, width, height];
}

function chart(canvas, values, digits) {
  const [pen, width, height] = fit(canvas);
  const most = Math.max(...values, 1e-9);
  pen.clearRect(0, 0, width, height);
  pen.strokeStyle = color("main");
  pen.lineWidth = 1.5;
  pen.beginPath();
  values.forEach((value, place) => {
    const x = (place / (POINTS - 1)) * width;
    const y = height - 2 - (value / most) * (height - 18);
    place ? pen.lineTo(x, y) : pen.moveTo(x, y);
  });
  pen.stroke();
  pen.fillStyle = color("dim");
  pen.font = "11px system-ui";
  pen.fillText(`at most ${most.toFixed(digits)}`, 2, 11);
}

function pages(map) {
  const canvas = $("pages");
  const [pen, width, height] = fit(canvas);
  const across = Math.ceil(Math.sqrt((map.length * width) / height));
  const size = Math.min(width / across, height / Math.ceil(map.length / across));
  const colors = ["free", "cached", "shared", "own"].map(color);
  pen.clearRect(0, 0, width, height);
  for (let i = 0; i < map.length; i++) {
    pen.fillStyle = colors[map[i]];
    pen.fillRect((i % across) * size, Math.floor(i / across) * size, Math.max(size - 1, 0.5), Math.max(size - 1, 0.5));
  }
}

function tiles(values) {
  const place = $("tiles");
  if (place.childElementCount !== Object.keys(values).length) {
    place.replaceChildren(
      ...Object.keys(values).map((name) => {
        const tile = document.createElement("div");
        tile.className = "tile";
        tile.append(document.createElement("b"), document.createElement("span"));
        tile.lastChild.textContent = name;
        return tile;
      }),
    );
  }
  Object.values(values).forEach((value, i) => (place.children[i].firstChild.textContent = value));
}

function rows(list) {
  $("rows").tBodies[0].replaceChildren(
    ...list.map((row) => {
      const line = document.createElement("tr");
      const name = row.rid.slice(0, 12) + (row.index ? `/${row.index}` : "");
      for (const text of [name, row.phase, row.prompt, row.cached, row.generated]) {
        line.insertCell().textContent = text;
      }
      const bar = document.createElement("progress");
      bar.max = row.phase === "decode" ? row.limit - row.prompt : row.prompt;
      bar.value = row.phase === "decode" ? row.generated : row.computed;
      line.insertCell().append(bar);
      return line;
    }),
  );
}

function tree(nodes) {
  const children = new Map();
  nodes.forEach((node, place) => {
    if (!children.has(node.parent)) children.set(node.parent, []);
    children.get(node.parent).push(place);
  });
  const draw = (place) => {
    const node = nodes[place];
    const below = children.get(place) ?? [];
    const label = `${node.tokens} tokens${node.users ? `, ${node.users} running` : ""}: ${JSON.stringify(node.text)}`;
    const made = document.createElement(below.length ? "details" : "div");
    const head = below.length ? document.createElement("summary") : made;
    head.textContent = label;
    if (node.users) head.classList.add("used");
    if (below.length) {
      made.open = !closed.has(node.text);
      head.addEventListener("click", () => (made.open ? closed.add(node.text) : closed.delete(node.text)));
      made.append(head, ...below.map(draw));
    } else {
      made.classList.add("leaf");
    }
    return made;
  };
  $("tree").replaceChildren(...(children.get(-1) ?? []).map(draw));
}

function push(list, value) {
  list.push(value);
  if (list.length > POINTS) list.shift();
}

function draw(view) {
  const { stats, http } = view;
  const now = performance.now() / 1000;
  const first = http.first_token;
  if (before) {
    const seconds = now - before.now;
    push(rates, Math.max(0, (stats.completion_tokens_total - before.tokens) / seconds));
    const count = first.count - before.first.count;
    push(firsts, count > 0 ? (first.sum - before.first.sum) / count : (firsts.at(-1) ?? 0));
  }
  before = { now, tokens: stats.completion_tokens_total, first };
  $("model").textContent = view.model;
  const looked = stats.prompt_tokens_total;
  tiles({
    "tokens/s": (rates.at(-1) ?? 0).toFixed(0),
    running: stats.num_running,
    waiting: stats.num_waiting,
    "first token": first.count ? `${((first.sum / first.count) * 1000).toFixed(0)} ms` : "–",
    "hit rate": looked ? `${((stats.cached_tokens_total / looked) * 100).toFixed(0)} %` : "–",
    "free pages": stats.kv_pages_free,
    "cached pages": stats.kv_pages_cached,
    steps: stats.steps_total,
  });
  chart($("rate"), rates, 0);
  chart($("ttft"), firsts, 3);
  rows([...view.rows, ...view.waiting]);
  pages(view.page_map);
  tree(view.nodes);
}

async function watch() {
  for (;;) {
    if (document.hidden) {
      await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
      continue;
    }
    const stop = new AbortController();
    const hide = () => document.hidden && stop.abort();
    document.addEventListener("visibilitychange", hide);
    try {
      const response = await fetch("/watch", { headers: headers(), signal: stop.signal });
      if (response.ok) await readEvents(response, (view) => view.error || draw(view));
      else $("model").textContent = await problem(response);
    } catch (error) {
      if (error.name !== "AbortError") $("model").textContent = "no connection";
    }
    document.removeEventListener("visibilitychange", hide);
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

watch();
