module github.com/landfall-dr/landfall/proto

go 1.26
