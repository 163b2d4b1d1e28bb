// The page: songs in, progress, players out.

import { Trouble, ask, events, hasKey, setKey, upload } from "./api.js";
import { clock, hueOf, mountPlayer, saveBlob } from "./player.js";

const $ = (id) => document.getElementById(id);
const ADVICE = {
  offline: "Check that the server runs, then try again.",
  busy: "Try again in a moment.",
  stopping: "The server restarts; try again in a moment.",
  too_large: "Send a smaller file, an mp3 for example.",
  unreadable_audio: "Choose another file, or convert it to wav first.",
  model_unavailable: "Choose another model, or try again later.",
  expired: "Results are kept for a while only; try again.",
};
let menu = null;
let closePlayer = null;

// ── what to choose from ──

async function start() {
  try {
    menu = await (await ask("v1/models")).json();
  } catch (error) {
    if (error.status === 401) return askForKey(hasKey());
    return complain(`${error.message} ${ADVICE[error.code] ?? ""}`);
  }
  complain("");
  const chosen = $("model").value;
  $("model").replaceChildren(...menu.models.map((one) => new Option(one.name, one.name, one.is_default)));
  if (menu.models.some((one) => one.name === chosen)) $("model").value = chosen;
  const minutes = Math.floor(menu.max_duration_seconds / 60);
  const megabytes = Math.floor(menu.max_bytes / 2 ** 20);
  $("limits").textContent = `mp3, wav, flac, m4a, ogg and most others; up to ${minutes} min and ${megabytes} MB`;
  $("kept").textContent = `after ${span(menu.keep_seconds)}`;
  $("version").textContent = `demucs-infer ${menu.version}`;
  showStems();
}

function span(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} seconds`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} minutes` : `${Math.round(seconds / 3600)} hours`;
}

function showStems() {
  const stems = menu.models.find((one) => one.name === $("model").value)?.stems;
  $("stems").hidden = !stems;
  $("stems").querySelector(".chips").replaceChildren(...(stems ?? []).map((name, index) => {
    const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name, checked: true });
    const label = document.createElement("label");
    label.append(box, name.replaceAll("_", " "));
    label.style.setProperty("--hue", hueOf(name, index));
    return label;
  }));
  showRest();
}

const boxes = () => [...$("stems").querySelectorAll("input")];
const chosenStems = () => boxes().filter((box) => box.checked).map((box) => box.value);

function showRest() {
  $("rest-row").hidden = chosenStems().length !== 1;
}

function wish() {
  const wanted = { model: $("model").value, format: $("format").value };
  const stems = chosenStems();
  if (stems.length === 1 && $("rest").checked) wanted.two_stems = stems[0];
  else if (stems.length && stems.length < boxes().length) wanted.stems = stems.join(",");
  return wanted;
}

// ── songs ──

function add(files) {
  if (!menu) return start();
  if (boxes().length && !chosenStems().length) return complain("Choose one stem at least, then add the song again.");
  complain("");
  for (const file of files) new Song(file, wish()).begin();
}

class Song {
  constructor(file, wanted) {
    this.file = file;
    this.wanted = wanted;
    this.item = $("song").content.firstElementChild.cloneNode(true);
    const [again, listen, cancel] = this.item.querySelectorAll("button");
    Object.assign(this, { again, listen, cancel, bar: this.item.querySelector("progress") });
    this.item.querySelector("h2").textContent = file.name;
    this.bar.setAttribute("aria-label", `Progress of ${file.name}`);
    again.onclick = () => this.begin();
    listen.onclick = () => this.open();
    cancel.onclick = () => this.leave();
    $("songs").prepend(this.item);
  }

  say(text, progress) {
    this.item.querySelector(".status").textContent = text;
    if (progress === null) this.bar.removeAttribute("value");
    else if (progress !== undefined) this.bar.value = progress;
  }

