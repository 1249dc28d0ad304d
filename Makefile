# Everything that CI does can be typed here. Windows: use Git Bash or the commands in the README.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
READY := $(VENV)/ready
WORKSPACE_OF_TESTS := $(VENV)/workspace
OF_COLAB := $(VENV)/of_colab

# The models of the tests are so small that one thread is fastest.
unit notebooks forms-on-colab colab-test browser-test: export OMP_NUM_THREADS = 1

.PHONY: demo test lint unit notebooks forms-on-colab colab-test browser-test soak convert-check docs badges wheel clean

demo: $(READY)  ## the whole main job on a small model and sample pictures
	$(BIN)/dbkit demo

test: lint unit notebooks forms-on-colab  ## everything CI runs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

unit: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# By nbval in order, in a workspace seeded with settings that end soon, so that a person and CI take one path.
define RUN_NOTEBOOKS
	rm -rf $(WORKSPACE_OF_TESTS)
	mkdir -p $(WORKSPACE_OF_TESTS)
	cp -r tests/notebook_settings $(WORKSPACE_OF_TESTS)/settings
	$(BIN)/python tests/tiny_tagger.py $(WORKSPACE_OF_TESTS)/models/tagger
	DBKIT_WORKSPACE=$(abspath $(WORKSPACE_OF_TESTS)) $(BIN)/python -m pytest -x --nbval-lax --nbval-current-env \
	  --nbval-cell-timeout 300 notebooks
endef

notebooks: $(READY)
	$(RUN_NOTEBOOKS)

# In a folder before the others, so that the environment keeps its version 8.
forms-on-colab: export PYTHONPATH = $(abspath $(OF_COLAB))
forms-on-colab: $(READY)  ## the widgets and the notebooks with the ipywidgets that Colab has
	rm -rf $(OF_COLAB)
	$(BIN)/python -m pip install -q --no-deps --target $(OF_COLAB) ipywidgets==7.7.1 ipython_genutils==0.2.0
	IPYWIDGETS=7.7.1 $(BIN)/python -m pytest -q tests/test_forms.py tests/test_editor.py
	$(RUN_NOTEBOOKS)

# Pictures of what was seen are left in .venv/browser. No part of `test`: not every machine has a browser.
browser-test: $(READY)  ## the notebooks in JupyterLab, by Chromium: /usr/bin/chromium, or the one that DBKIT_CHROMIUM names
	$(BIN)/python -m pip install -q -c constraints.txt "jupyterlab>=4.2" "playwright>=1.45"
	DBKIT_PICTURES=$(abspath $(VENV))/browser $(BIN)/python -m pytest -x tests/browser_notebooks.py

# The environment is Colab's by its versions, but for Python and torch, which are those of this folder.
COLAB_VENV := .venv-colab
COLAB_BIN := $(COLAB_VENV)/bin

colab-test: $(READY) $(COLAB_VENV)/ready wheel  ## the notebooks among Colab's versions, with a stand-in of its Drive: Linux, 2 GB, minutes
	COLAB_VENV=$(COLAB_VENV) COLAB_WHEEL=$$(ls -t dist/dbkit-*.whl | head -n 1) $(BIN)/python -m pytest tests/colab_notebooks.py

$(COLAB_VENV)/ready: tests/colab_packages.txt constraints.txt
	rm -rf $(COLAB_VENV)
	$(PYTHON) -m venv $(COLAB_VENV)
	(grep -v '^torch==' tests/colab_packages.txt; grep '^torch==' constraints.txt) > $(COLAB_VENV)/packages.txt
	$(COLAB_BIN)/python -m pip install -q -r $(COLAB_VENV)/packages.txt
	$(COLAB_BIN)/python -m pip uninstall -q -y jedi
	$(COLAB_BIN)/python -m pip install -q pip==24.1.2
	touch $(COLAB_VENV)/ready

soak: $(READY)  ## kill a training at 60 random moments; DBKIT_SEED chooses others
	DBKIT_KILLS=60 $(BIN)/python -m pytest tests/test_kill.py

# OPTIONS='--width small' takes seconds; benchmarks/convert.py --help lists all.
convert-check: $(READY)  ## prove conversion on full-size models, beside diffusers' own: 10 GB of disk, minutes
	$(BIN)/python benchmarks/convert.py $(OPTIONS)

docs: $(READY)  ## write docs/settings.md from the settings classes
	$(BIN)/python docs/settings_page.py

badges: $(READY)  ## Colab badges in the READMEs: REPOSITORY=owner/name says where this folder is public on GitHub
	$(BIN)/python docs/badges.py $(REPOSITORY)

wheel: $(READY)  ## dist/dbkit-*.whl, to put in Drive for Colab
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

clean:
	rm -rf $(VENV) $(COLAB_VENV) build dist *.egg-info

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]" --config-settings editable_mode=compat
	touch $(READY)
