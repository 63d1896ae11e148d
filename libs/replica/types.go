package replica

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Lineage identifies one protection of one VM: a UUID as 32 lower-case hex
// digits. Every container of the lineage carries it in its name.
type Lineage string

// ParseLineage checks a lineage id. It accepts the UUID with or without dashes,
// in either case, and returns the canonical form.
func ParseLineage(s string) (Lineage, error) {
	t := strings.ToLower(strings.ReplaceAll(s, "-", ""))
	if !isHex(t, 32) {
		return "", fmt.Errorf("parse lineage %q: want a UUID of 32 hex digits: %w", s, ErrInvalid)
	}
	return Lineage(t), nil
}

// Bytes is the lineage as 16 raw bytes; zero for an invalid one.
func (l Lineage) Bytes() (b [16]byte) {
	if len(l) == 32 {
		_, _ = hex.Decode(b[:], []byte(l))
	}
	return b
}

// JournalContainer is the write-once container of segments, configurations and manifests.
func (l Lineage) JournalContainer() string { return journalPrefix + string(l) }

// StagingContainer holds the segments of passes until the checkpoint that ends their run.
func (l Lineage) StagingContainer() string { return stagingPrefix + string(l) }

// ReplicaContainer holds the page blobs, checkpoints and the retention record.
func (l Lineage) ReplicaContainer() string { return replicaPrefix + string(l) }

// FailoverContainer holds working copies and the step journals of failovers.
func (l Lineage) FailoverContainer() string { return failoverPrefix + string(l) }

// Ordinal numbers points and passes of a lineage from one counter. 0 is "none".
type Ordinal uint64

// Epoch says who may still write. It is granted with a task and never raised by a worker.
type Epoch uint64

// Seq is the number of a manifest in the chain, dense from 1. 0 is "none".
type Seq uint64

// MaxSeq is the largest manifest number: twelve decimal digits.
const MaxSeq Seq = 999_999_999_999

// ParseOrdinal parses a decimal ordinal, with or without leading zeros.
func ParseOrdinal(s string) (Ordinal, error) {
	n, err := parseUint("ordinal", s)
	return Ordinal(n), err
}

// ParseEpoch parses a decimal epoch.
func ParseEpoch(s string) (Epoch, error) {
	n, err := parseUint("epoch", s)
	return Epoch(n), err
}

// ParseSeq parses a decimal manifest number, with or without leading zeros.
func ParseSeq(s string) (Seq, error) {
	n, err := parseUint("sequence number", s)
	if err == nil && Seq(n) > MaxSeq {
		return 0, fmt.Errorf("parse sequence number %q: above %d: %w", s, MaxSeq, ErrInvalid)
	}
	return Seq(n), err
}

func parseUint(what, s string) (uint64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	if err != nil {
		return 0, fmt.Errorf("parse %s %q: want decimal digits: %w", what, s, ErrInvalid)
	}
	return n, nil
}

// Kind is what a manifest means.
type Kind string

// The kinds of manifests.
const (
	KindBase    Kind = "base"    // the first point after a copy: complete by itself
	KindPoint   Kind = "point"   // a delta from its base ordinal
	KindPartial Kind = "partial" // one task of a pass: applied, never a point
	KindRewind  Kind = "rewind"  // sets the disks back to an earlier point
	KindClose   Kind = "close"   // fence: names its failover, nothing of the source follows
	KindOpen    Kind = "open"    // ends the fence of its failover, raises the epoch by one
)

// IsPoint reports whether the manifest is a recovery point.
func (k Kind) IsPoint() bool { return k == KindBase || k == KindPoint }

// IsFence reports whether the manifest is a close or an open, which carry no data.
func (k Kind) IsFence() bool { return k == KindClose || k == KindOpen }

// Consistency of a point.
type Consistency string

// The consistencies of a point.
const (
	ConsistencyNone  Consistency = ""      // not a point
	ConsistencyCrash Consistency = "crash" // as after a power cut
	ConsistencyApp   Consistency = "app"   // inside a confirmed freeze
)

// Outcome says what a successful Commit did.
type Outcome int

// The outcomes of a commit.
const (
	// Committed: this call's manifest is in the chain.
	Committed Outcome = iota + 1
	// AlreadyCommitted: the ordinal (or pass task, or fence, or rewind) was in the chain; nothing was written.
	AlreadyCommitted
	// NothingToDo: the chain's newest state is the rewind's target without it; nothing was written.
	NothingToDo
)

// String names the outcome for logs.
func (o Outcome) String() string {
	switch o {
	case Committed:
		return "committed"
	case AlreadyCommitted:
		return "already committed"
	case NothingToDo:
		return "nothing to do"
	}
	return "unknown"
}

// Refusals of Commit, Rewind and the fences: final for the task that asked. Each is returned only after the
// head was read from storage.
var (
	// ErrStaleEpoch: the task's epoch is below the head's.
	ErrStaleEpoch = errors.New("epoch is older than the chain's")
	// ErrClosed: a close stands above; the lineage is fenced.
	ErrClosed = errors.New("lineage is closed by a failover")
	// ErrStaleOpen: the task names another open than the newest.
	ErrStaleOpen = errors.New("task was issued under another open")
	// ErrBaseAhead: the base is above the chain's state ordinal; the host must resync.
	ErrBaseAhead = errors.New("base is ahead of the chain")
	// ErrNoBase: a point needs a base manifest in the chain.
	ErrNoBase = errors.New("chain has no base yet")
	// ErrOrdinalUsed: the ordinal is not above the highest ever used, and is not in the chain as the same thing.
	ErrOrdinalUsed = errors.New("ordinal was used or passed already")
	// ErrPassOrder: a task of a pass that is not the newest thing in the chain, or that disagrees with it.
	ErrPassOrder = errors.New("pass is not the one in progress")
	// ErrHeadMoved: the proposal must follow an exact manifest, and another one did.
	ErrHeadMoved = errors.New("head moved")
	// ErrNotFenced: an open or rewind without its failover's close as the newest fence.
	ErrNotFenced = errors.New("failover does not hold the fence")
	// ErrReopened: the failover's open is in the chain; its close fences nothing any more.
	ErrReopened = errors.New("failover ended: its open is in the chain")
	// ErrDiskReplaced: a disk was replaced as a whole since the rewind's target. Such a point can be materialised, not
	// rewound to.
	ErrDiskReplaced = errors.New("a disk was replaced since that point")
	// ErrRetired: the number committed is below the floor or in a retired range.
	ErrRetired = errors.New("sequence number is retired")
)

