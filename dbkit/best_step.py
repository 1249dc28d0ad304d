"""Which saved step of a run is best, by the figures that were measured while it trained; no model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple

from dbkit.run_folder import finite

# What of the best is good enough: what comes later adds little, and costs what no figure sees. Of losses less is
# enough, since they go on falling where photographs are learnt by heart.
SHARE, SHARE_OF_LOSS = 0.95, 0.9
# Likeness, a cosine, that is no gain: by about so much the pictures of one model differ.
_NOTHING = 0.05
# What the next step has at least where a step is good, and not its picture alone lucky.
_NEXT = 0.75
# What is worth telling of what came later, as a share of what was gained.
_NOTABLE = 0.1
# Each figure that is measured, and how to read it.
MEANINGS = {
    "subject_fidelity": "likeness of the previews to the subject; higher is closer",
    "prompt_fidelity": "agreement of the previews with their prompts; falls where the subject is all that is drawn",
    "class_leak": "drift: likeness of the class's previews to the subject; should stay as at step 0",
    "validation_loss": "loss on the photographs at fixed noise; falls as they are learnt, and by heart too",
    "class_loss": "loss on the class images at fixed noise; rises where the class is forgotten",
}


class _Way(NamedTuple):
    """A way to compare steps: the figure that is gained and the one that is lost, each with the sign of a gain.

    share of the best is enough, and up to nothing is no gain; the rest says it in words.
    """

    gained: tuple[str, int]
    lost: tuple[str, int]
    share: float
    nothing: float
    what: str
    best: str
    of_class: str


_BY_PREVIEWS = _Way(
    ("subject_fidelity", 1),
    ("class_leak", -1),
    SHARE,
    _NOTHING,
    "likeness to the subject",
    "its previews are {}as like the subject as those of the best steps",
    "likeness that the class took on too does not count",
)
_BY_LOSS = _Way(
    ("validation_loss", -1),
    ("class_loss", -1),
    SHARE_OF_LOSS,
    0,
    "fit to the photographs",
    "it fits the photographs {}as well as the best steps",
    "what the class lost is taken off",
)


@dataclass(frozen=True)
class Recommendation:
    """A step of a run to use, and why, as the end of a sentence."""

    step: int
    reason: str

    def __str__(self) -> str:
        return f"step {self.step} is recommended: {self.reason}"


def recommend(figures: list[dict[str, Any]], among: Iterable[int]) -> Recommendation | None:
    """The best of some steps by the lines of a figures.jsonl; None where step 0 or none of them was measured.

    A step is worth what it gained since step 0 less what the class lost. The gain is in likeness of the previews to the
    photographs, the loss in likeness of the class's previews to them. The best is the highest mean of a step and those
    beside it, since a single picture may be a lucky one. The earliest step that is worth SHARE of it is recommended,
    unless the next one is far below; where that is so of all of them, a steadier one that gained less, if there is one
    (by the loss, which is no matter of luck, the best of all).

    Where previews are not judged as far as steps are measured, or not all made with the settings of step 0, the gain is
    how far the loss at fixed noise fell, the loss how far that on class images rose, and the share SHARE_OF_LOSS.
    """
    lines = {line["step"]: line for line in figures}
    base, saved, gap = lines.get(0, {}), set(among), _first_unlike(lines)
    way = _BY_PREVIEWS if gap is None else _BY_LOSS
    known = [step for step in sorted(lines) if finite(lines[step].get(way.gained[0]))]
    measured = [step for step in known if step and (gap is not None or _is_like(lines, step))]
    usable = [step for step in measured if step in saved]
    if not usable or not finite(base.get(way.gained[0])):
        return None
    worth = {step: _gain(way.gained, base, lines[step]) - _loss(way.lost, base, lines[step]) for step in measured}
    beside = {step: measured[max(0, place - 1) : place + 2] for place, step in enumerate(measured)}
    best = max(mean(worth[near] for near in beside[step]) for step in usable)
    most = max(usable, key=worth.__getitem__)
    notes = [way.of_class] if finite(base.get(way.lost[0])) else []
    if gap is not None:
        notes.append(f"by the loss, since {_why_unlike(lines, gap)}")
    if best <= way.nothing or worth[most] <= 0:
        # Read while a training runs too.
        reason = f"it is the least bad so far, since no step gained much in {way.what}{_in_brackets(notes)}"
        return Recommendation(most, f"{reason}; more steps or a higher learning_rate may help")
    good = [step for step in usable if worth[step] >= way.share * best]
    after = {step: worth[beside[step][-1]] for step in measured}
    # A lucky picture has no such neighbour.
    steady = [step for step in good if after[step] >= _NEXT * best]
    if good and not steady and gap is None:
        others = {step: min(worth[step], after[step]) for step in usable if step not in good}
        return _without_luck(way, others, most, _in_brackets(notes))
    step = steady[0] if steady else most
    share = f"{worth[step] / best:.0%}" if worth[step] < best else "100%"
    if share != "100%":
        notes.insert(0, f"{share} of the best gain")
    reason = way.best.format("nearly " if share != "100%" else "")
    if not good:
        reason = f"of the saved steps it gained the most in {way.what}"
    reason += f"{_in_brackets(notes)}; {_afterwards(way, lines, worth, step, best, saved)}"
    unmeasured = step < measured[-1] < max(saved)
    return Recommendation(step, f"{reason}; steps after {measured[-1]} were not measured" if unmeasured else reason)


def _is_like(lines: dict[int, dict[str, Any]], step: int) -> bool:
    """Whether the previews of a step were judged, and made with the same settings as those of step 0."""
    line, base = lines.get(step, {}), lines.get(0, {})
    return finite(line.get(_BY_PREVIEWS.gained[0])) and line.get("previews") == base.get("previews")


def _first_unlike(lines: dict[int, dict[str, Any]]) -> int | None:
    """The step from which on previews say nothing beside those of step 0; None where they do.

    A single step without such previews is left out, since those before and after it tell enough.
    """
    steps = [
        s for s in sorted(lines) if s and any(finite(lines[s].get(way.gained[0])) for way in (_BY_PREVIEWS, _BY_LOSS))
    ]
    like = [_is_like(lines, 0), *(_is_like(lines, step) for step in steps)]
    if not like[0]:
        return 0
    return next((step for step, *two in zip(steps, like[1:], [*like[2:], False]) if not any(two)), None)


def _why_unlike(lines: dict[int, dict[str, Any]], gap: int) -> str:
    """Why previews are not compared, of which those of the step `gap` are the first that cannot be."""
    name = _BY_PREVIEWS.gained[0]
    if not any(finite(line.get(name)) for line in lines.values()):
        return "previews were not judged"
    what = "made with other settings" if finite(lines.get(gap, {}).get(name)) else "not judged"
    return f"previews of step {gap} were {what}"


def _without_luck(way: _Way, others: dict[int, float], most: int, notes: str) -> Recommendation:
    """A steadier step than those that are good and not followed by a good one, if there is one that gained anything.

    others has what both it and the next one are worth, most is the step that is worth the most.
    """
    best = max(others.values(), default=0)
    luck = "has far less, so it may be luck"
    if best <= way.nothing:
        return Recommendation(most, f"it gained the most in {way.what}{notes}, though the step after it {luck}")
    step = next(step for step, value in others.items() if value >= way.share * best)
    reason = f"it is steadier than step {most}, which gained more in {way.what}{notes}, but the step after that {luck}"
    return Recommendation(step, reason)


def _in_brackets(notes: list[str]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""


def _afterwards(
    way: _Way, lines: dict[int, dict[str, Any]], worth: dict[int, float], step: int, best: float, saved: set[int]
) -> str:
    """What the measured steps after one did, in words."""
    own, after = lines[step], [number for number in worth if number > step]
    if not after:
        return "it is the last one measured, and more steps may add more"
    higher = {number for number in after if worth[number] > worth[step] + _NOTABLE * best}
    if higher - saved:
        return "later ones that are not saved gained more"
    if higher:
        luck = ", so it may be luck" if way is _BY_PREVIEWS else ""
        return f"some later steps gained more, but those beside them less{luck}"
    later, signs = [lines[number] for number in after], []
    if max(_loss(way.lost, own, line) for line in later) > _NOTABLE * best:
        signs.append("the class drifts")
    # Against what the words agreed with at the beginning, since judges differ in their scales.
    agreed = lines[0].get("prompt_fidelity")
    most = _NOTABLE * abs(agreed) if finite(agreed) else 0
    if max(_loss(("prompt_fidelity", 1), own, line) for line in later) > most > 0:
        signs.append("pictures follow their prompts less")
    return f"after {step} {' and '.join(signs)}" if signs else f"what comes after {step} adds little"


def _gain(figure: tuple[str, int], before: dict[str, Any], after: dict[str, Any]) -> float:
    """How much better a figure became; 0 where it was not measured."""
    name, sign = figure
    known = finite(before.get(name)) and finite(after.get(name))
    return sign * (after[name] - before[name]) if known else 0.0


def _loss(figure: tuple[str, int], before: dict[str, Any], after: dict[str, Any]) -> float:
    return max(0.0, -_gain(figure, before, after))
