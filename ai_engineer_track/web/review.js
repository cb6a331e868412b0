// The review page: shows an answer that went wrong with its sources, and sends what a person says is right.
// Whatever comes from the model, the library or a person enters the page as text nodes only, never as markup.

import { $, announce, call, make, place, post } from "./page.js";

const actions = [
  ["answer", "Answer with these sentences"], ["not_answered", "Say that the library does not answer"],
  ["clarify", "Ask back"], ["escalate", "Send to the emergency number"], ["decline", "Decline"],
];
const names = new Map(actions);
const why = {
  thumbs_down: "a person disliked it", judge_failed: "the judge disliked it", withheld: "it was withheld",
  low_confidence: "nothing sure was found", clarify_failed: "asking back did not help",
};
let task = null;
let picked = [];            // sentence ids, in the order they were marked
let found = new Map();      // passages that were searched for: id -> source
let sending = false;

const reviewer = () => $("reviewer").value.trim().toLowerCase();

// --- what is to be looked at -----------------------------------------------------------------------------------------

async function next() {
  trouble("");
  try {
    const reply = await (await call(`reviews/next?reviewer=${encodeURIComponent(reviewer())}`)).json();
    task = reply.task;
    picked = [];
    found = new Map();
    tell(reply.progress);
    show();
  } catch (error) {
    trouble(error);
  }
}

function tell({ failed, labelled, yours, agreement }) {
  const kappa = (value) => (value === null ? "not known yet" : value.toFixed(2));
  const agreed = `Two reviewers said the same ${agreement.same} of ${agreement.answers} times; kappa ${kappa(agreement.action)} (what to do), `
    + `${kappa(agreement.sentences)} (which sentences)`;
  $("progress").textContent = `${labelled} of ${failed} labelled, ${yours} left for you. ${agreement.answers ? agreed : ""}`;
}

function show() {
  const box = $("task");
  box.hidden = false;
  $("who").hidden = true;
  if (!task) {
    box.replaceChildren(make("p", { className: "done", id: "question", textContent: "Nothing is left for you to look at. Thank you." }));
    announce("Nothing is left for you to look at.");
    box.focus();
    return;
  }
  box.replaceChildren(asked(), given(), ...(task.opinions.length ? [opinions()] : []), choice(), sources(), sheet());
  document.querySelector("main").scrollTop = 0;
  box.focus({ preventScroll: true });
  announce(`Question: ${task.question}`);
  update();
}

function asked() {
  const earlier = task.earlier.flatMap(([message, reply]) => [
    make("p", { className: "mine", textContent: message }), ...(reply ? [make("p", { className: "told", textContent: reply })] : [])]);
  return make("div", {}, make("h3", { textContent: "Asked" }), ...earlier, make("p", { className: "mine", id: "question", textContent: task.question }));
}

function given() {
  const reasons = task.reasons.map((one) => make("li", { className: one.counts ? "badge doubt" : "badge plain",
    textContent: [why[one.kind] || one.kind, one.text].filter(Boolean).join(": ") + (one.counts ? "" : " (this judge is not trusted)") }));
  const withheld = task.withheld ? [make("h3", { textContent: "Written and not shown" }), make("p", { textContent: task.withheld })] : [];
  return make("div", {}, make("h3", { textContent: "Answered" }),
    make("div", { className: "given" }, make("p", { textContent: task.text }), ...withheld,
      make("ul", { className: "reasons" }, ...reasons), make("p", { className: "fine", textContent: `${task.answer_id} by ${task.model_version}` })));
}

function opinions() {
  return make("div", {}, make("h3", { textContent: "Two reviewers differ; you decide" }), ...task.opinions.map((one) =>
    make("p", { className: "opinion" }, make("b", { textContent: `${one.reviewer}: ${names.get(one.action)}` }),
      one.sentences.length ? ` (${one.sentences.join(", ")})` : "")));
}

// --- what is right ---------------------------------------------------------------------------------------------------

function choice() {
  const options = actions.map(([value, text], n) => make("label", {},
    make("input", { type: "radio", name: "action", value, onchange: update }), text, make("kbd", { textContent: n + 1, "aria-hidden": "true" })));
  return make("fieldset", {}, make("legend", { textContent: "What should have been done?" }), make("div", { className: "actions" }, ...options));
}

