"""What stands under the form of training: what its settings come to, found out in a thread while the form is used.

No model is loaded, only its tokenizer; nothing is printed, written, or asked of the Hub.
"""

from __future__ import annotations

import contextlib
import html
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

from dbkit.auto import settings_and_reasons
from dbkit.checkpoint import Checkpoint, by_step, read_manifest
from dbkit.concepts import Concept, concepts_of, warnings
from dbkit.errors import CannotGoOn, DbkitError, counted
from dbkit.examples import Example, describe_pictures, describe_prompts, instance_examples, unread_examples
from dbkit.identifier import how_read
from dbkit.libraries import only_cached
from dbkit.plan import Plan, Where, estimate
from dbkit.planning import (
    arithmetic,
    check_settings,
    holds_run,
    make_order,
    preview_prompts,
    total_steps,
    warnings_of,
)
from dbkit.resume import check_same_run, identity_of, settled
from dbkit.settings import replace
from dbkit.tokenizer import load_tokenizer, model_tokenizer
from dbkit.train_config import TrainConfig

Value = TypeVar("Value")
# The name of the thread.
BACKGROUND = "summary of a form"
# The title of the row that says what is wrong, the last one.
WRONG = "to be changed"
# Each change of the form looks at the pictures again, so of many it does not.
MOST_PICTURES = 200


class Background(Generic[Value]):
    """Shows the steps of some work on the value that was given last, from a thread that ends with it."""

    def __init__(self, steps: Callable[[Value], Generator[str, None, None]]) -> None:
        self._steps = steps
        self._lock, self._thread = threading.Lock(), None
        self._waiting: list[tuple[Value, Callable[[str], None]]] = []

    def give(self, value: Value, show: Callable[[str], None]) -> None:
        """Begin with a value, after the step that is being worked on; what is still to be shown of others is not."""
        with self._lock:
            self._waiting = [(value, show)]
            if not (self._thread and self._thread.is_alive()):
                self._thread = threading.Thread(target=self._work, name=BACKGROUND)
                self._thread.start()

    def finish(self) -> None:
        """Wait until all is shown."""
        thread = self._thread
        if thread:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                value, show = self._waiting.pop()
            with contextlib.closing(self._steps(value)) as texts:
                for text in texts:
                    with self._lock:
                        if self._waiting:
                            break
                        show(text)


def summarize(config: TrainConfig | None) -> Generator[str, None, None]:
    """The summary as HTML, with more in it each time; nothing for settings that are not right."""
    if config is None:
        yield ""
        return
    token = only_cached.set(True)
    rows: list[tuple[str, str]] = []
    try:
        for found in _found(config):
            rows += found
            yield _table(rows) + "<p>…</p>"
    except DbkitError as error:
        rows.append((WRONG, str(error)))
    except Exception as error:  # nobody would see it: a cell that shows a thread's mistakes may be any
        rows.append(("not known", f"{type(error).__name__}: {error}"))
    finally:
        only_cached.reset(token)
    yield _table(rows)


