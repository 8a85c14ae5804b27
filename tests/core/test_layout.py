"""Layouts: every preset reads IDs published elsewhere, and no number that does not fit becomes an ID."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Final

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from zflake.core.layout import (
    CALENDAR_END_MS,
    DEFAULT,
    MAX_TICK_MS,
    PRESETS,
    Decomposed,
    Field,
    Layout,
    parse,
    parse_epoch,
)
from zflake.errors import LayoutError, ZflakeError

quick = settings(deadline=None, max_examples=100)

MS = timedelta(milliseconds=1)
UNIX = datetime(1970, 1, 1, tzinfo=UTC)


def at(ms: int) -> datetime:
    """The instant `ms` milliseconds after the Unix epoch."""
    return UNIX + ms * MS


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout that the class takes, from 3 to 64 bits, its end cut by the calendar or not."""
    time = draw(st.integers(1, 62))
    machine = draw(st.integers(1, 63 - time))
    sequence = draw(st.integers(1, 64 - time - machine))
    rest = [Field("machine", machine), Field("sequence", sequence)]
    if draw(st.booleans()):
        rest.reverse()
    tick_ms = draw(st.sampled_from([1, 2, 10, 1000, 60_000, MAX_TICK_MS]) | st.integers(1, MAX_TICK_MS))
    epoch_ms = draw(
        st.sampled_from([0, 1_577_836_800_000, CALENDAR_END_MS - 10 * MAX_TICK_MS])
        | st.integers(0, CALENDAR_END_MS - MAX_TICK_MS)
    )
    return Layout("drawn", (Field("time", time), *rest), epoch_ms, tick_ms)


def fields_of(layout: Layout) -> st.SearchStrategy[tuple[int, int, int]]:
    """Tick, machine and sequence that fit, the bounds included more often than chance would."""

    def below(limit: int) -> st.SearchStrategy[int]:
        return st.sampled_from([0, limit - 1]) | st.integers(0, limit - 1)

    return st.tuples(below(layout.end_tick), below(layout.machines), below(layout.ids_per_tick))


def highest(layout: Layout, tick: int) -> int:
    """The highest ID of a tick."""
    return layout.compose(tick, layout.machines - 1, layout.ids_per_tick - 1)


# --- presets against IDs published elsewhere ---


@pytest.mark.parametrize(
    ("preset", "id_", "time", "machine", "sequence"),
    [
        pytest.param(
            # Discord's developer documentation, "API Reference", section "Snowflakes".
            *("discord", 175928847299117063, "2016-04-30T11:18:25.796Z", 1 << 5 | 0, 7),
            id="discord-documentation",
        ),
        pytest.param(
            # Wikipedia, "Snowflake ID": a tweet of Wikipedia's own account, taken apart bit by bit.
            *("twitter", 1541815603606036480, "2022-06-28T16:07:40.105Z", 378, 0),
            id="twitter-wikipedia",
        ),
        pytest.param(
            # The readme of snowflake-id on PyPI (vd2org/snowflake): `Snowflake.parse(..., 1288834974657)`
            # prints milliseconds 1492960851339, instance 363, seq 15.
            *("twitter", 856165981072306191, "2017-04-23T15:20:51.339Z", 363, 15),
            id="twitter-snowflake-id-readme",
        ),
    ],
)
def test_a_preset_reads_ids_published_elsewhere(
    preset: str, id_: int, time: str, machine: int, sequence: int
) -> None:
    layout = PRESETS[preset]
    parts = layout.decompose(id_)
    assert (parts.id, parts.time) == (id_, datetime.fromisoformat(time))
    assert (parts.machine, parts.sequence) == (machine, sequence)
    assert layout.compose(parts.tick, machine, sequence) == id_


def test_discords_machine_field_is_shown_as_worker_and_process() -> None:
    # "API Reference", "Snowflakes": internal worker ID 1, internal process ID 0.
    assert PRESETS["discord"].decompose(175928847299117063).parts == {"worker": 1, "process": 0}
    both = PRESETS["discord"].compose(0, 3 << 5 | 17, 0)
    assert list(PRESETS["discord"].decompose(both).parts.items()) == [("worker", 3), ("process", 17)]
    assert PRESETS["twitter"].decompose(both).parts == {}


