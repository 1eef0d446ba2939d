"""A web page on this machine: a picture in, scores and a saliency map out (extra `demo`).

The page is served on the loopback address only. It loads nothing from elsewhere and reports nothing to anyone; what is
uploaded lies in one folder, which goes when the page ends.
"""

from __future__ import annotations

import html
import importlib.util
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unimed_jax import __version__, saliency
from unimed_jax.data import images, limits, medical, windows
from unimed_jax.errors import DataError, UnimedError, UsageError
from unimed_jax.evaluate import calibration, multilabel, results, tasks
from unimed_jax.evaluate import question as questions
from unimed_jax.evaluate.multilabel import Findings
from unimed_jax.infer import Loaded

HOST = "127.0.0.1"
PIP = 'pip install "unimed-jax[demo]"'
OWN = "my labels"  # the choice of classes that is no built-in task
_SHOWN = 512  # pixels of the longer side
_MAX_LABELS = 100
_KINDS = {"dicom": "DICOM", "nifti": "NIfTI", "image": "image", "slide": "slide"}
_RULES = {"option": "window as chosen", "file": "window of the file", "percentile": "percentile window"}
_METHODS = {
    "attention": "attention, for the class",
    "gradient": "gradient, for the class",
    "smoothgrad": "gradient, smoothed",
    "rollout": "attention, for any class",
    "": "none",
}
# What a browser may load on the page, whatever a library puts into it.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'"
)
_CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.uj-line { padding: 8px 12px; border-radius: 8px; border: 1px solid var(--border-color-primary);
  overflow-wrap: anywhere; }
