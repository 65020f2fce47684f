"""A request to stop is a wish, however often it is made."""

import os
import signal

import pytest

from disttrain.resilience import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_wish(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.wanted
        os.kill(os.getpid(), number)
        assert stop.wanted


def test_a_second_signal_does_no_harm() -> None:
    with StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.wanted


def test_the_handlers_before_are_the_handlers_after() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest():
        assert all(signal.getsignal(number) not in before for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(ZeroDivisionError), StopRequest():
        _ = 1 / 0
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_request_is_not_remembered_by_the_next_one() -> None:
    with StopRequest() as first:
        os.kill(os.getpid(), signal.SIGTERM)
    with StopRequest() as second:
        assert (first.wanted, second.wanted) == (True, False)