def test_instagram_composes_the_id_of_its_engineering_blog() -> None:
    # "Sharding & IDs at Instagram": 1387263000 ms after its epoch, user 31341 in shard 1341 of 2000, and
    # 5001 IDs drawn before: `id = 1387263000 << (64-41); id |= 1341 << (64-41-13); id |= (5001 % 1024)`.
    published = 1387263000 << 64 - 41 | 1341 << 64 - 41 - 13 | 5001 % 1024
    instagram = PRESETS["instagram"]
    assert instagram.compose(1387263000, 1341, 5001 % 1024) == published
    read = instagram.decompose(published)
    assert (read.tick, read.machine, read.sequence) == (1387263000, 1341, 905)
    # The function in the same article: `our_epoch bigint := 1314220021721` and `(now - our_epoch) << 23`.
    assert read.time == at(1314220021721 + 1387263000)


@pytest.mark.parametrize(
    ("elapsed", "sequence", "machine", "published"),
    # The tests of elciok/sonyflakex (generator_test.exs) for Sonyflake's own order of the fields.
    [(6, 0, 2, 100663298), (5, 35, 2, 86179842)],
)
def test_sonyflake_puts_the_sequence_above_the_machine(
    elapsed: int, sequence: int, machine: int, published: int
) -> None:
    assert PRESETS["sonyflake"].compose(elapsed, machine, sequence) == published


def test_sonyflake_counts_10_ms_since_september_2014() -> None:
    # The readme of ZipFile/python-sonyflake-turbo, which keeps Sonyflake's time field but writes the machine
    # above the counter: 0x0874AD4993 CAFE 04, "1409529600 + 0x874AD4993 / 100 = 2026-03-05T09:15:19.87Z".
    when = datetime.fromisoformat("2026-03-05T09:15:19.87Z")
    turbo = parse("time:39,machine:16,sequence:8@10ms").with_epoch(PRESETS["sonyflake"].epoch_ms)
    read = turbo.decompose(0x0874AD4993CAFE04)
    assert (read.time, read.machine, read.sequence) == (when, 0xCAFE, 4)
    assert PRESETS["sonyflake"].decompose(0x0874AD499304CAFE) == Decomposed(
        0x0874AD499304CAFE, when, 0x0874AD4993, 0xCAFE, 4, {}
    )


def test_a_layout_spelled_out_reads_ids_published_elsewhere() -> None:
    # The readme of thedv91/sonyflake: Sonyflake's fields in ticks of 1 ms since `Date.UTC(2020, 4, 18)`.
    thedv = parse("time:39,sequence:8,machine:16").with_epoch(parse_epoch("2020-05-18T00:00Z"))
    read = thedv.decompose(1211144891006978)
    assert (read.time, read.machine, read.sequence) == (at(1589832189861), 2, 0)
    # The readme of T-PWK/flake-idgen: 42 bits of time, 5 of datacenter, 5 of worker, 12 of counter; the row
    # 0x8c20c0335, 00011b, 00001b, 0x001.
    flake = parse("time:42,machine:10,sequence:12").decompose(0x02308300CD461001)
    assert (flake.tick, flake.machine, flake.sequence) == (0x8C20C0335, 0b00011_00001, 1)


def test_snowcloud_composes_as_its_ancestor_does() -> None:
    # No Snowcloud ID is published; its readme gives 42, 10 and 12 bits since 2020-01-01, and generator.py of
    # breqdev/snowcloud: EPOCH = 1577836800, `(timestamp << 22) | (worker_id << 12) | increment`.
    timestamp, worker_id, increment = 1656432460105 - 1577836800 * 1000, 731, 4095
    ancestor = (timestamp << 22) | (worker_id << 12) | increment
    assert PRESETS["snowcloud"].compose(timestamp, worker_id, increment) == ancestor
    assert PRESETS["snowcloud"].decompose(ancestor).time == at(1656432460105)
    assert DEFAULT is PRESETS["snowcloud"]


