// The page: sends messages, shows what streams back, and opens quoted sentences where they stand.
// Whatever comes from the model, the library or a person enters the page as text nodes only, never as markup.

import { $, announce, call, make, place, post } from "./page.js";

const stored = { session: "session" };
const nodeNames = {
  triage: "Checking for an emergency", retrieve: "Looking in the library", decide: "Deciding what to do",
  clarify: "Thinking of a question", answer: "Quoting the leaflets", verify: "Checking the answer",
  escalate: "Emergency", decline: "Declining", refuse: "Looking for the nearest leaflets",
};
let titles = new Map();     // slug -> title
let busy = false;
let cameFrom = null;        // what had the focus before a leaflet opened
let following = null;       // the message whose reply is kept in view, until the person scrolls

// --- small helpers ---------------------------------------------------------------------------------------------------

function hint(text) {
  $("hint").textContent = text || "Enter sends, Shift+Enter begins a new line.";
  $("hint").classList.toggle("problem", Boolean(text));
  if (text) announce(text);
}

/** Scroll with a growing reply, at most until the message it answers is at the top. */
function follow() {
  if (!following) return;
  const view = document.querySelector("main");
  view.scrollTop = Math.min(following.offsetTop - 16, view.scrollHeight - view.clientHeight);
}

function seconds(value) { return value < 0.01 ? "<0.01 s" : `${value.toFixed(value < 10 ? 2 : 1)} s`; }

// --- the stream ------------------------------------------------------------------------------------------------------

