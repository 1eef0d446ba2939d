"""Downloads single files of a package index through pip's own session; run as a child process by `fetch`.

`pip download` would do for wheels, but for a source archive it runs the package's build script to learn its
metadata. Here nothing in an archive is ever run: the file is found by its exact name on the index and saved.
Proxy, certificate, mirror and credential settings are those of the user's pip, because the session is pip's.

Reads a JSON list of {project, filename, sha256, size, out} on stdin; prints one line a file and, last, a reason
when it failed. Exit status: 0 all saved, 3 no index answered, 4 an index answered but the file is not there or is
another one.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import url2pathname

ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.2"
ATTEMPTS = 3
CHUNK = 1 << 18


class _Anchors(HTMLParser):
    """Collects the hrefs of an index page in HTML form."""

    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keeps the href of each anchor."""
        self.hrefs += [value for name, value in attrs if tag == "a" and name == "href" and value]


def links(page: str, base: str, *, is_json: bool) -> dict[str, str]:
    """The files of a project's index page: file name -> URL.

    Example:
        >>> links('<a href="../x/a-1.whl#sha256=00">a</a>', "http://h/simple/a/", is_json=False)
        {'a-1.whl': 'http://h/simple/x/a-1.whl'}
    """
    if is_json:
        found = [f["url"] for f in json.loads(page)["files"]]
    else:
        parser = _Anchors()
        parser.feed(page)
        found = parser.hrefs
    urls = [urljoin(base, href).partition("#")[0] for href in found]
    return {unquote(urlsplit(url).path.rsplit("/", 1)[-1]): url for url in urls}


def _local(url: str) -> Path | None:
    """The path behind a file: URL or a plain path; None for anything on the network."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return None if len(parts.scheme) > 1 else Path(url)


def find(session: Any, options: Any, project: str, filename: str) -> tuple[str | None, list[str]]:
    """Looks a file up in pip's find-links folders and indexes; returns (URL or None, reasons of failures)."""
    name = re.sub(r"[-_.]+", "-", project).lower()
    for place in options.find_links or []:
        folder = _local(place)
        if folder is not None and (folder / filename).is_file():
            return (folder / filename).resolve().as_uri(), []
    failures = []
    indexes = [] if options.no_index else [options.index_url, *(options.extra_index_urls or [])]
    for index in filter(None, indexes):
        page_url = f"{index.rstrip('/')}/{name}/"
        folder = _local(page_url)
        try:
            if folder is not None:
                page, is_json = (folder / "index.html").read_text(), False
            else:
                response = session.get(page_url, headers={"Accept": ACCEPT})
                if response.status_code == 404:
                    continue
                response.raise_for_status()
                page, page_url = response.text, response.url
                is_json = "json" in response.headers.get("Content-Type", "")
            url = links(page, page_url, is_json=is_json).get(filename)
        except FileNotFoundError:
            continue
        except Exception as e:  # pip's session raises its own and its libraries' kinds
            failures.append(f"{index}: {type(e).__name__}: {e}")
            continue
        if url:
            return url, failures
    return None, failures


def save(session: Any, url: str, want: dict[str, Any]) -> str:
    """Streams one file to want["out"]; returns "" or why it is not the wanted one."""
    out = Path(want["out"])
    digest, n, told = hashlib.sha256(), 0, time.monotonic()
    local = _local(url)
    chunks = _read(local) if local else session.get(url, stream=True).iter_content(CHUNK)
    with out.open("wb") as f:
        for chunk in chunks:
            n += len(chunk)
            if n > want["size"]:
                break
            f.write(chunk)
            digest.update(chunk)
            if time.monotonic() - told > 5:
                told = time.monotonic()
                print(f"{want['filename']}: {n / 1e6:.0f} of {want['size'] / 1e6:.0f} MB", flush=True)
    if n != want["size"]:
        return f"{n if n < want['size'] else 'more than ' + str(want['size'])} bytes of {want['size']} came"
    if digest.hexdigest() != want["sha256"]:
        return f"its sha256 is {digest.hexdigest()}, not {want['sha256']}"
    return ""


def _read(path: Path):
    with path.open("rb") as f:
        while chunk := f.read(CHUNK):
            yield chunk


def main() -> int:
    """Serves the requests on stdin; see the module's text."""
    from pip._internal.commands import create_command

    command = create_command("download")
    options, _ = command.parse_args(["unused"])
    with command.main_context():
        session = command.get_default_session(options)  # pyright: ignore[reportAttributeAccessIssue]
        for want in json.load(sys.stdin):
            url, failures = find(session, options, want["project"], want["filename"])
            if url is None:
                print(f"{want['filename']}: " + ("; ".join(failures) or "no index has it"))
                return 3 if failures else 4
            reason = ""
            for attempt in range(ATTEMPTS):
                try:
                    reason, code = save(session, url, want), 4
                except Exception as e:
                    reason, code = f"{type(e).__name__}: {e}", 3
                if not reason:
                    break
                time.sleep(attempt)
            if reason:
                print(f"{want['filename']}: {reason}")
                return code
            print(f"{want['filename']}: {want['size'] / 1e6:.1f} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
