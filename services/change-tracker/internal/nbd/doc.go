// Package nbd serves block devices to guests by the NBD protocol (fixed
// newstyle, doc/proto.md of the NBD project): read, write, flush, FUA, trim,
// write-zeroes, block status of base:allocation, several connections.
package nbd
