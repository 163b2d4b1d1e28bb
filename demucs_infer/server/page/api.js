// Requests to the server: uploads, events, the API key. Every URL is relative.

export class ApiError extends Error {
  constructor(status, code, message = code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let key = sessionStorage.getItem("key") ?? "";

export const hasKey = () => key !== "";
export function setKey(value) {
  key = value;
  sessionStorage.setItem("key", value);
}

// Without API keys, a secret of this browser says which jobs are its own.
function loadClient() {
  let client = localStorage.getItem("client");
  if (!client) {
    client = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    localStorage.setItem("client", client);
  }
  return client;
}

const headers = () => (key ? { "X-API-Key": key } : { "X-Client-Id": loadClient() });

async function parseError(status, text) {
  try {
    const { code, message } = JSON.parse(text).error;
    return new ApiError(status, code, message);
  } catch {
    return new ApiError(status, "failed", `HTTP ${status}`);
  }
}

export async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "offline");
  }
  if (!response.ok) throw await parseError(response.status, await response.text());
  return response;
}

// XMLHttpRequest, as fetch does not report the progress of an upload.
export function upload(file, parameters, { onProgress, signal }) {
  return new Promise((resolve, reject) => {
    const xhr = new XMLHttpRequest();
    xhr.open("POST", `v1/jobs?${new URLSearchParams(parameters)}`);
    xhr.setRequestHeader("Content-Type", "application/octet-stream");
    xhr.setRequestHeader("X-File-Name", encodeURIComponent(file.name));
    for (const [name, value] of Object.entries(headers())) xhr.setRequestHeader(name, value);
    xhr.upload.onprogress = (event) => onProgress(event.loaded / Math.max(event.total, 1));
    xhr.onload = async () => {
      if (xhr.status === 202) resolve(JSON.parse(xhr.responseText));
      else reject(await parseError(xhr.status, xhr.responseText));
    };
    xhr.onerror = () => reject(new ApiError(0, "interrupted"));
    xhr.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    signal.addEventListener("abort", () => xhr.abort());
    xhr.send(file);
  });
}

// Parsed by hand, as an EventSource cannot send the API key.
export async function* streamEvents(id, signal) {
  const response = await request(`v1/jobs/${id}/events`, { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const name = /^event: (.*)$/m.exec(part), data = /^data: (.*)$/m.exec(part);
      if (name && data) yield { name: name[1], data: JSON.parse(data[1]) };
    }
  }
}