def test_clawflake_composes_as_its_readme_says() -> None:
    # No Clawflake ID is published.  The readme of nc0fr/clawflake: time 45, sequence 12, machine 7 bits, "uses
    # all 64 bits".  Its code (id.go, `t<<19 | machineId<<7 | seq`) lets machine and sequence share bits; with
    # either of them 0 the two agree on the time.
    time, sequence, machine = 1683492000123, 0xABC, 0x55
    readme = int(f"{time:045b}{sequence:012b}{machine:07b}", 2)
    assert PRESETS["clawflake"].compose(time, machine, sequence) == readme
    assert PRESETS["clawflake"].decompose(readme).time == at(time)
    assert PRESETS["clawflake"].decompose(time << 19).time == at(time)
    assert PRESETS["clawflake"].epoch_ms == 0


@pytest.mark.parametrize(
    ("name", "time", "machine", "sequence"), [("wide", 42, 14, 8), ("javascript", 41, 6, 6)]
)
def test_zflakes_own_presets_are_what_the_readme_says(
    name: str, time: int, machine: int, sequence: int
) -> None:
    # Published nowhere else: these two are zflake's own.
    layout = PRESETS[name]
    written = int(f"{123_456_789_012:0{time}b}{3:0{machine}b}{5:0{sequence}b}", 2)
    assert layout.compose(123_456_789_012, 3, 5) == written
    assert layout.epoch == datetime(2020, 1, 1, tzinfo=UTC)


def test_the_presets_have_the_bits_ticks_and_epochs_that_are_documented() -> None:
    table = {
        name: ([tuple(f) for f in layout.fields], layout.tick_ms, layout.epoch.isoformat(), layout.bits)
        for name, layout in PRESETS.items()
    }
    t, m, s = "time", "machine", "sequence"
    assert table == {
        "snowcloud": ([(t, 42), (m, 10), (s, 12)], 1, "2020-01-01T00:00:00+00:00", 64),
        "clawflake": ([(t, 45), (s, 12), (m, 7)], 1, "1970-01-01T00:00:00+00:00", 64),
        "twitter": ([(t, 41), (m, 10), (s, 12)], 1, "2010-11-04T01:42:54.657000+00:00", 63),
        "discord": ([(t, 42), (m, 10), (s, 12)], 1, "2015-01-01T00:00:00+00:00", 64),
        "sonyflake": ([(t, 39), (s, 8), (m, 16)], 10, "2014-09-01T00:00:00+00:00", 63),
        "instagram": ([(t, 41), (m, 13), (s, 10)], 1, "2011-08-24T21:07:01.721000+00:00", 64),
        "wide": ([(t, 42), (m, 14), (s, 8)], 1, "2020-01-01T00:00:00+00:00", 64),
        "javascript": ([(t, 41), (m, 6), (s, 6)], 1, "2020-01-01T00:00:00+00:00", 53),
    }
    assert all(name == layout.name for name, layout in PRESETS.items())


# --- fields <-> integer ---


@quick
@given(st.data(), layouts())
def test_decompose_undoes_compose(data: st.DataObject, layout: Layout) -> None:
    tick, machine, sequence = data.draw(fields_of(layout))
    id_ = layout.compose(tick, machine, sequence)
    assert 0 <= id_ < 1 << layout.bits <= 1 << 64
    read = layout.decompose(id_)
    assert (read.tick, read.machine, read.sequence) == (tick, machine, sequence)
    assert read.time == at(layout.epoch_ms + tick * layout.tick_ms)


@quick
@given(st.data(), layouts())
def test_compose_undoes_decompose(data: st.DataObject, layout: Layout) -> None:
    id_ = data.draw(st.integers(0, (layout.end_tick << layout.time_shift) - 1))
    read = layout.decompose(id_)
    assert layout.compose(read.tick, read.machine, read.sequence) == id_


@quick
@given(st.data(), layouts())
def test_ids_sort_by_time_first(data: st.DataObject, layout: Layout) -> None:
    one, two = data.draw(fields_of(layout)), data.draw(fields_of(layout))
    assume(one[0] < two[0])
    assert layout.compose(*one) < layout.compose(*two)


