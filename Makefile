# Two commands do everything on a fresh machine: `make demo` and `make test`. The rest is convenience.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export GRADIO_ANALYTICS_ENABLED := False

.PHONY: setup demo test lab bench corpus prepare clean

setup: .venv/installed

# torch first: any other package would pull torch's largest build
.venv/installed: constraints.txt settings.ini pyproject.toml
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed, this is ' + sys.version.split()[0]) if sys.version_info < (3, 11) else None"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,synthetic]"
	touch $@

demo: setup
	$(BIN)/talking-face walkthrough --out artifacts/demo

test: setup
	$(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/python -m pytest -n 2 --dist loadfile

lab: setup
	$(BIN)/jupyter lab nbs

bench: setup
	$(BIN)/python -m talking_face.app.bench

# renders data/embedded again and judges it; needs the head assets (its README says where they are from)
corpus: setup
	rm -rf artifacts/corpus
	$(BIN)/talking-face synthesize --out artifacts/corpus --identities 24 --clips 2 --seconds 3 --seed 1 --jobs 2
	$(BIN)/python -m talking_face.evaluation.corpus_truth artifacts/corpus
	rm -rf data/embedded
	mv artifacts/corpus data/embedded

# for those who change a notebook: export, clean, README
prepare: setup
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python -m talking_face.app.readme

clean:
	rm -rf .venv artifacts/demo artifacts/runs build dist talking_face.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
