"""Every setting of an experiment, as slotted dataclasses. Standard library only.

A config file (`configs/*.py`) has `get_config(arg="")` and returns a `Train`. Overrides come from the command
line (`--config.optim.lr=1e-3`). `config_rules` refuses impossible settings; `to_dict`/`from_dict` give the JSON form
that run folders, checkpoints and model folders hold.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from unimed_jax.errors import UsageError, did_you_mean

MODALITIES = ("X-ray", "CT", "MRI", "Ultrasound", "Histopathology", "Fundus")
# The 13 parts of UniMed in the order of its mixture (5.28 million pairs) with their weights. The original reads its
# shards once an epoch, whatever their source: with data.mixture "size" that is a weight of 1 each.
UNIMED_WEIGHTS = {
    "radimagenet": 1.0,
    "chexpert": 1.0,
    "mimic_cxr": 1.0,
    "openi": 1.0,
    "chest_xray8": 1.0,
    "roco": 1.0,
    "pmc_clip": 1.0,
    "llava_med_alignment_set": 1.0,
    "llava_med_hq_60k_set": 1.0,
    "quilt": 1.0,
    "retina_part1": 1.0,
    "retina_part2": 1.0,
    "retina_part3": 1.0,
}
UNIMED_SOURCES = tuple(UNIMED_WEIGHTS)
CAPTION_KINDS = ("original", "report", "template", "llm")


@dataclass(kw_only=True, slots=True)
class Duration:
    """A length of training, given once: as steps, epochs or examples (0 = not given).

    Example:
        >>> Duration(epochs=2).steps_for(batch_size=8, epoch_examples=100)
        25
    """

    steps: int = 0
    epochs: float = 0.0
    examples: int = 0

    def given(self) -> bool:
        """Whether any of the three spellings is set."""
        return bool(self.steps or self.epochs or self.examples)

    def steps_for(self, *, batch_size: int, epoch_examples: int) -> int:
        """Resolves to whole steps (rounded up); 0 when nothing is given."""
        if self.steps:
            return self.steps
        return math.ceil((self.examples or self.epochs * epoch_examples) / batch_size)


@dataclass(kw_only=True, slots=True)
class Vision:
    """A vision transformer. Defaults are the ViT-B/16 of OpenAI CLIP, MetaCLIP and UniMed-CLIP."""

    image_size: int = 224  # pixels
    patch_size: int = 16  # pixels
    width: int = 768
    depth: int = 12  # blocks
    heads: int = 12
    mlp_dim: int = 3072
    act: str = "quick_gelu"  # quick_gelu | gelu (exact, erf)
    ln_pre: bool = True
    ln_eps: float = 1e-5
    patch_bias: bool = False
    pool: str = "cls"  # cls | mean (over patches)
    proj: str = "linear"  # none | linear | mlp; never with biases
    normalize: str = "openai"  # name of a (mean, std) pair in data/images.py


@dataclass(kw_only=True, slots=True)
class Text:
    """A text transformer. Defaults are BERT-base with UniMed-CLIP's MLP head."""

    kind: str = "bert"  # bert (post-norm, bidirectional) | clip (pre-norm, causal)
    vocab_size: int = 30522
    context_length: int = 256  # tokens, [CLS] and [SEP] included
    max_positions: int = 512  # rows of the position table; for clip equal to context_length
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    act: str = "gelu"
    ln_eps: float = 1e-12
    dropout: float = 0.1  # hidden and attention dropout, training only
    pad_id: int = 0
    eot_id: int = -1  # clip: the token pooled; -1 = position of the largest id, as OpenAI's model does
    pool: str = "cls"  # cls | eot | mean (over real tokens)
    proj: str = "mlp"  # none | linear | mlp; never with biases


