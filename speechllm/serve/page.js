"use strict";
// One page: a sound goes to the server it came from, its segments come back one by one, and are corrected by typing.

const TEXTS = {
  en: {
    ready: "Record, or choose a sound.", recording: "Recording… {s} s. Press again to end.", stop: "Stop",
    preparing: "Preparing the sound…", sending: "Sending…", working: "Listening… {s} of {all} s", done: "Done in {s} s.",
    cancelled: "Cancelled.", nothing: "No speech was found.", noMicrophone: "The microphone cannot be used: {why}",
    notSound: "This file cannot be read as a sound.", lost: "The server cannot be reached, or ended the connection.",
    empty: "(no speech)", flag_loop: "repetition mended", flag_cut: "perhaps cut off", flag_doubtful: "doubtful",
    flag_no_speech: "no speech", play: "Play from {t}", edit: "Text from {t}", copied: "Copied.", confidence: "sure: {p} %",
  },
  ja: {
    input: "音声", record: "録音", choose: "ファイルを選ぶ", drop: "またはここにドロップ",
    words: "聞き取りたい語（人名・用語など、空白で区切る）", cancel: "中止", result: "文字起こし",
    hint: "語をクリックするとそこから再生。直接入力して修正できます。", unsure: "低い確信度", sure: "高い",
    download: "保存", copy: "コピー", ready: "録音するか、音声を選んでください。",
    recording: "録音中… {s} 秒。もう一度押すと終わります。", stop: "停止", preparing: "音声を準備しています…",
    sending: "送信しています…", working: "聞き取り中… {all} 秒中 {s} 秒", done: "{s} 秒で終わりました。",
    cancelled: "中止しました。", nothing: "発話が見つかりませんでした。", noMicrophone: "マイクを使えません: {why}",
    notSound: "このファイルは音声として読めません。", lost: "サーバーに接続できないか、接続が切れました。",
    empty: "（発話なし）", flag_loop: "繰り返しを修正", flag_cut: "途中で切れた可能性", flag_doubtful: "疑わしい",
    flag_no_speech: "発話なし", play: "{t} から再生", edit: "{t} からの文", copied: "コピーしました。", confidence: "確信度 {p} %",
  },
};
const language = (navigator.language || "en").toLowerCase().startsWith("ja") ? "ja" : "en";
const byId = (id) => document.getElementById(id);
const RATE_HZ = 16000;
const READ_BY_SERVER = /\.(wav|flac|ogg|oga|opus|mp3|aif|aiff|au|caf)$/i;
const LOW = 0.5, HIGH = 0.8;

const state = { segments: [], duration: 0, name: "speech", recorder: null, request: null, url: null };

