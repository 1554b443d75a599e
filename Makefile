# Everything runs in environments of its own under .venv/, made with uv from the pins in constraints/.
# With PYTHON=python3.13 they are those under .venv/py3.13/, made with the same pins.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# The supported versions are the classifiers; by default the lowest Python of this machine among them.
SUPPORTED := $(shell sed -n 's/^ *"Programming Language :: Python :: \(3\.[0-9]*\)",$$/\1/p' pyproject.toml)
ifeq ($(origin PYTHON),undefined)
PYTHON := $(or $(shell scripts/pythons 1),python3)
endif
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# Tools and servers are programs beside the tests: they have one environment each, made with the lowest Python.
TOOLS := .venv
TOOLS_PYTHON = $(or $(shell scripts/pythons 1),$(PYTHON))
ENVS := $(TOOLS)$(if $(filter-out $(firstword $(SUPPORTED)),$(PYTHON_VERSION)),/py$(PYTHON_VERSION))
UV := $(TOOLS)/uv/bin/uv
REAL_SERVER ?= 0.22.5
SERVERS ?= 0.18.44 0.19.40 0.20.24 0.21.5 0.22.5
ENDS := $(REAL_SERVER) $(firstword $(SERVERS))
REPORTS := build/reports
PYTEST_FLAGS ?=
export DO_NOT_TRACK := 1

CORE := $(ENVS)/core/.ready
AIRFLOW := $(ENVS)/airflow/.ready
# Each minor version that the provider declares has a lane; the newest is `airflow`.
AIRFLOW_OLD := 3.1 3.2
PREFECT := $(ENVS)/prefect/.ready
PREFECT_38 := $(ENVS)/prefect-3.8/.ready
PREFECT_OLDEST := $(ENVS)/prefect-oldest/.ready
PREFECT_RUNNERS := $(ENVS)/prefect-runners/.ready
SERVER := $(TOOLS)/server-$(REAL_SERVER)/.ready
BENCH_AIRFLOW := $(ENVS)/bench-airflow/.ready
BENCH_PLOTS := $(TOOLS)/bench-plots/.ready
DOCS := $(TOOLS)/docs/.ready
DIST := $(TOOLS)/dist/.ready

.PHONY: help
help: ## Show the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

.PHONY: demo demo-prefect
demo: $(AIRFLOW) ## Run the example DAG through a real Airflow, on the embedded dstack server
	@$(ENVS)/airflow/bin/python scripts/demo_airflow.py

demo-prefect: $(PREFECT) ## Run the example flow on a real Prefect server, on the embedded dstack server
	@$(ENVS)/prefect/bin/python scripts/demo_prefect.py

# `.ci/run` sets scripts.pytest_twice: a test that fails beside others is run once more, alone, and reported.
PYTEST_MODULE ?= pytest

.PHONY: test test-fast test-core test-contract test-airflow test-prefect test-servers test-matrix \
  test-airflow-components test-prefect-components test-airflow-matrix
test: test-core test-contract test-airflow test-prefect ## Run every test, on the newest and the oldest dstack server
	@$(MAKE) --no-print-directory count-tests

.PHONY: environments count-tests
environments: $(CORE) $(AIRFLOW) $(PREFECT) $(ENDS:%=$(TOOLS)/server-%/.ready) ## Make the environments that `make test` needs

count-tests:
	@$(ENVS)/core/bin/python scripts/count_tests.py $(REPORTS)/core.xml $(ENDS:%=$(REPORTS)/server-%.xml) \
	  $(REPORTS)/airflow.xml $(REPORTS)/prefect.xml

# Most tests wait, for replies of servers on loopback and for timeouts: two cores are busy with four processes.
test-core: $(CORE) ## Run the tests of the core and the embedded server
	@echo "== core, embedded server"
	@$(ENVS)/core/bin/python -m $(PYTEST_MODULE) -q -n 4 --dist worksteal -m "not real and not endurance" --junitxml=$(REPORTS)/core.xml $(PYTEST_FLAGS)

# How many configurations of each type both clients are compared on; `make test` takes a few.
CONFIGURATIONS ?= 3000

# Those tests mostly wait, so several processes share one server, each with a project of its own.
define contract
@for version in $(1); do \
  echo "== contract with dstack $$version"; \
  $(ENVS)/core/bin/python -m tests.rig.shared --version $$version -- \
    $(ENVS)/core/bin/python -m $(PYTEST_MODULE) -q -n 4 tests/contract -m real \
    --junitxml=$(REPORTS)/server-$$version.xml $(PYTEST_FLAGS) || exit 1; \
