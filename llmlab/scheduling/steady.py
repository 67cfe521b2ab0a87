"""Leaps: many steps at once, while everybody who runs goes on, nobody can be let in and nothing else can change.

    ... decode decode decode decode | finish          one leap up to the first finish, arrival or shortage

Only an executor that knows the future can be leapt with: a simulated one, which says what a step costs and which tokens
come. A leap does what as many turns of the engine's loop do: blocks are taken and made findable in the same order, and at
level 2 the log holds the same events. Below level 2, where the log holds no plans, a leap is one `Leapt` event, and each
request's tokens are released in one event with their times.

Policies are not asked during a leap, so those that would be must have promised their answer: a composer by defining
`cuts`, a placement and a decoding method by `steady = True`, in the class that defines the answer itself.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from typing import Protocol

from llmlab.decoding.autoregressive import TokenStop
from llmlab.events import catalog as ev
from llmlab.scheduling.scheduler import Policies, Scheduler, Update
from llmlab.seams import Limits
from llmlab.types import Durations, FinishReason, ItemResult, Request, Sequence, Span, StepPlan, StepResult, WorkItem

LONGEST = 64  # steps in a leap, and tokens that are looked up ahead at once


class Future(Protocol):
    """What only a simulated executor knows."""

    def start(self) -> float | None:
        """When the next step would begin; None if it depends on more than the step itself."""
        ...

    def tokens(self, request: Request, position: int, count: int) -> AbstractSequence[int]: ...

    def seconds(self, seen: AbstractSequence[int], chunks: AbstractSequence[Span], logits: int) -> float:
        """Of a step with one new token for each of `seen` (tokens that it sees, itself included) and chunks of prompts."""
        ...

    def pass_to(self, t: float) -> None:
        """The steps before `t` are done, and it is `t` now."""
        ...


class Script:
    """The output of one request that is known ahead: `tokens[i]` is its output number `first + i`; it ends with output
    number `last`, for `reason`, if that is known."""

    __slots__ = ("first", "last", "reason", "tokens")

    def __init__(self, first: int) -> None:
        self.first = first
        self.tokens: list[int] = []
        self.last: int | None = None
        self.reason: FinishReason | None = None


class Row:
    """One running request in a leap. Before step j it has computed `base + j` tokens if it decodes, `base` if part of its
    prompt is `left`. Its output of step j is number `output` + j; `since` is the step that gave its first one in this leap
    if it began in its prompt, else -1."""

    __slots__ = ("base", "left", "order", "output", "script", "seq", "since")

    script: Script

    def __init__(self, order: int, seq: Sequence) -> None:
        self.order, self.seq, self.since = order, seq, -1
        length, self.base = len(seq.token_ids), seq.num_computed_tokens
        self.left = length - self.base
        self.output = length - seq.num_prompt_tokens

    def token(self, j: int) -> int:
        return self.script.tokens[self.output + j - self.script.first]

    def ends(self) -> int:
        """The number of steps after which it finishes, or after which its tokens are not known."""
        script = self.script
        return (script.first + len(script.tokens) if script.last is None else script.last + 1) - self.output

    def sync(self, j: int) -> None:
        """Append the tokens that came before step `j`."""
        ids, script = self.seq.token_ids, self.script
        start = len(ids) - self.seq.num_prompt_tokens - script.first
        ids.extend(script.tokens[start : self.output + j - script.first])


class Steady:
    """Leaps with one scheduler. See the module's text."""

    def __init__(self, scheduler: Scheduler, future: Future) -> None:
        self._scheduler, self._future = scheduler, future
        self._scripts: dict[str, Script] = {}
        self._policies: Policies | None = None
        self._promised = False

    def leap(self, horizon: float) -> list[Update] | None:
        """Go on until something can change, at most until the first step that begins at `horizon` or later. None: not even
        the next step is foreseeable."""
        start = self._future.start()
        if start is None or not self._calm():
            return None
        rows = self._rows()
        if rows is None:
            return None
        kind = _LoggedLeap if self._scheduler.log.wants(ev.StepPlanned) else _SilentLeap
        leap = kind(self._scheduler, self._future, rows, start)
        if not leap.run(horizon):
            return None
        if len(self._scripts) > 64 + 2 * len(self._scheduler.sequences):  # of requests that have ended
            self._scripts = {name: self._scripts[name] for name in self._scheduler.sequences if name in self._scripts}
        return leap.updates

    def _calm(self) -> bool:
        """Whether nobody has to be asked anything before the next step."""
        s = self._scheduler
        if s.log.level > 2 or s.inflight or not s.running or not s.is_settled:
            return False
        if s.policies is not self._policies:
            self._policies, self._promised = s.policies, promised(s.policies)
        return self._promised and (not len(s.waiting) or self._queue_is_stuck())

    def _queue_is_stuck(self) -> bool:
        """Whether all seats are taken and the queue knows it; nobody is asked then."""
        s = self._scheduler
        refresh = getattr(s.policies.ordering.policy, "refresh", "arrival")
        full = len(s.running) >= s.limits.max_num_seqs
        return full and refresh != "step" and s.waiting.head(1)[0].waiting_reason == "seats"

    def _rows(self) -> list[Row] | None:
        """The running requests in their order; None if one would write to a block that it shares, or owns more than it
        has filled, or is about to begin its output."""
        memory = self._scheduler.memory
        tables, refs, size, scripts = memory.tables, memory.pool.refs, memory.block_size, self._scripts
        rows = []
        for order, seq in enumerate(self._scheduler.running.values()):
            name = seq.request.id
            blocks, computed = tables[name].block_ids, seq.num_computed_tokens
            if len(blocks) != -(-computed // size) or (computed % size and refs[blocks[-1]] > 1):
                return None
            row = Row(order, seq)
            if row.left == 1 and not row.output:  # the last token of a prompt: stands among the decodes, but is none
                return None
            script = scripts.get(name)
            if script is None or script.last is None or script.first + len(script.tokens) < row.output:
                script = self._script(seq, row.output)
            row.script = script
            rows.append(row)
        return rows

    def _script(self, seq: Sequence, number: int) -> Script:
        """What comes from output `number` on, known for some steps ahead at least."""
        script = self._scripts.get(seq.request.id)
        if script is None or script.first + len(script.tokens) < number:  # unknown, or left behind by ordinary steps
            script = self._scripts[seq.request.id] = Script(number)
        known = script.first + len(script.tokens)
        if script.last is None and known - number < LONGEST // 4:
            request = seq.request
            more = self._future.tokens(request, request.num_prompt_tokens + known, LONGEST)
            stop = TokenStop().first(request, more, known)
            if stop is not None:
                script.last, script.reason = known + stop.at, stop.reason
                more = more[: stop.at + 1]
            del script.tokens[: number - script.first]
            script.first = number
            script.tokens.extend(more)
        return script


def promised(policies: Policies) -> bool:
    """Whether all policies that a step asks have promised their answers for leaps."""
    asked = ((policies.composer.policy, "compose", "cuts"), (policies.placement.policy, "place", "steady"),
             (policies.decoding.policy, "work", "steady"), (policies.decoding.policy, "accept", "steady"))  # fmt: skip
    return type(policies.stop_rule) is TokenStop and all(_promises(*each) for each in asked)


def _promises(policy: object, method: str, mark: str) -> bool:
    """Whether the very class that defines `method` defines `mark`: whoever overrides the one must renew the other."""
    owner = next((kind for kind in type(policy).__mro__ if method in vars(kind)), None)
    return owner is not None and bool(vars(owner).get(mark)) and method not in getattr(policy, "__dict__", {})


# ------------------------------------------------------------------------------------------- leaps
class _Leap:
    """One leap. `_decoding` and `_prompts` are in the order in which the requests run; `_by_phase[p]` are the decoding
    rows that take a block in the steps j with (j + p) % block_size == 0."""

    def __init__(self, scheduler: Scheduler, future: Future, rows: AbstractSequence[Row], start: float) -> None:
        self.updates: list[Update] = []
        self._s, self._future = scheduler, future
        self._memory, self._size = scheduler.memory, scheduler.memory.block_size
        self._t = start
        self._decoding: list[Row] = []
        self._prompts = [row for row in rows if row.left > 1]
        self._by_phase: dict[int, list[Row]] = {}
        self._end = LONGEST
        for row in rows:
            if row.left == 1:
                self._join(row)

    def _join(self, row: Row) -> None:
        """From now on the row decodes."""
        self._decoding.append(row)
        self._by_phase.setdefault(row.base % self._size, []).append(row)
        self._end = min(self._end, row.ends())

    def run(self, horizon: float) -> bool:
        """Take steps; whether there was one."""
        j = 0
        while j < self._end and not (j and self._t >= horizon):
            chunks = self._chunks()
            if chunks is None or not self._take_blocks(j, chunks):
                break
            self._step(j, chunks)
            j += 1
        if j:
            self._close(j)
        return j > 0

    def _chunks(self) -> list[tuple[Row, int]] | None:
        """How much of each prompt in progress the next step computes; None if that is not foreseeable."""
        limits: Limits = self._s.limits
        room = limits.max_num_batched_tokens - len(self._decoding)
        if room < 0:
            return None
        if not self._prompts:
            return []
        left = [row.left for row in self._prompts]
        cuts = self._s.policies.composer.policy.cuts(len(self._decoding), left, limits)  # type: ignore[attr-defined]
        if cuts is None or min(left) == 1 or len(cuts) != len(left) or sum(cuts) > room:
            return None
        if not all(0 <= cut <= most for cut, most in zip(cuts, left)):
            return None
        return [(row, cut) for row, cut in zip(self._prompts, cuts) if cut]

    def _take_blocks(self, j: int, chunks: AbstractSequence[tuple[Row, int]]) -> bool:
        """Blocks for one step, in the order of its items; False if there are not enough."""
        memory, size = self._memory, self._size
        takers = self._by_phase.get(-j % size, ())
        owned = memory.num_blocks_of
        fresh = [max(0, -(-(row.base + cut) // size) - owned(row.seq.request.id)) for row, cut in chunks]
        if len(takers) + sum(fresh) > memory.pool.num_free:
            return False
        for row in takers:
            memory.extend(row.seq, 1)
        for (row, _), count in zip(chunks, fresh):
            memory.extend(row.seq, count)
        return True

    def _keep_blocks(self, j: int) -> None:
        """Decoding rows whose block this step filled make it findable."""
        if self._memory.caching:
            for row in self._by_phase.get((-j - 1) % self._size, ()):
                row.sync(j)
                self._memory.commit(row.seq, row.base + j + 1)

    def _step(self, j: int, chunks: AbstractSequence[tuple[Row, int]]) -> None:
        raise NotImplementedError

    def _close(self, count: int) -> None:
        raise NotImplementedError


class _SilentLeap(_Leap):
    """A leap below level 2: of the steps themselves nothing is logged."""

    def __init__(self, scheduler: Scheduler, future: Future, rows: AbstractSequence[Row], start: float) -> None:
        super().__init__(scheduler, future, rows, start)
        self._began = start
        self._times: list[float] = []
        self._late: list[Row] = []
        self._num_tokens = self._most_used = self._used = 0
        self._seconds = 0.0

    def _step(self, j: int, chunks: AbstractSequence[tuple[Row, int]]) -> None:
        decoding = self._decoding
        done = [row for row, cut in chunks if cut == row.left]
        seen = [row.base + j + 1 for row in decoding]
        spans = [Span(row.base, row.base + cut) for row, cut in chunks]
        seconds = self._future.seconds(seen, spans, len(decoding) + len(done))
        self._t += seconds
        self._seconds += seconds
        self._times.append(self._t)
        self._num_tokens += len(decoding) + sum(cut for _, cut in chunks)
        self._keep_blocks(j)
        for row, cut in chunks:
            row.base += cut
            row.left -= cut
            row.seq.num_computed_tokens = row.base
            self._memory.commit(row.seq, row.base)
        if done:
            self._begin_decoding(j, done)
        self._most_used, self._used = max(self._most_used, self._used), self._memory.num_used  # the last counts what remains

    def _begin_decoding(self, j: int, done: AbstractSequence[Row]) -> None:
        """These rows got their first token from step `j`, and decode from the next one on."""
        self._prompts = [row for row in self._prompts if row.left]
        self._s.log.step = self._s.next_step + j
        self._future.pass_to(self._t)
        first = [row for row in done if not row.output]
        for row in done:
            row.left, row.since = 1, j
            row.base -= j + 1
            row.output -= j
            self._join(row)
        self._decoding.sort(key=_order)
        for rows in self._by_phase.values():
            rows.sort(key=_order)
        if self._end == j + 1:  # somebody ends with this step: then each row's events come in its turn
            self._late = first
        else:
            self._tell_first(first)

    def _tell_first(self, rows: AbstractSequence[Row]) -> None:
        for row in rows:
            self._s.log.emit(ev.FirstToken, row.seq.request.id)

    def _close(self, count: int) -> None:
        s, log = self._s, self._s.log
        log.step = s.next_step + count - 1
        self._future.pass_to(self._t)
        times = tuple(self._times)
        for row in sorted(self._decoding, key=lambda row: row.since == count - 1):  # the last step's prompts came last in it
            self._release(row, count, times)
        s.next_step += count
        s.hash.forget()
        log.emit(ev.Leapt, num_steps=count, num_tokens=self._num_tokens, seconds=self._seconds,
                 used_blocks=max(self._most_used, self._memory.num_used))  # fmt: skip

    def _release(self, row: Row, count: int, times: tuple[float, ...]) -> None:
        seq, script = row.seq, row.script
        since = max(0, row.since)
        tokens = tuple(script.tokens[row.output + since - script.first : row.output + count - script.first])
        row.sync(count)
        seq.num_computed_tokens = row.base + count
        if row in self._late:
            self._tell_first([row])
        self._s.log.emit_tokens(seq.request.id, -1, tokens, times[since:] if since else times)
        reason = script.reason if script.last == row.output + count - 1 else None
        if reason is not None:
            self._s.end(seq, reason)
        self.updates.append(Update(seq.request.id, tokens, None, reason))


def _order(row: Row) -> int:
    return row.order


class _LoggedLeap(_Leap):
    """A leap at level 2: every step leaves the events that the engine's loop leaves. Decoding only."""

    def _chunks(self) -> list[tuple[Row, int]] | None:
        return super()._chunks() if not self._prompts else None

    def _step(self, j: int, chunks: AbstractSequence[tuple[Row, int]]) -> None:
        s, decoding = self._s, self._decoding
        s.log.step = s.next_step
        items = tuple([WorkItem(row.seq.request.id, Span(row.base + j, row.base + j + 1)) for row in decoding])
        cause = s.tell_plan(StepPlan(s.next_step, items), self._t)
        seconds = self._future.seconds([row.base + j + 1 for row in decoding], (), len(decoding))
        self._t += seconds
        self._future.pass_to(self._t)
        self._keep_blocks(j)
        results = tuple([self._release(row, j, cause) for row in decoding])
        s.next_step += 1
        s.tell_finish(StepResult(s.next_step - 1, results, Durations(seconds)), cause, len(decoding))

    def _release(self, row: Row, j: int, cause: int) -> ItemResult:
        seq, s = row.seq, self._s
        name, tokens = seq.request.id, (row.token(j),)
        seq.cause = cause
        row.sync(j + 1)
        seq.num_computed_tokens = row.base + j + 1
        s.hash.touch(seq)
        s.log.emit_tokens(name, cause, tokens)
        script = row.script
        if script.last == row.output + j and script.reason is not None:
            s.end(seq, script.reason)
        return ItemResult(name, tokens)

    def _close(self, count: int) -> None:
        for row in self._decoding:
            script, last = row.script, row.output + count - 1
            tokens = tuple(script.tokens[row.output - script.first : last + 1 - script.first])
            self.updates.append(Update(row.seq.request.id, tokens, None, script.reason if script.last == last else None))
