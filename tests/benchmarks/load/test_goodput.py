"""`skylapse bench goodput`: the rules of the contest, stubs in the services' place; and that services end with us."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from aiohttp import web

from skylapse.benchmarks.load import goodput as contest_of
from skylapse.benchmarks.load import services
from skylapse.benchmarks.load.goodput import OURS, PEER, Contest, goodput
from skylapse.benchmarks.load.services import Service, idle_cores, started
from skylapse.benchmarks.load.stub import Stub
from skylapse.benchmarks.load.workloads import mixed
from skylapse.benchmarks.record import SuiteReport, read

Serve = Callable[[web.Application], str]  # of the fixture `serving`
STUB = (sys.executable, "-m", "skylapse.benchmarks.load.stub")


def listener(url: str) -> int:
    """The process that listens there."""
    port = int(url.rpartition(":")[2])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inode = next(row[9] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A")
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(os.readlink(link) == f"socket:[{inode}]" for link in (folder / "fd").iterdir()):
                return int(folder.name)
    raise AssertionError(f"nobody listens at {url}")


def standing_in(monkeypatch: pytest.MonkeyPatch, peer: str, ours: str) -> list[int]:
    """The batch sizes that the peer is told on the way."""
    tuned: list[int] = []

    @contextmanager
    def service(name: str, url: str) -> Iterator[Service]:
        yield Service(name, url, None, 0.0, "a stub")

    monkeypatch.setattr(contest_of, "plain_ray_serve", lambda *_: service(PEER, peer))
    monkeypatch.setattr(contest_of, "ours", lambda *_: service(OURS, ours))
    monkeypatch.setattr(contest_of, "idle_cores", lambda services: {one.name: 0.0 for one in services})
    monkeypatch.setattr(contest_of, "tune", lambda peer, size: tuned.append(size))
    monkeypatch.setattr(contest_of, "FACTOR", 6.0)  # stubs take so little that a busy machine adds as much again
    return tuned


def test_slo_and_load_come_from_the_peer_alone() -> None:
    solo_s = {PEER: {"small": 1.0, "large": 5.0}, OURS: {"small": 0.1, "large": 0.5}}
    contest = Contest({}, mixed(), solo_s)
    assert [(slo.kind, slo.limit_s) for slo in contest.slos] == [("small", 3.0), ("large", 15.0)]
    assert contest.capacity == 4 / (3 * 1.0 + 5.0)
    assert contest.longest_s == 15.0


def test_a_service_three_times_as_fast_has_more_goodput_and_the_file_has_all_of_it(
    serving: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, ours = Stub(0.06, slots=1), Stub(0.02, slots=1)
    tuned = standing_in(monkeypatch, serving(peer.app()), serving(ours.app()))
    out = tmp_path / "r.json"
    arguments = ["--loads", "0.6,2.5", "--seeds", "0,1", "--window", "1", "--solo", "3", "--out", str(out)]
    assert goodput(arguments) in (0, 1)  # 1: the generator itself was late on this machine
    found = read(out, SuiteReport)
    assert found.partial is None and not [name for name in found.failures if not name.endswith("trusted")]
    best = found.settings["max_batch_of_the_peer"]
    assert tuned == [1, 4, 10, best]  # all are the same to a stub, which makes no batches
    ratio = next(one for one in found.comparisons if one.name == "goodput/most/requests")
    assert (ratio.of, ratio.to, ratio.spread.n) == (OURS, PEER, 2)
    assert ratio.spread.median > 1.4
    curves = {curve.name: curve for curve in found.curves}
    assert len(curves) == 12  # of each service, in requests and in seconds of video: two seeds and their mean
    assert [x for x, _ in curves["goodput/requests/ray_serve"].points] == pytest.approx(
        [share * found.settings["peers_solo_capacity_per_s"] for share in (0.6, 2.5)]
    )
    played = [[str(body) for body in one.asked if body["prompt"] != "a star"] for one in (peer, ours)]
    alone, tuning = 2 * 4, len(played[0]) - len(played[1])
    assert tuning > 0 and tuning % 3 == 0
    assert sorted(played[0][:alone] + played[0][alone + tuning :]) == sorted(played[1])  # all but the probes in between
    good = next(one for one in found.measurements if one.name == "goodput/seed0/load2.5/good/ray_serve")
    assert float(good.labels["requests"]) > float(good.labels["good"])


def test_a_run_out_of_time_sums_up_what_both_have_played(
    serving: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing_in(monkeypatch, serving(Stub(0.02).app()), serving(Stub(0.02).app()))
    out = tmp_path / "r.json"
    arguments = ["--loads", "0.5,1", "--seeds", "0", "--window", "1", "--solo", "1", "--limit", "1.5"]
    arguments += ["--max-batch", "1"]
    assert goodput([*arguments, "--out", str(out)]) == 1
    found = read(out, SuiteReport)
    assert found.partial is not None and "out of time (1.5 s) before seed 0" in found.partial
    assert [len(curve.points) for curve in found.curves if curve.name == "goodput/requests/skylapse"] == [1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--loads", "1,x"], "loads must be different numbers"),
        (["--seeds", "1,1"], "seeds must be different numbers"),
        (["--warm-up", "1"], "warm-up must be from 0 to below 1"),
        (["--window", "-3"], "window, solo and max-batch must be above 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_started(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        goodput(arguments)


def test_a_service_ends_with_the_block_and_one_that_does_not_start_is_told_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "REST_LOOK_S", 0.3)
    with started("stub", STUB, "/openapi.json", None, tmp_path / "log") as service:
        pid = listener(service.url)
        assert service.cpu_s()[pid] > 0.1  # it has imported aiohttp
        assert 0 <= idle_cores((service,))["stub"] < 0.25
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    broken = (sys.executable, "-c", "import sys; sys.exit('no model here')")
    with pytest.raises(RuntimeError, match="no model here"), started("x", broken, "/", None, tmp_path / "log"):
        pass


def test_a_service_ends_where_its_starter_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from skylapse.benchmarks.load.services import started\n"
        f"with started('stub', {STUB!r}, '/openapi.json', None, Path({str(tmp_path / 'log')!r})) as service:\n"
        "    print(service.url, flush=True); sys.stdin.read()\n"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None and starter.stdin is not None
    service = os.pidfd_open(listener(starter.stdout.readline().strip()))
    starter.kill()
    starter.wait()
    starter.stdin.close()
    starter.stdout.close()
    ended = select.select([service], [], [], 10.0)[0]  # a process' descriptor can be read once it has ended
    os.close(service)
    assert ended
