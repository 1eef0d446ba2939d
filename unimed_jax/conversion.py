"""Conversion from any known file, folder or run to any format that can hold the model; with proof, when asked for.

Whatever is wrong is found before the target appears, and an older target stays until the new one stands.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax import config, model_folder
from unimed_jax.convert import card, native, optimizer, outputs, source, verify
from unimed_jax.data import files
from unimed_jax.data.text import Tokenizer
from unimed_jax.errors import DataError, UsageError, did_you_mean
from unimed_jax.models import clip

TARGETS = ("native", *outputs.WRITERS)
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to convert, and how.

    Attributes:
        src: a `.pt`, `.bin` or `.safetensors` file, a Hugging Face or OpenCLIP folder, a model folder, or a run
            (`RUN@STEP` for one step).
        dst: the folder, or for "unimed" the file, to write. A source of one tower becomes a tower file
            (`.safetensors`), which `init.vision` and `init.text` of a training take.
        to: one of `TARGETS`.
        model: a named architecture, for a source that does not show everything about its own.
        tokenizer: of the model, where the source has none, or instead of a folder's; a run's must be the one it names.
        with_optimizer: bring Adam's moments and the step of a training checkpoint, too.
        ema: of a run, the averaged weights (True) or the plain ones (False); None: averaged where they were kept.
        hf_text: name of the text tower on the hub, written into an OpenCLIP folder instead of the folder's own path.
        verify: compare with PyTorch.
        force: replace an existing target.
        digest: gives the sha256 of `src`, a file, where it is being computed already (`files.sha256_ahead`).
    """

    src: str | Path
    dst: str | Path
    to: str = "native"
    model: str = ""
    tokenizer: str | Path = ""
    with_optimizer: bool = False
    ema: bool | None = None
    hf_text: str = ""
    verify: bool = False
    force: bool = False
    digest: Callable[[], str] | None = None


@dataclass(slots=True, kw_only=True)
class Converted:
    """What a conversion did.

    Attributes:
        model: the architecture.
        towers: those that were converted.
        format: of the source.
        read: what became of the source's tensors, one line.
        ignored: the source's tensors that are no weights of the model, with the reason.
        wrote: files and folders.
        verified: largest absolute difference from PyTorch by tower; empty when it was not asked for.
        missing: what the target lacks, one line each, e.g. a tokenizer.
    """

    model: config.Model
    towers: tuple[str, ...] = ("vision", "text")
    format: str = "native"
    read: str = ""
    ignored: dict[str, str] = field(default_factory=dict)
    wrote: list[Path] = field(default_factory=list)
    verified: dict[str, float] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def convert(request: Request, tell: Tell = lambda line: None) -> Converted:
    """Reads a model from anywhere and writes it in one format.

    Args:
        request: what to do.
        tell: called with lines that say what is going on.

    Raises:
        UsageError: for a target that exists, a format that cannot hold the model, or something that only the user
            knows (an activation that no file says, say).
        DataError: for a file that is damaged or does not fit, everything wrong listed; or for outputs that differ.
    """
    r = request
    if r.to not in (*TARGETS, *outputs.REFUSED):  # those are refused with the reason, once the model is known
        raise UsageError(f"no format {r.to!r}.{did_you_mean(r.to, TARGETS)}", f"one of {', '.join(TARGETS)}")
    _refuse_target(r)
    if r.with_optimizer and r.to != "native":
        raise UsageError(
            f"the format {r.to} holds no optimizer state", "--with-optimizer goes with --to native"
        )
    if r.hf_text and r.to != "openclip":
        raise UsageError(
            f"the format {r.to} names no text tower on the hub", "--hf-text-name goes with --to openclip"
        )
    if r.verify and importlib.util.find_spec("torch") is None:
        raise UsageError(
            "comparing with PyTorch needs torch, which is not installed", "pip install 'unimed-jax[torch]'"
        )
    return (_foreign if model_folder.is_foreign(r.src) else _own)(r, tell)