@quick
@given(layouts())
def test_every_field_takes_its_bounds_and_nothing_beyond(layout: Layout) -> None:
    full = (layout.end_tick - 1, layout.machines - 1, layout.ids_per_tick - 1)
    assert layout.compose(0, 0, 0) == 0
    read = layout.decompose(layout.compose(*full))
    assert (read.tick, read.machine, read.sequence) == full
    for place in range(3):
        for outside in (full[place] + 1, -1):
            fields = list(full)
            fields[place] = outside
            with pytest.raises(LayoutError):
                layout.compose(*fields)


@pytest.mark.parametrize("name", PRESETS)
def test_the_highest_id_has_exactly_the_layouts_bits(name: str) -> None:
    layout = PRESETS[name]
    assert highest(layout, layout.end_tick - 1) == (1 << layout.bits) - 1
    with pytest.raises(LayoutError):
        layout.decompose(1 << layout.bits)


@pytest.mark.parametrize("bad", [-1, 1.0, "1", None, True, 1 << 64])
def test_what_is_no_whole_number_in_range_is_no_id(bad: Any) -> None:
    with pytest.raises(LayoutError):
        DEFAULT.decompose(bad)
    for fields in ((bad, 0, 0), (0, bad, 0), (0, 0, bad)):
        with pytest.raises(LayoutError):
            DEFAULT.compose(*fields)
    with pytest.raises(LayoutError):
        DEFAULT.check_machine(bad)


def test_a_negative_id_is_refused_with_the_way_back_from_a_signed_column() -> None:
    last = (1 << 64) - 1
    with pytest.raises(LayoutError, match=r"add 2\*\*64"):
        PRESETS["clawflake"].decompose(last - (1 << 64))


def test_a_layout_error_is_a_value_error_and_one_of_zflakes() -> None:
    assert issubclass(LayoutError, ValueError)
    assert issubclass(LayoutError, ZflakeError)


@quick
@given(layouts())
def test_check_machine_takes_just_the_machines_there_are(layout: Layout) -> None:
    assert layout.check_machine(0) == 0
    assert layout.check_machine(layout.machines - 1) == layout.machines - 1
    for outside in (-1, layout.machines):
        with pytest.raises(LayoutError):
            layout.check_machine(outside)


# --- ends ---


@pytest.mark.parametrize(
    ("name", "overflows"),
    [
        ("snowcloud", "2159-05-15T07:35:11.104Z"),  # 2**42 ms after its epoch
        ("twitter", "2080-07-10T17:30:30.209Z"),  # 2**41 ms; Wikipedia: 69 years
        ("sonyflake", "2188-11-16T03:28:58.880Z"),  # 2**39 * 10 ms; its readme: 174 years
        ("clawflake", "3084-12-12T12:41:28.832Z"),  # 2**45 ms; its readme: 1115.7 years
    ],
)
def test_a_layout_knows_when_it_overflows_and_refuses_from_then_on(name: str, overflows: str) -> None:
    layout = PRESETS[name]
    assert layout.overflows == datetime.fromisoformat(overflows)
    last = layout.compose(layout.end_tick - 1, 0, 0)
    assert layout.decompose(last).time == layout.overflows - layout.tick_ms * MS
    assert layout.tick_of(layout.overflows) == layout.end_tick
    with pytest.raises(LayoutError):
        layout.compose(layout.tick_of(layout.overflows), 0, 0)
    with pytest.raises(LayoutError):
        layout.time_of(layout.end_tick + 1)
    with pytest.raises(LayoutError):
        layout.time_of(-1)


@pytest.mark.parametrize(
    ("name", "until"),
    [
        # 2**63 >> 19 ms after 1970: half of Clawflake's range.
        ("clawflake", "2527-06-23T06:20:44.416Z"),
        ("snowcloud", "2089-09-06T15:47:35.552Z"),
        ("instagram", "2046-06-27T17:00:49.497Z"),
    ],
)
def test_signed_until_is_where_ids_leave_a_signed_column(name: str, until: str) -> None:
    layout = PRESETS[name]
    assert layout.signed_until == datetime.fromisoformat(until)
    tick = layout.tick_of(layout.signed_until)
    assert layout.compose(tick, 0, 0) == 1 << 63
    assert highest(layout, tick - 1) == (1 << 63) - 1


@pytest.mark.parametrize("name", ["twitter", "sonyflake", "javascript"])
def test_ids_of_63_bits_fit_a_signed_column_until_the_layout_ends(name: str) -> None:
    assert PRESETS[name].signed_until == PRESETS[name].overflows


