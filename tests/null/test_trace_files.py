"""Trace files: what is written is read again; what is damaged is cut off and named; a full disk stops no run."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from simlab import expected_tokens, greedy, run_to_end, sim_engine, specs

from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.events.trace import Run
from llmlab.events.tracefile import read_trace
from llmlab.types import LabError, RequestError, SamplingParams, TraceError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def engine_after_work(**fields: Any) -> Engine:
    engine = sim_engine(**{"num_blocks": 8, "block_size": 2, "tiering": "swap", **fields})
    for i in range(6):
        engine.add_request([i % 2] * 4 + [i], greedy(7, ignore_eos=True), metadata={"output_len": 5, "tag": "é\n\u2028"})
    with pytest.raises(RequestError):
        engine.add_request([], greedy(1))
    run_to_end(engine, 400)
    engine.close()
    return engine


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The lines of a whole trace."""
    path = tmp_path_factory.mktemp("trace") / "run.jsonl"
    engine_after_work(trace=str(path))
    return Lines(path.read_bytes().splitlines(keepends=True))


class Lines(list[bytes]):
    """Shown by its length, where a failing example is printed."""

    def __repr__(self) -> str:
        return f"<{len(self)} lines>"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("log_level", [0, 1, 2, 3, 4])
def test_a_trace_written_while_running_and_a_saved_run_hold_the_same_events(
    suffix: str, log_level: int, tmp_path: Path
) -> None:
    live, saved = tmp_path / f"live{suffix}", tmp_path / f"saved{suffix}"
    engine = engine_after_work(trace=str(live), log_level=log_level)
    events = tuple(engine.log)
    run = Run(events)
    run.save(saved)
    assert Run.load(live).log_events == Run.load(saved).log_events == events
    assert Run.load(live).cut == ""
    assert live.read_bytes()[:2] == {".jsonl": b'{"', ".jsonl.gz": b"\x1f\x8b", ".jsonl.zst": b"\x28\xb5"}[suffix]


def test_every_kind_of_event_survives_the_file(tmp_path: Path) -> None:
    """Events with all fields drawn at random from their types."""
    import msgspec

    events: list[ev.Event] = [ev.RunStarted(seq=0, t=0.0)]
    rng = random.Random(3)
    for kind in ev.EVENT_TYPES.values():
        fields = {f.name: _sample(f.type, rng) for f in msgspec.structs.fields(kind) if f.name not in ("seq", "schema")}
        events.append(kind(seq=len(events), **fields))
    run = Run(events)
    run.save(tmp_path / "all.jsonl.zst")
    assert Run.load(tmp_path / "all.jsonl.zst").log_events == tuple(events)


def _sample(kind: Any, rng: random.Random) -> Any:
    """A value of a field's type."""
    import msgspec

    info = msgspec.inspect.type_info(kind)
    return _value(info, rng)


def _value(info: Any, rng: random.Random) -> Any:
    import msgspec

    mi = msgspec.inspect
    if isinstance(info, mi.UnionType):
        return _value(rng.choice([t for t in info.types if not isinstance(t, mi.NoneType)]), rng)
    if isinstance(info, mi.StructType):
        return info.cls(**{f.name: _value(f.type, rng) for f in info.fields if f.required or not isinstance(f.type, mi.AnyType)})
    if isinstance(info, mi.VarTupleType):
        return tuple(_value(info.item_type, rng) for _ in range(rng.randint(0, 2)))
    if isinstance(info, mi.TupleType):
        return tuple(_value(t, rng) for t in info.item_types)
    if isinstance(info, (mi.DictType,)):
        return {_value(info.key_type, rng): _value(info.value_type, rng)}
    if isinstance(info, mi.NamedTupleType):
        return info.cls(*(_value(f.type, rng) for f in info.fields))
    if isinstance(info, mi.LiteralType):
        return rng.choice(info.values)
    if isinstance(info, mi.EnumType):
        return rng.choice(list(info.cls))
    simple = {mi.IntType: 3, mi.FloatType: 0.25, mi.StrType: "é\"\n", mi.BoolType: True, mi.AnyType: {"a": [1, "b", None]}}
    return simple[type(info)]


# ------------------------------------------------------------------------------------------- damage
def test_the_first_line_tells_the_schema(lines: list[bytes]) -> None:
    first = json.loads(lines[0])
    assert (first["event"], first["schema"]) == ("RunStarted", ev.SCHEMA)


@pytest.mark.parametrize("schema", [None, 0, 99, "x"])
def test_a_trace_of_another_schema_is_refused_with_the_way_out(schema: Any, lines: list[bytes], tmp_path: Path) -> None:
    first = json.loads(lines[0])
    first["schema"], first["code"] = schema, "0.0.9"
    if schema is None:
        del first["schema"]
    path = tmp_path / "old.jsonl"
    path.write_bytes(json.dumps(first).encode() + b"\n" + b"".join(lines[1:]))
    with pytest.raises(TraceError) as caught:
        Run.load(path)
    assert "old.jsonl" in str(caught.value) and "schema" in str(caught.value) and "0.0.9" in str(caught.value)


