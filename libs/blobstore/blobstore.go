// Package blobstore is Landfall's only door to storage.
//
// It offers what the replica needs of an object store, in the vocabulary of
// Azure Storage: block blobs (whole objects, create-only or conditional
// writes), page blobs (512-byte pages written in place, a sequence number,
// snapshots), leases, ETags and storage time. Backend "dir" keeps all of it
// in a folder; backend "azure" is Azure Blob Storage. Every backend passes
// the suite in package blobstoretest.
//
// Every method takes a context whose deadline it honours. Errors are
// classified by the sentinels below; test with errors.Is. A method that
// returns an error outside these sentinels has an unknown outcome: the caller
// re-reads before it decides.
package blobstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"
)

// Sentinel errors. A backend wraps them with the operation and the name.
var (
	// ErrNotFound: the container, blob or snapshot does not exist.
	ErrNotFound = errors.New("blob not found")
	// ErrExists: a create-only write met an existing blob.
	ErrExists = errors.New("blob already exists")
	// ErrConditionFailed: an If-Match or sequence-number condition did not hold.
	ErrConditionFailed = errors.New("condition not met")
	// ErrLeaseConflict: the blob is leased and the call carried no lease id or another one,
	// or the lease named by the call is not held.
	ErrLeaseConflict = errors.New("lease conflict")
	// ErrInvalid: the call's arguments break a rule of the store (alignment, size, name).
	ErrInvalid = errors.New("invalid storage request")
	// ErrFull: no space left, or the account's limit is reached.
	ErrFull = errors.New("storage is full")
	// ErrNoContainer: the container itself does not exist. errors.Is(err, ErrNotFound) holds as well.
	ErrNoContainer = fmt.Errorf("container missing: %w", ErrNotFound)
	// ErrCredentials: the store does not accept who the caller says to be: wrong, expired, revoked or, with a clock
	// that is off, not yet valid credentials.
	ErrCredentials = errors.New("storage credentials refused")
	// ErrClockSkew: the credentials are refused because the caller's clock is far from the store's. errors.Is(err, ErrCredentials)
	// holds as well.
	ErrClockSkew = fmt.Errorf("clocks too far apart: %w", ErrCredentials)
	// ErrPermission: the caller is known and lacks the right for this operation.
	ErrPermission = errors.New("storage operation not permitted")
	// ErrWriteOnce: a write-once policy or a legal hold forbids to overwrite or delete this blob now.
	ErrWriteOnce = errors.New("blob is under a write-once policy")
)

// PageSize is the unit of page blobs, in bytes (Azure: "Put Page", 512-byte pages).
const PageSize = 512

// MaxPageWrite is the largest single WritePages call, in bytes (Azure: 4 MiB).
const MaxPageWrite = 4 << 20

// ETag identifies one version of a blob. The zero value means "no condition".
type ETag string

// SnapshotID names an immutable snapshot of a page blob. Empty is the live blob.
type SnapshotID string

// LeaseID is the caller's proposed lease id (a UUID). Empty means "no lease".
type LeaseID string

// Properties describes a blob as storage sees it.
type Properties struct {
	Name     string
	Snapshot SnapshotID
	Size     int64 // bytes
	ETag     ETag
	// LastModified is storage time, never the caller's clock.
	LastModified time.Time
	// Sequence is a page blob's sequence number; 0 for block blobs.
	Sequence int64
	IsPages  bool
	Metadata map[string]string
}

// Conditions restrict a write. All that are set must hold, atomically with the write.
type Conditions struct {
	// CreateOnly fails with ErrExists when the blob exists (If-None-Match: *).
	CreateOnly bool
	// IfMatch fails with ErrConditionFailed when the blob's ETag differs.
	IfMatch ETag
	// Lease is the id of the lease that the caller holds. A leased blob refuses a write without it,
	// and a write that carries it fails with ErrLeaseConflict when that lease is not active.
	Lease LeaseID
	// IfSequence fails with ErrConditionFailed when the page blob's sequence number differs.
	IfSequence *int64
}