  async begin() {
    this.stopped = new AbortController();
    this.job = null;
    this.again.hidden = true;
    this.bar.hidden = false;
    this.cancel.textContent = "Cancel";
    this.item.classList.remove("failed");
    try {
      this.say("Sending…", 0);
      this.job = await upload(this.file, this.wanted, {
        signal: this.stopped.signal,
        onProgress: (share) => this.say(`Sending… ${Math.round(100 * share)} %`, share),
      });
      await this.follow();
      if (this.job.status === "failed") throw new Trouble(0, this.job.error.code, this.job.error.message);
      this.finish();
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error);
    }
  }

  async follow() {
    const began = performance.now();
    this.waiting();
    for await (const { name, data } of events(this.job.id, this.stopped.signal)) {
      if (name === "ChunkProcessed") {
        const left = ((performance.now() - began) / 1000) * (1 / data.fraction - 1);
        this.job.status = "running";
        this.say(`Separating… ${Math.round(100 * data.fraction)} %, about ${clock(left)} left`, data.fraction);
      } else if (name === "Stage.Started") {
        this.job.status = "running";
        if (data.stage === "save") this.say("Writing the files…", null);
      } else if (name === "end") this.job = data;
    }
    while (["queued", "running"].includes(this.job.status)) { // the line was cut
      await new Promise((resolve) => setTimeout(resolve, 1500));
      this.job = await (await ask(`v1/jobs/${this.job.id}`, { signal: this.stopped.signal })).json();
      this.say("Separating…", this.job.progress);
    }
  }

  async waiting() {
    while (this.job.status === "queued" && !this.stopped.signal.aborted) {
      try {
        const now = await (await ask(`v1/jobs/${this.job.id}`, { signal: this.stopped.signal })).json();
        if (this.job.status !== "queued" || now.status !== "queued") return;
        this.say(now.position ? `Waiting, ${now.position} before it…` : "Waiting for its turn…", null);
      } catch { return; }
      await new Promise((resolve) => setTimeout(resolve, 1500));
    }
  }

  finish() {
    const took = this.job.is_cached ? "done before" : `done in ${clock(this.job.seconds)}`;
    this.say([`${this.job.stems.length} stems, ${took}`, ...this.job.warnings].join(" · "), 1);
    this.bar.hidden = true;
    this.cancel.textContent = "Remove";
    this.listen.hidden = false;
    if (!closePlayer) this.open();
    if ($("stems").hidden) start(); // what the model makes is known by now
  }

  fail(error) {
    this.item.classList.add("failed");
    this.bar.hidden = true;
    this.again.hidden = false;
    this.cancel.textContent = "Remove";
    this.say(`${sentence(error.message)} ${ADVICE[error.code] ?? ""}`);
    if (error.status === 401) askForKey(true);
  }

  async open() {
    await closePlayer?.();
    const root = this.item.querySelector(".player");
    root.hidden = false;
    this.listen.hidden = true;
    const stems = this.job.stems.map((one) => ({
      name: one.name,
      file: `${this.title} (${one.name})${/\.\w+$/.exec(one.file)?.[0] ?? ""}`,
      url: `v1/jobs/${one.url}`,
      bytes: async () => (await ask(`v1/jobs/${one.url}`)).arrayBuffer(),
    }));
    const shut = () => {
      root.hidden = true;
      this.listen.hidden = false;
      this.isOpen = false;
      closePlayer = null;
    };
    closePlayer = async () => shut();
    try {
      const close = await mountPlayer(root, stems, {
        title: this.title, zip: `v1/jobs/${this.job.id}/stems.zip`, save,
      });
      this.isOpen = true;
      closePlayer = async () => { shut(); await close(); };
    } catch (error) {
      shut();
      this.fail(error instanceof Trouble ? error : new Trouble(0, "", "This browser cannot play these files; choose WAV."));
    }
  }

  get title() { return this.file.name.replace(/\.[^.]+$/, ""); }

  async leave() {
    this.stopped.abort();
    if (this.isOpen) await closePlayer?.();
    this.item.remove();
    if (this.job) await ask(`v1/jobs/${this.job.id}`, { method: "DELETE" }).catch(() => {});
  }
}

const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?…]$/.test(text) ? "" : "."}`;

// A plain link sends no key.
async function save(event, link) {
  if (!hasKey()) return;
  event.preventDefault();
  saveBlob(await (await ask(link.href)).blob(), link.download);
}

// ── the rest ──

function complain(text) {
  $("notice").hidden = !text;
  $("notice").textContent = text;
}

function askForKey(wasWrong) {
  $("door-error").textContent = wasWrong ? "This key is not known here." : "";
  if (!$("door").open) $("door").showModal();
}

$("door").addEventListener("close", () => {
  if (!$("key").value) return;
  setKey($("key").value);
  start();
});
$("model").onchange = showStems;
$("stems").onchange = showRest;
$("order").onsubmit = (event) => event.preventDefault();
$("files").onchange = () => {
  add([...$("files").files]);
  $("files").value = "";
};
$("sample").onclick = async () => {
  const bytes = await (await ask("sample.wav")).blob();
  add([new File([bytes], "tiny song.wav", { type: "audio/wav" })]);
};
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") add([...event.dataTransfer.files]);
  });
}
start();
