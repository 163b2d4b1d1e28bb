// The page: uploads, progress and players.

import { ApiError, hasKey, request, setKey, streamEvents, upload } from "./api.js";
import { clock, hueOf, mountPlayer, saveBlob } from "./player.js";

const $ = (id) => document.getElementById(id);
const ADVICE = {
  offline: "Check that the server is running, then try again.",
  busy: "Try again in a moment.",
  stopping: "Try again in a moment.",
  too_large: "Choose a smaller file, such as an mp3.",
  unreadable_audio: "Choose another file, or convert it to wav first.",
  model_unavailable: "Choose another model, or try again later.",
  expired: "Results are kept for a limited time; try again.",
};
let capabilities = null;
let closePlayer = null;

// ── choices ──

async function loadCapabilities() {
  try {
    capabilities = await (await request("v1/models")).json();
  } catch (error) {
    if (error.status === 401) return askForKey(hasKey());
    return showNotice(`${error.message} ${ADVICE[error.code] ?? ""}`);
  }
  showNotice("");
  const selected = $("model").value;
  $("model").replaceChildren(...capabilities.models.map(({ name, is_default }) => new Option(name, name, is_default)));
  if (capabilities.models.some(({ name }) => name === selected)) $("model").value = selected;
  const minutes = Math.floor(capabilities.max_duration_seconds / 60);
  const megabytes = Math.floor(capabilities.max_bytes / 2 ** 20);
  $("limits").textContent = `mp3, wav, flac, m4a, ogg and most other formats; up to ${minutes} min and ${megabytes} MB`;
  $("kept").textContent = `after ${formatDuration(capabilities.keep_seconds)}`;
  $("version").textContent = `demucs-infer ${capabilities.version}`;
  showStems();
}

function formatDuration(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} seconds`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} minutes` : `${Math.round(seconds / 3600)} hours`;
}

function showStems() {
  const stems = capabilities.models.find(({ name }) => name === $("model").value)?.stems;
  $("stems").hidden = !stems;
  $("stems").querySelector(".chips").replaceChildren(...(stems ?? []).map((name, index) => {
    const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name, checked: true });
    const label = document.createElement("label");
    label.append(box, name.replaceAll("_", " "));
    label.style.setProperty("--hue", hueOf(name, index));
    return label;
  }));
  updateRest();
}

const boxes = () => [...$("stems").querySelectorAll("input")];
const selectedStems = () => boxes().filter((box) => box.checked).map((box) => box.value);

function updateRest() {
  $("rest-row").hidden = selectedStems().length !== 1;
}

function readParameters() {
  const parameters = { model: $("model").value, format: $("format").value };
  const stems = selectedStems();
  if (stems.length === 1 && $("rest").checked) parameters.two_stems = stems[0];
  else if (stems.length && stems.length < boxes().length) parameters.stems = stems.join(",");
  return parameters;
}

// ── songs ──

function add(files) {
  if (!capabilities) return loadCapabilities();
  if (boxes().length && !selectedStems().length) return showNotice("Choose at least one stem, then add the song again.");
  showNotice("");
  for (const file of files) new Song(file, readParameters()).start();
}

class Song {
  constructor(file, parameters) {
    this.file = file;
    this.parameters = parameters;
    this.item = $("song").content.firstElementChild.cloneNode(true);
    const [retry, listen, cancel] = this.item.querySelectorAll("button");
    Object.assign(this, { retry, listen, cancel, bar: this.item.querySelector("progress") });
    this.item.querySelector("h2").textContent = file.name;
    this.bar.setAttribute("aria-label", `Progress of ${file.name}`);
    retry.onclick = () => this.start();
    listen.onclick = () => this.open();
    cancel.onclick = () => this.remove();
    $("songs").prepend(this.item);
  }

  setStatus(text, progress) {
    this.item.querySelector(".status").textContent = text;
    if (progress === null) this.bar.removeAttribute("value");
    else if (progress !== undefined) this.bar.value = progress;
  }

