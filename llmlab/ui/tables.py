"""The words and tables of a report, as HTML. Every text from outside goes through `html.escape`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from llmlab.config import EngineConfig
from llmlab.events import catalog as ev
from llmlab.events.export import RequestSpan, merge_spans, output_tokens, request_spans
from llmlab.events.metrics import RequestMetrics, Summary
from llmlab.events.why import TITLES
from llmlab.ui.chart import count, percent, seconds

if TYPE_CHECKING:
    from llmlab.events.trace import Run

MAX_REQUESTS = 200
MAX_PREEMPTIONS = 10
MAX_TEXT = 600  # characters of a prompt or an answer
NONE = "<span class=none>-</span>"


class Texts(msgspec.Struct, frozen=True):
    """What is known about requests beyond the run itself, by request id."""

    answers: Mapping[str, str] = {}
    prompts: Mapping[str, str] = {}
    verdicts: Mapping[str, bool] = {}


# ---------------------------------------------------------------------------------------- header
def headline(run: Run) -> str:
    how = "simulated on" if run.mode == "simulated" else "measured on"
    return f"{count(len(run.requests), 'request')} on {run.started.model.get('name', '?')}, {how} {run.started.hardware.get('name', '?')}"


def lead(run: Run) -> str:
    """The run in three sentences."""
    m = run.metrics
    if not m.num_requests:
        return "No request arrived in this run."
    tokens = sum(output_tokens(run).values())
    rate = f", {tokens / m.duration:,.0f} tokens per second" if m.duration else ""
    said = [f"{m.num_finished} of {count(m.num_requests, 'request')} finished in {seconds(m.duration)} with {count(tokens, 'token')}{rate}."]
    late = [(e.t - run.requests[e.request].arrival, e.request) for e in run.events(ev.FirstToken)]
    if late:
        first = sorted(t for t, _ in late)
        said.append(f"The median first token came after {seconds(Summary.of(first).p50 or 0.0)}, the latest ({max(late)[1]}) "
                    f"after {seconds(max(late)[0])}.")  # fmt: skip
    if m.num_preemptions:
        tax = f"; {percent(m.recompute_tax)} of all computed tokens were computed again" if run.started.level >= 2 else ""
        said.append(f"{count(m.num_preemptions, 'preemption')}{tax}.")
    if run.cut:
        said.append(f"The trace ends early: {run.cut}.")
    return " ".join(said)


def fact_list(run: Run) -> str:
    """Where the numbers come from."""
    started = run.started
    hardware = dict(started.hardware)
    facts = {"time": f"{run.mode}", "model": started.model.get("name", "?"), "hardware": hardware.pop("name", "?"),
             "seed": started.seed, "log level": started.level}  # fmt: skip
    if "bandwidth" in hardware:
        facts["memory bandwidth"] = f"{float(hardware.pop('bandwidth')) / 1e9:,.0f} GB/s"
    facts |= {k: v for k, v in hardware.items() if v != facts["hardware"]}
    return f"<dl class=facts>{_definitions(facts)}</dl>"


def settings(run: Run) -> str:
    """The configuration: what differs from the defaults in sight, all of it folded."""
    config, defaults = run.started.config, EngineConfig().describe()
    said = ("model", "hardware", "seed", "log_level", "trace")
    chosen = {k: v for k, v in config.items() if k not in said and v is not None and defaults.get(k) != v}
    every = f"<details><summary>All {len(config)} settings</summary><dl class=facts>{_definitions(config)}</dl></details>"
    return f"<p class=sub>Settings other than the defaults</p><dl class=facts>{_definitions(chosen)}</dl>{every}" if config else ""


def _definitions(facts: Mapping[str, Any]) -> str:
    return "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts.items())


def _text(value: Any) -> str:
    return html.escape(str(value))


def tiles(run: Run) -> str:
    """The metrics that people ask for first; what the log level does not hold is a dash."""
    m, level = run.metrics, run.started.level
    total = run.started.config.get("num_blocks", "?")
    tokens = sum(output_tokens(run).values())
    shown = [
        ("Time to first token, median", _time(m.ttft.p50), f"p90 {_plain(m.ttft.p90)}, p99 {_plain(m.ttft.p99)}"),
        ("Time per output token, median", _time(m.tpot.p50), f"p90 {_plain(m.tpot.p90)}"),
        ("End to end, median", _time(m.e2e.p50), f"p90 {_plain(m.e2e.p90)}, max {_plain(m.e2e.max)}"),
        ("In the queue, median", _time(m.queue_time.p50), f"p90 {_plain(m.queue_time.p90)}"),
        ("Output tokens per second", f"{tokens / m.duration:,.0f}" if m.duration else NONE, f"{tokens:,} tokens in {seconds(m.duration)}"),
        ("Tokens in a step, mean", f"{m.mean_batch:.1f}" if m.num_steps else NONE, count(m.num_steps, "step")),
        ("Preemptions", str(m.num_preemptions) if level >= 1 else NONE, f"{m.recomputed_tokens:,} tokens computed again"),
        ("KV blocks, most in use", str(m.max_kv_blocks) if level >= 1 else NONE, f"of {total}; {percent(m.prefix_hit_rate)} prefix hits"),
    ]
    cells = (f"<div class=tile><span>{name}</span><b>{value}</b><small>{note}</small></div>" for name, value, note in shown)
    missing = "" if level >= 2 else f"<p class=note>Log level {level} does not hold everything: a dash means not recorded.</p>"
    return f"<div class=tiles>{''.join(cells)}</div>{missing}"


def _time(value: float | None) -> str:
    return NONE if value is None else seconds(value)


def _plain(value: float | None) -> str:
    return "-" if value is None else seconds(value)


# ------------------------------------------------------------------------------------------- why
_DOTS = {"queued": "waiting", "prompt": "prefill", "decode": "decode", "preempted": "preempted", "recompute": "prefill"}


def why_section(run: Run, why: Sequence[str]) -> str:
    """Why a request was late: the given sentences, or the stretches of the life of the latest one."""
    if why:
        items = "".join(f"<li>{_said(sentence)}</li>" for sentence in why)
        return f"<section id=why><h2>Why was it late?</h2><ol class='card why'>{items}</ol></section>"
    late = [(e.t - run.requests[e.request].arrival, e.request) for e in run.events(ev.FirstToken)]
    if not late:
        return "<section id=why><h2>Why was it late?</h2><p class=note>No request got a first token in this run.</p></section>"
    name = max(late)[1]
    story = run.why(name)
    items = "".join(_stretch(stretch, sum(story.parts.values())) for stretch in story.stretches)
    heading = f"Why did {_text(name)} wait longest for its first token?"
    return (f"<section id=why><h2>{heading}</h2><div class=card><p>{_said(story.headline)}</p><ol class=why>{items}</ol>"
            f"<p class=sub>In Python: <code>run.why({_text(repr(name))})</code></p></div></section>")  # fmt: skip


def _said(sentence: str) -> str:
    """A sentence of the log, with the sign for micro."""
    return _text(re.sub(r"(?<=\d) us\b", " µs", sentence))


def _stretch(stretch: Any, total: float) -> str:
    share = percent(stretch.seconds / total) if total else "all"
    sentences = "".join(f"<p>{_said(s)}</p>" for s in stretch.sentences)
    return (f"<li class={_DOTS[stretch.kind]}><b>{_text(TITLES[stretch.kind])}</b> <span class=when>{_text(seconds(stretch.seconds))},"
            f" {share} of its life, from {_text(seconds(stretch.start))} to {_text(seconds(stretch.end))}</span>{sentences}</li>")  # fmt: skip


# -------------------------------------------------------------------------------------- requests
def request_section(run: Run, texts: Texts) -> str:
    """A row a request: its life as a bar, its latencies, and its texts if there are any."""
    spans, outputs = request_spans(run), output_tokens(run)
    columns = ["request", "life", "tokens", "first token", "end to end", "preempted"]
    columns += ["verified"] * bool(texts.verdicts) + ["text"] * bool(texts.prompts or texts.answers)
    names = list(spans)[:MAX_REQUESTS]
    end = max((own[-1].end for own in spans.values() if own), default=0.0)
    start = min((own[0].start for own in spans.values() if own), default=0.0)
    rows = (_row(run.requests[n], outputs[n], _bar(spans[n], start, end), texts, columns) for n in names)
    more = f"<p class=note>The first {len(names)} of {len(spans)} requests.</p>" if len(names) < len(spans) else ""
    right = f" {sum(texts.verdicts.values())} of {len(texts.verdicts)} answers were verified as right." if texts.verdicts else ""
    note = f"<p class=sub>In order of arrival; tokens are prompt → output.{right}</p>"
    return f"<section id=requests><h2>Requests</h2>{note}{_table(columns, rows, 'No request arrived in this run.')}{more}</section>"


def _row(r: RequestMetrics, num_output: int, bar: str, texts: Texts, columns: Sequence[str]) -> Iterable[str]:
    cells = {
        "request": f"<b>{_text(r.request)}</b>" + ("" if r.finish_reason in ("stop", "length") else f"<br><small>{_text(r.finish_reason or 'unfinished')}</small>"),
        "life": bar, "tokens": f"{r.num_prompt_tokens} → {num_output}", "first token": _time(r.ttft), "end to end": _time(r.e2e),
        "preempted": str(r.num_preemptions or ""), "verified": _verdict(texts.verdicts.get(r.request)),
        "text": _long("ask", texts.prompts.get(r.request)) + _long("say", texts.answers.get(r.request)),
    }  # fmt: skip
    return [cells[name] for name in columns]


def _bar(spans: Sequence[RequestSpan], start: float, end: float) -> str:
    """A request's life on the time axis of the run."""
    whole = (end - start) or 1.0
    parts = "".join(f'<i class={s.kind} style="left:{100 * (s.start - start) / whole:.2f}%;width:{100 * s.seconds / whole:.2f}%"></i>'
                    for s in merge_spans(spans))  # fmt: skip
    return f"<div class=life>{parts}</div>"


