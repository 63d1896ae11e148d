// Package changetracker runs on each host, beside the disks: it is the only writer of the images it serves to guests by
// NBD, keeps what changed between points in write logs, and reads and hashes ranges for uploaders and resync engines.
// It never decides when a point is cut, and never sends anything anywhere.
//
// Where a hypervisor has the disks and the list of changes (QEMU's dirty bitmaps), it reads points and passes from that
// hypervisor's NBD exports instead: AttachSource. Both kinds of machine are read through one interface, source.
//
// design.md has the invariants and the tables of interruptions; docs/formats/sidecar.md, point-record.md and source.md
// specify the files. The domain (Tracker and below) knows neither gRPC nor telemetry; server.go decodes, calls it and
// encodes.
//
// Events: none. The scheduler learns by asking.
package changetracker
