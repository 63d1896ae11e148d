module github.com/landfall-dr/landfall/tools

go 1.26.0

require (
	github.com/landfall-dr/landfall/libs v0.0.0
	github.com/landfall-dr/landfall/proto v0.0.0
	github.com/landfall-dr/landfall/services/change-tracker v0.0.0
	github.com/landfall-dr/landfall/services/failover-orchestrator v0.0.0
	github.com/landfall-dr/landfall/services/host-provider v0.0.0
	github.com/landfall-dr/landfall/services/resync-engine v0.0.0
	github.com/landfall-dr/landfall/services/scheduler v0.0.0
	github.com/landfall-dr/landfall/services/uploader v0.0.0
)

require (
	github.com/inconshreveable/mousetrap v1.1.0 // indirect
	github.com/rogpeppe/go-internal v1.16.0 // indirect
	github.com/spf13/cobra v1.10.2 // indirect
	github.com/spf13/pflag v1.1.0 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
	golang.org/x/sys v0.49.0 // indirect
	golang.org/x/term v0.47.0 // indirect
)

replace github.com/landfall-dr/landfall/proto => ../proto

replace github.com/landfall-dr/landfall/libs => ../libs

replace github.com/landfall-dr/landfall/services/host-provider => ../services/host-provider

replace github.com/landfall-dr/landfall/services/change-tracker => ../services/change-tracker

replace github.com/landfall-dr/landfall/services/uploader => ../services/uploader

replace github.com/landfall-dr/landfall/services/resync-engine => ../services/resync-engine

replace github.com/landfall-dr/landfall/services/scheduler => ../services/scheduler

replace github.com/landfall-dr/landfall/services/failover-orchestrator => ../services/failover-orchestrator
