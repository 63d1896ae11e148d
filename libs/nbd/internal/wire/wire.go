// Package wire has the numbers of the NBD protocol, in one place for the client (package nbd) and the server (package
// nbd/server): https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md.
package wire

// Magic numbers that begin a message.
const (
	// MagicServer is the first word of a server, "NBDMAGIC".
	MagicServer = 0x4e42444d41474943
	// MagicOption is its second word, "IHAVEOPT", and begins each option of a client.
	MagicOption = 0x49484156454f5054
	// MagicReply begins the reply to an option.
	MagicReply = 0x0003e889045565a9
	// MagicRequest begins a request.
	MagicRequest = 0x25609513
	// MagicSimple begins a simple reply.
	MagicSimple = 0x67446698
	// MagicChunk begins a chunk of a structured reply.
	MagicChunk = 0x668e33ef
)

// Flags of the handshake.
const (
	FlagFixedNewstyle = 1 << 0
	FlagNoZeroes      = 1 << 1
)

// Options of the handshake.
const (
	OptExportName      = 1
	OptAbort           = 2
	OptList            = 3
	OptInfo            = 6
	OptGo              = 7
	OptStructuredReply = 8
	OptListMeta        = 9
	OptSetMeta         = 10
)

// Replies to options. RepErr is the bit of those that refuse.
const (
	RepAck        = 1
	RepServer     = 2
	RepInfo       = 3
	RepMeta       = 4
	RepErr        = 1 << 31
	RepErrUnsup   = RepErr + 1
	RepErrPolicy  = RepErr + 2
	RepErrInvalid = RepErr + 3
	RepErrTLS     = RepErr + 5
	RepErrUnknown = RepErr + 6
	RepErrTooBig  = RepErr + 9
)

// Kinds of information about an export.
const (
	InfoExport    = 0
	InfoBlockSize = 3
)

// Transmission flags of an export.
const (
	ExportHasFlags  = 1 << 0
	ExportReadOnly  = 1 << 1
	ExportFlush     = 1 << 2
	ExportFUA       = 1 << 3
	ExportTrim      = 1 << 5
	ExportZeroes    = 1 << 6
	ExportDF        = 1 << 7
	ExportMultiConn = 1 << 8
	ExportFastZero  = 1 << 11
)

// Commands.
const (
	CmdRead        = 0
	CmdWrite       = 1
	CmdDisconnect  = 2
	CmdFlush       = 3
	CmdTrim        = 4
	CmdWriteZeroes = 6
	CmdBlockStatus = 7
)

// Flags of commands.
const (
	CmdFlagFUA      = 1 << 0
	CmdFlagNoHole   = 1 << 1
	CmdFlagDF       = 1 << 2
	CmdFlagReqOne   = 1 << 3
	CmdFlagFastZero = 1 << 4
)

// Chunks of structured replies. ChunkDone is the flag of the last one, ChunkIsError the bit of those that refuse.
const (
	ChunkDone        = 1 << 0
	ChunkNone        = 0
	ChunkData        = 1
	ChunkHole        = 2
	ChunkBlockStatus = 5
	ChunkIsError     = 1 << 15
	ChunkError       = ChunkIsError + 1
	ChunkErrorOffset = ChunkIsError + 2
)

// Context base:allocation and the flags of its extents.
const (
	ContextAllocation = "base:allocation"
	StateHole         = 1 << 0
	StateZero         = 1 << 1
)

// Numbers of errors.
const (
	EPERM     = 1
	EIO       = 5
	EINVAL    = 22
	ENOSPC    = 28
	EOVERFLOW = 75
	ENOTSUP   = 95
	ESHUTDOWN = 108
)

// Lengths in bytes.
const (
	// RequestSize is the head of a request.
	RequestSize = 28
	// MaxPayload is the most that one request reads or writes; every peer takes as much.
	MaxPayload = 32 << 20
	// MaxName is the longest export or context name.
	MaxName = 4096
)
