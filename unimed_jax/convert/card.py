"""The model card beside every exported model: what it is, where it comes from, how to load it, what it is not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from unimed_jax import __version__, config
from unimed_jax.data.images import NORMALIZE
from unimed_jax.models import clip

# How each format is opened; {place} is the folder or file.
USE: dict[str, str] = {
    "native": 'import unimed_jax as uj\n\nmodel = uj.load("{place}")\nmodel.classify(["scan.png"], '
    '{{"pneumonia": ["chest X-ray of pneumonia"], "normal": ["normal chest X-ray"]}})',
    "openclip": "import open_clip\n\nmodel, preprocess = open_clip.create_model_from_pretrained("
    '"local-dir:{place}")\ntokenizer = open_clip.get_tokenizer("local-dir:{place}")',
    "unimed": "# in a checkout of UniMed-CLIP\nmodel, _, preprocess = create_model_and_transforms(\n"
    '    "{architecture}", pretrained="{place}", force_quick_gelu=True)  # text encoder: {hf_text}',
    "hf-vision": "from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection\n\n"
    'model = CLIPVisionModelWithProjection.from_pretrained("{place}")\n'
    'processor = CLIPImageProcessor.from_pretrained("{place}")',
    "hf-clip": 'from transformers import CLIPModel, CLIPProcessor\n\nmodel = CLIPModel.from_pretrained("{place}")\n'
    'processor = CLIPProcessor.from_pretrained("{place}")',
}
_CELL = 600  # characters of one cell
_NOT_KNOWN = "not known to this program: the terms of the weights it was made from apply"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where weights come from; every field is optional.

    Attributes:
        file: name of the file or folder read, without its path.
        sha256: of that file.
        format: of that file.
        repo, revision: on a hub.
        run, steps: of a training run.
        licence: of the weights.
        note: anything else, one line each.
    """

    file: str = ""
    sha256: str = ""
    format: str = ""
    repo: str = ""
    revision: str = ""
    run: str = ""
    steps: int = 0
    licence: str = ""
    note: Sequence[str] = field(default_factory=tuple)

    def rows(self) -> list[tuple[str, str]]:
        """What is known, as (name, value)."""
        rows = [
            ("file", self.file),
            ("sha256 of the file", self.sha256),
            ("format of the file", self.format),
            ("hub", f"{self.repo} @ {self.revision}" if self.repo else ""),
            ("training run", f"{self.run}, {self.steps} steps" if self.run else ""),
            ("licence of the weights", self.licence or _NOT_KNOWN),
            *(("note", line) for line in self.note),
        ]
        return [(k, v) for k, v in rows if v]


def origin_of(said: Mapping[str, Any]) -> Origin:
    """The origin that a config.json tells, in its fields or in those of "origin"; values of other types are left out.

    Example:
        >>> origin_of({"run": "a", "steps": "many", "origin": {"licence": "MIT"}, "x": 1})
        Origin(file='', sha256='', format='', repo='', revision='', run='a', steps=0, licence='MIT', note=())
    """
    inner = said.get("origin")
    said = {**said, **(inner if isinstance(inner, Mapping) else {})}
    known: dict[str, Any] = {}
    for f in fields(Origin):
        value = said.get(f.name)
        if f.name == "note":
            lines = value if isinstance(value, (list, tuple)) else ()
            known["note"] = tuple(x for x in lines if isinstance(x, str))
        elif type(value) is (int if f.name == "steps" else str):
            known[f.name] = value
    return Origin(**known)


def card(
    m: config.Model,
    to: str,
    *,
    place: str = "",
    origin: Origin | None = None,
    tokenizer: bool = True,
    verified: Mapping[str, float] | None = None,
    hf_text: str = "",
) -> str:
    """README.md of an exported model.

    Args:
        m: the architecture.
        to: format, a key of `USE`.
        place: folder or file for the lines that load it; default: a placeholder.
        origin: where the weights come from.
        tokenizer: whether one lies beside the weights.
        verified: largest absolute difference from PyTorch by tower, when it was measured.
        hf_text: name of the text tower on the hub, for formats that want one.

    Example:
        >>> from unimed_jax.models import zoo
        >>> "ViT 64x2, patch 8, 32 px" in card(zoo.get("tiny"), "native")
        True
    """
    v, t = m.vision, m.text
    mean, std = NORMALIZE[v.normalize]
    number = lambda xs: ", ".join(f"{x:.8g}" for x in xs)
    count = sum(int(np.prod(x.shape)) for x in clip.flatten(clip.skeleton(m)[1]).values())
    architecture = [
        (
            "image tower",
            f"ViT {v.width}x{v.depth}, patch {v.patch_size}, {v.image_size} px, {v.heads} heads, {v.act}",
        ),
        (
            "text tower",
            f"{t.kind} {t.width}x{t.depth}, {t.vocab_size} words, context {t.context_length} tokens, {t.act}",
        ),
        ("embedding", f"{m.embed_dim}; heads: image {v.proj}, text {t.proj}"),
        ("parameters", f"{count:,}"),
        (
            "preprocessing",
            f"shorter side to {v.image_size} (bicubic), centre crop, RGB, mean {number(mean)}, std {number(std)}",
        ),
        (
            "tokenizer",
            "tokenizer.json beside the weights" if tokenizer else "NOT INCLUDED: only images can be encoded",
        ),
    ]
    use = USE[to].format(
        place=place or "PATH",
        hf_text=hf_text or "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
        architecture=open_clip_name(v),
    )
    parts = [
        f"# {_cell(m.name)}",
        f"A vision-language model for medical images, written in the format `{to}` by unimed_jax {__version__}.",
        "**Research use only. Not a medical device; no diagnosis may rest on its scores, which are not calibrated "
        "probabilities.**",
        "## Architecture",
        _table(architecture),
        "## Weights",
        _table((origin or Origin()).rows()),
    ]
    if verified:
        said = ", ".join(f"{tower} {value:.2g}" for tower, value in verified.items())
        parts.append(
            "Checked at conversion: the same pictures and texts through PyTorch and through this program, float32; "
            f"largest absolute difference: {said}."
        )
    parts += ["## Use", f"```python\n{use}\n```"]
    return "\n\n".join(parts) + "\n"


def open_clip_name(v: config.Vision) -> str:
    """The name of a vision tower in OpenCLIP's and the original's lists of configurations.

    Example:
        >>> open_clip_name(config.Vision(width=1024, patch_size=14, image_size=336))
        'ViT-L-14-336-quickgelu'
    """
    size = {384: "S", 768: "B", 1024: "L", 1280: "H"}.get(v.width, f"{v.width}")
    resolution = "" if v.image_size == 224 else f"-{v.image_size}"
    return f"ViT-{size}-{v.patch_size}{resolution}{'-quickgelu' if v.act == 'quick_gelu' else ''}"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(a)} | {_cell(b)} |" for a, b in rows)])


def _cell(text: str) -> str:
    r"""Words that may come from a file as one line of Markdown without any markup of its own.

    Example:
        >>> print(_cell("a|b`c\n# d"))
        a\|b\`c # d
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line if len(line) <= _CELL else f"{line[: _CELL - 3]}..."
    return re.sub(r"([\\`|<\[])", r"\\\1", line)
