"""A language model behind OpenAI's protocol that judges transcripts of continuations."""

import hashlib
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import parse_json
from llama_mimi.judging.metrics import INSTALL, Input, Measure, Value
from llama_mimi.report.document import import_extra

ATTEMPTS = 3  # for a reply that cannot be read
RETRIES = 6  # of a call that fails, by the client: it waits up to 8 s, or as long as the server asks
SCALE = range(1, 6)
PARALLEL_CALLS = 8  # on each rank
TIMEOUT_SECONDS = 120.0  # of a call
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Criteria:
    """Content of a file such as eval/judge.toml."""

    names: list[str]
    system: str  # role of the judge, and a question for each criterion
    request: str  # template with the fields {prompt} and {continuation}
    sha256: str


def read_criteria(path: Path) -> Criteria:
    """Read a file such as eval/judge.toml; raise a `UserError` if it is missing or has another form."""
    try:
        data = path.read_bytes()
        content = tomllib.loads(data.decode())
        names, request = list(content["criteria"]), content["request"]
        questions = "\n".join(f"- {name}: {question}" for name, question in content["criteria"].items())
        system = f"{content['system']}\n\n{questions}"
        filled = request.format(prompt="<prompt>", continuation="<continuation>")
        if not names or "<prompt>" not in filled or "<continuation>" not in filled:
            raise ValueError("no criterion, or no field {prompt} or {continuation} in the request")
    except (OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"'{path}' is not a file of criteria ({reason}); see eval/judge.toml") from error
    return Criteria(names, system, request, hashlib.sha256(data).hexdigest())


def read_reply(text: str, names: Sequence[str]) -> dict[str, int]:
    """Return the scores in the last JSON object of a reply that contains no other; raise a `ValueError` if invalid."""
    for found in reversed(re.findall(r"{[^{}]*}", text)):  # some models think before they answer, also in braces
        try:
            scores = parse_json(found)
        except ValueError:
            continue
        if scores.keys() != set(names):
            raise ValueError("scores of other criteria")
        if any(isinstance(score, bool) or score not in SCALE for score in scores.values()):
            raise ValueError(f"a score is not a whole number from {SCALE[0]} to {SCALE[-1]}")
        return {name: int(scores[name]) for name in names}
    raise ValueError("no JSON")


def judge(url: str | None, model_name: str, criteria: Criteria) -> Measure:
    """Return the measure of scores by criterion, 1 to 5, of two texts; a call that fails is a `UserError`."""
    openai = import_extra("openai", "--judge_model", INSTALL)
    key = os.environ.get("OPENAI_API_KEY") or "none"
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT_SECONDS)
    score = {"type": "integer", "minimum": SCALE[0], "maximum": SCALE[-1]}
    names = criteria.names
    properties = {"properties": dict.fromkeys(names, score), "required": names, "additionalProperties": False}
    schema = {"name": "scores", "schema": {"type": "object", **properties}, "strict": True}
    form = {"type": "json_schema", "json_schema": schema}  # servers without schemas ignore it
    create = client.chat.completions.create

    def call(messages: Messages) -> str:
        """Return the text of a reply, empty if the reply is not of the protocol."""
        try:
            reply = create(model=model_name, messages=messages, temperature=0, response_format=form)
            return reply.choices[0].message.content or ""
        except (openai.APIConnectionError, openai.APIStatusError) as error:  # also a timeout
            problem = f"the judge '{model_name}' at {url or 'OpenAI'} does not answer ({first_line(error)})"
            raise UserError(f"{problem}; fix that and run the command again: earlier replies are kept") from error
        except (openai.OpenAIError, ValueError, RecursionError, AttributeError, IndexError, TypeError):
            return ""

    def values(batch: Sequence[Input]) -> Iterator[Value]:
        with ThreadPoolExecutor(PARALLEL_CALLS, thread_name_prefix="judge") as pool:
            yield from pool.map(lambda texts: _ask(call, criteria, *texts), batch)  # a failure cancels the other calls

    description = {"model": model_name, "criteria_sha256": criteria.sha256, "temperature": 0}
    # A batch waits for its slowest call, so it has several for each thread.
    return Measure("judge", [f"judge/{name}" for name in names], description, values, batch_size=8 * PARALLEL_CALLS)


def _ask(call: Callable[[Messages], str], criteria: Criteria, prompt: str, continuation: str) -> Value:
    """Return scores, or the reason why there are none after `ATTEMPTS` replies."""
    request = criteria.request.format(prompt=prompt, continuation=continuation)
    messages = [{"role": "system", "content": criteria.system}, {"role": "user", "content": request}]
    for _ in range(ATTEMPTS):
        text = call(messages)
        try:
            return {f"judge/{name}": score for name, score in read_reply(text, criteria.names).items()}
        except ValueError as error:
            reason = str(error)
        # At temperature 0 the same question has the same answer.
        keys = ", ".join(criteria.names)
        again = f"That could not be read ({reason}). Reply with one JSON object with only the keys {keys}."
        messages = [*messages[:2], {"role": "assistant", "content": text}, {"role": "user", "content": again}]
    return reason
