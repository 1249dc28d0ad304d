"""The five notebooks in JupyterLab, in a browser, as a person uses them; `make browser-test` runs it.

The tests go through the notebooks in order, in one workspace. What a first-time user sees is kept as pictures in the
folder that DBKIT_PICTURES names.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from safetensors.torch import load_file
from tiny_tagger import save_tagger

from dbkit.log import read_log

ROOT = Path(__file__).parents[1]
CHROMIUM = Path(os.environ.get("DBKIT_CHROMIUM", "/usr/bin/chromium"))
PICTURES = Path(os.environ.get("DBKIT_PICTURES", "pictures"))
# How long a machine without a GPU may take for the longest cell, in seconds.
PATIENCE = 300
STEPS = 120

# What JupyterLab itself knows of the notebook that is in front.
NOTEBOOK = "const notebook = jupyterapp.shell.currentWidget; const cells = [...notebook.content.model.cells];"
CODE = f"{NOTEBOOK} const code = cells.filter(cell => cell.type === 'code');"
READY = """name => {
    const shown = window.jupyterapp?.shell.currentWidget;
    return shown?.context?.path === name && shown.context.sessionContext.session?.kernel?.status === 'idle';
}"""
CONNECTED = READY.replace(" === 'idle'", "")
COUNT = f"() => {{ {CODE} return Math.max(0, ...code.map(cell => cell.executionCount)); }}"
OUTPUTS = f"() => {{ {CODE} return code.flatMap(cell => cell.outputs.toJSON()); }}"
# Every cell was run since a cell had this count, or one failed.
RAN = f"""before => {{ {CODE}
    const idle = notebook.context.sessionContext.session?.kernel?.status === 'idle';
    const failed = code.some(cell => cell.outputs.toJSON().some(output => output.output_type === 'error'));
    return idle && (failed || code.every(cell => cell.executionState === 'idle' && cell.executionCount > before));
}}"""
RAN_ONE = f"""([place, before]) => {{ {CODE}
    const failed = code.some(cell => cell.outputs.toJSON().some(output => output.output_type === 'error'));
    return failed || (cells[place].executionState === 'idle' && cells[place].executionCount > before);
}}"""
# A code cell runs or has run, in a notebook that was opened with no outputs.
BEGUN = f"""place => {{ {CODE}
    return code[place].executionState === 'running' || code[place].executionCount !== null;
}}"""
PLACE_OF = f"""text => {{ {NOTEBOOK}
    const sources = cells.map(cell => cell.type === 'code' ? cell.sharedModel.source : '');
    return sources.includes(text) ? sources.indexOf(text) : sources.findIndex(source => source.includes(text));
}}"""
SCROLL = f"place => {{ {NOTEBOOK} return notebook.content.scrollToItem(place, 'start'); }}"


def until(holds, what: str) -> None:
    """Wait for a file or a process; for the page there is playwright's own waiting."""
    limit = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < limit, f"waited in vain for: {what}"
        time.sleep(0.05)