// Store is one storage account, or a folder that stands for one.
type Store interface {
	// CreateContainer makes a container; it is success when the container exists.
	CreateContainer(ctx context.Context, name string) error
	// ListContainers yields container names with the prefix, in order.
	ListContainers(ctx context.Context, prefix string) iter.Seq2[string, error]
	// Container returns a handle without asking the store.
	Container(name string) Container
	// Now is storage time.
	Now(ctx context.Context) (time.Time, error)
	Close() error
}

// Container holds blobs. Names are '/'-separated paths of [A-Za-z0-9._-] segments.
type Container interface {
	Name() string

	// Put writes a whole block blob of exactly size bytes read from body's present position, durable and
	// visible all at once when Put returns nil, or not at all. A body that ends early is ErrInvalid.
	// IfMatch on a missing blob is ErrConditionFailed. A lease survives an overwrite.
	Put(ctx context.Context, name string, body io.ReadSeeker, size int64, cond Conditions) (Properties, error)
	// Get opens length bytes of a block blob at offset; length < 0 reads to the end, and a range that
	// passes the end is cut there. An offset past the end is ErrInvalid. The reader keeps to the version
	// that it opened, whatever is put or deleted later. The caller closes it.
	Get(ctx context.Context, name string, offset, length int64) (io.ReadCloser, Properties, error)
	// Stat returns a blob's properties; snapshot "" is the live blob.
	Stat(ctx context.Context, name string, snapshot SnapshotID) (Properties, error)
	// List yields live blobs whose name has the prefix and sorts after `after`, in the byte order of whole
	// names. Blobs put or deleted while it runs may or may not be seen; all others are seen exactly once.
	// The pair with a non-nil error is the last one.
	List(ctx context.Context, prefix, after string) iter.Seq2[Properties, error]
	// Delete removes a block or page blob (with its snapshots).
	Delete(ctx context.Context, name string, cond Conditions) error

	// CreatePages makes a page blob of size bytes (a multiple of PageSize), all zero, sequence number 0.
	// It never replaces a blob: an existing one is ErrExists whatever cond says. Metadata is fixed at
	// creation, its keys are [a-z][a-z0-9_]*.
	CreatePages(ctx context.Context, name string, size int64, metadata map[string]string, cond Conditions) (Properties, error)
	// WritePages writes page-aligned data of at most MaxPageWrite bytes. It is durable only once a later
	// SetSequence returned. The ETag changes with every write, also one whose writer died half-way, so
	// an ETag read before it never matches again. With several writes in flight the ETags returned are
	// of no use to IfMatch: take the one that SetSequence returns.
	WritePages(ctx context.Context, name string, offset int64, data []byte, cond Conditions) (Properties, error)
	// ClearPages zeroes a page-aligned range of any length and frees its space.
	ClearPages(ctx context.Context, name string, offset, length int64, cond Conditions) (Properties, error)
	// ReadPages fills buf from offset of the blob or its snapshot; pages never written read as zeros.
	// Offset and length need not be aligned; a range that leaves the blob is ErrInvalid. Reading the live
	// blob while pages of the range are written may see part of a write.
	ReadPages(ctx context.Context, name string, snapshot SnapshotID, offset int64, buf []byte) error
	// PageRanges yields the written ranges within [offset, offset+length), in order; a range may
	// contain zeros, but nothing outside the yielded ranges is non-zero.
	PageRanges(ctx context.Context, name string, snapshot SnapshotID, offset, length int64) iter.Seq2[PageRange, error]
	// SetSequence sets the page blob's sequence number, durably ordered after every page write
	// that returned before the call.
	// After an error outside the sentinels the number is either one, and page writes since the last successful
	// call may be lost: redo them before the number says that they are there, do not just repeat the call.
	SetSequence(ctx context.Context, name string, n int64, cond Conditions) (Properties, error)
	// SnapshotPages freezes the page blob's present content, size and sequence number under a new id,
	// durably. Ids of one blob sort by age. The blob's own ETag does not change. Nil metadata copies the
	// blob's. A leased blob needs no lease id here; one that is given must be held.
	SnapshotPages(ctx context.Context, name string, metadata map[string]string, cond Conditions) (SnapshotID, Properties, error)
	// ListSnapshots yields the snapshots of one page blob, oldest first.
	ListSnapshots(ctx context.Context, name string) iter.Seq2[Properties, error]
	// DeleteSnapshot removes one snapshot.
	DeleteSnapshot(ctx context.Context, name string, snapshot SnapshotID) error

	// AcquireLease takes the blob's lease under the proposed id, or answers ErrLeaseConflict while another
	// holds it. Acquiring again with the same id renews it. duration is 15 s to 60 s, by storage time.
	// Lease calls never change the ETag.
	AcquireLease(ctx context.Context, name string, id LeaseID, duration time.Duration) error
	// RenewLease extends the lease by its duration; ErrLeaseConflict when it is no longer the holder's.
	// Whether an expired lease that nobody else took can be renewed differs by backend: acquire it again.
	RenewLease(ctx context.Context, name string, id LeaseID) error
	// ReleaseLease ends the holder's lease.
	ReleaseLease(ctx context.Context, name string, id LeaseID) error
	// BreakLease ends whoever's lease at once; it is success when there is none.
	BreakLease(ctx context.Context, name string) error
}