def test_files_that_are_no_traces_are_refused_by_name(tmp_path: Path, lines: list[bytes]) -> None:
    bad: dict[str, bytes] = {
        "empty.jsonl": b"", "text.jsonl": b"hello\n", "binary.jsonl": bytes(range(256)), "null.jsonl": b"null\n",
        "list.jsonl": b"[1]\n", "other.jsonl": b'{"event": "FirstToken", "seq": 0, "t": 0}\n', "tail.jsonl": lines[3],
        "not_gzip.jsonl.gz": lines[0], "not_zst.jsonl.zst": lines[0], "empty.jsonl.zst": b"", "empty.jsonl.gz": b"",
        "deep.jsonl": b"[" * 100_000, "wrong_types.jsonl": b'{"event": "RunStarted", "schema": 1, "seq": "x", "t": 0}\n',
    }  # fmt: skip
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TraceError, match=name.replace(".", r"\.")):
            Run.load(tmp_path / name)
    with pytest.raises(TraceError, match="does not exist"):
        Run.load(tmp_path / "missing.jsonl")
    with pytest.raises(TraceError):
        Run.load(tmp_path)


def test_a_damaged_tail_is_cut_off_and_named(lines: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    for end in (b'{"event":"Fir', b"\x00\xff\x00", b'{"event":"Nonsense","seq":9,"t":0}\n', b"[]\n", b"\n"):
        path.write_bytes(b"".join(lines[:9]) + end)
        loaded = read_trace(path)
        assert len(loaded.events) == 9 and loaded.cut.startswith("line 10 ")
    path.write_bytes(b"".join(lines[:9] + lines[10:]))
    loaded = read_trace(path)
    assert len(loaded.events) == 9 and loaded.cut == "line 10 is event 10, event 9 is missing"
    path.write_bytes(b"".join(lines[:9] + lines[8:]))
    assert len(read_trace(path).events) == 9


@given(data=st.data(), suffix=st.sampled_from(SUFFIXES))
def test_whatever_is_damaged_the_events_before_it_are_right(data: st.DataObject, suffix: str, lines: list[bytes],
                                                            tmp_path_factory: pytest.TempPathFactory) -> None:  # fmt: skip
    """Cut, flip and insert bytes anywhere: an honest error, or a prefix of the true events."""
    whole = b"".join(lines)
    packed = {".jsonl": whole, ".jsonl.gz": gzip.compress(whole), ".jsonl.zst": zstandard.compress(whole)}[suffix]
    damage = data.draw(st.sampled_from(["cut", "flip", "insert"]))
    at = data.draw(st.integers(0, len(packed) - 1))
    if damage == "cut":
        packed = packed[:at]
    elif damage == "flip":
        packed = packed[:at] + bytes([packed[at] ^ data.draw(st.integers(1, 255))]) + packed[at + 1 :]
    else:
        packed = packed[:at] + data.draw(st.binary(min_size=1, max_size=9)) + packed[at:]
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    path.write_bytes(packed)
    try:
        loaded = Run.load(path)
    except LabError:
        return
    assert len(loaded.log_events) <= len(lines)
    if damage == "cut":
        assert loaded.cut or suffix == ".jsonl"
        path.with_suffix(".whole").write_bytes(b"".join(lines[: len(loaded.log_events)]))
        assert loaded.log_events == Run.load(path.with_suffix(".whole")).log_events


# ------------------------------------------------------------------------------------ full disks
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_ends_the_trace_and_not_the_run(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tmp_path / f"full{suffix}"
    full.symlink_to("/dev/full")
    engine = sim_engine(trace=str(full), num_blocks=8)
    rng = random.Random(5)
    for i in range(40):
        engine.add_request([rng.randrange(500) for _ in range(20)], greedy(6, ignore_eos=True), metadata={"n": rng.random(), "i": i})
    done = run_to_end(engine, 2000)
    engine.close()
    assert len(done) == 40
    for name, spec in specs(engine).items():
        assert done[name].outputs[0].token_ids == expected_tokens(engine, spec)
    said = capsys.readouterr().err
    assert said.count("llmlab: the trace") == 1 and "No space left on device" in said and str(full) in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_saving_a_run_to_a_full_disk_is_an_error(suffix: str, tmp_path: Path) -> None:
    full = tmp_path / f"full{suffix}"
    full.symlink_to("/dev/full")
    with pytest.raises(TraceError, match="No space left on device"):
        Run.of(engine_after_work().log).save(full)


def test_what_no_file_can_hold_ends_the_trace_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plug-in whose reason is no text that can be written."""
    from llmlab.seams import Admit

    class Surrogate:
        name = "surrogate"

        def admit(self, view: Any, request: Any, need: Any) -> Admit:
            return Admit("\ud800")

    path = tmp_path / "run.jsonl"
    engine = sim_engine(trace=str(path), admission=Surrogate())
    engine.add_request([1, 2], greedy(3))
    assert len(run_to_end(engine, 50)) == 1
    engine.close()
    assert capsys.readouterr().err.count("the trace") == 1
    assert len(Run.load(path).log_events) >= 1


def test_closing_twice_and_aborting_after_the_end_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl.zst"
    with sim_engine(trace=str(path)) as engine:
        engine.add_request([1, 2], SamplingParams(max_tokens=2))
        run_to_end(engine, 20)
        engine.close()
    assert Run.load(path).log_events == tuple(engine.log)


def test_a_log_whose_beginning_fell_out_of_the_ring_says_so() -> None:
    engine = sim_engine(log_capacity=20)
    engine.add_request([1, 2], greedy(30, ignore_eos=True))
    run_to_end(engine, 100)
    with pytest.raises(TraceError, match="log_capacity"):
        Run.of(engine.log)
