// The cards: one for every job, the newest first.

import { ask, videoPath } from "./api.js";
import { $, announce, part, pressTwice } from "./dom.js";
import { hasEnded, isCancelled, jobs } from "./jobs.js";
import { clearStage, showStage } from "./stage.js";
import * as words from "./words.js";

export const download = (link, job) => {
  link.hidden = job.video.status !== "completed";
  link.href = videoPath(job.id, "/content");
  link.download = `${job.id}.mp4`;
};

export async function removeJob(job) {
  const card = cards.get(job.id);
  const neighbour = card?.nextElementSibling ?? card?.previousElementSibling;
  await ask("DELETE", videoPath(job.id));
  jobs.remove(job.id);
  (neighbour ? part(neighbour, "open") : $("prompt")).focus();
  announce("Deleted.");
}

const cards = new Map();

function makeCard(job, { open, reuse }) {
  const card = $("card").content.firstElementChild.cloneNode(true);
  card.dataset.id = job.id;
  part(card, "prompt").textContent = job.video.prompt;
  part(card, "open").setAttribute("aria-label", `Open: ${job.video.prompt}`);
  part(card, "open").addEventListener("click", () => open(job));
  part(card, "reuse").addEventListener("click", () => reuse(job.video));
  part(card, "cancel").addEventListener("click", async ({ target }) => {
    target.disabled = true;
    await tried(card, async () => jobs.put(await ask("POST", videoPath(job.id, "/cancel"))));
    target.disabled = false;
  });
  pressTwice(part(card, "remove"), "Delete?", () => tried(card, () => removeJob(job)));
  return card;
}

// What goes wrong with a card is said on it.
async function tried(card, act) {
  try {
    await act();
  } catch (problem) {
    const note = card.querySelector(".note");
    note.textContent = problem.message;
    note.hidden = false;
    announce(problem.message);
  }
}

function showCard(card, job) {
  const { video, run } = job;
  showStage(card.querySelector(".stage"), job);
  part(card, "facts").textContent = `${words.size(video)} · ${words.length(video.seconds)}`;
  download(part(card, "download"), job);

  part(card, "run").hidden = hasEnded(job);
  if (hasEnded(job)) return;
  part(card, "status").textContent = words.status(job);
  const bar = part(card, "progress");
  const steps = run?.num_steps || 0;
  bar.max = steps || 100;
  bar.value = steps ? run.step : video.progress;
  bar.style.setProperty("--steps", steps <= 40 ? steps || 1 : 1); // more notches would be hairlines
  bar.style.setProperty("--done", `${100 * bar.position}%`);
  bar.setAttribute("aria-label", `Progress of: ${video.prompt}`);
}

// Said when a job gets somewhere, not at every step.
function announceJob(job) {
  const { status, progress } = job.video;
  const quarter = status === "in_progress" ? Math.floor(progress / 25) : 0;
  const stand = isCancelled(job) ? "cancelled" : `${status} ${quarter}`;
  if (stand === job.announced) return;
  const isFirst = job.announced === undefined;
  job.announced = stand;
  if (isFirst && hasEnded(job)) return; // it had ended before it came onto the page
  const said = { queued: words.status(job), in_progress: words.status(job), completed: "completed", failed: "failed" };
  announce(`${job.video.prompt.slice(0, 60)}: ${isCancelled(job) ? "cancelled" : said[status]}`);
}

export function setUpGallery(actions) {
  const list = $("gallery");
  const older = $("older");
  const showEmpty = () => ($("empty").hidden = list.childElementCount > 0);

  jobs.addEventListener("added", ({ detail: { job, isOlder } }) => {
    const card = makeCard(job, actions);
    cards.set(job.id, card);
    list[isOlder ? "append" : "prepend"](card);
    showCard(card, job);
    announceJob(job);
    showEmpty();
  });
  jobs.addEventListener("changed", ({ detail: job }) => {
    showCard(cards.get(job.id), job);
    announceJob(job);
  });
  jobs.addEventListener("removed", ({ detail: job }) => {
    const card = cards.get(job.id);
    clearStage(card.querySelector(".stage"));
    card.remove();
    cards.delete(job.id);
    showEmpty();
  });
  older.addEventListener("click", async () => {
    older.disabled = true;
    const last = list.lastElementChild;
    try {
      older.hidden = !(await jobs.older(last.dataset.id));
      if (last.nextElementSibling) part(last.nextElementSibling, "open").focus();
    } catch (problem) {
      announce(problem.message);
    }
    older.disabled = false;
  });
  return async function load() {
    older.hidden = !(await jobs.refresh());
    showEmpty();
  };
}
