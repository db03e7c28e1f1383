"""Artifacts: written once, whole or not at all, read by ranges, and never outside their folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from urllib.request import Request, urlopen

import pytest
from bucket import bucket_server, new_bucket

from skylapse.serve.jobs import artifacts
from skylapse.serve.jobs.artifacts import ArtifactStore

KEY = "jobs/video_1/1/video.mp4"
DATA = bytes(range(256)) * 20


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with bucket_server() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str) -> ArtifactStore:
    url, options = new_bucket(endpoint)
    return ArtifactStore(url, **options)


@pytest.fixture(params=["folder", "memory", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    """A folder, fsspec's file system in memory, which has no rename and no folders, and a bucket behind S3's API."""
    if request.param == "bucket":
        store = request.getfixturevalue("bucket")
    else:
        store = ArtifactStore(str(tmp_path) if request.param == "folder" else f"memory://{tmp_path}")
    yield store
    store.remove("jobs")


def test_what_was_written_is_read_whole_and_in_ranges(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "clip").write_bytes(DATA)
    for key, source in ((KEY, DATA), ("jobs/video_1/2/video.mp4", tmp_path / "clip")):
        artifact = store.write(key, source)
        assert (artifact.key, artifact.num_bytes, artifact.sha256) == (key, 5120, hashlib.sha256(DATA).hexdigest())
        assert b"".join(store.read(key)) == DATA and store.size(key) == 5120
        assert b"".join(store.read(key, 100, 300)) == DATA[100:300]
        assert b"".join(store.read(key, 5000, 9000)) == DATA[5000:] and b"".join(store.read(key, 6000)) == b""


def test_a_key_is_written_once(store: ArtifactStore) -> None:
    store.write(KEY, b"right")
    with pytest.raises(FileExistsError, match=KEY):
        store.write(KEY, b"wrong")
    assert b"".join(store.read(KEY)) == b"right"


def test_large_files_come_in_pieces(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "CHUNK_BYTES", 1000)
    store.write(KEY, DATA)
    assert [len(piece) for piece in store.read(KEY, 10, 2510)] == [1000, 1000, 500]


def test_a_file_that_is_not_there_is_not_found_before_the_first_piece(store: ArtifactStore) -> None:
    with pytest.raises(FileNotFoundError):
        store.read(KEY)
    with pytest.raises(FileNotFoundError):
        store.size(KEY)


def test_a_jobs_files_are_listed_and_removed_and_nobody_elses(store: ArtifactStore) -> None:
    for key in ("jobs/video_1/1/a", "jobs/video_1/2/b", "jobs/video_12/1/c"):
        store.write(key, b"x")
    assert store.keys("jobs/video_1") == ["jobs/video_1/1/a", "jobs/video_1/2/b"]
    assert store.remove("jobs/video_1") == 2 and store.remove("jobs/video_1") == 0
    assert store.keys("jobs") == ["jobs/video_12/1/c"]


def test_folders_tell_when_something_was_written_in_them_last(store: ArtifactStore) -> None:
    """An upload is there before its job's row, and must not look like what a job that is gone has left."""
    assert store.folders("jobs") == []
    for key in ("jobs/video_1/1/a", "jobs/video_1/input/b", "jobs/video_2/1/c"):
        store.write(key, b"x")
    assert store.folders("jobs", older_than_s=-60.0) == ["video_1", "video_2"]
    assert store.folders("jobs", older_than_s=3600.0) == []


@pytest.mark.parametrize("store", ["folder", "bucket"], indirect=True)  # the memory's forgets nothing
def test_a_failed_write_leaves_no_file(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(source: object) -> Iterator[bytes]:
        yield b"half"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "_chunks", breaks)
    with pytest.raises(OSError, match="No space left"):
        store.write(KEY, b"")
    assert store.files.find(store.root) == []
    monkeypatch.undo()
    store.write(KEY, b"now")
    assert b"".join(store.read(KEY)) == b"now"