def _verdict(right: bool | None) -> str:
    if right is None:
        return NONE
    return "<b class=right>right</b>" if right else "<b class=wrong>wrong</b>"


def _long(kind: str, text: str | None) -> str:
    """A prompt ("ask") or an answer ("say")."""
    if text is None:
        return ""
    cut = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ... ({len(text):,} characters)"
    return f"<div class={kind}>{_text(cut)}</div>"


def _table(columns: Sequence[str], rows: Iterable[Iterable[str]], empty: str) -> str:
    kinds = [f"c-{column.split()[0]}" for column in columns]
    body = "".join(f"<tr>{''.join(f'<td class={k}>{cell}</td>' for k, cell in zip(kinds, row))}</tr>" for row in rows)
    if not body:
        return f"<p class=note>{empty}</p>"
    head = "".join(f"<th class={k}>{c}</th>" for k, c in zip(kinds, columns))
    return f"<div class='card scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


# ------------------------------------------------------------------------------------- decisions
def decision_section(run: Run) -> str:
    """The last preemptions with what else was possible and at which predicted cost, then all seams in numbers."""
    content = "".join(_decisions(run))
    return f"<section id=decisions><h2>What was decided, and what else was possible</h2>{content}</section>"


def _decisions(run: Run) -> Iterator[str]:
    if run.started.level < 1:
        yield "<p class=note>Log level 0 records no decisions. Run with log_level=2 for each with its alternatives.</p>"
        return
    preemptions = run.events(ev.RequestPreempted)
    if not preemptions:
        yield "<p class=note>No request was preempted in this run.</p>"
    else:
        last = preemptions[-MAX_PREEMPTIONS:]
        which = f"The last {len(last)} of {count(len(preemptions), 'preemption')}" if len(last) < len(preemptions) else f"{count(len(last), 'preemption')}"
        yield f"<p class=sub>{which}; times in brackets are predicted costs of bringing the request back.</p>"
        yield _table(["time", "preempted", "in favour of", "instead of", "mode", "instead of mode"],
                     (_preemption(run, e, _tiering(run, e)) for e in last), "")  # fmt: skip
    if run.started.level < 2:
        yield "<p class=note>The alternatives of each decision are recorded from log_level=2 on.</p>"
        return
    yield f"<p class=sub>All decisions</p>{_table(['seam', 'policy', 'decisions', 'the last one'], _seams(run), 'No policy had to decide anything.')}"


