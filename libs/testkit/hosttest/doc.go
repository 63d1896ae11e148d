// Package hosttest is a host that behaves, for tests of those who pull data
// from hosts: sparse disk images in memory, what changed on them between
// points, open passes, and ChangeTrackerService's three bulk streams over them.
//
// A test writes to a [Host] as a guest would, cuts points and begins passes by
// method, and serves the streams on any gRPC server. Every cut keeps the
// images as they were ([Host.At]), which is what a replica is compared with. A
// hook sees every message before it is sent and may hold the stream, break it
// or damage the message.
//
// What it does not do: the calls that move the tracker's state have no gRPC
// form here, and nothing is durable.
package hosttest