class Lab:
    """JupyterLab on a copy of the notebooks, with a workspace whose settings end soon."""

    def __init__(self, folder: Path) -> None:
        self.workspace, self.settings = folder / "workspace", folder / "workspace" / "settings"
        shutil.copytree(ROOT / "tests" / "notebook_settings", self.settings)
        save_tagger(self.workspace / "models" / "tagger")
        self.notebooks = folder / "notebooks"
        shutil.copytree(ROOT / "notebooks", self.notebooks, ignore=shutil.ignore_patterns("workspace", ".*"))
        # Nobody is asked about news of Jupyter's in front of the notebook.
        own_settings = folder / "SETTINGS" / "@jupyterlab" / "apputils-extension"
        own_settings.mkdir(parents=True)
        (own_settings / "notification.jupyterlab-settings").write_text(
            '{"fetchNews": "false", "checkForUpdates": false}'
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        own = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
        own |= {f"JUPYTERLAB_{name}_DIR": str(folder / name) for name in ("SETTINGS", "WORKSPACES")}
        environment = {**os.environ, **own, "DBKIT_WORKSPACE": str(self.workspace), "HF_HUB_OFFLINE": "1"}
        flags = [
            "--no-browser",
            "--allow-root",
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={port}",
            f"--ServerApp.root_dir={self.notebooks}",
            "--IdentityProvider.token=",
            "--LabApp.expose_app_in_browser=True",
        ]
        with (folder / "lab.log").open("w") as log:
            command = [sys.executable, "-m", "jupyterlab", *flags]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        until(self._answers, "JupyterLab's server")

    def _answers(self) -> bool:
        assert self.process.poll() is None, "JupyterLab's server ended"
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.address}/api/status").status == 200
        return False

    def kernel(self, notebook: str) -> psutil.Process:
        """The process of a notebook's kernel. A closed page leaves it running."""
        sessions = json.load(urllib.request.urlopen(f"{self.address}/api/sessions"))
        (number,) = (session["kernel"]["id"] for session in sessions if session["path"] == notebook)
        children = psutil.Process(self.process.pid).children(recursive=True)
        (found,) = (child for child in children if number in " ".join(child.cmdline()))
        return found

    def kept(self, name: str) -> dict:
        """A form's settings, as they lie on the disk."""
        file = self.settings / f"{name}.yaml"
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}

    def set_and_made(self) -> dict[Path, bytes]:
        """What a person set, wrote and made: forms, captions, saved steps, and whole models outside of the run."""
        places = ["settings/*.yaml", "datasets/*/*.txt", "runs/*/checkpoints/**/*.safetensors"]
        places += ["models/**/*.safetensors"]
        return {path: path.read_bytes() for place in places for path in self.workspace.glob(place)}

    def run(self) -> Path:
        (log,) = self.workspace.glob("runs/*/log.jsonl")
        return log.parent

    def steps(self) -> list[int]:
        """The steps in the log of the one run; none before it begins."""
        logs = list(self.workspace.glob("runs/*/log.jsonl"))
        return [line["step"] for line in read_log(logs[0])] if logs else []


