"""From a config to the parts of a run: mesh, tokenizer, data, model, optimizer, compiled step, first state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unimed_jax import config, parallel
from unimed_jax.convert import native
from unimed_jax.data import pipeline, shards
from unimed_jax.data.text import Tokenizer, load_tokenizer
from unimed_jax.errors import DataError, UsageError
from unimed_jax.models import clip
from unimed_jax.train import checkpoint, features, hygiene, optim, run_folder, step


@dataclass(slots=True, kw_only=True)
class Built:
    """Model, optimizer and abstract state on a mesh; nothing is allocated on the devices yet.

    Attributes:
        cfg: the experiment.
        mesh: all devices.
        graphdef: structure of the model.
        params: abstract parameters.
        tx: the optimizer.
        state: abstract training state with shardings.
    """

    cfg: config.Train
    mesh: jax.sharding.Mesh
    graphdef: Any
    params: clip.Params
    tx: Any
    state: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Parts(Built):
    """What a run consists of.

    Attributes:
        tokenizer: of the text tower.
        data: this process's share of the training stream.
        total_steps: when the run ends.
        digests: of what the result depends on beside the settings: tokenizer and manifests.
    """

    tokenizer: Tokenizer
    data: pipeline.Pipeline | features.FeaturePipeline
    total_steps: int
    digests: dict[str, Any]


def tokenizer_path(data: config.Data) -> Path:
    """Where the tokenizer of a config is.

    Raises:
        UsageError: when neither `data.tokenizer` nor `data.root` is given.
        DataError: when the root is missing.
    """
    if not (data.tokenizer or data.root):
        raise UsageError(
            "config: data.root is empty", "--config.data.root=FOLDER, as `unimed-jax data build` wrote it"
        )
    if data.root and not Path(data.root).is_dir():
        raise DataError(f"no folder {data.root}", "unimed-jax data build SOURCE --out DIR writes one")
    return Path(data.tokenizer) if data.tokenizer else Path(data.root) / "tokenizer.json"


def assemble(cfg: config.Train) -> Parts:
    """Opens the data and builds everything that costs nothing on a device.

    Raises:
        UsageError: for a batch that does not divide over the devices, or settings that do not fit the data.
        DataError: for missing or damaged records, or a tokenizer that does not fit.
    """
    mesh = parallel.make_mesh(cfg.mesh)
    parallel.check_batch(cfg.batch_size, mesh, accum_steps=cfg.optim.accum_steps)
    tokenizer = load_tokenizer(tokenizer_path(cfg.data))
    data = pipeline.make(
        cfg, tokenizer=tokenizer, process_index=jax.process_index(), process_count=jax.process_count()
    )
    sources = [s for s in data.blocks.sources if isinstance(s, shards.Shards)]
    run_folder.refuse_other_tokenizer(cfg, tokenizer, sources)
    native.refuse_other_tokenizer(cfg, tokenizer.digest)
    native.refuse_other_words(cfg, tokenizer)
    total = cfg.duration.steps_for(batch_size=cfg.batch_size, epoch_examples=data.epoch_examples)
    built = assemble_model(cfg, mesh, total, data.epoch_examples)
    parts = Parts(
        **{f.name: getattr(built, f.name) for f in dataclasses.fields(built)},
        tokenizer=tokenizer,
        data=data,
        total_steps=total,
        digests={"tokenizer": tokenizer.digest, "manifests": run_folder.manifests(sources)},
    )
    if features.towers_of(cfg, built.params):
        # Only the frozen towers are read, and those are the same in every state of the run.
        params = first_params(parts)
        parts.data = features.precompute(cfg, data, params, parts.digests, tell=hygiene.say)
    return parts


def assemble_model(
    cfg: config.Train, mesh: jax.sharding.Mesh, total_steps: int, epoch_examples: int
) -> Built:
    """Model, optimizer and abstract state of a run of so many steps."""
    graphdef, params = clip.skeleton(cfg.model)
    tx = optim.make_optimizer(with_warmup_steps(cfg, epoch_examples), params, total_steps)
    state = jax.eval_shape(lambda p: step.create_state(cfg, p, tx), params)
    place = parallel.shardings(state, mesh, min_size=cfg.mesh.min_size)
    return Built(
        cfg=cfg, mesh=mesh, graphdef=graphdef, params=params, tx=tx, state=checkpoint.abstract(state, place)
    )


def with_warmup_steps(cfg: config.Train, epoch_examples: int) -> config.Train:
    """The same config with its warm-up in steps, whatever it was given in."""
    steps = cfg.optim.warmup.steps_for(batch_size=cfg.batch_size, epoch_examples=epoch_examples)
    return dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, warmup=config.Duration(steps=steps)))


def first_state(parts: Built, report: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The state before the first step, made in place on the devices: random, then what `cfg.init` names.

    With `init.optimizer` it is the state after the last step of the run that the moments come from.

    Raises:
        DataError: for initial weights or moments that do not fit.
    """
    place = jax.tree.map(lambda x: x.sharding, parts.state)
    create = jax.jit(
        lambda p: step.create_state(parts.cfg, p, parts.tx), out_shardings=place, donate_argnums=0
    )
    state = create(first_params(parts, report))
    return _with_moments(parts.cfg, state, report) if parts.cfg.init.optimizer else state


