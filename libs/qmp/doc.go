// Package qmp talks to QEMU's monitor ([Monitor]) and to the guest agent ([Agent]) over their unix sockets. Both are JSON
// lines; both serve one client at a time and leave a second one in silence, so the first answer is waited for with a
// deadline of its own and its absence is called by name.
//
// Errors: an answer of the other side is a *[CommandError]. Everything that leaves the outcome unknown (no connection, a
// broken one, no answer in time) has the reason HYPERVISOR_UNREACHABLE; whoever changes things must look before it
// repeats. Reconnecting is the caller's; [Pool] shares one connection per socket.
package qmp
