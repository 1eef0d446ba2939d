"""One training step as a pure function of (state, batch): towers, loss, gradients, update, metrics.

The state is a plain dict: `step` i32[], `params`, `opt` and, when averaging is on, `ema` (a whole parameter tree).
Randomness is a function of (seed, step), so a restored state continues bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from unimed_jax import config, parallel
from unimed_jax.models import clip
from unimed_jax.models.clip import Embeddings, Params
from unimed_jax.train import batch_metrics, optim
from unimed_jax.train.loss import contrastive_loss

State = dict[str, Any]
Batch = Mapping[str, Array]
Metrics = dict[str, Array]  # f32[] each, but `examples` i32[sources]


def create_state(cfg: config.Train, params: Params, tx: Any) -> State:
    """The state before the first step; put it on the devices with `parallel.shardings`.

    Example:
        >>> import optax
        >>> sorted(create_state(config.Train(), {"logit_scale": jnp.float32(0)}, optax.sgd(1.0)))
        ['opt', 'params', 'step']
    """
    state: State = {"step": jnp.zeros((), jnp.int32), "params": params, "opt": tx.init(params)}
    if cfg.optim.ema_decay:
        # A copy: the step donates its state, and one buffer cannot be given away twice.
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def make_train_step(
    cfg: config.Train, graphdef: nnx.GraphDef, tx: Any, mesh: Mesh, *, sources: int = 0
) -> Callable[..., tuple[State, Metrics]]:
    """The jitted step `(state, batch, key=None) -> (state, metrics)`; the given state is donated.

    `batch` has `image` u8[b h w 3] and `tokens` i32[b t], and may have `mask` bool[b] (rows that count),
    `caption_id` i32[b] (needed by `loss.dedup="mask"`) and `source` i32[b], below `sources` (0 = not counted). Its
    rows lie on the mesh as `parallel.put` lays them. `key` is the base key, by default that of `cfg.seed`; the step's
    own key is `fold_in(key, state["step"])`.

    The loss is over the global batch also when it is computed in `optim.accum_steps` micro-batches: all embeddings
    come first, without gradients; then the loss and its gradients to them; then each micro-batch goes through the
    towers again, with the same dropout (gradient caching, arXiv 2101.06983).

    When loss or gradient norm is not finite, everything but `step` keeps its value. All devices see the same
    numbers, so all decide alike.

    Metrics: `loss`, `grad_norm`, `param_norm` (both over trainable parameters), `lr`, `logit_scale` (the factor),
    `bad` (1 when the update was left out), those of the loss and those of the batch (train/batch_metrics.py).

    Raises:
        UsageError: for a batch that does not divide over devices and micro-batches, or patterns that match nothing.
    """
    parallel.check_batch(cfg.batch_size, mesh, accum_steps=cfg.optim.accum_steps)
    abstract = clip.skeleton(cfg.model)[1]
    frozen = optim.frozen_paths(cfg.optim, abstract)
    gradients = _gradients(cfg, graphdef, mesh)

    def step(state: State, batch: Batch, key: PRNGKeyArray | None = None) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(cfg.seed) if key is None else key, state["step"])
        trainable, fixed = optim.split(state["params"], frozen)
        loss, metrics, grads = gradients(trainable, fixed, batch, key if cfg.model.text.dropout else None)
        grad_norm = _norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        updates, opt = tx.update(grads, state["opt"], trainable, step=state["step"])
        moved = optim.clamp(jax.tree.map(jnp.add, trainable, updates), cfg.optim)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        trainable = keep(moved, trainable)
        new = {
            "step": state["step"] + 1,
            "params": optim.join(trainable, fixed),
            "opt": keep(opt, state["opt"]),
        }
        if "ema" in state:
            mean, rest = optim.split(state["ema"], frozen)
            mean = keep(optim.update_ema(mean, trainable, cfg.optim.ema_decay, state["step"]), mean)
            new["ema"] = optim.join(mean, rest)
        text = clip.bind(graphdef, state["params"]).text
        metrics |= batch_metrics.of_batch(batch, text, cfg, mesh, sources)
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "param_norm": _norm(trainable),
            "lr": optim.current_rate(opt),
            "bad": 1.0 - good,
        }
        return new, metrics

    shapes = jax.eval_shape(lambda p: create_state(cfg, p, tx), abstract)
    place = parallel.shardings(shapes, mesh, min_size=cfg.mesh.min_size)
    return jax.jit(step, donate_argnums=0, out_shardings=(place, parallel.replicated(mesh)))


def _norm(tree: Any) -> Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def _gradients(cfg: config.Train, graphdef: nnx.GraphDef, mesh: Mesh) -> Callable:
    """`(trainable, fixed, batch, key) -> (loss, metrics, gradients of trainable)`."""
    n = cfg.optim.accum_steps

    def embed(trainable: Params, fixed: Params, batch: Batch, key: PRNGKeyArray | None) -> Embeddings:
        # Only trainable parameters are differentiated: a frozen tower has no backward pass at all.
        params = parallel.whole(optim.join(trainable, fixed), mesh, min_size=cfg.mesh.min_size)
        model = clip.bind(graphdef, params)
        return model(batch["image"], batch["tokens"], key=key, shards=mesh.size)

    def loss_of(e: Embeddings, batch: Batch) -> tuple[Array, Metrics]:
        loss, metrics = contrastive_loss(
            e.image,
            e.text,
            e.logit_scale,
            bias=e.logit_bias,
            ids=batch.get("caption_id"),
            mask=batch.get("mask"),
            mesh=mesh,
            kind=cfg.loss.kind,
            impl=cfg.loss.impl,
            tile=cfg.loss.tile,
            dedup=cfg.loss.dedup,
        )
        return loss, metrics | {"logit_scale": e.logit_scale}

    def whole(trainable, fixed, batch, key):
        def f(trainable):
            return loss_of(embed(trainable, fixed, batch, key), batch)

        (loss, metrics), grads = jax.value_and_grad(f, has_aux=True)(trainable)
        return loss, metrics, grads

    def in_parts(trainable, fixed, batch, key):
        parts = _split_rows({k: batch[k] for k in ("image", "tokens")}, n, mesh)
        own_key = lambda i: None if key is None else jax.random.fold_in(key, i)
        first = lambda i, part: embed(trainable, fixed, part, own_key(i))
        e = lax.map(lambda x: first(*x), (jnp.arange(n), parts))
        rows = _join_rows({"image": e.image, "text": e.text}, n, mesh)
        e = Embeddings(**rows, logit_scale=e.logit_scale[0], logit_bias=e.logit_bias[0])
        (loss, metrics), d = jax.value_and_grad(loss_of, has_aux=True)(e, batch)
        d_parts = _split_rows({"image": d.image, "text": d.text}, n, mesh)

        def second(total, x):
            i, part, d_part = x
            pull = jax.vjp(lambda p: embed(p, fixed, part, own_key(i)), trainable)[1]
            # Temperature and bias enter every micro-batch; each takes its share of their gradient.
            (grads,) = pull(Embeddings(**d_part, logit_scale=d.logit_scale / n, logit_bias=d.logit_bias / n))
            return jax.tree.map(jnp.add, total, grads), None

        zero = jax.tree.map(jnp.zeros_like, trainable)
        grads, _ = lax.scan(second, zero, (jnp.arange(n), parts, d_parts))
        return loss, metrics, grads

    return whole if n == 1 else in_parts


# A micro-batch takes an equal share of every device's rows, so that cutting the batch moves no data.


def _split_rows(tree: Any, n: int, mesh: Mesh) -> Any:
    """[b ...] -> [n b/n ...]."""

    def split(x):
        x = x.reshape(mesh.size, n, -1, *x.shape[1:]).swapaxes(0, 1)
        return _rows_at(1, x.reshape(n, -1, *x.shape[3:]), mesh)

    return jax.tree.map(split, tree)


def _join_rows(tree: Any, n: int, mesh: Mesh) -> Any:
    """The inverse of `_split_rows`."""

    def join(x):
        x = x.reshape(n, mesh.size, -1, *x.shape[2:]).swapaxes(0, 1)
        return _rows_at(0, x.reshape(-1, *x.shape[3:]), mesh)

    return jax.tree.map(join, tree)


def _rows_at(axis: int, x: Array, mesh: Mesh) -> Array:
    return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*[None] * axis, parallel.AXES)))
