// Package hrl writes and reads replica logs in the format that Microsoft publishes as [MS-HRL], version 2: every
// write of data to a disk, with its data, in the order it happened.
//
// A log is a 4,096-byte header, then data and metadata blocks in turn. Data comes first, then the block that
// describes it, so that writing is purely sequential. A block has a 32-byte head and slots of 32 bytes that are
// filled from its end backwards; each block says how far behind it the previous one lies. While the log is open
// the header's EOLLocation is zero; closing sets it. Log names its predecessor by PreviousUniqueId, which chains
// the logs of one disk. docs/formats/hrl.md describes every field and where this package is stricter than the
// specification.
//
// # Writer
//
// Create begins a log, Append adds one write, Flush makes everything appended provable and durable, Close seals.
// Appending is one positioned write of the data; a metadata block follows every 127 entries. Space for the block
// that will describe the appended entries is reserved before their data is written, so a full volume never takes
// entries already accepted: Append returns ErrFull, and Flush and Close still succeed.
//
// # Reader
//
// Open checks the header, Reader.Blocks yields blocks in the order written, each with its entries and the place of
// their data in the file; data is never held. A closed log must be right to the last byte: anything else is a
// *CorruptError naming what is wrong and where. A log that was not closed yields the longest prefix that can be
// proved whole (see Reader.Blocks for the algorithm and its bounds) and Reader.Tail says where proof ended.
package hrl
