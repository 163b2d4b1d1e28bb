// The page: uploads, progress and players.

import { ApiError, hasKey, request, setKey, streamEvents, upload } from "./api.js";
import { clock, hueOf, mountPlayer, saveBlob, showHelp } from "./player.js";
import {
  TEXTS, formatPercent, formatUnit, getLanguage, hasText, languageEvents, setLanguage, setText, t, translate,
} from "./texts.js";
import { makeContext } from "./transport.js";

const $ = (id) => document.getElementById(id);
const POLL_MILLISECONDS = 1500;
const LINK = "#song="; // what follows is sent to no server until the page asks for that song
const MAX_REMEMBERED = 50;
let capabilities = null;
let closePlayer = null;
let isRestored = false;

// ── choices ──

async function loadCapabilities() {
  try {
    capabilities = await (await request("v1/models")).json();
  } catch (error) {
    if (error.status === 401 && linkedSong() && !hasKey()) return void ($("request").hidden = true); // a link needs no key
    if (error.status === 401) return askForKey(hasKey());
    return showNotice(...describe(error));
  }
  showNotice();
  const selected = $("model").value;
  $("model").replaceChildren(...capabilities.models.map(({ name, is_default }) => new Option(name, name, is_default)));
  if (capabilities.models.some(({ name }) => name === selected)) $("model").value = selected;
  showCapabilities();
  restoreSongs().catch((error) => showNotice(...describe(error)));
}

function showCapabilities() {
  const { max_duration_seconds: duration, max_bytes: bytes, keep_seconds: keep, version } = capabilities;
  setText($("limits"), "limits", { duration: formatDuration(duration), size: formatUnit(Math.floor(bytes / 2 ** 20), "megabyte", "short") });
  setText($("kept"), "kept", { duration: formatDuration(keep) });
  $("version").textContent = `demucs-infer ${version}`;
  showStems();
}

function formatDuration(seconds) {
  if (seconds < 120) return formatUnit(seconds, "second");
  return seconds < 7200 ? formatUnit(seconds / 60, "minute") : formatUnit(seconds / 3600, "hour");
}