/** Server-sent events of a fetch response, as {name, data}. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    for (let end = rest.indexOf("\n\n"); end >= 0; end = rest.indexOf("\n\n")) {
      const block = rest.slice(0, end).split("\n");
      rest = rest.slice(end + 2);
      const field = (name) => block.filter((line) => line.startsWith(`${name}: `)).map((line) => line.slice(name.length + 2)).join("\n");
      if (field("data")) yield { name: field("event"), data: JSON.parse(field("data")) };
    }
  }
}

async function ask(message) {
  if (busy || !message.trim()) return;
  setBusy(true);
  hint("");
  $("message").value = "";
  fit();
  closeChoices();
  const mine = said(message);
  const reply = new Reply();
  following = mine;
  follow();
  try {
    const session_id = sessionStorage.getItem(stored.session);
    const response = await post("chat", session_id ? { message, session_id } : { message }, { Accept: "text/event-stream" });
    const begun = response.headers.get("X-Session-ID");
    for await (const { name, data } of events(response)) {
      if (name === "done") {
        keepSession(begun);
        reply.finish(data, true);
      } else {
        reply.take(name, data);
      }
    }
    if (!reply.finished) throw new Error("The connection broke before the answer was complete. Please try again.");
  } catch (error) {
    if (error.cause === 404) keepSession(null);  // deleted elsewhere: the next message begins anew
    reply.fail(error instanceof TypeError ? "The service cannot be reached. Please try again in a moment." : error.message);
    if (!$("message").value) $("message").value = message;
    fit();
  } finally {
    setBusy(false);
  }
}

function setBusy(value) {
  busy = value;
  $("send").disabled = value;
  $("forget").disabled = value;
}

function keepSession(id) {
  if (id) sessionStorage.setItem(stored.session, id);
  else sessionStorage.removeItem(stored.session);
  $("forget").hidden = !id;
}

// --- a reply ---------------------------------------------------------------------------------------------------------

class Reply {
  constructor() {
    this.text = "";
    this.citations = new Map();
    this.finished = false;
    this.body = make("div", { className: "text" });
    this.status = make("p", { className: "working", textContent: "Reading your message" });
    this.box = make("li", { className: "theirs" }, make("h3", { className: "hidden", textContent: "Answer" }), this.body, this.status);
    $("log").append(this.box);
    announce("Working on an answer.");
  }

  take(name, data) {
    if (name === "step" && data.state === "started") this.status.textContent = nodeNames[data.node] || data.node;
    if (name === "citation") this.citations.set(data.number, data);
    if (name === "warning") this.warn(data);
    if (name === "delta") {
      this.text = data.replace ? data.delta : this.text + data.delta;
      this.show();
    }
    if (name === "error") throw new Error(data.message);
  }

  /** The text, each quoted sentence followed by the button that opens it. A mark that is still arriving is not shown. */
  show() {
    const parts = this.text.replace(/\s*\[\d*$/, "").split(/\s*\[(\d{1,3})\]\s*/);
    const paragraphs = parts[0].split(/\n+/).filter((line) => line.trim()).map((line) => make("p", { textContent: line }));
    for (let i = 1; i < parts.length; i += 2) paragraphs.push(this.quote(Number(parts[i]), parts[i + 1]));
    this.body.replaceChildren(...paragraphs);
    follow();
  }

  quote(number, text) {
    const citation = this.citations.get(number);
    const name = citation ? `Source ${number}: ${place(citation)}` : `Source ${number}`;
    const button = make("button", { className: "cite", type: "button", textContent: number, title: name, "aria-label": name,
      "aria-controls": "leaflet", "aria-expanded": "false", disabled: !citation,
      onclick: () => openLeaflet(citation.leaflet, citation.sentence_id, button) });
    const space = text.lastIndexOf(" ") + 1;  // the mark stays on the line of the last word
    const last = text.length - space < 24 ? space : text.length;
    return make("p", {}, text.slice(0, last), make("span", { className: "together" }, text.slice(last), " ", button));
  }

  /** What would make this an emergency, above the answer and before it. */
  warn({ text, sign }) {
    if (this.warning) return;
    const read = sign && make("button", { className: "quiet", type: "button", textContent: "Read the warning signs",
      onclick: (event) => openLeaflet(sign.split("/")[0], sign, event.currentTarget) });
    this.warning = make("div", { className: "warning", role: "note" }, make("p", { textContent: text }), ...(read ? [read] : []));
    this.body.before(this.warning);
    $("alarm").textContent = text;
  }

  finish(exchange, fresh) {
    const { turn } = exchange;
    if (turn.warning) this.warn({ text: turn.warning, sign: turn.sign });
    this.finished = true;
    this.status.remove();
    this.text = turn.text || turn.question?.text || "";
    for (const citation of turn.citations) this.citations.set(citation.number, citation);
    this.show();
    if (turn.kind === "escalate") this.emergency();
    if (turn.question) this.choices(turn.question);
    if (turn.nearest.length && turn.kind === "not_answered") this.nearest(turn.nearest);
    this.sources();
    this.box.append(foot(exchange));
    if (!fresh) return;
    follow();
    const spoken = this.body.textContent.trim();
    if (turn.kind === "escalate") $("alarm").textContent = `This may be an emergency. Call your emergency number now. ${spoken}`;
    else announce(turn.question ? `Question: ${spoken} Choices: ${turn.question.choices.join(", ")}` : `Answer: ${spoken}`);
  }

  emergency() {
    this.box.classList.add("emergency");
    this.box.querySelector("h3").remove();
    this.box.prepend(
      make("h3", { textContent: "This may be an emergency" }),
      make("ul", {},
        make("li", { textContent: "Call your emergency number now, or ask someone near you to call." }),
        make("li", { textContent: "Do not wait for an answer here, and do not drive yourself." }),
        make("li", { textContent: "Say what happened and where you are. If it is someone else, stay with them." })));
  }

  sources() {
    if (!this.citations.size) return;
    const buttons = [...this.citations.values()].map((one) => make("button", { className: "quiet", type: "button",
      textContent: `${one.number}  ${place(one)}`, onclick: (event) => openLeaflet(one.leaflet, one.sentence_id, event.currentTarget) }));
    this.body.after(make("div", { className: "sources", role: "group", "aria-label": "Sources" }, ...buttons));
  }

  choices(question) {
    const buttons = question.choices.map((choice) => make("button", { type: "button", textContent: choice, onclick: () => ask(choice) }));
    const legend = make("legend", { className: "fine", textContent: "Choose one, or answer in your own words below." });
    this.box.append(make("fieldset", { className: "choices" }, legend, ...buttons));
  }

  nearest(slugs) {
    const buttons = slugs.map((slug) => make("button", { className: "quiet", type: "button", textContent: titles.get(slug) || slug,
      onclick: (event) => openLeaflet(slug, null, event.currentTarget) }));
    this.box.append(make("p", { className: "nearest" }, "Open a leaflet:", ...buttons));
  }

  fail(message) {
    this.finished = true;
    this.status.remove();
    this.body.replaceChildren(make("p", { className: "problem", textContent: message }));
    announce(message);
  }
}

function said(message) {
  const item = make("li", { className: "mine" }, make("span", { className: "hidden", textContent: "You: " }), message);
  $("log").append(item);
  return item;
}

function closeChoices() {
  for (const old of document.querySelectorAll(".choices")) old.remove();
}

// --- below an answer -------------------------------------------------------------------------------------------------

function foot(exchange) {
  return make("div", { className: "foot" }, badge(exchange.turn), how(exchange), thumbs(exchange));
}