done
endef

test-contract: $(CORE) $(ENDS:%=$(TOOLS)/server-%/.ready) ## Run the contract tests on the newest and the oldest server
	$(call contract,$(ENDS))

test-servers: export DSTACK_TEST_CONFIGURATIONS := $(CONFIGURATIONS)
test-servers: $(CORE) $(SERVERS:%=$(TOOLS)/server-%/.ready) ## Run the contract tests on every server
	$(call contract,$(SERVERS))
	@$(ENVS)/core/bin/python scripts/count_tests.py $(SERVERS:%=$(REPORTS)/server-%.xml)

# A file's tests stay in one process, which has a host of its own. Of an hour of Airflow's tests, ten minutes are CPU
# time; with Prefect, the server of each process needs as much again.
test-airflow: $(AIRFLOW) $(SERVER) ## Run the tests of the Airflow provider
	@echo "== airflow-provider-dstack, with dstack $(REAL_SERVER)"
	@$(ENVS)/airflow/bin/python -m $(PYTEST_MODULE) tests/provider_airflow -q -n 3 --dist loadfile -m "not matrix and not endurance" --junitxml=$(REPORTS)/airflow.xml $(PYTEST_FLAGS)

test-prefect: $(PREFECT) $(SERVER) ## Run the tests of the Prefect collection
	@echo "== prefect-dstack, with dstack $(REAL_SERVER)"
	@$(ENVS)/prefect/bin/python -m $(PYTEST_MODULE) tests/provider_prefect -q -n 3 --dist loadfile -m "not matrix and not endurance and not runners" --junitxml=$(REPORTS)/prefect.xml $(PYTEST_FLAGS)

test-matrix: test-airflow-components test-celery test-prefect-components ## Kill, cancel and take over real Airflow and Prefect processes (an hour)

# AIRFLOW_TEST_DATABASE=postgres puts the real components on a private Postgres server, else sqlite. `.ci/run` leaves
# the long ones out.
MATRIX ?= matrix
test-airflow-components: $(AIRFLOW) $(SERVER) ## Kill and take over real Airflow processes (a quarter of an hour; needs Chromium)
	@echo "== kills, take-overs, cancellations: Airflow on $${AIRFLOW_TEST_DATABASE:-sqlite}"
	@$(ENVS)/airflow/bin/python -m $(PYTEST_MODULE) tests/provider_airflow -q -n 2 --dist loadfile -m "($(MATRIX)) and not fleet" --junitxml=$(REPORTS)/airflow-matrix.xml $(PYTEST_FLAGS)

# One fleet at a time: two workers, two schedulers and two triggerers keep two cores busy.
.PHONY: test-celery
test-celery: export AIRFLOW_TEST_DATABASE := postgres
test-celery: $(AIRFLOW) ## Run Airflow on a fleet of Celery workers, kill its parts and take them away (an hour and a half; needs Postgres and Redis)
	@echo "== a fleet: CeleryExecutor, two workers, schedulers and triggerers; processes as in pods"
	@$(ENVS)/airflow/bin/python -m $(PYTEST_MODULE) tests/provider_airflow/test_celery*.py tests/provider_airflow/test_pods.py -q -m matrix --junitxml=$(REPORTS)/airflow-celery.xml $(PYTEST_FLAGS)

test-prefect-components: $(PREFECT) ## Kill and cancel real Prefect processes (needs Chromium)
	@echo "== kills, take-overs, cancellations: Prefect"
	@$(ENVS)/prefect/bin/python -m $(PYTEST_MODULE) tests/provider_prefect -q -m matrix --junitxml=$(REPORTS)/prefect-matrix.xml $(PYTEST_FLAGS)

.PHONY: test-prefect-runners
test-prefect-runners: $(PREFECT_RUNNERS) ## Run the tests with the task runners of Dask and Ray, on Prefect 3.9 (ten minutes)
	@echo "== prefect-dstack with prefect-dask and prefect-ray"
	@$(ENVS)/prefect-runners/bin/python -m pytest tests/provider_prefect -q -m runners --junitxml=$(REPORTS)/prefect-runners.xml $(PYTEST_FLAGS)

