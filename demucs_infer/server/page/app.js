// The page: uploads, progress and players.

import { ApiError, hasKey, request, setKey, streamEvents, upload } from "./api.js";
import { clock, hueOf, makeContext, mountPlayer, saveBlob } from "./player.js";

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
const ABOUT = {
  htdemucs: "Four stems, fast: the best first choice.",
  htdemucs_ft: "Four stems, a little better, and four times slower.",
  htdemucs_6s: "Six stems: guitar and piano too; the piano is experimental.",
  hdemucs_mmi: "Four stems by an earlier network; a second opinion.",
  mdx_extra: "Four stems, trained on other songs; slow, and often clean vocals.",
  tiny: "Very small: to try things out, not for results.",
};
const STAGES = {
  fetch: "Downloading the model…",
  load: "Loading the model…",
  read: "Reading the song…",
  separate: "Separating…",
  save: "Writing the files…",
};
const POLL_MILLISECONDS = 1500;
const MAX_REMEMBERED = 50;
let capabilities = null;
let closePlayer = null;
let isRestored = false;

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
  restoreSongs().catch((error) => showNotice(toSentence(error.message)));
}

function formatDuration(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} seconds`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} minutes` : `${Math.round(seconds / 3600)} hours`;
}

function showStems() {
  $("about").textContent = ABOUT[$("model").value] ?? "";
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

// What the page remembers: jobs of the server, so that a reload loses nothing.
const remembered = () => JSON.parse(localStorage.getItem("songs") ?? "[]");
function remember(id, name) {
  const others = remembered().filter((song) => song.id !== id);
  localStorage.setItem("songs", JSON.stringify([{ id, name }, ...others].slice(0, MAX_REMEMBERED)));
}
const forget = (id) => localStorage.setItem("songs", JSON.stringify(remembered().filter((song) => song.id !== id)));

async function restoreSongs() {
  if (isRestored) return;
  isRestored = true;
  const shown = new Set([...document.querySelectorAll(".song")].map((item) => item.dataset.job));
  const { jobs } = await (await request("v1/jobs?limit=200")).json();
  const listed = new Set(jobs.map(({ id }) => id));
  const others = await Promise.all(remembered().filter(({ id }) => !listed.has(id)).map(findJob));
  const all = [...jobs, ...others].filter(({ id }) => !shown.has(id));
  for (const job of all.sort((a, b) => (a.created ?? 0) - (b.created ?? 0))) new Song({ name: job.name, job }).resume();
}

async function findJob({ id, name }) {
  try {
    return await (await request(`v1/jobs/${id}`)).json();
  } catch (error) {
    return { id, name, status: "failed", error: { code: error.status === 404 ? "expired" : error.code, message: error.status === 404 ? "The stems have been deleted" : error.message } };
  }
}

function add(files) {
  if (!capabilities) return loadCapabilities();
  if (boxes().length && !selectedStems().length) return showNotice("Choose at least one stem, then add the song again.");
  showNotice("");
  for (const file of files) new Song({ name: file.name, file, parameters: readParameters() }).start();
}

class Song {
  constructor({ name, file = null, parameters = null, job = null }) {
    Object.assign(this, { name, file, parameters });
    this.item = $("song").content.firstElementChild.cloneNode(true);
    const [retry, listen, cancel] = this.item.querySelectorAll("button");
    Object.assign(this, { retry, listen, cancel, bar: this.item.querySelector("progress") });
    this.item.querySelector("h2").textContent = name;
    this.bar.setAttribute("aria-label", `Progress of ${name}`);
    retry.onclick = () => this.start();
    listen.onclick = () => this.open();
    cancel.onclick = () => this.remove();
    $("songs").prepend(this.item);
    this.setJob(job);
  }

  setJob(job) {
    this.job = job;
    if (job) this.item.dataset.job = job.id;
  }

  setStatus(text, progress) {
    this.item.querySelector(".status").textContent = text;
    if (progress === null) this.bar.removeAttribute("value");
    else if (progress !== undefined) this.bar.value = progress;
  }

  async start() {
    this.prepare();
    try {
      this.setStatus("Uploading…", 0);
      this.setJob(await upload(this.file, this.parameters, {
        signal: this.controller.signal,
        onProgress: (fraction) => this.setStatus(fraction < 1 ? `Uploading… ${Math.round(100 * fraction)} %` : "Checking the song…", fraction < 1 ? fraction : null),
      }));
      remember(this.job.id, this.name);
      await this.follow();
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error);
    }
  }

  async resume() {
    this.prepare();
    try {
      await this.follow();
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error);
    }
  }

  prepare() {
    this.controller = new AbortController();
    this.retry.hidden = true;
    this.bar.hidden = false;
    this.cancel.textContent = "Cancel";
    this.item.classList.remove("failed");
  }

  get isRunning() { return ["queued", "running"].includes(this.job.status); }

  async follow() {
    if (this.isRunning) {
      this.poll();
      await this.streamProgress();
    }
    while (this.isRunning) { // the connection was lost
      await this.refresh();
      await new Promise((resolve) => setTimeout(resolve, POLL_MILLISECONDS));
    }
    if (this.job.status === "failed") throw new ApiError(0, this.job.error.code, this.job.error.message);
    if (this.job.status === "cancelled") throw new ApiError(0, "cancelled", "Cancelled");
    this.finish();
  }

  async streamProgress() {
    const startedAt = performance.now();
    let first = null;
    for await (const { name, data } of streamEvents(this.job.id, this.controller.signal)) {
      if (name === "ChunkProcessed") {
        first ??= data.fraction;
        const left = ((performance.now() - startedAt) / 1000) * ((1 - data.fraction) / Math.max(data.fraction - first, 1e-3));
        const estimate = data.fraction > first ? `, about ${clock(left)} left` : "";
        this.job.status = "running";
        this.setStatus(`Separating… ${Math.round(100 * data.fraction)} %${estimate}`, data.fraction);
      } else if (name === "Stage.Started") {
        this.job.status = "running";
        if (data.stage === "save") this.setStatus(STAGES.save, null);
      } else if (name === "end") this.setJob(data);
    }
  }

  // Asks for what the events do not tell: the place in the queue, the model, what can be heard.
  async poll() {
    while (this.isRunning && !this.controller.signal.aborted) {
      try { await this.refresh(); } catch { /* the stream of events tells */ }
      await new Promise((resolve) => setTimeout(resolve, POLL_MILLISECONDS));
    }
  }

  async refresh() {
    const job = await (await request(`v1/jobs/${this.job.id}`, { signal: this.controller.signal })).json();
    if (!this.isRunning) return;
    this.setJob(job);
    if (job.status === "queued") this.setStatus(job.position ? `Waiting, ${job.position} ahead…` : "Waiting…", null);
    else if (job.status === "running" && !job.progress) this.setStatus(STAGES[job.stage] ?? STAGES.separate, null);
    this.updatePreview();
  }

  updatePreview() {
    const { preview } = this.job;
    if (!preview?.duration_seconds || !this.isRunning) return;
    if (this.player) this.player.extend({ duration: preview.duration_seconds, available: preview.available_seconds, isComplete: false });
    else this.listen.hidden = preview.available_seconds < 5;
  }

  finish() {
    const result = this.job.is_cached ? "from the cache" : `done in ${clock(this.job.seconds)}`;
    this.setStatus([`${this.job.stems.length} stems, ${result}`, ...this.job.warnings].join(" · "), 1);
    this.bar.hidden = true;
    this.cancel.textContent = "Remove";
    if (!this.job.stems.length) throw new ApiError(0, "expired", "The stems have been deleted");
    if (this.player) {
      const { duration_seconds: duration } = this.job.preview;
      this.player.extend({ duration, available: duration, isComplete: true });
    } else {
      this.listen.hidden = false;
      if (!closePlayer && this.file) this.open();
    }
    if ($("stems").hidden) loadCapabilities(); // the stems of the model are known now
  }

  fail(error) {
    this.item.classList.add("failed");
    this.bar.hidden = true;
    this.retry.hidden = !this.file;
    this.cancel.textContent = "Remove";
    this.setStatus(`${toSentence(error.message)} ${ADVICE[error.code] ?? ""}`);
    if (error.status === 401) askForKey(true);
  }

  open() {
    closePlayer?.();
    const { preview, format, id } = this.job;
    const context = makeContext(preview.sample_rate);
    const stems = preview.stems.map((name) => {
      const url = `v1/jobs/${id}/stems/${encodeURIComponent(name)}`;
      return {
        name,
        file: `${this.title} (${name}).${format === "alac" ? "m4a" : format}`,
        url,
        read: async (start, duration) => {
          const part = await requestPart(`${url}/part?${new URLSearchParams({ start, duration })}`);
          return context.decodeAudioData(await part.arrayBuffer());
        },
        waveform: async () => (await (await request(`${url}/waveform`)).json()).peaks,
      };
    });
    const root = this.item.querySelector(".player");
    root.hidden = false;
    this.listen.hidden = true;
    const player = mountPlayer(root, stems, {
      context,
      duration: preview.duration_seconds,
      available: preview.available_seconds,
      title: this.title,
      zip: `v1/jobs/${id}/stems.zip`,
      save,
      onError: (error) => {
        if (this.player === player) this.close();
        this.fail(error instanceof ApiError ? error : new ApiError(0, "", "This browser cannot play the stems; save them instead"));
      },
    });
    this.player = player;
    closePlayer = () => this.close();
  }

  close() {
    this.player?.close();
    this.player = null;
    this.item.querySelector(".player").hidden = true;
    this.listen.hidden = false;
    closePlayer = null;
  }

  get title() { return this.name.replace(/\.[^.]+$/, ""); }

  async remove() {
    this.controller.abort();
    if (this.player) this.close();
    this.item.remove();
    if (!this.job) return;
    forget(this.job.id);
    await request(`v1/jobs/${this.job.id}`, { method: "DELETE" }).catch(() => {});
  }
}

async function requestPart(path) {
  try {
    return await request(path);
  } catch (error) {
    if (error.code !== "not_done") throw error;
    await new Promise((resolve) => setTimeout(resolve, 1000)); // between running and finished
    return request(path);
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