function t(key, values = {}) {
  const text = TEXTS[language][key] ?? TEXTS.en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

function say(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

// --- sound in ---------------------------------------------------------------------------------------------------

async function toggleRecording() {
  if (state.recorder) { state.recorder.stop(); return; }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    say(t("noMicrophone", { why: error.message }), true);
    return;
  }
  const parts = [], recorder = new MediaRecorder(stream), began = performance.now();
  const tick = () => say(t("recording", { s: Math.floor((performance.now() - began) / 1000) }));
  const clock = setInterval(tick, 500);
  recorder.ondataavailable = (event) => parts.push(event.data);
  recorder.onstop = () => {
    clearInterval(clock);
    stream.getTracks().forEach((track) => track.stop());
    state.recorder = null;
    showRecording(false);
    take(new Blob(parts, { type: recorder.mimeType }), "recording", false);
  };
  state.recorder = recorder;
  recorder.start();
  showRecording(true);
  tick();
}

function showRecording(isOn) {
  byId("record").setAttribute("aria-pressed", String(isOn));
  byId("record-label").textContent = isOn ? t("stop") : (TEXTS[language].record ?? "Record");
}

async function take(blob, name, isReadByServer) {
  if (state.request) state.request.abort();
  clear();
  state.name = name.replace(/\.[^.]*$/, "") || "speech";
  busy(true);
  say(t("preparing"));
  let sound = blob;
  if (!isReadByServer) {
    try {
      sound = await asWav(blob);
    } catch {
      busy(false);
      say(t("notSound"), true);
      return;
    }
  }
  state.url = URL.createObjectURL(sound);
  byId("player").src = state.url;
  await send(sound, isReadByServer ? name : `${state.name}.wav`);
}

// what the browser can play becomes a WAV of 16 kHz, so that the server needs no other decoders
async function asWav(blob) {
  const context = new OfflineAudioContext(1, 1, RATE_HZ);
  const decoded = await context.decodeAudioData(await blob.arrayBuffer());
  const channels = Array.from({ length: decoded.numberOfChannels }, (_, i) => decoded.getChannelData(i));
  const view = new DataView(new ArrayBuffer(44 + 2 * decoded.length));
  const ascii = (at, text) => [...text].forEach((char, i) => view.setUint8(at + i, char.charCodeAt(0)));
  ascii(0, "RIFF"); view.setUint32(4, 36 + 2 * decoded.length, true); ascii(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, RATE_HZ, true); view.setUint32(28, 2 * RATE_HZ, true);
  view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  ascii(36, "data"); view.setUint32(40, 2 * decoded.length, true);
  for (let i = 0; i < decoded.length; i++) {
    const mean = channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length;
    view.setInt16(44 + 2 * i, Math.round(Math.max(-1, Math.min(1, mean)) * 32767), true);
  }
  return new Blob([view], { type: "audio/wav" });
}

// --- text back --------------------------------------------------------------------------------------------------

async function send(sound, name) {
  const form = new FormData();
  form.append("file", sound, name);
  form.append("response_format", "verbose_json");
  form.append("stream", "true");
  form.append("prompt", byId("words").value);
  const request = new AbortController(), began = performance.now();
  state.request = request;
  say(t("sending"));
  try {
    const answer = await fetch("v1/audio/transcriptions", { method: "POST", body: form, signal: request.signal });
    if (!answer.ok) throw new Refused((await answer.json()).error.message);
    const whole = await readEvents(answer.body);
    if (!whole) throw new TypeError("cut short");
    state.duration = whole.duration;
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    say(whole.text ? t("done", { s: seconds }) : t("nothing"));
    byId("result").hidden = false;
  } catch (error) {
    if (state.request !== request) return;  // another sound has taken over
    if (error.name === "AbortError") say(t("cancelled"));
    else say(error instanceof Refused ? error.message : t("lost"), true);
  }
  if (state.request === request) { state.request = null; busy(false); }
}

class Refused extends Error {}

async function readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "", whole = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return whole;
    const events = (waiting + value).split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const found = JSON.parse(event.slice("data: ".length));
      if (found.error) throw new Refused(found.error.message);
      if (found.type === "transcript.text.delta") add(found.segment);
      else whole = found;
    }
  }
}

function add(segment) {
  state.segments.push(segment);
  byId("result").hidden = false;
  byId("segments").append(row(segment));
  const all = byId("player").duration;
  say(t("working", { s: segment.end.toFixed(0), all: Number.isFinite(all) ? all.toFixed(0) : "?" }));
}

function row(segment) {
  const item = document.createElement("li");
  const time = document.createElement("button");
  time.type = "button";
  time.className = "time";
  time.textContent = `${clockOf(segment.start, 1)} – ${clockOf(segment.end, 1)}`;
  time.setAttribute("aria-label", t("play", { t: clockOf(segment.start, 1) }));
  time.addEventListener("click", () => playFrom(segment.start));
  const text = document.createElement("div");
  text.className = "text";
  text.contentEditable = "plaintext-only";
  text.spellcheck = false;
  text.dataset.empty = t("empty");
  text.setAttribute("role", "textbox");
  text.setAttribute("aria-multiline", "true");
  text.setAttribute("aria-label", t("edit", { t: clockOf(segment.start, 1) }));
  text.append(...pieces(segment));
  text.addEventListener("input", () => {
    segment.text = text.textContent;
    segment.corrected = true;
    const piece = getSelection().anchorNode?.parentElement;
    if (piece?.matches("#segments span")) piece.className = "high";  // what was typed is sure
  });
  text.addEventListener("keydown", (event) => { if (event.key === "Enter") event.preventDefault(); });
  item.append(time, text);
  if (segment.flags.length) {
    const flags = document.createElement("span");
    flags.className = "flags";
    flags.textContent = segment.flags.map((flag) => t(`flag_${flag}`)).join(" · ");
    item.append(flags);
  }
  return item;
}

