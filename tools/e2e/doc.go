// Package e2e holds the tests of the whole product, from outside: they start
// `landfall up`, or the fleet of six programs with an external nats-server over
// TCP and mutual TLS, let a guest write to its disks without pause, and hold
// every recovery point against what the guest recorded. The same tests drive
// both forms, through the command line and the public API.
//
// The robustness tests kill programs with SIGKILL, at named failpoints and at
// any moment, and ask after each kill: is no received point lost or wrong, does
// replication go on, with a delta and not with a full copy, and did the guest
// never see an error? Failovers of every kind are attacked in the same way, on
// the way up and on the way back: did what came up lie within the bounds of its
// point, did never two machines write, is nothing left behind? They run a short
// set; LANDFALL_ROBUSTNESS_RUNS=200 (make test-robustness) runs the long one,
// LANDFALL_SEED another one.
//
// Programs are taken from the folder LANDFALL_BIN, or built once. What a failed
// test leaves behind (logs, state, store) stays, and its folder is printed.
package e2e
