// How numbers and states are said.

import { hasEnded } from "./jobs.js";

export const size = (video) => video.size.replace("x", " × ");
export const length = (seconds) => `${Number(Number(seconds).toFixed(3))} s`;

export function duration(seconds) {
  if (seconds < 1) return "less than 1 s";
  if (seconds < 100) return `${Math.round(seconds)} s`;
  return seconds < 6000 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

const STAGES = { encode: "reading the prompt", decode: "decoding", finish: "writing the file" };

// Of a job that has not ended.
export function status({ video, position, run }) {
  if (video.status === "queued") {
    if (position === undefined || position === null) return "waiting";
    return position <= 1 ? "next in line" : `number ${position} in line`;
  }
  if (run === undefined) return `${video.progress} %`;
  if (run.stage !== "denoise") return STAGES[run.stage] ?? run.stage;
  const left = run.eta_s === null || run.eta_s === undefined ? "" : `, ${duration(run.eta_s)} left`;
  return `step ${run.step} of ${run.num_steps}${left}`;
}

export function when(seconds) {
  return new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

// [name, value] of what is known of a job.
export function facts(job) {
  const { video } = job;
  const optional = (name, value) => (value === null || value === undefined || value === "" ? [] : [[name, `${value}`]]);
  return [
    ...(hasEnded(job) ? [] : [["Now", status(job)]]),
    ["Size", size(video)],
    ["Length", length(video.seconds)],
    ...optional("Seed", video.seed),
    ...optional("Steps", video.num_inference_steps),
    ...optional("Guidance", video.guidance_scale),
    ...optional("Cache", video.cache),
    ...optional("Kept out", video.negative_prompt),
    ["Model", video.model],
    ["Made", when(video.created_at)],
    ...optional("Took", video.completed_at && duration(video.completed_at - video.created_at)),
    ...optional("Resumed", video.resumed_from_step && `from step ${video.resumed_from_step}, nothing was lost`),
    ...optional("Made from", video.remixed_from_video_id),
    ["Id", video.id],
  ];
}