// IsRefusal reports whether err is a final refusal of Commit: repeating the same task cannot succeed.
// ErrHeadMoved is one too: its proposal has to be computed again.
func IsRefusal(err error) bool {
	for _, r := range []error{ErrStaleEpoch, ErrClosed, ErrStaleOpen, ErrBaseAhead, ErrNoBase, ErrOrdinalUsed,
		ErrPassOrder, ErrHeadMoved, ErrNotFenced, ErrReopened, ErrDiskReplaced} {
		if errors.Is(err, r) {
			return true
		}
	}
	return false
}

// Other errors of this package.
var (
	// ErrInvalid: an argument or a stored object breaks the format.
	ErrInvalid = errors.New("invalid")
	// ErrCorrupt: storage holds something the format forbids: a gap, a broken hash link, a wrong checksum.
	ErrCorrupt = errors.New("replica is corrupt")
	// ErrTampered: a page blob is not as this package left it: missing, replaced, of another size, with a number that the
	// chain does not explain, or written to by somebody else. Nothing was written over it; only a resync or a person can go
	// on. It is ErrCorrupt too.
	ErrTampered = fmt.Errorf("a replica disk was changed by somebody else: %w", ErrCorrupt)
	// ErrNoLineage: the lineage has no journal container.
	ErrNoLineage = errors.New("no such lineage")
	// ErrNotFound: no such point or manifest, or it was retired.
	ErrNotFound = errors.New("not found in the chain")
	// ErrContention: the commit lost more races than its bound; try again later.
	ErrContention = errors.New("too many concurrent commits")
	// ErrUnknownOutcome: storage did not say whether the write happened, and reading did not show it. Try again.
	ErrUnknownOutcome = errors.New("outcome unknown")
	// ErrBusy: another applier holds a disk's lease; try again after it expires (60 s at most).
	ErrBusy = errors.New("another applier holds the lease")
	// ErrLeaseLost: the applier's lease was taken, or the number changed under it; it stopped.
	ErrLeaseLost = errors.New("applier lost its lease")
	// ErrNotAtRest: a checkpoint was asked for, but a disk is not at rest at that manifest.
	ErrNotAtRest = errors.New("disks are not at rest at this manifest")
	// ErrNotReachable: no kept checkpoint and journals lead to the point.
	ErrNotReachable = errors.New("point cannot be rebuilt from what is kept")
	// ErrVoid: the checkpoint was voided and will never exist.
	ErrVoid = errors.New("checkpoint is void")
)

// Pass names one task of a pass: task I of K (1-based) of the pass with that ordinal.
// A comparing pass counts its empty first partial as one of the K.
type Pass struct {
	Ordinal Ordinal `json:"ordinal"`
	I       uint32  `json:"i"`
	K       uint32  `json:"k"`
}

// Disk is one disk in a manifest.
type Disk struct {
	// ID is stable within the lineage: 1 to 64 of [a-z0-9-].
	ID string `json:"id"`
	// Gen counts replacements of the whole disk, from 1.
	Gen uint32 `json:"gen"`
	// Size is the virtual size in bytes, a multiple of 512.
	Size int64 `json:"size"`
	// State is a note of the source (up to 256 bytes), not interpreted here.
	State string `json:"state,omitempty"`
	// Segments in ascending order of their extents, none overlapping. A full disk may have many.
	Segments []Segment `json:"segments,omitempty"`
}

// Container says which of the lineage's containers holds a segment.
type Container string

// The containers a segment may be in.
const (
	Journal Container = "journal" // points
	Staging Container = "staging" // passes
)

// Segment names a stored segment. PutSegment returns it; a manifest lists it.
type Segment struct {
	Name      string    `json:"name"`
	Container Container `json:"container"`
	Bytes     int64     `json:"bytes"`  // of the stored object
	SHA256    string    `json:"sha256"` // of the stored object, hex
}

// Point is a recovery point as Points lists it.
type Point struct {
	Ordinal     Ordinal
	Seq         Seq
	Kind        Kind // KindBase or KindPoint
	CutTime     time.Time
	Consistency Consistency
	Bytes       int64 // stored bytes of its segments
	// Signals say what its changes looked like; nil when unknown.
	Signals *Signals
	// Stored is when its manifest was stored, by storage time: ages are measured by it.
	Stored time.Time
	// Processed: the replica's page blobs have taken it in. Checkpointed: a checkpoint marks exactly it.
	Processed, Checkpointed bool
	// Checkpoint is the manifest of the checkpoint it is reached from; 0 when the chain is replayed from its beginning.
	Checkpoint Seq
	// Tier is why it is kept, by the Keep of the last Retain; TierNone when the next one retires it.
	Tier Tier
	// Pins at its manifest.
	Pins []Pin
}

func isHex(s string, n int) bool {
	if len(s) != n {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