.PHONY: test-prefect-matrix
test-prefect-matrix: $(PREFECT) $(PREFECT_38) $(PREFECT_OLDEST) $(SERVER) ## Run all of them on Prefect 3.9, 3.8 and the oldest (an hour and a half)
	@for env in prefect prefect-3.8 prefect-oldest; do \
	  echo "== $$($(ENVS)/$$env/bin/python -m prefect --version | head -1) of $$env, with dstack $(REAL_SERVER)"; \
	  $(ENVS)/$$env/bin/python -m pytest tests/provider_prefect -q -m "not runners and not browser" --junitxml=$(REPORTS)/$$env-all.xml $(PYTEST_FLAGS) || exit 1; \
	done

.PHONY: test-airflow-matrix
test-airflow-matrix: $(AIRFLOW_OLD:%=$(ENVS)/airflow-%/.ready) $(SERVER) ## Run the tests of the Airflow provider on Airflow 3.1 and 3.2, kills and take-overs included
	@for version in $(AIRFLOW_OLD); do \
	  echo "== airflow-provider-dstack on Airflow $$version, with dstack $(REAL_SERVER)"; \
	  $(ENVS)/airflow-$$version/bin/python -m pytest tests/provider_airflow -q -m "not browser" \
	    --junitxml=$(REPORTS)/airflow-$$version.xml $(PYTEST_FLAGS) || exit 1; \
	done

test-fast: $(CORE) ## Run what needs no host and no real server (under a minute)
	@$(ENVS)/core/bin/python -m pytest -q -n 2 --dist worksteal -m "not real and not slow and not endurance" $(PYTEST_FLAGS)

# What shows that a Python is supported: the tests that need no host, then with both hosts the imports of every
# module, the parsed DAGs and deployed flows, and a few of the tests that start runs.
.PHONY: test-python test-pythons
test-python: $(CORE) $(AIRFLOW) $(PREFECT) ## Run the fast part of all tests on one Python: PYTHON=python3.13 (three minutes)
	@echo "== Python $(PYTHON_VERSION): core, embedded server"
	@$(ENVS)/core/bin/python -m $(PYTEST_MODULE) -q -n 4 --dist worksteal -m "not real and not slow and not endurance" \
	  tests/core tests/local tests/documented --junitxml=$(REPORTS)/core-$(PYTHON_VERSION).xml $(PYTEST_FLAGS)
	@echo "== Python $(PYTHON_VERSION): both providers"
	@$(ENVS)/airflow/bin/python -m $(PYTEST_MODULE) -q --junitxml=$(REPORTS)/airflow-$(PYTHON_VERSION).xml $(PYTEST_FLAGS) \
	  $(patsubst %,tests/provider_airflow/test_%.py,package parameters options example_dags)
	@$(ENVS)/prefect/bin/python -m $(PYTEST_MODULE) -q --junitxml=$(REPORTS)/prefect-$(PYTHON_VERSION).xml $(PYTEST_FLAGS) \
	  $(patsubst %,tests/provider_prefect/test_%.py,public input option_fields example)

test-pythons: ## Do so on every other supported Python of this machine
	@others=$$(scripts/pythons | tail -n +2); \
	[ -n "$$others" ] || echo "== other Pythons: this machine has none of $(filter-out $(PYTHON_VERSION),$(SUPPORTED))"; \
	for python in $$others; do $(MAKE) --no-print-directory test-python PYTHON=$$python; done

# The direct dependencies of the core have the lowest versions that pyproject.toml allows; what these bring is as new
# as it can be. The tests' own tools have the pins of the core's environment.
LOWEST_TOOLS := execnet hatchling hypothesis iniconfig packaging pluggy pygments pytest pytest-timeout pytest-xdist \
  sortedcontainers tomlkit trove-classifiers
LOWEST := $(ENVS)/lowest/.ready
.PHONY: test-lowest lowest
test-lowest: $(LOWEST) ## Run the fast tests of the core on the lowest versions that are allowed (two minutes)
	@echo "== lowest versions: core, embedded server"
	@$(ENVS)/lowest/bin/python -m $(PYTEST_MODULE) -q -n 4 --dist worksteal -m "not real and not slow and not endurance" \
	  tests/core tests/local tests/documented --junitxml=$(REPORTS)/lowest.xml $(PYTEST_FLAGS)

