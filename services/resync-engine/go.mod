module github.com/landfall-dr/landfall/services/resync-engine

go 1.26

require (
	github.com/landfall-dr/landfall/libs v0.0.0
	github.com/landfall-dr/landfall/proto v0.0.0
)

replace github.com/landfall-dr/landfall/proto => ../../proto

replace github.com/landfall-dr/landfall/libs => ../../libs