def test_javascripts_ids_are_exact_numbers_until_the_layout_ends() -> None:
    layout = PRESETS["javascript"]
    assert layout.fits_until(53) == layout.overflows
    last = highest(layout, layout.end_tick - 1)
    assert last == int(float(last)) == 2**53 - 1  # Number.MAX_SAFE_INTEGER


@settings(deadline=None, max_examples=200)
@given(layouts(), st.integers(0, 70))
def test_fits_until_is_the_first_tick_whose_ids_need_more_bits(layout: Layout, bits: int) -> None:
    until = layout.fits_until(bits)
    if until == layout.overflows:
        assert highest(layout, layout.end_tick - 1).bit_length() <= bits
    else:
        tick = layout.tick_of(until)
        assert highest(layout, tick).bit_length() > bits
        assert tick == 0 or highest(layout, tick - 1).bit_length() <= bits


@pytest.mark.parametrize("tick_ms", [1, 10, 7, MAX_TICK_MS])
def test_no_layout_outlives_the_year_9999(tick_ms: int) -> None:
    epoch_ms = CALENDAR_END_MS - 3 * MAX_TICK_MS
    layout = Layout("late", PRESETS["clawflake"].fields, epoch_ms, tick_ms)
    assert layout.end_tick == 3 * MAX_TICK_MS // tick_ms < 1 << 45
    read = layout.decompose(layout.compose(layout.end_tick - 1, 5, 6))
    assert read.time.year == 9999
    assert layout.overflows.year == 9999  # there is no later datetime to say it with
    with pytest.raises(LayoutError):
        layout.compose(layout.end_tick, 5, 6)
    with pytest.raises(LayoutError, match="after the end"):
        layout.decompose(layout.end_tick << layout.time_shift)


# --- time ---


@quick
@given(layouts(), st.datetimes(timezones=st.just(UTC)))
def test_a_time_falls_in_the_tick_that_began_last(layout: Layout, time: datetime) -> None:
    tick = layout.tick_of(time)
    since = time - at(layout.epoch_ms)
    assert tick * layout.tick_ms * MS <= since < (tick + 1) * layout.tick_ms * MS
    if 0 <= tick < layout.end_tick:
        assert layout.time_of(tick) <= time


def test_a_time_zone_changes_nothing_and_a_missing_one_is_refused() -> None:
    noon = datetime(2024, 2, 29, 12, tzinfo=UTC)
    east = noon.astimezone(timezone(timedelta(hours=5, minutes=45)))
    assert DEFAULT.tick_of(noon) == DEFAULT.tick_of(east)
    assert DEFAULT.range(noon, noon + MS) == DEFAULT.range(east, east + MS)
    naive = noon.replace(tzinfo=None)
    for start, end in ((naive, noon), (noon, naive)):
        with pytest.raises(LayoutError, match="time zone"):
            DEFAULT.range(start, end)
    with pytest.raises(LayoutError, match="time zone"):
        DEFAULT.tick_of(naive)


@settings(deadline=None, max_examples=200)
@given(st.data(), layouts())
def test_an_id_lies_in_a_range_exactly_when_its_time_does(data: st.DataObject, layout: Layout) -> None:
    tick, machine, sequence = data.draw(fields_of(layout))
    id_, time = layout.compose(tick, machine, sequence), layout.time_of(tick)
    near = st.sampled_from([timedelta(0), timedelta(microseconds=1), MS, layout.tick_ms * MS])
    sign = st.sampled_from([-1, 1])

    def around() -> datetime:
        try:
            return time + data.draw(sign) * data.draw(near)
        except OverflowError:
            return time

    anywhere = st.datetimes(timezones=st.just(UTC))
    start, end = sorted(data.draw(anywhere) if data.draw(st.booleans()) else around() for _ in range(2))
    low, high = layout.range(start, end)
    assert (low <= id_ < high) == (start <= time < end)


