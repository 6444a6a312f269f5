"""What broker and relay say to each other."""

from __future__ import annotations

import json
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdibuild.pool import control
from vdibuild.pool.admission import Admission
from vdibuild.pool.control import (
    Acknowledge,
    ControlError,
    End,
    Ended,
    Error,
    GetState,
    Linked,
    Offer,
    OfferState,
    Refused,
    Replace,
    Revoke,
    SessionState,
    State,
)
from vdibuild.pool.events import EventLog, Refusals

OFFER = Offer(
    lease="a-1",
    socket=Path("/run/a-1"),
    password="hunter2",
    station=ip_address("10.0.0.1"),
    ticket="once",
    expires=10,
)


@pytest.mark.parametrize(
    "command",
    [OFFER, Revoke(lease="a"), End(lease="a", reason="over"), GetState(), Acknowledge(number=3), Replace()],
)
def test_a_command_is_one_line_that_is_read_back(command: control.Command) -> None:
    assert command.line().count(b"\n") == 1 and command.line().endswith(b"\n")
    assert control.command(command.line()) == command


@pytest.mark.parametrize(
    "report",
    [
        Linked(number=1, lease="a", address="10.0.0.1"),
        Ended(number=2, lease="a", reason="r", seconds=1.5, bytes_in=1, bytes_out=2),
        Refused(number=3, address="10.0.0.1", reason="r", times=4),
        Error(lease=None, message="m"),
        State(
            sessions=[SessionState(lease="a", address="::1", seconds=1, bytes_in=0, bytes_out=0, channels=3)],
            offers=[OfferState(lease="b", station=None, ticketed=True, expires=2)],
        ),
    ],
)
def test_a_report_is_read_back(report: control.Report) -> None:
    assert control.report(report.line()) == report


def test_an_offer_as_it_is_sent() -> None:
    assert json.loads(OFFER.line()) == {
        "command": "offer",
        "lease": "a-1",
        "socket": "/run/a-1",
        "password": "hunter2",
        "station": "10.0.0.1",
        "ticket": "once",
        "expires": 10.0,
    }


def test_secrets_are_not_shown() -> None:
    assert "hunter2" not in repr(OFFER) + str(OFFER) and "once" not in repr(OFFER) + str(OFFER)


@pytest.mark.parametrize(
    "changed",
    [
        {"station": None, "ticket": None},
        {"expires": 0},
        {"expires": "NaN"},
        {"password": ""},
        {"password": "x" * 61},
        {"password": "pässword"},
        {"ticket": ""},
        {"ticket": "a b"},
        {"lease": "a\nb"},
        {"station": "here"},
        {"more": 1},
    ],
)
def test_an_offer_that_is_none(changed: dict[str, object]) -> None:
    line = json.dumps({**json.loads(OFFER.line()), **changed}).encode()
    with pytest.raises(ControlError) as caught:
        control.command(line)
    assert "hunter2" not in str(caught.value)


@given(st.binary(max_size=200))
def test_no_line_does_harm(line: bytes) -> None:
    for read in (control.command, control.report):
        with pytest.raises(ControlError):
            read(line)


def test_strangers_cannot_push_out_what_became_of_leases() -> None:
    log = EventLog()
    log.add(Linked(lease="a", address="10.0.0.1"))
    for number in range(5000):
        log.add(Refused(address=f"10.0.0.{number}", reason="r"))
    log.add(Ended(lease="a", reason="r"))
    kept = log.kept()
    assert len(kept) < 1100
    assert [one.event for one in (kept[0], kept[-1])] == ["linked", "ended"]
    assert [one.number for one in kept] == sorted(one.number for one in kept)
    log.acknowledge(kept[-2].number)
    assert [one.number for one in log.kept()] == [5002]


def test_refusals_are_summed_up() -> None:
    refusals = Refusals()
    assert refusals.add("10.0.0.1", "r")
    assert not refusals.add("10.0.0.1", "r")
    for number in range(5000):
        refusals.add(f"10.1.{number // 250}.{number % 250}", "r")
    report = refusals.report()
    assert len(report) < 300 and sum(one.times for one in report) == 5002
    assert (report[0].address, report[0].times) == ("10.0.0.1", 2)
    assert report[-1].address == "others"
    assert refusals.report() == []


def test_who_holds_most_loses_a_place_to_another() -> None:
    gone: list[str] = []
    admission = Admission(total=4, per_address=3)
    places = [admission.enter("a", lambda number=number: gone.append(f"a{number}")) for number in range(4)]  # type: ignore[misc]
    assert places[3] is None
    assert admission.enter("b", lambda: gone.append("b")) is not None
    assert admission.enter("c", lambda: gone.append("c")) is not None
    assert gone == ["a0"]
    assert admission.enter("a", lambda: gone.append("a")) is None
    for place in places[1:3]:
        assert place is not None
        admission.leave("a", place)
        admission.leave("a", place)
    assert [admission.enter("d", lambda: None) is None for _ in range(3)] == [False, False, True]