  async start() {
    this.controller = new AbortController();
    this.job = null;
    this.retry.hidden = true;
    this.bar.hidden = false;
    this.cancel.textContent = "Cancel";
    this.item.classList.remove("failed");
    try {
      this.setStatus("Uploading…", 0);
      this.job = await upload(this.file, this.parameters, {
        signal: this.controller.signal,
        onProgress: (fraction) => this.setStatus(`Uploading… ${Math.round(100 * fraction)} %`, fraction),
      });
      await this.follow();
      if (this.job.status === "failed") throw new ApiError(0, this.job.error.code, this.job.error.message);
      this.finish();
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error);
    }
  }

  async follow() {
    const startedAt = performance.now();
    this.showPosition();
    for await (const { name, data } of streamEvents(this.job.id, this.controller.signal)) {
      if (name === "ChunkProcessed") {
        const left = ((performance.now() - startedAt) / 1000) * (1 / data.fraction - 1);
        this.job.status = "running";
        this.setStatus(`Separating… ${Math.round(100 * data.fraction)} %, about ${clock(left)} left`, data.fraction);
      } else if (name === "Stage.Started") {
        this.job.status = "running";
        if (data.stage === "save") this.setStatus("Writing the files…", null);
      } else if (name === "end") this.job = data;
    }
    while (["queued", "running"].includes(this.job.status)) { // the connection was lost
      await new Promise((resolve) => setTimeout(resolve, 1500));
      this.job = await (await request(`v1/jobs/${this.job.id}`, { signal: this.controller.signal })).json();
      this.setStatus("Separating…", this.job.progress);
    }
  }

  async showPosition() {
    while (this.job.status === "queued" && !this.controller.signal.aborted) {
      try {
        const job = await (await request(`v1/jobs/${this.job.id}`, { signal: this.controller.signal })).json();
        if (this.job.status !== "queued" || job.status !== "queued") return;
        this.setStatus(job.position ? `Waiting, ${job.position} ahead…` : "Waiting…", null);
      } catch { return; }
      await new Promise((resolve) => setTimeout(resolve, 1500));
    }
  }

  finish() {
    const result = this.job.is_cached ? "from the cache" : `done in ${clock(this.job.seconds)}`;
    this.setStatus([`${this.job.stems.length} stems, ${result}`, ...this.job.warnings].join(" · "), 1);
    this.bar.hidden = true;
    this.cancel.textContent = "Remove";
    this.listen.hidden = false;
    if (!closePlayer) this.open();
    if ($("stems").hidden) loadCapabilities(); // the stems of the model are known now
  }

  fail(error) {
    this.item.classList.add("failed");
    this.bar.hidden = true;
    this.retry.hidden = false;
    this.cancel.textContent = "Remove";
    this.setStatus(`${toSentence(error.message)} ${ADVICE[error.code] ?? ""}`);
    if (error.status === 401) askForKey(true);
  }

  async open() {
    await closePlayer?.();
    const root = this.item.querySelector(".player");
    root.hidden = false;
    this.listen.hidden = true;
    const stems = this.job.stems.map(({ name, file, url }) => ({
      name,
      file: `${this.title} (${name})${/\.\w+$/.exec(file)?.[0] ?? ""}`,
      url: `v1/jobs/${url}`,
      bytes: async () => (await request(`v1/jobs/${url}`)).arrayBuffer(),
    }));
    const hide = () => {
      root.hidden = true;
      this.listen.hidden = false;
      this.isOpen = false;
      closePlayer = null;
    };
    closePlayer = async () => hide();
    try {
      const close = await mountPlayer(root, stems, {
        title: this.title, zip: `v1/jobs/${this.job.id}/stems.zip`, save,
      });
      this.isOpen = true;
      closePlayer = async () => { hide(); await close(); };
    } catch (error) {
      hide();
      this.fail(error instanceof ApiError ? error : new ApiError(0, "", "This browser cannot play these files; choose WAV."));
    }
  }

  get title() { return this.file.name.replace(/\.[^.]+$/, ""); }

  async remove() {
    this.controller.abort();
    if (this.isOpen) await closePlayer?.();
    this.item.remove();
    if (this.job) await request(`v1/jobs/${this.job.id}`, { method: "DELETE" }).catch(() => {});
  }
}

const toSentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?…]$/.test(text) ? "" : "."}`;

// A link cannot send the API key.
async function save(event, link) {
  if (!hasKey()) return;
  event.preventDefault();
  saveBlob(await (await request(link.href)).blob(), link.download);
}

// ── page ──

function showNotice(text) {
  $("notice").hidden = !text;
  $("notice").textContent = text;
}

function askForKey(wasRejected) {
  $("sign-in-error").textContent = wasRejected ? "This key is not valid." : "";
  if (!$("sign-in").open) $("sign-in").showModal();
}

$("sign-in").addEventListener("close", () => {
  if (!$("key").value) return;
  setKey($("key").value);
  loadCapabilities();
});
$("model").onchange = showStems;
$("stems").onchange = updateRest;
$("request").onsubmit = (event) => event.preventDefault();
$("files").onchange = () => {
  add([...$("files").files]);
  $("files").value = "";
};
$("sample").onclick = async () => {
  const bytes = await (await request("sample.wav")).blob();
  add([new File([bytes], "sample.wav", { type: "audio/wav" })]);
};
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", type === "dragover");
    if (type === "drop") add([...event.dataTransfer.files]);
  });
}
loadCapabilities();
