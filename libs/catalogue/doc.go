// Package catalogue keeps in storage what a recovery needs to know and no lineage
// says: which machines are protected under which names, the policies, and the
// recovery plans. With it the storage account alone is enough to recover
// (docs/formats/catalogue.md, docs/adr/0013-storage-catalogue.md).
//
// It is a mirror. While the control plane's records (bucket "vms", "policies",
// "plans") live they are the truth; a [Mirror] brings the catalogue to them, level
// by level, and never the other way round. Nobody waits for it, and nothing but a
// recovery reads it.
//
// Invariants:
//  1. A stale writer never rolls a record back: a record is written on condition
//     that it is still the version that was read *before* the truth was read
//     (If-Match, or create-only), so whoever wrote meanwhile knew better.
//  2. Nothing is deleted. What ended says when; so a late writer cannot bring it
//     back, and a role needs no right to delete.
//  3. A record ends on evidence that it ended, never because the truth does not know
//     it: records that were lost look the same.
//  4. A record that is damaged or of a newer version never hides another one.
package catalogue

import "errors"

// Container is the container of the catalogue; there is one in an account.
const Container = "lf-catalogue"

// Version is the version of the records, the newest that is read.
const Version = 1

// maxRecord bounds a record, in bytes: the largest plan, and more.
const maxRecord = 2 << 20

// maxRecords bounds a listing.
const maxRecords = 100_000

// Errors of this package; those of the store come through.
var (
	// ErrInvalid: the record breaks the format.
	ErrInvalid = errors.New("invalid catalogue record")
	// ErrNewer: the record is of a version that this program does not know.
	ErrNewer = errors.New("catalogue record is of a newer version")
	// ErrStale: the record is not the version any more on which the write was built.
	ErrStale = errors.New("catalogue record was written meanwhile")
)
