"""Judge of transcripts: a language model on a server that supports OpenAI's protocol."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import parse_json
from llama_mimi.judging.metrics import INSTALL, Input, Measure, Value
from llama_mimi.judging.options import Criteria
from llama_mimi.report.document import import_extra

ATTEMPTS = 3  # maximum number of requests until a reply can be parsed
RETRIES = 6  # maximum number of times that the client repeats a failed call
SCALE = range(1, 6)
PARALLEL_CALLS = 8  # per rank
TIMEOUT_SECONDS = 120.0  # per call
Messages = list[dict[str, str]]


def read_reply(text: str, names: Sequence[str]) -> dict[str, int]:
    """Return the scores in the last JSON object of a reply; raise a `ValueError` if scores are missing or invalid."""
    for found in reversed(re.findall(r"{[^{}]*}", text)):  # text before the scores may contain braces, too
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
    """Return a measure that asks the judge to score a continuation from 1 to 5. A failed call raises a `UserError`."""
    openai = import_extra("openai", "--judge_model", INSTALL)
    key = os.environ.get("OPENAI_API_KEY") or "none"
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT_SECONDS)
    score = {"type": "integer", "minimum": SCALE[0], "maximum": SCALE[-1]}
    names = criteria.names
    properties = {"properties": dict.fromkeys(names, score), "required": names, "additionalProperties": False}
    schema = {"name": "scores", "schema": {"type": "object", **properties}, "strict": True}
    form = {"type": "json_schema", "json_schema": schema}  # a server that does not support schemas ignores this
    create = client.chat.completions.create

    def call(messages: Messages) -> str:
        """Return the text of a reply, or an empty string for a malformed reply."""
        try:
            reply = create(model=model_name, messages=messages, temperature=0, response_format=form)
            return reply.choices[0].message.content or ""
        except (openai.APIConnectionError, openai.APIStatusError) as error:  # includes timeouts
            problem = f"the judge '{model_name}' at {url or 'OpenAI'} does not answer ({first_line(error)})"
            raise UserError(f"{problem}; check the server and re-run the command: earlier replies are saved") from error
        except (openai.OpenAIError, ValueError, RecursionError, AttributeError, IndexError, TypeError):
            return ""

    def values(batch: Sequence[Input]) -> Iterator[Value]:
        with ThreadPoolExecutor(PARALLEL_CALLS, thread_name_prefix="judge") as pool:
            yield from pool.map(lambda texts: _ask(call, criteria, *texts), batch)  # an error cancels the other calls

    description = {"model": model_name, "criteria_sha256": criteria.sha256, "temperature": 0}
    # Each batch waits for its slowest call. Large batches reduce the waiting.
    return Measure("judge", [f"judge/{name}" for name in names], description, values, batch_size=8 * PARALLEL_CALLS)


def _ask(call: Callable[[Messages], str], criteria: Criteria, prompt: str, continuation: str) -> Value:
    """Return the scores of the judge or, after `ATTEMPTS` invalid replies, the problem of the last reply."""
    request = criteria.request.format(prompt=prompt, continuation=continuation)
    messages = [{"role": "system", "content": criteria.system}, {"role": "user", "content": request}]
    for _ in range(ATTEMPTS):
        text = call(messages)
        try:
            return {f"judge/{name}": score for name, score in read_reply(text, criteria.names).items()}
        except ValueError as error:
            reason = str(error)
        # At temperature 0, a repeated question gets the same answer, so the next question names the error.
        keys = ", ".join(criteria.names)
        again = f"That could not be read ({reason}). Reply with one JSON object with only the keys {keys}."
        messages = [*messages[:2], {"role": "assistant", "content": text}, {"role": "user", "content": again}]
    return reason
