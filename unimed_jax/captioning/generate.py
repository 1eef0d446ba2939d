"""k captions for each label of a table, asked for in rounds until all are there or the rounds are used up.

In a round each label that lacks captions is asked about once, several at the same time; then the answers are judged in
the order of the table. So the result does not depend on the number of threads or on which answer came first. Every
answer is stored, under the hash of its question, before it is used: a run that was killed asks again only what had
not been answered, and ends with the same file.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unimed_jax.captioning import checks, prompts
from unimed_jax.captioning.client import Answer, Endpoint, Unanswered
from unimed_jax.data import files
from unimed_jax.data.label_captions import Label, LabelCaptions, Triplet
from unimed_jax.errors import DataError, Fault

_TOKENS_EACH = 120  # of an answer, for each caption; doubled for a label whose answer was cut off
_TOKENS_MORE = 400
_MOST_DOUBLINGS = 3
_DEAD = 2  # questions of each thread without answer, in a row: then the rest of the round is not asked
_SHOWN = 30  # captions that a question repeats, at most
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What decides which captions come out, beside table, model and server."""

    k: int = 10
    seed: int = 0
    temperature: float = 0.8
    rounds: int = 6
    rules: checks.Rules = field(default_factory=checks.Rules)


@dataclass(slots=True)
class _State:
    """A label on its way."""

    triplet: Triplet
    captions: list[dict[str, Any]] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)  # the last detail of each rule
    doublings: int = 0
    answers: int = 0  # so far, good or bad
    lost: str = ""  # why the last question got none

    def reject(self, rule: str, detail: str) -> None:
        self.rejected[rule] += 1
        self.details[rule] = detail


@dataclass(slots=True)
class Cache:
    """Answers by the hash of their question, one file each, written at once.

    Args:
        folder: beside the result.
    """

    folder: Path
    hits: int = 0

    def get(self, question: dict[str, Any]) -> Answer | None:
        """The stored answer; a damaged file counts as none and is written again."""
        try:
            values = json.loads(self._path(question).read_text(encoding="utf-8"))
            if values["question"] != question:
                return None
            answer = Answer(**values["answer"])
            if not all(isinstance(x, str) for x in asdict(answer).values()):
                return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        self.hits += 1
        return answer

    def put(self, question: dict[str, Any], answer: Answer) -> None:
        """Stores an answer.

        Raises:
            DataError: when it cannot be written.
        """
        with files.swapped(self._path(question)) as beside:
            text = json.dumps({"question": question, "answer": answer.json()}, indent=1, ensure_ascii=False)
            beside.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
            files.sync(beside)

    def sweep(self) -> None:
        """Removes what a killed run left half-written; only while no other run uses the folder."""
        for left in self.folder.glob(".*.new"):
            files.remove(left)

    def _path(self, question: dict[str, Any]) -> Path:
        return self.folder / f"{_sha256(json.dumps(question, sort_keys=True))}.json"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def run(
    triplets: Sequence[Triplet],
    endpoint: Endpoint,
    cache: Cache,
    settings: Settings,
    *,
    workers: int = 4,
    progress: Progress = lambda done, wanted: None,
) -> LabelCaptions:
    """Generates captions; a label that still lacks some at the end says how many in `more["missing"]`, and why.

    Args:
        triplets: the table of labels.
        endpoint: the language model.
        cache: where answers are kept.
        settings: see Settings.
        workers: questions at a time; the result does not depend on it.
        progress: called with captions that are there, and wanted.

    Raises:
        Fault: when no question at all was answered.
        UnimedError: when the server refuses all requests; see `Endpoint.ask`.
    """
    checker = checks.Checker(triplets, settings.rules)
    states = [_State(t) for t in triplets]
    not_sent: set[str] = set()
    for _ in range(settings.rounds):
        lacking = [s for s in states if len(s.captions) < settings.k]
        if not lacking:
            break
        questions = [_question(s, endpoint.model, settings) for s in lacking]
        answers = _ask_all(questions, endpoint, cache, workers)
        for state, question, answer in zip(lacking, questions, answers, strict=True):
            _judge(state, question, answer, checker, settings.k)
            not_sent.update(answer.not_sent.split() if isinstance(answer, Answer) else ())
        progress(sum(len(s.captions) for s in states), settings.k * len(states))
        if all(isinstance(a, Unanswered) for a in answers):
            if not any(s.answers for s in states):
                raise Fault(f"the endpoint does not answer: {answers[0]}", "run again: answers are kept")
            break
    generator = _generator(endpoint, settings, triplets) | {"not_sent": sorted(not_sent)}
    return LabelCaptions(labels=[_label(s, settings.k) for s in states], generator=generator)


def _question(state: _State, model: str, settings: Settings) -> dict[str, Any]:
    """Everything that an answer depends on; its hash names the answer."""
    n = settings.k - len(state.captions)
    messages = prompts.messages(
        state.triplet,
        n,
        min_words=settings.rules.min_words,
        max_words=settings.rules.max_words,
        taken=[c["text"] for c in state.captions][-_SHOWN:],
        faults=sorted(state.rejected),
    )
    return {
        "model": model,
        "messages": messages,
        "seed": settings.seed + state.answers,  # lost questions are asked again as they were
        "temperature": settings.temperature,
        "max_tokens": (_TOKENS_EACH * n + _TOKENS_MORE) << state.doublings,
    }