def test_the_range_of_a_10_ms_tick_rounds_both_ends_up() -> None:
    layout = PRESETS["sonyflake"]
    epoch = layout.epoch
    assert layout.range(epoch, epoch + 10 * MS) == (0, 1 << 24)
    # A tick belongs to the instant at which it began: 1 to 10 ms holds no beginning, 1 to 11 ms holds one.
    assert layout.range(epoch + MS, epoch + 10 * MS) == (1 << 24, 1 << 24)
    assert layout.range(epoch + MS, epoch + 11 * MS) == (1 << 24, 2 << 24)
    assert layout.range(epoch, epoch + timedelta(microseconds=1)) == (0, 1 << 24)


def test_a_range_beyond_the_layout_is_cut_to_it() -> None:
    first, last = datetime(1, 1, 1, tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    assert DEFAULT.range(first, last) == (0, 1 << 64)
    assert PRESETS["twitter"].range(first, last) == (0, 1 << 63)
    assert DEFAULT.range(DEFAULT.overflows, last) == (1 << 64, 1 << 64)
    assert DEFAULT.range(first, DEFAULT.epoch) == (0, 0)
    late = DEFAULT.with_epoch(CALENDAR_END_MS - 1000)
    assert late.range(first, last) == (0, 1000 << 22)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(PRESETS)),
    st.datetimes(timezones=st.just(UTC)),
    st.datetimes(timezones=st.just(UTC)),
)
@example("snowcloud", datetime(2024, 1, 1, tzinfo=UTC), datetime(2023, 12, 31, tzinfo=UTC))
@example("snowcloud", datetime(1990, 1, 1, tzinfo=UTC), datetime(1980, 1, 1, tzinfo=UTC))
def test_a_range_that_ends_before_it_starts_is_refused(name: str, start: datetime, end: datetime) -> None:
    assume(end < start)
    with pytest.raises(LayoutError, match="before its start"):
        PRESETS[name].range(start, end)


# --- custom layouts ---


@pytest.mark.parametrize(
    "fields",
    [
        (),
        (Field("time", 41), Field("machine", 10)),
        (Field("time", 41), Field("machine", 10), Field("machine", 12)),
        (Field("time", 41), Field("machine", 10), Field("sequence", 11), Field("sequence", 1)),
        (Field("time", 41), Field("node", 10), Field("sequence", 12)),
        (Field("machine", 10), Field("time", 41), Field("sequence", 12)),
        (Field("time", 42), Field("machine", 10), Field("sequence", 13)),
        (Field("time", 0), Field("machine", 10), Field("sequence", 12)),
        (Field("time", 41), Field("machine", -1), Field("sequence", 12)),
        (Field("time", 41), Field("machine", True), Field("sequence", 12)),
        (Field("time", 41), Field("machine", 10), Field("sequence", 12.0)),  # type: ignore[arg-type]
    ],
)
def test_fields_that_make_no_layout_are_refused(fields: tuple[Field, ...]) -> None:
    with pytest.raises(LayoutError):
        Layout("bad", fields)


@pytest.mark.parametrize("tick_ms", [0, -1, MAX_TICK_MS + 1, 1.5, True])
def test_a_tick_is_a_whole_number_of_ms_up_to_a_day(tick_ms: Any) -> None:
    with pytest.raises(LayoutError):
        Layout("bad", DEFAULT.fields, tick_ms=tick_ms)


@pytest.mark.parametrize("epoch_ms", [-1, CALENDAR_END_MS, 0.5, "0", None])
def test_an_epoch_lies_between_1970_and_9999(epoch_ms: Any) -> None:
    with pytest.raises(LayoutError):
        DEFAULT.with_epoch(epoch_ms)


def test_the_parts_of_a_machine_field_add_up_to_it() -> None:
    with pytest.raises(LayoutError):
        Layout("bad", DEFAULT.fields, machine_parts=(Field("rack", 5), Field("slot", 4)))
    with pytest.raises(LayoutError):
        Layout("bad", DEFAULT.fields, machine_parts=(Field("rack", 11), Field("slot", -1)))


@quick
@given(layouts())
def test_a_layout_survives_its_text(layout: Layout) -> None:
    again = parse(str(layout)).with_epoch(layout.epoch_ms)
    assert again.same_ids(layout)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_parsed_by_its_name(name: str) -> None:
    assert parse(name) is PRESETS[name]
    assert parse(str(PRESETS[name])).fields == PRESETS[name].fields


