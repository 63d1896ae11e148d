// Package storagecheck tries a store before first use, as one role: whether it answers, whether the role may do what it must and
// nothing more, whether every operation keeps its promise (conditions, numbers, snapshots, leases), how fast it is, how far the
// clocks are apart, and how the account is set up. What it makes lies in containers of a lineage that no machine has.
package storagecheck
