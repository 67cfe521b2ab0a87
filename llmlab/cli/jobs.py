"""What `llmlab run` is to serve: prompts from arguments, files and stdin, or a drawn workload."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from llmlab.types import RequestError, SamplingParams

PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")
_FORM = 'Write {"prompt": "..."} (or "messages", or "prompt_token_ids"), and any sampling parameter beside it.'


class Job(msgspec.Struct, frozen=True):
    """One request to be. `source` says where it came from, `title` what was asked; `arrival` in seconds after the start."""

    prompt: Any
    sampling: SamplingParams
    source: str
    title: str = ""
    arrival: float | None = None
    metadata: Mapping[str, Any] = {}


def jobs_of(prompts: Sequence[str], file: str | None, sampling: SamplingParams, chat: bool) -> list[Job]:
    """Prompts of the arguments, then those of `file` ("-": stdin). Raises RequestError."""
    jobs = [Job(_asked(text, chat), sampling, f"prompt {i}", text) for i, text in enumerate(prompts, 1)]
    if file is not None:
        jobs += _jobs_of_lines(_lines(file), file, sampling, chat)
    if not jobs:
        raise RequestError("prompts", [], "there is nothing to run",
                           "Give prompts, --file FILE (- for stdin), or --requests N for a drawn workload.")  # fmt: skip
    return jobs


def workload_jobs(count: int, rate: float | None, prompt: str, output: str, shared_prefix: int, seed: int,
                  vocab_size: int) -> list[Job]:  # fmt: skip
    """A drawn workload: `count` requests, `rate` a second (all at once if None). Raises ConfigError."""
    from llmlab.workloads.workload import Workload

    lengths = {"prompt": length_model(prompt), "output": length_model(output)}
    more = {"seed": seed, "shared_prefix": shared_prefix, **lengths}
    drawn = Workload.batch(count, **more) if rate is None else Workload.poisson(rate, count, **more)
    return [Job({"prompt_token_ids": r.prompt_token_ids}, r.sampling, f"request {i}", arrival=r.arrival, metadata=r.metadata)
            for i, r in enumerate(drawn.requests(vocab_size), 1)]  # fmt: skip


def length_model(text: str) -> Any:
    """A length model as the command line writes it: 128, 16,128 or lognormal:256,1.0."""
    parts = text.split(",")
    if all(part.strip().isdigit() for part in parts) and len(parts) <= 2:
        numbers = [int(part) for part in parts]
        return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
    return text


def _asked(text: str, chat: bool) -> Any:
    return [{"role": "user", "content": text}] if chat else text


def _lines(file: str) -> list[str]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError("file", file, f"cannot be read ({error.strerror})", "Give a text or .jsonl file, or -.") from None
    except UnicodeDecodeError as error:
        raise RequestError("file", file, f"is not UTF-8 text ({error.reason})", "Save it as UTF-8.") from None
    return text.splitlines()


def _jobs_of_lines(lines: Sequence[str], file: str, sampling: SamplingParams, chat: bool) -> Iterator[Job]:
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    as_json = file.endswith(".jsonl") or (file == "-" and bool(numbered) and numbered[0][1].lstrip().startswith("{"))
    for number, line in numbered:
        source = f"{'stdin' if file == '-' else file} line {number}"
        yield _json_job(line, source, sampling, chat) if as_json else Job(_asked(line, chat), sampling, source, line)


def _json_job(line: str, source: str, sampling: SamplingParams, chat: bool) -> Job:
    try:
        fields = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise RequestError(source, line, f"is not JSON ({error})", _FORM) from None
    if not isinstance(fields, dict) or sum(key in fields for key in PROMPT_KEYS) != 1:
        raise RequestError(source, line, f"needs one of {', '.join(PROMPT_KEYS)}", _FORM)
    title = fields["prompt"] if isinstance(fields.get("prompt"), str) else ""
    prompt = _prompt_of(fields, chat)
    return Job(prompt, _sampling_of(fields, sampling, source), source, title)


def _prompt_of(fields: dict[str, Any], chat: bool) -> Any:
    """Take the prompt out of `fields`."""
    if "prompt_token_ids" in fields:
        return {"prompt_token_ids": fields.pop("prompt_token_ids")}
    if "messages" in fields:
        return fields.pop("messages")
    return _asked(fields.pop("prompt"), chat)


def _sampling_of(fields: Mapping[str, Any], sampling: SamplingParams, source: str) -> SamplingParams:
    known = SamplingParams.__struct_fields__
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise RequestError(source, unknown[0], "is not a sampling parameter", f"Known: {', '.join(known)}.")
    try:
        return msgspec.structs.replace(sampling, **fields)
    except RequestError as error:
        raise RequestError(f"{source}: {error.field}", error.value, error.problem, error.way_out) from None
