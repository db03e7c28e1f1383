// What a client of OpenAI's JavaScript SDK does; a program that reads the facts from its standard input and prints
// {"version": ..., "results": {scenario: null, or the stack of what went wrong}}. `sdk.py` makes the facts.
'use strict';

const assert = require('node:assert/strict');
const fs = require('node:fs');
const http = require('node:http');
const OpenAI = require('openai');
const { VERSION } = require('openai/version');

const FAST = { num_inference_steps: 2, num_frames: 5 };  // a quarter of a second
const KEYS = ['id', 'object', 'model', 'status', 'progress', 'created_at', 'completed_at', 'expires_at', 'prompt',
  'size', 'seconds', 'remixed_from_video_id', 'error'];
const facts = JSON.parse(fs.readFileSync(0, 'utf8'));
const clip = fs.readFileSync(facts.clip);
const scenarios = {};

let requests = [];  // of the scenario that runs: {method, url, status, headers}

function client({ url = 'url', key = 'key', ...options } = {}) {
  const heard = async (target, init) => {
    const answer = await fetch(target, init);
    const sent = { method: init.method.toUpperCase(), url: String(target), headers: new Headers(init.headers) };
    requests.push({ ...sent, status: answer.status, answered: answer.headers });
    return answer;
  };
  return new OpenAI({ baseURL: facts[url], apiKey: facts[key] ?? key, fetch: heard, ...options });
}

const held = (key = 'held_key') => client({ url: 'held_url', key });

async function refused(kind, call, { attempts = 1, ...expected }) {
  const before = requests.length;
  const error = await call().then(() => assert.fail('it was not refused'), (raised) => raised);
  assert.equal(error.constructor, kind, error.stack);
  const told = Object.fromEntries(Object.keys(expected).map((name) => [name, error[name]]));
  assert.deepEqual(told, expected);
  assert.equal(error.requestID, error.headers.get('x-request-id'));
  assert.match(error.requestID, /^req_/);
  assert.equal(requests.length - before, attempts, 'requests');
  return error;
}

async function finish(some, video) {
  while (video.status === 'queued' || video.status === 'in_progress') {
    await new Promise((resolve) => setTimeout(resolve, 30));
    video = await some.videos.retrieve(video.id);
  }
  assert.deepEqual([video.status, video.progress, video.error], ['completed', 100, null]);
  return video;
}

async function all(pages) {
  const items = [];
  for await (const item of pages) items.push(item);
  return items;
}

// ------------------------------------------------------------------------------------------------------------ create

scenarios.a_prompt_alone_becomes_a_video_object = async () => {
  const video = await held().videos.create({ prompt: 'a star', model: 'sora-2', seconds: '2', size: '1280x720' });
  for (const key of KEYS) assert.ok(key in video, key);
  assert.deepEqual([video.object, video.status, video.progress], ['video', 'queued', 0]);
  assert.deepEqual([video.model, video.seconds, video.size], ['sora-2', '2', '1280x720']);
  assert.match(video._request_id, /^req_/);
  assert.deepEqual({ ...(await held().videos.retrieve(video.id)) }, { ...video });
  await held().videos.delete(video.id);
};

scenarios.a_first_frame_goes_as_stream_file_or_response = async () => {
  const some = held();
  const bytes = fs.readFileSync(facts.picture);
  const references = [fs.createReadStream(facts.picture), await OpenAI.toFile(bytes, 'frame.png'),
    new File([bytes], 'frame.png', { type: 'image/png' })];
  for (const input_reference of references) {
    const video = await some.videos.create({ prompt: 'a star', input_reference });
    await some.videos.delete(video.id);
  }
};

scenarios.a_first_frame_goes_within_a_data_url = async () => {
  const image_url = `data:image/png;base64,${fs.readFileSync(facts.picture).toString('base64')}`;
  const some = held();
  const video = await some.videos.create({ prompt: 'a star', input_reference: { image_url } });
  await some.videos.delete(video.id);
};