@pytest.mark.parametrize(
    "key",
    ["", "x", "/etc/passwd", "../x", "jobs/../x", "jobs/./x", "jobs//x", "jobs/x\0", "jobs/X", "jobs/.x", "a/"],
)
def test_keys_that_lead_elsewhere_are_refused(key: str, tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    for call in (store.read, store.size, lambda key: store.write(key, b"x")):
        with pytest.raises(ValueError, match="an artifact's key must be like"):
            call(key)


def test_a_folder_signs_no_urls(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    store.write(KEY, DATA)
    assert store.sign(KEY, 60) is None


def test_a_signed_url_reads_a_clip_and_its_ranges_without_a_key(bucket: ArtifactStore) -> None:
    bucket.write(KEY, DATA)
    url = bucket.sign(KEY, 60)
    assert url is not None and "a-secret" not in url
    with urlopen(url) as answer:
        assert (answer.read(), answer.headers["content-type"]) == (DATA, "video/mp4")
        assert answer.headers["accept-ranges"] == "bytes"
    with urlopen(Request(url, headers={"range": "bytes=100-299"})) as answer:
        assert (answer.status, answer.read()) == (206, DATA[100:300])
        assert answer.headers["content-range"] == "bytes 100-299/5120"


def test_what_is_signed_is_one_key_for_a_time(bucket: ArtifactStore) -> None:
    """The stand-in checks no signature, so this reads what is signed: AWS refuses anything else by it."""
    bucket.write(KEY, DATA)
    parsed = urlsplit(bucket.sign(KEY, 60) or "")
    query = parse_qs(parsed.query)
    assert parsed.path.endswith(f"/clips/{KEY}")
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"] and query["X-Amz-Expires"] == ["60"]
    assert len(query["X-Amz-Signature"][0]) == 64


def test_a_file_that_another_process_wrote_is_seen_at_once(endpoint: str) -> None:
    url, options = new_bucket(endpoint)
    here, there = (ArtifactStore(url, **options, skip_instance_cache=True) for _ in range(2))
    here.write("jobs/video_1/1/preview", b"x")
    assert here.keys("jobs/video_1") == ["jobs/video_1/1/preview"] and here.size("jobs/video_1/1/preview") == 1
    there.write("jobs/video_1/1/video.mp4", DATA)
    assert b"".join(here.read("jobs/video_1/1/video.mp4")) == DATA and here.size("jobs/video_1/1/video.mp4") == 5120
    there.remove("jobs/video_1")
    with pytest.raises(FileNotFoundError):
        here.read("jobs/video_1/1/video.mp4")


def test_large_files_go_up_in_parts_and_a_range_fetches_little_more(
    bucket: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    large = tmp_path / "clip"
    large.write_bytes(b"0123456789abcdef" * (4 << 20))  # 64 MiB: above s3fs' parts of 50
    artifact = bucket.write(KEY, large)
    assert artifact.num_bytes == bucket.size(KEY) == 64 << 20
    fetched: list[int] = []
    fetch = s3fs.core._fetch_range

    def counted(files: Any, bucket: str, key: str, version: Any, start: int, end: int, **options: Any) -> bytes:
        fetched.append(end - start)
        return fetch(files, bucket, key, version, start, end, **options)

    monkeypatch.setattr(s3fs.core, "_fetch_range", counted)
    assert b"".join(bucket.read(KEY, (8 << 20) + 3, (8 << 20) + 9)) == b"345678"
    assert 6 <= sum(fetched) <= 5 << 20


def test_a_large_write_that_fails_leaves_no_parts(bucket: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(source: object) -> Iterator[bytes]:
        yield b"x" * (51 << 20)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(artifacts, "_chunks", breaks)
    with pytest.raises(OSError, match="Input/output"):
        bucket.write(KEY, b"")
    name = bucket.root.split("/")[0]
    assert bucket.keys("jobs") == [] and bucket.files.list_multipart_uploads(name) == []