def _refuse_target(r: Request) -> None:
    """Before any work: nothing that is there is ever overwritten unasked, and the source least of all."""
    dst = Path(r.dst)
    if dst.exists() and _holds_source(r):
        raise UsageError(
            f"{r.src} would be overwritten: it is the target, or inside it, or the target is a part of it",
            "choose another target",
        )
    if r.to in outputs.WRITERS:
        outputs.refuse_target(r.to, dst, force=r.force)
    elif dst.suffix != ".safetensors" or dst.is_dir():
        files.refuse_folder(dst, model_folder.OWN_FILES, force=r.force, what="model folder")
    elif os.path.lexists(dst) and not r.force:
        raise UsageError(f"{r.dst} exists", "choose another target, or --force to replace it")
    card_file = _card_file(r)
    if card_file and card_file.is_dir():
        raise UsageError(f"{card_file} is a folder: the model card goes there", "choose another target")
    if card_file and os.path.lexists(card_file) and not r.force:
        raise UsageError(
            f"{card_file} exists: the model card goes there", "choose another target, or --force"
        )


def _holds_source(r: Request) -> bool:
    """Whether a target that exists is the source, holds it, or is one of its files or folders."""
    text = str(r.src)
    run, _, step = text.rpartition("@")
    text = run if run and step.isdigit() and not os.path.lexists(text) else text
    for place in (os.path.abspath, os.path.realpath):  # as it was named, and where links lead
        src, dst = Path(place(text)), Path(place(r.dst))
        if os.path.lexists(src) and (src == dst or src.is_relative_to(dst)):
            return True
        # Below a source, a run's folders and what may have been read are its own; results may well lie there.
        read = dst.is_file() and (model_folder.is_foreign(src) or dst.name in model_folder.OWN_FILES)
        parts = {src / "model", src / "checkpoints"}
        if src in dst.parents and (read or parts & {dst, *dst.parents}):
            return True
    return False


def _card_file(r: Request) -> Path | None:
    """The model card of a format that is one file; a folder has it inside."""
    return Path(f"{r.dst}.md") if r.to in outputs.WRITERS and outputs.WRITERS[r.to].is_file else None


def describe(m: config.Model, towers: tuple[str, ...] = ("vision", "text")) -> str:
    """One line: what the towers are.

    Example:
        >>> from unimed_jax.models import zoo
        >>> describe(zoo.get("tiny"), ("vision",))
        'tiny: ViT 64x2, patch 8, 32 px, quick_gelu, head linear 32'
    """
    v, t = m.vision, m.text
    words = {
        "vision": f"ViT {v.width}x{v.depth}, patch {v.patch_size}, {v.image_size} px, {v.act}, "
        f"head {v.proj} {m.embed_dim}",
        "text": f"{t.kind} {t.width}x{t.depth}, {t.vocab_size} words, context {t.context_length}, {t.act}, "
        f"head {t.proj} {m.embed_dim}",
    }
    return f"{m.name}: " + " + ".join(words[tower] for tower in towers)


# -- from another library ---------------------------------------------------------------------------------------------


def _foreign(r: Request, tell: Tell) -> Converted:
    if r.ema is not None:
        raise UsageError(f"{r.src} is no run, its weights are one kind", "leave --ema and --no-ema out")
    found = source.open_source(r.src, model=r.model)
    m = found.model
    done = Converted(model=m, towers=found.towers, format=found.format, ignored=found.ignored)
    tell(f"read    {found.path}  {found.format}")
    tell(f"arch    {describe(m, found.towers)}")
    for name, value in found.facts.get("assumed", {}).items():
        tell(f"assumed {name} = {value}")
    for line in _left_out(found, r):
        tell(f"left    {line}")
    if len(found.towers) == 1:
        return _tower(r, found, done, tell)
    if r.to != "native":
        outputs.writer_for(r.to, m)
    words = _words(r.tokenizer or found.tokenizer, m)
    moments = _moments(found) if r.with_optimizer else None
    with ThreadPoolExecutor(1) as pool:
        origin = pool.submit(_origin, found, r.digest)  # reads the whole file, beside the conversion
        done.read = found.report()
        tell(f"mapped  {done.read}")
        whole = found.params() if r.verify else None  # else leaf by leaf
        if whole and r.verify:
            done.verified = check(found, whole, words, tell)
        _write(r, m, whole or found.leaves(), words, origin.result, done, tell, moments)
    return done