@dataclass(kw_only=True, slots=True)
class Model:
    """The dual encoder and how it is computed."""

    name: str = "unimed-clip-vit-b16"
    embed_dim: int = 512
    vision: Vision = field(default_factory=Vision)
    text: Text = field(default_factory=Text)
    init_logit_scale: float = math.log(1 / 0.07)
    logit_bias: bool = False  # SigLIP's learned bias; needs loss.kind = sigmoid
    init_logit_bias: float = -10.0
    dtype: str = "bfloat16"  # compute; parameters are float32
    remat: str = "none"  # none | dots | full
    unroll: int = 1  # blocks per iteration of the layer scan
    cls_only_last: bool = True  # the last block computes only the pooled token (exact)
    # Text at its true length: (width, share of the batch) pairs, shares add up to 1. Captions are sorted by length
    # and each share is encoded at its own width; a batch that does not fit is encoded whole. Exact. Empty = off.
    text_groups: tuple[tuple[int, float], ...] = ()


@dataclass(kw_only=True, slots=True)
class Source:
    """One part of the training mixture."""

    name: str = ""
    path: str = ""  # folder under data.root; default: the name
    weight: float = 1.0  # relative draw frequency; see data.mixture
    captions: str = ""  # caption policy (data/captions.py); default: by source name


@dataclass(kw_only=True, slots=True)
class Data:
    """Where the records are and how a batch is made of them."""

    root: str = ""
    sources: tuple[Source, ...] = ()  # empty = every source under root
    split: str = "train"
    tokenizer: str = ""  # tokenizer.json, vocab.txt or a folder with one; default: <root>/tokenizer.json
    mixture: str = "size"  # size (weight x records) | weight (weights as they are) | temperature
    temperature: float = 2.0  # of mixture "temperature": shares of weight x records^(1/temperature)
    crop_scale: tuple[float, float] = (0.9, 1.0)  # area share of RandomResizedCrop
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: bool = False  # the reference has none: left and right matter in medicine
    color_jitter: float = 0.0  # brightness and contrast strength; 0 = off, as the reference
    # Fixed crops a record, used in turn and equal for every seed; the first is the picture that evaluation sees.
    # 0 = a fresh crop each epoch.
    views: int = 0
    # Folder for the features of frozen towers, computed once instead of every step (LiT, arXiv 2111.07991). Exact:
    # the same losses as without. Needs views > 0 for a frozen vision tower. Empty = off.
    features: str = ""
    workers: int = 0  # reader processes; 0 = threads in this process
    threads: int = 4  # reader threads a process
    prefetch: int = 2  # batches kept ready on the device


@dataclass(kw_only=True, slots=True)
class Loss:
    """The contrastive loss over the global batch."""

    kind: str = "clip"  # clip (InfoNCE) | sigmoid (SigLIP)
    impl: str = "ring"  # ring (tiles, constant memory) | gathered
    tile: int = 2048  # columns a tile
    dedup: str = "off"  # off (reference) | mask: equal captions are no negatives


@dataclass(kw_only=True, slots=True)
class Optim:
    """AdamW as in the reference: betas 0.9/0.98, eps 1e-6, decay 0.2, warm-up then cosine to zero."""

    lr: float = 5e-4
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2
    warmup: Duration = field(default_factory=lambda: Duration(steps=2000))
    clip_norm: float = 0.0  # global gradient norm; 0 = off, as the reference
    max_logit_scale: float = math.log(100.0)
    layer_decay: float = 1.0  # learning-rate factor per block counted from the top; 1 = off
    freeze: tuple[str, ...] = ()  # regexes on parameter paths, e.g. "vision/(?!proj).*" (LiT)
    lr_multipliers: tuple[tuple[str, float], ...] = ()  # (regex on path, factor); the first match wins
    accum_steps: int = 1  # micro-batches a step; contrastive-exact
    ema_decay: float = 0.0  # 0 = off


@dataclass(kw_only=True, slots=True)
class Mesh:
    """Devices: `data` replicates the model, `fsdp` shards it; -1 = all that are left."""

    data: int = -1
    fsdp: int = 1
    min_size: int = 2**18  # elements; smaller leaves stay whole on every device


