"""DICOM files to pictures, and nothing else of them (extra `medical`).

Gray pixels pass through one order of operations: rescale (slope and intercept, or the modality table), window (the
caller's, else the first in the file, else its VOI table, else the 0.5 to 99.5 percentile), then inversion of
MONOCHROME1. Only pixels leave a header: no name, id, date, UID or free text reaches a picture, a message or a log.
Text burned into the pixels is not removed.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image

from unimed_jax.data import images, limits, windows
from unimed_jax.errors import DataError

PIP = 'pip install "unimed-jax[medical]"'
# Values of (0008,0060) that may be repeated in summaries; anything else could be free text.
_MODALITIES = frozenset(
    [
        "BI",
        "CR",
        "CT",
        "DX",
        "ES",
        "GM",
        "IO",
        "MG",
        "MR",
        "NM",
        "OCT",
        "OP",
        "OPT",
        "OT",
        "PT",
        "PX",
        "RF",
        "SC",
        "SM",
        "US",
        "XA",
        "XC",
    ]
)
_NO_PICTURE = {  # modality: what such a file holds instead
    **dict.fromkeys(("SEG", "LABELMAP"), "a segmentation"),
    "RTDOSE": "a dose grid",
    "RTSTRUCT": "contours",
    "RTPLAN": "a treatment plan",
    "SR": "a structured report",
    "PR": "a presentation state",
    "KO": "an object selection",
    "REG": "a registration",
    "DOC": "a document",
    "ECG": "a waveform",
    "AU": "audio",
    "HD": "a waveform",
}
_BYTES_A_SAMPLE = 24  # while a frame is decoded and shown; numpy's share is at most 16, of a palette 46
_DICOMDIR = "1.2.840.10008.1.3.10"
_DEFLATED = "1.2.840.10008.1.2.1.99"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture of a file, ready for `images.eval_image`."""

    data: bytes | UInt8[np.ndarray, "..."]  # an ordinary image file as it is, else u8[h w] or u8[h w 3]
    kind: str  # dicom | nifti | image | slide
    frame: int = 0
    frames: int = 1
    modality: str = ""  # DICOM's two letters, when they are one of the known
    window: str = ""  # which rule made the gray values
    inverted: bool = False  # MONOCHROME1
    corner: tuple[int, int] | None = None  # (x, y) of a slide's tile, in pixels of its finest level
    where: str = ""  # what to call it in an error

    def facts(self) -> Picture:
        """Itself without the pixels."""
        return replace(self, data=b"")

    def square(self, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """The evaluation picture of `images.eval_image`.

        Raises:
            DataError: for an ordinary image file that is damaged; DICOM and NIfTI are refused earlier.
        """
        data = self.data if isinstance(self.data, bytes) else Image.fromarray(self.data)
        return images.eval_image(data, size, where=self.where)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A picture that is found, but not decoded yet."""

    file: Path
    cost: int  # bytes of memory that decoding it takes, roughly and at most
    read: Callable[[], Picture]  # raises DataError


Hold = Callable[[int], AbstractContextManager[Any]]  # waits until so many bytes may be taken


def frames(
    path: Path,
    window: tuple[float, float] | None,
    pick: Callable[[int], range],
    hold: Hold = nullcontext,
) -> list[Frame]:
    """Finds the frames of one file that `pick` chooses from their number; only the header is read.

    Args:
        path: the file.
        window: (centre, width) instead of the file's own.
        pick: frame numbers from the number of frames.
        hold: entered while a deflated file, which is inflated whole, is in memory.

    Raises:
        DataError: for a file without a readable header, without a picture, or too large; `Frame.read` for a coding
            that nothing here decodes. The message holds the file's name and the coding, never a header value.
    """
    pydicom = need("pydicom")
    with no_identifiers():
        try:
            with path.open("rb") as f:
                inflated = inflated_bytes(f, path.name, pydicom)
            with hold(inflated):
                ds = _header_of(path, pydicom)
                count = _refuse_unpictured(path.name, ds)
                cost = _cost(ds) + inflated
                kept = None if inflated else ds
                del ds
        except DataError:
            raise
        except Exception as e:  # an open set of exceptions, whose texts may quote the header
            raise DataError(f"{path.name}: no readable DICOM header ({type(e).__name__})") from None
    chosen = pick(count)
    if len(chosen) > limits.MAX_FRAMES:
        raise DataError(f"{path.name}: {len(chosen)} frames are too many", "--slices every:N")

    def read(k: int) -> Picture:
        with no_identifiers():
            ds = kept or _header_of(path, pydicom)
            try:
                return _frame(path, ds, k, count, window, pydicom)
            except Exception as e:
                raise _cannot_decode(path.name, ds, e, pydicom) from None

    return [Frame(file=path, cost=cost, read=functools.partial(read, k)) for k in chosen]


def _header_of(path: Path, pydicom: Any) -> Any:
    """The data set; large values, so the pixels, stay on the disk until they are asked for."""
    return pydicom.dcmread(path, defer_size=65536, force=True)


def _cost(ds: Any) -> int:
    """Gray is computed in float64, with a copy for its percentiles; a palette makes three colours of each pixel."""
    samples = int(ds.get("SamplesPerPixel", 1) or 1)
    if ds.get("PhotometricInterpretation") == "PALETTE COLOR":
        samples = 2
    return int(ds.Rows) * int(ds.Columns) * samples * _BYTES_A_SAMPLE


def _frame(path: Path, ds: Any, k: int, frames: int, window, pydicom) -> Picture:
    pixels = _pixels(path, ds, k, frames, pydicom)
    modality = str(ds.get("Modality", ""))
    common: dict[str, Any] = {
        "kind": "dicom",
        "where": path.name,
        "frame": k,
        "frames": frames,
        "modality": modality if modality in _MODALITIES else "",
    }
    photometric = str(ds.get("PhotometricInterpretation", ""))
    if photometric == "PALETTE COLOR":
        colour = pydicom.pixels.processing.apply_color_lut(pixels, ds)
        return Picture(
            data=windows.upper_bits(colour, 16 if colour.max(initial=0) > 255 else 8),
            window="palette",
            **common,
        )
    if pixels.ndim == 3:
        return Picture(data=windows.upper_bits(pixels, int(ds.BitsStored)), window="colour", **common)
    gray, rule = _gray(pixels, ds, k, window, pydicom)
    inverted = photometric == "MONOCHROME1"
    return Picture(data=255 - gray if inverted else gray, window=rule, inverted=inverted, **common)


def _pixels(path: Path, ds: Any, k: int, frames: int, pydicom) -> Num[np.ndarray, "..."]:
    """Decodes one frame; YBR becomes RGB. Of several frames only the one is read, unless the file is deflated."""
    whole = frames == 1 or ds.file_meta.get("TransferSyntaxUID") == _DEFLATED
    pixels = np.asarray(pydicom.pixels.pixel_array(ds if whole else path, index=k))
    return pixels[k] if pixels.ndim == 4 else pixels


def _gray(
    pixels: Num[np.ndarray, "h w"], ds: Any, k: int, window, pydicom
) -> tuple[UInt8[np.ndarray, "h w"], str]:
    """Rescale, then the first rule that applies."""
    padding = ds.get("PixelPaddingValue")
    valid = pixels != padding if padding is not None else np.ones(pixels.shape, bool)
    if "ModalityLUTSequence" in ds:
        values = np.asarray(pydicom.pixels.processing.apply_modality_lut(pixels, ds), np.float64)
    else:
        slope = _header(ds, k, "PixelValueTransformationSequence", "RescaleSlope")
        intercept = _header(ds, k, "PixelValueTransformationSequence", "RescaleIntercept")
        slope = 1.0 if slope is None else float(slope)
        values = pixels * slope
        values += 0.0 if intercept is None else float(intercept)  # in place: a frame may take 256 MB
    if not np.isfinite(values).all():
        raise ValueError("values are not finite")
    if window is not None:
        return windows.apply(values, *window), "option"
    centre = _first(_header(ds, k, "FrameVOILUTSequence", "WindowCenter"))
    width = _first(_header(ds, k, "FrameVOILUTSequence", "WindowWidth"))
    if centre is not None and width is not None and width > 0:
        function = str(_header(ds, k, "FrameVOILUTSequence", "VOILUTFunction") or "LINEAR")
        return windows.apply(values, centre, width, function), "file"
    if "VOILUTSequence" in ds:
        table = pydicom.pixels.processing.apply_voi(values.astype(np.int64), ds)
        return windows.upper_bits(table, int(ds.VOILUTSequence[0].LUTDescriptor[2])), "table"
    if ds.BitsStored == 8 and ds.PixelRepresentation == 0 and "RescaleSlope" not in ds:
        return pixels.astype(np.uint8), "as stored"
    return windows.stretch(values, valid), "percentile"


def _header(ds: Any, k: int, sequence: str, keyword: str) -> Any:
    """A header value: of this frame, else shared by the frames, else of the file."""
    for name, index in (("PerFrameFunctionalGroupsSequence", k), ("SharedFunctionalGroupsSequence", 0)):
        groups = ds.get(name) or ()
        if index < len(groups) and groups[index].get(sequence) and keyword in groups[index][sequence][0]:
            return groups[index][sequence][0].get(keyword)
    return ds.get(keyword)


def _first(value: Any) -> float | None:
    """The first of several values as a number."""
    if value is None or isinstance(value, str):
        return float(value) if value else None
    if hasattr(value, "__iter__"):
        return float(value[0]) if len(value) else None
    return float(value)


def _refuse_unpictured(name: str, ds: Any) -> int:
    """Checks what the header promises before any pixel is decoded; returns the number of frames."""
    if ds.get("file_meta", {}).get("MediaStorageSOPClassUID") == _DICOMDIR or "DirectoryRecordSequence" in ds:
        raise DataError(f"{name}: is a DICOM directory, not a picture", "name the image files themselves")
    what = _NO_PICTURE.get(str(ds.get("Modality", "")))
    if what:
        raise DataError(f"{name}: holds {what}, no picture")
    if len(ds) == 0:
        raise DataError(f"{name}: is no DICOM file")
    if "PixelData" not in ds:
        raise DataError(f"{name}: has no pixels")
    rows, columns = int(ds.get("Rows", 0) or 0), int(ds.get("Columns", 0) or 0)
    samples, frames = int(ds.get("SamplesPerPixel", 1) or 1), int(ds.get("NumberOfFrames", 1) or 1)
    if min(rows, columns, frames) < 1 or samples not in (1, 3):
        raise DataError(
            f"{name}: the header describes no picture ({rows} x {columns} x {samples}, {frames} frames)"
        )
    most = limits.MAX_GRAY_PIXELS if samples == 1 else limits.MAX_IMAGE_PIXELS
    if rows * columns > most:
        raise DataError(f"{name}: {rows} x {columns} pixels are too many", f"at most {most}")
    return frames


def inflated_bytes(file: BinaryIO, name: str, pydicom: Any) -> int:
    """What a deflated file, which may hold a thousand times its size and is inflated whole, takes; else 0.

    Raises:
        DataError: beyond the limit, found by inflating it in small pieces.
    """
    reader = pydicom.filereader
    file.seek(132 if file.read(132)[128:] == b"DICM" else 0)
    # The very steps after which pydicom inflates what is left: the length in the header may say otherwise.
    meta = reader._read_file_meta_info(file)
    if meta.get("TransferSyntaxUID") != _DEFLATED:
        return 0
    reader._read_command_set_elements(file)
    inflate, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    for chunk in iter(lambda: file.read(1 << 16), b""):
        while chunk:
            total += len(inflate.decompress(chunk, 1 << 22))
            chunk = inflate.unconsumed_tail
            if total > limits.MAX_FILE_BYTES:
                raise DataError(f"{name}: inflates to more than {limits.MAX_FILE_BYTES} bytes")
    return total


def _cannot_decode(name: str, ds: Any, e: Exception, pydicom: Any) -> DataError:
    """Says which coding it was and what would read it, never what the exception said."""
    uid = ds.file_meta.get("TransferSyntaxUID") if hasattr(ds, "file_meta") else None
    known = uid in pydicom.uid.UID_dictionary
    coding = f"transfer syntax {uid.name}" if uid and known else "an unknown transfer syntax"
    remedy = "the file is damaged, or no decoder reads it; convert it with another program"
    if uid and known and uid.is_transfer_syntax and uid.is_compressed:
        try:
            available = pydicom.pixels.get_decoder(uid).is_available
        except NotImplementedError:
            available = True
        remedy = remedy if available else PIP
    return DataError(f"{name}: cannot decode the pixels ({coding}, {type(e).__name__})", remedy)


def need(name: str) -> Any:
    """Imports a package of the extra `medical`, or says how to get it.

    Raises:
        DataError: with the pip line.
    """
    try:
        module = importlib.import_module(name)
        if name == "pydicom":
            importlib.import_module("pydicom.pixels.processing")
    except ImportError:
        raise DataError(f"reading this file needs {name}, which is not installed", PIP) from None
    return module


_reading = threading.local()


class _TagsOnly(logging.Filter):
    """Rewrites pydicom's messages, which quote the values they complain about, to bare tag numbers."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Passes the record on, without header values, while this thread reads a file."""
        if getattr(_reading, "on", False):
            tags = re.findall(r"\([0-9a-fA-F]{4},\s?[0-9a-fA-F]{4}\)", record.getMessage())
            record.msg = f"DICOM header: unusual value in {', '.join(tags) or 'an element'}"
            record.args, record.exc_info, record.exc_text = (), None, None
            return record.levelno > logging.DEBUG
        return True


_TAGS_ONLY = _TagsOnly()


@contextmanager
def no_identifiers() -> Iterator[None]:
    """Pydicom warns and logs with the offending value, a name or an id: nothing of that leaves this block."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"pydicom(\.|$)")
    logger = logging.getLogger("pydicom")
    if _TAGS_ONLY not in logger.filters:
        logger.addFilter(_TAGS_ONLY)
    _silence_gdcm()
    _reading.on = True
    try:
        yield
    finally:
        _reading.on = False


def _silence_gdcm() -> None:
    """Gdcm writes to stderr from C++."""
    try:
        import gdcm  # type: ignore[import-not-found]
    except ImportError:
        return
    for switch in (gdcm.Trace.DebugOff, gdcm.Trace.WarningOff, gdcm.Trace.ErrorOff):
        switch()
