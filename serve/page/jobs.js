// What is known of every job on the page, kept up to date by event streams and, where those do not reach, by asking.

import { ask, videoPath } from "./api.js";

const EVENTS = ["queued", "in_progress", "progress", "preview", "completed", "failed"].map((name) => `video.${name}`);
const MAX_STREAMS = 3; // a browser opens six connections to an HTTP/1.1 host: clips and clicks need some of them
const TICK_MS = 2000; // between questions while jobs have no stream, and before a lost stream is opened again
const IDLE_TICKS = 8; // between questions otherwise: jobs that other clients made appear by themselves
export const PAGE = 12;

export const hasEnded = (job) => job.video.status === "completed" || job.video.status === "failed";
export const isCancelled = (job) => job.video.error?.code === "cancelled";

// Events: "added" (detail: {job, isOlder}), "changed" (detail: job), "removed" (detail: job).
class Jobs extends EventTarget {
  #known = new Map();
  #removed = new Set(); // an answer that was on its way must not bring them back
  #streams = new Map();
  #timer = null;
  #tick = 0;
  #isAsking = false;

  get all() {
    return [...this.#known.values()];
  }

  // A Video object as the server has said it.
  put(video, isOlder = false) {
    const job = this.#known.get(video.id) ?? { id: video.id, video };
    if (this.#removed.has(job.id)) return;
    if (!this.#known.has(job.id)) {
      this.#known.set(job.id, job);
      this.#tell("added", { job, isOlder });
    } else if (!hasEnded(job) || video.status === job.video.status) {
      job.video = video; // one that has ended stays so: an answer may be older than the stream's last event
      this.#tell("changed", job);
    }
    this.#balance();
  }

  remove(id) {
    this.#removed.add(id);
    this.#forget(id);
    this.#balance();
  }

  // The newest jobs, from now on again and again. Unknown ones are new down to the first that is known; below it they
  // belong to an older page.
  async refresh() {
    this.#timer ??= setInterval(() => this.#askAgain(), TICK_MS);
    const page = await ask("GET", `/v1/videos?limit=${PAGE}&order=desc`);
    const fresh = [];
    let isNew = true;
    for (const video of page.data) {
      isNew &&= !this.#known.has(video.id);
      if (isNew) fresh.unshift(video);
      else if (this.#known.has(video.id)) this.put(video);
    }
    for (const video of fresh) this.put(video);
    return page.has_more;
  }

  async older(after) {
    const page = await ask("GET", `/v1/videos?limit=${PAGE}&order=desc&after=${encodeURIComponent(after)}`);
    for (const video of page.data) this.put(video, true);
    return page.has_more;
  }

  // Whoever looks away needs no streams; whoever comes back wants to know at once.
  look() {
    this.#balance();
    if (this.#timer !== null && !document.hidden) this.#askAgain(true);
  }

  clear() {
    clearInterval(this.#timer);
    this.#timer = null;
    for (const id of this.#known.keys()) this.#forget(id);
  }

  async #askAgain(isDue = false) {
    const open = this.all.filter((job) => !hasEnded(job));
    isDue ||= ++this.#tick % IDLE_TICKS === 0 || open.length > this.#streams.size;
    if (document.hidden || this.#isAsking || !isDue) return;
    this.#isAsking = true;
    await this.refresh().catch(() => null); // the next tick tries again; a session that ended is told to the window
    this.#isAsking = false;
  }

  // Streams for those that run, then for those that wait longest.
  #balance() {
    const open = document.hidden ? [] : this.all.filter((job) => !hasEnded(job));
    const rank = (job) => (job.video.status === "in_progress" ? 0 : 1);
    open.sort((a, b) => rank(a) - rank(b) || a.video.created_at - b.video.created_at);
    const wanted = new Set(open.slice(0, MAX_STREAMS).map((job) => job.id));
    for (const id of this.#streams.keys()) if (!wanted.has(id)) this.#close(id);
    for (const id of wanted) if (!this.#streams.has(id)) this.#open(id);
  }

  #open(id) {
    const stream = new EventSource(videoPath(id, "/events"));
    this.#streams.set(id, stream);
    for (const name of EVENTS) stream.addEventListener(name, (event) => this.#take(id, JSON.parse(event.data)));
    // A stream that the server or the network ended connects again by itself; one that was refused does not.
    stream.addEventListener("error", () => {
      if (stream.readyState === EventSource.CLOSED) setTimeout(() => this.#lost(id, stream), TICK_MS);
    });
  }

  #close(id) {
    this.#streams.get(id)?.close();
    this.#streams.delete(id);
  }

  async #lost(id, stream) {
    if (this.#streams.get(id) !== stream) return;
    this.#close(id);
    try {
      this.put(await ask("GET", videoPath(id)));
    } catch (problem) {
      if (problem.status === 404) this.remove(id); // else the job is without a stream, and asked for with the others
    }
  }

  #take(id, { video, ...event }) {
    const job = this.#known.get(id);
    if (job === undefined) return;
    if (event.type === "video.queued") job.position = event.position;
    if (event.type === "video.progress") job.run = event;
    if (event.type === "video.preview") {
      job.preview = { url: `data:image/webp;base64,${event.preview.b64_json}`, step: event.preview.step };
    }
    this.put(video);
  }

  #forget(id) {
    const job = this.#known.get(id);
    this.#close(id);
    if (this.#known.delete(id)) this.#tell("removed", job);
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

export const jobs = new Jobs();
