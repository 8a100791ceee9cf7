from hypothesis import given
from hypothesis import strategies as st

from edgellm_agent.worker.prefill import PrefillBudget
from edgellm_agent.worker.waiting import WaitingQueue
from tests.unit.agent.sequences import make


def add(queue, sequence, active=(), free=0):
    return queue.add(sequence, active=set(active), free=free)


def test_one_client_is_served_in_the_order_of_arrival():
    queue = WaitingQueue(10)
    first, second = make(1), make(2)
    add(queue, first)
    add(queue, second)
    assert queue.next() is first
    queue.remove(first)
    assert queue.next() is second


def test_who_was_served_least_comes_next():
    queue = WaitingQueue(10)
    add(queue, make(1, client="a"))
    add(queue, make(2, client="b"))
    queue.charge("a", answer_tokens=10)
    assert queue.next().client == "b"
    queue.charge("b", answer_tokens=20)
    assert queue.next().client == "a"


def test_a_client_that_was_away_has_saved_nothing_up():
    queue = WaitingQueue(10)
    add(queue, make(1, client="a"))
    queue.charge("a", answer_tokens=1000)
    add(queue, make(2, client="late"))
    queue.charge("late", answer_tokens=1)
    assert queue.next().client == "a"


def test_a_client_that_comes_back_still_owes_what_it_was_served():
    queue = WaitingQueue(10)
    first = make(1, client="a")
    add(queue, first)
    add(queue, make(2, client="b"))
    queue.charge("a", answer_tokens=1000)
    queue.remove(first)
    add(queue, make(3, client="a"))
    assert queue.next().client == "b"


def test_a_sequence_whose_reader_takes_nothing_does_not_come_next():
    queue = WaitingQueue(10)
    stalled, ready = make(1, credit=0), make(2)
    queue.put_back(ready)
    queue.put_back(stalled)
    assert queue.next() is ready


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 50)), max_size=60))
def test_the_names_of_clients_do_not_pile_up(visits):
    queue = WaitingQueue(10)
    for name, served in visits:
        sequence = make(1, client=str(name))
        add(queue, sequence)
        queue.charge(str(name), answer_tokens=served)
        queue.remove(sequence)
    assert len(queue._served) <= 258


def test_a_sequence_that_was_put_back_is_its_clients_next():
    queue = WaitingQueue(1)
    add(queue, make(1))
    begun = make(2)
    queue.put_back(begun)
    assert queue.next() is begun
    assert len(queue) == 2


def test_one_that_has_begun_to_answer_is_not_refused_for_a_newcomer():
    queue = WaitingQueue(0)
    begun = make(1)
    begun.timeline.started = 1.0
    queue.put_back(begun)
    newcomer = make(2)
    assert add(queue, newcomer) is newcomer


def test_free_places_do_not_count_as_waiting():
    queue = WaitingQueue(0)
    assert add(queue, make(1), free=1) is None
    refused = make(2)
    assert add(queue, refused, free=1) is refused


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 50)), max_size=60))
def test_the_queue_never_grows_beyond_its_bound(arrivals):
    queue = WaitingQueue(5)
    present = set()
    for number, (client, served) in enumerate(arrivals):
        refused = add(queue, make(number, client=client), active="z")
        present |= {number}
        if refused is not None:
            present.remove(refused.id)
        queue.charge(client, answer_tokens=served)
        assert {s.id for s in queue} == present
        assert len(queue) <= 5


def test_a_chunk_has_as_many_tokens_as_the_budget_has_time_for():
    budget = PrefillBudget(0.1, 512)
    assert budget.tokens(others_wait=False) == 512
    assert budget.tokens(others_wait=True) == 32  # nothing is known yet
    budget.observe(32, 0.032)
    assert budget.tokens(others_wait=True) == 96


def test_a_machine_that_slows_down_gets_smaller_chunks_at_once_and_larger_ones_little_by_little():
    budget = PrefillBudget(0.1, 512)
    budget.observe(64, 0.064)
    budget.observe(64, 0.256)
    assert budget.tokens(others_wait=True) == 16
    sizes = []
    for _ in range(20):
        budget.observe(64, 0.064)
        sizes.append(budget.tokens(others_wait=True))
    assert sizes == sorted(sizes)
    assert sizes[-1] == 96


@given(st.floats(1e-6, 10), st.lists(st.tuples(st.integers(1, 512), st.floats(1e-6, 100)), max_size=20))
def test_a_chunk_is_never_empty_and_never_longer_than_the_plan_counted(seconds, chunks):
    budget = PrefillBudget(seconds, 100)
    for tokens, took in chunks:
        budget.observe(tokens, took)
        assert 1 <= budget.tokens(others_wait=True) <= 100
