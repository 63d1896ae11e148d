// Package proto holds Landfall's public contracts: the protobuf definitions
// of the six services and of the events, and the Go code generated from them
// under gen/. Clients import only this module.
package proto