// the words may leave out marks that the text has: those stay outside of the coloured pieces
function pieces(segment) {
  const found = [];
  let at = 0;
  const words = segment.words.length ? segment.words : [{ word: segment.text, start: segment.start, end: segment.end, confidence: segment.confidence }];
  for (const word of words) {
    const begin = segment.text.indexOf(word.word, at);
    if (begin < 0 || !word.word) continue;
    if (begin > at) found.push(document.createTextNode(segment.text.slice(at, begin)));
    const piece = document.createElement("span");
    piece.textContent = word.word;
    piece.className = word.confidence < LOW ? "low" : word.confidence < HIGH ? "mid" : "high";
    piece.title = `${clockOf(word.start, 2)} · ${t("confidence", { p: Math.round(100 * word.confidence) })}`;
    piece.dataset.start = word.start;
    piece.dataset.end = word.end;
    piece.addEventListener("click", () => playFrom(word.start));
    found.push(piece);
    at = begin + word.word.length;
  }
  if (at < segment.text.length) found.push(document.createTextNode(segment.text.slice(at)));
  return found;
}

function playFrom(seconds) {
  const player = byId("player");
  player.currentTime = seconds;
  player.play().catch(() => {});
}

function showPlace() {
  const now = byId("player").currentTime;
  for (const piece of document.querySelectorAll("#segments span[data-start]")) {
    piece.classList.toggle("now", Number(piece.dataset.start) <= now && now < Number(piece.dataset.end));
  }
}

// --- files out --------------------------------------------------------------------------------------------------

function clockOf(seconds, digits) {
  const unit = 10 ** digits, all = Math.round(seconds * unit);
  const two = (value) => String(value).padStart(2, "0");
  const s = Math.floor(all / unit), part = String(all % unit).padStart(digits, "0");
  return `${s >= 3600 ? `${Math.floor(s / 3600)}:` : ""}${two(Math.floor(s / 60) % 60)}:${two(s % 60)}.${part}`;
}

function wholeText() {
  return state.segments.map((segment) => segment.text).reduce(
    (text, next) => text + (/[\x00-\x7f]$/.test(text) && /^[\x00-\x7f]/.test(next) ? " " : "") + next, "");
}

// the server writes the files, in the formats of `speechllm transcribe`
async function save(kind) {
  const transcript = { duration: state.duration || byId("player").duration || 0, segments: state.segments };
  try {
    const answer = await fetch(`formats/${kind}`, { method: "POST", body: JSON.stringify(transcript) });
    if (!answer.ok) throw new Refused((await answer.json()).error.message);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = `${state.name}.${kind}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (error) {
    say(error instanceof Refused ? error.message : t("lost"), true);
  }
}

// --- the page ---------------------------------------------------------------------------------------------------

function busy(isBusy) {
  byId("progress").hidden = byId("cancel").hidden = !isBusy;
  byId("record").disabled = isBusy;
}

function clear() {
  state.segments = [];
  byId("segments").replaceChildren();
  byId("result").hidden = true;
  if (state.url) URL.revokeObjectURL(state.url);
}

function start() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-t]")) {
    const text = TEXTS[language][element.dataset.t];
    if (text) element.textContent = text;
  }
  say(t("ready"));
  fetch("v1/models").then((answer) => answer.json()).then((found) => {
    byId("model").textContent = found.data[0].id;
    byId("segments").lang = found.data[0].language;  // Japanese and Chinese share characters, not their shapes
  }).catch(() => say(t("lost"), true));
  byId("record").addEventListener("click", toggleRecording);
  byId("file").addEventListener("change", (event) => {
    const file = event.target.files[0];
    if (file) take(file, file.name, READ_BY_SERVER.test(file.name));
    event.target.value = "";
  });
  byId("cancel").addEventListener("click", () => state.request?.abort());
  byId("player").addEventListener("timeupdate", showPlace);
  byId("copy").addEventListener("click", () => navigator.clipboard.writeText(wholeText()).then(() => say(t("copied"))));
  for (const button of document.querySelectorAll("[data-save]")) {
    button.addEventListener("click", () => save(button.dataset.save));
  }
  const zone = document.documentElement;
  zone.addEventListener("dragover", (event) => { event.preventDefault(); byId("drop").classList.add("over"); });
  zone.addEventListener("dragleave", () => byId("drop").classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    byId("drop").classList.remove("over");
    const file = event.dataTransfer.files[0];
    if (file) take(file, file.name, READ_BY_SERVER.test(file.name));
  });
}

start();
