"""/healthz and /metrics tell which decoder runs, what leaves the GPU, and what has been demoted."""

from __future__ import annotations

from pathlib import Path

from fastapi.testclient import TestClient

from skylapse.runtime.models.residency import ResidencyReport
from skylapse.runtime.vae.backends import DecoderReport
from skylapse.serve.http.app import create_app
from skylapse.serve.jobs.services import open_context
from skylapse.serve.store.processes import ENGINE


def test_decoders_and_their_demotions_are_told(tmp_path: Path) -> None:
    context = open_context({"data": str(tmp_path), "metrics_open": True})
    good = DecoderReport("onnxruntime", "measured at 8 x 8 latents: onnxruntime 0.05 s, eager 0.07 s", [])
    bad = DecoderReport("eager", "onnxruntime was demoted: it failed", ["onnxruntime: it failed"])
    for name, report in (("a", good), ("b", bad)):
        context.processes.beat(name, ENGINE, {"model": "demo", **report.facts})
    with TestClient(create_app(context)) as client:
        engines = {engine["id"]: engine for engine in client.get("/healthz").json()["engines"]}
        lines = client.get("/metrics").text.splitlines()
    context.database.close()
    assert engines["a"]["decoder"] == "onnxruntime" and engines["a"]["decoder_why"] == good.why
    assert engines["a"]["decoder_demotions"] == 0 and "decoder_demoted" not in engines["a"]
    assert engines["b"]["decoder_demoted"] == ["onnxruntime: it failed"]
    assert 'skylapse_engine_decoder{backend="onnxruntime",engine="a"} 1.0' in lines
    assert 'skylapse_engine_decoder{backend="eager",engine="b"} 1.0' in lines
    assert 'skylapse_engine_decoder_demotions{engine="b"} 1.0' in lines


def test_what_leaves_an_engines_gpu_is_told(tmp_path: Path) -> None:
    context = open_context({"data": str(tmp_path), "metrics_open": True})
    report = ResidencyReport("auto", ("text_encoder", "transformer"), ("transformer",), num_moves=3, moved_bytes=7)
    context.processes.beat("a", ENGINE, {"model": "demo", **report.facts})
    with TestClient(create_app(context)) as client:
        (engine,) = client.get("/healthz").json()["engines"]
    context.database.close()
    assert engine["offload"] == "auto" and engine["moved"] == ["text_encoder", "transformer"]
    assert (engine["on_device"], engine["num_moves"], engine["moved_bytes"]) == (["transformer"], 3, 7)
