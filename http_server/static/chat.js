// The chat: /v1/chat/completions, streamed.

const $ = (id) => document.getElementById(id);
let history = [];
let running = null; // an AbortController while an answer comes

export function headers() {
  const key = $("key").value;
  return key ? { authorization: `Bearer ${key}` } : {};
}

// Calls `take` with each event of a stream, decoded; ends with the stream.
export async function readEvents(response, take) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const line = event.split("\n").find((text) => text.startsWith("data: "));
      if (line && line !== "data: [DONE]") take(JSON.parse(line.slice(6)));
    }
  }
}

export async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

function element(kind, name, text = "") {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}

function show(kind, text = "") {
  const made = element("div", `message ${kind}`, text);
  $("messages").append(made);
  return made;
}

function body() {
  const asked = { messages: [...history], stream: true, max_tokens: Number($("most").value) || undefined };
  if ($("system").value) asked.messages.unshift({ role: "system", content: $("system").value });
  if ($("temperature").value !== "") asked.temperature = Number($("temperature").value);
  if (!$("thinking").checked) asked.chat_template_kwargs = { enable_thinking: false };
  if ($("tools").value.trim()) asked.tools = JSON.parse($("tools").value);
  return asked;
}

async function answer() {
  const place = show("assistant");
  const thinking = element("div", "thinking");
  const text = element("div", "text");
  const turn = { role: "assistant", content: "", reasoning: "" };
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...headers() },
      body: JSON.stringify(body()),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await problem(response));
    await readEvents(response, (event) => {
      if (event.error) throw new Error(event.error.message);
      for (const { delta, finish_reason } of event.choices) {
        if (delta.reasoning) {
          if (!thinking.isConnected) place.prepend(thinking);
          thinking.textContent = turn.reasoning += delta.reasoning;
        }
        if (delta.content) {
          if (!text.isConnected) place.append(text);
          text.textContent = turn.content += delta.content;
        }
        for (const call of delta.tool_calls ?? []) {
          (turn.tool_calls ??= []).push({ id: call.id, type: "function", function: call.function });
          place.append(element("div", "call", `${call.function.name}(${call.function.arguments})`));
        }
        if (finish_reason === "length") place.append(element("div", "thinking", "(cut off: most tokens)"));
      }
      place.scrollIntoView({ block: "end" });
    });
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  } finally {
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
  }
  history.push(turn);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  history.push({ role: "user", content: text });
  show("user", text);
  answer();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("reset").addEventListener("click", () => {
  running?.abort();
  history = [];
  $("messages").replaceChildren();
});
