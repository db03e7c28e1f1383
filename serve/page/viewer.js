// One job up close: the clip, what is known of it, what can be made of it, and the code that makes it again.

import { ask, videoPath } from "./api.js";
import { $, announce, complain, fill, part, pressTwice } from "./dom.js";
import { download, removeJob } from "./gallery.js";
import { jobs } from "./jobs.js";
import { curl, pythonCode } from "./snippets.js";
import { clearStage, showStage } from "./stage.js";
import * as words from "./words.js";

const dialog = $("viewer");
const LANGUAGES = { curl, python: pythonCode };
const EXTRA_S = ["0.5", "1", "2", "4", "8"];
let shown = null; // the job
let language = "curl";

export function openViewer(job) {
  shown = job;
  const sequel = part(dialog, "sequel");
  sequel.elements.prompt.value = job.video.prompt;
  complain(sequel.querySelector(".problem"), null);
  show();
  if (!dialog.open) dialog.showModal();
}

export const closeViewer = () => dialog.close();

export function setUpViewer({ reuse }) {
  part(dialog, "close").addEventListener("click", closeViewer);
  dialog.addEventListener("click", ({ target }) => {
    if (target === dialog) closeViewer(); // the backdrop
  });
  dialog.addEventListener("close", () => {
    clearStage(part(dialog, "stage"));
    shown = null;
  });
  dialog.addEventListener("keydown", step);
  part(dialog, "reuse").addEventListener("click", () => {
    const { video } = shown;
    closeViewer();
    reuse(video);
  });
  const sequel = part(dialog, "sequel");
  pressTwice(part(dialog, "remove"), "Delete?", async () => {
    const job = shown;
    try {
      closeViewer();
      await removeJob(job);
    } catch (problem) {
      openViewer(job);
      complain(sequel.querySelector(".problem"), problem);
    }
  });
  fill(sequel.elements.seconds, EXTRA_S.map((seconds) => [seconds, words.length(seconds)]));
  sequel.elements.seconds.value = "2";
  sequel.addEventListener("submit", (event) => {
    event.preventDefault();
    makeSequel(sequel, event.submitter?.value ?? "remix");
  });
  for (const tab of dialog.querySelectorAll("[role=tab]")) {
    tab.addEventListener("click", () => {
      language = tab.dataset.language;
      showSnippet();
    });
  }
  part(dialog, "copy").addEventListener("click", copy);
  jobs.addEventListener("changed", ({ detail: job }) => job === shown && show());
  jobs.addEventListener("removed", ({ detail: job }) => job === shown && closeViewer());
}

function show() {
  const { video } = shown;
  showStage(part(dialog, "stage"), shown);
  part(dialog, "prompt").textContent = video.prompt;
  const rows = words.facts(shown).flatMap(([name, value]) => {
    const [term, text] = ["dt", "dd"].map((name) => document.createElement(name));
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  });
  part(dialog, "facts").replaceChildren(...rows);
  download(part(dialog, "download"), shown);
  part(dialog, "sequel").hidden = video.status !== "completed";
  showSnippet();
}

function showSnippet() {
  part(dialog, "snippet").textContent = LANGUAGES[language](shown.video);
  for (const tab of dialog.querySelectorAll("[role=tab]")) {
    tab.setAttribute("aria-selected", `${tab.dataset.language === language}`);
  }
  part(dialog, "snippet").setAttribute("aria-labelledby", `tab-${language}`);
}

// The arrow keys lead to the neighbours, unless they move a cursor or a control.
function step({ key, target }) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[key];
  if (by === undefined || target.matches("textarea, select, video, pre, [role=tab]")) return;
  const ids = [...$("gallery").children].map((card) => card.dataset.id);
  const id = ids[ids.indexOf(shown.id) + by];
  const job = jobs.all.find((job) => job.id === id);
  if (job !== undefined) openViewer(job);
}

async function makeSequel(sequel, kind) {
  const { id } = shown;
  const prompt = sequel.elements.prompt.value;
  const seconds = sequel.elements.seconds.value;
  const buttons = sequel.querySelectorAll("button");
  complain(sequel.querySelector(".problem"), null);
  for (const button of buttons) button.disabled = true;
  try {
    const video =
      kind === "extend"
        ? await ask("POST", "/v1/videos/extensions", { video: { id }, prompt, seconds })
        : await ask("POST", videoPath(id, "/remix"), { prompt });
    jobs.put(video);
    closeViewer();
    $("prompt").scrollIntoView({ block: "center" });
  } catch (problem) {
    complain(sequel.querySelector(".problem"), problem);
  }
  for (const button of buttons) button.disabled = false;
}

// The clipboard's interface exists on https and localhost alone; elsewhere the text is selected and copied as by hand.
async function copy() {
  const snippet = part(dialog, "snippet");
  try {
    await navigator.clipboard.writeText(snippet.textContent);
  } catch {
    getSelection().selectAllChildren(snippet);
    document.execCommand("copy");
  }
  const label = part(dialog, "copy").querySelector("span");
  label.textContent = "Copied";
  announce("Copied.");
  setTimeout(() => (label.textContent = "Copy"), 1500);
}
