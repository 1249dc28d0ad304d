"""Which saved step of a run is best, by the figures that were measured while it trained; no model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean
from typing import Any

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
# What is gained by learning, and what the class loses, each with the sign of a gain: of judged previews, or without.
_JUDGED = (("subject_fidelity", 1), ("class_leak", -1))
_UNJUDGED = (("validation_loss", -1), ("class_loss", -1))


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
    unless the next one is far below. Where previews were not judged, or later ones are of other prompts than those of
    step 0, the gain is how far the loss at fixed noise fell, the loss how far that on class images rose, and the share
    SHARE_OF_LOSS.
    """
    lines = {line["step"]: line for line in figures}
    base = lines.get(0, {})
    # Previews of other prompts than at step 0 say nothing beside those.
    seen = [line.get("prompts") for line in lines.values() if finite(line.get(_JUDGED[0][0]))]
    same = seen.count(base.get("prompts")) == len(seen)
    gained, lost = _JUDGED if same and finite(base.get(_JUDGED[0][0])) else _UNJUDGED
    measured = sorted(step for step in lines if step and finite(lines[step].get(gained[0])))
    saved = set(among)
    usable = [step for step in measured if step in saved]
    if not usable or not finite(base.get(gained[0])):
        return None
    worth = {step: _gain(gained, base, lines[step]) - _loss(lost, base, lines[step]) for step in measured}
    beside = {step: measured[max(0, place - 1) : place + 2] for place, step in enumerate(measured)}
    best = max(mean(worth[near] for near in beside[step]) for step in usable)
    most = max(usable, key=worth.__getitem__)
    judged = gained is _JUDGED[0]
    why = "were not judged" if same else "have other prompts than at step 0"
    what = "likeness to the subject" if judged else f"what the photographs teach (previews {why})"
    if best <= (_NOTHING if judged else 0) or worth[most] <= 0:
        reason = f"it is the least bad: no step gained much in {what} beyond what its class lost"
        return Recommendation(most, f"{reason}; train longer or at a higher rate")
    enough = (SHARE if judged else SHARE_OF_LOSS) * best
    # A lucky picture has no such neighbour.
    step = next((s for s in usable if worth[s] >= enough and worth[beside[s][-1]] >= _NEXT * best), most)
    if judged and finite(base.get(lost[0])):
        what += ", less what the class took on of it"
    share = "all" if worth[step] >= best else f"{worth[step] / best:.0%}"
    reason = f"it has {share} of what the best steps gained in {what}"
    later = [worth[number] for number in measured if number > step]
    if later and max(later) > worth[step] + _NOTABLE * best:
        return Recommendation(step, f"{reason}; later ones gained more")
    return Recommendation(step, f"{reason}; {_afterwards(lines, step, lost, best)}")


def _afterwards(lines: dict[int, dict[str, Any]], step: int, lost: tuple[str, int], best: float) -> str:
    """What the steps after one did, in words."""
    own, later = lines[step], [line for number, line in lines.items() if number > step]
    if not later:
        return "it is the last one, and more steps may add more"
    signs = []
    if max(_loss(lost, own, line) for line in later) > _NOTABLE * best:
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
