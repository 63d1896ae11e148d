// Package inside is all that runs in the lab guest: one program under several
// names (cmd/landfall-guest). It only does something on Linux.
//
//   - As process 1 of the initial RAM file system (stage1_linux.go): loads
//     modules, finds the OS disk by its label on whatever bus, notes whether
//     its journal has to be replayed, mounts it, goes over to it.
//   - As process 1 of the OS disk (init_linux.go): mounts the data disk,
//     verifies, reports, listens to the power button, starts the guest agents
//     and the writer, reaps, powers down in order. It is a program of ours and
//     not a service manager, so that READY can mean exactly "a power button
//     pressed now is seen and the agents have their ports open": a button
//     pressed before anyone listens is lost without trace.
//   - `landfall-guest writer`: the two-disk ledger and the files.
//   - `landfall-guest verify|write|latency|rate|poweroff|reboot`: on demand,
//     through the guest agent's guest-exec. `shutdown` and `poweroff` are
//     links to it, because the agent's guest-shutdown calls /sbin/shutdown.
package inside
