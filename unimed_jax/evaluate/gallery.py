"""A self-contained HTML page of small pictures with captions: hits of a search, pairs of an audit."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unimed_jax.data import files
from unimed_jax.errors import DataError
from unimed_jax.evaluate import shown

SIDE = 224  # pixels of a thumbnail's longer side
_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.4 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem}
section{display:flex;flex-wrap:wrap;gap:1rem}
figure{margin:0;padding:.6rem;border:1px solid #8885;border-radius:6px;box-sizing:border-box}
figure{width:min-content;max-width:100%}
figure div{display:flex;gap:.4rem}
figure span{width:224px;min-width:0}
img{display:block;max-width:100%;background:#000}
i{display:block;height:120px;background:#8883;padding:.5rem;font-style:normal;box-sizing:border-box}
figcaption,small{overflow-wrap:anywhere}
small{display:block;margin-top:.3rem;opacity:.75}
figcaption:not(:empty){margin-top:.4rem}
small,figcaption{white-space:pre-line}
dt{font-weight:600;float:left;clear:left;margin-right:.6rem}
dd{margin:0 0 .2rem;overflow-wrap:anywhere}
@media(max-width:560px){body{margin:1rem auto}figure{width:100%}figure span{flex:1}}
"""

Picture = tuple[str, str]  # (JPEG as base64, or empty; what is written below it)


def thumbnail(pixels: UInt8[np.ndarray, "..."], side: int = SIDE) -> str:
    """A picture as base64 JPEG, its longer side at most so many pixels."""
    image = Image.fromarray(pixels).convert("RGB")
    image.thumbnail((side, side))
    return shown.thumbnail(np.asarray(image))


def page(
    title: str,
    facts: Mapping[str, str],
    groups: Iterable[tuple[str, Sequence[tuple[Sequence[Picture], str]]]],
    note: str,
) -> str:
    """The HTML; every text in it is escaped.

    Args:
        title: of the page.
        facts: name -> value, listed at the top.
        groups: (heading, figures); a figure is (its pictures side by side, a caption).
        note: the last line.
    """
    text = html.escape
    listed = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in facts.items())
    body = []
    for heading, figures in groups:
        body.append(f"<h2>{text(heading)}</h2><section>" if heading else "<section>")
        for pictures, caption in figures:
            cells = "".join(
                f"<span>{_image(jpeg)}<small>{text(below)}</small></span>" for jpeg, below in pictures
            )
            body.append(f"<figure><div>{cells}</div><figcaption>{text(caption)}</figcaption></figure>")
        body.append("</section>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style><h1>{text(title)}</h1><dl>{listed}</dl>"
        f"{''.join(body)}<p>{text(note)}</p></html>\n"
    )


def _image(jpeg: str) -> str:
    return f'<img alt="" src="data:image/jpeg;base64,{jpeg}">' if jpeg else "<i>no picture here</i>"


def write(path: str | Path, text: str) -> None:
    """Writes a page, atomically.

    Raises:
        DataError: when it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)
    except OSError as e:
        raise DataError(f"{path} cannot be written: {e.strerror or e}", "choose another name") from e
