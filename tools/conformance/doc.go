// Package conformance runs the exported conformance suites against the real
// thing: every driver together with its change source, as two services of one
// host in a process of their own that is killed and started again.
package conformance
