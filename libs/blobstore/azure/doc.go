// Package azure is the blobstore backend on Azure Blob Storage. It is the only package that knows the SDK.
//
// # Retries
//
// The SDK's own retries are off: it repeats calls whose answer was lost and then reports the trace of its first try as
// somebody else's (409 on our own blob, 412 on our own ETag). Here every call is repeated with jittered exponential delays,
// a Retry-After obeyed, until it is answered for good, its context ends or Settings.RetryFor has passed. Every try has its
// own time-out, made of a fixed part and the size over the slowest link that is accepted. When a try was not answered, and a
// later one is refused by a condition, storage is read back:
//
//   - Put and CreatePages leave a random id of the call in the blob's metadata (hidden from callers): the blob with our id
//     is ours, whatever else looks alike.
//   - WritePages and ClearPages under IfMatch compare the pages.
//   - SetSequence looks at the number, and never uses "increment".
//   - Delete, DeleteSnapshot and ReleaseLease find the thing gone.
//   - SnapshotPages may leave one snapshot that nobody knows; ListSnapshots shows it.
//
// Where reading back cannot tell, the error is outside the sentinels: the outcome is unknown, as the interface says.
//
// # Conditions that the service does not have
//
// IfSequence on SetSequence, SnapshotPages and Delete is checked by reading the blob and binding the call to the ETag that
// was read; a write in between makes it read again.
//
// # What callers may rely on
//
// A reader from Get fetches pieces of at most 4 MiB, one ahead, all bound to the ETag of the first. Content of more than one
// piece that is overwritten or deleted while it is read ends in an error, never in a mixture. Properties returned by page
// writes take size and metadata from a bounded memory of what the blob was created with: both are fixed at creation.
// Store.Now is the service's Date header, carried on by the monotonic clock and never ahead of it.
package azure