lowest: $(UV) ## Write the lowest versions that pyproject.toml allows into constraints/lowest.txt
	@$(UV) pip compile --quiet --python-version $(firstword $(SUPPORTED)) --resolution lowest-direct --extra attach --extra async --extra local --extra cloudpickle --no-annotate --no-header \
	  pyproject.toml -o constraints/lowest.txt
	@for tool in $(LOWEST_TOOLS); do grep "^$$tool==" constraints/core.txt; done >> constraints/lowest.txt

# The environments are tried side by side: their cases mostly wait.
.PHONY: test-faults
test-faults: $(CORE) $(AIRFLOW) $(PREFECT) $(PREFECT_RUNNERS) $(SERVER) ## Let every request of a run's life go wrong in every way; write docs/reliability.md (an hour)
	@mkdir -p $(REPORTS); rm -f $(REPORTS)/faults-*
	@try() { \
	  log=$(REPORTS)/faults-$$1.log; held=0; \
	  timeout 9000 $(ENVS)/$$1/bin/python -m tests.faults $$1 > $$log 2>&1 || held=1; \
	  echo "== faults: $$1: $$(tail -1 $$log)"; \
	  timeout 7200 $(ENVS)/$$1/bin/python -m tests.faults suites $$1 > $${log/faults-/faults-suites-} 2>&1 || held=1; \
	  echo "== suites: $$1: $$(tail -1 $${log/faults-/faults-suites-})"; \
	  return $$held; \
	}; \
	tries=(); for env in core airflow prefect; do try $$env & tries+=($$!); done; \
	status=0; for one in $${tries[@]}; do wait $$one || status=1; done; \
	log=$(REPORTS)/faults-prefect-runners.log; \
	timeout 3600 $(ENVS)/prefect-runners/bin/python -m tests.faults prefect --part latency --only '(Dask|Ray), ' > $$log 2>&1 \
	  || status=1; echo "== faults: prefect with Dask and Ray: $$(tail -1 $$log)"; \
	timeout 3600 $(ENVS)/prefect-runners/bin/python -m tests.faults suites prefect-runners > $${log/faults-/faults-suites-} 2>&1 \
	  || status=1; echo "== suites: prefect-runners: $$(tail -1 $${log/faults-/faults-suites-})"; \
	$(ENVS)/core/bin/python -m tests.faults report || status=1; exit $$status

.PHONY: bench bench-quick
bench bench-quick: export BENCH_ENVIRONMENTS := $(ENVS)
bench bench-quick: $(CORE) $(AIRFLOW) $(PREFECT) $(SERVER) $(BENCH_AIRFLOW) $(BENCH_PLOTS)
bench: ## Measure beside the peers and write docs/performance.md (half an hour on a quiet machine)
	@$(ENVS)/core/bin/python -m benchmarks

bench-quick: ## Do the same with smaller sizes (ten minutes)
	@$(ENVS)/core/bin/python -m benchmarks --quick

