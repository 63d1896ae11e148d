// Package nbd is a client of the Network Block Device protocol: fixed newstyle handshake, structured replies, block
// status by named contexts, and many requests in flight on one connection.
//
// It is made for reading what others export (a hypervisor's frozen disks with the list of their changes) and trusts
// the other side in nothing: a context that a caller needs and the server did not acknowledge is an error and never
// "nothing changed"; replies are checked to cover exactly what was asked; no length that a server tells makes the
// client allocate or wait without bound.
//
//	c, err := nbd.Dial(ctx, "nbd+unix:///os?socket=/run/qemu.nbd", "qemu:dirty-bitmap:b7")
//	for e, err := range c.Extents(ctx, "qemu:dirty-bitmap:b7", extent.Range{Len: c.Size()}) { ... }
//	err = c.ReadAt(ctx, buf, e.Off)
//
// The protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md. Not supported: TLS, oldstyle, servers
// without NBD_OPT_GO, 64-bit extended headers.
package nbd
