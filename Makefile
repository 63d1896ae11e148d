# Landfall. `make help` lists the targets. Logic that needs an `if` lives in Go programs under tools/.

SHELL := /bin/bash
.DEFAULT_GOAL := help

MODULES  := proto libs $(sort $(wildcard services/*)) tools
PROGRAMS := host-provider change-tracker uploader resync-engine scheduler failover-orchestrator
TOOLS    := $(CURDIR)/.tools/bin
BIN      := $(CURDIR)/bin
VERSION  ?= $(shell git describe --always --dirty 2>/dev/null || echo dev)
LDFLAGS  := -s -w -X github.com/landfall-dr/landfall/libs/program.Version=$(VERSION)

# Pinned tools: the only place where their versions stand.
BUF_VERSION             := v1.75.0
PROTOC_GEN_GO_VERSION   := v1.36.12
PROTOC_GEN_GRPC_VERSION := v1.6.2
GOLANGCI_VERSION        := v2.15.0
NATS_SERVER_VERSION     := v2.15.2

# The race detector needs a C compiler; without one the tests run without it and say so.
RACE := $(shell command -v gcc >/dev/null 2>&1 && echo -race)
TESTFLAGS ?= $(RACE) -shuffle=on -timeout 15m
# What tests of the whole product are told: built programs, and that they may boot machines.
LAB := LANDFALL_BIN=$(BIN) LANDFALL_NATS_SERVER=$(TOOLS)/nats-server LANDFALL_GUEST_TESTS=1
# Test packages that run at once: each may start servers of its own.
TESTJOBS ?= 2

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z][a-zA-Z-]*:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  %-20s %s\n", $$1, $$2}'

.PHONY: demo
demo: build ## Protect a VM that is being written to, replicate, fail over, prove the bytes (KEEP=1 leaves it running)
	$(BIN)/landfall-demo $(if $(KEEP),--keep)

.PHONY: build
build: ## Build bin/landfall and one program per service
	@mkdir -p $(BIN)
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./tools/cmd/... $(foreach p,$(PROGRAMS),./services/$(p)/cmd/$(p))

.PHONY: build-windows
build-windows: ## Cross-compile every package for Windows
	@for m in $(MODULES); do echo "windows: $$m"; (cd $$m && GOOS=windows GOARCH=amd64 CGO_ENABLED=0 go build ./...) || exit 1; done

.PHONY: test
test: build $(TOOLS)/nats-server azurite-or-say ## Run all tests (CI=true: nothing may be skipped)
	@test -n "$(RACE)" || echo "make test: no C compiler found: running WITHOUT the race detector"
	@# Tests that boot a machine are skipped, and say so, where QEMU is missing.
	$(LAB) go test -p $(TESTJOBS) $(TESTFLAGS) \
		$$(go list $(foreach m,$(MODULES),./$(m)/...) | grep -v /tools/e2e)
	@# The end-to-end tests drive programs from outside: the race detector would see only the tests themselves.
	$(LAB) go test -shuffle=on -timeout 30m ./tools/e2e/...
	@# What bounds memory is meant for programs as they are shipped, without the detector's own memory.
	LANDFALL_BIN=$(BIN) go test -count=1 -timeout 10m -run 'BigSparseDisk' ./tools/scenario

.PHONY: azurite
azurite: tools/azurite/node_modules/.installed ## Install the storage emulator of the tests (Azurite; needs Node 18 and npm)

tools/azurite/node_modules/.installed: tools/azurite/package-lock.json
	cd tools/azurite && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

.PHONY: azurite-or-say
azurite-or-say:
	@if command -v node >/dev/null && command -v npm >/dev/null && $(MAKE) --no-print-directory azurite; then :; \
	elif [ "$$CI" = true ]; then echo "make test: CI needs Azurite, and Node and npm for it"; exit 1; \
	else echo "make test: AZURITE IS NOT INSTALLED (it needs Node 18 and npm): NOTHING IS TESTED ON THE STORAGE EMULATOR"; fi

.PHONY: test-robustness
test-robustness: build $(TOOLS)/nats-server ## The long sets: 200 seeded kill runs of the six processes, 100,000 interleavings of the protocol model
	LANDFALL_E2E_WHOLE=1 $(LAB) go test -count=1 -timeout 1h -run 'EveryPoint|ForeignWriters|FailOverForReal|RecoverFromStorage' ./tools/e2e
	LANDFALL_ROBUSTNESS_RUNS=200 LANDFALL_MODEL_SEEDS=100000 LANDFALL_BIN=$(BIN) LANDFALL_NATS_SERVER=$(TOOLS)/nats-server \
		go test -timeout 6h -run 'Robust|Model' -v ./tools/e2e/... ./libs/replica/...

.PHONY: test-guest
test-guest: build $(TOOLS)/nats-server ## Real machines come back: BIOS, UEFI and generation 1, VHDX and qcow2, both forms; needs QEMU, about 15 minutes on a quiet machine
	LANDFALL_GUEST_WHOLE=1 $(LAB) go test -count=1 -timeout 3h -v -run 'RealMachine' ./tools/e2e
	$(LAB) go test -count=1 -timeout 30m ./tools/guest/... ./tools/conformance

.PHONY: bench
bench: build ## Go benchmarks, then the comparison suite of tools/bench
	go test -run '^$$' -bench . -benchmem $(foreach m,libs $(sort $(wildcard services/*)),./$(m)/...)
	go run ./tools/bench/cmd/landfall-bench

.PHONY: lint
lint: verify-format verify-proto verify-tidy $(TOOLS)/golangci-lint ## Run the linters and every verify-* check
	@for m in $(MODULES); do echo "lint: $$m"; (cd $$m && $(TOOLS)/golangci-lint run --config $(CURDIR)/.golangci.yaml ./...) || exit 1; done

.PHONY: generate
generate: fix-generate ## Generate Go from proto, and the pages made from tables

.PHONY: fix-generate
fix-generate: proto-tools ## Generate Go from proto
	rm -rf proto/gen/landfall
	$(TOOLS)/buf generate
	cd proto && gofmt -w gen

.PHONY: verify-generate
verify-generate: fix-generate ## Check that generated code is up to date
	@git diff --exit-code --stat -- proto/gen || { echo "generated code is stale: run 'make fix-generate' and commit"; exit 1; }
	@test -z "$$(git status --porcelain -- proto/gen)" || { echo "generated code is not committed: run 'make fix-generate' and commit"; exit 1; }

.PHONY: verify-proto
verify-proto: proto-tools ## buf lint, format, and breaking changes against the committed image
	$(TOOLS)/buf lint
	$(TOOLS)/buf format --diff --exit-code >/dev/null || { echo "proto files are not formatted: run 'make fix-proto'"; exit 1; }
	$(TOOLS)/buf breaking --against proto/contract.binpb

.PHONY: fix-proto
fix-proto: proto-tools ## Format proto files
	$(TOOLS)/buf format -w

.PHONY: fix-contract
fix-contract: proto-tools ## Accept the present contracts as the ones not to break
	$(TOOLS)/buf build --path proto/landfall -o proto/contract.binpb

.PHONY: verify-format
verify-format: ## Check gofmt
	@out=$$(gofmt -l $(MODULES)); test -z "$$out" || { echo "not formatted (run 'make fix-format'):"; echo "$$out"; exit 1; }

.PHONY: fix-format
fix-format: ## Run gofmt
	gofmt -w $(MODULES)

.PHONY: verify-tidy
verify-tidy: ## Check that every go.mod is tidy
	@for m in $(MODULES); do (cd $$m && GOWORK=off go mod tidy -diff >/dev/null) || { echo "$$m/go.mod is not tidy: run 'make fix-tidy'"; exit 1; }; done

.PHONY: fix-tidy
fix-tidy: ## Tidy every go.mod
	@for m in $(MODULES); do (cd $$m && GOWORK=off go mod tidy) || exit 1; done

.PHONY: ci
ci: lint verify-generate build-windows test ## What .ci/run does after installing packages

# --- pinned tools, built from their Go modules into .tools/bin

.PHONY: proto-tools
proto-tools: $(TOOLS)/buf $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc ## Build the pinned proto tools

$(TOOLS)/buf:
	GOWORK=off GOBIN=$(TOOLS) go install github.com/bufbuild/buf/cmd/buf@$(BUF_VERSION)
$(TOOLS)/protoc-gen-go:
	GOWORK=off GOBIN=$(TOOLS) go install google.golang.org/protobuf/cmd/protoc-gen-go@$(PROTOC_GEN_GO_VERSION)
$(TOOLS)/protoc-gen-go-grpc:
	GOWORK=off GOBIN=$(TOOLS) go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@$(PROTOC_GEN_GRPC_VERSION)
$(TOOLS)/golangci-lint:
	GOWORK=off GOBIN=$(TOOLS) go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION)
$(TOOLS)/nats-server:
	GOWORK=off GOBIN=$(TOOLS) go install github.com/nats-io/nats-server/v2@$(NATS_SERVER_VERSION)
