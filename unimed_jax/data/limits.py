"""Limits on everything that is read from outside, in one table; larger input is refused before it is decoded.

Medical pictures are large but not unbounded: 64 million pixels hold an 8000 x 8000 mosaic. A decompression bomb
of a few kilobytes would otherwise take gigabytes.
"""

from __future__ import annotations

MAX_IMAGE_PIXELS = 64_000_000  # pixels of one picture, as stored and as resized
MAX_FILE_BYTES = 512 * 2**20  # bytes of one source file
MAX_FRAMES = 4096  # frames read from one medical file
MAX_RECORD_BYTES = 64 * 2**20  # bytes of one record
MAX_CAPTIONS = 256  # captions of one record
MAX_CAPTION_CHARS = 20_000  # characters of one caption; the longest radiology reports have a few thousand
MAX_BAD_SHARE = 0.001  # share of a source that an export may reject
