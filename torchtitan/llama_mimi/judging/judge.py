"""Judge of transcripts: a language model on a server that supports OpenAI's protocol."""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import parse_json
from llama_mimi.judging.metrics import INSTALL, Input, Measure, Value
from llama_mimi.judging.options import Criteria
from llama_mimi.report.document import import_extra

RETRIES = 6  # maximum number of times that the client repeats a failed call
SCALE = range(1, 6)
PARALLEL_CALLS = 8  # per rank
TIMEOUT_SECONDS = 120.0  # per call


def read_reply(text: str, names: Sequence[str]) -> dict[str, int]:
    """Return measures ``judge/<name>`` from the last JSON object of a reply. A wrong object raises a `ValueError`."""
    found = re.findall(r"{[^{}]*}", text)  # text before the scores may contain braces, too
    scores = parse_json(found[-1]) if found else {}
    if scores.keys() != set(names):
        raise ValueError(f"the reply does not end with a JSON object with the keys {', '.join(names)}")
    if any(isinstance(score, bool) or score not in SCALE for score in scores.values()):
        raise ValueError(f"a score is not a whole number from {SCALE[0]} to {SCALE[-1]}")
    return {f"judge/{name}": int(scores[name]) for name in names}


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

    def value(texts: Input) -> Value:
        """Return the judge's scores, or the problem of an invalid reply."""
        prompt, continuation = texts
        request = criteria.request.format(prompt=prompt, continuation=continuation)
        messages = [{"role": "system", "content": criteria.system}, {"role": "user", "content": request}]
        try:
            reply = create(model=model_name, messages=messages, temperature=0, response_format=form)
            return read_reply(reply.choices[0].message.content or "", names)
        except (openai.APIConnectionError, openai.APIStatusError) as error:  # includes timeouts
            problem = f"the judge '{model_name}' at {url or 'OpenAI'} does not answer ({first_line(error)})"
            raise UserError(f"{problem}; check the server and re-run the command: earlier replies are saved") from error
        except (openai.OpenAIError, ValueError, RecursionError, AttributeError, IndexError, TypeError) as error:
            return first_line(error)

    def values(batch: Sequence[Input]) -> Iterator[Value]:
        with ThreadPoolExecutor(PARALLEL_CALLS, thread_name_prefix="judge") as pool:
            yield from pool.map(value, batch)  # an error cancels the other calls

    description = {"model": model_name, "criteria_sha256": criteria.sha256, "temperature": 0}
    # Each batch waits for its slowest call. Large batches reduce the waiting.
    return Measure("judge", [f"judge/{name}" for name in names], description, values, batch_size=8 * PARALLEL_CALLS)
