// The server's side of the page: requests, the key, progress. Every address is relative.

export class Trouble extends Error {
  constructor(status, code, message) {
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

const headers = () => (key ? { "X-API-Key": key } : {});

async function troubleOf(status, text) {
  try {
    const { code, message } = JSON.parse(text).error;
    return new Trouble(status, code, message);
  } catch {
    return new Trouble(status, "failed", `The server answered ${status}.`);
  }
}

export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble(0, "offline", "The server cannot be reached.");
  }
  if (!answer.ok) throw await troubleOf(answer.status, await answer.text());
  return answer;
}

// fetch cannot tell how much has been sent; this can.
export function upload(file, wish, { onProgress, signal }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", `v1/jobs?${new URLSearchParams(wish)}`);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.setRequestHeader("X-File-Name", encodeURIComponent(file.name));
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => onProgress(event.loaded / Math.max(event.total, 1));
    request.onload = async () => {
      if (request.status === 202) resolve(JSON.parse(request.responseText));
      else reject(await troubleOf(request.status, request.responseText));
    };
    request.onerror = () => reject(new Trouble(0, "offline", "The upload was cut off."));
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    signal.addEventListener("abort", () => request.abort());
    request.send(file);
  });
}

// Server-sent events by hand: an EventSource sends no key.
export async function* events(id, signal) {
  const answer = await ask(`v1/jobs/${id}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
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