def _with_moments(
    cfg: config.Train, state: dict[str, Any], report: Callable[[str], None] | None
) -> dict[str, Any]:
    """The state with Adam's moments and the step of `init.model`; frozen parameters have none."""
    found = native.init_moments(cfg, report=report)
    mu, nu, count = optim.moments(state["opt"])
    # Copies: the step gives its state away, and these may be views of a file.
    put = lambda x, like: jax.device_put(np.array(x, like.dtype), like.sharding)
    place = lambda tree, leaves: clip.unflatten(
        {path: put(leaves[path], like) for path, like in clip.flatten(tree).items()}
    )
    first, second = found.trees()
    opt = optim.with_moments(state["opt"], place(mu, first), place(nu, second), put(found.step, count))
    return state | {"step": put(found.step, state["step"]), "opt": opt}


def first_params(parts: Built, report: Callable[[str], None] | None = None) -> clip.Params:
    """The parameters of `first_state`."""
    cfg = parts.cfg
    place = jax.tree.map(lambda x: x.sharding, parts.state["params"])
    params = jax.jit(lambda key: clip.init(cfg.model, key), out_shardings=place)(jax.random.key(cfg.seed))
    if native.names_weights(cfg.init):
        params = native.init_from(cfg, params, report=report)
    return params


def compiled_step(
    parts: Built,
) -> Callable[[dict[str, Any], dict[str, jax.Array]], tuple[dict[str, Any], Any]]:
    """The train step, compiled ahead for this state and batch: another shape or type raises, nothing recompiles."""
    sources = len(parts.data.mixture.names) if isinstance(parts, Parts) else 0
    train_step: Any = step.make_train_step(parts.cfg, parts.graphdef, parts.tx, parts.mesh, sources=sources)
    return train_step.lower(parts.state, abstract_batch(parts.cfg, parts.mesh)).compile()


def abstract_batch(cfg: config.Train, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of one global batch on the mesh."""
    b, size, tokens = cfg.batch_size, cfg.model.vision.image_size, cfg.model.text.context_length
    shapes = {
        "image": ((b, size, size, 3), jnp.uint8),
        "tokens": ((b, tokens), jnp.int32),
        "source": ((b,), jnp.int32),
        "mask": ((b,), jnp.bool_),
        "caption_id": ((b,), jnp.int32),
    }
    widths = features.widths(cfg, clip.skeleton(cfg.model)[1]) if cfg.data.features else {}
    for tower, name in (("vision", "image"), ("text", "tokens")):
        if tower in widths:
            shapes[name] = ((b, widths[tower]), jnp.float32)
    rows = parallel.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, (shape, dtype) in shapes.items()
    }
