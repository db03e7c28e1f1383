// Where a job is seen: previews as they form, then the clip.

import { isStill } from "./dom.js";
import { hasEnded, isCancelled } from "./jobs.js";
import { videoPath } from "./api.js";

// Clips play while they are in view. Whoever wants no motion sees their thumbnail.
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && !isStill()) target.play().catch(() => null); // a browser may refuse: the thumbnail stays
    else target.pause();
  }
});

function show(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value); // the same again would load it again
  element.hidden = false;
}

export function showStage(stage, job) {
  const [glow, preview, clip, note] = ["glow", "preview", "video", "note"].map((name) =>
    stage.querySelector(name === "video" ? name : `.${name}`),
  );
  const { video } = job;
  const isCompleted = video.status === "completed";
  stage.dataset.state = isCancelled(job) ? "cancelled" : video.status;
  glow.hidden = preview.hidden = clip.hidden = note.hidden = true;

  if (isCompleted) {
    const thumbnail = videoPath(job.id, "/content?variant=thumbnail");
    show(glow, "src", thumbnail);
    show(clip, "poster", thumbnail);
    show(clip, "src", videoPath(job.id, "/content"));
    seen.observe(clip);
    return;
  }
  if (job.preview !== undefined && !hasEnded(job)) {
    show(glow, "src", job.preview.url);
    show(preview, "src", job.preview.url);
    preview.alt = `Preview after step ${job.preview.step}`;
    stage.style.setProperty("--formed", job.run?.num_steps ? job.preview.step / job.run.num_steps : 0.5);
  }
  if (video.status === "failed") {
    note.textContent = isCancelled(job) ? "Cancelled" : video.error?.message || "This video failed.";
    note.hidden = false;
  }
}

export function clearStage(stage) {
  const clip = stage.querySelector("video");
  seen.unobserve(clip);
  clip.pause();
  for (const element of stage.querySelectorAll("img, video")) {
    element.removeAttribute("src");
    element.hidden = true;
  }
  clip.removeAttribute("poster");
  clip.load(); // lets go of the connection
}
