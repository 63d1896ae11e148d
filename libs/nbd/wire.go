package nbd

import "github.com/landfall-dr/landfall/libs/nbd/internal/wire"

// Bounds. A server that goes beyond one breaks the protocol, or is cut short where the protocol allows that.
const (
	// MaxPayload is the most that one request reads or writes, in bytes; longer calls are split.
	MaxPayload = wire.MaxPayload
	// maxInFlight bounds the requests in flight on a connection, those that were given up unanswered included.
	maxInFlight = 32
	// maxOptionReply is the longest answer to an option, in bytes; maxOptionReplies the most answers to one.
	maxOptionReply   = 64 << 10
	maxOptionReplies = 64
	// maxPieces is the most pieces that a read reply may lie in at any moment, not yet joined to each other.
	maxPieces = 1024
	// maxExtents is the most extents taken of one block status reply; what follows is asked for again. QEMU sends as many.
	maxExtents = 128 << 10
	// maxStatusReply is the longest block status chunk, in bytes.
	maxStatusReply = 64 << 20
	// maxErrorReply is the longest error chunk, in bytes.
	maxErrorReply = 64 << 10
	// statusStep is the most that one block status request asks about, in bytes (a length has 32 bits).
	statusStep = 1 << 31
	// discardStep is the most that one trim or write-zeroes asks for, in bytes.
	discardStep = 1 << 30
	// maxSize is the largest export, in bytes.
	maxSize = 1 << 62
)

// Flags of extents.
const (
	// Dirty is the flag of "qemu:dirty-bitmap:..." extents that changed.
	Dirty = 1 << 0
	// Hole is the flag of ContextAllocation extents without space; what they read as is told by Zero.
	Hole = wire.StateHole
	// Zero is the flag of ContextAllocation extents that read as zeros.
	Zero = wire.StateZero
)

// ContextAllocation is the context that tells holes and zeros from data. Servers whose format has no map call all data.
const ContextAllocation = wire.ContextAllocation
