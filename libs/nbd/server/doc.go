// Package server serves disks by the NBD protocol: fixed newstyle negotiation, structured replies with the
// base:allocation context, and every command that a guest needs. A disk that cannot be written is exported read-only. Several connections may use one export at once;
// a flush on any of them covers the writes that were answered on all.
//
// Everything is bounded: options and their length, payloads, requests and bytes in flight per connection,
// connections, the time of a negotiation and of taking a reply. Space that a disk does not hold is sent as a hole and
// never read, if the client takes structured replies. TLS is not offered; listen on loopback or a Unix socket.
package server
