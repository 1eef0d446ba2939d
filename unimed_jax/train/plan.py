"""What a run would do, before anything is paid for: `--dry_run`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from unimed_jax import config, parallel
from unimed_jax.convert import native
from unimed_jax.data import pipeline
from unimed_jax.models import clip, flops
from unimed_jax.train import assemble, meter

_SMALL = 20_000_000  # parameters up to which the step is compiled to learn its memory

# Bytes that the backward pass keeps, per token, block and unit of width in 16-bit numbers, by remat policy; with the
# attention matrix fused away. An estimate: the compiler's own figure is printed for small models.
_KEPT_BYTES = {"none": 32, "dots": 18, "full": 2}


def describe(cfg: config.Train) -> str:
    """The plan of a run as text: shapes, parameters, memory, data, steps, FLOPs.

    Raises:
        UsageError: for settings that do not fit together, the devices or the data.
        DataError: for missing or damaged records.
    """
    mesh = parallel.make_mesh(cfg.mesh)
    parallel.check_batch(cfg.batch_size, mesh, accum_steps=cfg.optim.accum_steps)
    data = pipeline.plan(cfg, shards_of_batch=mesh.size) if cfg.data.root else None
    total = (
        data["total_steps"] if data else cfg.duration.steps_for(batch_size=cfg.batch_size, epoch_examples=0)
    )
    sections = [_run(cfg, mesh), _parameters(cfg), _start(cfg)]
    sections += [_shapes(cfg), _memory(cfg, mesh, max(total, 1))]
    sections += [_mixture(data), _text(data)] if data else [["data      none: no data.root given"]]
    sections.append(_steps(cfg, data, total))
    return "\n".join(line for section in sections for line in section)


def _run(cfg: config.Train, mesh: jax.sharding.Mesh) -> list[str]:
    kind = jax.devices()[0].device_kind
    axes = " x ".join(f"{name} {n}" for name, n in mesh.shape.items())
    return [
        f"run       {cfg.name}, seed {cfg.seed}",
        f"devices   {mesh.size} x {kind} on {jax.process_count()} hosts, mesh {axes}",
    ]


def _parameters(cfg: config.Train) -> list[str]:
    params = clip.skeleton(cfg.model)[1]
    groups: dict[str, dict[str, int]] = {}
    for path, leaf in clip.flatten(params).items():
        tower, _, rest = path.partition("/")
        table = groups.setdefault(tower if rest else "temperature", {})
        part = rest.partition("/")[0] or path
        table[part] = table.get(part, 0) + int(np.prod(leaf.shape))
    lines = [f"model     {cfg.model.name}: {clip.count(params):,} parameters, computing in {cfg.model.dtype}"]
    for tower, table in groups.items():
        parts = ", ".join(f"{part} {n:,}" for part, n in table.items())
        lines.append(f"  {tower:<8}{sum(table.values()):>13,}  ({parts})")
    return lines


def _start(cfg: config.Train) -> list[str]:
    """What the parameters start from; reads the files and keeps nothing."""
    if not native.names_weights(cfg.init):
        return ["start     at random"]
    lines: list[str] = []
    native.init_from(cfg, clip.skeleton(cfg.model)[1], report=lines.append)
    if cfg.init.optimizer:
        native.init_moments(cfg, report=lines.append)
    first, *rest = native.summary(lines)
    return [f"start     {first}", *(f"  {line}" for line in rest)]


def _shapes(cfg: config.Train) -> list[str]:
    batch = assemble.abstract_batch(cfg, parallel.make_mesh(cfg.mesh))
    shapes = ", ".join(
        f"{k} {v.dtype.name}{list(v.shape)}" for k, v in batch.items() if k in ("image", "tokens")
    )
    accum = cfg.optim.accum_steps
    return [
        f"batch     {cfg.batch_size}" + (f" in {accum} micro-batches" if accum > 1 else "") + f": {shapes}"
    ]


def activation_bytes(m: config.Model) -> float:
    """Estimated bytes that the backward pass of one image-caption pair needs, with attention fused.

    Example:
        >>> round(activation_bytes(config.Model()) / 1e6)  # ViT-B/16 and BERT-base at 256 tokens, bfloat16
        134
    """
    v, t = m.vision, m.text
    units = (
        v.depth * v.width * ((v.image_size // v.patch_size) ** 2 + 1) + t.depth * t.width * t.context_length
    )
    return units * _KEPT_BYTES[m.remat] * (1 if m.dtype == "bfloat16" else 2)


def _memory(cfg: config.Train, mesh: jax.sharding.Mesh, total: int) -> list[str]:
    model = assemble.assemble_model(cfg, mesh, total, 1)
    here = {name: _bytes_here(tree) for name, tree in model.state.items()}
    rows = cfg.batch_size / mesh.size / cfg.optim.accum_steps
    estimate = activation_bytes(cfg.model) * rows
    parts = [
        f"parameters {_gb(here['params'])}",
        f"moments {_gb(here['opt'])}",
        f"gradients {_gb(here['params'])}",
    ]
    parts += [f"average {_gb(here['ema'])}"] if "ema" in here else []
    sum_ = here["params"] * 2 + here["opt"] + here.get("ema", 0) + estimate
    lines = [
        f"memory    a device: {', '.join(parts)}, activations about {_gb(estimate)} ({rows:g} pairs, "
        f"remat {cfg.model.remat}); together about {_gb(sum_)}"
    ]
    limit = (
        (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
        if jax.devices()[0].platform != "cpu"
        else None
    )
    if limit and sum_ > limit:
        lines.append(
            f"  warning: more than the {_gb(limit)} of a device: try optim.accum_steps, model.remat or mesh.fsdp"
        )
    if clip.count(model.params) <= _SMALL:
        measured = assemble.compiled_step(model).memory_analysis()  # type: ignore[attr-defined]
        if measured is not None:
            lines.append(
                f"  compiled: arguments {_gb(measured.argument_size_in_bytes)}, temporaries "
                f"{_gb(measured.temp_size_in_bytes)}"
            )
    return lines


def _bytes_here(tree: Any) -> int:
    """Bytes of one device's part."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _gb(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def _mixture(data: dict[str, Any]) -> list[str]:
    lines = [
        f"data      {data['epoch_examples']:,} examples an epoch from {len(data['sources'])} sources, mixture "
        f"{data['mixture']}"
    ]
    width = max(len(s["name"]) for s in data["sources"])
    for s in data["sources"]:
        lines.append(
            f"  {s['name']:<{width}}  {s['draws_per_epoch']:>10,} an epoch ({s['share']:>6.2%}) of "
            f"{s['records']:>10,} records, weight {s['weight']:g}: {s['passes_per_epoch']:.2f} passes, captions "
            f"{s['captions']}"
        )
    return lines