class Notebook:
    """A notebook in a browser of its own, opened by its name."""

    def __init__(self, browser: Browser, lab: Lab, name: str) -> None:
        self.lab, self.name = lab, f"{name}.ipynb"
        self.page: Page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.page.set_default_timeout(60_000)
        self.page.goto(f"{lab.address}/lab/tree/{self.name}?reset")
        self.page.wait_for_function(READY, arg=self.name)

    def run_all(self, wait: bool = True) -> None:
        before = self.page.evaluate(COUNT)
        self.menu("Run", "Run All Cells")
        if wait:
            self.wait_until_ran(before)

    def run_to(self, source: str) -> None:
        """Run the cells from the first to the one that has this text."""
        self.cell(source).locator(".jp-InputPrompt").click()
        self.menu("Run", "Run All Above Selected Cell")
        self.run(source)

    def run(self, source: str) -> None:
        """Run one cell, and wait for it."""
        before = self.page.evaluate(COUNT)
        self.cell(source).locator(".jp-InputPrompt").click()
        self.page.keyboard.press("Control+Enter")
        self.page.wait_for_function(RAN_ONE, arg=[self.page.evaluate(PLACE_OF, source), before])
        assert not self.errors()

    def reload(self) -> None:
        self.page.reload()
        self.page.wait_for_function(CONNECTED, arg=self.name)

    def kill(self) -> None:
        """End the kernel and the page with no chance to say good-bye."""
        kernel = self.lab.kernel(self.name)
        kernel.send_signal(signal.SIGKILL)
        self.page.close()
        kernel.wait()

    def wait_until_ran(self, before: int) -> None:
        self.page.wait_for_function(RAN, arg=before, timeout=PATIENCE * 1000)
        assert not self.errors()

    def errors(self) -> list[dict]:
        return [output for output in self.page.evaluate(OUTPUTS) if output["output_type"] == "error"]

    def menu(self, name: str, entry: str) -> None:
        self.page.locator(".lm-MenuBar-item", has_text=name).click()
        self.page.locator(".lm-Menu-itemLabel").get_by_text(entry, exact=True).click()

    def cell(self, source: str) -> Locator:
        """The cell that has this text, scrolled to: JupyterLab draws those alone that are in sight."""
        place = self.page.evaluate(PLACE_OF, source)
        assert place >= 0, source
        self.page.evaluate(SCROLL, place)
        return self.page.locator(f".jp-Cell[data-windowed-list-index='{place}']")

    def row(self, field: str) -> Locator:
        return self.page.locator(".widget-hbox").filter(has=self.page.locator(f"b:text-is('{field}')"))

    def wait_for_row(self, source: str, title: str) -> None:
        """A row of a form's summary, the cell scrolled to again and again: outputs above it move it out of sight."""
        until(lambda: self.cell(source).locator(f"b:text-is('{title}')").is_visible(), f"{title} under the form")

    def fill(self, field: str, text: str) -> None:
        box = self.row(field).locator("input, textarea")
        box.fill(text)
        box.press("Tab")

    def picture(self, name: str, source: str) -> None:
        """Keep a cell as a picture, on a page so high that all of it is drawn."""
        self.page.set_viewport_size({"width": 1280, "height": 3200})
        # A click elsewhere would change what is in front; the mouse over a cell shows its buttons.
        self.page.mouse.move(0, 0)
        self.cell(source).screenshot(path=PICTURES / f"{name}.png")
        self.page.set_viewport_size({"width": 1280, "height": 900})


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.process.terminate()
    lab.process.wait()


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.fail(f"there is no {CHROMIUM}; `apt-get install chromium`, or name another in DBKIT_CHROMIUM")
    expect.set_options(timeout=60_000)
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, lab):
    """Opens a notebook; all are closed at the end of the test."""
    books = []

    def open_notebook(name: str) -> Notebook:
        books.append(Notebook(browser, lab, name))
        return books[-1]

    yield open_notebook
    for book in books:
        if not book.page.is_closed():
            book.page.close()


def test_the_first_notebook_says_where_the_workspace_is(opened, lab):
    book = opened("1_mount_drive")
    book.run_all()
    assert str(lab.workspace) in json.dumps(book.page.evaluate(OUTPUTS))


def test_a_model_is_converted_to_the_folder_that_was_typed(opened, lab):
    book = opened("2_convert")
    book.run_all()
    book.cell("settings = form(")
    book.fill("destination", "models/small")
    until(lambda: lab.kept("convert").get("destination") == "models/small", "the field on the disk")
    book.picture("2_form", "settings = form(")
    book.run_all()
    assert (lab.workspace / "models" / "small" / "model_index.json").exists()
    book.picture("2_look", "print(model)")


def test_pictures_are_prepared_and_a_caption_is_edited(opened, lab):
    book = opened("3_caption")
    book.run_all()
    book.cell("settings = form(")
    expect(book.row("resolution").locator("input")).to_have_value("32")
    book.fill("resolution", "7")
    expect(book.row("resolution")).to_contain_text("it must be")
    book.picture("3_form", "settings = form(")
    book.fill("resolution", "32")
    expect(book.row("resolution")).not_to_contain_text("it must be")
    assert lab.kept("prepare")["resolution"] == "32"
    book.run_all()
    book.picture("3_report", "report")
    book.picture("3_caption", "captioner = form(")
    caption = book.cell("caption_editor").locator("textarea").first
    caption.fill("photo of a pink poodle, at the beach")
    caption.press("Tab")
    written = lab.workspace / "datasets" / "poodle" / "poodle_beach.txt"
    until(lambda: "pink poodle" in written.read_text(encoding="utf-8"), "the caption on the disk")
    book.picture("3_editor", "caption_editor")


