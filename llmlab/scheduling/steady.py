"""Leaps: many steps at once, while everybody who runs goes on, nobody can be let in and nothing else can change.

    ... decode decode decode decode | finish          one leap up to the first finish, arrival or shortage

Only an executor that knows the future can be leapt with: a simulated one, which says what a step costs and which tokens
come. A leap does what as many turns of the engine's loop do: blocks are taken and made findable in the same order, and at
level 2 the log holds the same events. Below level 2, where the log holds no plans, a leap is one `Leapt` event, and a
request's tokens are released in one event with their times: at its end, or when somebody wants to see it (`settle`). Who
waits in the queue is let in on the way.

Policies are not asked during a leap, so those that would be must have promised their answer: a composer by defining
`cuts`, a placement and a decoding method by `steady = True`, in the class that defines the answer itself.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from typing import Protocol

from llmlab.decoding.autoregressive import TokenStop
from llmlab.events import catalog as ev
from llmlab.scheduling.core import Policies, Update
from llmlab.scheduling.scheduler import Scheduler
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
    if it began in its prompt, else -1. The tokens of step `told` and later ones are still to be released."""

    __slots__ = ("base", "left", "order", "output", "script", "seq", "since", "told")

    script: Script

    def __init__(self, order: int, seq: Sequence) -> None:
        self.order, self.seq, self.since, self.told = order, seq, -1, 0
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
        self._last: _SilentLeap | None = None

    def leap(self, horizon: float) -> list[Update] | None:
        """Go on until something can change, at most until the first step that begins at `horizon` or later. None: not even
        the next step is foreseeable."""
        start = self._future.start()
        if start is None or not self._calm():
            return None
        leap = self._logged_leap(start) if self._scheduler.log.wants(ev.StepPlanned) else self._silent_leap(start)
        if leap is None or not leap.run(horizon):
            return None
        if len(self._scripts) > 64 + 2 * len(self._scheduler.sequences):  # of requests that have ended
            self._scripts = {name: self._scripts[name] for name in self._scheduler.sequences if name in self._scripts}
        return leap.updates

    def settle(self) -> list[Update]:
        """Release what leaps have produced and kept back. Whoever looks at requests, or changes them, calls this first."""
        last, self._last = self._last, None
        return [] if last is None else last.settle()

    def _logged_leap(self, start: float) -> _Leap | None:
        if len(self._scheduler.waiting) and not is_stuck(self._scheduler):
            return None
        rows = self._rows()
        return None if rows is None else _LoggedLeap(self._scheduler, self._future, rows, start)

    def _silent_leap(self, start: float) -> _Leap | None:
        """The leap before this one, if nothing has happened since, or a new one."""
        if self._last is None or not self._last.goes_on(start):
            early = self.settle()
            assert not early, "somebody went on with what a leap had kept back"
            rows = self._rows()
            self._last = None if rows is None else _SilentLeap(self._scheduler, self._future, rows, start, self.script)
        return self._last

    def _calm(self) -> bool:
        """Whether nobody has to be asked anything before the next step, but for the queue."""
        s = self._scheduler
        if s.log.level > 2 or s.inflight or not s.running or not s.is_settled:
            return False
        if s.policies is not self._policies:
            self._policies, self._promised = s.policies, promised(s.policies)
        return self._promised

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
            if seq.home != "device" or seq.cursor:  # left over from a placement before this one
                return None
            if row.left == 1 and not row.output:  # the last token of a prompt: stands among the decodes, but is none
                return None
            script = scripts.get(name)
            if script is None or script.last is None or script.first + len(script.tokens) < row.output:
                script = self.script(seq, row.output)
            row.script = script
            rows.append(row)
        return rows

    def script(self, seq: Sequence, number: int, untold: int | None = None) -> Script:
        """What comes from output `number` on, known for some steps ahead at least; and from `untold` on, if given."""
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
            kept = number if untold is None else untold
            del script.tokens[: kept - script.first]
            script.first = kept
            script.tokens.extend(more)
        return script


def is_stuck(scheduler: Scheduler) -> bool:
    """Whether all seats are taken and the queue knows it, so that nobody in it is asked anything."""
    s = scheduler
    refresh = getattr(s.policies.ordering.policy, "refresh", "arrival")
    full = len(s.running) >= s.limits.max_num_seqs
    return full and refresh != "step" and s.waiting.head(1)[0].waiting_reason == "seats"