scenarios.extensions_go_as_extra_fields_and_come_back = async () => {
  const some = client();
  const more = { seed: 7, negative_prompt: 'dark', guidance_scale: 1.5, cache: 'none', fps: 10, resize: false };
  const video = await some.videos.create({ prompt: 'a star', size: '64x64', ...FAST, ...more });
  const { seed, seconds, native_size, native_frames } = await finish(some, video);
  assert.deepEqual([seed, seconds, native_size, native_frames], [7, '0.5', '64x64', 5]);
};

// ----------------------------------------------------------------------------------------------- read, list, delete

scenarios.pages_follow_one_another_to_the_last_video = async () => {
  const some = held('listed_key');
  for (const [order, expected] of [['asc', facts.listed], ['desc', [...facts.listed].reverse()]]) {
    requests = [];
    const found = await all(some.videos.list({ limit: 2, order }));
    assert.deepEqual(found.map((video) => video.id), expected);
    assert.equal(requests.length, 3, 'two and a half pages');
  }
  const page = await some.videos.list({ limit: 2 });
  assert.deepEqual([page.has_more, page.last_id, page.hasNextPage()], [true, page.data[1].id, true]);
  assert.deepEqual(await all(held('empty_key').videos.list()), []);
};

scenarios.a_deleted_video_is_gone = async () => {
  const some = held();
  const { id } = await some.videos.create({ prompt: 'a' });
  assert.deepEqual({ ...(await some.videos.delete(id)) }, { id, object: 'video.deleted', deleted: true });
  const missing = { status: 404, code: 'video_not_found', type: 'invalid_request_error' };
  await refused(OpenAI.NotFoundError, () => some.videos.retrieve(id), missing);
};

scenarios.models_are_listed_and_found = async () => {
  const some = client();
  const models = await all(some.models.list());
  assert.ok(models.some((model) => model.id === 'sora-2'));
  for (const model of models) assert.deepEqual({ ...(await some.models.retrieve(model.id)) }, { ...model });
};

scenarios.content_is_downloaded = async () => {
  const some = client();
  const content = await some.videos.downloadContent(facts.finished);
  assert.equal(content.headers.get('content-type'), 'video/mp4');
  assert.deepEqual(Buffer.from(await content.arrayBuffer()), clip);
  const thumbnail = await some.videos.downloadContent(facts.finished, { variant: 'thumbnail' });
  assert.equal((await thumbnail.blob()).type, 'image/webp');
  const stream = (await some.videos.downloadContent(facts.finished)).body;
  assert.deepEqual(Buffer.concat(await all(stream)), clip);
};

// --------------------------------------------------------------------------------------------------- wait and watch

scenarios.events_are_streamed_up_to_the_end = async () => {
  const some = client();
  const { id } = await some.videos.create({ prompt: 'a', ...FAST, partial_images: 1 });
  const events = await all(await some.get(`/videos/${id}/events`, { stream: true }));
  assert.equal(events.at(-1).type, 'video.completed');
  for (const event of events) for (const key of KEYS) assert.ok(key in event.video, key);
  const [failed] = await all(await some.get(`/videos/${facts.failed}/events`, { stream: true }));
  assert.deepEqual([failed.type, failed.video.error.code], ['video.failed', 'cancelled']);
};