def _found(config: TrainConfig) -> Iterator[list[tuple[str, str]]]:
    """Rows of the summary, each a title and a text, the quick ones first."""
    where, concepts = Where.of(config), concepts_of(config)
    examples = unread_examples(config, concepts)
    rows = [("images", "\n".join(describe_prompts(examples, concepts)))]
    if config.auto_test_model:
        rows.append(("previews of", "\n".join(preview_prompts(config, examples, concepts))))
    yield rows
    asked, config = config, settled(config, where.run, where.home)
    config, reasons = settings_and_reasons(config, where.saved, where.device, where.dtype)
    check_settings(config, where.run)
    order = make_order(config, concepts, examples)
    total = total_steps(config, order)
    chosen = "\n".join(reason.removeprefix("auto: ") for reason in reasons)
    yield [("chosen", chosen)] * bool(chosen) + [("steps", arithmetic(config, total, order, len(examples)))]
    if len(examples) > MOST_PICTURES:
        pictures = [f"{counted(len(examples), 'picture')}, which are looked at when training starts"]
    else:
        instance = instance_examples(config, concepts)
        pictures = describe_pictures(instance)
        try:
            _check_continues(config, where, instance)
        except CannotGoOn:
            # As in training: to start over was asked for already.
            if not asked.start_over:
                raise
            config = replace(config, start_over=True)
    yield [("pictures", "\n".join((*pictures, *warnings(concepts), *warnings_of(config))))]
    # One that is not here yet, or damaged, is said where the model is.
    with contextlib.suppress(DbkitError):
        yield [("prompts", "\n".join(_how_read(config, concepts, examples)))]
    begins = _begins(config, where, total, asked.start_over)
    yield begins
    try:
        made = estimate(config, where, search=False)
        if not made.fits:
            yield []
            made = estimate(config, where)
    except DbkitError as error:
        yield [("memory", f"not known yet: {error}")]
    else:
        finished = any(title == "finished" for title, _ in begins)
        yield _needs(made) + [("time", made.time)] * (not finished)


def _how_read(config: TrainConfig, concepts: list[Concept], examples: list[Example]) -> list[str]:
    """What training says of its prompts, by the tokenizer alone."""
    name = config.pretrained_model_name_or_path
    other = config.tokenizer_name
    tokenizer = load_tokenizer(other) if other else model_tokenizer(name, config.revision)
    prompts = [prompt for example in examples for prompt in example.prompts]
    prompts += [concept.class_prompt for concept in concepts if config.with_prior_preservation]
    return how_read(tokenizer, concepts, list(dict.fromkeys(prompts)))


def _check_continues(config: TrainConfig, where: Where, instance: list[Example]) -> None:
    """Raise DbkitError if the folder holds a run of other settings or data, as train() does."""
    states = by_step(where.saved / "resume")
    manifest = None if config.start_over or not states else read_manifest(states[max(states)])
    if manifest:
        # Whether its files are whole is looked at when training starts: on a Drive that takes minutes.
        saved = Checkpoint(states[max(states)], manifest["step"], manifest["facts"])
        library = saved.facts["settings"].get("library of the optimizer")
        check_same_run(saved, identity_of(config, library, instance), where.home)


def _begins(config: TrainConfig, where: Where, total: int, asked_to_start_over: bool) -> list[tuple[str, str]]:
    """What becomes of the run that the folder holds, if there is one, as a row."""
    done = max(by_step(where.saved / "resume"), default=0)
    if config.start_over:
        there = next((folder for folder in (where.saved, where.home) if holds_run(folder)), None)
        steps = f" ({counted(done, 'step')})" if done else ""
        return [("starts over", f"the run in {there}{steps} is moved aside")] if there else []
    if done >= total:
        return [("finished", f"all {counted(done, 'step')} are done; to train further, raise max_train_steps")]
    already = "; start_over was done already" * asked_to_start_over
    return [("goes on", f"after step {done}, which is saved{already}")] if done else []


def _needs(made: Plan) -> list[tuple[str, str]]:
    """The rows of a plan, but for the parts of the memory."""
    return [row for row in made.rows() if not row[0].startswith((" ", "memory in", "steps"))]


def _table(rows: list[tuple[str, str]]) -> str:
    cells = (
        "<tr style='vertical-align:top'><td style='padding-right:1em;white-space:nowrap'><b>{}</b></td><td>{}</td></tr>"
    )
    filled = "".join(cells.format(_lines(title), red(text) if title == WRONG else _lines(text)) for title, text in rows)
    heading = "<h3 style='margin:12px 0 4px'>What this comes to</h3>"
    return f"{heading}<table style='line-height:1.4;text-align:left'>{filled}</table>"


def red(text: str) -> str:
    """A sentence that says what is wrong, as HTML that can be read on light and dark."""
    return f"<span style='color:crimson'>{_lines(text)}</span>"


def _lines(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")