.PHONY: check
check: $(CORE) $(AIRFLOW) $(PREFECT) $(BENCH_PLOTS) ## Run ruff, mypy --strict and the layer test
	$(ENVS)/core/bin/ruff format --check .
	$(ENVS)/core/bin/ruff check .
	@# One call for each environment, each with a cache of its own, side by side. What a newer Python's library has or
	@# lost shows in the core, which is checked for the highest Python too.
	@checks=(); \
	{ $(ENVS)/core/bin/mypy --python-version $(lastword $(SUPPORTED)) --cache-dir=.mypy_cache/core -p dstack_core -p dstack_report && \
	$(ENVS)/core/bin/mypy --cache-dir=.mypy_cache/core -p dstack_core -p dstack_report -p tests.core -p tests.local \
	  -p tests.contract -p tests.rig -p tests.docs -p tests.documented -p scripts \
	  $(addprefix -m benchmarks.,__main__ imports log_relay attached_relay report_delay submit_requests idle_run) \
	  $(patsubst tests/faults/%.py,-m tests.faults.%,$(filter-out %_adapters.py %_kills.py %/airflow_latency.py \
	    %/__init__.py tests/faults/prefect_%,$(wildcard tests/faults/*.py))); } & checks+=($$!); \
	{ $(ENVS)/airflow/bin/mypy --cache-dir=.mypy_cache/airflow providers/airflow/src dags scripts/demo_airflow.py \
	    tests/provider_airflow $(addprefix tests/faults/airflow_,adapters.py kills.py latency.py) \
	    $(patsubst %,benchmarks/%.py,dag_parse watching watcher chatty airflow_host signalled waiting_for_log dags/measured) && \
	  $(ENVS)/prefect/bin/mypy --cache-dir=.mypy_cache/prefect providers/prefect/src flows scripts/demo_prefect.py \
	    tests/provider_prefect $(wildcard tests/faults/prefect_*.py) \
	    $(patsubst %,benchmarks/%.py,prefect_import prefect_host served) && \
	  $(TOOLS)/bench-plots/bin/mypy --cache-dir=.mypy_cache/plots -m benchmarks.page; } & checks+=($$!); \
	status=0; for one in $${checks[@]}; do wait $$one || status=1; done; exit $$status
	$(ENVS)/core/bin/python -m pytest -q tests/core/test_layers.py

.PHONY: check-examples
check-examples: $(CORE) $(AIRFLOW) $(PREFECT) ## Check the types of every documented example with mypy --strict and basedpyright (a minute)
	@$(ENVS)/core/bin/python -m scripts.check_examples

.PHONY: dist test-dist
dist: $(DIST) ## Build the wheels and sdists of all distributions in dist/, and check them as an index does
	@$(TOOLS)/dist/bin/python -m scripts.distributions $(RELEASE)

test-dist: $(CORE) ## Install the wheels in fresh environments with pip, and use them (five minutes)
	@echo "== wheels, in environments that pip makes"
	@$(ENVS)/core/bin/python -m $(PYTEST_MODULE) -q tests/installed --junitxml=$(REPORTS)/installed.xml $(PYTEST_FLAGS)

.PHONY: docs docs-serve
docs: $(DOCS) ## Build the documentation site in build/site, without network access; warnings and broken links fail
	@NO_MKDOCS_2_WARNING=1 $(TOOLS)/docs/bin/python -m scripts.make_site

DOCS_PORT ?= 8000
docs-serve: docs ## Show the built site on http://127.0.0.1:8000 (DOCS_PORT)
	@$(TOOLS)/docs/bin/python -m http.server --bind 127.0.0.1 --directory build/site $(DOCS_PORT)

.PHONY: walks
walks: $(CORE) $(AIRFLOW) $(PREFECT) ## Print the files and functions that a submit and each host's task pass, and the sizes
	@$(ENVS)/core/bin/python -m scripts.walks
	@$(ENVS)/airflow/bin/python -m scripts.walks --walk airflow 2>/dev/null | sed '/^$$/,$$d'
	@$(ENVS)/prefect/bin/python -m scripts.walks --walk prefect 2>/dev/null | sed '/^$$/,$$d'

.PHONY: format reference clean pins
format: $(CORE) ## Format the code
	$(ENVS)/core/bin/ruff format .
	$(ENVS)/core/bin/ruff check --fix .

reference: $(CORE) ## Explain the options in docstrings, and write docs/reference/ from these
	@$(ENVS)/core/bin/python -m scripts.make_reference

clean: ## Remove the environments and everything built
	rm -rf $(TOOLS) build dist

pins: $(CORE) $(AIRFLOW) $(PREFECT) $(SERVER) $(BENCH_AIRFLOW) $(BENCH_PLOTS) $(DOCS) $(DIST) ## Write the versions installed now into constraints/
	@[ $(ENVS) = $(TOOLS) ] || { echo "make pins: expected Python $(firstword $(SUPPORTED)), got $(PYTHON_VERSION). Call it without PYTHON." >&2; exit 1; }
	@for env in core airflow prefect server-$(REAL_SERVER) bench-airflow bench-plots docs dist; do \
	  VIRTUAL_ENV=$(TOOLS)/$$env $(UV) pip freeze --exclude-editable | grep '==' > constraints/$$env.txt; done

# A pin file that changed makes its environment new.
# What only newer Pythons need is pinned in constraints/ENV.newer.txt, which `make pins` leaves alone.
INSTALL = VIRTUAL_ENV=$(@D) $(UV) pip install --build-constraint constraints/build.txt \
  $(addprefix -c ,constraints/$(notdir $(@D)).txt $(wildcard constraints/$(notdir $(@D)).newer.txt))
# What uv resolves, downloads and installs is shown, the list of every package is not.
BRIEFLY = 2>&1 | sed -u '/^ [+~-] /d'
define fresh_env
@echo "== making $(@D)"
@$(UV) venv --quiet --clear --python $(1) $(@D)
endef

$(UV): constraints/tools.txt
	@echo "== making $(TOOLS)/uv"
	@$(TOOLS_PYTHON) -m venv $(TOOLS)/uv
	@$(TOOLS)/uv/bin/python -m pip install --quiet --disable-pip-version-check -r constraints/tools.txt
	@touch $@

$(CORE): constraints/core.txt constraints/build.txt pyproject.toml | $(UV)
	$(call fresh_env,$(PYTHON))
	@$(INSTALL) -e '.[async,local]' --group dev --group build --group plots $(BRIEFLY)
	@touch $@

$(AIRFLOW): constraints/airflow.txt constraints/build.txt pyproject.toml providers/airflow/pyproject.toml | $(UV)
	$(call fresh_env,$(PYTHON))
	@$(INSTALL) -e '.[async,local]' -e providers/airflow --group airflow $(BRIEFLY)
	@touch $@

$(LOWEST): constraints/lowest.txt constraints/build.txt pyproject.toml | $(UV)
	$(call fresh_env,$(PYTHON))
	@$(INSTALL) -e '.[async,local]' --group lowest $(BRIEFLY)
	@touch $@

# Their pins are of May 2026: neither starts with what came later.
$(AIRFLOW_OLD:%=$(ENVS)/airflow-%/.ready): $(ENVS)/airflow-%/.ready: constraints/airflow-%.txt constraints/build.txt pyproject.toml providers/airflow/pyproject.toml | $(UV)
	$(call fresh_env,$(PYTHON))
	@$(INSTALL) -e '.[async,local]' -e providers/airflow --group airflow-tests $(BRIEFLY)
	@touch $@

$(PREFECT): constraints/prefect.txt constraints/build.txt pyproject.toml providers/prefect/pyproject.toml | $(UV)
	$(call fresh_env,$(PYTHON))
	@$(INSTALL) -e '.[async,local]' -e providers/prefect --group prefect $(BRIEFLY)
	@touch $@

$(PREFECT_38) $(PREFECT_OLDEST): $(ENVS)/%/.ready: constraints/%.txt constraints/build.txt pyproject.toml providers/prefect/pyproject.toml | $(UV)
	$(call fresh_env,$(PYTHON))
	@$(INSTALL) -e '.[async,local]' -e providers/prefect --group dev $(BRIEFLY)
	@touch $@

# The newest Prefect beside the task runners that start tasks in processes of their own.
$(PREFECT_RUNNERS): constraints/prefect-runners.txt constraints/build.txt pyproject.toml providers/prefect/pyproject.toml | $(UV)
	$(call fresh_env,$(PYTHON))
	@$(INSTALL) -e '.[async,local]' -e providers/prefect --group dev prefect-dask prefect-ray $(BRIEFLY)
	@touch $@

# What the benchmarks compare with: the providers of others, in the same Airflow as ours.
$(BENCH_AIRFLOW): constraints/bench-airflow.txt constraints/build.txt pyproject.toml providers/airflow/pyproject.toml | $(UV)
	$(call fresh_env,$(PYTHON))
	@$(INSTALL) -e '.[async,local]' -e providers/airflow \
	  $(addprefix apache-airflow-providers-,cncf-kubernetes databricks docker standard) $(BRIEFLY)
	@touch $@

$(BENCH_PLOTS): constraints/bench-plots.txt constraints/build.txt | $(UV)
	$(call fresh_env,$(TOOLS_PYTHON))
	@$(INSTALL) matplotlib mypy $(BRIEFLY)
	@touch $@

$(DOCS): constraints/docs.txt constraints/build.txt | $(UV)
	$(call fresh_env,$(TOOLS_PYTHON))
	@$(INSTALL) mkdocs-material $(BRIEFLY)
	@touch $@

$(DIST): constraints/dist.txt constraints/build.txt | $(UV)
	$(call fresh_env,$(TOOLS_PYTHON))
	@$(INSTALL) hatchling twine $(BRIEFLY)
	@touch $@

# A server that cannot start with what it asks for gets something else by constraints/server-*.overrides.txt.
OVERRIDES = $(wildcard constraints/server-$*.overrides.txt)
.SECONDEXPANSION:
$(TOOLS)/server-%/.ready: constraints/server-%.txt $$(OVERRIDES) | $(UV)
	$(call fresh_env,$(TOOLS_PYTHON))
	@$(INSTALL) $(OVERRIDES:%=--overrides %) 'dstack[server]==$*' $(BRIEFLY)
	@touch $@