def _text(data: dict[str, Any]) -> list[str]:
    t = data["tokens"]
    if not t:
        return ["captions  no token counts in the records"]
    lines = [
        f"captions  mean {t['mean']:.1f} tokens, median {t['median']:.0f}, 95 % up to {t['p95']:.0f}, longest "
        f"{t['longest']}; {t['truncated']:.1%} cut, {t['padding']:.1%} padding ({t['captions']:,} drawn)"
    ]
    if g := data["text_groups"]:
        lines.append(
            f"  text_groups: {g['fit']:.1%} of {g['batches']} batches fit, {g['padding']:.1%} padding"
        )
    return lines


def _steps(cfg: config.Train, data: dict[str, Any] | None, total: int) -> list[str]:
    epoch = data["epoch_examples"] if data else 0
    if not total:
        return ["steps     unknown without data"]
    warmup = cfg.optim.warmup.steps_for(batch_size=cfg.batch_size, epoch_examples=epoch)
    work = flops.train_flops(cfg.model) * cfg.batch_size
    lines = [
        f"steps     {total:,}, warm-up {warmup:,} ({warmup / total:.1%}), learning rate {cfg.optim.lr:g}"
    ]
    if data:
        lines[0] += f", {data['steps_per_epoch']:,} an epoch, {data['epochs']:.2f} epochs"
    if warmup >= total:
        lines.append("  warning: the warm-up is not shorter than the run")
    lines.append(
        f"FLOPs     {work:.3g} a step, {work * total:.3g} in all (forward and backward, padding counted)"
    )
    peak = meter.peak_flops(jax.devices()[0].device_kind)
    if peak:
        hours = work * total / (peak * jax.device_count() * 0.4) / 3600
        lines.append(f"          about {hours:.1f} h on these devices at 40 % of their peak")
    return lines
