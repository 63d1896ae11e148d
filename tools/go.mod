module github.com/landfall-dr/landfall/tools

go 1.26

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

replace github.com/landfall-dr/landfall/proto => ../proto

replace github.com/landfall-dr/landfall/libs => ../libs

replace github.com/landfall-dr/landfall/services/host-provider => ../services/host-provider

replace github.com/landfall-dr/landfall/services/change-tracker => ../services/change-tracker

replace github.com/landfall-dr/landfall/services/uploader => ../services/uploader

replace github.com/landfall-dr/landfall/services/resync-engine => ../services/resync-engine

replace github.com/landfall-dr/landfall/services/scheduler => ../services/scheduler

replace github.com/landfall-dr/landfall/services/failover-orchestrator => ../services/failover-orchestrator
