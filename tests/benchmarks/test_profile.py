"""The profile of a step: whose time is whose, that nothing is left behind, and that the parts add up to the step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType

from skylapse.benchmarks.record import SuiteReport, read
from skylapse.benchmarks.suites import nouns, profile
from skylapse.benchmarks.suites.denoise import denoise
from skylapse.benchmarks.suites.nouns import NOUNS, PREFIX, Ranges
from skylapse.runtime.layers.linear import Linear

GROUP = "denoise/profile/64x64x17"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that `--profile` has written of the demo model's default request."""
    path = tmp_path_factory.mktemp("profile") / "new"
    assert denoise(["--quick", "--steps", "4", "--profile", str(path)]) == 0
    return path


def seconds(folder: Path, name: str) -> float:
    report = read(folder / "denoise.json", SuiteReport)
    return sum(next(m.samples for m in report.measurements if m.name == f"{GROUP}/{name}"))


def test_our_nouns_are_nine_tenths_of_a_step_and_more(folder: Path) -> None:
    """The step is the demo model's; the block's own lines, between its norms and products, are named too."""
    step_s = seconds(folder, "profiled")
    named = [noun for noun in {n.name for n in NOUNS} - {"text encoder", "text keys and values", "decode"}]
    parts_s = sum(seconds(folder, name.replace(", ", "-").replace(" ", "-")) for name in named)
    rest_s = seconds(folder, "scheduling-and-the-rest")
    assert parts_s / step_s >= 0.9
    assert parts_s + rest_s == pytest.approx(step_s, rel=1e-3)


def test_every_block_is_counted(folder: Path) -> None:
    report = read(folder / "denoise.json", SuiteReport)
    calls = {m.name.removeprefix(f"{GROUP}/"): m.labels.get("calls") for m in report.measurements}
    for name in ("self-attention", "cross-attention", "qk_norm_rope", "feed-forward", "adaln"):
        assert calls[name] == 6, name
    assert (calls["linear"], calls["patch-embed"], calls["head-and-unpatchify"]) == (24, 1, 1)  # 4 a block
    beside = {m.name.removeprefix(f"{GROUP}/beside/") for m in report.measurements if "/beside/" in m.name}
    assert {"text-encoder", "text-keys-and-values", "decode", "first-step"} <= beside


def test_products_reach_more_of_the_roofline_than_norms(folder: Path) -> None:
    roof = {
        m.name: m.spread.median for m in read(folder / "denoise.json", SuiteReport).measurements if "/roof" in m.name
    }
    assert all(share > 0 for share in roof.values())
    assert roof[f"{GROUP}/feed-forward/roofline"] > roof[f"{GROUP}/rms_norm/roofline"]


def test_trace_is_chrome_s_and_names_our_ranges(folder: Path) -> None:
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    named = {event.get("name") for event in events}
    assert {f"{PREFIX}step", f"{PREFIX}self-attention", f"{PREFIX}text encoder"} <= named
    assert "| feed-forward | 6 |" in (folder / "nouns.md").read_text()
    assert "addmm" in (folder / "operators.txt").read_text()


def test_nothing_of_the_package_is_touched_but_while_it_looks() -> None:
    before = [vars(noun.owner)[noun.attribute] for noun in NOUNS]
    with pytest.raises(RuntimeError, match="a request broke"), Ranges(nvtx=False).watching():
        assert all(vars(n.owner)[n.attribute] is not f for n, f in zip(NOUNS, before, strict=True))
        raise RuntimeError("a request broke")
    assert all(vars(n.owner)[n.attribute] is f for n, f in zip(NOUNS, before, strict=True))


class Part:
    """A profiler's event: microseconds from start to end, and the kernels that it launched."""

    def __init__(self, name: str, start: float, end: float, parent: Part | None = None, *kernels: float) -> None:
        self.name, self.cpu_parent, self.device_type = name, parent, DeviceType.CPU
        self.cpu_time_total, self.time_range = end - start, SimpleNamespace(start=start)
        self.kernels = [SimpleNamespace(name="gemm", duration=duration) for duration in kernels]


def events() -> list[Any]:
    encode = Part(PREFIX + "ticks that encode", 0, 50)
    step = Part(PREFIX + "step", 100, 200)
    block = Part(PREFIX + "modulation table", 110, 190, step)
    add = Part("aten::add", 112, 115, block, 7)
    adaln = Part(PREFIX + "adaln", 120, 150, block)
    norm = Part("aten::layer_norm", 125, 140, adaln, 11, 2)
    later = Part(PREFIX + "step", 300, 330)
    return [later, norm, adaln, add, block, step, encode, Part("aten::zeros", 400, 900)]


def test_a_range_is_less_what_stands_inside_it() -> None:
    found = profile.read(events(), on_gpu=False)
    assert found.steps == pytest.approx([1e-4, 3e-5])
    parts = found.of_steps
    assert parts["adaln"].seconds == pytest.approx([30e-6, 0])
    assert parts["modulation table"].seconds == pytest.approx([50e-6, 0])
    assert parts[profile.OTHER].seconds == pytest.approx([20e-6, 30e-6])
    assert [parts[name].calls for name in ("adaln", "modulation table", profile.OTHER)] == [[1, 0], [1, 0], [1, 1]]
    assert found.beside == pytest.approx({"ticks that encode": 50e-6})


def test_a_kernel_belongs_to_the_range_that_launched_it() -> None:
    found = profile.read(events(), on_gpu=True)
    parts = {name: part.seconds for name, part in found.of_steps.items()}
    assert parts["adaln"] == pytest.approx([13e-6, 0])
    assert parts["modulation table"] == pytest.approx([7e-6, 0])
    assert parts[profile.OTHER] == pytest.approx([0, 0])


def test_costs_are_those_of_the_calls_that_were_counted() -> None:
    layer = Linear(3, {"a": 5})
    ranges, x = Ranges(nvtx=False), torch.zeros(7, 3)
    with torch.inference_mode(), ranges.watching():
        layer(x)
        ranges.counts = True
        layer(x)
        layer(x, "gelu_tanh")
    [(cost, calls)] = ranges.costs["linear"].items()
    assert (cost.num_bytes, cost.operations, calls) == (4 * (15 + 5 + 7 * 3 + 7 * 5), 2 * 7 * 3 * 5, 2)
    pack = SimpleNamespace(cu_seqlens=(0, 3, 7), text=SimpleNamespace(cu_seqlens=(0, 2, 4), key_bias=None), image=None)
    q = torch.zeros(7, 2, 8)
    assert nouns._self_attention(None, q, q, q, pack).operations == 4 * 16 * (3 * 3 + 4 * 4)  # type: ignore[arg-type]
    assert nouns._cross_attention(None, q, pack, 0).operations == 4 * 16 * (3 * 2 + 4 * 2)  # type: ignore[arg-type]


def test_profile_goes_into_a_folder_and_not_over_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="--profile must be a folder, got the file"):
        denoise(["--profile", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="--profile takes one --size, got 2"):
        denoise(["--size", "64x64x1", "--size", "64x64x5", "--profile", str(tmp_path / "new")])
    monkeypatch.setenv("SKYLAPSE_COMPILE", "1")
    with pytest.raises(ValueError, match="eager mode, got SKYLAPSE_COMPILE=1"):
        denoise(["--profile", str(tmp_path / "new")])
    assert (tmp_path / "out").read_text() == "mine"
