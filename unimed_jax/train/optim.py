"""AdamW as PyTorch computes it, with the reference's schedule; what is decayed, frozen or slowed goes by name.

Layers are stacked on axis 0 here, so a LayerNorm scale has two dimensions and rules about the number of dimensions
would go wrong: every rule is a regex over the parameter's path, e.g. "vision/blocks/mlp/up/kernel".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unimed_jax import config
from unimed_jax.errors import UsageError, did_you_mean
from unimed_jax.models.clip import Params, flatten, unflatten

# What the reference excludes: everything that is a vector or scalar before stacking.
NO_DECAY = r".*/(bias|scale)|vision/cls|logit_(scale|bias)"

# Depth of a parameter for layer-wise learning rates; the first match wins.
_EMBEDDINGS = r"vision/(patch/.*|cls|pos|ln_pre/.*)|text/(word|pos|type|ln_embed/.*)"
_BLOCKS = r"(vision|text)/blocks/.*"


def schedule(o: config.Optim, warmup: int, total: int) -> Callable[[Any], jax.Array]:
    """The learning rate of step 0, 1, 2, ...: linear warm-up, then half a cosine to zero at `total`.

    Step s of the warm-up has `lr * (s + 1) / warmup`; afterwards it is
    `lr / 2 * (1 + cos(pi * (s - warmup) / (total - warmup)))`, the rule of open_clip and UniMed-CLIP.

    Example:
        >>> rate = schedule(config.Optim(lr=1.0), warmup=4, total=8)
        >>> [round(float(rate(s)), 3) for s in range(9)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """

    def rate(step: Any) -> jax.Array:
        s = jnp.asarray(step, jnp.float32)
        up = (s + 1) / max(warmup, 1)
        left = jnp.clip((total - s) / max(total - warmup, 1), 0, 1)
        # (1 + cos(pi * done)) / 2, written so that float32 keeps its digits near the end.
        return o.lr * jnp.where(s < warmup, up, jnp.square(jnp.sin(jnp.pi / 2 * left)))

    return rate


def warmup_steps(cfg: config.Train) -> int:
    """The warm-up in steps.

    Raises:
        UsageError: when it is given in epochs, whose length only the data knows.
    """
    if cfg.optim.warmup.epochs:
        raise UsageError("optim.warmup is in epochs", "turn it into steps first: Duration.steps_for")
    return cfg.optim.warmup.steps_for(batch_size=cfg.batch_size, epoch_examples=0)


def decay_mask(params: Params) -> Params:
    """True where weight decay applies: all but biases, norm scales, the class token, temperature and bias.

    Example:
        >>> decay_mask({"text": {"ln_embed": {"bias": 0}, "word": 0}, "logit_scale": 0})
        {'logit_scale': False, 'text': {'ln_embed': {'bias': False}, 'word': True}}
    """
    return unflatten({path: not re.fullmatch(NO_DECAY, path) for path in flatten(params)})


def frozen_paths(o: config.Optim, params: Params) -> frozenset[str]:
    """The paths of parameters that `optim.freeze` keeps as they are (LiT, arXiv 2111.07991).

    Raises:
        UsageError: for a pattern that matches no parameter, or when nothing is left to train.

    Example:
        >>> sorted(frozen_paths(config.Optim(freeze=("vision/.*",)), {"vision": {"cls": 0}, "logit_scale": 0}))
        ['vision/cls']
    """
    paths = flatten(params)
    frozen = frozenset(p for pattern in o.freeze for p in _matching(pattern, paths, "optim.freeze"))
    if len(frozen) == len(paths):
        raise UsageError("optim.freeze matches every parameter: nothing is left to train", "freeze less")
    return frozen


def split(params: Params, frozen: frozenset[str]) -> tuple[Params, Params]:
    """(trainable, frozen) parts of a parameter tree; `join` is the inverse.

    Example:
        >>> split({"vision": {"cls": 1}, "logit_scale": 2}, frozenset({"vision/cls"}))
        ({'logit_scale': 2}, {'vision': {'cls': 1}})
    """
    leaves = flatten(params)
    part = lambda wanted: unflatten({p: x for p, x in leaves.items() if (p in frozen) == wanted})
    return part(False), part(True)


def join(one: Params, other: Params) -> Params:
    """One tree out of two without common leaves."""
    return unflatten(flatten(one) | flatten(other))


def lr_factors(o: config.Optim, params: Params) -> Params:
    """Factors on the learning rate, broadcastable to each leaf: layer-wise decay times `optim.lr_multipliers`.

    With decay g and L blocks the head has 1, block i (from 0) g^(L - i), the embeddings g^(L + 1), as in BEiT
    (arXiv 2106.08254); a stacked leaf gets one factor per layer, `f32[L 1 ...]`.

    Raises:
        UsageError: for a multiplier whose pattern matches no parameter.
    """
    leaves = flatten(params)
    matches = [(frozenset(_matching(p, leaves, "optim.lr_multipliers")), f) for p, f in o.lr_multipliers]
    chosen = {path: next((f for paths, f in matches if path in paths), 1.0) for path in leaves}
    depth = {path.split("/")[0]: x.shape[0] for path, x in leaves.items() if re.fullmatch(_BLOCKS, path)}
    factor = lambda path, x: np.float32(chosen[path] * _depth_factor(o.layer_decay, path, x, depth))
    return unflatten({path: factor(path, x) for path, x in leaves.items()})


def _depth_factor(decay: float, path: str, x: Any, depth: dict[str, int]) -> Any:
    if decay == 1:
        return 1.0
    if re.fullmatch(_BLOCKS, path):
        exponents = np.arange(x.shape[0], 0, -1).reshape(-1, *[1] * (len(x.shape) - 1))
        return decay**exponents
    return decay ** (depth.get(path.split("/")[0], 0) + 1) if re.fullmatch(_EMBEDDINGS, path) else 1.0


def _matching(pattern: str, paths: Iterable[str], field: str) -> list[str]:
    found = [p for p in paths if re.fullmatch(pattern, p)]
    if not found:
        raise UsageError(
            f"{field} pattern {pattern!r} matches no parameter.{did_you_mean(pattern, paths)}",
            'patterns match whole paths, e.g. "vision/.*"',
        )
    return found


def make_optimizer(
    cfg: config.Train, params: Params, total_steps: int
) -> optax.GradientTransformationExtraArgs:
    """AdamW with decoupled decay times learning rate (arXiv 1711.05101), equal to torch.optim.AdamW.

    The state holds moments of trainable parameters only. `update` takes gradients and parameters of the trainable
    part (`split`) and the keyword `step`: the learning rate follows the step of the run, so that an update that was
    left out does not shift the schedule.

    Args:
        cfg: the experiment; its warm-up in steps or examples.
        params: all parameters, abstract or concrete.
        total_steps: where the cosine ends.

    Raises:
        UsageError: for patterns that match nothing, or a warm-up in epochs.
    """
    o = cfg.optim
    frozen = frozen_paths(o, params)
    rate = schedule(o, warmup_steps(cfg), total_steps)
    inner = optax.chain(
        *([optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm else []),
        optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps),
        optax.add_decayed_weights(o.weight_decay, mask=decay_mask),
        _scale_by_rate(rate, split(lr_factors(o, params), frozen)[0]),
    )
    return optax.GradientTransformationExtraArgs(
        lambda params: inner.init(split(params, frozen)[0]), inner.update
    )


class RateState(NamedTuple):
    """The learning rate of the last update, kept for the log."""

    lr: jax.Array


def _scale_by_rate(
    rate: Callable[[Any], jax.Array], factors: Params
) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, step: Any = None, **extra):
        del state, params, extra
        lr = rate(step)
        return jax.tree.map(lambda u, f: -lr * f * u, updates, factors), RateState(lr)

    return optax.GradientTransformationExtraArgs(lambda params: RateState(jnp.zeros((), jnp.float32)), update)


def current_rate(opt_state: Any) -> jax.Array:
    """The learning rate that the update behind this state of `make_optimizer` used."""
    return opt_state[-1].lr


def with_moments(opt_state: Any, first: Params, second: Params, step: Any) -> Any:
    """A state of `make_optimizer` with other moments, as after so many updates.

    Args:
        opt_state: the state.
        first: running means of the gradients, of the trainable parameters.
        second: running means of their squares.
        step: updates made, i32[]; the bias correction depends on it.
    """

    def replaced(part: Any) -> Any:
        adam = isinstance(part, optax.ScaleByAdamState)
        return part._replace(count=step, mu=first, nu=second) if adam else part

    return tuple(replaced(part) for part in opt_state)


def moments(opt_state: Any) -> tuple[Any, Any, Any]:
    """Both moments and the number of updates in a state of `make_optimizer`."""
    adam = next(part for part in opt_state if isinstance(part, optax.ScaleByAdamState))
    return adam.mu, adam.nu, adam.count


def clamp(params: Params, o: config.Optim) -> Params:
    """Keeps `logit_scale` within [0, optim.max_logit_scale]; applied after every update, as the reference does.

    Example:
        >>> float(clamp({"logit_scale": jnp.float32(9)}, config.Optim(max_logit_scale=4.0))["logit_scale"])
        4.0
    """
    if "logit_scale" not in params:  # frozen
        return params
    return params | {"logit_scale": jnp.clip(params["logit_scale"], 0.0, o.max_logit_scale)}


def update_ema(ema: Params, params: Params, decay: float, step: Any) -> Params:
    """The running mean of parameters, with less inertia in the first steps: decay is at most (1 + s) / (10 + s).

    Example:
        >>> float(update_ema({"w": jnp.float32(0)}, {"w": jnp.float32(1)}, 0.999, 0)["w"])
        0.8999999761581421
    """
    s = jnp.asarray(step, jnp.float32)
    d = jnp.minimum(decay, (1 + s) / (10 + s))
    return jax.tree.map(lambda e, p: e + (1 - d) * (p - e), ema, params)