def _left_out(found: source.Source, r: Request) -> list[str]:
    """What the file holds beside the weights and is not taken, one line each."""
    names = list(found.facts.get("left_out", ()))
    lines = (
        [f"out: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"]
        if names
        else []
    )
    if found.optimizer is not None and not r.with_optimizer:
        lines.append("out: the optimizer's state; --with-optimizer brings it")
    return lines


def _tower(r: Request, found: source.Source, done: Converted, tell: Tell) -> Converted:
    """A source that holds one tower becomes a tower file, or another library's model of that tower."""
    (tower,) = found.towers
    alone = f"{found.path} holds the {tower} tower alone"
    others = [to for to, writer in outputs.WRITERS.items() if writer.towers == found.towers]
    if r.to not in ("native", *others):
        raise UsageError(
            f"{alone}, the format {r.to} wants a whole model", f"--to {', '.join(['native', *others])}"
        )
    if r.to == "native" and (r.with_optimizer or r.tokenizer or Path(r.dst).suffix != ".safetensors"):
        raise UsageError(
            f"{alone}, so it is no model by itself",
            f"write a tower file, e.g. {tower}.safetensors, or start from it: --config.init.{tower}={found.path}",
        )
    params = found.params()
    done.read = found.report()
    tell(f"mapped  {done.read}")
    if r.verify:
        done.verified = check(found, params, None, tell)
    origin = _origin(found, r.digest)
    if r.to != "native":
        _write(r, found.model, params, None, lambda: origin, done, tell)
        return done
    about = {tower: config.to_dict(getattr(found.model, tower)), "origin": dataclasses.asdict(origin)}
    _refuse_target(r)  # again: reading took its time
    native.save_tower({tower: params[tower]}, r.dst, about)
    done.wrote = [Path(r.dst)]
    tell(f"wrote   {r.dst}")
    return done


def _moments(found: source.Source) -> optimizer.Moments:
    if found.optimizer is None:
        raise DataError(
            f"{found.path} holds weights and no optimizer state", "convert without --with-optimizer"
        )
    return optimizer.of_source(found)


def _origin(found: source.Source, digest: Callable[[], str] | None) -> card.Origin:
    said = {k: v for k, v in found.facts.items() if isinstance(v, (str, int, float))}
    note = [f"{k}: {v}" for k, v in sorted(said.items())]
    if found.files != (found.weights,):  # an index names them, and its own digest says nothing about them
        note += [f"sha256 of {file.name}: {files.file_sha256(file)}" for file in found.files]
        sha256 = ""
    elif digest is not None and found.path.is_file():  # of a folder, it would be the wrong file's
        sha256 = digest()
    else:
        sha256 = files.file_sha256(found.weights)
    return card.Origin(file=found.path.name, sha256=sha256, format=found.format, note=tuple(note))


# -- from here --------------------------------------------------------------------------------------------------------


def _own(r: Request, tell: Tell) -> Converted:
    if r.model or r.with_optimizer:
        raise UsageError(
            f"{r.src} is a model of this program and says itself what it is",
            "--model and --with-optimizer go with a PyTorch file",
        )
    m, params, words = model_folder.read(r.src, ema=r.ema, tokenizer=r.tokenizer)
    words = _words(r.tokenizer, m) if r.tokenizer else words
    done = Converted(model=m, read=f"{len(clip.flatten(params))} leaves")
    tell(f"read    {r.src}  {done.read}")
    tell(f"arch    {describe(m)}")
    if r.to == "native" and r.verify:
        raise UsageError("both sides are of this program: there is nothing to compare", "leave --verify out")
    moments = None
    if (Path(r.src) / optimizer.FILE).is_file():
        if r.to == "native":
            moments = optimizer.load(Path(r.src) / optimizer.FILE)
        else:
            tell(f"left    out: {optimizer.FILE}, which the format {r.to} cannot hold")
    if r.to != "native":
        outputs.writer_for(r.to, m)
    _write(r, m, params, words, lambda: _own_origin(r), done, tell, moments)
    return done


def _own_origin(r: Request) -> card.Origin:
    """What the source says of its own origin, and that it went through our hands."""
    known = card.origin_of(model_folder.about(r.src))
    passed = f"converted from the model folder or run {Path(str(r.src)).name}"
    return dataclasses.replace(known, note=(*known.note, passed))


# -- writing ----------------------------------------------------------------------------------------------------------