scenarios.a_webhook_is_delivered_and_unwrapped = async () => {
  const some = client({ webhookSecret: facts.webhook_secret });
  let server;
  const delivered = new Promise((resolve) => {
    server = http.createServer(async (request, response) => {
      const body = Buffer.concat(await all(request)).toString();
      response.writeHead(204).end();
      resolve({ body, headers: request.headers });
    });
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const webhook_url = `http://127.0.0.1:${server.address().port}/hook`;
  const { id } = await some.videos.create({ prompt: 'a', ...FAST, webhook_url });
  const { body, headers } = await delivered;
  server.close();
  const event = await some.webhooks.unwrap(body, headers);
  assert.deepEqual([event.type, event.object, event.data.id], ['video.completed', 'event', id]);
  await assert.rejects(some.webhooks.unwrap(`${body} `, headers), OpenAI.InvalidWebhookSignatureError);
};

// ------------------------------------------------------------------------------------------------ videos from videos

scenarios.videos_are_remixed_edited_and_extended = async () => {
  const some = client();
  const more = { num_inference_steps: 2 };
  const id = facts.finished;
  const remix = await some.videos.remix(id, { prompt: 'a', ...more });
  const edits = [
    await some.videos.edit({ prompt: 'a', video: { id }, ...more }),
    await some.videos.edit({ prompt: 'a', video: fs.createReadStream(facts.clip), ...more }),
    await some.post('/videos/edits', { body: { prompt: 'a', video: { id }, ...more } }),
  ];
  const extensions = [
    await some.videos.extend({ prompt: 'a', seconds: '1', video: { id }, ...more }),
    await some.videos.extend({ prompt: 'a', seconds: '1', video: fs.createReadStream(facts.clip), ...more }),
  ];
  const sources = [remix, ...edits, ...extensions].map((video) => video.remixed_from_video_id);
  assert.deepEqual(sources, [id, id, null, id, id, null]);
  for (const video of [remix, ...edits]) await finish(some, video);
  for (const video of extensions) assert.equal((await finish(some, video)).seconds, facts.extended_seconds);
};

// ------------------------------------------------------------------------------------------------------------ errors

scenarios.errors_are_of_the_sdks_own_classes = async () => {
  const video = { prompt: 'a' };
  const stranger = client({ key: 'sk-nobody' });
  await refused(OpenAI.AuthenticationError, () => stranger.models.list(), { status: 401, code: 'invalid_api_key' });
  const reader = client({ key: 'reader_key' });
  const denied = { status: 403, code: 'insufficient_permissions', type: 'permission_error' };
  await refused(OpenAI.PermissionDeniedError, () => reader.videos.create(video), denied);
  const wrong = { status: 400, code: 'unknown_parameter', param: 'sead', type: 'invalid_request_error' };
  await refused(OpenAI.BadRequestError, () => held().videos.create({ ...video, sead: 1 }), wrong);
  const unknown = { status: 404, code: 'unknown_url', param: null };
  await refused(OpenAI.NotFoundError, () => held().post('/voices', { body: {} }), unknown);
  const character = { name: 'mia', video: fs.createReadStream(facts.clip) };
  const unsupported = { status: 400, code: 'unsupported' };
  await refused(OpenAI.BadRequestError, () => held().videos.createCharacter(character), unsupported);
  const early = { status: 400, code: 'video_not_ready' };
  const { id } = await held().videos.create(video);
  await refused(OpenAI.BadRequestError, () => held().videos.downloadContent(id), early);
  await held().videos.delete(id);
};

scenarios.a_used_up_quota_says_when_to_come_back = async () => {
  const full = held('full_key').withOptions({ maxRetries: 0 });
  const used_up = { status: 429, code: 'quota_exceeded', type: 'rate_limit_error' };
  const error = await refused(OpenAI.RateLimitError, () => full.videos.create({ prompt: 'a' }), used_up);
  assert.equal(error.headers.get('retry-after'), '10');
};

scenarios.a_used_idempotency_key_is_one_job_and_a_conflict_is_not_retried = async () => {
  const some = held();
  const headers = { 'Idempotency-Key': 'javascript' };
  const { id } = await some.videos.create({ prompt: 'a' }, { headers });
  assert.equal((await some.videos.create({ prompt: 'a' }, { headers })).id, id);
  const conflict = { status: 409, code: 'idempotency_conflict' };
  await refused(OpenAI.ConflictError, () => some.videos.create({ prompt: 'b' }, { headers }), conflict);
  await some.videos.delete(id);
};

scenarios.raw_posts_work = async () => {
  const some = held();
  const video = await some.post('/videos', { body: { prompt: 'a', seconds: 2 } });
  assert.equal(video.seconds, '2');
  const cancelled = await some.post(`/videos/${video.id}/cancel`);
  assert.deepEqual([cancelled.status, cancelled.error.code], ['failed', 'cancelled']);
  await some.videos.delete(video.id);
};

// ----------------------------------------------------------------------------------------------------------- program

async function main() {
  const results = {};
  for (const [name, run] of Object.entries(scenarios)) {
    requests = [];
    const began_ms = performance.now();
    results[name] = await run().then(() => null, (error) => error.stack ?? String(error));
    console.error(`${((performance.now() - began_ms) / 1000).toFixed(2)} s ${name}`);
  }
  process.stdout.write(JSON.stringify({ version: VERSION, results }));
}

main().then(() => process.exit(0));
