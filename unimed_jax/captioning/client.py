"""A language model behind an OpenAI-compatible endpoint: one question, one answer, whatever the network does.

The openai client (extra `captions`) speaks the protocol. Answers are streamed, so that the time limit is on silence and
not on long answers, and a stream that ends early is seen. Retries are here and not in the client, which knows
nothing of broken streams: 408, 409, 429 and 5xx, time-outs and lost connections, with `Retry-After` or doubling waits.
"""

from __future__ import annotations

import email.utils
import importlib.util
import ipaddress
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from unimed_jax.captioning import prompts
from unimed_jax.errors import DataError, UnimedError, UsageError

KEY_VARIABLE = "UNIMED_CAPTIONS_API_KEY"
PIP = 'pip install "unimed-jax[captions]"'
_AGAIN = {408, 409, 425, 429}
_UNSUPPORTED = {400, 422, 501}
# Parameters that some servers or models refuse, and the names to try in turn; empty = it is not sent.
_NAMES = {
    "response_format": ("response_format", "response_format", ""),  # see prompts.response_formats
    "max_tokens": ("max_tokens", "max_completion_tokens", ""),
    "temperature": ("temperature", ""),
    "seed": ("seed", ""),
}
_SECRET = 8  # characters; local servers take any word for a key, which must not blank out words
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds between tries


class Unanswered(Exception):
    """Raised when a question got no answer in the end; the reason is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model said."""

    content: str
    finish: str  # stop, length, content_filter, ...
    refusal: str = ""
    model: str = ""  # as the server names it
    response_format: str = ""
    not_sent: str = ""  # parameters that the server refuses, with spaces between them

    def json(self) -> dict[str, str]:
        """For the cache."""
        return {
            "content": self.content,
            "finish": self.finish,
            "refusal": self.refusal,
            "model": self.model,
            "response_format": self.response_format,
            "not_sent": self.not_sent,
        }


