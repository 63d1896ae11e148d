// Package extent is the algebra of byte ranges on a disk: which bytes changed, which are absent, and which
// piece of stored data is the newest for each byte.
//
// Three types do all of it. Range is a half-open span of bytes. Set is a set of bytes kept as disjoint ranges,
// adjacent ones joined. Map gives every byte at most one value, the last one put, and remembers how much of the
// front of each put range was overwritten, so that a value can say where data lives.
//
// # Invariants
//
// The ranges held by a Set or a Map are valid, not empty, disjoint and ascending; those of a Set are also never
// adjacent. Empty ranges given to any method are ignored. Ranges that are not Valid (negative, or ending past the
// largest int64) are a programming error and panic: dropping one silently would lose a change. Whoever decodes
// ranges from outside checks Valid first; Set.UnmarshalBinary does.
//
// # Concurrency
//
// A Set or Map may be read from several goroutines at once, not while it is changed. It must not be changed while
// one of its iterators runs, nor copied by value; Clone copies in constant time (both sides then copy on write).
// Clone counts as a change.
package extent