// PageRange is a half-open byte range of a page blob.
type PageRange struct {
	Offset, Length int64
}

// RequestCost is implemented by stores where a page request costs time besides its bytes. An applier merges two ranges
// when the unchanged gap between them is cheaper to send again than another request.
type RequestCost interface {
	// BytesPerRequest is the number of bytes that could be sent in the time that one more page request takes: the rate in
	// bytes/s over the requests/s, both as measured lately or as the service's limits say (Azure: 60 MiB/s over 500/s is
	// 126 KB for one page blob).
	BytesPerRequest() int64
}

// Protection is what a container's write-once policy enforces.
type Protection struct {
	// WriteOnce is how long after its creation a blob can be neither overwritten nor deleted; 0 is not at all.
	// A store that says that there is a policy and not for how long answers 1 ns.
	WriteOnce time.Duration
	// Locked says that the policy can only be made longer, by nobody.
	Locked bool
	// LegalHold says that nothing may be overwritten or deleted until the hold is lifted.
	LegalHold bool
}

// Protector is implemented by stores whose containers can be write-once. A store that is no Protector enforces nothing.
type Protector interface {
	// ContainerProtection reads it: ErrNoContainer when there is none such.
	ContainerProtection(ctx context.Context, container string) (Protection, error)
	// ProtectContainer sets a policy of at least this strength, and is success when there is one already. ErrPermission when
	// this process may not (in Azure it is a right of the management plane): what to set by hand is in the error's text.
	ProtectContainer(ctx context.Context, container string, p Protection) error
}

// AccountFacts are the settings of an account that decide what a deleted or overwritten blob costs and whether it can come back.
type AccountFacts struct {
	// SKU and Kind such as Standard_LRS and StorageV2; empty when the caller may not know.
	SKU, Kind string
	// Hierarchical accounts (Data Lake) have no page blobs.
	Hierarchical bool
	// Versioning keeps a version of every overwritten blob: a replica's metadata and snapshots would pile up (it should be off).
	Versioning bool
	// SoftDelete is how long a deleted blob or snapshot can be undeleted; 0 is not at all.
	SoftDelete time.Duration
}

// Inspector is implemented by stores that can tell their account's settings.
type Inspector interface {
	// Inspect reads them: ErrPermission when this identity may not.
	Inspect(ctx context.Context) (AccountFacts, error)
}
