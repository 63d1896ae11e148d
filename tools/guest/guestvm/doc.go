// Package guestvm runs lab guests in QEMU for tests, as a host would, and
// gives the lab its own view of them.
//
// A machine has two monitors and two agents: one of each belongs to the
// system under test (QMPPath, AgentPath), since a socket serves one client,
// and one to the lab. The lab follows the steps that the guest acknowledges,
// reads the console, runs commands, presses the power button and kills.
//
// Software emulation is forced: /dev/kvm may be there and hang.
package guestvm
