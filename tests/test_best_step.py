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
        "step 200 is recommended: its previews are nearly as like the subject as those of the best steps (97% of the "
        "best gain); what comes after 200 adds little"
    )
    assert recommend(lines(subject_fidelity=[0.0, 0.3, 0.75, 0.78, 0.8, 0.8, 0.79]), STEPS).step == 300


def test_one_lucky_picture_is_not_the_best():
    assert recommend(lines(subject_fidelity=[0.0, 0.3, 0.78, 0.9, 0.78, 0.78, 0.78]), STEPS).step == 200
    # Nor does it hide that a training was still gaining.
    assert recommend(lines(range(0, 400, 100), subject_fidelity=[0.0, 0.3, 0.6, 0.9]), [100, 200, 300]).step == 300


def test_likeness_that_the_class_took_on_too_does_not_count():
    leak = [0.2, 0.2, 0.5, 0.2, 0.2, 0.4, 0.5]
    found = recommend(lines(subject_fidelity=LEARNT, class_leak=leak), STEPS)
    assert found.step == 300
    assert found.reason.endswith(" (likeness that the class took on too does not count); after 300 the class drifts")
    # A class that becomes less like the subject has lost nothing, and gains nothing either.
    assert recommend(lines(subject_fidelity=LEARNT, class_leak=[0.2, -0.9, *[0.2] * 5]), STEPS).step == 200


def test_prompts_that_count_less_later_are_said():
    found = recommend(lines(subject_fidelity=LEARNT, prompt_fidelity=[0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.26]), STEPS)
    assert found.reason.endswith("; after 200 pictures follow their prompts less")


def test_a_lucky_picture_of_an_early_step_is_not_taken():
    assert recommend(lines(subject_fidelity=[0.0, 0.3, 0.85, 0.4, 0.8, 0.8, 0.8]), STEPS).step == 400


def test_a_lucky_picture_is_not_taken_where_only_steadier_steps_that_gained_less_are_left():
    short = lines(range(0, 400, 100), subject_fidelity=[0.1, 0.2, 0.9, 0.2])
    assert str(recommend(short, [100, 200, 300])) == (
        "step 100 is recommended: it is steadier than step 200, which gained more in likeness to the subject, but the "
        "step after that has far less, so it may be luck"
    )
    # What is left is taken for what the next step has of it too, and not for the lucky one beside it.
    assert recommend(lines(range(0, 600, 100), subject_fidelity=[0, 0.1, 0.9, 0.2, 0.25, 0.2]), STEPS).step == 300
    assert recommend(lines(range(0, 400, 100), subject_fidelity=[0, 0.3, 0.9, 0.1]), STEPS).step == 100


def test_a_lucky_picture_is_taken_where_no_other_step_gained_anything_and_that_is_said():
    found = recommend(lines(range(0, 400, 100), subject_fidelity=[0.1, 0.12, 0.9, 0.1]), [100, 200, 300])
    assert found.step == 200
    assert found.reason == (
        "it gained the most in likeness to the subject, though the step after it has far less, so it may be luck"
    )


def test_a_low_loss_at_fixed_noise_is_no_luck():
    found = recommend(lines(range(0, 500, 100), validation_loss=[0.5, 0.5, 0.1, 0.4, 0.4]), STEPS)
    assert found.step == 200 and "luck" not in found.reason


def test_where_a_better_step_is_not_saved_that_is_said():
    assert str(recommend(lines(range(0, 400, 100), subject_fidelity=[0.0, 0.1, 0.3, 0.5]), [100, 200])).endswith(
        "; later ones that are not saved gained more"
    )
    alone = recommend(lines(range(0, 400, 100), subject_fidelity=[0.0, 0.1, 0.2, 0.9]), [100, 200])
    assert str(alone) == (
        "step 200 is recommended: of the saved steps it gained the most in likeness to the subject (50% of the best "
        "gain); later ones that are not saved gained more"
    )


def test_of_later_steps_that_gained_more_one_by_one_and_not_on_average_that_is_said():
    found = recommend(lines(subject_fidelity=[0.0, 0.3, 0.8, 0.7, 0.7, 0.9, 0.7]), STEPS)
    assert found.step == 200
    assert found.reason == (
        "its previews are as like the subject as those of the best steps; some later steps gained more, but those "
        "beside them less, so it may be luck"
    )


