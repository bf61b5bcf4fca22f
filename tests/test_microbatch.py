"""The queue, on an event loop whose clock only moves when nothing else can happen."""

from __future__ import annotations

import asyncio
import math
import selectors
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitfit.serve.microbatch import (
    BatchReport,
    Closing,
    DeadlineExceeded,
    Limits,
    MicroBatcher,
    QueueFull,
)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Sleeping takes no time: the clock jumps to the next timer."""

    def __init__(self):
        self.now = 0.0
        super().__init__(selectors.SelectSelector())
        select = self._selector.select

        def jump(timeout=None):
            assert timeout is not None, "everything waits for ever"
            self.now += max(timeout, 0)
            return select(0)

        self._selector.select = jump
        self._clock_resolution = 1e-9

    def time(self):
        return self.now


def run(main):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


@dataclass
class Machine:
    """Computes 1,000 tokens a second, doubling numbers; remembers when it was given what."""

    batches: list = field(default_factory=list)
    speed: float = 1000.0

    async def __call__(self, payloads):
        loop = asyncio.get_running_loop()
        self.batches.append((loop.time(), list(payloads)))
        await asyncio.sleep(sum(tokens for _, tokens in payloads) / self.speed)
        return [number * 2 for number, _ in payloads]

    @property
    def computed(self):
        return [number for _, payloads in self.batches for number, _ in payloads]


LIMITS = Limits(max_tokens=64, max_wait=0.01, max_items=10_000, max_queue_tokens=10**6)


async def ask(queue, payloads, deadline=math.inf):
    with queue.admit(len(payloads), deadline=deadline) as place:
        return await place.run([(payload, payload[1]) for payload in payloads])


def make(limits=LIMITS, **more):
    machine = Machine()
    reports: list[BatchReport] = []
    queue = MicroBatcher(machine, limits, on_batch=reports.append, **more)
    return queue, machine, reports


requests = st.lists(
    st.tuples(
        st.floats(0, 0.5),  # when it comes
        st.lists(st.integers(1, 100), min_size=1, max_size=6),  # tokens of its items
        st.one_of(st.none(), st.floats(0.001, 0.5)),  # after which its client goes away
        st.one_of(st.none(), st.floats(0.001, 0.5)),  # its deadline
    ),
    min_size=1,
    max_size=25,
)


@given(requests)
@settings(max_examples=60, deadline=None)
def test_every_request_gets_its_own_answers_or_its_own_reason(asked):
    dropped = []
    queue, machine, reports = make(discard=lambda payload: dropped.append(payload[0]))
    numbers = iter(range(10**6))

    async def client(when, sizes, patience, allowed):
        await asyncio.sleep(when)
        now = asyncio.get_running_loop().time()
        payloads = [(next(numbers), size) for size in sizes]
        deadline = math.inf if allowed is None else now + allowed
        outcome, ended = None, None
        try:
            async with asyncio.timeout(patience):
                outcome = await ask(queue, payloads, deadline)
        except DeadlineExceeded:
            outcome = "late"
        except QueueFull:
            outcome = "refused"
        except TimeoutError:
            outcome = "gone"
        ended = asyncio.get_running_loop().time()
        return payloads, outcome, now, deadline, patience, ended

    async def main():
        queue.start()
        found = await asyncio.gather(*(client(*each) for each in asked))
        await queue.drain()
        return found

    found = run(main())
    computed = set(machine.computed)
    assert len(computed) == len(machine.computed), "an item was computed twice"
    assert not computed & set(dropped), "an item was computed and dropped"
    begun = {n: when for when, payloads in machine.batches for n, _ in payloads}
    everything = set()
    for payloads, outcome, began, deadline, patience, ended in found:
        mine = {number for number, _ in payloads}
        everything |= mine if outcome != "refused" else set()
        if isinstance(outcome, list):  # matched, and in order
            assert outcome == [number * 2 for number, _ in payloads]
            assert ended <= deadline + 1e-6
        elif outcome == "late":
            assert ended == pytest.approx(deadline)
        elif outcome == "gone":
            assert ended == pytest.approx(began + patience)
        else:
            assert not mine & computed
        # Nothing begins once nobody wants it.
        wanted_until = min(deadline, began + (patience or math.inf))
        assert all(begun[number] <= wanted_until + 1e-9 for number in mine & computed)
    assert computed | set(dropped) == everything, "an item was lost"
    assert (queue.items, queue.tokens, queue._waiting_tokens, queue._jobs) == (0, 0, 0, {})
    for _, payloads in machine.batches:
        widest = max(tokens for _, tokens in payloads)
        assert len(payloads) == 1 or widest * len(payloads) <= LIMITS.max_tokens
    assert sum(report.items for report in reports) == len(computed)


@given(st.lists(st.floats(0, 0.3), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_an_idle_engine_waits_for_company_no_longer_than_the_limit(arrivals):
    queue, machine, _ = make()

    async def client(when):
        await asyncio.sleep(when)
        await ask(queue, [(when, 1)])

    async def main():
        queue.start()
        await asyncio.gather(*map(client, arrivals))
        await queue.drain()

    run(main())
    idle_from = 0.0
    for when, payloads in machine.batches:
        oldest = min(arrived for arrived, _ in payloads)
        assert when <= max(idle_from, oldest + LIMITS.max_wait) + 1e-6
        idle_from = when + len(payloads) / machine.speed


def test_a_full_batch_does_not_wait():
    queue, machine, _ = make()

    async def main():
        queue.start()
        await ask(queue, [(i, 16) for i in range(4)])
        await queue.drain()

    run(main())
    assert [(when, len(payloads)) for when, payloads in machine.batches] == [(0.0, 4)]


def test_items_of_like_length_share_a_batch_and_the_oldest_is_always_in_it():
    queue, machine, reports = make()

    async def main():
        queue.start()
        await ask(queue, [(i, 60 if i % 2 else 6) for i in range(8)])
        await queue.drain()

    run(main())
    first = [tokens for _, tokens in machine.batches[0][1]]
    assert first == [6] * len(first)
    assert len(first) >= 2
    assert sorted(machine.computed) == list(range(8))
    waiting = set(range(8))
    for _, payloads in machine.batches:
        numbers = {number for number, _ in payloads}
        assert min(waiting) in numbers
        waiting -= numbers
    assert all(report.fill <= 1 for report in reports)


def test_an_item_larger_than_a_batch_goes_alone():
    queue, machine, _ = make()

    async def main():
        queue.start()
        found = await ask(queue, [(1, 500), (2, 5)])
        await queue.drain()
        return found

    assert run(main()) == [2, 4]
    assert [len(payloads) for _, payloads in machine.batches] == [1, 1]


def test_what_the_client_abandoned_is_not_computed():
    dropped = []
    queue, machine, _ = make(discard=lambda payload: dropped.append(payload[0]))

    async def main():
        queue.start()
        first = asyncio.create_task(ask(queue, [(1, 64)]))
        await asyncio.sleep(0.001)
        second = asyncio.create_task(ask(queue, [(2, 10), (3, 10)]))
        await asyncio.sleep(0.001)
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await queue.drain()

    run(main())
    assert machine.computed == [1]
    assert dropped == [2, 3]


def test_a_request_beyond_its_deadline_is_given_up_at_once():
    queue, machine, _ = make()

    async def main():
        queue.start()
        slow = asyncio.create_task(ask(queue, [(1, 64)]))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded):
            await ask(queue, [(2, 10)], asyncio.get_running_loop().time() + 0.02)
        ended = asyncio.get_running_loop().time()
        await slow
        await queue.drain()
        return ended

    assert run(main()) == pytest.approx(0.02)
    assert machine.computed == [1]


@pytest.mark.parametrize("error", [None, TimeoutError("its own")])
def test_what_comes_just_as_the_deadline_rings_is_the_answer(error):
    async def compute(payloads):
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        loop.call_at(0.09, done.set_result, None)
        loop.call_at(0.09, setattr, loop, "now", 0.2)  # others held the loop meanwhile
        await done
        if error is not None:
            raise error
        return payloads

    queue = MicroBatcher(compute, LIMITS)

    async def main():
        queue.start()
        found = await asyncio.gather(ask(queue, [(1, 64)], 0.1), return_exceptions=True)
        await queue.drain()
        return found

    assert run(main()) == [[(1, 64)] if error is None else error]


@pytest.mark.parametrize(
    ("limits", "accepted", "message"),
    [
        ({"max_items": 3}, 3, "3 items wait, 1 more would exceed 3"),
        ({"max_queue_tokens": 150}, 3, "128 tokens wait, 64 more would exceed 150"),
        ({"max_delay": 0.1}, 2, r"it would wait about 0\.1 s, 0\.1 s are allowed"),
    ],
)
def test_a_full_queue_refuses_and_says_when_to_come_back(limits, accepted, message):
    queue, _machine, _ = make(Limits(**(vars(LIMITS) | limits)))

    async def main():
        queue.start()
        await ask(queue, [(0, 64)])  # now the speed is known: 1,000 tokens a second
        waiting = []
        for i in range(accepted):
            waiting.append(asyncio.create_task(ask(queue, [(i, 64)])))
            await asyncio.sleep(0.001)
        with pytest.raises(QueueFull, match=message) as refused:
            await ask(queue, [(9, 64)])
        assert 0 < refused.value.retry_after < 0.3
        await asyncio.gather(*waiting)
        await queue.drain()

    run(main())


def test_a_request_with_nothing_to_compute_is_not_refused_for_tokens():
    queue, _, _ = make(Limits(**(vars(LIMITS) | {"max_queue_tokens": 50})))

    async def main():
        queue.start()
        large = asyncio.create_task(ask(queue, [(1, 64)]))  # alone: accepted
        await asyncio.sleep(0)
        assert await ask(queue, []) == []
        await large
        await queue.drain()

    run(main())


def test_a_wait_beyond_the_deadline_is_refused_before_any_work():
    queue, machine, _ = make()

    async def main():
        queue.start()
        await ask(queue, [(0, 64)])
        waiting = asyncio.create_task(ask(queue, [(i, 64) for i in range(1, 9)]))
        await asyncio.sleep(0.001)
        with pytest.raises(QueueFull, match="allowed"):
            await ask(queue, [(9, 64)], asyncio.get_running_loop().time() + 0.1)
        await waiting
        await queue.drain()

    run(main())
    assert 9 not in machine.computed


def test_small_batches_say_nothing_of_the_speed():
    queue, _, _ = make()

    async def main():
        queue.start()
        await ask(queue, [(0, 1)])
        await queue.drain()

    run(main())
    assert queue._speed == 0


def test_draining_answers_what_was_accepted_and_refuses_the_rest():
    queue, _, _ = make()

    async def late_reader():
        """Accepted, but its texts are still being read when the queue is told to stop."""
        with queue.admit(1) as place:
            await asyncio.sleep(0.5)
            return await place.run([((7, 3), 3)])

    async def main():
        queue.start()
        accepted = [asyncio.create_task(ask(queue, [(i, 40)])) for i in range(3)]
        accepted.append(asyncio.create_task(late_reader()))
        await asyncio.sleep(0.001)
        queue.close()
        with pytest.raises(Closing):
            await ask(queue, [(9, 1)])
        await queue.drain()
        assert all(task.done() for task in accepted)
        return await asyncio.gather(*accepted)

    assert run(main()) == [[0], [2], [4], [14]]
    assert not queue.broken


def test_a_failed_computation_fails_its_requests_and_no_others():
    async def compute(payloads):
        await asyncio.sleep(0.01)
        if any(number == 13 for number, _ in payloads):
            raise RuntimeError("unlucky")
        return [number for number, _ in payloads]

    queue = MicroBatcher(compute, LIMITS)

    async def main():
        queue.start()
        first = asyncio.create_task(ask(queue, [(13, 64), (1, 64)]))
        second = asyncio.create_task(ask(queue, [(2, 64)]))
        found = await asyncio.gather(first, second, return_exceptions=True)
        assert not queue.broken
        await queue.drain()
        return found

    failed, answered = run(main())
    assert isinstance(failed, RuntimeError)
    assert answered == [2]
    assert (queue.items, queue.tokens) == (0, 0)


def test_under_twice_the_load_the_latency_of_what_is_accepted_stays_bounded():
    """Open loop: 2,000 tokens a second come, 1,000 can be computed."""
    queue, _, _ = make(Limits(**(vars(LIMITS) | {"max_delay": 0.5})))
    latencies, refused, most = [], 0, 0

    async def client(number):
        nonlocal refused, most
        await asyncio.sleep(number * 0.005)
        began = asyncio.get_running_loop().time()
        try:
            await ask(queue, [(number, 10)])
            latencies.append(asyncio.get_running_loop().time() - began)
        except QueueFull:
            refused += 1
        most = max(most, queue.items)

    async def main():
        queue.start()
        await asyncio.gather(*map(client, range(2000)))
        await queue.drain()

    run(main())
    assert max(latencies) < 0.5 + 3 * 0.064  # the limit, the batch at work, its own
    assert len(latencies) > 900  # the machine was never idle: 1,000 could be answered
    assert refused == 2000 - len(latencies)
    assert most <= 70  # and so is memory