function sources() {
  const search = make("form", { className: "row finder", role: "search", onsubmit: (event) => { event.preventDefault(); look(search); } },
    make("input", { type: "search", "aria-label": "Search the library", placeholder: "Not there? Search the library", autocomplete: "off" }),
    make("button", { type: "submit", className: "quiet", textContent: "Search" }));
  const all = [...task.sources, ...found.values()];
  const shown = all.length ? all.map(source) : [make("p", { className: "fine", textContent: "Nothing was retrieved." })];
  return make("fieldset", { id: "sources" }, make("legend", { textContent: "Which sentences answer?" }), ...shown, search);
}

function source({ id, heading, title, sentences }) {
  const lines = sentences.map((one) => {
    const box = make("input", { type: "checkbox", value: one.id, checked: picked.includes(one.id), onchange: () => mark(one.id, box.checked) });
    const quoted = task.cited.includes(one.id) ? make("span", { className: "note", textContent: "quoted in the answer" }) : null;
    return make("label", {}, box, make("span", { textContent: one.text }), quoted);
  });
  return make("div", { className: "source", role: "group", "aria-label": heading || title }, make("h4", { textContent: heading || title }), ...lines);
}

async function look(form) {
  const query = form.querySelector("input").value.trim();
  if (!query) return;
  try {
    const { results } = await (await call(`search?k=5&q=${encodeURIComponent(query)}`)).json();
    const known = new Set(task.sources.map(({ id }) => id));
    const fresh = results.filter(({ id }) => !known.has(id) && !found.has(id));
    for (const one of fresh) found.set(one.id, { id: one.id, title: one.title, heading: place(one), sentences: one.sentences });
    const focus = fresh.length ? fresh[0].id : null;
    $("sources").replaceWith(sources());
    announce(`${fresh.length} more passages`);
    if (focus) $("sources").querySelector(`[value="${CSS.escape(`${focus}/1`)}"]`)?.focus();
  } catch (error) {
    trouble(error);
  }
}

function mark(id, on) {
  picked = picked.filter((one) => one !== id);
  if (on) {
    picked.push(id);
    choose("answer");  // who marks a sentence means it as the answer
  }
  update();
}

function choose(value) {
  const option = document.querySelector(`input[name="action"][value="${value}"]`);
  if (option) option.checked = true;
  update();
}

const action = () => document.querySelector('input[name="action"]:checked')?.value;

function sheet() {
  return make("div", { className: "sheet" }, make("p", { id: "sum", className: "fine" }),
    make("button", { id: "send", type: "button", textContent: "Save and go on", onclick: send }));
}

function update() {
  const chosen = action();
  const missing = !chosen ? "Choose what should have been done." : chosen === "answer" && !picked.length ? "Mark the sentences that answer." : "";
  $("sum").textContent = missing || (chosen === "answer" ? `Quoted in this order: ${picked.join(", ")}` : `${names.get(chosen)}.`);
  $("send").disabled = Boolean(missing) || sending;
}

async function send() {
  if ($("send").disabled) return;
  const chosen = action();
  const sentences = chosen === "answer" ? picked : [];
  const used = [...found.keys()].filter((id) => sentences.some((one) => one.startsWith(`${id}/`)));
  sending = true;
  update();
  try {
    const kept = await (await post("reviews", { answer_id: task.answer_id, reviewer: reviewer(), action: chosen, sentences, found: used })).json();
    announce(kept.labelled ? "Saved. The answer has its label now." : "Saved.");
    sending = false;
    await next();
  } catch (error) {
    sending = false;
    if (error.cause === 409) await next();  // settled by somebody else meanwhile
    else update();
    trouble(error);
  }
}

function trouble(error) {
  $("trouble").textContent = error instanceof TypeError ? "The service cannot be reached. Please try again in a moment." : error.message || error;
}

// --- start -----------------------------------------------------------------------------------------------------------

$("reviewer-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("reviewer", reviewer());
  next();
});
document.addEventListener("keydown", (event) => {
  if (!task || event.altKey || event.metaKey || document.querySelector("dialog[open]")) return;
  if (event.ctrlKey && event.key === "Enter") send();
  const typing = event.target.matches?.('input:not([type="radio"], [type="checkbox"])');
  const option = !event.ctrlKey && !typing && actions[Number(event.key) - 1];
  if (option) choose(option[0]);
});
const before = sessionStorage.getItem("reviewer");
if (before) {
  $("reviewer").value = before;
  await next();
} else {
  $("reviewer").focus();
}
