"""Limits by key: what a minute holds, when to come back, and what a changed file does."""

import pytest

from service.api.rate_limits import RateLimits
from service.clients import Client
from service.errors import RateLimited
from tests.conftest import hardening
from tests.test_admission import Clock

ALICE = Client("alice", requests_per_minute=6)
BOB = Client("bob", tokens_per_minute=600)


def limits(processes: int = 1) -> tuple[RateLimits, Clock]:
    clock = Clock()
    return RateLimits(processes, clock), clock


def let_in(limits: RateLimits, client: Client, tries: int = 100) -> int:
    """How many of so many requests at once are let in."""
    for count in range(tries):
        try:
            limits.check(client)
        except RateLimited:
            return count
    return tries


def refused(limits: RateLimits, client: Client) -> RateLimited:
    with pytest.raises(RateLimited) as error:
        limits.check(client)
    return error.value


@hardening(22)
def test_a_minutes_requests_may_come_at_once_and_then_evenly() -> None:
    rates, clock = limits()
    assert let_in(rates, Client("carol")) == 100
    assert let_in(rates, ALICE) == 6
    error = refused(rates, ALICE)
    assert (error.status, error.type, error.retry_after) == (429, "rate_limited", 10)
    assert error.message.startswith("this key's limit requests=6/min is used up")
    clock.now += 9
    assert refused(rates, ALICE).retry_after == 1
    clock.now += 1
    assert let_in(rates, ALICE) == 1
    clock.now += 3600
    assert let_in(rates, ALICE) == 6


@hardening(22)
def test_tokens_are_taken_at_the_end_and_may_be_more_than_there_are() -> None:
    rates, clock = limits()
    assert let_in(rates, BOB) == 100  # nobody knows yet what they use
    rates.spend(BOB, 599)
    assert let_in(rates, BOB) == 100
    rates.spend(BOB, 1201)  # 1200 below zero: two minutes, and the first token after them
    error = refused(rates, BOB)
    assert error.retry_after == 121
    assert error.message.startswith("this key's limit tokens=600/min is used up")
    clock.now += 120
    assert refused(rates, BOB).retry_after == 1
    clock.now += 1
    rates.check(BOB)


def test_the_longest_wait_counts_and_a_refused_request_costs_nothing() -> None:
    rates, clock = limits()
    both = Client("dora", requests_per_minute=1, tokens_per_minute=60)
    rates.check(both)
    rates.spend(both, 90)
    assert refused(rates, both).retry_after == 60  # of the requests
    clock.now += 60
    rates.spend(both, 60)
    error = refused(rates, both)
    assert error.retry_after == 31 and "tokens=60/min" in error.message
    clock.now += 31
    assert let_in(rates, both) == 1


def test_a_changed_limit_holds_at_once_and_the_others_keep_what_they_used() -> None:
    rates, clock = limits()
    assert let_in(rates, ALICE) == 6
    more = Client("alice", requests_per_minute=60)
    assert refused(rates, more).retry_after == 1  # it fills ten times as fast, from where it was
    clock.now += 2
    assert let_in(rates, more) == 2
    clock.now += 60
    assert let_in(rates, Client("alice", requests_per_minute=3)) == 3
    assert let_in(rates, Client("alice")) == 100


def test_api_processes_share_a_limit_but_each_lets_one_in() -> None:
    rates, _ = limits(processes=4)
    assert let_in(rates, Client("alice", requests_per_minute=100)) == 25
    once = Client("bob", requests_per_minute=1)
    assert let_in(rates, once) == 1
    assert refused(rates, once).retry_after == 240
