"""Recommended is the earliest step that has nearly all that was gained, less what the class lost."""

import pytest

from dbkit.best_step import recommend


def lines(steps=range(0, 700, 100), **figures):
    """Lines of a figures.jsonl: for each figure its value at each step."""
    return [{"step": step, **{name: float(v[n]) for name, v in figures.items()}} for n, step in enumerate(steps)]


LEARNT = [0.0, 0.3, 0.77, 0.78, 0.8, 0.8, 0.79]
STEPS = range(100, 700, 100)


def test_of_steps_that_are_nearly_as_good_the_earliest_is_taken():
    found = recommend(lines(subject_fidelity=LEARNT), STEPS)
    assert found.step == 200
    assert str(found) == (
        "step 200 is recommended: it has 97% of what the best steps gained in likeness to the subject; what comes "
        "after 200 adds little"
    )
    assert recommend(lines(subject_fidelity=[0.0, 0.3, 0.75, 0.78, 0.8, 0.8, 0.79]), STEPS).step == 300


def test_one_lucky_picture_is_not_the_best():
    assert recommend(lines(subject_fidelity=[0.0, 0.3, 0.78, 0.9, 0.78, 0.78, 0.78]), STEPS).step == 200
    # Nor does it hide that a training was still gaining.
    assert recommend(lines(range(0, 400, 100), subject_fidelity=[0.0, 0.3, 0.6, 0.9]), [100, 200, 300]).step == 300


def test_likeness_that_the_class_took_on_too_does_not_count():
    leak = [0.2, 0.2, 0.5, 0.2, 0.2, 0.4, 0.5]
    found = recommend(lines(subject_fidelity=LEARNT, class_leak=leak), STEPS)
    assert found.step == 300 and found.reason.endswith("; after 300 the class drifts")
    # A class that becomes less like the subject has lost nothing, and gains nothing either.
    assert recommend(lines(subject_fidelity=LEARNT, class_leak=[0.2, -0.9, *[0.2] * 5]), STEPS).step == 200


def test_prompts_that_count_less_later_are_said():
    found = recommend(lines(subject_fidelity=LEARNT, prompt_fidelity=[0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.26]), STEPS)
    assert found.reason.endswith("; after 200 pictures follow their prompts less")


def test_a_lucky_picture_of_an_early_step_is_not_taken():
    assert recommend(lines(subject_fidelity=[0.0, 0.3, 0.85, 0.4, 0.8, 0.8, 0.8]), STEPS).step == 400


def test_where_a_better_step_is_not_saved_that_is_said():
    assert str(recommend(lines(range(0, 400, 100), subject_fidelity=[0.0, 0.1, 0.3, 0.5]), [100, 200])).endswith(
        "; later ones gained more"
    )


def test_previews_of_other_prompts_than_at_first_are_not_compared_with_those():
    measured = lines(subject_fidelity=LEARNT, validation_loss=[0.2, 0.12, 0.105, 0.101, 0.1, 0.1, 0.1])
    for line in measured[4:]:
        line["prompts"] = ["photo of zwx dog in the snow"]
    assert "(previews have other prompts than at step 0)" in recommend(measured, STEPS).reason
    for line in measured[:4]:
        line["prompts"] = ["photo of zwx dog in the snow"]
    assert "previews" not in recommend(measured, STEPS).reason


def test_only_steps_that_are_there_are_recommended():
    assert recommend(lines(subject_fidelity=LEARNT), [400, 600]).step == 400
    assert recommend(lines(subject_fidelity=[0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), STEPS).reason.endswith(
        "; it is the last one, and more steps may add more"
    )


def test_without_judged_previews_the_loss_at_fixed_noise_decides_and_that_is_said():
    falling = [0.2, 0.12, 0.105, 0.101, 0.1, 0.1, 0.1]
    found = recommend(lines(validation_loss=falling), STEPS)
    assert found.step == 200 and "what the photographs teach (previews were not judged)" in found.reason
    forgotten = [0.1, 0.1, 0.15, 0.1, 0.1, 0.1, 0.1]
    assert recommend(lines(validation_loss=falling, class_loss=forgotten), STEPS).step == 300


def test_where_nothing_was_gained_the_step_that_lost_least_is_named():
    found = recommend(lines(subject_fidelity=[0.5, 0.1, 0.3, 0.2, 0.1, 0.1, 0.1]), STEPS)
    assert found.step == 200 and found.reason.startswith("it is the least bad: no step gained")
    # Nor is it a gain that pictures of one model differ by, or that the class made too.
    slight = lines(subject_fidelity=[0.0, 0.1, 0.18, 0.18, 0.18, 0.18, 0.18], class_leak=[0, 0.09, 0.17, *[0.18] * 4])
    assert recommend(slight, STEPS).reason.startswith("it is the least bad: no step gained")


@pytest.mark.parametrize(
    "measured", [[], lines(subject_fidelity=LEARNT)[1:], lines(subject_fidelity=LEARNT)[:1], [{"step": 0}, {"step": 5}]]
)
def test_nothing_is_recommended_where_too_little_was_measured(measured):
    assert recommend(measured, STEPS) is None


@pytest.mark.parametrize("value", ["0.3", None, [], True, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["subject_fidelity", "prompt_fidelity", "class_leak"])
def test_a_figure_of_the_base_that_is_no_number_is_as_if_it_were_not_there(name, value):
    measured = lines(subject_fidelity=LEARNT, prompt_fidelity=LEARNT, class_leak=[0.2] * 7)
    without = [{key: figure for key, figure in line.items() if line["step"] or key != name} for line in measured]
    measured[0][name] = value
    assert recommend(measured, STEPS) == recommend(without, STEPS)
