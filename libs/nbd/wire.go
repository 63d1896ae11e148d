package nbd

// Numbers of the protocol.
const (
	magicServer  = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption  = 0x49484156454f5054 // "IHAVEOPT"
	magicReply   = 0x0003e889045565a9
	magicRequest = 0x25609513
	magicSimple  = 0x67446698
	magicChunk   = 0x668e33ef

	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1

	optGo              = 7
	optStructuredReply = 8
	optSetMeta         = 10

	repAck        = 1
	repInfo       = 3
	repMeta       = 4
	repErr        = 1 << 31
	repErrUnsup   = repErr + 1
	repErrPolicy  = repErr + 2
	repErrTLS     = repErr + 5
	repErrUnknown = repErr + 6

	infoExport    = 0
	infoBlockSize = 3

	exportReadOnly  = 1 << 1
	exportFlush     = 1 << 2
	exportFUA       = 1 << 3
	exportTrim      = 1 << 5
	exportZeroes    = 1 << 6
	exportDF        = 1 << 7
	exportMultiConn = 1 << 8

	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	cmdFlagFUA    = 1 << 0
	cmdFlagNoHole = 1 << 1
	cmdFlagDF     = 1 << 2

	chunkDone        = 1 << 0
	chunkNone        = 0
	chunkData        = 1
	chunkHole        = 2
	chunkBlockStatus = 5
	chunkIsError     = 1 << 15
	chunkError       = chunkIsError + 1
	chunkErrorOffset = chunkIsError + 2
)

// Bounds. A server that goes beyond one breaks the protocol, or is cut short where the protocol allows that.
const (
	// MaxPayload is the most that one request reads or writes, in bytes; longer calls are split.
	MaxPayload = 32 << 20
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
	// maxName is the longest export name and context name, in bytes.
	maxName = 4096
	// maxSize is the largest export, in bytes.
	maxSize = 1 << 62
)

// Flags of extents.
const (
	// Dirty is the flag of "qemu:dirty-bitmap:..." extents that changed.
	Dirty = 1 << 0
	// Hole is the flag of ContextAllocation extents without space; what they read as is told by Zero.
	Hole = 1 << 0
	// Zero is the flag of ContextAllocation extents that read as zeros.
	Zero = 1 << 1
)

// ContextAllocation is the context that tells holes and zeros from data. Servers whose format has no map call all data.
const ContextAllocation = "base:allocation"
