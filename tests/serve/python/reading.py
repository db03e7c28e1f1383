"""Videos, their files and models: listed, read, deleted."""

from __future__ import annotations

import tempfile
from pathlib import Path

import openai
from side import Side, done, each, entered


async def pages_follow_one_another_to_the_last_video(side: Side) -> None:
    async with entered(side.held("listed_key")) as client:
        page = await done(client.videos.list(limit=2, order="asc"))
        assert page.object == "list" and page.has_more is True and page.last_id == page.data[-1].id
        assert [v.id for v in page.data] == side.facts["listed"][:2]
        for order, expected in (("asc", side.facts["listed"]), ("desc", side.facts["listed"][::-1])):
            side.answers.clear()
            found = client.videos.list(limit=2, order=order)
            assert [v.id for v in await each(found)] == expected
            assert len(side.answers) == 3, "two and a half pages"
        after = await each(client.videos.list(after=side.facts["listed"][3], order="asc"))
        assert [v.id for v in after] == side.facts["listed"][4:]
        assert len(await each(client.videos.list())) == 5
        wrong = dict(status_code=400, code="invalid_value", param="after")
        await side.refused(openai.BadRequestError, lambda: client.videos.list(after="video_1"), **wrong)
    async with entered(side.held("empty_key")) as client:
        assert await each(client.videos.list()) == []


async def a_deleted_video_is_gone(side: Side) -> None:
    async with entered(side.held()) as client:
        video = await done(client.videos.create(prompt="a"))
        gone = await done(client.videos.delete(video.id))
        assert (gone.id, gone.object, gone.deleted) == (video.id, "video.deleted", True)
        missing = dict(status_code=404, code="video_not_found", type="invalid_request_error")
        for call in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
            await side.refused(openai.NotFoundError, lambda call=call: call(video.id), **missing)
        assert video.id not in [v.id for v in await each(client.videos.list())]


async def models_are_listed_and_found(side: Side) -> None:
    async with entered(side.client()) as client:
        models = await each(client.models.list())
        assert {"sora-2", "sora-2-pro"} < {model.id for model in models}
        for model in models:
            assert type(model) is type(models[0]) and (model.object, model.owned_by) == ("model", "skylapse")
            assert isinstance(model.created, int) and model.native_sizes and model.max_seconds > 4
            assert (await done(client.models.retrieve(model.id))).to_dict() == model.to_dict()
        missing = dict(status_code=404, code="model_not_found", param="model")
        await side.refused(openai.NotFoundError, lambda: client.models.retrieve("sora-3"), **missing)
        await side.refused(openai.NotFoundError, lambda: client.videos.create(prompt="a", model="sora-3"), **missing)


async def content_is_read_written_and_streamed(side: Side) -> None:
    video_id, clip = side.facts["finished"], Path(side.facts["clip"]).read_bytes()
    async with entered(side.client()) as client:
        content = await done(client.videos.download_content(video_id))
        assert content.response.headers["content-type"] == "video/mp4"
        assert await done(content.aread() if side.is_async else content.read()) == content.content == clip
        with tempfile.TemporaryDirectory() as folder:
            content.write_to_file(f"{folder}/clip.mp4")
            assert Path(f"{folder}/clip.mp4").read_bytes() == clip
        thumbnail = await done(client.videos.download_content(video_id, variant="thumbnail"))
        assert thumbnail.response.headers["content-type"] == "image/webp" and thumbnail.content[8:12] == b"WEBP"
        part = await done(client.videos.download_content(video_id, extra_headers={"Range": "bytes=4-7"}))
        assert (part.response.status_code, part.content) == (206, b"ftyp")
        stream = client.videos.with_streaming_response.download_content(video_id)
        async with entered(stream) as response:
            assert b"".join(await each(response.iter_bytes(1000))) == clip
        wrong = dict(status_code=400, code="unsupported", param="variant")
        sheet = "spritesheet"
        await side.refused(
            openai.BadRequestError, lambda: client.videos.download_content(video_id, variant=sheet), **wrong
        )


async def content_that_is_not_there_yet_is_refused_once(side: Side) -> None:
    async with entered(side.held()) as client:
        video = await done(client.videos.create(prompt="a"))
        early = dict(status_code=400, code="video_not_ready", type="invalid_request_error")
        await side.refused(openai.BadRequestError, lambda: client.videos.download_content(video.id), **early)
        await done(client.post(f"/videos/{video.id}/cancel", cast_to=openai.types.Video, body={}))
        late = dict(status_code=400, code="video_failed")
        await side.refused(openai.BadRequestError, lambda: client.videos.download_content(video.id), **late)
        await done(client.videos.delete(video.id))
