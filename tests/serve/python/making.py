"""Videos from prompts, first frames and other videos."""

from __future__ import annotations

import base64
from pathlib import Path

import openai
from side import FAST, KEYS, Side, done, each, entered, finish


async def a_prompt_alone_becomes_a_video_object(side: Side) -> None:
    async with entered(side.held(organization="org-1", project="proj_1")) as client:
        video = await done(client.videos.create(prompt="a star", model="sora-2", seconds="2", size="1280x720"))
        assert type(video).__name__ == "Video" and set(video.to_dict()) >= KEYS
        assert (video.object, video.status, video.progress, video.prompt) == ("video", "queued", 0, "a star")
        assert (video.model, video.seconds, video.size) == ("sora-2", "2", "1280x720")
        assert video.completed_at is video.expires_at is video.error is video.remixed_from_video_id is None
        assert isinstance(video.created_at, int) and isinstance(video.seed, int)
        assert side.answers[-1].request.headers["content-type"].startswith("multipart/form-data")
        again = await done(client.videos.retrieve(video.id))
        assert again.to_dict() == video.to_dict()
        assert (await done(client.videos.delete(video.id))).deleted is True


async def a_first_frame_goes_as_bytes_tuple_path_or_file(side: Side) -> None:
    path = Path(side.facts["picture"])
    with path.open("rb") as file:
        for reference in (path.read_bytes(), ("frame.png", path.read_bytes(), "image/png"), path, file):
            async with entered(side.held()) as client:
                video = await done(client.videos.create(prompt="a star", input_reference=reference))
                assert video.status == "queued"
                await done(client.videos.delete(video.id))


async def a_first_frame_within_a_data_url_goes_by_extra_body(side: Side) -> None:
    url = "data:image/png;base64," + base64.b64encode(Path(side.facts["picture"]).read_bytes()).decode()
    reference = {"input_reference": {"image_url": url}}
    async with entered(side.client()) as client:
        for headers in ({}, {"Content-Type": "application/json"}):
            body = {**reference, **FAST}
            create = client.videos.create(
                prompt="a", input_reference=openai.omit, extra_body=body, extra_headers=headers
            )
            await finish(client, await done(create))


async def references_as_dicts_raise_in_the_sdk_before_anything_is_sent(side: Side) -> None:
    """docs/api.md recommends `omit` and extra_body for this. If it fails, the SDK is mended: simplify the page."""
    reference = {"id": side.facts["finished"]}
    async with entered(side.held()) as client:
        for call in (client.videos.edit, client.videos.extend):
            more = {"seconds": "1"} if call == client.videos.extend else {}
            try:
                await done(call(prompt="a", video=reference, **more))
            except RuntimeError as error:
                assert "received <class 'dict'>" in str(error)
            else:
                raise AssertionError("it was sent")
    assert side.answers == []


async def extensions_go_through_extra_body_and_come_back_as_attributes(side: Side) -> None:
    more = {
        **FAST,
        **dict(seed=7, negative_prompt="dark", guidance_scale=1.5, cache="none", fps=10, priority=0, partial_images=1),
        "resize": False,
    }
    async with entered(side.client()) as client:
        video = await done(client.videos.create(prompt="a star", size="64x64", extra_body=more))
        video = await finish(client, video)
        assert (video.seed, video.seconds, video.native_size, video.native_frames) == (7, "0.5", "64x64", 5)
        assert (video.attempts, video.resumed_from_step) == (0, None)


async def answers_of_default_sizes_pass_strict_validation(side: Side) -> None:
    async with entered(side.held(_strict_response_validation=True)) as client:
        for size in ("720x1280", "1280x720", "1024x1792", "1792x1024"):
            for seconds in ("4", 4):
                video = await done(client.videos.create(prompt="a", size=size, seconds=seconds))
                assert (video.size, video.seconds) == (size, "4")
        page = await done(client.videos.list(limit=8))
        assert len(page.data) == 8
        for video in page.data:
            await done(client.videos.retrieve(video.id))
            assert (await done(client.videos.delete(video.id))).object == "video.deleted"
    async with entered(side.client(_strict_response_validation=True)) as client:
        video = await done(client.videos.create(prompt="a", size="1280x720", extra_body=FAST))
        await finish(client, video)
        assert await each(await done(client.models.list()))


async def a_remix_names_the_video_that_it_was_made_from(side: Side) -> None:
    async with entered(side.client()) as client:
        more = {"num_inference_steps": 2}
        video = await finish(
            client, await done(client.videos.remix(side.facts["finished"], prompt="a", extra_body=more))
        )
        assert (video.remixed_from_video_id, video.prompt) == (side.facts["finished"], "a")


async def videos_are_edited_by_file_by_id_and_by_json(side: Side) -> None:
    video_id, clip = side.facts["finished"], Path(side.facts["clip"])
    more, named = {"num_inference_steps": 2}, {"video": {"id": video_id}}
    json_type = {"Content-Type": "application/json"}
    async with entered(side.client()) as client:
        edit = client.videos.edit
        made = [
            await done(edit(prompt="a", video=clip, extra_body=more)),
            await done(edit(prompt="a", video=openai.omit, extra_body=more | named)),
            await done(edit(prompt="a", video=openai.omit, extra_body=more | named, extra_headers=json_type)),
            await done(client.post("/videos/edits", cast_to=openai.types.Video, body={"prompt": "a"} | more | named)),
        ]
        assert [video.remixed_from_video_id for video in made] == [None, video_id, video_id, video_id]
        kinds = [answer.request.headers["content-type"].partition(";")[0] for answer in side.answers]
        assert kinds == ["multipart/form-data"] * 2 + ["application/json"] * 2
        for video in made:
            await finish(client, video)


async def videos_are_extended_by_file_by_id_and_by_json(side: Side) -> None:
    clip, named = Path(side.facts["clip"]), {"video": {"id": side.facts["finished"]}}
    more = {"num_inference_steps": 2}
    json_type = {"Content-Type": "application/json"}
    async with entered(side.client()) as client:
        extend = client.videos.extend
        made = [
            await done(extend(prompt="a", seconds="1", video=clip, extra_body=more)),
            await done(extend(prompt="a", seconds="1", video=openai.omit, extra_body=more | named)),
            await done(
                extend(prompt="a", seconds="1", video=openai.omit, extra_body=more | named, extra_headers=json_type)
            ),
        ]
        for video in made:
            video = await finish(client, video)
            assert video.seconds == side.facts["extended_seconds"], "the stitched clip's length"
