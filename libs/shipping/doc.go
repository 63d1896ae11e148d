// Package shipping moves the bytes of a disk from its host into segments of
// the journal. It is what the workers that pull data have in common: the
// uploader, who ships what a host says has changed, and the resync-engine, who
// ships what it found to differ.
//
//   - [Source] reads one disk of one host: changes of a point, ranges of a pass,
//     digests. A broken stream goes on where it broke, a bounded number of times;
//     every run is checked against its checksum and its place.
//   - [Pool] is the bounded set of buffers in which a process builds segments.
//   - [Packer] turns ascending runs into segments: zero blocks of 4 KiB are taken
//     out, a full segment is stored while the next one fills.
//   - [Reason] names the errors of all this for operators.
//
// It commits nothing and decides nothing: which manifest names the segments is
// the caller's business.
package shipping
