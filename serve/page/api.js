// Asks the server that this page came from; its errors come in OpenAI's envelope.

export class Refusal extends Error {
  constructor(status, { message, code = null, param = null } = {}) {
    super(message || `The server answered ${status}.`);
    this.status = status;
    this.code = code;
    this.param = param;
  }
}

// body: a FormData, or what is sent as JSON. A 401 is also told to the window: the session has ended.
export async function ask(method, path, body) {
  const isForm = body instanceof FormData;
  const options = { method, body: isForm || body === undefined ? body : JSON.stringify(body) };
  if (body !== undefined && !isForm) options.headers = { "content-type": "application/json" };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Refusal(0, { message: "The server cannot be reached." });
  }
  const said = answer.status === 204 ? null : await answer.json().catch(() => null);
  if (answer.ok) return said;
  const refusal = new Refusal(answer.status, said?.error ?? {});
  if (answer.status === 401 && path !== "/session") window.dispatchEvent(new CustomEvent("logged-out"));
  throw refusal;
}

export const videoPath = (id, rest = "") => `/v1/videos/${encodeURIComponent(id)}${rest}`;