.uj-line.bad { border-color: #b3403a; color: #b3403a; }
.dark .uj-line.bad { border-color: #f0857d; color: #f0857d; }
.uj-soft { opacity: 0.8; font-size: 13px; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the page shows of one picture."""

    scores: dict[str, float]  # class -> share, or finding -> probability, in their order
    line: str  # what the picture is, which findings it has, and whether its scores are calibrated
    picture: UInt8[np.ndarray, "h w 3"]
    overlay: UInt8[np.ndarray, "h w 3"] | None


class Desk:
    """Answers for one model; text embeddings are kept for the question that was asked last.

    Args:
        model: the model.
        calibrated: its calibration; questions that it does not know are answered with plain scores.
    """

    def __init__(self, model: Loaded, calibrated: calibration.Calibration | None = None):
        self.model, self.calibrated = model, calibrated
        self._last: tuple[str, questions.Question, str] | None = None

    def answer(
        self, path: str | Path, task: tasks.Task | Findings, *, window: str = "", method: str = "attention"
    ) -> Answer:
        """Scores the middle picture of a file.

        Args:
            path: DICOM, NIfTI or an image.
            task: classes, or findings that do not exclude each other, with their prompts.
            window: see `windows.parse_window`.
            method: a key of `saliency.METHODS`, or nothing.

        Raises:
            DataError: for a file that holds no picture; the message names no file.
            UsageError: for an unknown window or method.
        """
        path = Path(path)
        try:
            found = medical.read(path, window=windows.parse_window(window))[0]
            square, picture = found.square(self.model.image_size), _shown(found)
        except DataError as e:
            raise DataError(e.cause.replace(path.name, "this file"), e.remedy) from None
        asked, how = self._asked(task)
        z = self.model.encode_image(square[None])
        p = asked.scores(z).p[0]
        over = None
        if method:
            heat = saliency.maps(self.model, square[None], asked.toward(z), method)[0]
            over = saliency.overlay(picture, *saliency.place(heat, *picture.shape[:2]))
        scores = dict(zip(asked.names, p.tolist(), strict=True))
        words = [_described(found), *([_present(asked.found(p))] if isinstance(task, Findings) else []), how]
        return Answer(scores=scores, line=" ".join(f"{w}." for w in words), picture=picture, overlay=over)

    def _asked(self, task: tasks.Task | Findings) -> tuple[questions.Question, str]:
        """The question with its calibration, if there is one, and in words whether there is."""
        if self._last is None or self._last[0] != task.digest:
            how = "Scores are not calibrated probabilities"
            try:
                asked = questions.ask(self.model, task, self.calibrated)
            except UsageError:
                if self.calibrated is None:
                    raise
                asked = questions.ask(self.model, task)
                how = "Scores are not calibrated: the calibration file does not know this question"
            self._last = (
                task.digest,
                asked,
                f"Scores are calibrated: {asked.fit.text()}" if asked.fit else how,
            )
        return self._last[1:]


def _present(found: Sequence[str]) -> str:
    return f"Found: {', '.join(found)}" if found else "No finding reaches its threshold"


def _shown(found: medical.Picture) -> UInt8[np.ndarray, "h w 3"]:
    """The whole picture, at the size of the page."""
    pixels = images.decode(found.data, where=found.where) if isinstance(found.data, bytes) else found.data
    image = Image.fromarray(pixels).convert("RGB")
    factor = _SHOWN / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def _described(p: medical.Picture) -> str:
    """What the header may tell: no value of it but the modality's two letters."""
    words = [f"{_KINDS[p.kind]} {p.modality}".strip()]
    words += [f"slice {p.frame + 1} of {p.frames}"] if p.frames > 1 else []
    words += [_RULES[p.window]] if p.window in _RULES else []
    words += ["inverted"] if p.inverted else []
    text = ", ".join(words)
    return text[:1].upper() + text[1:]


def question(classes: str, labels: str, modality: str, several: bool = False) -> tasks.Task | Findings:
    """The task that the page's fields ask for.

    Args:
        classes: `OWN`, or a built-in task.
        labels: class names, one a line or separated by commas.
        modality: named in the sentences that are made of them.
        several: whether they are findings that do not exclude each other.

    Raises:
        UsageError: for fewer than two labels, repeated ones, or too many.

    Example:
        >>> list(question(OWN, "pneumonia, no finding", "").classes)
        ['pneumonia', 'no finding']
        >>> question(OWN, "edema", "xray", several=True).findings["edema"].negative[0]
        'a chest or skeletal X-ray image without edema'
    """
    if classes != OWN:
        return multilabel.either(classes)
    words = [w.strip() for line in labels.splitlines() for w in line.split(",")]
    words = [w for w in words if w]
    if len(words) > _MAX_LABELS:
        raise UsageError(f"{len(words)} labels are too many", f"at most {_MAX_LABELS}")
    return (multilabel.from_labels if several else tasks.from_labels)(words, modality=modality)


def build(
    desk: Desk, *, labels: Sequence[str] = ("normal", "abnormal"), task: str = "", several: bool = False
) -> Any:
    """The page, as gradio.Blocks.

    Args:
        desk: what answers.
        labels: class names that stand on the page at first.
        task: a built-in task that is chosen at first.
        several: whether the labels do not exclude each other.

    Raises:
        DataError: without gradio.
        UsageError: for an unknown task.
    """
    gr = _gradio()
    first = multilabel.either(task).name if task else OWN
    # Of findings none is the answer: the line below says which are there.
    one = lambda classes, several: not (several if classes == OWN else classes in multilabel.names())
    fields = lambda classes, several: [
        *[gr.update(visible=classes == OWN)] * 3,
        gr.update(show_heading=one(classes, several), value=None),
    ]

    def score(
        path: str | None, classes: str, words: str, several: bool, modality: str, window: str, method: str
    ) -> list[Any]:
        try:
            if not path:
                raise UsageError("there is no picture yet", "choose a file")
            task = question(classes, words, modality, several)
            found = desk.answer(path, task, window=window, method=method)
        except UnimedError as e:
            return [None, None, None, _line(e.line(), bad=True)]
        except Exception as e:  # its text may quote the file
            return [None, None, None, _line(f"the file could not be read ({type(e).__name__})", bad=True)]
        return [found.scores, found.picture, found.overlay, _line(found.line)]

    with gr.Blocks(title="unimed_jax", analytics_enabled=False) as page:
        gr.HTML(
            f"<h2>unimed_jax</h2><p>{html.escape(', '.join(re.split('  +', desk.model.describe())))}</p>"
            f"<p class='uj-soft'>{html.escape(results.USE)} {html.escape(saliency.NOTE)} "
            "Text burned into pictures is shown. Everything stays on this machine; uploads are deleted when "
            "the page ends.</p>"
        )
        with gr.Row():
            with gr.Column(min_width=300):
                file = gr.File(label="Picture, DICOM or NIfTI file", type="filepath", height=160)
                classes = gr.Dropdown(
                    [OWN, *tasks.names(), *multilabel.names()], value=first, label="Classes"
                )
                words = gr.Textbox(
                    "\n".join(labels), label="Labels, one a line", lines=3, visible=first == OWN
                )
                checked = gr.Checkbox(
                    several, label="Findings that do not exclude each other", visible=first == OWN
                )
                modality = gr.Dropdown(
                    [("not named", ""), *((m, m) for m in _modalities())],
                    value="",
                    label="Modality in the sentences",
                    visible=first == OWN,
                )
                window = gr.Dropdown(
                    [("the file's own", ""), *((w, w) for w in windows.WINDOWS)], value="", label="Window"
                )
                method = gr.Dropdown(
                    [(v, k) for k, v in _METHODS.items()], value="attention", label="Saliency"
                )
                button = gr.Button("Score", variant="primary")
            with gr.Column(min_width=300, scale=2):
                line = gr.HTML()
                scores = gr.Label(label="Scores", num_top_classes=10, show_heading=one(first, several))
                plain: dict[str, Any] = {
                    "format": "png",
                    "interactive": False,
                    "show_label": False,
                    "buttons": [],
                }
                with gr.Row():
                    with gr.Column(min_width=240):
                        gr.HTML("<p class='uj-soft'>Picture</p>")
                        picture = gr.Image(label="Picture", **plain)
                    with gr.Column(min_width=240):
                        gr.HTML("<p class='uj-soft'>Saliency of the first class or finding</p>")
                        overlay = gr.Image(label="Saliency", **plain)
        for changed in (classes, checked):
            changed.change(
                fields, [classes, checked], [words, checked, modality, scores], api_visibility="private"
            )
        button.click(
            score,
            [file, classes, words, checked, modality, window, method],
            [scores, picture, overlay, line],
            api_name="score",
        )
    return page


def _line(text: str, *, bad: bool = False) -> str:
    return f"<div class='uj-line{' bad' if bad else ''}'>{html.escape(text)}</div>"


def _modalities() -> Sequence[str]:
    from unimed_jax.config import MODALITIES

    return MODALITIES


def require() -> None:
    """Refuses early when the extra is not installed.

    Raises:
        DataError: with the pip line.
    """
    if importlib.util.find_spec("gradio") is None:
        raise DataError("the demo needs gradio, which is not installed", PIP)


def _gradio() -> Any:
    """The library, told not to call home before it can."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    require()
    import gradio  # pyright: ignore[reportMissingImports]

    return gradio


class _Sealed:
    """ASGI middleware: every answer tells the browser to load nothing from elsewhere and to keep nothing."""

    def __init__(self, app: Callable[..., Any]):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sealed(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        await self.app(scope, receive, sealed)


def serve(make: Callable[[], Any], *, port: int, ready: Callable[[str], None]) -> None:
    """Serves a page until the process is interrupted or terminated; then every upload is deleted.

    Args:
        make: builds the page, see `build`; called when the folder of the uploads is set.
        port: 0 for any free one.
        ready: called with the address.

    Raises:
        DataError: without gradio.
        UsageError: when the port is taken.
    """
    folder = tempfile.mkdtemp(prefix="unimed-jax-demo-")  # readable for this user only
    os.environ["GRADIO_TEMP_DIR"] = folder  # before the import of gradio
    os.environ["NO_PROXY"] = f"{os.environ.get('NO_PROXY', '')},{HOST},localhost".lstrip(",")
    page = None
    handled = {s: signal.signal(s, _end) for s in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))}
    try:
        page = make()
        ready(_launch(page, _free(port)))
        threading.Event().wait()
    except (KeyboardInterrupt, _Ended):
        pass
    finally:
        if page is not None:
            page.close(verbose=False)
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("GRADIO_TEMP_DIR")
        for s, old in handled.items():
            signal.signal(s, old)


class _Ended(BaseException):
    """The process was asked to end."""


def _end(number: int, frame: Any) -> None:
    raise _Ended


def _free(port: int) -> int:
    """The port, when nothing else listens on it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as e:
            raise UsageError(f"port {port} cannot be used: {e.strerror}", "choose another --port") from e
        return probe.getsockname()[1]


def _launch(page: Any, port: int) -> str:
    """Everything that could leave the machine is said to be off, whatever the environment says."""
    from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]
    from starlette.middleware.trustedhost import (  # pyright: ignore[reportMissingImports]
        TrustedHostMiddleware,
    )

    gr = _gradio()
    plain = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # the default is fetched
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        inbrowser=False,
        pwa=False,
        mcp_server=False,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=limits.MAX_FILE_BYTES,
        theme=gr.themes.Default(
            primary_hue="blue", font=plain, font_mono=["ui-monospace", "Consolas", "monospace"]
        ),
        css=_CSS,
        app_kwargs={
            "title": f"unimed_jax {__version__}",
            "middleware": [
                # A page elsewhere cannot reach this one under a name of its own.
                Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
                Middleware(_Sealed),
            ],
        },
    )
    return f"http://{HOST}:{port}/"
