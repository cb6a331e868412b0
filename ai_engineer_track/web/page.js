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
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401 && await askToken()) return call(path, options);
  if (!response.ok) throw new Error(await sentence(response), { cause: response.status });
  return response;
}

async function sentence(response) {
  try {
    return (await response.json()).error.message;
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
