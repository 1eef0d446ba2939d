"""The directory of a zip archive, read strictly: every record lies where it says, and nowhere else.

Layout: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (sections 4.3 and 4.5.3). Only what is needed to
map stored records in place; nothing is ever inflated or extracted.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, replace
from typing import NoReturn

from unimed_jax.convert.mapped import FileMap, shown
from unimed_jax.errors import DataError

MAX_RECORDS = 100_000
MAX_DIRECTORY = 32 * 2**20  # bytes
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_ENCRYPTED = 1 | 1 << 6 | 1 << 13  # traditional, strong, masked headers
_DESCRIPTOR, _UTF8 = 1 << 3, 1 << 11
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


@dataclass(slots=True, frozen=True, kw_only=True)
class Record:
    """One member: where its bytes lie and how they are stored."""

    name: str
    header: int  # where its local header begins
    start: int  # where its bytes begin; 0 until the local header was read
    size: int  # bytes as stored in the file
    full_size: int  # bytes when unpacked
    method: int  # 0 = stored
    crc: int


def read(file: FileMap) -> dict[str, Record]:
    """Every record by name, checked against its own header and against its neighbours.

    Raises:
        DataError: for anything but a complete, unencrypted archive in one part without equal names or overlaps.
    """
    start, size, count = _find_directory(file)
    records = _read_central(file, start, size, count)
    with file.path.open("rb", buffering=0) as f:  # reads touch less of a large file than the map would
        records = [_with_place(file, f, r) for r in records]
    end = 0
    for r in sorted(records, key=lambda r: r.header):
        if r.header < end:
            _refuse(file, f"record {shown(r.name)} overlaps another")
        end = r.start + r.size
        if end > start:
            _refuse(file, f"record {shown(r.name)} runs past the end of the data")
    found = {r.name: r for r in records}
    if len(found) < len(records):
        twice = next(name for name, n in Counter(r.name for r in records).items() if n > 1)
        _refuse(file, f"it holds {shown(twice)} twice")
    return found


def _refuse(file: FileMap, why: str) -> NoReturn:
    raise DataError(f"{file.path} is no sound zip archive: {why}", "download or save it again")


def _find_directory(file: FileMap) -> tuple[int, int, int]:
    """Start, size and number of records of the central directory."""
    tail_at = max(0, file.size - _END.size - _FULL16)
    tail = file.bytes(tail_at, _END.size + _FULL16)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        _refuse(file, "its directory is missing, the file is cut short")
    _, disk, first_disk, here, count, size, start, comment = _END.unpack_from(tail, at)
    end = tail_at + at
    if end + _END.size + comment != file.size:
        _refuse(file, "bytes follow its end")
    if disk or first_disk or here != count:
        _refuse(file, "it has several parts")
    locator = file.bytes(end - _LOCATOR.size, _LOCATOR.size) if end >= _LOCATOR.size else b""
    if locator.startswith(b"PK\6\7"):
        place = (start, size, count)
        end, (start, size, count) = _read_end64(file, locator, end)
        for short, full, most in zip(place, (start, size, count), (_FULL32, _FULL32, _FULL16), strict=True):
            if short not in (most, full):
                _refuse(file, "its two directory ends disagree")
    if start + size != end:
        _refuse(file, f"its directory of {size} bytes at {start} does not end where it should, at {end}")
    if count > MAX_RECORDS:
        _refuse(file, f"{count} records are over the limit of {MAX_RECORDS}")
    if size > MAX_DIRECTORY:
        _refuse(file, f"a directory of {size} bytes is over the limit of {MAX_DIRECTORY}")
    if count * _CENTRAL.size > size:
        _refuse(file, f"{count} records do not fit into a directory of {size} bytes")
    return start, size, count


def _read_end64(file: FileMap, locator: bytes, end: int) -> tuple[int, tuple[int, int, int]]:
    _, disk, at, parts = _LOCATOR.unpack(locator)
    raw = file.bytes(at, _END64.size) if at < file.size else b""
    if len(raw) < _END64.size or not raw.startswith(b"PK\6\6") or disk or parts > 1:
        _refuse(file, "its 64-bit directory end is not where it should be")
    _, length, _, _, disk, first_disk, here, count, size, start = _END64.unpack(raw)
    if at + 12 + length + _LOCATOR.size != end or disk or first_disk or here != count:
        _refuse(file, "its 64-bit directory end is damaged")
    return at, (start, size, count)


def _read_central(file: FileMap, start: int, size: int, count: int) -> list[Record]:
    raw, at, records = file.bytes(start, size), 0, []
    for _ in range(count):
        if size - at < _CENTRAL.size:
            _refuse(file, "its directory is cut short")
        head = _CENTRAL.unpack_from(raw, at)
        _, _, _, flags, method, _, _, crc, packed, full, n_name, n_extra, n_comment, disk, _, _, header = head
        at += _CENTRAL.size
        if head[0] != b"PK\1\2" or size - at < n_name + n_extra + n_comment or not n_name:
            _refuse(file, "its directory is damaged")
        name = _decode(file, raw[at : at + n_name], flags)
        extra = raw[at + n_name : at + n_name + n_extra]
        at += n_name + n_extra + n_comment
        if flags & _ENCRYPTED:
            _refuse(file, f"record {shown(name)} is encrypted")
        if disk:
            _refuse(file, "it has several parts")
        full, packed, header = _widen(file, name, extra, (full, packed, header))
        if method == 0 and packed != full:
            _refuse(file, f"record {shown(name)} is stored in {packed} bytes but should have {full}")
        records.append(
            Record(name=name, header=header, start=0, size=packed, full_size=full, method=method, crc=crc)
        )
    if at != size:
        _refuse(file, "bytes follow the last record of its directory")
    return records


def _decode(file: FileMap, raw: bytes, flags: int) -> str:
    try:
        name = raw.decode("utf-8" if flags & _UTF8 else "ascii")
    except UnicodeDecodeError:
        _refuse(file, f"a record's name cannot be read: {shown(raw)}")
    if "\0" in name or "\\" in name or name.startswith("/") or ".." in name.split("/"):
        _refuse(file, f"record {shown(name)} has no plain name")
    return name


def _widen(file: FileMap, name: str, extra: bytes, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes and place with their 64-bit values where the short fields are full."""
    blocks: dict[int, bytes] = {}
    at = 0
    while len(extra) - at >= 4:
        kind, n = struct.unpack_from("<2H", extra, at)
        if kind in blocks and kind == 1:
            _refuse(file, f"record {shown(name)} has two 64-bit sizes")
        blocks[kind] = extra[at + 4 : at + 4 + n]
        at += 4 + n
    wide = blocks.get(1, b"")
    wanted = sum(v == _FULL32 for v in sizes)
    if len(wide) < 8 * wanted:
        _refuse(file, f"record {shown(name)} lacks its 64-bit size")
    values = iter(struct.unpack_from(f"<{wanted}Q", wide))
    return tuple(next(values) if v == _FULL32 else v for v in sizes)