def check_url(url: str, *, allow_remote: bool) -> str:
    """An endpoint's address, checked; it may be written into files, so it must hold no secret.

    Raises:
        UsageError: for what is no http(s) address, holds a user, password, query or fragment, or is on another machine
            without `allow_remote`.

    Example:
        >>> check_url("http://127.0.0.1:8000/v1/", allow_remote=False)
        'http://127.0.0.1:8000/v1'
    """
    example = "e.g. http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UsageError("--endpoint is no address", example) from None
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError("--endpoint is no http or https address", example)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            "--endpoint holds a user, a password or a query",
            f"give the key in the environment: {KEY_VARIABLE}",
        )
    if not allow_remote and not _is_loopback(host):
        raise UsageError(
            f"--endpoint {host} is not this machine, and labels would leave it", "--allow-remote if they may"
        )
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(slots=True)
class Endpoint:
    """Asks one model; safe to use from several threads.

    Args:
        url: from `check_url`.
        model: as the server knows it.
        allow_remote: whether the address may be on another machine.
        timeout: seconds of silence before a question counts as lost.
        retries: further tries after one that got lost.
        longest: seconds that an answer may take in all; a server that asks to wait longer is not waited for.
        sleep: waits; tests replace it.

    Raises:
        UsageError: as `check_url`.
        DataError: without the openai client.
    """

    url: str
    model: str
    allow_remote: bool = False
    timeout: float = 120.0
    retries: int = 5
    longest: float = 1200.0
    sleep: Callable[[float], None] = time.sleep
    _client: Any = field(init=False, repr=False)
    _lost: type[Exception] = field(init=False, repr=False)  # of the HTTP library that the client is built on
    _key: str = field(init=False, repr=False)
    _tried: dict[str, int] = field(init=False, default_factory=lambda: dict.fromkeys(_NAMES, 0))
    _lock: threading.Lock = field(init=False, repr=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.url = check_url(self.url, allow_remote=self.allow_remote)
        require()
        import openai

        remote = not _is_loopback(urlsplit(self.url).hostname or "")
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise UsageError(
                f"{KEY_VARIABLE} holds what is no key", "letters, digits and signs of ASCII only"
            )
        # No redirect leads elsewhere, and no proxy of the environment sees what is for this machine. Settings of the
        # environment that are meant for OpenAI's own service stay here.
        http = openai.DefaultHttpxClient(trust_env=remote, follow_redirects=False)
        self._lost = importlib.import_module(type(http).__mro__[1].__module__).TransportError
        omit = {name: openai.Omit() for name in ("OpenAI-Organization", "OpenAI-Project")}
        self._client = openai.OpenAI(
            base_url=self.url,
            api_key=self._key or "none",
            http_client=http,
            timeout=self.timeout,
            max_retries=0,
            default_headers=omit,  # pyright: ignore[reportArgumentType]
        )

    def ask(
        self, messages: Sequence[dict[str, str]], *, seed: int, temperature: float, max_tokens: int
    ) -> Answer:
        """The model's answer.

        Raises:
            Unanswered: when all tries failed.
            UnimedError: when the server refuses the request itself: no such model, no right to it, bad parameters.
        """
        import openai

        why, wait = "", _FIRST_WAIT
        for left in range(self.retries, -1, -1):
            tried, asked = dict(self._tried), None
            try:
                return self._once(messages, tried, seed=seed, temperature=temperature, max_tokens=max_tokens)
            except openai.APIStatusError as e:
                if e.status_code in _UNSUPPORTED and self._give_up(e, tried):
                    return self.ask(messages, seed=seed, temperature=temperature, max_tokens=max_tokens)
                if e.status_code not in _AGAIN and e.status_code < 500:
                    raise self._refused(e) from None
                why, asked = f"status {e.status_code}", _retry_after(e.response.headers)
            except openai.APITimeoutError:
                why = f"no answer within {self.timeout:g} s"
            except (openai.APIConnectionError, self._lost):  # the latter while a refusal was read
                why = "no connection, or it was lost"
            except openai.APIError as e:  # an error inside the stream
                why = f"the server reports {self._clean(e.message)!r}"
            except (_Cut, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
                why = str(e) if isinstance(e, _Cut) else "what came is not the chat protocol"
            if asked is not None and asked > self.longest:
                raise Unanswered(f"{why}, and the server asks to wait {asked:.0f} s") from None
            if left:
                # Spread, so that several processes do not come back at the same moment.
                self.sleep(wait * random.uniform(0.75, 1.25) if asked is None else asked)
                wait = min(2 * wait, _LONGEST_WAIT)
        raise Unanswered(f"{why} ({self.retries + 1} tries)")

    def _once(self, messages: Sequence[dict[str, str]], tried: dict[str, int], **values: Any) -> Answer:
        wanted = prompts.response_formats()[tried["response_format"]]
        values["response_format"] = wanted
        options = {name: values[p] for p, names in _NAMES.items() if (name := names[tried[p]])}
        end = time.monotonic() + self.longest
        content, refusal, finish, model, size = [], [], "", "", 0
        with self._client.chat.completions.create(
            model=self.model, messages=list(messages), stream=True, **options
        ) as stream:
            for number, chunk in enumerate(stream):
                model = chunk.model or model
                for choice in (chunk.choices or ())[:1]:
                    content.append(choice.delta.content or "")
                    refusal.append(choice.delta.refusal or "")
                    size += len(content[-1]) + len(refusal[-1])
                    finish = choice.finish_reason or finish
                if max(size, number) > prompts.MAX_REPLY_CHARS:  # pieces may be empty
                    raise _Cut(f"the answer has more than {prompts.MAX_REPLY_CHARS} characters")
                if time.monotonic() > end:
                    raise _Cut(f"the answer took more than {self.longest:g} s")
        if not finish:
            raise _Cut("the stream ended before the answer did")
        return Answer(
            content=self._without_key("".join(content)),
            finish=str(finish),
            refusal=self._clean("".join(refusal)),
            model=self._clean(str(model)),
            response_format=wanted["type"] if wanted else "none",
            not_sent=" ".join(p for p, names in _NAMES.items() if not names[tried[p]]),
        )

    def _give_up(self, e: Any, tried: dict[str, int]) -> bool:
        """Leaves out, or names otherwise, the parameter that a refusal is about; False when there is no other way."""
        said = f"{e.param or ''} {e.message}"
        about = next((p for p in _NAMES if re.search(rf"\b{p}\b", said)), "response_format")
        with self._lock:
            if tried[about] + 1 == len(_NAMES[about]):
                return False
            self._tried[about] = max(self._tried[about], tried[about] + 1)
            return True

    def _refused(self, e: Any) -> UnimedError:
        said = self._clean(e.message)
        match e.status_code:
            case 401 | 403:
                return UsageError(
                    f"the endpoint refuses access (status {e.status_code}: {said})", f"set {KEY_VARIABLE}"
                )
            case 404:
                return UsageError(
                    f"the endpoint knows no such address or model {self.model!r} ({said})",
                    "--endpoint usually ends in /v1; the server lists its models at /v1/models",
                )
            case status if 300 <= status < 400:
                return UsageError(
                    f"the endpoint redirects (status {status})", "give the address that it redirects to"
                )
        return DataError(f"the endpoint refuses the request (status {e.status_code}: {said})")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) >= _SECRET else text

    def _clean(self, text: Any) -> str:
        """Words of a server for a message: short, printable, without the key."""
        kept = "".join(c if c.isprintable() else " " for c in self._without_key(str(text)))
        # Servers repeat keys with their middle left out.
        return " ".join(re.sub(r"\b[\w-]*\*{3,}[\w-]*|\bsk-[\w-]+", "***", kept).split())[:200]


class _Cut(Exception):
    """An answer that does not end as it should."""


def require() -> None:
    """Refuses to go on without the openai client.

    Raises:
        DataError: naming the extra.
    """
    if importlib.util.find_spec("openai") is None:
        raise DataError("captions from a language model need the openai client, which is not installed", PIP)


def _retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait, from a number or a date."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds == seconds else None