def _words(path: str | Path | None, m: config.Model) -> Tokenizer | None:
    return model_folder.open_tokenizer(Path(path), m) if path else None


def _write(
    r: Request,
    m: config.Model,
    params: clip.Params | Iterable[tuple[str, np.ndarray]],
    words: Tokenizer | None,
    origin: Callable[[], card.Origin],
    done: Converted,
    tell: Tell,
    moments: optimizer.Moments | None = None,
) -> None:
    """Writes the target; `origin` is asked for last, since it may still be being computed."""
    if r.to in outputs.WRITERS and len(done.towers) == 2 and (parts := outputs.stay_out(r.to, m)):
        tell(f"left    out: {', '.join(parts)}, which the format {r.to} cannot hold")
    if words is None and r.to not in ("hf-vision", "unimed"):
        done.missing.append(f"no tokenizer, so only images can be encoded: {model_folder.NO_TOKENIZER}")
    if r.to == "native":

        def more(folder: Path) -> None:
            if moments:
                optimizer.save(folder / optimizer.FILE, moments, m)

        about = lambda: {
            "origin": {k: v for k, v in dataclasses.asdict(origin()).items() if v},
            **({"verified": done.verified} if done.verified else {}),
        }
        done.wrote = [model_folder.save(r.dst, m, params, words, force=r.force, extra=about, more=more)]
    else:
        done.wrote = _write_foreign(r, m, params, words, origin, done, tell)
    for path in done.wrote:
        tell(f"wrote   {path}")
    for line in done.missing:
        tell(f"missing {line}")


def _write_foreign(
    r: Request,
    m: config.Model,
    params: Any,
    words: Tokenizer | None,
    origin: Callable[[], card.Origin],
    done: Converted,
    tell: Tell,
) -> list[Path]:
    """Writes another library's format; a model of ours is compared with PyTorch before the target appears."""

    def finish(beside: Path) -> None:
        if r.verify and not done.verified:
            done.verified = check(source.open_source(beside, model=m), params, words, tell)
        readme = card.card(
            *(m, r.to),
            place=str(r.dst),
            origin=origin(),
            tokenizer=words is not None,
            verified=done.verified,
            hf_text=r.hf_text,
        )
        # Beside a single file, the card comes first: it says nothing without the file, the file little without it.
        files.write_text(_card_file(r) or beside / model_folder.CARD, readme)

    outputs.write(
        *(r.to, params, m, r.dst), tokenizer=words, force=r.force, hf_text_name=r.hf_text, more=finish
    )
    card_file = _card_file(r)
    return [Path(r.dst)] if card_file is None else [Path(r.dst), card_file]


# -- proof ------------------------------------------------------------------------------------------------------------


def check(
    reference: source.Source, params: clip.Params, words: Tokenizer | None, tell: Tell
) -> dict[str, float]:
    """Compares our outputs with PyTorch's, tower by tower: largest absolute differences.

    Raises:
        DataError: when one is above `verify.LIMIT`.
    """
    found = verify.compare(reference, *encoders(reference.model, params), tokenizer=words)
    for d in found:
        what = "images" if d.tower == "vision" else "texts"
        tell(
            f"verify  {d.tower}: max |difference| {d.value:.2g} of embeddings up to {d.scale:.2g} "
            f"({d.n} {what}, float32)  {'OK' if d.ok else 'DIFFERENT'}"
        )
    verify.require(found, str(reference.path))
    return {d.tower: d.value for d in found}


def encoders(m: config.Model, params: clip.Params) -> tuple[verify.Encode, verify.Encode]:
    """Our two towers in float32 as functions on numpy arrays, embeddings not normalised; one tower may be absent."""
    from unimed_jax import infer  # slow to import, and for proof alone

    have = clip.flatten(params)
    # A tower that the source does not have is never called; it only has to be there.
    whole = {
        k: have[k] if k in have else np.zeros(v.shape, np.float32)
        for k, v in clip.flatten(clip.skeleton(m)[1]).items()
    }
    loaded = infer.Loaded(m, clip.unflatten(whole), None)
    return (
        lambda pictures: loaded.encode_image(pictures, normalize=False),
        lambda tokens: loaded.encode_text(tokens, normalize=False),
    )