def _preemption(run: Run, event: ev.RequestPreempted, tiering: ev.Decision | None) -> Iterable[str]:
    victim = run.event(event.cause) if event.cause >= 0 else None
    victim = victim if isinstance(victim, ev.Decision) else None
    redo = f" ({_cost(victim.predicted)})" if victim is not None and victim.predicted is not None else ""
    lost = f"{count(event.tokens_lost, 'token')} dropped" if event.mode == "recompute" else f"{count(event.num_blocks, 'block')} to the host"
    chosen = f" ({_cost(tiering.predicted)})" if tiering is not None and tiering.predicted is not None else ""
    favoured = "itself: it asked for the blocks" if event.beneficiary == event.request else _text(event.beneficiary or "nobody: the device lost its memory")
    return [seconds(event.t), f"<b>{_text(event.request)}</b>{redo}", favoured, _options(victim),
            f"{event.mode}{chosen}<br><small>{lost}</small>", _options(tiering)]  # fmt: skip


def _tiering(run: Run, event: ev.RequestPreempted) -> ev.Decision | None:
    """The choice between recompute and swap, logged just before the preemption with the same cause."""
    before = run.log_events[max(0, event.seq - run.log_events[0].seq - 3) : event.seq - run.log_events[0].seq]
    return next((e for e in before if isinstance(e, ev.Decision) and e.seam == "tiering" and e.cause == event.cause), None)


def _options(decision: ev.Decision | None) -> str:
    if decision is None:
        return NONE
    notes = []
    for option in decision.alternatives:
        cost = f" ({_cost(option.predicted)})" if option.predicted is not None else ""
        reason = f", {option.why_not}" if option.why_not else ""
        notes.append(_text(f"{option.option}{cost}{'' if option.feasible else ': not possible'}{reason}"))
    return "<br>".join(notes) or "nobody else"


def _cost(cost: Any) -> str:
    return seconds(cost.seconds)


def _seams(run: Run) -> Iterator[Iterable[str]]:
    last: dict[tuple[str, str], ev.Decision] = {}
    counts: dict[tuple[str, str], int] = {}
    for event in run.events(ev.Decision):
        key = (event.seam, event.policy)
        counts[key], last[key] = counts.get(key, 0) + 1, event
    for (seam, policy), event in last.items():
        said = f"{event.request + ': ' if event.request else ''}{event.chosen}" + (f", because {event.reason}" if event.reason else "")
        yield [_text(seam), _text(policy), f"{counts[seam, policy]:,}", _text(said[:240])]