def _with_place(file: FileMap, f, r: Record) -> Record:
    """The record with the place of its bytes, after its local header was found to agree."""
    name = r.name.encode("utf-8")
    if r.header + _LOCAL.size + len(name) > file.size:
        _refuse(file, f"record {shown(r.name)} begins outside the file")
    f.seek(r.header)
    raw = f.read(_LOCAL.size + len(name))
    if len(raw) < _LOCAL.size + len(name):
        _refuse(file, f"record {shown(r.name)} is cut short")
    sign, _, flags, method, _, _, crc, packed, full, n_name, n_extra = _LOCAL.unpack_from(raw)
    if sign != b"PK\3\4" or n_name != len(name) or raw[_LOCAL.size :] != name or method != r.method:
        _refuse(file, f"record {shown(r.name)} is not where its directory says")
    if flags & _ENCRYPTED:
        _refuse(file, f"record {shown(r.name)} is encrypted")
    known = {_FULL32, 0} if flags & _DESCRIPTOR else {_FULL32}  # else written after the bytes, or in 64 bits
    if (packed != r.size and packed not in known) or (full != r.full_size and full not in known):
        _refuse(file, f"record {shown(r.name)} has two sizes, {packed} and {r.size} bytes")
    if crc != r.crc and not (crc == 0 and flags & _DESCRIPTOR):
        _refuse(file, f"record {shown(r.name)} has two checksums")
    return replace(r, start=r.header + _LOCAL.size + len(name) + n_extra)