function badge(turn) {
  const { verdict } = turn;
  if (!verdict) return turn.quotes_verified ? make("span", { className: "badge", textContent: "Quotes checked word for word" }) : null;
  const fine = verdict.grounded && verdict.safe && verdict.helpful >= 3;
  const words = [verdict.grounded ? "grounded" : "not grounded", verdict.safe ? "safe" : "not safe", `helpful ${verdict.helpful}/5`];
  const withheld = turn.kind === "not_answered" ? "Answer withheld: " : "Judge: ";
  return make("span", { className: fine ? "badge" : "badge doubt", textContent: withheld + words.join(", "),
    title: "What the judge, a model too, thought of the answer. The report says how far it can be trusted." });
}

function thumbs(exchange) {
  const group = make("div", { className: "thumbs", role: "group", "aria-label": "Was this helpful?" });
  const send = async (kind, reason) => {
    try {
      await post("feedback", { answer_id: exchange.answer_id, kind, reason });
      announce("Thank you for your feedback.");
      return true;
    } catch (error) {
      hint(error.message);
      return false;
    }
  };
  const press = (chosen) => { for (const button of group.children) button.setAttribute("aria-pressed", button === chosen); };
  const up = make("button", { className: "quiet", type: "button", textContent: "Helpful", "aria-pressed": "false",
    onclick: async () => { closeWhy(group); if (await send("thumbs_up", "")) press(up); } });
  const down = make("button", { className: "quiet", type: "button", textContent: "Not helpful", "aria-pressed": "false",
    onclick: () => { press(down); askWhy(group, (reason) => send("thumbs_down", reason)); } });
  group.append(up, down);
  return group;
}

function askWhy(group, send) {
  closeWhy(group);
  const input = make("input", { type: "text", maxLength: 2000, "aria-label": "What was wrong? (optional)", placeholder: "What was wrong? (optional)" });
  const form = make("form", { className: "why", onsubmit: async (event) => {
    event.preventDefault();
    if (await send(input.value.trim())) form.replaceChildren(make("p", { textContent: "Thank you. It will be looked at." }));
  } }, make("div", { className: "row" }, input, make("button", { type: "submit", textContent: "Send feedback" })),
    make("p", { className: "fine", textContent: "Names, numbers and addresses are taken out before it is stored." }));
  group.after(form);
  input.focus();
  form.scrollIntoView({ block: "nearest" });
}

function closeWhy(group) {
  group.parentElement?.querySelector(".why")?.remove();
}

/** Steps, passages, time and cost. */
function how(exchange) {
  const { turn } = exchange;
  const tokens = turn.trace.reduce((sum, step) => sum + step.prompt_tokens + step.completion_tokens, 0);
  const total = Math.max(...turn.trace.map((step) => step.seconds), 0.001);
  const best = Math.max(...turn.passages.map((passage) => passage.score), 1e-9);
  const summary = [`${seconds(exchange.seconds)} in all`, `${tokens} tokens`, turn.cost ? `cost ${turn.cost.toFixed(6)}` : "no cost"];
  if (turn.cached) summary.push("from an earlier, equal question");
  const parts = [make("summary", { textContent: "How this answer came about" }), make("p", { className: "fine", textContent: summary.join(" · ") })];
  if (turn.reason) parts.push(make("p", { className: "fine", textContent: `Why: ${turn.reason}` }));
  if (turn.trace.length) {
    parts.push(make("h4", { textContent: "Steps" }), make("ol", { className: "steps" }, ...turn.trace.map((step) => stepLine(step, total))));
  }
  if (turn.passages.length) {
    parts.push(make("h4", { textContent: "Passages found, best first" }), make("ol", { className: "found" }, ...turn.passages.map((p) => passageLine(p, best))));
  }
  parts.push(make("p", { className: "fine", textContent: `Answer ${exchange.answer_id}${turn.model_version ? ` by ${turn.model_version}` : ""}` }));
  return make("details", { className: "how", ontoggle: (event) => { if (event.target.open) event.target.scrollIntoView({ block: "nearest" }); } }, ...parts);
}

function stepLine(step, longest) {
  const used = step.prompt_tokens + step.completion_tokens;
  const line = make("div", { className: "line" },
    make("b", { textContent: step.node }),
    make("progress", { max: longest, value: step.seconds, "aria-label": `Time of ${step.node}` }),
    make("span", { textContent: used ? `${seconds(step.seconds)} · ${used} tokens` : seconds(step.seconds) }));
  const item = make("li", {}, line);
  const told = [["in", step.input], ["out", step.output]].filter(([, text]) => text);
  if (told.length) {
    item.append(make("dl", { className: "said" }, ...told.flatMap(([name, text]) => [make("dt", { textContent: name }), make("dd", { textContent: text })])));
  }
  return item;
}

