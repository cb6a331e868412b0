// What both pages stand on: elements made of text, never of markup, and requests that bring the token along.

export const $ = (id) => document.getElementById(id);

export function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export async function call(path, options = {}) {
  const token = sessionStorage.getItem("token");
  // one id from here to the engine: what went wrong can be found in every log under the number the page shows
  const id = crypto.getRandomValues(new Uint32Array(2)).reduce((text, word) => text + word.toString(16).padStart(8, "0"), "");
  const headers = { "X-Request-ID": id, ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401 && await askToken()) return call(path, options);
  if (!response.ok) throw new Error(await sentence(response), { cause: response.status });
  return response;
}

async function sentence(response) {
  try {
    const { message, request_id } = (await response.json()).error;
    return response.status >= 500 && request_id ? `${message} (request ${request_id})` : message;
  } catch {
    return `The service answered with status ${response.status}.`;
  }
}

export function post(path, body, headers = {}) {
  return call(path, { method: "POST", headers: { "Content-Type": "application/json", ...headers }, body: JSON.stringify(body) });
}

function askToken() {
  const dialog = $("token-dialog");
  $("token").value = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const token = $("token").value.trim();
      if (token) sessionStorage.setItem("token", token);
      resolve(Boolean(token));
    }, { once: true });
  });
}

export function announce(text) { $("announcer").textContent = text; }

/** Where a citation or passage stands: "Migraine, See a doctor". */
export function place({ title, section }) {
  return `${title}, ${section.charAt(0).toUpperCase()}${section.slice(1).replaceAll("-", " ")}`;
}