def promised(policies: Policies) -> bool:
    """Whether all policies that a step asks have promised their answers for leaps."""
    asked = ((policies.composer.policy, "compose", "cuts"), (policies.placement.policy, "place", "steady"),
             (policies.decoding.policy, "work", "steady"), (policies.decoding.policy, "accept", "steady"))  # fmt: skip
    if hasattr(policies.placement.policy, "wish"):  # it is asked anew in every step
        return False
    return type(policies.stop_rule) is TokenStop and all(_promises(*each) for each in asked)


def _promises(policy: object, method: str, mark: str) -> bool:
    """Whether the very class that defines `method` defines `mark`: whoever overrides the one must renew the other."""
    owner = next((kind for kind in type(policy).__mro__ if method in vars(kind)), None)
    return owner is not None and bool(vars(owner).get(mark)) and method not in getattr(policy, "__dict__", {})


# ------------------------------------------------------------------------------------------- leaps
class _Leap:
    """One leap. `_decoding` and `_prompts` are in the order in which the requests run; `_by_phase[p]` are the decoding
    rows that take a block in the steps j with (j + p) % block_size == 0. `_end` is the first step that cannot be taken:
    somebody ends with the one before, or its tokens are not known."""

    def __init__(self, scheduler: Scheduler, future: Future, rows: AbstractSequence[Row], start: float) -> None:
        self.updates: list[Update] = []
        self._s, self._future = scheduler, future
        self._memory, self._size = scheduler.memory, scheduler.memory.block_size
        self._t = start
        self._j = self._first = 0
        self._decoding: list[Row] = []
        self._prompts = [row for row in rows if row.left > 1]
        self._by_phase: dict[int, list[Row]] = {}
        self._end = 1 << 60
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
        self._first, last = self._j, min(self._end, self._j + LONGEST)
        while self._j < last and not (self._j > self._first and self._t >= horizon):
            if not self._advance():
                break
            self._j += 1
            last = min(last, self._end)
        if self._j > self._first:
            self._close()
        return self._j > self._first

    def _advance(self) -> bool:
        """One step; False, and nothing done, if it cannot be foreseen."""
        raise NotImplementedError

    def _close(self) -> None:
        """Bring everything up to date with the steps taken."""
        raise NotImplementedError

    def _cuts(self, entering: AbstractSequence[WorkItem]) -> AbstractSequence[int] | None:
        """How much the next step computes of each prompt in progress, and of those that are let in; None if that cannot be
        foreseen."""
        limits: Limits = self._s.limits
        room = limits.max_num_batched_tokens - len(self._decoding)
        if room < 0:
            return None
        if not self._prompts and not entering:
            return ()
        left = [row.left for row in self._prompts]
        if 1 in left:  # the last token of a prompt stands among the decodes
            return None
        left += [item.num_tokens for item in entering]
        cuts: AbstractSequence[int] | None = self._s.policies.composer.policy.cuts(  # type: ignore[attr-defined]
            len(self._decoding), left, limits)  # fmt: skip
        if cuts is None or len(cuts) != len(left) or sum(cuts) > room:
            return None
        return cuts if all(0 <= cut <= most for cut, most in zip(cuts, left)) else None

    def _take_blocks(self, chunks: AbstractSequence[tuple[Row, int]]) -> bool:
        """Blocks for one step, in the order of its items; False if there are not enough."""
        memory, size = self._memory, self._size
        takers = self._by_phase.get(-self._j % size, ())
        if not takers and not chunks:
            return True
        owned = memory.num_blocks_of
        fresh = [max(0, -(-(row.base + cut) // size) - owned(row.seq.request.id)) for row, cut in chunks]
        if len(takers) + sum(fresh) > memory.pool.num_free:
            return False
        for row in takers:
            memory.extend(row.seq, 1)
        for (row, _), count in zip(chunks, fresh):
            memory.extend(row.seq, count)
        return True

    def _keep_blocks(self) -> None:
        """Decoding rows whose block this step filled make it findable."""
        if self._memory.caching:
            for row in self._by_phase.get((-self._j - 1) % self._size, ()):
                row.sync(self._j)
                self._memory.commit(row.seq, row.base + self._j + 1)


class _SilentLeap(_Leap):
    """Leaps below level 2: of the steps themselves nothing is logged. One object serves for many leaps, as long as nothing
    else happens between them."""

    def __init__(self, scheduler: Scheduler, future: Future, rows: AbstractSequence[Row], start: float,
                 script: Callable[..., Script]) -> None:  # fmt: skip
        super().__init__(scheduler, future, rows, start)
        self._script = script
        self._next_step = scheduler.next_step
        self._num_rows = len(rows)
        self._times: list[float] = []  # of the ends of steps from number `_forgotten` on
        self._forgotten = 0
        self._late: list[Row] = []
        self._num_tokens = self._most_used = self._used = 0
        self._seconds = 0.0

    def goes_on(self, start: float) -> bool:
        """Whether everything is as the last leap has left it."""
        s = self._s
        if s.next_step != self._next_step or len(s.running) != len(self._decoding) + len(self._prompts) or start < self._t:
            return False
        self.updates, self._late = [], []
        self._num_tokens = self._most_used = self._used = 0
        self._seconds, self._t = 0.0, start
        if self._j >= self._end:
            for row in self._decoding:
                if row.ends() - self._j < LONGEST // 4 and row.script.last is None:
                    row.script = self._script(row.seq, row.output + self._j, row.output + row.told)
            self._end = min([row.ends() for row in self._decoding], default=1 << 60)
        return True

    def _advance(self) -> bool:
        entering: AbstractSequence[WorkItem] = ()
        if len(self._s.waiting) and not is_stuck(self._s):
            if not self._s.can_admit_plainly:
                return False
            entering = self._admitted()
        cuts = self._cuts(entering)
        if cuts is None:
            return False
        chunks = [(row, cut) for row, cut in zip(self._prompts, cuts) if cut]
        if not self._take_blocks(chunks):
            return False
        if entering:
            chunks += self._let_in(entering, cuts[len(self._prompts) :], cuts)
        self._step(chunks)
        return True

    # ------------------------------------------------------------------------------------ the queue
    def _admitted(self) -> AbstractSequence[WorkItem]:
        """What the queue offers, now that its policies see everybody as they are."""
        for row in self._decoding:
            row.sync(self._j)
            row.seq.num_computed_tokens = row.base + self._j
        self._s.log.step = self._s.next_step + self._j - self._first
        self._future.pass_to(self._t)
        return self._s.offers_of_queue(self._t)

    def _let_in(self, entering: AbstractSequence[WorkItem], cuts: AbstractSequence[int], all_cuts: AbstractSequence[int]
                ) -> list[tuple[Row, int]]:  # fmt: skip
        """Start those that got a part of the step, as far as there is memory."""
        s = self._s
        s.tell_left_out([item for item, cut in zip(entering, cuts) if not cut], len(self._decoding) + sum(all_cuts))
        started = []
        for item, cut in zip(entering, cuts):
            flight = s.start(item.shortened(cut)) if cut else None
            if flight is not None:
                row = Row(self._num_rows, flight.seq)
                row.script = self._script(flight.seq, row.output)
                self._num_rows += 1
                self._prompts.append(row)
                started.append((row, flight.item.num_tokens))
        return started

    # --------------------------------------------------------------------------------------- steps
    def _step(self, chunks: AbstractSequence[tuple[Row, int]]) -> None:
        decoding, j = self._decoding, self._j
        done = [row for row, cut in chunks if cut == row.left]
        seen = [row.base + j + 1 for row in decoding]
        spans = [Span(row.base, row.base + cut) for row, cut in chunks]
        seconds = self._future.seconds(seen, spans, len(decoding) + len(done))
        self._t += seconds
        self._seconds += seconds
        self._times.append(self._t)
        self._num_tokens += len(decoding)
        self._keep_blocks()
        for row, cut in chunks:
            row.base += cut
            row.left -= cut
            row.seq.num_computed_tokens = row.base
            self._num_tokens += cut
            self._memory.commit(row.seq, row.base)
        if done:
            self._begin_decoding(done)
        self._most_used, self._used = max(self._most_used, self._used), self._memory.num_used  # the last counts what remains

    def _begin_decoding(self, done: AbstractSequence[Row]) -> None:
        """These rows got their first token from this step, and decode from the next one on."""
        j = self._j
        self._prompts = [row for row in self._prompts if row.left]
        first = [row for row in done if not row.output]
        for row in done:
            row.left, row.since, row.told = 1, j, j
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
        self._s.log.step = self._s.next_step + self._j - self._first
        self._future.pass_to(self._t)
        for row in rows:
            self._s.log.emit(ev.FirstToken, row.seq.request.id)

    def _close(self) -> None:
        s, log, last = self._s, self._s.log, self._j - 1
        log.step = s.next_step + last - self._first
        self._future.pass_to(self._t)
        ended = [row for row in self._decoding if row.script.last == row.output + last] if self._j == self._end else []
        for row in sorted({*ended, *self._late}, key=lambda row: (row.since == last, row.order)):  # as they stood in the step
            if row in self._late:
                log.emit(ev.FirstToken, row.seq.request.id)
            if row in ended:
                self._release(row)
        for row in ended:
            self._decoding.remove(row)
            self._by_phase[row.base % self._size].remove(row)
        s.next_step = self._next_step = s.next_step + self._j - self._first
        if self._j == self._end:
            self._trim()
        s.hash.forget()
        log.emit(ev.Leapt, num_steps=self._j - self._first, num_tokens=self._num_tokens, seconds=self._seconds,
                 used_blocks=max(self._most_used, self._memory.num_used))  # fmt: skip

    def _trim(self) -> None:
        """Forget the times of steps whose tokens were all released."""
        oldest = min([row.told for row in self._decoding], default=self._j)
        if oldest - self._forgotten > 1024:
            del self._times[: oldest - self._forgotten]
            self._forgotten = oldest

    def _release(self, row: Row) -> None:
        """Commit and tell what a row has produced since it was last told."""
        seq, script, count, start = row.seq, row.script, self._j, row.told
        row.sync(count)
        seq.num_computed_tokens = row.base + count
        if start == count:
            return
        row.told = count
        tokens = tuple(script.tokens[row.output + start - script.first : row.output + count - script.first])
        times = tuple(self._times[start - self._forgotten :])
        self._s.log.emit_tokens(seq.request.id, -1, tokens, times)
        reason = script.reason if script.last == row.output + count - 1 else None
        if reason is not None:
            self._s.end(seq, reason)
        self.updates.append(Update(seq.request.id, tokens, None, reason))

    def settle(self) -> list[Update]:
        """Release everything that was kept back."""
        self.updates = []
        for row in self._decoding:
            self._release(row)
        return self.updates


def _order(row: Row) -> int:
    return row.order


class _LoggedLeap(_Leap):
    """A leap at level 2: every step leaves the events that the engine's loop leaves. Decoding only."""

    def _advance(self) -> bool:
        if self._prompts or self._cuts(()) is None or not self._take_blocks(()):
            return False
        s, decoding, j = self._s, self._decoding, self._j
        s.log.step = s.next_step
        items = tuple([WorkItem(row.seq.request.id, Span(row.base + j, row.base + j + 1)) for row in decoding])
        cause = s.tell_plan(StepPlan(s.next_step, items), self._t)
        seconds = self._future.seconds([row.base + j + 1 for row in decoding], (), len(decoding))
        self._t += seconds
        self._future.pass_to(self._t)
        self._keep_blocks()
        results = tuple([self._release(row, cause) for row in decoding])
        s.next_step += 1
        s.tell_finish(StepResult(s.next_step - 1, results, Durations(seconds)), cause, len(decoding))
        return True

    def _release(self, row: Row, cause: int) -> ItemResult:
        seq, s, j = row.seq, self._s, self._j
        name, tokens = seq.request.id, (row.token(j),)
        seq.cause = cause
        seq.token_ids.append(tokens[0])
        seq.num_computed_tokens = row.base + j + 1
        s.hash.touch(seq)
        s.log.emit_tokens(name, cause, tokens)
        script = row.script
        if script.last == row.output + j and script.reason is not None:
            s.end(seq, script.reason)
        return ItemResult(name, tokens)

    def _close(self) -> None:
        for row in self._decoding:
            script, last = row.script, row.output + self._j - 1
            tokens = tuple(script.tokens[row.output - script.first : last + 1 - script.first])
            self.updates.append(Update(row.seq.request.id, tokens, None, script.reason if script.last == last else None))
