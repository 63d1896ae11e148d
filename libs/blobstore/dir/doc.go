// Package dir keeps a blobstore.Store in a folder.
//
// It promises what Azure promises, to several processes of one machine that open the same folder at the
// same time, and to a process that is killed at any instruction: conditions (create-only, If-Match,
// sequence number, lease) hold atomically with the write they guard; a block blob is visible whole or not
// at all; what the interface calls durable has been fsynced. docs/formats/dir-store.md describes every file.
//
// How it holds together:
//
//   - Locks are byte ranges of one lock file, four bytes per blob name (lock.go). They belong to an open
//     file description, so the kernel drops them with the process, and they exclude goroutines as well as
//     processes. A page write holds its blob shared, everything that changes what a condition looks at
//     holds it exclusively: a write that passed its check lands before the condition can change.
//   - Block blobs are written to a session's own temporary folder, fsynced and linked (create-only) or
//     renamed into place. Their modification time is storage time and their ETag.
//   - A page blob is a folder: a sparse data file, a state file with two alternating checksummed slots
//     and two counters of started and finished page writes (state.go). The counters are part of the ETag,
//     so it changes with every write at the price of two atomic additions to a shared mapping; a writer that
//     dies between them leaves them unequal, and the next exclusive holder turns that into a new ETag.
//   - The first page write after SetSequence makes a "dirty" mark durable first, so that also after a power
//     loss, when counters may be lost, an ETag from before the write never matches again.
//   - Temporary files belong to a session whose lock is held as long as its process lives; Open removes
//     the folders of sessions whose lock is free, never a live one's, whatever its age or pid.
//
// Limits: one machine (the counters are shared memory); a case-sensitive or case-preserving file system
// with time stamps of 100 ns or finer (Open checks).
package dir
