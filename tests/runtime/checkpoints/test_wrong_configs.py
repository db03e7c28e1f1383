"""Fields of a model's configs that are wrong: each is named in one line, by `models inspect` and `generate` alike."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from model_folders import CARD, IMAGE, INDEX, SCHEDULER, TEXT, TRANSFORMER, VAE, set_fields

from skylapse import Engine
from skylapse.runtime.checkpoints.registry import read_folder
from skylapse.runtime.families.wan.config import WanConfig
from skylapse.runtime.sampler.config import SolverConfig
from skylapse.runtime.vae.wan_config import WanVAEConfig
from skylapse.serve.core.config import ServeConfig
from skylapse.serve.jobs.served_models import check_models

WRONG: list[tuple[str, str, Any, str]] = [
    (TRANSFORMER, "num_layers", "two", 'must be a whole number, got "two"'),
    (TRANSFORMER, "num_layers", 10**9, "must be from 1 to 256, got 1000000000"),
    (TRANSFORMER, "num_layers", True, "must be a whole number, got true"),
    (TRANSFORMER, "num_attention_heads", 0, "must be from 1 to 1024, got 0"),
    (TRANSFORMER, "ffn_dim", -3, "must be from 1 to 131072, got -3"),
    (TRANSFORMER, "patch_size", [1, 0, 2], "must be from 1 to 16, got [1, 0, 2]"),
    (TRANSFORMER, "patch_size", [2, 2, 1], "must begin with 1, got [2, 2, 1]"),
    (TRANSFORMER, "patch_size", [1, 2], "must be 3 whole numbers, got [1, 2]"),
    (TRANSFORMER, "attention_head_dim", 7, "must be even and from 2 to 1024, got 7"),
    (TRANSFORMER, "eps", float("nan"), "must be a number, got NaN"),
    (TRANSFORMER, "cross_attn_norm", "no", 'must be true or false, got "no"'),
    (TRANSFORMER, "qk_norm", "layer_norm", 'must be "rms_norm_across_heads", got "layer_norm"'),
    (TRANSFORMER, "text_dim", 48, "must be 64, the text encoder's d_model, got 48"),
    (TRANSFORMER, "in_channels", 7, "must be 4, or 12 where an image is given in channels beside the latents, got 7"),
    (TRANSFORMER, "out_channels", 12, "must be 4, the VAE's z_dim, got 12"),
    (TRANSFORMER, "image_dim", 24, "must be 20, the image encoder's hidden_size, got 24"),
    (TRANSFORMER, "added_kv_proj_dim", None, "must be 48 (heads times their size) beside image_dim, got null"),
    (TRANSFORMER, "pos_embed_seq_len", 33, "must be 34, the image encoder's rows of two images, got 33"),
    (TRANSFORMER, "_class_name", "WanVACETransformer3DModel", "must be WanTransformer3DModel, got WanVACE"),
    (VAE, "base_dim", 0, "must be from 1 to 4096, got 0"),
    (VAE, "dim_mult", [], "must be 1 to 8 numbers from 1 to 64, got []"),
    (VAE, "dim_mult", [1, "2"], 'must be a list of whole numbers, got [1, "2"]'),
    (VAE, "scale_factor_spatial", 0, "must be 8 with these dim_mult, temperal_downsample and patch_size, got 0"),
    (VAE, "scale_factor_temporal", 8, "must be 4 with these dim_mult, temperal_downsample and patch_size, got 8"),
    (VAE, "z_dim", "a", 'must be a whole number, got "a"'),
    (VAE, "temperal_downsample", [True], "must have 3 values, one less than dim_mult, got [true]"),
    (VAE, "latents_mean", [0.0], "must have z_dim = 4 values, got 1"),
    (VAE, "latents_std", [1.0, 0.0, 1.0, 1.0], "must be above 0, got 0.0"),
    (VAE, "in_channels", 12, "must be 3 with these"),
    (VAE, "attn_scales", [0.5], "must be empty, got [0.5]"),
    (SCHEDULER, "flow_shift", "x", 'must be a number, got "x"'),
    (SCHEDULER, "flow_shift", -1, "must be above 0, got -1"),
    (SCHEDULER, "num_train_timesteps", 1000.5, "must be a whole number, got 1000.5"),
    (SCHEDULER, "solver_order", 7, "must be 1, 2 or 3, got 7"),
    (SCHEDULER, "lower_order_final", "yes", 'must be true or false, got "yes"'),
    (SCHEDULER, "disable_corrector", 3, "must be a list of whole numbers, got 3"),
    (SCHEDULER, "use_karras_sigmas", True, "is not supported, got true"),
    (SCHEDULER, "_class_name", ["UniPCMultistepScheduler"], "must be UniPCMultistepScheduler or DPM"),
    (SCHEDULER, "_class_name", "FlowMatchEulerDiscreteScheduler", "must be UniPCMultistepScheduler, as in model_index"),
    (TEXT, "d_model", "wide", 'must be a whole number, got "wide"'),
    (TEXT, "num_heads", 0, "must be from 1 to 1024, got 0"),
    (TEXT, "num_layers", 10**9, "must be from 1 to 256, got 1000000000"),
    (TEXT, "relative_attention_num_buckets", 2, "must be even and from 4 to 4096, got 2"),
    (TEXT, "layer_norm_epsilon", 0, "must be above 0 and below 1, got 0"),
    (TEXT, "feed_forward_proj", "gated-tanh", "must be relu or gelu or gelu_new or silu or gated-relu or"),
    (TEXT, "dropout_rate", "some", 'must be a number, got "some"'),
    (TEXT, "dense_act_fn", "tanh", "must be relu or gelu or gelu_new or silu, got"),
    (IMAGE, "hidden_size", [20], "must be a whole number, got [20]"),
    (IMAGE, "num_attention_heads", 3, "must be a divisor of hidden_size = 20, got 3"),
    (IMAGE, "patch_size", 64, "must be from 1 to 32, got 64"),
    (IMAGE, "hidden_act", "tanh", "must be quick_gelu or gelu or gelu_new or relu or silu, got"),
    (IMAGE, "num_channels", 4, "must be from 3 to 3, got 4"),
    (INDEX, "transformer", "WanTransformer3DModel", "must be a pair of library and class"),
    (INDEX, "vae", ["diffusers", "AutoencoderKL"], "must be AutoencoderKLWan, got AutoencoderKL"),
    (INDEX, "text_encoder", ["transformers", "CLIPTextModel"], "must be UMT5EncoderModel or T5EncoderModel, got CLIP"),
    (INDEX, "boundary_ratio", "half", 'must be a number, got "half"'),
    (INDEX, "boundary_ratio", 1.5, "must be from 0 to 1, got 1.5"),
    (INDEX, "boundary_ratio", 0.9, "= 0.9 needs one"),
    (INDEX, "expand_timesteps", "no", 'must be true or false, got "no"'),
    (INDEX, "expand_timesteps", True, "must be false with in_channels = 12, got true"),
    (CARD, "defaults", {"width": 70}, "width must be a multiple of 8"),
    (CARD, "defaults", {"width": 72, "height": 64}, "width must be a multiple of 16 for this model, got 72"),
    (CARD, "defaults", {"fps": "fast"}, "fps must be a whole number, got 'fast'"),
    (CARD, "defaults", {"colour": 1}, "unknown field 'colour' (known: width"),
    (CARD, "defaults", [], "must be an object, got []"),
    (CARD, "limits", {"max_pixels": "many"}, 'max_pixels must be a whole number, got "many"'),
    (CARD, "native_sizes", 3, "must be a list of pairs [width, height], got 3"),
    (CARD, "native_sizes", [["a", 64]], "width must be a whole number, got 'a'"),
    (CARD, "native_sizes", [[72, 64]], "width must be a multiple of 16 for this model, got 72"),
    (CARD, "cache", {"high": 3}, "cache.high must be a text, got 3"),
    (CARD, "cache", {"higher": "easy"}, "unknown field 'higher' (known: high, balanced, fast)"),
    (CARD, "teacache", ["a"], 'must be a list of numbers, got ["a"]'),
    (CARD, "distilled", "yes", 'must be true or false, got "yes"'),
    (CARD, "native_size", [[64, 64]], "unknown field 'native_size' (known: defaults, native_sizes"),
]


@pytest.mark.parametrize(
    ("file", "field", "value", "allowed"), WRONG, ids=lambda value: str(value).replace("/", " ")[:40]
)
def test_a_wrong_field_is_named_with_its_file_its_value_and_what_is_allowed(
    file: str, field: str, value: Any, allowed: str, folder: Path, refusal: Callable[[Path], str]
) -> None:
    set_fields(folder / file, **{field: value})
    told = refusal(folder)
    assert allowed in told and len(told) < 400
    assert field in told and told.startswith(f"{file}: ")
    if "checkpoint" not in told:  # a service's ingress reads JSON alone, and says the same
        with pytest.raises(ValueError) as caught:
            check_models(ServeConfig(model=str(folder)))
        assert str(caught.value) == f"model {str(folder)!r}: {told}"


@pytest.mark.parametrize("file", [TRANSFORMER, VAE, SCHEDULER, TEXT, IMAGE])
def test_null_means_the_default(file: str, folder: Path) -> None:
    """Every field with its default's value may be null: some writers spell all of them out so."""
    given = json.loads((folder / file).read_text())
    before, changed = read_folder(folder), 0
    for name in given:
        set_fields(folder / file, **given | {name: None})
        try:
            after = read_folder(folder)
        except ValueError:  # the default is another one, and does not go with the rest
            continue
        changed += 1
        assert (after.limits, after.defaults, after.tasks) == (before.limits, before.defaults, before.tasks), name
    assert changed >= 4


def test_nulls_of_a_scheduler_are_its_defaults(folder: Path) -> None:
    names = ("sigma_min", "sigma_max", "shift_terminal", "solver_order", "num_train_timesteps", "disable_corrector")
    set_fields(folder / SCHEDULER, **dict.fromkeys((*names, "lower_order_final", "timestep_spacing")))
    model = Engine.from_pretrained(str(folder), device="cpu").model
    assert model.solver == SolverConfig(solver="unipc", shift=5.0)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(WanConfig, WanTransformer3DModel), (WanVAEConfig, AutoencoderKLWan)], ids=["denoiser", "VAE"]
)
def test_defaults_are_those_of_diffusers(ours: type[Any], theirs: type[Any]) -> None:
    """A config.json without a field means the same as in diffusers."""
    defaults = {field.name: getattr(ours(), field.name) for field in dataclasses.fields(ours)}
    known = {name: parameter.default for name, parameter in inspect.signature(theirs.__init__).parameters.items()}
    for name, value in defaults.items():
        assert (list(value) if isinstance(value, tuple) else value) == (
            list(known[name]) if isinstance(known[name], tuple | list) else known[name]
        ), name
