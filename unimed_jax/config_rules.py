"""Which settings are possible: choices, ranges, and what must agree; refusals name the field. Standard library."""

from __future__ import annotations

import math
import re
from typing import Any

from unimed_jax import config
from unimed_jax.errors import UsageError

CHOICES: dict[str, tuple[str, ...]] = {
    "model.vision.act": ("quick_gelu", "gelu"),
    "model.vision.normalize": ("openai", "imagenet", "half"),  # the table in data/images.py
    "model.vision.pool": ("cls", "mean"),
    "model.vision.proj": ("none", "linear", "mlp"),
    "model.text.kind": ("bert", "clip"),
    "model.text.act": ("quick_gelu", "gelu"),
    "model.text.pool": ("cls", "eot", "mean"),
    "model.text.proj": ("none", "linear", "mlp"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "data.mixture": ("size", "weight", "temperature"),
    "loss.kind": ("clip", "sigmoid"),
    "loss.impl": ("ring", "gathered"),
    "loss.dedup": ("off", "mask"),
    "init.resize": ("", "bicubic", "antialias"),
}

# Least value, and the bound that a value stays below. NaN and infinity are in no range.
_COUNT, _NUMBER, _SHARE = (1, math.inf), (0, math.inf), (0, 1)
RANGES: dict[str, tuple[float, float]] = {
    "model.embed_dim": _COUNT,
    "model.unroll": _COUNT,
    "model.vision.image_size": _COUNT,
    "model.vision.patch_size": _COUNT,
    **{f"model.{t}.{n}": _COUNT for t in ("vision", "text") for n in ("width", "depth", "heads", "mlp_dim")},
    "model.vision.ln_eps": _NUMBER,
    "model.text.ln_eps": _NUMBER,
    "model.text.vocab_size": _COUNT,
    "model.text.context_length": _COUNT,
    "model.text.max_positions": _COUNT,
    "model.text.pad_id": _NUMBER,
    "model.text.dropout": _SHARE,
    "seed": (0, 2**32),
    "batch_size": _COUNT,
    "data.temperature": _COUNT,
    "data.color_jitter": _NUMBER,
    "data.views": _NUMBER,
    "data.workers": _NUMBER,
    "data.threads": _COUNT,
    "data.prefetch": _NUMBER,
    "loss.tile": _COUNT,
    "optim.lr": _NUMBER,
    "optim.b1": _SHARE,
    "optim.b2": _SHARE,
    "optim.eps": _NUMBER,
    "optim.weight_decay": _NUMBER,
    "optim.clip_norm": _NUMBER,
    "optim.max_logit_scale": _NUMBER,
    "optim.accum_steps": _COUNT,
    "optim.ema_decay": _SHARE,
    "mesh.min_size": _NUMBER,
    "eval.batch_size": _COUNT,
    "eval.bootstrap": _NUMBER,
    "checkpoint.keep": (2, math.inf),  # the newest may be damaged
    "log_every": _COUNT,
    "max_bad_steps": _COUNT,
    "watchdog_s": _NUMBER,
}


_NAME = 100  # characters of a model's name
_WEIGHT = 1e6  # of a source


def _require(ok: bool, cause: str, remedy: str = "") -> None:
    if not ok:
        raise UsageError(f"config: {cause}", remedy)


def _require_known_values(settings: Any, *, model: bool) -> None:
    """Holds the fields of a Model or a Train against `CHOICES` and `RANGES`."""
    for path in (*CHOICES, *RANGES):
        if path.startswith("model.") != model:
            continue
        value = config.get_path(settings, path.removeprefix("model."))
        if path in CHOICES:
            _require(value in CHOICES[path], f"{path} is {value!r:.90}", f"one of {', '.join(CHOICES[path])}")
        else:
            low, high = RANGES[path]
            below = f", below {high:g}" if math.isfinite(high) else ""
            _require(low <= value < high, f"{path} is {value}", f"at least {low}{below}")


def validate_model(m: config.Model) -> config.Model:
    """Refuses an impossible architecture.

    Raises:
        UsageError: naming the field, its value and what would be accepted.
    """
    # It stands in messages, cards and file headers.
    _require(
        len(m.name) <= _NAME and m.name.isprintable(),
        f"model.name is {m.name[:_NAME]!r}",
        f"one printable line of at most {_NAME} characters",
    )
    _require_known_values(m, model=True)
    v, t = m.vision, m.text
    for name, tower in (("vision", v), ("text", t)):
        _require(
            tower.width % tower.heads == 0,
            f"model.{name}.width {tower.width} does not divide into {tower.heads} heads",
        )
        _require(
            tower.proj != "none" or tower.width == m.embed_dim,
            f"model.{name}.proj is none but its width {tower.width} is not model.embed_dim {m.embed_dim}",
            f'set model.{name}.proj="linear"',
        )
    _require(
        v.image_size % v.patch_size == 0,
        f"model.vision.image_size {v.image_size} is no multiple of patch_size {v.patch_size}",
    )
    _require(
        t.context_length <= t.max_positions,
        f"model.text.context_length {t.context_length} exceeds max_positions {t.max_positions}",
    )
    _require(
        (t.kind == "bert") == (t.pool != "eot"),
        "model.text.pool eot belongs to kind clip, cls and mean to bert",
    )
    if m.text_groups:
        total = sum(share for _, share in m.text_groups)
        widths = [w for w, _ in m.text_groups]
        _require(abs(total - 1) < 1e-6, f"model.text_groups shares add up to {total}, not 1")
        _require(
            widths == sorted(set(widths)) and widths[0] > 1 and widths[-1] <= t.context_length,
            f"model.text_groups widths {widths} must rise and stay within the context {t.context_length}",
        )
    return m


def validate(c: config.Train) -> config.Train:
    """Refuses impossible settings before anything is computed; returns the same config.

    Raises:
        UsageError: naming the field, its value and what would be accepted.

    Example:
        >>> validate(config.Train(batch_size=8)).batch_size
        8
    """
    validate_model(c.model)
    _require_known_values(c, model=False)
    for path in ("duration", "optim.warmup", "eval.every", "checkpoint.every"):
        d = config.get_path(c, path)
        n = sum(bool(x) for x in (d.steps, d.epochs, d.examples))
        _require(
            n <= 1, f"{path} is given {n} times", "set one of steps, epochs, examples and the others to 0"
        )
        _require(min(d.steps, d.epochs, d.examples) >= 0, f"{path} is negative")
    _require(c.duration.given(), "duration is empty", "set duration.steps, .epochs or .examples")
    o = c.optim
    _require(
        c.batch_size % o.accum_steps == 0,
        f"batch_size {c.batch_size} does not divide into optim.accum_steps {o.accum_steps} micro-batches",
    )
    _require(0 < o.layer_decay <= 1, f"optim.layer_decay is {o.layer_decay}", "above 0, at most 1")
    for pattern in (*o.freeze, *(p for p, _ in o.lr_multipliers)):
        try:
            re.compile(pattern)
        except re.error as e:
            raise UsageError(
                f"config: optim.freeze/lr_multipliers pattern {pattern!r} is no regex: {e}"
            ) from e
    _require(
        (c.loss.kind == "sigmoid") == c.model.logit_bias,
        f"loss.kind {c.loss.kind} with model.logit_bias {c.model.logit_bias}",
        "the sigmoid loss learns a bias; the clip loss has none",
    )
    low, high = c.data.crop_scale
    _require(0 < low <= high <= 1, f"data.crop_scale is {c.data.crop_scale}", "0 < low <= high <= 1")
    _require(0 < c.data.crop_ratio[0] <= c.data.crop_ratio[1], f"data.crop_ratio is {c.data.crop_ratio}")
    _require(
        not c.data.features or c.model.text.dropout == 0 or not any(map(_freezes_text, o.freeze)),
        f"data.features with a frozen text tower and model.text.dropout {c.model.text.dropout}",
        "set model.text.dropout=0: features are computed once",
    )
    i = c.init
    _require(
        not i.optimizer or bool(i.model and not (i.vision or i.text or i.logit_scale)),
        "init.optimizer needs init.model and none of init.vision, init.text, init.logit_scale",
        "moments belong to all weights of one run",
    )
    for s in c.data.sources:
        _require(bool(s.name), "a source in data.sources has no name")
        _require(s.weight > 0, f"source {s.name} has weight {s.weight}", "leave it out instead")
        _require(s.weight <= _WEIGHT, f"source {s.name} has weight {s.weight}", f"at most {_WEIGHT:g}")
    names = [s.name for s in c.data.sources]
    twice = sorted({n for n in names if names.count(n) > 1})
    _require(not twice, f"data.sources names {', '.join(twice)} twice", "raise its weight instead")
    for axis, n in (("data", c.mesh.data), ("fsdp", c.mesh.fsdp)):
        _require(n == -1 or n >= 1, f"mesh.{axis} is {n}", "-1 or at least 1")
    _require(c.mesh.data != -1 or c.mesh.fsdp != -1, "mesh.data and mesh.fsdp cannot both be -1")
    return c


def _freezes_text(pattern: str) -> bool:
    return re.fullmatch(pattern, "text/word") is not None
