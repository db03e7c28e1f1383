// The form that asks for a new video.

import { ask } from "./api.js";
import { $, announce, choose, complain, fill, isStill } from "./dom.js";
import { jobs } from "./jobs.js";
import * as words from "./words.js";

const PREVIEWS = 6; // pictures on the way
const LENGTHS_S = [0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 60, 90, 120];
const PICTURES = ["image/png", "image/jpeg", "image/webp"];
const OPTIONAL = ["seed", "num_inference_steps", "guidance_scale", "negative_prompt"];
const IDEAS = {
  demo: [
    "a red circle moving right at sunset",
    "a large blue star moving up over a meadow",
    "a small white ball falling at night",
  ],
  other: [
    "a lighthouse at dusk, waves rolling in, slow aerial shot",
    "fog lifting from a pine forest at sunrise",
    "a paper boat drifting down a rainy street",
  ],
};

const form = $("composer");
const fields = form.elements;
let models = [];
let picture = null; // a File

export function setUpComposer() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  fields.prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  fields.model.addEventListener("change", showModel);
  fields.size.addEventListener("change", showShape);
  setUpPicture();
}

export async function loadModels(mayWrite) {
  const list = await ask("GET", "/v1/models");
  models = distinct(list.data.filter((model) => model.native_sizes?.length));
  fill(fields.model, models.map((model) => [model.id, model.id]));
  $("model-pill").hidden = models.length < 2;
  $("generate").disabled = !mayWrite || models.length === 0;
  $("generate").title = mayWrite ? "" : "This key may only read.";
  showModel();
  $("ideas").replaceChildren(...(IDEAS[fields.model.value] ?? IDEAS.other).map(makeIdea));
}

// An alias is what it stands for in all but the name; the first name will do.
function distinct(all) {
  const facts = ({ id, ...rest }) => JSON.stringify(rest);
  return all.filter((model, index) => all.findIndex((other) => facts(other) === facts(model)) === index);
}

function makeIdea(text) {
  const [item, button] = ["li", "button"].map((name) => document.createElement(name));
  button.type = "button";
  button.className = "idea";
  button.textContent = text;
  button.addEventListener("click", () => {
    fields.prompt.value = text;
    fields.prompt.focus();
  });
  item.append(button);
  return item;
}

function showModel() {
  const model = models.find((model) => model.id === fields.model.value);
  if (model === undefined) return;
  const longest = model.max_seconds;
  const lengths = new Set([...LENGTHS_S.filter((seconds) => seconds < longest), longest, Number(model.default_seconds)]);
  const sorted = [...lengths].sort((a, b) => a - b);
  fill(fields.size, model.native_sizes.map((size) => [size, words.size({ size })]));
  fill(fields.seconds, sorted.map((seconds) => [`${seconds}`, words.length(seconds)]));
  const presets = new Set(["none", ...(model.cache_presets ?? [])]);
  fill(fields.cache, [...presets].map((name) => [name, name]));
  fields.num_inference_steps.placeholder = model.default_steps ?? "";
  fields.guidance_scale.placeholder = model.default_guidance ?? "";
  fields.size.value = model.default_size;
  fields.seconds.value = `${Number(model.default_seconds)}`;
  showShape();
}

// The outline of the size, at the same area whatever its aspect.
function showShape() {
  const [width, height] = fields.size.value.split("x").map(Number);
  const aspect = Math.min(2.4, Math.max(1 / 2.4, width / height));
  $("shape").style.setProperty("--width", Math.sqrt(aspect));
  $("shape").style.setProperty("--height", Math.sqrt(1 / aspect));
}

async function submit() {
  const generate = $("generate");
  if (generate.disabled) return; // Enter submits a form whose button may not be pressed
  complainAbout(null);
  if (!fields.prompt.value.trim()) {
    complainAbout({ message: "Say what the video should show.", param: "prompt" });
    return;
  }
  const body = new FormData();
  for (const name of ["prompt", "model", "size", "seconds", "cache"]) body.append(name, fields[name].value);
  for (const name of OPTIONAL) if (fields[name].value.trim()) body.append(name, fields[name].value.trim());
  body.append("partial_images", PREVIEWS);
  if (picture !== null) body.append("input_reference", picture);
  generate.disabled = true;
  try {
    const video = await ask("POST", "/v1/videos", body);
    jobs.put(video);
    const card = document.querySelector(`[data-id="${CSS.escape(video.id)}"]`);
    card?.scrollIntoView({ block: "nearest", behavior: isStill() ? "auto" : "smooth" });
  } catch (problem) {
    complainAbout(problem);
  }
  generate.disabled = false;
}

// In words below the form, and at the field that it is about.
function complainAbout(problem) {
  complain($("problem"), problem);
  for (const field of fields) field.removeAttribute("aria-invalid");
  const field = problem?.param && fields[problem.param];
  if (!(field instanceof HTMLElement)) return;
  if ($("advanced").contains(field)) $("advanced").open = true;
  field.setAttribute("aria-invalid", "true");
  field.focus();
}

// ------------------------------------------------------------------------------------------------ the first image

function setUpPicture() {
  const input = $("image");
  input.addEventListener("change", () => usePicture(input.files[0]));
  $("image-remove").addEventListener("click", () => {
    usePicture(null);
    input.focus();
  });
  form.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) usePicture(file);
  });
  const isFile = (event) => event.dataTransfer?.types.includes("Files");
  // anywhere on the page: a picture that misses the form must not replace the page
  for (const name of ["dragover", "drop", "dragleave"]) {
    document.addEventListener(name, (event) => {
      if (!isFile(event)) return;
      event.preventDefault();
      form.classList.toggle("is-over", name === "dragover");
      if (name === "drop") usePicture(event.dataTransfer.files[0]);
    });
  }
}

function usePicture(file) {
  complainAbout(null);
  if (file && !PICTURES.includes(file.type)) {
    complainAbout({ message: "The first image must be a PNG, JPEG or WebP." });
    return;
  }
  const shown = $("image-shown");
  if (shown.src) URL.revokeObjectURL(shown.src);
  picture = file ?? null;
  if (picture === null) {
    shown.removeAttribute("src");
    $("image").value = "";
  } else {
    shown.src = URL.createObjectURL(picture);
    announce(`First image: ${picture.name}`);
  }
  shown.hidden = $("image-remove").hidden = picture === null;
}

// ---------------------------------------------------------------------------------------------------------- reuse

export function reuse(video) {
  if (models.some((model) => model.id === video.model)) {
    fields.model.value = video.model;
    showModel();
  }
  fields.prompt.value = video.prompt;
  choose(fields.size, video.size, words.size(video));
  choose(fields.seconds, `${Number(video.seconds)}`, words.length(video.seconds));
  if (video.cache) choose(fields.cache, video.cache);
  for (const name of OPTIONAL) fields[name].value = video[name] ?? "";
  $("advanced").open ||= OPTIONAL.slice(1).some((name) => fields[name].value !== "");
  showShape();
  form.scrollIntoView({ block: "center", behavior: isStill() ? "auto" : "smooth" });
  fields.prompt.focus({ preventScroll: true });
  announce("Settings taken over.");
}
