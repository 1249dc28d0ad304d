"""When a run saves, on a clock that the tests turn."""

from itertools import pairwise

import pytest

from dbkit.saves import Due, Saves
from dbkit.settings import replace


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def due_steps(config, steps: int, seconds: float, save: float = 0.0, total: int = 10_000) -> dict[int, Due]:
    """What is due after which of so many steps, each of which takes so many seconds, and a save so many."""
    clock = Clock()
    saves, found = Saves(config, 0, total, clock), {}
    for step in range(1, steps + 1):
        clock.now += seconds
        if due := saves.due(step):
            found[step] = due
            with saves.saving():
                clock.now += save
    return found


@pytest.fixture
def plain(config):
    return replace(config, save_model_every_n_steps=None, save_every_n_minutes=None)


def test_nothing_is_due_where_nothing_is_asked_for(plain):
    assert due_steps(plain, 1000, 60) == {}


def test_weights_are_saved_after_so_many_steps_but_not_at_the_end(plain):
    found = due_steps(replace(plain, save_model_every_n_steps=200), 1000, 1, total=1000)
    assert found == dict.fromkeys((200, 400, 600, 800), Due.WEIGHTS)


def test_a_state_is_saved_after_so_many_minutes_of_training(plain):
    # A save of 40 seconds does not count.
    found = due_steps(replace(plain, save_every_n_minutes=5), 1000, 2, save=40)
    assert set(found.values()) == {Due.STATE}
    assert [two - one for one, two in pairwise(found)] == [150] * (len(found) - 1) and min(found) == 150


def test_a_save_of_weights_is_one_of_the_state_too(plain):
    both = replace(plain, save_every_n_minutes=5, save_model_every_n_steps=100)
    assert set(due_steps(both, 1000, 2).values()) == {Due.WEIGHTS}


def test_the_last_save_comes_before_the_session_ends(plain):
    budget = replace(plain, session_minutes=30)
    # A minute before the end, or three times as long as a save takes.
    assert due_steps(budget, 2000, 1) == {29 * 60: Due.STATE}
    slow = due_steps(replace(budget, save_model_every_n_steps=700), 2000, 1, save=50)
    assert {step: due for step, due in slow.items() if due is Due.STATE} == {30 * 60 - 150 - 2 * 50: Due.STATE}


def test_a_session_begins_before_the_first_step(plain):
    clock = Clock()
    saves = Saves(replace(plain, session_minutes=30), 0, 10_000, clock, session=clock.now - 20 * 60)
    due = []
    for step in range(1, 1000):
        clock.now += 1
        due += [step] if saves.due(step) else []
    assert due == [9 * 60]


def test_it_is_said_once_whether_the_run_fits_into_the_session(plain):
    clock = Clock()
    saves = Saves(replace(plain, session_minutes=30), 100, 2000, clock)
    said = []
    for step in range(101, 200):
        clock.now += 1.5
        said.append(saves.outlook(step))
    assert [number for number, sentence in enumerate(said) if sentence] == [9]
    assert said[9] == (
        "at 1.5 s a step the run needs 47 min more, and this session has 30 min: it will be near step 1300 of 2000; "
        "what is saved until then goes on in the next session by the same command or cell"
    )


def test_a_run_that_fits_is_said_to_and_without_a_session_nothing_is(plain):
    clock = Clock()
    runs = [Saves(replace(plain, session_minutes=minutes), 0, 100, clock) for minutes in (30, None)]
    clock.now += 10
    assert [saves.outlook(10) for saves in runs] == [
        "at 1 s a step the run needs 2 min more, and this session has 30 min: it fits",
        None,
    ]