def test_a_text_names_its_tick_unless_it_is_1_ms() -> None:
    assert str(DEFAULT) == "time:42,machine:10,sequence:12"
    assert str(PRESETS["sonyflake"]) == "time:39,sequence:8,machine:16@10ms"
    spaced = parse("time: 39, sequence: 8, machine: 16 @ 10ms")
    assert spaced.with_epoch(PRESETS["sonyflake"].epoch_ms).same_ids(PRESETS["sonyflake"])
    assert spaced.epoch_ms == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nosuch",
        "Snowcloud",
        "time:42",
        "time:42,machine:10",
        "time:42,machine:10,sequence:13",
        "time:42,machine:10,sequence:12@0ms",
        "time:42,machine:10,sequence:12@10",
        "time:42,machine:10,sequence:12@86400001ms",
        "time:42,machine:10,sequence:12,",
        "time:42,machine:10,sequence:0",
        "time:-2,machine:10,sequence:12",
        "machine:10,time:42,sequence:12",
        "time:42,machine:10,sequence:12\n",
    ],
)
def test_a_text_that_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(LayoutError):
        parse(text)


@quick
@given(layouts())
def test_a_layout_survives_its_map(layout: Layout) -> None:
    assert Layout.from_map(layout.to_map()) == layout


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_map_holds_plain_values_only(name: str) -> None:
    values = PRESETS[name].to_map()
    assert Layout.from_map(values) == PRESETS[name]
    plain = [values["name"], values["epoch_ms"], values["tick_ms"]]
    plain += [cell for pair in values["fields"] + values["machine_parts"] for cell in pair]
    assert {type(value) for value in plain} <= {str, int}


MAP: Final = DEFAULT.to_map()


@pytest.mark.parametrize(
    "values",
    [
        *(None, 5, [], "layout", {}),
        *({key: MAP[key] for key in MAP if key != missing} for missing in MAP),
        MAP | {"fields": None},
        MAP | {"fields": [["time"]]},
        MAP | {"fields": [["time", 42], ["machine", 10], ["sequence", "12"]]},
        MAP | {"fields": [["time", 42], ["machine", 10], ["sequence", 13]]},
        MAP | {"epoch_ms": None},
        MAP | {"epoch_ms": -1},
        MAP | {"tick_ms": "1"},
        MAP | {"machine_parts": 5},
        MAP | {"machine_parts": [["rack", 9]]},
        MAP | {"name": 5},
    ],
)
def test_a_map_that_is_no_layouts_is_refused(values: Any) -> None:
    with pytest.raises(LayoutError):
        Layout.from_map(values)


def test_two_layouts_read_ids_alike_whatever_their_names() -> None:
    other = Layout("other", DEFAULT.fields, DEFAULT.epoch_ms, DEFAULT.tick_ms)
    assert other != DEFAULT
    assert other.same_ids(DEFAULT)
    assert not other.same_ids(DEFAULT.with_epoch(DEFAULT.epoch_ms + 1))
    assert not other.same_ids(Layout("other", DEFAULT.fields, DEFAULT.epoch_ms, 2))
    assert not other.same_ids(PRESETS["wide"])


def test_with_epoch_derives_the_end_anew() -> None:
    late = PRESETS["clawflake"].with_epoch(CALENDAR_END_MS - 7)
    assert late.end_tick == 7
    assert PRESETS["clawflake"].end_tick == 1 << 45


# --- epochs ---


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("0", 0),
        ("1577836800000", 1_577_836_800_000),
        ("2020-01-01T00:00Z", 1_577_836_800_000),
        ("2020-01-01", 1_577_836_800_000),
        ("2020-01-01T05:45+05:45", 1_577_836_800_000),
        ("2010-11-04T01:42:54.657Z", 1_288_834_974_657),
    ],
)
def test_an_epoch_is_a_number_of_ms_or_an_iso_time(text: str, ms: int) -> None:
    assert parse_epoch(text) == ms


@pytest.mark.parametrize("text", ["", "yesterday", "-5", "1.5", "2020-13-01", "1" * 16])
def test_an_epoch_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(LayoutError):
        parse_epoch(text)