def _ask_all(
    questions: Sequence[dict[str, Any]], endpoint: Endpoint, cache: Cache, workers: int
) -> list[Answer | Unanswered]:
    answers: list[Answer | Unanswered | None] = [cache.get(q) for q in questions]
    todo = deque(i for i, a in enumerate(answers) if a is None)
    done: queue.SimpleQueue[tuple[int, Answer | Exception]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            try:
                i = todo.popleft()
            except IndexError:
                return
            try:
                wanted = {k: v for k, v in questions[i].items() if k not in ("model", "messages")}
                answer = endpoint.ask(questions[i]["messages"], **wanted)
                cache.put(questions[i], answer)
                done.put((i, answer))
            except Exception as e:
                done.put((i, e))

    # Daemons, so that an interrupt need not wait for answers; what they store appears at once or not at all.
    for _ in range(min(workers, expected := len(todo))):
        threading.Thread(target=work, daemon=True).start()
    lost = 0  # in a row
    while expected:
        i, answer = done.get()
        expected -= 1
        if isinstance(answer, Exception) and not isinstance(answer, Unanswered):
            todo.clear()
            raise answer  # a refusal of one request is a refusal of all
        answers[i] = answer
        lost = lost + 1 if isinstance(answer, Unanswered) else 0
        while lost >= _DEAD * workers and todo:  # do not wait for each of a thousand questions in vain
            with contextlib.suppress(IndexError):
                answers[todo.popleft()] = Unanswered(f"not asked, since {lost} others in a row got no answer")
                expected -= 1
    return [a for a in answers if a is not None]


def _judge(
    state: _State, question: dict[str, Any], answer: Answer | Unanswered, checker: checks.Checker, k: int
) -> None:
    if isinstance(answer, Unanswered):
        state.lost = str(answer)
        return
    state.answers, state.lost = state.answers + 1, ""
    if answer.refusal or answer.finish == "content_filter":
        state.reject("refused", "the model refused" + f": {answer.refusal}" * bool(answer.refusal))
        return
    if answer.finish == "length":
        state.doublings = min(state.doublings + 1, _MOST_DOUBLINGS)
        state.reject("cut_off", f"the answer was longer than {question['max_tokens']} tokens")
        return
    texts = prompts.parse(answer.content)
    if not texts:
        state.reject("malformed", "the answer is no JSON with captions")
        return
    for text in texts:
        if len(state.captions) == k:
            state.reject("surplus", "more captions than asked for")
        elif fault := checker.take(text, state.triplet):
            state.reject(*fault)
        else:
            state.captions.append(
                {
                    "text": text,
                    "kind": "llm",
                    "model": answer.model or question["model"],
                    "seed": question["seed"],
                    "reply_sha256": _sha256(answer.content),
                }
            )


def _label(state: _State, k: int) -> Label:
    more: dict[str, Any] = {}
    if state.lost:
        state.reject("unanswered", state.lost)
    if state.rejected:
        more["rejected"] = dict(sorted(state.rejected.items()))
    if missing := k - len(state.captions):
        more |= {"missing": missing, "details": dict(sorted(state.details.items()))}
    return Label(triplet=state.triplet, captions=state.captions, more=more)


def _generator(endpoint: Endpoint, settings: Settings, triplets: Sequence[Triplet]) -> dict[str, Any]:
    table = json.dumps([t.json() for t in triplets], sort_keys=True)
    return {
        "kind": "llm",
        "model": endpoint.model,
        "endpoint": endpoint.url,
        "seed": settings.seed,
        "temperature": settings.temperature,
        "captions_per_label": settings.k,
        "rounds": settings.rounds,
        "rules": settings.rules.json(),
        "prompt": {"version": prompts.VERSION, "sha256": prompts.digest()},
        "labels_sha256": _sha256(table),
    }


def lacking(found: LabelCaptions) -> list[Label]:
    """The labels that lack captions."""
    return [label for label in found.labels if label.more.get("missing")]


def write_errors(path: Path, labels: Sequence[Label]) -> None:
    """Lists labels that lack captions, with the reasons; without any, an older list is removed.

    Raises:
        DataError: when it cannot be written.
    """
    if not labels:
        try:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        except OSError as e:
            raise DataError(f"{path} cannot be removed ({e.strerror})") from e
        return
    with files.swapped(path) as beside, beside.open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["modality", "anatomy", "finding", "missing", "reasons"])
        for label in labels:
            t = label.triplet
            writer.writerow([t.modality, t.anatomy, t.finding, label.more["missing"], reasons(label)])


def reasons(label: Label) -> str:
    """Why captions of a label were refused, the most frequent reason first."""
    details = label.more.get("details", {})
    counts = Counter(label.more.get("rejected", {})).most_common()
    return "; ".join(
        f"{n} {rule} ({details[rule]})" if rule in details else f"{n} {rule}" for rule, n in counts
    )