@dataclass(kw_only=True, slots=True)
class Eval:
    """Zero-shot evaluation inside training."""

    every: Duration = field(default_factory=Duration)  # not given = only at the end, when tasks are named
    tasks: tuple[str, ...] = ()  # task names (evaluate/prompts/*.json) or JSON files
    root: str = ""  # record folder of the evaluation split; default: data.root
    split: str = "test"
    batch_size: int = 64
    bootstrap: int = 1000  # resamples for the intervals


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """Saved states in the run folder."""

    every: Duration = field(default_factory=lambda: Duration(steps=1000))
    keep: int = 3  # newest states kept; at least 2


@dataclass(kw_only=True, slots=True)
class Init:
    """Where the parameters start from; empty = at random. Anything that `unimed-jax convert` reads will do.

    Files and folders of any library, model folders, RUN or RUN@STEP, and names of models that were fetched.
    """

    vision: str = ""  # file or folder that the vision tower comes from
    text: str = ""
    model: str = ""  # file or folder of a whole model: both towers and the logit scale
    logit_scale: str = ""  # where the temperature comes from; empty = init.model, else fresh
    resize: str = ""  # positions of another grid: "" refuse | bicubic (UniMed-CLIP) | antialias (OpenCLIP)
    optimizer: bool = False  # also Adam's moments and the step of init.model: its run goes on here


@dataclass(kw_only=True, slots=True)
class Train:
    """One experiment."""

    name: str = "unimed"
    seed: int = 0
    batch_size: int = 2048  # global batch, over all devices and hosts
    duration: Duration = field(default_factory=lambda: Duration(epochs=10))
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    mesh: Mesh = field(default_factory=Mesh)
    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    init: Init = field(default_factory=Init)
    log_every: int = 100  # steps
    max_bad_steps: int = 3  # non-finite steps in a row before the run stops
    writers: tuple[str, ...] = ("jsonl", "tensorboard")
    watchdog_s: float = 600.0  # seconds without progress before the run is called stalled; 0 = off


def get_path(config: Any, path: str) -> Any:
    """Returns the value at a dotted path, e.g. `get_path(train, "optim.lr")`."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON form of any config dataclass (tuples become lists)."""
    return _plain(dataclasses.asdict(config))


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    return [_plain(v) for v in x] if isinstance(x, (tuple, list)) else x


def from_dict(cls: type, values: dict[str, Any], where: str = "config") -> Any:
    """Rebuilds a config dataclass from its JSON form; fields that are absent keep their defaults.

    Raises:
        UsageError: for an unknown field or a value of the wrong type, with the full path.

    Example:
        >>> from_dict(Mesh, {"fsdp": 4}).fsdp
        4
    """
    if not isinstance(values, dict):
        raise UsageError(f"{where} is {type(values).__name__}, not a table of settings")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise UsageError(f"{where} has no field {name!r:.90}.{did_you_mean(str(name), hints)}")
    return cls(**{name: _coerce(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UsageError(f"{where} is {value!r:.90}, not a list")
        args = typing.get_args(hint)
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise UsageError(f"{where} has {len(value)} items, not {len(inner)}")
        return tuple(
            _coerce(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True))
        )
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise UsageError(f"{where} is a number of {len(str(value))} digits") from None
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise UsageError(f"{where} is {value!r:.90}", f"it must be of type {hint.__name__}")
    return value


def diff(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The settings that differ between two configs (dataclasses or their JSON form), by dotted path.

    Example:
        >>> diff(Mesh(fsdp=1), Mesh(fsdp=2))
        {'fsdp': (1, 2)}
    """
    a = old if isinstance(old, dict) else to_dict(old)
    b = new if isinstance(new, dict) else to_dict(new)
    out: dict[str, tuple[Any, Any]] = {}
    for k in sorted(a.keys() | b.keys()):
        x, y = a.get(k), b.get(k)
        if isinstance(x, dict) and isinstance(y, dict):
            out |= diff(x, y, f"{prefix}{k}.")
        elif x != y:
            out[prefix + k] = (x, y)
    return out
