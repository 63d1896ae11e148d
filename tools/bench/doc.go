// Package bench measures the product beside its peers on the same machine in
// the same minutes, and checks every result: a fast wrong copy is a failure.
//
// A suite is a list of rows. A row makes its input from a seed, runs the product
// and the peers in turn (A B A B), and reports of each the medians of wall time,
// processor time (user and system, servers included), peak memory and bytes in
// and out, with the figures the row is about. Rows of the product's own parts
// run the Go benchmarks that live beside the code and repeat their figures.
//
// Rows whose names begin with guest- boot the lab guest (tools/guest) under
// software emulation: failovers, increments and bytes with `landfall up --qemu`
// and its command line; cuts, freezes, the guest's own writes and the reading of
// changes with the driver and the change-tracker alone, so that a row chooses the
// moment and the number of cuts. They are skipped, with what is missing, where
// QEMU or a tool of the guest's builder is not installed. The processor time of
// QEMU counts in them, and the guest's own work is part of it: so its writer rests
// where it is not what is measured.
//
// Rows whose names begin with st- store in a storage account: libs/blobstore/azurefake
// as a sink with the limits of a link or of a page blob, or Azurite. Each side is a
// process of its own, this program started again as a worker: the sink; the site, with
// a change-tracker, the event server and the uploader's role ship; the applier; the
// restorer. The product ships segments into the journal (that is when a point is
// received) and applies them to the page blob afterwards, both are reported; azcopy
// (tools/bench/azcopy) writes the page blob at once. Result and source are compared by
// the sink's digest of a page blob whose pages were written once, else byte for byte.
//
// Wall times of a busy machine say little: compare ratios within one report.
// Processor time, bytes and memory are the firm figures. Memory is measured on
// Linux only, and is reported as absent elsewhere.
package bench