function showStems() {
  const about = `about.${$("model").value}`;
  $("about").hidden = !hasText(about);
  if (hasText(about)) setText($("about"), about);
  const stems = capabilities.models.find(({ name }) => name === $("model").value)?.stems;
  $("stems").hidden = !stems;
  $("stems").querySelector(".chips").replaceChildren(...(stems ?? []).map((name, index) => {
    const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name, checked: true });
    const label = document.createElement("label");
    const text = document.createElement("span");
    setText(text, "stem", { stem: name });
    label.append(box, text);
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

const linkedSong = () => (location.hash.startsWith(LINK) ? location.hash.slice(LINK.length) : null);

async function openLink() {
  const id = linkedSong();
  if (!id) return;
  try {
    const job = await (await request(`v1/jobs/${encodeURIComponent(id)}`)).json();
    new Song({ name: job.name, job }).resume();
  } catch (error) {
    showNotice(...describe(error));
  }
}

async function findJob({ id, name }) {
  try {
    return await (await request(`v1/jobs/${id}`)).json();
  } catch (error) {
    return { id, name, status: "failed", error: { code: error.status === 404 ? "expired" : error.code, message: error.message } };
  }
}

function add(files) {
  if (!capabilities) return loadCapabilities();
  if (boxes().length && !selectedStems().length) return showNotice("chooseStem");
  showNotice();
  for (const file of files) new Song({ name: file.name, file, parameters: readParameters() }).start();
}

class Song {
  constructor({ name, file = null, parameters = null, job = null }) {
    Object.assign(this, { name, file, parameters });
    this.item = $("song").content.firstElementChild.cloneNode(true);
    const [retry, listen, share, cancel] = this.item.querySelectorAll("button");
    Object.assign(this, { retry, listen, share, cancel, bar: this.item.querySelector("progress") });
    this.item.querySelector("h2").textContent = name;
    translate(this.item);
    setText(this.bar, "progressOf", { song: name }, "label");
    this.item.song = this;
    retry.onclick = () => this.start();
    listen.onclick = () => this.open();
    share.onclick = () => this.copyLink();
    cancel.onclick = () => this.remove();
    $("songs").prepend(this.item);
    this.setJob(job);
  }

  setJob(job) {
    this.job = job;
    if (job) this.item.dataset.job = job.id;
  }

  // `makeText` is called again when the language changes.
  setStatus(makeText, progress) {
    this.makeStatus = makeText;
    this.showStatus();
    if (progress === null) this.bar.removeAttribute("value");
    else if (progress !== undefined) this.bar.value = progress;
  }

  showStatus() { this.item.querySelector(".status").textContent = this.makeStatus?.() ?? ""; }

  async start() {
    this.prepare();
    try {
      this.setStatus(() => t("uploading", { percent: formatPercent(0) }), 0);
      this.setJob(await upload(this.file, this.parameters, {
        signal: this.controller.signal,
        onProgress: (fraction) => (fraction < 1
          ? this.setStatus(() => t("uploading", { percent: formatPercent(fraction) }), fraction)
          : this.setStatus(() => t("checking"), null)),
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
    setText(this.cancel, "cancel");
    this.item.classList.remove("failed");
  }

  // Whether the stems are all of the song.
  get addsUp() {
    const names = this.job.preview.stems;
    const all = capabilities?.models.find(({ name }) => name === this.job.model)?.stems;
    return names.some((name) => name.startsWith("no_")) || !all || all.every((name) => names.includes(name));
  }

  get isShared() { return this.job.id === this.job.shared_id; } // by another, with a link
  get isRunning() { return ["downloading", "queued", "running"].includes(this.job.status); }

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
    if (this.job.status === "cancelled") throw new ApiError(0, "cancelled");
    this.finish();
  }

  async streamProgress() {
    const startedAt = performance.now();
    let first = null;
    for await (const { name, data } of streamEvents(this.job.id, this.controller.signal)) {
      if (name === "ChunkProcessed") {
        first ??= data.fraction;
        const left = ((performance.now() - startedAt) / 1000) * ((1 - data.fraction) / Math.max(data.fraction - first, 1e-3));
        const hasEstimate = data.fraction > first;
        this.job.status = "running";
        this.setStatus(() => t(hasEstimate ? "separatingLeft" : "separating", {
          percent: formatPercent(data.fraction), time: clock(left),
        }), data.fraction);
      } else if (name === "Stage.Started" && data.stage !== "download") {
        this.job.status = "running";
        if (data.stage === "save") this.setStatus(() => t("stage.save"), null);
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
    const stage = hasText(`stage.${job.stage}`) ? `stage.${job.stage}` : "stage.separate";
    if (job.status === "downloading") this.showDownload(job.download);
    else if (job.status === "queued") this.setStatus(() => t(job.position ? "waitingBehind" : "waiting", { count: job.position }), null);
    else if (job.status === "running" && !job.progress) this.setStatus(() => t(stage), null);
    this.updatePreview();
  }

  showDownload({ received_bytes: received, total_bytes: total }) {
    if (!total) return this.setStatus(() => t("downloading"), null);
    this.setStatus(() => t("downloadingPercent", { percent: formatPercent(received / total) }), received / total);
  }

  updatePreview() {
    const { preview } = this.job;
    if (!preview?.duration_seconds || !this.isRunning) return;
    const { duration_seconds: duration, available_seconds: available } = preview;
    if (this.player) this.player.extend({ duration, available, isComplete: false });
    else if (available > 0 && !closePlayer && this.file) this.open();
    else this.listen.hidden = !available;
  }

  finish() {
    const { is_cached: isCached, seconds, stems: { length: count }, warnings } = this.job;
    const makeResult = () => t(isCached ? "cached" : "done", { stems: t("stemCount", { count }), time: clock(seconds) });
    this.setStatus(() => [makeResult(), ...warnings].join(" · "), 1);
    this.bar.hidden = true;
    setText(this.cancel, "remove");
    this.share.hidden = !this.job.shared_id || this.isShared;
    if (!this.job.stems.length) throw new ApiError(0, "expired");
    if (this.player) {
      const { duration_seconds: duration } = this.job.preview;
      this.player.extend({ duration, available: duration, isComplete: true });
    } else {
      this.listen.hidden = false;
      if (!closePlayer && (this.file || this.isShared)) this.open();
    }
    if ($("stems").hidden) loadCapabilities(); // the stems of the model are known now
  }

  fail(error) {
    this.item.classList.add("failed");
    if (this.player) this.close();
    this.listen.hidden = this.job?.status !== "done";
    this.bar.hidden = true;
    this.retry.hidden = !this.file;
    setText(this.cancel, "remove");
    this.setStatus(() => t(...describe(error)));
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
        waveform: async (start, duration) => {
          const isPart = start > 0 || duration < this.job.preview.duration_seconds - 1e-3;
          const query = isPart ? `?${new URLSearchParams({ start, duration })}` : "";
          return (await (await requestPart(`${url}/waveform${query}`)).json()).peaks;
        },
      };
    });
    const root = this.item.querySelector(".player");
    root.hidden = false;
    this.listen.hidden = true;
    const original = this.file && URL.createObjectURL(this.file);
    this.original = original;
    const player = mountPlayer(root, stems, {
      original,
      canCompare: Boolean(original) || this.addsUp,
      context,
      duration: preview.duration_seconds,
      available: preview.available_seconds,
      title: this.title,
      zip: `v1/jobs/${id}/stems.zip`,
      save,
      onError: (error) => {
        if (this.player === player) this.close();
        this.fail(error instanceof ApiError ? error : new ApiError(0, "unplayable"));
      },
    });
    this.player = player;
    closePlayer = () => this.close();
  }

  async copyLink() {
    const link = `${location.href.split("#")[0]}${LINK}${this.job.shared_id}`;
    try {
      await navigator.clipboard.writeText(link);
      this.setStatus(() => t("shared"));
    } catch {
      this.setStatus(() => t("shareFailed", { link }));
    }
  }

  close() {
    this.player?.close();
    this.player = null;
    if (this.original) URL.revokeObjectURL(this.original);
    this.item.querySelector(".player").hidden = true;
    this.listen.hidden = false;
    closePlayer = null;
  }

  get title() { return this.name.replace(/\.[^.]+$/, ""); }

  async remove() {
    this.controller.abort();
    if (this.player) this.close();
    this.item.remove();
    if (!this.job || this.isShared) return;
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

// Returns the text for an error, and its values.
const describe = ({ code, message }) => (hasText(`error.${code}`) ? [`error.${code}`] : ["error.other", { message }]);

// A link cannot send the API key.
async function save(event, link) {
  if (!hasKey()) return;
  event.preventDefault();
  saveBlob(await (await request(link.href)).blob(), link.download);
}

// ── page ──

function showNotice(key, values) {
  $("notice").hidden = !key;
  if (key) setText($("notice"), key, values);
}

function askForKey(wasRejected) {
  $("sign-in-error").hidden = !wasRejected;
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
$("help").onclick = showHelp;
$("language").append(...Object.entries(TEXTS).map(([name, { languageName }]) =>
  Object.assign(new Option(languageName, name, false, name === getLanguage()), { lang: name })));
$("language").onchange = () => setLanguage($("language").value);
languageEvents.addEventListener("change", () => {
  if (capabilities) showCapabilities();
  document.querySelectorAll(".song").forEach(({ song }) => song.showStatus());
});
translate(document);
window.addEventListener("hashchange", openLink);
loadCapabilities().then(openLink);