FALLING = [0.2, 0.12, 0.105, 0.101, 0.1, 0.1, 0.1]


def test_previews_made_with_other_settings_than_at_first_are_not_compared_with_those():
    measured = lines(subject_fidelity=LEARNT, validation_loss=FALLING)
    for line in measured[4:]:
        line["previews"] = {"test_seed": 5}
    reason = recommend(measured, STEPS).reason
    assert "; by the loss, since previews of step 400 were made with other settings)" in reason
    for line in measured[:4]:
        line["previews"] = {"test_seed": 5}
    assert "by the loss" not in recommend(measured, STEPS).reason


def test_a_run_that_learnt_nothing_is_not_recommended_for_the_seed_of_its_later_previews():
    measured = lines(range(0, 10, 2), subject_fidelity=[0.2, 0.2, 0.2, 0.6, 0.6], validation_loss=[0.2] * 5)
    for line in measured:
        line["previews"] = {"test_seed": 1 if line["step"] <= 4 else 5}
    assert recommend(measured, [2, 4, 6, 8]).reason.startswith(
        "it is the least bad so far, since no step gained much in fit"
    )


def test_where_later_previews_were_not_judged_all_steps_are_compared_by_the_loss():
    steps = range(0, 70, 10)
    measured = lines(steps, subject_fidelity=[0.1, 0.6, *[0.0] * 5], validation_loss=[0.2, 0.18, *FALLING[2:]])
    for line in measured[2:]:
        del line["subject_fidelity"]
    assert str(recommend(measured, steps)) == (
        "step 20 is recommended: it fits the photographs nearly as well as the best steps (95% of the best gain; by "
        "the loss, since previews of step 20 were not judged); what comes after 20 adds little"
    )


def test_previews_of_step_0_that_were_not_judged_leave_the_loss_to_compare():
    measured = lines(subject_fidelity=LEARNT, validation_loss=FALLING)
    del measured[0]["subject_fidelity"]
    assert "(by the loss, since previews of step 0 were not judged)" in recommend(measured, [400]).reason


def test_a_single_step_whose_previews_were_not_judged_is_left_out_between_others():
    measured = lines(subject_fidelity=LEARNT, validation_loss=FALLING)
    del measured[2]["subject_fidelity"]
    found = recommend(measured, STEPS)
    assert found.step == 300 and "by the loss" not in found.reason
    # Two of them may hide the best step.
    del measured[3]["subject_fidelity"]
    assert "since previews of step 200 were not judged" in recommend(measured, STEPS).reason


def test_saved_steps_that_were_not_measured_are_said():
    assert recommend(lines(subject_fidelity=LEARNT), [*STEPS, 800]).reason.endswith(
        "; what comes after 200 adds little; steps after 600 were not measured"
    )


def test_only_steps_that_are_there_are_recommended():
    assert recommend(lines(subject_fidelity=LEARNT), [400, 600]).step == 400
    assert recommend(lines(subject_fidelity=[0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), STEPS).reason.endswith(
        "; it is the last one measured, and more steps may add more"
    )


def test_without_judged_previews_the_loss_at_fixed_noise_decides_and_that_is_said():
    found = recommend(lines(validation_loss=FALLING), STEPS)
    assert found.step == 200 and "by the loss, since previews were not judged" in found.reason
    forgotten = [0.1, 0.1, 0.15, 0.1, 0.1, 0.1, 0.1]
    found = recommend(lines(validation_loss=FALLING, class_loss=forgotten), STEPS)
    assert found.step == 300 and "; what the class lost is taken off; " in found.reason


def test_where_nothing_was_gained_the_step_that_lost_least_is_named():
    found = recommend(lines(subject_fidelity=[0.5, 0.1, 0.3, 0.2, 0.1, 0.1, 0.1]), STEPS)
    assert found.step == 200 and found.reason.startswith("it is the least bad so far, since no step gained much")
    # Nor is it a gain that pictures of one model differ by, or that the class made too.
    slight = lines(subject_fidelity=[0.0, 0.1, 0.18, 0.18, 0.18, 0.18, 0.18], class_leak=[0, 0.09, 0.17, *[0.18] * 4])
    assert recommend(slight, STEPS).reason.startswith("it is the least bad so far, since no step gained much")


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
