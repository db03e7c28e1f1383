// A job as the commands that would make it again. Prompts are quoted, never trusted.

const OPTIONS = ["seed", "num_inference_steps", "guidance_scale", "cache", "negative_prompt"];
const isSet = (value) => value !== null && value !== undefined && value !== "";

// In single quotes a shell reads nothing into anything but the quote itself.
const shell = (text) => (/^[\w.:/=-]+$/.test(text) ? `${text}` : `'${`${text}`.replaceAll("'", `'\\''`)}'`);
// A JSON string is a Python string too, but for halves of surrogate pairs, which JSON.stringify escapes the same way.
const python = (value) => JSON.stringify(value);

export function curl(video, origin = location.origin) {
  const key = `-H "Authorization: Bearer $OPENAI_API_KEY"`;
  let create;
  if (video.remixed_from_video_id) {
    const body = shell(JSON.stringify({ prompt: video.prompt }));
    create = [`curl ${origin}/v1/videos/${video.remixed_from_video_id}/remix`, key];
    create.push(`-H "Content-Type: application/json"`, `--data-raw ${body}`);
  } else {
    // --form-string: with -F a prompt that begins with @ would send a file of that name
    create = [`curl ${origin}/v1/videos`, key];
    for (const name of ["model", "prompt", "size", "seconds", ...OPTIONS]) {
      if (isSet(video[name])) create.push(`--form-string ${shell(`${name}=${video[name]}`)}`);
    }
  }
  const file = [`curl ${origin}/v1/videos/${video.id}/content`, key, `-o ${video.id}.mp4`];
  return `${create.join(" \\\n  ")}\n\n# the file, once it is there\n${file.join(" \\\n  ")}\n`;
}

export function pythonCode(video, origin = location.origin) {
  const lines = ["import os", "", "from openai import OpenAI", ""];
  lines.push(`client = OpenAI(base_url=${python(`${origin}/v1`)}, api_key=os.environ["OPENAI_API_KEY"])`);
  if (video.remixed_from_video_id) {
    lines.push(`video = client.videos.remix(${python(video.remixed_from_video_id)}, prompt=${python(video.prompt)})`);
    lines.push("video = client.videos.poll(video.id)");
  } else {
    const extra = OPTIONS.filter((name) => isSet(video[name])).map((name) => `${python(name)}: ${python(video[name])}`);
    lines.push("video = client.videos.create_and_poll(");
    for (const name of ["model", "prompt", "size", "seconds"]) lines.push(`    ${name}=${python(video[name])},`);
    if (extra.length > 0) lines.push(`    extra_body={${extra.join(", ")}},`);
    lines.push(")");
  }
  lines.push(`client.videos.download_content(video.id).write_to_file("clip.mp4")`);
  return `${lines.join("\n")}\n`;
}