function passageLine(passage, best) {
  const ranks = [passage.dense_rank && `meaning #${passage.dense_rank}`, passage.bm25_rank && `words #${passage.bm25_rank}`].filter(Boolean);
  const slug = passage.id.split("/")[0];
  return make("li", {},
    make("button", { type: "button", textContent: place(passage), title: ranks.join(", "),
      onclick: (event) => openLeaflet(slug, `${passage.id}/1`, event.currentTarget) }),
    make("progress", { max: best, value: Math.max(passage.score, 0), "aria-label": "Score" }),
    make("span", { textContent: passage.score.toFixed(3) }));
}

// --- leaflets --------------------------------------------------------------------------------------------------------

async function openLeaflet(slug, sentenceId, from) {
  let leaflet;
  try {
    leaflet = await (await call(`leaflets/${encodeURIComponent(slug)}`)).json();
  } catch (error) {
    hint(error.message);
    return;
  }
  markOpener(null);
  cameFrom = from;
  markOpener(from);
  $("leaflet-title").textContent = leaflet.title;
  let quoted = null;
  const parts = leaflet.sections.flatMap((section) => [make("h3", { textContent: section.heading }), ...section.sentences.map((one) => {
    const line = make("p", { textContent: one.text });
    if (one.id === sentenceId) {
      line.className = "quoted";
      line.tabIndex = -1;
      line.prepend(make("span", { className: "hidden", textContent: "Quoted: " }));
      quoted = line;
    }
    return line;
  })]);
  $("leaflet-body").replaceChildren(...parts);
  $("leaflet").hidden = false;
  $("leaflet").scrollTop = 0;
  (quoted || $("leaflet-title")).focus({ preventScroll: true });
  quoted?.scrollIntoView({ block: "center" });
}

function closeLeaflet() {
  if ($("leaflet").hidden) return;
  $("leaflet").hidden = true;
  markOpener(null);
  (cameFrom?.isConnected ? cameFrom : $("message")).focus();
}

function markOpener(opener) {
  for (const old of document.querySelectorAll('.cite[aria-expanded="true"]')) old.setAttribute("aria-expanded", "false");
  if (opener?.classList.contains("cite")) opener.setAttribute("aria-expanded", "true");
}

async function listLeaflets() {
  try {
    const { leaflets } = await (await call("leaflets")).json();
    titles = new Map(leaflets.map(({ slug, title }) => [slug, title]));
    $("titles").replaceChildren(...leaflets.map(({ slug, title }) => make("li", {},
      make("button", { className: "quiet", type: "button", textContent: title, onclick: (event) => openLeaflet(slug, null, event.currentTarget) }))));
    $("library").querySelector("summary").textContent = `Read the ${leaflets.length} leaflets`;
  } catch (error) {
    hint(error instanceof TypeError ? "The service cannot be reached. Please try again in a moment." : error.message);
  }
}

// --- start -----------------------------------------------------------------------------------------------------------

async function restore() {
  const id = sessionStorage.getItem(stored.session);
  if (!id) return;
  try {
    const { exchanges } = await (await call(`sessions/${encodeURIComponent(id)}`)).json();
    for (const exchange of exchanges) {
      closeChoices();
      said(exchange.message);
      new Reply().finish(exchange, false);
    }
    keepSession(id);
    announce("");
    following = document.querySelector(".mine:nth-last-child(2)");
    follow();
  } catch {
    keepSession(null);
  }
}

function fit() {
  const box = $("message");
  box.rows = Math.min(6, box.value.split("\n").length);
}

$("composer").addEventListener("submit", (event) => { event.preventDefault(); ask($("message").value); });
$("message").addEventListener("input", fit);
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask($("message").value); }
});
for (const moved of ["wheel", "touchmove"]) document.querySelector("main").addEventListener(moved, () => { following = null; }, { passive: true });
$("close").addEventListener("click", closeLeaflet);
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !document.querySelector("dialog[open]")) closeLeaflet(); });
$("filter").addEventListener("input", () => {
  const wanted = $("filter").value.trim().toLowerCase();
  for (const item of $("titles").children) item.hidden = !item.textContent.toLowerCase().includes(wanted);
});
$("forget").addEventListener("click", () => $("forget-dialog").showModal());
$("forget-dialog").addEventListener("close", async () => {
  if ($("forget-dialog").returnValue !== "delete") return;
  $("forget-dialog").returnValue = "";
  try {
    await call(`sessions/${encodeURIComponent(sessionStorage.getItem(stored.session))}`, { method: "DELETE" });
  } catch (error) {
    if (error.cause !== 404) { hint(error.message); return; }
  }
  keepSession(null);
  $("log").replaceChildren();
  closeLeaflet();
  announce("Your conversation has been deleted.");
  $("message").focus();
});

await listLeaflets();
await restore();
if (matchMedia("(hover: hover)").matches) $("message").focus();  // on a phone the keyboard would cover the page
