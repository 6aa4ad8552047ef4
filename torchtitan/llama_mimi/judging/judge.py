"""A language model as the judge of what continuations say: any server that speaks OpenAI's protocol."""

import contextlib
import hashlib
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import parse_json
from llama_mimi.judging.measures import FAILED
from llama_mimi.judging.words import TextPair

ASKED = 3  # times, where a reply cannot be read
RETRIES = 6  # of a call that fails, by the client itself, waiting up to 8 s in between or as long as the server asks
SCALE = (1, 5)


@dataclass(frozen=True)
class Criteria:
    """What a judge is asked.

    Args:
        system: who the judge is, the scale, and the form of a reply.
        request: with the fields {prompt} and {continuation}.
        questions: by name of the criterion.
        sha256: of the file.
    """

    system: str
    request: str
    questions: dict[str, str]
    sha256: str

    def messages(self, pair: TextPair) -> list[dict[str, str]]:
        """The first messages of a call."""
        asked = "\n".join(f"- {name}: {question}" for name, question in self.questions.items())
        request = self.request.format(prompt=pair.prompt, continuation=pair.continuation)
        return [{"role": "system", "content": f"{self.system}\n\n{asked}"}, {"role": "user", "content": request}]


def read_criteria(path: Path) -> Criteria:
    """Read a file as eval/judge.toml.

    Raises:
        UserError: it is missing or is not as it should be.
    """
    try:
        data = path.read_bytes()
        content = tomllib.loads(data.decode())
        questions = {str(name): str(question) for name, question in content["criteria"].items()}
        criteria = Criteria(content["system"], content["request"], questions, hashlib.sha256(data).hexdigest())
        criteria.messages(TextPair("", ""))
    except (OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise UserError(
            f"'{path}' is no file of criteria ({type(error).__name__}: {first_line(error)}); see eval/judge.toml"
        ) from error
    if not questions or not all("{" + field + "}" in criteria.request for field in ("prompt", "continuation")):
        raise UserError(
            f"'{path}' lacks criteria, or its request the fields {{prompt}} and {{continuation}}; see eval/judge.toml"
        )
    return criteria


class BadReplyError(Exception):
    """A reply that holds no scores; the message says why."""


def read_reply(text: str, names: Sequence[str]) -> dict[str, int]:
    """The scores of a reply, which is a JSON object with a number for each criterion, also between other words.

    Raises:
        BadReplyError: it is none.
    """
    scores = _last_object(text)
    if scores is None:
        raise BadReplyError("no JSON")
    if len(scores) != len(names):
        raise BadReplyError("wrong number of scores")
    if scores.keys() != set(names):
        raise BadReplyError("scores of other criteria")
    low, high = SCALE
    for score in scores.values():
        if isinstance(score, bool) or not isinstance(score, int | float) or score != score // 1:
            raise BadReplyError("score is no whole number")
        if not low <= score <= high:
            raise BadReplyError("score is out of range")
    return {name: int(scores[name]) for name in names}


def _last_object(text: str) -> dict[str, Any] | None:
    """Return the last JSON object in a text that contains no other; some models think aloud before, also in braces."""
    for found in reversed(re.findall(r"{[^{}]*}", text)):  # one pass, also over a million braces
        with contextlib.suppress(ValueError):
            return parse_json(found)
    return None


class Judge:
    """Scores of 1 to 5 by criterion.

    Args:
        url: of the server, such as http://localhost:8000/v1; None is OpenAI's own.
        model_name: that the server knows.
        parallel: calls at once, of each rank.
    """

    name = "judge"

    def __init__(
        self, url: str | None, model_name: str, criteria: Criteria, parallel: int, timeout_seconds: float
    ) -> None:
        try:
            import openai  # of an extra
        except ImportError as error:
            raise UserError(
                "--judge_model needs the package openai, which is not installed; install llama-mimi[judging]"
            ) from error
        key = os.environ.get("OPENAI_API_KEY")
        self._errors, self._url, self._model_name = openai, url, model_name
        self._client = openai.OpenAI(base_url=url, api_key=key or "none", max_retries=RETRIES, timeout=timeout_seconds)
        self._criteria, self._parallel = criteria, parallel
        score = {"type": "integer", "minimum": SCALE[0], "maximum": SCALE[1]}
        names = list(criteria.questions)
        schema = {
            "type": "object",
            "properties": dict.fromkeys(names, score),
            "required": names,
            "additionalProperties": False,
        }
        # A server that cannot hold a reply to a schema leaves it out; the request asks for the same in words.
        self._format = {"type": "json_schema", "json_schema": {"name": "scores", "schema": schema, "strict": True}}

    def describe(self) -> dict[str, Any]:
        return {"model": self._model_name, "criteria_sha256": self._criteria.sha256, "temperature": 0}

    def values(self, inputs: Sequence[TextPair]) -> Iterator[tuple[int, dict[str, int] | str]]:
        """Scores, or why there are none after `ASKED` replies.

        Raises:
            UserError: the server cannot be reached or refuses; calls that were answered are yielded before.
        """
        pool = ThreadPoolExecutor(self._parallel, thread_name_prefix="judge")
        failure: UserError | None = None
        try:
            asked = {pool.submit(self._ask, pair): place for place, pair in enumerate(inputs)}
            for answer in as_completed(asked):
                if answer.cancelled():
                    continue
                try:
                    yield asked[answer], answer.result()
                except UserError as error:
                    failure = failure or error
                    for waiting in asked:
                        waiting.cancel()
        finally:
            pool.shutdown(cancel_futures=True)
        if failure is not None:
            raise failure

    def _ask(self, pair: TextPair) -> dict[str, int] | str:
        messages = self._criteria.messages(pair)
        reason = ""
        for _ in range(ASKED):
            text = self._call(messages)
            try:
                return read_reply(text, list(self._criteria.questions))
            except BadReplyError as error:
                reason = str(error)
            # At temperature 0 the same question has the same answer.
            names = ", ".join(self._criteria.questions)
            again = f"That could not be read ({reason}). Reply with one JSON object with the keys {names} alone."
            messages = [*messages[:2], {"role": "assistant", "content": text}, {"role": "user", "content": again}]
        return FAILED + reason

    def _call(self, messages: Sequence[dict[str, str]]) -> str:
        create: Any = self._client.chat.completions.create
        try:
            reply = create(
                model=self._model_name,
                messages=messages,
                temperature=0,
                response_format=self._format,
            )
        except self._errors.APIConnectionError as error:  # also one that came too late
            where = self._url or "OpenAI"
            raise UserError(
                f"the judge at {where} cannot be reached or is too slow ({first_line(error)}); start its server and "
                "this command again: what it has replied is kept"
            ) from error
        except self._errors.APIStatusError as error:
            raise UserError(
                f"the judge '{self._model_name}' refuses with status {error.status_code} ({first_line(error)}); mend "
                "that and start again: what it has replied is kept"
            ) from error
        except (self._errors.OpenAIError, ValueError, RecursionError) as error:
            return f"(no reply of this protocol: {first_line(error)})"
        message = reply.choices[0].message if getattr(reply, "choices", None) else None
        return message.content or "" if message else ""
