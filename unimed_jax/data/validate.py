"""What makes an example fit to be stored: a picture that decodes, and captions that say something."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from unimed_jax import config
from unimed_jax.data import images, limits, markers
from unimed_jax.data.record import Caption, Example
from unimed_jax.errors import DataError

_WHITE = frozenset("\t\n\v\f\r\x85")


class Reject(Exception):
    """Raised for an item that cannot be used; it is counted and listed, the rest goes on.

    Args:
        reason: one word, e.g. decode_error.
        detail: one line for the list of rejects; without paths or personal data.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = " ".join(str(detail).split())[:500]


def clean_captions(
    captions: Iterable[Caption], count: Callable[[str], int] | None = None, *, source: str = ""
) -> tuple[Caption, ...]:
    """Takes joined captions apart (data/markers.py), brings them to NFC, drops placeholders, counts tokens.

    Args:
        captions: of one example.
        count: number of tokens of a text, special ones included; None = not counted.
        source: of the example.

    Raises:
        Reject: caption_not_utf8, caption_control, caption_too_long, caption_kind, caption_too_many, caption_empty.

    Example:
        >>> clean_captions([Caption(text=" a chest film "), Caption(text="nan")])
        (Caption(text='a chest film', kind='original', tokens=0),)
    """
    kept = []
    for caption in _taken_apart(captions, source):
        if fault := caption_fault(caption):
            raise Reject(*fault)
        text = unicodedata.normalize("NFC", caption.text).strip()
        if not markers.is_placeholder(text):
            kept.append(Caption(text=text, kind=caption.kind, tokens=count(text) if count else 0))
    if not kept:
        raise Reject("caption_empty", "no caption says anything")
    if len(kept) > limits.MAX_CAPTIONS:
        raise Reject("caption_too_many", f"{len(kept)} captions, more than {limits.MAX_CAPTIONS}")
    return tuple(kept)


def _taken_apart(captions: Iterable[Caption], source: str) -> Iterator[Caption]:
    for caption in captions:
        yield from markers.split(caption.text, source) if markers.find(caption.text, source) else [caption]


def caption_fault(caption: Caption) -> tuple[str, str] | None:
    """The (reason, detail) for which a caption is refused, or None."""
    text = caption.text
    if any("\ud800" <= c <= "\udfff" for c in text):
        return "caption_not_utf8", "it has bytes that are not UTF-8"
    if len(text) > limits.MAX_CAPTION_CHARS:
        return "caption_too_long", f"{len(text)} characters, more than {limits.MAX_CAPTION_CHARS}"
    control = [c for c in text if unicodedata.category(c) == "Cc" and c not in _WHITE]
    if control:
        return "caption_control", f"control character U+{ord(control[0]):04X}"
    if caption.kind not in config.CAPTION_KINDS:
        return "caption_kind", f"kind {caption.kind!r} is none of {', '.join(config.CAPTION_KINDS)}"
    return None


def finish(example: Example, count: Callable[[str], int] | None = None) -> Example:
    """Decodes the picture and completes the example: format, height, width, sha256, captions, token counts.

    Args:
        example: as a source gives it.
        count: as in `clean_captions`.

    Raises:
        Reject: empty_file, too_large, too_slow, decode_error, modality, label, or one of `clean_captions`.
    """
    try:
        with limits.processor_time(limits.MAX_DECODE_SECONDS):
            pixels = images.decode(example.image)
        image_format = images.image_format(example.image)
    except images.TooLarge as e:
        raise Reject("too_large", e.cause) from e
    except limits.TooSlow as e:
        raise Reject("too_slow", f"decoding took {e}") from e
    except DataError as e:
        raise Reject("decode_error" if example.image else "empty_file", e.cause) from e
    if example.modality and example.modality not in config.MODALITIES:
        raise Reject("modality", f"{example.modality[:40]!r} is none of {', '.join(config.MODALITIES)}")
    if not all(label.isprintable() and len(label) <= limits.MAX_LABEL_CHARS for label in example.labels):
        raise Reject(
            "label",
            f"it is not UTF-8, has control characters or more than {limits.MAX_LABEL_CHARS} characters",
        )
    return replace(
        example,
        captions=clean_captions(example.captions, count, source=example.source),
        image_format=image_format,
        height=pixels.shape[0],
        width=pixels.shape[1],
        sha256=hashlib.sha256(example.image).hexdigest(),
    )
