"""A page to accept or strike captions, which works from a file with no server, and what becomes of its decisions."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data import files, limits
from unimed_jax.data.label_captions import Label, LabelCaptions
from unimed_jax.errors import DataError

FORMAT = "unimed_jax.caption_decisions"
VERSION = 1
DECISIONS = ("accept", "strike")

_STYLE = """\
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:60em;padding:0 1em 6em}
body{color:#1b1b1b;overflow-wrap:anywhere}button{flex:none}
h2{font-size:1.05em;margin:1.6em 0 .4em}ol{list-style:none;padding:0;margin:0}
li{display:flex;gap:.6em;align-items:baseline;padding:.3em .4em;border-left:4px solid #ccc;margin:.25em 0}
li.accept{border-color:#1a7f37;background:#eefaf0}li.strike{border-color:#b42318;background:#fdf0ef}
li.strike q{text-decoration:line-through;color:#777}q{flex:1;quotes:none}small{color:#666}
@media(max-width:560px){li{flex-wrap:wrap}q{flex-basis:100%}}
button{font:inherit;padding:.1em .6em;cursor:pointer}
#bar{position:fixed;bottom:0;left:0;right:0;text-align:center;background:#fff;padding:.6em}
#bar{border-top:1px solid #ccc}
@media print{#bar,button{display:none}}"""
_SCRIPT = """\
'use strict';
const sha=document.body.dataset.sha256,slot='unimed_jax.captions.'+sha,items=[...document.querySelectorAll('li')];
let decided={};
try{decided=JSON.parse(localStorage.getItem(slot))||{}}catch(e){}
function show(){let a=0,s=0;
 for(const li of items){const d=decided[li.id];li.className=d||'';a+=d==='accept';s+=d==='strike';
  for(const b of li.querySelectorAll('button'))b.setAttribute('aria-pressed',String(b.value===d))}
 document.getElementById('count').textContent=a+' accepted, '+s+' struck, '+(items.length-a-s)+' undecided';
 try{localStorage.setItem(slot,JSON.stringify(decided))}catch(e){}}
document.addEventListener('click',e=>{const b=e.target;
 if(b.value==='accept'||b.value==='strike'){const id=b.closest('li').id;
  if(decided[id]===b.value)delete decided[id];else decided[id]=b.value;show()}
 if(b.id==='rest'){for(const li of items)if(!decided[li.id])decided[li.id]='accept';show()}
 if(b.id==='save'){const out={format:'FORMAT',version:VERSION,captions_sha256:sha,decisions:{}};
  for(const li of items)if(decided[li.id])out.decisions[li.id]=decided[li.id];
  const link=document.createElement('a');
  link.href=URL.createObjectURL(new Blob([JSON.stringify(out,null,1)+'\\n'],{type:'application/json'}));
  link.download='decisions.json';link.click()}});
show();""".replace("FORMAT", FORMAT).replace("VERSION", str(VERSION))


def caption_id(label: Label, text: str) -> str:
    """The name of a caption in a page and in decisions.

    Example:
        >>> from unimed_jax.data.label_captions import Triplet
        >>> film = Label(triplet=Triplet(modality="X-ray", anatomy="chest", finding="pneumonia"))
        >>> caption_id(film, "A film with pneumonia.")
        'cf2f109a3453a76f3'
    """
    parts = json.dumps([*label.triplet.key, text])
    return "c" + hashlib.sha256(parts.encode(errors="backslashreplace")).hexdigest()[:16]


def digest(found: LabelCaptions) -> str:
    """SHA-256 of all labels and texts: what decisions belong to."""
    parts = [[*x.triplet.key, c["text"]] for x in found.labels for c in x.captions]
    return hashlib.sha256(json.dumps(parts).encode(errors="backslashreplace")).hexdigest()


def page(found: LabelCaptions) -> str:
    """The page: self-contained, loads nothing, sends nothing; texts are shown as text."""
    sections = []
    for label in found.labels:
        missing = f" <small>{label.more['missing']} missing</small>" if label.more.get("missing") else ""
        rows = "".join(
            f'<li id="{caption_id(label, c["text"])}"><q>{html.escape(c["text"])}</q>'
            f"<small>{html.escape(c['kind'])}</small>"
            '<button value="accept">accept</button><button value="strike">strike</button></li>'
            for c in label.captions
        )
        names = f" <small>{html.escape('; '.join(label.triplet.synonyms))}</small>"
        sections.append(f"<h2>{html.escape(label.triplet.name)}{names}{missing}</h2><ol>{rows}</ol>")
    made = html.escape(
        ", ".join(f"{k}: {v}" for k, v in found.generator.items() if isinstance(v, (str, int)))
    )
    allowed = "; ".join(
        f"{what}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for what, text in (("script", _SCRIPT), ("style", _STYLE))
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Captions</title>'
        '<meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; {allowed}">'
        f'<style>{_STYLE}</style><body data-sha256="{digest(found)}"><h1>Captions</h1>'
        f"<p><small>{made}</small></p><p>Accept what is true for every picture with the label, strike the rest, "
        "and save. Undecided captions stay, unless <code>captions apply --accepted-only</code>.</p>"
        f"{''.join(sections)}"
        '<div id="bar"><span id="count"></span> <button id="rest">accept all undecided</button> '
        '<button id="save">save decisions.json</button></div>'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def read_decisions(path: Path, found: LabelCaptions) -> dict[str, str]:
    """The decisions that a page saved, by caption.

    Raises:
        DataError: for a file that cannot be read, is none, or belongs to other captions.
    """
    values = files.read_json(path, "save the page's decisions again", most=limits.MAX_RECORD_BYTES)
    decisions = values.get("decisions") if isinstance(values, dict) else None
    if not isinstance(decisions, dict) or (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        raise DataError(f"{path} holds no decisions about captions", "the review page saves them")
    if values.get("captions_sha256") != digest(found):
        raise DataError(f"{path} belongs to other captions", "review this file")
    known = {caption_id(x, c["text"]) for x in found.labels for c in x.captions}
    for name, decision in decisions.items():
        if name not in known or decision not in DECISIONS:
            raise DataError(f"{path}: {name[:40]!r} is no caption, or its decision is none of accept, strike")
    return decisions


def apply(
    found: LabelCaptions, decisions: Mapping[str, str], *, accepted_only: bool = False
) -> LabelCaptions:
    """The captions that stay: all but the struck ones, or only the accepted ones.

    Args:
        found: the captions.
        decisions: from `read_decisions`.
        accepted_only: whether undecided captions go, too.
    """
    stays = lambda d: d == "accept" if accepted_only else d != "strike"
    labels, counts = [], {"accepted": 0, "struck": 0, "undecided": 0}
    for label in found.labels:
        kept: list[dict[str, Any]] = []
        for caption in label.captions:
            decision = decisions.get(caption_id(label, caption["text"]), "")
            counts[{"accept": "accepted", "strike": "struck"}.get(decision, "undecided")] += 1
            if stays(decision):
                kept.append(caption)
        labels.append(Label(triplet=label.triplet, captions=kept, more=label.more))
    reviewed = counts | {"captions_sha256": digest(found), "accepted_only": accepted_only}
    return LabelCaptions(labels=labels, generator=found.generator | {"review": reviewed})


def write_page(path: Path, found: LabelCaptions) -> None:
    """Writes the page.

    Raises:
        DataError: when it cannot be written.
    """
    with files.swapped(path) as beside:
        beside.write_text(page(found), encoding="utf-8", errors="replace")