def test_a_training_goes_on_through_a_reload_of_the_page(opened, lab):
    book = opened("4_train")
    # The form alone, to fill it in before anything is trained.
    book.run_to("settings = form(")
    form = book.cell("settings = form(")
    book.fill("max_train_steps", "-3")
    expect(book.row("max_train_steps")).to_contain_text("it must be")
    book.picture("4_message", "settings = form(")
    book.fill("max_train_steps", str(STEPS))
    expect(book.row("max_train_steps")).not_to_contain_text("it must be")
    book.fill("save_model_every_n_steps", str(STEPS // 4))
    until(lambda: lab.kept("train").get("save_model_every_n_steps") == str(STEPS // 4), "the fields on the disk")
    expect(form).to_contain_text(f"{STEPS} steps x 4 images")
    # The last thing that is found out.
    expect(form.locator("b:text-is('disk')")).to_be_visible()
    book.picture("4_form", "settings = form(")
    book.run_all(wait=False)
    until(lambda: max(lab.steps(), default=0) >= STEPS // 2, "half of the steps")
    training = book.cell("dbkit.train(")
    expect(training).to_contain_text("a process is at work")
    book.picture("4_training", "dbkit.train(")
    kernel = lab.kernel(book.name)
    book.reload()
    assert max(lab.steps()) < STEPS, "the training ended before the page was there again"
    book.run_all()
    assert lab.kernel(book.name) == kernel
    book.cell("settings = form(")
    expect(book.row("max_train_steps").locator("input")).to_have_value(str(STEPS))
    steps = lab.steps()
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    book.picture("4_watch", "dbkit.watch(")
    # Who has this notebook alone has a file too.
    (made,) = lab.workspace.glob("exports/*.safetensors")
    assert str(made) in json.dumps(book.page.evaluate(OUTPUTS)) and load_file(made)


def test_a_form_that_is_run_again_soon_after_a_change_is_drawn_whole(opened, lab):
    book = opened("4_train")
    mistakes = []
    book.page.on("console", lambda message: mistakes.append(message.text) if "not found" in message.text else None)
    book.run_to("settings = form(")
    form_cell = "settings = form("
    form = book.cell(form_cell)
    book.wait_for_row(form_cell, "disk")
    rows = book.page.locator(".jp-OutputArea-output .widget-hbox").count()
    steps = book.row("max_train_steps").locator("input").input_value()
    # So fast is a person: the fields' summary is worked on meanwhile.
    for pause in (100, 200, 300, 400, 500, 600, 700, 800):
        book.fill("max_train_steps", str(STEPS + pause))
        book.page.wait_for_timeout(pause)
        # A click beside the cell would leave the cursor in the field.
        form.locator(".jp-InputArea .cm-content").click()
        before = book.page.evaluate(COUNT)
        book.page.keyboard.press("Control+Enter")
        book.page.wait_for_function(RAN_ONE, arg=[book.page.evaluate(PLACE_OF, "settings = form("), before])
        book.wait_for_row(form_cell, "disk")
        expect(form).not_to_contain_text("javascript error")
        expect(book.page.locator(".jp-OutputArea-output .widget-hbox")).to_have_count(rows)
        assert not mistakes and not book.errors()
    book.fill("max_train_steps", steps)
    until(lambda: str(lab.kept("train").get("max_train_steps")) == steps, "the field on the disk")


def test_a_killed_kernel_and_browser_lose_nothing_that_was_set_or_trained(opened, lab):
    book = opened("4_train")
    book.run_to("settings = form(")
    book.cell("settings = form(")
    book.fill("max_train_steps", str(2 * STEPS))
    until(lambda: lab.kept("train").get("max_train_steps") == str(2 * STEPS), "the field on the disk")
    book.kill()

    book = opened("4_train")
    book.run_all(wait=False)
    until(lambda: max(lab.steps()) >= STEPS + STEPS // 3, "steps after those that were finished")
    book.kill()
    log, states = lab.run() / "log.jsonl", [int(path.name[5:]) for path in (lab.run() / "resume").glob("step_??????")]
    kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= max(states)]
    assert max(states) > STEPS and lab.steps()[-1] < 2 * STEPS

    book = opened("4_train")
    book.run_all()
    book.cell("settings = form(")
    expect(book.row("max_train_steps").locator("input")).to_have_value(str(2 * STEPS))
    # The lines hold times, so those of steps that were taken again would differ.
    assert log.read_text().splitlines()[: len(kept)] == kept and lab.steps()[-1] == 2 * STEPS
    book.picture("4_again", "dbkit.train(")

    book.cell("looks = form(")
    book.fill("num_inference_steps", "25")
    book.run("dbkit.preview(")
    assert lab.kept("preview")["num_inference_steps"] == "25"
    expect(book.cell("dbkit.preview(").locator("img")).to_be_visible()
    book.picture("4_looks", "looks = form(")
    book.picture("4_preview", "dbkit.preview(")


def test_the_recommended_step_is_looked_at_and_exported(opened, lab):
    book = opened("5_export")
    book.run_to("settings = form(")
    shown = book.cell("dbkit.saved_models(")
    expect(shown).to_contain_text("recommended")
    book.picture("5_saved", "dbkit.saved_models(")
    slider = shown.locator("input[type=range]")
    # By the mouse, then by the keyboard.
    slider.click()
    expect(shown.locator("code >> visible=true")).to_have_count(1)
    slider.press("Home")
    expect(shown.locator("code >> visible=true")).not_to_have_count(1)
    slider.press("ArrowRight")
    expect(shown.locator("code >> visible=true")).to_contain_text("step_")
    book.picture("5_one_step", "dbkit.saved_models(")
    book.cell("settings = form(")
    book.fill("destination", "exports/mine.safetensors")
    until(lambda: lab.kept("export").get("destination") == "exports/mine.safetensors", "the field on the disk")
    book.picture("5_form", "settings = form(")
    book.run_all()
    book.picture("5_export", "checkpoint = ")
    book.picture("5_look", "print(checkpoint)")
    tensors = load_file(lab.workspace / "exports" / "mine.safetensors")
    assert "model.diffusion_model.input_blocks.0.0.weight" in tensors


@pytest.mark.parametrize("name", ["3_caption", "4_train", "5_export"])
def test_a_kill_at_any_cell_loses_nothing_that_was_set_or_made(opened, lab, name):
    more = max(lab.steps()) + STEPS // 2
    book = opened("4_train")
    book.run_to("settings = form(")
    book.cell("settings = form(")
    book.fill("max_train_steps", str(more))
    until(lambda: lab.kept("train").get("max_train_steps") == str(more), "the field on the disk")
    book.kill()
    log = lab.run() / "log.jsonl"
    before, lines = lab.set_and_made(), log.read_bytes()

    book = opened(name)
    count = len(book.page.evaluate(f"() => {{ {CODE} return code.map(cell => cell.type); }}"))
    for place in range(count):
        book.run_all(wait=False)
        book.page.wait_for_function(BEGUN, arg=place, timeout=PATIENCE * 1000)
        book.kill()
        after = lab.set_and_made()
        assert {path: after.get(path) for path in before} == before and log.read_bytes().startswith(lines)
        # What is made anew is the old one or the new one.
        assert load_file(lab.run() / "model" / "unet" / "diffusion_pytorch_model.safetensors")
        assert load_file(lab.workspace / "exports" / "mine.safetensors")
        shutil.copy(ROOT / "notebooks" / book.name, lab.notebooks)
        book = opened(name)
    book.page.close()

    book = opened("4_train")
    book.run_all()
    book.cell("settings = form(")
    expect(book.row("max_train_steps").locator("input")).to_have_value(str(more))
    steps = lab.steps()
    assert steps == sorted(set(steps)) and steps[-1] == more and log.read_bytes().startswith(lines)
